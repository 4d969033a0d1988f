//! Commands to MongoDB, and what its answers mean.
//!
//! Everything is sent as a command, because only so many updates and deletes go in one on servers
//! before 8.0. The driver repeats none of the writes: the caller does, and every one here may be
//! applied twice. A command runs in a task of its own, because a future of the driver that is
//! dropped half-way takes its connection with it.

use std::time::Duration;

use bson::raw::{CString, RawArrayBuf, RawDocument, RawDocumentBuf};
use bson::{Binary, Bson, Document, RawBson, Timestamp, cstr, rawdoc, spec::BinarySubtype};
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use mongodb::error::{
    Error, ErrorKind, RETRYABLE_WRITE_ERROR, TRANSIENT_TRANSACTION_ERROR,
    UNKNOWN_TRANSACTION_COMMIT_RESULT, WriteFailure,
};
use mongodb::raw_batch_cursor::RawBatch;
use mongodb::{ClientSession, Database};

use crate::store::StoreError;

/// Bytes of documents in one command; the server refuses a command beyond 16 MiB.
const COMMAND_BYTES_MAX: usize = 8 << 20;
/// Documents or statements in one command: more would only hold up others.
const COMMAND_ITEMS_MAX: usize = 1000;
/// A document that is larger than this would not fit into a command.
pub(super) const DOCUMENT_BYTES_MAX: usize = 16 << 20;
/// Documents read at a time where all of them are wanted.
const PAGE_DOCUMENTS: i64 = 1000;

const DUPLICATE_KEY: i32 = 11_000;
const NAMESPACE_EXISTS: i32 = 48;
const MAX_TIME_EXPIRED: i32 = 50;
/// What an update would make of a document, or of an answer, is beyond 16 MiB.
const TOO_LARGE: [i32; 3] = [10_334, 17_419, 17_420];
/// Codes of what stays as it is until somebody mends it: no such user, no right, no such command or
/// not on this deployment, rules that somebody has made for the documents, indexes that are in the
/// way.
const REFUSED: [i32; 13] = [11, 13, 18, 20, 31, 59, 67, 85, 86, 115, 121, 166, 8000];
const UNAUTHORIZED: i32 = 13;

/// Codes of what the server will never accept, however often it is asked: that is our mistake.
const NONSENSE: [i32; 23] = [
    2, 9, 14, 15, 16, 17, 22, 28, 40, 52, 53, 54, 56, 57, 66, 72, 73, 168, 257, 263, 322, 323,
    40_415,
];

/// Labels of what is to be tried again, whatever its code: also of what the driver, or a newer
/// server, knows better than we do.
const AGAIN: [&str; 4] = [
    RETRYABLE_WRITE_ERROR,
    UNKNOWN_TRANSACTION_COMMIT_RESULT,
    "RetryableError",
    "SystemOverloadedError",
];

/// Where commands go to, and how long they may take.
#[derive(Clone, Debug)]
pub(super) struct Commands {
    database: Database,
    /// The servers and the database, without credentials.
    location: String,
    timeout: Duration,
}

/// Why a command failed.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// Others wrote to the same documents at the same time: the transaction counts for nothing.
    Conflict,
    /// A document with this key is there already.
    Duplicate,
    /// The collection is there already.
    Exists,
    /// The document of this statement would become larger than a document may be.
    TooLarge(usize),
    /// The server did not come to an end in the time that it was given.
    TooSlow,
    Store(StoreError),
}

/// The answer to a command that writes.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// How many documents matched or were made.
    pub(super) matched: i64,
    /// The statements that found a document with their key, where it was asked for.
    pub(super) duplicates: Vec<usize>,
    /// When it happened.
    pub(super) time: Option<Timestamp>,
}

impl Commands {
    pub(super) fn new(database: Database, location: String, timeout: Duration) -> Self {
        Self {
            database,
            location,
            timeout,
        }
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// Runs a command. A write that is not durable has failed, whatever else the answer says.
    pub(super) async fn run(&self, command: RawDocumentBuf) -> Result<Document, Failure> {
        let database = self.database.clone();
        let answer = async move { database.run_raw_command(command).await };
        let answer = self.finish(answer).await?;
        match answer.get_document("writeConcernError") {
            Ok(error) => {
                let reason = error.get_str("errmsg").unwrap_or_default();
                Err(StoreError::Unavailable(format!("not replicated: {reason}")).into())
            }
            Err(_) => Ok(answer),
        }
    }

    /// Runs a write, outside of a transaction. Statements that find their key taken are reported,
    /// all other errors of statements fail it.
    pub(super) async fn write(&self, command: RawDocumentBuf) -> Result<Outcome, StoreError> {
        let answer = self.run(command).await.map_err(StoreError::from)?;
        self.outcome(&answer).map_err(StoreError::from)
    }

    /// Writes all `items`, in no order, until a majority has them. What comes of it is as if it had been
    /// one command. It is one if it can be: the server syncs for one after the other.
    pub(super) async fn write_all(
        &self,
        verb: Verb,
        collection: &str,
        items: &[impl AsRef<RawDocument>],
    ) -> Result<Outcome, StoreError> {
        let batches = write_commands(verb, collection, items, Concern::Majority);
        let written = batches.into_iter().map(|batch| async move {
            let outcome = self.write(batch.command).await?;
            Ok::<_, StoreError>((batch.first, outcome))
        });
        let mut all = Outcome::default();
        for (first, outcome) in try_join_all(written).await? {
            all.matched += outcome.matched;
            let duplicates = outcome.duplicates.iter();
            all.duplicates.extend(duplicates.map(|index| first + index));
            all.time = all.time.max(outcome.time);
        }
        Ok(all)
    }

    /// Runs a write in the transaction of `session`: all of it, or nothing.
    pub(super) async fn write_in(
        &self,
        session: &mut ClientSession,
        command: RawDocumentBuf,
    ) -> Result<Outcome, Failure> {
        let answer = self.database.run_raw_command(command).session(session);
        let answer = self.in_time(answer).await?;
        let answer = answer.map_err(|error| self.failure(&error))?;
        let outcome = self.outcome(&answer)?;
        if outcome.duplicates.is_empty() {
            Ok(outcome)
        } else {
            Err(Failure::Duplicate)
        }
    }

    /// Runs a query in the transaction of `session`, which has one batch of results at most.
    pub(super) async fn find_in(
        &self,
        session: &mut ClientSession,
        find: RawDocumentBuf,
    ) -> Result<Vec<RawDocumentBuf>, Failure> {
        let failure = |error: Error| self.failure(&error);
        let cursor = self.database.run_raw_cursor_command(find);
        let cursor = cursor.session(&mut *session).batch();
        let mut cursor = self.in_time(cursor).await?.map_err(failure)?;
        let batch = cursor.stream(session).next().await;
        match batch {
            Some(batch) => Ok(documents(&batch.map_err(failure)?)?),
            None => Ok(Vec::new()),
        }
    }

    /// The first documents that `query` asks for: as many as one answer holds.
    pub(super) async fn find(&self, query: Query) -> Result<Vec<RawDocumentBuf>, StoreError> {
        let found = self.first_batch(query.into_command()).await;
        found.map_err(StoreError::from)
    }

    /// The same, unless the server has to look for them for longer than `time`.
    pub(super) async fn find_within(
        &self,
        time: Duration,
        query: Query,
    ) -> Result<Option<Vec<RawDocumentBuf>>, StoreError> {
        let mut command = query.into_command();
        command.append(cstr!("maxTimeMS"), time.as_millis() as i64);
        match self.first_batch(command).await {
            Err(Failure::TooSlow) => Ok(None),
            found => Ok(Some(found?)),
        }
    }

    async fn first_batch(&self, command: RawDocumentBuf) -> Result<Vec<RawDocumentBuf>, Failure> {
        let database = self.database.clone();
        let batch = async move {
            let mut cursor = database.run_raw_cursor_command(command).batch().await?;
            cursor.next().await.transpose()
        };
        match self.finish(batch).await? {
            Some(batch) => Ok(documents(&batch)?),
            None => Ok(Vec::new()),
        }
    }

    /// Hands every document that matches to `each`, in the order of their keys, page by page.
    pub(super) async fn for_each(
        &self,
        query: Query,
        mut each: impl FnMut(&RawDocument) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut after: Option<RawBson> = None;
        loop {
            let mut page = query.clone().limit(PAGE_DOCUMENTS);
            if let Some(after) = after {
                let mut both = RawArrayBuf::new();
                both.push(rawdoc! { "_id": { "$gt": after } });
                both.push(page.filter);
                page.filter = rawdoc! { "$and": both };
            }
            let documents = self.find(page).await?;
            let Some(last) = documents.last() else {
                return Ok(());
            };
            let key = last
                .get("_id")
                .ok()
                .flatten()
                .ok_or(StoreError::Damaged { what: "a key" })?;
            after = Some(key.into());
            documents
                .iter()
                .try_for_each(|document| each(document.as_ref()))?;
        }
    }

    /// What the primary's clock says.
    pub(super) async fn now(&self) -> Result<bson::DateTime, StoreError> {
        let hello = self
            .run(rawdoc! { "hello": 1 })
            .await
            .map_err(StoreError::from)?;
        hello
            .get_datetime("localTime")
            .copied()
            .map_err(|_| StoreError::Io("the answer to `hello` has no time".to_owned()))
    }

    async fn finish<T: Send + 'static>(
        &self,
        answer: impl Future<Output = mongodb::error::Result<T>> + Send + 'static,
    ) -> Result<T, Failure> {
        match self.in_time(tokio::spawn(answer)).await? {
            Ok(answer) => answer.map_err(|error| self.failure(&error)),
            Err(ended) => Err(StoreError::Io(ended.to_string()).into()),
        }
    }

    /// Waits no longer for an answer than one may take.
    pub(super) async fn in_time<T>(
        &self,
        answer: impl IntoFuture<Output = T>,
    ) -> Result<T, Failure> {
        let answer = tokio::time::timeout(self.timeout, answer.into_future()).await;
        answer.map_err(|_| {
            let seconds = self.timeout.as_secs_f32();
            StoreError::Unavailable(format!("no answer in {seconds} s")).into()
        })
    }

    /// Reads what an answer with `ok: 1` may still have to say about single statements.
    fn outcome(&self, answer: &Document) -> Result<Outcome, Failure> {
        let mut duplicates = Vec::new();
        for error in answer.get_array("writeErrors").into_iter().flatten() {
            let error = error.as_document();
            let number = |key| {
                let value = error.and_then(|error| error.get(key));
                value.and_then(Bson::as_i32).unwrap_or(-1)
            };
            let reason = error.and_then(|error| error.get_str("errmsg").ok());
            match (number("code"), usize::try_from(number("index"))) {
                (DUPLICATE_KEY, Ok(index)) => duplicates.push(index),
                (code, Ok(index)) if TOO_LARGE.contains(&code) => {
                    return Err(Failure::TooLarge(index));
                }
                (code, _) => {
                    return Err(self
                        .by_code(code, reason.unwrap_or("no reason given"))
                        .into());
                }
            }
        }
        Ok(Outcome {
            matched: integer(answer, "n").unwrap_or(0),
            duplicates,
            time: answer.get_timestamp("operationTime").ok(),
        })
    }

    pub(super) fn failure(&self, error: &Error) -> Failure {
        // Without labels and the server's answer, which the kind has told.
        let error_text = || error.kind.to_string();
        match &*error.kind {
            ErrorKind::Command(command) if command.code == DUPLICATE_KEY => Failure::Duplicate,
            ErrorKind::Command(command) if command.code == NAMESPACE_EXISTS => Failure::Exists,
            // Also set when the connection broke or the primary changed: a new attempt decides.
            ErrorKind::Command(_) if error.contains_label(TRANSIENT_TRANSACTION_ERROR) => {
                Failure::Conflict
            }
            _ if AGAIN.iter().any(|label| error.contains_label(label)) => {
                StoreError::Unavailable(error_text()).into()
            }
            ErrorKind::Command(command) if command.code == MAX_TIME_EXPIRED => Failure::TooSlow,
            ErrorKind::Command(command) => self.by_code(command.code, &command.message).into(),
            ErrorKind::Write(WriteFailure::WriteConcernError(_))
            | ErrorKind::Io(_)
            // Another attempt has another connection, and perhaps another server.
            | ErrorKind::InvalidResponse { .. }
            | ErrorKind::ConnectionPoolCleared { .. }
            | ErrorKind::ServerSelection { .. }
            | ErrorKind::DnsResolve { .. } => StoreError::Unavailable(error_text()).into(),
            ErrorKind::Authentication { .. }
            | ErrorKind::InvalidTlsConfig { .. }
            | ErrorKind::InvalidArgument { .. }
            | ErrorKind::IncompatibleServer { .. }
            | ErrorKind::SessionsNotSupported => self.unusable(error_text()).into(),
            _ => StoreError::Io(error_text()).into(),
        }
    }

    /// What is not known to be final may pass: no primary, shutting down, too slow, no room, in
    /// conflict with another write, an error inside of the server. Nothing is acknowledged while it
    /// is tried again; that is all there is to lose.
    fn by_code(&self, code: i32, reason: &str) -> StoreError {
        if REFUSED.contains(&code) {
            let remedy = match code {
                UNAUTHORIZED => "; midge's user needs the role readWrite on this database",
                _ => "",
            };
            return self.unusable(format!("{reason} ({code}){remedy}"));
        }
        if NONSENSE.contains(&code) || TOO_LARGE.contains(&code) {
            return StoreError::Io(format!("{reason} ({code})"));
        }
        StoreError::Unavailable(format!("{reason} ({code})"))
    }

    pub(super) fn unusable(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Unusable {
            path: self.location.clone(),
            reason: reason.into(),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Outside of a transaction nothing conflicts for long.
impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Store(error) => error,
            Failure::TooLarge(_) => Self::Io("a document is too large".to_owned()),
            Failure::TooSlow => Self::Unavailable("it took the server too long".to_owned()),
            Failure::Conflict => Self::Unavailable("others write to the same documents".to_owned()),
            Failure::Exists | Failure::Duplicate => {
                Self::Unavailable("the key is taken".to_owned())
            }
        }
    }
}

/// A query for documents, in the order of their keys if nothing else is said, of which only what is durable is seen.
#[derive(Clone, Debug)]
pub(super) struct Query {
    collection: &'static str,
    filter: RawDocumentBuf,
    projection: Option<RawDocumentBuf>,
    order: RawDocumentBuf,
    limit: i64,
    after: Option<Timestamp>,
}

impl Query {
    pub(super) fn new(collection: &'static str, filter: RawDocumentBuf) -> Self {
        Self {
            collection,
            filter,
            projection: None,
            order: rawdoc! { "_id": 1 },
            limit: 0,
            after: None,
        }
    }

    pub(super) fn only(self, projection: RawDocumentBuf) -> Self {
        let projection = Some(projection);
        Self { projection, ..self }
    }

    /// In another order, which an index has.
    pub(super) fn by(self, order: RawDocumentBuf) -> Self {
        Self { order, ..self }
    }

    pub(super) fn limit(self, limit: i64) -> Self {
        Self { limit, ..self }
    }

    /// Sees whatever was durable at `time`.
    pub(super) fn after(self, time: Option<Timestamp>) -> Self {
        Self {
            after: time,
            ..self
        }
    }

    fn into_command(self) -> RawDocumentBuf {
        let mut concern = rawdoc! { "level": "majority" };
        if let Some(after) = self.after {
            concern.append(cstr!("afterClusterTime"), after);
        }
        let mut command = rawdoc! {
            "find": self.collection,
            "filter": self.filter,
            "sort": self.order,
            "limit": self.limit,
            "singleBatch": true,
            "readConcern": concern,
        };
        // Without it, an answer ends after 101 documents.
        let at_most = match self.limit {
            0 => i64::from(i32::MAX),
            limit => limit,
        };
        command.append(cstr!("batchSize"), at_most);
        if let Some(projection) = self.projection {
            command.append(cstr!("projection"), projection);
        }
        command
    }
}

/// How durable a write is before it is answered. In a transaction its commit decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Concern {
    Majority,
    /// May be lost with the primary.
    Primary,
    OfTransaction,
}

/// What a command that writes does with its items.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    Insert,
    Update,
    Delete,
}

/// A command, and which of all items is the first that it writes.
#[derive(Debug)]
pub(super) struct WriteCommand {
    pub(super) command: RawDocumentBuf,
    pub(super) first: usize,
}

/// Commands that write all `items`, none of them larger than the server allows.
pub(super) fn write_commands(
    verb: Verb,
    collection: &str,
    items: impl IntoIterator<Item = impl AsRef<RawDocument>>,
    concern: Concern,
) -> Vec<WriteCommand> {
    let (name, list) = match verb {
        Verb::Insert => (cstr!("insert"), cstr!("documents")),
        Verb::Update => (cstr!("update"), cstr!("updates")),
        Verb::Delete => (cstr!("delete"), cstr!("deletes")),
    };
    let mut commands = Vec::new();
    let mut first = 0;
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() {
        let mut batch = RawArrayBuf::new();
        let (mut bytes, mut count) = (0, 0);
        while let Some(item) = items.next_if(|item| {
            let with_item = bytes + item.as_ref().as_bytes().len();
            count == 0 || count < COMMAND_ITEMS_MAX && with_item <= COMMAND_BYTES_MAX
        }) {
            bytes += item.as_ref().as_bytes().len();
            count += 1;
            batch.push(item.as_ref());
        }
        let mut command = RawDocumentBuf::new();
        command.append(name, collection);
        command.append(list, batch);
        // In a transaction the first error ends it.
        command.append(cstr!("ordered"), concern == Concern::OfTransaction);
        match concern {
            Concern::Majority => {
                command.append(cstr!("writeConcern"), rawdoc! { "w": "majority" });
            }
            Concern::Primary => command.append(cstr!("writeConcern"), rawdoc! { "w": 1 }),
            Concern::OfTransaction => {}
        }
        commands.push(WriteCommand { command, first });
        first += count;
    }
    commands
}

/// One update statement.
pub(super) fn update(
    query: RawDocumentBuf,
    update: impl Into<RawBson>,
    upsert: bool,
) -> RawDocumentBuf {
    rawdoc! { "q": query, "u": update.into(), "upsert": upsert }
}

/// One delete statement, for one document.
pub(super) fn delete(query: RawDocumentBuf) -> RawDocumentBuf {
    rawdoc! { "q": query, "limit": 1 }
}

pub(super) fn binary(bytes: impl Into<Vec<u8>>) -> Binary {
    Binary {
        subtype: BinarySubtype::Generic,
        bytes: bytes.into(),
    }
}

/// The name of a field that is only known at run time.
///
/// # Panics
/// If `name` contains U+0000: names are made of hexadecimal digits.
pub(super) fn field(name: String) -> CString {
    CString::try_from(name).expect("hexadecimal digits and dots")
}

pub(super) fn array<T: Into<RawBson>>(items: impl IntoIterator<Item = T>) -> RawArrayBuf {
    items.into_iter().map(Into::<RawBson>::into).collect()
}

/// An integer, whichever type the server chose for it.
pub(super) fn integer(document: &Document, key: &str) -> Option<i64> {
    match document.get(key)? {
        Bson::Int32(value) => Some(i64::from(*value)),
        Bson::Int64(value) => Some(*value),
        Bson::Double(value) => Some(*value as i64),
        _ => None,
    }
}

fn documents(batch: &RawBatch) -> Result<Vec<RawDocumentBuf>, StoreError> {
    let damaged = |_| StoreError::Damaged {
        what: "an answer of the server",
    };
    let slices = batch
        .doc_slices()
        .map_err(|error| StoreError::Io(error.to_string()))?;
    slices
        .into_iter()
        .map(|document| match document.map_err(damaged)?.as_document() {
            Some(document) => Ok(document.to_owned()),
            None => Err(StoreError::Damaged {
                what: "an answer of the server",
            }),
        })
        .collect()
}
