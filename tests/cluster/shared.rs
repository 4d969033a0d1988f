//! Share groups whose members are connected to several nodes: each message goes to one of them,
//! whoever leaves and whatever fails.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::client::Client;
use crate::mongod::Database;
use crate::node::{Cluster, Settings};
use crate::redis::{self, Redis};
use crate::seed::Seed;
use crate::traffic::{Publisher, Subscriber, World};
use crate::wire::{Answer, Connect, DISCONNECT, PINGREQ, Packet, Publish, Version};
use crate::workload::version;

const GROUP: &str = "$share/group/jobs/#";

/// On MongoDB alone.
async fn start_without_redis(nodes: usize) -> Cluster {
    let database = Database::shared();
    Cluster::start((0..nodes).map(|_| database.settings()).collect()).await
}

/// A member that takes over what it gets, to the end of each exchange.
struct Member {
    client: Client,
    /// Exchanges of QoS 2 between PUBREC and PUBCOMP.
    unreleased: usize,
}

impl Member {
    async fn join(cluster: &mut Cluster, node: usize, connect: &Connect) -> Self {
        let mut client = Client::connect(cluster.node(node).address(), connect).await;
        client.subscribe(GROUP, 2).await.unwrap();
        Self {
            client,
            unreleased: 0,
        }
    }

    async fn take(&mut self, packet: Packet) -> Option<u32> {
        match packet {
            Packet::Publish(publish) => {
                self.unreleased += usize::from(publish.qos == 2);
                self.client.acknowledge(&publish).await.unwrap();
                Some(publish.text().parse().unwrap())
            }
            Packet::Answer(Answer::PubRel, id, _) => {
                self.unreleased -= 1;
                let answer = Answer::PubComp.encode(id);
                self.client.send(&answer).await.unwrap();
                None
            }
            other => panic!("{other:?}"),
        }
    }

    /// Fails if it is sent anything more.
    async fn expect_nothing_more(&mut self) {
        while self.unreleased > 0 {
            let packet = self.client.receive().await.unwrap();
            assert_eq!(self.take(packet).await, None);
        }
        self.client.send(&PINGREQ).await.unwrap();
        assert_eq!(self.client.receive().await.unwrap(), Packet::PingResp);
    }
}

async fn publisher(cluster: &mut Cluster, node: usize) -> Client {
    let connect = Connect::fleeting(Version::V5, &format!("publisher-{node}"));
    Client::connect(cluster.node(node).address(), &connect).await
}

async fn publish_all(publisher: &mut Client, qos: u8, numbers: std::ops::Range<u32>) {
    for number in numbers {
        let publish = Publish::new("jobs/1", &number.to_string(), qos);
        publisher.publish(&publish).await.unwrap();
    }
}

/// Receives until all of `missing` have come to one of the members; each must come once. Returns how
/// many came to each.
async fn receive_all(members: &mut [&mut Member], mut missing: BTreeSet<u32>) -> Vec<usize> {
    let mut counts = vec![0; members.len()];
    while !missing.is_empty() {
        let receiving = members.iter_mut();
        let receiving = receiving.map(|member| Box::pin(member.client.receive()));
        let (packet, place, others) = futures_util::future::select_all(receiving).await;
        drop(others);
        if let Some(number) = members[place].take(packet.unwrap()).await {
            assert!(missing.remove(&number), "{number} comes twice");
            counts[place] += 1;
        }
    }
    for member in members {
        member.expect_nothing_more().await;
    }
    counts
}

async fn members_share(cluster: &mut Cluster) {
    for (round, connect) in [Connect::persistent, Connect::fleeting]
        .into_iter()
        .enumerate()
    {
        let one = connect(Version::V5, &format!("one-{round}"));
        let two = connect(Version::V311, &format!("two-{round}"));
        let mut one = Member::join(cluster, 0, &one).await;
        let mut two = Member::join(cluster, 1, &two).await;
        for node in [0, 1] {
            let mut publisher = publisher(cluster, node).await;
            for qos in [1, 2] {
                publish_all(&mut publisher, qos, 0..40).await;
                let members = &mut [&mut one, &mut two];
                let counts = receive_all(members, (0..40).collect()).await;
                assert!(counts.iter().all(|count| *count >= 10), "{counts:?}");
            }
        }
        one.client.unsubscribe(GROUP).await.unwrap();
        two.client.unsubscribe(GROUP).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_4_8_2_members_at_different_nodes_share() {
    let redis = Redis::start();
    let mut cluster = redis::start(2, &redis).await;
    members_share(&mut cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_4_8_2_members_at_different_nodes_share_without_redis() {
    let mut cluster = start_without_redis(2).await;
    members_share(&mut cluster).await;
}

/// QoS 0 goes to whoever is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_qos_0_are_shared() {
    let redis = Redis::start();
    let mut cluster = redis::start(2, &redis).await;
    let one = Connect::fleeting(Version::V5, "one");
    let mut one = Member::join(&mut cluster, 0, &one).await;
    let two = Connect::fleeting(Version::V5, "two");
    let mut two = Member::join(&mut cluster, 1, &two).await;
    for node in [0, 1] {
        let mut publisher = publisher(&mut cluster, node).await;
        publish_all(&mut publisher, 0, 0..20).await;
        let members = &mut [&mut one, &mut two];
        let received = receive_all(members, (0..20).collect());
        let counts = timeout(Duration::from_secs(20), received).await;
        assert_eq!(counts.expect("none is lost"), [10, 10]);
    }
}

/// [MQTT-4.8.2-6]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_leaves_unacknowledged_goes_to_another_node() {
    let redis = Redis::start();
    let mut cluster = redis::start(2, &redis).await;
    for (round, (first, second)) in [(0, 1), (1, 0)].into_iter().enumerate() {
        let silent = Connect::persistent(Version::V5, &format!("silent-{round}"));
        let mut silent = Member::join(&mut cluster, first, &silent).await;
        let mut publisher = publisher(&mut cluster, second).await;
        publish_all(&mut publisher, 1, 0..10).await;
        for number in 0..10 {
            let Packet::Publish(publish) = silent.client.receive().await.unwrap() else {
                panic!("messages come");
            };
            assert_eq!(publish.text(), number.to_string());
        }
        let other = Connect::persistent(Version::V5, &format!("other-{round}"));
        let mut other = Member::join(&mut cluster, second, &other).await;
        if round == 0 {
            drop(silent);
        } else {
            silent.client.send(&DISCONNECT).await.unwrap();
        }

        receive_all(&mut [&mut other], (0..10).collect()).await;
        other.client.unsubscribe(GROUP).await.unwrap();
    }
}

/// A message that is half-way to a member by QoS 2 is for that one alone, [MQTT-4.8.2-4], wherever it
/// comes back, and whether or not its node lives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_4_8_2_4_an_exchange_of_qos_2_is_finished_with_its_member() {
    for (round, is_killed) in [false, true].into_iter().enumerate() {
        let redis = Redis::start();
        let mut cluster = redis::start(3, &redis).await;
        let connect = Connect::persistent(Version::V5, &format!("member-{round}"));
        let mut member = Member::join(&mut cluster, 0, &connect).await;
        let mut publisher = publisher(&mut cluster, 1).await;
        publish_all(&mut publisher, 2, 0..1).await;
        let Packet::Publish(publish) = member.client.receive().await.unwrap() else {
            panic!("a message comes");
        };
        member.client.acknowledge(&publish).await.unwrap();
        let released = member.client.receive().await.unwrap();
        assert_eq!(
            released,
            Packet::Answer(Answer::PubRel, publish.packet_id, 0)
        );
        let other = Connect::persistent(Version::V5, &format!("other-{round}"));
        let mut other = Member::join(&mut cluster, 1, &other).await;
        if is_killed {
            cluster.node(0).kill();
        } else {
            drop(member);
        }

        // Whoever is left gets what comes later, and that alone.
        publish_all(&mut publisher, 2, 1..2).await;
        receive_all(&mut [&mut other], BTreeSet::from([1])).await;
        let mut member = Client::connect(cluster.node(2).address(), &connect).await;
        assert!(member.session_present);
        let released = member.receive().await.unwrap();
        assert_eq!(
            released,
            Packet::Answer(Answer::PubRel, publish.packet_id, 0)
        );
        let completed = Answer::PubComp.encode(publish.packet_id);
        member.send(&completed).await.unwrap();
        assert!(member.ping().await.unwrap().is_empty());
        other.expect_nothing_more().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_has_stays_with_it_when_another_node_dispatches() {
    for is_killed in [false, true] {
        let redis = Redis::start();
        let mut cluster = redis::start(3, &redis).await;
        // Its node dispatches the group until nobody is there.
        let first = Connect::fleeting(Version::V5, "first");
        let first = Member::join(&mut cluster, 0, &first).await;
        let holder = Connect::persistent(Version::V5, "holder");
        let mut holder = Member::join(&mut cluster, 1, &holder).await;
        first.client.disconnect().await.unwrap();
        let mut publisher = publisher(&mut cluster, 1).await;
        publish_all(&mut publisher, 1, 0..10).await;
        publish_all(&mut publisher, 2, 10..20).await;
        let mut held = Vec::new();
        while held.len() < 20 {
            held.push(holder.client.receive().await.unwrap());
        }
        let other = Connect::persistent(Version::V311, "other");
        let mut other = Member::join(&mut cluster, 2, &other).await;
        if is_killed {
            cluster.node(0).kill();
        } else {
            assert!(cluster.node(0).terminate().success());
        }

        publish_all(&mut publisher, 1, 20..40).await;
        receive_all(&mut [&mut holder, &mut other], (20..40).collect()).await;
        for (packet, number) in held.into_iter().zip(0..) {
            assert_eq!(holder.take(packet).await, Some(number));
        }
        holder.expect_nothing_more().await;
        other.expect_nothing_more().await;
    }
}

/// Messages wait for the group, wherever its members come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_while_all_are_offline_waits_for_the_group() {
    let redis = Redis::start();
    let mut cluster = redis::start(3, &redis).await;
    let one = Connect::persistent(Version::V5, "one");
    let two = Connect::persistent(Version::V311, "two");
    for (node, connect) in [(0, &one), (1, &two)] {
        let member = Member::join(&mut cluster, node, connect).await;
        member.client.disconnect().await.unwrap();
    }
    let mut publisher = publisher(&mut cluster, 0).await;
    publish_all(&mut publisher, 1, 0..20).await;
    publish_all(&mut publisher, 2, 20..40).await;

    let client = Client::connect(cluster.node(2).address(), &two).await;
    let mut member = Member {
        client,
        unreleased: 0,
    };
    receive_all(&mut [&mut member], (0..40).collect()).await;
}

async fn members(world: &World) -> Vec<Subscriber> {
    let mut members = Vec::new();
    for number in 0..4 {
        let member = Subscriber::member(&format!("member-{number}"), version(number));
        members.push(member.register(world).await);
    }
    members
}

/// Leaves messages unacknowledged, leaves with and without a word, and comes back anywhere.
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
                _ = member.step(&world, seed.percent(95)) => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
            if seed.percent(3) {
                if seed.percent(50) {
                    // Its node may be killed meanwhile.
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

/// Of each publisher, in each of its streams.
const MESSAGES: u32 = 150;

/// Restless members and publishers, while `disturb` does what it does.
async fn share_while<D: AsyncFnOnce(&mut Cluster, &Arc<World>, &mut Seed)>(
    mut cluster: Cluster,
    mut seed: Seed,
    disturb: D,
) {
    let world = World::across(cluster.servers(), seed.split());
    let stop = watch::Sender::new(false);
    let mut restless = Vec::new();
    for member in members(&world).await {
        let seed = seed.split();
        restless.push(start_restless(member, &world, seed, stop.subscribe()));
    }
    let publishers = [Version::V5, Version::V311].into_iter().zip(1..);
    let publishers = publishers.map(|(version, number)| {
        let publisher = Publisher {
            stay: u32::try_from(seed.between(50, 300)).unwrap(),
            ..Publisher::new(number, version, MESSAGES)
        };
        publisher.start(&world)
    });
    let publishers: Vec<_> = publishers.collect();

    disturb(&mut cluster, &world, &mut seed).await;
    for publisher in publishers {
        publisher.await.unwrap();
    }
    stop.send_replace(true);
    let mut members = Vec::new();
    for member in restless {
        members.push(member.await.unwrap());
    }
    let members = world.settle_group_of_cluster(members).await;

    world.check_group_of_cluster(&members);
}

async fn wait_for_percent(world: &World, percent: u64) {
    let enough = u64::from(MESSAGES) * 2 * 4 * percent / 100;
    world.wait_until(|now| now.acknowledged >= enough).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_loses_nothing_when_members_move() {
    let redis = Redis::start();
    let cluster = redis::start(3, &redis).await;
    share_while(cluster, Seed::new(), async |_, _, _| {}).await;
}

/// One of them dispatches.
async fn kill_all_in_turn(cluster: &mut Cluster, world: &Arc<World>, seed: &mut Seed) {
    for node in 0..3 {
        let percent = 25 * node as u64;
        wait_for_percent(world, percent + seed.between(5, 25)).await;
        cluster.node(node).kill();
        wait_for_percent(world, percent + 25).await;
        cluster.node(node).start_again();
    }
}

/// Scenario 32.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_loses_nothing_when_its_dispatcher_is_killed() {
    let redis = Redis::start();
    let cluster = redis::start(3, &redis).await;
    share_while(cluster, Seed::new(), kill_all_in_turn).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_without_redis_loses_nothing_when_its_dispatcher_is_killed() {
    let cluster = start_without_redis(3).await;
    share_while(cluster, Seed::new(), kill_all_in_turn).await;
}

/// Nodes that leave in good order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_loses_nothing_when_nodes_are_restarted() {
    let redis = Redis::start();
    let cluster = redis::start(3, &redis).await;
    share_while(
        cluster,
        Seed::new(),
        async |cluster: &mut Cluster, world: &Arc<World>, _: &mut Seed| {
            for node in 0..3 {
                wait_for_percent(world, 20 * (node as u64 + 1)).await;
                assert!(cluster.node(node).terminate().success());
                cluster.node(node).start_again();
            }
        },
    )
    .await;
}

/// What is lost on the way is told again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_loses_nothing_when_redis_is_killed() {
    let mut redis = Redis::start();
    let cluster = redis::start(3, &redis).await;
    share_while(
        cluster,
        Seed::new(),
        async |cluster: &mut Cluster, world: &Arc<World>, seed: &mut Seed| {
            wait_for_percent(world, seed.between(5, 30)).await;
            redis.kill();
            wait_for_percent(world, seed.between(30, 50)).await;
            redis.start_again();
            // There is nobody to cut off before.
            for node in 0..3 {
                cluster.node(node).wait_for_events("bus_up", 2);
            }
            wait_for_percent(world, seed.between(50, 80)).await;
            redis.cut_off_listeners().await;
        },
    )
    .await;
}

/// A group's messages are written all the same: nobody knows in time who gets them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_loses_nothing_when_nodes_elide() {
    let redis = Redis::start();
    let database = Database::shared();
    let settings = (0..3).map(|_| {
        let mut settings: Settings = redis::settings(&database, redis.address());
        settings.push(("store.write_elision".to_owned(), "true".to_owned()));
        settings
    });
    let cluster = Cluster::start(settings.collect()).await;
    share_while(cluster, Seed::new(), kill_all_in_turn).await;
}
