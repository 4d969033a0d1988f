//! Group commit: everything that must become durable, in the order in which it arrived.
//!
//! While one flush is being written, whatever else arrives joins the next one. Whoever adds to a
//! flush gets a [`Receipt`], and may acknowledge once [`Flusher::is_durable`] says so. A flush
//! carries a clock value that no earlier key in the store has, so keys are in order of arrival.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{SystemTime, UNIX_EPOCH};

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::mailbox::{Admission, Mailbox};
use super::trim::Overfull;
use crate::mqtt::QoS;
use crate::session::{Delivery, Origin};
use crate::store::{Change, Chunk, Entry, MessageId, SessionId, Store, StoreError};

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

/// Owns the flush that is being gathered, and the mark up to which everything is durable.
pub(crate) struct Flusher {
    store: Arc<dyn Store>,
    node: u32,
    gathering: Mutex<Gathering>,
    /// Bytes of messages in the flush that is being gathered.
    gathered_bytes: AtomicUsize,
    /// The last flush that is durable.
    durable: AtomicU64,
    pub(super) overfull: Overfull,
    has_failed: AtomicBool,
    /// Wakes the writer when there is something to write.
    work: Notify,
}

struct Gathering {
    /// Of this flush.
    number: u64,
    /// The clock value of its first message.
    first_hlc: u64,
    /// The clock value of its next message.
    hlc: u64,
    next_index: u16,
    changes: Vec<Change>,
    /// The open chunk of each session: its place in `changes`, and its bytes.
    open_chunks: HashMap<SessionId, (usize, usize)>,
    /// The place in `changes` of every chunk.
    places: HashMap<(SessionId, MessageId), usize>,
    bytes: usize,
    /// Why nothing becomes durable any more.
    failed: Option<StoreError>,
    /// Who waits for this flush.
    waiters: Vec<Waker>,
    /// Who waits for the flush that is being written.
    waiters_of_previous: Vec<Waker>,
    /// Who waits for room in this flush.
    waiters_for_room: Vec<Waker>,
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
    pub(crate) fn new(store: Arc<dyn Store>, last_hlc: u64) -> Self {
        Self {
            store,
            node: 0,
            gathering: Mutex::new(Gathering {
                number: 1,
                first_hlc: next_hlc(last_hlc),
                hlc: next_hlc(last_hlc),
                next_index: 0,
                changes: Vec::new(),
                open_chunks: HashMap::new(),
                places: HashMap::new(),
                bytes: 0,
                failed: None,
                waiters: Vec::new(),
                waiters_of_previous: Vec::new(),
                waiters_for_room: Vec::new(),
            }),
            gathered_bytes: AtomicUsize::new(0),
            durable: AtomicU64::new(0),
            overfull: Overfull::default(),
            has_failed: AtomicBool::new(false),
            work: Notify::new(),
        }
    }

    /// Writes flush after flush until the store fails, for ever otherwise.
    pub(crate) async fn run(&self) -> StoreError {
        loop {
            let Some(changes) = self.seal() else {
                self.work.notified().await;
                continue;
            };
            // Everything may have been taken over by clients before it had to be written.
            let written = if changes.is_empty() {
                Ok(())
            } else {
                self.store.write(changes.into()).await
            };
            let mut gathering = self.gathering.lock();
            let mut waiters = std::mem::take(&mut gathering.waiters_of_previous);
            match written {
                Ok(()) => self.durable.store(gathering.number - 1, Ordering::Release),
                Err(error) => {
                    gathering.failed = Some(error.clone());
                    self.has_failed.store(true, Ordering::Release);
                    waiters.append(&mut gathering.waiters);
                    waiters.append(&mut gathering.waiters_for_room);
                    drop(gathering);
                    waiters.into_iter().for_each(Waker::wake);
                    return error;
                }
            }
            drop(gathering);
            waiters.into_iter().for_each(Waker::wake);
        }
    }

    /// Ends the gathering of a flush, if there is anything in it, and begins the next one.
    fn seal(&self) -> Option<Vec<Change>> {
        let mut gathering = self.gathering.lock();
        if gathering.changes.is_empty() {
            return None;
        }
        let mut changes = std::mem::take(&mut gathering.changes);
        // Chunks whose messages were all acknowledged before they had to be written.
        changes.retain(
            |change| !matches!(change, Change::Enqueue { chunk, .. } if chunk.entries.is_empty()),
        );
        gathering.number += 1;
        gathering.tick();
        gathering.places.clear();
        gathering.first_hlc = gathering.hlc;
        gathering.bytes = 0;
        self.gathered_bytes.store(0, Ordering::Relaxed);
        let waiters = std::mem::take(&mut gathering.waiters);
        gathering.waiters_of_previous.extend(waiters);
        gathering.waiters_for_room.drain(..).for_each(Waker::wake);
        Some(changes)
    }

    /// Opens the flush that is being gathered.
    pub(crate) fn add(&self) -> Additions<'_> {
        let gathering = self.gathering.lock();
        Additions {
            was_empty: gathering.changes.is_empty(),
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

    /// Whether nothing becomes durable any more.
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

    /// The receipt of everything that has been added so far.
    pub(crate) fn everything(&self) -> Receipt {
        let gathering = self.gathering.lock();
        Receipt(gathering.number - u64::from(gathering.changes.is_empty()))
    }
}

impl Additions<'_> {
    /// Of everything added until now.
    pub(crate) fn receipt(&self) -> Receipt {
        Receipt(self.gathering.number - u64::from(self.gathering.changes.is_empty()))
    }

    pub(crate) fn persist(&mut self, change: Change) -> Receipt {
        if let Change::Retain(retained) = &change {
            self.gathering.bytes += retained.message.len();
        }
        self.gathering.changes.push(change);
        Receipt(self.gathering.number)
    }

    /// Begins a new clock value: all messages added until now are below it, all later ones are not.
    pub(crate) fn tick(&mut self) -> u64 {
        self.gathering.tick();
        self.gathering.hlc
    }

    /// Adds a message to an inbox, and hands it to whoever empties the inbox, in one step: both
    /// see messages in the same order.
    pub(crate) fn enqueue(&mut self, mailbox: &Arc<Mailbox>, mut delivery: Delivery) -> Receipt {
        match mailbox.admit(&delivery.message) {
            Admission::Refused => return self.receipt(),
            Admission::Admitted => {}
            Admission::Overfull => self.flusher.overfull.add(mailbox.clone()),
        }
        let gathering = &mut *self.gathering;
        if gathering.next_index == u16::MAX {
            gathering.tick();
        }
        let id = MessageId {
            hlc: gathering.hlc,
            node: self.flusher.node,
            index: gathering.next_index,
        };
        gathering.next_index += 1;
        delivery.origin = match &mailbox.group {
            None => Origin::Inbox(id),
            Some(_) => Origin::Group(mailbox.session, id),
        };
        let entry = Entry {
            id,
            qos: delivery.qos,
            retain: delivery.retain,
            subscription_identifiers: delivery.subscription_identifiers.clone(),
            message: delivery.message.clone(),
        };
        let bytes = delivery.message.len();
        gathering.bytes += bytes;
        let key = match gathering.open_chunk(mailbox.session, delivery.qos) {
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
                gathering.begin_chunk(mailbox.session, chunk, bytes);
                id
            }
        };
        mailbox.push_durable(id, key, delivery);
        Receipt(gathering.number)
    }

    /// The client has taken over these messages of its inbox: what of them is not yet written
    /// never will be, and the rest is removed as soon as its chunk is done with.
    pub(crate) fn settle(&mut self, mailbox: &Mailbox, ids: &[MessageId]) {
        for id in ids {
            let done = mailbox.settle(*id);
            let gathering = &mut *self.gathering;
            if id.hlc >= gathering.first_hlc
                && let Some(place) = gathering.places.get(&(mailbox.session, done.key))
                && let Change::Enqueue { chunk, .. } = &mut gathering.changes[*place]
            {
                if let Ok(at) = chunk.entries.binary_search_by_key(id, |entry| entry.id) {
                    let entry = chunk.entries.remove(at);
                    gathering.bytes = gathering.bytes.saturating_sub(entry.message.len());
                }
            } else if done.chunk_finished {
                gathering.changes.push(Change::Dequeue {
                    session: mailbox.session,
                    key: done.key,
                });
            }
        }
    }

    /// Replaces a chunk by what of it has not been acknowledged.
    pub(crate) fn rewrite(&mut self, session: SessionId, chunk: Chunk) -> Receipt {
        if chunk.entries.is_empty() {
            self.persist(Change::Dequeue {
                session,
                key: chunk.key,
            })
        } else {
            self.persist(Change::Enqueue { session, chunk })
        }
    }
}

impl Gathering {
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
        let Change::Enqueue { chunk, .. } = &mut self.changes[*place] else {
            unreachable!("an open chunk is an Enqueue");
        };
        let joins = |entry: &Entry| entry.qos == QoS::AtLeastOnce && qos == QoS::AtLeastOnce;
        (*size < CHUNK_BYTES_MAX && chunk.entries.last().is_some_and(joins))
            .then_some((chunk, size))
    }

    fn begin_chunk(&mut self, session: SessionId, chunk: Chunk, bytes: usize) {
        let place = self.changes.len();
        self.open_chunks.insert(session, (place, bytes));
        self.places.insert((session, chunk.key), place);
        self.changes.push(Change::Enqueue { session, chunk });
    }
}

impl Drop for Additions<'_> {
    fn drop(&mut self) {
        self.flusher
            .gathered_bytes
            .store(self.gathering.bytes, Ordering::Relaxed);
        if self.was_empty && !self.gathering.changes.is_empty() {
            self.flusher.work.notify_one();
        }
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
    u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
}

/// The hybrid logical clock: 48 bits of milliseconds, 16 of counter, never the same twice.
fn next_hlc(last: u64) -> u64 {
    (unix_ms() << 16).max(last + 1)
}
