//! A client id that connects again while it is connected.

use crate::broker::Broker;
use crate::seed::{Seed, rounds};
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

/// I4, I5 across takeovers: the old connection is still open when the new one comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn takeovers_in_the_middle_of_a_flood_lose_and_reorder_nothing() {
    let mut seed = Seed::new();
    let broker = Broker::start();
    let world = World::new(broker.server());
    let mut subscriber = Subscriber::new("taken", Version::V5).register(&world).await;
    let rounds = rounds(20);
    let messages = u32::try_from(20 * rounds).unwrap();
    let publishers = [
        Publisher::new(1, Version::V311, messages).start(&world),
        Publisher::new(2, Version::V5, messages).start(&world),
    ];

    for _ in 0..rounds {
        for _ in 0..seed.between(1, 120) {
            subscriber.step(&world, true).await.unwrap();
        }
        subscriber.take_over(&world).await;
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let subscribers = world.settle(vec![subscriber]).await;

    world.check(&subscribers);
}
