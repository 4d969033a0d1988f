//! Filling an empty database with what another store has.
//!
//! A document in `meta` says that it is being filled. Nodes look for it before they load anything and
//! after they have joined, and whoever fills looks for nodes after it has made it: one of the two
//! gives way. It stays until everything is there, so what an import that was cut short has left is
//! never served, and can be thrown away by the next one.

use std::sync::Arc;
use std::time::Duration;

use bson::raw::RawDocumentBuf;
use bson::{RawBson, cstr, rawdoc};
use hashbrown::HashMap;

use super::commands::{Query, Verb, binary, delete, update};
use super::documents::{
    AWAITING, Document, EXCHANGES, GARBAGE, INBOX, META, NODES, RETAINED, SESSIONS, SUBLOG,
    read_chunk, unix_ms,
};
use super::{MongoOptions, MongoStore, PAGE_CHUNKS, milestones, schema};
use crate::store::{Chunk, MessageId, SessionId, StoreError, format};

/// The document in `meta`. `filling` is false until it is certain that nobody else is there.
const IMPORT: &str = "import";

/// How long a node that does not count is taken for alive.
const SILENT_AFTER: Duration = Duration::from_secs(6);

/// Between two looks at the other nodes.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Everything that an import may have left.
const FILLED: [&str; 7] = [
    SESSIONS, SUBLOG, INBOX, EXCHANGES, AWAITING, RETAINED, GARBAGE,
];

impl MongoStore {
    /// Joins the cluster in order to fill its database. Nothing must be written before
    /// [`MongoStore::begin_import`].
    ///
    /// # Errors
    /// As [`MongoStore::connect`], but for a database that is being filled.
    pub(crate) async fn connect_for_import(options: MongoOptions) -> Result<Arc<Self>, StoreError> {
        let store = Self::reach(options).await?;
        store.enter(0).await?;
        Ok(store)
    }

    /// Makes the database this node's alone, and empties it of what an unfinished import has left.
    /// Meanwhile, and until the import is finished, the node must send heartbeats.
    ///
    /// # Errors
    /// `Unusable` if another node uses the database, or has put something into it.
    pub(crate) async fn begin_import(&self) -> Result<(), StoreError> {
        let is_partial = self.import_mark().await? == Some(true);
        self.verify_unused(is_partial).await?;
        self.write_mark(rawdoc! { "$setOnInsert": { "filling": false } })
            .await?;
        if let Err(error) = self.verify_unused(is_partial).await {
            if !is_partial {
                self.finish_import().await?;
            }
            return Err(error);
        }
        self.write_mark(rawdoc! { "$set": { "filling": true } })
            .await?;
        if is_partial {
            for collection in FILLED {
                let drop = rawdoc! { "drop": collection, "writeConcern": { "w": "majority" } };
                self.commands.run(drop).await.map_err(StoreError::from)?;
            }
            schema::prepare(&self.commands).await?;
        }
        Ok(())
    }

    /// Lets nodes use the database.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown.
    pub(crate) async fn finish_import(&self) -> Result<(), StoreError> {
        let mark = [delete(rawdoc! { "_id": IMPORT })];
        self.commands.write_all(Verb::Delete, META, &mark).await?;
        Ok(())
    }

    /// Fails if an import into this database was not finished.
    pub(super) async fn verify_complete(&self) -> Result<(), StoreError> {
        match self.import_mark().await? {
            None => Ok(()),
            Some(_) => Err(self.commands.unusable(
                "`midge store copy` into this database is under way or was interrupted: let it \
                 finish, or run it again",
            )),
        }
    }

    /// What the server's clock says, which decides whether something has expired.
    ///
    /// # Errors
    /// `StoreError` if it does not answer.
    pub(crate) async fn now_ms(&self) -> Result<u64, StoreError> {
        Ok(unix_ms(self.commands.now().await?))
    }

    /// Chunks of all inboxes in the order of their keys, from the first that follows `after`; none
    /// if there are no more.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn read_inboxes(
        &self,
        after: Option<(SessionId, MessageId)>,
    ) -> Result<Vec<(SessionId, Chunk)>, StoreError> {
        let mut keys = milestones::except();
        if let Some((session, key)) = after {
            let after = binary(format::inbox_key(session, key));
            keys.append(cstr!("_id"), rawdoc! { "$gt": after });
        }
        let page = Query::new(INBOX, keys).limit(PAGE_CHUNKS);
        let mut chunks = Vec::new();
        for document in self.commands.find(page).await? {
            let key = Document::new("a chunk", &document).required_bytes("_id")?;
            let (session, _) = format::read_inbox_key(key)?;
            chunks.push((session, read_chunk(&document)?));
        }
        Ok(chunks)
    }

    /// Whether there is an import, and if so, whether it has begun to fill.
    async fn import_mark(&self) -> Result<Option<bool>, StoreError> {
        let mark = Query::new(META, rawdoc! { "_id": IMPORT }).limit(1);
        let found = self.commands.find(mark).await?;
        found
            .first()
            .map(|mark| Document::new("the mark of an import", mark).flag("filling"))
            .transpose()
    }

    async fn write_mark(&self, change: RawDocumentBuf) -> Result<(), StoreError> {
        let mark = [update(rawdoc! { "_id": IMPORT }, change, true)];
        self.commands.write_all(Verb::Update, META, &mark).await?;
        Ok(())
    }

    /// Fails if a node uses the database; nodes that have gone without a word are declared dead.
    /// Unless what is there is left from an import, it fails also if there is anything.
    async fn verify_unused(&self, is_partial: bool) -> Result<(), StoreError> {
        if !is_partial {
            for (collection, filter, what) in [
                (SESSIONS, RawDocumentBuf::new(), "sessions"),
                (INBOX, milestones::except(), "messages"),
                (
                    RETAINED,
                    rawdoc! { "b": { "$ne": RawBson::Null } },
                    "retained messages",
                ),
            ] {
                let any = Query::new(collection, filter)
                    .only(rawdoc! { "_id": 1 })
                    .limit(1);
                if !self.commands.find(any).await?.is_empty() {
                    return Err(self.commands.unusable(format!(
                        "this database already has {what}: choose another one with \
                         store.database, or drop it first"
                    )));
                }
            }
        }
        let mut counted = HashMap::new();
        loop {
            let others = rawdoc! { "_id": { "$ne": i64::from(self.node) }, "st": "up" };
            let others = self.commands.find(Query::new(NODES, others)).await?;
            if others.is_empty() {
                return Ok(());
            }
            let now = self.now_ms().await?;
            for other in &others {
                let fields = Document::new("a node", other);
                let (node, beats) = (fields.node("_id")?, fields.long("hbn")?.cast_unsigned());
                let beat_at = fields.date("hb")?.map_or(0, unix_ms);
                if *counted.entry(node).or_insert(beats) != beats {
                    return Err(self.commands.unusable(format!(
                        "the node `{}` uses this database, or another copy into it is under way",
                        fields.text("name")?
                    )));
                }
                if now.saturating_sub(beat_at) >= SILENT_AFTER.as_millis() as u64 {
                    self.declare_dead(node, beats).await?;
                    self.end_transactions_of(node).await?;
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}
