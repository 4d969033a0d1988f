//! The messages on their way to one session, or to the members of one share group.
//!
//! Whoever publishes puts messages in; one consumer, the task of the client's connection or the
//! dispatcher of the group, takes them out. A mailbox is `Live` (memory holds all that waits) or
//! `Paged` (what waits is read from the inbox in the store, in pages, until the consumer has caught
//! up), so its memory is bounded however much waits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::Waker;

use parking_lot::Mutex;

use super::inspect::Waiting;
use crate::metrics::{Arrival, By, Counter, Dropped};
use crate::mqtt::topic::SubscriptionFilter;
use crate::mqtt::{Message, QoS, ReasonCode};
use crate::session::{Delivery, Origin};
use crate::store::{Chunk, Entry, InboxSummary, MessageId, SessionId};

/// What a mailbox may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MailboxLimits {
    /// Messages that wait in the inbox.
    pub(crate) queue_messages_max: u64,
    pub(crate) queue_bytes_max: u64,
    pub(crate) queue_full: QueueFull,
    /// Messages that wait in memory.
    pub(crate) memory_messages_max: usize,
    pub(crate) memory_bytes_max: usize,
}

/// What happens to a QoS 1 or 2 message for which there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QueueFull {
    DropOldest,
    DropNew,
    Disconnect,
}

/// What a connection must do, said from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Ask whether its client may stay; all others are to end.
    CheckAccess,
    TakenOver,
    QueueFull,
    Shutdown,
    /// To another node: this one is being drained, and goes on for long enough to hand sessions over.
    Leave(ReasonCode),
    /// By whoever operates the broker.
    Kicked(ReasonCode),
}

/// The messages on their way to one session or share group.
pub(crate) struct Mailbox {
    pub(crate) session: SessionId,
    pub(crate) client_id: Arc<str>,
    /// Set if this is the mailbox of a share group.
    pub(crate) group: Option<SubscriptionFilter>,
    /// Whether QoS 1 and 2 messages go through the inbox in the store.
    durable: AtomicBool,
    /// Whether other nodes write to the inbox too.
    shared: bool,
    /// The node that has the session's client, if it is not this one; 0 if none has.
    holder: AtomicU32,
    /// Another node has taken the session: nothing may be answered to the client any more.
    lost: AtomicBool,
    patience: Patience,
    limits: MailboxLimits,
    /// Of the whole node.
    dropped: Arc<By<Dropped, Counter>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    /// What waits in memory, in order.
    live: VecDeque<Delivery>,
    live_bytes: usize,
    /// Whether someone takes messages out.
    attached: bool,
    consumer: Option<Waker>,
    /// Whether the consumer waits for messages; otherwise only an order wakes it.
    consumer_wants_messages: bool,
    order: Option<Order>,
    /// Publishers waiting for a consumer that keeps taking messages.
    waiting_publishers: Vec<Waker>,
    inbox: Inbox,
    /// Whether its inbox is on the list of those to be trimmed.
    trimming: bool,
    /// What this node has added to an inbox that others add to as well since all of it was counted.
    uncounted: Uncounted,
    /// Whether chunks that the last consumer left half acknowledged are still to be written anew.
    unsettled: bool,
    /// How many consumers there have been.
    consumers: u64,
    /// Whether the reading begins anew, and what is done with has to be gone from the store before.
    restart: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Memory holds all that waits; what has a clock value below `since` was read, if it was there.
    Live { since: u64 },
    /// The consumer reads the inbox from the key `from` on, up to the clock value `live_from` from
    /// which on memory holds what waits.
    Paged {
        from: MessageId,
        live_from: Option<u64>,
    },
}

/// What was added to an inbox.
#[derive(Clone, Copy, Debug, Default)]
struct Uncounted {
    messages: u64,
    bytes: u64,
    /// Whether what had been there before was counted.
    is_rest_known: bool,
}

/// What is known of the inbox in the store.
#[derive(Debug)]
struct Inbox {
    /// Messages waiting, delivered or not, that the client has not taken over.
    messages: u64,
    bytes: u64,
    /// Reading begins here.
    head: MessageId,
    /// Up to here messages may be in flight, while the client is away.
    begun: MessageId,
    /// Chunks of which memory or the consumer has messages.
    chunks: BTreeMap<MessageId, OpenChunk>,
    /// Chunks that are done with, but may be read once more.
    finished: BTreeSet<MessageId>,
    /// Chunks that another node has offered and not yet decided whether to write, and whether the
    /// client has taken over all of each.
    undecided: BTreeMap<MessageId, bool>,
}

/// A chunk of which memory or the consumer has messages.
#[derive(Debug)]
struct OpenChunk {
    /// It has those before this one.
    held_before: MessageId,
    /// Messages in the chunk that are not acknowledged.
    remaining: u32,
    bytes: u64,
    /// Indexes of those that are, as long as others are not.
    settled: Vec<(u64, u16)>,
}

/// Where the QoS 1 and 2 messages of a mailbox lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InboxKind {
    /// In memory.
    None,
    /// In an inbox that this node alone writes to; what is in it already.
    Own(InboxSummary),
    /// In one that other nodes write to as well.
    Shared,
}

/// What [`Mailbox::admit`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Admitted,
    /// The message counts as dropped.
    Refused,
    /// Admitted, but the inbox has to be trimmed.
    Overfull,
}

/// What [`Mailbox::settle`] found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settled {
    pub(crate) key: MessageId,
    pub(crate) chunk_finished: bool,
    /// The node that offered the chunk has to be told: it may not have to write it.
    pub(crate) undecided: bool,
}

/// What is at hand for the consumer.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Messages were moved out, or there are none.
    Live,
    /// The inbox must be read from `from` on. From `live_from` on memory holds what waits.
    ReadInbox {
        from: MessageId,
        live_from: Option<u64>,
    },
    /// The inbox must be read anew, after [`Mailbox::begin_reading`].
    Restart,
}

/// Other nodes that are expected to add as much to an inbox as this one does; were they more, it would
/// become that much fuller.
const OTHERS: u64 = 3;

impl Mailbox {
    pub(crate) fn new(
        session: SessionId,
        client_id: Arc<str>,
        group: Option<SubscriptionFilter>,
        inbox: InboxKind,
        limits: MailboxLimits,
        dropped: Arc<By<Dropped, Counter>>,
    ) -> Self {
        let (durable, shared, stored) = match inbox {
            InboxKind::None => (false, false, InboxSummary::default()),
            InboxKind::Own(stored) => (true, false, stored),
            InboxKind::Shared => (true, true, InboxSummary::default()),
        };
        Self {
            session,
            client_id,
            group,
            durable: AtomicBool::new(durable),
            shared,
            holder: AtomicU32::new(0),
            lost: AtomicBool::new(false),
            patience: Patience::default(),
            limits,
            dropped,
            state: Mutex::new(State {
                mode: if durable {
                    Mode::AWAY
                } else {
                    Mode::WITHOUT_INBOX
                },
                live: VecDeque::new(),
                live_bytes: 0,
                attached: false,
                consumer: None,
                consumer_wants_messages: false,
                order: None,
                waiting_publishers: Vec::new(),
                trimming: false,
                uncounted: Uncounted::default(),
                unsettled: false,
                consumers: 0,
                restart: false,
                inbox: Inbox {
                    messages: stored.messages,
                    bytes: stored.bytes,
                    head: stored.head.unwrap_or(MessageId::MIN),
                    begun: MessageId::MIN,
                    chunks: BTreeMap::new(),
                    finished: BTreeSet::new(),
                    undecided: BTreeMap::new(),
                },
            }),
        }
    }

    pub(crate) fn is_durable(&self) -> bool {
        self.durable.load(Ordering::Relaxed)
    }

    /// A share group becomes durable with its first durable member, and stays so until its end.
    pub(super) fn make_durable(&self) {
        let mut state = self.state.lock();
        if !state.attached {
            state.mode = Mode::AWAY;
        }
        self.durable.store(true, Ordering::Relaxed);
    }

    /// Puts in a message that a share group has chosen this client for; it always fits, since the
    /// group keeps within the client's window.
    pub(super) fn push_from_group(&self, delivery: Delivery) -> bool {
        let mut state = self.state.lock();
        if !state.attached {
            return false;
        }
        state.live_bytes += delivery.message.len();
        state.live.push_back(delivery);
        if let Some(consumer) = state.consumer_for_message() {
            drop(state);
            consumer.wake();
        }
        true
    }

    /// Puts in a message that is not stored: QoS 0, or for a session that ends with its connection.
    /// Returns whether the publisher had better wait for [`Mailbox::wait_for_space`].
    pub(crate) fn push(&self, delivery: Delivery) -> bool {
        let mut state = self.state.lock();
        if !state.attached {
            return false;
        }
        // Its socket, or its window, is full: waiting for it would let it slow down others.
        let stalled = state.consumer.is_some() && !state.consumer_wants_messages;
        if !self.fits(&state) {
            if delivery.qos == QoS::AtMostOnce {
                self.dropped.of(Dropped::NotWritable).inc();
                return !stalled;
            }
            self.dropped.of(Dropped::QueueFull).inc();
            match self.limits.queue_full {
                QueueFull::DropNew => return !stalled,
                // A share group has no connection.
                QueueFull::Disconnect if self.group.is_some() => return false,
                QueueFull::Disconnect => {
                    self.give_order(&mut state, Order::QueueFull);
                    return false;
                }
                QueueFull::DropOldest => {
                    // What a share group gave to this client is the group's.
                    let own = |delivery: &Delivery| delivery.origin == Origin::Memory;
                    while !self.fits(&state)
                        && let Some(oldest) = state.live.iter().position(own)
                        && let Some(oldest) = state.live.remove(oldest)
                    {
                        state.live_bytes -= oldest.message.len();
                    }
                }
            }
        }
        state.live_bytes += delivery.message.len();
        state.live.push_back(delivery);
        let crowded = !stalled && self.is_crowded(&state);
        let consumer = state.consumer_for_message();
        drop(state);
        if let Some(consumer) = consumer {
            consumer.wake();
        }
        crowded
    }

    /// The other node that has the session's client.
    pub(super) fn holder(&self) -> Option<u32> {
        match self.holder.load(Ordering::Acquire) {
            0 => None,
            node => Some(node),
        }
    }

    /// Says which other node has the session's client now. What waits is counted anew: by this node,
    /// what it adds while no node has the client; by the one that has it, everything.
    pub(super) fn set_holder(&self, node: Option<u32>) {
        self.holder.store(node.unwrap_or(0), Ordering::Release);
        let mut state = self.state.lock();
        if !state.attached {
            state.inbox.messages = 0;
            state.inbox.bytes = 0;
            state.uncounted = Uncounted::default();
        }
    }

    /// This node has taken the session; whatever another does from now on counts again.
    pub(super) fn regain(&self) {
        self.lost.store(false, Ordering::Release);
        self.set_holder(None);
    }

    /// Another node has taken the session: nothing more is put in here.
    pub(super) fn lose(&self, holder: Option<u32>) {
        self.holder.store(holder.unwrap_or(0), Ordering::Release);
        self.lost.store(true, Ordering::Release);
        let mut state = self.state.lock();
        state.attached = false;
        self.give_order(&mut state, Order::TakenOver);
    }

    /// Whether another node has taken the session from the connection.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// What waits for the session.
    pub(super) fn waiting(&self) -> Waiting {
        let state = self.state.lock();
        let (memory_messages, memory_bytes) = (state.live.len() as u64, state.live_bytes as u64);
        let (messages, bytes) = if self.is_durable() {
            (state.inbox.messages, state.inbox.bytes)
        } else {
            (memory_messages, memory_bytes)
        };
        Waiting {
            messages,
            bytes,
            memory_messages,
            memory_bytes,
            is_behind: state.attached && (!state.mode.is_live() || self.is_crowded(&state)),
        }
    }

    /// Whether the limits of the inbox let another message in.
    pub(super) fn admit(&self, message: &Message, counts: bool) -> Admission {
        if self.holder().is_some() {
            return Admission::Admitted;
        }
        let mut state = self.state.lock();
        let full = state.inbox.messages >= self.limits.queue_messages_max
            || state.inbox.bytes + message.len() as u64 > self.limits.queue_bytes_max;
        if full {
            self.dropped.of(Dropped::QueueFull).inc();
            match self.limits.queue_full {
                // A client that is there and takes nothing for long: nobody drops the oldest.
                QueueFull::DropOldest
                    if state.attached
                        && (state.inbox.messages / 2 >= self.limits.queue_messages_max
                            || state.inbox.bytes / 2 >= self.limits.queue_bytes_max) =>
                {
                    return Admission::Refused;
                }
                // Whoever takes messages out drops the oldest when it gets to it.
                QueueFull::DropOldest => {}
                QueueFull::DropNew => return Admission::Refused,
                // A share group has no connection.
                QueueFull::Disconnect if self.group.is_some() || !state.attached => {
                    return Admission::Refused;
                }
                QueueFull::Disconnect => {
                    self.give_order(&mut state, Order::QueueFull);
                    return Admission::Refused;
                }
            }
        }
        if !counts {
            return Admission::Admitted;
        }
        state.inbox.messages += 1;
        state.inbox.bytes += message.len() as u64;
        // Not for every single message: a step of trimming costs a read.
        let slack = self.limits.queue_messages_max / 16;
        let bytes_slack = self.limits.queue_bytes_max / 16;
        let overfull = if self.shared {
            state.uncounted.messages += 1;
            state.uncounted.bytes += message.len() as u64;
            let Uncounted {
                messages,
                bytes,
                is_rest_known,
            } = state.uncounted;
            // The others add as well, each perhaps as much as this one; counting costs a read of all
            // that waits.
            let may_be_over = !is_rest_known
                || state.inbox.messages + messages * OTHERS > self.limits.queue_messages_max
                || state.inbox.bytes + bytes * OTHERS > self.limits.queue_bytes_max;
            may_be_over && (messages > slack || bytes > bytes_slack)
        } else {
            state.inbox.messages > self.limits.queue_messages_max + slack
                || state.inbox.bytes > self.limits.queue_bytes_max + bytes_slack
        };
        if overfull && state.may_be_trimmed() && !state.trimming {
            state.trimming = true;
            return Admission::Overfull;
        }
        Admission::Admitted
    }

    /// Whether there is too much in the inbox and nobody takes messages out.
    pub(super) fn is_trimmable(&self) -> bool {
        let state = self.state.lock();
        state.may_be_trimmed() && self.is_over(&state.inbox)
    }

    /// Whether other nodes add to the inbox as well.
    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    /// Which of these messages, all that are in the inbox and their lengths, is the oldest that may
    /// stay there.
    pub(super) fn counted(&self, all: &[(MessageId, u64)]) -> MessageId {
        let (mut messages, mut bytes) = (0, 0);
        let fits = |(_, length): &&(MessageId, u64)| {
            messages += 1;
            bytes += length;
            messages <= self.limits.queue_messages_max && bytes <= self.limits.queue_bytes_max
        };
        let oldest = all.iter().rev().take_while(fits).last();
        let state = &mut *self.state.lock();
        state.inbox.messages = all.len() as u64;
        state.inbox.bytes = all.iter().map(|(_, length)| length).sum();
        state.uncounted = Uncounted {
            is_rest_known: true,
            ..Uncounted::default()
        };
        oldest.map_or(MessageId::MAX, |(id, _)| *id)
    }

    /// Drops the oldest messages, which are in this chunk, as far as the limits demand and none from
    /// `keep` on; returns what is left of the chunk if anything was dropped.
    pub(super) fn drop_oldest(&self, chunk: &Chunk, keep: MessageId) -> Option<Vec<Entry>> {
        let mut state = self.state.lock();
        if state.attached {
            return None;
        }
        let mut left = Vec::new();
        for entry in &chunk.entries {
            // What was begun to be delivered has to be finished.
            if entry.id > state.inbox.begun && entry.id < keep && self.is_over(&state.inbox) {
                state.inbox.messages = state.inbox.messages.saturating_sub(1);
                state.inbox.bytes = state.inbox.bytes.saturating_sub(entry.message.len() as u64);
            } else {
                left.push(entry.clone());
            }
        }
        // What was begun stays in front, and has to be found again.
        let begun = state.inbox.begun;
        let keeps_begun = begun > MessageId::MIN && state.inbox.head <= begun;
        if left.is_empty() && !keeps_begun && state.inbox.head <= chunk.key {
            state.inbox.head = chunk.key.successor();
        }
        (left.len() < chunk.entries.len()).then_some(left)
    }

    /// What the last consumer left half acknowledged has been written anew.
    pub(super) fn settled(&self) {
        self.state.lock().unsettled = false;
    }

    /// Changes with every consumer.
    pub(super) fn consumers(&self) -> u64 {
        self.state.lock().consumers
    }

    pub(super) fn trimmed(&self) {
        self.state.lock().trimming = false;
    }

    pub(super) fn head(&self) -> MessageId {
        self.state.lock().inbox.head
    }

    fn is_over(&self, inbox: &Inbox) -> bool {
        inbox.messages > self.limits.queue_messages_max || inbox.bytes > self.limits.queue_bytes_max
    }

    /// Puts in a message that was added to the flush, as one of the chunk `key`; called in the order
    /// of ids. Returns whether it is on its way to the client now, and has not to be read first.
    pub(super) fn push_durable(&self, id: MessageId, key: MessageId, delivery: Delivery) -> bool {
        let mut state = self.state.lock();
        let bytes = delivery.message.len();
        if let Some(chunk) = state.inbox.chunks.get_mut(&key) {
            chunk.remaining += 1;
            chunk.bytes += bytes as u64;
        }
        if id.hlc < state.mode.held_from() {
            return false;
        }
        if !self.fits(&state) {
            state.spill(self.session, key, self.shared);
            if let Some(consumer) = state.consumer_for_message() {
                drop(state);
                consumer.wake();
            }
            return false;
        }
        if id == key {
            let chunk = OpenChunk {
                held_before: id,
                remaining: 1,
                bytes: bytes as u64,
                settled: Vec::new(),
            };
            state.inbox.chunks.insert(key, chunk);
        }
        if let Some(chunk) = state.inbox.chunks.get_mut(&key) {
            chunk.held_before = id.successor();
        }
        state.live_bytes += bytes;
        state.live.push_back(delivery);
        let is_next = state.mode.is_live();
        if let Some(consumer) = state.consumer_for_message() {
            drop(state);
            consumer.wake();
        }
        is_next
    }

    /// Puts in a chunk that another node has not written yet, and need not write if the client
    /// acknowledges it in time. Returns whether it goes to the client at once; if not, the chunk is
    /// the other node's alone.
    pub(super) fn push_offered(&self, chunk: &Chunk, arrival: Arrival) -> bool {
        let mut state = self.state.lock();
        let is_late = state.mode.has_read(chunk.key);
        let is_next = state.attached && state.mode.is_live() && !is_late && self.fits(&state);
        if !is_next || state.inbox.chunks.contains_key(&chunk.key) {
            return false;
        }
        state.inbox.undecided.insert(chunk.key, false);
        self.hold_chunk(&mut state, chunk, arrival);
        let consumer = state.consumer_for_message();
        drop(state);
        consumer.into_iter().for_each(Waker::wake);
        true
    }

    /// The node that offered a chunk has written it, or at last need not. Returns whether it is to be
    /// removed from the store.
    pub(super) fn decide(&self, key: MessageId, is_written: bool) -> bool {
        let state = &mut *self.state.lock();
        let is_finished = state.inbox.undecided.remove(&key).unwrap_or_default();
        if is_written && is_finished {
            state.may_be_read_again(key);
        }
        is_written && is_finished
    }

    /// Puts in a chunk that is in the store already: one that another node wrote, or that had to wait
    /// until it was certain.
    pub(super) fn push_committed(&self, chunk: &Chunk, arrival: Arrival) {
        self.add_committed(chunk.key, Some((chunk, arrival)));
    }

    /// A chunk is in the store that another node wrote and did not send: it has to be read.
    pub(super) fn read_committed(&self, key: MessageId) {
        self.add_committed(key, None);
    }

    fn add_committed(&self, key: MessageId, chunk: Option<(&Chunk, Arrival)>) {
        let mut state = self.state.lock();
        let is_offered = state.inbox.undecided.contains_key(&key);
        if !state.attached || is_offered || state.inbox.finished.contains(&key) {
            return;
        }
        if state.mode.has_read(key) || key.hlc < state.mode.held_from() {
            // It is read when its turn comes. If that is over, its node was not heard of in time, and
            // it may have been read already, and be done with.
            match &mut state.mode {
                Mode::Paged { from, .. } if key < *from => {
                    *from = key;
                    state.restart = true;
                }
                Mode::Paged { .. } => {}
                Mode::Live { .. } => state.spill(self.session, key, self.shared),
            }
            let consumer = state.consumer_for_message();
            drop(state);
            consumer.into_iter().for_each(Waker::wake);
            return;
        }
        if state.inbox.chunks.contains_key(&key) {
            return;
        }
        match chunk {
            Some((chunk, arrival)) if self.fits(&state) => {
                self.hold_chunk(&mut state, chunk, arrival);
            }
            _ => {
                let entries = chunk.map_or(&[][..], |(chunk, _)| &chunk.entries);
                let bytes: usize = entries.iter().map(|entry| entry.message.len()).sum();
                state.inbox.messages += entries.len() as u64;
                state.inbox.bytes += bytes as u64;
                state.spill(self.session, key, self.shared);
            }
        }
        let consumer = state.consumer_for_message();
        drop(state);
        consumer.into_iter().for_each(Waker::wake);
    }

    /// Memory has all of this chunk now.
    fn hold_chunk(&self, state: &mut State, chunk: &Chunk, arrival: Arrival) {
        let bytes: usize = chunk.entries.iter().map(|entry| entry.message.len()).sum();
        state.inbox.messages += chunk.entries.len() as u64;
        state.inbox.bytes += bytes as u64;
        let last = chunk.entries.last().map_or(chunk.key, |entry| entry.id);
        let open = OpenChunk {
            held_before: last.successor(),
            remaining: u32::try_from(chunk.entries.len()).unwrap_or(u32::MAX),
            bytes: bytes as u64,
            settled: Vec::new(),
        };
        state.inbox.chunks.insert(chunk.key, open);
        state.live_bytes += bytes;
        let entries = chunk.entries.iter().cloned();
        state
            .live
            .extend(entries.map(|entry| self.delivery(entry, arrival)));
    }

    /// How soon its client acknowledges.
    pub(super) fn patience(&self) -> &Patience {
        &self.patience
    }

    /// Something may be in the inbox that memory does not know of: all of it is read again.
    pub(super) fn doubt(&self) {
        self.doubt_besides(&[]);
    }

    /// Whether these were taken over is not known: those that are still in the inbox are read again.
    pub(super) fn read_again(&self, ids: &[MessageId]) {
        if !ids.is_empty() {
            self.doubt_besides(ids);
        }
    }

    /// In one step: of what has been read until now, nothing counts as new.
    fn doubt_besides(&self, forgotten: &[MessageId]) {
        let mut state = self.state.lock();
        if !state.attached {
            return;
        }
        for id in forgotten {
            state.inbox.forget(*id);
        }
        state.spill(self.session, MessageId::MIN, true);
        let consumer = state.consumer_for_message();
        drop(state);
        consumer.into_iter().for_each(Waker::wake);
    }

    /// Half full: publishers do well to let the consumer catch up.
    fn is_crowded(&self, state: &State) -> bool {
        state.live.len() * 2 > self.limits.memory_messages_max
            || state.live_bytes * 2 > self.limits.memory_bytes_max
    }

    fn fits(&self, state: &State) -> bool {
        state.live.len() < self.limits.memory_messages_max
            && state.live_bytes < self.limits.memory_bytes_max
    }

    /// The client has taken over a message of the inbox.
    pub(super) fn settle(&self, id: MessageId) -> Settled {
        let state = &mut *self.state.lock();
        let floor = state.mode.held_from();
        let inbox = &mut state.inbox;
        let found = inbox.chunks.range_mut(..=id).next_back();
        let Some((&key, chunk)) = found.filter(|(_, chunk)| id < chunk.held_before) else {
            // Settled before, or not yet read again.
            return Settled {
                key: id,
                chunk_finished: false,
                undecided: false,
            };
        };
        // The length of one message is not known here; that of all of them is.
        let bytes = chunk.bytes / u64::from(chunk.remaining.max(1));
        chunk.bytes -= bytes;
        chunk.remaining = chunk.remaining.saturating_sub(1);
        inbox.bytes = inbox.bytes.saturating_sub(bytes);
        inbox.messages = inbox.messages.saturating_sub(1);
        if inbox.messages == 0 {
            inbox.bytes = 0;
        }
        let is_finished = chunk.remaining == 0;
        let undecided = inbox.undecided.get_mut(&key);
        let is_undecided = undecided.is_some();
        if is_finished {
            // Whether there is anything to remove from the store is not known yet.
            undecided.into_iter().for_each(|finished| *finished = true);
            inbox.chunks.remove(&key);
            inbox.head = inbox
                .first_read(floor)
                .unwrap_or_else(|| inbox.head.max(key));
            if !is_undecided {
                state.may_be_read_again(key);
            }
        } else {
            chunk.settled.push((id.hlc, id.index));
        }
        Settled {
            key,
            chunk_finished: is_finished && !is_undecided,
            undecided: is_undecided,
        }
    }

    /// Appends to `into` what a page of the inbox has that the consumer has not had yet.
    pub(crate) fn accept_page(&self, page: Vec<Chunk>, into: &mut VecDeque<Delivery>) {
        let mut state = self.state.lock();
        let State {
            mode,
            inbox,
            restart,
            ..
        } = &mut *state;
        let Mode::Paged { from, .. } = mode else {
            return;
        };
        // Read before it was found out that more has to be read.
        if *restart {
            return;
        }
        for Chunk { key, entries } in page {
            *from = key.successor();
            if inbox.finished.remove(&key) || inbox.undecided.get(&key) == Some(&true) {
                continue;
            }
            let chunk = inbox.chunks.entry(key).or_insert_with(|| OpenChunk {
                held_before: key,
                remaining: 0,
                bytes: 0,
                settled: Vec::new(),
            });
            chunk.remaining = 0;
            chunk.bytes = 0;
            for entry in entries {
                if chunk.settled.contains(&(entry.id.hlc, entry.id.index)) {
                    continue;
                }
                chunk.remaining += 1;
                chunk.bytes += entry.message.len() as u64;
                if entry.id < chunk.held_before {
                    continue;
                }
                chunk.held_before = entry.id.successor();
                into.push_back(self.delivery(entry, Arrival::NONE));
            }
        }
        inbox.finished = inbox.finished.split_off(from);
    }

    fn delivery(&self, entry: Entry, arrival: Arrival) -> Delivery {
        Delivery {
            message: entry.message,
            qos: entry.qos,
            retain: entry.retain,
            subscription_identifiers: entry.subscription_identifiers,
            origin: self.origin(entry.id),
            arrival,
        }
    }

    /// Where a message of this mailbox's inbox waits.
    pub(super) fn origin(&self, id: MessageId) -> Origin {
        match &self.group {
            None => Origin::Inbox(id),
            Some(_) => Origin::Group(self.session, id),
        }
    }

    /// Whether the oldest message that has not been delivered is to be dropped.
    pub(crate) fn is_over_limit(&self) -> bool {
        self.is_over(&self.state.lock().inbox)
    }

    /// Whether what the session asked for itself, retained messages, may be added without pushing
    /// out what others have sent.
    pub(crate) fn has_ample_room(&self) -> bool {
        let inbox = &self.state.lock().inbox;
        inbox.messages * 2 <= self.limits.queue_messages_max
            && inbox.bytes * 2 <= self.limits.queue_bytes_max
    }

    /// How many retained messages, of `at_most`, may be added at a time.
    pub(crate) fn retained_step(&self, at_most: usize) -> usize {
        let room = usize::try_from(self.limits.queue_messages_max / 2).unwrap_or(usize::MAX);
        at_most.min(room).max(1)
    }

    /// Begins to take messages out. `tick` is a clock value between everything that is in the inbox
    /// and everything that will be; without it, other nodes may still add what comes before.
    pub(crate) fn attach(&self, tick: Option<u64>) {
        let mut state = self.state.lock();
        state.attached = true;
        state.consumers += 1;
        state.mode = match tick {
            None if self.is_durable() => Mode::AWAY,
            Some(_) if state.inbox.messages > 0 => Mode::Paged {
                from: state.inbox.head,
                live_from: tick,
            },
            _ => Mode::Live {
                since: tick.unwrap_or(0),
            },
        };
        state.restart = false;
        state.inbox.finished.clear();
    }

    /// Begins to read the inbox anew. Called while the flush is held: what is done with until now is
    /// gone from the store once the flush is durable, and what is done with later is remembered.
    pub(crate) fn begin_reading(&self) {
        let mut state = self.state.lock();
        state.restart = false;
        state.inbox.finished.clear();
    }

    /// Ends taking messages out. What was not stored and not taken is returned: it is lost, or goes
    /// back to the share group that it came from.
    pub(crate) fn detach(&self) -> VecDeque<Delivery> {
        let mut state = self.state.lock();
        state.attached = false;
        state.order = None;
        state.consumer = None;
        state.live_bytes = 0;
        let waiting = std::mem::take(&mut state.live);
        state.waiting_publishers.drain(..).for_each(Waker::wake);
        if self.is_durable() {
            let floor = state.mode.held_from();
            state.mode = Mode::AWAY;
            state.unsettled = true;
            state.inbox.head = state.inbox.first_read(floor).unwrap_or(state.inbox.head);
        }
        waiting
    }

    /// Says which messages of the inbox were begun to be delivered, so that none of them is dropped
    /// while the client is away.
    pub(super) fn set_begun(&self, last: Option<MessageId>) {
        self.state.lock().inbox.begun = last.unwrap_or(MessageId::MIN);
    }

    /// The chunks that are acknowledged in part, with what is: they are to be written anew, so that
    /// nothing is delivered twice. Afterwards nothing is known of what the consumer had.
    pub(crate) fn take_partly_settled(&self) -> Vec<(MessageId, Vec<(u64, u16)>)> {
        let mut state = self.state.lock();
        let chunks = std::mem::take(&mut state.inbox.chunks);
        chunks
            .into_iter()
            .filter(|(_, chunk)| !chunk.settled.is_empty())
            .map(|(key, chunk)| (key, chunk.settled))
            .collect()
    }

    /// Moves up to `room` messages into `into`, or says what to read.
    pub(crate) fn take(&self, into: &mut VecDeque<Delivery>, room: usize) -> Taken {
        let mut state = self.state.lock();
        match state.mode {
            Mode::Live { .. } => {
                state.move_out(into, room);
                Taken::Live
            }
            Mode::Paged { .. } if state.restart => Taken::Restart,
            Mode::Paged { from, live_from } => {
                if live_from.is_none() {
                    // Only what is not stored; the rest comes from the inbox.
                    state.move_out(into, room);
                }
                Taken::ReadInbox { from, live_from }
            }
        }
    }

    /// Asks that from `tick` on messages are held in memory too, so that the reading can end.
    pub(crate) fn hold_from(&self, tick: u64) {
        let mut state = self.state.lock();
        if let Mode::Paged {
            live_from: live_from @ None,
            ..
        } = &mut state.mode
        {
            *live_from = Some(tick);
        }
    }

    /// The inbox has been read up to `before`: memory holds all that waits, unless it has spilled
    /// meanwhile.
    pub(crate) fn caught_up(&self, before: u64) {
        let mut state = self.state.lock();
        if let Mode::Paged {
            live_from: Some(live_from),
            ..
        } = state.mode
            && live_from == before
            && !state.restart
        {
            state.mode = Mode::Live { since: before };
            state.inbox.finished.clear();
        }
    }

    /// Leaves a waker for the next message or order; returns false if there is one already.
    pub(crate) fn wait(&self, waker: &Waker, wants_messages: bool) -> bool {
        let mut state = self.state.lock();
        if state.order.is_some()
            || (wants_messages && (!state.live.is_empty() || !state.mode.is_live()))
        {
            return false;
        }
        state.consumer_wants_messages = wants_messages;
        match &mut state.consumer {
            Some(waiting) => waiting.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        true
    }

    /// A connection begins: what was said to the one before it is void.
    pub(super) fn clear_order(&self) {
        self.state.lock().order = None;
    }

    pub(crate) fn order(&self) -> Option<Order> {
        self.state.lock().order
    }

    /// The connection has carried an order out that does not end it.
    pub(crate) fn withdraw_order(&self, carried_out: Order) {
        self.state
            .lock()
            .order
            .take_if(|order| *order == carried_out);
    }

    /// Tells the connection to end, or to ask whether it should.
    pub(crate) fn give(&self, order: Order) {
        self.give_order(&mut self.state.lock(), order);
    }

    fn give_order(&self, state: &mut State, order: Order) {
        if matches!(state.order, None | Some(Order::CheckAccess)) {
            state.order = Some(order);
        }
        if let Some(consumer) = state.consumer.take() {
            consumer.wake();
        }
    }

    /// Registers a publisher that waits for the consumer to take messages; false if it need not wait.
    pub(crate) fn wait_for_space(&self, waker: &Waker) -> bool {
        let mut state = self.state.lock();
        if !state.attached || !self.is_crowded(&state) {
            return false;
        }
        if !state
            .waiting_publishers
            .iter()
            .any(|waiting| waiting.will_wake(waker))
        {
            state.waiting_publishers.push(waker.clone());
        }
        true
    }
}

/// Whether the client of a mailbox acknowledges soon enough that it is worth waiting for.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// Not before then, in milliseconds since the Unix epoch.
    not_before: AtomicU64,
    /// How often it was waited for in vain since the last time that it was not.
    in_vain: AtomicU32,
}

/// For how long no one waits for a client after it was waited for in vain. Doubled each time.
const IMPATIENCE_MIN_MS: u64 = 10;
const IMPATIENCE_DOUBLINGS_MAX: u32 = 10;

impl Patience {
    pub(super) fn is_worth(&self, now_ms: u64) -> bool {
        self.not_before.load(Ordering::Relaxed) <= now_ms
    }

    /// Its client was waited for, and has acknowledged in time or not.
    pub(super) fn note(&self, in_time: bool, now_ms: u64) {
        if in_time {
            self.in_vain.store(0, Ordering::Relaxed);
            return;
        }
        let in_vain = self.in_vain.fetch_add(1, Ordering::Relaxed);
        let pause = IMPATIENCE_MIN_MS << in_vain.min(IMPATIENCE_DOUBLINGS_MAX);
        self.not_before.store(now_ms + pause, Ordering::Relaxed);
    }
}

impl Mode {
    const WITHOUT_INBOX: Self = Self::Live { since: 0 };

    /// Of a mailbox that nobody takes messages out of.
    const AWAY: Self = Self::Paged {
        from: MessageId::MIN,
        live_from: None,
    };

    /// Whether this would have been read before, had it been there.
    fn has_read(self, key: MessageId) -> bool {
        matches!(self, Self::Live { since } if key.hlc < since)
    }

    fn is_live(self) -> bool {
        matches!(self, Self::Live { .. })
    }

    /// The clock value from which on memory holds all that waits.
    fn held_from(self) -> u64 {
        match self {
            Self::Live { .. } => 0,
            Self::Paged { live_from, .. } => live_from.unwrap_or(u64::MAX),
        }
    }
}

impl Inbox {
    /// This message, and what follows it in its chunk, has to be read. Returns the key of the chunk.
    fn forget(&mut self, id: MessageId) -> Option<MessageId> {
        let (&key, chunk) = self.chunks.range_mut(..=id).next_back()?;
        chunk.held_before = chunk.held_before.min(id);
        if chunk.held_before == key {
            self.chunks.remove(&key);
        }
        Some(key)
    }

    /// The first chunk that was read from the store, as opposed to those that memory holds from
    /// `floor` on while older ones are still to be read.
    fn first_read(&self, floor: u64) -> Option<MessageId> {
        let first = self.chunks.keys().next().copied();
        first.filter(|key| floor == 0 || key.hlc < floor)
    }
}

impl State {
    /// Whether nobody else writes chunks anew.
    fn may_be_trimmed(&self) -> bool {
        !self.attached && !self.unsettled
    }

    /// Notes that a chunk is done with, if it may still be read.
    fn may_be_read_again(&mut self, key: MessageId) {
        if let Mode::Paged { from, .. } = self.mode
            && (key >= from || self.restart)
        {
            self.inbox.finished.insert(key);
        }
    }

    fn consumer_for_message(&mut self) -> Option<Waker> {
        if self.consumer_wants_messages {
            self.consumer.take()
        } else {
            None
        }
    }

    fn move_out(&mut self, into: &mut VecDeque<Delivery>, room: usize) {
        if self.live.len() <= room && into.is_empty() {
            // The usual case: the two queues change places, and both keep their memory.
            std::mem::swap(&mut self.live, into);
            self.live_bytes = 0;
        } else {
            for delivery in self.live.drain(..room.min(self.live.len())) {
                self.live_bytes -= delivery.message.len();
                into.push_back(delivery);
            }
        }
        self.waiting_publishers.drain(..).for_each(Waker::wake);
    }

    /// Memory is full: what is stored, also what is being added to the chunk `adding`, is read from
    /// the store again when its turn comes.
    fn spill(&mut self, session: SessionId, adding: MessageId, shared: bool) {
        // Other nodes may add chunks before those that memory has.
        let mut first = if shared { MessageId::MIN } else { adding };
        self.live.retain(|delivery| {
            let Some(id) = delivery.origin.place_in(session) else {
                return true;
            };
            self.live_bytes -= delivery.message.len();
            if let Some(key) = self.inbox.forget(id) {
                first = first.min(key);
            }
            false
        });
        let from = match self.mode {
            Mode::Live { .. } => first,
            Mode::Paged { from, .. } => from.min(first),
        };
        self.mode = Mode::Paged {
            from,
            live_from: None,
        };
        self.restart = true;
    }
}

impl fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox")
            .field("client_id", &self.client_id)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}
