//! `GET /metrics`: what Prometheus reads.
//!
//! [`families`] has the names, [`text`] the formats; here is where the values come from.

mod families;
mod process;
mod requests;
mod text;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use tokio::time::{Instant, timeout};

use self::families as f;
use self::text::{Exposition, Format};
use super::health::Status;
use super::{Context, build};
use crate::broker::Node;
use crate::broker::inspect::{Census, StoreHealth};
use crate::lifecycle::Steering;
use crate::metrics::{
    By, Counter, Direction, Gauge, Histogram, Label, ListenerTotals, Persistence, Scale, Source,
};
use crate::mqtt::QoS;
use crate::store::mongodb::Estimates;
use crate::telemetry;

pub(super) use process::note_start;
pub(super) use requests::{Requests, measure};

/// How old the figures may be that take a while to find out.
const OBSERVED_FOR: Duration = Duration::from_secs(15);

/// How long the shared store may take for its figures.
const ESTIMATE_TIMEOUT: Duration = Duration::from_secs(2);

/// Figures that are not asked for at every scrape, however many there are. Whoever scrapes while they
/// are found out waits for them.
#[derive(Debug, Default)]
pub(super) struct Observatory {
    #[expect(
        clippy::disallowed_types,
        reason = "whoever comes second waits for what the first one finds out"
    )]
    last: tokio::sync::Mutex<Option<(Instant, Observed)>>,
}

#[derive(Clone, Debug, Default)]
struct Observed {
    census: Census,
    /// Absent if they are not known.
    estimates: Option<Estimates>,
}

impl Observatory {
    async fn look(&self, node: &Node) -> Observed {
        let mut last = self.last.lock().await;
        let now = Instant::now();
        if let Some((at, observed)) = &*last
            && now.duration_since(*at) < OBSERVED_FOR
        {
            return observed.clone();
        }
        let census = node.census().await;
        let estimates = match &node.cluster {
            None => Some(Estimates {
                sessions_online: census.persistent + census.clean,
                sessions_offline: census.detached,
                messages: census.offline_messages,
                retained: node.retained.count(),
                retained_bytes: node.retained.bytes(),
            }),
            Some(cluster) => {
                let estimates = timeout(ESTIMATE_TIMEOUT, cluster.store.estimates()).await;
                estimates.ok().and_then(Result::ok)
            }
        };
        let observed = Observed { census, estimates };
        *last = Some((now, observed.clone()));
        observed
    }
}

pub(super) async fn metrics(State(context): State<Arc<Context>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT);
    let accept = accept.and_then(|accept| accept.to_str().ok());
    let format = Format::accepted_by(accept.unwrap_or_default());
    let mut exposition = Exposition::new(format);
    let (node, steering) = (context.node.load_full(), context.steering.load_full());
    let mode = node.as_ref().map_or("none", |node| node.store_kind());
    exposition
        .family(&f::BUILD_INFO)
        .sample(&[build::VERSION, build::REVISION, build::RUST, mode], 1);
    let mut states = exposition.family(&f::NODE_STATE);
    let status = context.health().status;
    for state in Status::ALL {
        states.sample(&[state.as_str()], u8::from(state == status));
    }
    if let (Some(node), Some(steering)) = (node, steering) {
        let observed = context.observatory.look(&node).await;
        let mut page = Page {
            node: &node,
            steering: &steering,
            observed: &observed,
            out: &mut exposition,
        };
        page.write_node();
        page.write_connections();
        page.write_access();
        page.write_messages();
        page.write_sessions();
        page.write_store();
        page.write_cluster();
    }
    let mut samples = exposition.family(&f::LOG_MESSAGES);
    for (level, count) in telemetry::logged().iter() {
        samples.sample(&[level.name()], count.get());
    }
    context.requests.write(&mut exposition);
    process::write(&mut exposition);
    let content_type = [(header::CONTENT_TYPE, format.content_type())];
    (content_type, exposition.finish()).into_response()
}

/// What there is to say of a node that serves.
struct Page<'a> {
    node: &'a Node,
    steering: &'a Steering,
    observed: &'a Observed,
    out: &'a mut Exposition,
}

impl Page<'_> {
    fn write_node(&mut self) {
        let node = self.node;
        let cluster = node.cluster.as_ref().map(|cluster| cluster.store.cluster());
        self.out
            .family(&f::NODE_INFO)
            .sample(&[&node.name, cluster.unwrap_or_default(), &node.zone], 1);
        let reload = self.steering.reload.last();
        let is_successful = reload.is_none_or(|last| last.is_successful);
        let succeeded_at = reload.and_then(|last| last.succeeded_at);
        let succeeded_at = succeeded_at.unwrap_or(self.steering.started_at);
        self.out
            .value(&f::CONFIG_RELOAD_SUCCESSFUL, u8::from(is_successful));
        self.out
            .value(&f::CONFIG_RELOAD_TIMESTAMP, succeeded_at as f64 / 1e3);
        if let Some(fingerprint) = self.steering.reload.fingerprint() {
            self.out.family(&f::CONFIG_INFO).sample(&[&fingerprint], 1);
        }
        self.out.value(&f::OVERLOAD_LEVEL, node.overload.level());
        let limit = node.overload.limit_bytes().unwrap_or(0);
        self.out.value(&f::MEMORY_LIMIT, limit);
        self.histogram(&f::RUNTIME_STALL, &node.totals.runtime_stall);
    }

    fn write_connections(&mut self) {
        let totals = &self.node.totals;
        let listeners = || totals.listeners.values();
        let mut samples = self.out.family(&f::CONNECTIONS);
        for listener in listeners() {
            for (version, connections) in listener.connections.iter() {
                let labels = [&listener.name, version.name()];
                samples.sample(&labels, connections.get());
            }
        }
        let limit = &self.steering.connections.connections_max;
        let limit = Some(limit.load(Ordering::Relaxed)).filter(|limit| *limit != usize::MAX);
        self.out.value(&f::MAX_CONNECTIONS, limit.unwrap_or(0));
        self.by_listener(&f::CONNECTIONS_OPENED, |listener| &listener.opened);
        let mut samples = self.out.family(&f::CONNECTIONS_CLOSED);
        for listener in listeners() {
            for (reason, closed) in listener.closed.iter() {
                samples.sample(&[&listener.name, reason.name()], closed.get());
            }
        }
        let mut samples = self.out.family(&f::CONNECTIONS_REJECTED);
        for listener in listeners() {
            for (reason, rejected) in listener.rejected.iter() {
                samples.sample(&[&listener.name, reason.name()], rejected.get());
            }
        }
        let delayed = totals.connections_delayed.get();
        self.out.value(&f::CONNECTIONS_DELAYED, delayed);
        self.by_listener(&f::PROBE_CONNECTIONS, |listener| &listener.probes);
        let mut samples = self.out.family(&f::CONNECT_DURATION);
        for listener in listeners() {
            samples.distribution(&[&listener.name], &listener.connect.read());
        }
        let tls = &self.steering.tls;
        let mut samples = self.out.family(&f::TLS_HANDSHAKE_DURATION);
        for listener in listeners().filter(|listener| tls.contains_key(&*listener.name)) {
            samples.distribution(&[&listener.name], &listener.tls_handshake.read());
        }
        let mut samples = self.out.family(&f::TLS_CERTIFICATE_EXPIRY);
        for (name, tls) in tls {
            if let Some(expires_at) = tls.expires_at() {
                samples.sample(&[name], expires_at);
            }
        }
        self.by_listener(&f::RECEIVED_BYTES, |listener| &listener.bytes_received);
        self.by_listener(&f::SENT_BYTES, |listener| &listener.bytes_sent);
        self.counters(&f::PACKETS_RECEIVED, &totals.packets_received);
        self.counters(&f::PACKETS_SENT, &totals.packets_sent);
        self.counters(&f::PROTOCOL_ERRORS, &totals.violations);
        self.gauges(&f::CLIENTS_THROTTLED, &totals.throttled);
    }

    fn write_access(&mut self) {
        let totals = &self.node.totals;
        self.counters_by(&f::AUTHENTICATIONS, &totals.authentications);
        self.histograms(&f::AUTHENTICATION_DURATION, &totals.authentication);
        self.counters_by(&f::AUTHORIZATIONS, &totals.authorizations);
    }

    fn write_messages(&mut self) {
        let totals = &self.node.totals;
        self.counters_by(&f::MESSAGES_RECEIVED, &totals.messages_received);
        self.counters(&f::MESSAGES_DELIVERED, &totals.messages_delivered);
        self.acknowledged(&f::MESSAGES_ACKNOWLEDGED, &totals.messages_acknowledged);
        self.acknowledged(&f::MESSAGES_REDELIVERED, &totals.messages_redelivered);
        self.counters(&f::MESSAGES_DROPPED, &totals.dropped);
        self.counters(&f::MESSAGES_UNROUTED, &totals.messages_unrouted);
        self.histogram(&f::MESSAGE_SIZE, &totals.message_size);
        self.histogram(&f::MESSAGE_FANOUT, &totals.fanout);
        self.acknowledgements(&f::PUBLISH_ACK_DURATION, &totals.publish_ack);
        self.histograms(&f::DELIVERY_DURATION, &totals.delivery);
        self.acknowledgements(&f::SUBSCRIBER_ACK_DURATION, &totals.subscriber_ack);
        let wills = totals.messages_received.iter();
        let wills = wills.map(|(_, by_source)| by_source.of(Source::Will).get());
        let wills: u64 = wills.sum();
        self.out.value(&f::WILLS_PUBLISHED, wills);
        let retained = totals.retained_delivered.get();
        self.out.value(&f::RETAINED_DELIVERED, retained);
    }

    fn write_sessions(&mut self) {
        let (totals, census) = (&self.node.totals, &self.observed.census);
        let mut samples = self.out.family(&f::SESSIONS);
        samples.sample(&[Persistence::Persistent.name()], census.persistent);
        samples.sample(&[Persistence::Clean.name()], census.clean);
        let created = totals.sessions_created.get();
        self.out.value(&f::SESSIONS_CREATED, created);
        self.counters(&f::SESSIONS_RESUMED, &totals.sessions_resumed);
        self.counters(&f::SESSIONS_TAKEN_OVER, &totals.sessions_taken_over);
        self.histograms(&f::SESSION_TAKEOVER_DURATION, &totals.takeover);
        let expired = totals.sessions_expired.get();
        self.out.value(&f::SESSIONS_EXPIRED, expired);
        self.gauges(&f::SUBSCRIPTIONS, &totals.subscriptions);
        let mut samples = self.out.family(&f::INFLIGHT_MESSAGES);
        samples.sample(&[Direction::Inbound.name()], census.inbound_in_flight);
        samples.sample(&[Direction::Outbound.name()], census.outbound_in_flight);
        self.out.value(&f::QUEUED_MESSAGES, census.queued_messages);
        self.out.value(&f::QUEUED_BYTES, census.queued_bytes);
        self.out.value(&f::SLOW_CONSUMERS, census.slow_consumers);
    }

    fn write_store(&mut self) {
        let totals = &self.node.totals.store;
        let is_up = self.node.store_health() == StoreHealth::Available;
        let backend = self.node.store_kind();
        self.out
            .family(&f::STORE_UP)
            .sample(&[backend], u8::from(is_up));
        self.counters_by(&f::STORE_OPERATIONS, &totals.operations);
        self.histograms(&f::STORE_OPERATION_DURATION, &totals.durations);
        self.histogram(&f::STORE_BATCH_CHANGES, &totals.batches);
        self.counters(&f::STORE_RETRIES, &totals.retries);
        self.out
            .value(&f::STORE_PENDING_OPERATIONS, totals.pending.get());
    }

    fn write_cluster(&mut self) {
        let cluster = self.node.cluster.as_ref();
        let [ready, suspect, dead] = cluster.map_or([0; 3], |cluster| cluster.members.count());
        let mut samples = self.out.family(&f::CLUSTER_NODES);
        samples.sample(&["ready"], ready + 1);
        samples.sample(&["suspect"], suspect);
        samples.sample(&["dead"], dead);
        if let Some(estimates) = &self.observed.estimates {
            let mut samples = self.out.family(&f::CLUSTER_SESSIONS);
            samples.sample(&["online"], estimates.sessions_online);
            samples.sample(&["offline"], estimates.sessions_offline);
            self.out
                .value(&f::CLUSTER_OFFLINE_MESSAGES, estimates.messages);
            self.out
                .value(&f::CLUSTER_RETAINED_MESSAGES, estimates.retained);
            self.out
                .value(&f::CLUSTER_RETAINED_BYTES, estimates.retained_bytes);
        }
        let Some(cluster) = cluster else {
            return;
        };
        let counters = cluster.links.counters();
        let is_connected = cluster.links.is_bus_connected();
        self.out.value(&f::BUS_CONNECTED, u8::from(is_connected));
        self.counters(&f::BUS_MESSAGES_PUBLISHED, &counters.sent);
        self.counters(&f::BUS_MESSAGES_RECEIVED, &counters.received);
        self.out
            .value(&f::BUS_BYTES_PUBLISHED, counters.bytes_sent.get());
        self.out.value(&f::BUS_GAPS, counters.gaps.get());
        self.out.value(&f::BUS_LOST, counters.lost.get());
        let pending_bytes = cluster.links.pending_bytes();
        self.out.value(&f::BUS_PENDING_BYTES, pending_bytes);
        self.out.value(&f::BUS_CREDIT_STALLS, counters.stalls.get());
        self.counters(&f::BUS_MESSAGES_DROPPED, &counters.dropped);
        self.counters(&f::BUS_PUBLISH_FAILURES, &counters.failures);
        let reconnects = cluster.links.bus_reconnects();
        self.out.value(&f::BUS_RECONNECTS, reconnects);
        self.histogram(&f::BUS_ROUNDTRIP_DURATION, &counters.roundtrip);
    }

    fn by_listener(
        &mut self,
        family: &'static f::Family,
        counter: impl Fn(&ListenerTotals) -> &Counter,
    ) {
        let mut samples = self.out.family(family);
        for listener in self.node.totals.listeners.values() {
            samples.sample(&[&listener.name], counter(listener).get());
        }
    }

    fn counters<L: Label>(&mut self, family: &'static f::Family, counters: &By<L, Counter>) {
        let mut samples = self.out.family(family);
        for (label, counter) in counters.iter() {
            samples.sample(&[label.name()], counter.get());
        }
    }

    /// There is no acknowledgement with QoS 0.
    fn acknowledged(&mut self, family: &'static f::Family, counters: &By<QoS, Counter>) {
        let mut samples = self.out.family(family);
        for (qos, counter) in counters.iter().filter(|(qos, _)| *qos > QoS::AtMostOnce) {
            samples.sample(&[qos.name()], counter.get());
        }
    }

    fn acknowledgements(&mut self, family: &'static f::Family, histograms: &By<QoS, Histogram>) {
        let mut samples = self.out.family(family);
        for (qos, histogram) in histograms.iter().filter(|(qos, _)| *qos > QoS::AtMostOnce) {
            samples.distribution(&[qos.name()], &histogram.read());
        }
    }

    fn counters_by<L: Label, M: Label>(
        &mut self,
        family: &'static f::Family,
        counters: &By<L, By<M, Counter>>,
    ) {
        let mut samples = self.out.family(family);
        for (first, counters) in counters.iter() {
            for (second, counter) in counters.iter() {
                samples.sample(&[first.name(), second.name()], counter.get());
            }
        }
    }

    fn gauges<L: Label>(&mut self, family: &'static f::Family, gauges: &By<L, Gauge>) {
        let mut samples = self.out.family(family);
        for (label, gauge) in gauges.iter() {
            samples.sample(&[label.name()], gauge.get());
        }
    }

    fn histogram<S: Scale>(&mut self, family: &'static f::Family, histogram: &Histogram<S>) {
        self.out.family(family).distribution(&[], &histogram.read());
    }

    fn histograms<L: Label>(&mut self, family: &'static f::Family, histograms: &By<L, Histogram>) {
        let mut samples = self.out.family(family);
        for (label, histogram) in histograms.iter() {
            samples.distribution(&[label.name()], &histogram.read());
        }
    }
}
