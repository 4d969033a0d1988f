//! Retained messages survive as soon as they are acknowledged, and so does their removal.

use std::collections::HashMap;
use std::io;

use crate::broker::Broker;
use crate::client::Client;
use crate::seed::{Seed, rounds};
use crate::wire::{Connect, Publish, Version};

/// Always there, so that whoever asks for it last knows that nothing else follows.
const LAST_TOPIC: &str = "last";

async fn retained(broker: &Broker) -> HashMap<String, u64> {
    let connect = Connect::fleeting(Version::V5, "reader");
    let mut client = Client::connect(broker.address(), &connect).await;
    let mut messages = client.subscribe("retained/#", 1).await.unwrap();
    messages.extend(client.subscribe(LAST_TOPIC, 1).await.unwrap());
    while messages.last().is_none_or(|last| last.topic != LAST_TOPIC) {
        messages.push(client.message().await.unwrap());
    }
    messages.pop();
    messages
        .into_iter()
        .map(|message| (message.topic.clone(), message.text().parse().unwrap()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_retained_messages_survive_a_crash_and_so_does_their_removal() {
    let mut seed = Seed::new();
    let mut broker = Broker::start();
    let connect = Connect::fleeting(Version::V311, "writer");
    // For each topic the value that was acknowledged last and the one that was sent last; 0 for none.
    let mut values: HashMap<String, (u64, u64)> = HashMap::new();
    let mut value = 0;
    let last = Publish::new(LAST_TOPIC, "0", 1).retained();
    let mut writer = Client::connect(broker.address(), &connect).await;
    writer.publish(&last).await.unwrap();
    for _ in 0..rounds(4) {
        let mut writer = Client::connect(broker.address(), &connect).await;
        for _ in 0..seed.between(20, 100) {
            value += 1;
            let topic = format!("retained/{}", seed.below(10));
            set(&mut writer, &mut seed, &mut values, &topic, value)
                .await
                .unwrap();
        }
        // One that may or may not be there afterwards.
        value += 1;
        let topic = format!("retained/{}", seed.below(10));
        let publish = Publish::new(&topic, &value.to_string(), 1).retained();
        values.entry(topic).or_default().1 = value;
        writer.send(&publish.encode(Version::V311)).await.unwrap();
        broker.crash_and_restart();

        let found = retained(&broker).await;
        for (topic, (acknowledged, sent)) in &mut values {
            let found = found.get(topic).copied().unwrap_or(0);
            assert!(
                found == *acknowledged || found == *sent,
                "{topic} has {found}, not {acknowledged} or {sent}"
            );
            (*acknowledged, *sent) = (found, found);
        }
    }
}

/// Sets or clears a retained message, and waits for the acknowledgement.
async fn set(
    writer: &mut Client,
    seed: &mut Seed,
    values: &mut HashMap<String, (u64, u64)>,
    topic: &str,
    value: u64,
) -> io::Result<()> {
    let (value, text) = if seed.percent(30) {
        (0, String::new())
    } else {
        (value, value.to_string())
    };
    let publish = Publish::new(topic, &text, 1).retained();
    writer.publish(&publish).await?;
    values.insert(topic.to_owned(), (value, value));
    Ok(())
}
