//! Wills, when it is the broker that dies.

use std::time::Duration;

use crate::broker::Broker;
use crate::client::Client;
use crate::wire::{Connect, Publish, Version, Will};

/// Gets every Will, in a session that lasts.
async fn watcher(broker: &Broker) -> Client {
    let connect = Connect::persistent(Version::V5, "watcher");
    let mut watcher = Client::connect(broker.address(), &connect).await;
    if !watcher.session_present {
        watcher.subscribe("will/#", 1).await.unwrap();
    }
    watcher
}

fn with_will(name: &str, expiry_interval: u32, delay_interval: u32) -> Connect {
    Connect {
        expiry_interval,
        will: Some(Will {
            topic: format!("will/{name}"),
            payload: name.to_owned(),
            qos: 1,
            delay_interval,
        }),
        ..Connect::persistent(Version::V5, name)
    }
}

/// The Wills that were published until now: the watcher's own mark comes behind them. Afterwards
/// their acknowledgement is durable.
async fn wills_until_now(watcher: &mut Client) -> Vec<String> {
    // Another identifier: its PUBACK may come when that of the message below is waited for.
    let mark = Publish {
        packet_id: 2,
        ..Publish::new("will/mark", "mark", 1)
    };
    watcher.send(&mark.encode(Version::V5)).await.unwrap();
    let mut wills = Vec::new();
    loop {
        let message = watcher.message().await.unwrap();
        if message.text() == "mark" {
            break;
        }
        wills.push(message.text().to_owned());
    }
    watcher.ping().await.unwrap();
    let written = Publish::new("written", "behind", 1).retained();
    watcher.publish(&written).await.unwrap();
    wills
}

/// I8, for sessions that last and sessions that end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_will_of_a_client_that_does_not_come_back_after_a_crash_is_published_once() {
    let mut broker = Broker::start();
    drop(watcher(&broker).await);
    let returns = with_will("returns", u32::MAX, 0);
    let lasting = with_will("lasting", u32::MAX, 0);
    let fleeting = with_will("fleeting", 0, 0);
    let mut clients = Vec::new();
    for connect in [&returns, &lasting, &fleeting] {
        clients.push(Client::connect(broker.address(), connect).await);
    }
    broker.crash_and_restart();

    let _returned = Client::connect(broker.address(), &returns).await;
    let mut watcher_again = watcher(&broker).await;
    let mut wills = Vec::new();
    for _ in 0..2 {
        wills.push(watcher_again.message().await.unwrap().text().to_owned());
    }
    wills.sort();
    assert_eq!(wills, ["fleeting", "lasting"]);
    assert!(wills_until_now(&mut watcher_again).await.is_empty());

    // Now there is nobody left who could be waited for, but the one that is connected.
    broker.crash_and_restart();
    let mut watcher_again = watcher(&broker).await;
    assert_eq!(watcher_again.message().await.unwrap().text(), "returns");
    assert!(wills_until_now(&mut watcher_again).await.is_empty());
}

/// I8, with a delay that ends while the broker is down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_will_that_is_due_while_the_broker_is_down_is_published_once() {
    let mut broker = Broker::start();
    let mut first_watcher = watcher(&broker).await;
    first_watcher
        .subscribe("$SYS/+/disconnect/clients", 0)
        .await
        .unwrap();
    let client = Client::connect(broker.address(), &with_will("delayed", u32::MAX, 1)).await;
    drop(client);
    while first_watcher.message().await.unwrap().text() != "delayed" {}
    // Behind this, that the client has gone is durable as well.
    assert!(wills_until_now(&mut first_watcher).await.is_empty());
    broker.crash();
    downtime(Duration::from_millis(1100)).await;
    broker.start_again();

    let mut watcher = watcher(&broker).await;
    assert_eq!(watcher.message().await.unwrap().text(), "delayed");
    assert!(wills_until_now(&mut watcher).await.is_empty());
    broker.crash_and_restart();
    let mut watcher = self::watcher(&broker).await;
    assert!(wills_until_now(&mut watcher).await.is_empty());
}

/// A client that sees its connection closed after DISCONNECT may take its Will for discarded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mqtt_3_14_4_3_a_will_that_disconnect_discarded_is_not_published_after_a_crash() {
    let mut broker = Broker::start();
    drop(watcher(&broker).await);
    for expiry_interval in [0, u32::MAX] {
        let connect = with_will(&format!("polite-{expiry_interval}"), expiry_interval, 0);
        let client = Client::connect(broker.address(), &connect).await;
        client.disconnect().await.unwrap();
    }
    let rude = Client::connect(broker.address(), &with_will("rude", 0, 0)).await;
    broker.crash_and_restart();

    // It is due when the others would be.
    let mut watcher = watcher(&broker).await;
    assert_eq!(watcher.message().await.unwrap().text(), "rude");
    assert!(wills_until_now(&mut watcher).await.is_empty());
    drop(rude);
}

/// The one thing here that takes time: an interval has to pass while no broker runs.
pub(crate) async fn downtime(interval: Duration) {
    tokio::time::sleep(interval).await;
}
