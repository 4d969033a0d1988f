//! Whether the copy is the same as what was copied.
//!
//! Both sides are read in the same order and compared step by step. MongoDB removes by itself what
//! has expired, so only what is missing before its time is a difference.

use std::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::{BATCH_BYTES_MAX, CopyError, Progress, Step, describe, page, persistently};
use crate::broker::flush::unix_ms;
use crate::mqtt::Message;
use crate::store::embedded::EmbeddedStore;
use crate::store::mongodb::{MongoStore, RetainedRange};
use crate::store::{
    Entry, MessageId, Owner, Retained, SessionId, Store, StoreError, StoredSession,
};

/// Differences that are told in words; the rest is counted.
const DESCRIBED_MAX: usize = 20;

/// Retained messages read at a time.
const PAGE_RETAINED: u32 = 500;

/// How often progress is told.
const OBSERVED_EVERY: u64 = 1000;

/// What is on both sides, and what is not.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) sessions: u64,
    pub(crate) subscriptions: u64,
    /// QoS 2 exchanges in either direction.
    pub(crate) exchanges: u64,
    pub(crate) messages: u64,
    pub(crate) retained: u64,
    /// Expired between the two readings, or before.
    pub(crate) expired: u64,
    /// The first of them, in words.
    pub(crate) described: Vec<String>,
    pub(crate) differences: u64,
}

impl Comparison {
    pub(crate) fn is_identical(&self) -> bool {
        self.differences == 0
    }

    fn differ(&mut self, what: impl FnOnce() -> String) {
        self.differences += 1;
        if self.described.len() < DESCRIBED_MAX {
            self.described.push(what());
        }
    }
}

pub(super) struct Comparing<'a, F> {
    source: &'a EmbeddedStore,
    target: &'a MongoStore,
    observe: F,
    found: Comparison,
    /// By the clock that is ahead: MongoDB's or this machine's. As of the last look.
    now: u64,
    done: u64,
    total: u64,
}

impl<'a, F: FnMut(Progress)> Comparing<'a, F> {
    pub(super) fn new(source: &'a EmbeddedStore, target: &'a MongoStore, observe: F) -> Self {
        Self {
            source,
            target,
            observe,
            found: Comparison::default(),
            now: 0,
            done: 0,
            total: 0,
        }
    }

    /// `sessions` are in the order of their ids, as they were to be written.
    pub(super) async fn run(
        mut self,
        sessions: Vec<StoredSession>,
        retained: u64,
    ) -> Result<Comparison, CopyError> {
        let messages: u64 = sessions.iter().map(|session| session.inbox.messages).sum();
        self.total = sessions.len() as u64 + messages + retained;
        let mut owners = HashMap::new();
        let mut inboxes = VecDeque::new();
        for session in &sessions {
            owners.insert(session.record.session, session.record.owner.clone());
            let head = session.inbox.head;
            inboxes.extend(head.map(|head| (session.record.session, head)));
        }
        self.compare_sessions(sessions).await?;
        self.compare_messages(inboxes, &owners).await?;
        self.compare_retained().await?;
        Ok(self.found)
    }

    async fn compare_sessions(&mut self, sessions: Vec<StoredSession>) -> Result<(), CopyError> {
        let copies = persistently(|| self.target.load_sessions()).await?;
        let copies = copies.sessions.into_iter();
        let mut copies: HashMap<_, _> = copies
            .map(|stored| (stored.record.session, stored))
            .collect();
        for mut session in sessions {
            self.advance();
            let Some(mut copy) = copies.remove(&session.record.session) else {
                self.found
                    .differ(|| format!("{}: not copied", describe(&session.record.owner)));
                continue;
            };
            sort(&mut session);
            sort(&mut copy);
            let parts = [
                ("session", session.record == copy.record),
                ("subscriptions", session.subscriptions == copy.subscriptions),
                (
                    "unreleased packet identifiers",
                    session.awaiting_release == copy.awaiting_release,
                ),
                ("QoS 2 exchanges", session.exchanges == copy.exchanges),
            ];
            for (part, _) in parts.iter().filter(|(_, is_same)| !is_same) {
                self.found
                    .differ(|| format!("{}: its {part} differ", describe(&copy.record.owner)));
            }
            self.found.sessions += 1;
            self.found.subscriptions += copy.subscriptions.len() as u64;
            self.found.exchanges += (copy.awaiting_release.len() + copy.exchanges.len()) as u64;
        }
        for copy in copies.into_values() {
            self.found
                .differ(|| format!("{}: only in MongoDB", describe(&copy.record.owner)));
        }
        Ok(())
    }

    async fn compare_messages(
        &mut self,
        inboxes: VecDeque<(SessionId, MessageId)>,
        owners: &HashMap<SessionId, Owner>,
    ) -> Result<(), CopyError> {
        let mut originals = Originals {
            source: self.source,
            inboxes,
            read: VecDeque::new(),
        };
        let mut copies = Copies {
            target: self.target,
            after: None,
            is_at_end: false,
            read: VecDeque::new(),
        };
        let place = |(session, entry): &(SessionId, Entry)| (*session, entry.id);
        let whose = |session: SessionId| match owners.get(&session) {
            Some(owner) => describe(owner),
            None => format!("session {session:?}"),
        };
        let mut original = originals.next().await?;
        let mut copy = copies.next().await?;
        loop {
            match order(original.as_ref().map(place), copy.as_ref().map(place)) {
                None => return Ok(()),
                Some(Ordering::Equal) => {
                    if original == copy {
                        self.found.messages += 1;
                    } else if let Some((session, entry)) = &original {
                        self.found.differ(|| {
                            let topic = entry.message.topic();
                            format!("{}: a message on `{topic}` differs", whose(*session))
                        });
                    }
                    self.advance();
                    original = originals.next().await?;
                    copy = copies.next().await?;
                }
                Some(Ordering::Less) => {
                    if let Some((session, entry)) = &original
                        && !self.has_expired(&entry.message).await?
                    {
                        self.found.differ(|| {
                            let topic = entry.message.topic();
                            format!("{}: a message on `{topic}` is missing", whose(*session))
                        });
                    }
                    self.advance();
                    original = originals.next().await?;
                }
                Some(Ordering::Greater) => {
                    if let Some((session, entry)) = &copy {
                        self.found.differ(|| {
                            let topic = entry.message.topic();
                            format!(
                                "{}: a message on `{topic}` is only in MongoDB",
                                whose(*session)
                            )
                        });
                    }
                    copy = copies.next().await?;
                }
            }
        }
    }

    async fn compare_retained(&mut self) -> Result<(), CopyError> {
        let mut originals = VecDeque::new();
        let mut copies = VecDeque::new();
        let (mut last_original, mut last_copy) = (None, None);
        loop {
            if originals.is_empty() {
                let page = self
                    .source
                    .read_retained(last_original.clone(), BATCH_BYTES_MAX);
                originals.extend(page.await?);
                last_original = originals.back().map(topic).or(last_original);
            }
            if copies.is_empty() {
                let range = RetainedRange::Prefix {
                    prefix: "".into(),
                    after: last_copy.clone(),
                    at_most: PAGE_RETAINED,
                };
                copies.extend(persistently(|| self.target.read_retained(range.clone())).await?);
                last_copy = copies.back().map(topic).or(last_copy);
            }
            let (original, copy) = (originals.front(), copies.front());
            match order(original.map(topic), copy.map(topic)) {
                None => return Ok(()),
                Some(Ordering::Equal) => {
                    if original == copy {
                        self.found.retained += 1;
                    } else {
                        let topic = original.map(topic).unwrap_or_default();
                        self.found
                            .differ(|| format!("the retained message of `{topic}` differs"));
                    }
                    self.advance();
                    originals.pop_front();
                    copies.pop_front();
                }
                Some(Ordering::Less) => {
                    if let Some(missing) = originals.pop_front()
                        && !self.has_expired(&missing.message).await?
                    {
                        let topic = topic(&missing);
                        self.found
                            .differ(|| format!("the retained message of `{topic}` is missing"));
                    }
                    self.advance();
                }
                Some(Ordering::Greater) => {
                    let topic = copies.pop_front().as_ref().map(topic).unwrap_or_default();
                    self.found
                        .differ(|| format!("the retained message of `{topic}` is only in MongoDB"));
                }
            }
        }
    }

    /// Whether that is why `message` is missing.
    async fn has_expired(&mut self, message: &Message) -> Result<bool, StoreError> {
        let Some(expires_at) = message.expires_at() else {
            return Ok(false);
        };
        if expires_at > self.now {
            let now = persistently(|| self.target.now_ms()).await?;
            self.now = now.max(unix_ms());
        }
        let has_expired = expires_at <= self.now;
        self.found.expired += u64::from(has_expired);
        Ok(has_expired)
    }

    fn advance(&mut self) {
        self.done += 1;
        if self.done.is_multiple_of(OBSERVED_EVERY) || self.done == self.total {
            (self.observe)(Progress {
                step: Step::Check,
                done: self.done,
                total: self.total,
            });
        }
    }
}

/// The messages in the source, in the order of session and message ids.
struct Originals<'a> {
    source: &'a EmbeddedStore,
    /// What to read next of each session that is not yet read.
    inboxes: VecDeque<(SessionId, MessageId)>,
    read: VecDeque<(SessionId, Entry)>,
}

impl Originals<'_> {
    async fn next(&mut self) -> Result<Option<(SessionId, Entry)>, StoreError> {
        while self.read.is_empty() {
            let Some((session, from)) = self.inboxes.pop_front() else {
                return Ok(None);
            };
            let chunks = self.source.read_inbox(page(session, from)).await?;
            if let Some(last) = chunks.last() {
                self.inboxes.push_front((session, last.key.successor()));
            }
            let entries = chunks.into_iter().flat_map(|chunk| chunk.entries);
            self.read.extend(entries.map(|entry| (session, entry)));
        }
        Ok(self.read.pop_front())
    }
}

/// All messages in MongoDB, in the same order.
struct Copies<'a> {
    target: &'a MongoStore,
    after: Option<(SessionId, MessageId)>,
    is_at_end: bool,
    read: VecDeque<(SessionId, Entry)>,
}

impl Copies<'_> {
    async fn next(&mut self) -> Result<Option<(SessionId, Entry)>, StoreError> {
        while self.read.is_empty() && !self.is_at_end {
            let chunks = persistently(|| self.target.read_inboxes(self.after)).await?;
            match chunks.last() {
                Some((session, last)) => self.after = Some((*session, last.key)),
                None => self.is_at_end = true,
            }
            for (session, chunk) in chunks {
                let entries = chunk.entries.into_iter();
                self.read.extend(entries.map(|entry| (session, entry)));
            }
        }
        Ok(self.read.pop_front())
    }
}

/// Which of two comes first, where the end comes last; nothing if both are at their end.
fn order<T: Ord>(original: Option<T>, copy: Option<T>) -> Option<Ordering> {
    match (original, copy) {
        (None, None) => None,
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        (Some(original), Some(copy)) => Some(original.cmp(&copy)),
    }
}

fn topic(retained: &Retained) -> Arc<str> {
    retained.message.topic().into()
}

/// Stores keep no order in a session.
fn sort(session: &mut StoredSession) {
    session
        .subscriptions
        .sort_by_cached_key(|subscription| subscription.filter.to_string());
    session.awaiting_release.sort();
    session.exchanges.sort_by_key(|exchange| exchange.packet_id);
}
