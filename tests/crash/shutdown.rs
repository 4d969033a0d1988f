//! SIGTERM.

use crate::broker::Broker;
use crate::client::Client;
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::{Connect, Publish, Version};

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
