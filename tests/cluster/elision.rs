//! Nodes that leave unwritten what clients acknowledge in time (`store.write_elision`): what clients
//! see while nodes and Redis fail, and that it is left unwritten.

use std::env;
use std::time::Duration;

use mongodb::Client as MongoClient;
use mongodb::bson::{Document, doc};
use tokio::time::Instant;

use crate::client::Client;
use crate::mongod::Database;
use crate::node::{Cluster, Settings};
use crate::proxy::Proxy;
use crate::redis::{self, Redis};
use crate::seed::Seed;
use crate::wire::{Connect, Publish, Version};
use crate::workload::{Size, Workload};

fn elides() -> (String, String) {
    ("store.write_elision".to_owned(), "true".to_owned())
}

fn settings(database: &Database, redis: std::net::SocketAddr) -> Settings {
    let mut settings = redis::settings(database, redis);
    settings.push(elides());
    settings
}

async fn start(nodes: usize, redis: &Redis, database: &Database) -> Cluster {
    let settings = (0..nodes).map(|_| settings(database, redis.address()));
    let mut cluster = Cluster::start(settings.collect()).await;
    for node in 0..nodes {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes_that_elide() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let cluster = start(3, &redis, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    workload.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_elides_is_killed_and_another_starts() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let mut cluster = start(3, &redis, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 30)).await;
    cluster.node(0).kill();
    workload.wait_for_percent(seed.between(30, 50)).await;
    cluster.node(1).kill();
    cluster.node(0).start_again();
    workload.wait_for_percent(seed.between(50, 80)).await;
    cluster.node(1).start_again();

    workload.finish().await;
}

/// Nodes, Redis and its connections fail one after the other, again and again.
/// `MIDGE_TEST_MINUTES` says for how long; without it, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_fails_while_nodes_elide() {
    let minutes: u64 = env::var("MIDGE_TEST_MINUTES").map_or(0, |minutes| minutes.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    loop {
        let mut seed = Seed::new();
        let mut redis = Redis::start();
        let proxy = Proxy::start(redis.address()).await;
        let database = Database::shared();
        let mut cluster = Cluster::start(vec![
            settings(&database, proxy.address()),
            settings(&database, redis.address()),
            settings(&database, redis.address()),
        ])
        .await;
        let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

        for percent in [10, 20, 30, 40, 50, 60, 70] {
            workload.wait_for_percent(percent).await;
            let node = usize::try_from(seed.below(3)).unwrap();
            match seed.below(5) {
                0 => {
                    cluster.node(node).kill();
                    workload.wait_for_percent(percent + 5).await;
                    cluster.node(node).start_again();
                }
                1 => {
                    assert!(cluster.node(node).terminate().success());
                    cluster.node(node).start_again();
                }
                2 => {
                    redis.kill();
                    workload.wait_for_percent(percent + 5).await;
                    redis.start_again();
                }
                3 => {
                    redis.process.freeze();
                    workload.wait_for_percent(percent + 5).await;
                    redis.process.thaw();
                }
                _ => {
                    proxy.cut();
                    workload.wait_for_percent(percent + 5).await;
                    proxy.restore();
                }
            }
        }

        workload.finish().await;
        if Instant::now() >= end {
            return;
        }
    }
}

/// Documents that were ever inserted into the inboxes of a database.
async fn inbox_inserts(database: &mongodb::Database) -> i64 {
    let mut stages = database
        .collection::<Document>("inbox")
        .aggregate([doc! { "$collStats": { "storageStats": {} } }])
        .await
        .unwrap();
    assert!(stages.advance().await.unwrap());
    let stats = stages.deserialize_current().unwrap();
    let cursor = stats.get_document("storageStats").unwrap();
    let cursor = cursor.get_document("wiredTiger").unwrap();
    let cursor = cursor.get_document("cursor").unwrap();
    let inserts = cursor.get("insert calls").unwrap();
    inserts
        .as_i64()
        .or_else(|| inserts.as_i32().map(i64::from))
        .unwrap()
}

/// Whether a message gets into an inbox, which its subscriber acknowledges at once.
async fn is_written(
    publish: &Publish,
    publisher: &mut Client,
    subscriber: &mut Client,
    database: &mongodb::Database,
) -> bool {
    let before = inbox_inserts(database).await;
    let received = async { subscriber.message().await.unwrap().text().to_owned() };
    let (published, received) = tokio::join!(publisher.publish(publish), received);
    published.unwrap();
    assert_eq!(received, publish.text());
    inbox_inserts(database).await > before
}

/// On a busy machine many acknowledgements come late.
async fn wait_until_some_are_unwritten(
    topic: &str,
    publisher: &mut Client,
    subscriber: &mut Client,
    database: &mongodb::Database,
) {
    let mut unwritten = 0;
    let mut numbers = 0..5_000;
    while unwritten < 100 {
        let number = numbers.next().expect("nearly everything is written");
        let publish = Publish::new(topic, &number.to_string(), 1);
        if !is_written(&publish, publisher, subscriber, database).await {
            unwritten += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_at_another_node_acknowledges_is_not_written() {
    let redis = Redis::start();
    let database = Database::shared();
    let mut cluster = start(2, &redis, &database).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(1).address(), &subscriber).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    let client = MongoClient::with_uri_str(&database.uri).await.unwrap();
    let database = client.database(&database.name);

    wait_until_some_are_unwritten("news", &mut publisher, &mut subscriber, &database).await;
}

/// To ask another node would cost a write by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_only_clients_of_the_same_node_are_waited_for() {
    let database = Database::shared();
    let settings = [database.settings(), vec![elides()]].concat();
    let mut cluster = Cluster::start(vec![settings.clone(), settings]).await;
    let [near, far] = ["near", "far"].map(|id| Connect::persistent(Version::V5, id));
    let mut near = Client::connect(cluster.node(0).address(), &near).await;
    near.subscribe("near", 1).await.unwrap();
    let mut far = Client::connect(cluster.node(1).address(), &far).await;
    far.subscribe("far", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    let client = MongoClient::with_uri_str(&database.uri).await.unwrap();
    let database = client.database(&database.name);

    wait_until_some_are_unwritten("near", &mut publisher, &mut near, &database).await;
    for number in 0..50 {
        let publish = Publish::new("far", &number.to_string(), 1);
        assert!(is_written(&publish, &mut publisher, &mut far, &database).await);
    }
}

/// What a client has been sent and has not acknowledged, and what its node was offered and cannot
/// answer for any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_other_node_has_not_confirmed_is_written() {
    let redis = Redis::start();
    let mut cluster = start(2, &redis, &Database::shared()).await;
    let slow = Connect::persistent(Version::V5, "slow");
    let mut silent = Client::connect(cluster.node(1).address(), &slow).await;
    silent.subscribe("news", 1).await.unwrap();
    let quick = Connect::persistent(Version::V5, "quick");
    let mut answering = Client::connect(cluster.node(1).address(), &quick).await;
    answering.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;

    let first = Publish::new("news", "first", 1);
    let received = async { answering.message().await.unwrap().text().to_owned() };
    let (published, received) = tokio::join!(publisher.publish(&first), received);
    published.unwrap();
    assert_eq!(received, "first");
    answering.ping().await.unwrap();
    cluster.node(1).freeze();
    let second = Publish::new("news", "second", 1);
    publisher.publish(&second).await.unwrap();
    cluster.node(1).kill();

    let mut slow = Client::connect(cluster.node(0).address(), &slow).await;
    assert!(slow.session_present);
    assert_eq!(slow.message().await.unwrap().text(), "first");
    assert_eq!(slow.message().await.unwrap().text(), "second");
    let mut quick = Client::connect(cluster.node(0).address(), &quick).await;
    assert!(quick.session_present);
    // The first one again, if its acknowledgement came late: then that was written.
    while quick.message().await.unwrap().text() != "second" {}
}
