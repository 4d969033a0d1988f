//! Every session of the cluster that outlives its connection, whichever node has its client.
//!
//! A node needs all of them, since it alone makes a message durable for whoever is subscribed. They
//! come from the store when the node starts, and from the subscription logs of the others after that.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::mailbox::Mailbox;
use crate::metrics::Arrival;
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{Message, QoS, SubscriptionFilter};
use crate::session::{Delivery, Origin};
use crate::store::SessionId;

/// All sessions that are shared with other nodes.
#[derive(Default)]
pub(crate) struct SharedSessions {
    table: Mutex<Table>,
    learned: Mutex<LearnedLog>,
}

#[derive(Default)]
struct LearnedLog {
    all: VecDeque<Learned>,
    /// The version of the last one that is not remembered any more.
    forgotten: u64,
}

#[derive(Default)]
struct Table {
    sessions: HashMap<SessionId, SharedSession>,
    /// Of each share group, the sessions that are subscribed.
    groups: HashMap<SubscriptionFilter, HashSet<SessionId>>,
    /// Which session a client has, and when it got to where it is.
    clients: HashMap<Arc<str>, Place>,
    /// The last that have ended, for what is still read of them in the logs of other nodes.
    ended: VecDeque<SessionId>,
    ended_set: HashSet<SessionId>,
}

struct SharedSession {
    mailbox: Arc<Mailbox>,
    filters: HashMap<SubscriptionFilter, Known>,
}

/// What is known of a subscription, and since which epoch of its session. Logs of two nodes that had
/// the session one after the other may be read in any order.
#[derive(Clone, Copy)]
struct Known {
    epoch: u64,
    subscription: Option<Terms>,
}

/// Options and identifier of a subscription.
pub(super) type Terms = (SubscribeOptions, Option<u32>);

/// What [`SharedSessions::note`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noted {
    /// That is known already, or something later is.
    Nothing,
    /// It was otherwise before, but messages of QoS 1 and 2 were wanted already, or are not.
    Changed,
    /// From now on messages of QoS 1 and 2 are wanted.
    Wanted,
}

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Its session, if that outlives its connection.
    pub(super) session: Option<SessionId>,
    /// The epoch of the session: later ones are greater.
    pub(super) epoch: u64,
    /// The node that it is connected to.
    pub(super) node: Option<u32>,
}

/// A subscription that another node has made.
#[derive(Clone)]
pub(super) struct Learned {
    /// The version of the subscriptions that has it.
    pub(super) version: u64,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) filter: SubscriptionFilter,
    pub(super) options: SubscribeOptions,
    pub(super) identifier: Option<u32>,
}

impl Learned {
    /// A message as the subscription wants it, if it does so with QoS 1 or 2.
    pub(super) fn delivery(&self, message: &Message) -> Option<Delivery> {
        let qos = message.qos().min(self.options.maximum_qos);
        let wanted = qos > QoS::AtMostOnce && self.filter.filter.matches(message.topic());
        wanted.then(|| Delivery {
            message: message.clone(),
            qos,
            retain: message.retain() && self.options.retain_as_published,
            subscription_identifiers: self.identifier.map(|identifier| Arc::from([identifier])),
            origin: Origin::Memory,
            arrival: Arrival::NONE,
        })
    }
}

/// Sessions that are remembered after their end.
const ENDED_MAX: usize = 100_000;

/// Subscriptions that are remembered for messages that are on their way into the store.
const LEARNED_MAX: usize = 100_000;

impl SharedSessions {
    /// Says where a client is; `false` if that is already known to be out of date.
    pub(super) fn place(&self, client_id: &Arc<str>, place: Place) -> bool {
        let mut table = self.table.lock();
        match table.clients.get(client_id) {
            Some(known) if known.epoch > place.epoch => return false,
            _ => {}
        }
        if place.session.is_none() && place.node.is_none() {
            table.clients.remove(client_id);
        } else {
            table.clients.insert(client_id.clone(), place);
        }
        true
    }

    pub(super) fn place_of(&self, client_id: &str) -> Option<Place> {
        self.table.lock().clients.get(client_id).copied()
    }

    /// The mailbox of a session; a new one if it is the first time that this node hears of it.
    pub(super) fn mailbox_or(
        &self,
        session: SessionId,
        new: impl FnOnce() -> Arc<Mailbox>,
    ) -> Arc<Mailbox> {
        let mut table = self.table.lock();
        let shared = table.sessions.entry(session);
        let shared = shared.or_insert_with(|| SharedSession {
            mailbox: new(),
            filters: HashMap::new(),
        });
        shared.mailbox.clone()
    }

    pub(super) fn mailbox(&self, session: SessionId) -> Option<Arc<Mailbox>> {
        let table = self.table.lock();
        table
            .sessions
            .get(&session)
            .map(|shared| shared.mailbox.clone())
    }

    /// Notes that a session subscribed, or unsubscribed, in an epoch.
    pub(super) fn note(
        &self,
        session: SessionId,
        filter: &SubscriptionFilter,
        epoch: u64,
        subscription: Option<Terms>,
    ) -> Noted {
        let mut table = self.table.lock();
        let Table {
            sessions, groups, ..
        } = &mut *table;
        let Some(shared) = sessions.get_mut(&session) else {
            return Noted::Nothing;
        };
        let known = Known {
            epoch,
            subscription,
        };
        let before = match shared.filters.get_mut(filter) {
            Some(later) if later.epoch > epoch => return Noted::Nothing,
            Some(earlier) => std::mem::replace(earlier, known).subscription,
            None => {
                shared.filters.insert(filter.clone(), known);
                None
            }
        };
        if filter.share.is_some() {
            note_member(groups, filter, session, subscription.is_some());
        }
        let wants = |terms: Option<Terms>| {
            terms.is_some_and(|(options, _)| options.maximum_qos > QoS::AtMostOnce)
        };
        if before == subscription {
            Noted::Nothing
        } else if wants(subscription) && !wants(before) {
            Noted::Wanted
        } else {
            Noted::Changed
        }
    }

    /// The filters that a session is subscribed to.
    pub(super) fn filters(&self, session: SessionId) -> HashSet<SubscriptionFilter> {
        let table = self.table.lock();
        let shared = table.sessions.get(&session);
        shared.map_or_else(HashSet::new, |shared| subscribed(&shared.filters))
    }

    /// The sessions that are subscribed to a share group, and their clients.
    pub(super) fn members_of(&self, group: &SubscriptionFilter) -> Vec<(SessionId, Arc<str>)> {
        let table = self.table.lock();
        let members = table.groups.get(group).into_iter().flatten();
        let members = members.filter_map(|session| {
            let mailbox = &table.sessions.get(session)?.mailbox;
            Some((*session, mailbox.client_id.clone()))
        });
        members.collect()
    }

    /// Whether a client has a session that is subscribed to a share group.
    pub(super) fn is_member(&self, client_id: &str, group: &SubscriptionFilter) -> bool {
        let table = self.table.lock();
        let session = table.clients.get(client_id).and_then(|place| place.session);
        let members = table.groups.get(group);
        session
            .zip(members)
            .is_some_and(|(session, members)| members.contains(&session))
    }

    /// Forgets a session that has ended, and returns what it was subscribed to.
    pub(super) fn end(
        &self,
        session: SessionId,
    ) -> Option<(Arc<Mailbox>, HashSet<SubscriptionFilter>)> {
        let mut table = self.table.lock();
        if table.ended_set.insert(session) {
            table.ended.push_back(session);
            if table.ended.len() > ENDED_MAX
                && let Some(oldest) = table.ended.pop_front()
            {
                table.ended_set.remove(&oldest);
            }
        }
        let SharedSession { mailbox, filters } = table.sessions.remove(&session)?;
        for filter in filters.keys().filter(|filter| filter.share.is_some()) {
            note_member(&mut table.groups, filter, session, false);
        }
        if let Some(place) = table.clients.get(&mailbox.client_id)
            && place.session == Some(session)
            && place.node.is_none()
        {
            table.clients.remove(&mailbox.client_id);
        }
        Some((mailbox, subscribed(&filters)))
    }

    pub(super) fn has_ended(&self, session: SessionId) -> bool {
        self.table.lock().ended_set.contains(&session)
    }

    /// The mailboxes of all sessions.
    pub(super) fn mailboxes(&self) -> Vec<Arc<Mailbox>> {
        let table = self.table.lock();
        let all = table.sessions.values();
        all.map(|shared| shared.mailbox.clone()).collect()
    }

    /// The clients that are known to be connected to a node, with their sessions.
    pub(super) fn clients_at(&self, node: u32) -> Vec<(Arc<str>, Place)> {
        let table = self.table.lock();
        let there = table
            .clients
            .iter()
            .filter(|(_, place)| place.node == Some(node));
        there
            .map(|(client_id, place)| (client_id.clone(), *place))
            .collect()
    }

    /// Remembers a subscription that another node has made, for messages that were matched before.
    pub(super) fn learn(&self, learned: Learned) {
        let mut log = self.learned.lock();
        if log.all.len() == LEARNED_MAX
            && let Some(oldest) = log.all.pop_front()
        {
            log.forgotten = oldest.version;
        }
        log.all.push_back(learned);
    }

    /// What was learned after `version`; `None` if not all of it is remembered.
    pub(super) fn learned_since(&self, version: u64) -> Option<Vec<Learned>> {
        let log = self.learned.lock();
        let since = log
            .all
            .iter()
            .rev()
            .take_while(|learned| learned.version > version);
        (log.forgotten <= version).then(|| since.cloned().collect())
    }
}

fn note_member(
    groups: &mut HashMap<SubscriptionFilter, HashSet<SessionId>>,
    group: &SubscriptionFilter,
    session: SessionId,
    is_member: bool,
) {
    if is_member {
        groups.entry(group.clone()).or_default().insert(session);
    } else if let Some(members) = groups.get_mut(group) {
        members.remove(&session);
        if members.is_empty() {
            groups.remove(group);
        }
    }
}

fn subscribed(filters: &HashMap<SubscriptionFilter, Known>) -> HashSet<SubscriptionFilter> {
    let subscribed = filters
        .iter()
        .filter(|(_, known)| known.subscription.is_some());
    subscribed.map(|(filter, _)| filter.clone()).collect()
}

impl fmt::Debug for SharedSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedSessions")
    }
}
