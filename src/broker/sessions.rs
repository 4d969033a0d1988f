//! From CONNECT to the end of a session: connecting, subscribing, disconnecting, expiring.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Node;
use super::clients::{Detached, SessionSubscriptions, Superseded};
use super::consumer::{Consumer, Inbox};
use super::flush::{Receipt, unix_ms};
use super::group::{Group, Membership};
use super::mailbox::{InboxKind, Mailbox};
use super::retained::RetainedWalk;
use super::routes::News;
use super::seats::SeatedMember;
use crate::failpoint;
use crate::metrics::{FilterKind, Where};
use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::mqtt::{ProtocolVersion, SubscriptionFilter};
use crate::session::connect::Terms;
use crate::session::{Exchanges, Origin, outbound::InFlight};
use crate::store::{
    Change, Chunk, InboxRange, InboxSummary, MessageId, Owner, SessionId, SessionRecord,
    StoreError, Stored, StoredSession,
};

/// How long after a start a client that was connected before may come back before its Will is
/// published: the specification lets a server that went down wait, section 3.1.2.5.
const WILL_GRACE: Duration = Duration::from_secs(5);

/// How often retained messages are looked through for expired ones. None is delivered once it has
/// expired; this only frees what they take.
const RETAINED_EXPIRY_INTERVAL: Duration = Duration::from_secs(60);

/// A session in the hands of a connection.
#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) subscriptions: SessionSubscriptions,
    pub(crate) record: SessionRecord,
    /// Later connections of the same client have a greater one, at whatever node.
    pub(super) epoch: u64,
    /// QoS 1 and 2 messages that may be in flight to the client.
    pub(crate) window: u16,
    /// Whether the node that had the client before did not say that it is done with it.
    pub(crate) is_abandoned: bool,
}

/// What CONNECT led to.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) connected: Connected,
    pub(crate) consumer: Consumer,
    pub(crate) exchanges: Exchanges,
    pub(crate) session_present: bool,
    /// CONNACK may be sent once this is durable.
    pub(crate) receipt: Receipt,
}

/// A connection did not get the session of its client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotOpened {
    #[error("another connection with the same client id came")]
    Superseded,
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl From<Superseded> for NotOpened {
    fn from(_: Superseded) -> Self {
        Self::Superseded
    }
}

/// A session that a connection has taken.
pub(super) struct Taken {
    pub(super) mailbox: Arc<Mailbox>,
    /// What there is to go on with; without it the session is new.
    pub(super) resumed: Option<Box<Detached>>,
    pub(super) epoch: u64,
    /// Whether the store knows that it is taken.
    pub(super) is_saved: bool,
    /// Of what has to be durable before the client is answered.
    pub(super) receipt: Receipt,
    pub(super) inbox: Inbox,
    /// The other node that had it last.
    pub(super) came_from: Option<u32>,
    /// Whether that did not say that it is done with it.
    pub(super) is_abandoned: bool,
}

/// What becomes of a Will as the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WillFate {
    /// The client sent DISCONNECT, [MQTT-3.14.4-3].
    Discard,
    /// Now, or after its delay.
    Publish,
    /// After its delay, and a time in which a client that was sent away finds another node.
    Defer,
    /// The broker is going down, and the Will waits in the store for its next start.
    Keep,
}

/// A subscription has been made.
pub(crate) struct Subscribed {
    pub(crate) receipt: Receipt,
    /// Retained messages to send.
    pub(crate) retained: Option<RetainedWalk>,
    /// Resolves when other nodes know of it, which has to be waited for before SUBACK.
    pub(crate) known: Option<BoxFuture<'static, ()>>,
}

/// What is due when, for sessions without a connection.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    /// Unix milliseconds, client id.
    due: Mutex<BTreeSet<(u64, Arc<str>)>>,
    sooner: Notify,
}

impl Deadlines {
    fn add(&self, at: u64, client_id: &Arc<str>) {
        let mut due = self.due.lock();
        due.insert((at, client_id.clone()));
        if due.first().is_some_and(|(first, _)| *first == at) {
            self.sooner.notify_one();
        }
    }

    fn add_record(&self, client_id: &Arc<str>, record: &SessionRecord) {
        let will_due = record.will.as_ref().and_then(|will| will.due_at);
        for at in [record.ends_at, will_due].into_iter().flatten() {
            self.add(at, client_id);
        }
    }

    fn remove_record(&self, client_id: &Arc<str>, record: &SessionRecord) {
        let will_due = record.will.as_ref().and_then(|will| will.due_at);
        let mut due = self.due.lock();
        for at in [record.ends_at, will_due].into_iter().flatten() {
            due.remove(&(at, client_id.clone()));
        }
    }

    /// Takes out who is due, and says when the next one is.
    fn take_due(&self, now: u64) -> (Vec<Arc<str>>, Option<u64>) {
        let mut due = self.due.lock();
        let mut taken = Vec::new();
        while due.first().is_some_and(|(at, _)| *at <= now) {
            taken.extend(due.pop_first().map(|(_, client_id)| client_id));
        }
        (taken, due.first().map(|(at, _)| *at))
    }
}

impl Node {
    /// Gives a connection the session of its client: the one that is there, or a new one.
    ///
    /// The future must be run to its end.
    pub(crate) async fn connect(&self, terms: &Terms) -> Result<Opened, NotOpened> {
        let durable = terms.expiry_interval > 0;
        let resumes = |detached: &Detached| {
            let expired = detached.record.ends_at.is_some_and(|at| at <= unix_ms());
            // What ended with its connection waits for its Will only.
            !terms.clean_start && !expired && detached.mailbox.is_durable()
        };
        let create = || self.new_mailbox(terms.client_id.clone(), durable);
        let asked = Instant::now();
        let claim = self.clients.claim(&terms.client_id, resumes, create);
        let claim = claim.await?;
        if claim.was_taken_over {
            self.totals
                .takeover
                .of(Where::Local)
                .observe(asked.elapsed());
        }
        self.forget_discarded_will(&terms.client_id);
        let Taken {
            mailbox,
            resumed,
            epoch,
            is_saved,
            receipt,
            inbox,
            came_from,
            is_abandoned,
        } = match &self.cluster {
            Some(cluster) => Box::pin(self.take_shared(cluster, terms, claim)).await?,
            None => Taken {
                mailbox: claim.mailbox,
                resumed: claim.resumed,
                epoch: 0,
                is_saved: false,
                receipt: match claim.ended {
                    Some(ended) => self.end_session(*ended),
                    None => Receipt::NOTHING,
                },
                inbox: Inbox::Known,
                came_from: None,
                is_abandoned: false,
            },
        };
        let session_present = resumed.is_some();
        match came_from {
            _ if !session_present => self.totals.sessions_created.inc(),
            None => self.totals.sessions_resumed.of(Where::Local).inc(),
            Some(_) => self.totals.sessions_resumed.of(Where::Remote).inc(),
        }
        let (subscriptions, mut exchanges) = match resumed {
            Some(detached) => {
                self.deadlines
                    .remove_record(&terms.client_id, &detached.record);
                (detached.subscriptions, detached.exchanges)
            }
            None => Default::default(),
        };
        let record = SessionRecord {
            owner: Owner::Client(terms.client_id.clone()),
            session: mailbox.session,
            version: terms.version,
            connected: true,
            expiry_interval: terms.expiry_interval,
            ends_at: None,
            will: terms.will.clone(),
            clock: 0,
        };
        let receipt = if !is_saved && (mailbox.is_durable() || record.will.is_some()) {
            self.flusher
                .persist(Change::SaveSession(Box::new(record.clone())))
        } else {
            receipt
        };
        for (group, id, _) in exchanges.outbound.bound_to_groups() {
            let is_member = |group: Arc<Group>| subscriptions.contains_key(group.filter());
            let may_be_member = match self.group_of_inbox(group) {
                Some(group) => is_member(group),
                // This node may not have heard of it yet.
                None => self.cluster.is_some() && !self.shared.has_ended(group),
            };
            if !may_be_member
                && let Some(packet_id) = exchanges.outbound.forget(Origin::Group(group, id))
            {
                // The message goes to other members, if there are any.
                self.flusher.persist(Change::EndExchange {
                    session: mailbox.session,
                    packet_id,
                });
            }
        }
        let connected = Connected {
            mailbox,
            subscriptions,
            record,
            epoch,
            window: terms.send_maximum,
            is_abandoned,
        };
        for filter in connected.subscriptions.keys() {
            self.totals.subscriptions.of(kind(filter)).inc();
        }
        let consumer = self.attach(&connected.mailbox, inbox);
        self.take_seats(&connected, &exchanges);
        for group in self.groups_of(&connected.subscriptions) {
            group.come_online(&terms.client_id, &connected.mailbox, connected.window, self);
        }
        Ok(Opened {
            connected,
            consumer,
            exchanges,
            session_present,
            receipt,
        })
    }

    /// Takes a session back from a connection that has ended.
    pub(crate) async fn disconnect(
        &self,
        connected: Connected,
        consumer: Consumer,
        mut exchanges: Exchanges,
        will: WillFate,
    ) {
        for filter in connected.subscriptions.keys() {
            self.totals.subscriptions.of(kind(filter)).dec();
        }
        if will == WillFate::Discard && connected.record.will.is_some() {
            self.discard_will(&connected.mailbox.client_id);
        }
        if connected.mailbox.is_lost() {
            return self.hand_over(connected, consumer, exchanges, will).await;
        }
        let Connected {
            mailbox,
            subscriptions,
            mut record,
            epoch,
            ..
        } = connected;
        let client_id = mailbox.client_id.clone();
        consumer.detach();
        exchanges.outbound.take_redistributable();
        let ends = !(mailbox.is_durable() && record.expiry_interval > 0);
        self.leave_seats(&mailbox, &subscriptions, &exchanges, ends);
        let begun = exchanges.outbound.bound_to_groups();
        for group in self.groups_of(&subscriptions) {
            let of_group = |(session, id, _): &(SessionId, MessageId, bool)| {
                (*session == group.session()).then_some(*id)
            };
            let begun: Vec<_> = begun.iter().filter_map(of_group).collect();
            group.go_offline(&client_id, &begun);
        }
        if mailbox.is_durable() {
            mailbox.set_begun(exchanges.outbound.last_in(mailbox.session));
            self.store_partly_settled(&mailbox).await;
        }
        // The millisecond has begun already: rounded up, so that nothing is due before its time.
        let now = unix_ms() + 1;
        record.connected = false;
        record.clock = self.flusher.add().tick();
        let lasts = mailbox.is_durable() && record.expiry_interval > 0;
        record.ends_at =
            (record.expiry_interval != u32::MAX).then(|| now + seconds(record.expiry_interval));
        match will {
            // A session that ends is removed from the store with its Will.
            WillFate::Discard if lasts => record.will = None,
            WillFate::Discard => {}
            WillFate::Publish => {
                if let Some(will) = &mut record.will {
                    // The end of the session is the latest moment, [MQTT-3.1.3-9].
                    will.due_at =
                        Some(now + seconds(will.delay_interval.min(record.expiry_interval)));
                }
            }
            WillFate::Defer => {
                if let Some(will) = &mut record.will {
                    let delay = with_grace(will.delay_interval);
                    let end = Duration::from_secs(record.expiry_interval.into());
                    will.due_at = Some(now + delay.min(end).as_millis() as u64);
                }
            }
            WillFate::Keep => {
                if let Some(will) = &mut record.will {
                    let delay = with_grace(will.delay_interval);
                    will.due_at = Some(now + delay.as_millis() as u64);
                }
            }
        }
        if mailbox.is_lost() {
            self.clients.release(&client_id, None);
            self.say_taken(&client_id, exchanges.outbound.at_least_once());
            return;
        }
        self.withdraw(&mailbox, epoch);
        let detached = Box::new(Detached {
            mailbox,
            subscriptions,
            exchanges,
            record,
            epoch,
        });
        if will == WillFate::Keep {
            if detached.record.will.is_some() || lasts {
                self.flusher
                    .persist(Change::SaveSession(Box::new(detached.record.clone())));
            }
            self.clients.release(&client_id, None);
        } else if lasts {
            let mut detached = detached;
            self.save_detached(&mut detached, now);
            self.deadlines.add_record(&client_id, &detached.record);
            let mailbox = detached.mailbox.clone();
            self.clients.release(&client_id, Some(detached));
            if mailbox.is_lost() {
                // Just now: nobody has seen that the connection was over.
                let taken = |detached: &mut Detached| Arc::ptr_eq(&detached.mailbox, &mailbox);
                if let Some(detached) = self.clients.with_detached(&client_id, taken) {
                    self.say_taken(&client_id, detached.exchanges.outbound.at_least_once());
                }
            }
        } else {
            self.end_session(*detached);
            self.clients.release(&client_id, None);
        }
    }

    /// Writes what a session without a connection is, publishing its Will if that is due.
    fn save_detached(&self, detached: &mut Detached, now: u64) {
        let client_id = detached.mailbox.client_id.clone();
        match detached
            .record
            .will
            .take_if(|will| will.due_at.is_some_and(|at| at <= now))
        {
            Some(will) => {
                let save = Change::SaveSession(Box::new(detached.record.clone()));
                self.publish_will(&client_id, &will, save);
            }
            None => {
                self.flusher
                    .persist(Change::SaveSession(Box::new(detached.record.clone())));
            }
        }
    }

    /// Ends a session: nothing of it is left but its Will, which is published now, [MQTT-3.1.2-8].
    pub(crate) fn end_session(&self, mut detached: Detached) -> Receipt {
        let mailbox = &detached.mailbox;
        let finished = detached.exchanges.outbound.bound_to_groups();
        if self.cluster.is_some() && mailbox.is_durable() {
            self.finish_in_groups(mailbox, &finished);
        }
        for (filter, _) in std::mem::take(&mut detached.subscriptions) {
            if self.cluster.is_some() && mailbox.is_durable() {
                // Once it is certain that the session is over, all of them go.
                continue;
            }
            if self.cluster.is_some() && filter.share.is_some() {
                // Its seat is empty already.
                continue;
            }
            if filter.share.is_some() {
                if let Some(group) = self.group(&filter) {
                    for (session, id, received) in &finished {
                        if *received && *session == group.session() {
                            group.finish(*id, &mut self.flusher.add());
                        }
                    }
                }
                self.leave_group(&filter, &mailbox.client_id);
            } else {
                self.subscriptions.unsubscribe(&filter.filter, mailbox);
                if !mailbox.is_durable() {
                    self.want(&filter, false);
                }
            }
        }
        let end = Change::EndSession(mailbox.session);
        match detached.record.will.take() {
            Some(will) if will.due_at.is_some() => {
                self.publish_will(&mailbox.client_id, &will, end)
            }
            Some(_) => self.flusher.persist(end),
            None if mailbox.is_durable() => self.flusher.persist(end),
            None => Receipt::NOTHING,
        }
    }

    /// Makes or replaces a subscription that has been allowed.
    pub(crate) fn subscribe(
        self: &Arc<Self>,
        connected: &mut Connected,
        filter: &SubscriptionFilter,
        options: SubscribeOptions,
        identifier: Option<u32>,
    ) -> Subscribed {
        let mailbox = &connected.mailbox;
        let known = connected
            .subscriptions
            .insert(filter.clone(), (options, identifier));
        if known.is_none() {
            self.totals.subscriptions.of(kind(filter)).inc();
        }
        let mut retained = None;
        let mut receipt = Receipt::NOTHING;
        if filter.share.is_some() {
            if let Some(cluster) = &self.cluster {
                self.note_membership(connected, filter, Some((options, identifier)));
                let member = seated(connected, options, identifier);
                self.take_seat(cluster, filter, member, Vec::new());
                receipt = self.receipt_of_group();
            } else {
                self.join_group(filter, connected, options, identifier);
            }
        } else {
            self.subscriptions
                .subscribe(&filter.filter, mailbox, options, identifier);
            let terms = Some((options, identifier));
            self.note_subscription(connected, filter, terms, known.is_none());
            let send = match options.retain_handling {
                RetainHandling::SendAtSubscribe => true,
                RetainHandling::SendIfNew => known.is_none(),
                RetainHandling::DoNotSend => false,
            };
            retained = send.then(|| {
                let in_store = self.cluster.is_some();
                self.retained.walk(filter.filter.clone(), in_store)
            });
        }
        if mailbox.is_durable() && known != Some((options, identifier)) {
            let filter = filter.clone();
            let change = Change::Subscribe {
                session: mailbox.session,
                filter,
                options,
                identifier,
            };
            receipt = self.flusher.persist(change);
        }
        let news = if filter.share.is_some() {
            Some(News::ToldUntil(receipt))
        } else if mailbox.is_durable() {
            (receipt != Receipt::NOTHING).then_some(News::Logged(receipt))
        } else {
            Some(self.news_of(filter))
        };
        Subscribed {
            receipt,
            retained,
            known: news.and_then(|news| self.known_everywhere(news)),
        }
    }

    /// Ends a subscription; `None` if there was none.
    pub(crate) fn unsubscribe(
        &self,
        connected: &mut Connected,
        filter: &SubscriptionFilter,
    ) -> Option<Receipt> {
        connected.subscriptions.remove(filter)?;
        self.totals.subscriptions.of(kind(filter)).dec();
        let mailbox = &connected.mailbox;
        if filter.share.is_some() {
            if let Some(cluster) = &self.cluster {
                self.note_membership(connected, filter, None);
                self.leave_seat(cluster, filter, mailbox, &[], true);
            } else {
                self.leave_group(filter, &mailbox.client_id);
            }
        } else {
            self.subscriptions.unsubscribe(&filter.filter, mailbox);
            self.note_subscription(connected, filter, None, true);
        }
        let change = Change::Unsubscribe {
            session: mailbox.session,
            filter: filter.clone(),
        };
        Some(if mailbox.is_durable() {
            self.flusher.persist(change)
        } else {
            Receipt::NOTHING
        })
    }

    pub(crate) fn group(&self, filter: &SubscriptionFilter) -> Option<Arc<Group>> {
        self.groups.lock().get(filter).cloned()
    }

    /// The group whose inbox this is.
    pub(crate) fn group_of_inbox(&self, session: SessionId) -> Option<Arc<Group>> {
        self.groups_by_session.lock().get(&session).cloned()
    }

    /// The groups of this node alone that a session is subscribed to.
    fn groups_of(&self, subscriptions: &SessionSubscriptions) -> Vec<Arc<Group>> {
        if self.cluster.is_some() {
            return Vec::new();
        }
        let shared = subscriptions.keys().filter(|filter| filter.share.is_some());
        shared.filter_map(|filter| self.group(filter)).collect()
    }

    /// A client has connected: it has a seat in each share group that its session is subscribed to.
    fn take_seats(&self, connected: &Connected, exchanges: &Exchanges) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let begun = exchanges.outbound.bound_to_groups().into_iter();
        let begun: Vec<_> = begun.map(|(inbox, id, _)| (inbox, id)).collect();
        for (filter, (options, identifier)) in &connected.subscriptions {
            if filter.share.is_some() {
                let member = seated(connected, *options, *identifier);
                self.take_seat(cluster, filter, member, begun.clone());
            }
        }
    }

    /// Its connection is over.
    pub(super) fn leave_seats(
        &self,
        mailbox: &Arc<Mailbox>,
        subscriptions: &SessionSubscriptions,
        exchanges: &Exchanges,
        has_left: bool,
    ) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let shared = subscriptions.keys().filter(|filter| filter.share.is_some());
        let begun = exchanges.outbound.bound_to_groups();
        for filter in shared {
            self.leave_seat(cluster, filter, mailbox, &begun, has_left);
        }
    }

    /// A session ends that has received messages of share groups: no other member may have them.
    fn finish_in_groups(&self, mailbox: &Mailbox, exchanges: &[(SessionId, MessageId, bool)]) {
        let received = exchanges.iter().filter(|(.., is_received)| *is_received);
        for (group, id, _) in received {
            self.finish_in_group(*group, &[*id]);
            // Together with the end of the session, which the exchange ends with.
            self.flusher.persist(Change::Dequeue {
                session: *group,
                key: *id,
                guard: Some(mailbox.session),
            });
        }
    }

    /// Notes that a client of this node is a member of a share group, or no longer, for when it is at
    /// another one.
    fn note_membership(
        &self,
        connected: &Connected,
        filter: &SubscriptionFilter,
        terms: Option<super::shared::Terms>,
    ) {
        let mailbox = &connected.mailbox;
        if mailbox.is_durable() {
            self.shared
                .note(mailbox.session, filter, connected.epoch, terms);
        }
    }

    fn join_group(
        self: &Arc<Self>,
        filter: &SubscriptionFilter,
        connected: &Connected,
        options: SubscribeOptions,
        identifier: Option<u32>,
    ) {
        let mailbox = &connected.mailbox;
        let membership = Membership {
            client_id: mailbox.client_id.clone(),
            durable: mailbox.is_durable(),
            options,
            identifier,
        };
        // The group cannot be removed between being found and being joined.
        let mut groups = self.groups.lock();
        let group = groups.entry(filter.clone()).or_insert_with(|| {
            let mailbox =
                self.new_group_mailbox(filter, SessionId::random(), InboxSummary::default(), false);
            self.start_group(Group::new(filter.clone(), mailbox, HashMap::new()))
        });
        self.store_group(group, &membership);
        group.join(membership, Some((mailbox.clone(), connected.window)), self);
    }

    /// A group is stored before its first durable member joins, and so before its first message.
    fn store_group(&self, group: &Group, membership: &Membership) {
        if membership.durable && !group.mailbox().is_durable() {
            let record = group_record(group.filter(), group.session());
            self.flusher.persist(Change::SaveSession(Box::new(record)));
        }
    }

    fn start_group(self: &Arc<Self>, group: Group) -> Arc<Group> {
        let group = Arc::new(group);
        self.groups_by_session
            .lock()
            .insert(group.session(), group.clone());
        self.subscriptions.add_group(&group);
        self.tasks.spawn(group.clone().dispatch(self.clone()));
        group
    }

    fn leave_group(&self, filter: &SubscriptionFilter, client_id: &str) {
        let mut groups = self.groups.lock();
        let Some(group) = groups.get(filter) else {
            return;
        };
        if group.leave(client_id) {
            self.subscriptions.remove_group(group);
            self.groups_by_session.lock().remove(&group.session());
            if group.mailbox().is_durable() {
                self.flusher.persist(Change::EndSession(group.session()));
            }
            groups.remove(filter);
        }
    }

    /// Writes chunks anew that were acknowledged in part, so that their rest can be delivered again
    /// without the part.
    pub(super) async fn store_partly_settled(&self, mailbox: &Mailbox) {
        self.rewrite_partly_settled(mailbox).await;
        mailbox.settled();
    }

    async fn rewrite_partly_settled(&self, mailbox: &Mailbox) {
        let parts = mailbox.take_partly_settled();
        if parts.is_empty() {
            return;
        }
        if self
            .flusher
            .durable(self.flusher.everything())
            .await
            .is_err()
        {
            return;
        }
        for (key, settled) in parts {
            let before = MessageId {
                hlc: key.hlc + 1,
                ..MessageId::MIN
            };
            let range = InboxRange {
                session: mailbox.session,
                from: key,
                before,
                bytes_max: 1,
            };
            match self.store.read_inbox(range).await {
                Ok(chunks) => {
                    let Some(chunk) = chunks.into_iter().find(|chunk| chunk.key == key) else {
                        continue;
                    };
                    let is_left = |entry: &crate::store::Entry| {
                        !settled.contains(&(entry.id.hlc, entry.id.index))
                    };
                    let entries = chunk.entries.into_iter().filter(is_left).collect();
                    self.flusher
                        .add()
                        .rewrite(mailbox.session, Chunk { key, entries });
                }
                Err(error) => {
                    tracing::error!(event = "inbox_unreadable", client_id = %mailbox.client_id, %error);
                    // Nor could the next one be read, and every try takes its time. What was
                    // acknowledged is of QoS 1, and may come again.
                    if error.may_pass() {
                        return;
                    }
                }
            }
        }
    }

    pub(crate) fn new_mailbox(&self, client_id: Arc<str>, durable: bool) -> Arc<Mailbox> {
        let stored = InboxSummary::default();
        self.mailbox(SessionId::random(), client_id, None, durable, stored)
    }

    pub(super) fn new_group_mailbox(
        &self,
        filter: &SubscriptionFilter,
        session: SessionId,
        stored: InboxSummary,
        durable: bool,
    ) -> Arc<Mailbox> {
        self.mailbox(
            session,
            filter.to_string().into(),
            Some(filter.clone()),
            durable,
            stored,
        )
    }

    pub(super) fn mailbox(
        &self,
        session: SessionId,
        client_id: Arc<str>,
        group: Option<SubscriptionFilter>,
        durable: bool,
        stored: InboxSummary,
    ) -> Arc<Mailbox> {
        let inbox = match (durable, &self.cluster) {
            (false, _) => InboxKind::None,
            (true, None) => InboxKind::Own(stored),
            (true, Some(_)) => InboxKind::Shared,
        };
        let dropped = self.totals.dropped.clone();
        let limits = self.limits.mailbox;
        Arc::new(Mailbox::new(
            session, client_id, group, inbox, limits, dropped,
        ))
    }

    /// Takes up what an earlier process left in the store.
    pub(crate) fn restore(self: &Arc<Self>, stored: Stored) {
        for retained in stored.retained {
            self.retained.set(retained);
        }
        let mut bound: HashMap<SessionId, HashMap<MessageId, Arc<str>>> = HashMap::new();
        let (groups, clients): (Vec<_>, Vec<_>) = stored
            .sessions
            .into_iter()
            .partition(|session| matches!(session.record.owner, Owner::Group(_)));
        for session in &clients {
            let Owner::Client(client_id) = &session.record.owner else {
                continue;
            };
            for exchange in session
                .exchanges
                .iter()
                .filter(|exchange| exchange.inbox != session.record.session)
            {
                bound
                    .entry(exchange.inbox)
                    .or_default()
                    .insert(exchange.message, client_id.clone());
            }
        }
        for StoredSession { record, inbox, .. } in groups {
            let Owner::Group(filter) = &record.owner else {
                continue;
            };
            let mailbox = self.new_group_mailbox(filter, record.session, inbox, true);
            let bound = bound.remove(&record.session).unwrap_or_default();
            let group = self.start_group(Group::new(filter.clone(), mailbox, bound));
            self.groups.lock().insert(filter.clone(), group);
        }
        for session in clients {
            self.restore_client(session);
        }
        let empty: Vec<_> = {
            let groups = self.groups.lock();
            groups
                .values()
                .filter(|group| group.member_count() == 0)
                .map(|group| group.filter().clone())
                .collect()
        };
        for filter in empty {
            self.leave_group(&filter, "");
        }
    }

    fn restore_client(self: &Arc<Self>, stored: StoredSession) {
        let StoredSession {
            mut record,
            subscriptions,
            awaiting_release,
            exchanges,
            inbox,
        } = stored;
        let Owner::Client(client_id) = record.owner.clone() else {
            return;
        };
        let now = unix_ms();
        let durable = record.expiry_interval > 0;
        let mailbox = self.mailbox(record.session, client_id.clone(), None, durable, inbox);
        if end_connection(&mut record, now) {
            self.flusher
                .persist(Change::SaveSession(Box::new(record.clone())));
        }
        if let Some(due_at) = record.will.as_mut().and_then(|will| will.due_at.as_mut()) {
            // Nobody could come back while the broker was down.
            *due_at = (*due_at).max(now + WILL_GRACE.as_millis() as u64);
        }
        wait_for_will(&mut record);
        let mut all = SessionSubscriptions::new();
        for subscription in subscriptions {
            let (options, identifier) = (subscription.options, subscription.identifier);
            if subscription.filter.share.is_some() {
                let membership = Membership {
                    client_id: client_id.clone(),
                    durable,
                    options,
                    identifier,
                };
                let mut groups = self.groups.lock();
                let group = groups
                    .entry(subscription.filter.clone())
                    .or_insert_with(|| {
                        let filter = &subscription.filter;
                        let mailbox = self.new_group_mailbox(
                            filter,
                            SessionId::random(),
                            InboxSummary::default(),
                            false,
                        );
                        self.start_group(Group::new(filter.clone(), mailbox, HashMap::new()))
                    });
                self.store_group(group, &membership);
                group.join(membership, None, self);
            } else {
                self.subscriptions.subscribe(
                    &subscription.filter.filter,
                    &mailbox,
                    options,
                    identifier,
                );
            }
            all.insert(subscription.filter, (options, identifier));
        }
        self.deadlines.add_record(&client_id, &record);
        let exchanges = Exchanges {
            inbound: awaiting_release.into_iter().collect(),
            outbound: InFlight::restore(record.session, &exchanges, &[]),
        };
        mailbox.set_begun(exchanges.outbound.last_in(mailbox.session));
        let detached = Detached {
            mailbox,
            subscriptions: all,
            exchanges,
            record,
            epoch: 0,
        };
        self.clients.restore(&client_id, Box::new(detached));
    }

    /// Publishes delayed Wills, ends sessions when they are due, and forgets expired retained
    /// messages, until the node stops.
    pub(crate) async fn run_deadlines(&self) {
        let mut retained_looked_at = unix_ms();
        loop {
            let now = unix_ms();
            if now.saturating_sub(retained_looked_at) >= RETAINED_EXPIRY_INTERVAL.as_millis() as u64
            {
                retained_looked_at = now;
                self.forget_expired_retained(now);
            }
            let (due, next) = self.deadlines.take_due(now);
            for client_id in due {
                self.look_after(&client_id, now);
            }
            let wait = next.map_or(RETAINED_EXPIRY_INTERVAL, |at| {
                Duration::from_millis(at.saturating_sub(now))
            });
            let wait = wait.min(RETAINED_EXPIRY_INTERVAL);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.deadlines.sooner.notified() => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    fn forget_expired_retained(&self, now: u64) {
        for topic in self.retained.expired(now) {
            let mut additions = self.flusher.add();
            if self.retained.remove_expired(&topic, now) {
                let at = additions.next_id();
                additions.persist(Change::ClearRetained { topic, at });
            }
        }
    }

    /// Does what is due for a session whose node has not done it in time.
    pub(crate) fn look_after_adopted(&self, session: StoredSession) {
        let Owner::Client(client_id) = session.record.owner.clone() else {
            return;
        };
        let id = session.record.session;
        let mailbox = self
            .shared
            .mailbox_or(id, || self.shared_mailbox(id, client_id.clone()));
        let mut detached = self.detached(session, &mailbox, 0, &[]);
        // By the clock of the store, which may be ahead of this one's.
        let due = detached.record.will.as_ref().and_then(|will| will.due_at);
        let now = [Some(unix_ms()), due].into_iter().flatten().max();
        let now = now.unwrap_or_default();
        if detached.record.will.is_some() {
            failpoint::reach("before_will");
        }
        if detached.record.ends_at.is_some_and(|at| at <= now) {
            tracing::info!(event = "session_expired", %client_id);
            self.end_session(detached);
        } else {
            self.save_detached(&mut detached, now);
        }
    }

    fn look_after(&self, client_id: &Arc<str>, now: u64) {
        let ended = self.clients.with_detached(client_id, |detached| {
            if detached.record.ends_at.is_some_and(|at| at <= now) {
                return true;
            }
            if detached
                .record
                .will
                .as_ref()
                .is_some_and(|will| will.due_at.is_some_and(|at| at <= now))
            {
                self.save_detached(detached, now);
            }
            false
        });
        if let Some(ended) = ended {
            tracing::info!(event = "session_expired", client_id = %client_id);
            self.totals.sessions_expired.inc();
            self.end_session(*ended);
        }
    }
}

fn kind(filter: &SubscriptionFilter) -> FilterKind {
    match filter {
        filter if filter.share.is_some() => FilterKind::Shared,
        filter if filter.filter.has_wildcard() => FilterKind::Wildcard,
        _ => FilterKind::Exact,
    }
}

/// The member of a share group that a connection is.
fn seated(
    connected: &Connected,
    options: SubscribeOptions,
    identifier: Option<u32>,
) -> SeatedMember {
    SeatedMember {
        mailbox: connected.mailbox.clone(),
        since: connected.epoch,
        window: connected.window,
        options,
        identifier,
    }
}

/// Ends the connection, if there was one, of a session whose process has ended; returns whether
/// there was. `now` is when that is noticed.
pub(crate) fn end_connection(record: &mut SessionRecord, now: u64) -> bool {
    if !std::mem::take(&mut record.connected) {
        return false;
    }
    record.ends_at =
        (record.expiry_interval != u32::MAX).then(|| now + seconds(record.expiry_interval));
    if let Some(will) = &mut record.will {
        let delay = with_grace(will.delay_interval);
        will.due_at = Some(now + delay.as_millis() as u64);
    }
    true
}

/// Lets a session that ended with its connection last until its Will is due, which is all that it
/// is kept for.
pub(crate) fn wait_for_will(record: &mut SessionRecord) {
    if let (Some(will), 0) = (&record.will, record.expiry_interval) {
        record.ends_at = will.due_at;
    }
}

/// The delay of a Will whose client did not leave of its own accord.
fn with_grace(delay_interval: u32) -> Duration {
    WILL_GRACE.max(Duration::from_secs(delay_interval.into()))
}

fn seconds(seconds: u32) -> u64 {
    u64::from(seconds) * 1000
}

pub(super) fn group_record(filter: &SubscriptionFilter, session: SessionId) -> SessionRecord {
    SessionRecord {
        owner: Owner::Group(filter.clone()),
        session,
        version: ProtocolVersion::V5,
        connected: false,
        expiry_interval: u32::MAX,
        ends_at: None,
        will: None,
        clock: 0,
    }
}
