//! All metrics that midge exposes: their names, what they are, and what they say.
//!
//! docs/metrics.md is made from this.

/// One metric, with all its series.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) labels: &'static [&'static str],
    pub(super) help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

macro_rules! families {
    ($($section:literal { $($name:ident: $kind:ident $text:literal [$($label:literal),*] $help:literal;)+ })+) => {
        $($(pub(super) static $name: Family = Family {
            name: $text,
            kind: Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)+)+

        /// All of them, in sections, as they are documented.
        #[cfg(test)]
        pub(super) static SECTIONS: &[(&str, &[&Family])] = &[
            $(($section, &[$(&$name),+]),)+
        ];
    };
}

families! {
    "The node" {
        BUILD_INFO: Gauge "midge_build_info" ["version", "revision", "rust_version", "mode"]
            "What this midge was made of, and the kind of its store; always 1.";
        NODE_INFO: Gauge "midge_node_info" ["node", "cluster", "zone"]
            "The name of this node, its cluster if it has one (the database and what tells it from others of that name), and node.zone; always 1.";
        NODE_STATE: Gauge "midge_node_state" ["state"]
            "Where this node stands: 1 for the state that it is in, 0 for the others.";
        CONFIG_RELOAD_SUCCESSFUL: Gauge "midge_config_last_reload_successful" []
            "Whether files were good when they were last read again (1) or not (0).";
        CONFIG_RELOAD_TIMESTAMP: Gauge "midge_config_last_reload_success_timestamp_seconds" []
            "Unix time at which the files in effect were read.";
        CONFIG_INFO: Gauge "midge_config_info" ["sha256"]
            "The first digits of a hash of the settings in effect, without passwords, node.name, node.zone and the addresses that are bound: nodes that differ have different settings. Always 1.";
        OVERLOAD_LEVEL: Gauge "midge_overload_level" []
            "0 if there is memory enough, 1 if new connections are paced, 2 if publishers are, 3 if nobody is let in.";
        MEMORY_LIMIT: Gauge "midge_memory_limit_bytes" []
            "The memory that this node may use; 0 if there is no limit.";
        LOG_MESSAGES: Counter "midge_log_messages_total" ["level"]
            "Lines of the log that say that something is wrong.";
        RUNTIME_STALL: Histogram "midge_runtime_stall_duration_seconds" []
            "How late a timer was that is due ten times a second: something blocks the runtime if it is much.";
    }
    "Connections" {
        CONNECTIONS: Gauge "midge_connections" ["listener", "version"]
            "Clients that are connected, by the Protocol Version of their CONNECT.";
        MAX_CONNECTIONS: Gauge "midge_max_connections" []
            "The connections that are let in, at all listeners together; 0 if there is no limit.";
        CONNECTIONS_OPENED: Counter "midge_connections_opened_total" ["listener"]
            "Connections that were established: CONNACK said yes.";
        CONNECTIONS_CLOSED: Counter "midge_connections_closed_total" ["listener", "reason"]
            "Established connections that ended.";
        CONNECTIONS_REJECTED: Counter "midge_connections_rejected_total" ["listener", "reason"]
            "Connections that ended before they were established.";
        CONNECTIONS_DELAYED: Counter "midge_connections_delayed_total" []
            "Connections that had to wait for their turn, because more came than limits.connect_rate.";
        PROBE_CONNECTIONS: Counter "midge_probe_connections_total" ["listener"]
            "Connections that ended before their first byte, as health checks of load balancers do.";
        CONNECT_DURATION: Histogram "midge_connect_duration_seconds" ["listener"]
            "From the last byte of CONNECT to CONNACK.";
        TLS_HANDSHAKE_DURATION: Histogram "midge_tls_handshake_duration_seconds" ["listener"]
            "TLS handshakes that succeeded.";
        TLS_CERTIFICATE_EXPIRY: Gauge "midge_tls_certificate_expiry_timestamp_seconds" ["listener"]
            "Unix time at which the certificate of the listener expires.";
        RECEIVED_BYTES: Counter "midge_received_bytes_total" ["listener"]
            "Bytes of MQTT that were read from clients.";
        SENT_BYTES: Counter "midge_sent_bytes_total" ["listener"]
            "Bytes of MQTT that were given to the sockets of clients.";
        PACKETS_RECEIVED: Counter "midge_packets_received_total" ["type"]
            "MQTT control packets that came.";
        PACKETS_SENT: Counter "midge_packets_sent_total" ["type"]
            "MQTT control packets that were sent.";
        PROTOCOL_ERRORS: Counter "midge_protocol_errors_total" ["reason_code"]
            "Connections that were ended because the client violated the specification.";
        CLIENTS_THROTTLED: Gauge "midge_clients_throttled" ["cause"]
            "Clients from which nothing is read at the moment.";
    }
    "Access" {
        AUTHENTICATIONS: Counter "midge_authentications_total" ["method", "result"]
            "Clients that asked to be let in.";
        AUTHENTICATION_DURATION: Histogram "midge_authentication_duration_seconds" ["method"]
            "How long it took to decide who is let in.";
        AUTHORIZATIONS: Counter "midge_authorizations_total" ["action", "result"]
            "Decisions about publishing, subscribing and, where rules restrict it, receiving.";
    }
    "Messages" {
        MESSAGES_RECEIVED: Counter "midge_messages_received_total" ["qos", "source"]
            "Messages that were accepted, by the QoS that they were published with.";
        MESSAGES_DELIVERED: Counter "midge_messages_delivered_total" ["qos"]
            "Messages that were sent to clients, once for each client and attempt.";
        MESSAGES_ACKNOWLEDGED: Counter "midge_messages_acknowledged_total" ["qos"]
            "Deliveries that clients have acknowledged, with PUBACK or PUBCOMP.";
        MESSAGES_REDELIVERED: Counter "midge_messages_redelivered_total" ["qos"]
            "Deliveries that were repeated, with DUP, after a client came back.";
        MESSAGES_DROPPED: Counter "midge_messages_dropped_total" ["reason"]
            "Messages that a session will never get.";
        MESSAGES_UNROUTED: Counter "midge_messages_unrouted_total" ["qos"]
            "Accepted messages that nobody had subscribed to.";
        MESSAGE_SIZE: Histogram "midge_message_size_bytes" []
            "Payloads that clients have published.";
        MESSAGE_FANOUT: Histogram "midge_message_fanout" []
            "Sessions and share groups that one message was for; all at another node that end with their connections count as one.";
        PUBLISH_ACK_DURATION: Histogram "midge_publish_ack_duration_seconds" ["qos"]
            "From reading PUBLISH to writing PUBACK or PUBREC.";
        DELIVERY_DURATION: Histogram "midge_delivery_duration_seconds" ["path"]
            "From reading PUBLISH (local) or the frame of another node (remote) to writing PUBLISH to a subscriber; what was read from an inbox is not in it.";
        SUBSCRIBER_ACK_DURATION: Histogram "midge_subscriber_ack_duration_seconds" ["qos"]
            "From writing PUBLISH to a subscriber to reading its PUBACK or PUBCOMP.";
        WILLS_PUBLISHED: Counter "midge_wills_published_total" []
            "Wills that were published.";
        RETAINED_DELIVERED: Counter "midge_retained_delivered_total" []
            "Retained messages that were sent because of a new subscription.";
    }
    "Sessions" {
        SESSIONS: Gauge "midge_sessions" ["persistent"]
            "Sessions whose clients are connected to this node.";
        SESSIONS_CREATED: Counter "midge_sessions_created_total" []
            "Sessions that began.";
        SESSIONS_RESUMED: Counter "midge_sessions_resumed_total" ["origin"]
            "Sessions that a client came back to; remote if they were last at another node.";
        SESSIONS_TAKEN_OVER: Counter "midge_sessions_taken_over_total" ["origin"]
            "Connections of this node that ended because their client came again; remote if to another node.";
        SESSION_TAKEOVER_DURATION: Histogram "midge_session_takeover_duration_seconds" ["origin"]
            "How long a client waited until its earlier connection to this node, or the node that had its session last (remote), let the session go.";
        SESSIONS_EXPIRED: Counter "midge_sessions_expired_total" []
            "Sessions that ended because their client stayed away.";
        SUBSCRIPTIONS: Gauge "midge_subscriptions" ["kind"]
            "Subscriptions of sessions whose clients are connected to this node.";
        INFLIGHT_MESSAGES: Gauge "midge_inflight_messages" ["direction"]
            "QoS 1 and 2 exchanges with connected clients that are not finished.";
        QUEUED_MESSAGES: Gauge "midge_queued_messages" []
            "Messages that wait in memory for connected clients.";
        QUEUED_BYTES: Gauge "midge_queued_bytes" []
            "Their size.";
        SLOW_CONSUMERS: Gauge "midge_slow_consumers" []
            "Connected clients that take messages more slowly than they come.";
    }
    "The store" {
        STORE_UP: Gauge "midge_store_up" ["backend"]
            "Whether the store takes what is written to it (1) or not (0).";
        STORE_OPERATIONS: Counter "midge_store_operations_total" ["operation", "result"]
            "What was asked of the store.";
        STORE_OPERATION_DURATION: Histogram "midge_store_operation_duration_seconds" ["operation"]
            "How long the store took.";
        STORE_BATCH_CHANGES: Histogram "midge_store_batch_changes" []
            "Changes that were written together, in one group commit.";
        STORE_RETRIES: Counter "midge_store_retries_total" ["operation"]
            "What was asked of the store again, because it was not available before.";
        STORE_PENDING_OPERATIONS: Gauge "midge_store_pending_operations" []
            "What was asked of the store and is not yet answered.";
    }
    "The cluster: the same at every node, so use max, not sum" {
        CLUSTER_NODES: Gauge "midge_cluster_nodes" ["state"]
            "Nodes as this one sees them, itself included.";
        CLUSTER_SESSIONS: Gauge "midge_cluster_sessions" ["state"]
            "Sessions in the store, at most 15 s old; with MongoDB without those that end with their connection.";
        CLUSTER_OFFLINE_MESSAGES: Gauge "midge_cluster_offline_messages" []
            "Messages that wait in the store, at most 15 s old; with MongoDB estimated, and with those in flight to connected clients.";
        CLUSTER_RETAINED_MESSAGES: Gauge "midge_cluster_retained_messages" []
            "Retained messages, at most 15 s old.";
        CLUSTER_RETAINED_BYTES: Gauge "midge_cluster_retained_bytes" []
            "Their size with topics and properties, at most 15 s old; with MongoDB that of their documents.";
    }
    "Between nodes: only with a shared store" {
        BUS_CONNECTED: Gauge "midge_cluster_bus_connected" []
            "Whether the bus that is configured works for this node (1), or not (0), and frames go by MongoDB.";
        BUS_MESSAGES_PUBLISHED: Counter "midge_cluster_bus_messages_published_total" ["kind"]
            "What this node told others.";
        BUS_MESSAGES_RECEIVED: Counter "midge_cluster_bus_messages_received_total" ["kind"]
            "What others told this node.";
        BUS_BYTES_PUBLISHED: Counter "midge_cluster_bus_bytes_published_total" []
            "Bytes of frames that this node put on the bus.";
        BUS_GAPS: Counter "midge_cluster_bus_gaps_total" []
            "Times that frames of another node were missing, and asked for again.";
        BUS_LOST: Counter "midge_cluster_bus_lost_total" []
            "Times that they could not be had, and inboxes were read from the store instead; clean sessions may have missed messages.";
        BUS_PENDING_BYTES: Gauge "midge_cluster_bus_pending_bytes" []
            "Bytes for single other nodes that these have not yet taken up: on their way, or held back until they have caught up.";
        BUS_CREDIT_STALLS: Counter "midge_cluster_bus_credit_stalls_total" []
            "Times that another node was so far behind that messages to it were held back, or had to be read from the store there.";
        BUS_MESSAGES_DROPPED: Counter "midge_cluster_bus_messages_dropped_total" ["qos"]
            "Messages for sessions that end with their connection, or of QoS 0, that were not sent to a node because it was behind; once for each node.";
        BUS_PUBLISH_FAILURES: Counter "midge_cluster_bus_publish_failures_total" ["reason"]
            "Times that the bus did not take frames in time.";
        BUS_RECONNECTS: Counter "midge_cluster_bus_reconnects_total" []
            "Times that a connection to the bus that was lost was made anew.";
        BUS_ROUNDTRIP_DURATION: Histogram "midge_cluster_bus_roundtrip_duration_seconds" []
            "From sending a frame to all to its coming back to this node.";
    }
    "HTTP" {
        HTTP_REQUESTS: Counter "midge_http_requests_total" ["route", "method", "code"]
            "Requests that were answered, by the template of their path.";
        HTTP_REQUEST_DURATION: Histogram "midge_http_request_duration_seconds" ["route"]
            "From the header of a request to its answer.";
    }
    "The process" {
        PROCESS_CPU: Counter "process_cpu_seconds_total" []
            "User and system CPU time of the process.";
        PROCESS_START_TIME: Gauge "process_start_time_seconds" []
            "Unix time at which the process began.";
        PROCESS_RESIDENT_MEMORY: Gauge "process_resident_memory_bytes" []
            "Memory that the kernel holds for the process.";
        PROCESS_VIRTUAL_MEMORY: Gauge "process_virtual_memory_bytes" []
            "Address space of the process.";
        PROCESS_OPEN_FDS: Gauge "process_open_fds" []
            "Open file descriptors.";
        PROCESS_MAX_FDS: Gauge "process_max_fds" []
            "File descriptors that the process may open.";
        PROCESS_THREADS: Gauge "process_threads" []
            "Threads of the process.";
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::http::health::Status;
    use crate::metrics::{
        Asked, Authentication, Authorization, BusFailure, Closed, Direction, Dropped, FilterKind,
        Label, Level, Method, Operation, Outcome, Persistence, Rejected, Source, Throttle, Traffic,
        Violation, Where,
    };
    use crate::mqtt::packet::PacketType;

    fn names<L: Label>() -> Vec<&'static str> {
        L::ALL.iter().map(|label| label.name()).collect()
    }

    /// The labels whose values are a closed set.
    fn values(family: &Family, label: &str) -> Option<Vec<&'static str>> {
        Some(match (family.name, label) {
            ("midge_build_info", "mode") | (_, "backend") => vec!["memory", "embedded", "mongodb"],
            ("midge_node_state", _) => Status::ALL.map(Status::as_str).to_vec(),
            ("midge_connections", "version") => vec!["3", "4", "5"],
            ("midge_connections_closed_total", "reason") => names::<Closed>(),
            ("midge_connections_rejected_total", "reason") => names::<Rejected>(),
            (_, "level") => names::<Level>(),
            (_, "type") => names::<PacketType>(),
            (_, "reason_code") => names::<Violation>(),
            (_, "cause") => names::<Throttle>(),
            (_, "method") => names::<Method>(),
            ("midge_authentications_total", "result") => names::<Authentication>(),
            ("midge_authorizations_total", "result") => names::<Authorization>(),
            (_, "action") => names::<Asked>(),
            (_, "source") => names::<Source>(),
            ("midge_messages_dropped_total", _) => names::<Dropped>(),
            (_, "path" | "origin") => names::<Where>(),
            (_, "persistent") => names::<Persistence>(),
            ("midge_subscriptions", _) => names::<FilterKind>(),
            (_, "direction") => names::<Direction>(),
            (_, "operation") => names::<Operation>(),
            ("midge_store_operations_total", "result") => names::<Outcome>(),
            ("midge_cluster_nodes", _) => vec!["ready", "suspect", "dead"],
            ("midge_cluster_sessions", _) => vec!["online", "offline"],
            (_, "kind") => names::<Traffic>(),
            ("midge_cluster_bus_publish_failures_total", _) => names::<BusFailure>(),
            _ => return None,
        })
    }

    fn reference() -> String {
        let mut text = String::new();
        for (section, families) in SECTIONS {
            let _ = writeln!(text, "### {section}\n");
            text.push_str("| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n");
            for family in *families {
                let labels: Vec<_> = family
                    .labels
                    .iter()
                    .map(|label| format!("`{label}`"))
                    .collect();
                let (name, kind, labels) = (family.name, family.kind.name(), labels.join(", "));
                let _ = writeln!(text, "| `{name}` | {kind} | {labels} | {} |", family.help);
            }
            text.push('\n');
            for family in *families {
                for label in family.labels {
                    if let Some(values) = values(family, label) {
                        let values: Vec<_> =
                            values.iter().map(|value| format!("`{value}`")).collect();
                        let values = values.join(", ");
                        let _ = writeln!(text, "- `{label}` of `{}`: {values}", family.name);
                    }
                }
            }
            text.push('\n');
        }
        text.replace("\n\n\n", "\n\n")
    }

    /// `MIDGE_TEST_UPDATE=1` writes it anew.
    #[test]
    fn the_reference_in_docs_is_what_is_exposed() {
        const BEGIN: &str = "<!-- made by a test from src/http/metrics/families.rs -->\n\n";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let (before, _) = page.split_once(BEGIN).unwrap();
        let expected = format!("{before}{BEGIN}{}\n", reference().trim_end());
        if std::env::var_os("MIDGE_TEST_UPDATE").is_some() {
            std::fs::write(&path, &expected).unwrap();
        } else {
            assert!(
                page == expected,
                "docs/metrics.md is not what midge exposes; run this test with MIDGE_TEST_UPDATE=1"
            );
        }
    }

    #[test]
    fn names_obey_the_rules_of_prometheus() {
        for family in SECTIONS.iter().flat_map(|(_, families)| *families) {
            let is_counter = family.kind == Kind::Counter;
            assert_eq!(
                is_counter,
                family.name.ends_with("_total"),
                "{}",
                family.name
            );
            if family.kind == Kind::Histogram {
                let has = |unit: &&str| family.name.ends_with(*unit);
                let units = ["_duration_seconds", "_bytes", "_changes", "_fanout"];
                assert!(units.iter().any(has), "{}", family.name);
            }
            let is_plain = |text: &str| !text.contains(['\\', '\n', '|', '"']);
            assert!(is_plain(family.help), "{}", family.name);
        }
    }
}
