//! MongoDB is away for longer than midge lets anybody wait.

use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::http::{ask, wait_for_status};
use crate::lines::DEADLINE;
use crate::mongod::{Database, POLL_PAUSE, ReplicaSet};
use crate::node::Cluster;
use crate::redis::{self, Redis};
use crate::wire::{Connect, Packet, Publish, Version};

/// Server unavailable, in CONNACK and DISCONNECT; version 3.1.1 has a code of its own in CONNACK.
const UNAVAILABLE: u8 = 0x88;
const UNAVAILABLE_311: u8 = 3;

fn news(number: u16) -> Publish {
    Publish {
        packet_id: number,
        ..Publish::new("news", &number.to_string(), 1)
    }
}

/// Scenario 15: whoever wants something stored is told after 30 s that it cannot be had, others go on, and
/// afterwards everything does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_is_away_for_longer_than_anybody_waits() {
    let redis = Redis::start();
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let settings = || redis::settings(&database, redis.address());
    let mut cluster = Cluster::start(vec![settings(), settings()]).await;
    for node in 0..2 {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    let [here, there] = [0, 1].map(|node| cluster.node(node).address());
    let http = cluster.node(0).http_address();

    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(there, &subscriber).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let publisher_connect = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(here, &publisher_connect).await;
    let mut watcher = Client::connect(there, &Connect::fleeting(Version::V5, "watcher")).await;
    watcher.subscribe("live", 0).await.unwrap();
    let mut speaker = Client::connect(here, &Connect::fleeting(Version::V5, "speaker")).await;
    publisher.publish(&news(1)).await.unwrap();
    assert_eq!(subscriber.message().await.unwrap().text(), "1");
    wait_for_status(http, "/readyz", 200).await;

    set.mongod(0).kill();
    publisher.send(&news(2).encode(Version::V5)).await.unwrap();
    for number in 0..10 {
        let live = Publish::new("live", &number.to_string(), 0);
        speaker.publish(&live).await.unwrap();
        assert_eq!(watcher.message().await.unwrap().text(), number.to_string());
    }
    let mut late = Client::connect(here, &Connect::fleeting(Version::V5, "late")).await;
    late.publish(&Publish::new("live", "late", 0))
        .await
        .unwrap();
    assert_eq!(watcher.message().await.unwrap().text(), "late");
    let refused = [
        Connect::persistent(Version::V5, "new"),
        Connect::persistent(Version::V311, "old"),
    ];
    let (new, old) = tokio::join!(
        Client::refusal(there, &refused[0]),
        Client::refusal(there, &refused[1]),
    );
    assert_eq!((new, old), (UNAVAILABLE, UNAVAILABLE_311));
    let told = publisher.receive().await.unwrap();
    assert_eq!(
        told,
        Packet::Disconnect(UNAVAILABLE),
        "and not acknowledged"
    );
    wait_for_status(http, "/readyz", 503).await;
    assert_eq!(ask(http, "GET", "/livez").unwrap().0, 200);
    // Those who were connected still are.
    speaker
        .publish(&Publish::new("live", "on", 0))
        .await
        .unwrap();
    assert_eq!(watcher.message().await.unwrap().text(), "on");

    set.mongod(0).start_again();
    let end = Instant::now() + DEADLINE;
    let mut publisher = loop {
        match Client::try_connect(here, &publisher_connect).await {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        sleep(POLL_PAUSE).await;
    };
    assert!(publisher.session_present);
    let again = Publish {
        dup: true,
        ..news(2)
    };
    publisher.publish(&again).await.unwrap();
    publisher.publish(&news(3)).await.unwrap();
    let mut received = Vec::new();
    while received.last().is_none_or(|last| last != "3") {
        received.push(subscriber.message().await.unwrap().text().to_owned());
    }
    // It was published twice.
    received.dedup();
    assert_eq!(received, ["2", "3"]);
    wait_for_status(http, "/readyz", 200).await;
    for node in 0..2 {
        let node = cluster.node(node);
        assert!(!node.has_logged("node_dead") && !node.has_logged("fenced"));
    }
}

/// It stops to answer while there is nothing to write: what comes then has to wait until other nodes can
/// be told how far the clock is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_stops_to_answer_a_node_at_rest() {
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let mut cluster = Cluster::start(vec![database.settings()]).await;
    let address = cluster.node(0).address();
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(address, &subscriber).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(address, &publisher).await;

    set.mongod(0).freeze();
    cluster.node(0).wait_for_event("heartbeat_failed");
    // The clock goes on with whoever comes.
    let _late = Client::connect(address, &Connect::fleeting(Version::V5, "late")).await;
    publisher.send(&news(1).encode(Version::V5)).await.unwrap();
    let told = publisher.receive().await.unwrap();
    assert_eq!(told, Packet::Disconnect(UNAVAILABLE), "not acknowledged");

    set.mongod(0).thaw();
    assert_eq!(subscriber.message().await.unwrap().text(), "1");
    cluster.node(0).wait_for_event("store_available");
}
