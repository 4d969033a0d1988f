//! A store that counts and measures what is asked of it.

use std::sync::Arc;

use async_trait::async_trait;

use super::{Change, Chunk, InboxRange, Messages, Store, StoreError, Stored, Written};
use crate::metrics::{Operation, StoreTotals};

/// Another store, and what it was asked for.
#[derive(Debug)]
pub(crate) struct MeteredStore {
    store: Arc<dyn Store>,
    totals: Arc<StoreTotals>,
}

impl MeteredStore {
    pub(crate) fn new(store: Arc<dyn Store>, totals: Arc<StoreTotals>) -> Self {
        Self { store, totals }
    }
}

#[async_trait]
impl Store for MeteredStore {
    async fn load(&self) -> Result<Stored, StoreError> {
        self.store.load().await
    }

    async fn write(
        &self,
        changes: Arc<Vec<Change>>,
        messages: Messages,
    ) -> Result<Written, StoreError> {
        self.totals.batches.add_many(changes.len() as u64, 1);
        let write = self.store.write(changes, messages);
        self.totals.measure(Operation::Write, write).await
    }

    async fn read_inbox(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
        let read = self.store.read_inbox(range);
        self.totals.measure(Operation::ReadInbox, read).await
    }

    fn note_retry(&self, operation: Operation) {
        self.totals.retries.of(operation).inc();
    }

    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    async fn close(&self) {
        self.store.close().await;
    }
}
