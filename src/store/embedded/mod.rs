//! The store of a single node: a log-structured database in one directory.
//!
//! Owns its directory, one thread that writes ([`writer`]) and one that sweeps away what ended
//! sessions left behind ([`sweeper`]). Reads run beside them on the runtime's blocking threads.
//! Nothing here blocks a runtime worker.
//!
//! Start reading at [`EmbeddedStore`]; the bytes are described in [`mod@format`].

mod format;
mod sweeper;
mod tables;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::{Mutex, RwLock};

use self::tables::Tables;
use self::writer::Writer;
use super::{
    Change, Chunk, InboxRange, Messages, Retained, SessionId, Store, StoreError, Stored,
    StoredSession, Written,
};

/// How much memory and disk the database may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmbeddedOptions {
    /// Blocks of the database kept in memory. Too low: a reconnecting client's inbox comes from disk.
    pub(crate) cache_bytes: u64,
    /// Inbox changes held in memory until they are sorted to disk. Too low: more, smaller files and
    /// stalls; too high: as much memory, up to five times while the disk is behind.
    pub(crate) memtable_bytes: u64,
    /// The log of synced writes on disk; at least 64 MiB. Too high: a slower start after a crash.
    pub(crate) journal_bytes_max: u64,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
            memtable_bytes: 32 << 20,
            journal_bytes_max: 256 << 20,
        }
    }
}

/// Sessions, inboxes and retained messages in a directory that no other process has open.
pub(crate) struct EmbeddedStore {
    path: PathBuf,
    /// Absent once closed. A read holds the lock as long as it lasts, so that closing waits for it.
    tables: Arc<RwLock<Option<Arc<Tables>>>>,
    /// Absent once closed.
    writer: Mutex<Option<Writer>>,
}

impl EmbeddedStore {
    /// Opens the store in the directory `path`, creating both if they are not there. Blocks: it
    /// replays what the last process had only logged.
    ///
    /// # Errors
    /// `InUse` if another process, or another store of this one, has it open; `Unusable` if `path`
    /// is no directory that can be written to or belongs to a newer midge; `Damaged` or `Io` if
    /// its files cannot be read.
    pub(crate) fn open(path: &Path, options: EmbeddedOptions) -> Result<Self, StoreError> {
        let tables = Arc::new(Tables::open(path, options)?);
        let writer = Writer::start(&tables).map_err(|error| StoreError::Unusable {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            tables: Arc::new(RwLock::new(Some(tables))),
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Everything but retained messages, which only [`EmbeddedStore::read_retained`] reads in parts.
    ///
    /// # Errors
    /// `StoreError` if what is stored cannot be read.
    pub(crate) async fn load_sessions(&self) -> Result<Stored, StoreError> {
        let loaded = self.read(load_sessions).await?;
        Ok(loaded.stored)
    }

    /// How many topics have a retained message.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn count_retained(&self) -> Result<u64, StoreError> {
        self.read(|tables| {
            let view = tables.view();
            let mut keys = view.keys(&tables.retained, &[]);
            keys.try_fold(0, |count, key| key.map(|_| count + 1))
        })
        .await
    }

    /// Retained messages in the order of their topics, from the first that follows `after`: as many
    /// as fit into `bytes_max`, but at least one if there is any.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn read_retained(
        &self,
        after: Option<Arc<str>>,
        bytes_max: usize,
    ) -> Result<Vec<Retained>, StoreError> {
        self.read(move |tables| read_retained(tables, after.as_deref(), bytes_max))
            .await
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Tables) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let tables = Arc::clone(&self.tables);
        let reading = tokio::task::spawn_blocking(move || match tables.read().as_deref() {
            Some(tables) => read(tables),
            None => Err(closed()),
        });
        reading
            .await
            .unwrap_or_else(|error| Err(StoreError::Io(error.to_string())))
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn load(&self) -> Result<Stored, StoreError> {
        let Loaded { stored, orphans } = self.read(load).await?;
        if !orphans.is_empty() {
            let ends = orphans.into_iter().map(Change::EndSession);
            self.write(Arc::new(ends.collect()), Messages::Present)
                .await?;
        }
        Ok(stored)
    }

    async fn write(
        &self,
        changes: Arc<Vec<Change>>,
        _messages: Messages,
    ) -> Result<Written, StoreError> {
        let jobs = self
            .writer
            .lock()
            .as_ref()
            .map(Writer::jobs)
            .ok_or_else(closed)?;
        jobs.write(changes).await?;
        Ok(Written::default())
    }

    async fn read_inbox(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
        self.read(move |tables| read_inbox(tables, range)).await
    }

    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn close(&self) {
        let Some(writer) = self.writer.lock().take() else {
            return;
        };
        let tables = Arc::clone(&self.tables);
        let closing = tokio::task::spawn_blocking(move || {
            writer.stop();
            if let Some(tables) = tables.write().take() {
                tables.close();
            }
        });
        if let Err(error) = closing.await {
            tracing::error!(%error, "store_close_failed");
        }
    }
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

fn closed() -> StoreError {
    StoreError::Io("it is closed".to_owned())
}

struct Loaded {
    stored: Stored,
    /// Sessions of which something is left, but neither a record nor a mark for the sweeper: their
    /// last changes were written after they had ended.
    orphans: BTreeSet<SessionId>,
}

fn load(tables: &Tables) -> Result<Loaded, StoreError> {
    let mut loaded = load_sessions(tables)?;
    for row in tables.view().rows(&tables.retained) {
        let retained = format::read_retained_value(&row?.1)?;
        loaded.stored.retained.push(retained);
    }
    Ok(loaded)
}

fn load_sessions(tables: &Tables) -> Result<Loaded, StoreError> {
    let view = tables.view();
    let mut stored = Stored::default();
    for row in view.rows(&tables.sessions) {
        let (key, value) = row?;
        let session = format::read_session(&key)?;
        stored.sessions.push(StoredSession {
            record: format::read_session_value(session, &value)?,
            subscriptions: Vec::new(),
            awaiting_release: Vec::new(),
            exchanges: Vec::new(),
            inbox: super::InboxSummary::default(),
        });
    }

    let mut orphans = BTreeSet::new();
    // The rows came in the order of their keys.
    let mut find = |sessions: &mut Vec<StoredSession>, session: SessionId| {
        let found = sessions
            .binary_search_by_key(&session, |stored| stored.record.session)
            .ok();
        if found.is_none() {
            orphans.insert(session);
        }
        found
    };
    for row in view.rows(&tables.subscriptions) {
        let (key, value) = row?;
        if let Some(at) = find(&mut stored.sessions, format::read_session(&key)?) {
            stored.sessions[at]
                .subscriptions
                .push(format::read_subscription_value(&value)?);
        }
    }
    for row in view.rows(&tables.awaiting) {
        let (session, packet_id) = format::read_packet_key(&row?.0)?;
        if let Some(at) = find(&mut stored.sessions, session) {
            stored.sessions[at].awaiting_release.push(packet_id);
        }
    }
    for row in view.rows(&tables.exchanges) {
        let (key, value) = row?;
        let (session, packet_id) = format::read_packet_key(&key)?;
        if let Some(at) = find(&mut stored.sessions, session) {
            let exchange = format::read_exchange_value(packet_id, &value)?;
            stored.last_hlc = stored.last_hlc.max(exchange.message.hlc);
            stored.sessions[at].exchanges.push(exchange);
        }
    }
    for row in view.rows(&tables.inbox) {
        let (key, value) = row?;
        let (session, key) = format::read_inbox_key(&key)?;
        if let Some(at) = find(&mut stored.sessions, session) {
            let summary = format::read_chunk_summary(&value)?;
            let inbox = &mut stored.sessions[at].inbox;
            inbox.head.get_or_insert(key);
            inbox.messages += u64::from(summary.entries);
            inbox.bytes += summary.message_bytes;
            stored.last_hlc = stored.last_hlc.max(key.hlc);
        }
    }
    for row in view.rows(&tables.garbage) {
        orphans.remove(&format::read_session(&row?.0)?);
    }
    Ok(Loaded { stored, orphans })
}

fn read_inbox(tables: &Tables, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
    let view = tables.view();
    let mut chunks = Vec::new();
    if range.from >= range.before || !view.contains(&tables.sessions, &range.session.0)? {
        return Ok(chunks);
    }
    let from = format::inbox_key(range.session, range.from);
    let before = format::inbox_key(range.session, range.before);
    let mut bytes = 0;
    for row in view.range(&tables.inbox, from..before) {
        let (key, value) = row?;
        bytes += format::read_chunk_summary(&value)?.message_bytes;
        if bytes > range.bytes_max as u64 && !chunks.is_empty() {
            break;
        }
        let (_, key) = format::read_inbox_key(&key)?;
        chunks.push(format::read_chunk_value(key, &value)?);
    }
    Ok(chunks)
}

fn read_retained(
    tables: &Tables,
    after: Option<&str>,
    bytes_max: usize,
) -> Result<Vec<Retained>, StoreError> {
    let from = after.map_or_else(Vec::new, |after| [after.as_bytes(), &[0]].concat());
    // No topic begins with this byte: they are UTF-8.
    let before = vec![0xFF];
    let mut retained = Vec::new();
    let mut bytes = 0;
    for row in tables.view().range(&tables.retained, from..before) {
        let (_, value) = row?;
        bytes += value.len();
        if bytes > bytes_max && !retained.is_empty() {
            break;
        }
        retained.push(format::read_retained_value(&value)?);
    }
    Ok(retained)
}
