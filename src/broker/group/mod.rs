//! Shared subscriptions, section 4.8: the subscribers of `$share/{ShareName}/{filter}`.
//!
//! A group is a session of its own: it has a mailbox and, once a member is durable, an inbox in the
//! store. Its dispatcher empties the mailbox and gives each message to one member that is
//! online and has room in its window. What a member leaves unacknowledged goes to another one; while
//! no member is online, messages wait in the group's inbox, not in a member's.
//!
//! In a cluster one node dispatches, and members take [`seats`](super::seats) there from wherever they
//! are connected: see [`dispatch`].

pub(super) mod dispatch;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use self::dispatch::{Handing, SeatKey, Serving};
use super::Node;
use super::consumer::{Consumer, Inbox};
use super::flush::Additions;
use super::mailbox::Mailbox;
use crate::metrics::Arrival;
use crate::mqtt::topic::{SubscribeOptions, SubscriptionFilter};
use crate::mqtt::{Message, QoS};
use crate::session::{Delivery, IN_MEMORY, Origin};
use crate::store::{MessageId, SessionId};

/// How long a dispatcher waits after an error of the store.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The subscribers of one shared subscription.
pub(crate) struct Group {
    filter: SubscriptionFilter,
    mailbox: Arc<Mailbox>,
    /// Whether nodes share it, and when it was made then: a later one of the same name has a greater
    /// epoch.
    shared_since: Option<u64>,
    members: Mutex<Members>,
    /// Something that a dispatcher waits for before it begins may have come.
    may_begin: Notify,
    /// Numbers messages that are held in memory only.
    next_in_memory: AtomicU64,
}

#[derive(Default)]
struct Members {
    all: Vec<Member>,
    /// Whose turn it is.
    turn: usize,
    /// Given to a member and not yet acknowledged.
    given: HashMap<MessageId, Given>,
    /// To be given to another member, before anything else.
    returned: BTreeMap<MessageId, Delivery>,
    /// Not known to be taken over or not, and to be read again.
    doubtful: Vec<MessageId>,
    /// Exchanges of QoS 2 that a member began and has to finish itself, [MQTT-4.8.2-5].
    bound: HashMap<MessageId, Bound>,
    /// Received by a member that is gone, and to be settled when they are read again.
    finished: HashSet<MessageId>,
    /// Given to members by way of their nodes, and to be sent there.
    handing: Vec<Handing>,
    /// Set while this node dispatches a group that nodes share.
    serving: Option<Serving>,
    dispatcher: Option<Waker>,
    /// Whether somebody takes messages out of the mailbox, or is about to.
    consuming: bool,
    /// For the dispatcher to take up.
    attached: Option<Consumer>,
    closed: bool,
}

struct Member {
    client_id: Arc<str>,
    options: SubscribeOptions,
    identifiers: Option<Arc<[u32]>>,
    online: Option<Online>,
}

/// A message that a member has.
struct Given {
    delivery: Delivery,
    client_id: Arc<str>,
    /// The seat that it was given to, if nodes share the group; none once that is empty.
    seat: SeatKey,
}

/// A message that one member alone may have, before it is read from the inbox again.
#[derive(Clone)]
struct Bound {
    client_id: Arc<str>,
    /// The member has it already.
    held_by: Option<SeatKey>,
}

struct Online {
    place: Place,
    /// QoS 1 and 2 messages that it may have at a time.
    window: u16,
    given: u16,
}

/// How a member is given messages.
enum Place {
    /// By its mailbox.
    Here(Arc<Mailbox>),
    /// By way of its node, which may be this one.
    Seat {
        key: SeatKey,
        /// The epoch of its session.
        since: u64,
    },
}

/// How a client takes part in a group.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) client_id: Arc<str>,
    pub(crate) durable: bool,
    pub(crate) options: SubscribeOptions,
    pub(crate) identifier: Option<u32>,
}

impl Group {
    pub(crate) fn new(
        filter: SubscriptionFilter,
        mailbox: Arc<Mailbox>,
        bound: HashMap<MessageId, Arc<str>>,
    ) -> Self {
        let bound = bound.into_iter().map(|(id, client_id)| {
            let held_by = None;
            (id, Bound { client_id, held_by })
        });
        let members = Members {
            bound: bound.collect(),
            ..Members::default()
        };
        mailbox.set_begun(members.last_bound());
        Self {
            members: Mutex::new(members),
            ..Self::empty(filter, mailbox, None)
        }
    }

    fn empty(filter: SubscriptionFilter, mailbox: Arc<Mailbox>, shared_since: Option<u64>) -> Self {
        Self {
            filter,
            mailbox,
            shared_since,
            members: Mutex::default(),
            may_begin: Notify::new(),
            next_in_memory: AtomicU64::new(1),
        }
    }

    pub(crate) fn filter(&self) -> &SubscriptionFilter {
        &self.filter
    }

    pub(crate) fn session(&self) -> SessionId {
        self.mailbox.session
    }

    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    /// The client ids of its members.
    pub(crate) fn member_ids(&self) -> Vec<Arc<str>> {
        let members = self.members.lock();
        let ids = members.all.iter().map(|member| member.client_id.clone());
        ids.collect()
    }

    /// How a client has subscribed, if it has.
    pub(super) fn terms_of(&self, client_id: &str) -> Option<(SubscribeOptions, Option<u32>)> {
        let members = self.members.lock();
        let mut all = members.all.iter();
        let member = all.find(|member| *member.client_id == *client_id)?;
        let identifiers = member.identifiers.as_ref();
        let identifier = identifiers.and_then(|all| all.first().copied());
        Some((member.options, identifier))
    }

    pub(crate) fn member_count(&self) -> usize {
        self.members.lock().all.len()
    }

    /// Whether a message of this QoS goes through the group's inbox.
    pub(crate) fn stores(&self, qos: QoS) -> bool {
        qos > QoS::AtMostOnce && self.mailbox.is_durable() && self.maximum_qos() > QoS::AtMostOnce
    }

    fn maximum_qos(&self) -> QoS {
        if self.shared_since.is_some() {
            // Whoever has a seat elsewhere may want it.
            return QoS::ExactlyOnce;
        }
        let members = self.members.lock();
        members
            .all
            .iter()
            .map(|member| member.options.maximum_qos)
            .max()
            .unwrap_or_default()
    }

    /// Adds a member, or changes its options.
    pub(super) fn join(
        &self,
        membership: Membership,
        online: Option<(Arc<Mailbox>, u16)>,
        node: &Node,
    ) {
        {
            let mut members = self.members.lock();
            let member = Member {
                client_id: membership.client_id,
                options: membership.options,
                identifiers: membership
                    .identifier
                    .map(|identifier| Arc::from([identifier])),
                online: online.map(|(mailbox, window)| Online {
                    place: Place::Here(mailbox),
                    window,
                    given: 0,
                }),
            };
            match members
                .all
                .iter_mut()
                .find(|known| known.client_id == member.client_id)
            {
                Some(known) => {
                    known.options = member.options;
                    known.identifiers = member.identifiers;
                }
                None => members.all.push(member),
            }
        }
        if membership.durable {
            self.mailbox.make_durable();
        }
        self.begin_to_consume(node);
    }

    /// A member's connection is there: it can be given messages. Those of an exchange that it has
    /// to finish are given to it again.
    pub(super) fn come_online(
        &self,
        client_id: &str,
        mailbox: &Arc<Mailbox>,
        window: u16,
        node: &Node,
    ) {
        {
            let mut members = self.members.lock();
            let mut held = members.held_by(client_id);
            held.sort_unstable();
            let given = u16::try_from(held.len()).unwrap_or(u16::MAX);
            for id in held {
                let delivery = members.given[&id].delivery.clone();
                mailbox.push_from_group(members.tailored(delivery, client_id));
            }
            if let Some(member) = members
                .all
                .iter_mut()
                .find(|member| &*member.client_id == client_id)
            {
                member.online = Some(Online {
                    place: Place::Here(mailbox.clone()),
                    window,
                    given,
                });
            }
        }
        self.begin_to_consume(node);
    }

    /// From now on messages are kept for the members that are online, also while the dispatcher has
    /// not yet had its turn.
    fn begin_to_consume(&self, node: &Node) {
        {
            let mut members = self.members.lock();
            members.wake_dispatcher();
            if members.consuming || !members.is_anybody_online() {
                return;
            }
            members.consuming = true;
        }
        // Not while the members are locked: publishers lock the flush before them.
        let consumer = node.attach(&self.mailbox, Inbox::Known);
        let mut members = self.members.lock();
        members.attached = Some(consumer);
        members.wake_dispatcher();
    }

    /// A member's connection is gone. All that it was given goes to others, but for the exchanges
    /// of QoS 2 that it has begun, if its session lives on.
    pub(super) fn go_offline(&self, client_id: &str, begun: &[MessageId]) {
        let mut members = self.members.lock();
        if let Some(member) = members
            .all
            .iter_mut()
            .find(|member| &*member.client_id == client_id)
        {
            member.online = None;
        }
        let mut held: Vec<_> = members.held_by(client_id);
        held.retain(|id| !begun.contains(id));
        for id in held {
            members.give_back(id);
        }
        for id in begun {
            let bound = Bound {
                client_id: client_id.into(),
                held_by: None,
            };
            members.bound.insert(*id, bound);
        }
        self.mailbox.set_begun(members.last_bound());
        members.wake_dispatcher();
    }

    /// A member's subscription or session has ended: all that it was given goes to others. Returns
    /// whether it was the last member.
    pub(super) fn leave(&self, client_id: &str) -> bool {
        let mut members = self.members.lock();
        members.all.retain(|member| &*member.client_id != client_id);
        members.turn = 0;
        for id in members.held_by(client_id) {
            members.give_back(id);
        }
        members
            .bound
            .retain(|_, bound| &*bound.client_id != client_id);
        self.mailbox.set_begun(members.last_bound());
        members.closed = members.all.is_empty();
        members.wake_dispatcher();
        members.closed
    }

    /// Ends the dispatcher.
    pub(super) fn close(&self) {
        let mut members = self.members.lock();
        members.closed = true;
        members.wake_dispatcher();
        self.may_begin.notify_waiters();
    }

    /// Puts in a message that goes through the inbox; with a `guard`, if that session is still this
    /// node's when it is written.
    pub(super) fn enqueue(
        &self,
        message: &Message,
        arrival: Arrival,
        additions: &mut Additions<'_>,
        guard: Option<SessionId>,
    ) {
        let delivery = self.delivery(message, Origin::Memory, arrival);
        additions.enqueue(&self.mailbox, delivery, guard);
    }

    /// Puts in a message that is held in memory only.
    pub(super) fn push(&self, message: &Message, arrival: Arrival) -> bool {
        let hlc = self.next_in_memory.fetch_add(1, Ordering::Relaxed);
        let id = MessageId {
            hlc,
            node: IN_MEMORY,
            index: 0,
        };
        let origin = Origin::Group(self.session(), id);
        self.mailbox.push(self.delivery(message, origin, arrival))
    }

    /// A message as it is for whichever member gets it.
    pub(super) fn delivery(&self, message: &Message, origin: Origin, arrival: Arrival) -> Delivery {
        Delivery {
            message: message.clone(),
            qos: message.qos().min(self.maximum_qos()),
            retain: message.retain(),
            subscription_identifiers: None,
            origin,
            arrival,
        }
    }

    /// A member has taken over a message. Ignored if the group has given it to another one since.
    pub(crate) fn settle(&self, id: MessageId, client_id: &str, additions: &mut Additions<'_>) {
        {
            let mut members = self.members.lock();
            let holder = members.given.get(&id).map(|given| &given.client_id);
            let bound = || members.bound.get(&id).map(|bound| &bound.client_id);
            let holder = holder.or_else(bound);
            if holder.is_none_or(|holder| &**holder != client_id) {
                return;
            }
            members.bound.remove(&id);
            members.forget(id);
            members.wake_dispatcher();
        }
        if id.node != IN_MEMORY {
            additions.settle(&self.mailbox, &[id]);
        }
    }

    /// A member whose session has ended had received a message for certain, so that no other member
    /// may have it.
    pub(super) fn finish(&self, id: MessageId, additions: &mut Additions<'_>) {
        let mut members = self.members.lock();
        members.bound.remove(&id);
        if members.consuming && members.given.remove(&id).is_some() {
            drop(members);
            additions.settle(&self.mailbox, &[id]);
        } else {
            members.finished.insert(id);
        }
    }

    /// Gives messages to members until the last member has left.
    pub(super) async fn dispatch(self: Arc<Self>, node: Arc<Node>) {
        let mut consumer: Option<Consumer> = None;
        loop {
            let step =
                std::future::poll_fn(|context| self.poll_dispatch(&mut consumer, &node, context))
                    .await;
            if matches!(step, Step::Unreadable) {
                tokio::time::sleep(READ_AGAIN_AFTER).await;
                continue;
            }
            if let Some(ending) = consumer.take() {
                // Nobody is online: what is stored is read again later, the rest is gone.
                ending.detach();
                self.members.lock().forget_what_is_stored();
                node.store_partly_settled(&self.mailbox).await;
                self.members.lock().consuming = false;
                self.begin_to_consume(&node);
            }
            if matches!(step, Step::Closed) {
                return;
            }
        }
    }

    /// Ready when there is nobody left to give messages to.
    fn poll_dispatch(
        &self,
        consumer: &mut Option<Consumer>,
        node: &Arc<Node>,
        context: &mut Context<'_>,
    ) -> Poll<Step> {
        loop {
            {
                let mut members = self.members.lock();
                members.dispatcher = Some(context.waker().clone());
                if members.closed {
                    return Poll::Ready(Step::Closed);
                }
                if let Some(attached) = members.attached.take() {
                    *consumer = Some(attached);
                }
                if !members.is_anybody_online() {
                    if consumer.is_none() {
                        return Poll::Pending;
                    }
                    // Before anybody comes back: it is all read from the inbox again, also by whom
                    // an exchange has to be finished, and cannot be settled until then.
                    members.returned.clear();
                    members.given.retain(|id, _| id.node == IN_MEMORY);
                    return Poll::Ready(Step::NobodyOnline);
                }
                members.give_returned();
                let is_full = !members.returned.is_empty() || !members.has_room();
                self.hand_over(members, node);
                if is_full {
                    // An acknowledgement, or another member, wakes the dispatcher.
                    return Poll::Pending;
                }
            }
            let Some(taking) = consumer else {
                return Poll::Pending;
            };
            match taking.poll_ready(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => {
                    tracing::error!(event = "inbox_unreadable", group = %self.filter, %error);
                    return Poll::Ready(Step::Unreadable);
                }
                Poll::Ready(Ok(())) => {}
            }
            let Some(delivery) = taking.next() else {
                continue;
            };
            let over_limit =
                delivery.origin.place_in(self.session()).is_some() && self.mailbox.is_over_limit();
            let Origin::Group(_, id) = delivery.origin else {
                continue;
            };
            let mut members = self.members.lock();
            if let Some(bound) = members.bound.get(&id).cloned() {
                members.give_to_holder(id, delivery, bound);
                self.hand_over(members, node);
            } else if members.finished.remove(&id) || over_limit {
                drop(members);
                node.flusher.add().settle(&self.mailbox, &[id]);
            } else {
                members.returned.insert(id, delivery);
            }
        }
    }
}

enum Step {
    NobodyOnline,
    Unreadable,
    Closed,
}

impl Member {
    fn tailor(&self, delivery: &mut Delivery) {
        delivery.qos = delivery.qos.min(self.options.maximum_qos);
        delivery.retain = delivery.message.retain() && self.options.retain_as_published;
        delivery.subscription_identifiers = self.identifiers.clone();
    }
}

impl Members {
    fn wake_dispatcher(&mut self) {
        if let Some(dispatcher) = self.dispatcher.take() {
            dispatcher.wake();
        }
    }

    fn is_anybody_online(&self) -> bool {
        self.all.iter().any(|member| member.online.is_some())
    }

    fn has_room(&self) -> bool {
        self.all
            .iter()
            .filter_map(|member| member.online.as_ref())
            .any(|online| online.given < online.window)
    }

    /// Gives what waits in memory to members in turn, as long as they have room.
    fn give_returned(&mut self) {
        while let Some((&id, first)) = self.returned.first_key_value() {
            let count = self.all.len();
            let needs_room = first.qos > QoS::AtMostOnce;
            let fits = |member: &Member| {
                member
                    .online
                    .as_ref()
                    .is_some_and(|online| !needs_room || online.given < online.window)
            };
            let Some(place) = (0..count)
                .map(|step| (self.turn + step) % count)
                .find(|place| fits(&self.all[*place]))
            else {
                return;
            };
            self.turn = (place + 1) % count;
            let Some(mut delivery) = self.returned.remove(&id) else {
                return;
            };
            let original = delivery.clone();
            let member = &mut self.all[place];
            member.tailor(&mut delivery);
            let Some(online) = &mut member.online else {
                return;
            };
            if delivery.qos == QoS::AtMostOnce && id.node == IN_MEMORY {
                delivery.origin = Origin::Memory;
            } else {
                online.given += 1;
                let given = Given {
                    delivery: original,
                    client_id: member.client_id.clone(),
                    seat: online.seat(),
                };
                self.given.insert(id, given);
            }
            online.push(id, delivery, &mut self.handing);
        }
    }

    /// A message of an exchange that only its holder can finish, as it is read from the inbox again.
    fn give_to_holder(&mut self, id: MessageId, delivery: Delivery, bound: Bound) {
        if self.given.contains_key(&id) {
            return;
        }
        let Bound { client_id, held_by } = bound;
        let tailored = self.tailored(delivery.clone(), &client_id);
        let mut all = self.all.iter_mut();
        let member = all.find(|member| member.client_id == client_id);
        let online = member.and_then(|member| member.online.as_mut());
        let seat = match (held_by, online) {
            (Some(seat), _) => {
                self.bound.remove(&id);
                seat
            }
            (None, Some(online)) => {
                online.given += 1;
                online.push(id, tailored, &mut self.handing);
                online.seat()
            }
            (None, None) => SeatKey::default(),
        };
        let given = Given {
            delivery,
            client_id,
            seat,
        };
        self.given.insert(id, given);
    }

    /// The delivery as the member's subscription asks for it.
    fn tailored(&self, mut delivery: Delivery, client_id: &str) -> Delivery {
        if let Some(member) = self
            .all
            .iter()
            .find(|member| &*member.client_id == client_id)
        {
            member.tailor(&mut delivery);
        }
        delivery
    }

    fn forget_what_is_stored(&mut self) {
        self.returned.clear();
        self.given.retain(|id, _| self.bound.contains_key(id));
    }

    /// The last message in the inbox of an exchange that was begun.
    fn last_bound(&self) -> Option<MessageId> {
        let stored = |id: &MessageId| id.node != IN_MEMORY;
        self.bound.keys().copied().filter(stored).max()
    }

    fn held_by(&self, client_id: &str) -> Vec<MessageId> {
        self.given
            .iter()
            .filter(|(_, given)| &*given.client_id == client_id)
            .map(|(id, _)| *id)
            .collect()
    }

    fn give_back(&mut self, id: MessageId) {
        if let Some(given) = self.given.remove(&id) {
            self.returned.insert(id, given.delivery);
        }
    }

    /// Takes back what a member may have taken over without a word that has arrived here. If it has,
    /// it is gone from the inbox; that matters to QoS 2 alone.
    fn give_back_unless_gone(&mut self, id: MessageId) {
        if let Some(given) = self.given.remove(&id) {
            if given.delivery.qos == QoS::ExactlyOnce && id.node != IN_MEMORY {
                self.doubtful.push(id);
            } else {
                self.returned.insert(id, given.delivery);
            }
        }
    }

    fn forget(&mut self, id: MessageId) {
        if let Some(given) = self.given.remove(&id)
            && let Some(member) = self
                .all
                .iter_mut()
                .find(|member| member.client_id == given.client_id)
            && let Some(online) = &mut member.online
            && online.seat() == given.seat
        {
            online.given = online.given.saturating_sub(1);
        }
    }
}

impl Online {
    /// None if the member has a mailbox here.
    fn seat(&self) -> SeatKey {
        match self.place {
            Place::Here(_) => SeatKey::default(),
            Place::Seat { key, .. } => key,
        }
    }

    fn push(&self, id: MessageId, delivery: Delivery, handing: &mut Vec<Handing>) {
        match &self.place {
            Place::Here(mailbox) => {
                mailbox.push_from_group(delivery);
            }
            Place::Seat { key, .. } => handing.push(Handing {
                seat: *key,
                id,
                delivery,
            }),
        }
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}
