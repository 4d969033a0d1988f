//! What can be seen of a node from outside, for health checks and the API. It changes nothing, but
//! for [`Node::kick`].

use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::clients::{Clients, Seen};
use super::flush::unix_ms;
use super::mailbox::{Mailbox, Order};
use super::subscriptions::Matches;
use super::{LastTopic, Node, Publisher};
use crate::bus::wire::Item;
use crate::cluster::Cluster;
use crate::metrics::{Arrival, ListenerTotals, Source};
use crate::mqtt::topic::{SubscribeOptions, TopicFilter};
use crate::mqtt::{Message, ProtocolVersion, ReasonCode, SubscriptionFilter};
use crate::store::mongodb::{ClientRow, ClientsAsked, NodeState};
use crate::store::{Retained, StoreError};

/// How often it is looked at whether timers are late.
const RUNTIME_LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Whether what clients send can be made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoreHealth {
    Available,
    Unavailable { reason: String },
}

/// What a connection tells about its client.
#[derive(Debug)]
pub(crate) struct Presence {
    pub(crate) peer: SocketAddr,
    pub(crate) listener: Arc<ListenerTotals>,
    pub(crate) user_name: Option<Arc<str>>,
    pub(crate) version: ProtocolVersion,
    pub(crate) keep_alive: Option<Duration>,
    pub(crate) clean_start: bool,
    /// Seconds.
    pub(crate) expiry_interval: u32,
    /// Unix milliseconds.
    pub(crate) connected_at: u64,
    /// QoS 1 and 2 messages sent to the client that it has not finished.
    pub(crate) in_flight: AtomicU16,
    /// QoS 1 and 2 messages of the client whose exchange has not ended.
    pub(crate) unacknowledged: AtomicU16,
}

/// What waits for a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// Sent and not acknowledged ones included.
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    /// Of these, and of QoS 0, what is held in memory.
    pub(crate) memory_messages: u64,
    pub(crate) memory_bytes: u64,
    /// The client is there, and takes messages more slowly than they come.
    pub(crate) is_behind: bool,
}

/// All sessions of a node, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    /// Connected ones.
    pub(crate) persistent: u64,
    pub(crate) clean: u64,
    pub(crate) detached: u64,
    /// In memory for connected ones.
    pub(crate) queued_messages: u64,
    pub(crate) queued_bytes: u64,
    /// In the store for those that are not.
    pub(crate) offline_messages: u64,
    /// Exchanges of QoS 1 and 2 messages that connected clients have sent.
    pub(crate) inbound_in_flight: u64,
    /// Of those sent to them.
    pub(crate) outbound_in_flight: u64,
    pub(crate) slow_consumers: u64,
}

/// A session, whether its client is there or not.
#[derive(Clone, Debug)]
pub(crate) struct ClientView {
    pub(crate) client_id: Arc<str>,
    pub(crate) connected: bool,
    /// The name of the node that has it, if one has.
    pub(crate) node: Option<Arc<str>>,
    pub(crate) version: ProtocolVersion,
    /// Seconds.
    pub(crate) expiry_interval: u32,
    /// Unix milliseconds.
    pub(crate) ends_at: Option<u64>,
    /// Of a connection to this node.
    pub(crate) presence: Option<Arc<Presence>>,
    /// Known at the node that has it.
    pub(crate) waiting: Option<Waiting>,
    /// Known at the node that has it.
    pub(crate) in_flight: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct SubscriptionView {
    pub(crate) filter: SubscriptionFilter,
    pub(crate) options: SubscribeOptions,
    pub(crate) identifier: Option<u32>,
}

/// Which clients to show, in the order of their ids.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClientsFilter {
    /// Only those whose ids follow it.
    pub(crate) after: Option<String>,
    pub(crate) id: IdFilter,
    pub(crate) connected: Option<bool>,
}

#[derive(Clone, Debug, Default)]
pub(crate) enum IdFilter {
    #[default]
    All,
    Is(String),
    BeginsWith(String),
}

/// A node of the cluster.
#[derive(Clone, Debug)]
pub(crate) struct NodeView {
    pub(crate) number: u32,
    pub(crate) name: String,
    pub(crate) state: NodeState,
    pub(crate) is_this: bool,
}

/// What became of an order to end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kicked {
    Told,
    NotConnected,
    Unknown,
}

impl Census {
    fn add(&mut self, mailbox: &Mailbox, presence: Option<&Presence>, is_connected: bool) {
        let waiting = mailbox.waiting();
        if !is_connected {
            self.detached += 1;
            self.offline_messages += waiting.messages;
            return;
        }
        match mailbox.is_durable() {
            true => self.persistent += 1,
            false => self.clean += 1,
        }
        self.queued_messages += waiting.memory_messages;
        self.queued_bytes += waiting.memory_bytes;
        self.slow_consumers += u64::from(waiting.is_behind);
        if let Some(presence) = presence {
            let read = |count: &AtomicU16| u64::from(count.load(Ordering::Relaxed));
            self.inbound_in_flight += read(&presence.unacknowledged);
            self.outbound_in_flight += read(&presence.in_flight);
        }
    }
}

impl IdFilter {
    fn admits(&self, client_id: &str) -> bool {
        match self {
            Self::All => true,
            Self::Is(id) => client_id == id,
            Self::BeginsWith(prefix) => client_id.starts_with(prefix.as_str()),
        }
    }
}

impl ClientsFilter {
    fn admits(&self, client_id: &str, connected: bool) -> bool {
        self.connected.is_none_or(|wanted| wanted == connected)
            && self.after.as_deref().is_none_or(|after| client_id > after)
            && self.id.admits(client_id)
    }
}

/// What the store says of a client.
async fn client_row(cluster: &Cluster, client_id: &str) -> Result<Option<ClientRow>, StoreError> {
    let asked = ClientsAsked {
        id: Some(client_id),
        at_most: 1,
        ..ClientsAsked::default()
    };
    Ok(cluster.store.clients(asked).await?.pop())
}

impl Node {
    pub(crate) fn store_health(&self) -> StoreHealth {
        if self.flusher.has_failed() {
            return StoreHealth::Unavailable {
                reason: "the store has failed".to_owned(),
            };
        }
        match &self.cluster {
            Some(cluster) => cluster.store_health(),
            None => StoreHealth::Available,
        }
    }

    /// What its store is, in the words of `store.kind`.
    pub(crate) fn store_kind(&self) -> &'static str {
        self.store.kind()
    }

    /// All nodes that there are, or were until an hour ago.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn nodes(&self) -> Result<Vec<NodeView>, StoreError> {
        let Some(cluster) = &self.cluster else {
            return Ok(vec![NodeView {
                number: 0,
                name: self.name.to_string(),
                state: NodeState::Up,
                is_this: true,
            }]);
        };
        let rows = cluster.store.nodes().await?;
        let view = |row: crate::store::mongodb::NodeRow| NodeView {
            number: row.node,
            is_this: row.node == cluster.node(),
            name: row.name,
            state: row.state,
        };
        Ok(rows.into_iter().map(view).collect())
    }

    /// Measures how late timers are, until the node stops: something blocks the runtime then.
    pub(crate) async fn watch_runtime(&self) {
        let watch = async {
            loop {
                let due = Instant::now() + RUNTIME_LOOK_INTERVAL;
                sleep_until(due).await;
                self.totals.runtime_stall.observe(due.elapsed());
            }
        };
        self.stopping.run_until_cancelled(watch).await;
    }

    /// Counts all sessions of this node. It takes a while where there are many, and gives way to others
    /// meanwhile.
    pub(crate) async fn census(&self) -> Census {
        let mut census = Census::default();
        for part in 0..Clients::PARTS {
            self.clients
                .visit_part(part, |mailbox, presence, is_connected| {
                    census.add(mailbox, presence, is_connected);
                });
            tokio::task::yield_now().await;
        }
        census
    }

    /// The first `at_most` clients that `filter` admits, of the whole cluster.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn clients(
        &self,
        filter: &ClientsFilter,
        at_most: usize,
    ) -> Result<Vec<ClientView>, StoreError> {
        let Some(cluster) = &self.cluster else {
            return Ok(self.own_clients(filter, at_most));
        };
        let (id, prefix) = match &filter.id {
            IdFilter::All => (None, None),
            IdFilter::Is(id) => (Some(id.as_str()), None),
            IdFilter::BeginsWith(prefix) => (None, Some(prefix.as_str())),
        };
        let asked = ClientsAsked {
            id,
            prefix,
            after: filter.after.as_deref(),
            connected: filter.connected,
            at_most: i64::try_from(at_most).unwrap_or(i64::MAX),
        };
        let rows = cluster.store.clients(asked).await?;
        let nodes = self.nodes().await?;
        Ok(rows
            .into_iter()
            .map(|row| self.shared_view(row, &nodes))
            .collect())
    }

    fn own_clients(&self, filter: &ClientsFilter, at_most: usize) -> Vec<ClientView> {
        // The largest on top: it goes when there are too many.
        let mut first: BinaryHeap<Arc<str>> = BinaryHeap::new();
        self.clients.visit_ids(|client_id, connected| {
            if !filter.admits(client_id, connected) {
                return;
            }
            if first.len() == at_most {
                if first.peek().is_none_or(|largest| largest <= client_id) {
                    return;
                }
                first.pop();
            }
            first.push(client_id.clone());
        });
        let ids = first.into_sorted_vec().into_iter();
        ids.filter_map(|client_id| self.own_client(&client_id))
            .collect()
    }

    /// A client of this node.
    fn own_client(&self, client_id: &Arc<str>) -> Option<ClientView> {
        let node = Some(self.name.clone());
        Some(match self.clients.see(client_id)? {
            Seen::Connected { mailbox, presence } => ClientView {
                client_id: client_id.clone(),
                connected: true,
                node,
                version: presence
                    .as_ref()
                    .map_or(ProtocolVersion::V5, |presence| presence.version),
                expiry_interval: presence
                    .as_ref()
                    .map_or(0, |presence| presence.expiry_interval),
                ends_at: None,
                waiting: Some(mailbox.waiting()),
                in_flight: presence.as_ref().map(|presence| {
                    let in_flight = presence.in_flight.load(Ordering::Relaxed);
                    u64::from(in_flight)
                }),
                presence,
            },
            Seen::Detached {
                mailbox,
                version,
                expiry_interval,
                ends_at,
                in_flight,
            } => ClientView {
                client_id: client_id.clone(),
                connected: false,
                node,
                version,
                expiry_interval,
                ends_at,
                presence: None,
                waiting: Some(mailbox.waiting()),
                in_flight: Some(u64::from(in_flight)),
            },
        })
    }

    /// What the store says of a client, with what this node knows if it is here.
    fn shared_view(&self, row: ClientRow, nodes: &[NodeView]) -> ClientView {
        let at = row.node.filter(|_| row.record.connected);
        let at = at.and_then(|number| nodes.iter().find(|node| node.number == number));
        let is_here = at.is_some_and(|node| node.is_this);
        let own = is_here.then(|| self.own_client(&row.client_id)).flatten();
        let own = own.filter(|own| own.connected);
        ClientView {
            connected: row.record.connected,
            node: at.map(|node| node.name.as_str().into()),
            version: row.record.version,
            expiry_interval: row.record.expiry_interval,
            ends_at: row.record.ends_at,
            waiting: own.as_ref().and_then(|own| own.waiting),
            in_flight: own.as_ref().and_then(|own| own.in_flight),
            presence: own.and_then(|own| own.presence),
            client_id: row.client_id,
        }
    }

    /// One client, with its subscriptions.
    ///
    /// # Errors
    /// `StoreError` if it cannot be read.
    pub(crate) async fn client(
        &self,
        client_id: &Arc<str>,
    ) -> Result<Option<(ClientView, Vec<SubscriptionView>)>, StoreError> {
        let Some(cluster) = &self.cluster else {
            let view = self.own_client(client_id);
            return Ok(view.map(|view| (view, self.own_subscriptions(client_id))));
        };
        let Some(mut row) = client_row(cluster, client_id).await? else {
            return Ok(None);
        };
        let stored = std::mem::take(&mut row.subscriptions);
        let view = self.shared_view(row, &self.nodes().await?);
        let subscriptions = if view.presence.is_some() {
            self.own_subscriptions(client_id)
        } else {
            let view = |stored: crate::store::StoredSubscription| SubscriptionView {
                filter: stored.filter,
                options: stored.options,
                identifier: stored.identifier,
            };
            stored.into_iter().map(view).collect()
        };
        Ok(Some((view, subscriptions)))
    }

    fn own_subscriptions(&self, client_id: &Arc<str>) -> Vec<SubscriptionView> {
        let Some(Seen::Connected { mailbox, .. } | Seen::Detached { mailbox, .. }) =
            self.clients.see(client_id)
        else {
            return Vec::new();
        };
        let mut views = self.subscriptions.of(&mailbox);
        let seats = self.seats_of(client_id).into_iter();
        views.extend(seats.map(|(filter, options, identifier)| SubscriptionView {
            filter,
            options,
            identifier,
        }));
        let groups = self.groups.lock();
        views.extend(groups.values().filter_map(|group| {
            let (options, identifier) = group.terms_of(client_id)?;
            Some(SubscriptionView {
                filter: group.filter().clone(),
                options,
                identifier,
            })
        }));
        views.sort_by(|a, b| a.filter.cmp(&b.filter));
        views
    }

    /// Who gets a message to `topic`.
    pub(crate) fn recipients(&self, topic: &str) -> Arc<Matches> {
        self.subscriptions.matches(topic).0
    }

    /// Has the connection of a client end, at whichever node.
    ///
    /// # Errors
    /// `StoreError` if it cannot be read where the client is.
    pub(crate) async fn kick(
        &self,
        client_id: &Arc<str>,
        reason: ReasonCode,
    ) -> Result<Kicked, StoreError> {
        let here = self.kick_here(client_id, reason);
        let Some(cluster) = self.cluster.as_ref().filter(|_| here != Kicked::Told) else {
            return Ok(here);
        };
        let Some(row) = client_row(cluster, client_id).await? else {
            return Ok(Kicked::Unknown);
        };
        match row.node.filter(|_| row.record.connected) {
            Some(node) if node != cluster.node() => {
                let client_id = client_id.clone();
                cluster.send(node, &Item::Kick { client_id, reason });
                Ok(Kicked::Told)
            }
            _ => Ok(Kicked::NotConnected),
        }
    }

    /// Tells a connection of this node to end.
    pub(super) fn kick_here(&self, client_id: &str, reason: ReasonCode) -> Kicked {
        match self.clients.see(client_id) {
            Some(Seen::Connected { mailbox, .. }) => {
                mailbox.give(Order::Kicked(reason));
                Kicked::Told
            }
            Some(Seen::Detached { .. }) => Kicked::NotConnected,
            None => Kicked::Unknown,
        }
    }

    /// Up to `at_most` retained messages that match `filter` and whose topics follow `after`, in the
    /// order of their topics; and whether there may be more.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read.
    pub(crate) async fn retained_page(
        &self,
        filter: &TopicFilter,
        after: Option<&str>,
        at_most: usize,
    ) -> Result<(Vec<Retained>, bool), StoreError> {
        // Other nodes have none of ours below `$SYS`, and the store has nothing else.
        let shared = self.cluster.as_ref();
        let shared = shared.filter(|_| !filter.as_str().starts_with("$SYS"));
        let mut walk = self
            .retained
            .walk_after(filter.clone(), shared.is_some(), after);
        let mut found = Vec::new();
        loop {
            let room = at_most - found.len();
            let more = match shared {
                None => walk.step(&self.retained, &mut found, room),
                Some(cluster) => match walk.next_in_store(room) {
                    None => false,
                    Some(range) => {
                        let read = cluster.store.read_retained(range).await?;
                        walk.take_read(read, &mut found);
                        true
                    }
                },
            };
            let now = unix_ms();
            found.retain(|retained| !retained.message.is_expired(now));
            if !more || found.len() >= at_most {
                return Ok((found, more));
            }
            tokio::task::yield_now().await;
        }
    }

    /// Publishes a message that comes from no client. Returns whether anybody wants it, once it is
    /// as safe as an acknowledged message of a client.
    ///
    /// # Errors
    /// `StoreError` if the store has failed.
    pub(crate) async fn publish_from(
        &self,
        publisher: &Arc<str>,
        message: &Message,
    ) -> Result<bool, StoreError> {
        let publisher = Publisher {
            client_id: publisher,
            mailbox: None,
            arrival: Arrival::NONE,
        };
        let published = self.publish(message, publisher, &mut LastTopic::default(), None);
        self.note_published(message, Source::Api, &published);
        self.flusher.durable(published.receipt).await?;
        Ok(published.recipients > 0)
    }
}
