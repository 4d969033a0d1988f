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

use std::sync::Arc;

use bytes::{BufMut, Bytes};
use xxhash_rust::xxh3::xxh3_64;

use crate::metrics::Traffic;
use crate::mqtt::{Message, PacketId, QoS, ReasonCode, SubscriptionFilter};
use crate::store::mongodb::{op_value, read_op};
use crate::store::{Chunk, Entry, LogEntry, LogPosition, MessageId, SessionId};

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

impl Malformed {
    /// Who sent it, if it says so.
    pub(crate) fn from(self) -> Option<u32> {
        match self {
            Self::Damaged => None,
            Self::Version { from, .. } | Self::Contents { from } => Some(from),
        }
    }
}

/// The beginning of a frame; [`Item::put`] and [`Signal::put`] add to it.
pub(crate) fn begin() -> Vec<u8> {
    begin_with_room(HEADER_BYTES)
}

/// The same, of a frame that may become `bytes` long without being moved.
pub(crate) fn begin_with_room(bytes: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes);
    frame.resize(HEADER_BYTES, 0);
    frame
}

/// Ends a frame.
pub(crate) fn seal(mut frame: Vec<u8>, header: Header) -> Bytes {
    let mut to = &mut frame[CHECKSUM_BYTES..HEADER_BYTES];
    to.put_u8(VERSION);
    to.put_u8(
        flag(FLAG_TO_ALL, header.stream == Stream::All)
            | flag(FLAG_STORE_OK, header.stamp.store_ok),
    );
    to.put_u32(header.from);
    to.put_u64(header.sequence);
    to.put_u64(header.stamp.hlc);
    to.put_u64(header.stamp.durable_hlc);
    let checksum = xxh3_64(&frame[CHECKSUM_BYTES..]);
    frame[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_be_bytes());
    frame.into()
}

impl Frame {
    /// Copies what it holds, so that nothing keeps `bytes` alive.
    ///
    /// # Errors
    /// [`Malformed`] if it was not made by [`seal`] of this version.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let checksum = reader.u64().ok_or(Malformed::Damaged)?;
        if checksum != xxh3_64(reader.0) {
            return Err(Malformed::Damaged);
        }
        let (version, flags, from) = reader.beginning().ok_or(Malformed::Damaged)?;
        if version != VERSION {
            return Err(Malformed::Version { from, version });
        }
        let (header, contents) =
            Self::read_rest(&mut reader, flags, from).ok_or(Malformed::Contents { from })?;
        Ok(Self {
            header,
            contents,
            bytes: bytes.len(),
        })
    }

    fn read_rest(reader: &mut Reader<'_>, flags: u8, from: u32) -> Option<(Header, Vec<Content>)> {
        let header = Header {
            from,
            stream: Stream::from_bit(flags & FLAG_TO_ALL != 0),
            sequence: reader.u64()?,
            stamp: Stamp {
                hlc: reader.u64()?,
                durable_hlc: reader.u64()?,
                store_ok: flags & FLAG_STORE_OK != 0,
            },
        };
        let mut contents = Vec::with_capacity(Reader(reader.0).count());
        let mut last_publisher = Arc::default();
        while !reader.0.is_empty() {
            contents.extend(Reader(reader.bytes()?).content(&mut last_publisher)?);
        }
        Some((header, contents))
    }
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

    pub(crate) fn put(&self, to: &mut Vec<u8>) {
        put_sized(to, |to| self.put_fields(to));
    }

    fn put_fields(&self, to: &mut Vec<u8>) {
        match self {
            Self::Deliver { session, chunk } => {
                to.put_u8(DELIVER);
                to.put_slice(&session.0);
                put_chunk(to, chunk);
            }
            Self::Stored { session, key } => {
                to.put_u8(STORED);
                to.put_slice(&session.0);
                put_message_id(to, *key);
            }
            Self::Pass {
                session,
                qos,
                retain,
                subscription_identifiers,
                message,
            } => {
                to.put_u8(PASS);
                to.put_slice(&session.0);
                let identifiers = subscription_identifiers.as_deref();
                put_delivery(to, *qos, *retain, identifiers, message);
            }
            Self::Publish { message, publisher } => {
                to.put_u8(PUBLISH);
                put_bytes(to, publisher.as_bytes());
                put_bytes(to, message.as_bytes());
            }
            Self::Own {
                client_id,
                session,
                epoch,
            } => {
                to.put_u8(OWN);
                put_bytes(to, client_id.as_bytes());
                to.put_u64(*epoch);
                to.put_u8(session.is_some().into());
                if let Some(session) = session {
                    to.put_slice(&session.0);
                }
            }
            Self::OwnAck { client_id, epoch } => {
                to.put_u8(OWN_ACK);
                put_bytes(to, client_id.as_bytes());
                to.put_u64(*epoch);
            }
            Self::Taken {
                client_id,
                epoch,
                in_flight,
                will_discarded,
            } => {
                to.put_u8(TAKEN);
                put_bytes(to, client_id.as_bytes());
                to.put_u64(*epoch);
                put_length(to, in_flight.len());
                for (packet_id, message) in in_flight {
                    to.put_u16(packet_id.get());
                    put_message_id(to, *message);
                }
                to.put_u8(u8::from(*will_discarded));
            }
            Self::Disown { session, epoch } => {
                to.put_u8(DISOWN);
                to.put_slice(&session.0);
                to.put_u64(*epoch);
            }
            Self::Route { reset, add, remove } => {
                to.put_u8(ROUTE);
                to.put_u8(u8::from(*reset));
                for filters in [add, remove] {
                    put_length(to, filters.len());
                    for filter in filters {
                        put_bytes(to, filter.to_string().as_bytes());
                    }
                }
            }
            Self::Kick { client_id, reason } => {
                to.put_u8(KICK);
                put_bytes(to, client_id.as_bytes());
                to.put_u8(*reason as u8);
            }
            Self::Figures { name, figures } => {
                to.put_u8(FIGURES);
                put_bytes(to, name.as_bytes());
                put_length(to, figures.len());
                figures.iter().for_each(|figure| to.put_u64(*figure));
            }
            Self::Log(LogEntry { position, ops }) => {
                to.put_u8(LOG);
                to.put_u32(position.node);
                to.put_u64(position.entry);
                put_length(to, ops.len());
                ops.iter().for_each(|op| put_bytes(to, &op_value(op)));
            }
            Self::Ask { number } => {
                to.put_u8(ASK);
                to.put_u64(*number);
            }
            Self::Answer { number } => {
                to.put_u8(ANSWER);
                to.put_u64(*number);
            }
            Self::Offer { session, chunk } => {
                to.put_u8(OFFER);
                to.put_slice(&session.0);
                put_chunk(to, chunk);
            }
            Self::Decline { session, key } => {
                to.put_u8(DECLINE);
                to.put_slice(&session.0);
                put_message_id(to, *key);
            }
            Self::Acknowledge { session, key, ids } => {
                to.put_u8(ACKNOWLEDGE);
                to.put_slice(&session.0);
                put_message_id(to, *key);
                put_message_ids(to, ids);
            }
            Self::Ring { session } => {
                to.put_u8(RING);
                to.put_slice(&session.0);
            }
            Self::Decide { written } => {
                to.put_u8(DECIDE);
                put_length(to, written.len());
                for (session, key) in written {
                    to.put_slice(&session.0);
                    put_message_id(to, *key);
                }
            }
            Self::Dispatch {
                group,
                session,
                epoch,
            } => {
                to.put_u8(DISPATCH);
                put_bytes(to, group.to_string().as_bytes());
                to.put_slice(&session.0);
                to.put_u64(*epoch);
            }
            Self::Seats {
                session,
                epoch,
                seats,
            } => {
                to.put_u8(SEATS);
                to.put_slice(&session.0);
                to.put_u64(*epoch);
                put_length(to, seats.len());
                seats.iter().for_each(|seat| put_seat(to, seat));
            }
            Self::Seat {
                session,
                epoch,
                seat,
            } => {
                to.put_u8(SEAT);
                to.put_slice(&session.0);
                to.put_u64(*epoch);
                put_seat(to, seat);
            }
            Self::Unseat {
                session,
                number,
                begun,
                finished,
                has_left,
            } => {
                to.put_u8(UNSEAT);
                to.put_slice(&session.0);
                to.put_u64(*number);
                put_message_ids(to, begun);
                put_message_ids(to, finished);
                to.put_u8(u8::from(*has_left));
            }
            Self::Give {
                session,
                epoch,
                seat,
                entry,
            } => {
                to.put_u8(GIVE);
                to.put_slice(&session.0);
                to.put_u64(*epoch);
                to.put_u64(*seat);
                put_entry(to, entry);
            }
            Self::Settled { session, seat, ids } => {
                to.put_u8(SETTLED);
                to.put_slice(&session.0);
                to.put_u64(*seat);
                put_message_ids(to, ids);
            }
        }
    }
}

impl Signal {
    pub(crate) fn put(&self, to: &mut Vec<u8>) {
        put_sized(to, |to| self.put_fields(to));
    }

    fn put_fields(&self, to: &mut Vec<u8>) {
        match self {
            Self::WantMark { hlc } => {
                to.put_u8(WANT_MARK);
                to.put_u64(*hlc);
            }
            Self::Beat { sent, received } => {
                to.put_u8(BEAT);
                for numbers in [sent, received] {
                    put_length(to, numbers.len());
                    for (node, sequence) in numbers {
                        to.put_u32(*node);
                        to.put_u64(*sequence);
                    }
                }
            }
            Self::Nack {
                stream,
                first,
                last,
            } => put_range(to, NACK, *stream, *first, *last),
            Self::Gone {
                stream,
                first,
                last,
            } => put_range(to, GONE, *stream, *first, *last),
            Self::Received { last } => {
                to.put_u8(RECEIVED);
                to.put_u64(*last);
            }
        }
    }
}

fn put_range(to: &mut Vec<u8>, kind: u8, stream: Stream, first: u64, last: u64) {
    to.put_u8(kind);
    to.put_u8(flag(FLAG_TO_ALL, stream == Stream::All));
    to.put_u64(first);
    to.put_u64(last);
}

fn put_chunk(to: &mut Vec<u8>, chunk: &Chunk) {
    put_message_id(to, chunk.key);
    put_length(to, chunk.entries.len());
    chunk.entries.iter().for_each(|entry| put_entry(to, entry));
}

fn put_entry(to: &mut Vec<u8>, entry: &Entry) {
    put_message_id(to, entry.id);
    let identifiers = entry.subscription_identifiers.as_deref();
    put_delivery(to, entry.qos, entry.retain, identifiers, &entry.message);
}

/// `number u64`, client id, `since u64`, `window u16`, `flags u8` (bits 0 and 1 the QoS, bit 2
/// Retain As Published, bit 3: an identifier follows), identifier `u32`, three lists of message ids.
fn put_seat(to: &mut Vec<u8>, seat: &Seat) {
    to.put_u64(seat.number);
    put_bytes(to, seat.client_id.as_bytes());
    to.put_u64(seat.since);
    to.put_u16(seat.window);
    to.put_u8(
        seat.maximum_qos as u8
            | flag(DELIVERY_RETAIN, seat.retain_as_published)
            | flag(DELIVERY_IDENTIFIERS, seat.identifier.is_some()),
    );
    if let Some(identifier) = seat.identifier {
        to.put_u32(identifier);
    }
    for ids in [&seat.begun, &seat.held, &seat.settled] {
        put_message_ids(to, ids);
    }
}

fn put_message_ids(to: &mut Vec<u8>, ids: &[MessageId]) {
    put_length(to, ids.len());
    ids.iter().for_each(|id| put_message_id(to, *id));
}

/// `flags u8` (bits 0 and 1 the QoS, bit 2 RETAIN, bit 3: identifiers follow), a list of `u32`,
/// message.
fn put_delivery(
    to: &mut Vec<u8>,
    qos: QoS,
    retain: bool,
    identifiers: Option<&[u32]>,
    message: &Message,
) {
    to.put_u8(
        qos as u8
            | flag(DELIVERY_RETAIN, retain)
            | flag(DELIVERY_IDENTIFIERS, identifiers.is_some()),
    );
    if let Some(identifiers) = identifiers {
        put_length(to, identifiers.len());
        identifiers
            .iter()
            .for_each(|&identifier| to.put_u32(identifier));
    }
    put_bytes(to, message.as_bytes());
}

fn put_message_id(to: &mut Vec<u8>, id: MessageId) {
    to.put_u64(id.hlc);
    to.put_u32(id.node);
    to.put_u16(id.index);
}

/// As `bytes`, whatever `put` adds.
fn put_sized(to: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    let at = to.len();
    put_length(to, 0);
    let begin = to.len();
    put(to);
    let length = to.len() - begin;
    to[at..begin].copy_from_slice(&length_bytes(length));
}

fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    put_length(to, bytes.len());
    to.put_slice(bytes);
}

fn put_length(to: &mut Vec<u8>, length: usize) {
    to.put_slice(&length_bytes(length));
}

fn length_bytes(length: usize) -> [u8; 4] {
    let length = u32::try_from(length).expect("no packet has 4 GiB");
    length.to_be_bytes()
}

fn flag(bit: u8, set: bool) -> u8 {
    if set { bit } else { 0 }
}

/// Takes a frame apart; `None` is what makes no sense.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    /// How many `bytes` there are.
    fn count(mut self) -> usize {
        let mut count = 0;
        while self.bytes().is_some() {
            count += 1;
        }
        count
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// Most often the same as `last`.
    fn shared_text(&mut self, last: &mut Arc<str>) -> Option<Arc<str>> {
        let text = self.text()?;
        if **last != *text {
            *last = text.into();
        }
        Some(last.clone())
    }

    /// Asks for no memory before the members are seen to be there.
    fn list<T>(&mut self, mut member: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()?;
        let mut members = Vec::new();
        for _ in 0..count {
            members.push(member(self)?);
        }
        Some(members)
    }

    /// Version, flags and sender.
    fn beginning(&mut self) -> Option<(u8, u8, u32)> {
        Some((self.u8()?, self.u8()?, self.u32()?))
    }

    fn session(&mut self) -> Option<SessionId> {
        self.array().map(SessionId)
    }

    fn message_id(&mut self) -> Option<MessageId> {
        Some(MessageId {
            hlc: self.u64()?,
            node: self.u32()?,
            index: self.u16()?,
        })
    }

    fn message(&mut self) -> Option<Message> {
        Message::from_bytes(self.bytes()?).ok()
    }

    fn filter(&mut self) -> Option<SubscriptionFilter> {
        SubscriptionFilter::parse(self.text()?).ok()
    }

    fn identifiers(&mut self, flags: u8) -> Option<Option<Arc<[u32]>>> {
        if flags & DELIVERY_IDENTIFIERS == 0 {
            return Some(None);
        }
        Some(Some(self.list(Self::u32)?.into()))
    }

    fn entry(&mut self) -> Option<Entry> {
        let id = self.message_id()?;
        let flags = self.u8()?;
        Some(Entry {
            id,
            qos: QoS::from_bits(flags & DELIVERY_QOS)?,
            retain: flags & DELIVERY_RETAIN != 0,
            subscription_identifiers: self.identifiers(flags)?,
            message: self.message()?,
        })
    }

    fn chunk(&mut self) -> Option<Chunk> {
        let key = self.message_id()?;
        let entries = self.list(Self::entry)?;
        (!entries.is_empty()).then_some(Chunk { key, entries })
    }

    fn seat(&mut self) -> Option<Seat> {
        let (number, client_id) = (self.u64()?, self.text()?.into());
        let (since, window) = (self.u64()?, self.u16()?);
        let flags = self.u8()?;
        Some(Seat {
            number,
            client_id,
            since,
            window,
            maximum_qos: QoS::from_bits(flags & DELIVERY_QOS)?,
            retain_as_published: flags & DELIVERY_RETAIN != 0,
            identifier: match flags & DELIVERY_IDENTIFIERS {
                0 => None,
                _ => Some(self.u32()?),
            },
            begun: self.list(Self::message_id)?,
            held: self.list(Self::message_id)?,
            settled: self.list(Self::message_id)?,
        })
    }

    fn numbers(&mut self) -> Option<Vec<(u32, u64)>> {
        self.list(|reader| Some((reader.u32()?, reader.u64()?)))
    }

    fn range(&mut self) -> Option<(Stream, u64, u64)> {
        let stream = Stream::from_bit(self.u8()? & FLAG_TO_ALL != 0);
        Some((stream, self.u64()?, self.u64()?))
    }

    /// Nothing in it if it is of a later version.
    fn content(&mut self, last_publisher: &mut Arc<str>) -> Option<Option<Content>> {
        let item = match self.u8()? {
            DELIVER => Item::Deliver {
                session: self.session()?,
                chunk: self.chunk()?,
            },
            STORED => Item::Stored {
                session: self.session()?,
                key: self.message_id()?,
            },
            PASS => {
                let session = self.session()?;
                let flags = self.u8()?;
                Item::Pass {
                    session,
                    qos: QoS::from_bits(flags & DELIVERY_QOS)?,
                    retain: flags & DELIVERY_RETAIN != 0,
                    subscription_identifiers: self.identifiers(flags)?,
                    message: self.message()?,
                }
            }
            PUBLISH => Item::Publish {
                publisher: self.shared_text(last_publisher)?,
                message: self.message()?,
            },
            OWN => Item::Own {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
                session: match self.u8()? {
                    0 => None,
                    _ => Some(self.session()?),
                },
            },
            OWN_ACK => Item::OwnAck {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
            },
            TAKEN => Item::Taken {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
                in_flight: self
                    .list(|reader| Some((PacketId::new(reader.u16()?)?, reader.message_id()?)))?,
                will_discarded: self.u8()? != 0,
            },
            DISOWN => Item::Disown {
                session: self.session()?,
                epoch: self.u64()?,
            },
            ROUTE => Item::Route {
                reset: self.u8()? != 0,
                add: self.list(Self::filter)?,
                remove: self.list(Self::filter)?,
            },
            KICK => Item::Kick {
                client_id: self.text()?.into(),
                reason: ReasonCode::from_byte(self.u8()?)?,
            },
            FIGURES => Item::Figures {
                name: self.text()?.into(),
                figures: self.list(Self::u64)?,
            },
            LOG => Item::Log(LogEntry {
                position: LogPosition {
                    node: self.u32()?,
                    entry: self.u64()?,
                },
                // Of another version there may be none, or some that this one does not know.
                ops: self
                    .list(|reader| read_op(reader.bytes()?).ok())
                    .unwrap_or_default(),
            }),
            ASK => Item::Ask {
                number: self.u64()?,
            },
            ANSWER => Item::Answer {
                number: self.u64()?,
            },
            OFFER => Item::Offer {
                session: self.session()?,
                chunk: self.chunk()?,
            },
            DECLINE => Item::Decline {
                session: self.session()?,
                key: self.message_id()?,
            },
            ACKNOWLEDGE => Item::Acknowledge {
                session: self.session()?,
                key: self.message_id()?,
                ids: self.list(Self::message_id)?,
            },
            DECIDE => Item::Decide {
                written: self.list(|reader| Some((reader.session()?, reader.message_id()?)))?,
            },
            DISPATCH => Item::Dispatch {
                group: self.filter()?,
                session: self.session()?,
                epoch: self.u64()?,
            },
            SEATS => Item::Seats {
                session: self.session()?,
                epoch: self.u64()?,
                seats: self.list(Self::seat)?,
            },
            SEAT => Item::Seat {
                session: self.session()?,
                epoch: self.u64()?,
                seat: self.seat()?,
            },
            UNSEAT => Item::Unseat {
                session: self.session()?,
                number: self.u64()?,
                begun: self.list(Self::message_id)?,
                finished: self.list(Self::message_id)?,
                has_left: self.u8()? != 0,
            },
            GIVE => Item::Give {
                session: self.session()?,
                epoch: self.u64()?,
                seat: self.u64()?,
                entry: self.entry()?,
            },
            SETTLED => Item::Settled {
                session: self.session()?,
                seat: self.u64()?,
                ids: self.list(Self::message_id)?,
            },
            RING => Item::Ring {
                session: self.session()?,
            },
            kind => return self.signal(kind),
        };
        Some(Some(Content::Item(item)))
    }

    fn signal(&mut self, kind: u8) -> Option<Option<Content>> {
        let signal = match kind {
            WANT_MARK => Signal::WantMark { hlc: self.u64()? },
            BEAT => Signal::Beat {
                sent: self.numbers()?,
                received: match self.0 {
                    // It was sent by a version that says nothing of it.
                    [] => Vec::new(),
                    _ => self.numbers()?,
                },
            },
            NACK => {
                let (stream, first, last) = self.range()?;
                Signal::Nack {
                    stream,
                    first,
                    last,
                }
            }
            GONE => {
                let (stream, first, last) = self.range()?;
                Signal::Gone {
                    stream,
                    first,
                    last,
                }
            }
            RECEIVED => Signal::Received { last: self.u64()? },
            _ => return Some(None),
        };
        Some(Some(Content::Signal(signal)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::mqtt::message::MessageParts;
    use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
    use crate::store::{LogAction, LogOp, Owner};

    fn qos() -> impl Strategy<Value = QoS> {
        prop_oneof![
            Just(QoS::AtMostOnce),
            Just(QoS::AtLeastOnce),
            Just(QoS::ExactlyOnce)
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        (
            "[a-z/]{0,9}",
            qos(),
            any::<bool>(),
            any::<Option<u64>>(),
            vec(any::<u8>(), 0..40),
        )
            .prop_map(|(topic, qos, retain, expires_at, payload)| {
                Message::new(MessageParts {
                    topic: &topic,
                    qos,
                    retain,
                    expires_at,
                    properties: &[],
                    payload: &payload,
                })
            })
    }

    fn message_id() -> impl Strategy<Value = MessageId> {
        any::<(u64, u32, u16)>().prop_map(|(hlc, node, index)| MessageId { hlc, node, index })
    }

    fn session() -> impl Strategy<Value = SessionId> {
        any::<[u8; 12]>().prop_map(SessionId)
    }

    fn identifiers() -> impl Strategy<Value = Option<Arc<[u32]>>> {
        any::<Option<Vec<u32>>>().prop_map(|identifiers| identifiers.map(Arc::from))
    }

    fn entry() -> impl Strategy<Value = Entry> {
        (message_id(), qos(), any::<bool>(), identifiers(), message()).prop_map(
            |(id, qos, retain, subscription_identifiers, message)| Entry {
                id,
                qos,
                retain,
                subscription_identifiers,
                message,
            },
        )
    }

    fn client_id() -> impl Strategy<Value = Arc<str>> {
        "\\PC{0,12}".prop_map(Arc::from)
    }

    fn filters() -> impl Strategy<Value = Vec<SubscriptionFilter>> {
        let filter =
            "([$]share/g/)?[a-z+]/#".prop_map(|filter| SubscriptionFilter::parse(&filter).unwrap());
        vec(filter, 0..4)
    }

    fn log_op() -> impl Strategy<Value = LogOp> {
        let filter = || filters().prop_filter_map("one", |mut filters| filters.pop());
        let options = (qos(), any::<bool>(), any::<bool>());
        let options =
            options.prop_map(
                |(maximum_qos, no_local, retain_as_published)| SubscribeOptions {
                    maximum_qos,
                    no_local,
                    retain_as_published,
                    retain_handling: RetainHandling::SendIfNew,
                },
            );
        let subscribe = (client_id(), filter(), options, any::<Option<u32>>());
        let action = prop_oneof![
            subscribe.prop_map(|(client_id, filter, options, identifier)| {
                LogAction::Subscribe {
                    owner: Owner::Client(client_id),
                    filter,
                    options,
                    identifier,
                }
            }),
            filter().prop_map(LogAction::Unsubscribe),
            filter().prop_map(LogAction::OpenGroup),
            Just(LogAction::End),
        ];
        (session(), any::<u64>(), action).prop_map(|(session, epoch, action)| LogOp {
            session,
            epoch,
            action,
        })
    }

    fn message_ids() -> impl Strategy<Value = Vec<MessageId>> {
        vec(message_id(), 0..4)
    }

    fn seat() -> impl Strategy<Value = Seat> {
        let who = (any::<u64>(), client_id(), any::<u64>(), any::<u16>());
        let terms = (qos(), any::<bool>(), any::<Option<u32>>());
        let messages = (message_ids(), message_ids(), message_ids());
        (who, terms, messages).prop_map(|(who, terms, (begun, held, settled))| {
            let (number, client_id, since, window) = who;
            let (maximum_qos, retain_as_published, identifier) = terms;
            Seat {
                number,
                client_id,
                since,
                window,
                maximum_qos,
                retain_as_published,
                identifier,
                begun,
                held,
                settled,
            }
        })
    }

    fn of_share_group() -> impl Strategy<Value = Item> {
        let group = "[$]share/g/[a-z+]/#";
        prop_oneof![
            (group, session(), any::<u64>()).prop_map(|(group, session, epoch)| Item::Dispatch {
                group: SubscriptionFilter::parse(&group).unwrap(),
                session,
                epoch,
            }),
            (session(), any::<u64>(), vec(seat(), 0..3)).prop_map(|(session, epoch, seats)| {
                Item::Seats {
                    session,
                    epoch,
                    seats,
                }
            }),
            (session(), any::<u64>(), seat()).prop_map(|(session, epoch, seat)| Item::Seat {
                session,
                epoch,
                seat
            }),
            (
                session(),
                any::<u64>(),
                message_ids(),
                message_ids(),
                any::<bool>()
            )
                .prop_map(|(session, number, begun, finished, has_left)| {
                    Item::Unseat {
                        session,
                        number,
                        begun,
                        finished,
                        has_left,
                    }
                }),
            (session(), any::<u64>(), any::<u64>(), entry()).prop_map(
                |(session, epoch, seat, entry)| Item::Give {
                    session,
                    epoch,
                    seat,
                    entry,
                }
            ),
            (session(), any::<u64>(), message_ids())
                .prop_map(|(session, seat, ids)| Item::Settled { session, seat, ids }),
        ]
    }

    fn item() -> impl Strategy<Value = Item> {
        prop_oneof![
            of_share_group(),
            (session(), message_id(), vec(entry(), 1..4)).prop_map(|(session, key, entries)| {
                Item::Deliver {
                    session,
                    chunk: Chunk { key, entries },
                }
            }),
            (session(), message_id()).prop_map(|(session, key)| Item::Stored { session, key }),
            (session(), qos(), any::<bool>(), identifiers(), message()).prop_map(
                |(session, qos, retain, subscription_identifiers, message)| Item::Pass {
                    session,
                    qos,
                    retain,
                    subscription_identifiers,
                    message,
                }
            ),
            (message(), client_id())
                .prop_map(|(message, publisher)| Item::Publish { message, publisher }),
            (client_id(), proptest::option::of(session()), any::<u64>()).prop_map(
                |(client_id, session, epoch)| Item::Own {
                    client_id,
                    session,
                    epoch,
                }
            ),
            (client_id(), any::<u64>())
                .prop_map(|(client_id, epoch)| Item::OwnAck { client_id, epoch }),
            (
                client_id(),
                any::<u64>(),
                vec(
                    (
                        (1..=u16::MAX).prop_map(|id| PacketId::new(id).unwrap()),
                        message_id()
                    ),
                    0..4
                ),
                any::<bool>()
            )
                .prop_map(|(client_id, epoch, in_flight, will_discarded)| {
                    Item::Taken {
                        client_id,
                        epoch,
                        in_flight,
                        will_discarded,
                    }
                }),
            (session(), any::<u64>()).prop_map(|(session, epoch)| Item::Disown { session, epoch }),
            (any::<bool>(), filters(), filters()).prop_map(|(reset, add, remove)| Item::Route {
                reset,
                add,
                remove
            }),
            (any::<u32>(), any::<u64>(), vec(log_op(), 0..3)).prop_map(|(node, entry, ops)| {
                Item::Log(LogEntry {
                    position: LogPosition { node, entry },
                    ops,
                })
            }),
            client_id().prop_map(|client_id| Item::Kick {
                client_id,
                reason: ReasonCode::ServerMoved,
            }),
            (".{0,9}", vec(any::<u64>(), 0..4)).prop_map(|(name, figures)| Item::Figures {
                name: name.into(),
                figures,
            }),
            any::<u64>().prop_map(|number| Item::Ask { number }),
            any::<u64>().prop_map(|number| Item::Answer { number }),
            (session(), message_id(), vec(entry(), 1..4)).prop_map(|(session, key, entries)| {
                Item::Offer {
                    session,
                    chunk: Chunk { key, entries },
                }
            }),
            (session(), message_id()).prop_map(|(session, key)| Item::Decline { session, key }),
            (session(), message_id(), vec(message_id(), 0..4))
                .prop_map(|(session, key, ids)| Item::Acknowledge { session, key, ids }),
            vec((session(), message_id()), 0..4).prop_map(|written| Item::Decide { written }),
            session().prop_map(|session| Item::Ring { session }),
        ]
    }

    fn stream() -> impl Strategy<Value = Stream> {
        any::<bool>().prop_map(Stream::from_bit)
    }

    fn numbers() -> impl Strategy<Value = Vec<(u32, u64)>> {
        vec(any::<(u32, u64)>(), 0..4)
    }

    fn signal() -> impl Strategy<Value = Signal> {
        let range = || (stream(), any::<u64>(), any::<u64>());
        prop_oneof![
            any::<u64>().prop_map(|hlc| Signal::WantMark { hlc }),
            (numbers(), numbers()).prop_map(|(sent, received)| Signal::Beat { sent, received }),
            any::<u64>().prop_map(|last| Signal::Received { last }),
            range().prop_map(|(stream, first, last)| Signal::Nack {
                stream,
                first,
                last
            }),
            range().prop_map(|(stream, first, last)| Signal::Gone {
                stream,
                first,
                last
            }),
        ]
    }

    fn content() -> impl Strategy<Value = Content> {
        prop_oneof![
            item().prop_map(Content::Item),
            signal().prop_map(Content::Signal)
        ]
    }

    fn header() -> impl Strategy<Value = Header> {
        (
            any::<u32>(),
            stream(),
            any::<u64>(),
            any::<(u64, u64, bool)>(),
        )
            .prop_map(
                |(from, stream, sequence, (hlc, durable_hlc, store_ok))| Header {
                    from,
                    stream,
                    sequence,
                    stamp: Stamp {
                        hlc,
                        durable_hlc,
                        store_ok,
                    },
                },
            )
    }

    fn frame_of(header: Header, contents: &[Content]) -> Bytes {
        let mut frame = begin();
        for content in contents {
            match content {
                Content::Item(item) => item.put(&mut frame),
                Content::Signal(signal) => signal.put(&mut frame),
            }
        }
        seal(frame, header)
    }

    /// With a checksum that fits, as damage on the way would never have.
    fn checked(mut bytes: Vec<u8>) -> Vec<u8> {
        if bytes.len() > CHECKSUM_BYTES {
            let checksum = xxh3_64(&bytes[CHECKSUM_BYTES..]);
            bytes[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let header = Header {
            from: 7,
            stream: Stream::Direct,
            sequence: 1,
            stamp: Stamp::default(),
        };
        let mut bytes = seal(begin(), header).to_vec();
        bytes[CHECKSUM_BYTES] = 9;

        let malformed = Frame::read(&checked(bytes)).unwrap_err();
        assert_eq!(
            malformed,
            Malformed::Version {
                from: 7,
                version: 9
            }
        );
    }

    #[test]
    fn what_a_later_version_adds_is_skipped() {
        let header = Header {
            from: 7,
            stream: Stream::Direct,
            sequence: 1,
            stamp: Stamp::default(),
        };
        let mut frame = begin();
        put_sized(&mut frame, |to| to.put_slice(&[u8::MAX, 1, 2, 3]));
        put_sized(&mut frame, |to| {
            Item::Ask { number: 5 }.put_fields(to);
            to.put_u64(6);
        });
        Signal::WantMark { hlc: 9 }.put(&mut frame);

        let contents = Frame::read(&seal(frame, header)).unwrap().contents;
        let expected = [
            Content::Item(Item::Ask { number: 5 }),
            Content::Signal(Signal::WantMark { hlc: 9 }),
        ];
        assert_eq!(contents, expected);
    }

    #[test]
    fn beat_of_an_earlier_version_says_nothing_of_what_was_received() {
        let header = Header {
            from: 7,
            stream: Stream::All,
            sequence: 1,
            stamp: Stamp::default(),
        };
        let mut frame = begin();
        put_sized(&mut frame, |to| {
            to.put_u8(BEAT);
            put_length(to, 1);
            to.put_u32(8);
            to.put_u64(9);
        });

        let contents = Frame::read(&seal(frame, header)).unwrap().contents;
        let beat = Signal::Beat {
            sent: vec![(8, 9)],
            received: Vec::new(),
        };
        assert_eq!(contents, [Content::Signal(beat)]);
    }

    proptest! {
        #[test]
        fn frame_reads_back(header in header(), contents in vec(content(), 0..6)) {
            let bytes = frame_of(header, &contents);

            let frame = Frame::read(&bytes).unwrap();
            prop_assert_eq!(frame, Frame { header, contents, bytes: bytes.len() });
        }

        #[test]
        fn damaged_frame_is_refused(
            contents in vec(content(), 0..4),
            header in header(),
            at in any::<proptest::sample::Index>(),
            flipped in 1..=u8::MAX,
        ) {
            let mut bytes = frame_of(header, &contents).to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flipped;

            prop_assert_eq!(Frame::read(&bytes), Err(Malformed::Damaged));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in vec(any::<u8>(), 0..200)) {
            let _ = Frame::read(&bytes);
            let _ = Frame::read(&checked(bytes));
        }

        #[test]
        fn nonsense_with_a_right_checksum_is_read_without_panic(
            contents in vec(content(), 1..4),
            header in header(),
            at in any::<proptest::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = frame_of(header, &contents).to_vec();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Frame::read(&checked(bytes.clone()));
            bytes.truncate(cut.index(bytes.len()));
            let _ = Frame::read(&checked(bytes));
        }
    }
}
