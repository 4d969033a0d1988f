//! What the documents of each collection look like, and how they are read.
//!
//! Keys are binary and begin with the [`SessionId`], so that a range of them is a session's. Among
//! the documents of `inbox`, `out2` and `q2in` are [`milestones`](super::milestones): `_id`, `milestone`.
//!
//! | collection | document |
//! |---|---|
//! | `meta` | `_id: "schema"`, `version` · `_id: "nid"`, `n`: the last node id · `_id: "import"`, `filling`: while another store is [copied](mod@super::import) into it |
//! | `nodes` | `_id`: node id, `name`, `st`: [`NodeState`](super::NodeState), `hb`: last heartbeat, `hbn`: how many, `hr`: reserved clock value, `k`: last entry of its log, `ls`: the server session of its transactions, which only one run of a node has |
//! | `sessions` | `_id`: [`format::owner_key`], `sid`, `e`: epoch, `n`: node of the connection, `c`: connected, `v`: version, `exp`: expiry interval, `ends`, `will` ([`will_value`]), `wd`: its delay, `willdue`, `due`: the earlier of both, `h`: the clock value when it was saved, `s`: subscriptions by [`subscription_field`], `sv`: how often it was changed, `ct`: the CONNECT that took it last, `pv`: what it was before that, `og`: [leftovers](super::Leftover) |
//! | `sublog` | `_id`: node `u32`, entry `u64`, `at`, `ops`: [`format::log_op_value`] |
//! | `inbox` | `_id`: [`format::inbox_key`], `b`: [`format::chunk_value`], `x`: when all of it has expired |
//! | `out2` | `_id`: [`format::packet_key`], `b`: [`format::exchange_value`] |
//! | `q2in` | `_id`: [`format::packet_key`] |
//! | `retained` | `_id`: topic, `k`: message id, `b`: [`format::retained_value`] or null once cleared, `x`: when it has expired |
//! | `gc` | `_id`: session that has ended, `at`, `swept`: whether it was, once |

use std::sync::Arc;

use aws_lc_rs::digest;
use bson::raw::{CStr, CString, RawDocument, RawDocumentBuf};
use bson::{DateTime, RawBson, RawBsonRef, cstr, rawdoc};

use super::commands::{binary, field};
use crate::mqtt::{ProtocolVersion, SubscriptionFilter};
use crate::store::format::{self, Reader};
use crate::store::{
    Chunk, Entry, MessageId, Retained, SessionId, SessionRecord, StoreError, StoredSubscription,
    WillRecord,
};

pub(super) const META: &str = "meta";
pub(super) const NODES: &str = "nodes";
pub(super) const SESSIONS: &str = "sessions";
pub(super) const SUBLOG: &str = "sublog";
pub(super) const INBOX: &str = "inbox";
pub(super) const EXCHANGES: &str = "out2";
pub(super) const AWAITING: &str = "q2in";
pub(super) const RETAINED: &str = "retained";
pub(super) const GARBAGE: &str = "gc";

/// The field of a subscription: hashed, because a filter may hold what a field's name may not.
pub(super) fn subscription_field(filter: &SubscriptionFilter) -> CString {
    let hash = digest::digest(&digest::SHA256, filter.to_string().as_bytes());
    let name = hash.as_ref()[..16].iter();
    field(name.fold("s.".to_owned(), |name, byte| format!("{name}{byte:02x}")))
}

pub(super) fn version_number(version: ProtocolVersion) -> i32 {
    match version {
        ProtocolVersion::V3_1 => 3,
        ProtocolVersion::V3_1_1 => 4,
        ProtocolVersion::V5 => 5,
    }
}

/// A Will without the time at which it is due, which is a field of its own.
pub(super) fn will_value(will: &WillRecord) -> Vec<u8> {
    let mut value = Vec::new();
    let undated = WillRecord {
        due_at: None,
        ..will.clone()
    };
    format::put_will(&mut value, &undated);
    value
}

pub(super) fn read_will(value: &[u8], due_at: Option<u64>) -> Result<WillRecord, StoreError> {
    let mut value = Reader::new("a will", value);
    let will = value.will()?;
    value.end()?;
    Ok(WillRecord { due_at, ..will })
}

/// Unix milliseconds; what is beyond all dates becomes the last one, which stands for it.
pub(super) fn date(unix_ms: u64) -> DateTime {
    DateTime::from_millis(i64::try_from(unix_ms).unwrap_or(i64::MAX))
}

pub(super) fn unix_ms(date: DateTime) -> u64 {
    match date.timestamp_millis() {
        i64::MAX => u64::MAX,
        ms => u64::try_from(ms).unwrap_or(0),
    }
}

/// An update by operators, whose values are never expressions.
#[derive(Debug, Default)]
pub(super) struct Fields {
    set: RawDocumentBuf,
    unset: RawDocumentBuf,
}

impl Fields {
    /// Sets a field, or removes it.
    pub(super) fn put(&mut self, name: impl AsRef<CStr>, value: Option<impl Into<RawBson>>) {
        match value {
            Some(value) => self.set.append(name, value.into()),
            None => self.unset.append(name, 1),
        }
    }

    /// Everything of `record` but what tells one incarnation and one owner from another.
    pub(super) fn put_record(&mut self, record: &SessionRecord, node: u32) {
        let will_due = record.will.as_ref().and_then(|will| will.due_at);
        let due = [record.ends_at, will_due].into_iter().flatten().min();
        let will = record.will.as_ref();
        // Also of a client that has left: what was in flight to it only its last node knows.
        self.put(cstr!("n"), Some(i64::from(node)));
        self.put(cstr!("c"), Some(record.connected));
        self.put(cstr!("v"), Some(version_number(record.version)));
        self.put(cstr!("exp"), Some(i64::from(record.expiry_interval)));
        self.put(cstr!("ends"), record.ends_at.map(date));
        self.put(cstr!("will"), will.map(|will| binary(will_value(will))));
        self.put(cstr!("wd"), will.map(|will| i64::from(will.delay_interval)));
        self.put(cstr!("willdue"), will_due.map(date));
        self.put(cstr!("due"), due.map(date));
        self.put(cstr!("h"), Some(record.clock.cast_signed()));
    }

    /// A document that has nothing else.
    pub(super) fn into_document(self) -> RawDocumentBuf {
        self.set
    }

    /// The update, which changes nothing else.
    pub(super) fn into_update(self) -> RawDocumentBuf {
        let mut update = RawDocumentBuf::new();
        if !self.set.is_empty() {
            update.append(cstr!("$set"), self.set);
        }
        if !self.unset.is_empty() {
            update.append(cstr!("$unset"), self.unset);
        }
        update
    }

    /// The update of a session, which always changes something: only then does it conflict with
    /// what others do to it.
    pub(super) fn into_session_update(self) -> RawDocumentBuf {
        let mut update = self.into_update();
        update.append(cstr!("$inc"), rawdoc! { "sv": 1_i64 });
        update
    }
}

/// A document of `sessions`.
#[derive(Debug)]
pub(super) struct SessionDocument {
    pub(super) key: Arc<str>,
    pub(super) epoch: u64,
    /// Absent if only leftovers are left.
    pub(super) record: Option<SessionRecord>,
    pub(super) subscriptions: Vec<StoredSubscription>,
    /// Where its client is connected, or was last.
    pub(super) node: Option<u32>,
    /// How often the session was changed.
    pub(super) changes: u64,
    /// The CONNECT that took it last.
    pub(super) token: Option<SessionId>,
    pub(super) previous: Option<Previous>,
    pub(super) leftovers: Vec<super::Leftover>,
}

/// What a session was before the CONNECT that took it last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Previous {
    pub(super) epoch: u64,
    /// Where its client was connected last.
    pub(super) node: Option<u32>,
    /// Whether it was still, or seemed to be.
    pub(super) connected: bool,
    /// A new incarnation was made.
    pub(super) fresh: bool,
}

impl SessionDocument {
    pub(super) fn read(document: &RawDocument) -> Result<Self, StoreError> {
        let fields = Document::new("a session", document);
        let key: Arc<str> = fields.text("_id")?.into();
        let owner = format::read_owner_key(&key)?;
        let will_due = fields.date("willdue")?.map(unix_ms);
        let record = match fields.session("sid")? {
            None => None,
            Some(session) => Some(SessionRecord {
                owner: owner.clone(),
                session,
                version: match fields.long("v")? {
                    3 => ProtocolVersion::V3_1,
                    4 => ProtocolVersion::V3_1_1,
                    5 => ProtocolVersion::V5,
                    _ => return Err(fields.damaged()),
                },
                connected: fields.flag("c")?,
                expiry_interval: u32::try_from(fields.long("exp")?)
                    .map_err(|_| fields.damaged())?,
                ends_at: fields.date("ends")?.map(unix_ms),
                will: match fields.bytes("will")? {
                    Some(will) => Some(read_will(will, will_due)?),
                    None => None,
                },
                // Absent until it is saved for the first time.
                clock: fields.long("h").unwrap_or(0).cast_unsigned(),
            }),
        };
        let mut subscriptions = Vec::new();
        if let Some(stored) = fields.document("s")? {
            for subscription in stored {
                let (_, value) = subscription.map_err(|_| fields.damaged())?;
                let RawBsonRef::Binary(value) = value else {
                    return Err(fields.damaged());
                };
                subscriptions.push(format::read_subscription_value(value.bytes)?);
            }
        }
        let previous = match fields.document("pv")? {
            None => None,
            Some(previous) => {
                let previous = Document::new("a session", previous);
                Some(Previous {
                    epoch: previous.long("e")?.cast_unsigned(),
                    node: previous.optional_node("n")?,
                    connected: previous.flag("c")?,
                    fresh: previous.flag("fr")?,
                })
            }
        };
        let mut leftovers = Vec::new();
        for leftover in fields.array("og")? {
            let leftover = Document::new("a session", leftover);
            leftovers.push(super::Leftover {
                owner: owner.clone(),
                session: leftover.session("id")?.ok_or_else(|| leftover.damaged())?,
                ended: leftover.flag("ended")?,
                will: match leftover.bytes("will")? {
                    Some(will) => {
                        let due_at = leftover.date("willdue")?.map(unix_ms);
                        Some(read_will(will, due_at)?)
                    }
                    None => None,
                },
            });
        }
        Ok(Self {
            key,
            epoch: fields.long("e")?.cast_unsigned(),
            record,
            subscriptions,
            node: fields.optional_node("n")?,
            changes: fields.optional_long("sv")?.unwrap_or(0).cast_unsigned(),
            token: fields.session("ct")?,
            previous,
            leftovers,
        })
    }
}

/// The value of an `inbox` document, and when all of it has expired, if that comes.
pub(super) fn chunk_fields(entries: &[Entry]) -> (bson::Binary, Option<DateTime>) {
    let mut expires_at = Some(0);
    for entry in entries {
        expires_at = expires_at.and_then(|last: u64| {
            let at = entry.message.expires_at()?;
            Some(last.max(at))
        });
    }
    let expires_at = expires_at.filter(|_| !entries.is_empty());
    (binary(format::chunk_value(entries)), expires_at.map(date))
}

pub(super) fn chunk_document(session: SessionId, chunk: &Chunk) -> RawDocumentBuf {
    let (value, expires_at) = chunk_fields(&chunk.entries);
    let mut document = RawDocumentBuf::new();
    document.append(cstr!("_id"), binary(format::inbox_key(session, chunk.key)));
    document.append(cstr!("b"), value);
    if let Some(expires_at) = expires_at {
        document.append(cstr!("x"), expires_at);
    }
    document
}

pub(super) fn read_chunk(document: &RawDocument) -> Result<Chunk, StoreError> {
    let fields = Document::new("a chunk", document);
    let (_, key) = format::read_inbox_key(fields.required_bytes("_id")?)?;
    format::read_chunk_value(key, fields.required_bytes("b")?)
}

pub(super) fn message_id_value(id: MessageId) -> bson::Binary {
    let mut value = Vec::with_capacity(format::MESSAGE_ID_BYTES);
    format::put_message_id(&mut value, id);
    binary(value)
}

pub(super) fn read_retained(document: &RawDocument) -> Result<Retained, StoreError> {
    let fields = Document::new("a retained message", document);
    format::read_retained_value(fields.required_bytes("b")?)
}

/// The query for all that begins with `session`.
pub(super) fn all_of(session: SessionId) -> RawDocumentBuf {
    let mut last = session.0.to_vec();
    last.resize(format::SESSION_BYTES + format::MESSAGE_ID_BYTES, 0xFF);
    range_of(session, last)
}

/// The query for the packet identifiers of `session`.
pub(super) fn packets_of(session: SessionId) -> RawDocumentBuf {
    let mut last = session.0.to_vec();
    last.resize(format::SESSION_BYTES + 2, 0xFF);
    range_of(session, last)
}

/// Binary values of different lengths sort by length first, so both ends are as long as the keys.
fn range_of(session: SessionId, last: Vec<u8>) -> RawDocumentBuf {
    let mut first = session.0.to_vec();
    first.resize(last.len(), 0);
    rawdoc! { "_id": { "$gte": binary(first), "$lte": binary(last) } }
}

/// A document that is taken apart; whatever does not fit is damage.
#[derive(Clone, Copy)]
pub(super) struct Document<'a> {
    what: &'static str,
    fields: &'a RawDocument,
}

impl<'a> Document<'a> {
    pub(super) fn new(what: &'static str, fields: &'a RawDocument) -> Self {
        Self { what, fields }
    }

    pub(super) fn damaged(&self) -> StoreError {
        StoreError::Damaged { what: self.what }
    }

    fn get(&self, name: &str) -> Result<Option<RawBsonRef<'a>>, StoreError> {
        match self.fields.get(name).map_err(|_| self.damaged())? {
            Some(RawBsonRef::Null) | None => Ok(None),
            value => Ok(value),
        }
    }

    fn convert<T>(
        &self,
        name: &str,
        convert: impl FnOnce(RawBsonRef<'a>) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        self.get(name)?
            .map(|value| convert(value).ok_or_else(|| self.damaged()))
            .transpose()
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str, StoreError> {
        self.convert(name, |value| value.as_str())?
            .ok_or_else(|| self.damaged())
    }

    pub(super) fn long(&self, name: &str) -> Result<i64, StoreError> {
        self.optional_long(name)?.ok_or_else(|| self.damaged())
    }

    fn optional_long(&self, name: &str) -> Result<Option<i64>, StoreError> {
        self.convert(name, |value| match value {
            RawBsonRef::Int32(value) => Some(i64::from(value)),
            RawBsonRef::Int64(value) => Some(value),
            _ => None,
        })
    }

    pub(super) fn node(&self, name: &str) -> Result<u32, StoreError> {
        self.optional_node(name)?.ok_or_else(|| self.damaged())
    }

    pub(super) fn optional_node(&self, name: &str) -> Result<Option<u32>, StoreError> {
        self.optional_long(name)?
            .map(|node| u32::try_from(node).map_err(|_| self.damaged()))
            .transpose()
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self
            .convert(name, |value| value.as_bool())?
            .unwrap_or(false))
    }

    pub(super) fn has(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self.get(name)?.is_some())
    }

    pub(super) fn date(&self, name: &str) -> Result<Option<DateTime>, StoreError> {
        self.convert(name, |value| value.as_datetime())
    }

    pub(super) fn bytes(&self, name: &str) -> Result<Option<&'a [u8]>, StoreError> {
        self.convert(name, |value| match value {
            RawBsonRef::Binary(value) => Some(value.bytes),
            _ => None,
        })
    }

    pub(super) fn required_bytes(&self, name: &str) -> Result<&'a [u8], StoreError> {
        self.bytes(name)?.ok_or_else(|| self.damaged())
    }

    pub(super) fn session(&self, name: &str) -> Result<Option<SessionId>, StoreError> {
        let read = |bytes: &[u8]| bytes.try_into().map(SessionId).map_err(|_| self.damaged());
        self.bytes(name)?.map(read).transpose()
    }

    pub(super) fn document(&self, name: &str) -> Result<Option<&'a RawDocument>, StoreError> {
        self.convert(name, |value| value.as_document())
    }

    /// The documents in an array.
    pub(super) fn array(&self, name: &str) -> Result<Vec<&'a RawDocument>, StoreError> {
        let Some(array) = self.convert(name, |value| value.as_array())? else {
            return Ok(Vec::new());
        };
        let items = array.into_iter().map(|item| match item {
            Ok(RawBsonRef::Document(item)) => Ok(item),
            _ => Err(self.damaged()),
        });
        items.collect()
    }

    /// The binary values in an array.
    pub(super) fn binaries(&self, name: &str) -> Result<Vec<&'a [u8]>, StoreError> {
        let Some(array) = self.convert(name, |value| value.as_array())? else {
            return Ok(Vec::new());
        };
        let items = array.into_iter().map(|item| match item {
            Ok(RawBsonRef::Binary(item)) => Ok(item.bytes),
            _ => Err(self.damaged()),
        });
        items.collect()
    }
}
