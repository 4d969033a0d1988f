//! Subscribers that come and go while messages flow.

use crate::broker::Broker;
use crate::seed::{Seed, rounds};
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

/// I2, I4: acknowledging some messages and not others, and leaving with and without a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_come_and_go_get_everything_and_nothing_they_acknowledged_again() {
    let mut seed = Seed::new();
    let broker = Broker::start();
    let world = World::new(broker.server());
    let mut registered = Vec::new();
    for number in 0..3 {
        let version = [Version::V5, Version::V311][number % 2];
        let subscriber = Subscriber::new(&format!("restless-{number}"), version);
        registered.push(subscriber.register(&world).await);
    }
    let rounds = rounds(12);
    let messages = u32::try_from(25 * rounds).unwrap();
    let publishers = [
        Publisher::new(1, Version::V311, messages).start(&world),
        Publisher::new(2, Version::V5, messages).start(&world),
    ];

    let mut restless = Vec::new();
    for mut subscriber in registered {
        let (world, mut seed) = (world.clone(), seed.split());
        restless.push(tokio::spawn(async move {
            for _ in 0..rounds {
                // What is not acknowledged stays below what may be in flight.
                for _ in 0..seed.between(1, 150) {
                    subscriber.step(&world, seed.percent(80)).await.unwrap();
                }
                if seed.percent(60) {
                    subscriber.disconnect(&world).await.unwrap();
                } else {
                    subscriber.abort();
                }
            }
            subscriber
        }));
    }
    let mut subscribers = Vec::new();
    for subscriber in restless {
        subscribers.push(subscriber.await.unwrap());
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let subscribers = world.settle(subscribers).await;

    world.check(&subscribers);
}

/// I2: what was acknowledged before DISCONNECT is gone, even when the client was half-way through
/// what the store keeps as one piece.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_before_disconnect_is_not_sent_again() {
    let broker = Broker::start();
    let world = World::new(broker.server());
    let mut subscriber = Subscriber::new("careful", Version::V311)
        .register(&world)
        .await;
    let publisher = Publisher::new(1, Version::V5, 100);
    publisher.start(&world).await.unwrap();

    for _ in 0..20 {
        for number in 0..10 {
            // Every other one, so that each piece is left in parts.
            subscriber.step(&world, number % 2 == 0).await.unwrap();
        }
        subscriber.disconnect(&world).await.unwrap();
    }
    let subscribers = world.settle(vec![subscriber]).await;

    world.check(&subscribers);
}

/// I3: what was in flight with QoS 2 is still known after a crash, what was in flight with QoS 1 is
/// not; together they are more than the client allows now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_3_3_4_9_a_client_may_come_back_with_a_smaller_receive_maximum() {
    for crashes in [false, true] {
        let mut broker = Broker::start();
        let world = World::new(broker.server());
        let subscriber = Subscriber::new("smaller", Version::V5).receive_maximum(40);
        let mut subscriber = subscriber.register(&world).await;
        let publisher = Publisher::new(1, Version::V5, 20);
        publisher.start(&world).await.unwrap();
        for _ in 0..40 {
            subscriber.step(&world, false).await.unwrap();
        }
        subscriber.abort();
        if crashes {
            broker.crash_and_restart();
        }

        let mut subscriber = subscriber.receive_maximum(3);
        for _ in 0..3 {
            subscriber.step(&world, false).await.unwrap();
        }
        assert!(
            subscriber.is_silent().await,
            "more than three are in flight"
        );
        subscriber.disconnect(&world).await.unwrap();
        let subscribers = world.settle(vec![subscriber]).await;

        world.check(&subscribers);
    }
}
