//! A node that stands still while others have more for it than Redis keeps.

use std::net::SocketAddr;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::http::{sample, wait_for_at_least};
use crate::lines::DEADLINE;
use crate::mongod::POLL_PAUSE;
use crate::redis::{self, Redis};
use crate::wire::{Connect, Publish, Version};

/// What Redis keeps for a node here: four times as much by default, and twice what may be on its way.
const LIMIT_MEBIBYTES: u32 = 16;

const MEBIBYTE: f64 = 1024.0 * 1024.0;

const PENDING: &str = "midge_cluster_bus_pending_bytes";
const STALLS: &str = "midge_cluster_bus_credit_stalls_total";

/// Messages of 64 KiB: of each of the first two more than Redis keeps, and more than is held back.
const QOS_0: u32 = 400;
const STORED: u16 = 200;
const FLEETING: u16 = 20;

fn message(topic: &str, number: u32, qos: u8) -> Publish {
    let number = number.to_string();
    let padding = "x".repeat(64 * 1024);
    Publish::new(topic, &format!("{number} {padding}"), qos)
}

/// Publishes messages with QoS 1, all before the first is acknowledged, and waits until all are.
async fn publish_all(client: &mut Client, topic: &str, count: u16) {
    for number in 1..=count {
        let publish = Publish {
            packet_id: number,
            ..message(topic, number.into(), 1)
        };
        client.send(&publish.encode(Version::V5)).await.unwrap();
    }
    for number in 1..=count {
        client.acknowledged(number).await.unwrap();
    }
}

/// Takes messages until one says `end`; returns the numbers of all before it.
fn collect(mut client: Client) -> JoinHandle<Vec<u32>> {
    tokio::spawn(async move {
        let mut numbers = Vec::new();
        loop {
            let message = client.message().await.unwrap();
            match message.text().split(' ').next().unwrap() {
                "end" => return numbers,
                number => numbers.push(number.parse().unwrap()),
            }
        }
    })
}

async fn subscribe(address: SocketAddr, connect: &Connect, topic: &str, qos: u8) -> Client {
    let mut client = Client::connect(address, connect).await;
    client.subscribe(topic, qos).await.unwrap();
    client
}

async fn wait_until_nothing_pends(http: SocketAddr) {
    let end = Instant::now() + DEADLINE;
    while sample(http, PENDING) != Some(0.0) {
        assert!(Instant::now() < end, "{:?}", sample(http, PENDING));
        sleep(POLL_PAUSE).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_does_not_cut_off_a_node_that_stands_still_however_much_is_for_it() {
    let redis = Redis::start();
    redis.limit_listeners(LIMIT_MEBIBYTES).await;
    let mut cluster = redis::start(2, &redis).await;
    let [here, there] = [0, 1].map(|node| cluster.node(node).address());
    let [http_here, http_there] = [0, 1].map(|node| cluster.node(node).http_address());
    let persistent = Connect::persistent(Version::V5, "persistent");
    let [clean, clean_0] = ["clean", "clean-0"].map(|id| Connect::fleeting(Version::V5, id));
    let stored = collect(subscribe(there, &persistent, "stored", 1).await);
    let fleeting = collect(subscribe(there, &clean, "fleeting", 1).await);
    let at_most_once = collect(subscribe(there, &clean_0, "at-most-once", 0).await);
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(here, &publisher).await;
    for topic in ["stored", "fleeting"] {
        publisher.publish(&message(topic, 0, 1)).await.unwrap();
    }
    // The node has said how far it is.
    wait_until_nothing_pends(http_here).await;

    cluster.node(1).freeze_in_place();
    for number in 1..=QOS_0 {
        let publish = message("at-most-once", number, 0);
        publisher.publish(&publish).await.unwrap();
    }
    wait_for_at_least(http_here, &dropped(0), 1.0).await;
    publish_all(&mut publisher, "stored", STORED).await;
    publish_all(&mut publisher, "fleeting", FLEETING).await;
    let pending = sample(http_here, PENDING).unwrap();
    assert!(pending < 10.0 * MEBIBYTE, "{pending}");
    cluster.node(1).thaw_in_place();
    wait_until_nothing_pends(http_here).await;
    for (topic, qos) in [("stored", 1), ("fleeting", 1), ("at-most-once", 0)] {
        publisher
            .publish(&Publish::new(topic, "end", qos))
            .await
            .unwrap();
    }

    let all: Vec<_> = (0..=STORED.into()).collect();
    assert_eq!(stored.await.unwrap(), all);
    let local = |reason: &str| {
        let series = format!("midge_messages_dropped_total{{reason=\"{reason}\"}}");
        sample(http_there, &series).unwrap()
    };
    let fleeting = fleeting.await.unwrap();
    assert!(fleeting.is_sorted_by(|one, next| one < next));
    let lost = sample(http_here, &dropped(1)).unwrap() + local("queue_full");
    assert_eq!(fleeting.len() as f64 + lost, f64::from(FLEETING) + 1.0);
    let at_most_once = at_most_once.await.unwrap();
    assert!(at_most_once.is_sorted_by(|one, next| one < next));
    let lost = sample(http_here, &dropped(0)).unwrap() + local("qos0_not_writable");
    assert_eq!(at_most_once.len() as f64 + lost, f64::from(QOS_0));
    assert!(sample(http_here, STALLS).unwrap() >= 1.0);
    assert!(!redis.has_ended_slow_connections());
    assert!(!cluster.node(1).has_logged("frames_lost"));
}

/// What a node has no credit for is read from the store, and before what its publisher sends by another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_moves_does_not_overtake_what_there_was_no_credit_for() {
    let redis = Redis::start();
    redis.limit_listeners(LIMIT_MEBIBYTES).await;
    let mut cluster = redis::start(3, &redis).await;
    let [here, there, elsewhere] = [0, 1, 2].map(|node| cluster.node(node).address());
    let http_here = cluster.node(0).http_address();
    let persistent = Connect::persistent(Version::V5, "persistent");
    let stored = collect(subscribe(there, &persistent, "stored", 1).await);
    let connect = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(here, &connect).await;
    publisher.publish(&message("stored", 0, 1)).await.unwrap();
    wait_until_nothing_pends(http_here).await;

    cluster.node(1).freeze_in_place();
    publish_all(&mut publisher, "stored", STORED).await;
    assert!(sample(http_here, STALLS).unwrap() >= 1.0);
    let mut publisher = Client::connect(elsewhere, &connect).await;
    let moved = u32::from(STORED) + 1..u32::from(STORED) + 11;
    for number in moved.clone() {
        let publish = Publish::new("stored", &number.to_string(), 1);
        publisher.publish(&publish).await.unwrap();
    }
    cluster.node(1).thaw_in_place();
    wait_until_nothing_pends(http_here).await;
    let end = Publish::new("stored", "end", 1);
    publisher.publish(&end).await.unwrap();

    let all: Vec<_> = (0..moved.end).collect();
    assert_eq!(stored.await.unwrap(), all);
    assert!(!redis.has_ended_slow_connections());
}

fn dropped(qos: u8) -> String {
    format!("midge_cluster_bus_messages_dropped_total{{qos=\"{qos}\"}}")
}
