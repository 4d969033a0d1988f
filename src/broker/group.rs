//! Shared subscriptions, section 4.8: the subscribers of `$share/{ShareName}/{filter}`.
//!
//! A group is a session of its own: it has a mailbox and, once a member is durable, an inbox in the
//! store. Its dispatcher empties the mailbox and gives each message to one member that is
//! online and has room in its window. What a member leaves unacknowledged goes to another one; while
//! no member is online, messages wait in the group's inbox, not in a member's.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;

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
    members: Mutex<Members>,
    /// Numbers messages that are held in memory only.
    next_in_memory: AtomicU64,
}

#[derive(Default)]
struct Members {
    all: Vec<Member>,
    /// Whose turn it is.
    turn: usize,
    /// Given to a member and not yet acknowledged.
    given: HashMap<MessageId, (Delivery, Arc<str>)>,
    /// To be given to another member, before anything else.
    returned: BTreeMap<MessageId, Delivery>,
    /// Exchanges of QoS 2 that a member began and has to finish itself, [MQTT-4.8.2-5].
    bound: HashMap<MessageId, Arc<str>>,
    /// Received by a member that is gone, and to be settled when they are read again.
    finished: HashSet<MessageId>,
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

struct Online {
    mailbox: Arc<Mailbox>,
    /// QoS 1 and 2 messages that it may have at a time.
    window: u16,
    given: u16,
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
        let members = Members {
            bound,
            ..Members::default()
        };
        mailbox.set_begun(members.last_bound());
        Self {
            filter,
            mailbox,
            members: Mutex::new(members),
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
                    mailbox,
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
                let delivery = members.given[&id].0.clone();
                mailbox.push_from_group(members.tailored(delivery, client_id));
            }
            if let Some(member) = members
                .all
                .iter_mut()
                .find(|member| &*member.client_id == client_id)
            {
                member.online = Some(Online {
                    mailbox: mailbox.clone(),
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
            members.bound.insert(*id, client_id.into());
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
        members.bound.retain(|_, holder| &**holder != client_id);
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
    }

    /// Puts in a message that goes through the inbox.
    pub(super) fn enqueue(
        &self,
        message: &Message,
        arrival: Arrival,
        additions: &mut Additions<'_>,
    ) {
        let delivery = self.delivery(message, Origin::Memory, arrival);
        additions.enqueue(&self.mailbox, delivery, None);
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

    fn delivery(&self, message: &Message, origin: Origin, arrival: Arrival) -> Delivery {
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
            let holder = members.given.get(&id).map(|(_, holder)| holder);
            let holder = holder.or_else(|| members.bound.get(&id));
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
                if !members.returned.is_empty() || !members.has_room() {
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
            if let Some(holder) = members.bound.get(&id).cloned() {
                members.give_to_holder(id, delivery, holder);
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
                self.given.insert(id, (original, member.client_id.clone()));
            }
            online.mailbox.push_from_group(delivery);
        }
    }

    /// A message of an exchange that only its holder can finish, as it is read from the inbox again.
    fn give_to_holder(&mut self, id: MessageId, delivery: Delivery, holder: Arc<str>) {
        if self.given.contains_key(&id) {
            return;
        }
        let tailored = self.tailored(delivery.clone(), &holder);
        if let Some(member) = self
            .all
            .iter_mut()
            .find(|member| member.client_id == holder)
            && let Some(online) = &mut member.online
        {
            online.given += 1;
            online.mailbox.push_from_group(tailored);
        }
        self.given.insert(id, (delivery, holder));
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
            .filter(|(_, (_, holder))| &**holder == client_id)
            .map(|(id, _)| *id)
            .collect()
    }

    fn give_back(&mut self, id: MessageId) {
        if let Some((delivery, _)) = self.given.remove(&id) {
            self.returned.insert(id, delivery);
        }
    }

    fn forget(&mut self, id: MessageId) {
        if let Some((_, holder)) = self.given.remove(&id)
            && let Some(member) = self
                .all
                .iter_mut()
                .find(|member| member.client_id == holder)
            && let Some(online) = &mut member.online
        {
            online.given = online.given.saturating_sub(1);
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
