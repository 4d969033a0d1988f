//! What `$SYS` tells of a cluster.

use std::collections::BTreeSet;

use crate::client::Client;
use crate::mongod::Database;
use crate::node::Cluster;
use crate::wire::{Connect, Version};

/// Takes messages until the topic has had this text, and returns the topics that there were.
async fn wait_for(watcher: &mut Client, topic: &str, text: &str) -> BTreeSet<String> {
    let mut topics = BTreeSet::new();
    loop {
        let message = watcher.message().await.unwrap();
        topics.insert(message.topic.clone());
        if message.topic == topic && message.text() == text {
            return topics;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_tells_the_figures_of_all_together_and_of_each() {
    let database = Database::shared();
    let mut settings = [database.settings(), database.settings()];
    for settings in &mut settings {
        settings.push(("sys.interval".to_owned(), "1s".to_owned()));
    }
    let mut cluster = Cluster::start(settings.to_vec()).await;
    let connect = |client_id| Connect::persistent(Version::V5, client_id);
    let [one, two] = [0, 1].map(|node| cluster.node(node).address());
    let mut watcher = Client::connect(one, &connect("watcher")).await;
    watcher.subscribe("$SYS/broker/clients/#", 0).await.unwrap();
    watcher.subscribe("$SYS/nodes/#", 0).await.unwrap();
    wait_for(&mut watcher, "$SYS/broker/clients/connected", "1").await;

    let _elsewhere = Client::connect(two, &connect("elsewhere")).await;
    wait_for(&mut watcher, "$SYS/broker/clients/connected", "2").await;
    wait_for(&mut watcher, "$SYS/nodes/node-1/clients/connected", "1").await;
    wait_for(&mut watcher, "$SYS/nodes/node-2/clients/connected", "1").await;

    cluster.node(1).kill();
    // There is nobody who could say so any more.
    wait_for(&mut watcher, "$SYS/nodes/node-2/clients/connected", "").await;
    wait_for(&mut watcher, "$SYS/broker/clients/connected", "1").await;
}
