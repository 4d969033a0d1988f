//! The thread that removes what ended sessions left behind.
//!
//! The keyspace `garbage` is its queue: a mark is written together with the end of the session and
//! removed after the last of its rows, so a crash in between repeats a part of the work. It is a
//! thread of its own because the inbox of a busy session is mostly tombstones: looking for rows
//! between them can take longer than any write should wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use super::tables::Tables;
use crate::store::StoreError;

/// Rows removed by one commit, during which writes wait.
const STEP_ROWS: usize = 1000;

/// Sweeps at the start and whenever `woken`, until the other end of `woken` is gone.
pub(super) fn run(tables: &Tables, woken: &Receiver<()>, stopping: &AtomicBool) {
    loop {
        if let Err(error) = sweep(tables, STEP_ROWS, stopping) {
            tracing::warn!(%error, "store_sweep_failed");
            return;
        }
        if woken.recv().is_err() {
            return;
        }
    }
}

/// Sweeps what is marked now; ends early, with the rest still marked, once it is `stopping`.
pub(super) fn sweep(
    tables: &Tables,
    step_rows: usize,
    stopping: &AtomicBool,
) -> Result<(), StoreError> {
    let view = tables.view();
    let mut batch = tables.unsynced_batch();
    for session in view.keys(&tables.garbage, &[]) {
        let session = session?;
        for keyspace in [
            &tables.inbox,
            &tables.subscriptions,
            &tables.exchanges,
            &tables.awaiting,
        ] {
            for key in view.keys(keyspace, &session) {
                batch.remove(keyspace, key?);
                if batch.len() >= step_rows {
                    tables.commit(std::mem::replace(&mut batch, tables.unsynced_batch()))?;
                    if stopping.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                }
            }
        }
        batch.remove(&tables.garbage, session);
    }
    tables.commit(batch)
}
