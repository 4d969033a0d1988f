//! Nodes on one database: what clients see while they move, and while nodes and servers fail.

use crate::mongod::{Database, ReplicaSet};
use crate::node::{Cluster, Settings};
use crate::proxy::Proxy;
use crate::seed::Seed;
use crate::workload::{Size, Workload};

async fn start(nodes: usize, database: &Database) -> Cluster {
    let settings: Vec<Settings> = (0..nodes).map(|_| database.settings()).collect();
    Cluster::start(settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes() {
    let mut seed = Seed::new();
    let cluster = start(3, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    workload.finish().await;
}

/// Scenarios 1 and 2: whoever publishes or subscribes at the node goes on at another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_killed_and_another_starts() {
    let mut seed = Seed::new();
    let mut cluster = start(3, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 30)).await;
    cluster.node(0).kill();
    workload.wait_for_percent(seed.between(30, 50)).await;
    cluster.node(1).kill();
    cluster.node(0).start_again();
    workload.wait_for_percent(seed.between(50, 80)).await;
    cluster.node(1).start_again();

    workload.finish().await;
}

/// Scenario 3: nothing but MongoDB knows what there was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_are_killed_at_once() {
    let mut seed = Seed::new();
    let mut cluster = start(2, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 80)).await;
    cluster.node(0).kill();
    cluster.node(1).kill();
    cluster.node(0).start_again();
    cluster.node(1).start_again();

    workload.finish().await;
}

/// Scenario 4: a node that sleeps is declared dead, and finds out when it wakes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_frozen_is_fenced_and_starts_anew() {
    let mut seed = Seed::new();
    let mut cluster = start(2, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 50)).await;
    cluster.node(0).freeze();
    cluster.node(1).wait_for_event("node_dead");
    cluster.node(0).thaw();
    cluster.node(0).wait_until_anew();

    workload.finish().await;
}

/// Nodes that leave in good order, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_restarted_one_by_one() {
    let mut seed = Seed::new();
    let mut cluster = start(3, &Database::shared()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    for node in 0..3 {
        workload.wait_for_percent(20 * (node as u64 + 1)).await;
        assert!(cluster.node(node).terminate().success());
        cluster.node(node).start_again();
    }

    workload.finish().await;
}

/// Scenario 12.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_steps_down_and_is_killed() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(3).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 30)).await;
    set.step_down().await;
    workload.wait_for_percent(seed.between(30, 60)).await;
    let primary = set.primary().await;
    set.mongod(primary).kill();
    workload.wait_for_percent(seed.between(60, 90)).await;
    set.mongod(primary).start_again();

    workload.finish().await;
}

/// Scenario 15: nobody is declared dead, and everything goes on afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_is_away_for_a_while() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(1).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 60)).await;
    set.mongod(0).kill();
    set.mongod(0).start_again();

    workload.finish().await;
}

/// Scenario 16: the other node takes over, and nothing that the first one still tries counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_cut_off_from_mongodb() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let proxy = Proxy::start(set.mongod(0).address()).await;
    let settings = vec![database.through(&proxy).settings(), database.settings()];
    let mut cluster = Cluster::start(settings).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(10, 50)).await;
    proxy.cut();
    cluster.node(1).wait_for_event("node_dead");
    proxy.restore();
    cluster.node(0).wait_until_anew();

    workload.finish().await;
}
