//! How much there is of everything, roughly and cheaply: what the server counts anyway, an index, and a
//! sample.

use std::time::Duration;

use bson::{cstr, rawdoc};

use super::commands::{Query, binary, integer};
use super::documents::{INBOX, RETAINED, SESSIONS, read_chunk};
use super::{MongoStore, milestones};
use crate::store::{MessageId, SessionId, StoreError, format};

/// Chunks of inboxes that are looked into. All of them, if there are not more.
const SAMPLE_CHUNKS: i64 = 100;

/// How long the server may look for them. There may be few among many that have been deleted.
const SAMPLE_TIME: Duration = Duration::from_millis(50);

/// What is in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Estimates {
    pub(crate) sessions_online: u64,
    pub(crate) sessions_offline: u64,
    /// In inboxes. Of many, as many as the chunks would hold if all were like those of a sample, or
    /// had one each if that took too long to find.
    pub(crate) messages: u64,
    /// Those that have expired and are not yet removed included.
    pub(crate) retained: u64,
    /// Of their topics, payloads and properties; in MongoDB with the names of the fields around them.
    pub(crate) retained_bytes: u64,
}

impl MongoStore {
    /// Counts what is in the store, as far as that costs little.
    ///
    /// # Errors
    /// `StoreError` if the server does not answer.
    pub(crate) async fn estimates(&self) -> Result<Estimates, StoreError> {
        let online = rawdoc! {
            "count": SESSIONS,
            "query": { "c": true, "n": { "$gte": 0 } },
            "hint": { "n": 1 },
        };
        let online = self.count(online).await?;
        let sessions = self.count(rawdoc! { "count": SESSIONS }).await?;
        let chunks = self.count(rawdoc! { "count": INBOX }).await?;
        let retained = self.count(rawdoc! { "count": RETAINED }).await?;
        Ok(Estimates {
            sessions_online: online,
            sessions_offline: sessions.saturating_sub(online),
            messages: self
                .messages_in(chunks.saturating_sub(milestones::MILESTONES.into()))
                .await?,
            retained,
            retained_bytes: self.bytes_of(RETAINED).await?,
        })
    }

    /// What the server knows without reading the collection.
    async fn bytes_of(&self, collection: &str) -> Result<u64, StoreError> {
        let answer = self
            .commands
            .run(rawdoc! { "collStats": collection })
            .await?;
        // Absent as long as there is no such collection.
        let bytes = integer(&answer, "size").unwrap_or(0);
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    async fn count(&self, command: bson::raw::RawDocumentBuf) -> Result<u64, StoreError> {
        let answer = self.commands.run(command).await?;
        let count = integer(&answer, "n").ok_or(StoreError::Damaged { what: "a count" })?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    async fn messages_in(&self, chunks: u64) -> Result<u64, StoreError> {
        if chunks == 0 {
            return Ok(0);
        }
        let Some((sampled, messages)) = self.sample().await? else {
            return Ok(chunks);
        };
        if sampled == 0 {
            return Ok(0);
        }
        Ok(messages * chunks.max(sampled) / sampled)
    }

    /// Chunks behind a random place among the inboxes, and before it if there are too few, and the
    /// messages that they have; `None` if they are too hard to find.
    async fn sample(&self) -> Result<Option<(u64, u64)>, StoreError> {
        let begin = binary(format::inbox_key(SessionId::random(), MessageId::MIN));
        let (mut sampled, mut messages) = (0, 0);
        for range in [rawdoc! { "$gte": begin.clone() }, rawdoc! { "$lt": begin }] {
            let mut wanted = milestones::except();
            wanted.append(cstr!("_id"), range);
            let wanted = Query::new(INBOX, wanted).limit(SAMPLE_CHUNKS - sampled);
            let Some(found) = self.commands.find_within(SAMPLE_TIME, wanted).await? else {
                return Ok(None);
            };
            for document in found {
                sampled += 1;
                messages += read_chunk(&document)?.entries.len() as u64;
            }
            if sampled == SAMPLE_CHUNKS {
                break;
            }
        }
        Ok(Some((sampled.unsigned_abs(), messages)))
    }
}
