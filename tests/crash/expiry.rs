//! What ends while the broker is down.

use std::time::Duration;

use crate::broker::Broker;
use crate::client::Client;
use crate::wills::downtime;
use crate::wire::{Connect, Publish, Version};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_and_messages_that_expire_while_the_broker_is_down_are_gone() {
    let mut broker = Broker::start();
    let short = Connect {
        expiry_interval: 1,
        ..Connect::persistent(Version::V5, "short")
    };
    let long = Connect::persistent(Version::V5, "long");
    for connect in [&short, &long] {
        let mut client = Client::connect(broker.address(), connect).await;
        client.subscribe("expiry", 1).await.unwrap();
        client.disconnect().await.unwrap();
    }
    let connect = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(broker.address(), &connect).await;
    for (text, expiry_interval) in [("long", None), ("short", Some(1)), ("long", None)] {
        let publish = Publish {
            expiry_interval,
            ..Publish::new("expiry", text, 1)
        };
        publisher.publish(&publish).await.unwrap();
    }
    let retained = Publish {
        expiry_interval: Some(1),
        ..Publish::new("retained", "short", 1).retained()
    };
    publisher.publish(&retained).await.unwrap();
    broker.crash();
    downtime(Duration::from_millis(1100)).await;
    broker.start_again();

    let client = Client::connect(broker.address(), &short).await;
    assert!(!client.session_present);
    let mut client = Client::connect(broker.address(), &long).await;
    assert!(client.session_present);
    for _ in 0..2 {
        assert_eq!(client.message().await.unwrap().text(), "long");
    }
    client.subscribe("retained", 1).await.unwrap();
    assert_eq!(client.ping().await.unwrap(), []);
}

/// A session that was connected when the broker died expires as if its client had left then or at
/// the start; until that it waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_was_connected_waits_for_its_client_after_a_crash() {
    let mut broker = Broker::start();
    let connect = Connect {
        expiry_interval: 60,
        ..Connect::persistent(Version::V5, "connected")
    };
    let client = Client::connect(broker.address(), &connect).await;
    broker.crash_and_restart();

    drop(client);
    let client = Client::connect(broker.address(), &connect).await;
    assert!(client.session_present);
}
