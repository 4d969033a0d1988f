//! The task that takes frames from the bus: puts them in order, asks for those that are missing,
//! and hands on what they hold.

use bytes::Bytes;
use hashbrown::{HashMap, HashSet};
use tokio::sync::mpsc;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::incoming::{Incoming, NACK_INTERVAL, Repair};
use super::{Handler, Links, outgoing};
use crate::bus::INTERRUPTION;
use crate::bus::wire::{Content, Frame, Header, Signal, Stream};
use crate::metrics::Arrival;

/// The part of a node's credit after which it is told that it has it back. So it never waits for the
/// next beat.
const CREDIT_PART: usize = 8;

pub(super) struct Receiver<'a> {
    links: &'a Links,
    handler: &'a mut dyn Handler,
    peers: HashMap<u32, Peer>,
    /// Who sent what cannot be read, and has been complained of. `None` is nobody knows who.
    malformed: HashSet<Option<u32>>,
}

/// The streams from one node.
struct Peer {
    direct: Incoming,
    all: Incoming,
    /// Bytes of frames to this node that were handed on since the node was told so.
    untold: usize,
    /// How far `direct` was when the last beat was sent.
    direct_at_beat: u64,
}

impl Peer {
    fn stream(&mut self, stream: Stream) -> &mut Incoming {
        match stream {
            Stream::Direct => &mut self.direct,
            Stream::All => &mut self.all,
        }
    }
}

impl<'a> Receiver<'a> {
    pub(super) fn new(links: &'a Links, handler: &'a mut dyn Handler) -> Self {
        Self {
            links,
            handler,
            peers: HashMap::new(),
            malformed: HashSet::new(),
        }
    }

    /// Runs until it is stopped or the bus ends.
    pub(super) async fn run(
        &mut self,
        mut frames: mpsc::Receiver<Bytes>,
        stop: &CancellationToken,
    ) {
        let mut repairs = time::interval(NACK_INTERVAL / 4);
        repairs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                frame = frames.recv() => match frame {
                    Some(frame) if frame == INTERRUPTION => self.handler.interrupted(),
                    Some(frame) => {
                        self.receive(&frame);
                        // Whoever was woken by what it holds, before there is more.
                        tokio::task::yield_now().await;
                    }
                    None => return,
                },
                _ = repairs.tick() => self.repair_all(),
                () = self.links.membership_changed.notified() => self.forget_gone(),
                () = stop.cancelled() => return,
            }
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let frame = match Frame::read(bytes) {
            Ok(frame) => frame,
            Err(problem) => {
                self.links.counters.malformed.inc();
                if self.malformed.insert(problem.from()) {
                    tracing::warn!(
                        event = "frame_malformed",
                        from = problem.from(),
                        reason = %problem,
                        "counted from now on"
                    );
                }
                return;
            }
        };
        let Header {
            from,
            stream,
            sequence,
            ..
        } = frame.header;
        if from == self.links.node {
            return self.links.hear_echo(&frame.header);
        }
        if self.links.is_gone(from) {
            return;
        }
        self.links.counters.frames_received.inc();
        self.links.clock.observe(&frame.header);
        if sequence == 0 {
            for content in &frame.contents {
                if let Content::Signal(signal) = content {
                    self.receive_unordered(from, signal);
                }
            }
        } else if !self.peer(from).stream(stream).accept(frame) {
            self.links.counters.duplicates.inc();
        }
        self.advance(from);
    }

    fn peer(&mut self, from: u32) -> &mut Peer {
        let node = self.links.node;
        self.peers.entry(from).or_insert_with(|| Peer {
            direct: Incoming::from_beginning(),
            // Numbers of nodes only rise, so one with a greater number began to speak when this
            // node already listened.
            all: if from > node {
                Incoming::from_beginning()
            } else {
                Incoming::from_now()
            },
            untold: 0,
            direct_at_beat: 0,
        })
    }

    /// Hands on everything that is next in order.
    fn advance(&mut self, from: u32) {
        // What went to all may tell of frames missing among those to this node.
        for stream in [Stream::All, Stream::Direct] {
            loop {
                while let Some(frame) = self.peer(from).stream(stream).pop() {
                    if stream == Stream::Direct {
                        self.peer(from).untold += frame.bytes;
                    }
                    self.perform(frame);
                }
                match self.peer(from).stream(stream).repair(Instant::now()) {
                    Repair::Nothing => break,
                    Repair::Ask(range) => {
                        self.links.counters.gaps.inc();
                        let (first, last) = range.into_inner();
                        self.links.signal(
                            from,
                            &Signal::Nack {
                                stream,
                                first,
                                last,
                            },
                        );
                    }
                    Repair::GiveUp(range) => {
                        self.peer(from).stream(stream).skip(&range);
                        self.lose(from);
                    }
                }
            }
        }
        self.tell_done(from);
    }

    /// Notes how far it is, for the next beat, or says so at once.
    fn tell_done(&mut self, from: u32) {
        let part = outgoing::credit(self.peers.len()) / CREDIT_PART;
        let peer = self.peer(from);
        let last = peer.direct.done();
        let is_due = peer.untold >= part;
        if is_due {
            peer.untold = 0;
        }
        self.links.handed_on.lock().insert(from, last);
        if is_due {
            self.links.signal(from, &Signal::Received { last });
        }
    }

    fn perform(&mut self, frame: Frame) {
        let Frame {
            header, contents, ..
        } = frame;
        let arrival = Arrival::from_peer();
        for content in contents {
            match content {
                Content::Item(item) => {
                    self.links.counters.received.of(item.traffic()).inc();
                    self.handler.receive(&header, arrival, item);
                }
                Content::Signal(Signal::Beat { sent, received }) => {
                    self.hear_beat(&header, &sent, &received);
                }
                Content::Signal(Signal::WantMark { hlc }) => {
                    self.links.promise_mark(header.from, hlc);
                }
                // These stand outside of streams.
                Content::Signal(
                    Signal::Nack { .. } | Signal::Gone { .. } | Signal::Received { .. },
                ) => {}
            }
        }
        if header.stream == Stream::Direct {
            self.links.marks.hear(header.from, header.stamp.durable_hlc);
        }
    }

    /// A beat goes to all; it counts as a mark for this node if nothing is missing of what was
    /// sent to it before. It may have come by another server, and overtaken that: only what is still
    /// missing at the next beat counts as lost.
    fn hear_beat(&mut self, header: &Header, sent: &[(u32, u64)], received: &[(u32, u64)]) {
        let node = self.links.node;
        let of_this_node = |numbers: &[(u32, u64)]| {
            let of_this_node = |(of, last): &(u32, u64)| (*of == node).then_some(*last);
            numbers.iter().find_map(of_this_node)
        };
        if let Some(last) = of_this_node(received) {
            self.links.confirm(header.from, last);
        }
        let last = of_this_node(sent).unwrap_or(0);
        let peer = self.peer(header.from);
        let before = std::mem::replace(&mut peer.direct_at_beat, last);
        peer.direct.know(before);
        if peer.direct.is_complete(last) {
            self.links.marks.hear(header.from, header.stamp.durable_hlc);
        }
    }

    fn receive_unordered(&mut self, from: u32, signal: &Signal) {
        match *signal {
            Signal::Nack {
                stream,
                first,
                last,
            } => self.links.send_again(from, stream, first..=last),
            Signal::Gone {
                stream,
                first,
                last,
            } => {
                if self.peer(from).stream(stream).skip(&(first..=last)) {
                    self.lose(from);
                }
            }
            Signal::Received { last } => self.links.confirm(from, last),
            Signal::WantMark { .. } | Signal::Beat { .. } => {}
        }
    }

    fn lose(&mut self, from: u32) {
        self.links.counters.lost.inc();
        tracing::warn!(
            event = "frames_lost",
            from,
            "everything is read from the store"
        );
        self.handler.lost(from);
    }

    fn repair_all(&mut self) {
        let incomplete: Vec<u32> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.has_gap())
            .map(|(node, _)| *node)
            .collect();
        incomplete.into_iter().for_each(|node| self.advance(node));
    }

    /// Nobody sends again what is missing from a node that is gone.
    fn forget_gone(&mut self) {
        let gone: Vec<(u32, Peer)> = self
            .peers
            .extract_if(|node, _| self.links.is_gone(*node))
            .collect();
        for (node, peer) in gone {
            self.links.handed_on.lock().remove(&node);
            if peer.has_gap() {
                self.lose(node);
            }
        }
    }
}

impl Peer {
    fn has_gap(&self) -> bool {
        self.direct.has_gap() || self.all.has_gap()
    }
}
