//! The taking end of a mailbox: messages in order, from memory or from the inbox in the store.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;

use super::flush::{Flusher, Receipt};
use super::mailbox::{Mailbox, Taken};
use crate::session::{Delivery, Origin};
use crate::store::{Chunk, InboxRange, MessageId, Store, StoreError};

/// Bytes of one page of an inbox.
const PAGE_BYTES: usize = 64 * 1024;

/// Takes messages out of one mailbox; there is one at a time.
pub(crate) struct Consumer {
    mailbox: Arc<Mailbox>,
    flusher: Arc<Flusher>,
    store: Arc<dyn Store>,
    /// Taken, not yet delivered.
    ready: VecDeque<Delivery>,
    /// The last message that was taken of those that are stored.
    last: MessageId,
    /// Where the next page begins, while the inbox is being read.
    cursor: Option<MessageId>,
    reading: Option<BoxFuture<'static, Result<Vec<Chunk>, StoreError>>>,
    /// Up to where the page is that is being read.
    reading_before: Option<u64>,
    /// Durable once all is in the store that is not in memory.
    catch_up: Receipt,
}

impl Consumer {
    pub(crate) fn attach(
        mailbox: Arc<Mailbox>,
        flusher: Arc<Flusher>,
        store: Arc<dyn Store>,
    ) -> Self {
        let catch_up = {
            let mut additions = flusher.add();
            mailbox.attach(additions.tick());
            additions.receipt()
        };
        Self {
            mailbox,
            flusher,
            store,
            ready: VecDeque::new(),
            last: MessageId::MIN,
            cursor: None,
            reading: None,
            reading_before: None,
            catch_up,
        }
    }

    /// Ends the taking. Returns what was not stored and not delivered.
    pub(crate) fn detach(self) -> VecDeque<Delivery> {
        let mut waiting = self.ready;
        waiting.extend(self.mailbox.detach());
        waiting
    }

    pub(crate) fn next(&mut self) -> Option<Delivery> {
        let next = self.ready.pop_front();
        if self.ready.is_empty() && self.ready.capacity() > IDLE_CAPACITY {
            self.ready = VecDeque::new();
        }
        next
    }

    /// Goes on in spite of an order to end.
    pub(crate) fn ignore_order(&self) {
        self.mailbox.clear_order();
    }

    pub(crate) fn peek(&self) -> Option<&Delivery> {
        self.ready.front()
    }

    /// Adds a message of the consumer's own, behind what has been taken already.
    pub(crate) fn add(&mut self, delivery: Delivery) {
        self.ready.push_back(delivery);
    }

    /// Whether so little has been taken that more may be added.
    pub(crate) fn is_nearly_empty(&self) -> bool {
        self.ready.len() < TAKE_MAX / 2
    }

    /// Ready when [`Consumer::next`] has something, or there is an order to end.
    ///
    /// # Errors
    /// `StoreError` if the inbox cannot be read.
    pub(crate) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), StoreError>> {
        loop {
            if !self.ready.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if let Some(reading) = &mut self.reading {
                let Poll::Ready(page) = reading.as_mut().poll(context) else {
                    return self.wait(context, false);
                };
                self.reading = None;
                self.accept(page?);
                continue;
            }
            match self
                .mailbox
                .take(&mut self.ready, TAKE_MAX, self.cursor, self.last)
            {
                Taken::Live => {
                    self.cursor = None;
                    if let Some(id) = self
                        .ready
                        .iter()
                        .rev()
                        .find_map(|delivery| delivery.origin.place_in(self.mailbox.session))
                    {
                        self.last = id;
                    }
                    if self.ready.is_empty() {
                        ready!(self.wait(context, true))?;
                        if self.mailbox.order().is_some() {
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
                Taken::ReadInbox { from, before } => {
                    // Only then is everything in the store that the page has to hold.
                    if before.is_some() {
                        match self.flusher.poll_durable(self.catch_up, context) {
                            Poll::Pending => return self.wait(context, false),
                            Poll::Ready(durable) => durable?,
                        }
                    }
                    self.read(from, before);
                }
            }
        }
    }

    /// Pending until there is a message, if that is what is waited for, or an order to end.
    fn wait(&self, context: &Context<'_>, for_messages: bool) -> Poll<Result<(), StoreError>> {
        if self.mailbox.wait(context.waker(), for_messages) {
            Poll::Pending
        } else {
            Poll::Ready(Ok(()))
        }
    }

    fn read(&mut self, from: MessageId, before: Option<u64>) {
        let range = InboxRange {
            session: self.mailbox.session,
            from,
            before: before.map_or(MessageId::MAX, |hlc| MessageId {
                hlc,
                ..MessageId::MIN
            }),
            bytes_max: PAGE_BYTES,
        };
        let store = self.store.clone();
        self.reading_before = before;
        self.reading = Some(Box::pin(async move { store.read_inbox(range).await }));
    }

    /// Takes what a page has; one that has nothing is the end of what is to be read.
    fn accept(&mut self, page: Vec<Chunk>) {
        if page.is_empty() {
            match self.reading_before {
                Some(before) => self.mailbox.caught_up(before),
                None => {
                    let mut additions = self.flusher.add();
                    self.mailbox.hold_from(additions.tick());
                    self.catch_up = additions.receipt();
                }
            }
            return;
        }
        for chunk in page {
            let bytes: usize = chunk.entries.iter().map(|entry| entry.message.len()).sum();
            let count = u32::try_from(chunk.entries.len()).unwrap_or(u32::MAX);
            let last = chunk.entries.last().map_or(chunk.key, |entry| entry.id);
            let settled = self
                .mailbox
                .open_chunk(chunk.key, last, count, bytes as u64);
            self.cursor = Some(chunk.key.successor());
            for entry in chunk.entries {
                if entry.id <= self.last || settled.contains(&(entry.id.hlc, entry.id.index)) {
                    continue;
                }
                self.last = entry.id;
                self.ready.push_back(Delivery {
                    message: entry.message,
                    qos: entry.qos,
                    retain: entry.retain,
                    subscription_identifiers: entry.subscription_identifiers,
                    origin: match &self.mailbox.group {
                        None => Origin::Inbox(entry.id),
                        Some(_) => Origin::Group(self.mailbox.session, entry.id),
                    },
                });
            }
        }
    }
}

/// Messages moved out of a mailbox at a time.
const TAKE_MAX: usize = 1024;

/// Places that an idle consumer keeps memory for.
const IDLE_CAPACITY: usize = 32;

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("mailbox", &self.mailbox)
            .finish_non_exhaustive()
    }
}
