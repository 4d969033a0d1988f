//! A store without a disk: what it holds ends with the process.
//!
//! For brokers that are to forget, and for tests of what is above the port.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::{
    Change, Chunk, Entry, InboxRange, InboxSummary, MessageId, Messages, OutgoingExchange,
    Retained, SessionId, SessionRecord, Store, StoreError, Stored, StoredSession,
    StoredSubscription, Written,
};
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{PacketId, SubscriptionFilter};

#[derive(Debug, Default)]
pub(crate) struct MemoryStore(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<SessionId, Session>,
    /// By topic.
    retained: BTreeMap<Arc<str>, Retained>,
}

#[derive(Debug)]
struct Session {
    record: SessionRecord,
    subscriptions: BTreeMap<SubscriptionFilter, (SubscribeOptions, Option<u32>)>,
    awaiting_release: BTreeSet<PacketId>,
    exchanges: BTreeMap<PacketId, OutgoingExchange>,
    inbox: BTreeMap<MessageId, Vec<Entry>>,
}

#[async_trait]
impl Store for MemoryStore {
    async fn load(&self) -> Result<Stored, StoreError> {
        let state = self.0.lock();
        let mut stored = Stored {
            retained: state.retained.values().cloned().collect(),
            ..Stored::default()
        };
        for session in state.sessions.values() {
            stored.last_hlc = stored.last_hlc.max(session.last_hlc());
            stored.sessions.push(session.stored());
        }
        Ok(stored)
    }

    async fn write(
        &self,
        changes: Arc<Vec<Change>>,
        _messages: Messages,
    ) -> Result<Written, StoreError> {
        let mut state = self.0.lock();
        changes.iter().for_each(|change| state.apply(change));
        Ok(Written::default())
    }

    async fn read_inbox(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError> {
        let state = self.0.lock();
        let mut chunks = Vec::new();
        let Some(session) = state
            .sessions
            .get(&range.session)
            .filter(|_| range.from < range.before)
        else {
            return Ok(chunks);
        };
        let mut bytes = 0;
        for (&key, entries) in session.inbox.range(range.from..range.before) {
            bytes += bytes_of(entries);
            if bytes > range.bytes_max && !chunks.is_empty() {
                break;
            }
            chunks.push(Chunk {
                key,
                entries: entries.clone(),
            });
        }
        Ok(chunks)
    }

    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn close(&self) {}
}

impl State {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::SaveSession(record) => match self.sessions.get_mut(&record.session) {
                Some(session) => session.record.clone_from(record),
                None => {
                    self.sessions
                        .insert(record.session, Session::new((**record).clone()));
                }
            },
            Change::EndSession(session) => {
                self.sessions.remove(session);
            }
            Change::Subscribe {
                session,
                filter,
                options,
                identifier,
            } => self.with(*session, |session| {
                session
                    .subscriptions
                    .insert(filter.clone(), (*options, *identifier));
            }),
            Change::Unsubscribe { session, filter } => self.with(*session, |session| {
                session.subscriptions.remove(filter);
            }),
            Change::Enqueue { session, chunk, .. } | Change::Shorten { session, chunk } => self
                .with(*session, |session| {
                    session.inbox.insert(chunk.key, chunk.entries.clone());
                }),
            Change::Dequeue { session, key, .. } => self.with(*session, |session| {
                session.inbox.remove(key);
            }),
            Change::AwaitRelease { session, packet_id } => self.with(*session, |session| {
                session.awaiting_release.insert(*packet_id);
            }),
            Change::Release { session, packet_id } => self.with(*session, |session| {
                session.awaiting_release.remove(packet_id);
            }),
            Change::SaveExchange { session, exchange } => self.with(*session, |session| {
                session.exchanges.insert(exchange.packet_id, *exchange);
            }),
            Change::EndExchange { session, packet_id } => self.with(*session, |session| {
                session.exchanges.remove(packet_id);
            }),
            Change::Retain { retained, .. } => {
                self.retained
                    .insert(retained.message.topic().into(), retained.clone());
            }
            Change::ClearRetained { topic, .. } => {
                self.retained.remove(topic);
            }
        }
    }

    /// Does nothing for a session that is not there: it has ended.
    fn with(&mut self, session: SessionId, change: impl FnOnce(&mut Session)) {
        if let Some(session) = self.sessions.get_mut(&session) {
            change(session);
        }
    }
}

impl Session {
    fn new(record: SessionRecord) -> Self {
        Self {
            record,
            subscriptions: BTreeMap::new(),
            awaiting_release: BTreeSet::new(),
            exchanges: BTreeMap::new(),
            inbox: BTreeMap::new(),
        }
    }

    fn stored(&self) -> StoredSession {
        let subscriptions = self.subscriptions.iter();
        StoredSession {
            record: self.record.clone(),
            subscriptions: subscriptions
                .map(|(filter, &(options, identifier))| StoredSubscription {
                    filter: filter.clone(),
                    options,
                    identifier,
                })
                .collect(),
            awaiting_release: self.awaiting_release.iter().copied().collect(),
            exchanges: self.exchanges.values().copied().collect(),
            inbox: InboxSummary {
                head: self.inbox.keys().next().copied(),
                messages: self
                    .inbox
                    .values()
                    .map(|entries| entries.len() as u64)
                    .sum(),
                bytes: self
                    .inbox
                    .values()
                    .map(|entries| bytes_of(entries) as u64)
                    .sum(),
            },
        }
    }

    fn last_hlc(&self) -> u64 {
        let waiting = self.inbox.keys().next_back().copied();
        let exchanged = self.exchanges.values().map(|exchange| exchange.message);
        waiting
            .into_iter()
            .chain(exchanged)
            .map(|id| id.hlc)
            .max()
            .unwrap_or(0)
    }
}

fn bytes_of(entries: &[Entry]) -> usize {
    entries.iter().map(|entry| entry.message.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::contract::{Fixture, store_contract};

    impl Fixture for MemoryStore {
        async fn new() -> Self {
            Self::default()
        }

        fn store(&self) -> &dyn Store {
            self
        }

        async fn reopen(self) -> Self {
            self
        }
    }

    store_contract!(MemoryStore);
}
