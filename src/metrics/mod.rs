//! What a node counts and measures.
//!
//! Owns the counters; what they are called outside is `http::metrics`' business. A connection counts
//! for itself in a [`Tally`] and adds up at the end of each turn, so that the counters of all
//! connections do not share a cache line per message.
//!
//! Start reading at [`Totals`].

mod arrival;
mod histogram;
mod label;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::mqtt::packet::PacketType;
use crate::mqtt::{Message, ProtocolVersion, QoS};

pub(crate) use arrival::Arrival;
use histogram::microseconds;
pub(crate) use histogram::{Bytes, Count, Distribution, Histogram, Run, Scale};
pub(crate) use label::{
    Asked, Authentication, Authorization, BusFailure, By, Closed, Direction, Dropped, FilterKind,
    Label, Level, Method, Operation, Outcome, Persistence, Rejected, Source, Throttle, Traffic,
    Violation, Where,
};

/// Something that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many there are of something at the moment.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    pub(crate) fn inc(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dec(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Totals of a node since its start.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// By their names.
    pub(crate) listeners: BTreeMap<Arc<str>, Arc<ListenerTotals>>,
    pub(crate) connected_maximum: AtomicU64,
    /// Established or not, health checks of load balancers included.
    pub(crate) connections: Counter,
    /// New connections that had to wait for their turn.
    pub(crate) connections_delayed: Counter,
    pub(crate) throttled: By<Throttle, Gauge>,

    pub(crate) authentications: By<Method, By<Authentication, Counter>>,
    pub(crate) authentication: By<Method, Histogram>,
    pub(crate) authorizations: By<Asked, By<Authorization, Counter>>,

    pub(crate) packets_received: By<PacketType, Counter>,
    pub(crate) packets_sent: By<PacketType, Counter>,
    pub(crate) violations: By<Violation, Counter>,

    pub(crate) messages_received: By<QoS, By<Source, Counter>>,
    pub(crate) messages_delivered: By<QoS, Counter>,
    pub(crate) messages_acknowledged: By<QoS, Counter>,
    pub(crate) messages_redelivered: By<QoS, Counter>,
    pub(crate) messages_unrouted: By<QoS, Counter>,
    pub(crate) retained_delivered: Counter,
    /// A mailbox counts what it does not take.
    pub(crate) dropped: Arc<By<Dropped, Counter>>,
    /// Of payloads that clients have published.
    pub(crate) message_size: Histogram<Bytes>,
    /// Who one message was for.
    pub(crate) fanout: Histogram<Count>,
    pub(crate) publish_ack: By<QoS, Histogram>,
    pub(crate) delivery: By<Where, Histogram>,
    pub(crate) subscriber_ack: By<QoS, Histogram>,

    pub(crate) sessions_created: Counter,
    pub(crate) sessions_resumed: By<Where, Counter>,
    pub(crate) sessions_taken_over: By<Where, Counter>,
    /// From asking whoever had the session to having it.
    pub(crate) takeover: By<Where, Histogram>,
    pub(crate) sessions_expired: Counter,
    pub(crate) subscriptions: By<FilterKind, Gauge>,

    pub(crate) store: Arc<StoreTotals>,
    pub(crate) runtime_stall: Histogram,
}

/// What a node asks of its store.
#[derive(Debug, Default)]
pub(crate) struct StoreTotals {
    pub(crate) operations: By<Operation, By<Outcome, Counter>>,
    pub(crate) durations: By<Operation, Histogram>,
    /// Asked again, because the store was not available before.
    pub(crate) retries: By<Operation, Counter>,
    /// Changes that were written together.
    pub(crate) batches: Histogram<Count>,
    /// Asked and not yet answered.
    pub(crate) pending: Gauge,
}

/// The same for one listener.
#[derive(Debug)]
pub(crate) struct ListenerTotals {
    pub(crate) name: Arc<str>,
    /// Established and not yet closed.
    pub(crate) connections: By<ProtocolVersion, Gauge>,
    pub(crate) opened: Counter,
    pub(crate) closed: By<Closed, Counter>,
    pub(crate) rejected: By<Rejected, Counter>,
    /// Ended before their first byte, as health checks of load balancers do.
    pub(crate) probes: Counter,
    /// From the last byte of CONNECT to CONNACK.
    pub(crate) connect: Histogram,
    pub(crate) tls_handshake: Histogram,
    pub(crate) bytes_received: Counter,
    pub(crate) bytes_sent: Counter,
}

impl Totals {
    pub(crate) fn new<'a>(listeners: impl IntoIterator<Item = &'a str>) -> Self {
        let listener = |name: &str| {
            let totals = Arc::new(ListenerTotals::new(name));
            (totals.name.clone(), totals)
        };
        Self {
            listeners: listeners.into_iter().map(listener).collect(),
            ..Self::default()
        }
    }

    pub(crate) fn bytes_received(&self) -> u64 {
        let listeners = self.listeners.values();
        listeners.map(|totals| totals.bytes_received.get()).sum()
    }

    pub(crate) fn bytes_sent(&self) -> u64 {
        let listeners = self.listeners.values();
        listeners.map(|totals| totals.bytes_sent.get()).sum()
    }

    pub(crate) fn authorized(&self, asked: Asked, is_allowed: bool) {
        let outcome = match is_allowed {
            true => Authorization::Allowed,
            false => Authorization::Denied,
        };
        self.authorizations.of(asked).of(outcome).inc();
    }
}

impl StoreTotals {
    /// Waits for an operation, and counts it.
    pub(crate) async fn measure<T, E>(
        &self,
        operation: Operation,
        asked: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let pending = Pending::new(&self.pending);
        let began = Instant::now();
        let answer = asked.await;
        drop(pending);
        let outcome = match &answer {
            Ok(_) => Outcome::Ok,
            Err(_) => Outcome::Error,
        };
        self.operations.of(operation).of(outcome).inc();
        self.durations.of(operation).observe(began.elapsed());
        answer
    }
}

/// Counts as long as it is there: whoever asks may stop waiting.
struct Pending<'a>(&'a Gauge);

impl<'a> Pending<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl ListenerTotals {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            connections: By::default(),
            opened: Counter::default(),
            closed: By::default(),
            rejected: By::default(),
            probes: Counter::default(),
            connect: Histogram::default(),
            tls_handshake: Histogram::default(),
            bytes_received: Counter::default(),
            bytes_sent: Counter::default(),
        }
    }
}

/// The sum of all counters of a family.
pub(crate) fn sum<L: Label>(counters: &By<L, Counter>) -> u64 {
    counters.iter().map(|(_, counter)| counter.get()).sum()
}

/// What one connection has counted and not yet added up.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    packets_received: [u32; 15],
    packets_sent: [u32; 15],
    /// By QoS, as all that follow.
    received: [u32; 3],
    unrouted: [u32; 3],
    delivered: [u32; 3],
    acknowledged: [u32; 3],
    publish_allowed: u32,
    /// Publications that were answered in the turn in which they came, by QoS.
    answered_at_once: [u32; 3],
    answers: [Run; 3],
    acknowledgements: [Run; 3],
    deliveries: [Run; 2],
    sizes: Run,
    fanouts: Run,
}

impl Tally {
    pub(crate) fn packet_received(&mut self, packet: PacketType) {
        self.packets_received[packet.index()] += 1;
    }

    pub(crate) fn packet_sent(&mut self, packet: PacketType) {
        self.packets_sent[packet.index()] += 1;
    }

    /// A message of the client was let in and handed to whoever wants it.
    pub(crate) fn published(&mut self, message: &Message, recipients: usize, totals: &Totals) {
        let qos = message.qos();
        let bytes = message.payload().len() as u64;
        self.sizes.observe(bytes, &totals.message_size);
        self.fanouts.observe(recipients as u64, &totals.fanout);
        self.publish_allowed += 1;
        self.received[qos.index()] += 1;
        self.unrouted[qos.index()] += u32::from(recipients == 0);
    }

    /// The client has finished a delivery, so long after it was sent; that is not known if it was sent
    /// on an earlier connection.
    pub(crate) fn acknowledged(&mut self, qos: QoS, after: Option<Duration>, totals: &Totals) {
        self.acknowledged[qos.index()] += 1;
        if let Some(after) = after {
            let us = microseconds(after);
            self.acknowledgements[qos.index()].observe(us, totals.subscriber_ack.of(qos));
        }
    }

    /// A PUBLISH was written to the client; `age` is how long after it came, if it has not waited.
    pub(crate) fn delivered(&mut self, qos: QoS, age: Option<(Duration, Where)>, totals: &Totals) {
        self.delivered[qos.index()] += 1;
        if let Some((age, from)) = age {
            let us = microseconds(age);
            self.deliveries[from.index()].observe(us, totals.delivery.of(from));
        }
    }

    /// A publication was acknowledged so long after it came.
    pub(crate) fn answered(&mut self, qos: QoS, after: Duration, totals: &Totals) {
        let us = microseconds(after);
        self.answers[qos.index()].observe(us, totals.publish_ack.of(qos));
    }

    /// The same, within its turn: the turn is measured as a whole.
    pub(crate) fn answered_at_once(&mut self, qos: QoS) {
        self.answered_at_once[qos.index()] += 1;
    }

    pub(crate) fn has_answered_at_once(&self) -> bool {
        self.answered_at_once != [0; 3]
    }

    /// So long has the turn taken.
    pub(crate) fn turn_took(&mut self, duration: Duration, totals: &Totals) {
        for (qos, count) in QoS::ALL.iter().zip(&mut self.answered_at_once) {
            if *count > 0 {
                let histogram = totals.publish_ack.of(*qos);
                histogram.observe_many(duration, std::mem::take(count).into());
            }
        }
    }

    /// Adds everything up and empties this.
    pub(crate) fn add_to(&mut self, totals: &Totals, listener: &ListenerTotals) {
        let add = |total: &Counter, count: u64| {
            if count > 0 {
                total.add(count);
            }
        };
        add(
            &listener.bytes_received,
            std::mem::take(&mut self.bytes_received),
        );
        add(&listener.bytes_sent, std::mem::take(&mut self.bytes_sent));
        add_each(&totals.packets_received, &mut self.packets_received);
        add_each(&totals.packets_sent, &mut self.packets_sent);
        for (qos, count) in QoS::ALL.iter().zip(&mut self.received) {
            let received = totals.messages_received.of(*qos).of(Source::Client);
            add(received, std::mem::take(count).into());
        }
        add_each(&totals.messages_unrouted, &mut self.unrouted);
        add_each(&totals.messages_delivered, &mut self.delivered);
        add_each(&totals.messages_acknowledged, &mut self.acknowledged);
        let allowed = totals
            .authorizations
            .of(Asked::Publish)
            .of(Authorization::Allowed);
        add(allowed, std::mem::take(&mut self.publish_allowed).into());
        for (qos, run) in QoS::ALL.iter().zip(&mut self.answers) {
            run.add_to(totals.publish_ack.of(*qos));
        }
        for (qos, run) in QoS::ALL.iter().zip(&mut self.acknowledgements) {
            run.add_to(totals.subscriber_ack.of(*qos));
        }
        self.sizes.add_to(&totals.message_size);
        self.fanouts.add_to(&totals.fanout);
        for (from, run) in Where::ALL.iter().zip(&mut self.deliveries) {
            run.add_to(totals.delivery.of(*from));
        }
    }
}

fn add_each<L: Label, const N: usize>(totals: &By<L, Counter>, counts: &mut [u32; N]) {
    for ((_, total), count) in totals.iter().zip(counts) {
        if *count > 0 {
            total.add(std::mem::take(count).into());
        }
    }
}
