//! Keeps the inboxes of clients that are away within their limits, by dropping what is oldest.
//!
//! While a client is connected its consumer does that itself.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Node;
use super::mailbox::Mailbox;
use crate::store::{Chunk, InboxRange, MessageId};

/// Bytes of an inbox looked at in one step.
const STEP_BYTES: usize = 64 * 1024;

/// Mailboxes whose inbox has to be trimmed, each once.
#[derive(Debug, Default)]
pub(crate) struct Overfull {
    mailboxes: Mutex<Vec<Arc<Mailbox>>>,
    added: Notify,
}

impl Overfull {
    pub(super) fn add(&self, mailbox: Arc<Mailbox>) {
        self.mailboxes.lock().push(mailbox);
        self.added.notify_one();
    }
}

impl Node {
    /// Trims inboxes until the node stops.
    pub(crate) async fn run_trimming(&self) {
        loop {
            let overfull = std::mem::take(&mut *self.flusher.overfull.mailboxes.lock());
            for mailbox in overfull {
                self.trim(&mailbox).await;
                mailbox.trimmed();
            }
            tokio::select! {
                () = self.flusher.overfull.added.notified() => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    async fn trim(&self, mailbox: &Mailbox) {
        let (mut from, keep) = if mailbox.is_shared() {
            let Some(keep) = self.count_inbox(mailbox).await else {
                return;
            };
            (MessageId::MIN, keep)
        } else {
            (mailbox.head(), MessageId::MAX)
        };
        // What is dropped has to be in the store before it can be taken out of it.
        while mailbox.is_trimmable()
            && self
                .flusher
                .durable(self.flusher.everything())
                .await
                .is_ok()
        {
            let range = InboxRange {
                session: mailbox.session,
                from,
                before: MessageId::MAX,
                bytes_max: STEP_BYTES,
            };
            let consumers = mailbox.consumers();
            let page = match self.store.read_inbox(range).await {
                Ok(page) if !page.is_empty() => page,
                Ok(_) => return,
                Err(error) => {
                    tracing::error!(event = "inbox_unreadable", client_id = %mailbox.client_id, %error);
                    return;
                }
            };
            for chunk in page {
                // While nothing can be added: what comes later must not have a later message
                // dropped instead of this one.
                let mut additions = self.flusher.add();
                // A consumer that came meanwhile may have left chunks other than they were read.
                if !mailbox.is_trimmable() || mailbox.consumers() != consumers {
                    break;
                }
                if chunk.key >= keep {
                    return;
                }
                let left = mailbox.drop_oldest(&chunk, keep);
                if left.as_ref().is_none_or(Vec::is_empty) {
                    from = chunk.key.successor();
                }
                if let Some(entries) = left {
                    let key = chunk.key;
                    additions.rewrite(mailbox.session, Chunk { key, entries });
                }
            }
        }
    }

    /// Counts what this and other nodes have put into an inbox; returns the oldest message that may
    /// stay there. Nodes that count at the same time come to the same, or to a later one of which
    /// the other one does not know yet: so none drops more than it must because the other one does.
    async fn count_inbox(&self, mailbox: &Mailbox) -> Option<MessageId> {
        self.flusher.durable(self.flusher.everything()).await.ok()?;
        let mut all = Vec::new();
        let mut from = MessageId::MIN;
        loop {
            let range = InboxRange {
                session: mailbox.session,
                from,
                before: MessageId::MAX,
                bytes_max: STEP_BYTES,
            };
            let page = match self.store.read_inbox(range).await {
                Ok(page) => page,
                Err(error) => {
                    tracing::error!(event = "inbox_unreadable", client_id = %mailbox.client_id, %error);
                    return None;
                }
            };
            let Some(last) = page.last() else {
                return Some(mailbox.counted(&all));
            };
            from = last.key.successor();
            let entries = page.iter().flat_map(|chunk| &chunk.entries);
            all.extend(entries.map(|entry| (entry.id, entry.message.len() as u64)));
        }
    }
}
