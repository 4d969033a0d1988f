//! The messages on their way to one session, or to the members of one share group.
//!
//! Whoever publishes puts messages in; one consumer, the task of the client's connection or the
//! dispatcher of the group, takes them out. A mailbox is `Live` (memory holds all that waits) or
//! `Paged` (what waits is read from the inbox in the store, in pages, until the consumer has caught
//! up), so its memory is bounded however much waits.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Waker;

use parking_lot::Mutex;

use crate::mqtt::topic::SubscriptionFilter;
use crate::mqtt::{Message, QoS};
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

/// Messages that a mailbox did not take, by reason. One set for the whole broker.
#[derive(Debug, Default)]
pub(crate) struct Dropped {
    /// QoS 0 for a client that does not keep up.
    pub(crate) slow_consumer: AtomicU64,
    /// QoS 1 and 2 beyond the limits of the queue.
    pub(crate) queue_full: AtomicU64,
}

/// Why a connection must end, said from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    TakenOver,
    QueueFull,
    Shutdown,
}

/// The messages on their way to one session or share group.
pub(crate) struct Mailbox {
    pub(crate) session: SessionId,
    pub(crate) client_id: Arc<str>,
    /// Set if this is the mailbox of a share group.
    pub(crate) group: Option<SubscriptionFilter>,
    /// Whether QoS 1 and 2 messages go through the inbox in the store.
    durable: AtomicBool,
    limits: MailboxLimits,
    dropped: Arc<Dropped>,
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
    /// Whether chunks that the last consumer left half acknowledged are still to be written anew.
    unsettled: bool,
    /// How many consumers there have been.
    consumers: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Memory holds all that waits.
    Live,
    /// The consumer reads the inbox, up to the clock value from which on memory holds what waits.
    Paged { live_from: Option<u64> },
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
    /// Chunks of which messages were handed to the consumer.
    chunks: BTreeMap<MessageId, OpenChunk>,
}

/// A chunk in the hands of the consumer.
#[derive(Debug)]
struct OpenChunk {
    /// Its last message.
    last: MessageId,
    /// Messages in it that are not acknowledged.
    remaining: u32,
    bytes: u64,
    /// Indexes of those that are, as long as others are not.
    settled: Vec<(u64, u16)>,
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
}

/// What is at hand for the consumer.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Messages were moved out, or there are none.
    Live,
    /// The inbox must be read, from `from` up to `before`.
    ReadInbox {
        from: MessageId,
        before: Option<u64>,
    },
}

impl Mailbox {
    pub(crate) fn new(
        session: SessionId,
        client_id: Arc<str>,
        group: Option<SubscriptionFilter>,
        durable: bool,
        stored: InboxSummary,
        limits: MailboxLimits,
        dropped: Arc<Dropped>,
    ) -> Self {
        Self {
            session,
            client_id,
            group,
            durable: AtomicBool::new(durable),
            limits,
            dropped,
            state: Mutex::new(State {
                mode: if durable {
                    Mode::Paged { live_from: None }
                } else {
                    Mode::Live
                },
                live: VecDeque::new(),
                live_bytes: 0,
                attached: false,
                consumer: None,
                consumer_wants_messages: false,
                order: None,
                waiting_publishers: Vec::new(),
                trimming: false,
                unsettled: false,
                consumers: 0,
                inbox: Inbox {
                    messages: stored.messages,
                    bytes: stored.bytes,
                    head: stored.head.unwrap_or(MessageId::MIN),
                    begun: MessageId::MIN,
                    chunks: BTreeMap::new(),
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
            state.mode = Mode::Paged { live_from: None };
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
                self.dropped.slow_consumer.fetch_add(1, Ordering::Relaxed);
                return !stalled;
            }
            self.dropped.queue_full.fetch_add(1, Ordering::Relaxed);
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

    /// Whether the limits of the inbox let another message in.
    pub(super) fn admit(&self, message: &Message) -> Admission {
        let mut state = self.state.lock();
        let full = state.inbox.messages >= self.limits.queue_messages_max
            || state.inbox.bytes + message.len() as u64 > self.limits.queue_bytes_max;
        if full {
            self.dropped.queue_full.fetch_add(1, Ordering::Relaxed);
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
        state.inbox.messages += 1;
        state.inbox.bytes += message.len() as u64;
        // Not for every single message: a step of trimming costs a read.
        let slack = self.limits.queue_messages_max / 16;
        let bytes_slack = self.limits.queue_bytes_max / 16;
        let overfull = state.inbox.messages > self.limits.queue_messages_max + slack
            || state.inbox.bytes > self.limits.queue_bytes_max + bytes_slack;
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

    /// Drops the oldest messages, which are in this chunk, as far as the limits demand; returns
    /// what is left of the chunk if anything was dropped.
    pub(super) fn drop_oldest(&self, chunk: &Chunk) -> Option<Vec<Entry>> {
        let mut state = self.state.lock();
        if state.attached {
            return None;
        }
        let mut left = Vec::new();
        for entry in &chunk.entries {
            // What was begun to be delivered has to be finished.
            if entry.id > state.inbox.begun && self.is_over(&state.inbox) {
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

    /// Puts in a message that was added to the flush; called in the order of ids.
    pub(super) fn push_durable(&self, id: MessageId, key: MessageId, delivery: Delivery) {
        let mut state = self.state.lock();
        let bytes = delivery.message.len();
        if let Some(chunk) = state.inbox.chunks.get_mut(&key) {
            chunk.last = id;
            chunk.remaining += 1;
            chunk.bytes += bytes as u64;
        }
        if id.hlc < state.mode.held_from() {
            return;
        }
        if !self.fits(&state) {
            state.spill(self.session);
            if let Some(consumer) = state.consumer_for_message() {
                drop(state);
                consumer.wake();
            }
            return;
        }
        if id == key {
            let chunk = OpenChunk {
                last: id,
                remaining: 1,
                bytes: bytes as u64,
                settled: Vec::new(),
            };
            state.inbox.chunks.insert(key, chunk);
        }
        state.live_bytes += bytes;
        state.live.push_back(delivery);
        if let Some(consumer) = state.consumer_for_message() {
            drop(state);
            consumer.wake();
        }
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
        let mut state = self.state.lock();
        let floor = state.mode.held_from();
        let inbox = &mut state.inbox;
        let found = inbox.chunks.range_mut(..=id).next_back();
        let Some((&key, chunk)) = found.filter(|(_, chunk)| id <= chunk.last) else {
            // Settled before, or not yet read again.
            return Settled {
                key: id,
                chunk_finished: false,
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
        let chunk_finished = chunk.remaining == 0;
        if chunk_finished {
            inbox.chunks.remove(&key);
            inbox.head = inbox
                .first_read(floor)
                .unwrap_or_else(|| inbox.head.max(key));
        } else {
            chunk.settled.push((id.hlc, id.index));
        }
        Settled {
            key,
            chunk_finished,
        }
    }

    /// The consumer has a chunk that it read from the inbox; returns which of its messages it is to
    /// leave out, because they were acknowledged already.
    pub(crate) fn open_chunk(
        &self,
        key: MessageId,
        last: MessageId,
        entries: u32,
        bytes: u64,
    ) -> Vec<(u64, u16)> {
        let mut state = self.state.lock();
        let chunk = state.inbox.chunks.entry(key).or_insert_with(|| OpenChunk {
            last,
            remaining: entries,
            bytes,
            settled: Vec::new(),
        });
        chunk.settled.clone()
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
    /// and everything that will be.
    pub(crate) fn attach(&self, tick: u64) {
        let mut state = self.state.lock();
        state.attached = true;
        state.consumers += 1;
        state.mode = if state.inbox.messages == 0 {
            Mode::Live
        } else {
            Mode::Paged {
                live_from: Some(tick),
            }
        };
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
            state.mode = Mode::Paged { live_from: None };
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

    /// Moves up to `room` messages into `into`, or says what to read: from `cursor`, or else from the
    /// chunk that has the last message taken, `last`.
    pub(crate) fn take(
        &self,
        into: &mut VecDeque<Delivery>,
        room: usize,
        cursor: Option<MessageId>,
        last: MessageId,
    ) -> Taken {
        let mut state = self.state.lock();
        match state.mode {
            Mode::Live => {
                state.move_out(into, room);
                Taken::Live
            }
            Mode::Paged { live_from } => {
                if live_from.is_none() {
                    // Only what is not stored; the rest comes from the inbox.
                    state.move_out(into, room);
                }
                let from = cursor.unwrap_or_else(|| {
                    let open = state.inbox.chunks.range(..=last).next_back();
                    open.map_or_else(|| last.max(state.inbox.head), |(key, _)| *key)
                });
                Taken::ReadInbox {
                    from,
                    before: live_from,
                }
            }
        }
    }

    /// Asks that from `tick` on messages are held in memory too, so that the reading can end.
    pub(crate) fn hold_from(&self, tick: u64) {
        let mut state = self.state.lock();
        if state.mode == (Mode::Paged { live_from: None }) {
            state.mode = Mode::Paged {
                live_from: Some(tick),
            };
        }
    }

    /// The inbox has been read up to `before`: memory holds all that waits, unless it has spilled
    /// meanwhile.
    pub(crate) fn caught_up(&self, before: u64) {
        let mut state = self.state.lock();
        if state.mode
            == (Mode::Paged {
                live_from: Some(before),
            })
        {
            state.mode = Mode::Live;
        }
    }

    /// Leaves a waker for the next message or order; returns false if there is one already.
    pub(crate) fn wait(&self, waker: &Waker, wants_messages: bool) -> bool {
        let mut state = self.state.lock();
        if state.order.is_some()
            || (wants_messages && (!state.live.is_empty() || state.mode != Mode::Live))
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

    /// Tells the connection to end.
    pub(crate) fn order_to_end(&self, order: Order) {
        self.give_order(&mut self.state.lock(), order);
    }

    fn give_order(&self, state: &mut State, order: Order) {
        state.order.get_or_insert(order);
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

impl Mode {
    /// The clock value from which on memory holds all that waits.
    fn held_from(self) -> u64 {
        match self {
            Self::Live => 0,
            Self::Paged { live_from } => live_from.unwrap_or(u64::MAX),
        }
    }
}

impl Inbox {
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

    /// Memory is full: what is stored is read from the store again when its turn comes.
    fn spill(&mut self, session: SessionId) {
        let first = self
            .live
            .iter()
            .find_map(|delivery| delivery.origin.place_in(session));
        self.live
            .retain(|delivery| delivery.origin.place_in(session).is_none());
        self.live_bytes = self
            .live
            .iter()
            .map(|delivery| delivery.message.len())
            .sum();
        self.mode = Mode::Paged { live_from: None };
        // Chunks of which the consumer has nothing are not in its hands.
        if let Some(first) = first {
            self.inbox.chunks.retain(|key, _| *key < first);
        }
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
