//! Frames in a capped collection, which every node reads at its end.
//!
//! A document is `{_id: ObjectId, to: long, f: Binary}`, `to` being a node or 0 for all. The
//! collection keeps them in the order in which they were inserted and overwrites the oldest.
//! A reader finds its place again by time: an ObjectId begins with the second at which its sender
//! made it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use mongodb::bson::oid::ObjectId;
use mongodb::bson::raw::{CStr, cstr};
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{RawBinaryRef, RawDocument, RawDocumentBuf, doc};
use mongodb::error::{Error, ErrorKind};
use mongodb::options::{
    Acknowledgment, CollectionOptions, CursorType, Hint, ReadConcern, ReadPreference,
    SelectionCriteria, WriteConcern,
};
use mongodb::raw_batch_cursor::RawBatchCursor;
use mongodb::{Collection, Database};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::{Bus, BusError, Destination};
use crate::metrics::Counter;

const COLLECTION: &str = "bus";

/// Bytes of frames that the collection keeps. Too few, and a node that stops for a moment misses
/// some; a cursor that is opened anew looks at all of them.
pub(crate) const CAPPED_BYTES: u64 = 256 * 1024 * 1024;

const TO_ALL: i64 = 0;

const TO: &CStr = cstr!("to");
const FRAME: &CStr = cstr!("f");

/// How long the server may take for an insert, or to say that there is nothing new, which it does
/// every second. Afterwards the connection counts as dead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

const REOPEN_DELAY: Duration = Duration::from_millis(200);

/// Frames that have been read and wait for whoever subscribed; the rest waits in the collection.
const READ_AHEAD_FRAMES: usize = 64;

/// How far the clocks of two nodes may be apart in their ObjectIds. Further, and frames are missed
/// when a cursor is lost: they have to be asked for again.
const CLOCK_SKEW_SECONDS: u32 = 120;

/// The code of the server for a collection that is already there.
const NAMESPACE_EXISTS: i32 = 48;

/// A bus for when there is no Redis.
#[derive(Clone, Debug)]
pub(crate) struct MongoBus {
    node: i64,
    collection: Collection<RawDocumentBuf>,
    reconnects: Arc<Counter>,
}

impl MongoBus {
    /// Makes the collection if it is not there; one that is keeps its size.
    ///
    /// # Errors
    /// `BusError` if it cannot be made, or is not capped and holds something else than frames.
    pub(crate) async fn open(
        database: &Database,
        node: u32,
        capped_bytes: u64,
    ) -> Result<Self, BusError> {
        let created = database
            .create_collection(COLLECTION)
            .capped(true)
            .size(capped_bytes)
            .await;
        match created {
            Err(error) if is_command_error(&error, NAMESPACE_EXISTS) => {
                see_that_it_is_capped(database, capped_bytes).await?;
            }
            other => other?,
        }
        // What the end of the collection may lose in a fail-over, links send again.
        let options = CollectionOptions::builder()
            .write_concern(WriteConcern::builder().w(Acknowledgment::Nodes(1)).build())
            .read_concern(ReadConcern::local())
            .selection_criteria(SelectionCriteria::ReadPreference(ReadPreference::Primary))
            .build();
        Ok(Self {
            node: node.into(),
            collection: database.collection_with_options(COLLECTION, options),
            reconnects: Arc::default(),
        })
    }

    async fn insert(&self, documents: Vec<RawDocumentBuf>) -> Result<(), BusError> {
        let collection = self.collection.clone();
        // A task of its own: the driver must not be interrupted in the middle of a command.
        let inserting =
            tokio::spawn(async move { collection.insert_many(documents).ordered(true).await });
        match timeout(ANSWER_TIMEOUT, inserting).await {
            Ok(Ok(inserted)) => inserted.map(drop).map_err(BusError::from),
            Ok(Err(stopped)) => Err(BusError::Unavailable(stopped.to_string())),
            Err(late) => Err(BusError::Unavailable(late.to_string())),
        }
    }

    /// A document that marks how far the collection goes now. It also keeps the collection from
    /// being empty: there the server closes a cursor at once.
    async fn insert_marker(&self) -> Result<ObjectId, BusError> {
        let id = ObjectId::new();
        self.insert(vec![document(id, self.node, &[])]).await?;
        Ok(id)
    }

    /// A cursor over what was sent around `id` or later, the oldest first.
    async fn open_cursor(&self, id: ObjectId) -> Result<RawBatchCursor, BusError> {
        let from = id
            .timestamp()
            .timestamp_millis()
            .saturating_div(1000)
            .saturating_sub(CLOCK_SKEW_SECONDS.into());
        let from = ObjectId::from_parts(u32::try_from(from).unwrap_or(0), [0; 5], [0; 3]);
        let filter = doc! { "to": { "$in": [self.node, TO_ALL] }, "_id": { "$gte": from } };
        let find = self
            .collection
            .find(filter)
            .cursor_type(CursorType::TailableAwait)
            .hint(Hint::Keys(doc! { "$natural": 1 }))
            .batch();
        Ok(find.await?)
    }
}

#[async_trait]
impl Bus for MongoBus {
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        let documents = frames
            .iter()
            .map(|(to, frame)| {
                let to = match to {
                    Destination::Node(node) => i64::from(*node),
                    Destination::All => TO_ALL,
                };
                document(ObjectId::new(), to, frame)
            })
            .collect();
        self.insert(documents).await
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        let marker = self.insert_marker().await?;
        let cursor = self.open_cursor(marker).await?;
        let (sender, frames) = mpsc::channel(READ_AHEAD_FRAMES);
        let tail = Tail {
            bus: self.clone(),
            last: marker,
            begin_after: Some(marker),
            frames: sender,
        };
        // Ends when nobody takes frames any more.
        tokio::spawn(tail.run(cursor));
        Ok(frames)
    }

    /// A frame is such a write itself.
    fn is_quick(&self) -> bool {
        false
    }

    fn reconnects(&self) -> u64 {
        self.reconnects.get()
    }
}

/// Follows the end of the collection.
struct Tail {
    bus: MongoBus,
    /// The last document that was read.
    last: ObjectId,
    /// The document at which reading begins; older ones were not sent to this subscriber.
    begin_after: Option<ObjectId>,
    frames: mpsc::Sender<Bytes>,
}

impl Tail {
    async fn run(mut self, mut cursor: RawBatchCursor) {
        let frames = self.frames.clone();
        tokio::select! {
            () = frames.closed() => {}
            () = async {
                loop {
                    let reason = self.follow(&mut cursor).await;
                    tracing::warn!(event = "bus_cursor_lost", %reason, "reading it anew");
                    cursor = self.reopen().await;
                    self.bus.reconnects.inc();
                }
            } => {}
        }
    }

    /// Returns why the cursor yields nothing more.
    async fn follow(&mut self, cursor: &mut RawBatchCursor) -> BusError {
        let failed = |reason: &dyn ToString| BusError::Unavailable(reason.to_string());
        loop {
            let batch = match timeout(ANSWER_TIMEOUT, cursor.next()).await {
                Ok(Some(Ok(batch))) => batch,
                Ok(Some(Err(error))) => return error.into(),
                Ok(None) => return failed(&"the server closed the cursor"),
                Err(late) => return failed(&late),
            };
            let documents = match batch.doc_slices() {
                Ok(documents) => documents,
                Err(error) => return error.into(),
            };
            for document in documents {
                let document = document.ok().and_then(|value| value.as_document());
                let Some((id, frame)) = document.and_then(read_document) else {
                    return failed(&"a document is not one of ours");
                };
                self.last = id;
                if self.begin_after == Some(id) {
                    self.begin_after = None;
                }
                let is_marker = frame.is_empty();
                if !is_marker && self.begin_after.is_none() {
                    // Closed: the caller sees that as well.
                    let _ = self.frames.send(Bytes::copy_from_slice(frame)).await;
                }
            }
        }
    }

    /// A cursor that begins before the place at which the last one was lost.
    async fn reopen(&mut self) -> RawBatchCursor {
        loop {
            sleep(REOPEN_DELAY).await;
            match self.try_reopen().await {
                Ok(cursor) => return cursor,
                Err(error) => {
                    tracing::debug!(event = "bus_cursor_not_opened", %error);
                }
            }
        }
    }

    async fn try_reopen(&mut self) -> Result<RawBatchCursor, BusError> {
        let marker = self.bus.insert_marker().await?;
        if self.begin_after.is_some() {
            // The old one may have been overwritten, and would be waited for in vain.
            self.begin_after = Some(marker);
        }
        self.bus.open_cursor(self.last).await
    }
}

fn document(id: ObjectId, to: i64, frame: &[u8]) -> RawDocumentBuf {
    let mut document = RawDocumentBuf::new();
    document.append(cstr!("_id"), id);
    document.append(TO, to);
    let frame = RawBinaryRef {
        subtype: BinarySubtype::Generic,
        bytes: frame,
    };
    document.append(FRAME, frame);
    document
}

fn read_document(document: &RawDocument) -> Option<(ObjectId, &[u8])> {
    let id = document.get_object_id("_id").ok()?;
    let frame = document.get_binary("f").ok()?;
    Some((id, frame.bytes))
}

/// A collection with frames that is not capped was made by a node that sent some just after the
/// database had been dropped. One with anything else is not ours.
async fn see_that_it_is_capped(database: &Database, capped_bytes: u64) -> Result<(), BusError> {
    let mut collections = database
        .list_collections()
        .filter(doc! { "name": COLLECTION })
        .await?;
    while let Some(collection) = collections.next().await {
        if collection?.options.capped == Some(true) {
            return Ok(());
        }
    }
    let is_no_frame = doc! { "$or": [
        { "to": { "$not": { "$type": "long" } } },
        { "f": { "$not": { "$type": "binData" } } },
    ] };
    let collection = database.collection::<RawDocumentBuf>(COLLECTION);
    if collection.find_one(is_no_frame).await?.is_some() {
        let name = format!("{}.{COLLECTION}", database.name());
        return Err(BusError::NotOurs(name));
    }
    let bytes = i64::try_from(capped_bytes).unwrap_or(i64::MAX);
    let convert = doc! { "convertToCapped": COLLECTION, "size": bytes };
    database.run_command(convert).await?;
    Ok(())
}

fn is_command_error(error: &Error, code: i32) -> bool {
    matches!(&*error.kind, ErrorKind::Command(command) if command.code == code)
}

impl From<Error> for BusError {
    fn from(error: Error) -> Self {
        // Without labels and the server's answer, which the kind has told.
        Self::Unavailable(error.kind.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bus::contract::{self, numbered, take, to};
    use crate::bus::mongod::Mongod;

    const MEBIBYTE: u64 = 1024 * 1024;

    #[tokio::test]
    async fn it_is_a_bus() {
        let mongod = Mongod::shared().await;
        let database = mongod.database().await;
        let one = MongoBus::open(&database, 1, 64 * MEBIBYTE).await.unwrap();
        let two = MongoBus::open(&database, 2, 64 * MEBIBYTE).await.unwrap();
        contract::frames_come_to_whom_they_were_sent_in_order(&one, &two).await;
        contract::large_frames_come_whole(&one).await;
        mongod.end().await;
    }

    #[tokio::test]
    async fn a_killed_cursor_misses_nothing() {
        let mongod = Mongod::start().await;
        let database = mongod.database().await;
        let bus = MongoBus::open(&database, 1, MEBIBYTE).await.unwrap();
        let mut frames = bus.subscribe().await.unwrap();
        bus.send(to(Destination::All, 0..10)).await.unwrap();
        assert_eq!(take(&mut frames, 10).await, numbered(0..10));

        let admin = database.client().database("admin");
        admin
            .run_command(doc! { "killAllSessions": [] })
            .await
            .unwrap();
        bus.send(to(Destination::All, 10..20)).await.unwrap();
        // Frames may come again.
        let mut last = 9;
        while last < 19 {
            let number = u32::from_be_bytes((*frames.recv().await.unwrap()).try_into().unwrap());
            assert!(number <= last + 1, "{number} after {last}");
            last = last.max(number);
        }
    }

    #[tokio::test]
    async fn a_restarted_server_is_found_again() {
        let mut mongod = Mongod::start().await;
        let database = mongod.database().await;
        let bus = MongoBus::open(&database, 1, MEBIBYTE).await.unwrap();
        let mut frames = bus.subscribe().await.unwrap();

        mongod.restart();
        while bus.send(to(Destination::Node(1), 7..8)).await.is_err() {}
        assert_eq!(take(&mut frames, 1).await, numbered(7..8));
        assert_eq!(bus.reconnects(), 1);
    }

    #[tokio::test]
    async fn a_reader_that_was_overtaken_goes_on_with_what_is_left() {
        let mongod = Mongod::shared().await;
        let database = mongod.database().await;
        let bus = MongoBus::open(&database, 1, MEBIBYTE).await.unwrap();
        let mut frames = bus.subscribe().await.unwrap();
        // Read ahead are at most an answer of 16 MiB and the frames in the channel.
        for number in 0_u32..200 {
            let mut frame = vec![0; 256 * 1024];
            frame.extend(number.to_be_bytes());
            bus.send(vec![(Destination::All, frame.into())])
                .await
                .unwrap();
        }

        let mut numbers = BTreeSet::new();
        while !numbers.contains(&199) {
            let frame = frames.recv().await.unwrap();
            numbers.insert(u32::from_be_bytes(*frame.last_chunk().unwrap()));
        }
        assert!(numbers.contains(&0));
        assert!(numbers.len() < 200);
        mongod.end().await;
    }

    #[tokio::test]
    async fn a_collection_of_somebody_else_is_refused() {
        let mongod = Mongod::shared().await;
        let database = mongod.database().await;
        let theirs = database.collection(COLLECTION);
        theirs.insert_one(doc! { "line": 7 }).await.unwrap();

        let refused = MongoBus::open(&database, 1, MEBIBYTE).await.unwrap_err();
        let BusError::NotOurs(collection) = refused else {
            panic!("{refused}");
        };
        assert_eq!(collection, format!("{}.{COLLECTION}", database.name()));
        mongod.end().await;
    }

    #[tokio::test]
    async fn a_collection_that_an_insert_made_becomes_a_bus() {
        let mongod = Mongod::shared().await;
        let database = mongod.database().await;
        let inserted = document(ObjectId::new(), 2, b"frame");
        let made = database.collection::<RawDocumentBuf>(COLLECTION);
        made.insert_one(inserted).await.unwrap();

        let bus = MongoBus::open(&database, 1, MEBIBYTE).await.unwrap();
        let mut frames = bus.subscribe().await.unwrap();
        bus.send(to(Destination::All, 0..10)).await.unwrap();
        assert_eq!(take(&mut frames, 10).await, numbered(0..10));
        mongod.end().await;
    }
}
