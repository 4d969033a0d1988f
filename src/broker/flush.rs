//! Group commit: everything that must become durable, in the order in which it arrived.
//!
//! While one flush is being written, whatever else arrives joins the next one. Whoever adds to a
//! flush gets a [`Receipt`], and may acknowledge once [`Flusher::is_durable`] says so. A flush
//! carries a clock value that no earlier key in the store has, so keys are in order of arrival.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Node;
use super::elision::{self, Decisions, Held, Places, TakenOver, take_out};
use super::follow::{Known, MissedChunk};
use super::mailbox::{Admission, Mailbox};
use super::trim::Overfull;
use crate::bus::wire::{Header, Item, Stamp};
use crate::cluster::link::Clock;
use crate::failpoint;
use crate::metrics::Operation;
use crate::mqtt::{Message, QoS};
use crate::session::Delivery;
use crate::store::{
    Change, Chunk, Entry, LogPosition, MessageId, Messages, SessionId, Store, StoreError,
};

/// The number of the flush that something is in; it is durable once that flush is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Receipt(u64);

impl Receipt {
    /// Of what needed no flush.
    pub(crate) const NOTHING: Self = Self(0);
}

/// Bytes of messages in the flush that is being gathered from which publishers have to wait.
const GATHERED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Bytes after which a chunk is closed and the session's next message begins another, so that a
/// page of an inbox stays small.
const CHUNK_BYTES_MAX: usize = 64 * 1024;

/// How long whoever waits for a store that is not available is kept waiting.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);

/// Between attempts to write.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Milliseconds that the clock gains in a second at most by counting alone: each has 65,536 values.
const COUNTED_MS: u64 = 10;

/// Clock values that a flush keeps for what it turns out to miss, of 65,535 messages each: more than
/// there is memory for.
const MISSED_HLCS: u64 = 256;

/// A node whose clock is further ahead than this does not drag the others with it.
const CLOCK_AHEAD_MAX: Duration = Duration::from_secs(60);

/// Owns the flush that is being gathered, and the mark up to which everything is durable.
pub(crate) struct Flusher {
    store: Arc<dyn Store>,
    /// This node among all that have ever written to the store.
    pub(crate) node: u32,
    gathering: Mutex<Gathering>,
    /// Bytes of messages in the flush that is being gathered.
    gathered_bytes: AtomicUsize,
    /// The last flush that is durable.
    durable: AtomicU64,
    pub(super) overfull: Overfull,
    has_failed: AtomicBool,
    /// No flush is written whose clock value is beyond this one.
    reserved: AtomicU64,
    /// Says that a flush waits for that.
    needs_reservation: Notify,
    /// Wakes the writer when there is something to write.
    work: Notify,
    /// Whether a flush is held back for clients that may take over what it has.
    elides: bool,
    /// Says that there is nothing left to be held back for.
    all_taken_over: Notify,
    /// Messages for inboxes that were written, and that never had to be.
    pub(crate) inbox_messages_written: AtomicU64,
    pub(crate) inbox_messages_elided: AtomicU64,
}

struct Gathering {
    /// Of this flush.
    number: u64,
    /// The clock value of its first message.
    first_hlc: u64,
    /// The clock value of its next message.
    hlc: u64,
    /// The clock value of the first message of the flush that is being written.
    writing_from: Option<u64>,
    next_index: u16,
    changes: Vec<Change>,
    /// The open chunk of each session: its place in `changes`, and its bytes.
    open_chunks: HashMap<SessionId, (usize, usize)>,
    /// The place in `changes` of every chunk.
    places: Places,
    /// The places of chunks that are on their way to clients of this node, if it is waited for them.
    on_their_way: Vec<(Arc<Mailbox>, usize)>,
    /// The flush that is about to be written.
    held: Option<Held>,
    bytes: usize,
    /// Messages of QoS 1 and 2, if other nodes may have made subscriptions that they match.
    messages: Vec<Matched>,
    /// The places in `changes` of chunks to be handed on once they are durable.
    later: Vec<(Arc<Mailbox>, usize)>,
    unstored: Vec<(SessionId, Unstored)>,
    /// Why nothing becomes durable any more, or for the time being.
    failed: Option<StoreError>,
    /// Who waits for this flush.
    waiters: Vec<Waker>,
    /// Who waits for the flush that is being written.
    waiters_of_previous: Vec<Waker>,
    /// Who waits for room in this flush.
    waiters_for_room: Vec<Waker>,
}

/// A message, and the version of the subscriptions that it was matched with.
#[derive(Clone, Debug)]
pub(super) struct Matched {
    pub(super) message: Message,
    pub(super) version: u64,
    /// The session that it depends on: whatever becomes of the message does so in one write.
    pub(super) guard: Option<SessionId>,
}

/// What of a message goes through no inbox, if it has to wait until the rest of it is certain.
#[derive(Debug)]
pub(super) enum Unstored {
    One {
        mailbox: Arc<Mailbox>,
        delivery: Delivery,
    },
    Nodes {
        message: Message,
        publisher: Arc<str>,
        nodes: Vec<u32>,
    },
    Retain {
        message: Message,
        publisher: Arc<str>,
    },
}

/// A flush that is being written.
struct Flush {
    /// By the session that it depends on.
    unstored: Vec<(SessionId, Unstored)>,
    changes: Vec<Change>,
    messages: Vec<Matched>,
    /// Chunks to be handed on to whoever empties their inbox.
    later: Vec<(Arc<Mailbox>, Chunk)>,
    /// To be told to those whom it was offered to.
    decisions: Decisions,
    missed_ids: MissedIds,
}

/// A flush whose changes are held back.
struct Sealed {
    unstored: Vec<(SessionId, Unstored)>,
    messages: Vec<Matched>,
    /// The places of chunks to be handed on to whoever empties their inbox.
    later: Vec<(Arc<Mailbox>, usize)>,
    /// The places of chunks that are on their way to clients of this node, if it is waited for them.
    on_their_way: Vec<(Arc<Mailbox>, usize)>,
    missed_ids: MissedIds,
}

/// Places for messages that a flush has missed: behind all that it has, and before all that was
/// gathered since.
#[derive(Debug)]
pub(super) struct MissedIds(MessageId);

impl MissedIds {
    pub(super) fn next(&mut self) -> MessageId {
        let id = self.0;
        match self.0.index.checked_add(1) {
            Some(index) => self.0.index = index,
            None => {
                self.0.hlc += 1;
                self.0.index = 0;
            }
        }
        id
    }
}

impl Flush {
    /// Adds what messages have missed, by what is known of other nodes' subscriptions now; returns how
    /// much of their logs that is.
    fn add_missed(&mut self, node: &Node, known: Known) -> Vec<LogPosition> {
        let missed = node.missed(&self.messages, known.version, &mut self.missed_ids);
        for matched in &mut self.messages {
            matched.version = known.version;
        }
        for MissedChunk {
            mailbox,
            chunk,
            guard,
        } in missed
        {
            self.changes.push(Change::Enqueue {
                session: mailbox.session,
                chunk: chunk.clone(),
                guard,
            });
            self.later.push((mailbox, chunk));
        }
        known.followed
    }
}

/// Exclusive access to the flush that is being gathered; several additions through one are
/// durable together or not at all.
pub(crate) struct Additions<'a> {
    gathering: parking_lot::MutexGuard<'a, Gathering>,
    flusher: &'a Flusher,
    was_empty: bool,
}

impl Flusher {
    /// `last_hlc` is the largest clock value in the store.
    /// With `elides`, what clients acknowledge soon enough is not written.
    pub(crate) fn new(store: Arc<dyn Store>, node: u32, last_hlc: u64, elides: bool) -> Self {
        Self {
            store,
            node,
            gathering: Mutex::new(Gathering {
                number: 1,
                first_hlc: next_hlc(last_hlc),
                hlc: next_hlc(last_hlc),
                writing_from: None,
                next_index: 0,
                changes: Vec::new(),
                open_chunks: HashMap::new(),
                places: Places::new(),
                on_their_way: Vec::new(),
                held: None,
                bytes: 0,
                messages: Vec::new(),
                later: Vec::new(),
                unstored: Vec::new(),
                failed: None,
                waiters: Vec::new(),
                waiters_of_previous: Vec::new(),
                waiters_for_room: Vec::new(),
            }),
            gathered_bytes: AtomicUsize::new(0),
            durable: AtomicU64::new(0),
            overfull: Overfull::default(),
            has_failed: AtomicBool::new(false),
            reserved: AtomicU64::new(u64::MAX),
            needs_reservation: Notify::new(),
            work: Notify::new(),
            elides,
            all_taken_over: Notify::new(),
            inbox_messages_written: AtomicU64::new(0),
            inbox_messages_elided: AtomicU64::new(0),
        }
    }

    /// Writes flush after flush until the store fails for good, for ever otherwise.
    pub(crate) async fn run(&self, node: &Node) -> StoreError {
        loop {
            let sealed = self.next_sealed().await;
            let flush = self.hold_back(sealed, node).await;
            if let Err(error) = self.commit(flush, node).await {
                self.fail(&error);
                return error;
            }
            let mut gathering = self.gathering.lock();
            gathering.writing_from = None;
            self.durable.store(gathering.number - 1, Ordering::Release);
            if gathering.failed.take().is_some() {
                self.has_failed.store(false, Ordering::Release);
            }
            let waiters = std::mem::take(&mut gathering.waiters_of_previous);
            drop(gathering);
            waiters.into_iter().for_each(Waker::wake);
            if let Some(cluster) = &node.cluster {
                cluster.links.durable_advanced();
            }
        }
    }

    /// Waits until there is something to write, and until it may be written. While the store does not
    /// answer, no further clock value can be reserved: whoever waits is let go after the same time as
    /// if it had been tried to write.
    async fn next_sealed(&self) -> Sealed {
        let mut let_go_at = None;
        let mut has_let_go = false;
        loop {
            if let Some(sealed) = self.seal() {
                if has_let_go {
                    tracing::info!(event = "store_available");
                }
                return sealed;
            }
            let work = self.work.notified();
            if self.has_failed() || !self.waits_for_reservation() {
                work.await;
                continue;
            }
            let let_go_at = *let_go_at.get_or_insert_with(|| Instant::now() + STORE_TIMEOUT);
            if tokio::time::timeout_at(let_go_at, work).await.is_err() {
                let error = StoreError::Unavailable("it takes no heartbeat".to_owned());
                tracing::warn!(event = "store_unavailable", %error);
                has_let_go = true;
                self.fail(&error);
            }
        }
    }

    fn waits_for_reservation(&self) -> bool {
        let gathering = self.gathering.lock();
        !gathering.is_empty() && gathering.hlc > self.reserved.load(Ordering::Acquire)
    }

    /// Writes a flush, and what it has to hold besides because of other nodes.
    async fn commit(&self, mut flush: Flush, node: &Node) -> Result<(), StoreError> {
        let acknowledges_messages = !flush.messages.is_empty();
        if acknowledges_messages {
            failpoint::reach("before_write");
        }
        let decisions = std::mem::take(&mut flush.decisions);
        self.write(flush, node).await?;
        if acknowledges_messages {
            self.hand_over(node).await?;
            failpoint::reach("after_hand_on");
        }
        // Nobody is answered because of these, so they are not waited for.
        if let Some(cluster) = &node.cluster {
            for (to, written) in decisions {
                cluster.send(to, &Item::Decide { written });
            }
        }
        Ok(())
    }

    /// Waits for a moment until clients have taken over what is on its way to them; what is left of
    /// the flush has to be written.
    async fn hold_back(&self, sealed: Sealed, node: &Node) -> Flush {
        let offers = self.start_waiting(&sealed, node);
        if let Some(cluster) = &node.cluster {
            for (to, offer) in offers {
                cluster.send(to, &offer);
            }
        }
        let all_taken_over = async {
            while self
                .gathering
                .lock()
                .held
                .as_ref()
                .is_some_and(Held::is_open)
            {
                self.all_taken_over.notified().await;
            }
        };
        // What is late is written.
        let _ = tokio::time::timeout(elision::WINDOW, all_taken_over).await;
        self.end_waiting(sealed)
    }

    /// Waits until other nodes get what was handed on, whatever becomes of this one. A publisher that
    /// was answered may go on at another node, and must not be overtaken there.
    async fn hand_over(&self, node: &Node) -> Result<(), StoreError> {
        let Some(cluster) = &node.cluster else {
            return Ok(());
        };
        if cluster.links.carried().await {
            return Ok(());
        }
        // If the bus alone has failed, the others ask for what they miss, later. If this node is cut
        // off, they read it once they have declared it dead, and it must not answer any more.
        let nothing = Arc::default();
        self.until_available(|| self.store.write(Arc::clone(&nothing), Messages::Present))
            .await?;
        Ok(())
    }

    async fn write(&self, mut flush: Flush, node: &Node) -> Result<(), StoreError> {
        let mut followed = None;
        if flush.messages.iter().any(|matched| matched.guard.is_some()) {
            let known = self.until_available(|| node.follow_to(&[])).await?;
            followed = Some(flush.add_missed(node, known));
        }
        loop {
            // Everything may have been taken over by clients before it had to be written.
            if flush.changes.is_empty() && flush.messages.is_empty() {
                return Ok(());
            }
            let all = Arc::new(std::mem::take(&mut flush.changes));
            let messages = match followed.take() {
                Some(followed) => Messages::MatchedTo(followed),
                None if flush.messages.is_empty() => Messages::Absent,
                None => Messages::Present,
            };
            let written = self
                .until_available(|| self.store.write(all.clone(), messages.clone()))
                .await?;
            if written.behind {
                flush.changes = Arc::unwrap_or_clone(all);
                let known = self.until_available(|| node.follow_to(&written.subscriptions));
                followed = Some(flush.add_missed(node, known.await?));
                continue;
            }
            if !flush.messages.is_empty() {
                failpoint::reach("after_write");
            }
            for change in all.iter() {
                if let Change::EndSession(session) = change
                    && !written.lost.contains(session)
                {
                    node.forget_session(*session);
                }
            }
            if !written.lost.is_empty() {
                node.lose(&written.lost);
                let left_out: Vec<_> = all
                    .iter()
                    .filter_map(|change| change.guarded_by(&written.lost))
                    .collect();
                flush
                    .later
                    .retain(|(_, chunk)| !left_out.contains(&chunk.key));
            }
            node.announce_log(written.logged);
            node.hand_on(std::mem::take(&mut flush.later));
            for (guard, unstored) in flush.unstored.drain(..) {
                if !written.lost.contains(&guard) {
                    node.deliver_unstored(unstored);
                }
            }
            // Of those, nothing was missed when they were written, or they count no more.
            flush.messages.retain(|matched| matched.guard.is_none());
            let known = self.until_available(|| node.follow_to(&written.subscriptions));
            flush.add_missed(node, known.await?);
            if flush.changes.is_empty() {
                return Ok(());
            }
        }
    }

    /// Does something with the store again and again until it is available.
    async fn until_available<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        mut operation: impl FnMut() -> F,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        let mut pause = RETRY_PAUSE_MIN;
        let mut has_failed = false;
        loop {
            match operation().await {
                Err(error) if error.may_pass() => {
                    has_failed = true;
                    tracing::warn!(event = "store_unavailable", %error);
                    if begun.elapsed() >= STORE_TIMEOUT {
                        self.fail(&error);
                    }
                    tokio::time::sleep(pause).await;
                    self.store.note_retry(Operation::Write);
                    pause = (pause * 2).min(RETRY_PAUSE_MAX);
                }
                result => {
                    if has_failed && result.is_ok() {
                        tracing::info!(event = "store_available");
                    }
                    return result;
                }
            }
        }
    }

    /// Lets go whoever waits for the flush, which may never be durable.
    pub(crate) fn fail(&self, error: &StoreError) {
        let mut gathering = self.gathering.lock();
        gathering.failed = Some(error.clone());
        self.has_failed.store(true, Ordering::Release);
        let mut waiters = std::mem::take(&mut gathering.waiters_of_previous);
        waiters.append(&mut gathering.waiters);
        waiters.append(&mut gathering.waiters_for_room);
        drop(gathering);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// Says for which clients the flush that was sealed is held back, and returns what is to be
    /// offered to other nodes.
    fn start_waiting(&self, sealed: &Sealed, node: &Node) -> Vec<(u32, Item)> {
        let cluster = node.cluster.as_ref();
        if !self.elides || cluster.is_some_and(|cluster| cluster.links.is_failing()) {
            return Vec::new();
        }
        let now_ms = unix_ms();
        let gathering = &mut *self.gathering.lock();
        let Some(held) = &mut gathering.held else {
            return Vec::new();
        };
        let asks_others = cluster.is_some_and(|cluster| cluster.links.is_quick());
        let elsewhere = sealed.later.iter().filter(|_| asks_others);
        // A share group's node does not know yet who will get it.
        let is_offered = |mailbox: &Mailbox| mailbox.holder().is_some() && mailbox.group.is_none();
        let elsewhere = elsewhere.filter(|(mailbox, _)| is_offered(mailbox));
        for (mailbox, place) in sealed.on_their_way.iter().chain(elsewhere) {
            held.wait_for(mailbox, *place, now_ms);
        }
        held.offers()
    }

    /// Takes the flush that was held back; from now on nothing is taken out of it.
    fn end_waiting(&self, sealed: Sealed) -> Flush {
        let Sealed {
            unstored,
            messages,
            later,
            missed_ids,
            ..
        } = sealed;
        let held = self.gathering.lock().held.take();
        let (mut changes, decisions) = held.map(Held::end).unwrap_or_default();
        // Also what was offered: whether that was declined too late is not known.
        let later = later.into_iter().filter_map(|(mailbox, place)| {
            let Change::Enqueue { chunk, .. } = &changes[place] else {
                return None;
            };
            (!chunk.entries.is_empty()).then(|| (mailbox, chunk.clone()))
        });
        let later = later.collect();
        let mut written = 0;
        // Chunks whose messages were all acknowledged before they had to be written.
        changes.retain(|change| match change {
            Change::Enqueue { chunk, .. } => {
                written += chunk.entries.len();
                !chunk.entries.is_empty()
            }
            _ => true,
        });
        self.inbox_messages_written
            .fetch_add(written as u64, Ordering::Relaxed);
        Flush {
            unstored,
            changes,
            messages,
            later,
            decisions,
            missed_ids,
        }
    }

    /// The client of a session at another node has taken over messages that were offered to it.
    pub(super) fn taken_over(&self, session: SessionId, key: MessageId, ids: &[MessageId]) {
        let mut gathering = self.gathering.lock();
        for id in ids {
            self.settle_held(&mut gathering, session, key, *id);
        }
    }

    /// Another node does not have a chunk delivered that was offered to it.
    pub(super) fn declined(&self, session: SessionId, key: MessageId) {
        let mut gathering = self.gathering.lock();
        if let Some(held) = &mut gathering.held {
            held.decline(session, key);
            if !held.is_open() {
                self.all_taken_over.notify_one();
            }
        }
    }

    /// Takes a message out of the flush that is held back, if it is there.
    fn settle_held(
        &self,
        gathering: &mut Gathering,
        session: SessionId,
        key: MessageId,
        id: MessageId,
    ) -> bool {
        let Some(held) = &mut gathering.held else {
            return false;
        };
        if !held.may_have(id) || !held.settle(session, key, id) {
            return false;
        }
        if !held.is_open() {
            self.all_taken_over.notify_one();
        }
        self.inbox_messages_elided.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Ends the gathering of a flush, if there is anything in it, and begins the next one.
    fn seal(&self) -> Option<Sealed> {
        let mut gathering = self.gathering.lock();
        if gathering.is_empty() {
            return None;
        }
        if gathering.hlc > self.reserved.load(Ordering::Acquire) {
            self.needs_reservation.notify_one();
            return None;
        }
        let changes = std::mem::take(&mut gathering.changes);
        let places = std::mem::take(&mut gathering.places);
        gathering.held = Some(Held::new(changes, places, gathering.first_hlc));
        gathering.number += 1;
        gathering.writing_from = Some(gathering.first_hlc);
        gathering.tick();
        let missed_ids = MissedIds(MessageId {
            hlc: gathering.hlc,
            node: self.node,
            index: 0,
        });
        gathering.hlc += MISSED_HLCS;
        gathering.tick();
        gathering.first_hlc = gathering.hlc;
        gathering.bytes = 0;
        self.gathered_bytes.store(0, Ordering::Relaxed);
        let waiters = std::mem::take(&mut gathering.waiters);
        gathering.waiters_of_previous.extend(waiters);
        gathering.waiters_for_room.drain(..).for_each(Waker::wake);
        Some(Sealed {
            messages: std::mem::take(&mut gathering.messages),
            unstored: std::mem::take(&mut gathering.unstored),
            later: std::mem::take(&mut gathering.later),
            on_their_way: std::mem::take(&mut gathering.on_their_way),
            missed_ids,
        })
    }

    /// Opens the flush that is being gathered.
    pub(crate) fn add(&self) -> Additions<'_> {
        let gathering = self.gathering.lock();
        Additions {
            was_empty: gathering.is_empty(),
            gathering,
            flusher: self,
        }
    }

    /// Adds one change.
    pub(crate) fn persist(&self, change: Change) -> Receipt {
        self.add().persist(change)
    }

    pub(crate) fn is_durable(&self, receipt: Receipt) -> bool {
        receipt.0 <= self.durable.load(Ordering::Acquire)
    }

    /// The clock value up to which every message is durable, and beyond which every further one is.
    pub(crate) fn mark(&self) -> u64 {
        let mut gathering = self.gathering.lock();
        if gathering.is_empty() {
            gathering.tick();
            gathering.first_hlc = gathering.hlc;
        }
        gathering.writing_from.unwrap_or(gathering.first_hlc) - 1
    }

    /// A clock value of another node: none that is given from now on is below it.
    pub(crate) fn observe(&self, hlc: u64) {
        let mut gathering = self.gathering.lock();
        if hlc > gathering.hlc {
            gathering.hlc = hlc;
            gathering.tick();
            if gathering.is_empty() {
                gathering.first_hlc = gathering.hlc;
            }
        }
    }

    /// A clock value that this node will not have come to in the next `ms` milliseconds, or that it
    /// will wait at.
    pub(crate) fn reservation(&self, ms: u64) -> u64 {
        let hlc = self.gathering.lock().hlc;
        // Ahead of the time of day it only counts, which takes it no further in effect.
        let counted = hlc + (COUNTED_MS << 16);
        ((unix_ms() + ms) << 16).max(counted)
    }

    /// Resolves when a flush waits for a further reservation.
    pub(crate) async fn needs_reservation(&self) {
        self.needs_reservation.notified().await;
    }

    /// Other nodes know that this one may come to the clock value `hlc`.
    pub(crate) fn reserve(&self, hlc: u64) {
        self.reserved.store(hlc, Ordering::Release);
        self.work.notify_one();
    }

    /// Whether nothing becomes durable any more, or not for the time being.
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// Ready once `receipt` is durable.
    ///
    /// # Errors
    /// `StoreError` if it never will be.
    pub(crate) fn poll_durable(
        &self,
        receipt: Receipt,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), StoreError>> {
        if self.is_durable(receipt) {
            return Poll::Ready(Ok(()));
        }
        let mut gathering = self.gathering.lock();
        if self.is_durable(receipt) {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = &gathering.failed {
            return Poll::Ready(Err(error.clone()));
        }
        let waiters = if receipt.0 == gathering.number {
            &mut gathering.waiters
        } else {
            &mut gathering.waiters_of_previous
        };
        waiters.push(context.waker().clone());
        Poll::Pending
    }

    /// # Errors
    /// `StoreError` if `receipt` never becomes durable.
    pub(crate) async fn durable(&self, receipt: Receipt) -> Result<(), StoreError> {
        std::future::poll_fn(|context| self.poll_durable(receipt, context)).await
    }

    /// Ready while the flush has room; publishers that do not wait for it make it grow.
    pub(crate) fn poll_room(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut gathering = self.gathering.lock();
        if gathering.bytes < GATHERED_BYTES_MAX {
            return Poll::Ready(());
        }
        gathering.waiters_for_room.push(context.waker().clone());
        Poll::Pending
    }

    pub(crate) fn has_room(&self) -> bool {
        self.gathered_bytes.load(Ordering::Relaxed) < GATHERED_BYTES_MAX
    }

    /// The receipt of what is added next.
    pub(crate) fn gathering(&self) -> Receipt {
        Receipt(self.gathering.lock().number)
    }

    /// The receipt of everything that has been added so far.
    pub(crate) fn everything(&self) -> Receipt {
        let gathering = self.gathering.lock();
        Receipt(gathering.number - u64::from(gathering.is_empty()))
    }
}

impl Additions<'_> {
    /// Of everything added until now.
    pub(crate) fn receipt(&self) -> Receipt {
        Receipt(self.gathering.number - u64::from(self.gathering.is_empty()))
    }

    pub(crate) fn persist(&mut self, change: Change) -> Receipt {
        if let Change::Retain { retained, .. } = &change {
            self.gathering.bytes += retained.message.len();
        }
        self.gathering.changes.push(change);
        Receipt(self.gathering.number)
    }

    /// The place of something that is written besides messages for inboxes.
    pub(crate) fn next_id(&mut self) -> MessageId {
        let gathering = &mut *self.gathering;
        if gathering.next_index == u16::MAX {
            gathering.tick();
        }
        let index = gathering.next_index;
        gathering.next_index += 1;
        MessageId {
            hlc: gathering.hlc,
            node: self.flusher.node,
            index,
        }
    }

    /// Begins a new clock value: all messages added until now are below it, all later ones are not.
    pub(crate) fn tick(&mut self) -> u64 {
        self.gathering.tick();
        self.gathering.hlc
    }

    /// Has something done once `guard` turns out to be this node's as the flush is written.
    pub(super) fn afterwards(&mut self, guard: SessionId, unstored: Unstored) {
        self.gathering.unstored.push((guard, unstored));
    }

    /// The message has to be matched again with subscriptions that other nodes have made meanwhile,
    /// before it may be acknowledged.
    pub(super) fn match_again(&mut self, matched: Matched) {
        self.gathering.messages.push(matched);
    }

    /// Adds what has been gathered to the inbox of a session that has turned out to want it, so that
    /// it comes before whatever is gathered from now on. All of it has been matched as of `version`
    /// then.
    pub(super) fn catch_up(
        &mut self,
        mailbox: &Arc<Mailbox>,
        version: u64,
        wanted: impl Fn(&Message) -> Option<Delivery>,
    ) {
        for at in 0..self.gathering.messages.len() {
            let matched = &mut self.gathering.messages[at];
            matched.version = version;
            let guard = matched.guard;
            if let Some(delivery) = wanted(&matched.message) {
                self.enqueue(mailbox, delivery, guard);
            }
        }
    }

    /// Adds a message to an inbox, and hands it to whoever empties the inbox, in one step: both
    /// see messages in the same order. With a `guard` it counts only if that session is still this
    /// node's when it is written, and is handed on only then.
    pub(crate) fn enqueue(
        &mut self,
        mailbox: &Arc<Mailbox>,
        mut delivery: Delivery,
        guard: Option<SessionId>,
    ) -> Receipt {
        // What has to wait counts once it is certain.
        match mailbox.admit(&delivery.message, guard.is_none()) {
            Admission::Refused => return self.receipt(),
            Admission::Admitted => {}
            Admission::Overfull => self.flusher.overfull.add(mailbox.clone()),
        }
        let id = self.next_id();
        let gathering = &mut *self.gathering;
        delivery.origin = mailbox.origin(id);
        let entry = Entry {
            id,
            qos: delivery.qos,
            retain: delivery.retain,
            subscription_identifiers: delivery.subscription_identifiers.clone(),
            message: delivery.message.clone(),
        };
        let bytes = delivery.message.len();
        gathering.bytes += bytes;
        let open = gathering.open_chunk(mailbox.session, delivery.qos);
        let key = match open.filter(|_| guard.is_none()) {
            Some((chunk, size)) => {
                *size += bytes;
                chunk.entries.push(entry);
                chunk.key
            }
            None => {
                let chunk = Chunk {
                    key: id,
                    entries: vec![entry],
                };
                gathering.begin_chunk(mailbox.session, chunk, bytes, guard);
                if guard.is_some() || mailbox.holder().is_some() {
                    let place = gathering.changes.len() - 1;
                    gathering.later.push((mailbox.clone(), place));
                }
                id
            }
        };
        if guard.is_none() {
            let begins_chunk = id == key;
            let is_on_its_way = mailbox.push_durable(id, key, delivery);
            if self.flusher.elides && begins_chunk && is_on_its_way && mailbox.group.is_none() {
                let place = gathering.changes.len() - 1;
                gathering.on_their_way.push((mailbox.clone(), place));
            }
        }
        Receipt(gathering.number)
    }

    /// The client has taken over these messages of its inbox: what of them is not yet written
    /// never will be, and the rest is removed as soon as its chunk is done with. Returns what other
    /// nodes have to be told, because they may not have written it yet.
    pub(crate) fn settle(&mut self, mailbox: &Mailbox, ids: &[MessageId]) -> Vec<TakenOver> {
        let mut elsewhere = Vec::new();
        for id in ids {
            let done = mailbox.settle(*id);
            if done.undecided {
                let (key, id) = (done.key, *id);
                elsewhere.push(TakenOver { key, id });
                continue;
            }
            let gathering = &mut *self.gathering;
            if id.hlc >= gathering.first_hlc
                && let Some(place) = gathering.places.get(&(mailbox.session, done.key))
            {
                if let Some(entry) = take_out(&mut gathering.changes[*place], *id) {
                    gathering.bytes = gathering.bytes.saturating_sub(entry.message.len());
                    let elided = &self.flusher.inbox_messages_elided;
                    elided.fetch_add(1, Ordering::Relaxed);
                }
                continue;
            }
            let flusher = self.flusher;
            let was_held = flusher.settle_held(gathering, mailbox.session, done.key, *id);
            if !was_held && done.chunk_finished {
                gathering.changes.push(Change::Dequeue {
                    session: mailbox.session,
                    key: done.key,
                    guard: None,
                });
            }
        }
        elsewhere
    }

    /// Replaces a chunk by what of it has not been acknowledged.
    pub(crate) fn rewrite(&mut self, session: SessionId, chunk: Chunk) -> Receipt {
        if chunk.entries.is_empty() {
            self.persist(Change::Dequeue {
                session,
                key: chunk.key,
                guard: None,
            })
        } else {
            self.persist(Change::Shorten { session, chunk })
        }
    }
}

impl Gathering {
    fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.messages.is_empty()
    }

    fn tick(&mut self) {
        self.hlc = next_hlc(self.hlc);
        self.next_index = 0;
        self.open_chunks.clear();
    }

    /// The chunk that a session's next message joins. A message of QoS 2 has one to itself: it is
    /// forgotten together with its exchange, whatever becomes of its neighbours. One of which
    /// everything has been taken out again is closed: its key is settled.
    fn open_chunk(&mut self, session: SessionId, qos: QoS) -> Option<(&mut Chunk, &mut usize)> {
        let (place, size) = self.open_chunks.get_mut(&session)?;
        let Change::Enqueue {
            chunk, guard: None, ..
        } = &mut self.changes[*place]
        else {
            return None;
        };
        let joins = |entry: &Entry| entry.qos == QoS::AtLeastOnce && qos == QoS::AtLeastOnce;
        (*size < CHUNK_BYTES_MAX && chunk.entries.last().is_some_and(joins))
            .then_some((chunk, size))
    }

    fn begin_chunk(
        &mut self,
        session: SessionId,
        chunk: Chunk,
        bytes: usize,
        guard: Option<SessionId>,
    ) {
        let place = self.changes.len();
        self.open_chunks.insert(session, (place, bytes));
        self.places.insert((session, chunk.key), place);
        self.changes.push(Change::Enqueue {
            session,
            chunk,
            guard,
        });
    }
}

impl Drop for Additions<'_> {
    fn drop(&mut self) {
        self.flusher
            .gathered_bytes
            .store(self.gathering.bytes, Ordering::Relaxed);
        if self.was_empty && !self.gathering.is_empty() {
            self.flusher.work.notify_one();
        }
    }
}

impl Clock for Flusher {
    fn stamp(&self) -> Stamp {
        let durable_hlc = self.mark();
        Stamp {
            hlc: self.gathering.lock().hlc,
            durable_hlc,
            store_ok: !self.has_failed(),
        }
    }

    fn observe(&self, header: &Header) {
        let ahead = (header.stamp.hlc >> 16).saturating_sub(unix_ms());
        if ahead > CLOCK_AHEAD_MAX.as_millis() as u64 {
            tracing::error!(
                event = "clock_ahead",
                node = header.from,
                milliseconds = ahead
            );
            return;
        }
        self.observe(header.stamp.hlc);
    }
}

impl fmt::Debug for Flusher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flusher")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let elapsed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let elapsed = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    elapsed.saturating_add_signed(failpoint::clock_offset_ms())
}

/// The hybrid logical clock: 48 bits of milliseconds, 16 of counter, never the same twice.
fn next_hlc(last: u64) -> u64 {
    (unix_ms() << 16).max(last + 1)
}
