//! From items and signals to frames.

use bytes::{BufMut, Bytes};
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::store::log_op_value;

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

impl Item {
    pub(crate) fn put(&self, to: &mut Vec<u8>) {
        put_sized(to, |to| self.put_fields(to));
    }

    pub(super) fn put_fields(&self, to: &mut Vec<u8>) {
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
                ops.iter().for_each(|op| put_bytes(to, &log_op_value(op)));
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

    pub(super) fn put_fields(&self, to: &mut Vec<u8>) {
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
pub(super) fn put_sized(to: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
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

pub(super) fn put_length(to: &mut Vec<u8>, length: usize) {
    to.put_slice(&length_bytes(length));
}

fn length_bytes(length: usize) -> [u8; 4] {
    let length = u32::try_from(length).expect("no packet has 4 GiB");
    length.to_be_bytes()
}

fn flag(bit: u8, set: bool) -> u8 {
    if set { bit } else { 0 }
}
