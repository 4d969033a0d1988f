//! Clients, looked up in the order of their ids.

use std::sync::Arc;

use bson::{cstr, rawdoc};

use super::MongoStore;
use super::commands::Query;
use super::documents::{Document, SESSIONS, SessionDocument};
use super::retained::successor;
use crate::store::{Owner, SessionRecord, StoreError, StoredSubscription, format};

/// Which clients to read.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClientsAsked<'a> {
    /// This one alone.
    pub(crate) id: Option<&'a str>,
    /// Those whose ids begin so.
    pub(crate) prefix: Option<&'a str>,
    /// Those whose ids follow it.
    pub(crate) after: Option<&'a str>,
    pub(crate) connected: Option<bool>,
    pub(crate) at_most: i64,
}

/// What the store has of a client.
#[derive(Clone, Debug)]
pub(crate) struct ClientRow {
    pub(crate) client_id: Arc<str>,
    /// The node of its connection.
    pub(crate) node: Option<u32>,
    pub(crate) record: SessionRecord,
    pub(crate) subscriptions: Vec<StoredSubscription>,
}

impl MongoStore {
    /// Reads sessions of clients.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn clients(
        &self,
        asked: ClientsAsked<'_>,
    ) -> Result<Vec<ClientRow>, StoreError> {
        let key = |client_id: &str| format::owner_key(&Owner::Client(client_id.into()));
        let first = key(asked.prefix.unwrap_or_default());
        let mut keys = rawdoc! { "$gte": &*first };
        if let Some(end) = successor(&first) {
            keys.append(cstr!("$lt"), end);
        }
        if let Some(after) = asked.after {
            keys.append(cstr!("$gt"), &*key(after));
        }
        if let Some(id) = asked.id {
            keys.append(cstr!("$eq"), &*key(id));
        }
        let mut filter = rawdoc! { "_id": keys, "sid": { "$exists": true } };
        if let Some(connected) = asked.connected {
            filter.append(cstr!("c"), connected);
        }
        let found = Query::new(SESSIONS, filter).limit(asked.at_most);
        let mut rows = Vec::new();
        for document in self.commands.find(found).await? {
            let node = Document::new("a session", &document).optional_node("n")?;
            let session = SessionDocument::read(&document)?;
            if let (Owner::Client(client_id), Some(record)) =
                (format::read_owner_key(&session.key)?, session.record)
            {
                rows.push(ClientRow {
                    client_id,
                    node,
                    record,
                    subscriptions: session.subscriptions,
                });
            }
        }
        Ok(rows)
    }
}
