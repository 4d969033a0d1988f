//! The broker is killed while messages flow.

use tokio::sync::watch;

use crate::broker::Broker;
use crate::seed::{Seed, rounds};
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

/// I1, I4, I5 with subscribers that are there, and come back at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_that_are_online_lose_nothing_when_the_broker_is_killed() {
    let mut seed = Seed::new();
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let stop = watch::Sender::new(false);
    let mut receiving = Vec::new();
    for number in 0..3 {
        let version = [Version::V5, Version::V311][number % 2];
        let subscriber = Subscriber::new(&format!("online-{number}"), version);
        let subscriber = subscriber.register(&world).await;
        receiving.push(subscriber.start(&world, stop.subscribe()));
    }
    let rounds = rounds(5);
    let messages = u32::try_from(70 * rounds).unwrap();

    let publishers = [
        Publisher::new(1, Version::V311, messages).start(&world),
        Publisher::new(2, Version::V5, messages).start(&world),
    ];
    for _ in 0..rounds {
        let enough = world.progress().received + seed.between(30, 700);
        world.wait_until(|now| now.received >= enough).await;
        broker.crash_and_restart();
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    stop.send_replace(true);
    let mut subscribers = Vec::new();
    for subscriber in receiving {
        subscribers.push(subscriber.await.unwrap());
    }
    let subscribers = world.settle(subscribers).await;

    world.check(&subscribers);
}
