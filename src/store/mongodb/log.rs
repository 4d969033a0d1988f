//! The subscription log: what each node has done to the subscriptions of persistent sessions.
//!
//! Each node writes its own, in the transaction of the flush that it belongs to, and counts its
//! entries in its document in `nodes`. Whoever has read the subscriptions of all sessions stays up
//! to date by the entries that follow.

use bson::raw::RawDocumentBuf;
use bson::{DateTime, cstr, rawdoc};
use bytes::BufMut;

use super::commands::{Query, array, binary};
use super::documents::{Document, NODES, SESSIONS, SUBLOG, SessionDocument};
use super::{MongoStore, NodeRow};
use crate::store::format::{self, Reader};
use crate::store::{
    LogEntry, LogOp, LogPosition, Owner, SessionId, StoreError, StoredSubscription,
};

/// Entries are removed after this time, by when every node that is alive has read them.
pub(super) const LOG_SECONDS: i64 = 3600;

/// Operations in one entry, and their bytes.
const ENTRY_OPS_MAX: usize = 1000;
const ENTRY_BYTES_MAX: usize = 4 << 20;

/// The subscriptions of one session, for nodes that do not hold it.
#[derive(Debug)]
pub(crate) struct SharedSession {
    pub(crate) owner: Owner,
    pub(crate) session: SessionId,
    pub(crate) epoch: u64,
    /// The node that a connection is open at.
    pub(crate) node: Option<u32>,
    pub(crate) subscriptions: Vec<StoredSubscription>,
}

impl MongoStore {
    /// Hands the subscriptions of all sessions to `each`, and returns how far the logs had come
    /// before: entries that follow may be included already, and do no harm when applied again.
    ///
    /// # Errors
    /// `StoreError` if not all of them could be read.
    pub(crate) async fn load_subscriptions(
        &self,
        mut each: impl FnMut(SharedSession),
    ) -> Result<Vec<LogPosition>, StoreError> {
        let positions = self.nodes().await?.iter().map(NodeRow::position).collect();
        let fields = rawdoc! { "og": 0, "pv": 0, "will": 0 };
        let sessions = Query::new(SESSIONS, rawdoc! { "sid": { "$exists": true } }).only(fields);
        self.commands
            .for_each(sessions, |document| {
                let node = Document::new("a session", document).optional_node("n")?;
                let document = SessionDocument::read(document)?;
                if let Some(record) = document.record {
                    each(SharedSession {
                        owner: record.owner,
                        session: record.session,
                        epoch: document.epoch,
                        node: node.filter(|_| record.connected),
                        subscriptions: document.subscriptions,
                    });
                }
                Ok(())
            })
            .await?;
        Ok(positions)
    }

    /// The entries that follow `position` in the log of its node, up to what is durable now; `None`
    /// if some of them have been removed, and all subscriptions have to be loaded again.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn read_log(
        &self,
        position: LogPosition,
    ) -> Result<Option<Vec<LogEntry>>, StoreError> {
        let node = Query::new(NODES, rawdoc! { "_id": i64::from(position.node) }).limit(1);
        let node = self.commands.find(node).await?;
        let Some(node) = node.first() else {
            return Ok(None);
        };
        let last = Document::new("a node", node).long("k")?.cast_unsigned();
        let range = rawdoc! { "_id": {
            "$gt": entry_key(position),
            "$lte": entry_key(LogPosition { entry: last, ..position }),
        } };
        let mut entries = Vec::new();
        let mut next = position.entry + 1;
        let read = |document: &bson::raw::RawDocument| {
            let entry = read_entry(document)?;
            if entry.position.entry == next {
                next += 1;
                entries.push(entry);
            }
            Ok(())
        };
        self.commands
            .for_each(Query::new(SUBLOG, range), read)
            .await?;
        Ok((next > last).then_some(entries))
    }
}

/// The entries that hold `ops`, the first of which has the number that follows `position`, and their
/// documents.
pub(super) fn entries(
    position: LogPosition,
    ops: Vec<LogOp>,
) -> (Vec<LogEntry>, Vec<RawDocumentBuf>) {
    let (mut entries, mut documents) = (Vec::new(), Vec::new());
    let with_value = |op| (format::log_op_value(&op), op);
    let mut ops = ops.into_iter().map(with_value).peekable();
    let mut position = position;
    while ops.peek().is_some() {
        let (mut values, mut entry) = (Vec::new(), Vec::new());
        let mut bytes = 0;
        while let Some((value, op)) = ops.next_if(|(value, _)| {
            entry.is_empty()
                || entry.len() < ENTRY_OPS_MAX && bytes + value.len() <= ENTRY_BYTES_MAX
        }) {
            bytes += value.len();
            values.push(value);
            entry.push(op);
        }
        position.entry += 1;
        let mut document = rawdoc! { "_id": entry_key(position), "at": DateTime::now() };
        document.append(cstr!("ops"), array(values.into_iter().map(binary)));
        documents.push(document);
        entries.push(LogEntry {
            position,
            ops: entry,
        });
    }
    (entries, documents)
}

fn entry_key(position: LogPosition) -> bson::Binary {
    let mut key = Vec::with_capacity(12);
    key.put_u32(position.node);
    key.put_u64(position.entry);
    binary(key)
}

fn read_entry(document: &bson::raw::RawDocument) -> Result<LogEntry, StoreError> {
    let fields = Document::new("a log entry", document);
    let mut key = Reader::new("a log entry", fields.required_bytes("_id")?);
    let position = LogPosition {
        node: key.u32()?,
        entry: key.u64()?,
    };
    key.end()?;
    let ops = fields.binaries("ops")?.into_iter().map(format::read_log_op);
    Ok(LogEntry {
        position,
        ops: ops.collect::<Result<_, _>>()?,
    })
}
