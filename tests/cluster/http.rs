//! What the HTTP API of one node tells of the others.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::lines::DEADLINE;
use crate::mongod::{Database, POLL_PAUSE, ReplicaSet};
use crate::node::Cluster;
use crate::wire::{Connect, Publish, Version};

/// The status and the body of the answer.
///
/// # Errors
/// When nobody answers there.
pub(crate) fn ask(address: SocketAddr, method: &str, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Ok((head[9..12].parse().unwrap(), body.to_owned()))
}

pub(crate) async fn wait_for_status(address: SocketAddr, path: &str, status: u16) {
    let end = Instant::now() + DEADLINE;
    while ask(address, "GET", path).unwrap().0 != status {
        assert!(Instant::now() < end, "{path} does not become {status}");
        sleep(POLL_PAUSE).await;
    }
}

#[track_caller]
fn get(address: SocketAddr, path: &str) -> Value {
    let (status, body) = ask(address, "GET", path).unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_tells_of_the_whole_cluster() {
    let set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let mut cluster = Cluster::start(vec![database.settings(), database.settings()]).await;
    let mut clients = Vec::new();
    for (node, client_id) in [(0, "a"), (1, "b"), (0, "c")] {
        let connect = Connect::persistent(Version::V5, client_id);
        let address = cluster.node(node).address();
        clients.push(Client::connect(address, &connect).await);
    }
    let http = [0, 1].map(|node| cluster.node(node).http_address());
    for address in http {
        wait_for_status(address, "/lbz", 200).await;
    }

    for address in http {
        let nodes = get(address, "/api/v1/nodes");
        assert_eq!(nodes["items"].as_array().unwrap().len(), 2);
        let first = get(address, "/api/v1/clients?limit=2&state=connected");
        let cursor = first["next_cursor"].as_str().unwrap();
        let rest = get(address, &format!("/api/v1/clients?limit=2&cursor={cursor}"));
        let items = [&first, &rest].map(|page| page["items"].as_array().unwrap().clone());
        let seen = items.concat();
        let seen: Vec<_> = seen
            .iter()
            .map(|client| {
                let text = |key: &str| client[key].as_str().unwrap_or_default();
                (text("client_id"), text("node"))
            })
            .collect();
        assert_eq!(seen, [("a", "node-1"), ("b", "node-2"), ("c", "node-1")]);
    }
    let own = get(http[0], "/api/v1/clients/a");
    assert_eq!(own["connection"]["listener"], "tcp");
    let other = get(http[1], "/api/v1/clients/a");
    assert_eq!(other["state"], "connected");
    assert!(other["connection"].is_null());
    for (address, client, client_id) in [(http[1], 0, "a"), (http[1], 1, "b"), (http[0], 2, "c")] {
        let path = format!("/api/v1/clients/{client_id}");
        let (status, body) = ask(address, "DELETE", &path).unwrap();
        assert_eq!(status, 204, "{body}");
        assert_eq!(clients[client].wait_for_end().await, Some(0x98));
    }
}

/// The value of a sample of `/metrics`.
pub(crate) fn sample(address: SocketAddr, series: &str) -> Option<f64> {
    let (status, body) = ask(address, "GET", "/metrics").unwrap();
    assert_eq!(status, 200, "{body}");
    let line = body.lines().find(|line| {
        line.strip_prefix(series)
            .is_some_and(|rest| rest.starts_with(' '))
    })?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_a_cluster_has_metrics_of_the_bus_and_of_its_peers() {
    let set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let mut cluster = Cluster::start(vec![database.settings(), database.settings()]).await;
    let http = [0, 1].map(|node| cluster.node(node).http_address());
    for address in http {
        wait_for_status(address, "/lbz", 200).await;
    }
    let address = cluster.node(1).address();
    let _client = Client::connect(address, &Connect::persistent(Version::V5, "a")).await;

    let page = include_str!("../../docs/metrics.md");
    let names = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let names = names.filter_map(|row| Some(row.split_once('`')?.0));
    let (_, body) = ask(http[0], "GET", "/metrics").unwrap();
    // The listener has no certificate that could expire.
    for name in names.filter(|name| !name.starts_with("midge_tls_")) {
        let has = |line: &str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with(['{', ' ', '_']))
        };
        assert!(
            body.lines().any(has),
            "{name} is documented and not exposed"
        );
    }
    for (series, at_least) in [
        ("midge_cluster_nodes{state=\"ready\"}", 2.0),
        ("midge_cluster_bus_connected", 1.0),
        (
            "midge_cluster_bus_messages_received_total{kind=\"session\"}",
            1.0,
        ),
        ("midge_cluster_bus_roundtrip_duration_seconds_count", 1.0),
        ("midge_cluster_sessions{state=\"online\"}", 1.0),
        (
            "midge_store_operations_total{operation=\"heartbeat\",result=\"ok\"}",
            1.0,
        ),
    ] {
        wait_for_at_least(http[0], series, at_least).await;
    }
    // The client goes from one node to the other.
    let address = cluster.node(0).address();
    let _client = Client::connect(address, &Connect::persistent(Version::V5, "a")).await;
    let takeovers = "midge_session_takeover_duration_seconds_count{origin=\"remote\"}";
    wait_for_at_least(http[0], takeovers, 1.0).await;
}

pub(crate) async fn wait_for_at_least(address: SocketAddr, series: &str, at_least: f64) {
    let end = Instant::now() + DEADLINE;
    loop {
        let value = sample(address, series);
        if value.is_some_and(|value| value >= at_least) {
            return;
        }
        assert!(Instant::now() < end, "{series}: {value:?}");
        sleep(POLL_PAUSE).await;
    }
}

/// Balancers that keep connections on 404 would cut off every client on 503.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_mongodb_is_alive_and_asks_for_no_new_clients() {
    let mut set = ReplicaSet::start(1).await;
    let mut cluster = Cluster::start(vec![Database::on(set.uri()).settings()]).await;
    let http = cluster.node(0).http_address();
    wait_for_status(http, "/lbz", 200).await;

    let address = cluster.node(0).address();
    let mut client = Client::connect(address, &Connect::persistent(Version::V5, "a")).await;
    client.subscribe("a", 1).await.unwrap();

    set.mongod(0).kill();
    let publish = Publish {
        packet_id: 1,
        ..Publish::new("a", "", 1)
    };
    client.send(&publish.encode(Version::V5)).await.unwrap();
    wait_for_at_least(http, "midge_store_retries_total{operation=\"write\"}", 1.0).await;
    wait_for_status(http, "/lbz", 404).await;
    assert_eq!(ask(http, "GET", "/livez").unwrap().0, 200);
    let (status, body) = ask(http, "GET", "/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("\"status\":\"degraded\""), "{body}");
}
