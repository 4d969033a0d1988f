//! Links: what nodes tell each other comes in order and once, or they learn that it was lost.
//!
//! Every node sends a stream of frames to each other one, and a stream to all. A bus may lose,
//! repeat and reorder frames: they are numbered, whoever misses some asks for them, and who sent
//! them keeps the last ones. What cannot be had any more is reported as lost, and then read from
//! the store. There is an order within a stream, and none between two.
//!
//! Everything waits in [`outgoing`] for [`Links::send_frames`], which sends what has gathered while
//! the bus carried the last frames, and no more than the other end keeps up with. [`receiver`] is that
//! other end; [`marks`] is how far the other nodes are.

mod incoming;
mod marks;
mod outgoing;
mod receiver;

#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::bus::wire::{self, Header, Item, Signal, Stamp, Stream};
use crate::bus::{Bus, Destination};
use crate::metrics::{Arrival, BusFailure, By, Counter, Histogram, Traffic};
use crate::mqtt::QoS;

pub(crate) use marks::Marks;

use outgoing::{Outgoing, Room};
use receiver::Receiver;

/// How often a node says that it is there, and how far it is.
const BEAT_INTERVAL: Duration = Duration::from_millis(250);

/// Bytes of frames held for each stream: those that wait, and those that may be asked for again.
const STREAM_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The same for all streams together.
const BYTES_MAX: usize = 128 * 1024 * 1024;

/// How long the bus may take for frames until it counts as failing.
const CARRY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it is waited for as long as it does: it may be about to work again.
const CARRY_TIMEOUT_FAILING: Duration = Duration::from_millis(100);

/// Between attempts to send frames.
const SEND_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How far this node is, and where it hears how far the others are.
pub(crate) trait Clock: Send + Sync {
    /// A message may count as durable only after everything that has to be said of it was given
    /// to [`Links::send`]. Must not call [`Links`].
    fn stamp(&self) -> Stamp;

    /// A frame came, in whatever order. The clock must not stay behind that of the header, or
    /// those who want a mark of it wait for ever.
    fn observe(&self, header: &Header);
}

/// Takes what other nodes send, without blocking.
pub(crate) trait Handler: Send {
    /// In order within a stream, and once.
    fn receive(&mut self, header: &Header, arrival: Arrival, item: Item);

    /// Some of what a node sent before whatever comes now will never come.
    fn lost(&mut self, from: u32);

    /// The bus was interrupted: what comes now from one node may be newer than what is still
    /// missing from another.
    fn interrupted(&mut self);
}

/// The links of one node to all others.
pub(crate) struct Links {
    node: u32,
    bus: Arc<dyn Bus>,
    clock: Arc<dyn Clock>,
    sending: Mutex<Sending>,
    /// The last frame of the stream from each other node that was handed on, and all before it.
    handed_on: Mutex<HashMap<u32, u64>>,
    carriage: watch::Sender<Carriage>,
    /// There may be something to send.
    work: Notify,
    /// Somebody waits for this node to be durable up to a clock value.
    mark_promised: AtomicBool,
    membership: Mutex<Membership>,
    membership_changed: Notify,
    marks: Marks,
    counters: Counters,
}

struct Sending {
    all: Outgoing,
    direct: HashMap<u32, Outgoing>,
    /// What stands outside of streams: frames that were asked for again, and signals.
    unordered: Vec<(u32, Bytes)>,
    unordered_bytes: usize,
    next_beat: Instant,
    /// The frame with the last beat, and when it was made, until it has come back.
    beat: Option<(u64, Instant)>,
    /// What was ever added to a stream, counted.
    added: u64,
}

/// How far the bus is.
struct Carriage {
    /// So much of what was added has been given to it, but for what nobody waits for, or dropped.
    carried: u64,
    is_failing: bool,
}

#[derive(Default)]
struct Membership {
    alive: HashSet<u32>,
    /// Nodes that were alive once. No number is used twice.
    gone: HashSet<u32>,
}

/// Totals since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) frames_sent: Counter,
    pub(crate) bytes_sent: Counter,
    pub(crate) frames_received: Counter,
    pub(crate) sent: By<Traffic, Counter>,
    pub(crate) received: By<Traffic, Counter>,
    /// Frames that were asked for again, and sent again.
    pub(crate) resends: Counter,
    /// Times that frames of other nodes were missing and asked for.
    pub(crate) gaps: Counter,
    /// Times that they could not be had.
    pub(crate) lost: Counter,
    /// Times that a node was so far behind that messages to it were held back or left out.
    pub(crate) stalls: Counter,
    /// Messages for sessions without an inbox that were dropped for that reason.
    pub(crate) dropped: By<QoS, Counter>,
    pub(crate) duplicates: Counter,
    pub(crate) malformed: Counter,
    pub(crate) failures: By<BusFailure, Counter>,
    /// From a beat to its return from the bus.
    pub(crate) roundtrip: Histogram,
}

impl Links {
    /// `node` is a number that no other process has or had, greater than those of all that
    /// started before.
    pub(crate) fn new(node: u32, bus: Arc<dyn Bus>, clock: Arc<dyn Clock>) -> Self {
        Self {
            node,
            bus,
            clock,
            sending: Mutex::new(Sending {
                all: Outgoing::new(Stream::All),
                direct: HashMap::new(),
                unordered: Vec::new(),
                unordered_bytes: 0,
                next_beat: Instant::now(),
                beat: None,
                added: 0,
            }),
            handed_on: Mutex::default(),
            // Until frames are sent.
            carriage: watch::Sender::new(Carriage {
                carried: 0,
                is_failing: true,
            }),
            work: Notify::new(),
            mark_promised: AtomicBool::new(false),
            membership: Mutex::default(),
            membership_changed: Notify::new(),
            marks: Marks::new(),
            counters: Counters::default(),
        }
    }

    /// Sends until `stop`; what waits then is still sent.
    pub(crate) async fn send_frames(&self, stop: &CancellationToken) {
        self.carriage
            .send_modify(|carriage| carriage.is_failing = false);
        loop {
            let is_ending = stop.is_cancelled();
            let (frames, carried) = self.seal(is_ending);
            if !frames.is_empty() {
                self.counters.frames_sent.add(frames.len() as u64);
                let bytes: usize = frames.iter().map(|(_, frame)| frame.len()).sum();
                self.counters.bytes_sent.add(bytes as u64);
                self.carry(frames, stop).await;
            }
            let has_advanced = self.carriage.send_if_modified(|carriage| {
                std::mem::replace(&mut carriage.carried, carried) != carried
            });
            // Beats do not count: on a slow bus one is due whenever the last has been carried.
            if has_advanced {
                continue;
            }
            if is_ending {
                break;
            }
            let next_beat = self.sending.lock().next_beat;
            tokio::select! {
                () = self.work.notified() => {}
                () = tokio::time::sleep_until(next_beat) => {}
                () = stop.cancelled() => {}
            }
        }
        self.carriage
            .send_modify(|carriage| carriage.is_failing = true);
    }

    /// Gives frames to the bus, again and again until it takes them: to send one twice does no harm,
    /// and nobody would know yet that it is missing.
    async fn carry(&self, frames: Vec<(Destination, Bytes)>, stop: &CancellationToken) {
        loop {
            let mut sending = self.bus.send(frames.clone());
            let outcome = match timeout(CARRY_TIMEOUT, &mut sending).await {
                Ok(outcome) => outcome,
                Err(late) => {
                    self.note_failure(BusFailure::Timeout, &late);
                    sending.await
                }
            };
            match outcome {
                Ok(()) => {
                    let recovered = self.carriage.send_if_modified(|carriage| {
                        std::mem::replace(&mut carriage.is_failing, false)
                    });
                    if recovered {
                        tracing::info!(event = "bus_recovered");
                        let direct = &mut self.sending.lock().direct;
                        direct.values_mut().for_each(Outgoing::hold_anew);
                    }
                    return;
                }
                Err(error) => self.note_failure(BusFailure::Error, &error),
            }
            if stop.is_cancelled() {
                return;
            }
            tokio::time::sleep(SEND_AGAIN_AFTER).await;
        }
    }

    fn note_failure(&self, failure: BusFailure, reason: &dyn fmt::Display) {
        self.counters.failures.of(failure).inc();
        let failed = self
            .carriage
            .send_if_modified(|carriage| !std::mem::replace(&mut carriage.is_failing, true));
        if failed {
            tracing::warn!(event = "bus_failed", %reason);
        }
    }

    /// Whether the bus does not carry frames at the moment.
    pub(crate) fn is_failing(&self) -> bool {
        self.carriage.borrow().is_failing
    }

    /// Whether another node may answer sooner than a write to the store takes.
    pub(crate) fn is_quick(&self) -> bool {
        self.bus.is_quick() && !self.is_failing()
    }

    /// Whether frames go by the way that they should.
    pub(crate) fn is_bus_connected(&self) -> bool {
        self.bus.is_connected() && !self.is_failing()
    }

    /// How often the bus has made a connection anew.
    pub(crate) fn bus_reconnects(&self) -> u64 {
        self.bus.reconnects()
    }

    /// Bytes for single other nodes that these have not said to have handed on.
    pub(crate) fn pending_bytes(&self) -> usize {
        let sending = self.sending.lock();
        sending.direct.values().map(Outgoing::pending_bytes).sum()
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The bus has brought back what this node sent to all.
    fn hear_echo(&self, header: &Header) {
        let mut sending = self.sending.lock();
        let is_beat = |(sequence, _): &mut (u64, Instant)| *sequence == header.sequence;
        if header.stream == Stream::All
            && let Some((_, at)) = sending.beat.take_if(is_beat)
        {
            self.counters.roundtrip.observe(at.elapsed());
        }
    }

    /// Waits until the bus has everything that was given to [`Links::send`] before. Returns whether
    /// it has; it is not waited for long.
    pub(crate) async fn carried(&self) -> bool {
        let added = self.sending.lock().added;
        let mut carriage = self.carriage.subscribe();
        let patience = if carriage.borrow().is_failing {
            CARRY_TIMEOUT_FAILING
        } else {
            CARRY_TIMEOUT
        };
        let carried = carriage.wait_for(|carriage| carriage.carried >= added);
        timeout(patience, carried).await.is_ok()
    }

    /// Receives until `stop`, or until the bus ends, which it never does by itself. `frames` come
    /// from [`Bus::subscribe`].
    pub(crate) async fn receive_frames(
        &self,
        frames: mpsc::Receiver<Bytes>,
        handler: &mut dyn Handler,
        stop: &CancellationToken,
    ) {
        Receiver::new(self, handler).run(frames, stop).await;
    }

    /// Queues an item, without waiting. When the bus does not keep up, the oldest are left out and
    /// the other end learns that they are lost. When the other end does not, messages are held back,
    /// and dropped if they are in no inbox. Returns whether the publisher of one had better wait for
    /// [`Links::wait_for_space`].
    pub(crate) fn send(&self, to: Destination, item: &Item) -> bool {
        self.counters.sent.of(item.traffic()).inc();
        self.add(to, |outgoing, number, room| {
            outgoing.send(item, number, room, &self.counters)
        })
    }

    /// Has `waker` woken once nothing is held back for a node any more; returns false if nothing is.
    pub(crate) fn wait_for_space(&self, node: u32, waker: &Waker) -> bool {
        let mut sending = self.sending.lock();
        let outgoing = sending.direct.get_mut(&node);
        outgoing.is_some_and(|outgoing| outgoing.wait_for_space(waker))
    }

    /// Asks all nodes to say when they are durable up to `hlc`, instead of at their next beat.
    pub(crate) fn want_marks(&self, hlc: u64) {
        self.add(Destination::All, |outgoing, _, room| {
            outgoing.add(room.bytes_max, |frame| Signal::WantMark { hlc }.put(frame))
        });
    }

    /// The clock says that more is durable now. Cheap.
    pub(crate) fn durable_advanced(&self) {
        if self.mark_promised.load(Ordering::Acquire) {
            self.work.notify_one();
        }
    }

    /// The nodes that take part, this one included or not. Those that no longer do are forgotten
    /// and not listened to any more.
    pub(crate) fn set_alive(&self, nodes: &[u32]) {
        let alive: HashSet<u32> = nodes
            .iter()
            .copied()
            .filter(|node| *node != self.node)
            .collect();
        let gone: Vec<u32> = {
            let mut membership = self.membership.lock();
            let gone: Vec<u32> = membership.alive.difference(&alive).copied().collect();
            membership.gone.extend(&gone);
            membership.alive = alive.clone();
            gone
        };
        self.marks.set_alive(alive.into_iter());
        if gone.is_empty() {
            return;
        }
        let mut sending = self.sending.lock();
        for node in gone {
            self.marks.forget(node);
            sending.direct.remove(&node);
        }
        drop(sending);
        // Nothing that was held back for them is waited for.
        self.work.notify_one();
        self.membership_changed.notify_one();
    }

    /// Does not wait for the marks of these nodes any more, unless they are heard of.
    pub(crate) fn suspect(&self, nodes: &[u32]) {
        self.marks.suspect(nodes.iter().copied());
    }

    pub(crate) fn marks(&self) -> &Marks {
        &self.marks
    }

    fn is_gone(&self, node: u32) -> bool {
        self.membership.lock().gone.contains(&node)
    }

    /// Returns whether messages are held back.
    fn add(&self, to: Destination, add: impl FnOnce(&mut Outgoing, u64, Room) -> bool) -> bool {
        let mut sending = self.sending.lock();
        // Nodes that are gone have no stream, and get none.
        if let Destination::Node(node) = to
            && !sending.direct.contains_key(&node)
            && (node == self.node || self.is_gone(node))
        {
            return false;
        }
        sending.added += 1;
        let (number, room) = (sending.added, sending.room());
        let outgoing = sending.outgoing(to);
        // Of what waits already it has been told that there is something to send.
        let is_known = outgoing.is_waiting();
        if !add(outgoing, number, room) {
            self.counters.failures.of(BusFailure::LeftOut).inc();
        }
        let holds_back = outgoing.has_held();
        drop(sending);
        if !is_known || holds_back {
            self.work.notify_one();
        }
        holds_back
    }

    /// Another node has handed on what it was sent directly, up to this frame.
    fn confirm(&self, node: u32, last: u64) {
        let mut sending = self.sending.lock();
        // While it is locked, or a stream to a node that is gone would begin again.
        if self.is_gone(node) {
            return;
        }
        let outgoing = sending.outgoing(Destination::Node(node));
        outgoing.confirm(last);
        let has_held = outgoing.has_held();
        drop(sending);
        if has_held {
            self.work.notify_one();
        }
    }

    /// Says something outside of streams: nobody asks for it again if it is lost.
    fn signal(&self, to: u32, signal: &Signal) {
        let mut frame = wire::begin();
        signal.put(&mut frame);
        let header = Header {
            from: self.node,
            stream: Stream::Direct,
            sequence: 0,
            stamp: self.clock.stamp(),
        };
        let frame = wire::seal(frame, header);
        self.sending.lock().add_unordered(to, frame);
        self.work.notify_one();
    }

    /// Answers a node that misses frames.
    fn send_again(&self, to: u32, stream: Stream, range: RangeInclusive<u64>) {
        let mut sending = self.sending.lock();
        let outgoing = match stream {
            Stream::All => &sending.all,
            Stream::Direct => sending.direct.entry(to).or_insert_with(new_direct),
        };
        let again = outgoing.again(&range);
        for frame in again.frames {
            if sending.add_unordered(to, frame) {
                self.counters.resends.inc();
            }
        }
        drop(sending);
        for range in again.gone {
            let (first, last) = range.into_inner();
            self.signal(
                to,
                &Signal::Gone {
                    stream,
                    first,
                    last,
                },
            );
        }
        self.work.notify_one();
    }

    /// Sends a node a mark as soon as this node is durable up to `hlc`.
    fn promise_mark(&self, to: u32, hlc: u64) {
        let mut sending = self.sending.lock();
        sending.outgoing(Destination::Node(to)).want_mark(hlc);
        self.mark_promised.store(true, Ordering::Release);
        drop(sending);
        self.work.notify_one();
    }

    /// Everything that is to be sent, and how much of what was added is carried then. In the end nothing
    /// is held back.
    fn seal(&self, is_ending: bool) -> (Vec<(Destination, Bytes)>, u64) {
        // Before anything is taken out: all that had to be said of what is durable is there.
        let stamp = self.clock.stamp();
        let now = Instant::now();
        let mut sending = self.sending.lock();
        let credit = if is_ending {
            usize::MAX
        } else {
            sending.room().credit
        };
        let Sending {
            all,
            direct,
            unordered,
            unordered_bytes,
            next_beat,
            beat,
            added,
        } = &mut *sending;
        *unordered_bytes = 0;
        let mut frames: Vec<_> = unordered
            .drain(..)
            .map(|(node, frame)| (Destination::Node(node), frame))
            .collect();
        let mut carried = *added;
        for (node, outgoing) in direct.iter_mut() {
            if outgoing.take_up(credit, &self.counters) {
                tracing::warn!(
                    event = "node_behind",
                    node,
                    "messages that wait in no inbox are dropped until it has caught up"
                );
            }
            if let Some(awaited) = outgoing.first_awaited() {
                carried = carried.min(awaited - 1);
            }
            let sealed = outgoing.seal(self.node, stamp).into_iter();
            frames.extend(sealed.map(|frame| (Destination::Node(*node), frame)));
        }
        let mark_promised = direct.values().any(Outgoing::wants_mark);
        self.mark_promised.store(mark_promised, Ordering::Release);
        if *next_beat <= now {
            *next_beat = now + BEAT_INTERVAL;
            let sent = direct
                .iter()
                .map(|(node, outgoing)| (*node, outgoing.last()))
                .collect();
            let received = self.handed_on.lock();
            let received = received.iter().map(|(node, last)| (*node, *last)).collect();
            let signal = Signal::Beat { sent, received };
            all.add(STREAM_BYTES_MAX, |frame| signal.put(frame));
            *beat = Some((all.last(), now));
        }
        let sealed = all.seal(self.node, stamp).into_iter();
        frames.extend(sealed.map(|frame| (Destination::All, frame)));
        (frames, carried)
    }
}

impl Sending {
    fn outgoing(&mut self, to: Destination) -> &mut Outgoing {
        match to {
            Destination::All => &mut self.all,
            Destination::Node(node) => self.direct.entry(node).or_insert_with(new_direct),
        }
    }

    fn room(&self) -> Room {
        let nodes = self.direct.len();
        Room {
            bytes_max: STREAM_BYTES_MAX.min(BYTES_MAX / (nodes + 1)),
            credit: outgoing::credit(nodes),
        }
    }

    /// Returns whether there was room.
    fn add_unordered(&mut self, to: u32, frame: Bytes) -> bool {
        if self.unordered_bytes > STREAM_BYTES_MAX {
            return false;
        }
        self.unordered_bytes += frame.len();
        self.unordered.push((to, frame));
        true
    }
}

fn new_direct() -> Outgoing {
    Outgoing::new(Stream::Direct)
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links")
            .field("node", &self.node)
            .field("bus", &self.bus)
            .finish_non_exhaustive()
    }
}
