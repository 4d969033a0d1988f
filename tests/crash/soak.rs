//! Everything at once, for a while: nothing may be left behind.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;
use std::{env, io};

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::broker::Broker;
use crate::client::Client;
use crate::seed::Seed;
use crate::wire::{Connect, Publish, Version, Will};

/// The allocator keeps some memory, and the database fills its caches during the first minutes.
const SLACK_MIB: u64 = 60;

const CLIENTS: u64 = 8;

/// Clients of all kinds come, subscribe, publish, and leave politely or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_come_and_go_leave_nothing_behind() {
    let mut seed = Seed::new();
    let seconds = env::var("MIDGE_TEST_SOAK_SECONDS").map_or(20, |text| {
        text.parse().expect("MIDGE_TEST_SOAK_SECONDS is a number")
    });
    let half = Duration::from_secs(seconds) / 2;
    let broker = Broker::start_with(&[("sys.interval", "1s")]);
    let address = broker.address();
    let before = figures(address, |_| true).await;

    run_clients(address, &mut seed, half).await;
    let first = broker.memory_mib();
    run_clients(address, &mut seed, half).await;
    let second = broker.memory_mib();

    assert!(
        second <= first + SLACK_MIB,
        "{first} MiB after the first half, {second} MiB after the second"
    );
    // All sessions were ended by a clean start, or with their connection.
    figures(address, |figures| {
        ["clients/total", "subscriptions/count"]
            .iter()
            .all(|name| figures[*name] == before[*name])
    })
    .await;
}

/// The figures below `$SYS/broker`, as soon as they please.
async fn figures(
    address: SocketAddr,
    please: impl Fn(&HashMap<String, u64>) -> bool,
) -> HashMap<String, u64> {
    let connect = Connect::fleeting(Version::V5, "figures");
    let mut client = Client::connect(address, &connect).await;
    let mut figures = HashMap::new();
    let mut messages = client.subscribe("$SYS/broker/#", 0).await.unwrap();
    let end = Instant::now() + crate::lines::DEADLINE;
    loop {
        for message in messages.drain(..) {
            let name = message.topic.trim_start_matches("$SYS/broker/").to_owned();
            if let Ok(value) = message.text().parse() {
                figures.insert(name, value);
            }
        }
        // The last of a round of figures, so that they are of the same moment.
        let is_round = figures.remove("retained messages/count").is_some();
        let is_whole = is_round && figures.contains_key("subscriptions/count");
        if is_whole && figures.get("clients/connected") == Some(&1) && please(&figures) {
            return figures;
        }
        assert!(Instant::now() < end, "something is left: {figures:?}");
        messages.push(client.message().await.unwrap());
    }
}

async fn run_clients(address: SocketAddr, seed: &mut Seed, duration: Duration) {
    let end = Instant::now() + duration;
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let mut seed = seed.split();
        clients.spawn(async move {
            while Instant::now() < end {
                visit(address, number, &mut seed).await.unwrap();
            }
            let connect = Connect::fleeting(Version::V5, &format!("soak-{number}"));
            let client = Client::connect(address, &connect).await;
            client.disconnect().await.unwrap();
        });
    }
    clients.join_all().await;
}

/// One connection of one client.
async fn visit(address: SocketAddr, number: u64, seed: &mut Seed) -> io::Result<()> {
    let version = [Version::V311, Version::V5][usize::from(seed.percent(50))];
    let name = format!("soak-{number}");
    let mut connect = if seed.percent(60) {
        Connect::persistent(version, &name)
    } else {
        Connect::fleeting(version, &name)
    };
    connect.will = seed.percent(30).then(|| Will {
        topic: "soak/will".to_owned(),
        payload: name,
        qos: 1,
        delay_interval: 0,
    });
    let mut client = Client::try_connect(address, &connect).await?;
    let filters = ["soak/+", "soak/#", "$share/group/soak/#", "soak/1"];
    let filter = filters[seed.below(4) as usize];
    let qos = seed.below(3) as u8;
    let mut received = client.subscribe(filter, qos).await?;
    for _ in 0..seed.below(40) {
        let topic = format!("soak/{}", seed.below(5));
        let mut publish = Publish::new(&topic, &"payload ".repeat(50), seed.below(3) as u8);
        publish.retain = seed.percent(10);
        client.publish(&publish).await?;
        received.extend(client.ping().await?);
    }
    // Some of what was received is acknowledged, the rest stays for the next connection.
    for message in received.iter().filter(|_| seed.percent(70)) {
        client.acknowledge(message).await?;
    }
    match seed.below(3) {
        0 => Ok(()),
        1 => client.unsubscribe(filter).await,
        _ => client.disconnect().await,
    }
}
