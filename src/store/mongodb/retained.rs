//! Retained messages, looked up topic by topic or in the order of their topics.

use std::sync::Arc;

use bson::raw::RawDocumentBuf;
use bson::{DateTime, RawBson, cstr, rawdoc};

use super::MongoStore;
use super::commands::Query;
use super::documents::{RETAINED, read_retained};
use crate::store::{Retained, StoreError};

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

impl MongoStore {
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
