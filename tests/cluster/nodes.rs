//! Nodes on one database: what clients see while they move, and while nodes and servers fail.

use std::env;
use std::time::Duration;

use mongodb::bson::doc;

use crate::client::Client;
use crate::mongod::{Database, ReplicaSet};
use crate::node::{Cluster, Settings};
use crate::proxy::Proxy;
use crate::redis::{self, Redis};
use crate::seed::Seed;
use crate::wire::{self, Connect, DISCONNECT, Packet, Publish, Version, Will};
use crate::workload::{Size, Workload};

async fn start(nodes: usize, database: &Database) -> Cluster {
    let settings: Vec<Settings> = (0..nodes).map(|_| database.settings()).collect();
    Cluster::start(settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes() {
    let mut seed = Seed::new();
    let cluster = start(3, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    workload.finish().await;
}

/// Scenarios 1 and 2: whoever publishes or subscribes at the node goes on at another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_killed_and_another_starts() {
    let mut seed = Seed::new();
    let mut cluster = start(3, &Database::shared()).await;
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

/// Scenario 1: whoever was at a node that is killed goes on before anybody is certain that it is dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_node_that_is_killed_go_on_elsewhere_soon() {
    let mut cluster = start(3, &Database::shared()).await;
    let connect = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(0).address(), &connect).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(2).address(), &publisher).await;
    let mut news = (0..).map(|number: u32| Publish::new("news", &number.to_string(), 1));
    let mut publish = async || {
        let publish = news.next().expect("there is always more");
        publisher.publish(&publish).await.unwrap();
    };

    for _ in 0..10 {
        publish().await;
    }
    cluster.node(0).kill();
    publish().await;
    let mut subscriber = Client::connect(cluster.node(1).address(), &connect).await;
    assert!(subscriber.session_present);
    publish().await;
    for number in 0..12 {
        let message = subscriber.message().await.unwrap();
        assert_eq!(message.text(), number.to_string());
    }
    assert!(!cluster.node(1).has_logged("node_dead"));
    assert!(!cluster.node(2).has_logged("node_dead"));
}

/// Scenario 3: nothing but MongoDB knows what there was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_are_killed_at_once() {
    let mut seed = Seed::new();
    let mut cluster = start(2, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 80)).await;
    cluster.node(0).kill();
    cluster.node(1).kill();
    cluster.node(0).start_again();
    cluster.node(1).start_again();

    workload.finish().await;
}

/// Scenario 4: a node that sleeps is declared dead, and finds out when it wakes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_frozen_is_fenced_and_starts_anew() {
    let mut seed = Seed::new();
    let mut cluster = start(2, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 50)).await;
    cluster.node(0).freeze();
    cluster.node(1).wait_for_event("node_dead");
    cluster.node(0).thaw();
    cluster.node(0).wait_until_anew();

    workload.finish().await;
}

/// Nodes that leave in good order, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_restarted_one_by_one() {
    let mut seed = Seed::new();
    let mut cluster = start(3, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    for node in 0..3 {
        workload.wait_for_percent(20 * (node as u64 + 1)).await;
        assert!(cluster.node(node).terminate().success());
        cluster.node(node).start_again();
    }

    workload.finish().await;
}

/// Scenario 12.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_steps_down_and_is_killed() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(3).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 30)).await;
    set.step_down().await;
    workload.wait_for_percent(seed.between(30, 60)).await;
    let primary = set.primary().await;
    set.mongod(primary).kill();
    workload.wait_for_percent(seed.between(60, 90)).await;
    set.mongod(primary).start_again();

    workload.finish().await;
}

/// Scenario 13: what a primary has taken that no other member has is undone when it comes back, and
/// nobody had been told that it was safe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_is_left_alone_and_undoes_what_it_did() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(3).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 50)).await;
    let primary = set.primary().await;
    let secondaries: Vec<_> = (0..3).filter(|member| *member != primary).collect();
    for member in &secondaries {
        set.mongod(*member).freeze();
    }
    let database = Database::on(set.mongod(primary).uri());
    set.mongod(primary).write_alone(&database).await;
    set.mongod(primary).freeze();
    for member in &secondaries {
        set.mongod(*member).thaw();
    }
    set.primary_other_than(primary).await;
    workload.wait_for_percent(70).await;
    set.mongod(primary).thaw();
    set.mongod(primary).wait_until_rolled_back();

    workload.finish().await;
}

/// Scenario 15: nobody is declared dead, and everything goes on afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_is_away_for_a_while() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(1).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 60)).await;
    set.mongod(0).kill();
    set.mongod(0).start_again();

    workload.finish().await;
}

/// Scenario 16: the other node takes over, and nothing that the first one still tries counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_cut_off_from_mongodb() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let proxy = Proxy::start(set.mongod(0).address()).await;
    let settings = vec![database.through(&proxy).settings(), database.settings()];
    let mut cluster = Cluster::start(settings).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 50)).await;
    proxy.cut();
    cluster.node(1).wait_for_event("node_dead");
    proxy.restore();
    cluster.node(0).wait_until_anew();

    workload.finish().await;
}

/// It counts as alive until it has written everything, however long that takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_stopped_is_not_given_up_while_it_writes() {
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let mut slow = database.named("slow").settings();
    slow.push(("drain.grace".to_owned(), "0s".to_owned()));
    let mut cluster = Cluster::start(vec![slow, database.settings()]).await;
    let connect = Connect::persistent(Version::V5, "client");
    let _client = Client::connect(cluster.node(0).address(), &connect).await;
    // Longer than a node may be silent.
    let how = doc! {
        "namespace": format!("{}.sessions", database.name),
        "blockConnection": true,
        "blockTimeMS": 9_000,
    };
    set.mongod(0)
        .fail("slow", &["update"], doc! { "times": 1 }, how)
        .await;

    assert!(cluster.node(0).terminate().success());
    cluster.node(1).wait_for_event("node_left");
    assert!(!cluster.node(1).has_logged("node_dead"));
}

/// What a publisher sends after it has moved to another node does not overtake what was acknowledged
/// before, even if the frames of its first node take their time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_not_overtaken() {
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let slow = database.named("slow").settings();
    let mut cluster = Cluster::start(vec![slow, database.settings(), database.settings()]).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(2).address(), &subscriber).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let bus = format!("{}.bus", database.name);
    let delay = Duration::from_millis(400);
    set.mongod(0).slow_down("slow", &bus, delay).await;

    let publisher = Connect::fleeting(Version::V5, "publisher");
    for number in 0..6 {
        let address = cluster.node(number % 2).address();
        let mut publisher = Client::connect(address, &publisher).await;
        let publish = Publish::new("news", &number.to_string(), 1);
        publisher.publish(&publish).await.unwrap();
    }

    for number in 0..6 {
        let message = subscriber.message().await.unwrap();
        assert_eq!(message.text(), number.to_string());
    }
}

/// [MQTT-3.3.1-1], although the client has left in good order before it connects elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_in_flight_comes_again_with_dup_at_another_node() {
    let mut cluster = start(2, &Database::shared()).await;
    let connect = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(0).address(), &connect).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    for number in 0..2 {
        let publish = Publish::new("news", &number.to_string(), 1);
        publisher.publish(&publish).await.unwrap();
    }
    let mut in_flight = Vec::new();
    while in_flight.len() < 2 {
        if let Packet::Publish(publish) = subscriber.receive().await.unwrap() {
            in_flight.push(publish.packet_id);
        }
    }
    subscriber.disconnect().await.unwrap();
    // When this is safe, it is known that the client has left.
    publisher
        .publish(&Publish::new("news", "2", 1))
        .await
        .unwrap();

    let mut subscriber = Client::connect(cluster.node(1).address(), &connect).await;
    for (number, packet_id) in in_flight.into_iter().enumerate() {
        let message = subscriber.message().await.unwrap();
        assert_eq!(message.text(), number.to_string());
        assert_eq!((message.dup, message.packet_id), (true, packet_id));
    }
    let message = subscriber.message().await.unwrap();
    assert_eq!((message.text(), message.dup), ("2", false));
}

/// Scenario 22.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_holds_everywhere_once_it_is_acknowledged() {
    let redis = Redis::start();
    subscribe_and_publish_elsewhere(redis::start(3, &redis).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_holds_everywhere_without_redis() {
    subscribe_and_publish_elsewhere(start(3, &Database::shared()).await).await;
}

/// Whatever is published anywhere after SUBACK comes, also to a session that ends with its connection,
/// and also with QoS 0. `MIDGE_TEST_ROUNDS` says how often it is tried.
async fn subscribe_and_publish_elsewhere(mut cluster: Cluster) {
    let rounds = env::var("MIDGE_TEST_ROUNDS").map_or(300, |rounds| rounds.parse().unwrap());
    let mut publishers = Vec::new();
    for node in 0..3 {
        let publisher = Connect::fleeting(Version::V5, &format!("publisher-{node}"));
        publishers.push(Client::connect(cluster.node(node).address(), &publisher).await);
    }

    for round in 0..rounds {
        let subscriber = format!("subscriber-{round}");
        let subscriber = if round % 2 == 0 {
            Connect::fleeting(Version::V5, &subscriber)
        } else {
            Connect::persistent(Version::V5, &subscriber)
        };
        let address = cluster.node(round % 3).address();
        let mut subscriber = Client::connect(address, &subscriber).await;
        let topic = format!("round/{round}");
        subscriber.subscribe(&topic, 1).await.unwrap();
        let qos = u8::from(round / 2 % 2 == 0);
        let elsewhere = &mut publishers[(round + 1 + round / 3 % 2) % 3];
        let publish = Publish::new(&topic, "after SUBACK", qos);
        elsewhere.publish(&publish).await.unwrap();

        let message = tokio::time::timeout(Duration::from_secs(5), subscriber.message()).await;
        let message = message.unwrap_or_else(|_| panic!("round {round}: nothing came"));
        assert_eq!(message.unwrap().text(), "after SUBACK");
        subscriber.disconnect().await.unwrap();
    }
}

/// Also if there are so many that other nodes read them from the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_subscriptions_hold_everywhere() {
    let redis = Redis::start();
    let mut cluster = redis::start(2, &redis).await;
    let [here, there] = [0, 1].map(|node| cluster.node(node).address());
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(there, &publisher).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(here, &subscriber).await;

    let topics: Vec<String> = (0..500).map(|number| format!("topic/{number}")).collect();
    let subscribe = wire::subscribe_to_all(Version::V5, 1, &topics, 1);
    subscriber.send(&subscribe).await.unwrap();
    let answer = subscriber.receive().await.unwrap();
    assert_eq!(answer, Packet::SubAck(1));
    for topic in &topics {
        let publish = Publish::new(topic, "after SUBACK", 0);
        publisher.publish(&publish).await.unwrap();
    }
    for topic in &topics {
        assert_eq!(subscriber.message().await.unwrap().topic, *topic);
    }
}

/// Whoever subscribes in the middle of a stream gets all of it from there on, and in order, although
/// the node that it is published at hears of the subscription only then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_joined_comes_in_order() {
    let mut cluster = start(2, &Database::shared()).await;
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let stopped = stop.clone();
    let publishing = tokio::spawn(async move {
        let mut sent = 0;
        // As fast as the node takes them: many are in each flush.
        while !stopped.is_cancelled() {
            for _ in 0..20 {
                sent += 1;
                let mut publish = Publish::new("stream", &sent.to_string(), 1);
                publish.packet_id = u16::try_from(sent % 20 + 1).unwrap();
                publisher.send(&publish.encode(Version::V5)).await.unwrap();
            }
            for _ in 0..20 {
                publisher.receive().await.unwrap();
            }
        }
    });

    for round in 0..40 {
        let subscriber = Connect::persistent(Version::V5, &format!("subscriber-{round}"));
        let mut subscriber = Client::connect(cluster.node(1).address(), &subscriber).await;
        let mut earlier = subscriber.subscribe("stream", 1).await.unwrap();
        while earlier.len() < 100 {
            earlier.push(subscriber.message().await.unwrap());
        }
        let numbers = earlier
            .iter()
            .map(|message| message.text().parse().unwrap());
        let numbers: Vec<u32> = numbers.collect();
        let in_order: Vec<u32> = (numbers[0]..).take(numbers.len()).collect();
        assert_eq!(numbers, in_order);
        subscriber.unsubscribe("stream").await.unwrap();
        subscriber.disconnect().await.unwrap();
    }

    stop.cancel();
    publishing.await.unwrap();
}

/// A client that says goodbye and connects elsewhere at once has not died.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_will_is_discarded_before_the_client_moves() {
    let mut cluster = start(2, &Database::shared()).await;
    let watcher = Connect::fleeting(Version::V5, "watcher");
    let mut watcher = Client::connect(cluster.node(0).address(), &watcher).await;
    watcher.subscribe("will", 1).await.unwrap();

    for round in 0..40 {
        let will = Some(Will {
            topic: "will".to_owned(),
            payload: format!("round {round}"),
            qos: 1,
            delay_interval: 0,
        });
        let fleeting = Connect {
            will,
            ..Connect::fleeting(Version::V5, "mover")
        };
        let connect = match round / 2 % 3 {
            0 => fleeting,
            1 => Connect {
                expiry_interval: 60,
                ..fleeting
            },
            _ => Connect {
                clean_start: false,
                expiry_interval: 60,
                ..fleeting
            },
        };
        let address = cluster.node(round % 2).address();
        let mut mover = Client::connect(address, &connect).await;
        mover.send(&DISCONNECT).await.unwrap();
    }

    // It would come before this.
    let mover = Connect::fleeting(Version::V5, "mover");
    let mut mover = Client::connect(cluster.node(0).address(), &mover).await;
    let last = Publish::new("will", "nothing before", 1);
    mover.publish(&last).await.unwrap();
    assert_eq!(watcher.message().await.unwrap().text(), "nothing before");
}

/// A subscription is known at once where MongoDB does not answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_need_not_reach_mongodb_to_learn_of_a_subscription() {
    let redis = Redis::start();
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let proxy = Proxy::start(set.mongod(0).address()).await;
    let settings = [database.clone(), database.through(&proxy)];
    let settings = settings.map(|database| redis::settings(&database, redis.address()));
    let mut cluster = Cluster::start(settings.into()).await;
    for node in 0..2 {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    let [here, there] = [0, 1].map(|node| cluster.node(node).address());
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(there, &publisher).await;
    proxy.pause();

    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(here, &subscriber).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let news = Publish::new("news", "live", 0);
    publisher.publish(&news).await.unwrap();
    assert_eq!(subscriber.message().await.unwrap().text(), "live");
}
