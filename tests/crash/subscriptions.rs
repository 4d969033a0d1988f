//! Subscriptions survive as soon as they are acknowledged, and so does their end.

use crate::broker::Broker;
use crate::client::Client;
use crate::seed::rounds;
use crate::wire::{Connect, Publish, Version};

/// I7 on one node, and across a crash right after SUBACK and UNSUBACK.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_subscribe_and_unsubscribe_survive_a_crash() {
    let mut broker = Broker::start();
    let publisher = Connect::fleeting(Version::V5, "publisher");
    for round in 0..rounds(3) {
        for version in [Version::V311, Version::V5] {
            let name = format!("{version:?}-{round}");
            let connect = Connect::persistent(version, &name);
            let mut client = Client::connect(broker.address(), &connect).await;
            for filter in ["kept", "ended"] {
                let filter = format!("{name}/{filter}/+");
                client.subscribe(&filter, 1).await.unwrap();
            }
            broker.crash_and_restart();

            let mut client = Client::connect(broker.address(), &connect).await;
            assert!(client.session_present);
            let filter = format!("{name}/ended/+");
            client.unsubscribe(&filter).await.unwrap();
            broker.crash_and_restart();

            let mut other = Client::connect(broker.address(), &publisher).await;
            for topic in ["ended/1", "kept/1"] {
                let publish = Publish::new(&format!("{name}/{topic}"), "", 1);
                other.publish(&publish).await.unwrap();
            }
            let mut client = Client::connect(broker.address(), &connect).await;
            assert!(client.session_present);
            assert_eq!(
                client.message().await.unwrap().topic,
                format!("{name}/kept/1")
            );
        }
    }
}
