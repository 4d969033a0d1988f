//! Messages that need not be written, because their clients take them over in time.
//!
//! A flush is held back for a moment before it is written. Its messages of QoS 1 are on their way
//! already to clients that are connected: here by their mailboxes, elsewhere because they are
//! offered to the node that has the client. What a client acknowledges meanwhile is its own: it is
//! taken out of the flush ([`Held`]). The rest is written and handed on like everything else, since
//! it may have been declined too late to be heard; and who was offered something is told what of it
//! that was: it has to remove that from the store once its client is done with it, and nothing else.
//!
//! Nothing rests on another node: one that does not answer, or dies, lets the moment pass.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;

use super::Node;
use super::flush::unix_ms;
use super::mailbox::Mailbox;
use crate::bus::wire::Item;
use crate::cluster::Cluster;
use crate::metrics::Arrival;
use crate::mqtt::QoS;
use crate::store::{Change, Chunk, Entry, MessageId, SessionId};

/// How long a flush is held back at most.
///
/// A few round trips between nodes; clients that need longer are soon not waited for any more.
pub(super) const WINDOW: Duration = Duration::from_millis(5);

/// The place of each chunk among the changes of a flush.
pub(super) type Places = HashMap<(SessionId, MessageId), usize>;

/// What of its offers was written, by node.
pub(super) type Decisions = HashMap<u32, Vec<(SessionId, MessageId)>>;

/// A message of a chunk that another node has offered, which the client has taken over.
pub(crate) struct TakenOver {
    /// Of the chunk.
    pub(super) key: MessageId,
    pub(super) id: MessageId,
}

/// The changes of a flush that is about to be written.
pub(super) struct Held {
    changes: Vec<Change>,
    places: Places,
    first_hlc: u64,
    /// Chunks that are on their way to a client, by their place.
    candidates: HashMap<usize, Candidate>,
    /// Messages of those that may still be taken over in time.
    open: usize,
    /// What of the offers is written, by node; all to whom anything was offered are there.
    decisions: Decisions,
}

struct Candidate {
    mailbox: Arc<Mailbox>,
    /// The node that has the client, if it is not this one.
    offered_to: Option<u32>,
}

impl Held {
    pub(super) fn new(changes: Vec<Change>, places: Places, first_hlc: u64) -> Self {
        Self {
            changes,
            places,
            first_hlc,
            candidates: HashMap::new(),
            open: 0,
            decisions: Decisions::new(),
        }
    }

    /// Waits for the client of a chunk, if it is one that can be left out and its client is worth
    /// waiting for.
    pub(super) fn wait_for(&mut self, mailbox: &Arc<Mailbox>, place: usize, now_ms: u64) {
        let Change::Enqueue {
            chunk, guard: None, ..
        } = &self.changes[place]
        else {
            return;
        };
        let can_be_left_out = |entry: &Entry| entry.qos == QoS::AtLeastOnce;
        if chunk.entries.is_empty()
            || !chunk.entries.iter().all(can_be_left_out)
            || !mailbox.patience().is_worth(now_ms)
        {
            return;
        }
        self.open += chunk.entries.len();
        let candidate = Candidate {
            mailbox: mailbox.clone(),
            offered_to: mailbox.holder(),
        };
        self.candidates.insert(place, candidate);
    }

    pub(super) fn is_open(&self) -> bool {
        self.open > 0
    }

    /// What is to be offered to other nodes.
    pub(super) fn offers(&mut self) -> Vec<(u32, Item)> {
        let offers = self.candidates.iter().filter_map(|(place, candidate)| {
            let node = candidate.offered_to?;
            let Change::Enqueue { session, chunk, .. } = &self.changes[*place] else {
                return None;
            };
            let (session, chunk) = (*session, chunk.clone());
            Some((node, Item::Offer { session, chunk }))
        });
        let mut offers: Vec<_> = offers.collect();
        for (node, _) in &offers {
            self.decisions.entry(*node).or_default();
        }
        // Chunks of one session in their order.
        offers.sort_unstable_by_key(|(_, item)| match item {
            Item::Offer { chunk, .. } => chunk.key,
            _ => MessageId::MIN,
        });
        offers
    }

    pub(super) fn may_have(&self, id: MessageId) -> bool {
        id.hlc >= self.first_hlc
    }

    /// A client has taken over a message; returns whether it was to be written.
    pub(super) fn settle(&mut self, session: SessionId, key: MessageId, id: MessageId) -> bool {
        let Some(&place) = self.places.get(&(session, key)) else {
            return false;
        };
        let is_taken = take_out(&mut self.changes[place], id).is_some();
        if is_taken && self.candidates.contains_key(&place) {
            self.open -= 1;
        }
        is_taken
    }

    /// A node does not have a chunk delivered that it was offered.
    pub(super) fn decline(&mut self, session: SessionId, key: MessageId) {
        let place = self.places.get(&(session, key));
        if let Some(place) = place
            && self.candidates.remove(place).is_some()
            && let Change::Enqueue { chunk, .. } = &self.changes[*place]
        {
            self.open -= chunk.entries.len();
        }
    }

    /// What is left to be written.
    pub(super) fn end(mut self) -> (Vec<Change>, Decisions) {
        let now_ms = unix_ms();
        for (place, candidate) in &self.candidates {
            let Change::Enqueue { session, chunk, .. } = &self.changes[*place] else {
                continue;
            };
            let in_time = chunk.entries.is_empty();
            candidate.mailbox.patience().note(in_time, now_ms);
            if let Some(node) = candidate.offered_to
                && !in_time
            {
                let written = self.decisions.entry(node).or_default();
                written.push((*session, chunk.key));
            }
        }
        (self.changes, self.decisions)
    }
}

/// Takes a message out of the chunk that a change adds.
pub(super) fn take_out(change: &mut Change, id: MessageId) -> Option<Entry> {
    let Change::Enqueue { chunk, .. } = change else {
        return None;
    };
    let at = chunk.entries.binary_search_by_key(&id, |entry| entry.id);
    at.ok().map(|at| chunk.entries.remove(at))
}

/// What other nodes have offered to this one and have not decided on.
pub(super) type Undecided = HashMap<u32, Offered>;

/// What one node has offered.
#[derive(Default)]
pub(super) struct Offered {
    /// Chunks that are on their way to their clients.
    accepted: Vec<(Arc<Mailbox>, MessageId)>,
    /// Sessions of which a chunk comes only once it is written: what follows must not overtake it.
    declined: HashSet<SessionId>,
}

impl Node {
    /// Another node waits for the client of a session to take over these messages.
    pub(super) fn receive_offer(
        &self,
        cluster: &Cluster,
        from: u32,
        session: SessionId,
        chunk: &Chunk,
        arrival: Arrival,
    ) {
        let key = chunk.key;
        let mut undecided = self.undecided.lock();
        let offered = undecided.entry(from).or_default();
        if !offered.declined.contains(&session)
            && let Some(mailbox) = self.shared.mailbox(session)
            && mailbox.push_offered(chunk, arrival)
        {
            offered.accepted.push((mailbox, key));
            return;
        }
        offered.declined.insert(session);
        drop(undecided);
        cluster.send(from, &Item::Decline { session, key });
    }

    /// Tells the nodes that wait for it what the client of a session has taken over.
    pub(crate) fn say_taken_over(&self, session: SessionId, taken: &[TakenOver]) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        for of_chunk in taken.chunk_by(|one, next| one.key == next.key) {
            let key = of_chunk[0].key;
            let ids = of_chunk.iter().map(|taken| taken.id).collect();
            cluster.send(key.node, &Item::Acknowledge { session, key, ids });
        }
    }

    /// A node has written some of what it has offered, and all else of it never will be.
    pub(super) fn receive_decision(&self, from: u32, written: &[(SessionId, MessageId)]) {
        let written: HashSet<_> = written.iter().copied().collect();
        self.decide(from, |chunk| written.contains(&chunk));
    }

    /// What a node has decided will not be heard of any more. To remove what is not there does no
    /// harm.
    pub(crate) fn miss_decisions(&self, from: u32) {
        self.decide(from, |_| true);
    }

    fn decide(&self, from: u32, is_written: impl Fn((SessionId, MessageId)) -> bool) {
        let undecided = self.undecided.lock().remove(&from);
        let Some(undecided) = undecided else {
            return;
        };
        // While the flush is held, as for all else that clients are done with.
        let mut additions = self.flusher.add();
        for (mailbox, key) in undecided.accepted {
            let session = mailbox.session;
            if mailbox.decide(key, is_written((session, key))) {
                additions.persist(Change::Dequeue {
                    session,
                    key,
                    guard: None,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;

    use super::*;
    use crate::auth::{self, CurrentAccess};
    use crate::broker::NodeLimits;
    use crate::broker::consumer::{Consumer, Inbox};
    use crate::broker::flush::{Flusher, Receipt};
    use crate::broker::mailbox::{MailboxLimits, Patience, QueueFull};
    use crate::config::Config;
    use crate::mqtt::message::MessageParts;
    use crate::mqtt::{Message, ProtocolVersion};
    use crate::session::{Delivery, Origin};
    use crate::store::memory::MemoryStore;
    use crate::store::{InboxRange, InboxSummary, Owner, SessionRecord, Store, StoreError};

    /// A node that holds its flushes back, and writes them.
    struct Running {
        node: Arc<Node>,
        store: Arc<MemoryStore>,
        writer: JoinHandle<StoreError>,
    }

    impl Running {
        fn start() -> Self {
            let store = Arc::new(MemoryStore::default());
            let flusher = Arc::new(Flusher::new(store.clone(), 1, 0, true));
            let limits = NodeLimits {
                mailbox: MailboxLimits {
                    queue_messages_max: 100,
                    queue_bytes_max: 1 << 20,
                    queue_full: QueueFull::DropOldest,
                    memory_messages_max: 100,
                    memory_bytes_max: 1 << 20,
                },
                subscriptions_per_client_max: 1,
                retained_messages_max: 0,
                topic_levels_max: 8,
                topic_bytes_max: 100,
                session_expiry_max: u32::MAX,
            };
            let access = auth::from_config(&Config::default().auth).unwrap();
            let authorizer = Arc::new(CurrentAccess::new(access));
            let node = Node::new(
                "node".into(),
                limits,
                authorizer,
                store.clone(),
                flusher,
                None,
                Arc::default(),
            );
            let node = Arc::new(node);
            let writing = node.clone();
            let writer = tokio::spawn(async move { writing.flusher.run(&writing).await });
            Self {
                node,
                store,
                writer,
            }
        }

        /// A client that is connected and takes messages.
        async fn client(&self, number: u8) -> Subscriber {
            let session = SessionId([number; 12]);
            let client_id: Arc<str> = format!("client-{number}").into();
            let record = SessionRecord {
                owner: Owner::Client(client_id.clone()),
                session,
                version: ProtocolVersion::V5,
                connected: true,
                expiry_interval: u32::MAX,
                ends_at: None,
                will: None,
                clock: 0,
            };
            let saved = self
                .node
                .flusher
                .persist(Change::SaveSession(Box::new(record)));
            self.node.flusher.durable(saved).await.unwrap();
            let summary = InboxSummary::default();
            let mailbox = self.node.mailbox(session, client_id, None, true, summary);
            let consumer = self.node.attach(&mailbox, Inbox::Known);
            Subscriber { mailbox, consumer }
        }

        /// Publishes a message with QoS 1 to all of these.
        fn publish(&self, subscribers: &[&Subscriber]) -> Receipt {
            let message = Message::new(MessageParts {
                topic: "t",
                qos: QoS::AtLeastOnce,
                retain: false,
                expires_at: None,
                properties: &[],
                payload: b"hello",
            });
            let mut additions = self.node.flusher.add();
            for subscriber in subscribers {
                let delivery = Delivery {
                    message: message.clone(),
                    qos: QoS::AtLeastOnce,
                    retain: false,
                    subscription_identifiers: None,
                    origin: Origin::Memory,
                    arrival: Arrival::NONE,
                };
                additions.enqueue(&subscriber.mailbox, delivery, None);
            }
            additions.receipt()
        }

        async fn stored(&self, subscriber: &Subscriber) -> usize {
            let range = InboxRange {
                session: subscriber.mailbox.session,
                from: MessageId::MIN,
                before: MessageId {
                    hlc: u64::MAX,
                    ..MessageId::MIN
                },
                bytes_max: usize::MAX,
            };
            let chunks = self.store.read_inbox(range).await.unwrap();
            chunks.iter().map(|chunk| chunk.entries.len()).sum()
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.writer.abort();
        }
    }

    struct Subscriber {
        mailbox: Arc<Mailbox>,
        consumer: Consumer,
    }

    impl Subscriber {
        async fn receive(&mut self) -> MessageId {
            loop {
                if let Some(delivery) = self.consumer.next() {
                    let Origin::Inbox(id) = delivery.origin else {
                        panic!("it is in no inbox");
                    };
                    return id;
                }
                let ready = std::future::poll_fn(|context| self.consumer.poll_ready(context));
                ready.await.unwrap();
            }
        }

        async fn receive_and_acknowledge(&mut self, node: &Node) {
            let id = self.receive().await;
            node.flusher.add().settle(&self.mailbox, &[id]);
        }
    }

    fn counted(node: &Node) -> (u64, u64) {
        let load = |counter: &std::sync::atomic::AtomicU64| {
            counter.load(std::sync::atomic::Ordering::Relaxed)
        };
        let flusher = &node.flusher;
        (
            load(&flusher.inbox_messages_written),
            load(&flusher.inbox_messages_elided),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn what_all_clients_acknowledge_in_time_is_never_written() {
        let running = Running::start();
        let mut one = running.client(1).await;
        let mut two = running.client(2).await;

        let receipt = running.publish(&[&one, &two]);
        assert!(!running.node.flusher.is_durable(receipt));
        one.receive_and_acknowledge(&running.node).await;
        two.receive_and_acknowledge(&running.node).await;
        running.node.flusher.durable(receipt).await.unwrap();

        assert_eq!(counted(&running.node), (0, 2));
        assert_eq!(running.stored(&one).await, 0);
        assert_eq!(running.stored(&two).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_message_of_a_client_that_does_not_acknowledge_is_written() {
        let running = Running::start();
        let mut one = running.client(1).await;
        let mut two = running.client(2).await;

        let receipt = running.publish(&[&one, &two]);
        one.receive_and_acknowledge(&running.node).await;
        let late = two.receive().await;
        running.node.flusher.durable(receipt).await.unwrap();
        assert_eq!(counted(&running.node), (1, 1));
        assert_eq!(running.stored(&one).await, 0);
        assert_eq!(running.stored(&two).await, 1);

        running.node.flusher.add().settle(&two.mailbox, &[late]);
        let everything = running.node.flusher.everything();
        running.node.flusher.durable(everything).await.unwrap();
        assert_eq!(running.stored(&two).await, 0);
    }

    #[test]
    fn a_client_that_was_waited_for_in_vain_is_not_waited_for_again_at_once() {
        let patience = Patience::default();
        assert!(patience.is_worth(1_000));

        patience.note(false, 1_000);
        assert!(!patience.is_worth(1_001));
        assert!(patience.is_worth(2_000));
        (0..30).for_each(|_| patience.note(false, 2_000));
        assert!(!patience.is_worth(5_000));
        assert!(patience.is_worth(60_000), "never for good");
        patience.note(true, 60_000);
        patience.note(false, 60_000);
        assert!(patience.is_worth(61_000), "it begins anew");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_client_that_is_away() {
        let running = Running::start();
        let away = running.client(1).await;
        away.mailbox.detach();

        let published = tokio::time::Instant::now();
        let receipt = running.publish(&[&away]);
        running.node.flusher.durable(receipt).await.unwrap();
        assert!(published.elapsed() < WINDOW);
        assert_eq!(running.stored(&away).await, 1);
    }

    fn chunk(id: MessageId) -> Chunk {
        let message = Message::new(MessageParts {
            topic: "t",
            qos: QoS::AtLeastOnce,
            ..MessageParts::default()
        });
        let entry = Entry {
            id,
            qos: QoS::AtLeastOnce,
            retain: false,
            subscription_identifiers: None,
            message,
        };
        Chunk {
            key: id,
            entries: vec![entry],
        }
    }

    /// Who offers a chunk does not know in time whether it is taken, and hands it on if in doubt.
    #[tokio::test(start_paused = true)]
    async fn what_was_offered_and_is_handed_on_comes_once() {
        let running = Running::start();
        let mut one = running.client(1).await;
        let offered = chunk(running.node.flusher.add().next_id());

        assert!(one.mailbox.push_offered(&offered, Arrival::NONE));
        one.mailbox.push_committed(&offered, Arrival::NONE);
        assert_eq!(one.receive().await, offered.key);
        let settled = running
            .node
            .flusher
            .add()
            .settle(&one.mailbox, &[offered.key]);
        assert_eq!(settled.len(), 1, "the other node has to be told");
        one.mailbox.push_committed(&offered, Arrival::NONE);
        assert!(one.mailbox.decide(offered.key, true), "to be removed");

        let next = chunk(running.node.flusher.add().next_id());
        one.mailbox.push_committed(&next, Arrival::NONE);
        assert_eq!(one.receive().await, next.key);
    }

    /// Its node was not waited for when the inbox was read.
    #[tokio::test(start_paused = true)]
    async fn what_is_handed_on_late_comes_only_if_it_is_still_in_the_inbox() {
        let running = Running::start();
        let (gone, waiting) = {
            let mut additions = running.node.flusher.add();
            (chunk(additions.next_id()), chunk(additions.next_id()))
        };
        let mut one = running.client(1).await;
        let session = one.mailbox.session;
        let written = running.node.flusher.persist(Change::Enqueue {
            session,
            chunk: waiting.clone(),
            guard: None,
        });
        running.node.flusher.durable(written).await.unwrap();

        one.mailbox.push_committed(&gone, Arrival::NONE);
        one.mailbox.push_committed(&waiting, Arrival::NONE);
        assert_eq!(one.receive().await, waiting.key);
        assert!(!one.mailbox.push_offered(&gone, Arrival::NONE));
    }

    /// Its node says so when this one is behind.
    #[tokio::test(start_paused = true)]
    async fn what_is_only_told_of_is_read_before_what_is_handed_on_after_it() {
        let running = Running::start();
        let mut one = running.client(1).await;
        let chunks = {
            let mut additions = running.node.flusher.add();
            [0; 4].map(|_| chunk(additions.next_id()))
        };
        for chunk in &chunks {
            let written = running.node.flusher.persist(Change::Enqueue {
                session: one.mailbox.session,
                chunk: chunk.clone(),
                guard: None,
            });
            running.node.flusher.durable(written).await.unwrap();
        }

        let [first, second, third, fourth] = &chunks;
        one.mailbox.read_committed(first.key);
        one.mailbox.push_committed(second, Arrival::NONE);
        one.mailbox.read_committed(third.key);
        for chunk in [first, second, third] {
            assert_eq!(one.receive().await, chunk.key);
        }
        one.mailbox.read_committed(third.key);
        one.mailbox.push_committed(fourth, Arrival::NONE);
        assert_eq!(one.receive().await, fourth.key, "none comes twice");
    }
}
