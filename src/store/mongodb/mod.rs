//! The store that nodes share: a MongoDB replica set.
//!
//! Owns its documents ([`documents`]) and this node's place among the nodes. A session belongs to
//! one node at a time, by the epoch of its document: whatever a node that has lost it still writes
//! changes nothing ([`mod@write`]). It never asks another node for anything.
//!
//! Start reading at [`MongoStore`].

mod batch;
mod clients;
mod commands;
mod documents;
mod estimates;
mod garbage;
mod groups;
mod held;
mod import;
mod log;
mod milestones;
mod nodes;
mod open;
mod resume;
mod retained;
mod schema;
mod write;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bson::raw::RawDocumentBuf;
use hashbrown::HashMap;
use mongodb::options::ClientOptions;
use mongodb::{Client, Database};
use parking_lot::Mutex;

use self::commands::{Commands, Query, binary};
use self::documents::{
    AWAITING, Document, EXCHANGES, GARBAGE, INBOX, RETAINED, SESSIONS, SessionDocument,
};
use self::held::HeldSessions;
use self::write::Transactions;
use super::{
    Change, Chunk, InboxRange, InboxSummary, Messages, OutgoingExchange, SessionId, Store,
    StoreError, Stored, StoredSession, Written, format,
};
use crate::mqtt::PacketId;

pub(crate) use self::clients::{ClientRow, ClientsAsked};
pub(crate) use self::estimates::Estimates;
pub(crate) use self::groups::{GroupPlace, GroupRequest};
pub(crate) use self::log::SharedSession;
pub(crate) use self::nodes::{NodeRow, NodeState};
pub(crate) use self::open::{Leftover, OpenRequest, OpenedSession};
use self::retained::KnownTopics;
pub(crate) use self::retained::RetainedRange;

/// Connections to the server at most, unless the URI says otherwise.
const POOL_SIZE: u32 = 32;

/// How often the servers are asked how they are, and how long an answer may take beyond that, unless
/// the URI says otherwise: a primary that has stopped answering is left after both.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Sessions in one query for exchanges.
const RANGES_MAX: usize = 100;

/// Chunks read at a time.
const PAGE_CHUNKS: i64 = 500;

/// Chunks that are read before it is known how large they are.
const FIRST_CHUNKS: i64 = 2;

/// An answer with fewer bytes than this was not cut short by the server, which does so at 16 MiB.
const ANSWER_BYTES_MIN: usize = 1024 * 1024;

/// Where the database is, and who asks.
#[derive(Clone)]
pub(crate) struct MongoOptions {
    pub(crate) uri: String,
    pub(crate) database: String,
    /// What people call this node.
    pub(crate) node_name: String,
    /// How long one operation waits for the server. Too low: a fail-over looks like an error; too
    /// high: errors are seen late.
    pub(crate) timeout: Duration,
}

/// The state of all nodes, seen and changed by one of them.
#[derive(Clone)]
pub(crate) struct MongoStore {
    commands: Commands,
    timeout: Duration,
    node: u32,
    /// The server session of its transactions, which tells this run of it from all others.
    run: Arc<RawDocumentBuf>,
    name: Arc<str>,
    cluster: String,
    held: Arc<HeldSessions>,
    #[expect(
        clippy::disallowed_types,
        reason = "one transaction of a node at a time"
    )]
    transactions: Arc<tokio::sync::Mutex<Transactions>>,
    /// The last entry of this node's subscription log.
    log_entry: Arc<Mutex<u64>>,
    known_topics: Arc<Mutex<KnownTopics>>,
}

impl MongoStore {
    /// Gets a number for a new node, making the collections if they are not there. Nothing can be
    /// written before [`MongoStore::join`].
    ///
    /// # Errors
    /// `Unusable` if this is no replica set of MongoDB 6.0 or newer, belongs to a newer midge,
    /// refuses this user or is [being filled](mod@import); `Unavailable` if it cannot be reached
    /// now.
    pub(crate) async fn connect(options: MongoOptions) -> Result<Arc<Self>, StoreError> {
        let store = Self::reach(options).await?;
        // What is loaded from now on is nobody's unfinished work.
        store.verify_complete().await?;
        Ok(store)
    }

    async fn reach(options: MongoOptions) -> Result<Arc<Self>, StoreError> {
        let unusable = |error: mongodb::error::Error| StoreError::Unusable {
            path: "store.uri".to_owned(),
            reason: error.to_string(),
        };
        let mut client = ClientOptions::parse(&options.uri).await.map_err(unusable)?;
        client.app_name.get_or_insert_with(|| "midge".to_owned());
        client.max_pool_size.get_or_insert(POOL_SIZE);
        client
            .server_selection_timeout
            .get_or_insert(options.timeout);
        client.heartbeat_freq.get_or_insert(HEARTBEAT_INTERVAL);
        client.connect_timeout.get_or_insert(CONNECT_TIMEOUT);
        // Every command says what it needs: with others, transactions would be refused.
        client.selection_criteria = None;
        client.read_concern = None;
        client.write_concern = None;
        let hosts: Vec<_> = client.hosts.iter().map(ToString::to_string).collect();
        let location = format!("mongodb://{}/{}", hosts.join(","), options.database);
        let database = Client::with_options(client)
            .map_err(unusable)?
            .database(&options.database);
        let commands = Commands::new(database, location, options.timeout);
        schema::verify_server(&commands).await?;
        schema::prepare(&commands).await?;
        let session = commands.database().client().start_session().await;
        let session = session.map_err(unusable)?;
        let node = nodes::new_number(&commands).await?;
        let transactions = Transactions::new(session);
        Ok(Arc::new(Self {
            cluster: schema::cluster_name(&commands).await?,
            run: Arc::new(transactions.id()?),
            transactions: Arc::new(transactions.into()),
            commands,
            timeout: options.timeout,
            node,
            name: options.node_name.into(),
            held: Arc::default(),
            log_entry: Arc::default(),
            known_topics: Arc::default(),
        }))
    }

    /// Where other things that nodes share may be kept.
    pub(crate) fn database(&self) -> &Database {
        self.commands.database()
    }

    /// A name that no other cluster has, whatever server and database it uses.
    pub(crate) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// This node, for as long as its process runs; no other in this database has ever had this number.
    pub(crate) fn node(&self) -> u32 {
        self.node
    }

    /// How long one operation waits for the server.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Forgets about a session of which this node will write nothing any more as of an epoch before
    /// `epoch`: it has ended, or another node has it.
    pub(crate) fn forget(&self, session: SessionId, epoch: u64) {
        self.held.forget(session, epoch);
    }

    /// Adds what is not in their documents to `sessions`: their exchanges.
    async fn load_exchanges(
        &self,
        sessions: impl Iterator<Item = &mut StoredSession>,
    ) -> Result<(), StoreError> {
        let mut sessions: Vec<_> = sessions.collect();
        for sessions in sessions.chunks_mut(RANGES_MAX) {
            let mut by_id = HashMap::new();
            let mut ranges = bson::raw::RawArrayBuf::new();
            for stored in sessions {
                ranges.push(documents::packets_of(stored.record.session));
                by_id.insert(stored.record.session, stored);
            }
            let ranges = bson::rawdoc! { "$or": ranges };
            self.commands
                .for_each(Query::new(EXCHANGES, ranges.clone()), |document| {
                    let (session, exchange) = read_exchange(document)?;
                    if let Some(stored) = by_id.get_mut(&session) {
                        stored.exchanges.push(exchange);
                    }
                    Ok(())
                })
                .await?;
            self.commands
                .for_each(Query::new(AWAITING, ranges), |document| {
                    let (session, packet_id) = read_awaiting_key(document)?;
                    if let Some(stored) = by_id.get_mut(&session) {
                        stored.awaiting_release.push(packet_id);
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }

    /// All sessions, without summaries of their inboxes.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn load_sessions(&self) -> Result<Stored, StoreError> {
        let mut stored = Stored::default();
        let mut places = HashMap::new();
        let sessions = Query::new(SESSIONS, RawDocumentBuf::new());
        self.commands
            .for_each(sessions, |document| {
                let document = SessionDocument::read(document)?;
                if let Some(record) = document.record {
                    places.insert(record.session, stored.sessions.len());
                    stored.sessions.push(StoredSession {
                        record,
                        subscriptions: document.subscriptions,
                        awaiting_release: Vec::new(),
                        exchanges: Vec::new(),
                        inbox: InboxSummary::default(),
                    });
                }
                Ok(())
            })
            .await?;
        self.commands
            .for_each(Query::new(EXCHANGES, milestones::except()), |document| {
                let (session, exchange) = read_exchange(document)?;
                if let Some(place) = places.get(&session) {
                    stored.last_hlc = stored.last_hlc.max(exchange.message.hlc);
                    stored.sessions[*place].exchanges.push(exchange);
                }
                Ok(())
            })
            .await?;
        self.commands
            .for_each(Query::new(AWAITING, milestones::except()), |document| {
                let (session, packet_id) = read_awaiting_key(document)?;
                if let Some(place) = places.get(&session) {
                    stored.sessions[*place].awaiting_release.push(packet_id);
                }
                Ok(())
            })
            .await?;
        Ok(stored)
    }

    async fn load_all(&self) -> Result<Stored, StoreError> {
        let mut stored = self.load_sessions().await?;
        let sessions = stored.sessions.iter().enumerate();
        let places: HashMap<_, _> = sessions
            .map(|(place, stored)| (stored.record.session, place))
            .collect();
        self.commands
            .for_each(Query::new(INBOX, milestones::except()), |document| {
                let fields = Document::new("a chunk", document);
                let (session, key) = format::read_inbox_key(fields.required_bytes("_id")?)?;
                if let Some(place) = places.get(&session) {
                    let summary = format::read_chunk_summary(fields.required_bytes("b")?)?;
                    let inbox = &mut stored.sessions[*place].inbox;
                    inbox.head.get_or_insert(key);
                    inbox.messages += u64::from(summary.entries);
                    inbox.bytes += summary.message_bytes;
                    stored.last_hlc = stored.last_hlc.max(key.hlc);
                }
                Ok(())
            })
            .await?;
        let current = retained::current(self.commands.now().await?);
        self.commands
            .for_each(Query::new(RETAINED, current), |document| {
                stored.retained.push(documents::read_retained(document)?);
                Ok(())
            })
            .await?;
        Ok(stored)
    }

    /// Whether a session is known to have ended, of one that this node does not hold.
    async fn has_ended(&self, session: SessionId) -> Result<bool, StoreError> {
        if self.held.is_held(session) {
            return Ok(false);
        }
        let mark = Query::new(GARBAGE, bson::rawdoc! { "_id": binary(session.0) }).limit(1);
        Ok(!self.commands.find(mark).await?.is_empty())
    }

    async fn read_chunks(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut bytes = 0;
        let mut from = range.from;
        let before = binary(format::inbox_key(range.session, range.before));
        // How large they are shows only when they are here, and large ones are not read in vain.
        let mut limit = FIRST_CHUNKS;
        loop {
            let first = binary(format::inbox_key(range.session, from));
            let keys = bson::rawdoc! { "_id": { "$gte": first, "$lt": before.clone() } };
            let page = Query::new(INBOX, keys).limit(limit);
            let page = self.commands.find(page).await?;
            let is_last = page.len() < limit as usize && bytes_of(&page) < ANSWER_BYTES_MIN;
            for document in &page {
                let value = Document::new("a chunk", document).required_bytes("b")?;
                bytes += format::read_chunk_summary(value)?.message_bytes;
                if bytes > range.bytes_max as u64 && !chunks.is_empty() {
                    return Ok(chunks);
                }
                chunks.push(documents::read_chunk(document)?);
            }
            match chunks.last() {
                Some(last) if !is_last => from = last.key.successor(),
                _ => return Ok(chunks),
            }
            let chunk_bytes = bytes / chunks.len() as u64 + 1;
            let wanted = (range.bytes_max as u64).saturating_sub(bytes) / chunk_bytes;
            limit = i64::try_from(wanted)
                .unwrap_or(i64::MAX)
                .clamp(FIRST_CHUNKS, PAGE_CHUNKS);
        }
    }
}

#[async_trait]
impl Store for MongoStore {
    /// Reads everything without holding it.
    async fn load(&self) -> Result<Stored, StoreError> {
        self.load_all().await
    }

    async fn write(
        &self,
        changes: Arc<Vec<Change>>,
        messages: Messages,
    ) -> Result<Written, StoreError> {
        let store = self.clone();
        let writing = async move { store.write_changes(&changes, &messages).await };
        let writing = tokio::spawn(writing);
        writing
            .await
            .unwrap_or_else(|ended| Err(StoreError::Io(ended.to_string())))
    }

    async fn read_inbox(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
        if range.from >= range.before {
            return Ok(Vec::new());
        }
        let (chunks, ended) =
            tokio::try_join!(self.read_chunks(range), self.has_ended(range.session))?;
        Ok(if ended { Vec::new() } else { chunks })
    }

    fn kind(&self) -> &'static str {
        "mongodb"
    }

    async fn close(&self) {
        let client = self.commands.database().client().clone();
        client.shutdown().immediate(true).await;
    }
}

fn bytes_of(documents: &[RawDocumentBuf]) -> usize {
    documents
        .iter()
        .map(|document| document.as_bytes().len())
        .sum()
}

fn read_exchange(
    document: &bson::raw::RawDocument,
) -> Result<(SessionId, OutgoingExchange), StoreError> {
    let fields = Document::new("an exchange", document);
    let (session, packet_id) = format::read_packet_key(fields.required_bytes("_id")?)?;
    let exchange = format::read_exchange_value(packet_id, fields.required_bytes("b")?)?;
    Ok((session, exchange))
}

fn read_awaiting_key(
    document: &bson::raw::RawDocument,
) -> Result<(SessionId, PacketId), StoreError> {
    let fields = Document::new("a packet identifier", document);
    format::read_packet_key(fields.required_bytes("_id")?)
}

/// Without the credentials that the URI may contain.
impl fmt::Debug for MongoOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoOptions")
            .field("database", &self.database)
            .field("node_name", &self.node_name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore")
            .field("commands", &self.commands)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}
