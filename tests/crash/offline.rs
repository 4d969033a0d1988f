//! Messages for clients that are away, while the broker is killed.

use crate::broker::Broker;
use crate::seed::{Seed, rounds};
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

/// I1, I4, I5: acknowledged while the subscribers were offline and the broker died again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_before_a_crash_reaches_sessions_that_were_offline() {
    let mut seed = Seed::new();
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let mut subscribers = Vec::new();
    for number in 0..4 {
        let version = [Version::V311, Version::V5][number % 2];
        let subscriber = Subscriber::new(&format!("offline-{number}"), version);
        subscribers.push(subscriber.register(&world).await);
    }
    let rounds = rounds(3);
    let messages = u32::try_from(80 * rounds).unwrap();

    let publishers = [
        Publisher::new(1, Version::V311, messages).start(&world),
        Publisher::new(2, Version::V5, messages).start(&world),
    ];
    for _ in 0..rounds {
        let enough = world.progress().acknowledged + seed.between(20, 300);
        world.wait_until(|now| now.acknowledged >= enough).await;
        broker.crash_and_restart();
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    broker.crash_and_restart();
    let subscribers = world.settle(subscribers).await;

    world.check(&subscribers);
}

/// I2, I5: the broker dies while the queue is being emptied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_was_emptied_half_way_goes_on_after_a_crash() {
    let mut seed = Seed::new();
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let mut subscriber = Subscriber::new("half-way", Version::V5)
        .register(&world)
        .await;
    let publisher = Publisher::new(1, Version::V5, 300).start(&world);
    publisher.await.unwrap();

    let rounds = rounds(4);
    for _ in 0..rounds {
        for _ in 0..seed.below(1600 / rounds) {
            // The first step after a crash finds the connection gone.
            let _ = subscriber.step(&world, true).await;
        }
        broker.crash_and_restart();
    }
    let subscribers = world.settle(vec![subscriber]).await;

    world.check(&subscribers);
}
