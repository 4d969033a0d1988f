//! The broker's news about itself: `$SYS/broker/…` with Mosquitto's names, and the events that
//! Mosca published on `$SYS/{node name}/…`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};

use super::{LastTopic, Node, Publisher};
use crate::metrics::{Arrival, Dropped, sum};
use crate::mqtt::message::MessageParts;
use crate::mqtt::packet::PacketType;
use crate::mqtt::{Message, QoS};
use crate::store::Retained;

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
        let rate = (total - self.last) as f64 * 60.0 / elapsed;
        self.last = total;
        for (average, (window, _)) in self.per_minute.iter_mut().zip(WINDOWS) {
            let weight = (-elapsed / window).exp();
            *average = rate * (1.0 - weight) + *average * weight;
        }
    }
}

impl Node {
    /// Publishes the figures every `interval` until the node stops.
    pub(crate) async fn run_sys(&self, interval: Duration) {
        let started = Instant::now();
        self.publish_sys(
            "$SYS/broker/version",
            concat!("midge version ", env!("CARGO_PKG_VERSION")),
        );
        let mut loads = [
            Load::new("messages/received"),
            Load::new("messages/sent"),
            Load::new("publish/received"),
            Load::new("publish/sent"),
            Load::new("bytes/received"),
            Load::new("bytes/sent"),
            Load::new("connections"),
            Load::new("publish/dropped"),
        ];
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = started;
        loop {
            tokio::select! {
                now = ticks.tick() => {
                    self.publish_figures(now - started, now - last, &mut loads);
                    last = now;
                }
                () = self.stopping.cancelled() => return,
            }
        }
    }

    fn publish_figures(&self, uptime: Duration, elapsed: Duration, loads: &mut [Load; 8]) {
        let totals = &self.totals;
        let dropped = [Dropped::NotWritable, Dropped::QueueFull];
        let dropped = dropped.map(|reason| totals.dropped.of(reason).get());
        let dropped = dropped.into_iter().sum();
        let packets_received = sum(&totals.packets_received);
        let packets_sent = sum(&totals.packets_sent);
        let publishes_received = totals.packets_received.of(PacketType::Publish).get();
        let publishes_sent = totals.packets_sent.of(PacketType::Publish).get();
        let (bytes_received, bytes_sent) = (totals.bytes_received(), totals.bytes_sent());
        let (connected, disconnected) = self.clients.count();
        totals
            .connected_maximum
            .fetch_max(connected, Ordering::Relaxed);
        let figures = [
            ("clients/connected", connected),
            ("clients/active", connected),
            ("clients/disconnected", disconnected),
            ("clients/inactive", disconnected),
            ("clients/total", connected + disconnected),
            (
                "clients/maximum",
                totals.connected_maximum.load(Ordering::Relaxed),
            ),
            ("clients/expired", totals.sessions_expired.get()),
            ("messages/received", packets_received),
            ("messages/sent", packets_sent),
            ("messages/stored", self.retained.count()),
            ("store/messages/count", self.retained.count()),
            ("store/messages/bytes", self.retained.bytes()),
            ("publish/messages/received", publishes_received),
            ("publish/messages/sent", publishes_sent),
            ("publish/messages/dropped", dropped),
            ("bytes/received", bytes_received),
            ("bytes/sent", bytes_sent),
            ("subscriptions/count", self.subscriptions.count()),
            ("retained messages/count", self.retained.count()),
        ];
        self.publish_sys(
            "$SYS/broker/uptime",
            &format!("{} seconds", uptime.as_secs()),
        );
        for (name, value) in figures {
            self.publish_sys(&format!("$SYS/broker/{name}"), &value.to_string());
        }
        if elapsed.is_zero() {
            return;
        }
        let current = [
            packets_received,
            packets_sent,
            publishes_received,
            publishes_sent,
            bytes_received,
            bytes_sent,
            totals.connections.get(),
            dropped,
        ];
        for (load, total) in loads.iter_mut().zip(current) {
            load.update(total, elapsed);
            for (average, (_, window)) in load.per_minute.iter().zip(WINDOWS) {
                self.publish_sys(
                    &format!("$SYS/broker/load/{}/{window}", load.name),
                    &format!("{average:.2}"),
                );
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
        self.publish_unretained(&format!("$SYS/{}/{name}", self.name), &payload);
    }

    /// Publishes, and keeps for later subscribers, in memory only: the next start has its own news.
    fn publish_sys(&self, topic: &str, payload: &str) {
        self.retained.set(Retained {
            message: message(topic, payload, true),
            publisher: Arc::default(),
        });
        self.publish_unretained(topic, payload);
    }

    fn publish_unretained(&self, topic: &str, payload: &str) {
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
