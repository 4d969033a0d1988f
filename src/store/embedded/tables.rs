//! The database and its keyspaces: how it is opened, read and closed, and what its errors mean.

use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use fjall::config::{BlockSizePolicy, FilterPolicy};
use fjall::{
    AbstractTree, Database, Keyspace, KeyspaceCreateOptions, KvPair, LsmError, OwnedWriteBatch,
    PersistMode, Readable, Snapshot,
};

use super::{EmbeddedOptions, format};
use crate::store::StoreError;

/// Sort and merge files. With a single one (fjall's choice on one CPU) a compaction delays the
/// flushes that writes wait for.
const DATABASE_THREADS: usize = 3;

/// fjall panics below it.
const JOURNAL_BYTES_MIN: u64 = 64 << 20;

/// All keyspaces but the inbox together change far less than it does.
const SMALL_MEMTABLE_BYTES: u64 = 8 << 20;

/// An inbox is read in ranges, a dozen chunks to a block, never by single keys.
const INBOX_BLOCK_BYTES: u32 = 16 << 10;

/// Below fjall's own limits of 4 and 30, see [`Tables::wait_for_room`].
const SEALED_MEMTABLES_MAX: usize = 3;
const UNMERGED_RUNS_MAX: usize = 24;

pub(super) struct Tables {
    database: Database,
    pub(super) sessions: Keyspace,
    pub(super) subscriptions: Keyspace,
    pub(super) inbox: Keyspace,
    pub(super) exchanges: Keyspace,
    pub(super) awaiting: Keyspace,
    pub(super) retained: Keyspace,
    pub(super) garbage: Keyspace,
}

impl Tables {
    pub(super) fn open(path: &Path, options: EmbeddedOptions) -> Result<Self, StoreError> {
        let unusable = |reason: String| StoreError::Unusable {
            path: path.display().to_string(),
            reason,
        };
        let opened = |error: fjall::Error| match error {
            fjall::Error::Locked => StoreError::InUse {
                path: path.display().to_string(),
            },
            fjall::Error::Io(error) => unusable(error.to_string()),
            fjall::Error::InvalidVersion(_) => {
                unusable("another version of the database wrote it".to_owned())
            }
            other => failure(&other),
        };
        if path.exists() && !path.is_dir() {
            return Err(unusable("it is not a directory".to_owned()));
        }
        fs::create_dir_all(path).map_err(|error| unusable(error.to_string()))?;
        remove_unfinished(path).map_err(opened)?;

        let database = Database::builder(path)
            .cache_size(options.cache_bytes)
            .max_journaling_size(options.journal_bytes_max.max(JOURNAL_BYTES_MIN))
            .worker_threads(DATABASE_THREADS)
            .open()
            .map_err(opened)?;

        let small = || KeyspaceCreateOptions::default().max_memtable_size(SMALL_MEMTABLE_BYTES);
        let open = |name: &str| {
            database
                .keyspace(name, small)
                .map_err(|error| failure(&error))
        };
        let meta = open("meta")?;
        match meta
            .get(format::FORMAT_KEY)
            .map_err(|error| failure(&error))?
        {
            Some(value) => {
                let found = format::read_format(&value)?;
                if found > format::FORMAT {
                    return Err(unusable(format!(
                        "a newer midge wrote it (format {found}, this one knows {})",
                        format::FORMAT
                    )));
                }
            }
            None => meta
                .insert(format::FORMAT_KEY, format::FORMAT.to_be_bytes())
                .map_err(|error| failure(&error))?,
        }
        let inbox = || {
            KeyspaceCreateOptions::default()
                .max_memtable_size(options.memtable_bytes)
                .data_block_size_policy(BlockSizePolicy::all(INBOX_BLOCK_BYTES))
                .filter_policy(FilterPolicy::disabled())
        };
        Ok(Self {
            sessions: open("sessions")?,
            subscriptions: open("subscriptions")?,
            inbox: database
                .keyspace("inbox", inbox)
                .map_err(|error| failure(&error))?,
            exchanges: open("exchanges")?,
            awaiting: open("awaiting")?,
            retained: open("retained")?,
            garbage: open("garbage")?,
            database,
        })
    }

    /// All keyspaces as they are now: never half of a write.
    pub(super) fn view(&self) -> View {
        View(self.database.snapshot())
    }

    /// A batch that survives the loss of power once it is committed.
    pub(super) fn synced_batch(&self, capacity: usize) -> OwnedWriteBatch {
        OwnedWriteBatch::with_capacity(self.database.clone(), capacity)
            .durability(Some(PersistMode::SyncData))
    }

    /// A batch that becomes durable with the next synced one.
    pub(super) fn unsynced_batch(&self) -> OwnedWriteBatch {
        self.database.batch()
    }

    pub(super) fn commit(&self, batch: OwnedWriteBatch) -> Result<(), StoreError> {
        self.wait_for_room()?;
        batch.commit().map_err(|error| failure(&error))
    }

    /// Waits until fjall's threads have caught up.
    ///
    /// fjall would wait by itself inside `commit`, but for ever if one of those threads has met an
    /// I/O error and ended. Here that is seen.
    fn wait_for_room(&self) -> Result<(), StoreError> {
        let is_behind = |keyspace: &&Keyspace| {
            keyspace.sealed_memtable_count() >= SEALED_MEMTABLES_MAX
                || keyspace.tree.l0_run_count() >= UNMERGED_RUNS_MAX
        };
        let written = [
            &self.sessions,
            &self.subscriptions,
            &self.inbox,
            &self.exchanges,
            &self.awaiting,
            &self.retained,
        ];
        while written.iter().any(is_behind) {
            // Fails once such an error has been met.
            self.database
                .persist(PersistMode::Buffer)
                .map_err(|error| failure(&error))?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Syncs what is not yet. The lock on the directory goes with the last reference.
    pub(super) fn close(&self) {
        if let Err(error) = self.database.persist(PersistMode::SyncAll) {
            tracing::error!(error = %failure(&error), "store_sync_failed");
        }
    }
}

/// Undoes a creation that was cut short before fjall marked it as complete, which it would refuse
/// to go on with. Nothing was ever written to such a store.
fn remove_unfinished(path: &Path) -> fjall::Result<()> {
    let journal = path.join("0.jnl");
    if path.join("version").try_exists()? || !journal.try_exists()? {
        return Ok(());
    }
    let lock = File::options()
        .read(true)
        .write(true)
        .open(path.join("lock"))?;
    match lock.try_lock() {
        Ok(()) if path.join("version").try_exists()? => Ok(()),
        Ok(()) => Ok(fs::remove_file(journal)?),
        Err(TryLockError::WouldBlock) => Err(fjall::Error::Locked),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// What a reader sees: all writes that were complete when it began, and none of the later ones.
pub(super) struct View(Snapshot);

impl View {
    pub(super) fn contains(&self, keyspace: &Keyspace, key: &[u8]) -> Result<bool, StoreError> {
        self.0
            .contains_key(keyspace, key)
            .map_err(|error| failure(&error))
    }

    pub(super) fn rows(
        &self,
        keyspace: &Keyspace,
    ) -> impl Iterator<Item = Result<KvPair, StoreError>> {
        self.0
            .iter(keyspace)
            .map(|row| row.into_inner().map_err(|error| failure(&error)))
    }

    pub(super) fn range(
        &self,
        keyspace: &Keyspace,
        keys: Range<impl AsRef<[u8]>>,
    ) -> impl Iterator<Item = Result<KvPair, StoreError>> {
        self.0
            .range(keyspace, keys)
            .map(|row| row.into_inner().map_err(|error| failure(&error)))
    }

    /// The keys that begin with `prefix`, copied: a key handed out by the database keeps the block
    /// alive that it lies in.
    pub(super) fn keys(
        &self,
        keyspace: &Keyspace,
        prefix: &[u8],
    ) -> impl Iterator<Item = Result<Vec<u8>, StoreError>> {
        self.0.prefix(keyspace, prefix).map(|row| {
            row.key()
                .map(|key| key.to_vec())
                .map_err(|error| failure(&error))
        })
    }
}

pub(super) fn failure(error: &fjall::Error) -> StoreError {
    use fjall::Error;
    let io = |error: &io::Error| StoreError::Io(error.to_string());
    match error {
        Error::Io(error) | Error::Storage(LsmError::Io(error)) => io(error),
        Error::Storage(_) => StoreError::Damaged { what: "a table" },
        Error::JournalRecovery(_)
        | Error::InvalidTrailer
        | Error::InvalidTag(_)
        | Error::Decompress(_) => StoreError::Damaged {
            what: "the journal",
        },
        Error::Unrecoverable => StoreError::Damaged {
            what: "the database",
        },
        Error::Poisoned => {
            StoreError::Io("an earlier write failed; restart to recover what is durable".to_owned())
        }
        other => StoreError::Io(other.to_string()),
    }
}
