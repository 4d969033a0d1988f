//! The thread that makes changes durable, one batch and one sync per write.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self as std_mpsc, SyncSender};
use std::thread::{self, JoinHandle};

use fjall::OwnedWriteBatch;
use tokio::sync::{mpsc, oneshot};

use super::tables::Tables;
use super::{format, sweeper};
use crate::store::{Change, StoreError};

/// There is one write at a time; a second place lets a cancelled one still be waiting.
const JOBS_MAX: usize = 2;

/// The threads behind a store; dropping it lets them end by themselves.
pub(super) struct Writer {
    jobs: Jobs,
    writer: JoinHandle<()>,
    sweeper: JoinHandle<()>,
    /// Tells the sweeper to leave the rest for the next start.
    stopping: Arc<AtomicBool>,
}

struct Job {
    changes: Arc<Vec<Change>>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// Where the writing thread takes its work from.
#[derive(Clone)]
pub(super) struct Jobs(mpsc::Sender<Job>);

impl Writer {
    pub(super) fn start(tables: &Arc<Tables>) -> io::Result<Self> {
        let (jobs, incoming) = mpsc::channel(JOBS_MAX);
        // One place: a wake-up that is still waiting says it all.
        let (wake, woken) = std_mpsc::sync_channel(1);
        let writer = thread::Builder::new()
            .name("midge-store".to_owned())
            .spawn({
                let tables = Arc::clone(tables);
                move || run(&tables, incoming, &wake)
            })?;
        let stopping = Arc::new(AtomicBool::new(false));
        let sweeper = thread::Builder::new()
            .name("midge-sweeper".to_owned())
            .spawn({
                let (tables, stopping) = (Arc::clone(tables), Arc::clone(&stopping));
                move || sweeper::run(&tables, &woken, &stopping)
            })?;
        Ok(Self {
            jobs: Jobs(jobs),
            writer,
            sweeper,
            stopping,
        })
    }

    pub(super) fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }

    /// Waits for what is queued to be written. Blocks.
    pub(super) fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        drop(self.jobs);
        for thread in [self.writer, self.sweeper] {
            if thread.join().is_err() {
                tracing::error!("store_thread_panicked");
            }
        }
    }
}

impl Jobs {
    pub(super) async fn write(self, changes: Arc<Vec<Change>>) -> Result<(), StoreError> {
        let ended = || StoreError::Io("its thread has ended".to_owned());
        let (done, outcome) = oneshot::channel();
        self.0
            .send(Job { changes, done })
            .await
            .map_err(|_| ended())?;
        // The thread ends once all senders are gone: one in a future that is never polled again
        // must not keep it.
        drop(self);
        outcome.await.unwrap_or_else(|_| Err(ended()))
    }
}

fn run(tables: &Tables, mut jobs: mpsc::Receiver<Job>, wake_sweeper: &SyncSender<()>) {
    // After a failed sync nobody knows what reached the disk: only a restart finds out.
    let mut failure: Option<StoreError> = None;
    while let Some(Job { changes, done }) = jobs.blocking_recv() {
        let outcome = match &failure {
            Some(failure) => Err(failure.clone()),
            None => write(tables, &changes),
        };
        match &outcome {
            Ok(()) if changes.iter().any(is_end) => {
                // Full: it has not yet begun with the last one. Closed: it failed, and said so.
                let _ = wake_sweeper.try_send(());
            }
            Ok(()) => {}
            Err(error) => failure = Some(error.clone()),
        }
        // Nobody waits any more if the caller was cancelled.
        let _ = done.send(outcome);
    }
}

fn is_end(change: &Change) -> bool {
    matches!(change, Change::EndSession(_))
}

fn write(tables: &Tables, changes: &[Change]) -> Result<(), StoreError> {
    let mut batch = tables.synced_batch(changes.len());
    changes
        .iter()
        .for_each(|change| stage(tables, &mut batch, change));
    tables.commit(batch)
}

/// Within a batch the last change of a key wins.
fn stage(tables: &Tables, batch: &mut OwnedWriteBatch, change: &Change) {
    match change {
        Change::SaveSession(record) => batch.insert(
            &tables.sessions,
            record.session.0,
            format::session_value(record),
        ),
        Change::EndSession(session) => {
            // All else of a session counts only while it has a record, so this hides it at once.
            batch.remove(&tables.sessions, session.0);
            batch.insert(&tables.garbage, session.0, []);
        }
        Change::Subscribe {
            session,
            filter,
            options,
            identifier,
        } => batch.insert(
            &tables.subscriptions,
            format::subscription_key(*session, filter),
            format::subscription_value(filter, *options, *identifier),
        ),
        Change::Unsubscribe { session, filter } => {
            batch.remove(
                &tables.subscriptions,
                format::subscription_key(*session, filter),
            );
        }
        Change::Enqueue { session, chunk, .. } | Change::Shorten { session, chunk } => {
            let key = format::inbox_key(*session, chunk.key);
            batch.insert(&tables.inbox, key, format::chunk_value(&chunk.entries));
        }
        Change::Dequeue { session, key, .. } => {
            batch.remove(&tables.inbox, format::inbox_key(*session, *key))
        }
        Change::AwaitRelease { session, packet_id } => {
            batch.insert(
                &tables.awaiting,
                format::packet_key(*session, *packet_id),
                [],
            );
        }
        Change::Release { session, packet_id } => {
            batch.remove(&tables.awaiting, format::packet_key(*session, *packet_id));
        }
        Change::SaveExchange { session, exchange } => batch.insert(
            &tables.exchanges,
            format::packet_key(*session, exchange.packet_id),
            format::exchange_value(exchange),
        ),
        Change::EndExchange { session, packet_id } => {
            batch.remove(&tables.exchanges, format::packet_key(*session, *packet_id));
        }
        Change::Retain { retained, .. } => {
            batch.insert(
                &tables.retained,
                retained.message.topic(),
                format::retained_value(retained),
            );
        }
        Change::ClearRetained { topic, .. } => batch.remove(&tables.retained, &**topic),
    }
}
