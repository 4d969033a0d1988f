//! The sending end of a stream: frames that are gathered, and frames that may be asked for again.
//!
//! The other end says how far it has handed them on. When its credit is on its way it is behind, and
//! is sent less. Of what is in an inbox it is told, and reads that there: this goes out at once, so
//! that nothing which the publisher sends afterwards, by whichever node, overtakes it. What is in no
//! inbox is held back outside of the stream, so that numbers, marks and beats know nothing of it. Its
//! publishers are not answered before it is sent, or after a while dropped for good; either way it
//! does not come too late.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Counters;
use crate::bus::FRAME_BYTES_MAX;
use crate::bus::wire::{self, HEADER_BYTES, Header, Item, Stamp, Stream};
use crate::metrics::Label;
use crate::mqtt::QoS;

/// Bytes from which a frame is full.
///
/// Beyond this, frames cost more cache misses than they save calls.
const FRAME_BYTES: usize = 64 * 1024;

/// Bytes that may be on their way to a node, from all others together.
///
/// So much waits in Redis for a node that stands still, which by default cuts off who has more than
/// this for a minute, or four times as much at all (`client-output-buffer-limit pubsub 32mb 8mb 60`).
const CREDIT_BYTES: usize = 8 * 1024 * 1024;

/// From each of them at least, or a cluster of very many nodes would be slow.
const CREDIT_BYTES_MIN: usize = 256 * 1024;

/// How long messages are held back before they are dropped.
///
/// Publishers wait for it, and for up to a beat more; it has to be over before they stop waiting for
/// frames to be carried, or an acknowledged message might be overtaken by the next one.
const HOLD_MAX: Duration = Duration::from_millis(500);

/// The bytes that may be on their way to one of so many other nodes.
pub(super) fn credit(nodes: usize) -> usize {
    (CREDIT_BYTES / nodes.max(1)).max(CREDIT_BYTES_MIN)
}

/// How much a stream may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Bytes of frames that are kept here.
    pub(super) bytes_max: usize,
    /// Bytes of those that the other end has not said to have handed on.
    pub(super) credit: usize,
}

impl Room {
    /// What is in no inbox leaves half of it to what is: to read that from the store costs more.
    fn credit_without_inbox(self) -> usize {
        self.credit / 2
    }
}

#[derive(Debug)]
pub(super) struct Outgoing {
    stream: Stream,
    /// The last number given to a frame.
    last: u64,
    /// Frames that were not sent yet; the last one may take more.
    waiting: VecDeque<(u64, Vec<u8>)>,
    /// The length of the last frame sent: the next one is likely to be as long.
    usual_bytes: usize,
    /// Frames that were.
    sent: VecDeque<(u64, Bytes)>,
    /// The length of all frames, waiting and sent.
    bytes: usize,
    standing: Standing,
    /// Messages that wait until the other end has caught up.
    held: VecDeque<Held>,
    held_bytes: usize,
    /// Who waits until nothing is held back.
    waiting_publishers: Vec<Waker>,
    /// One was left out: those that follow must not overtake it.
    leaves_out_offers: bool,
    /// The stamp of the last frame sent.
    durable_hlc: u64,
    /// The other end wants a frame once this is durable.
    wanted_mark: Option<u64>,
}

/// How the other end keeps up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It does not say how far it is, as midge did not before it could: it is sent everything.
    Unknown,
    KeepsUp,
    Behind,
    /// It has been for too long: no more messages are held back for it.
    GivenUp,
}

/// A frame that has no number yet.
#[derive(Debug)]
struct Held {
    frame: Vec<u8>,
    since: Instant,
    /// The first of its messages that a publisher waits for, by its place in all that was sent.
    first_awaited: Option<u64>,
    /// By their QoS.
    messages: [u64; QoS::ALL.len()],
}

/// What can be sent again of a range, and what cannot.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Again {
    pub(super) frames: Vec<Bytes>,
    pub(super) gone: Vec<RangeInclusive<u64>>,
}

impl Outgoing {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            last: 0,
            waiting: VecDeque::new(),
            usual_bytes: HEADER_BYTES,
            sent: VecDeque::new(),
            bytes: 0,
            standing: Standing::Unknown,
            held: VecDeque::new(),
            held_bytes: 0,
            waiting_publishers: Vec::new(),
            leaves_out_offers: false,
            durable_hlc: 0,
            wanted_mark: None,
        }
    }

    /// The number of the last frame, sent or not.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    pub(super) fn want_mark(&mut self, hlc: u64) {
        self.wanted_mark = self.wanted_mark.max(Some(hlc));
    }

    /// Whether one is still due.
    pub(super) fn wants_mark(&self) -> bool {
        self.wanted_mark.is_some()
    }

    /// Adds an item, the one with this number of all that are sent. When the other end is behind, it
    /// may be held back, left out, or something shorter added in its place. Returns false if something
    /// is lost that it might miss.
    pub(super) fn send(
        &mut self,
        item: &Item,
        number: u64,
        room: Room,
        counters: &Counters,
    ) -> bool {
        match item {
            Item::Publish { message, .. } if self.holds_back(room, counters) => {
                return self.hold(item, message.qos(), number, room, counters);
            }
            Item::Pass { qos, .. } if self.holds_back(room, counters) => {
                return self.hold(item, *qos, number, room, counters);
            }
            Item::Deliver { session, chunk } if self.is_behind(room.credit, counters) => {
                let (session, key) = (*session, chunk.key);
                let stored = Item::Stored { session, key };
                return self.add(room.bytes_max, |frame| stored.put(frame));
            }
            // Nobody acknowledges it then, and it is written. The next one to its session might be
            // delivered before it, so none follows until it has been handed on.
            Item::Offer { .. }
                if self.leaves_out_offers || self.is_behind(room.credit, counters) =>
            {
                self.leaves_out_offers = true;
                return true;
            }
            Item::Decide { .. } => self.leaves_out_offers = false,
            _ => {}
        }
        self.add(room.bytes_max, |frame| item.put(frame))
    }

    /// Whether so much is on its way.
    fn is_behind(&mut self, credit: usize, counters: &Counters) -> bool {
        let is_behind = self.standing != Standing::Unknown && self.bytes >= credit;
        if is_behind && self.standing == Standing::KeepsUp {
            self.standing = Standing::Behind;
            counters.stalls.inc();
        }
        is_behind
    }

    /// Whether what is in no inbox has to wait, also for its turn.
    fn holds_back(&mut self, room: Room, counters: &Counters) -> bool {
        !self.held.is_empty() || self.is_behind(room.credit_without_inbox(), counters)
    }

    fn hold(
        &mut self,
        item: &Item,
        qos: QoS,
        number: u64,
        room: Room,
        counters: &Counters,
    ) -> bool {
        let has_room = match qos {
            QoS::AtMostOnce => self.held_bytes < room.credit_without_inbox(),
            QoS::AtLeastOnce | QoS::ExactlyOnce => self.bytes + self.held_bytes < room.bytes_max,
        };
        if self.standing == Standing::GivenUp || !has_room {
            counters.dropped.of(qos).inc();
            return true;
        }
        let mut held = match self.held.pop_back() {
            Some(open) if open.frame.len() < FRAME_BYTES => open,
            full => {
                self.held.extend(full);
                self.held_bytes += HEADER_BYTES;
                Held::new()
            }
        };
        self.held_bytes -= held.frame.len();
        let overflow = write(&mut held.frame, |frame| item.put(frame));
        if let Some(frame) = overflow {
            self.held_bytes += held.frame.len();
            self.held.push_back(held);
            held = Held {
                frame,
                ..Held::new()
            };
        }
        if held.frame.len() > FRAME_BYTES_MAX {
            return false;
        }
        held.messages[qos.index()] += 1;
        if qos > QoS::AtMostOnce {
            held.first_awaited.get_or_insert(number);
        }
        self.held_bytes += held.frame.len();
        self.held.push_back(held);
        true
    }

    /// The other end has handed on everything up to this frame, and will not ask for it again: when it
    /// starts anew it is another node.
    pub(super) fn confirm(&mut self, last: u64) {
        if self.standing == Standing::Unknown {
            self.standing = Standing::KeepsUp;
        }
        while let Some((_, frame)) = self.sent.pop_front_if(|(sequence, _)| *sequence <= last) {
            self.bytes -= frame.len();
        }
    }

    /// What is held back has waited for the bus until now, not for the other end.
    pub(super) fn hold_anew(&mut self) {
        let now = Instant::now();
        self.held.iter_mut().for_each(|held| held.since = now);
    }

    /// The length of what the other end has not handed on.
    pub(super) fn pending_bytes(&self) -> usize {
        self.bytes + self.held_bytes
    }

    /// Whether something is to be sent now.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn has_held(&self) -> bool {
        !self.held.is_empty()
    }

    /// Has `waker` woken once nothing is held back any more; returns false if nothing is.
    pub(super) fn wait_for_space(&mut self, waker: &Waker) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let mut waiting = self.waiting_publishers.iter();
        if !waiting.any(|waiting| waiting.will_wake(waker)) {
            self.waiting_publishers.push(waker.clone());
        }
        true
    }

    /// The first message that is held back and that a publisher waits for.
    pub(super) fn first_awaited(&self) -> Option<u64> {
        self.held.iter().find_map(|held| held.first_awaited)
    }

    /// Has messages that were held back sent, as far as the other end has caught up; drops them if it
    /// takes too long. Returns whether it has just begun to do so.
    pub(super) fn take_up(&mut self, credit: usize, counters: &Counters) -> bool {
        if self.standing == Standing::Unknown {
            return false;
        }
        let room = Room {
            bytes_max: usize::MAX,
            credit,
        };
        while self.bytes < room.credit_without_inbox()
            && let Some(held) = self.held.pop_front()
        {
            self.held_bytes -= held.frame.len();
            self.bytes += held.frame.len();
            self.last += 1;
            self.waiting.push_back((self.last, held.frame));
        }
        let Some(first) = self.held.front() else {
            self.waiting_publishers.drain(..).for_each(Waker::wake);
            if self.bytes < room.credit_without_inbox() {
                self.standing = Standing::KeepsUp;
            }
            return false;
        };
        if first.since.elapsed() < HOLD_MAX {
            return false;
        }
        self.waiting_publishers.drain(..).for_each(Waker::wake);
        self.held_bytes = 0;
        for held in self.held.drain(..) {
            for (qos, count) in QoS::ALL.iter().zip(held.messages) {
                counters.dropped.of(*qos).add(count);
            }
        }
        self.standing = Standing::GivenUp;
        true
    }

    /// Adds what `put` writes. What no frame can carry leaves a gap instead, and so do the oldest
    /// frames once there are more than `bytes_max`: the other end notices. Returns whether nothing
    /// had to be left out.
    pub(super) fn add(&mut self, bytes_max: usize, put: impl FnOnce(&mut Vec<u8>)) -> bool {
        let mut frame = match self.waiting.pop_back() {
            Some((sequence, open)) if sequence == self.last && open.len() < FRAME_BYTES => open,
            full => {
                self.waiting.extend(full);
                self.last += 1;
                self.bytes += HEADER_BYTES;
                wire::begin_with_room(self.usual_bytes)
            }
        };
        self.bytes -= frame.len();
        if let Some(next) = write(&mut frame, put) {
            self.bytes += frame.len();
            self.waiting.push_back((self.last, frame));
            self.last += 1;
            frame = next;
        }
        let fits = frame.len() <= FRAME_BYTES_MAX;
        if fits {
            self.bytes += frame.len();
            self.waiting.push_back((self.last, frame));
        }
        self.shrink(bytes_max) && fits
    }

    /// Forgets frames until no more than `bytes_max` are held, but never the last one that waits.
    /// Returns whether all of them had been sent.
    fn shrink(&mut self, bytes_max: usize) -> bool {
        while self.bytes > bytes_max {
            if let Some((_, frame)) = self.sent.pop_front() {
                self.bytes -= frame.len();
            } else if self.waiting.len() > 1
                && let Some((_, frame)) = self.waiting.pop_front()
            {
                self.bytes -= frame.len();
                return false;
            } else {
                break;
            }
        }
        true
    }

    /// Ends all frames that wait. Only the last one says how far this node is: whoever got it, got
    /// all before it.
    pub(super) fn seal(&mut self, from: u32, stamp: Stamp) -> Vec<Bytes> {
        if self.wanted_mark.is_some_and(|hlc| hlc <= stamp.durable_hlc) {
            self.wanted_mark = None;
            if self.waiting.is_empty() {
                // An empty frame says it.
                self.last += 1;
                self.bytes += HEADER_BYTES;
                self.waiting.push_back((self.last, wire::begin()));
            }
        }
        let mut frames = Vec::with_capacity(self.waiting.len());
        while let Some((sequence, frame)) = self.waiting.pop_front() {
            if self.waiting.is_empty() {
                self.durable_hlc = stamp.durable_hlc;
            }
            let header = Header {
                from,
                stream: self.stream,
                sequence,
                stamp: Stamp {
                    durable_hlc: self.durable_hlc,
                    ..stamp
                },
            };
            self.usual_bytes = frame.len();
            let frame = wire::seal(frame, header);
            self.sent.push_back((sequence, frame.clone()));
            frames.push(frame);
        }
        frames
    }

    /// Frames that were asked for again.
    pub(super) fn again(&self, range: &RangeInclusive<u64>) -> Again {
        let mut again = Again::default();
        let mut next = *range.start();
        let begin = self.sent.partition_point(|(sequence, _)| *sequence < next);
        for (sequence, frame) in self.sent.range(begin..) {
            if sequence > range.end() {
                break;
            }
            if *sequence > next {
                again.gone.push(next..=sequence - 1);
            }
            again.frames.push(frame.clone());
            next = sequence + 1;
        }
        // Those that still wait come by themselves.
        let end = match self.waiting.front() {
            Some((waiting, _)) => (*range.end()).min(waiting.saturating_sub(1)),
            None => *range.end(),
        };
        if next <= end {
            again.gone.push(next..=end);
        }
        again
    }
}

impl Held {
    fn new() -> Self {
        Self {
            frame: wire::begin(),
            since: Instant::now(),
            first_awaited: None,
            messages: [0; QoS::ALL.len()],
        }
    }
}

/// Adds to a frame what `put` writes; returns the next one if that does not fit.
fn write(frame: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) -> Option<Vec<u8>> {
    let before = frame.len();
    put(frame);
    if before == HEADER_BYTES || frame.len() <= FRAME_BYTES {
        return None;
    }
    let mut next = wire::begin_with_room(FRAME_BYTES);
    next.extend_from_slice(&frame[before..]);
    frame.truncate(before);
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::wire::{Content, Frame};
    use crate::mqtt::Message;
    use crate::mqtt::message::MessageParts;
    use crate::store::{Chunk, Entry, MessageId, SessionId};

    const NO_LIMIT: usize = usize::MAX;

    const ROOM: Room = Room {
        bytes_max: 32 * FRAME_BYTES,
        credit: 16 * FRAME_BYTES,
    };

    fn stamp(durable_hlc: u64) -> Stamp {
        Stamp {
            hlc: durable_hlc + 5,
            durable_hlc,
            store_ok: true,
        }
    }

    fn add(outgoing: &mut Outgoing, bytes: usize, bytes_max: usize) -> bool {
        outgoing.add(bytes_max, |frame| frame.extend(vec![0; bytes]))
    }

    /// Number and durable mark of frames whose contents are no items.
    fn headers(frames: &[Bytes]) -> Vec<(u64, u64)> {
        let u64_at =
            |frame: &Bytes, at: usize| u64::from_be_bytes(frame[at..at + 8].try_into().unwrap());
        frames
            .iter()
            .map(|frame| (u64_at(frame, 14), u64_at(frame, 30)))
            .collect()
    }

    #[test]
    fn what_is_small_shares_a_frame() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        (0..100).for_each(|_| assert!(add(&mut outgoing, 100, NO_LIMIT)));

        assert_eq!(outgoing.seal(1, stamp(9)).len(), 1);
        assert_eq!(outgoing.seal(1, stamp(9)).len(), 0);
    }

    #[test]
    fn frames_stay_small_and_only_the_last_one_has_the_new_mark() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        add(&mut outgoing, 10, NO_LIMIT);
        outgoing.seal(1, stamp(3));
        (0..3).for_each(|_| assert!(add(&mut outgoing, FRAME_BYTES / 2, NO_LIMIT)));

        let frames = outgoing.seal(1, stamp(9));
        assert!(frames.iter().all(|frame| frame.len() <= FRAME_BYTES));
        assert_eq!(headers(&frames), [(2, 3), (3, 3), (4, 9)]);
    }

    #[test]
    fn what_no_frame_can_carry_leaves_a_gap() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        assert!(add(&mut outgoing, 10, NO_LIMIT));
        assert!(!add(&mut outgoing, FRAME_BYTES_MAX, NO_LIMIT));
        assert!(add(&mut outgoing, 10, NO_LIMIT));

        assert_eq!(headers(&outgoing.seal(1, stamp(9))), [(1, 0), (3, 9)]);
        assert_eq!(outgoing.again(&(2..=2)).gone, [2..=2]);
    }

    #[test]
    fn frames_are_sent_again_while_there_is_room_for_them() {
        let mut outgoing = Outgoing::new(Stream::All);
        let bytes_max = 4 * FRAME_BYTES;
        let mut frames = Vec::new();
        for _ in 0..8 {
            assert!(add(&mut outgoing, FRAME_BYTES, bytes_max), "all were sent");
            frames.extend(outgoing.seal(1, stamp(9)));
        }

        let again = outgoing.again(&(3..=8));
        assert_eq!(again.gone, [3..=5]);
        assert_eq!(again.frames, frames[5..]);
        assert_eq!(outgoing.again(&(1..=2)).gone, [1..=2]);
    }

    #[test]
    fn the_oldest_are_left_out_when_nothing_can_be_sent() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        let all_kept = (0..8).fold(true, |kept, _| {
            add(&mut outgoing, FRAME_BYTES, 4 * FRAME_BYTES) && kept
        });
        assert!(!all_kept);

        assert_eq!(outgoing.again(&(1..=8)).gone, [1..=5]);
        assert_eq!(
            headers(&outgoing.seal(1, stamp(9))),
            [(6, 0), (7, 0), (8, 9)]
        );
        assert_eq!(outgoing.again(&(1..=8)).frames.len(), 3);
    }

    #[test]
    fn a_wanted_mark_is_an_empty_frame_once_it_is_durable() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        outgoing.want_mark(7);

        assert_eq!(outgoing.seal(1, stamp(6)).len(), 0);
        let frames = outgoing.seal(1, stamp(7));
        assert_eq!(frames.len(), 1);
        assert_eq!(Frame::read(&frames[0]).unwrap().contents, []);
        assert_eq!(outgoing.seal(1, stamp(8)).len(), 0);
    }

    /// A message with this number, of half a frame.
    fn message(number: u64, qos: QoS) -> Message {
        let payload = vec![0; FRAME_BYTES / 2];
        Message::new(MessageParts {
            topic: &number.to_string(),
            qos,
            payload: &payload,
            ..MessageParts::default()
        })
    }

    fn publish(number: u64, qos: QoS) -> Item {
        Item::Publish {
            message: message(number, qos),
            publisher: "publisher".into(),
        }
    }

    const SESSION: SessionId = SessionId([7; 12]);

    fn key(number: u64) -> MessageId {
        MessageId {
            hlc: number,
            ..MessageId::MIN
        }
    }

    fn chunk(number: u64) -> Chunk {
        let entry = Entry {
            id: key(number),
            qos: QoS::AtLeastOnce,
            retain: false,
            subscription_identifiers: None,
            message: message(number, QoS::AtLeastOnce),
        };
        Chunk {
            key: key(number),
            entries: vec![entry],
        }
    }

    fn deliver(number: u64) -> Item {
        Item::Deliver {
            session: SESSION,
            chunk: chunk(number),
        }
    }

    fn offer(number: u64) -> Item {
        Item::Offer {
            session: SESSION,
            chunk: chunk(number),
        }
    }

    fn decide() -> Item {
        let written = Vec::new();
        Item::Decide { written }
    }

    /// A stream to a node that says how far it is.
    struct Limited {
        outgoing: Outgoing,
        counters: Counters,
        sent: u64,
    }

    impl Limited {
        fn new() -> Self {
            let mut outgoing = Outgoing::new(Stream::Direct);
            outgoing.confirm(0);
            Self {
                outgoing,
                counters: Counters::default(),
                sent: 0,
            }
        }

        fn send(&mut self, item: &Item) {
            self.sent += 1;
            let Self {
                outgoing, counters, ..
            } = self;
            assert!(outgoing.send(item, self.sent, ROOM, counters));
        }

        /// What goes out now.
        fn take(&mut self) -> Vec<Item> {
            self.outgoing.take_up(ROOM.credit, &self.counters);
            items(&self.outgoing.seal(1, stamp(9)))
        }

        /// The other end has handed on all that was sent.
        fn catch_up(&mut self) {
            self.outgoing.confirm(self.outgoing.last());
        }

        fn dropped(&self, qos: QoS) -> u64 {
            self.counters.dropped.of(qos).get()
        }
    }

    fn items(frames: &[Bytes]) -> Vec<Item> {
        let contents = frames
            .iter()
            .flat_map(|frame| Frame::read(frame).unwrap().contents);
        let item = |content| match content {
            Content::Item(item) => item,
            Content::Signal(signal) => panic!("{signal:?}"),
        };
        contents.map(item).collect()
    }

    fn publishes(numbers: std::ops::Range<u64>, qos: QoS) -> Vec<Item> {
        numbers.map(|number| publish(number, qos)).collect()
    }

    #[test]
    fn who_does_not_say_how_far_it_is_is_sent_everything() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        let counters = Counters::default();
        let many = publishes(0..50, QoS::AtMostOnce);
        for item in &many {
            assert!(outgoing.send(item, 1, ROOM, &counters));
        }

        outgoing.take_up(ROOM.credit, &counters);
        assert_eq!(items(&outgoing.seal(1, stamp(9))), many);
    }

    #[test]
    fn what_is_in_no_inbox_waits_for_credit_and_comes_in_its_order() {
        let mut link = Limited::new();
        let many = publishes(0..20, QoS::AtLeastOnce);
        many.iter().for_each(|item| link.send(item));

        let first = link.take();
        assert!(first.len() < many.len());
        assert_eq!(link.outgoing.first_awaited(), Some(first.len() as u64 + 1));
        assert_eq!(link.take(), [], "nothing was handed on");
        link.send(&publish(20, QoS::AtMostOnce));
        link.catch_up();
        let rest = link.take();
        assert_eq!(link.outgoing.first_awaited(), None);
        assert_eq!(
            [first, rest].concat(),
            [many, publishes(20..21, QoS::AtMostOnce)].concat()
        );
        assert_eq!(link.counters.stalls.get(), 1);
        assert_eq!(link.dropped(QoS::AtMostOnce), 0);
    }

    #[test]
    fn what_is_no_message_is_sent_without_credit() {
        let mut link = Limited::new();
        let many = publishes(0..20, QoS::AtLeastOnce);
        many.iter().for_each(|item| link.send(item));
        link.take();

        let answer = Item::Answer { number: 7 };
        link.send(&answer);
        assert_eq!(link.take(), [answer]);
        assert!(link.outgoing.has_held());
    }

    #[test]
    fn what_is_in_an_inbox_is_told_of_when_there_is_no_credit() {
        let mut link = Limited::new();
        for item in publishes(0..20, QoS::AtMostOnce) {
            link.send(&item);
        }
        link.take();
        link.send(&deliver(1));
        assert_eq!(link.take(), [deliver(1)], "half of the credit is left");

        (2..40).for_each(|number| link.send(&deliver(number)));
        let told = link.take();
        let is_told = |item: &Item| matches!(item, Item::Stored { .. });
        let first = told.iter().position(is_told).unwrap() as u64 + 2;
        let delivered = (2..first).map(deliver);
        let stored = (first..40).map(|number| Item::Stored {
            session: SESSION,
            key: key(number),
        });
        assert_eq!(told, delivered.chain(stored).collect::<Vec<_>>());
        link.catch_up();
        link.send(&deliver(40));
        assert!(link.take().contains(&deliver(40)));
    }

    #[test]
    fn no_offer_overtakes_one_that_was_left_out() {
        let mut link = Limited::new();
        (0..40).for_each(|number| link.send(&offer(number)));
        let offered = link.take();
        assert!(offered.len() < 40);

        link.catch_up();
        link.send(&offer(40));
        assert_eq!(link.take(), []);
        link.send(&decide());
        link.send(&offer(41));
        assert_eq!(link.take(), [decide(), offer(41)]);
    }

    #[test]
    fn what_is_beyond_all_bounds_is_dropped_and_counted() {
        let mut link = Limited::new();
        let few = publishes(0..100, QoS::AtMostOnce);
        few.iter().for_each(|item| link.send(item));
        let kept = 100 - link.dropped(QoS::AtMostOnce);
        assert!(kept < 40, "{kept}");
        for item in publishes(100..200, QoS::AtLeastOnce) {
            link.send(&item);
        }
        let kept_too = 100 - link.dropped(QoS::AtLeastOnce);
        assert!(kept_too > 0);
        assert!(link.outgoing.pending_bytes() < ROOM.bytes_max + 2 * FRAME_BYTES);

        let mut sent = link.take();
        while link.outgoing.has_held() {
            link.catch_up();
            sent.extend(link.take());
        }
        let expected = [
            publishes(0..kept, QoS::AtMostOnce),
            publishes(100..100 + kept_too, QoS::AtLeastOnce),
        ];
        assert_eq!(sent, expected.concat());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_held_back_for_long_or_again_before_the_other_end_has_caught_up() {
        let mut link = Limited::new();
        for item in publishes(0..20, QoS::AtLeastOnce) {
            link.send(&item);
        }
        let sent = link.take().len() as u64;
        assert_eq!(link.outgoing.first_awaited(), Some(sent + 1));

        tokio::time::advance(HOLD_MAX).await;
        assert!(link.outgoing.take_up(ROOM.credit, &link.counters));
        assert_eq!(link.outgoing.first_awaited(), None);
        assert_eq!(link.dropped(QoS::AtLeastOnce), 20 - sent);
        link.send(&publish(20, QoS::AtLeastOnce));
        assert_eq!(link.dropped(QoS::AtLeastOnce), 21 - sent);
        assert_eq!(link.take(), []);

        link.catch_up();
        link.send(&publish(21, QoS::AtLeastOnce));
        assert_eq!(link.take(), [publish(21, QoS::AtLeastOnce)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_waited_for_the_bus_is_still_sent() {
        let mut link = Limited::new();
        for item in publishes(0..20, QoS::AtLeastOnce) {
            link.send(&item);
        }
        let first = link.take().len();
        tokio::time::advance(HOLD_MAX).await;

        link.outgoing.hold_anew();
        assert_eq!(link.take(), []);
        link.catch_up();
        assert_eq!(link.take().len(), 20 - first);
    }

    #[test]
    fn what_was_handed_on_is_not_kept() {
        let mut outgoing = Outgoing::new(Stream::Direct);
        for _ in 0..4 {
            add(&mut outgoing, FRAME_BYTES, NO_LIMIT);
        }
        outgoing.seal(1, stamp(9));

        outgoing.confirm(3);
        assert_eq!(outgoing.again(&(1..=4)).gone, [1..=3]);
        assert_eq!(outgoing.again(&(1..=4)).frames.len(), 1);
        outgoing.confirm(4);
        assert_eq!(outgoing.pending_bytes(), 0);
    }
}
