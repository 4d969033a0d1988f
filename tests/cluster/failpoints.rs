//! Nodes that crash or stop at places that have names, in the middle of what they promise.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use crate::client::Client;
use crate::lines::DEADLINE;
use crate::mongod::{Database, POLL_PAUSE};
use crate::node::{Cluster, FAILPOINTS, Settings};
use crate::seed::{Seed, rounds};
use crate::wire::{Answer, Connect, Packet, Publish, Version, Will};
use crate::workload::{Size, Workload};

/// Nodes of which some have failpoints.
async fn start<const N: usize>(database: &Database, failpoints: [&str; N]) -> Cluster {
    let settings = failpoints.map(|failpoints| -> Settings {
        let mut settings = database.settings();
        settings.push((FAILPOINTS.to_owned(), failpoints.to_owned()));
        settings
    });
    Cluster::start(settings.into()).await
}

/// Where traffic comes by.
const ON_THE_WAY: [&str; 14] = [
    "before_write",
    "before_commit",
    "after_commit",
    "after_insert",
    "after_write",
    "after_hand_on",
    "before_puback",
    "before_pubrec",
    "before_pubrel",
    "before_pubcomp",
    "before_qos2_publish",
    "before_claim",
    "after_claim",
    "before_taken",
];

/// Where what a dead node has left comes by.
const AFTER_A_DEATH: [&str; 3] = ["after_declaring_dead", "after_releasing", "before_will"];

/// Scenarios 2, 24 and 25: three nodes crash again and again, each time somewhere else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_crash_wherever_they_are() {
    let mut seed = Seed::new();
    let mut places = ON_THE_WAY.to_vec();
    let mut next = |seed: &mut Seed| {
        if places.is_empty() {
            return String::new();
        }
        let place = usize::try_from(seed.below(places.len() as u64)).unwrap();
        let place = places.swap_remove(place);
        // Clients move less often than they publish.
        let is_of_move = place.ends_with("_claim") || place == "before_taken";
        let times = seed.between(1, if is_of_move { 4 } else { 20 });
        format!("{place}=crash@{times}")
    };
    let armed = [(); 3].map(|()| next(&mut seed));
    let armed = [&*armed[0], &*armed[1], &*armed[2]];
    let mut cluster = start(&Database::shared(), armed).await;
    // A Will of a node that crashes comes only when that is certain.
    let size = Size {
        goes_on: true,
        mortals: 0,
        ..Size::small()
    };
    let workload = Workload::start(cluster.servers(), &mut seed, size).await;

    let mut crashes = 0;
    let end = Instant::now() + DEADLINE;
    let enough = usize::try_from(rounds(7)).unwrap().min(ON_THE_WAY.len());
    while crashes < enough {
        for number in 0..3 {
            let node = cluster.node(number);
            if let Some(place) = node.crashed_at() {
                let progress = workload.progress();
                eprintln!("node {number} crashed at {place}, {progress:?}");
                crashes += 1;
                node.fail_at(&next(&mut seed));
                node.start_after_crash();
            }
        }
        let progress = workload.progress();
        assert!(Instant::now() < end, "only {crashes} crashes, {progress:?}");
        sleep(POLL_PAUSE).await;
    }
    for number in 0..3 {
        let node = cluster.node(number);
        node.fail_at("");
        node.start_after_crash();
    }

    workload.finish().await;
}

/// Scenario 37: whoever looks after what a dead node has left dies as well, and so does the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_crash_while_they_look_after_a_dead_one() {
    let mut seed = Seed::new();
    let mut left: Vec<_> = AFTER_A_DEATH.into();
    while left.len() as u64 > rounds(1) {
        left.swap_remove(usize::try_from(seed.below(left.len() as u64)).unwrap());
    }
    let arm = |left: &[&str]| {
        let all = left.iter().map(|place| format!("{place}=crash"));
        all.collect::<Vec<_>>().join(";")
    };
    let all = arm(&left);
    let mut cluster = start(&Database::shared(), ["", &all, &all, &all]).await;
    let watcher = Connect::persistent(Version::V5, "watcher");
    let mut watching = Client::connect(cluster.node(1).address(), &watcher).await;
    watching.subscribe("will/#", 2).await.unwrap();
    drop(watching);
    let mut mortals = Vec::new();
    for number in 0..20 {
        let mut mortal = match number % 2 {
            0 => Connect::persistent(Version::V5, &format!("mortal-{number}")),
            _ => Connect::fleeting(Version::V311, &format!("mortal-{number}")),
        };
        mortal.will = Some(Will {
            topic: format!("will/{number}"),
            payload: number.to_string(),
            qos: 2,
            delay_interval: 0,
        });
        mortals.push(Client::connect(cluster.node(0).address(), &mortal).await);
    }

    cluster.node(0).kill();
    let end = Instant::now() + DEADLINE;
    while !left.is_empty() {
        for number in 1..4 {
            let node = cluster.node(number);
            if let Some(place) = node.crashed_at() {
                eprintln!("node {number} crashed at {place}");
                left.retain(|left| *left != place);
                node.fail_at(&arm(&left));
                node.start_after_crash();
            }
        }
        assert!(Instant::now() < end, "not reached: {left:?}");
        sleep(POLL_PAUSE).await;
    }
    cluster.node(0).start_again();

    let mut watching = Client::connect(cluster.node(0).address(), &watcher).await;
    assert!(watching.session_present);
    let mut wills: Vec<u32> = Vec::new();
    while wills.len() < 20 {
        wills.push(watching.message().await.unwrap().text().parse().unwrap());
    }
    let more = timeout(Duration::from_millis(300), watching.message()).await;
    assert!(more.is_err(), "a Will too many: {more:?}");
    wills.sort_unstable();
    assert_eq!(wills, (0..20).collect::<Vec<_>>());
}

/// Scenario 5: a node that stands still between writing a message and asking who else has subscribed
/// asks when it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_after_writing_asks_who_has_subscribed_meanwhile() {
    let database = Database::shared();
    let mut cluster = start(&database, ["after_insert=stop", ""]).await;
    let early = Connect::persistent(Version::V5, "early");
    let mut early = Client::connect(cluster.node(1).address(), &early).await;
    early.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    let publish = |number: u16| {
        let publish = Publish::new("news", &number.to_string(), 1);
        let packet_id = number;
        Publish {
            packet_id,
            ..publish
        }
        .encode(Version::V5)
    };
    publisher.send(&publish(1)).await.unwrap();
    cluster.node(0).wait_for_event("failpoint");

    let late = Connect::persistent(Version::V5, "late");
    let mut late = Client::connect(cluster.node(1).address(), &late).await;
    late.subscribe("news", 1).await.unwrap();
    // After SUBACK, so it has to come.
    publisher.send(&publish(2)).await.unwrap();
    cluster.node(0).thaw_in_place();

    for number in 1..=2 {
        let answer = publisher.receive().await.unwrap();
        assert!(
            matches!(answer, Packet::Answer(Answer::PubAck, id, _) if id == number),
            "{answer:?}"
        );
        assert_eq!(early.message().await.unwrap().text(), number.to_string());
    }
    // The first one may come too: it was not acknowledged then.
    while late.message().await.unwrap().text() != "2" {}
}

/// Scenario 6: a node stands still with a transaction that has touched a session. Whoever connects
/// with that elsewhere is let in once the node is given up, and the message comes once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_before_a_commit_holds_a_session_for_a_while() {
    let database = Database::shared();
    let mut cluster = start(&database, ["before_commit=stop@2", ""]).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(1).address(), &subscriber).await;
    subscriber.subscribe("news", 2).await.unwrap();
    let connect = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &connect).await;
    let publish = Publish::new("news", "once", 2);
    // The first transaction of the node, so that the second one is that of the message.
    publisher.subscribe("nothing", 0).await.unwrap();
    publisher.send(&publish.encode(Version::V5)).await.unwrap();
    cluster.node(0).wait_for_event("failpoint");

    let mut moved = timeout(
        DEADLINE,
        Client::connect(cluster.node(1).address(), &connect),
    )
    .await
    .expect("the node is given up");
    assert!(moved.session_present);
    let again = Publish {
        dup: true,
        ..publish
    };
    moved.send(&again.encode(Version::V5)).await.unwrap();
    let answer = moved.receive().await.unwrap();
    assert!(
        matches!(answer, Packet::Answer(Answer::PubRec, 1, _)),
        "{answer:?}"
    );
    cluster.node(0).thaw_in_place();
    cluster.node(0).wait_until_anew();
    moved.send(&Answer::PubRel.encode(1)).await.unwrap();
    let answer = moved.receive().await.unwrap();
    assert!(
        matches!(answer, Packet::Answer(Answer::PubComp, 1, _)),
        "{answer:?}"
    );
    moved
        .publish(&Publish::new("news", "last", 2))
        .await
        .unwrap();
    assert_eq!(subscriber.message().await.unwrap().text(), "once");
    assert_eq!(subscriber.message().await.unwrap().text(), "last");
}

/// Scenarios 2 and 24, the way in: a message of QoS 2 is taken over by a node that crashes before it has
/// told anybody. When it is sent again at another node it has come before whatever follows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_over_before_a_crash_is_not_overtaken() {
    let database = Database::shared();
    for place in ["after_commit", "after_write"] {
        // The first transaction of the node is that of the subscription.
        let failpoint = match place {
            "after_commit" => "after_commit=crash@2".to_owned(),
            _ => format!("{place}=crash"),
        };
        let mut cluster = start(&database, [&*failpoint, "", ""]).await;
        let subscriber = Connect::persistent(Version::V5, &format!("subscriber-{place}"));
        let mut subscriber = Client::connect(cluster.node(2).address(), &subscriber).await;
        subscriber.subscribe(place, 2).await.unwrap();
        let connect = Connect::persistent(Version::V5, &format!("publisher-{place}"));
        let mut publisher = Client::connect(cluster.node(0).address(), &connect).await;
        publisher.subscribe("nothing", 0).await.unwrap();
        let first = Publish::new(place, "first", 2);
        publisher.send(&first.encode(Version::V5)).await.unwrap();
        publisher.wait_for_end().await;

        let mut publisher = Client::connect(cluster.node(1).address(), &connect).await;
        assert!(publisher.session_present);
        let again = Publish { dup: true, ..first };
        publisher.publish(&again).await.unwrap();
        publisher
            .publish(&Publish::new(place, "second", 2))
            .await
            .unwrap();
        assert_eq!(subscriber.message().await.unwrap().text(), "first");
        assert_eq!(subscriber.message().await.unwrap().text(), "second");
    }
}

/// Scenario 25: a node crashes after it has forgotten an identifier and before it says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_identifier_is_free_after_a_crash_before_pubcomp() {
    let database = Database::shared();
    let mut cluster = start(&database, ["before_pubcomp=crash", ""]).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(1).address(), &subscriber).await;
    subscriber.subscribe("news", 2).await.unwrap();
    let connect = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &connect).await;
    let first = Publish::new("news", "first", 2);
    publisher.send(&first.encode(Version::V5)).await.unwrap();
    publisher.receive().await.unwrap();
    publisher.send(&Answer::PubRel.encode(1)).await.unwrap();
    publisher.wait_for_end().await;

    let mut publisher = Client::connect(cluster.node(1).address(), &connect).await;
    assert!(publisher.session_present);
    publisher.send(&Answer::PubRel.encode(1)).await.unwrap();
    let answer = publisher.receive().await.unwrap();
    assert!(
        matches!(answer, Packet::Answer(Answer::PubComp, 1, _)),
        "{answer:?}"
    );
    // The same identifier.
    publisher
        .publish(&Publish::new("news", "second", 2))
        .await
        .unwrap();
    assert_eq!(subscriber.message().await.unwrap().text(), "first");
    assert_eq!(subscriber.message().await.unwrap().text(), "second");
}

/// Scenario 24, the way out: what a client was sent before its node crashed comes again with the same
/// identifier, or only its PUBREL, and nothing comes twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_goes_on_at_another_node_where_it_was() {
    let database = Database::shared();
    for place in ["before_qos2_publish", "before_pubrel"] {
        let crash = format!("{place}=crash");
        let mut cluster = start(&database, [&*crash, ""]).await;
        let connect = Connect::persistent(Version::V5, &format!("subscriber-{place}"));
        let mut subscriber = Client::connect(cluster.node(0).address(), &connect).await;
        subscriber.subscribe(place, 2).await.unwrap();
        let publisher = Connect::fleeting(Version::V5, &format!("publisher-{place}"));
        let mut publisher = Client::connect(cluster.node(1).address(), &publisher).await;
        publisher
            .publish(&Publish::new(place, "once", 2))
            .await
            .unwrap();
        let mut sent = None;
        while let Ok(packet) = subscriber.receive().await {
            if let Packet::Publish(publish) = packet {
                let received = Answer::PubRec.encode(publish.packet_id);
                // The node may have crashed already.
                let _ = subscriber.send(&received).await;
                sent = Some(publish);
            }
        }
        assert_eq!(sent.is_some(), place == "before_pubrel");

        let mut subscriber = Client::connect(cluster.node(1).address(), &connect).await;
        assert!(subscriber.session_present);
        match (subscriber.receive().await.unwrap(), sent) {
            (Packet::Publish(publish), None) => {
                assert_eq!(publish.text(), "once");
                let received = Answer::PubRec.encode(publish.packet_id);
                subscriber.send(&received).await.unwrap();
                let release = subscriber.receive().await.unwrap();
                assert!(
                    matches!(release, Packet::Answer(Answer::PubRel, ..)),
                    "{release:?}"
                );
                let completed = Answer::PubComp.encode(publish.packet_id);
                subscriber.send(&completed).await.unwrap();
            }
            (Packet::Answer(Answer::PubRel, id, _), Some(publish)) => {
                assert_eq!(id, publish.packet_id);
                subscriber.send(&Answer::PubComp.encode(id)).await.unwrap();
            }
            other => panic!("{other:?}"),
        }
        publisher
            .publish(&Publish::new(place, "last", 2))
            .await
            .unwrap();
        assert_eq!(subscriber.message().await.unwrap().text(), "last");
    }
}
