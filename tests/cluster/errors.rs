//! What nodes make of the errors of MongoDB: those that pass, those that an operator has to mend, and
//! those that leave it open whether something was written.

use std::time::Duration;

use mongodb::bson::{Bson, Document, doc};

use crate::client::Client;
use crate::mongod::{Database, ReplicaSet};
use crate::node::Cluster;
use crate::seed::{Seed, rounds};
use crate::wire::{Answer, Connect, Packet, Publish, Version};
use crate::workload::{Size, Workload};

/// The name by which servers know the nodes.
const NODES: &str = "nodes";

async fn start(nodes: usize, database: &Database) -> Cluster {
    let database = database.named(NODES);
    Cluster::start((0..nodes).map(|_| database.settings()).collect()).await
}

/// A way for a command to fail: before it has done anything, afterwards, or nobody knows.
struct Way {
    how: Document,
    /// Of a command to fail.
    probability: f64,
}

fn ways() -> Vec<Way> {
    let fails = |code: i32| doc! { "errorCode": code };
    let is_not_replicated = |code: i32| {
        let reason = "not replicated, or not known to be";
        doc! { "writeConcernError": { "code": code, "errmsg": reason } }
    };
    // InternalError, Unauthorized, ExceededTimeLimit, TemporarilyUnavailable, OutOfDiskSpace.
    let at_once = [1, 13, 262, 365, 14_031].map(fails);
    // WriteConcernFailed.
    let at_once = at_once.into_iter().chain([is_not_replicated(64)]);
    // ShutdownInProgress, PrimarySteppedDown, InterruptedDueToReplStateChange: a driver looks for
    // the primary, for a second or so, before it tries again.
    let later = [91, 189, 11_602].map(fails).into_iter();
    let later = later.chain([91, 189].map(is_not_replicated));
    let later = later.chain([doc! { "closeConnection": true }]);
    let at_once = at_once.map(|how| Way {
        how,
        probability: 0.1,
    });
    let later = later.map(|how| Way {
        how,
        probability: 0.02,
    });
    at_once.chain(later).collect()
}

/// Scenarios 14 and 36: commands fail now and then, and each time in another way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_to_mongodb_fail_in_all_ways() {
    let mut seed = Seed::new();
    let mut set = ReplicaSet::start(1).await;
    let cluster = start(2, &Database::on(set.uri())).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    let mut ways = ways();
    let writes = ["insert", "update", "delete", "commitTransaction"];
    let (from, to) = (5, 90);
    let count = rounds(4).min(ways.len() as u64);
    for step in 0..count {
        let place = usize::try_from(seed.below(ways.len() as u64)).unwrap();
        let Way { how, probability } = ways.swap_remove(place);
        eprintln!("{how}");
        let mut commands = writes.to_vec();
        if how.contains_key("errorCode") {
            // Of those that write, a retry is the driver's own business.
            commands.extend(["find", "findAndModify", "abortTransaction"]);
        }
        let sometimes = doc! { "activationProbability": probability };
        let server = set.mongod(0);
        server.fail(NODES, &commands, sometimes, how).await;
        workload
            .wait_for_percent(from + (to - from) * step / count)
            .await;
    }
    set.mongod(0).fail(NODES, &writes, "off", doc! {}).await;

    workload.finish().await;
}

/// Scenario 36: nothing is acknowledged, nobody is disconnected, and all of it goes on when somebody
/// has mended it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_wait_while_the_disk_is_full_and_while_they_have_no_rights() {
    let mut set = ReplicaSet::start(1).await;
    let mut cluster = start(2, &Database::on(set.uri())).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(1).address(), &subscriber).await;
    subscriber.subscribe("news", 2).await.unwrap();
    let publisher = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;

    let writes = ["insert", "update", "commitTransaction"];
    let out_of_disk_space: Bson = 14_031.into();
    let unauthorized: Bson = 13.into();
    for (number, code) in (1..).zip([out_of_disk_space, unauthorized]) {
        let server = set.mongod(0);
        let how = doc! { "errorCode": code };
        server.fail(NODES, &writes, "alwaysOn", how).await;
        for (packet_id, qos) in [(1, 1), (2, 2)] {
            let publish = Publish {
                packet_id,
                ..Publish::new("news", &format!("{number}"), qos)
            };
            publisher.send(&publish.encode(Version::V5)).await.unwrap();
        }
        // Twice: what follows the first attempt is an attempt of the same.
        cluster
            .node(0)
            .wait_for_events("store_unavailable", 2 * number);
        let early = tokio::time::timeout(Duration::from_millis(100), publisher.receive()).await;
        assert!(early.is_err(), "acknowledged: {early:?}");

        let server = set.mongod(0);
        server.fail(NODES, &writes, "off", doc! {}).await;
        cluster.node(0).wait_for_events("store_available", number);
        for _ in 0..2 {
            match publisher.receive().await.unwrap() {
                Packet::Answer(Answer::PubAck, 1, 0) => {}
                Packet::Answer(Answer::PubRec, 2, 0) => {
                    publisher.send(&Answer::PubRel.encode(2)).await.unwrap();
                    let completed = publisher.receive().await.unwrap();
                    assert_eq!(completed, Packet::Answer(Answer::PubComp, 2, 0));
                }
                other => panic!("{other:?}"),
            }
        }
        let mut received = Vec::new();
        while received.len() < 2 {
            let message = subscriber.message().await.unwrap();
            assert_eq!(message.text(), number.to_string());
            received.push(message.qos);
        }
        received.sort_unstable();
        assert_eq!(received, [1, 2]);
    }
}

/// Scenario 36: what was in the database is gone with it, but nothing is acknowledged that is nowhere, and the
/// nodes make it anew and serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_is_dropped_while_nodes_run() {
    let database = Database::shared();
    let mut cluster = start(2, &database).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut before = Client::connect(cluster.node(1).address(), &subscriber).await;
    before.subscribe("news", 1).await.unwrap();
    let publisher = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    let publish = Publish {
        packet_id: 1,
        ..Publish::new("news", "1", 1)
    };
    publisher.publish(&publish).await.unwrap();

    database.remove().await;
    publisher.send(&publish.encode(Version::V5)).await.unwrap();
    while let Ok(packet) = publisher.receive().await {
        assert!(!matches!(packet, Packet::Answer(..)), "acknowledged");
    }
    for node in 0..2 {
        cluster.node(node).wait_until_anew();
    }

    let mut after = Client::connect(cluster.node(1).address(), &subscriber).await;
    assert!(!after.session_present);
    after.subscribe("news", 1).await.unwrap();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(0).address(), &publisher).await;
    publisher.publish(&publish).await.unwrap();
    assert_eq!(after.message().await.unwrap().text(), "1");
}
