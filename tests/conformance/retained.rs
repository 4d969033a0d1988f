//! Section 3.3.1.3: retained messages.

use crate::support::{Broker, Client, Publish, V5, Version, both_versions, property};

both_versions! {
    mqtt_3_3_1_5_retained_message_is_sent_to_a_new_subscription_with_retain_1,
    mqtt_3_3_1_5_last_retained_message_replaces_the_one_before,
    mqtt_3_3_1_6_empty_payload_removes_the_retained_message,
    mqtt_3_3_1_7_empty_payload_is_not_retained,
    mqtt_3_3_1_8_message_without_retain_leaves_the_retained_message,
    message_that_removes_a_retained_one_is_delivered,
    qos0_message_is_retained,
    retained_message_is_delivered_with_the_lower_qos,
    retained_messages_of_a_wildcard_subscription_come_once_each,
    retained_messages_are_per_topic,
    retained_messages_outlive_the_session_of_their_publisher,
    retained_messages_survive_a_restart,
    retained_messages_survive_a_crash,
    removed_retained_message_stays_removed_after_a_crash,
    retained_messages_come_only_to_the_one_that_subscribes,
}

#[track_caller]
fn subscribe_anew(broker: &Broker, version: Version, filter: &str, qos: u8) -> Client {
    let mut client = broker.connect(version, "late");
    client.subscribe(filter, qos);
    client
}

fn mqtt_3_3_1_5_retained_message_is_sent_to_a_new_subscription_with_retain_1(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "kept", 1);

    let mut late = subscribe_anew(&broker, version, "t", 1);

    let message = late.accept_publish("t", "kept");
    assert_eq!(
        (message.retain(), message.qos(), message.dup()),
        (true, 1, false)
    );
    late.expect_nothing();
}

fn mqtt_3_3_1_5_last_retained_message_replaces_the_one_before(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    for (payload, qos) in [("first", 2), ("second", 1), ("last", 0)] {
        publisher.publish_retained("t", payload, qos);
    }

    let mut late = subscribe_anew(&broker, version, "t", 2);

    assert_eq!(late.accept_publish("t", "last").qos(), 0);
    late.expect_nothing();
}

fn mqtt_3_3_1_6_empty_payload_removes_the_retained_message(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t", "kept", 1);
    publisher.publish_retained("t", "", 1);

    let mut late = subscribe_anew(&broker, version, "t", 1);

    late.expect_nothing();
}

fn mqtt_3_3_1_7_empty_payload_is_not_retained(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "", 1);

    let mut late = subscribe_anew(&broker, version, "#", 1);

    late.expect_nothing();
}

fn mqtt_3_3_1_8_message_without_retain_leaves_the_retained_message(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t", "kept", 1);
    publisher.publish_acknowledged("t", "passing", 1);
    publisher.publish_acknowledged("t", "", 1);

    let mut late = subscribe_anew(&broker, version, "t", 1);

    late.accept_publish("t", "kept");
}

fn message_that_removes_a_retained_one_is_delivered(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t", "kept", 1);
    let mut subscriber = subscribe_anew(&broker, version, "t", 1);
    subscriber.accept_publish("t", "kept");

    publisher.publish_retained("t", "", 1);

    assert!(!subscriber.accept_publish("t", "").retain());
}

fn qos0_message_is_retained(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "kept", 0);

    let mut late = subscribe_anew(&broker, version, "t", 2);

    assert_eq!(late.expect_publish("t", "kept").qos(), 0);
}

fn retained_message_is_delivered_with_the_lower_qos(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    for published in [0, 1, 2] {
        publisher.publish_retained("t", "kept", published);
        for granted in [0, 1, 2] {
            let mut late = subscribe_anew(&broker, version, "t", granted);

            assert_eq!(
                late.accept_publish("t", "kept").qos(),
                published.min(granted)
            );
        }
    }
}

fn retained_messages_of_a_wildcard_subscription_come_once_each(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    for topic in ["t", "t/a", "t/b", "t/a/c", "other"] {
        publisher.publish_retained(topic, topic, 1);
    }

    let mut late = subscribe_anew(&broker, version, "t/#", 1);

    let mut topics = ["", "", "", ""].map(|_| {
        let message = late.expect(crate::support::Kind::Publish);
        assert!(message.retain());
        late.send_puback(message.id);
        message.topic
    });
    topics.sort();
    assert_eq!(topics, ["t", "t/a", "t/a/c", "t/b"]);
    late.expect_nothing();
}

fn retained_messages_are_per_topic(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t/a", "a", 1);
    publisher.publish_retained("t/b", "b", 1);
    publisher.publish_retained("t/a", "", 1);

    let mut late = subscribe_anew(&broker, version, "t/+", 1);

    late.accept_publish("t/b", "b");
    late.expect_nothing();
}

fn retained_messages_outlive_the_session_of_their_publisher(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t", "kept", 1);
    publisher.disconnect();

    let mut late = subscribe_anew(&broker, version, "t", 1);

    late.accept_publish("t", "kept");
}

fn retained_messages_survive_a_restart(version: Version) {
    let mut broker = Broker::start();
    retain_three(&broker, version);

    broker.restart();

    expect_three(&broker, version);
}

fn retained_messages_survive_a_crash(version: Version) {
    let mut broker = Broker::start();
    retain_three(&broker, version);

    broker.crash_and_restart();

    expect_three(&broker, version);
}

#[track_caller]
fn retain_three(broker: &Broker, version: Version) {
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("a", "replaced", 1);
    publisher.publish_retained("b", "1", 1);
    publisher.publish_retained("c", "2", 2);
    publisher.publish_retained("a", "last", 1);
}

#[track_caller]
fn expect_three(broker: &Broker, version: Version) {
    let mut late = broker.connect(version, "late");
    for (topic, payload, qos) in [("a", "last", 1), ("b", "1", 1), ("c", "2", 2)] {
        late.subscribe(topic, 2);
        let message = late.accept_publish(topic, payload);
        assert_eq!((message.retain(), message.qos()), (true, qos));
    }
}

fn removed_retained_message_stays_removed_after_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_retained("t", "kept", 1);
    publisher.publish_retained("t", "", 1);

    broker.crash_and_restart();

    subscribe_anew(&broker, version, "t", 1).expect_nothing();
}

fn retained_messages_come_only_to_the_one_that_subscribes(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "kept", 1);
    let mut early = broker.connect(version, "early");
    early.subscribe("t", 1);
    early.accept_publish("t", "kept");

    let mut late = subscribe_anew(&broker, version, "t", 1);
    late.accept_publish("t", "kept");

    early.expect_nothing();
}

#[test]
fn retained_message_keeps_its_properties() {
    let broker = Broker::start();
    let properties = [
        property::content_type("text/plain"),
        property::response_topic("answer"),
        property::correlation_data(b"id"),
        property::user_property("a", "1"),
        property::user_property("a", "2"),
    ];
    let publish = properties
        .iter()
        .cloned()
        .fold(Publish::new("t", "kept").retain(), Publish::property);
    broker.connect(V5, "publisher").complete(publish, 1);

    let mut late = subscribe_anew(&broker, V5, "t", 1);

    let message = late.accept_publish("t", "kept");
    for expected in &properties {
        assert!(
            message.properties.contains(expected),
            "{expected:?} in {message:?}"
        );
    }
}

#[test]
fn mqtt_3_3_2_6_expiry_of_a_retained_message_is_counted_down() {
    let broker = Broker::start();
    let publish = Publish::new("t", "kept")
        .retain()
        .property(property::message_expiry(100));
    broker.connect(V5, "publisher").complete(publish, 1);

    broker.wait_for_keep_alive_timeout();

    let mut late = subscribe_anew(&broker, V5, "t", 1);
    let left = late
        .accept_publish("t", "kept")
        .number(property::MESSAGE_EXPIRY_INTERVAL);
    assert!(
        left.is_some_and(|left| (1..=99).contains(&left)),
        "{left:?} seconds left"
    );
}

#[test]
fn mqtt_3_3_2_5_expired_retained_message_is_not_sent() {
    let broker = Broker::start();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.complete(
        Publish::new("t", "short")
            .retain()
            .property(property::message_expiry(1)),
        1,
    );

    broker.wait_for_keep_alive_timeout();

    subscribe_anew(&broker, V5, "t", 1).expect_nothing();
}

#[test]
fn retained_message_to_a_dollar_topic_is_not_sent_to_a_wildcard_subscription() {
    let broker = Broker::start();
    broker
        .connect(V5, "publisher")
        .publish_retained("$private/t", "hidden", 0);

    let mut late = subscribe_anew(&broker, V5, "#", 0);
    late.expect_nothing();

    late.subscribe("$private/#", 0);
    late.expect_publish("$private/t", "hidden");
}
