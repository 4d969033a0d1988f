//! The last retained message of each topic: in memory, or in the store if that is shared with other
//! nodes. Of those, memory has this node's own below `$SYS`.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::RwLock;

use super::Node;
use crate::metrics::Operation;
use crate::mqtt::topic::TopicFilter;
use crate::store::mongodb::RetainedRange;
use crate::store::{Retained, StoreError};

/// All retained messages, by topic.
#[derive(Default)]
pub(crate) struct RetainedMessages {
    by_topic: RwLock<BTreeMap<Arc<str>, Retained>>,
    count: AtomicU64,
    bytes: AtomicU64,
}

/// A walk through the retained messages that match a filter; it holds no lock between its steps.
#[derive(Debug)]
pub(crate) struct RetainedWalk {
    filter: TopicFilter,
    /// The last topic that was looked at.
    after: Option<Arc<str>>,
    /// Whether there is more to be read from the store.
    goes_on_in_store: bool,
}

fn counts(topic: &str) -> bool {
    !topic.starts_with("$SYS/")
}

/// How long to wait after the store could not be read.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Topics that one step of a walk looks at before others may write.
const STEP_TOPICS: usize = 512;

impl RetainedMessages {
    /// Replaces the message of a topic; one without a payload clears it, [MQTT-3.3.1-6].
    /// Returns whether anything was there.
    pub(crate) fn set(&self, retained: Retained) -> bool {
        let mut by_topic = self.by_topic.write();
        let counts = counts(retained.message.topic());
        let length = retained.message.len() as u64;
        let (previous, added) = if retained.message.payload().is_empty() {
            (by_topic.remove(retained.message.topic()), None)
        } else {
            let previous = match by_topic.get_mut(retained.message.topic()) {
                Some(known) => Some(std::mem::replace(known, retained)),
                None => by_topic.insert(retained.message.topic().into(), retained),
            };
            (previous, Some(length))
        };
        let removed = previous
            .as_ref()
            .map(|previous| previous.message.len() as u64);
        if counts {
            self.count_change(added, removed);
        }
        previous.is_some()
    }

    /// Counts a message that was added, and one that was removed, by their lengths.
    fn count_change(&self, added: Option<u64>, removed: Option<u64>) {
        if let Some(length) = added {
            self.count.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(length, Ordering::Relaxed);
        }
        if let Some(length) = removed {
            self.count.fetch_sub(1, Ordering::Relaxed);
            self.bytes.fetch_sub(length, Ordering::Relaxed);
        }
    }

    pub(crate) fn contains(&self, topic: &str) -> bool {
        self.by_topic.read().contains_key(topic)
    }

    /// How many clients have left; the broker's own `$SYS` topics do not count.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// `in_store` says that other nodes may have more, which are read from the store.
    pub(crate) fn walk(&self, filter: TopicFilter, in_store: bool) -> RetainedWalk {
        RetainedWalk {
            goes_on_in_store: in_store,
            filter,
            after: None,
        }
    }

    /// As [`RetainedMessages::walk`], with topics that follow `after` alone.
    pub(super) fn walk_after(
        &self,
        filter: TopicFilter,
        in_store: bool,
        after: Option<&str>,
    ) -> RetainedWalk {
        RetainedWalk {
            after: after.map(Into::into),
            ..self.walk(filter, in_store)
        }
    }

    /// Topics whose message has expired, [MQTT-3.3.2-5].
    pub(crate) fn expired(&self, now_unix_ms: u64) -> Vec<Arc<str>> {
        let by_topic = self.by_topic.read();
        by_topic
            .iter()
            .filter(|(_, retained)| retained.message.is_expired(now_unix_ms))
            .map(|(topic, _)| topic.clone())
            .collect()
    }

    /// Removes the message of a topic if it has expired; returns whether it did.
    pub(crate) fn remove_expired(&self, topic: &str, now_unix_ms: u64) -> bool {
        let mut by_topic = self.by_topic.write();
        let expired = by_topic
            .get(topic)
            .is_some_and(|retained| retained.message.is_expired(now_unix_ms));
        if expired
            && let Some(previous) = by_topic.remove(topic)
            && counts(topic)
        {
            self.count_change(None, Some(previous.message.len() as u64));
        }
        expired
    }
}

impl RetainedWalk {
    /// Appends up to `at_most` further messages to `into`; returns whether the walk may have more.
    pub(crate) fn step(
        &mut self,
        messages: &RetainedMessages,
        into: &mut Vec<Retained>,
        at_most: usize,
    ) -> bool {
        let by_topic = messages.by_topic.read();
        let filter = self.filter.as_str();
        let prefix = self.prefix();
        if !self.filter.has_wildcard() {
            into.extend(by_topic.get(filter).cloned());
            return false;
        }
        let start = match &self.after {
            Some(after) => Bound::Excluded(&**after),
            None => Bound::Included(prefix),
        };
        let mut found = 0;
        let mut last = None;
        for (looked_at, (topic, retained)) in by_topic
            .range::<str, _>((start, Bound::Unbounded))
            .enumerate()
        {
            if !topic.starts_with(prefix) {
                return false;
            }
            if looked_at == STEP_TOPICS || found == at_most {
                self.after = last.map(Arc::clone);
                return true;
            }
            last = Some(topic);
            if self.filter.matches(topic) {
                into.push(retained.clone());
                found += 1;
            }
        }
        false
    }
}

impl RetainedWalk {
    /// Everything that matches begins with what stands before the first wildcard. The level above
    /// `/#` matches too and is shorter by the slash.
    fn prefix(&self) -> &str {
        let filter = self.filter.as_str();
        let wildcard = filter.find(['+', '#']).unwrap_or(filter.len());
        let literal = &filter[..wildcard];
        if filter[wildcard..].starts_with('#') {
            literal.strip_suffix('/').unwrap_or(literal)
        } else {
            literal
        }
    }

    /// What of the store is to be read next, up to `at_most` messages.
    pub(crate) fn next_in_store(&mut self, at_most: usize) -> Option<RetainedRange> {
        if !std::mem::take(&mut self.goes_on_in_store) {
            return None;
        }
        Some(if self.filter.has_wildcard() {
            RetainedRange::Prefix {
                prefix: self.prefix().into(),
                after: self.after.take(),
                at_most: u32::try_from(at_most).unwrap_or(u32::MAX),
            }
        } else {
            RetainedRange::Topic(self.filter.as_str().into())
        })
    }

    /// Takes what was read.
    pub(crate) fn take_read(&mut self, read: Vec<Retained>, into: &mut Vec<Retained>) {
        if let Some(last) = read.last()
            && self.filter.has_wildcard()
        {
            self.after = Some(last.message.topic().into());
            self.goes_on_in_store = true;
        }
        let matching = |retained: &Retained| self.filter.matches(retained.message.topic());
        into.extend(read.into_iter().filter(matching));
    }
}

impl fmt::Debug for RetainedMessages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetainedMessages")
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

impl Node {
    /// Begins to read what a walk has to look at in the store, if there is anything. It is tried until
    /// the store is available.
    pub(crate) fn read_retained(
        &self,
        walk: &mut RetainedWalk,
        at_most: usize,
    ) -> Option<BoxFuture<'static, Result<Vec<Retained>, StoreError>>> {
        let cluster = self.cluster.clone()?;
        let range = walk.next_in_store(at_most)?;
        let measured = self.totals.store.clone();
        Some(Box::pin(async move {
            loop {
                let reading = cluster.store.read_retained(range.clone());
                match measured.measure(Operation::ReadRetained, reading).await {
                    Err(error) if error.may_pass() => {
                        tokio::time::sleep(READ_AGAIN_AFTER).await;
                        measured.retries.of(Operation::ReadRetained).inc();
                    }
                    read => return read,
                }
            }
        }))
    }
}
