//! Taking sessions: for a client that connects, from nodes that have died, and when something of
//! them is due.
//!
//! Each is taken by one operation on its document, which raises the epoch and so locks out whoever
//! held it before. What that operation puts an end to, and a Will that is still to be published,
//! stays in the document as a [`Leftover`] until a flush has dealt with it: whoever is stopped in
//! between, another node can go on.

use std::sync::Arc;
use std::time::Duration;

use bson::raw::{RawDocument, RawDocumentBuf};
use bson::{RawBson, Timestamp, cstr, rawdoc};
use hashbrown::{HashMap, HashSet};

use super::MongoStore;
use super::commands::{Concern, Query, Verb, array, binary, update, write_commands};
use super::documents::{Document, SESSIONS, SessionDocument, version_number, will_value};
use super::held::{Held, Hold};
use crate::mqtt::ProtocolVersion;
use crate::store::{
    InboxSummary, Owner, SessionId, SessionRecord, StoreError, StoredSession, WillRecord, format,
};

/// How often a CONNECT is repeated that meets another first CONNECT of the same client.
const ATTEMPTS: usize = 10;

/// Documents in one query: even the longest keys fit.
const SESSIONS_MAX: usize = 200;

/// How long a node has for what it took because it was due, before another one may take it.
const ADOPTION: Duration = Duration::from_secs(10);

/// Sessions of a dead node that are released at a time.
const RELEASED_MAX: i64 = 200;

/// A client that connects.
#[derive(Clone, Debug)]
pub(crate) struct OpenRequest {
    pub(crate) client_id: Arc<str>,
    /// Used if a new session is made, and never again: the same request may be sent again after
    /// `Unavailable`.
    pub(crate) new_session: SessionId,
    pub(crate) clean_start: bool,
    pub(crate) version: ProtocolVersion,
    pub(crate) expiry_interval: u32,
    pub(crate) will: Option<WillRecord>,
    /// It outlives its connection. One that does not is stored only if it has a Will.
    pub(crate) durable: bool,
    /// The epoch will not be less, also that of a client of which nothing is stored.
    pub(crate) epoch_min: u64,
}

/// A session that this node holds from now on.
#[derive(Debug)]
pub(crate) struct OpenedSession {
    /// Without a summary of its inbox.
    pub(crate) session: StoredSession,
    /// It was there before.
    pub(crate) present: bool,
    pub(crate) epoch: u64,
    pub(crate) previous_epoch: u64,
    /// The node that has the session to let go: it has, or had last, the client of it.
    pub(crate) previous_node: Option<u32>,
    /// What has to be dealt with, each by a flush that ends it.
    pub(crate) leftovers: Vec<Leftover>,
}

/// What is left to do of a session that was taken: its Will is to be published, if it has one, in a
/// flush that contains `EndSession` of `session`, with that as guard of the messages. Several nodes
/// may try; for all but one of them the leftover is among [`Written::lost`](crate::store::Written).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leftover {
    pub(crate) owner: Owner,
    /// Names the leftover. If it has `ended`, this was its session.
    pub(crate) session: SessionId,
    /// An incarnation has ended; otherwise the session goes on, and only the Will is left over.
    pub(crate) ended: bool,
    /// To be published without delay.
    pub(crate) will: Option<WillRecord>,
}

impl OpenRequest {
    pub(super) fn is_stored(&self) -> bool {
        self.durable || self.will.is_some()
    }

    pub(super) fn key(&self) -> Arc<str> {
        format::owner_key(&Owner::Client(self.client_id.clone()))
    }

    /// The statement that takes the session, unless it has been taken by the same request before.
    fn statement(&self, node: u32) -> RawDocumentBuf {
        let token = || binary(self.new_session.0);
        let has_ended = rawdoc! { "$or": [
            self.clean_start,
            is_missing("$sid"),
            { "$eq": ["$exp", 0_i64] },
            { "$and": [{ "$not": is_missing("$ends") }, { "$lte": ["$ends", "$$NOW"] }] },
        ] };
        // Every field is set, or it would keep its value of the time before.
        let remember = rawdoc! { "$set": { "pv": {
            "e": { "$ifNull": ["$e", 0_i64] },
            "n": { "$ifNull": ["$n", RawBson::Null] },
            "c": { "$ifNull": ["$c", false] },
            "fr": if self.is_stored() { has_ended } else { rawdoc! { "$literal": true } },
        } } };
        let leftover = |id: RawBson, ended: bool| {
            array([rawdoc! {
                "id": id,
                "ended": ended,
                "will": { "$ifNull": ["$will", RawBson::Null] },
                "willdue": { "$ifNull": ["$willdue", RawBson::Null] },
                "at": "$$NOW",
            }])
        };
        // A Will with a delay is not published if its session goes on, [MQTT-3.1.3-9].
        let leftovers = rawdoc! { "$concatArrays": [
            { "$ifNull": ["$og", []] },
            { "$cond": [
                "$pv.fr",
                { "$cond": [is_missing("$sid"), [], leftover("$sid".into(), true)] },
                { "$cond": [{ "$eq": ["$wd", 0_i64] }, leftover(token().into(), false), []] },
            ] },
        ] };
        let epoch = || {
            let epoch_min = self.epoch_min.cast_signed();
            rawdoc! { "$max": [{ "$add": ["$pv.e", 1_i64] }, epoch_min] }
        };
        let stages = if self.is_stored() {
            let mut fields = rawdoc! {
                "og": { "$let": {
                    "vars": { "all": leftovers },
                    "in": { "$cond": [{ "$eq": ["$$all", []] }, "$$REMOVE", "$$all"] },
                } },
                "ends": "$$REMOVE",
                "willdue": "$$REMOVE",
                "due": "$$REMOVE",
                "sid": { "$cond": ["$pv.fr", token(), "$sid"] },
                "s": { "$cond": ["$pv.fr", { "$literal": {} }, "$s"] },
                "e": epoch(),
                "n": i64::from(node),
                "c": true,
                "ct": token(),
                "v": version_number(self.version),
                "exp": i64::from(self.expiry_interval),
                "sv": { "$add": [{ "$ifNull": ["$sv", 0_i64] }, 1_i64] },
            };
            match &self.will {
                Some(will) => {
                    fields.append(
                        cstr!("will"),
                        rawdoc! { "$literal": binary(will_value(will)) },
                    );
                    fields.append(cstr!("wd"), i64::from(will.delay_interval));
                }
                None => {
                    fields.append(cstr!("will"), "$$REMOVE");
                    fields.append(cstr!("wd"), "$$REMOVE");
                }
            }
            array([remember, rawdoc! { "$set": fields }])
        } else {
            // Nothing of it is stored but what it puts an end to.
            let end = rawdoc! {
                "_id": "$_id",
                "e": epoch(),
                "ct": token(),
                "pv": "$pv",
                "og": leftovers,
            };
            array([remember, rawdoc! { "$replaceWith": end }])
        };
        let key = self.key();
        let query = rawdoc! { "_id": &*key, "ct": { "$ne": token() } };
        update(query, stages, self.is_stored())
    }

    /// What is opened if nothing is stored.
    pub(super) fn fresh_record(&self) -> SessionRecord {
        SessionRecord {
            owner: Owner::Client(self.client_id.clone()),
            session: self.new_session,
            version: self.version,
            connected: true,
            expiry_interval: self.expiry_interval,
            ends_at: None,
            will: self.will.clone(),
            clock: 0,
        }
    }
}

impl MongoStore {
    /// Takes the session of every request from whoever holds it, or makes it, in the order of the
    /// requests; `None` where a newer request, of this node or another, has taken it already.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; the same requests may be sent again.
    pub(crate) async fn open(
        &self,
        requests: Vec<OpenRequest>,
    ) -> Result<Vec<Option<OpenedSession>>, StoreError> {
        let (mut documents, mut waiting) = self.take_simple(&requests).await?;
        for _ in 0..ATTEMPTS {
            if waiting.is_empty() {
                break;
            }
            let statements = waiting.iter().map(|request| request.statement(self.node));
            let mut refused = Vec::new();
            let mut time = None;
            for batch in write_commands(Verb::Update, SESSIONS, statements, Concern::Majority) {
                let outcome = self.commands.write(batch.command).await?;
                time = time.max(outcome.time);
                let refused_here = outcome.duplicates.iter();
                refused.extend(refused_here.map(|index| waiting[batch.first + index]));
            }
            self.read_sessions(&waiting, time, &mut documents).await?;
            // Its key was taken by another insert at the same moment, or by itself, before its
            // answer was lost.
            waiting = refused;
            waiting.retain(|request| {
                let document = documents.get(&request.key());
                document.is_none_or(|document| document.token != Some(request.new_session))
            });
        }

        let mut opened = Vec::with_capacity(requests.len());
        for request in &requests {
            let key = request.key();
            opened.push(match documents.get(&key) {
                Some(document) if document.token == Some(request.new_session) => documents
                    .remove(&key)
                    .map(|document| self.opened(request, document)),
                None if !request.is_stored() => Some(unstored(request)),
                _ => None,
            });
        }
        let present = opened.iter_mut().flatten().filter(|opened| opened.present);
        self.load_exchanges(present.map(|opened| &mut opened.session))
            .await?;
        Ok(opened)
    }

    /// Adds the documents of these clients, as they were at `time` or later.
    pub(super) async fn read_sessions(
        &self,
        requests: &[&OpenRequest],
        time: Option<Timestamp>,
        documents: &mut HashMap<Arc<str>, SessionDocument>,
    ) -> Result<(), StoreError> {
        for some in requests.chunks(SESSIONS_MAX) {
            let keys = some.iter().map(|request| request.key());
            let query = rawdoc! { "_id": { "$in": array(keys.map(|key| key.to_string())) } };
            let read = |document: &RawDocument| {
                let document = SessionDocument::read(document)?;
                documents.insert(document.key.clone(), document);
                Ok(())
            };
            self.commands
                .for_each(Query::new(SESSIONS, query).after(time), read)
                .await?;
        }
        Ok(())
    }

    fn opened(&self, request: &OpenRequest, document: SessionDocument) -> OpenedSession {
        self.hold_leftovers(&document.key, &document.leftovers);
        let epoch = document.epoch;
        let previous = document.previous;
        let present = previous.is_some_and(|previous| !previous.fresh);
        let record = match document.record {
            Some(record) => {
                let held = Held {
                    key: document.key,
                    epoch,
                    is_known_to_others: present,
                };
                self.held.insert(record.session, Hold::Session(held));
                record
            }
            None => request.fresh_record(),
        };
        OpenedSession {
            session: StoredSession {
                record,
                subscriptions: document.subscriptions,
                awaiting_release: Vec::new(),
                exchanges: Vec::new(),
                inbox: InboxSummary::default(),
            },
            present,
            epoch,
            previous_epoch: previous.map_or(0, |previous| previous.epoch),
            previous_node: previous
                .filter(|previous| previous.connected || present)
                .and_then(|previous| previous.node),
            leftovers: document.leftovers,
        }
    }

    fn hold_leftovers(&self, key: &Arc<str>, leftovers: &[Leftover]) {
        for leftover in leftovers {
            let hold = Hold::Leftover {
                key: key.clone(),
                ended: leftover.ended,
            };
            self.held.insert(leftover.session, hold);
        }
    }

    /// Makes sessions offline that were connected to a node which has died, some hundreds of them;
    /// false when there are no more. Their Wills are due after their delays, and not before
    /// `will_grace` has passed: clients may come back.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; it may be repeated, by any node.
    pub(crate) async fn release_sessions_of(
        &self,
        node: u32,
        will_grace: Duration,
    ) -> Result<bool, StoreError> {
        let connected = || rawdoc! { "n": i64::from(node), "c": true };
        let query = Query::new(SESSIONS, connected())
            .only(rawdoc! { "_id": 1 })
            .by(rawdoc! { "n": 1 })
            .limit(RELEASED_MAX);
        let found = self.commands.find(query).await?;
        let mut keys = Vec::with_capacity(found.len());
        for document in &found {
            let fields = Document::new("a session", document);
            keys.push(fields.text("_id")?);
        }
        if keys.is_empty() {
            return Ok(false);
        }
        let in_ms = |field: &str| rawdoc! { "$multiply": [field, 1000_i64] };
        let grace = will_grace.as_millis() as i64;
        let offline = rawdoc! {
            "c": false,
            "n": "$$REMOVE",
            "e": { "$add": ["$e", 1_i64] },
            "sv": { "$add": ["$sv", 1_i64] },
            "ends": { "$cond": [
                { "$eq": ["$exp", i64::from(u32::MAX)] },
                "$$REMOVE",
                { "$add": ["$$NOW", in_ms("$exp")] },
            ] },
            "willdue": { "$cond": [
                is_missing("$will"),
                "$$REMOVE",
                { "$add": ["$$NOW", { "$max": [in_ms("$wd"), grace] }] },
            ] },
        };
        let due = rawdoc! { "due": { "$ifNull": [{ "$min": ["$ends", "$willdue"] }, "$$REMOVE"] } };
        let stages = array([rawdoc! { "$set": offline }, rawdoc! { "$set": due }]);
        let mut still_connected = connected();
        still_connected.append(cstr!("_id"), rawdoc! { "$in": array(keys) });
        let release = rawdoc! { "q": still_connected, "u": stages, "multi": true };
        for batch in write_commands(Verb::Update, SESSIONS, [release], Concern::Majority) {
            self.commands.write(batch.command).await?;
        }
        Ok(found.len() as i64 == RELEASED_MAX)
    }

    /// Takes offline sessions that have ended, or whose Will is due, for longer than `late` by the
    /// server's clock. They are taken again, by this or another node, unless they are saved or
    /// ended soon.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; what was taken will be due again.
    pub(crate) async fn adopt_due(
        &self,
        late: Duration,
        at_most: i64,
    ) -> Result<Vec<StoredSession>, StoreError> {
        let late_ms = late.as_millis() as i64;
        let past = self.commands.now().await?.timestamp_millis() - late_ms;
        let query = rawdoc! { "due": { "$lte": bson::DateTime::from_millis(past) } };
        let query = Query::new(SESSIONS, query)
            .by(rawdoc! { "due": 1 })
            .limit(at_most);
        let token = random_token();
        let mut statements = Vec::new();
        let mut keys = Vec::new();
        for document in self.commands.find(query).await? {
            let document = SessionDocument::read(&document)?;
            let is_due = rawdoc! { "$lte": ["$due", { "$subtract": ["$$NOW", late_ms] }] };
            let query = rawdoc! {
                "_id": &*document.key,
                "e": document.epoch.cast_signed(),
                "$expr": is_due,
            };
            let take = rawdoc! { "$set": {
                "e": { "$add": ["$e", 1_i64] },
                "sv": { "$add": ["$sv", 1_i64] },
                "ct": binary(token),
                "due": { "$add": ["$$NOW", ADOPTION.as_millis() as i64] },
            } };
            statements.push(update(query, array([take]), false));
            keys.push(document.key);
        }
        for batch in write_commands(Verb::Update, SESSIONS, statements, Concern::Majority) {
            self.commands.write(batch.command).await?;
        }
        let mut adopted = Vec::new();
        for keys in keys.chunks(SESSIONS_MAX) {
            let keys = array(keys.iter().map(|key| &**key));
            let taken = rawdoc! { "_id": { "$in": keys }, "ct": binary(token) };
            let read = |document: &RawDocument| {
                let document = SessionDocument::read(document)?;
                if let Some(record) = document.record {
                    let held = Held {
                        key: document.key,
                        epoch: document.epoch,
                        is_known_to_others: true,
                    };
                    self.held.insert(record.session, Hold::Session(held));
                    adopted.push(StoredSession {
                        record,
                        subscriptions: document.subscriptions,
                        awaiting_release: Vec::new(),
                        exchanges: Vec::new(),
                        inbox: InboxSummary::default(),
                    });
                }
                Ok(())
            };
            self.commands
                .for_each(Query::new(SESSIONS, taken), read)
                .await?;
        }
        self.load_exchanges(adopted.iter_mut()).await?;
        Ok(adopted)
    }

    /// Takes what was left over longer than `late` ago and not dealt with, because the node that took
    /// the session was stopped. It is taken again, by this or another node, unless it is dealt with.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; what was taken may be taken again later.
    pub(crate) async fn adopt_leftovers(
        &self,
        late: Duration,
        at_most: i64,
    ) -> Result<Vec<Leftover>, StoreError> {
        let past = self.commands.now().await?.timestamp_millis() - late.as_millis() as i64;
        let past = bson::DateTime::from_millis(past);
        let is_late = || rawdoc! { "og.at": { "$lte": past } };
        let query = Query::new(SESSIONS, is_late())
            .only(rawdoc! { "_id": 1 })
            .by(rawdoc! { "og.at": 1 })
            .limit(at_most);
        let found = self.commands.find(query).await?;
        let mut keys = Vec::with_capacity(found.len());
        for document in &found {
            keys.push(Document::new("a session", document).text("_id")?);
        }
        let token = random_token();
        let take = |leftover: &str| {
            rawdoc! { "$cond": [
                { "$lte": [format!("{leftover}.at"), past] },
                { "$mergeObjects": [leftover, { "at": "$$NOW", "by": binary(token) }] },
                leftover,
            ] }
        };
        let taken = rawdoc! { "$map": { "input": "$og", "in": take("$$this") } };
        let taken = array([rawdoc! { "$set": { "og": taken } }]);
        let statements = keys.iter().map(|key| {
            let mut query = is_late();
            query.append(cstr!("_id"), *key);
            update(query, taken.clone(), false)
        });
        for batch in write_commands(Verb::Update, SESSIONS, statements, Concern::Majority) {
            self.commands.write(batch.command).await?;
        }
        let mut leftovers = Vec::new();
        for keys in keys.chunks(SESSIONS_MAX) {
            let keys = array(keys.iter().copied());
            let taken = rawdoc! { "_id": { "$in": keys }, "og.by": binary(token) };
            let read = |document: &RawDocument| {
                let fields = Document::new("a session", document);
                let mut mine = HashSet::new();
                for leftover in fields.array("og")? {
                    let leftover = Document::new("a session", leftover);
                    if leftover.session("by")? == Some(SessionId(token)) {
                        mine.extend(leftover.session("id")?);
                    }
                }
                let document = SessionDocument::read(document)?;
                let mut taken = document.leftovers;
                taken.retain(|leftover| mine.contains(&leftover.session));
                self.hold_leftovers(&document.key, &taken);
                leftovers.extend(taken);
                Ok(())
            };
            self.commands
                .for_each(Query::new(SESSIONS, taken), read)
                .await?;
        }
        Ok(leftovers)
    }
}

/// What those are marked with that one operation takes.
fn random_token() -> [u8; 12] {
    let mut token = [0; 12];
    getrandom::fill(&mut token).expect("the system has random numbers");
    token
}

fn unstored(request: &OpenRequest) -> OpenedSession {
    OpenedSession {
        session: StoredSession {
            record: request.fresh_record(),
            subscriptions: Vec::new(),
            awaiting_release: Vec::new(),
            exchanges: Vec::new(),
            inbox: InboxSummary::default(),
        },
        present: false,
        epoch: request.epoch_min,
        previous_epoch: 0,
        previous_node: None,
        leftovers: Vec::new(),
    }
}

fn is_missing(field: &str) -> RawDocumentBuf {
    rawdoc! { "$eq": [{ "$type": field }, "missing"] }
}
