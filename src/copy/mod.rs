//! Copying everything that a store of a single node has into the MongoDB that nodes share.
//!
//! Owns what is copied, in which order, and how it is retried. Sessions come first, since the rest
//! belongs to them; then messages and retained messages, a part at a time, so that memory holds no
//! more than the sessions. Session and message ids stay what they are. At last both sides are read
//! again and compared ([`mod@compare`]); only then can nodes use the database.
//!
//! Start reading at [`copy`].

mod compare;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::broker::flush::unix_ms;
use crate::broker::sessions::{end_connection, wait_for_will};
use crate::config::{Config, ConfigError, StoreKind};
use crate::server::mongo_options;
use crate::store::embedded::{EmbeddedOptions, EmbeddedStore};
use crate::store::mongodb::MongoStore;
use crate::store::{
    Change, InboxRange, MessageId, Messages, Owner, SessionId, Store, StoreError, Stored,
    StoredSession,
};

pub(crate) use self::compare::Comparison;

/// Messages read at a time, and changes written at a time.
const BATCH_BYTES_MAX: usize = 4 << 20;
const BATCH_CHANGES_MAX: usize = 1000;

/// What a change costs besides its message.
const CHANGE_BYTES: usize = 128;

const BEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How long MongoDB may be away: longer than it takes to elect a primary.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// Why nothing, or not everything, was copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("{}: there is no store of midge", .0.display())]
    NoSource(PathBuf),
    #[error(
        "store.kind is not \"mongodb\": the configuration has to be that of a node with MongoDB, \
         with store.uri and store.database"
    )]
    NoTarget,
    #[error(
        "the clock of this machine is {} s behind that of the messages: set it right first, or \
         new messages would overtake those that wait", .0.as_secs_f32()
    )]
    ClockBehind(Duration),
    #[error("{}: has too many subscriptions for a document of MongoDB", describe(.0))]
    TooLarge(Owner),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How far a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) step: Step,
    pub(crate) done: u64,
    /// Of the step.
    pub(crate) total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Sessions,
    Messages,
    Retained,
    Check,
}

/// Copies the store in the directory `from` into the MongoDB that `config` names, and compares the
/// two. `observe` is called every now and then.
///
/// If it fails or is cut short, no node can use the database until it has been run again.
pub(crate) async fn copy(
    config: &Config,
    from: &Path,
    observe: impl FnMut(Progress),
) -> Result<Comparison, CopyError> {
    if config.store.kind != StoreKind::MongoDb {
        return Err(CopyError::NoTarget);
    }
    let options = mongo_options(config)?;
    // Opening would make one.
    if !from.join("version").exists() {
        return Err(CopyError::NoSource(from.to_owned()));
    }
    let source = EmbeddedStore::open(from, EmbeddedOptions::default())?;
    let target = match MongoStore::connect_for_import(options).await {
        Ok(target) => target,
        Err(error) => {
            source.close().await;
            return Err(error.into());
        }
    };
    let copying = Copying {
        source: &source,
        target: &target,
        observe,
    };
    let outcome = tokio::select! {
        outcome = copying.run() => outcome,
        error = beat(&target) => Err(error.into()),
    };
    source.close().await;
    if let Err(error) = target.leave().await {
        // Others find out by its silence.
        tracing::warn!(event = "leave_failed", %error);
    }
    target.close().await;
    outcome
}

/// Shows others that somebody is at work, until they do not believe it any more.
async fn beat(target: &MongoStore) -> StoreError {
    loop {
        if let Err(StoreError::Fenced) = target.heartbeat(unix_ms() << 16).await {
            return StoreError::Fenced;
        }
        tokio::time::sleep(BEAT_INTERVAL).await;
    }
}

struct Copying<'a, F> {
    source: &'a EmbeddedStore,
    target: &'a MongoStore,
    observe: F,
}

impl<F: FnMut(Progress)> Copying<'_, F> {
    async fn run(mut self) -> Result<Comparison, CopyError> {
        let Stored {
            mut sessions,
            last_hlc,
            ..
        } = self.source.load_sessions().await?;
        let now = unix_ms();
        let ahead = (last_hlc >> 16).saturating_sub(now);
        if ahead > 0 {
            return Err(CopyError::ClockBehind(Duration::from_millis(ahead)));
        }
        for session in &mut sessions {
            // The connection ended with the process that had it.
            end_connection(&mut session.record, now);
            wait_for_will(&mut session.record);
        }
        let retained = self.source.count_retained().await?;
        self.target.begin_import().await?;
        self.copy_sessions(&sessions).await?;
        self.copy_messages(&sessions).await?;
        self.copy_retained(retained).await?;
        let comparison = compare::Comparing::new(self.source, self.target, self.observe)
            .run(sessions, retained)
            .await?;
        if comparison.is_identical() {
            persistently(|| self.target.finish_import()).await?;
        }
        Ok(comparison)
    }

    async fn copy_sessions(&mut self, sessions: &[StoredSession]) -> Result<(), CopyError> {
        let mut copied = self.step(Step::Sessions, sessions.len() as u64);
        for session in sessions {
            for change in creation(session) {
                copied.add(change, 0).await?;
            }
            copied.done += 1;
        }
        match copied.finish().await?.first() {
            None => Ok(()),
            Some(lost) => {
                let lost = sessions
                    .iter()
                    .find(|stored| stored.record.session == *lost);
                let owner = lost.map(|lost| lost.record.owner.clone());
                Err(owner.map_or_else(|| StoreError::Fenced.into(), CopyError::TooLarge))
            }
        }
    }

    async fn copy_messages(&mut self, sessions: &[StoredSession]) -> Result<(), CopyError> {
        let source = self.source;
        let messages = sessions.iter().map(|session| session.inbox.messages).sum();
        let mut copied = self.step(Step::Messages, messages);
        for stored in sessions {
            let session = stored.record.session;
            let mut from = stored.inbox.head;
            while let Some(first) = from {
                let chunks = source.read_inbox(page(session, first)).await?;
                from = chunks.last().map(|last| last.key.successor());
                for chunk in chunks {
                    copied.done += chunk.entries.len() as u64;
                    let bytes = chunk.entries.iter().map(|entry| entry.message.len()).sum();
                    let guard = None;
                    let enqueue = Change::Enqueue {
                        session,
                        chunk,
                        guard,
                    };
                    copied.add(enqueue, bytes).await?;
                }
            }
        }
        copied.finish().await?;
        Ok(())
    }

    async fn copy_retained(&mut self, count: u64) -> Result<(), CopyError> {
        let source = self.source;
        // Whatever nodes write afterwards is later.
        let at = MessageId {
            hlc: unix_ms() << 16,
            node: self.target.node(),
            index: 0,
        };
        let mut copied = self.step(Step::Retained, count);
        let mut after = None;
        loop {
            let page = source.read_retained(after, BATCH_BYTES_MAX).await?;
            let Some(last) = page.last() else {
                break;
            };
            after = Some(last.message.topic().into());
            for retained in page {
                copied.done += 1;
                let bytes = retained.message.len();
                copied.add(Change::Retain { retained, at }, bytes).await?;
            }
        }
        copied.finish().await?;
        Ok(())
    }

    fn step(&mut self, step: Step, total: u64) -> Copied<'_, F> {
        Copied {
            target: self.target,
            observe: &mut self.observe,
            step,
            total,
            done: 0,
            changes: Vec::new(),
            bytes: 0,
            lost: Vec::new(),
        }
    }
}

/// What a step writes.
struct Copied<'a, F> {
    target: &'a MongoStore,
    observe: &'a mut F,
    step: Step,
    total: u64,
    done: u64,
    /// Not yet written.
    changes: Vec<Change>,
    bytes: usize,
    lost: Vec<SessionId>,
}

impl<F: FnMut(Progress)> Copied<'_, F> {
    async fn add(&mut self, change: Change, message_bytes: usize) -> Result<(), CopyError> {
        self.changes.push(change);
        self.bytes += CHANGE_BYTES + message_bytes;
        if self.changes.len() >= BATCH_CHANGES_MAX || self.bytes >= BATCH_BYTES_MAX {
            self.write().await?;
        }
        Ok(())
    }

    /// Writes the rest; returns the sessions that could not be written.
    async fn finish(mut self) -> Result<Vec<SessionId>, CopyError> {
        self.write().await?;
        Ok(self.lost)
    }

    async fn write(&mut self) -> Result<(), CopyError> {
        let changes = Arc::new(std::mem::take(&mut self.changes));
        self.bytes = 0;
        let written =
            persistently(|| self.target.write(changes.clone(), Messages::Present)).await?;
        self.lost.extend(written.lost);
        (self.observe)(Progress {
            step: self.step,
            done: self.done,
            total: self.total,
        });
        Ok(())
    }
}

/// What makes a session where there is none.
fn creation(stored: &StoredSession) -> impl Iterator<Item = Change> {
    let session = stored.record.session;
    let save = Change::SaveSession(Box::new(stored.record.clone()));
    let subscriptions = stored.subscriptions.iter().map(move |subscription| {
        let filter = subscription.filter.clone();
        Change::Subscribe {
            session,
            filter,
            options: subscription.options,
            identifier: subscription.identifier,
        }
    });
    let awaiting = stored.awaiting_release.iter();
    let awaiting = awaiting.map(move |&packet_id| Change::AwaitRelease { session, packet_id });
    let exchanges = stored.exchanges.iter();
    let exchanges = exchanges.map(move |&exchange| Change::SaveExchange { session, exchange });
    let parts = subscriptions.chain(awaiting).chain(exchanges);
    std::iter::once(save).chain(parts)
}

/// The next part of an inbox.
fn page(session: SessionId, from: MessageId) -> InboxRange {
    InboxRange {
        session,
        from,
        before: MessageId::MAX,
        bytes_max: BATCH_BYTES_MAX,
    }
}

/// What people know a session by.
fn describe(owner: &Owner) -> String {
    match owner {
        Owner::Client(client_id) => format!("client `{client_id}`"),
        Owner::Group(filter) => format!("share group `{filter}`"),
    }
}

/// Tries again while MongoDB is not available.
async fn persistently<T>(
    mut attempt: impl AsyncFnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let deadline = Instant::now() + RETRY_TIMEOUT;
    loop {
        match attempt().await {
            Err(StoreError::Unavailable(_)) if Instant::now() < deadline => {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            outcome => return outcome,
        }
    }
}
