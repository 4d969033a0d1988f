//! A session goes from one node of the cluster to another.
//!
//! The node that a client connects to takes its session in the store, from when on nobody else can
//! write to it, and tells all nodes that the client is there now ([`Node::announce`]). What the last
//! one has not written yet, and what its client has not acknowledged, it says as it lets the session
//! go. So a node that takes a session over finds in the store what was written before, and is sent
//! what is written after; the two meet where all others have acknowledged that they know of the new
//! place.

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
use super::flush::{Additions, Receipt, unix_ms};
use super::mailbox::Mailbox;
use super::sessions::{Connected, NotOpened, Taken, WillFate};
use super::shared::Place;
use crate::bus::wire::Item;
use crate::cluster::Cluster;
use crate::failpoint;
use crate::metrics::{Operation, Where};
use crate::mqtt::PacketId;
use crate::session::Exchanges;
use crate::session::connect::Terms;
use crate::session::outbound::InFlight;
use crate::store::mongodb::{Leftover, OpenRequest};
use crate::store::{
    Change, InboxSummary, MessageId, Owner, SessionId, StoredSession, StoredSubscription,
};

/// How long a node that takes a session over waits for what the others have to say.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// Sessions on their way to this node, or away from it.
#[derive(Default)]
pub(super) struct Takeovers {
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
pub(super) struct LetGo {
    pub(super) in_flight: Vec<InFlightMessage>,
    pub(super) will_discarded: bool,
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
            Some(_) => SessionId::random(),
            None => claimed.session,
        };
        let request = OpenRequest {
            client_id: client_id.clone(),
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
        let is_newest = {
            let _in_one_step = self.flusher.add();
            let is_newest = self.shared.place(client_id, place);
            // Else the inbox is that of the node that has taken the session since.
            if is_newest {
                mailbox.regain();
            }
            is_newest
        };
        // Whoever had the client before this may have been heard of only now.
        self.clients.rebind(client_id, &mailbox);
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
        self.takeovers.expected.lock().remove(client_id);
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
        self.takeovers.unaware.lock().insert(key, unaware);
        cluster.broadcast(&Item::Own {
            client_id: mailbox.client_id.clone(),
            session,
            epoch,
        });
        Some(Box::pin(async move {
            let _ = tokio::time::timeout(ANSWER_TIMEOUT, all_told).await;
        }))
    }

    /// A node knows where a client is now.
    pub(super) fn is_aware(&self, key: &(Arc<str>, u64), node: u32) {
        let mut all = self.takeovers.unaware.lock();
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
        let mut all = self.takeovers.expected.lock();
        // Whoever waited before for the same client has been superseded.
        all.insert(client_id.clone(), expected);
        async move {
            let taken = tokio::time::timeout(ANSWER_TIMEOUT, receiver).await;
            taken.ok().and_then(Result::ok)
        }
    }

    /// The last node of a client has let its session go.
    pub(super) fn session_let_go(
        &self,
        from: u32,
        client_id: &Arc<str>,
        epoch: u64,
        let_go: LetGo,
    ) {
        let mut all = self.takeovers.expected.lock();
        let is_expected = all
            .get(client_id)
            .is_some_and(|expected| (expected.node, expected.epoch) == (from, epoch));
        if is_expected && let Some(expected) = all.remove(client_id) {
            // Whoever waited may have given up.
            let _ = expected.let_go.send(let_go);
        }
    }

    /// A node is gone: it need not know any more where clients are.
    pub(super) fn expect_nothing_of(&self, node: u32) {
        let waiting: Vec<_> = {
            let all = self.takeovers.unaware.lock();
            let waiting = all
                .iter()
                .filter(|(_, unaware)| unaware.nodes.contains(&node));
            waiting.map(|(key, _)| key.clone()).collect()
        };
        for key in &waiting {
            self.is_aware(key, node);
        }
    }

    /// Deals with what a session that was taken has left: publishes its Will, and ends it.
    pub(crate) fn finish(&self, leftover: &Leftover) -> Receipt {
        {
            let mut finishing = self.takeovers.finishing.lock();
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
        self.takeovers
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

    /// Notes where the client of a session is, and so whose its inbox is, unless that is known to be out
    /// of date.
    pub(super) fn place(&self, mailbox: &Arc<Mailbox>, place: Place) -> bool {
        let _in_one_step = self.flusher.add();
        let is_news = self.shared.place(&mailbox.client_id, place);
        if is_news {
            mailbox.set_holder(place.node);
        }
        is_news
    }

    /// A client is at another node now.
    pub(super) fn client_moved(
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
        let in_one_step = self.flusher.add();
        if !self.shared.place(client_id, place) {
            return;
        }
        let detached = if let Some(session) = session {
            let mailbox = self
                .shared
                .mailbox_or(session, || self.shared_mailbox(session, client_id.clone()));
            self.let_go(in_one_step, client_id, &mailbox, Some(node))
        } else {
            drop(in_one_step);
            None
        };
        if session.is_some() {
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
                let mut takers = self.takeovers.takers.lock();
                takers.insert(client_id.clone(), (node, epoch));
            }
            self.let_go(self.flusher.add(), client_id, &mailbox, None);
        } else if let Some(before) = before.filter(|before| Some(*before) != session)
            && let Some(mailbox) = self.shared.mailbox(before)
        {
            self.let_go(self.flusher.add(), client_id, &mailbox, None);
        }
    }

    /// Lets go of sessions that another node has taken, as a write has shown.
    pub(super) fn lose(&self, sessions: &[SessionId]) {
        for session in sessions {
            if self.group_lost(*session) {
                continue;
            }
            if let Some(mailbox) = self.shared.mailbox(*session) {
                let in_one_step = self.flusher.add();
                let place = self.shared.place_of(&mailbox.client_id);
                // Its new node may not have been heard of yet.
                let holder = place.and_then(|place| place.node);
                let holder = holder.filter(|node| *node != self.flusher.node);
                self.let_go(in_one_step, &mailbox.client_id, &mailbox, holder);
            }
        }
    }

    /// Ends what this node has of a client that another node has now. Its connection says so
    /// elsewhere when it has ended; what is there without one is returned.
    fn let_go(
        &self,
        mut additions: Additions<'_>,
        client_id: &Arc<str>,
        mailbox: &Arc<Mailbox>,
        holder: Option<u32>,
    ) -> Option<Box<Detached>> {
        // Whoever adds a message from now on hands it on to the other node.
        mailbox.lose(holder);
        additions.tick();
        drop(additions);
        let of_session = |detached: &mut Detached| Arc::ptr_eq(&detached.mailbox, mailbox);
        self.clients.with_detached(client_id, of_session)
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
        let taker = self.takeovers.takers.lock().remove(&client_id);
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
        let mut wills = self.takeovers.discarded.lock();
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
        self.takeovers.discarded.lock().clients.remove(client_id);
    }

    fn is_will_discarded(&self, client_id: &Arc<str>) -> bool {
        self.takeovers
            .discarded
            .lock()
            .clients
            .contains_key(client_id)
    }
}
