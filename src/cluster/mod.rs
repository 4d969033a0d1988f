//! All nodes together: who there is, how they tell each other, and what each does for the others.
//!
//! [`link`] carries what they tell each other, [`membership`] knows who is alive, [`opening`] takes
//! sessions from the store. What it all means for the clients of a node is `broker::peers`' business.

pub(crate) mod link;
mod membership;
mod opening;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use crate::broker::inspect::StoreHealth;
use crate::broker::{LastTopic, Node};
use crate::bus::Destination;
use crate::bus::wire::{Header, Item};
use crate::failpoint;
use crate::metrics::{Arrival, Operation, StoreTotals};
use crate::store::mongodb::{MongoStore, NodeState, OpenRequest, OpenedSession};
use crate::store::{LogEntry, StoreError};
use link::Links;
pub(crate) use link::Marks;
use membership::Members;
use opening::Opener;

/// How far ahead of its clock a node may be, as the others know: whoever takes over from it begins
/// after that.
pub(crate) const RESERVED_MS: u64 = 2_000;

/// How long MongoDB may take nothing, which in a fail-over is a few seconds, before that is told.
const UNAVAILABLE_AFTER: Duration = Duration::from_secs(12);

/// How long a Will of a client whose node died waits: it may come back at another one.
const WILL_GRACE: Duration = Duration::from_secs(5);

/// How often the clients of a node that is gone are looked for.
const RELEASE_INTERVAL: Duration = Duration::from_secs(10);

/// Announced log entries that wait to be read.
const ANNOUNCED_MAX: usize = 1024;

/// How late something is when any node does it for the one whose business it was.
const LATE: Duration = Duration::from_secs(5);

/// Sessions that are taken at a time to do for them what is due.
const DUE_MAX: i64 = 100;

/// How often inboxes are read for messages that got lost on their way between nodes.
const SWEEP_INTERVAL: Duration = Duration::from_secs(300);

/// How often what ended sessions have left is removed.
const GARBAGE_INTERVAL: Duration = Duration::from_secs(60);

/// This node's part in a cluster.
pub(crate) struct Cluster {
    pub(crate) store: Arc<MongoStore>,
    pub(crate) links: Links,
    pub(crate) members: Members,
    opener: Opener,
    announced: mpsc::Sender<Announced>,
    /// When the store last took a heartbeat.
    last_beat: Mutex<Instant>,
}

/// What another node has said of its subscription log.
#[derive(Debug)]
pub(crate) enum Announced {
    /// It has come so far. What the entry has, unless that is to be read.
    Log(LogEntry),
    /// It asks to be told when all of this is known.
    Ask { from: u32, number: u64 },
}

impl Cluster {
    /// What the receiver yields is to be given to [`Cluster::run`].
    pub(crate) fn new(
        store: Arc<MongoStore>,
        links: Links,
        totals: Arc<StoreTotals>,
    ) -> (Self, mpsc::Receiver<Announced>) {
        let (announced, receiver) = mpsc::channel(ANNOUNCED_MAX);
        let cluster = Self {
            opener: Opener::start(store.clone(), totals),
            store,
            links,
            members: Members::default(),
            announced,
            last_beat: Mutex::new(Instant::now()),
        };
        (cluster, receiver)
    }

    /// The number of this node: no other has it, or ever had it.
    pub(crate) fn node(&self) -> u32 {
        self.store.node()
    }

    /// Whether MongoDB takes what this node writes.
    pub(crate) fn store_health(&self) -> StoreHealth {
        let silence = self.last_beat.lock().elapsed();
        if silence < UNAVAILABLE_AFTER {
            return StoreHealth::Available;
        }
        let seconds = silence.as_secs();
        StoreHealth::Unavailable {
            reason: format!("MongoDB has taken nothing for {seconds} s"),
        }
    }

    pub(crate) fn marks(&self) -> &Marks {
        self.links.marks()
    }

    /// Returns whether the publisher of a message had better wait: see [`Links::send`].
    pub(crate) fn send(&self, node: u32, item: &Item) -> bool {
        self.links.send(Destination::Node(node), item)
    }

    pub(crate) fn broadcast(&self, item: &Item) {
        self.links.send(Destination::All, item);
    }

    /// Takes the session of a client from whoever has it; `None` if somebody has taken it since.
    ///
    /// # Errors
    /// `StoreError` if it is not certain whose it is now.
    pub(crate) async fn open(
        &self,
        request: OpenRequest,
    ) -> Result<Option<OpenedSession>, StoreError> {
        self.opener.open(request).await
    }

    /// Has a log read that another node has announced, or an answer given once that is done.
    pub(crate) fn follow_later(&self, announced: Announced) {
        // What does not fit is read before it matters, by the next flush; who asks waits for a while.
        let _ = self.announced.try_send(announced);
    }

    /// The clock value that a node will not have gone beyond, even if it still runs.
    pub(crate) async fn reserved_by(&self, node: u32) -> u64 {
        if let Some(reserved) = self.members.reserved_by_gone(node) {
            return reserved;
        }
        let rows = self.store.nodes().await.unwrap_or_default();
        let row = rows.iter().find(|row| row.node == node);
        row.map_or(0, |row| row.reserved_hlc)
    }

    /// The other nodes that are up, also those that have come just now.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn others_up(&self) -> Result<Vec<u32>, StoreError> {
        let rows = self.store.nodes().await?.into_iter();
        let others = rows.filter(|row| row.state == NodeState::Up && row.node != self.node());
        Ok(others.map(|row| row.node).collect())
    }

    /// Gets to know the other nodes.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn join(&self, node: &Node) -> Result<(), StoreError> {
        let reserved = node.flusher.reservation(RESERVED_MS);
        self.store.join(reserved).await?;
        node.flusher.reserve(reserved);
        // What nodes that are gone have written comes before what this one will write.
        let rows = self.store.nodes().await?;
        for gone in rows.iter().filter(|row| row.state == NodeState::Dead) {
            node.flusher.observe(gone.reserved_hlc);
        }
        let changes = self.members.look(&self.store, Instant::now()).await?;
        self.links.set_alive(&self.members.others());
        for joined in changes.joined {
            node.greet(self, joined);
        }
        node.forget_absent_dispatchers(self);
        Ok(())
    }

    /// Says goodbye to the other nodes.
    pub(crate) async fn leave(&self) {
        let leaving = async {
            // Of clients that did not let go in time.
            self.release(self.node()).await?;
            self.store.leave().await
        };
        if let Err(error) = leaving.await {
            tracing::warn!(event = "leave_failed", %error);
        }
    }

    /// Does what has to be done every now and then, until this node is declared dead. One that stops
    /// does no more than to stay alive.
    pub(crate) async fn run(
        &self,
        node: &Node,
        mut announced: mpsc::Receiver<Announced>,
    ) -> StoreError {
        tokio::select! {
            error = self.beat(node) => error,
            Some(error) = node.stopping.run_until_cancelled(self.look_after(node)) => error,
            () = async {
                while let Some(announced) = announced.recv().await {
                    match announced {
                        Announced::Log(entry) => {
                            if let Err(error) = node.follow_announced(self, entry).await {
                                tracing::warn!(event = "log_unreadable", %error);
                            }
                        }
                        Announced::Ask { from, number } => {
                            self.send(from, &Item::Answer { number });
                        }
                    }
                }
                std::future::pending().await
            } => StoreError::Fenced,
        }
    }

    /// Counts, and watches who else does.
    async fn beat(&self, node: &Node) -> StoreError {
        let mut ticks = tokio::time::interval(membership::BEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = node.flusher.needs_reservation() => {}
            }
            let reserved = node.flusher.reservation(RESERVED_MS);
            let heartbeat = self.store.heartbeat(reserved);
            let measured = &node.totals.store;
            match measured.measure(Operation::Heartbeat, heartbeat).await {
                Ok(()) => {
                    node.flusher.reserve(reserved);
                    *self.last_beat.lock() = Instant::now();
                }
                Err(StoreError::Fenced) => return StoreError::Fenced,
                Err(error) => {
                    tracing::warn!(event = "heartbeat_failed", %error);
                    continue;
                }
            }
            let changes = match self.members.look(&self.store, last).await {
                Ok(changes) => changes,
                Err(error) => {
                    tracing::warn!(event = "nodes_unreadable", %error);
                    continue;
                }
            };
            last = Instant::now();
            self.links.suspect(&self.members.silent());
            // A node that writes nothing hears of subscriptions in no other way, should it not be
            // told; and not for ever, because the documents of nodes that are gone are removed.
            if let Err(error) = node.follow(self, &changes.positions).await {
                tracing::warn!(event = "log_unreadable", %error);
            }
            if !changes.joined.is_empty() || !changes.left.is_empty() {
                self.links.set_alive(&self.members.others());
            }
            for joined in changes.joined {
                tracing::info!(event = "node_joined", node = joined);
                node.greet(self, joined);
            }
            for left in changes.left {
                tracing::info!(event = "node_left", node = left);
                node.node_left(left);
            }
        }
    }

    /// The clients of a node that is gone are not connected any more.
    async fn release(&self, gone: u32) -> Result<(), StoreError> {
        if let Err(error) = self.store.end_transactions_of(gone).await {
            // They end by themselves, in a minute by default.
            tracing::warn!(event = "transactions_unended", node = gone, %error);
        }
        let mut are_left = true;
        while are_left {
            are_left = self.store.release_sessions_of(gone, WILL_GRACE).await?;
            failpoint::reach("after_releasing");
        }
        Ok(())
    }

    /// Does what is due for sessions whose node has not done it in time, and cleans up.
    async fn look_after(&self, node: &Node) -> StoreError {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut swept = Instant::now();
        let mut collected = Instant::now();
        let mut released: HashMap<u32, Instant> = HashMap::new();
        loop {
            ticks.tick().await;
            let now = Instant::now();
            node.look_for_dispatchers(self);
            for gone in self.members.gone() {
                // Again after a while: it may have taken another session before it knew.
                let is_done = |at: &Instant| now - *at < RELEASE_INTERVAL;
                if released.get(&gone).is_some_and(is_done) {
                    continue;
                }
                match self.release(gone).await {
                    Ok(()) => {
                        released.insert(gone, now);
                    }
                    Err(error) => {
                        tracing::warn!(event = "sessions_unreleased", node = gone, %error);
                    }
                }
            }
            match self.store.adopt_due(LATE, DUE_MAX).await {
                Ok(sessions) => sessions
                    .into_iter()
                    .for_each(|session| node.look_after_adopted(session)),
                Err(error) => tracing::warn!(event = "due_sessions_unreadable", %error),
            }
            match self.store.adopt_leftovers(LATE, DUE_MAX).await {
                Ok(leftovers) => leftovers.iter().for_each(|leftover| {
                    node.finish(leftover);
                }),
                Err(error) => tracing::warn!(event = "leftovers_unreadable", %error),
            }
            if now - collected >= GARBAGE_INTERVAL {
                collected = now;
                if let Err(error) = self.store.collect_garbage().await {
                    tracing::warn!(event = "garbage_uncollected", %error);
                }
                node.end_deserted_groups(self).await;
            }
            if now - swept >= SWEEP_INTERVAL {
                swept = now;
                node.look_for_messages();
            }
        }
    }
}

/// Takes what other nodes send to this one.
pub(crate) struct Reception {
    node: Arc<Node>,
    last_topic: LastTopic,
}

impl Reception {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self {
            node,
            last_topic: LastTopic::default(),
        }
    }
}

impl link::Handler for Reception {
    fn receive(&mut self, header: &Header, arrival: Arrival, item: Item) {
        if let Some(cluster) = &self.node.cluster {
            let last_topic = &mut self.last_topic;
            self.node
                .receive(cluster, header.from, arrival, item, last_topic);
        }
    }

    fn lost(&mut self, from: u32) {
        self.node.miss_decisions(from);
        self.node.resynchronize_groups(from);
        self.node.look_for_messages();
    }

    fn interrupted(&mut self) {
        self.node.look_for_messages();
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("store", &self.store)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}
