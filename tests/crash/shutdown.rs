//! SIGTERM.

use std::os::unix::net::UnixDatagram;

use serde_json::Value;
use tempfile::TempDir;

use crate::broker::Broker;
use crate::client::Client;
use crate::lines::DEADLINE;
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::{Connect, Publish, Version, Will};

/// I1, I5, with a restart in good order under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_says_goodbye_and_loses_nothing() {
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let subscriber = Subscriber::new("offline", Version::V5);
    let offline = subscriber.register(&world).await;
    let publishers = [
        Publisher::new(1, Version::V311, 200).start(&world),
        Publisher::new(2, Version::V5, 200).start(&world),
    ];
    let mut idle = Vec::new();
    for (name, version) in [("idle-3", Version::V311), ("idle-5", Version::V5)] {
        let connect = Connect::persistent(version, name);
        idle.push(Client::connect(broker.address(), &connect).await);
    }
    world.wait_until(|now| now.acknowledged >= 200).await;

    let status = broker.terminate();

    assert_eq!(status.code(), Some(0));
    assert_eq!(idle[0].wait_for_end().await, None);
    assert_eq!(idle[1].wait_for_end().await, Some(0x8b));
    broker.start_again();
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let subscribers = world.settle(vec![offline]).await;
    world.check(&subscribers);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_ends_at_once() {
    let mut broker = Broker::start();
    // Does not read what it is sent, so that the goodbye to it takes long.
    let connect = Connect::fleeting(Version::V5, "blocked");
    let mut blocked = Client::connect(broker.address(), &connect).await;
    blocked.subscribe("flood", 0).await.unwrap();
    let connect = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(broker.address(), &connect).await;
    let flood = Publish {
        payload: vec![b'.'; 512 * 1024],
        ..Publish::new("flood", "", 0)
    };
    for _ in 0..40 {
        publisher.publish(&flood).await.unwrap();
        publisher.ping().await.unwrap();
    }

    broker.signal("TERM");
    assert_eq!(publisher.wait_for_end().await, Some(0x8b));
    broker.signal("TERM");
    let status = broker.wait();

    assert_eq!(status.code(), Some(1));
    let log = broker.log();
    assert!(log.last().unwrap().contains("ending at once"), "{log:#?}");
}

#[tokio::test]
async fn clients_are_accepted_during_the_grace_and_a_second_sigterm_ends_it() {
    let mut broker = Broker::start_with(&[("drain.grace", "1h"), ("drain.deadline", "1h")]);
    let connect = Connect::persistent(Version::V5, "early");
    let mut early = Client::connect(broker.address(), &connect).await;

    broker.signal("TERM");
    wait_for_event(&broker, "draining");
    Client::connect(broker.address(), &Connect::fleeting(Version::V5, "late")).await;
    early.ping().await.unwrap();
    broker.signal("TERM");

    assert_eq!(broker.wait().code(), Some(1));
}

#[tokio::test]
async fn clients_are_told_to_leave_at_the_rate_until_the_deadline() {
    let mut broker = Broker::start_with(&[("drain.evict_rate", "1"), ("drain.deadline", "1500ms")]);
    let mut clients = Vec::new();
    for number in 0..8 {
        let connect = Connect::persistent(Version::V5, &format!("client-{number}"));
        clients.push(Client::connect(broker.address(), &connect).await);
    }

    broker.signal("TERM");
    for client in &mut clients {
        assert_eq!(client.wait_for_end().await, Some(0x8b));
    }

    assert_eq!(broker.wait().code(), Some(0));
    let deadline = wait_for_event(&broker, "drain_deadline");
    let left = deadline["left"].as_u64().unwrap();
    assert!((1..8).contains(&left), "{left}");
}

#[tokio::test]
async fn sigint_does_not_drain() {
    let mut broker = Broker::start_with(&[("drain.grace", "1h"), ("drain.deadline", "1h")]);
    let connect = Connect::persistent(Version::V5, "client");
    let mut client = Client::connect(broker.address(), &connect).await;

    broker.signal("INT");

    assert_eq!(client.wait_for_end().await, Some(0x8b));
    assert_eq!(broker.wait().code(), Some(0));
}

/// The Will of a client that was sent away is not published while it may come back.
#[tokio::test]
async fn the_will_of_a_client_that_was_told_to_leave_waits_for_it() {
    let mut broker = Broker::start();
    let will = Will {
        topic: "wills".to_owned(),
        payload: "gone".to_owned(),
        qos: 1,
        delay_interval: 0,
    };
    let connect = Connect {
        will: Some(will),
        ..Connect::persistent(Version::V5, "client")
    };
    let mut client = Client::connect(broker.address(), &connect).await;
    assert_eq!(broker.terminate().code(), Some(0));
    assert_eq!(client.wait_for_end().await, Some(0x8b));
    broker.start_again();
    let watcher = Connect::persistent(Version::V5, "watcher");
    let mut watcher = Client::connect(broker.address(), &watcher).await;
    watcher.subscribe("#", 1).await.unwrap();

    let mut client = Client::connect(broker.address(), &connect).await;
    assert!(client.session_present);
    client.ping().await.unwrap();
    watcher.ping().await.unwrap();

    assert_eq!(watcher.received(), None);
}

#[test]
fn systemd_is_told_what_goes_on() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_read_timeout(Some(DEADLINE)).unwrap();
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "20000"),
    ];
    let next = || {
        let mut state = [0; 64];
        let length = systemd.recv(&mut state).unwrap();
        String::from_utf8_lossy(&state[..length]).into_owned()
    };
    let wait_for = |wanted: &str| while next() != wanted {};

    let mut broker = Broker::start_in(&environment);
    wait_for("READY=1");
    wait_for("WATCHDOG=1");
    broker.signal("HUP");
    wait_for("RELOADING=1");
    wait_for("READY=1");
    broker.signal("TERM");
    wait_for("STOPPING=1");

    assert_eq!(broker.wait().code(), Some(0));
}

#[track_caller]
fn wait_for_event(broker: &Broker, name: &str) -> Value {
    broker.wait_for_log(name, |lines| {
        lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|record| record["event"] == name)
    })
}
