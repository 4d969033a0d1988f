//! The broker's news about itself: `$SYS/broker/…` with Mosquitto's names, and the events that
//! Mosca published on `$SYS/{node name}/…`. In a cluster the figures are those of all nodes together, and
//! `$SYS/nodes/{node name}/…` has those of each.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::{LastTopic, Node, Publisher};
use crate::bus::wire::Item;
use crate::metrics::{Arrival, Dropped, sum};
use crate::mqtt::message::MessageParts;
use crate::mqtt::packet::PacketType;
use crate::mqtt::{Message, QoS};
use crate::store::Retained;
use crate::store::mongodb::Estimates;

/// Something that happened to a client, for `$SYS/{node name}/…`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ClientEvent<'a> {
    Connected,
    Disconnected,
    Subscribed(&'a str),
    Unsubscribed(&'a str),
}

/// Averages of a rate over 1, 5 and 15 minutes, as Mosquitto computes them: per minute, weighted
/// exponentially.
#[derive(Debug)]
struct Load {
    name: &'static str,
    last: u64,
    per_minute: [f64; 3],
}

const WINDOWS: [(f64, &str); 3] = [(60.0, "1min"), (300.0, "5min"), (900.0, "15min")];

impl Load {
    fn new(name: &'static str) -> Self {
        Self {
            name,
            last: 0,
            per_minute: [0.0; 3],
        }
    }

    fn update(&mut self, total: u64, elapsed: Duration) {
        let elapsed = elapsed.as_secs_f64();
        // It is less than before when a node has left the cluster.
        let rate = total.saturating_sub(self.last) as f64 * 60.0 / elapsed;
        self.last = total;
        for (average, (window, _)) in self.per_minute.iter_mut().zip(WINDOWS) {
            let weight = (-elapsed / window).exp();
            *average = rate * (1.0 - weight) + *average * weight;
        }
    }
}

/// What nodes tell each other of themselves, in this order. All are sums but the peak of connected clients.
const FIGURES: [&str; 13] = [
    "clients/connected",
    "clients/disconnected",
    "clients/maximum",
    "clients/expired",
    "messages/received",
    "messages/sent",
    "publish/messages/received",
    "publish/messages/sent",
    "publish/messages/dropped",
    "bytes/received",
    "bytes/sent",
    "subscriptions/count",
    "connections",
];

type Figures = [u64; FIGURES.len()];

/// The place of a figure.
fn at(name: &str) -> usize {
    let place = FIGURES.iter().position(|figure| *figure == name);
    place.expect("only the names above are asked for")
}

/// Rates that are averaged, and the figures that they are rates of.
const LOADS: [(&str, &str); 8] = [
    ("messages/received", "messages/received"),
    ("messages/sent", "messages/sent"),
    ("publish/received", "publish/messages/received"),
    ("publish/sent", "publish/messages/sent"),
    ("bytes/received", "bytes/received"),
    ("bytes/sent", "bytes/sent"),
    ("connections", "connections"),
    ("publish/dropped", "publish/messages/dropped"),
];

/// How long the shared store may take for what it knows.
const ESTIMATE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the other nodes have told last, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Others(Mutex<HashMap<u32, (Arc<str>, Figures)>>);

/// What is published at intervals.
struct News {
    loads: [Load; LOADS.len()],
    /// The most clients that were connected at once, in the whole cluster.
    peak: u64,
    /// Nodes of which there are topics.
    shown: HashSet<Arc<str>>,
}

impl Node {
    /// Publishes the figures every `interval` until the node stops. Every node of a cluster publishes those
    /// of all, to its own clients.
    pub(crate) async fn run_sys(&self, interval: Duration) {
        let started = Instant::now();
        self.publish_sys(
            "$SYS/broker/version",
            concat!("midge version ", env!("CARGO_PKG_VERSION")),
        );
        let mut news = News {
            loads: LOADS.map(|(name, _)| Load::new(name)),
            peak: 0,
            shown: HashSet::new(),
        };
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = started;
        let publish = async {
            loop {
                let now = ticks.tick().await;
                let stored = match &self.cluster {
                    None => None,
                    Some(cluster) => {
                        let stored = timeout(ESTIMATE_TIMEOUT, cluster.store.estimates()).await;
                        stored.ok().and_then(Result::ok)
                    }
                };
                self.publish_figures(now - started, now - last, stored, &mut news);
                last = now;
            }
        };
        self.stopping.run_until_cancelled(publish).await;
    }

    /// Another node has told of itself.
    pub(super) fn receive_figures(&self, from: u32, name: Arc<str>, figures: &[u64]) {
        // Another version of midge may have others.
        if let Ok(figures) = Figures::try_from(figures) {
            self.others.0.lock().insert(from, (name, figures));
        }
    }

    fn own_figures(&self) -> Figures {
        let totals = &self.totals;
        let (connected, disconnected) = self.clients.count();
        let before = totals
            .connected_maximum
            .fetch_max(connected, Ordering::Relaxed);
        let dropped = [Dropped::NotWritable, Dropped::QueueFull];
        let dropped = dropped.map(|reason| totals.dropped.of(reason).get());
        let subscriptions = match self.cluster {
            None => self.subscriptions.count(),
            // All nodes know all of those that last.
            Some(_) => totals
                .subscriptions
                .iter()
                .map(|(_, count)| count.get())
                .sum(),
        };
        [
            connected,
            disconnected,
            before.max(connected),
            totals.sessions_expired.get(),
            sum(&totals.packets_received),
            sum(&totals.packets_sent),
            totals.packets_received.of(PacketType::Publish).get(),
            totals.packets_sent.of(PacketType::Publish).get(),
            dropped.into_iter().sum(),
            totals.bytes_received(),
            totals.bytes_sent(),
            subscriptions,
            totals.connections.get(),
        ]
    }

    /// Of this node, and of those others that are alive.
    fn all_figures(&self) -> Vec<(Arc<str>, Figures)> {
        let own = self.own_figures();
        let mut all = vec![(self.name.clone(), own)];
        if let Some(cluster) = &self.cluster {
            let figures = own.to_vec();
            let name = self.name.clone();
            cluster.broadcast(&Item::Figures { name, figures });
            let alive = cluster.members.others();
            let mut others = self.others.0.lock();
            others.retain(|node, _| alive.contains(node));
            all.extend(others.values().cloned());
        }
        all
    }

    fn publish_figures(
        &self,
        uptime: Duration,
        elapsed: Duration,
        stored: Option<Estimates>,
        news: &mut News,
    ) {
        let nodes = self.all_figures();
        let mut figures: Figures = [0; FIGURES.len()];
        for (_, of_node) in &nodes {
            for (figure, own) in figures.iter_mut().zip(of_node) {
                *figure += own;
            }
        }
        let connected = figures[at("clients/connected")];
        let maximum = &mut figures[at("clients/maximum")];
        if self.cluster.is_some() {
            // Nodes had theirs at different times.
            news.peak = news.peak.max(connected);
            *maximum = news.peak;
        }
        if let Some(stored) = stored {
            figures[at("clients/disconnected")] = stored.sessions_offline;
        }
        let disconnected = figures[at("clients/disconnected")];
        let retained = self.retained.count() + stored.map_or(0, |stored| stored.retained);
        let mut shown: Vec<(&str, u64)> = FIGURES.into_iter().zip(figures).collect();
        // Only its rate is.
        shown.pop();
        shown.extend([
            ("clients/active", connected),
            ("clients/inactive", disconnected),
            ("clients/total", connected + disconnected),
            ("messages/stored", retained),
            ("store/messages/count", retained),
            ("retained messages/count", retained),
        ]);
        if self.cluster.is_none() {
            shown.push(("store/messages/bytes", self.retained.bytes()));
        }
        self.publish_sys(
            "$SYS/broker/uptime",
            &format!("{} seconds", uptime.as_secs()),
        );
        for (name, value) in shown {
            self.publish_sys(&format!("$SYS/broker/{name}"), &value.to_string());
        }
        if self.cluster.is_some() {
            self.publish_nodes(&nodes, &mut news.shown);
        }
        if elapsed.is_zero() {
            return;
        }
        for (load, (_, figure)) in news.loads.iter_mut().zip(LOADS) {
            load.update(figures[at(figure)], elapsed);
            for (average, (_, window)) in load.per_minute.iter().zip(WINDOWS) {
                self.publish_sys(
                    &format!("$SYS/broker/load/{}/{window}", load.name),
                    &format!("{average:.2}"),
                );
            }
        }
    }

    /// Publishes the figures of each node, and clears those of nodes that are gone.
    fn publish_nodes(&self, nodes: &[(Arc<str>, Figures)], shown: &mut HashSet<Arc<str>>) {
        let topic = |node: &str, figure: &str| format!("$SYS/nodes/{node}/{figure}");
        let own_names = &FIGURES[..FIGURES.len() - 1];
        let mut gone = std::mem::take(shown);
        for (node, figures) in nodes {
            gone.remove(node);
            shown.insert(node.clone());
            for (figure, value) in own_names.iter().zip(figures) {
                self.publish_sys(&topic(node, figure), &value.to_string());
            }
        }
        for node in gone {
            for figure in own_names {
                self.publish_sys(&topic(&node, figure), "");
            }
        }
    }

    /// Publishes what happened to a client.
    pub(crate) fn publish_event(&self, client_id: &str, event: ClientEvent<'_>) {
        // Almost nobody listens, and it is asked for every CONNECT.
        if self.subscriptions.count() == 0 {
            return;
        }
        let about_topic =
            |topic: &str| serde_json::json!({ "clientId": client_id, "topic": topic }).to_string();
        let (name, payload) = match event {
            ClientEvent::Connected => ("new/clients", client_id.to_owned()),
            ClientEvent::Disconnected => ("disconnect/clients", client_id.to_owned()),
            ClientEvent::Subscribed(topic) => ("new/subscribes", about_topic(topic)),
            ClientEvent::Unsubscribed(topic) => ("new/unsubscribes", about_topic(topic)),
        };
        self.publish_everywhere(&format!("$SYS/{}/{name}", self.name), &payload);
    }

    /// Publishes to the clients of this node, and keeps for later subscribers, in memory only: the next start
    /// has its own news.
    fn publish_sys(&self, topic: &str, payload: &str) {
        self.retained.set(Retained {
            message: message(topic, payload, true),
            publisher: Arc::default(),
        });
        let message = message(topic, payload, false);
        let (matches, _) = self.subscriptions.matches(topic);
        for found in &matches.sessions {
            if found.mailbox.holder().is_none() {
                let delivery = found.terms.delivery(&message, Arrival::NONE);
                found.mailbox.push(delivery);
            }
        }
        for group in &matches.groups {
            group.push(&message, Arrival::NONE);
        }
    }

    fn publish_everywhere(&self, topic: &str, payload: &str) {
        let publisher = Publisher {
            client_id: &Arc::default(),
            mailbox: None,
            arrival: Arrival::NONE,
        };
        self.publish(
            &message(topic, payload, false),
            publisher,
            &mut LastTopic::default(),
            None,
        );
    }
}

fn message(topic: &str, payload: &str, retain: bool) -> Message {
    Message::new(MessageParts {
        topic,
        qos: QoS::AtMostOnce,
        retain,
        payload: payload.as_bytes(),
        ..MessageParts::default()
    })
}
