//! What is stored, byte by byte, wherever it is stored.
//!
//! Integers are big-endian, so that keys sort as what they stand for. `text` and `bytes` are a
//! `u32` length and that many bytes; a message is the `bytes` of [`Message::as_bytes`]. An optional
//! part is there if its flag is set. What belongs to a session has a key that begins with its
//! [`SessionId`], so that one range holds it.
//!
//! None of this may change without a new number for the format of every adapter that uses it.

use std::sync::Arc;

use bytes::BufMut;

use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::mqtt::{Message, PacketId, ProtocolVersion, QoS, SubscriptionFilter};
use crate::store::{
    Chunk, Entry, LogAction, LogOp, MessageId, OutgoingExchange, Owner, Retained, SessionId,
    SessionRecord, StoreError, StoredSubscription, WillRecord,
};

pub(super) const SESSION_BYTES: usize = 12;
pub(super) const MESSAGE_ID_BYTES: usize = 14;
pub(super) const PACKET_ID_BYTES: usize = 2;
const CHUNK_HEADER_BYTES: usize = 12;
/// An entry without identifiers and message.
const ENTRY_BYTES_MIN: usize = MESSAGE_ID_BYTES + 1 + 4;

const OWNER_CLIENT: u8 = 0;
const OWNER_GROUP: u8 = 1;

const KEY_CLIENT: &str = "c:";
const KEY_GROUP: &str = "g:";

const SESSION_CONNECTED: u8 = 0b001;
const SESSION_ENDS_AT: u8 = 0b010;
const SESSION_WILL: u8 = 0b100;

const WILL_MESSAGE_EXPIRY: u8 = 0b001;
const WILL_DUE_AT: u8 = 0b010;
const WILL_USER_NAME: u8 = 0b100;

/// Subscription Options as section 3.8.3.1 lays them out, and one bit that it reserves.
const OPTIONS_QOS: u8 = 0b0000_0011;
const OPTIONS_NO_LOCAL: u8 = 0b0000_0100;
const OPTIONS_RETAIN_AS_PUBLISHED: u8 = 0b0000_1000;
const OPTIONS_RETAIN_HANDLING_SHIFT: u8 = 4;
const OPTIONS_RETAIN_HANDLING: u8 = 0b0011_0000;
const OPTIONS_IDENTIFIER: u8 = 0b0100_0000;

const ENTRY_QOS: u8 = 0b0011;
const ENTRY_RETAIN: u8 = 0b0100;
const ENTRY_IDENTIFIERS: u8 = 0b1000;

const EXCHANGE_RECEIVED: u8 = 0b1;

const LOG_SUBSCRIBE: u8 = 0;
const LOG_UNSUBSCRIBE: u8 = 1;
const LOG_END: u8 = 2;
const LOG_GROUP: u8 = 3;

pub(super) fn inbox_key(
    session: SessionId,
    id: MessageId,
) -> [u8; SESSION_BYTES + MESSAGE_ID_BYTES] {
    let mut key = [0; SESSION_BYTES + MESSAGE_ID_BYTES];
    let mut rest = &mut key[..];
    rest.put_slice(&session.0);
    put_message_id(&mut rest, id);
    key
}

pub(super) fn read_inbox_key(key: &[u8]) -> Result<(SessionId, MessageId), StoreError> {
    let mut key = Reader::new("an inbox key", key);
    let parts = (key.session()?, key.message_id()?);
    key.end()?;
    Ok(parts)
}

/// The key of an exchange, and of an identifier that awaits its PUBREL.
pub(super) fn packet_key(
    session: SessionId,
    packet_id: PacketId,
) -> [u8; SESSION_BYTES + PACKET_ID_BYTES] {
    let mut key = [0; SESSION_BYTES + PACKET_ID_BYTES];
    let mut rest = &mut key[..];
    rest.put_slice(&session.0);
    rest.put_u16(packet_id.get());
    key
}

pub(super) fn read_packet_key(key: &[u8]) -> Result<(SessionId, PacketId), StoreError> {
    let mut key = Reader::new("a key with a packet identifier", key);
    let session = key.session()?;
    let packet_id = PacketId::new(key.u16()?).ok_or_else(|| key.damaged())?;
    key.end()?;
    Ok((session, packet_id))
}

/// Reads a key that begins with a session.
pub(super) fn read_session(key: &[u8]) -> Result<SessionId, StoreError> {
    Reader::new("a session key", key).session()
}

/// What the sessions of `owner`, which follow each other, have in common.
pub(super) fn owner_key(owner: &Owner) -> Arc<str> {
    match owner {
        Owner::Client(client_id) => format!("{KEY_CLIENT}{client_id}").into(),
        Owner::Group(filter) => format!("{KEY_GROUP}{filter}").into(),
    }
}

pub(super) fn read_owner_key(key: &str) -> Result<Owner, StoreError> {
    let damaged = StoreError::Damaged {
        what: "the key of a session",
    };
    if let Some(client_id) = key.strip_prefix(KEY_CLIENT) {
        Ok(Owner::Client(client_id.into()))
    } else if let Some(filter) = key.strip_prefix(KEY_GROUP) {
        let filter = SubscriptionFilter::parse(filter).map_err(|_| damaged)?;
        Ok(Owner::Group(filter))
    } else {
        Err(damaged)
    }
}

/// `owner u8` (0 a client, 1 a share group), `text` (client identifier, or `$share/…/…`),
/// `version u8` (3, 4, 5), `flags u8`, `expiry_interval u32`, `ends_at u64` (flag 1), will (flag 2).
/// Flag 0 is `connected`.
///
/// The will: `flags u8`, `delay_interval u32`, `message_expiry_interval u32` (flag 0),
/// `due_at u64` (flag 1), user name `text` (flag 2), message.
pub(super) fn session_value(record: &SessionRecord) -> Vec<u8> {
    let mut value = Vec::new();
    match &record.owner {
        Owner::Client(client_id) => {
            value.put_u8(OWNER_CLIENT);
            put_bytes(&mut value, client_id.as_bytes());
        }
        Owner::Group(filter) => {
            value.put_u8(OWNER_GROUP);
            put_bytes(&mut value, filter.to_string().as_bytes());
        }
    }
    value.put_u8(match record.version {
        ProtocolVersion::V3_1 => 3,
        ProtocolVersion::V3_1_1 => 4,
        ProtocolVersion::V5 => 5,
    });
    value.put_u8(
        flag(SESSION_CONNECTED, record.connected)
            | flag(SESSION_ENDS_AT, record.ends_at.is_some())
            | flag(SESSION_WILL, record.will.is_some()),
    );
    value.put_u32(record.expiry_interval);
    record.ends_at.into_iter().for_each(|at| value.put_u64(at));
    if let Some(will) = &record.will {
        put_will(&mut value, will);
    }
    value
}

pub(super) fn put_will(value: &mut Vec<u8>, will: &WillRecord) {
    value.put_u8(
        flag(WILL_MESSAGE_EXPIRY, will.message_expiry_interval.is_some())
            | flag(WILL_DUE_AT, will.due_at.is_some())
            | flag(WILL_USER_NAME, will.user_name.is_some()),
    );
    value.put_u32(will.delay_interval);
    will.message_expiry_interval
        .into_iter()
        .for_each(|seconds| value.put_u32(seconds));
    will.due_at.into_iter().for_each(|at| value.put_u64(at));
    if let Some(user_name) = &will.user_name {
        put_bytes(value, user_name.as_bytes());
    }
    put_bytes(value, will.message.as_bytes());
}

pub(super) fn read_session_value(
    session: SessionId,
    value: &[u8],
) -> Result<SessionRecord, StoreError> {
    let mut value = Reader::new("a session", value);
    let owner = match value.u8()? {
        OWNER_CLIENT => Owner::Client(value.text()?.into()),
        OWNER_GROUP => Owner::Group(value.filter()?),
        _ => return Err(value.damaged()),
    };
    let version = match value.u8()? {
        3 => ProtocolVersion::V3_1,
        4 => ProtocolVersion::V3_1_1,
        5 => ProtocolVersion::V5,
        _ => return Err(value.damaged()),
    };
    let flags = value.u8()?;
    let record = SessionRecord {
        owner,
        session,
        version,
        connected: flags & SESSION_CONNECTED != 0,
        expiry_interval: value.u32()?,
        ends_at: value.optional(flags & SESSION_ENDS_AT, Reader::u64)?,
        will: value.optional(flags & SESSION_WILL, Reader::will)?,
        clock: 0,
    };
    value.end()?;
    Ok(record)
}

/// `options u8` (section 3.8.3.1; bit 6: an identifier follows), `identifier u32`, filter `text`.
pub(super) fn subscription_value(
    filter: &SubscriptionFilter,
    options: SubscribeOptions,
    identifier: Option<u32>,
) -> Vec<u8> {
    let mut value = Vec::new();
    value.put_u8(
        options.maximum_qos as u8
            | flag(OPTIONS_NO_LOCAL, options.no_local)
            | flag(OPTIONS_RETAIN_AS_PUBLISHED, options.retain_as_published)
            | (options.retain_handling as u8) << OPTIONS_RETAIN_HANDLING_SHIFT
            | flag(OPTIONS_IDENTIFIER, identifier.is_some()),
    );
    identifier
        .into_iter()
        .for_each(|identifier| value.put_u32(identifier));
    put_bytes(&mut value, filter.to_string().as_bytes());
    value
}

pub(super) fn read_subscription_value(value: &[u8]) -> Result<StoredSubscription, StoreError> {
    let mut value = Reader::new("a subscription", value);
    let bits = value.u8()?;
    let retain_handling = (bits & OPTIONS_RETAIN_HANDLING) >> OPTIONS_RETAIN_HANDLING_SHIFT;
    let retain_handling =
        RetainHandling::from_bits(retain_handling).ok_or_else(|| value.damaged())?;
    let options = SubscribeOptions {
        maximum_qos: value.qos(bits & OPTIONS_QOS)?,
        no_local: bits & OPTIONS_NO_LOCAL != 0,
        retain_as_published: bits & OPTIONS_RETAIN_AS_PUBLISHED != 0,
        retain_handling,
    };
    let identifier = value.optional(bits & OPTIONS_IDENTIFIER, Reader::u32)?;
    let filter = value.filter()?;
    value.end()?;
    Ok(StoredSubscription {
        filter,
        options,
        identifier,
    })
}

/// `entries u32`, `message_bytes u64` (the sum of [`Message::len`]), then the entries.
///
/// An entry: `hlc u64`, `node u32`, `index u16`, `flags u8` (bits 0 and 1 the QoS, bit 2 RETAIN,
/// bit 3: identifiers follow), identifiers (`count u32` and as many `u32`), message.
pub(super) fn chunk_value(entries: &[Entry]) -> Vec<u8> {
    let message_bytes: usize = entries.iter().map(|entry| entry.message.len()).sum();
    let length = CHUNK_HEADER_BYTES
        + entries
            .iter()
            .map(|entry| ENTRY_BYTES_MIN + identifiers_bytes(entry))
            .sum::<usize>()
        + message_bytes;
    let mut value = Vec::with_capacity(length);
    put_length(&mut value, entries.len());
    value.put_u64(message_bytes as u64);
    for entry in entries {
        put_message_id(&mut value, entry.id);
        value.put_u8(
            entry.qos as u8
                | flag(ENTRY_RETAIN, entry.retain)
                | flag(ENTRY_IDENTIFIERS, entry.subscription_identifiers.is_some()),
        );
        if let Some(identifiers) = &entry.subscription_identifiers {
            put_length(&mut value, identifiers.len());
            identifiers
                .iter()
                .for_each(|&identifier| value.put_u32(identifier));
        }
        put_bytes(&mut value, entry.message.as_bytes());
    }
    debug_assert_eq!(value.len(), length, "one allocation");
    value
}

fn identifiers_bytes(entry: &Entry) -> usize {
    entry
        .subscription_identifiers
        .as_ref()
        .map_or(0, |identifiers| 4 + 4 * identifiers.len())
}

/// What a chunk holds, without reading its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkSummary {
    pub(super) entries: u32,
    pub(super) message_bytes: u64,
}

pub(super) fn read_chunk_summary(value: &[u8]) -> Result<ChunkSummary, StoreError> {
    Reader::new("a chunk", value).chunk_summary()
}

pub(super) fn read_chunk_value(key: MessageId, value: &[u8]) -> Result<Chunk, StoreError> {
    let mut value = Reader::new("a chunk", value);
    let summary = value.chunk_summary()?;
    let mut entries = Vec::with_capacity(summary.entries as usize);
    for _ in 0..summary.entries {
        entries.push(value.entry()?);
    }
    value.end()?;
    Ok(Chunk { key, entries })
}

/// `inbox` session 12, `hlc u64`, `node u32`, `index u16`, `flags u8` (bit 0: PUBREC has come).
pub(super) fn exchange_value(exchange: &OutgoingExchange) -> Vec<u8> {
    let mut value = Vec::with_capacity(SESSION_BYTES + MESSAGE_ID_BYTES + 1);
    value.put_slice(&exchange.inbox.0);
    put_message_id(&mut value, exchange.message);
    value.put_u8(flag(EXCHANGE_RECEIVED, exchange.received));
    value
}

pub(super) fn read_exchange_value(
    packet_id: PacketId,
    value: &[u8],
) -> Result<OutgoingExchange, StoreError> {
    let mut value = Reader::new("an exchange", value);
    let exchange = OutgoingExchange {
        packet_id,
        inbox: value.session()?,
        message: value.message_id()?,
        received: value.u8()? & EXCHANGE_RECEIVED != 0,
    };
    value.end()?;
    Ok(exchange)
}

/// Publisher `text`, message.
pub(super) fn retained_value(retained: &Retained) -> Vec<u8> {
    let mut value = Vec::with_capacity(8 + retained.publisher.len() + retained.message.len());
    put_bytes(&mut value, retained.publisher.as_bytes());
    put_bytes(&mut value, retained.message.as_bytes());
    value
}

pub(super) fn read_retained_value(value: &[u8]) -> Result<Retained, StoreError> {
    let mut value = Reader::new("a retained message", value);
    let publisher = value.text()?.into();
    let message = value.message()?;
    value.end()?;
    Ok(Retained { message, publisher })
}

/// `kind u8`, session 12, `epoch u64`; then of a subscription the `text` of its owner's key and
/// [`subscription_value`], of others the `text` of the filter, if there is one.
pub(crate) fn log_op_value(op: &LogOp) -> Vec<u8> {
    let mut value = Vec::new();
    value.put_u8(match op.action {
        LogAction::Subscribe { .. } => LOG_SUBSCRIBE,
        LogAction::Unsubscribe(_) => LOG_UNSUBSCRIBE,
        LogAction::OpenGroup(_) => LOG_GROUP,
        LogAction::End => LOG_END,
    });
    value.put_slice(&op.session.0);
    value.put_u64(op.epoch);
    match &op.action {
        LogAction::Subscribe {
            owner,
            filter,
            options,
            identifier,
        } => {
            put_bytes(&mut value, owner_key(owner).as_bytes());
            let subscription = subscription_value(filter, *options, *identifier);
            put_bytes(&mut value, &subscription);
        }
        LogAction::Unsubscribe(filter) | LogAction::OpenGroup(filter) => {
            put_bytes(&mut value, filter.to_string().as_bytes());
        }
        LogAction::End => {}
    }
    value
}

/// # Errors
/// `StoreError::Damaged` if it is none, or of a later version.
pub(crate) fn read_log_op(value: &[u8]) -> Result<LogOp, StoreError> {
    let mut value = Reader::new("a log entry", value);
    let kind = value.u8()?;
    let (session, epoch) = (value.session()?, value.u64()?);
    let action = match kind {
        LOG_SUBSCRIBE => {
            let owner = read_owner_key(value.text()?)?;
            let subscription = read_subscription_value(value.bytes()?)?;
            LogAction::Subscribe {
                owner,
                filter: subscription.filter,
                options: subscription.options,
                identifier: subscription.identifier,
            }
        }
        LOG_UNSUBSCRIBE => LogAction::Unsubscribe(value.filter()?),
        LOG_GROUP => LogAction::OpenGroup(value.filter()?),
        LOG_END => LogAction::End,
        _ => return Err(value.damaged()),
    };
    value.end()?;
    Ok(LogOp {
        session,
        epoch,
        action,
    })
}

fn flag(bit: u8, set: bool) -> u8 {
    if set { bit } else { 0 }
}

pub(super) fn put_message_id(to: &mut impl BufMut, id: MessageId) {
    to.put_u64(id.hlc);
    to.put_u32(id.node);
    to.put_u16(id.index);
}

pub(super) fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    put_length(to, bytes.len());
    to.put_slice(bytes);
}

fn put_length(to: &mut Vec<u8>, length: usize) {
    to.put_u32(u32::try_from(length).expect("no packet has 4 GiB"));
}

/// Takes a key or value apart; whatever does not fit is damage.
pub(super) struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    pub(super) fn damaged(&self) -> StoreError {
        StoreError::Damaged { what: self.what }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], StoreError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| self.damaged())?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StoreError> {
        let (taken, rest) = self
            .rest
            .split_first_chunk()
            .ok_or_else(|| self.damaged())?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, StoreError> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, StoreError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, StoreError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, StoreError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], StoreError> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, StoreError> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes).map_err(|_| self.damaged())
    }

    pub(super) fn session(&mut self) -> Result<SessionId, StoreError> {
        self.array().map(SessionId)
    }

    pub(super) fn message_id(&mut self) -> Result<MessageId, StoreError> {
        Ok(MessageId {
            hlc: self.u64()?,
            node: self.u32()?,
            index: self.u16()?,
        })
    }

    /// Copies the message, so that it does not keep alive the block it was read from.
    fn message(&mut self) -> Result<Message, StoreError> {
        let bytes = self.bytes()?;
        Message::from_bytes(bytes).map_err(|_| self.damaged())
    }

    fn qos(&self, bits: u8) -> Result<QoS, StoreError> {
        QoS::from_bits(bits).ok_or_else(|| self.damaged())
    }

    pub(super) fn filter(&mut self) -> Result<SubscriptionFilter, StoreError> {
        let text = self.text()?;
        SubscriptionFilter::parse(text).map_err(|_| self.damaged())
    }

    fn optional<T>(
        &mut self,
        flag: u8,
        read: impl FnOnce(&mut Self) -> Result<T, StoreError>,
    ) -> Result<Option<T>, StoreError> {
        if flag == 0 {
            Ok(None)
        } else {
            read(self).map(Some)
        }
    }

    pub(super) fn will(&mut self) -> Result<WillRecord, StoreError> {
        let flags = self.u8()?;
        let delay_interval = self.u32()?;
        let message_expiry_interval = self.optional(flags & WILL_MESSAGE_EXPIRY, Self::u32)?;
        let due_at = self.optional(flags & WILL_DUE_AT, Self::u64)?;
        let user_name = self
            .optional(flags & WILL_USER_NAME, Self::text)?
            .map(Arc::from);
        Ok(WillRecord {
            message: self.message()?,
            message_expiry_interval,
            delay_interval,
            due_at,
            user_name,
        })
    }

    fn chunk_summary(&mut self) -> Result<ChunkSummary, StoreError> {
        let (entries, message_bytes) = (self.u32()?, self.u64()?);
        // Checked before any memory is asked for.
        if entries as usize > self.rest.len() / ENTRY_BYTES_MIN
            || message_bytes > self.rest.len() as u64
        {
            return Err(self.damaged());
        }
        Ok(ChunkSummary {
            entries,
            message_bytes,
        })
    }

    fn entry(&mut self) -> Result<Entry, StoreError> {
        let id = self.message_id()?;
        let flags = self.u8()?;
        Ok(Entry {
            id,
            qos: self.qos(flags & ENTRY_QOS)?,
            retain: flags & ENTRY_RETAIN != 0,
            subscription_identifiers: self
                .optional(flags & ENTRY_IDENTIFIERS, Self::identifiers)?,
            message: self.message()?,
        })
    }

    fn identifiers(&mut self) -> Result<Arc<[u32]>, StoreError> {
        let count = self.u32()?;
        let bytes = self.take(count as usize * 4)?;
        let (identifiers, _) = bytes.as_chunks();
        Ok(identifiers
            .iter()
            .copied()
            .map(u32::from_be_bytes)
            .collect())
    }

    pub(super) fn end(&self) -> Result<(), StoreError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.damaged())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::contract::chunk;

    #[test]
    fn chunk_summary_is_read_without_the_entries() {
        let chunk = chunk(1, 3);
        let message_bytes = chunk
            .entries
            .iter()
            .map(|entry| entry.message.len() as u64)
            .sum();
        let value = chunk_value(&chunk.entries);

        assert_eq!(
            read_chunk_summary(&value).unwrap(),
            ChunkSummary {
                entries: 3,
                message_bytes
            }
        );
    }

    #[test]
    fn cut_or_extended_chunk_is_damaged() {
        let chunk = chunk(1, 2);
        let mut value = chunk_value(&chunk.entries);
        for length in 0..value.len() {
            assert!(
                read_chunk_value(chunk.key, &value[..length]).is_err(),
                "cut at {length}"
            );
        }
        value.push(0);
        assert!(read_chunk_value(chunk.key, &value).is_err());
    }

    #[test]
    fn inbox_keys_sort_as_their_parts() {
        let id = |hlc, node, index| MessageId { hlc, node, index };
        let ids = [
            id(0, 0, 1),
            id(0, 1, 0),
            id(0, 256, 0),
            id(1, 0, 0),
            id(256, 0, 0),
            id(u64::MAX, 0, 0),
        ];
        let keys = ids.map(|id| inbox_key(SessionId([7; 12]), id));

        assert!(keys.is_sorted());
        assert_eq!(keys.map(|key| read_inbox_key(&key).unwrap().1), ids);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_inbox_key(&bytes);
            let _ = read_packet_key(&bytes);
            let _ = read_session(&bytes);
            let _ = read_session_value(SessionId([0; 12]), &bytes);
            let _ = read_subscription_value(&bytes);
            let _ = read_chunk_summary(&bytes);
            let _ = read_chunk_value(MessageId::MIN, &bytes);
            let _ = read_exchange_value(PacketId::new(1).unwrap(), &bytes);
            let _ = read_retained_value(&bytes);
        }

        #[test]
        fn flipped_bytes_are_read_without_panic(at in 0_usize..100, byte in any::<u8>()) {
            let chunk = chunk(1, 2);
            let mut value = chunk_value(&chunk.entries);
            value[at] = byte;
            let _ = read_chunk_value(chunk.key, &value);
        }
    }
}
