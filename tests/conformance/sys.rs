//! `$SYS`: what the broker says of itself, and Mosca's events.

use serde_json::{Value, json};

use crate::support::{Broker, Client, Kind, V5, Version, both_versions};

both_versions! {
    sys_version_is_sent_on_subscribing,
    sys_topics_are_published_at_intervals,
    mqtt_4_7_2_1_sys_topics_are_not_matched_by_wildcards,
    clients_do_not_publish_to_sys,
    new_clients_event_has_the_client_id,
    disconnect_clients_event_has_the_client_id,
    new_subscribes_event_names_client_and_topic,
    new_unsubscribes_event_names_client_and_topic,
}

/// A broker by the name of `n1`, and an observer of one of its events.
#[track_caller]
fn observe(version: Version, event: &str) -> (Broker, Client, String) {
    let broker = Broker::start_with(&[("node.name", "n1")]);
    let mut observer = broker.connect(version, "observer");
    let topic = format!("$SYS/n1/{event}");
    observer.subscribe(&topic, 0);
    (broker, observer, topic)
}

fn sys_version_is_sent_on_subscribing(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.subscribe("$SYS/broker/version", 0);

    let message = client.expect(Kind::Publish);
    assert_eq!(message.topic, "$SYS/broker/version");
    assert!(
        message.text().contains(env!("CARGO_PKG_VERSION")),
        "{}",
        message.text()
    );
    assert!(message.retain());
}

fn sys_topics_are_published_at_intervals(version: Version) {
    let broker = Broker::start_with(&[("sys.interval", "1s")]);
    let mut client = broker.connect(version, "c");
    client.subscribe("$SYS/broker/uptime", 0);

    // The retained one, or the first of those that come at intervals.
    let first = client.expect(Kind::Publish);
    let second = client.expect(Kind::Publish);

    assert_eq!(first.topic, "$SYS/broker/uptime");
    assert_ne!(first.text(), second.text());
}

fn mqtt_4_7_2_1_sys_topics_are_not_matched_by_wildcards(version: Version) {
    let broker = Broker::start_with(&[("sys.interval", "1s")]);
    let mut client = broker.connect(version, "c");
    client.subscribe_all(&[("#", 0), ("+/broker/version", 0), ("+/#", 0)], &[]);

    broker.wait_for_keep_alive_timeout();

    client.publish_acknowledged("marker", "x", 0);
    client.expect_publish("marker", "x");
}

fn clients_do_not_publish_to_sys(version: Version) {
    let broker = Broker::start();
    let mut observer = broker.connect(version, "observer");
    observer.subscribe("$SYS/forged", 0);
    observer.subscribe("marker", 0);
    let mut forger = broker.connect(version, "forger");

    forger.publish(&crate::support::Publish::new("$SYS/forged", "x").retain());
    forger.drop_connection();

    broker
        .connect(version, "publisher")
        .publish_acknowledged("marker", "x", 0);
    observer.expect_publish("marker", "x");
    let mut late = broker.connect(version, "late");
    late.subscribe("$SYS/forged", 0);
    late.expect_nothing();
}

#[test]
fn publish_to_sys_is_refused_with_a_reason() {
    let broker = Broker::start();
    let mut forger = broker.connect(V5, "forger");

    forger.publish(&crate::support::Publish::new("$SYS/forged", "x").qos(1, 1));

    forger.expect_puback(1, 0x87);
}

fn new_clients_event_has_the_client_id(version: Version) {
    let (broker, mut observer, topic) = observe(version, "new/clients");

    let _client = broker.connect(version, "newcomer");

    observer.expect_publish(&topic, "newcomer");
}

fn disconnect_clients_event_has_the_client_id(version: Version) {
    let (broker, mut observer, topic) = observe(version, "disconnect/clients");

    broker.connect(version, "in order").disconnect();
    observer.expect_publish(&topic, "in order");
    broker.connect(version, "lost").drop_connection();
    observer.expect_publish(&topic, "lost");
}

#[track_caller]
fn expect_subscription_event(observer: &mut Client, topic: &str, client_id: &str, filter: &str) {
    let message = observer.expect(Kind::Publish);
    assert_eq!(message.topic, topic);
    let event: Value = serde_json::from_str(&message.text()).expect("JSON");
    assert_eq!(event, json!({ "clientId": client_id, "topic": filter }));
}

fn new_subscribes_event_names_client_and_topic(version: Version) {
    let (broker, mut observer, topic) = observe(version, "new/subscribes");
    // Its own subscription may or may not be among what it sees.
    let mut client = broker.connect(version, "c");

    client.subscribe("a/+/b", 1);

    loop {
        let message = observer.expect(Kind::Publish);
        assert_eq!(message.topic, topic);
        let event: Value = serde_json::from_str(&message.text()).expect("JSON");
        if event["clientId"] != "observer" {
            assert_eq!(event, json!({ "clientId": "c", "topic": "a/+/b" }));
            break;
        }
    }
}

fn new_unsubscribes_event_names_client_and_topic(version: Version) {
    let (broker, mut observer, topic) = observe(version, "new/unsubscribes");
    let mut client = broker.connect(version, "c");
    client.subscribe("a/b", 1);

    client.unsubscribe(&["a/b"]);

    expect_subscription_event(&mut observer, &topic, "c", "a/b");
}
