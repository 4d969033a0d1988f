//! Retained messages: written so that the latest one of a topic stays, looked up topic by topic or in
//! the order of their topics.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use bson::raw::RawDocumentBuf;
use bson::{DateTime, RawBson, Timestamp, cstr, rawdoc};
use hashbrown::{HashMap, HashSet};

use super::MongoStore;
use super::commands::{Query, Verb, binary, update};
use super::documents::{RETAINED, date, message_id_value, read_retained};
use crate::store::{MessageId, Retained, StoreError, format};

/// How long the cleared state of a topic is remembered: longer than any write can be late.
const TOMBSTONE: Duration = Duration::from_secs(3600);

/// Topics that are remembered as written, 2 MiB of them.
const KNOWN_MAX: usize = 1 << 17;

/// Topics that are likely to have a document. It costs a quarter to insert one that has none, and
/// more to find out that it has.
#[derive(Debug, Default)]
pub(super) struct KnownTopics(HashSet<u64>);

impl KnownTopics {
    /// Whether the topic was noted before; it is from now on.
    fn note(&mut self, topic: &str) -> bool {
        let hash = self.0.hasher().hash_one(topic);
        if self.0.len() == KNOWN_MAX && !self.0.contains(&hash) {
            self.0.clear();
        }
        !self.0.insert(hash)
    }
}

/// Which retained messages to read.
#[derive(Clone, Debug)]
pub(crate) enum RetainedRange {
    /// The one of this topic.
    Topic(Arc<str>),
    /// Those whose topics begin with `prefix` and follow `after`, in order: `at_most` so many, and
    /// fewer if they are large, but at least one if there is any.
    Prefix {
        prefix: Arc<str>,
        after: Option<Arc<str>>,
        at_most: u32,
    },
}

/// The state of one topic: `None` is that nothing is retained.
type State<'a> = (&'a str, MessageId, Option<&'a Retained>);

/// The fields of a topic's document, and when it is removed.
fn fields_of(&(_, at, retained): &State<'_>) -> (RawDocumentBuf, Option<DateTime>) {
    let mut fields = rawdoc! { "k": message_id_value(at) };
    let expires_at = match retained {
        Some(retained) => {
            fields.append(cstr!("b"), binary(format::retained_value(retained)));
            retained.message.expires_at().map(date)
        }
        None => {
            fields.append(cstr!("b"), RawBson::Null);
            let until = DateTime::now().timestamp_millis() + TOMBSTONE.as_millis() as i64;
            Some(DateTime::from_millis(until))
        }
    };
    if let Some(expires_at) = expires_at {
        fields.append(cstr!("x"), expires_at);
    }
    (fields, expires_at)
}

fn insertion(state: &State<'_>) -> RawDocumentBuf {
    let (mut fields, _) = fields_of(state);
    fields.append(cstr!("_id"), state.0);
    fields
}

fn replacement(state: &State<'_>) -> RawDocumentBuf {
    let change = match fields_of(state) {
        (fields, Some(_)) => rawdoc! { "$set": fields },
        (fields, None) => rawdoc! { "$set": fields, "$unset": { "x": 1 } },
    };
    // The key is taken if the same one or a later one is there: then nothing is to be done.
    let older = rawdoc! { "_id": state.0, "k": { "$lt": message_id_value(state.1) } };
    update(older, change, true)
}

impl MongoStore {
    /// Of the same topic the one with the highest id stays, whichever is written last.
    pub(super) async fn write_retained(
        &self,
        retained: &HashMap<&str, (MessageId, Option<&Retained>)>,
    ) -> Result<Option<Timestamp>, StoreError> {
        if retained.is_empty() {
            return Ok(None);
        }
        let states = retained
            .iter()
            .map(|(topic, (at, retained))| (*topic, *at, *retained));
        let (known, new): (Vec<State<'_>>, Vec<_>) = {
            let mut topics = self.known_topics.lock();
            states.partition(|(topic, ..)| topics.note(topic))
        };
        let (replaced, (inserted, taken)) =
            tokio::try_join!(self.replace_retained(&known), self.insert_retained(&new))?;
        let taken = self.replace_retained(&taken).await?;
        Ok(replaced.max(inserted).max(taken))
    }

    /// Returns those whose topics have a document.
    async fn insert_retained<'a>(
        &self,
        states: &[State<'a>],
    ) -> Result<(Option<Timestamp>, Vec<State<'a>>), StoreError> {
        let documents: Vec<_> = states.iter().map(insertion).collect();
        let inserted = self.commands.write_all(Verb::Insert, RETAINED, &documents);
        let inserted = inserted.await?;
        let taken = inserted.duplicates.iter().map(|place| states[*place]);
        Ok((inserted.time, taken.collect()))
    }

    async fn replace_retained(
        &self,
        states: &[State<'_>],
    ) -> Result<Option<Timestamp>, StoreError> {
        let statements: Vec<_> = states.iter().map(replacement).collect();
        let written = self.commands.write_all(Verb::Update, RETAINED, &statements);
        Ok(written.await?.time)
    }

    /// Reads retained messages, but none that has expired or was cleared.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn read_retained(
        &self,
        range: RetainedRange,
    ) -> Result<Vec<Retained>, StoreError> {
        let mut filter = current(DateTime::now());
        let limit = match range {
            RetainedRange::Topic(topic) => {
                filter.append(cstr!("_id"), &*topic);
                1
            }
            RetainedRange::Prefix {
                prefix,
                after,
                at_most,
            } => {
                let mut topics = match after.filter(|after| **after > *prefix) {
                    Some(after) => rawdoc! { "$gt": &*after },
                    None => rawdoc! { "$gte": &*prefix },
                };
                if let Some(end) = successor(&prefix) {
                    topics.append(cstr!("$lt"), end);
                }
                filter.append(cstr!("_id"), topics);
                i64::from(at_most)
            }
        };
        let found = Query::new(RETAINED, filter).limit(limit);
        let found = self.commands.find(found).await?;
        found
            .iter()
            .map(|document| read_retained(document))
            .collect()
    }
}

/// The filter for messages that are there at `now`.
pub(super) fn current(now: DateTime) -> RawDocumentBuf {
    rawdoc! {
        "b": { "$ne": RawBson::Null },
        "x": { "$not": { "$lte": now } },
    }
}

/// The first text that follows all those that begin with `prefix`, if there is one.
pub(super) fn successor(prefix: &str) -> Option<String> {
    let mut prefix = prefix.to_owned();
    while let Some(last) = prefix.pop() {
        // Skips the surrogates, which are no characters.
        if let Some(next) = (last..=char::MAX).nth(1) {
            prefix.push(next);
            return Some(prefix);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::successor;

    #[test]
    fn successor_follows_all_that_begin_alike() {
        assert_eq!(successor("a/").as_deref(), Some("a0"));
        assert_eq!(successor("\u{D7FF}").as_deref(), Some("\u{E000}"));
        assert_eq!(successor("a\u{10FFFF}").as_deref(), Some("b"));
        assert_eq!(successor("\u{10FFFF}"), None);
        assert_eq!(successor(""), None);
    }
}
