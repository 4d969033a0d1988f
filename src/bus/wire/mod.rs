//! Frames, byte by byte: version 2.
//!
//! Integers are big-endian; `text` and `bytes` are a `u32` length and that many bytes; a list is
//! a `u32` count and its members. A message is the `bytes` of [`Message::as_bytes`].
//!
//! A frame is a header, then items and signals one after the other, each as `bytes` that begin with
//! a `u8` that says what it is. What a node does not know it skips, and what follows the fields that
//! it knows: nodes of a version and of the next one understand each other, as long as the older
//! ones can do without what is new.
//!
//! | at | header |
//! |---|---|
//! | 0 | `checksum u64`: XXH3 of all that follows |
//! | 8 | `version u8` |
//! | 9 | `flags u8`: bit 0 the stream to all nodes, bit 1 the sender reaches its store |
//! | 10 | `from u32` |
//! | 14 | `sequence u64` |
//! | 22 | `hlc u64` |
//! | 30 | `durable_hlc u64` |

mod decode;
mod encode;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::metrics::Traffic;
use crate::mqtt::{Message, PacketId, QoS, ReasonCode, SubscriptionFilter};
use crate::store::{Chunk, Entry, LogEntry, MessageId, SessionId};

pub(crate) use encode::{begin, begin_with_room, seal};

/// Raised when an older midge could no longer read what this one sends.
const VERSION: u8 = 2;

/// Bytes at the beginning of a frame that [`seal`] fills in.
pub(crate) const HEADER_BYTES: usize = 38;
const CHECKSUM_BYTES: usize = 8;

const FLAG_TO_ALL: u8 = 0b01;
const FLAG_STORE_OK: u8 = 0b10;

const DELIVER: u8 = 1;
const PASS: u8 = 2;
const PUBLISH: u8 = 3;
const OWN: u8 = 4;
const OWN_ACK: u8 = 5;
const TAKEN: u8 = 6;
const DISOWN: u8 = 7;
const ROUTE: u8 = 8;
const LOG: u8 = 9;
const ASK: u8 = 10;
const ANSWER: u8 = 11;
const OFFER: u8 = 12;
const DECLINE: u8 = 13;
const ACKNOWLEDGE: u8 = 14;
const DECIDE: u8 = 15;
const DISPATCH: u8 = 16;
const SEATS: u8 = 17;
const SEAT: u8 = 18;
const UNSEAT: u8 = 19;
const GIVE: u8 = 20;
const SETTLED: u8 = 21;
const FIGURES: u8 = 22;
const KICK: u8 = 23;
const STORED: u8 = 24;
const RING: u8 = 64;
const WANT_MARK: u8 = 128;
const BEAT: u8 = 129;
const NACK: u8 = 130;
const GONE: u8 = 131;
const RECEIVED: u8 = 132;

const DELIVERY_QOS: u8 = 0b0011;
const DELIVERY_RETAIN: u8 = 0b0100;
const DELIVERY_IDENTIFIERS: u8 = 0b1000;

/// A frame that has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) contents: Vec<Content>,
    /// The length of what it was read from.
    pub(crate) bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) from: u32,
    pub(crate) stream: Stream,
    /// Counts the frames of a stream from 1; 0 stands outside of it, in no order.
    pub(crate) sequence: u64,
    pub(crate) stamp: Stamp,
}

/// The frames from one node that have an order of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stream {
    /// To one other node.
    Direct,
    All,
}

/// How far a node was when it sent a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Its clock.
    pub(crate) hlc: u64,
    /// It will write no message of this clock value or a smaller one any more.
    pub(crate) durable_hlc: u64,
    /// It reaches its store.
    pub(crate) store_ok: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Item(Item),
    Signal(Signal),
}

/// What one node tells another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    /// Messages that were added to the inbox of a session that the receiver owns.
    Deliver { session: SessionId, chunk: Chunk },
    /// The same, without the messages: the receiver is behind, and reads them from the store.
    Stored { session: SessionId, key: MessageId },
    /// A message that waits in no inbox, for a session that the receiver owns.
    Pass {
        session: SessionId,
        qos: QoS,
        retain: bool,
        subscription_identifiers: Option<Arc<[u32]>>,
        message: Message,
    },
    /// A message for whatever sessions of the receiver have no inbox.
    Publish {
        message: Message,
        /// The client that published it, for No Local.
        publisher: Arc<str>,
    },
    /// The client is at the sending node now. If its session outlives the connection, the sender
    /// empties its inbox.
    Own {
        client_id: Arc<str>,
        session: Option<SessionId>,
        epoch: u64,
    },
    /// What was on its way to a previous owner of the session is durable.
    OwnAck { client_id: Arc<str>, epoch: u64 },
    /// The previous owner let go of a session; what its client had not acknowledged.
    Taken {
        client_id: Arc<str>,
        epoch: u64,
        in_flight: Vec<(PacketId, MessageId)>,
        /// The client has said goodbye: what the store has as the Will of its last connection is not
        /// to be published.
        will_discarded: bool,
    },
    /// The client of a session is gone.
    Disown { session: SessionId, epoch: u64 },
    /// What the sessions without an inbox on the sending node want: a change, or everything.
    Route {
        reset: bool,
        add: Vec<SubscriptionFilter>,
        remove: Vec<SubscriptionFilter>,
    },
    /// Ends the connection of a client, if it is at the receiver.
    Kick {
        client_id: Arc<str>,
        reason: ReasonCode,
    },
    /// What a node has counted, for `$SYS`.
    Figures { name: Arc<str>, figures: Vec<u64> },
    /// A node's subscription log has come so far. Without `ops`, the entry has to be read from the
    /// store.
    Log(LogEntry),
    /// Asks every node to say when it knows all of [`Item::Route`] and [`Item::Log`] that was sent
    /// before.
    Ask { number: u64 },
    /// It does.
    Answer { number: u64 },
    /// Messages for a session that the receiver owns. The sender waits a moment before it writes
    /// them: what the client has acknowledged until then it does not write.
    Offer { session: SessionId, chunk: Chunk },
    /// The client will not get them before they are written.
    Decline { session: SessionId, key: MessageId },
    /// The client has taken over these messages of a chunk that was offered.
    Acknowledge {
        session: SessionId,
        key: MessageId,
        ids: Vec<MessageId>,
    },
    /// Of all chunks that were offered before, these were written, at least in part.
    Decide {
        written: Vec<(SessionId, MessageId)>,
    },
    /// There may be messages in the inbox of a session that the receiver owns, and that it was not
    /// told of by whoever wrote them.
    Ring { session: SessionId },
    /// The sender gives the messages of a share group to its members from now on, and asks which
    /// of them are connected to the receiver.
    Dispatch {
        group: SubscriptionFilter,
        session: SessionId,
        epoch: u64,
    },
    /// These are, and no others. What the sender had written for the group before is durable.
    Seats {
        session: SessionId,
        epoch: u64,
        seats: Vec<Seat>,
    },
    /// One more is connected to the sender, or what it wants has changed.
    Seat {
        session: SessionId,
        epoch: u64,
        seat: Seat,
    },
    /// One is not any more.
    Unseat {
        session: SessionId,
        number: u64,
        /// Exchanges of QoS 2 that are to be finished when it comes back.
        begun: Vec<MessageId>,
        /// Messages that it has received for certain, although it does not come back.
        finished: Vec<MessageId>,
        /// It is no member any more.
        has_left: bool,
    },
    /// A message for a member at the receiver.
    Give {
        session: SessionId,
        epoch: u64,
        seat: u64,
        entry: Entry,
    },
    /// The member has taken over these; with the seat 0, one has received them whose session has
    /// ended.
    Settled {
        session: SessionId,
        seat: u64,
        ids: Vec<MessageId>,
    },
}

/// A connected member of a share group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    /// The sender never uses it for another one.
    pub(crate) number: u64,
    pub(crate) client_id: Arc<str>,
    /// The epoch of its session: of two seats of one client the one with the greater epoch counts.
    pub(crate) since: u64,
    /// Messages of QoS 1 and 2 that it may have at a time.
    pub(crate) window: u16,
    pub(crate) maximum_qos: QoS,
    pub(crate) retain_as_published: bool,
    pub(crate) identifier: Option<u32>,
    /// Exchanges of QoS 2 that an earlier connection began and this one has to finish.
    pub(crate) begun: Vec<MessageId>,
    /// Messages that it was given and has not taken over.
    pub(crate) held: Vec<MessageId>,
    /// The last ones that it has.
    pub(crate) settled: Vec<MessageId>,
}

/// What links tell each other, for themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Asks for a frame once the receiver is durable up to this clock value.
    WantMark { hlc: u64 },
    Beat {
        /// The last frame sent to each node that was sent any.
        sent: Vec<(u32, u64)>,
        /// The last frame from each node that was handed on, and all before it; 0 if none was.
        received: Vec<(u32, u64)>,
    },
    /// Asks for frames again, both ends included.
    Nack {
        stream: Stream,
        first: u64,
        last: u64,
    },
    /// Frames that can no longer be had, both ends included.
    Gone {
        stream: Stream,
        first: u64,
        last: u64,
    },
    /// The same as in a beat, to a node that may wait for it.
    Received { last: u64 },
}

/// Bytes that are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("its bytes are damaged")]
    Damaged,
    #[error("it is of version {version}")]
    Version { from: u32, version: u8 },
    #[error("its contents make no sense")]
    Contents { from: u32 },
}

impl Stream {
    fn from_bit(all: bool) -> Self {
        if all { Self::All } else { Self::Direct }
    }
}

impl Item {
    /// For the counters.
    pub(crate) fn traffic(&self) -> Traffic {
        match self {
            Self::Pass { .. } | Self::Publish { .. } => Traffic::Publish,
            Self::Deliver { .. }
            | Self::Stored { .. }
            | Self::Offer { .. }
            | Self::Give { .. }
            | Self::Ring { .. } => Traffic::Deliver,
            Self::Decline { .. } | Self::Acknowledge { .. } | Self::Decide { .. } => {
                Traffic::Elision
            }
            Self::Own { .. }
            | Self::OwnAck { .. }
            | Self::Taken { .. }
            | Self::Disown { .. }
            | Self::Kick { .. } => Traffic::Session,
            Self::Dispatch { .. }
            | Self::Seats { .. }
            | Self::Seat { .. }
            | Self::Unseat { .. }
            | Self::Settled { .. } => Traffic::ShareGroup,
            Self::Figures { .. } => Traffic::Figures,
            Self::Route { .. } | Self::Log(_) | Self::Ask { .. } | Self::Answer { .. } => {
                Traffic::Subscription
            }
        }
    }
}

impl Malformed {
    /// Who sent it, if it says so.
    pub(crate) fn from(self) -> Option<u32> {
        match self {
            Self::Damaged => None,
            Self::Version { from, .. } | Self::Contents { from } => Some(from),
        }
    }
}
