//! Removing what ended sessions left behind, and the documents of nodes that are gone.

use std::time::Duration;

use bson::raw::{RawArrayBuf, RawDocument, RawDocumentBuf};
use bson::{DateTime, rawdoc};
use tokio::time::Instant;

use super::MongoStore;
use super::commands::{Concern, Query, Verb, array, binary, delete, update, write_commands};
use super::documents::{
    AWAITING, Document, EXCHANGES, GARBAGE, INBOX, NODES, SESSIONS, all_of, packets_of,
};
use super::log::LOG_SECONDS;
use crate::store::{SessionId, StoreError};

/// After this, no flush is under way any more that did not know of the end of a session.
const FIRST_SWEEP_MS: i64 = 60_000;
/// After this, not even one of a node that was stopped for a while.
const LAST_SWEEP_MS: i64 = 600_000;

/// How long the document of a node stays after the node is gone, and after the last entry of its log
/// has been removed: by then all others have read that.
const SILENT_MS: i64 = 600_000;

/// How long one call goes on.
const COLLECTION_TIME: Duration = Duration::from_secs(10);

/// Sessions that are swept at a time, and documents that one command removes.
const SESSIONS_MAX: i64 = 100;
const DOCUMENTS_MAX: i64 = 1000;

impl MongoStore {
    /// Does a part of what there is to remove; any node may, at any time.
    ///
    /// # Errors
    /// `StoreError` if it could not be finished; the rest stays for another time.
    pub(crate) async fn collect_garbage(&self) -> Result<(), StoreError> {
        let now = self.commands.now().await?.timestamp_millis();
        let before = |ms: i64| DateTime::from_millis(now - ms);
        let begun = Instant::now();
        for (was_swept, ms) in [(false, FIRST_SWEEP_MS), (true, LAST_SWEEP_MS)] {
            let marks = rawdoc! { "swept": was_swept, "at": { "$lte": before(ms) } };
            while begun.elapsed() < COLLECTION_TIME {
                let sessions = self.garbage(marks.clone()).await?;
                self.sweep(&sessions).await?;
                let mark = |session: &SessionId| rawdoc! { "_id": binary(session.0) };
                if was_swept {
                    let removed = sessions.iter().map(|session| delete(mark(session)));
                    self.write_marks(Verb::Delete, removed).await?;
                } else {
                    let swept = || rawdoc! { "$set": { "swept": true } };
                    let swept = sessions
                        .iter()
                        .map(|session| update(mark(session), swept(), false));
                    self.write_marks(Verb::Update, swept).await?;
                }
                if (sessions.len() as i64) < SESSIONS_MAX {
                    break;
                }
            }
        }
        let gone = rawdoc! {
            "st": { "$ne": "up" },
            "$or": [
                { "k": 0_i64, "hb": { "$lte": before(SILENT_MS) } },
                { "hb": { "$lte": before(LOG_SECONDS * 1000 + SILENT_MS) } },
            ],
        };
        self.remove_nodes(gone).await
    }

    /// Removes the documents of nodes, but of none whose sessions still have to be released.
    async fn remove_nodes(&self, gone: RawDocumentBuf) -> Result<(), StoreError> {
        let mut documents = Vec::new();
        for node in self.commands.find(Query::new(NODES, gone)).await? {
            let node = i64::from(Document::new("a node", &node).node("_id")?);
            let connected = rawdoc! { "n": node, "c": true };
            let connected = Query::new(SESSIONS, connected)
                .by(rawdoc! { "n": 1 })
                .limit(1);
            if self.commands.find(connected).await?.is_empty() {
                documents.push(delete(rawdoc! { "_id": node, "st": { "$ne": "up" } }));
            }
        }
        for batch in write_commands(Verb::Delete, NODES, documents, Concern::Majority) {
            self.commands.write(batch.command).await?;
        }
        Ok(())
    }

    async fn garbage(&self, filter: RawDocumentBuf) -> Result<Vec<SessionId>, StoreError> {
        let marks = Query::new(GARBAGE, filter)
            .by(rawdoc! { "swept": 1, "at": 1 })
            .limit(SESSIONS_MAX);
        let mut sessions = Vec::new();
        for mark in self.commands.find(marks).await? {
            sessions.extend(Document::new("a mark of an end", &mark).session("_id")?);
        }
        Ok(sessions)
    }

    async fn write_marks(
        &self,
        verb: Verb,
        statements: impl IntoIterator<Item = RawDocumentBuf>,
    ) -> Result<(), StoreError> {
        for batch in write_commands(verb, GARBAGE, statements, Concern::Majority) {
            self.commands.write(batch.command).await?;
        }
        Ok(())
    }

    /// Removes everything whose key begins with one of `sessions`.
    async fn sweep(&self, sessions: &[SessionId]) -> Result<(), StoreError> {
        if sessions.is_empty() {
            return Ok(());
        }
        let sessions = || sessions.iter().copied();
        self.empty(INBOX, array(sessions().map(all_of))).await?;
        let packets = array(sessions().map(packets_of));
        self.empty(EXCHANGES, packets.clone()).await?;
        self.empty(AWAITING, packets).await
    }

    async fn empty(&self, collection: &'static str, ranges: RawArrayBuf) -> Result<(), StoreError> {
        loop {
            let rows = Query::new(collection, rawdoc! { "$or": ranges.clone() })
                .only(rawdoc! { "_id": 1 })
                .limit(DOCUMENTS_MAX);
            let rows = self.commands.find(rows).await?;
            if rows.is_empty() {
                return Ok(());
            }
            let remove = rows.iter().map(|row| delete(RawDocument::to_owned(row)));
            for batch in write_commands(Verb::Delete, collection, remove, Concern::Majority) {
                self.commands.write(batch.command).await?;
            }
        }
    }
}
