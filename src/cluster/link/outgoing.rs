//! The sending end of a stream: frames that are gathered, and frames that may be asked for again.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use bytes::Bytes;

use crate::bus::FRAME_BYTES_MAX;
use crate::bus::wire::{self, HEADER_BYTES, Header, Stamp, Stream};

/// Bytes from which a frame is full.
///
/// Beyond this, frames cost more cache misses than they save calls.
const FRAME_BYTES: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Outgoing {
    stream: Stream,
    /// The last number given to a frame.
    last: u64,
    /// Frames that were not sent yet; the last one may take more.
    waiting: VecDeque<(u64, Vec<u8>)>,
    /// Frames that were.
    sent: VecDeque<(u64, Bytes)>,
    /// The length of all frames, waiting and sent.
    bytes: usize,
    /// The stamp of the last frame sent.
    durable_hlc: u64,
    /// The other end wants a frame once this is durable.
    wanted_mark: Option<u64>,
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
            sent: VecDeque::new(),
            bytes: 0,
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
                wire::begin()
            }
        };
        let before = frame.len();
        put(&mut frame);
        self.bytes += frame.len() - before;
        if before > HEADER_BYTES && frame.len() > FRAME_BYTES {
            let next = [&wire::begin(), &frame[before..]].concat();
            frame.truncate(before);
            self.waiting.push_back((self.last, frame));
            self.last += 1;
            self.bytes += HEADER_BYTES;
            frame = next;
        }
        let fits = frame.len() <= FRAME_BYTES_MAX;
        if fits {
            self.waiting.push_back((self.last, frame));
        } else {
            self.bytes -= frame.len();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::wire::Frame;

    const NO_LIMIT: usize = usize::MAX;

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
}
