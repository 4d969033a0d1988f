//! What a node and the other nodes of its cluster have to do with each other.
//!
//! The node that a message is published at writes it into the inbox of every session, wherever the
//! client of that is. Once it is written it is handed on to the node that has the client. So a node
//! that takes a session over finds in the store what was written before, and is sent what is written
//! after; the two meet where all others have acknowledged that they know of the new place
//! ([`Node::announce`]).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Node;
use super::clients::{Claim, Detached, SessionSubscriptions};
use super::consumer::{Consumer, Inbox};
use super::elision::Undecided;
use super::flush::{Matched, MissedIds, Receipt, Unstored, unix_ms};
use super::mailbox::Mailbox;
use super::retained::RetainedWalk;
use super::sessions::{Connected, NotOpened, Taken, WillFate, random_session_id};
use super::shared::{self, Learned, Noted, Place};
use crate::bus::wire::Item;
use crate::cluster::{Announced, Cluster};
use crate::failpoint;
use crate::metrics::{Arrival, Operation, Where};
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{Message, PacketId, QoS, SubscriptionFilter};
use crate::session::connect::Terms;
use crate::session::outbound::InFlight;
use crate::session::{Delivery, Exchanges, Origin};
use crate::store::mongodb::{
    GroupPlace, Leftover, LogAction, LogEntry, LogOp, OpenRequest, SharedSession,
};
use crate::store::{
    Change, Chunk, InboxSummary, LogPosition, MessageId, Owner, Retained, SessionId, StoreError,
    StoredSession, StoredSubscription,
};

/// How long a node that takes a session over waits for what the others have to say.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// How long to wait after the store could not be read.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What this node is waiting for from others, and how far it has followed them.
#[derive(Default)]
pub(super) struct Peers {
    /// How much of each node's subscription log is in the subscriptions.
    #[expect(
        clippy::disallowed_types,
        reason = "held while the store is read, so that entries are applied once and in order"
    )]
    followed: tokio::sync::Mutex<HashMap<u32, u64>>,
    /// Nodes that do not yet know where a client is now, by client and epoch.
    unaware: Mutex<HashMap<(Arc<str>, u64), Unaware>>,
    /// Sessions that their last node has still to let go.
    expected: Mutex<HashMap<Arc<str>, Expected>>,
    /// What sessions that were taken have left, and that is being dealt with.
    finishing: Mutex<HashMap<SessionId, Receipt>>,
    /// Nodes that wait for this one to let a client go which has no session there, and its epoch.
    takers: Mutex<HashMap<Arc<str>, (u32, u64)>>,
    /// Clients that have said goodbye, and their Wills, which the store may still have.
    discarded: Mutex<DiscardedWills>,
    pub(super) undecided: Mutex<Undecided>,
}

/// How far this node has followed the subscriptions of others.
#[derive(Default)]
pub(super) struct Known {
    /// Of the subscriptions that have it.
    pub(super) version: u64,
    /// How much of other nodes' logs is in them.
    pub(super) followed: Vec<LogPosition>,
}

/// A message that is missing in an inbox.
pub(super) struct MissedChunk {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) chunk: Chunk,
    /// As the message's own.
    pub(super) guard: Option<SessionId>,
}

/// A QoS 1 message that the client has not acknowledged, under the identifier that it knows.
pub(super) type InFlightMessage = (PacketId, MessageId);

/// A session that a node has still to let go.
struct Expected {
    node: u32,
    epoch: u64,
    let_go: oneshot::Sender<LetGo>,
}

/// What a node says as it lets a session go.
#[derive(Default)]
struct LetGo {
    in_flight: Vec<InFlightMessage>,
    will_discarded: bool,
}

/// Wills that were discarded, until the store knows that and nobody can have taken the session before
/// it did.
#[derive(Default)]
struct DiscardedWills {
    clients: HashMap<Arc<str>, DiscardedWill>,
    swept: Option<Instant>,
}

struct DiscardedWill {
    at: Instant,
    /// Of what tells the store.
    receipt: Receipt,
}

/// How long it is remembered that a Will was discarded: whoever takes the session waits for less.
const DISCARDED_KEPT: Duration = Duration::from_secs(2);

struct Unaware {
    nodes: HashSet<u32>,
    mailbox: Arc<Mailbox>,
    told: Option<oneshot::Sender<()>>,
}

impl Node {
    /// Lets go of sessions that another node has taken, as a write has shown.
    pub(super) fn lose(&self, sessions: &[SessionId]) {
        for session in sessions {
            if self.group_lost(*session) {
                continue;
            }
            if let Some(mailbox) = self.shared.mailbox(*session) {
                let place = self.shared.place_of(&mailbox.client_id);
                // Its new node may not have been heard of yet.
                let holder = place.and_then(|place| place.node);
                let holder = holder.filter(|node| *node != self.flusher.node);
                self.let_go(&mailbox.client_id, &mailbox, holder);
            }
        }
    }

    /// Ends what this node has of a client that another node has now. Its connection says so
    /// elsewhere when it has ended; what is there without one is returned.
    fn let_go(
        &self,
        client_id: &Arc<str>,
        mailbox: &Arc<Mailbox>,
        holder: Option<u32>,
    ) -> Option<Box<Detached>> {
        {
            // Whoever adds a message from now on hands it on to the other node.
            let mut additions = self.flusher.add();
            mailbox.lose(holder);
            additions.tick();
        }
        let of_session = |detached: &mut Detached| Arc::ptr_eq(&detached.mailbox, mailbox);
        self.clients.with_detached(client_id, of_session)
    }

    /// Tells the node that a client is at now that this one has let its session go, once everything
    /// that it has written for it is durable.
    pub(super) fn say_taken(&self, client_id: &Arc<str>, in_flight: Vec<InFlightMessage>) {
        let Some(cluster) = self.cluster.clone() else {
            return;
        };
        let place = self.shared.place_of(client_id);
        let Some(Place {
            session,
            epoch,
            node: Some(node),
        }) = place.filter(|place| place.node != Some(self.flusher.node))
        else {
            return;
        };
        let let_go = LetGo {
            in_flight,
            will_discarded: self.is_will_discarded(client_id),
        };
        self.say_taken_to(&cluster, node, client_id, (session, epoch), let_go);
    }

    fn say_taken_to(
        &self,
        cluster: &Arc<Cluster>,
        node: u32,
        client_id: &Arc<str>,
        (session, epoch): (Option<SessionId>, u64),
        let_go: LetGo,
    ) {
        let (cluster, flusher) = (cluster.clone(), self.flusher.clone());
        let LetGo {
            in_flight,
            will_discarded,
        } = let_go;
        let client_id = client_id.clone();
        self.tasks.spawn(async move {
            // The client's own messages, and what it has acknowledged, come before what follows at
            // the other node. If they never will be durable, it need not wait for them.
            if flusher.durable(flusher.everything()).await.is_ok() {
                if let Some(session) = session {
                    cluster.store.forget(session, epoch);
                }
                let taken = Item::Taken {
                    client_id,
                    epoch,
                    in_flight,
                    will_discarded,
                };
                failpoint::reach("before_taken");
                cluster.send(node, &taken);
            }
        });
    }

    /// Remembers that a client has said goodbye: another node may take its session before the store
    /// knows, and must not publish its Will.
    pub(super) fn discard_will(&self, client_id: &Arc<str>) {
        if self.cluster.is_none() {
            return;
        }
        let (at, receipt) = (Instant::now(), self.flusher.gathering());
        let mut wills = self.peers.discarded.lock();
        if wills.swept.is_none_or(|swept| at - swept > DISCARDED_KEPT) {
            wills.swept = Some(at);
            wills.clients.retain(|_, will| {
                at - will.at < DISCARDED_KEPT || !self.flusher.is_durable(will.receipt)
            });
        }
        wills
            .clients
            .insert(client_id.clone(), DiscardedWill { at, receipt });
    }

    /// A client has connected again, with another Will or without one.
    pub(super) fn forget_discarded_will(&self, client_id: &Arc<str>) {
        self.peers.discarded.lock().clients.remove(client_id);
    }

    fn is_will_discarded(&self, client_id: &Arc<str>) -> bool {
        self.peers.discarded.lock().clients.contains_key(client_id)
    }

    /// Follows the logs of other nodes up to `positions`, at least.
    pub(super) async fn follow_to(&self, positions: &[LogPosition]) -> Result<Known, StoreError> {
        let Some(cluster) = &self.cluster else {
            return Ok(Known::default());
        };
        self.follow(cluster, positions).await?;
        // While nothing more is followed: both are of the same moment.
        let followed = self.peers.followed.lock().await;
        let positions = followed.iter();
        Ok(Known {
            followed: positions
                .map(|(node, entry)| LogPosition {
                    node: *node,
                    entry: *entry,
                })
                .collect(),
            version: self.subscriptions.version(),
        })
    }

    /// Messages for subscriptions that other nodes had made before these were written, but that this
    /// node did not know of: they have to be written too before anything is acknowledged. What was
    /// learned after `known` is left to the next look.
    pub(super) fn missed(
        &self,
        messages: &[Matched],
        known: u64,
        ids: &mut MissedIds,
    ) -> Vec<MissedChunk> {
        let mut missed = Vec::new();
        for Matched {
            message,
            version,
            guard,
        } in messages
        {
            let Some(learned) = self.shared.learned_since(*version) else {
                // So many at a time: it is matched with all subscriptions again. Whoever had it
                // before gets a QoS 1 message twice.
                missed.extend(self.match_whole(message, *guard, ids));
                continue;
            };
            for learned in learned {
                if learned.version > known {
                    continue;
                }
                let Some(delivery) = learned.delivery(message) else {
                    continue;
                };
                let id = ids.next();
                let entry = delivery.into_entry(id);
                let chunk = Chunk {
                    key: id,
                    entries: vec![entry],
                };
                missed.push(MissedChunk {
                    mailbox: learned.mailbox,
                    chunk,
                    guard: *guard,
                });
            }
        }
        missed
    }

    /// A message for the inboxes of all sessions that want it.
    fn match_whole(
        &self,
        message: &Message,
        guard: Option<SessionId>,
        ids: &mut MissedIds,
    ) -> Vec<MissedChunk> {
        let (matches, _) = self.subscriptions.matches(message.topic());
        let durable = matches
            .sessions
            .iter()
            .filter(|found| found.mailbox.is_durable());
        let sessions =
            durable.map(|found| (&found.mailbox, found.terms.delivery(message, Arrival::NONE)));
        let groups = matches.groups.iter();
        let groups = groups.map(|group| {
            let delivery = group.delivery(message, Origin::Memory, Arrival::NONE);
            (group.mailbox(), delivery)
        });
        sessions
            .chain(groups)
            .filter_map(|(mailbox, delivery)| {
                let id = ids.next();
                let entry = delivery.into_entry(id);
                let qos = entry.qos;
                let entries = vec![entry];
                (qos > QoS::AtMostOnce).then(|| MissedChunk {
                    mailbox: mailbox.clone(),
                    chunk: Chunk { key: id, entries },
                    guard,
                })
            })
            .collect()
    }

    /// Tells other nodes that this one has changed subscriptions.
    pub(super) fn announce_log(&self, positions: &[LogPosition]) {
        let own = positions
            .iter()
            .find(|position| position.node == self.flusher.node);
        if let (Some(cluster), Some(position)) = (&self.cluster, own) {
            cluster.broadcast(&Item::Log(*position));
        }
    }

    /// Hands chunks that are in the store to whoever empties their inbox.
    pub(super) fn hand_on(&self, chunks: Vec<(Arc<Mailbox>, Chunk)>) {
        for (mailbox, chunk) in chunks {
            match (mailbox.holder(), &self.cluster) {
                (Some(node), Some(cluster)) => {
                    let session = mailbox.session;
                    cluster.send(node, &Item::Deliver { session, chunk });
                }
                _ => mailbox.push_committed(&chunk, Arrival::NONE),
            }
        }
    }

    /// Begins to read what a walk has to look at in the store, if there is anything. It is tried until
    /// the store is available.
    pub(crate) fn read_retained(
        &self,
        walk: &mut RetainedWalk,
        at_most: usize,
    ) -> Option<BoxFuture<'static, Result<Vec<Retained>, StoreError>>> {
        let cluster = self.cluster.clone()?;
        let range = walk.next_in_store(at_most)?;
        let measured = self.totals.store.clone();
        Some(Box::pin(async move {
            loop {
                let reading = cluster.store.read_retained(range.clone());
                match measured.measure(Operation::ReadRetained, reading).await {
                    Err(error) if error.may_pass() => {
                        tokio::time::sleep(READ_AGAIN_AFTER).await;
                        measured.retries.of(Operation::ReadRetained).inc();
                    }
                    read => return read,
                }
            }
        }))
    }

    /// Does what had to wait.
    pub(super) fn deliver_unstored(&self, unstored: Unstored) {
        match unstored {
            Unstored::One { mailbox, delivery } if mailbox.holder().is_some() => {
                self.pass(&mailbox, delivery);
            }
            Unstored::One { mailbox, delivery } => {
                mailbox.push(delivery);
            }
            Unstored::Nodes {
                message,
                publisher,
                nodes,
            } => self.pass_to_nodes(&message, &publisher, &nodes),
            Unstored::Retain { message, publisher } => {
                self.retain(&message, &publisher, &mut self.flusher.add());
            }
        }
    }

    /// A message to this topic has been taken over by a node that may have died before it handed it on.
    /// It lies in the inboxes of whoever wants it, and comes before whatever its publisher sends from
    /// now on.
    pub(crate) fn ring(&self, topic: &str) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let (matches, _) = self.subscriptions.matches(topic);
        for found in &matches.sessions {
            let mailbox = &found.mailbox;
            match mailbox.holder() {
                _ if !mailbox.is_durable() => {}
                Some(node) => {
                    let session = mailbox.session;
                    cluster.send(node, &Item::Ring { session });
                }
                None => mailbox.doubt(),
            }
        }
    }

    /// Gives a message that is not stored to the node that has the client.
    pub(super) fn pass(&self, mailbox: &Mailbox, delivery: Delivery) {
        if let (Some(node), Some(cluster)) = (mailbox.holder(), &self.cluster) {
            let item = Item::Pass {
                session: mailbox.session,
                qos: delivery.qos,
                retain: delivery.retain,
                subscription_identifiers: delivery.subscription_identifiers,
                message: delivery.message,
            };
            cluster.send(node, &item);
        }
    }

    /// Gives a message to nodes where clients want it whose sessions end with their connections.
    pub(super) fn pass_to_nodes(&self, message: &Message, publisher: &Arc<str>, nodes: &[u32]) {
        // Each node has its own.
        if message.topic().starts_with("$SYS/") {
            return;
        }
        if let Some(cluster) = &self.cluster {
            let item = Item::Publish {
                message: message.clone(),
                publisher: publisher.clone(),
            };
            for node in nodes {
                cluster.send(*node, &item);
            }
        }
    }

    /// Takes the session of a client from whichever node had it last.
    pub(super) async fn take_shared(
        &self,
        cluster: &Cluster,
        terms: &Terms,
        claim: Claim,
    ) -> Result<Taken, NotOpened> {
        let client_id = &terms.client_id;
        let node = Some(self.flusher.node);
        let lasts = terms.expiry_interval > 0;
        let Claim {
            mailbox: claimed,
            resumed,
            ended,
            was_taken_over: _,
        } = claim;
        let here = resumed.or(ended);
        let place = self.shared.place_of(client_id);
        let has_session = here.is_some() || place.is_some_and(|place| place.session.is_some());
        let epoch = self.flusher.add().tick();
        // An earlier session goes on until the end of this connection.
        let durable = lasts || (has_session && !terms.clean_start);
        if !durable && terms.will.is_none() && !has_session {
            let session = None;
            let place = Place {
                session,
                epoch,
                node,
            };
            self.shared.place(client_id, place);
            return Ok(Taken {
                inbox: Inbox::Shared(self.announce(cluster, &claimed, epoch)),
                mailbox: claimed,
                resumed: None,
                epoch,
                is_saved: true,
                receipt: Receipt::NOTHING,
                came_from: None,
                is_abandoned: false,
            });
        }
        // What an earlier connection left must not be written over what comes now.
        let everything = self.flusher.everything();
        if let Err(error) = self.flusher.durable(everything).await {
            self.clients.release(client_id, here);
            return Err(error.into());
        }
        let new_session = match &here {
            Some(_) => random_session_id(),
            None => claimed.session,
        };
        let request = OpenRequest {
            owner: Owner::Client(client_id.clone()),
            new_session,
            clean_start: terms.clean_start,
            version: terms.version,
            expiry_interval: terms.expiry_interval,
            will: terms.will.clone(),
            durable,
            epoch_min: epoch,
        };
        failpoint::reach("before_claim");
        let opening = cluster.open(request);
        let measured = &self.totals.store;
        let mut opened = match measured.measure(Operation::OpenSession, opening).await {
            Ok(Some(opened)) => {
                failpoint::reach("after_claim");
                opened
            }
            Ok(None) => {
                self.clients.release(client_id, None);
                return Err(NotOpened::Superseded);
            }
            Err(error) => {
                self.clients.release(client_id, here);
                return Err(error.into());
            }
        };
        let session = opened.session.record.session;
        let epoch = opened.epoch;
        // What the client publishes here comes after what it published elsewhere.
        self.flusher.observe(opened.session.record.clock);
        let mailbox = match &here {
            _ if claimed.session == session => claimed,
            Some(here) if here.mailbox.session == session => here.mailbox.clone(),
            _ if !durable => self.mailbox(
                session,
                client_id.clone(),
                None,
                false,
                InboxSummary::default(),
            ),
            _ => self.shared_mailbox(session, client_id.clone()),
        };
        let mailbox = if durable {
            self.shared.mailbox_or(session, || mailbox)
        } else {
            mailbox
        };
        let place = Place {
            session: durable.then_some(session),
            epoch,
            node,
        };
        let is_newest = self.shared.place(client_id, place);
        // Whoever had the client before this may have been heard of only now.
        self.clients.rebind(client_id, &mailbox);
        mailbox.regain();
        // Whoever takes the session from now on is heard.
        if !is_newest || self.shared.place_of(client_id) != Some(place) {
            self.clients.release(client_id, None);
            return Err(NotOpened::Superseded);
        }
        let last_node = opened.previous_node.filter(|last| Some(*last) != node);
        let let_go = last_node
            .filter(|last| cluster.members.is_alive(*last))
            .map(|last| self.expect_session(client_id, epoch, last));
        let told = self.announce(cluster, &mailbox, epoch);
        let asked = Instant::now();
        let let_go = match let_go {
            Some(let_go) => let_go.await,
            None => None,
        };
        if let_go.is_some() {
            self.totals
                .takeover
                .of(Where::Remote)
                .observe(asked.elapsed());
        }
        self.peers.expected.lock().remove(client_id);
        let is_abandoned = last_node.is_some() && let_go.is_none();
        if let (Some(last), None) = (last_node, &let_go) {
            // What was in flight with QoS 1 will come again without DUP.
            tracing::debug!(event = "session_not_handed_over", %client_id, node = last);
            // Whatever it may still write, and however wrong its clock is: what this node writes
            // comes after.
            let reserved = cluster.reserved_by(last).await;
            self.flusher.observe(reserved);
        }
        let LetGo {
            in_flight,
            will_discarded,
        } = let_go.unwrap_or_default();
        if will_discarded && let Some(last) = opened.leftovers.last_mut() {
            // The one that this connection has made, if it has.
            let is_own = if last.ended {
                !opened.present
            } else {
                last.session == new_session
            };
            if is_own {
                last.will = None;
            }
        }
        let mut receipt = Receipt::NOTHING;
        for leftover in &opened.leftovers {
            receipt = receipt.max(self.finish(leftover));
        }
        let is_last = |here: &Detached| {
            here.epoch == opened.previous_epoch && Arc::ptr_eq(&here.mailbox, &mailbox)
        };
        let resumed = opened.present.then(|| match here {
            Some(here) if is_last(&here) => here,
            _ => Box::new(self.detached(opened.session, &mailbox, epoch, &in_flight)),
        });
        Ok(Taken {
            mailbox,
            resumed,
            epoch,
            is_saved: true,
            receipt,
            inbox: match told {
                // Nobody else can know of a new session before it subscribes.
                None if !opened.present => Inbox::Known,
                told => Inbox::Shared(told),
            },
            came_from: last_node,
            is_abandoned,
        })
    }

    /// Deals with what a session that was taken has left: publishes its Will, and ends it.
    pub(crate) fn finish(&self, leftover: &Leftover) -> Receipt {
        {
            let mut finishing = self.peers.finishing.lock();
            finishing.retain(|_, receipt| !self.flusher.is_durable(*receipt));
            if let Some(receipt) = finishing.get(&leftover.session) {
                return *receipt;
            }
        }
        let end = Change::EndSession(leftover.session);
        let receipt = match (&leftover.owner, &leftover.will) {
            (Owner::Client(client_id), Some(will)) => {
                failpoint::reach("before_will");
                self.publish_will(client_id, will, end)
            }
            _ => self.flusher.persist(end),
        };
        self.peers
            .finishing
            .lock()
            .insert(leftover.session, receipt);
        receipt
    }

    /// A session as the store has it.
    pub(super) fn detached(
        &self,
        stored: StoredSession,
        mailbox: &Arc<Mailbox>,
        epoch: u64,
        in_flight: &[InFlightMessage],
    ) -> Detached {
        let mut gone = self.shared.filters(mailbox.session);
        let mut subscriptions = SessionSubscriptions::new();
        for StoredSubscription {
            filter,
            options,
            identifier,
        } in stored.subscriptions
        {
            gone.remove(&filter);
            subscriptions.insert(filter.clone(), (options, identifier));
            self.learn(mailbox, epoch, filter, options, identifier);
        }
        for filter in gone {
            self.shared.note(mailbox.session, &filter, epoch, None);
            self.remove_subscription(&filter, mailbox);
        }
        let session = mailbox.session;
        Detached {
            mailbox: mailbox.clone(),
            subscriptions,
            exchanges: Exchanges {
                inbound: stored.awaiting_release.into_iter().collect(),
                outbound: InFlight::restore(session, &stored.exchanges, in_flight),
            },
            record: stored.record,
            epoch,
        }
    }

    /// Gives up a session that another node has taken.
    pub(super) async fn hand_over(
        &self,
        connected: Connected,
        consumer: Consumer,
        mut exchanges: Exchanges,
        will: WillFate,
    ) {
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
        let has_left = !mailbox.is_durable();
        self.leave_seats(&mailbox, &subscriptions, &exchanges, has_left);
        if mailbox.is_durable() {
            self.store_partly_settled(&mailbox).await;
        }
        let in_flight = exchanges.outbound.at_least_once();
        let place = self.shared.place_of(&client_id);
        if place.is_none_or(|place| place.session != Some(mailbox.session)) {
            // The other node has nothing of it: this one ends it, unless it is over already.
            if will == WillFate::Publish
                && let Some(will) = &mut record.will
            {
                will.due_at = Some(unix_ms());
            }
            self.end_session(Detached {
                mailbox,
                subscriptions,
                exchanges,
                record,
                epoch,
            });
        }
        self.clients.release(&client_id, None);
        let taker = self.peers.takers.lock().remove(&client_id);
        if let (Some((node, epoch)), Some(cluster)) = (taker, &self.cluster) {
            let let_go = LetGo {
                in_flight: Vec::new(),
                will_discarded: will == WillFate::Discard,
            };
            self.say_taken_to(cluster, node, &client_id, (None, epoch), let_go);
        } else {
            self.say_taken(&client_id, in_flight);
        }
    }

    /// The client of a session is gone: other nodes need not hand on anything.
    pub(super) fn withdraw(&self, mailbox: &Arc<Mailbox>, epoch: u64) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let place = Place {
            session: mailbox.is_durable().then_some(mailbox.session),
            epoch,
            node: None,
        };
        if self.shared.place(&mailbox.client_id, place) && mailbox.is_durable() {
            let session = mailbox.session;
            cluster.broadcast(&Item::Disown { session, epoch });
        }
    }

    /// Notes what a client of this node subscribes to, for when it is at another one.
    pub(super) fn note_subscription(
        &self,
        connected: &Connected,
        filter: &SubscriptionFilter,
        terms: Option<shared::Terms>,
        is_new: bool,
    ) {
        if self.cluster.is_none() {
            return;
        }
        let mailbox = &connected.mailbox;
        if mailbox.is_durable() {
            self.shared
                .note(mailbox.session, filter, connected.epoch, terms);
        } else if is_new {
            self.want(filter, terms.is_some());
        }
    }

    /// Tells all nodes that a client is here now. Resolves when all of them know, or should: from
    /// then on they send this one what they write for its session.
    pub(super) fn announce(
        &self,
        cluster: &Cluster,
        mailbox: &Arc<Mailbox>,
        epoch: u64,
    ) -> Option<BoxFuture<'static, ()>> {
        let session = mailbox.is_durable().then_some(mailbox.session);
        let nodes = cluster.members.others();
        if nodes.is_empty() {
            return None;
        }
        let (told, all_told) = oneshot::channel();
        let unaware = Unaware {
            nodes: nodes.into_iter().collect(),
            mailbox: mailbox.clone(),
            told: Some(told),
        };
        let key = (mailbox.client_id.clone(), epoch);
        self.peers.unaware.lock().insert(key, unaware);
        cluster.broadcast(&Item::Own {
            client_id: mailbox.client_id.clone(),
            session,
            epoch,
        });
        Some(Box::pin(async move {
            let _ = tokio::time::timeout(ANSWER_TIMEOUT, all_told).await;
        }))
    }

    /// Expects that the last node of a client lets its session go.
    fn expect_session(
        &self,
        client_id: &Arc<str>,
        epoch: u64,
        node: u32,
    ) -> impl Future<Output = Option<LetGo>> + use<> {
        let (let_go, receiver) = oneshot::channel();
        let expected = Expected {
            node,
            epoch,
            let_go,
        };
        let mut all = self.peers.expected.lock();
        // Whoever waited before for the same client has been superseded.
        all.insert(client_id.clone(), expected);
        async move {
            let taken = tokio::time::timeout(ANSWER_TIMEOUT, receiver).await;
            taken.ok().and_then(Result::ok)
        }
    }

    /// Something that another node has sent.
    pub(crate) fn receive(&self, cluster: &Cluster, from: u32, item: Item) {
        match item {
            Item::Deliver { session, chunk } => {
                if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.push_committed(&chunk, Arrival::from_peer());
                }
            }
            Item::Pass {
                session,
                qos,
                retain,
                subscription_identifiers,
                message,
            } => {
                if let Some(group) = self.group_of_inbox(session) {
                    group.push(&message, Arrival::from_peer());
                } else if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.push(Delivery {
                        message,
                        qos,
                        retain,
                        subscription_identifiers,
                        origin: Origin::Memory,
                        arrival: Arrival::from_peer(),
                    });
                }
            }
            Item::Publish { message, publisher } => {
                self.publish_from_elsewhere(&message, &publisher);
            }
            Item::Own {
                client_id,
                session,
                epoch,
            } => {
                self.client_moved(&client_id, session, epoch, from);
                cluster.send(from, &Item::OwnAck { client_id, epoch });
            }
            Item::OwnAck { client_id, epoch } => self.is_aware(&(client_id, epoch), from),
            Item::Taken {
                client_id,
                epoch,
                in_flight,
                will_discarded,
            } => {
                let mut all = self.peers.expected.lock();
                let is_expected = all
                    .get(&client_id)
                    .is_some_and(|expected| (expected.node, expected.epoch) == (from, epoch));
                if is_expected && let Some(expected) = all.remove(&client_id) {
                    // Whoever waited may have given up.
                    let _ = expected.let_go.send(LetGo {
                        in_flight,
                        will_discarded,
                    });
                }
            }
            Item::Disown { session, epoch } => {
                if self.group_disowned(session, epoch) {
                    return;
                }
                let place = Place {
                    session: Some(session),
                    epoch,
                    node: None,
                };
                if let Some(mailbox) = self.shared.mailbox(session)
                    && self.shared.place(&mailbox.client_id, place)
                {
                    mailbox.set_holder(None);
                }
            }
            Item::Route { reset, add, remove } => {
                self.receive_route(from, reset, add, remove);
            }
            Item::Kick { client_id, reason } => {
                self.kick_here(&client_id, reason);
            }
            Item::Figures { name, figures } => self.receive_figures(from, name, &figures),
            Item::Log(position) => cluster.follow_later(Announced::Log(position)),
            Item::Ask { number } => cluster.follow_later(Announced::Ask { from, number }),
            Item::Answer { number } => self.receive_answer(cluster, from, number),
            Item::Offer { session, chunk } => self.receive_offer(cluster, from, session, &chunk),
            Item::Decline { session, key } => self.flusher.declined(session, key),
            Item::Acknowledge { session, key, ids } => self.flusher.taken_over(session, key, &ids),
            Item::Decide { written } => self.receive_decision(from, &written),
            Item::Dispatch {
                group,
                session,
                epoch,
            } => self.receive_dispatch(from, &group, session, epoch),
            Item::Seats {
                session,
                epoch,
                seats,
            } => self.receive_seats(cluster, from, session, epoch, Ok(&seats)),
            Item::Seat {
                session,
                epoch,
                seat,
            } => self.receive_seats(cluster, from, session, epoch, Err(&seat)),
            Item::Give {
                session,
                epoch,
                seat,
                entry,
            } => self.receive_give(from, session, epoch, seat, entry, Arrival::from_peer()),
            item @ (Item::Unseat { .. } | Item::Settled { .. }) => {
                self.receive_from_seat(from, item);
            }
            Item::Ring { session } => {
                if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.doubt();
                }
            }
        }
    }

    /// Delivers what a client of another node has published, to the clients here whose sessions end
    /// with their connections. The inboxes of the others were seen to there.
    fn publish_from_elsewhere(&self, message: &Message, publisher: &Arc<str>) {
        let (matches, _) = self.subscriptions.matches(message.topic());
        for found in &matches.sessions {
            if !found.mailbox.is_durable() {
                // [MQTT-3.8.3-3], of a client that has moved here meanwhile.
                let own = found.mailbox.client_id == *publisher;
                let terms = if own {
                    found.own_terms.as_ref()
                } else {
                    Some(&found.terms)
                };
                if let Some(terms) = terms {
                    found
                        .mailbox
                        .push(terms.delivery(message, Arrival::from_peer()));
                }
            }
        }
    }

    fn client_moved(
        &self,
        client_id: &Arc<str>,
        session: Option<SessionId>,
        epoch: u64,
        node: u32,
    ) {
        let before = self.shared.place_of(client_id);
        // Where a client is whose session ends with its connection is its node's business alone.
        let place = Place {
            session,
            epoch,
            node: session.map(|_| node),
        };
        if !self.shared.place(client_id, place) {
            return;
        }
        if let Some(session) = session {
            let mailbox = self
                .shared
                .mailbox_or(session, || self.shared_mailbox(session, client_id.clone()));
            let detached = self.let_go(client_id, &mailbox, Some(node));
            let was_here = before.is_some_and(|place| place.node == Some(self.flusher.node))
                || detached.is_some()
                || self.is_will_discarded(client_id);
            if self.clients.connected(client_id).is_none() && was_here {
                let exchanges = detached.map(|detached| detached.exchanges);
                let in_flight = exchanges.map(|exchanges| exchanges.outbound.at_least_once());
                self.say_taken(client_id, in_flight.unwrap_or_default());
            }
        } else if let Some(cluster) = &self.cluster
            && self.clients.connected(client_id).is_none()
            && self.is_will_discarded(client_id)
        {
            let let_go = LetGo {
                will_discarded: true,
                ..LetGo::default()
            };
            self.say_taken_to(cluster, node, client_id, (None, epoch), let_go);
        }
        let before = before.and_then(|place| place.session);
        if let Some(mailbox) = self.clients.connected(client_id)
            && Some(mailbox.session) != session
        {
            if session.is_none() {
                let mut takers = self.peers.takers.lock();
                takers.insert(client_id.clone(), (node, epoch));
            }
            self.let_go(client_id, &mailbox, None);
        } else if let Some(before) = before.filter(|before| Some(*before) != session)
            && let Some(mailbox) = self.shared.mailbox(before)
        {
            self.let_go(client_id, &mailbox, None);
        }
    }

    fn is_aware(&self, key: &(Arc<str>, u64), node: u32) {
        let mut all = self.peers.unaware.lock();
        let Some(unaware) = all.get_mut(key).filter(|it| it.nodes.contains(&node)) else {
            // It has joined meanwhile: what it wrote before was for whoever had the client then.
            let place = self.shared.place_of(&key.0);
            let here = Some(self.flusher.node);
            let place = place.filter(|place| place.epoch == key.1 && place.node == here);
            if let Some(mailbox) = place.and_then(|place| self.shared.mailbox(place.session?)) {
                mailbox.doubt();
            }
            return;
        };
        unaware.nodes.remove(&node);
        let is_late = unaware.told.as_ref().is_none_or(oneshot::Sender::is_closed);
        if is_late {
            unaware.mailbox.doubt();
        }
        if unaware.nodes.is_empty()
            && let Some(unaware) = all.remove(key)
            && let Some(told) = unaware.told
        {
            // Whoever waited may have given up.
            let _ = told.send(());
        }
    }

    /// A node is gone: nothing is expected of it any more, and what it may have written and not
    /// handed on has to be looked for.
    pub(crate) fn node_left(&self, node: u32) {
        if let Some(cluster) = &self.cluster {
            self.forget_routes(cluster, node);
        }
        self.miss_decisions(node);
        if let Some(cluster) = &self.cluster {
            self.node_of_groups_left(cluster, node);
        }
        let waiting: Vec<_> = {
            let all = self.peers.unaware.lock();
            let waiting = all
                .iter()
                .filter(|(_, unaware)| unaware.nodes.contains(&node));
            waiting.map(|(key, _)| key.clone()).collect()
        };
        for key in &waiting {
            self.is_aware(key, node);
        }
        for (client_id, place) in self.shared.clients_at(node) {
            let place = Place {
                node: None,
                ..place
            };
            if self.shared.place(&client_id, place)
                && let Some(session) = place.session
                && let Some(mailbox) = self.shared.mailbox(session)
            {
                mailbox.set_holder(None);
            }
        }
        self.look_for_messages();
    }

    /// Reads every inbox of this node's clients again: messages may have got lost on their way from
    /// another node.
    pub(crate) fn look_for_messages(&self) {
        for mailbox in self.shared.mailboxes() {
            mailbox.doubt();
        }
    }

    /// Applies what other nodes have logged, up to `positions`.
    pub(crate) async fn follow(
        &self,
        cluster: &Cluster,
        positions: &[LogPosition],
    ) -> Result<(), StoreError> {
        let mut followed = self.peers.followed.lock().await;
        for position in positions {
            let entry = followed.get(&position.node).copied().unwrap_or(0);
            if position.node == self.flusher.node || position.entry <= entry {
                continue;
            }
            let from = LogPosition { entry, ..*position };
            match cluster.store.read_log(from).await? {
                Some(entries) => {
                    for entry in entries {
                        followed.insert(entry.position.node, entry.position.entry);
                        self.apply(entry);
                    }
                }
                None => {
                    let mut sessions = Vec::new();
                    let positions = cluster
                        .store
                        .load_subscriptions(|session| sessions.push(session))
                        .await?;
                    for session in sessions {
                        self.take_up(session);
                    }
                    for position in positions {
                        followed.insert(position.node, position.entry);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes up all sessions of the cluster as the node starts.
    pub(crate) async fn load_shared(&self, cluster: &Cluster) -> Result<(), StoreError> {
        let mut followed = self.peers.followed.lock().await;
        let positions = cluster
            .store
            .load_subscriptions(|session| self.take_up(session))
            .await?;
        followed.extend(
            positions
                .iter()
                .map(|position| (position.node, position.entry)),
        );
        Ok(())
    }

    fn take_up(&self, session: SharedSession) {
        let client_id = match &session.owner {
            Owner::Client(client_id) => client_id,
            Owner::Group(filter) => return self.take_up_group(filter, &session),
        };
        let place = Place {
            session: Some(session.session),
            epoch: session.epoch,
            node: session.node.filter(|node| *node != self.flusher.node),
        };
        let mailbox = self.shared.mailbox_or(session.session, || {
            self.shared_mailbox(session.session, client_id.clone())
        });
        if self.shared.place(client_id, place) {
            mailbox.set_holder(place.node);
        }
        for subscription in session.subscriptions {
            self.learn(
                &mailbox,
                session.epoch,
                subscription.filter,
                subscription.options,
                subscription.identifier,
            );
        }
    }

    fn take_up_group(&self, filter: &SubscriptionFilter, session: &SharedSession) {
        let group = self.learn_group(filter, session.session, session.epoch);
        let node = session.node.filter(|node| *node != self.flusher.node);
        if let (Some(group), Some(node)) = (group, node) {
            let place = GroupPlace {
                session: session.session,
                epoch: session.epoch,
                node,
                is_saved: true,
            };
            self.place_group(&group, place);
        }
    }

    fn apply(&self, entry: LogEntry) {
        for LogOp {
            session,
            epoch,
            action,
        } in entry.ops
        {
            match action {
                LogAction::Subscribe {
                    owner: Owner::Client(client_id),
                    filter,
                    options,
                    identifier,
                } => {
                    if self.shared.has_ended(session) {
                        continue;
                    }
                    let mailbox = self
                        .shared
                        .mailbox_or(session, || self.shared_mailbox(session, client_id));
                    self.learn(&mailbox, epoch, filter, options, identifier);
                }
                LogAction::Unsubscribe(filter) => {
                    if self.shared.note(session, &filter, epoch, None) != Noted::Nothing
                        && let Some(mailbox) = self.shared.mailbox(session)
                    {
                        self.remove_subscription(&filter, &mailbox);
                    }
                }
                LogAction::End => self.forget_session(session),
                LogAction::OpenGroup(filter) => {
                    self.learn_group(&filter, session, epoch);
                }
                LogAction::Subscribe { .. } => {}
            }
        }
    }

    fn learn(
        &self,
        mailbox: &Arc<Mailbox>,
        epoch: u64,
        filter: SubscriptionFilter,
        options: SubscribeOptions,
        identifier: Option<u32>,
    ) {
        let terms = Some((options, identifier));
        // Nothing is gathered meanwhile: each message has been matched either before or after it.
        let mut additions = self.flusher.add();
        let noted = self.shared.note(mailbox.session, &filter, epoch, terms);
        // A group has messages of its own.
        if noted == Noted::Nothing || filter.share.is_some() {
            return;
        }
        let version = self
            .subscriptions
            .subscribe(&filter.filter, mailbox, options, identifier);
        if noted == Noted::Changed {
            return;
        }
        let learned = Learned {
            version,
            mailbox: mailbox.clone(),
            filter,
            options,
            identifier,
        };
        additions.catch_up(mailbox, version, |message| learned.delivery(message));
        self.shared.learn(learned);
    }

    /// Nothing more is for a session that has ended.
    pub(super) fn forget_session(&self, session: SessionId) {
        if let Some(cluster) = &self.cluster {
            cluster.store.forget(session, u64::MAX);
        }
        if let Some((mailbox, filters)) = self.shared.end(session) {
            for filter in filters {
                self.remove_subscription(&filter, &mailbox);
            }
            if mailbox.group.is_some() {
                self.forget_group(session);
            }
        }
    }

    /// A session that is known everywhere is not subscribed any more.
    fn remove_subscription(&self, filter: &SubscriptionFilter, mailbox: &Arc<Mailbox>) {
        if filter.share.is_some() {
            self.member_ended(filter, &mailbox.client_id);
        } else {
            self.subscriptions.unsubscribe(&filter.filter, mailbox);
        }
    }

    /// The mailbox of a session that other nodes write to as well.
    pub(super) fn shared_mailbox(&self, session: SessionId, client_id: Arc<str>) -> Arc<Mailbox> {
        self.mailbox(session, client_id, None, true, InboxSummary::default())
    }
}
