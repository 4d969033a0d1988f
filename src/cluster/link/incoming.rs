//! The receiving end of a stream: frames in order, each once, and which are missing. Pure.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::time::Instant;

use crate::bus::wire::Frame;

/// Bytes of frames that wait for one before them; with more, that one is given up.
const HELD_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long to wait for frames that were asked for.
pub(super) const NACK_INTERVAL: Duration = Duration::from_millis(500);

/// How often to ask without getting any before they are given up.
pub(super) const NACKS_MAX: u32 = 4;

#[derive(Debug)]
pub(super) struct Incoming {
    /// The frame that is next; unknown until the first one has come.
    next: Option<u64>,
    /// Frames that came before their time.
    held: BTreeMap<u64, Frame>,
    held_bytes: usize,
    /// The last frame that is known to have been sent.
    last: u64,
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    range: RangeInclusive<u64>,
    times: u32,
    again_at: Instant,
}

/// What to do about frames that are missing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Repair {
    Nothing,
    /// Ask for these.
    Ask(RangeInclusive<u64>),
    /// They will not come any more.
    GiveUp(RangeInclusive<u64>),
}

impl Incoming {
    /// A stream that is heard from its beginning.
    pub(super) fn from_beginning() -> Self {
        Self::beginning_with(Some(1))
    }

    /// A stream that begins, for this node, with the first frame that it hears.
    pub(super) fn from_now() -> Self {
        Self::beginning_with(None)
    }

    fn beginning_with(next: Option<u64>) -> Self {
        Self {
            next,
            held: BTreeMap::new(),
            held_bytes: 0,
            last: 0,
            asked: None,
        }
    }

    /// Returns whether it is the first time that this frame came.
    pub(super) fn accept(&mut self, frame: Frame) -> bool {
        let sequence = frame.header.sequence;
        let next = *self.next.get_or_insert(sequence);
        if sequence < next || self.held.contains_key(&sequence) {
            return false;
        }
        self.know(sequence);
        self.held_bytes += frame.bytes;
        self.held.insert(sequence, frame);
        true
    }

    /// The next frame in order, if it has come.
    pub(super) fn pop(&mut self) -> Option<Frame> {
        let first = self.held.first_entry()?;
        if self.next != Some(*first.key()) {
            return None;
        }
        let frame = first.remove();
        self.held_bytes -= frame.bytes;
        self.next = Some(frame.header.sequence.saturating_add(1));
        Some(frame)
    }

    /// Says that a frame was sent, whether it comes or not.
    pub(super) fn know(&mut self, sequence: u64) {
        self.last = self.last.max(sequence);
    }

    /// The last frame that was taken out, or will not come; 0 if none was.
    pub(super) fn done(&self) -> u64 {
        self.next.map_or(0, |next| next - 1)
    }

    /// Whether every frame up to this one was taken out.
    pub(super) fn is_complete(&self, sequence: u64) -> bool {
        self.next.is_some_and(|next| next > sequence)
    }

    /// The first frames that are missing.
    fn gap(&self) -> Option<RangeInclusive<u64>> {
        let next = self.next?;
        let before = match self.held.first_key_value() {
            Some((first, _)) => *first,
            None => self.last.saturating_add(1),
        };
        (next < before).then(|| next..=before - 1)
    }

    pub(super) fn has_gap(&self) -> bool {
        self.gap().is_some()
    }

    pub(super) fn repair(&mut self, now: Instant) -> Repair {
        let Some(gap) = self.gap() else {
            self.asked = None;
            return Repair::Nothing;
        };
        if self.held_bytes > HELD_BYTES_MAX {
            return Repair::GiveUp(gap);
        }
        let times = match &self.asked {
            Some(asked) if asked.range.contains(gap.start()) => {
                let comes = gap.start() > asked.range.start();
                if comes {
                    self.asked = Some(Asked {
                        range: *gap.start()..=*asked.range.end(),
                        times: 1,
                        again_at: now + NACK_INTERVAL,
                    });
                    return Repair::Nothing;
                }
                if now < asked.again_at {
                    return Repair::Nothing;
                }
                asked.times
            }
            _ => 0,
        };
        if times == NACKS_MAX {
            return Repair::GiveUp(gap);
        }
        self.asked = Some(Asked {
            range: gap.clone(),
            times: times + 1,
            again_at: now + NACK_INTERVAL,
        });
        Repair::Ask(gap)
    }

    /// Goes on behind these frames, if they are missing and next. Returns whether they were.
    pub(super) fn skip(&mut self, gone: &RangeInclusive<u64>) -> bool {
        let Some(gap) = self.gap() else {
            return false;
        };
        if !gone.contains(gap.start()) {
            return false;
        }
        self.next = Some((*gone.end().min(gap.end())).saturating_add(1));
        self.asked = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::wire::{Header, Stamp, Stream};

    fn frame(sequence: u64) -> Frame {
        Frame {
            header: Header {
                from: 2,
                stream: Stream::Direct,
                sequence,
                stamp: Stamp::default(),
            },
            contents: Vec::new(),
            bytes: 100,
        }
    }

    fn popped(incoming: &mut Incoming) -> Vec<u64> {
        std::iter::from_fn(|| incoming.pop())
            .map(|frame| frame.header.sequence)
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn frames_come_out_in_order_and_once() {
        let mut incoming = Incoming::from_beginning();
        for (sequence, is_new) in [(2, true), (1, true), (2, false), (1, false), (4, true)] {
            assert_eq!(incoming.accept(frame(sequence)), is_new, "{sequence}");
        }

        assert_eq!(popped(&mut incoming), [1, 2]);
        assert!(!incoming.accept(frame(2)));
        assert_eq!(incoming.repair(Instant::now()), Repair::Ask(3..=3));
        assert!(incoming.accept(frame(3)));
        assert_eq!(popped(&mut incoming), [3, 4]);
        assert_eq!(incoming.repair(Instant::now()), Repair::Nothing);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_joined_begins_with_its_first_frame() {
        let mut incoming = Incoming::from_now();
        incoming.accept(frame(7));
        assert_eq!(popped(&mut incoming), [7]);
        assert_eq!(incoming.repair(Instant::now()), Repair::Nothing);

        let mut incoming = Incoming::from_beginning();
        incoming.accept(frame(7));
        assert_eq!(incoming.repair(Instant::now()), Repair::Ask(1..=6));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_frame_is_missed_as_well() {
        let mut incoming = Incoming::from_beginning();
        incoming.accept(frame(1));
        incoming.pop();
        assert!(incoming.is_complete(1));

        incoming.know(3);
        assert!(!incoming.is_complete(3));
        assert_eq!(incoming.repair(Instant::now()), Repair::Ask(2..=3));
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_slowly_is_not_asked_for_again() {
        let mut incoming = Incoming::from_beginning();
        incoming.accept(frame(20));
        assert_eq!(incoming.repair(Instant::now()), Repair::Ask(1..=19));

        for sequence in 1..=19 {
            tokio::time::advance(NACK_INTERVAL * 3 / 4).await;
            incoming.accept(frame(sequence));
            incoming.pop();
            assert_eq!(incoming.repair(Instant::now()), Repair::Nothing);
        }
        assert_eq!(popped(&mut incoming), [20]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_come_is_given_up() {
        let mut incoming = Incoming::from_beginning();
        incoming.accept(frame(3));
        for _ in 0..NACKS_MAX {
            assert_eq!(incoming.repair(Instant::now()), Repair::Ask(1..=2));
            assert_eq!(incoming.repair(Instant::now()), Repair::Nothing);
            tokio::time::advance(NACK_INTERVAL).await;
        }
        assert_eq!(incoming.repair(Instant::now()), Repair::GiveUp(1..=2));

        assert!(incoming.skip(&(1..=2)));
        assert_eq!(popped(&mut incoming), [3]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_missing_is_skipped() {
        let mut incoming = Incoming::from_beginning();
        incoming.accept(frame(5));
        assert!(!incoming.skip(&(3..=4)), "1 is missing before it");
        assert!(incoming.skip(&(1..=2)));
        assert_eq!(incoming.repair(Instant::now()), Repair::Ask(3..=4));
        assert!(incoming.skip(&(3..=9)));
        assert_eq!(popped(&mut incoming), [5]);
        assert!(!incoming.skip(&(6..=9)), "nothing is missing");
    }

    #[tokio::test(start_paused = true)]
    async fn too_much_that_waits_gives_up_what_it_waits_for() {
        let mut incoming = Incoming::from_beginning();
        incoming.accept(Frame {
            bytes: HELD_BYTES_MAX + 1,
            ..frame(2)
        });
        assert_eq!(incoming.repair(Instant::now()), Repair::GiveUp(1..=1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_number_of_all_does_not_overflow() {
        let mut incoming = Incoming::from_now();
        incoming.accept(frame(u64::MAX));
        assert_eq!(popped(&mut incoming), [u64::MAX]);
        incoming.know(u64::MAX);
        assert_eq!(incoming.repair(Instant::now()), Repair::Nothing);
    }
}
