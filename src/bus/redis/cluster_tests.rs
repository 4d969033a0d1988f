//! The bus on a Redis Cluster.

use redis::cluster_routing::Slot;

use super::*;
use crate::bus::INTERRUPTION;
use crate::bus::contract::{self, frame, take, to, wait_for};
use crate::bus::redis_server::{RedisCluster, RedisServer};

/// Two nodes whose channels are at these masters: that of node 1, that of node 2, the one for all.
async fn two_nodes(redis: &RedisCluster, places: [usize; 3]) -> [RedisBus; 2] {
    let location = Location::parse(&redis.url()).unwrap();
    let servers = location.find().await.unwrap();
    let are_there = |cluster: &String| {
        let channels = Channels::new(cluster, 1, true);
        let destinations = [Destination::Node(1), Destination::Node(2), Destination::All];
        destinations.map(|to| servers.place_of(&channels.of(to))) == places
    };
    let mut names = (0..).map(|number| format!("test-{number}"));
    let cluster = names.find(are_there).unwrap();
    [1, 2].map(|node| RedisBus::new(location.clone(), &cluster, node))
}

/// Sends a frame again and again until it comes.
async fn go_on(
    bus: &RedisBus,
    destination: Destination,
    number: u32,
    at: &mut mpsc::Receiver<Bytes>,
) {
    loop {
        let _ = bus.send(to(destination, number..number + 1)).await;
        if timeout(RESEND_INTERVAL, wait_for(at, number)).await.is_ok() {
            return;
        }
    }
}

const RESEND_INTERVAL: Duration = Duration::from_millis(50);

#[tokio::test]
async fn it_is_a_bus() {
    let redis = RedisCluster::start().await;
    // Neighbours are never at the same master: their numbers differ too little.
    for places in [[0, 1, 2], [0, 1, 0], [1, 2, 2], [2, 0, 1]] {
        let [one, two] = two_nodes(&redis, places).await;
        contract::frames_for_each_destination_come_in_order(&one, &two).await;
        let [one, _] = two_nodes(&redis, places).await;
        contract::large_frames_come_whole(&one).await;
    }
}

#[tokio::test]
async fn it_says_how_many_listen_at_whatever_master() {
    let redis = RedisCluster::start().await;
    let [one, two] = two_nodes(&redis, [0, 1, 2]).await;
    let mut at_one = one.subscribe().await.unwrap();
    let mut at_two = two.subscribe().await.unwrap();

    let destinations = [2, 0, 3, 1, 0, 2].map(|node| match node {
        0 => Destination::All,
        node => Destination::Node(node),
    });
    let frames = destinations.map(|to| (to, frame(7)));
    assert_eq!(one.publish(&frames).await.unwrap(), [1, 2, 0, 1, 2, 1]);
    take(&mut at_one, 3).await;
    take(&mut at_two, 4).await;
}

#[tokio::test]
async fn a_restarted_master_is_found_again() {
    let mut redis = RedisCluster::start().await;
    let [one, two] = two_nodes(&redis, [0, 1, 2]).await;
    let mut at_one = one.subscribe().await.unwrap();
    let mut at_two = two.subscribe().await.unwrap();

    for (number, master) in (0..).zip(0..3) {
        redis.masters[master].kill();
        while at_one.recv().await.unwrap() != INTERRUPTION {}
        one.send(to(Destination::Node(2), 0..1)).await.unwrap_err();
        redis.masters[master].start_again();
        go_on(&one, Destination::Node(2), 10 * number + 1, &mut at_two).await;
        go_on(&two, Destination::All, 10 * number + 2, &mut at_one).await;
        go_on(&two, Destination::Node(1), 10 * number + 3, &mut at_one).await;
    }
}

#[tokio::test]
async fn a_frozen_master_is_noticed_without_sending() {
    let redis = RedisCluster::start().await;
    let [one, _] = two_nodes(&redis, [0, 1, 2]).await;
    let mut frames = one.subscribe().await.unwrap();

    // The second has no channel of this node.
    for (number, master) in (0..).zip(&redis.masters) {
        master.freeze();
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        one.send(to(Destination::All, 0..1)).await.unwrap_err();
        master.thaw();
        go_on(&one, Destination::All, 10 + number, &mut frames).await;
    }
}

#[tokio::test]
async fn a_listener_that_a_master_cuts_off_comes_back() {
    let redis = RedisCluster::start().await;
    let [one, _] = two_nodes(&redis, [0, 1, 2]).await;
    let mut frames = one.subscribe().await.unwrap();

    for (number, master) in [(0, 0), (1, 2)] {
        let kill = ["CLIENT", "KILL", "TYPE", "pubsub"];
        redis.masters[master].command(&kill).await;
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        go_on(&one, Destination::Node(1), 2 * number, &mut frames).await;
        go_on(&one, Destination::All, 2 * number + 1, &mut frames).await;
    }
}

#[tokio::test]
async fn channels_that_move_to_another_master_are_found_again() {
    let redis = RedisCluster::start().await;
    let [one, two] = two_nodes(&redis, [0, 1, 2]).await;
    let mut at_one = one.subscribe().await.unwrap();
    let mut at_two = two.subscribe().await.unwrap();
    let slot = async |destination| {
        let channel = one.channels.of(destination);
        redis.masters[0]
            .ask::<u16>(&["CLUSTER", "KEYSLOT", &channel])
            .await
            .unwrap()
    };

    // Whoever listens there is told.
    redis.move_slot(slot(Destination::All).await, 2, 0).await;
    assert_eq!(at_one.recv().await.unwrap(), INTERRUPTION);
    assert_eq!(at_two.recv().await.unwrap(), INTERRUPTION);
    go_on(&one, Destination::All, 1, &mut at_one).await;
    go_on(&two, Destination::All, 2, &mut at_one).await;

    // Whoever publishes there is refused.
    redis
        .move_slot(slot(Destination::Node(2)).await, 1, 2)
        .await;
    while at_two.recv().await.unwrap() != INTERRUPTION {}
    two.health().wait_until_up().await;
    one.send(to(Destination::Node(2), 0..1)).await.unwrap_err();
    while at_one.recv().await.unwrap() != INTERRUPTION {}
    go_on(&one, Destination::Node(2), 3, &mut at_two).await;
}

/// So would one that is cut off from the others, and that the others have replaced.
#[tokio::test]
async fn a_cluster_that_is_down_is_left() {
    let redis = RedisCluster::start().await;
    let [one, _] = two_nodes(&redis, [0, 1, 2]).await;
    let mut frames = one.subscribe().await.unwrap();
    let unused = {
        let used = [Destination::Node(1), Destination::Node(2), Destination::All];
        let used = used.map(|to| Slot::for_key(one.channels.of(to)));
        let unused = (0..).find(|slot| !used.contains(&Slot::new(*slot).unwrap()));
        unused.unwrap().to_string()
    };

    redis.masters[0]
        .command(&["CLUSTER", "DELSLOTS", &unused])
        .await;
    assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
    one.send(to(Destination::All, 0..1)).await.unwrap_err();
    redis.masters[0]
        .command(&["CLUSTER", "ADDSLOTS", &unused])
        .await;
    go_on(&one, Destination::All, 1, &mut frames).await;
}

#[tokio::test]
async fn seeds_are_asked_one_after_the_other() {
    let redis = RedisCluster::start().await;
    let nowhere = {
        let mut killed = RedisServer::start();
        killed.kill();
        killed.address()
    };
    let alone = RedisServer::start();
    let member = redis.masters[1].address();
    let url = |seeds: &[&str]| format!("redis+cluster://:secret@{}", seeds.join(","));
    let found = |url: String| async move { Location::parse(&url).unwrap().find().await };

    let servers = found(url(&[&nowhere, &alone.address(), &member]))
        .await
        .unwrap();
    let mut addresses: Vec<_> = servers
        .iter()
        .map(|server| server.addr().to_string())
        .collect();
    addresses.sort();
    let mut expected: Vec<_> = redis.masters.iter().map(RedisServer::address).collect();
    expected.sort();
    assert_eq!(addresses, expected);
    for bad in [
        url(&[&nowhere, &alone.address()]),
        format!("redis+cluster://:wrong@{member}"),
    ] {
        assert!(found(bad).await.is_err());
    }
}
