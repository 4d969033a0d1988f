//! What only this adapter promises; the rest is in `store::contract`.

use std::fs;
use std::sync::atomic::AtomicBool;

use fjall::{Database, Keyspace, KeyspaceCreateOptions};
use tempfile::TempDir;

use super::*;
use crate::store::contract::{
    Fixture, chunk, enqueue, everything_of, load, read_all, save, session, store_contract,
    subscribe, whole_inbox, write,
};
use crate::store::{InboxSummary, MessageId, Messages};

struct InDirectory {
    store: EmbeddedStore,
    directory: TempDir,
}

impl Fixture for InDirectory {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            store: open(directory.path()).unwrap(),
            directory,
        }
    }

    fn store(&self) -> &dyn Store {
        &self.store
    }

    async fn reopen(self) -> Self {
        self.store.close().await;
        Self {
            store: open(self.directory.path()).unwrap(),
            directory: self.directory,
        }
    }
}

store_contract!(InDirectory);

fn open(path: &Path) -> Result<EmbeddedStore, StoreError> {
    EmbeddedStore::open(
        path,
        EmbeddedOptions {
            cache_bytes: 1 << 20,
            ..EmbeddedOptions::default()
        },
    )
}

/// Opens a store and leaves it closed, with what `edit` did to one of its keyspaces.
fn edit(path: &Path, keyspace: &str, edit: impl FnOnce(&Keyspace)) {
    let database = Database::builder(path).open().unwrap();
    edit(
        &database
            .keyspace(keyspace, KeyspaceCreateOptions::default)
            .unwrap(),
    );
}

fn rows(path: &Path, keyspace: &str) -> usize {
    let mut rows = 0;
    edit(path, keyspace, |keyspace| rows = keyspace.len().unwrap());
    rows
}

#[tokio::test]
async fn second_open_is_refused_until_the_first_is_closed() {
    let InDirectory { store, directory } = InDirectory::new().await;

    assert!(matches!(
        open(directory.path()),
        Err(StoreError::InUse { .. })
    ));
    store.close().await;
    open(directory.path()).unwrap().close().await;
}

#[tokio::test]
async fn newer_format_is_refused() {
    let InDirectory { store, directory } = InDirectory::new().await;
    store.close().await;
    edit(directory.path(), "meta", |meta| {
        meta.insert(format::FORMAT_KEY, (format::FORMAT + 1).to_be_bytes())
            .unwrap();
    });

    let error = open(directory.path()).unwrap_err();
    assert!(
        matches!(&error, StoreError::Unusable { reason, .. } if reason.contains("newer midge")),
        "{error}"
    );
}

#[test]
fn file_is_not_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "").unwrap();

    let error = open(&path).unwrap_err();
    assert!(
        matches!(&error, StoreError::Unusable { reason, .. } if reason == "it is not a directory"),
        "{error}"
    );
}

#[test]
fn directory_that_cannot_be_made_is_unusable() {
    let error = open(Path::new("/dev/null/midge")).unwrap_err();

    assert!(matches!(error, StoreError::Unusable { .. }), "{error}");
}

/// `/proc` refuses even the superuser.
#[test]
#[cfg(target_os = "linux")]
fn directory_that_cannot_be_written_to_is_unusable() {
    let error = open(Path::new("/proc/self/fd")).unwrap_err();

    assert!(matches!(error, StoreError::Unusable { .. }), "{error}");
}

#[tokio::test]
async fn creation_cut_short_is_repeated() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("lock"), "").unwrap();
    fs::write(directory.path().join("0.jnl"), [0; 100]).unwrap();

    let store = open(directory.path()).unwrap();
    write(&store, [save(session(1))]).await;
    assert_eq!(load(&store).await.sessions.len(), 1);
}

#[tokio::test]
async fn damaged_chunk_is_reported() {
    let InDirectory { store, directory } = InDirectory::new().await;
    write(
        &store,
        [save(session(1)), enqueue(session(1), &chunk(1, 1))],
    )
    .await;
    store.close().await;
    edit(directory.path(), "inbox", |inbox| {
        inbox
            .insert(format::inbox_key(session(1), chunk(1, 1).key), [0xFF; 40])
            .unwrap();
    });

    let store = open(directory.path()).unwrap();
    assert!(matches!(
        store.load().await,
        Err(StoreError::Damaged { what: "a chunk" })
    ));
    let read = store.read_inbox(whole_inbox(session(1))).await;
    assert!(matches!(read, Err(StoreError::Damaged { what: "a chunk" })));
}

#[tokio::test]
async fn damaged_session_is_reported() {
    let InDirectory { store, directory } = InDirectory::new().await;
    store.close().await;
    edit(directory.path(), "sessions", |sessions| {
        sessions.insert(session(1).0, "").unwrap()
    });

    let store = open(directory.path()).unwrap();
    assert!(matches!(
        store.load().await,
        Err(StoreError::Damaged { what: "a session" })
    ));
}

#[tokio::test]
async fn damaged_journal_does_not_panic() {
    let InDirectory { store, directory } = InDirectory::new().await;
    write(
        &store,
        [save(session(1)), enqueue(session(1), &chunk(1, 1))],
    )
    .await;
    store.close().await;
    let journal = directory.path().join("0.jnl");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[..4096].iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(&journal, bytes).unwrap();

    // The damage may look like a write that was cut short, which is dropped: nothing to report then.
    if let Ok(store) = open(directory.path()) {
        assert!(load(&store).await.sessions.is_empty());
    }
}

#[tokio::test]
async fn closed_store_fails_cleanly() {
    let InDirectory {
        store,
        directory: _directory,
    } = InDirectory::new().await;
    store.close().await;
    store.close().await;

    assert!(matches!(
        store
            .write(Arc::new(vec![save(session(1))]), Messages::Present)
            .await,
        Err(StoreError::Io(_))
    ));
    assert!(matches!(
        store.read_inbox(whole_inbox(session(1))).await,
        Err(StoreError::Io(_))
    ));
    assert!(matches!(store.load().await, Err(StoreError::Io(_))));
}

#[tokio::test]
async fn ended_session_leaves_nothing_on_disk() {
    let InDirectory { store, directory } = InDirectory::new().await;
    write(&store, everything_of(session(1))).await;
    write(&store, everything_of(session(2))).await;
    write(&store, [Change::EndSession(session(1))]).await;
    until_swept(&store).await;
    store.close().await;

    for keyspace in [
        "sessions",
        "subscriptions",
        "inbox",
        "exchanges",
        "awaiting",
    ] {
        assert_eq!(rows(directory.path(), keyspace), 1, "{keyspace}");
    }
}

#[tokio::test]
async fn sweep_that_was_cut_short_goes_on_after_a_restart() {
    let InDirectory { store, directory } = InDirectory::new().await;
    write(&store, [save(session(1))]).await;
    write(
        &store,
        (1..=50).map(|hlc| enqueue(session(1), &chunk(hlc, 1))),
    )
    .await;
    store.close().await;
    // Ended, with the first step of the sweep done: 20 of its chunks are gone.
    let tables = Tables::open(directory.path(), EmbeddedOptions::default()).unwrap();
    tables.sessions.remove(session(1).0).unwrap();
    tables.garbage.insert(session(1).0, []).unwrap();
    sweeper::sweep(&tables, 20, &AtomicBool::new(true)).unwrap();
    assert_eq!(tables.inbox.len().unwrap(), 30);
    drop(tables);

    let store = open(directory.path()).unwrap();
    assert_eq!(read_all(&store, session(1)).await, []);
    until_swept(&store).await;
    store.close().await;
    assert_eq!(rows(directory.path(), "inbox"), 0);
}

#[tokio::test]
async fn what_was_written_for_an_ended_session_is_swept_after_a_restart() {
    let fixture = InDirectory::new().await;
    write(&fixture.store, [Change::EndSession(session(1))]).await;
    until_swept(&fixture.store).await;
    write(
        &fixture.store,
        [
            subscribe(session(1), "a"),
            enqueue(session(1), &chunk(1, 1)),
        ],
    )
    .await;

    let InDirectory { store, directory } = fixture.reopen().await;
    assert!(load(&store).await.sessions.is_empty());
    until_swept(&store).await;
    store.close().await;
    assert_eq!(rows(directory.path(), "inbox"), 0);
    assert_eq!(rows(directory.path(), "subscriptions"), 0);
}

/// Waits until the sweeper has nothing left to do.
async fn until_swept(store: &EmbeddedStore) {
    while !store
        .read(|tables| Ok(tables.garbage.is_empty().unwrap()))
        .await
        .unwrap()
    {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_run_beside_writes() {
    let InDirectory {
        store,
        directory: _directory,
    } = InDirectory::new().await;
    let store = Arc::new(store);
    write(&*store, [save(session(1))]).await;
    let reader = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            let mut seen = 0;
            while seen < 100 {
                let read = read_all(&*store, session(1)).await;
                // A prefix of what was written, each write whole.
                let keys = read.iter().map(|chunk| chunk.key.hlc);
                assert!(keys.eq((1..).take(read.len())));
                assert_eq!(read.len() % 2, 0);
                assert!(read.len() >= seen);
                seen = read.len();
            }
        }
    });
    for hlc in (1..=100).step_by(2) {
        write(
            &*store,
            [
                enqueue(session(1), &chunk(hlc, 1)),
                enqueue(session(1), &chunk(hlc + 1, 1)),
            ],
        )
        .await;
        assert_eq!(read_all(&*store, session(1)).await.len() as u64, hlc + 1);
    }

    reader.await.unwrap();
}

#[tokio::test]
async fn drained_inbox_has_no_head() {
    let fixture = InDirectory::new().await;
    write(&fixture.store, [save(session(1))]).await;
    write(
        &fixture.store,
        (1..=100).map(|hlc| enqueue(session(1), &chunk(hlc, 1))),
    )
    .await;
    let dequeue = |hlc| Change::Dequeue {
        guard: None,
        session: session(1),
        key: MessageId {
            hlc,
            node: 1,
            index: 0,
        },
    };
    write(&fixture.store, (1..=100).map(dequeue)).await;

    let fixture = fixture.reopen().await;
    assert_eq!(
        load(&fixture.store).await.sessions[0].inbox,
        InboxSummary::default()
    );
}
