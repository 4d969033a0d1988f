//! The workload and the nodes themselves, on a node that has a store of its own.

use tempfile::TempDir;

use crate::node::{Cluster, Settings};
use crate::seed::Seed;
use crate::workload::{Size, Workload};

fn settings(directory: &TempDir) -> Settings {
    let path = directory.path().join("data").to_str().unwrap().to_owned();
    vec![("store.path".to_owned(), path)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_frozen_killed_and_stopped_keeps_its_promises() {
    let mut seed = Seed::new();
    let directory = TempDir::new().unwrap();
    let mut cluster = Cluster::start(vec![settings(&directory)]).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 20)).await;
    cluster.node(0).freeze();
    cluster.node(0).thaw();
    workload.wait_for_percent(seed.between(20, 50)).await;
    cluster.node(0).kill();
    cluster.node(0).start_again();
    workload.wait_for_percent(seed.between(50, 80)).await;
    assert!(cluster.node(0).terminate().success());
    cluster.node(0).start_again();

    workload.finish().await;
}
