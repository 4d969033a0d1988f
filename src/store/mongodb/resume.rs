//! Taking sessions that are new or just go on: those of most clients that connect.
//!
//! Their documents are read, and then made, or changed on condition that they are as they were read.
//! That costs the server a tenth of the operation that finds out by itself what to do
//! (`docs/benchmarks.md`); [`open`](mod@super::open) does that with what is left.

use std::sync::Arc;

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{RawBson, cstr, rawdoc};
use hashbrown::{HashMap, HashSet};

use super::MongoStore;
use super::commands::{Verb, binary, update};
use super::documents::{Fields, Previous, SESSIONS, SessionDocument};
use super::open::OpenRequest;
use crate::store::{SessionRecord, StoreError, WillRecord};

/// How often documents are read again that others have changed meanwhile, such as the node that looks
/// after those of a dead one.
const ATTEMPTS: usize = 3;

/// A session as it is taken by a request, and what makes its document so.
struct Step<'a> {
    request: &'a OpenRequest,
    document: SessionDocument,
    statement: RawDocumentBuf,
}

impl AsRef<RawDocument> for Step<'_> {
    fn as_ref(&self) -> &RawDocument {
        &self.statement
    }
}

impl OpenRequest {
    /// Makes the session, of a client that has none.
    fn make(&self, node: u32) -> Step<'_> {
        let previous = Previous {
            epoch: 0,
            node: None,
            connected: false,
            fresh: true,
        };
        let record = self.fresh_record();
        let epoch = self.epoch_min.max(1);
        let mut fields = self.fields(&record, epoch, previous, node);
        fields.put(cstr!("_id"), Some(&*self.key()));
        fields.put(cstr!("sid"), Some(binary(record.session.0)));
        fields.put(cstr!("s"), Some(RawDocumentBuf::new()));
        fields.put(cstr!("sv"), Some(1_i64));
        let document = SessionDocument {
            key: self.key(),
            epoch,
            record: Some(record),
            subscriptions: Vec::new(),
            node: Some(node),
            changes: 1,
            token: Some(self.new_session),
            previous: Some(previous),
            leftovers: Vec::new(),
        };
        Step {
            request: self,
            document,
            statement: fields.into_document(),
        }
    }

    /// Goes on with the session that was found; `None` if something ends thereby, or is left over.
    fn resume(&self, found: SessionDocument, node: u32) -> Option<Step<'_>> {
        let record = found.record?;
        // One without a delay is published as soon as its connection is taken over.
        let is_due = |will: &WillRecord| will.delay_interval == 0;
        if self.clean_start
            || record.expiry_interval == 0
            || record.will.as_ref().is_some_and(is_due)
            || !found.leftovers.is_empty()
        {
            return None;
        }
        let mut as_found = rawdoc! {
            "_id": &*found.key,
            "sid": binary(record.session.0),
            "e": found.epoch.cast_signed(),
            "sv": found.changes.cast_signed(),
        };
        if record.ends_at.is_some() {
            as_found.append(cstr!("$expr"), rawdoc! { "$gt": ["$ends", "$$NOW"] });
        }
        let previous = Previous {
            epoch: found.epoch,
            node: found.node,
            connected: record.connected,
            fresh: false,
        };
        let record = SessionRecord {
            session: record.session,
            clock: record.clock,
            ..self.fresh_record()
        };
        let epoch = self.epoch_min.max(found.epoch + 1);
        let fields = self.fields(&record, epoch, previous, node);
        let document = SessionDocument {
            epoch,
            record: Some(record),
            node: Some(node),
            changes: found.changes + 1,
            token: Some(self.new_session),
            previous: Some(previous),
            ..found
        };
        Some(Step {
            request: self,
            document,
            statement: update(as_found, fields.into_session_update(), false),
        })
    }

    fn fields(&self, record: &SessionRecord, epoch: u64, previous: Previous, node: u32) -> Fields {
        let before = rawdoc! {
            "e": previous.epoch.cast_signed(),
            "n": previous.node.map_or(RawBson::Null, |node| i64::from(node).into()),
            "c": previous.connected,
            "fr": previous.fresh,
        };
        let mut fields = Fields::default();
        fields.put(cstr!("e"), Some(epoch.cast_signed()));
        fields.put(cstr!("ct"), Some(binary(self.new_session.0)));
        fields.put(cstr!("pv"), Some(before));
        fields.put_record(record, node);
        fields
    }
}

impl MongoStore {
    /// Takes the sessions that are new or just go on. Returns their documents, and the requests that
    /// are still to be seen to: those for other sessions, and those that somebody came between again
    /// and again.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; the same requests may be sent again.
    pub(super) async fn take_simple<'a>(
        &self,
        requests: &'a [OpenRequest],
    ) -> Result<(HashMap<Arc<str>, SessionDocument>, Vec<&'a OpenRequest>), StoreError> {
        let mut taken = HashMap::new();
        let mut others = Vec::new();
        let mut waiting: Vec<_> = requests.iter().collect();
        let keys: HashSet<_> = requests.iter().map(OpenRequest::key).collect();
        if keys.len() < requests.len() {
            // Those of the same client are in an order.
            return Ok((taken, waiting));
        }
        let mut time = None;
        for _ in 0..ATTEMPTS {
            let mut found = HashMap::new();
            self.read_sessions(&waiting, time, &mut found).await?;
            let (mut made, mut resumed) = (Vec::new(), Vec::new());
            for request in waiting.drain(..) {
                match found.remove(&request.key()) {
                    Some(found) if found.token == Some(request.new_session) => {
                        taken.insert(found.key.clone(), found);
                    }
                    Some(found) if request.is_stored() => match request.resume(found, self.node) {
                        Some(step) => resumed.push(step),
                        None => others.push(request),
                    },
                    Some(_) => others.push(request),
                    None if request.is_stored() => made.push(request.make(self.node)),
                    // There is nothing to put an end to, and nothing to be stored.
                    None => {}
                }
            }
            let (inserted, updated) = tokio::try_join!(
                self.commands.write_all(Verb::Insert, SESSIONS, &made),
                self.commands.write_all(Verb::Update, SESSIONS, &resumed),
            )?;
            time = inserted.time.max(updated.time);
            let refused: HashSet<_> = inserted.duplicates.into_iter().collect();
            // Which of them did not match is not said.
            let all_match = updated.matched == resumed.len() as i64;
            let made = made.into_iter().enumerate();
            let made = made.map(|(place, step)| (step, !refused.contains(&place)));
            let resumed = resumed.into_iter().map(|step| (step, all_match));
            for (step, is_taken) in made.chain(resumed) {
                if is_taken {
                    taken.insert(step.document.key.clone(), step.document);
                } else {
                    waiting.push(step.request);
                }
            }
            if waiting.is_empty() {
                break;
            }
        }
        others.append(&mut waiting);
        Ok((taken, others))
    }
}
