//! Subscribers that are slower than what comes.

use crate::broker::Broker;
use crate::seed::Seed;
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

/// I3, I4: memory holds ten messages, so the broker reads the rest from the store, and catches up,
/// and falls behind again, while new messages arrive all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_overflows_memory_gets_everything_in_order() {
    let mut seed = Seed::new();
    let broker = Broker::start_with(&[("session.memory_messages_max", "10")]);
    let world = World::new(broker.server());
    let mut slow = Vec::new();
    for (number, version) in [Version::V5, Version::V311].into_iter().enumerate() {
        let subscriber = Subscriber::new(&format!("slow-{number}"), version).receive_maximum(20);
        slow.push(subscriber.register(&world).await);
    }
    let publishers = [
        Publisher::new(1, Version::V311, 400).start(&world),
        Publisher {
            payload_bytes: 2000,
            ..Publisher::new(2, Version::V5, 400)
        }
        .start(&world),
    ];

    let mut receiving = Vec::new();
    for mut subscriber in slow {
        let (world, mut seed) = (world.clone(), seed.split());
        receiving.push(tokio::spawn(async move {
            for _ in 0..20 {
                for _ in 0..seed.between(5, 100) {
                    subscriber.step(&world, true).await.unwrap();
                }
                // Falls behind by some messages, which may be more or fewer than fit in memory.
                let behind = world.progress().acknowledged + seed.below(40);
                let all_is_sent = |acknowledged| acknowledged >= 2 * 2 * 2 * 400;
                world
                    .wait_until(|now| now.acknowledged >= behind || all_is_sent(now.acknowledged))
                    .await;
            }
            subscriber
        }));
    }
    let mut subscribers = Vec::new();
    for subscriber in receiving {
        subscribers.push(subscriber.await.unwrap());
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let subscribers = world.settle(subscribers).await;

    world.check(&subscribers);
}
