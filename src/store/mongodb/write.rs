//! How a flush is written.
//!
//! Messages of QoS 1, and what clients have done with, are written in any order: all of it may be
//! written twice, and what of it is missing after a crash was not acknowledged. Everything else goes
//! into one transaction that changes the document of every session it is about, on condition that no
//! other node has taken the session. Sessions and the node come last in it, so that one that is never
//! finished, because its node was stopped, seldom stands in anybody's way.
//!
//! The caller writes the same changes again until the store is available. A transaction is not
//! repeated that is committed, and one that may be is committed again first.

use std::sync::Arc;
use std::time::Duration;

use bson::raw::{CString, RawDocumentBuf};
use bson::{Timestamp, cstr, rawdoc};
use hashbrown::HashMap;
use mongodb::ClientSession;
use mongodb::error::UNKNOWN_TRANSACTION_COMMIT_RESULT;
use mongodb::options::{ReadConcern, WriteConcern};
use tokio::time::Instant;

use super::MongoStore;
use super::batch::{Batch, InboxChange, InboxChanges, SessionChanges};
use super::commands::{
    Concern, DOCUMENT_BYTES_MAX, Failure, Query, Verb, array, binary, delete, update,
    write_commands,
};
use super::documents::{
    AWAITING, Document, EXCHANGES, Fields, GARBAGE, INBOX, NODES, SESSIONS, SUBLOG, chunk_document,
    chunk_fields, subscription_field,
};
use super::held::{Held, Hold};
use super::log;
use crate::failpoint;
use crate::mqtt::SubscriptionFilter;
use crate::store::{
    Change, Chunk, LogAction, LogEntry, LogOp, LogPosition, MessageId, Messages, Owner, SessionId,
    SessionRecord, StoreError, Written, format,
};

/// Wait before a transaction is repeated that others were in the way of, at first and at most.
const CONFLICT_WAIT: Duration = Duration::from_millis(2);
const CONFLICT_WAIT_MAX: Duration = Duration::from_millis(100);

/// Keys in one query: even the longest fit.
const KEYS_MAX: usize = 200;

/// Why a transaction was not committed.
enum Refusal {
    /// Another node has taken some of the sessions.
    Sessions,
    /// The document of this session would become larger than a document may be.
    TooLarge(SessionId),
    /// The node is not up any more, or its log is longer than this process knew.
    Node,
    /// Logs of other nodes are longer than the caller knows.
    Behind(Vec<LogPosition>),
    Failure(Failure),
}

/// What a transaction changes of what this node holds, once it is committed.
struct Staged {
    holds: Vec<(SessionId, Option<Hold>)>,
    logged: Vec<LogEntry>,
}

/// What is to be written in one transaction.
struct Together<'a> {
    batch: Batch<'a>,
    /// Those of its sessions that this node held when the write began.
    holds: HashMap<SessionId, Hold>,
    /// Sessions that were left out.
    lost: Vec<SessionId>,
    /// Another attempt may have committed although its answer was lost.
    may_be_there: bool,
    messages: &'a Messages,
}

/// What became of it.
enum Outcome {
    Committed(Committed),
    Behind(Vec<LogPosition>),
}

#[derive(Clone, Default)]
struct Committed {
    lost: Vec<SessionId>,
    logged: Vec<LogEntry>,
    time: Option<Timestamp>,
}

/// The part of a transaction that touches sessions, which is sent last.
#[derive(Default)]
struct SessionPart {
    updates: Vec<(SessionId, RawDocumentBuf)>,
    log: Vec<LogOp>,
    ended: Vec<SessionId>,
    /// Keys of documents that may have become empty.
    emptied: Vec<Arc<str>>,
    holds: Vec<(SessionId, Option<Hold>)>,
}

/// What all transactions of this node are made with, one after the other.
pub(super) struct Transactions {
    session: ClientSession,
    /// Of the flush that is being written, which may have to be written again.
    last: Option<Last>,
}

struct Last {
    changes: Arc<Vec<Change>>,
    committed: Committed,
    /// It is not known whether it is committed; if it is, this is to be adopted.
    unknown: Option<Staged>,
}

impl Transactions {
    pub(super) fn new(session: ClientSession) -> Self {
        let last = None;
        Self { session, last }
    }

    /// What others may end its transaction by.
    pub(super) fn id(&self) -> Result<RawDocumentBuf, StoreError> {
        RawDocumentBuf::try_from(self.session.id()).map_err(|_| StoreError::Damaged {
            what: "the id of a server session",
        })
    }
}

impl MongoStore {
    pub(super) async fn write_changes(
        &self,
        changes: &Arc<Vec<Change>>,
        messages: &Messages,
    ) -> Result<Written, StoreError> {
        let mut batch = Batch::of(changes);
        let mut retained = std::mem::take(&mut batch.retained);
        let plain = batch.take_plain();
        let mut earlier = None;
        if !batch.is_empty() {
            // Before the transaction: once that has been committed, a publisher that sends its message
            // again is answered, and nothing more is done about it. It does no harm if the message is
            // retained and nothing comes of the rest: it is published again.
            let retained = std::mem::take(&mut retained);
            earlier = self.write_retained(&retained).await?;
        }
        // Each is waited for, even if another one has failed: a transaction would be left open.
        let (together, plain, retained) = tokio::join!(
            self.write_together(changes, batch, messages),
            self.write_plain(&plain),
            self.write_retained(&retained),
        );
        match (together?, plain?, retained?) {
            (Outcome::Behind(subscriptions), ..) => Ok(Written {
                behind: true,
                subscriptions,
                ..Written::default()
            }),
            (Outcome::Committed(committed), plain, retained) => {
                let Committed { lost, logged, time } = committed;
                // A transaction with a log entry has seen that this node is up.
                let subscriptions = if matches!(messages, Messages::Absent) && !logged.is_empty() {
                    Vec::new()
                } else {
                    let time = time.max(plain).max(retained).max(earlier);
                    self.log_positions(time).await?
                };
                self.transactions.lock().await.last = None;
                Ok(Written {
                    lost,
                    behind: false,
                    subscriptions,
                    logged,
                })
            }
        }
    }

    /// How far every node's log had come at `time`.
    async fn log_positions(&self, time: Option<Timestamp>) -> Result<Vec<LogPosition>, StoreError> {
        let nodes = Query::new(NODES, RawDocumentBuf::new())
            .only(rawdoc! { "k": 1, "st": 1, "ls": 1 })
            .after(time);
        self.positions(&self.commands.find(nodes).await?)?
            .ok_or(StoreError::Fenced)
    }

    /// How far the logs of these nodes have come; `None` if this one is not up.
    fn positions(&self, nodes: &[RawDocumentBuf]) -> Result<Option<Vec<LogPosition>>, StoreError> {
        let mut positions = Vec::with_capacity(nodes.len());
        let mut is_up = false;
        for node in nodes {
            let fields = Document::new("a node", node);
            let position = LogPosition {
                node: fields.node("_id")?,
                entry: fields.long("k")?.cast_unsigned(),
            };
            is_up |= position.node == self.node
                && fields.text("st")? == "up"
                && fields.document("ls")? == Some(&**self.run);
            positions.push(position);
        }
        Ok(is_up.then_some(positions))
    }

    async fn write_plain(
        &self,
        changes: &InboxChanges<'_>,
    ) -> Result<Option<Timestamp>, StoreError> {
        let mut put = Vec::new();
        let mut shortened = Vec::new();
        let mut removed = Vec::new();
        for ((session, key), change) in changes {
            match change {
                InboxChange::Put { chunk, .. } => put.push((*session, *chunk)),
                InboxChange::Shorten(chunk) => shortened.push(shorten(*session, chunk)),
                InboxChange::Remove(_) => removed.push(delete(inbox_query(*session, *key))),
            }
        }
        // What is lost with the primary would only be delivered again, marked as a duplicate. But
        // whoever reads afterwards waits for the majority, and that comes sooner if it is asked for.
        let (inserted, shortened, removed) = tokio::try_join!(
            self.insert_chunks(&put),
            self.commands.write_all(Verb::Update, INBOX, &shortened),
            self.commands.write_all(Verb::Delete, INBOX, &removed),
        )?;
        Ok(inserted.max(shortened.time).max(removed.time))
    }

    /// Adds chunks, and replaces those that are there already.
    async fn insert_chunks(
        &self,
        chunks: &[(SessionId, &Chunk)],
    ) -> Result<Option<Timestamp>, StoreError> {
        let documents = chunks
            .iter()
            .map(|(session, chunk)| chunk_document(*session, chunk));
        let documents: Vec<_> = documents.collect();
        let inserted = self.commands.write_all(Verb::Insert, INBOX, &documents);
        let inserted = inserted.await?;
        if !chunks.is_empty() {
            failpoint::reach("after_insert");
        }
        let taken = inserted.duplicates.iter().map(|place| chunks[*place]);
        // One that was there and is not any more has been delivered: it is not made again.
        let replacements = taken.map(|(session, chunk)| shorten(session, chunk));
        let replacements: Vec<_> = replacements.collect();
        let replaced = self.commands.write_all(Verb::Update, INBOX, &replacements);
        Ok(inserted.time.max(replaced.await?.time))
    }

    /// Writes all of `batch` or nothing, but leaves out what belongs to sessions that are lost, and
    /// returns those.
    async fn write_together<'a>(
        &self,
        changes: &Arc<Vec<Change>>,
        batch: Batch<'a>,
        messages: &'a Messages,
    ) -> Result<Outcome, StoreError> {
        if batch.is_empty() {
            return Ok(Outcome::Committed(Committed::default()));
        }
        let mut transactions = self.transactions.lock().await;
        if let Some(committed) = self.finish_last(&mut transactions, changes).await? {
            return Ok(Outcome::Committed(committed));
        }
        let mut together = Together {
            holds: self.held.of(batch.sessions.keys().copied()),
            batch,
            lost: Vec::new(),
            may_be_there: false,
            messages,
        };
        together.leave_out_lost();
        let deadline = Instant::now() + self.timeout;
        let mut wait = CONFLICT_WAIT;
        while !together.batch.is_empty() {
            match self.attempt(&mut transactions.session, &together).await {
                Ok(staged) => {
                    transactions.last = Some(Last {
                        changes: changes.clone(),
                        committed: Committed {
                            lost: together.lost.clone(),
                            logged: staged.logged.clone(),
                            time: None,
                        },
                        unknown: Some(staged),
                    });
                    if let Some(committed) = self.finish_last(&mut transactions, changes).await? {
                        return Ok(Outcome::Committed(committed));
                    }
                }
                Err(Refusal::Sessions) => {
                    let taken = self.find_taken(&together).await?;
                    for session in &taken {
                        if let Some(hold) = together.holds.get(session) {
                            self.held.lose(*session, hold);
                        }
                    }
                    together.leave_out(taken);
                }
                Err(Refusal::TooLarge(session)) => {
                    tracing::warn!(event = "session_too_large", session = ?session);
                    together.leave_out(vec![session]);
                }
                Err(Refusal::Behind(positions)) => return Ok(Outcome::Behind(positions)),
                Err(Refusal::Node) => self.read_own_log_position().await?,
                Err(Refusal::Failure(Failure::Duplicate)) => {
                    together.may_be_there = true;
                    self.read_own_log_position().await?;
                }
                Err(Refusal::Failure(Failure::Conflict | Failure::Exists)) => {}
                Err(Refusal::Failure(
                    failure @ (Failure::Store(_) | Failure::TooLarge(_) | Failure::TooSlow),
                )) => {
                    return Err(failure.into());
                }
            }
            if Instant::now() + wait > deadline {
                return Err(Failure::Conflict.into());
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(CONFLICT_WAIT_MAX);
        }
        Ok(Outcome::Committed(Committed {
            lost: together.lost,
            ..Committed::default()
        }))
    }

    /// Commits the last transaction, if it is not known to be committed. Returns what it came to if
    /// it was about `changes`, and `None` if that has still to be written.
    ///
    /// # Errors
    /// `StoreError` if it is still not known.
    async fn finish_last(
        &self,
        transactions: &mut Transactions,
        changes: &Arc<Vec<Change>>,
    ) -> Result<Option<Committed>, StoreError> {
        let Transactions { session, last } = transactions;
        let Some(finished) = last else {
            return Ok(None);
        };
        if finished.unknown.is_some() {
            failpoint::reach("before_commit");
            match self.commit(session).await {
                Ok(time) => {
                    failpoint::reach("after_commit");
                    finished.committed.time = time;
                }
                Err(Failure::Conflict) => {
                    *last = None;
                    return Ok(None);
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        if let Some(staged) = finished.unknown.take() {
            self.adopt(staged);
        }
        let is_same = Arc::ptr_eq(&finished.changes, changes);
        Ok(is_same.then(|| finished.committed.clone()))
    }

    /// # Errors
    /// `Conflict` if the transaction counts for nothing; after anything else it may be committed.
    async fn commit(&self, session: &mut ClientSession) -> Result<Option<Timestamp>, Failure> {
        let deadline = Instant::now() + self.timeout;
        loop {
            match self.commands.in_time(session.commit_transaction()).await? {
                Ok(()) => return Ok(session.operation_time()),
                Err(error)
                    if error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT)
                        && Instant::now() < deadline =>
                {
                    tokio::time::sleep(CONFLICT_WAIT_MAX).await;
                }
                Err(error) => return Err(self.commands.failure(&error)),
            }
        }
    }

    fn adopt(&self, staged: Staged) {
        *self.log_entry.lock() += staged.logged.len() as u64;
        for (session, hold) in staged.holds {
            match hold {
                Some(hold) => self.held.insert(session, hold),
                None => self.held.remove(session),
            }
        }
    }

    /// Finds out what the last entry of this node's log is.
    async fn read_own_log_position(&self) -> Result<(), StoreError> {
        let positions = self.log_positions(None).await?;
        let own = positions.iter().find(|position| position.node == self.node);
        *self.log_entry.lock() = own.ok_or(StoreError::Fenced)?.entry;
        Ok(())
    }

    /// The sessions that other nodes have taken, or that have ended.
    async fn find_taken(&self, together: &Together<'_>) -> Result<Vec<SessionId>, StoreError> {
        let sessions = together.batch.sessions.keys();
        let held: Vec<_> = sessions
            .filter_map(|session| Some((*session, together.holds.get(session)?)))
            .collect();
        let mut taken = Vec::new();
        for held in held.chunks(KEYS_MAX) {
            let keys = held.iter().filter_map(|(_, hold)| match hold {
                Hold::Session(held) => Some(&*held.key),
                Hold::Leftover { key, .. } => Some(&**key),
                Hold::Lost => None,
            });
            let query = Query::new(SESSIONS, rawdoc! { "_id": { "$in": array(keys) } })
                .only(rawdoc! { "sid": 1, "e": 1, "og.id": 1 });
            let mut current = HashMap::new();
            let read = |document: &bson::raw::RawDocument| {
                let fields = Document::new("a session", document);
                if let Some(session) = fields.session("sid")? {
                    current.insert(session, Some(fields.long("e")?.cast_unsigned()));
                }
                for leftover in fields.array("og")? {
                    let leftover = Document::new("a session", leftover).session("id")?;
                    current.extend(leftover.map(|leftover| (leftover, None)));
                }
                Ok(())
            };
            self.commands.for_each(query, read).await?;
            taken.extend(held.iter().filter_map(|(session, hold)| {
                let is_taken = match hold {
                    Hold::Session(held) => current.get(session) != Some(&Some(held.epoch)),
                    Hold::Leftover { .. } => current.get(session) != Some(&None),
                    Hold::Lost => true,
                };
                is_taken.then_some(*session)
            }));
        }
        Ok(taken)
    }

    /// Sends everything of a transaction but its commit.
    async fn attempt(
        &self,
        session: &mut ClientSession,
        together: &Together<'_>,
    ) -> Result<Staged, Refusal> {
        let begin = session
            .start_transaction()
            .read_concern(ReadConcern::majority())
            .write_concern(WriteConcern::majority());
        begin
            .await
            .map_err(|error| Refusal::Failure(self.commands.failure(&error)))?;
        let staged = self.stage(session, together).await;
        if staged.is_err() {
            let aborted = self.commands.in_time(session.abort_transaction()).await;
            // The server forgets one that is never ended as well, only later.
            if let Err(failure) = aborted {
                tracing::debug!(?failure, "transaction_abort_failed");
            }
        }
        staged
    }

    async fn stage(
        &self,
        session: &mut ClientSession,
        together: &Together<'_>,
    ) -> Result<Staged, Refusal> {
        if let Messages::MatchedTo(followed) = together.messages {
            self.stage_version_read(session, followed).await?;
        }
        let batch = &together.batch;
        let mut part = SessionPart::default();
        self.stage_creations(session, together, &mut part).await?;
        for (id, changes) in &batch.sessions {
            match together.holds.get(id) {
                Some(Hold::Session(held)) => part.change(*id, held, changes, self.node),
                Some(Hold::Leftover { key, ended }) => part.finish(*id, key, *ended, changes),
                Some(Hold::Lost) | None => {}
            }
        }

        self.stage_inbox(session, batch, together.may_be_there)
            .await?;
        self.stage_exchanges(session, batch).await?;
        let ended = part.ended.iter().map(|ended| {
            let mark = rawdoc! { "$set": {
                "at": { "$ifNull": ["$at", "$$NOW"] },
                "swept": { "$ifNull": ["$swept", false] },
            } };
            update(rawdoc! { "_id": binary(ended.0) }, array([mark]), true)
        });
        self.send(session, Verb::Update, GARBAGE, ended).await?;
        let position = LogPosition {
            node: self.node,
            entry: *self.log_entry.lock(),
        };
        let (logged, entries) = log::entries(position, part.log);
        self.send(session, Verb::Insert, SUBLOG, entries).await?;

        let is_too_large =
            |(_, statement): &&(_, RawDocumentBuf)| statement.as_bytes().len() > DOCUMENT_BYTES_MAX;
        if let Some((id, _)) = part.updates.iter().find(is_too_large) {
            return Err(Refusal::TooLarge(*id));
        }
        let (ids, updates): (Vec<_>, Vec<_>) = part.updates.into_iter().unzip();
        let matched = match self.send(session, Verb::Update, SESSIONS, updates).await {
            Err(Refusal::Failure(Failure::TooLarge(index))) => {
                return Err(Refusal::TooLarge(ids[index]));
            }
            matched => matched?,
        };
        if matched != ids.len() as i64 {
            return Err(Refusal::Sessions);
        }
        let emptied = part.emptied.into_iter().map(|key| {
            let absent = || rawdoc! { "$exists": false };
            delete(rawdoc! { "_id": &*key, "sid": absent(), "og": absent() })
        });
        self.send(session, Verb::Delete, SESSIONS, emptied).await?;
        if !logged.is_empty() {
            let mut expected = self.itself();
            expected.append(cstr!("k"), position.entry.cast_signed());
            let lengthen = rawdoc! { "$inc": { "k": logged.len() as i64 } };
            let lengthen = [update(expected, lengthen, false)];
            if self.send(session, Verb::Update, NODES, lengthen).await? != 1 {
                return Err(Refusal::Node);
            }
        }
        Ok(Staged {
            holds: part.holds,
            logged,
        })
    }

    /// Sees in the snapshot of the transaction whether other nodes have logged more than was
    /// followed. Read after the commit, it would come too late: the publisher of a message of QoS 2
    /// that repeats it after a crash is answered without another look at who wants it.
    async fn stage_version_read(
        &self,
        session: &mut ClientSession,
        followed: &[LogPosition],
    ) -> Result<(), Refusal> {
        let find = rawdoc! {
            "find": NODES,
            "projection": { "k": 1, "st": 1, "ls": 1 },
            "batchSize": i64::from(i32::MAX),
            "singleBatch": true,
        };
        let nodes = self.commands.find_in(session, find).await;
        let nodes = nodes.map_err(Refusal::Failure)?;
        let positions = self.positions(&nodes);
        let positions = positions.map_err(|error| Refusal::Failure(error.into()))?;
        let positions = positions.ok_or(Refusal::Node)?;
        let is_new = |position: &LogPosition| {
            let mut known = followed.iter();
            let known = known.find(|known| known.node == position.node);
            position.node != self.node && position.entry > known.map_or(0, |known| known.entry)
        };
        if positions.iter().any(is_new) {
            return Err(Refusal::Behind(positions));
        }
        Ok(())
    }

    async fn send(
        &self,
        session: &mut ClientSession,
        verb: Verb,
        collection: &'static str,
        items: impl IntoIterator<Item = RawDocumentBuf>,
    ) -> Result<i64, Refusal> {
        let mut matched = 0;
        for batch in write_commands(verb, collection, items, Concern::OfTransaction) {
            let written = self.commands.write_in(session, batch.command).await;
            let written = written.map_err(|failure| match failure {
                Failure::TooLarge(index) => Failure::TooLarge(batch.first + index),
                other => other,
            });
            matched += written.map_err(Refusal::Failure)?.matched;
        }
        Ok(matched)
    }

    /// Takes the documents of sessions that this node saves without holding them.
    async fn stage_creations(
        &self,
        session: &mut ClientSession,
        together: &Together<'_>,
        part: &mut SessionPart,
    ) -> Result<(), Refusal> {
        let sessions = together.batch.sessions.iter();
        let created: Vec<_> = sessions
            .filter(|(id, _)| !together.holds.contains_key(*id))
            .filter_map(|(_, changes)| Some((format::owner_key(&changes.saved?.owner), changes)))
            .collect();
        for created in created.chunks(KEYS_MAX) {
            let keys = created.iter().map(|(key, _)| &**key);
            let find = rawdoc! {
                "find": SESSIONS,
                "filter": { "_id": { "$in": array(keys) } },
                "projection": { "sid": 1, "e": 1 },
                "batchSize": KEYS_MAX as i64,
                "singleBatch": true,
            };
            let found = self.commands.find_in(session, find).await;
            let mut current = HashMap::new();
            for document in found.map_err(Refusal::Failure)? {
                let fields = Document::new("a session", &document);
                let read = || {
                    let epoch = fields.long("e")?.cast_unsigned();
                    Ok((
                        fields.text("_id")?.to_owned(),
                        (fields.session("sid")?, epoch),
                    ))
                };
                current
                    .extend([read().map_err(|error: StoreError| Refusal::Failure(error.into()))?]);
            }
            for (key, changes) in created {
                if let Some(record) = changes.saved {
                    part.create(
                        key,
                        record,
                        changes,
                        current.get(&**key).copied(),
                        self.node,
                    );
                }
            }
        }
        Ok(())
    }

    async fn stage_inbox(
        &self,
        session: &mut ClientSession,
        batch: &Batch<'_>,
        may_be_there: bool,
    ) -> Result<(), Refusal> {
        let put = || {
            batch
                .inbox
                .iter()
                .filter_map(|((id, _), change)| match change {
                    InboxChange::Put { chunk, .. } => Some((*id, *chunk)),
                    InboxChange::Shorten(_) | InboxChange::Remove(_) => None,
                })
        };
        if may_be_there {
            let replacements = put().map(|(id, chunk)| {
                update(inbox_query(id, chunk.key), chunk_document(id, chunk), true)
            });
            self.send(session, Verb::Update, INBOX, replacements)
                .await?;
        } else {
            let documents = put().map(|(id, chunk)| chunk_document(id, chunk));
            self.send(session, Verb::Insert, INBOX, documents).await?;
        }
        let shortened = batch
            .inbox
            .iter()
            .filter_map(|((id, _), change)| match change {
                InboxChange::Shorten(chunk) => Some(shorten(*id, chunk)),
                InboxChange::Put { .. } | InboxChange::Remove(_) => None,
            });
        self.send(session, Verb::Update, INBOX, shortened).await?;
        let removed = batch
            .inbox
            .iter()
            .filter_map(|((id, key), change)| match change {
                InboxChange::Remove(_) => Some(delete(inbox_query(*id, *key))),
                InboxChange::Put { .. } | InboxChange::Shorten(_) => None,
            });
        self.send(session, Verb::Delete, INBOX, removed).await?;
        Ok(())
    }

    async fn stage_exchanges(
        &self,
        session: &mut ClientSession,
        batch: &Batch<'_>,
    ) -> Result<(), Refusal> {
        let mut saved = Vec::new();
        let mut ended = Vec::new();
        let mut awaited = Vec::new();
        let mut released = Vec::new();
        for (id, changes) in &batch.sessions {
            let key = |packet_id| rawdoc! { "_id": binary(format::packet_key(*id, packet_id)) };
            for (packet_id, exchange) in &changes.exchanges {
                match exchange {
                    Some(exchange) => {
                        let value = rawdoc! {
                            "$set": { "b": binary(format::exchange_value(exchange)) },
                        };
                        saved.push(update(key(*packet_id), value, true));
                    }
                    None => ended.push(delete(key(*packet_id))),
                }
            }
            for (packet_id, is_awaiting) in &changes.awaiting {
                if *is_awaiting {
                    awaited.push(update(key(*packet_id), key(*packet_id), true));
                } else {
                    released.push(delete(key(*packet_id)));
                }
            }
        }
        self.send(session, Verb::Update, EXCHANGES, saved).await?;
        self.send(session, Verb::Delete, EXCHANGES, ended).await?;
        self.send(session, Verb::Update, AWAITING, awaited).await?;
        self.send(session, Verb::Delete, AWAITING, released).await?;
        Ok(())
    }
}

impl Together<'_> {
    /// Leaves out what is to sessions that this node does not hold and does not save.
    fn leave_out_lost(&mut self) {
        let sessions = self.batch.sessions.iter();
        let lost = sessions.filter(|(session, changes)| match self.holds.get(*session) {
            Some(Hold::Session(_) | Hold::Leftover { .. }) => false,
            Some(Hold::Lost) => true,
            None => changes.saved.is_none(),
        });
        let lost = lost.map(|(session, _)| *session).collect();
        self.leave_out(lost);
    }

    fn leave_out(&mut self, lost: Vec<SessionId>) {
        self.batch.leave_out(&lost);
        self.lost.extend(lost);
    }
}

impl SessionPart {
    /// A session that this node holds.
    fn change(&mut self, id: SessionId, held: &Held, changes: &SessionChanges<'_>, node: u32) {
        let query = rawdoc! {
            "_id": &*held.key,
            "sid": binary(id.0),
            "e": held.epoch.cast_signed(),
        };
        if changes.ended {
            // What is left over of earlier incarnations stays, and so does the epoch with it.
            let emptied = rawdoc! { "$replaceWith": {
                "_id": "$_id",
                "e": { "$add": ["$e", 1_i64] },
                "og": "$og",
            } };
            self.updates
                .push((id, update(query, array([emptied]), false)));
            self.emptied.push(held.key.clone());
            if held.is_known_to_others {
                self.log(id, held.epoch, LogAction::End);
            }
            self.ended.push(id);
            self.holds.push((id, None));
            return;
        }
        let mut fields = Fields::default();
        if let Some(record) = changes.saved {
            fields.put_record(record, node);
        }
        for (filter, options) in &changes.subscriptions {
            let value = options.map(|(options, identifier)| {
                binary(format::subscription_value(filter, options, identifier))
            });
            fields.put(subscription_field(filter), value);
        }
        self.updates
            .push((id, update(query, fields.into_session_update(), false)));
        let new_group = changes.saved.and_then(|record| match &record.owner {
            Owner::Group(filter) if !held.is_known_to_others => Some(filter),
            Owner::Group(_) | Owner::Client(_) => None,
        });
        if new_group.is_some() || !changes.subscriptions.is_empty() {
            if let Some(filter) = new_group {
                self.log(id, held.epoch, LogAction::OpenGroup(filter.clone()));
            }
            self.log_subscriptions(id, held, changes);
            let known = Held {
                is_known_to_others: true,
                ..held.clone()
            };
            self.holds.push((id, Some(Hold::Session(known))));
        }
    }

    /// A session that this node takes as it saves it; `current` is the incarnation that is there,
    /// and its epoch.
    fn create(
        &mut self,
        key: &Arc<str>,
        record: &SessionRecord,
        changes: &SessionChanges<'_>,
        current: Option<(Option<SessionId>, u64)>,
        node: u32,
    ) {
        let id = record.session;
        let (incarnation, epoch) = current.unwrap_or_default();
        let held = Held {
            key: key.clone(),
            epoch: epoch + 1,
            is_known_to_others: true,
        };
        let mut query = rawdoc! { "_id": &**key };
        match current {
            Some(_) => query.append(cstr!("e"), epoch.cast_signed()),
            None => query.append(cstr!("e"), rawdoc! { "$exists": false }),
        }
        let mut fields = Fields::default();
        fields.put(cstr!("sid"), Some(binary(id.0)));
        fields.put(cstr!("e"), Some(held.epoch.cast_signed()));
        fields.put_record(record, node);
        let subscriptions = changes.subscriptions.iter().map(|(filter, options)| {
            let value = options.map(|(options, identifier)| {
                binary(format::subscription_value(filter, options, identifier))
            });
            (subscription_field(filter), value)
        });
        if incarnation == Some(id) {
            subscriptions.for_each(|(field, value)| fields.put(field, value));
        } else {
            let stored: RawDocumentBuf = subscriptions
                .filter_map(|(field, value)| Some((last_part(&field), value?)))
                .collect();
            fields.put(cstr!("s"), Some(stored));
            if let Some(old) = incarnation {
                self.log(old, epoch, LogAction::End);
                self.ended.push(old);
                self.holds.push((old, None));
            }
            if let Owner::Group(filter) = &record.owner {
                self.log(id, held.epoch, LogAction::OpenGroup(filter.clone()));
            }
        }
        let take = update(query, fields.into_session_update(), current.is_none());
        self.updates.push((id, take));
        self.log_subscriptions(id, &held, changes);
        self.holds.push((id, Some(Hold::Session(held))));
    }

    /// What was left over, of an incarnation that has ended or of one that goes on, and is now
    /// dealt with if `changes` end it.
    fn finish(&mut self, id: SessionId, key: &Arc<str>, ended: bool, changes: &SessionChanges<'_>) {
        let query = rawdoc! { "_id": &**key, "og.id": binary(id.0) };
        if !changes.ended {
            let touch = Fields::default().into_session_update();
            self.updates.push((id, update(query, touch, false)));
            return;
        }
        let others = rawdoc! { "$filter": {
            "input": "$og",
            "cond": { "$ne": ["$$this.id", binary(id.0)] },
        } };
        let stages = [
            rawdoc! { "$set": { "og": others } },
            rawdoc! { "$set": {
                "og": { "$cond": [{ "$eq": ["$og", []] }, "$$REMOVE", "$og"] },
            } },
        ];
        self.updates.push((id, update(query, array(stages), false)));
        self.emptied.push(key.clone());
        self.holds.push((id, None));
        if ended {
            self.log(id, 0, LogAction::End);
            self.ended.push(id);
        }
    }

    fn log_subscriptions(&mut self, id: SessionId, held: &Held, changes: &SessionChanges<'_>) {
        let Some(owner) = format::read_owner_key(&held.key).ok() else {
            return;
        };
        for (filter, options) in &changes.subscriptions {
            let filter: SubscriptionFilter = (*filter).clone();
            let action = match *options {
                Some((options, identifier)) => LogAction::Subscribe {
                    owner: owner.clone(),
                    filter,
                    options,
                    identifier,
                },
                None => LogAction::Unsubscribe(filter),
            };
            self.log(id, held.epoch, action);
        }
    }

    fn log(&mut self, session: SessionId, epoch: u64, action: LogAction) {
        self.log.push(LogOp {
            session,
            epoch,
            action,
        });
    }
}

/// The name of a subscription inside of `s`.
fn last_part(field: &CString) -> CString {
    super::commands::field(field.as_str().trim_start_matches("s.").to_owned())
}

fn inbox_query(session: SessionId, key: MessageId) -> RawDocumentBuf {
    rawdoc! { "_id": binary(format::inbox_key(session, key)) }
}

/// Replaces a chunk, if it is there.
fn shorten(session: SessionId, chunk: &Chunk) -> RawDocumentBuf {
    let (value, expires_at) = chunk_fields(&chunk.entries);
    let mut fields = Fields::default();
    fields.put(cstr!("b"), Some(value));
    fields.put(cstr!("x"), expires_at);
    update(inbox_query(session, chunk.key), fields.into_update(), false)
}
