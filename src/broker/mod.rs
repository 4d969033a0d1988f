//! One node: who is connected, who wants what, and what must become durable.
//!
//! Owns the sessions of this node, the subscriptions, the retained messages and the flush. It has
//! no socket and knows no protocol packet; `net::connection` brings clients to it.
//!
//! Start reading at [`Node::publish`], the way of a message, then [`flush`] and [`mailbox`].

pub(crate) mod clients;
pub(crate) mod consumer;
pub(crate) mod elision;
pub(crate) mod flush;
mod follow;
pub(crate) mod group;
pub(crate) mod inspect;
pub(crate) mod mailbox;
mod peers;
pub(crate) mod retained;
mod routes;
mod seats;
pub(crate) mod sessions;
mod shared;
pub(crate) mod subscriptions;
pub(crate) mod sys;
mod takeover;
pub(crate) mod trim;
pub(crate) mod wills;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::Authorizer;
use crate::cluster::Cluster;
use crate::metrics::{Arrival, Source, Totals};
use crate::mqtt::{Message, QoS, SubscriptionFilter};
use crate::overload::Overload;
use crate::session::Origin;
use crate::store::{Change, Retained, SessionId, Store};
use clients::Clients;
use consumer::{Consumer, Inbox};
use elision::Undecided;
use flush::{Flusher, Matched, Receipt, Unstored};
use follow::Followed;
use group::Group;
use mailbox::{Mailbox, MailboxLimits};
use retained::RetainedMessages;
use routes::Routes;
use seats::Seats;
use sessions::Deadlines;
use shared::SharedSessions;
use subscriptions::{Matches, Subscriptions};
use takeover::Takeovers;

/// What the operator lets this node keep.
#[derive(Clone, Debug)]
pub(crate) struct NodeLimits {
    pub(crate) mailbox: MailboxLimits,
    pub(crate) subscriptions_per_client_max: usize,
    pub(crate) retained_messages_max: u64,
    pub(crate) topic_levels_max: usize,
    pub(crate) topic_bytes_max: usize,
    /// Seconds; `u32::MAX` sets no limit.
    pub(crate) session_expiry_max: u32,
}

/// This node.
pub(crate) struct Node {
    pub(crate) name: Arc<str>,
    pub(crate) zone: Arc<str>,
    pub(crate) limits: NodeLimits,
    pub(crate) authorizer: Arc<dyn Authorizer>,
    pub(crate) flusher: Arc<Flusher>,
    store: Arc<dyn Store>,
    /// Set if the store is shared with other nodes.
    pub(crate) cluster: Option<Arc<Cluster>>,
    shared: SharedSessions,
    takeovers: Takeovers,
    followed: Followed,
    undecided: Mutex<Undecided>,
    routes: Routes,
    seats: Seats,
    pub(crate) clients: Clients,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) retained: RetainedMessages,
    groups: Mutex<HashMap<SubscriptionFilter, Arc<Group>>>,
    groups_by_session: Mutex<HashMap<SessionId, Arc<Group>>>,
    deadlines: Deadlines,
    /// Of the other nodes, for `$SYS`.
    others: sys::Others,
    pub(crate) totals: Arc<Totals>,
    pub(crate) overload: Arc<Overload>,
    /// The dispatchers of share groups.
    tasks: TaskTracker,
    /// Ends what runs in the background.
    pub(crate) stopping: CancellationToken,
}

/// Who publishes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Publisher<'a> {
    pub(crate) client_id: &'a Arc<str>,
    /// The mailbox of its session, for subscriptions with No Local.
    pub(crate) mailbox: Option<&'a Arc<Mailbox>>,
    /// When its message came, if it came from a client just now.
    pub(crate) arrival: Arrival,
}

/// What a publisher sent last, and to whom it went: most publish to one topic.
#[derive(Debug, Default)]
pub(crate) struct LastTopic {
    topic: String,
    version: u64,
    matches: Option<Arc<Matches>>,
}

/// Who is behind with what it was sent.
#[derive(Clone, Debug)]
pub(crate) enum Crowded {
    Mailbox(Arc<Mailbox>),
    Node(u32),
}

/// What became of a message.
#[derive(Debug)]
pub(crate) struct Published {
    /// To be acknowledged once this is durable.
    pub(crate) receipt: Receipt,
    /// Sessions and share groups that it is for. All sessions at another node that end with their
    /// connections count as one.
    pub(crate) recipients: usize,
    /// A client that takes messages more slowly than this publisher sends them, but does take
    /// them: the publisher does well to wait a moment.
    pub(crate) crowded: Option<Crowded>,
}

impl Node {
    pub(crate) fn new(
        name: Arc<str>,
        limits: NodeLimits,
        authorizer: Arc<dyn Authorizer>,
        store: Arc<dyn Store>,
        flusher: Arc<Flusher>,
        cluster: Option<Arc<Cluster>>,
        totals: Arc<Totals>,
    ) -> Self {
        Self {
            name,
            zone: Arc::default(),
            limits,
            authorizer,
            flusher,
            store,
            cluster,
            shared: SharedSessions::default(),
            takeovers: Takeovers::default(),
            followed: Followed::default(),
            undecided: Mutex::default(),
            routes: Routes::default(),
            seats: Seats::default(),
            clients: Clients::new(),
            subscriptions: Subscriptions::new(),
            retained: RetainedMessages::default(),
            groups: Mutex::default(),
            groups_by_session: Mutex::default(),
            deadlines: Deadlines::default(),
            others: sys::Others::default(),
            totals,
            overload: Arc::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }
    }

    pub(crate) fn in_zone(self, zone: &str) -> Self {
        let zone = zone.into();
        Self { zone, ..self }
    }

    /// Hands a message to everybody who wants it, and to the flush what must be durable before it
    /// may be acknowledged. `with` becomes durable together with it.
    pub(crate) fn publish(
        &self,
        message: &Message,
        publisher: Publisher<'_>,
        last_topic: &mut LastTopic,
        with: Option<Change>,
    ) -> Published {
        let mut matches = self.matches(message.topic(), last_topic);
        let qos = message.qos();
        let (mut crowded, mut node_behind) = (None, None);
        let is_clustered = self.cluster.is_some();
        let stores = with.is_some()
            || message.retain()
            || (qos > QoS::AtMostOnce && (is_clustered || matches.anything_stored()));
        let guard = with
            .as_ref()
            .filter(|_| is_clustered)
            .and_then(Change::session);
        let mut additions = stores.then(|| self.flusher.add());
        if let Some(additions) = &mut additions {
            if is_clustered {
                // What was learned of other nodes just now is as good as before it.
                matches = self.matches(message.topic(), last_topic);
            }
            if is_clustered && qos > QoS::AtMostOnce {
                additions.match_again(Matched {
                    message: message.clone(),
                    version: last_topic.version,
                    guard,
                });
            }
            if let Some(change) = with {
                additions.persist(change);
            }
            if message.retain() {
                match guard {
                    // A Will that another node publishes must not replace what came after it.
                    Some(guard) if publisher.mailbox.is_none() => {
                        let (message, publisher) = (message.clone(), publisher.client_id.clone());
                        additions.afterwards(guard, Unstored::Retain { message, publisher });
                    }
                    _ => self.retain(message, publisher.client_id, additions),
                }
            }
        }
        let mut recipients = matches.groups.len() + matches.nodes.len();
        for found in &matches.sessions {
            let own = publisher
                .mailbox
                .is_some_and(|mailbox| Arc::ptr_eq(mailbox, &found.mailbox));
            let terms = if own {
                // [MQTT-3.8.3-3]
                let Some(terms) = &found.own_terms else {
                    continue;
                };
                terms
            } else {
                &found.terms
            };
            recipients += 1;
            let delivery = terms.delivery(message, publisher.arrival);
            match &mut additions {
                Some(additions) if delivery.qos > QoS::AtMostOnce && found.mailbox.is_durable() => {
                    additions.enqueue(&found.mailbox, delivery, guard);
                }
                Some(additions) if let Some(guard) = guard => {
                    let mailbox = found.mailbox.clone();
                    additions.afterwards(guard, Unstored::One { mailbox, delivery });
                }
                _ if found.mailbox.holder().is_some() => {
                    node_behind = self.pass(&found.mailbox, delivery).or(node_behind);
                }
                _ => {
                    if found.mailbox.push(delivery) {
                        crowded = Some(&found.mailbox);
                    }
                }
            }
        }
        for group in &matches.groups {
            match &mut additions {
                Some(additions) if group.stores(qos) => {
                    group.enqueue(message, publisher.arrival, additions, guard);
                }
                _ if group.mailbox().holder().is_some() => {
                    let delivery = group.delivery(message, Origin::Memory, publisher.arrival);
                    node_behind = self.pass(group.mailbox(), delivery).or(node_behind);
                }
                _ => {
                    if group.push(message, publisher.arrival) {
                        crowded = Some(group.mailbox());
                    }
                }
            }
        }
        match (&mut additions, guard) {
            _ if matches.nodes.is_empty() => {}
            (Some(additions), Some(guard)) => {
                let unstored = Unstored::Nodes {
                    message: message.clone(),
                    publisher: publisher.client_id.clone(),
                    nodes: matches.nodes.clone(),
                };
                additions.afterwards(guard, unstored);
            }
            _ => {
                let behind = self.pass_to_nodes(message, publisher.client_id, &matches.nodes);
                node_behind = behind.or(node_behind);
            }
        }
        let crowded = crowded.cloned().map(Crowded::Mailbox);
        Published {
            receipt: additions.map_or(Receipt::NOTHING, |additions| additions.receipt()),
            recipients,
            crowded: crowded.or_else(|| node_behind.map(Crowded::Node)),
        }
    }

    /// Has `waker` woken once there is space again where it was crowded; returns false if there is
    /// already.
    pub(crate) fn wait_for_space(&self, crowded: &Crowded, waker: &Waker) -> bool {
        match (crowded, &self.cluster) {
            (Crowded::Mailbox(mailbox), _) => mailbox.wait_for_space(waker),
            (Crowded::Node(node), Some(cluster)) => cluster.links.wait_for_space(*node, waker),
            (Crowded::Node(_), None) => false,
        }
    }

    /// Counts a message that comes from no connection.
    pub(crate) fn note_published(&self, message: &Message, source: Source, published: &Published) {
        let totals = &self.totals;
        totals.messages_received.of(message.qos()).of(source).inc();
        totals.fanout.add_many(published.recipients as u64, 1);
        if published.recipients == 0 {
            totals.messages_unrouted.of(message.qos()).inc();
        }
    }

    fn matches(&self, topic: &str, last: &mut LastTopic) -> Arc<Matches> {
        let version = self.subscriptions.version();
        if let Some(matches) = &last.matches
            && last.version == version
            && last.topic == topic
        {
            return matches.clone();
        }
        let (matches, version) = self.subscriptions.matches(topic);
        last.topic.clear();
        last.topic.push_str(topic);
        last.version = version;
        last.matches = Some(matches.clone());
        matches
    }

    /// Replaces or clears the retained message of a topic, [MQTT-3.3.1-5], [MQTT-3.3.1-6].
    pub(super) fn retain(
        &self,
        message: &Message,
        publisher: &Arc<str>,
        additions: &mut flush::Additions<'_>,
    ) {
        let retained = Retained {
            message: message.clone(),
            publisher: publisher.clone(),
        };
        if self.cluster.is_some() {
            let at = additions.next_id();
            let topic = message.topic();
            additions.persist(if message.payload().is_empty() {
                let topic = topic.into();
                Change::ClearRetained { topic, at }
            } else {
                Change::Retain { retained, at }
            });
        } else if message.payload().is_empty() {
            if self.retained.set(retained) {
                let (topic, at) = (message.topic().into(), additions.next_id());
                additions.persist(Change::ClearRetained { topic, at });
            }
        } else {
            self.retained.set(retained.clone());
            let at = additions.next_id();
            additions.persist(Change::Retain { retained, at });
        }
    }

    /// Whether one more topic may have a retained message.
    pub(crate) fn may_retain(&self, message: &Message) -> bool {
        message.payload().is_empty()
            || self.retained.count() < self.limits.retained_messages_max
            || self.retained.contains(message.topic())
    }

    /// Begins to take messages out of a mailbox.
    pub(crate) fn attach(&self, mailbox: &Arc<Mailbox>, inbox: Inbox) -> Consumer {
        let (flusher, store) = (self.flusher.clone(), self.store.clone());
        Consumer::attach(mailbox.clone(), flusher, store, self.cluster.clone(), inbox)
    }

    /// Ends the background tasks.
    pub(crate) async fn stop(&self) {
        self.stopping.cancel();
        for group in self.groups.lock().values() {
            group.close();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
