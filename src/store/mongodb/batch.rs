//! The changes of one flush, of which for each thing only the last is left.

use hashbrown::{HashMap, HashSet};

use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{PacketId, QoS, SubscriptionFilter};
use crate::store::{
    Change, Chunk, Entry, MessageId, OutgoingExchange, Retained, SessionId, SessionRecord,
};

/// One flush, reduced.
#[derive(Debug, Default)]
pub(super) struct Batch<'a> {
    /// What is to be changed only while this node holds the session, or while nobody else has
    /// taken it since: the guard of a chunk is here even if nothing else of it changes.
    pub(super) sessions: HashMap<SessionId, SessionChanges<'a>>,
    pub(super) inbox: InboxChanges<'a>,
    /// By topic; no message clears it.
    pub(super) retained: HashMap<&'a str, (MessageId, Option<&'a Retained>)>,
}

#[derive(Debug, Default)]
pub(super) struct SessionChanges<'a> {
    pub(super) saved: Option<&'a SessionRecord>,
    pub(super) ended: bool,
    /// Absent values are removed.
    pub(super) subscriptions: HashMap<&'a SubscriptionFilter, Option<Options>>,
    pub(super) awaiting: HashMap<PacketId, bool>,
    pub(super) exchanges: HashMap<PacketId, Option<OutgoingExchange>>,
}

/// By session and key.
pub(super) type InboxChanges<'a> = HashMap<(SessionId, MessageId), InboxChange<'a>>;

pub(super) type Options = (SubscribeOptions, Option<u32>);

#[derive(Clone, Copy, Debug)]
pub(super) enum InboxChange<'a> {
    Put {
        chunk: &'a Chunk,
        guard: Option<SessionId>,
    },
    Shorten(&'a Chunk),
    Remove(Removal),
}

/// Who is done with a chunk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Removal {
    /// The session whose exchange ends with it, in the same transaction.
    guard: Option<SessionId>,
    /// It is removed even if that session is lost.
    is_certain: bool,
}

impl<'a> Batch<'a> {
    pub(super) fn of(changes: &'a [Change]) -> Self {
        let mut batch = Self::default();
        changes.iter().for_each(|change| batch.add(change));
        let ended: HashSet<_> = batch
            .sessions
            .iter()
            .filter(|(_, changes)| changes.ended)
            .map(|(session, _)| *session)
            .collect();
        // Never read again: whoever removes the rest of an inbox need not be given more.
        batch
            .inbox
            .retain(|(session, _), _| !ended.contains(session));
        batch
    }

    fn add(&mut self, change: &'a Change) {
        match change {
            Change::SaveSession(record) => {
                if let Some(session) = self.living(record.session) {
                    session.saved = Some(record);
                }
            }
            Change::EndSession(session) => {
                let ended = SessionChanges {
                    ended: true,
                    ..SessionChanges::default()
                };
                self.sessions.insert(*session, ended);
            }
            Change::Subscribe {
                session,
                filter,
                options,
                identifier,
            } => {
                if let Some(session) = self.living(*session) {
                    let options = Some((*options, *identifier));
                    session.subscriptions.insert(filter, options);
                }
            }
            Change::Unsubscribe { session, filter } => {
                if let Some(session) = self.living(*session) {
                    session.subscriptions.insert(filter, None);
                }
            }
            Change::Enqueue {
                session,
                chunk,
                guard,
            } => {
                if let Some(guard) = *guard {
                    self.sessions.entry(guard).or_default();
                }
                let put = InboxChange::Put {
                    chunk,
                    guard: *guard,
                };
                self.inbox.insert((*session, chunk.key), put);
            }
            Change::Shorten { session, chunk } => {
                let key = (*session, chunk.key);
                let shortened = match self.inbox.get(&key) {
                    Some(InboxChange::Put { guard, .. }) => InboxChange::Put {
                        chunk,
                        guard: *guard,
                    },
                    Some(InboxChange::Remove(removal)) => InboxChange::Remove(*removal),
                    Some(InboxChange::Shorten(_)) | None => InboxChange::Shorten(chunk),
                };
                self.inbox.insert(key, shortened);
            }
            Change::Dequeue {
                session,
                key,
                guard,
            } => {
                let mut removal = match self.inbox.get(&(*session, *key)) {
                    Some(InboxChange::Remove(removal)) => *removal,
                    _ => Removal::default(),
                };
                match guard {
                    Some(guard) => removal.guard = Some(*guard),
                    None => removal.is_certain = true,
                }
                self.inbox
                    .insert((*session, *key), InboxChange::Remove(removal));
            }
            Change::AwaitRelease { session, packet_id } => {
                if let Some(session) = self.living(*session) {
                    session.awaiting.insert(*packet_id, true);
                }
            }
            Change::Release { session, packet_id } => {
                if let Some(session) = self.living(*session) {
                    session.awaiting.insert(*packet_id, false);
                }
            }
            Change::SaveExchange { session, exchange } => {
                if let Some(session) = self.living(*session) {
                    session
                        .exchanges
                        .insert(exchange.packet_id, Some(*exchange));
                }
            }
            Change::EndExchange { session, packet_id } => {
                if let Some(session) = self.living(*session) {
                    session.exchanges.insert(*packet_id, None);
                }
            }
            Change::Retain { retained, at } => {
                self.retain(retained.message.topic(), *at, Some(retained));
            }
            Change::ClearRetained { topic, at } => self.retain(topic, *at, None),
        }
    }

    fn living(&mut self, session: SessionId) -> Option<&mut SessionChanges<'a>> {
        let changes = self.sessions.entry(session).or_default();
        (!changes.ended).then_some(changes)
    }

    fn retain(&mut self, topic: &'a str, at: MessageId, retained: Option<&'a Retained>) {
        let last = self.retained.entry(topic).or_insert((at, retained));
        if last.0 <= at {
            *last = (at, retained);
        }
    }

    /// Takes out what may be written in any order and in part, because nothing belongs together with
    /// it: messages of QoS 1, and those that clients have done with. What a session does to its own
    /// inbox in this flush goes with its exchanges.
    pub(super) fn take_plain(&mut self) -> InboxChanges<'a> {
        let sessions = &self.sessions;
        let is_plain = |(session, _): &(SessionId, MessageId), change: &mut InboxChange<'a>| {
            let one_by_one = |entry: &Entry| entry.qos != QoS::ExactlyOnce;
            match change {
                InboxChange::Put { chunk, guard: None } => chunk.entries.iter().all(one_by_one),
                InboxChange::Put { .. } => false,
                InboxChange::Remove(removal) if removal.guard.is_some() => false,
                InboxChange::Shorten(_) | InboxChange::Remove(_) => !sessions.contains_key(session),
            }
        };
        self.inbox.extract_if(is_plain).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sessions.is_empty() && self.inbox.is_empty() && self.retained.is_empty()
    }

    /// Forgets what was to be written only while these sessions are held.
    pub(super) fn leave_out(&mut self, lost: &[SessionId]) {
        for session in lost {
            self.sessions.remove(session);
        }
        self.inbox.retain(|_, change| match change {
            InboxChange::Put {
                guard: Some(guard), ..
            } => !lost.contains(guard),
            InboxChange::Remove(removal) => {
                removal.guard.take_if(|guard| lost.contains(guard));
                removal.guard.is_some() || removal.is_certain
            }
            _ => true,
        });
    }
}
