//! Clients that move faster, or live longer, than is good for a cluster; and clocks that are wrong.

use std::time::Duration;

use mongodb::bson::{Document, doc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::lines::DEADLINE;
use crate::mongod::{Database, POLL_PAUSE, ReplicaSet};
use crate::node::{Cluster, Settings};
use crate::seed::{Seed, rounds};
use crate::wire::{Connect, DISCONNECT, Packet, Publish, Version, Will};
use crate::workload::{Size, Workload};

async fn start(nodes: usize) -> Cluster {
    let database = Database::shared();
    Cluster::start((0..nodes).map(|_| database.settings()).collect()).await
}

/// Nodes whose clocks are so many milliseconds wrong.
async fn start_with_clocks<const N: usize>(offsets: [i64; N]) -> Cluster {
    let database = Database::shared();
    let settings = offsets.map(|offset| -> Settings {
        let mut settings = database.settings();
        let variable = "MIDGE_TEST_CLOCK_OFFSET_MS".to_owned();
        settings.push((variable, offset.to_string()));
        settings
    });
    Cluster::start(settings.into()).await
}

/// Scenario 20: publishers hop between nodes whose clocks are seconds apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes_whose_clocks_are_wrong() {
    let mut seed = Seed::new();
    let mut cluster = start_with_clocks([5000, 0, -5000]).await;
    let size = Size {
        mortals: 0,
        ..Size::small()
    };
    let workload = Workload::start(cluster.servers(), &mut seed, size).await;

    // Also when the one that is ahead of all others cannot say how far it has come.
    workload.wait_for_percent(seed.between(30, 60)).await;
    cluster.node(0).kill();
    workload.wait_for_percent(80).await;
    cluster.node(0).start_again();

    workload.finish().await;
}

/// Scenario 18: everybody uses the same client id, at all nodes. Whoever is left over is alone, and
/// the session works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_id_connects_everywhere_at_once() {
    let mut seed = Seed::new();
    let mut cluster = start(3).await;
    for round in 0..rounds(2) {
        let mut storm = JoinSet::new();
        for _ in 0..30 {
            let node = usize::try_from(seed.below(3)).unwrap();
            let address = cluster.node(node).address();
            let version = [Version::V5, Version::V311][usize::from(seed.percent(50))];
            let pause = Duration::from_millis(seed.below(300));
            storm.spawn(async move {
                sleep(pause).await;
                // Another one may be faster.
                let connect = Connect::persistent(version, "everybody");
                Client::try_connect(address, &connect).await.ok()
            });
        }
        let connected: Vec<_> = storm.join_all().await.into_iter().flatten().collect();
        assert!(!connected.is_empty(), "round {round}: nobody is let in");
        let mut left = Vec::new();
        let mut ended = JoinSet::new();
        for mut client in connected {
            ended.spawn(async move {
                let end = timeout(Duration::from_secs(1), client.wait_for_end()).await;
                end.is_err().then_some(client)
            });
        }
        left.extend(ended.join_all().await.into_iter().flatten());
        assert_eq!(left.len(), 1, "round {round}: connections that are left");

        let mut last = left.remove(0);
        let topic = format!("round/{round}");
        last.subscribe(&topic, 1).await.unwrap();
        for node in 0..3 {
            let publisher = Connect::fleeting(Version::V5, &format!("publisher-{node}"));
            let mut publisher = Client::connect(cluster.node(node).address(), &publisher).await;
            let publish = Publish::new(&topic, &node.to_string(), 1);
            publisher.publish(&publish).await.unwrap();
            assert_eq!(last.message().await.unwrap().text(), node.to_string());
        }
    }
}

/// A node has taken a session, and before it has read all of it, another one has taken it as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_too_slow_to_take_a_session_leaves_it_to_the_other() {
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let slow = database.named("slow").settings();
    let mut cluster = Cluster::start(vec![slow, database.settings()]).await;
    let [slow, other] = [0, 1].map(|node| cluster.node(node).address());
    let connect = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(other, &connect).await;
    subscriber.subscribe("news", 1).await.unwrap();
    let how = doc! {
        "namespace": format!("{}.out2", database.name),
        "blockConnection": true,
        "blockTimeMS": 3_000,
    };
    set.mongod(0)
        .fail("slow", &["find"], doc! { "times": 1 }, how)
        .await;

    let client = mongodb::Client::with_uri_str(set.uri()).await.unwrap();
    let sessions = client
        .database(&database.name)
        .collection::<Document>("sessions");
    let epoch = async || {
        let session = doc! { "_id": "c:subscriber" };
        let session = sessions.find_one(session).await.unwrap().unwrap();
        session.get_i64("e").unwrap()
    };
    let before = epoch().await;
    let late = tokio::spawn({
        let connect = connect.clone();
        async move { Client::try_connect(slow, &connect).await.is_ok() }
    });
    while epoch().await == before {
        sleep(POLL_PAUSE).await;
    }
    let mut subscriber = Client::connect(other, &connect).await;
    assert!(!late.await.unwrap());

    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(slow, &publisher).await;
    let news = Publish::new("news", "after all", 1);
    publisher.publish(&news).await.unwrap();
    assert_eq!(subscriber.message().await.unwrap().text(), "after all");
}

/// Scenario 19: the subscriber moves on and on while it is flooded, and gets everything in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_moves_in_the_middle_of_a_flood() {
    let mut seed = Seed::new();
    let mut cluster = start(3).await;
    let connect = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(0).address(), &connect).await;
    subscriber.subscribe("flood", 1).await.unwrap();
    let stop = CancellationToken::new();
    let publisher = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(1).address(), &publisher).await;
    let stopped = stop.clone();
    let publishing = tokio::spawn(async move {
        let mut sent = 0_u32;
        while !stopped.is_cancelled() {
            let mut batch = Vec::new();
            for _ in 0..50 {
                sent += 1;
                let mut publish = Publish::new("flood", &sent.to_string(), 1);
                publish.packet_id = u16::try_from(sent % 50 + 1).unwrap();
                batch.extend(publish.encode(Version::V5));
            }
            publisher.send(&batch).await.unwrap();
            for _ in 0..50 {
                publisher.receive().await.unwrap();
            }
        }
        sent
    });

    let mut last = 0;
    let mut accept = |publish: &Publish| {
        let number: u32 = publish.text().parse().unwrap();
        assert!(number <= last + 1, "{number} comes after {last}");
        last = last.max(number);
        last
    };
    for _ in 0..rounds(25) {
        let stay = Instant::now() + Duration::from_millis(seed.between(20, 300));
        while let Ok(message) = timeout(stay - Instant::now(), subscriber.message()).await {
            accept(&message.unwrap());
        }
        let node = usize::try_from(seed.below(3)).unwrap();
        // With a word or without; or while the last connection is still there.
        let old = match seed.below(3) {
            0 => {
                subscriber.send(&DISCONNECT).await.unwrap();
                None
            }
            1 => None,
            _ => Some(subscriber),
        };
        subscriber = Client::connect(cluster.node(node).address(), &connect).await;
        assert!(subscriber.session_present);
        drop(old);
    }
    stop.cancel();
    let sent = publishing.await.unwrap();
    while accept(&subscriber.message().await.unwrap()) < sent {}
}

/// Scenarios 26 and 27: a subscriber that takes few at a time, and one that acknowledges nothing, hold
/// up nobody and cost a node no memory; what waits for them lies in MongoDB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_are_slow_cost_no_memory() {
    let database = Database::shared();
    let mut settings = database.settings();
    settings.push(("session.memory_messages_max".to_owned(), "100".to_owned()));
    let mut cluster = Cluster::start(vec![settings.clone(), settings]).await;
    let narrow = Connect {
        receive_maximum: 3,
        ..Connect::persistent(Version::V5, "narrow")
    };
    let mut narrow = Client::connect(cluster.node(0).address(), &narrow).await;
    narrow.subscribe("news", 1).await.unwrap();
    let silent = Connect {
        receive_maximum: 7,
        ..Connect::persistent(Version::V5, "silent")
    };
    let mut silent = Client::connect(cluster.node(0).address(), &silent).await;
    silent.subscribe("news", 2).await.unwrap();
    let before = cluster.node(0).resident_bytes();

    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(1).address(), &publisher).await;
    let messages = 5000;
    let padding = "x".repeat(8000);
    for first in (0..messages).step_by(100) {
        let mut batch = Vec::new();
        for number in first..first + 100 {
            let mut publish = Publish::new("news", &format!("{number} {padding}"), 1);
            publish.packet_id = u16::try_from(number % 100 + 1).unwrap();
            batch.extend(publish.encode(Version::V5));
        }
        publisher.send(&batch).await.unwrap();
        for _ in 0..100 {
            publisher.receive().await.unwrap();
        }
    }
    // 40 MB wait for each of them.
    let grown = cluster.node(0).resident_bytes().saturating_sub(before);
    assert!(grown < 30_000_000, "{grown} bytes more");

    let mut unacknowledged = Vec::new();
    while let Ok(packet) = timeout(Duration::from_millis(200), silent.receive()).await {
        if let Packet::Publish(publish) = packet.unwrap() {
            unacknowledged.push(publish);
        }
    }
    assert_eq!(unacknowledged.len(), 7);
    for number in 0..messages {
        let message = narrow.message().await.unwrap();
        assert_eq!(message.text().split(' ').next(), Some(&*number.to_string()));
    }
    for publish in &unacknowledged {
        silent.acknowledge(publish).await.unwrap();
    }
    for number in 7..messages {
        let message = silent.message().await.unwrap();
        assert_eq!(message.text().split(' ').next(), Some(&*number.to_string()));
    }
}

/// What waits for a client that is away is bounded by what all nodes add to it together, and nothing is
/// dropped that fits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_of_a_queue_hold_over_all_nodes() {
    const MAXIMUM: u32 = 160;
    let database = Database::shared();
    let mut settings = database.settings();
    let maximum = MAXIMUM.to_string();
    settings.push(("session.queue_messages_max".to_owned(), maximum));
    let mut cluster = Cluster::start(vec![settings.clone(), settings]).await;
    let connect = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(0).address(), &connect).await;
    subscriber.subscribe("news", 1).await.unwrap();
    subscriber.disconnect().await.unwrap();
    let mut publishers = Vec::new();
    for node in 0..2 {
        let publisher = Connect::fleeting(Version::V5, &format!("publisher-{node}"));
        publishers.push(Client::connect(cluster.node(node).address(), &publisher).await);
    }

    // In turn, and more than either node would take by itself.
    let sent = 2 * MAXIMUM;
    for number in 0..sent {
        let publisher = &mut publishers[(number % 2) as usize];
        let publish = Publish::new("news", &number.to_string(), 1);
        publisher.publish(&publish).await.unwrap();
    }
    // One sixteenth for each node, and what came while the last one counted.
    let at_most = MAXIMUM + 2 * (MAXIMUM / 16) + 2;
    let end = Instant::now() + DEADLINE;
    while database.count("inbox").await > u64::from(at_most) {
        assert!(Instant::now() < end, "more is left than may be");
        sleep(POLL_PAUSE).await;
    }
    let mut subscriber = Client::connect(cluster.node(1).address(), &connect).await;
    let mut received = Vec::new();
    while !(received.contains(&(sent - 1)) && received.contains(&(sent - 2))) {
        let message = subscriber.message().await.unwrap();
        received.push(message.text().parse::<u32>().unwrap());
    }
    assert!(received.len() >= MAXIMUM as usize, "{}", received.len());
    // Of each publisher the last ones, in order.
    for parity in 0..2 {
        let of_one = received
            .iter()
            .copied()
            .filter(|number| number % 2 == parity);
        let of_one: Vec<_> = of_one.collect();
        let last: Vec<_> = (of_one[0]..sent).step_by(2).collect();
        assert_eq!(of_one, last);
    }
}

/// Scenario 29: a session ends while its node is dead, another is begun anew while the node that has
/// it stands still. What was for them before comes to nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_end_while_their_node_cannot_know() {
    let mut cluster = start(2).await;
    let short = Connect {
        expiry_interval: 1,
        ..Connect::persistent(Version::V5, "short")
    };
    let mut expiring = Client::connect(cluster.node(0).address(), &short).await;
    expiring.subscribe("news", 1).await.unwrap();
    let anew = Connect::persistent(Version::V5, "anew");
    let mut renewed = Client::connect(cluster.node(0).address(), &anew).await;
    renewed.subscribe("news", 1).await.unwrap();

    cluster.node(0).freeze();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(1).address(), &publisher).await;
    let old = Publish::new("news", "old", 1);
    publisher.publish(&old).await.unwrap();
    let clean_start = Connect {
        clean_start: true,
        ..anew.clone()
    };
    let mut renewed = Client::connect(cluster.node(1).address(), &clean_start).await;
    assert!(!renewed.session_present);
    cluster.node(1).wait_for_event("node_dead");
    cluster.node(1).wait_for_event("session_expired");
    let mut expired = Client::connect(cluster.node(1).address(), &short).await;
    assert!(!expired.session_present);
    cluster.node(0).thaw();
    cluster.node(0).wait_until_anew();

    // The old subscriptions are gone, at both nodes.
    for node in 0..2 {
        let publisher = Connect::fleeting(Version::V5, "publisher");
        let mut publisher = Client::connect(cluster.node(node).address(), &publisher).await;
        publisher.publish(&old).await.unwrap();
    }
    for client in [&mut renewed, &mut expired] {
        assert_eq!(client.ping().await.unwrap(), []);
        client.subscribe("news", 1).await.unwrap();
    }
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    publisher
        .publish(&Publish::new("news", "new", 1))
        .await
        .unwrap();
    for client in [&mut renewed, &mut expired] {
        assert_eq!(client.message().await.unwrap().text(), "new");
    }
}

/// Scenario 30: the Wills of clients whose node dies, with delays: of one that comes back in time, of
/// one that comes back with a clean start, and of one that stays away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_wills_of_a_node_that_dies() {
    let mut cluster = start(2).await;
    let watcher = Connect::persistent(Version::V5, "watcher");
    let mut watcher = Client::connect(cluster.node(1).address(), &watcher).await;
    watcher.subscribe("will/#", 2).await.unwrap();
    let mortal = |name: &str| Connect {
        will: Some(Will {
            topic: format!("will/{name}"),
            payload: name.to_owned(),
            qos: 2,
            delay_interval: 1,
        }),
        ..Connect::persistent(Version::V5, name)
    };
    for name in ["back", "clean", "away"] {
        Client::connect(cluster.node(0).address(), &mortal(name))
            .await
            .ping()
            .await
            .unwrap();
    }
    // Their connections are gone with it.
    cluster.node(0).kill();
    let node = cluster.node(1);
    let back = Client::connect(node.address(), &mortal("back")).await;
    assert!(back.session_present);
    let clean = Connect {
        clean_start: true,
        will: None,
        ..mortal("clean")
    };
    let clean = Client::connect(node.address(), &clean).await;
    assert!(!clean.session_present);
    // The end of the session is the end of the delay.
    assert_eq!(watcher.message().await.unwrap().text(), "clean");
    assert_eq!(watcher.message().await.unwrap().text(), "away");
    back.disconnect().await.unwrap();
    let connect = Connect::persistent(Version::V5, "back");
    let mut back = Client::connect(cluster.node(1).address(), &connect).await;
    back.publish(&Publish::new("will/last", "last", 2))
        .await
        .unwrap();
    assert_eq!(watcher.message().await.unwrap().text(), "last");
}

/// Scenario 31: two nodes, whose clocks are not the same, set and clear the same retained messages.
/// Whoever looks then finds the same at both, and nothing that was cleared later than it was set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_agree_on_retained_messages() {
    const TOPICS: u32 = 20;
    let mut seed = Seed::new();
    let mut cluster = start_with_clocks([2000, -2000]).await;
    let mut publishers = JoinSet::new();
    for node in 0..2 {
        let address = cluster.node(node).address();
        let connect = Connect::fleeting(Version::V5, &format!("publisher-{node}"));
        let mut seed = seed.split();
        publishers.spawn(async move {
            let mut publisher = Client::connect(address, &connect).await;
            for number in 0..1000 {
                let topic = format!("state/{}", seed.below(TOPICS.into()));
                let payload = match seed.percent(30) {
                    true => String::new(),
                    false => format!("{node}/{number}"),
                };
                let qos = u8::try_from(seed.between(1, 3)).unwrap();
                let publish = Publish::new(&topic, &payload, qos).retained();
                publisher.publish(&publish).await.unwrap();
            }
        });
    }
    publishers.join_all().await;
    let mut seen = Vec::new();
    for node in 0..2 {
        seen.push(retained(&mut cluster, node).await);
    }
    assert_eq!(seen[0], seen[1]);

    // Who has seen that a message was set clears it, although the clock there is behind.
    let connect = Connect::fleeting(Version::V5, "setter");
    let mut setter = Client::connect(cluster.node(0).address(), &connect).await;
    let connect = Connect::fleeting(Version::V5, "clearer");
    let mut clearer = Client::connect(cluster.node(1).address(), &connect).await;
    clearer.subscribe("state/#", 0).await.unwrap();
    for number in 0..TOPICS {
        let topic = format!("state/{number}");
        let set = Publish::new(&topic, "set", 1).retained();
        setter.publish(&set).await.unwrap();
        while clearer.message().await.unwrap().text() != "set" {}
        let clear = Publish::new(&topic, "", 0).retained();
        clearer.publish(&clear).await.unwrap();
        while !clearer.message().await.unwrap().payload.is_empty() {}
    }
    let end = Instant::now() + DEADLINE;
    for node in 0..2 {
        while !retained(&mut cluster, node).await.is_empty() {
            assert!(Instant::now() < end, "something is left");
            sleep(POLL_PAUSE).await;
        }
    }
}

/// Topics and payloads that a new subscription is sent.
async fn retained(cluster: &mut Cluster, node: usize) -> Vec<(String, String)> {
    let connect = Connect::fleeting(Version::V5, "reader");
    let mut reader = Client::connect(cluster.node(node).address(), &connect).await;
    let mut messages = reader.subscribe("state/#", 1).await.unwrap();
    while let Ok(message) = timeout(Duration::from_millis(300), reader.message()).await {
        messages.push(message.unwrap());
    }
    let mut seen: Vec<_> = messages
        .iter()
        .map(|message| (message.topic.clone(), message.text().to_owned()))
        .collect();
    seen.sort();
    seen
}
