//! Share groups whose members come and go, and the broker with them.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::broker::Broker;
use crate::seed::{Seed, rounds};
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::Version;

async fn members(world: &World) -> Vec<Subscriber> {
    let mut members = Vec::new();
    for number in 0..3 {
        let version = [Version::V5, Version::V311][number % 2];
        let member = Subscriber::member(&format!("member-{number}"), version);
        members.push(member.register(world).await);
    }
    members
}

fn publishers(world: &Arc<World>, messages: u32) -> [JoinHandle<()>; 2] {
    [
        Publisher::new(1, Version::V311, messages).start(world),
        Publisher::new(2, Version::V5, messages).start(world),
    ]
}

/// Leaves messages unacknowledged, leaves with and without a word, and comes back.
fn start_restless(
    mut member: Subscriber,
    world: &Arc<World>,
    mut seed: Seed,
    mut stop: watch::Receiver<bool>,
) -> JoinHandle<Subscriber> {
    let world = world.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = member.step(&world, seed.percent(90)) => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
            if seed.percent(3) {
                if seed.percent(50) {
                    // The broker may be killed meanwhile.
                    let _ = member.disconnect(&world).await;
                } else {
                    member.abort();
                }
            }
        }
        member.abort();
        member
    })
}

/// I1, I2, I5 for a group: one member has each message, whoever leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_group_loses_nothing_when_members_leave_in_the_middle() {
    let mut seed = Seed::new();
    let broker = Broker::start();
    let world = World::new(broker.server());
    let stop = watch::Sender::new(false);
    let mut restless = Vec::new();
    for member in members(&world).await {
        restless.push(start_restless(
            member,
            &world,
            seed.split(),
            stop.subscribe(),
        ));
    }

    for publisher in publishers(&world, 200) {
        publisher.await.unwrap();
    }
    stop.send_replace(true);
    let mut members = Vec::new();
    for member in restless {
        members.push(member.await.unwrap());
    }
    let members = world.settle_group(members).await;

    world.check_group(&members);
}

/// The same, and the broker is killed again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_group_loses_nothing_when_the_broker_is_killed() {
    let mut seed = Seed::new();
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let stop = watch::Sender::new(false);
    let mut restless = Vec::new();
    for member in members(&world).await {
        restless.push(start_restless(
            member,
            &world,
            seed.split(),
            stop.subscribe(),
        ));
    }
    let rounds = rounds(4);

    let publishers = publishers(&world, u32::try_from(60 * rounds).unwrap());
    for _ in 0..rounds {
        let enough = world.progress().acknowledged + seed.between(20, 300);
        world.wait_until(|now| now.acknowledged >= enough).await;
        broker.crash_and_restart();
    }
    for publisher in publishers {
        publisher.await.unwrap();
    }
    stop.send_replace(true);
    let mut members = Vec::new();
    for member in restless {
        members.push(member.await.unwrap());
    }
    let members = world.settle_group(members).await;

    world.check_group(&members);
}

/// Messages wait for the group while all its members are offline.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_group_gets_what_was_published_while_all_members_were_offline() {
    let mut broker = Broker::start();
    let world = World::new(broker.server());
    let members = members(&world).await;

    for publisher in publishers(&world, 60) {
        publisher.await.unwrap();
    }
    broker.crash_and_restart();
    let members = world.settle_group(members).await;

    world.check_group(&members);
}

/// A QoS 2 exchange must be finished with the member it was begun with, and is begun once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_4_8_2_5_a_member_that_comes_back_gets_its_qos_2_messages_once() {
    for crashes in [false, true] {
        let mut broker = Broker::start();
        let world = World::new(broker.server());
        let member = Subscriber::member("alone", Version::V5);
        let mut member = member.register(&world).await;
        let publisher = Publisher {
            qos: &[2],
            ..Publisher::new(1, Version::V5, 10)
        };
        publisher.start(&world).await.unwrap();

        for number in 0..20 {
            member.step(&world, number % 2 == 0).await.unwrap();
        }
        member.disconnect(&world).await.unwrap();
        if crashes {
            broker.crash_and_restart();
        }
        let members = world.settle_group(vec![member]).await;
        let members = world.settle_group(members).await;

        world.check_group(&members);
    }
}
