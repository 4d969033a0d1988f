//! The taking end of a mailbox: messages in order, from memory or from the inbox in the store.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::flush::{Flusher, Receipt};
use super::mailbox::{Mailbox, Taken};
use crate::cluster::{Cluster, Marks};
use crate::metrics::Operation;
use crate::session::Delivery;
use crate::store::{Chunk, InboxRange, MessageId, Store, StoreError};

/// Bytes of one page of an inbox.
const PAGE_BYTES: usize = 64 * 1024;

/// What is known of an inbox as its emptying begins.
pub(crate) enum Inbox {
    /// All that is in it was put in by this node.
    Known,
    /// Other nodes have put something in, or will. They know of the emptying when this resolves.
    Shared(Option<BoxFuture<'static, ()>>),
}

/// How long to wait after the store could not be read.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Takes messages out of one mailbox; there is one at a time.
pub(crate) struct Consumer {
    mailbox: Arc<Mailbox>,
    flusher: Arc<Flusher>,
    store: Arc<dyn Store>,
    cluster: Option<Arc<Cluster>>,
    /// Resolves when other nodes know that the mailbox is emptied here.
    told: Option<BoxFuture<'static, ()>>,
    /// Taken, not yet delivered.
    ready: VecDeque<Delivery>,
    reading: Option<BoxFuture<'static, Result<Vec<Chunk>, StoreError>>>,
    /// Up to where it is read.
    reading_before: u64,
    /// From where on memory holds what waits.
    reading_to: Option<u64>,
    /// Up to here there is nothing that has not been read.
    empty_before: u64,
    /// Nothing is read before this is durable: only then is everything in the store that is not in
    /// memory, and nothing that is done with.
    catch_up: Receipt,
}

impl Consumer {
    pub(crate) fn attach(
        mailbox: Arc<Mailbox>,
        flusher: Arc<Flusher>,
        store: Arc<dyn Store>,
        cluster: Option<Arc<Cluster>>,
        inbox: Inbox,
    ) -> Self {
        let (is_known, told) = match inbox {
            Inbox::Known => (true, None),
            Inbox::Shared(told) => (false, told),
        };
        let catch_up = {
            let mut additions = flusher.add();
            let tick = additions.tick();
            mailbox.attach(is_known.then_some(tick));
            additions.receipt()
        };
        Self {
            mailbox,
            flusher,
            store,
            cluster,
            told,
            ready: VecDeque::new(),
            reading: None,
            reading_before: 0,
            reading_to: None,
            empty_before: 0,
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
            match self.mailbox.take(&mut self.ready, TAKE_MAX) {
                Taken::Live => {
                    if self.ready.is_empty() {
                        ready!(self.wait(context, true))?;
                        if self.mailbox.order().is_some() {
                            return Poll::Ready(Ok(()));
                        }
                    }
                }
                Taken::Restart => {
                    let additions = self.flusher.add();
                    self.mailbox.begin_reading();
                    self.empty_before = 0;
                    self.catch_up = additions.receipt();
                }
                Taken::ReadInbox { from, live_from } => {
                    if let Some(told) = &mut self.told {
                        if told.as_mut().poll(context).is_pending() {
                            return self.wait(context, false);
                        }
                        self.told = None;
                    }
                    match self.flusher.poll_durable(self.catch_up, context) {
                        Poll::Pending => return self.wait(context, false),
                        Poll::Ready(durable) => durable?,
                    }
                    // Behind a mark a message may still come to stand before one that is there.
                    let marks = self.cluster.as_ref().map(|cluster| cluster.marks());
                    let safe = marks.map_or(u64::MAX, Marks::safe);
                    let wanted = live_from.unwrap_or_else(|| self.flusher.mark() + 1);
                    let before = wanted.min(safe.saturating_add(1));
                    if before <= self.empty_before
                        && let Some(marks) = marks
                        && marks.poll_reached(self.empty_before, context).is_pending()
                    {
                        return self.wait(context, false);
                    }
                    self.read(from, before, live_from);
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

    fn read(&mut self, from: MessageId, before: u64, live_from: Option<u64>) {
        let range = InboxRange {
            session: self.mailbox.session,
            from,
            before: MessageId {
                hlc: before,
                ..MessageId::MIN
            },
            bytes_max: PAGE_BYTES,
        };
        let store = self.store.clone();
        self.reading_before = before;
        self.reading_to = live_from;
        self.reading = Some(Box::pin(async move {
            loop {
                match store.read_inbox(range).await {
                    Err(error) if error.may_pass() => {
                        tokio::time::sleep(READ_AGAIN_AFTER).await;
                        store.note_retry(Operation::ReadInbox);
                    }
                    page => return page,
                }
            }
        }));
    }

    /// Takes what a page has; one that has nothing is the end of what is to be read.
    fn accept(&mut self, page: Vec<Chunk>) {
        if !page.is_empty() {
            self.mailbox.accept_page(page, &mut self.ready);
            return;
        }
        match self.reading_to {
            Some(live_from) if live_from <= self.reading_before => {
                self.mailbox.caught_up(live_from);
            }
            Some(_) => self.empty_before = self.reading_before,
            None => {
                self.empty_before = self.reading_before;
                let tick = {
                    let mut additions = self.flusher.add();
                    let tick = additions.tick();
                    self.mailbox.hold_from(tick);
                    self.catch_up = additions.receipt();
                    tick
                };
                if let Some(cluster) = &self.cluster {
                    cluster.links.want_marks(tick);
                }
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
