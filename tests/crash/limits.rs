//! Queues that are full.

use crate::broker::Broker;
use crate::client::Client;
use crate::wire::{Connect, Packet, Publish, Version};

fn queue_full(rule: &str) -> Broker {
    Broker::start_with(&[
        ("session.queue_messages_max", "100"),
        ("session.queue_full", rule),
    ])
}

fn sleeper() -> Connect {
    Connect::persistent(Version::V5, "sleeper")
}

async fn subscribe_and_leave(broker: &Broker) {
    let mut client = Client::connect(broker.address(), &sleeper()).await;
    client.subscribe("queue", 1).await.unwrap();
    client.disconnect().await.unwrap();
}

/// Publishes the numbers in `range`, each acknowledged.
async fn publish(broker: &Broker, range: std::ops::Range<usize>) {
    let connect = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(broker.address(), &connect).await;
    for number in range {
        let publish = Publish::new("queue", &number.to_string(), 1);
        publisher.publish(&publish).await.unwrap();
    }
}

/// The numbers that wait for the client, of which there must be `at_least` so many.
async fn queued(broker: &Broker, at_least: usize) -> Vec<usize> {
    let mut client = Client::connect(broker.address(), &sleeper()).await;
    assert!(client.session_present);
    let mut found = Vec::new();
    while found.len() < at_least {
        found.push(client.message().await.unwrap().text().parse().unwrap());
    }
    // Now there is room for a mark, which comes behind all others.
    for message in client.ping().await.unwrap() {
        client.acknowledge(&message).await.unwrap();
        found.push(message.text().parse().unwrap());
    }
    let mark = Publish::new("queue", "end", 1);
    client.send(&mark.encode(Version::V5)).await.unwrap();
    loop {
        let message = client.message().await.unwrap();
        if message.text() == "end" {
            client.disconnect().await.unwrap();
            return found;
        }
        found.push(message.text().parse().unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_oldest_keeps_the_newest() {
    for crashes in [false, true] {
        let mut broker = queue_full("drop_oldest");
        subscribe_and_leave(&broker).await;
        publish(&broker, 0..150).await;
        if crashes {
            broker.crash_and_restart();
        }
        publish(&broker, 150..170).await;

        assert_eq!(queued(&broker, 100).await, Vec::from_iter(70..170));
        publish(&broker, 170..180).await;
        assert_eq!(queued(&broker, 10).await, Vec::from_iter(170..180));
    }
}

/// I2: what was begun to be delivered is finished, before the newest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_oldest_keeps_what_is_in_flight() {
    let broker = queue_full("drop_oldest");
    let mut client = Client::connect(broker.address(), &sleeper()).await;
    client.subscribe("queue", 1).await.unwrap();
    publish(&broker, 0..5).await;
    let Packet::Publish(first) = client.receive().await.unwrap() else {
        panic!("a message comes first");
    };
    assert_eq!(first.text(), "0");
    for _ in 1..5 {
        client.receive().await.unwrap();
    }
    client.disconnect().await.unwrap();
    publish(&broker, 5..300).await;

    let expected = Vec::from_iter((0..5).chain(205..300));
    assert_eq!(queued(&broker, 100).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drop_new_keeps_the_oldest() {
    for crashes in [false, true] {
        let mut broker = queue_full("drop_new");
        subscribe_and_leave(&broker).await;
        publish(&broker, 0..150).await;
        if crashes {
            broker.crash_and_restart();
        }
        publish(&broker, 150..170).await;

        assert_eq!(queued(&broker, 100).await, Vec::from_iter(0..100));
        publish(&broker, 170..180).await;
        assert_eq!(queued(&broker, 10).await, Vec::from_iter(170..180));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disconnect_ends_the_connection_and_keeps_the_oldest() {
    let broker = queue_full("disconnect");
    let mut client = Client::connect(broker.address(), &sleeper()).await;
    client.subscribe("queue", 1).await.unwrap();
    publish(&broker, 0..101).await;

    assert_eq!(client.wait_for_end().await, Some(0x97));
    assert_eq!(queued(&broker, 100).await, Vec::from_iter(0..100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disconnect_lets_a_client_come_back_whose_queue_became_full_while_it_was_away() {
    let broker = queue_full("disconnect");
    subscribe_and_leave(&broker).await;
    publish(&broker, 0..150).await;

    assert_eq!(queued(&broker, 100).await, Vec::from_iter(0..100));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_of_bytes_keeps_the_newest() {
    let mut broker = Broker::start_with(&[("session.queue_bytes_max", "10KiB")]);
    for crashes in [false, true] {
        subscribe_and_leave(&broker).await;
        let connect = Connect::fleeting(Version::V5, "publisher");
        let mut publisher = Client::connect(broker.address(), &connect).await;
        for number in 0..50 {
            let publish = Publish::new("queue", &format!("{number:01000}"), 1);
            publisher.publish(&publish).await.unwrap();
        }
        if crashes {
            broker.crash_and_restart();
        }

        // Ten KiB hold ten messages, with a few bytes for each besides its payload.
        let queued = queued(&broker, 9).await;
        assert!((9..=10).contains(&queued.len()), "{queued:?}");
        assert_eq!(queued, Vec::from_iter(50 - queued.len()..50));
    }
}
