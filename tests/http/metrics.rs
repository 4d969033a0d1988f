//! What Prometheus reads, and that it is what docs/metrics.md says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use tokio::time::Instant;

use crate::broker::{Answer, Broker};
use crate::mqtt::Client;

/// The samples of an answer, by the text before their values.
fn samples(answer: &Answer) -> BTreeMap<&str, f64> {
    let lines = answer.body.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series, value.parse().unwrap())
        })
        .collect()
}

/// The names and types of the families of an answer.
fn families(answer: &Answer) -> BTreeMap<String, String> {
    let types = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| {
            let (name, kind) = line.split_once(' ').unwrap();
            (name.to_owned(), kind.to_owned())
        })
        .collect()
}

fn documented() -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let page = std::fs::read_to_string(path).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let (name, rest) = row.split_once("` | ").unwrap();
        (name.to_owned(), rest.split(' ').next().unwrap().to_owned())
    })
    .collect()
}

/// Waits until the sample has this value.
#[track_caller]
fn wait_for(broker: &Broker, series: &str, value: f64) {
    let deadline = Instant::now() + crate::lines::DEADLINE;
    loop {
        let answer = broker.get("/metrics").expect(200);
        let found = samples(&answer).get(series).copied();
        if found == Some(value) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{series} is {found:?} and not {value}"
        );
        std::thread::yield_now();
    }
}

#[test]
fn what_is_documented_is_exposed_and_the_other_way_round() {
    let broker = Broker::start();

    let exposed = families(&broker.get("/metrics").expect(200));

    // Those between nodes are looked at in the tests of the cluster.
    let mut expected = documented();
    expected.retain(|name, _| !name.starts_with("midge_cluster_bus_"));
    assert_eq!(exposed, expected);
}

#[test]
fn promtool_finds_nothing_to_complain_of() {
    let broker = Broker::start();
    let answer = broker.get("/metrics").expect(200);
    let promtool =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-tools/prometheus/usr/bin/promtool");

    let mut check = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("./test installs promtool");
    let mut input = check.stdin.take().unwrap();
    input.write_all(answer.body.as_bytes()).unwrap();
    drop(input);
    let output = check.wait_with_output().unwrap();

    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && complaints.is_empty(),
        "{complaints}"
    );
}

#[test]
fn open_metrics_comes_to_those_who_ask_for_it() {
    let broker = Broker::start();
    let accept = "Accept: application/openmetrics-text; version=1.0.0\r\n";

    let answer = broker.ask("GET", "/metrics", accept, "").expect(200);

    assert!(
        answer
            .head
            .contains("content-type: application/openmetrics-text; version=1.0.0")
    );
    assert!(answer.body.ends_with("# EOF\n"));
    let plain = families(&broker.get("/metrics").expect(200));
    let without_suffix = |(name, kind): (String, String)| match &*kind {
        "counter" => (name.trim_end_matches("_total").to_owned(), kind),
        _ => (name, kind),
    };
    let expected: BTreeMap<_, _> = plain.into_iter().map(without_suffix).collect();
    assert_eq!(families(&answer), expected);
}

#[test]
fn every_counter_begins_with_zero() {
    let broker = Broker::start();
    let answer = broker.get("/metrics").expect(200);

    let own = |series: &&str| series.starts_with("midge_") && series.contains("_total");
    let counted: BTreeSet<_> = samples(&answer)
        .into_iter()
        .filter(|(series, value)| own(series) && *value != 0.0)
        // The store and the HTTP server are asked for things before anybody comes.
        .filter(|(series, _)| !series.starts_with("midge_store_"))
        .filter(|(series, _)| !series.starts_with("midge_http_"))
        .map(|(series, _)| series.to_owned())
        .collect();

    assert_eq!(counted, BTreeSet::new());
    assert!(samples(&answer).len() > 300, "{}", samples(&answer).len());
}

#[test]
fn what_clients_do_is_counted() {
    let broker = Broker::start();
    let mut subscriber = Client::connect(broker.mqtt, "subscriber");
    subscriber.subscribe("a/+");
    let mut publisher = Client::connect(broker.mqtt, "publisher");
    publisher.publish("a/b", b"hello");
    publisher.publish("nobody/wants/it", b"hello");
    let (kind, publish) = subscriber.receive();
    assert_eq!(kind & 0xF0, 0x30);
    subscriber.acknowledge(&publish);

    for (series, value) in [
        ("midge_connections_opened_total{listener=\"tcp\"}", 2.0),
        (
            "midge_messages_received_total{qos=\"1\",source=\"client\"}",
            2.0,
        ),
        ("midge_messages_delivered_total{qos=\"1\"}", 1.0),
        ("midge_messages_unrouted_total{qos=\"1\"}", 1.0),
        ("midge_subscriptions{kind=\"wildcard\"}", 1.0),
        ("midge_packets_received_total{type=\"connect\"}", 2.0),
        ("midge_packets_sent_total{type=\"suback\"}", 1.0),
        (
            "midge_connect_duration_seconds_count{listener=\"tcp\"}",
            2.0,
        ),
        ("midge_publish_ack_duration_seconds_count{qos=\"1\"}", 2.0),
        ("midge_delivery_duration_seconds_count{path=\"local\"}", 1.0),
        (
            "midge_subscriber_ack_duration_seconds_count{qos=\"1\"}",
            1.0,
        ),
        ("midge_message_fanout_bucket{le=\"0.0\"}", 1.0),
        ("midge_message_fanout_count", 2.0),
        ("midge_message_fanout_sum", 1.0),
        (
            "midge_authentications_total{method=\"anonymous\",result=\"allowed\"}",
            2.0,
        ),
    ] {
        wait_for(&broker, series, value);
    }
    drop(publisher);
    let closed = "midge_connections_closed_total{listener=\"tcp\",reason=\"network_error\"}";
    wait_for(&broker, closed, 1.0);
}

#[test]
fn a_client_that_comes_again_waits_for_its_first_connection_to_let_go() {
    let broker = Broker::start();
    let _first = Client::connect(broker.mqtt, "ann");
    let _second = Client::connect(broker.mqtt, "ann");

    for (series, value) in [
        ("midge_sessions_taken_over_total{origin=\"local\"}", 1.0),
        (
            "midge_session_takeover_duration_seconds_count{origin=\"local\"}",
            1.0,
        ),
        (
            "midge_session_takeover_duration_seconds_count{origin=\"remote\"}",
            0.0,
        ),
    ] {
        wait_for(&broker, series, value);
    }
}

#[test]
fn retained_messages_have_a_size() {
    let broker = Broker::start();
    let message = serde_json::json!({ "payload": "hello", "qos": 1 });
    let answer = broker.send("PUT", "/api/v1/retained/a", &message);
    assert!(answer.status < 300, "{answer:?}");

    // The first look at what takes a while to find out.
    let answer = broker.get("/metrics").expect(200);
    let samples = samples(&answer);
    assert_eq!(samples["midge_cluster_retained_messages"], 1.0);
    assert!(samples["midge_cluster_retained_bytes"] >= 5.0);
}

/// The value of `sha256`.
fn fingerprint(broker: &Broker) -> String {
    let answer = broker.get("/metrics").expect(200);
    let series = samples(&answer);
    let mut infos = series
        .keys()
        .filter(|series| series.starts_with("midge_config_info{"));
    infos.next().unwrap().split('"').nth(1).unwrap().to_owned()
}

#[test]
fn nodes_with_the_same_settings_have_the_same_fingerprint() {
    let start = |settings: &[&str]| Broker::start_in(tempfile::tempdir().unwrap(), settings);
    let broker = start(&[]);
    let twin = start(&["node.name=there"]);
    let other = start(&["limits.topic_levels_max=7"]);

    assert_eq!(fingerprint(&broker).len(), 8);
    assert_eq!(fingerprint(&broker), fingerprint(&twin));
    assert_ne!(fingerprint(&broker), fingerprint(&other));
}

#[test]
fn a_connection_that_says_nothing_is_a_probe_and_one_that_says_nonsense_is_rejected() {
    let broker = Broker::start();

    drop(std::net::TcpStream::connect(broker.mqtt).unwrap());
    wait_for(
        &broker,
        "midge_probe_connections_total{listener=\"tcp\"}",
        1.0,
    );
    let mut stream = std::net::TcpStream::connect(broker.mqtt).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    wait_for(
        &broker,
        "midge_connections_rejected_total{listener=\"tcp\",reason=\"not_mqtt\"}",
        1.0,
    );

    let answer = broker.get("/metrics").expect(200);
    let opened = samples(&answer)["midge_connections_opened_total{listener=\"tcp\"}"];
    assert_eq!(opened, 0.0);
}
