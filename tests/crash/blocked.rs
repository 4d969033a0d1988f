//! Clients that do not take what is theirs must not be in anybody else's way.

use tokio::sync::watch;

use crate::broker::Broker;
use crate::client::Client;
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::{Connect, Publish, Version};

/// With room for what fills the buffers of one socket, and for a debug build.
const MEMORY_MIB_MAX: u64 = 300;

async fn connect(broker: &Broker, name: &str) -> Client {
    Client::connect(broker.address(), &Connect::fleeting(Version::V5, name)).await
}

/// Publishes 200 MiB in QoS 0 that one subscriber does not read. What another one receives is
/// counted; it must go on receiving all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qos_0_flood_to_a_blocked_socket_neither_fills_memory_nor_stops_others() {
    let broker = Broker::start();
    let mut blocked = connect(&broker, "blocked").await;
    blocked.subscribe("flood", 0).await.unwrap();
    let mut reader = connect(&broker, "reader").await;
    reader.subscribe("#", 0).await.unwrap();
    let mut publisher = connect(&broker, "publisher").await;
    let flood = Publish {
        payload: vec![b'.'; 100 * 1024],
        ..Publish::new("flood", "", 0)
    };

    for round in 0..200 {
        for _ in 0..10 {
            publisher.publish(&flood).await.unwrap();
        }
        // Lets the reader keep up: it then loses nothing.
        let mut mark = flood.clone();
        mark.topic = format!("mark/{round}");
        publisher.publish(&mark).await.unwrap();
        let mut floods = 0;
        while reader.message().await.unwrap().topic == "flood" {
            floods += 1;
        }
        assert_eq!(floods, 10);
    }
    assert!(
        broker.memory_mib() < MEMORY_MIB_MAX,
        "{} MiB",
        broker.memory_mib()
    );
    drop(blocked);
}

/// QoS 1 and 2 to a socket that is not read, to a client that never acknowledges, and to one that
/// does what it should.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_messages_for_blocked_clients_wait_on_disk_and_stop_nobody() {
    let broker = Broker::start();
    let world = World::new(broker.server());
    let unread = Connect::persistent(Version::V5, "unread");
    let mut unread = Client::connect(broker.address(), &unread).await;
    unread.subscribe("load/#", 2).await.unwrap();
    let mut silent = Subscriber::new("silent", Version::V5).receive_maximum(10);
    silent.open(&world).await.unwrap();
    let mut reader = Subscriber::new("reader", Version::V311);
    reader.open(&world).await.unwrap();
    let publishers = [1, 2].map(|number| {
        Publisher {
            payload_bytes: 10_000,
            ..Publisher::new(number, Version::V5, 500)
        }
        .start(&world)
    });

    for _ in 0..10 {
        silent.step(&world, false).await.unwrap();
    }
    let stop = watch::Sender::new(false);
    let reading = reader.start(&world, stop.subscribe());
    for publisher in publishers {
        publisher.await.unwrap();
    }
    stop.send_replace(true);
    let readers = world.settle(vec![reading.await.unwrap()]).await;
    world.check(&readers);
    assert!(
        broker.memory_mib() < MEMORY_MIB_MAX,
        "{} MiB",
        broker.memory_mib()
    );

    // Gives back what it never acknowledged.
    silent.disconnect(&world).await.unwrap();
    let silent = world.settle(vec![silent]).await;
    world.check(&silent);
    drop(unread);
}
