//! Section 3.3: PUBLISH.

use crate::support::{Broker, Kind, Publish, V3_1, V3_1_1, V5, Version, both_versions, property};

both_versions! {
    a_message_reaches_every_subscriber_and_nobody_else,
    a_client_receives_its_own_messages,
    payload_is_delivered_byte_for_byte,
    empty_payload_is_delivered,
    large_payload_is_delivered,
    mqtt_3_3_1_2_dup_of_the_publisher_is_not_forwarded,
    mqtt_3_3_1_12_retain_is_0_for_an_established_subscription,
    mqtt_3_3_2_2_wildcards_in_a_topic_name_end_the_connection,
    mqtt_4_7_3_1_empty_topic_name_ends_the_connection,
    publish_to_nobody_is_acknowledged,
    publisher_may_end_at_once_after_qos0,
}

fn a_message_reaches_every_subscriber_and_nobody_else(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect(version, "first");
    first.subscribe("t", 0);
    let mut second = broker.connect(version, "second");
    second.subscribe("t", 1);
    let mut other = broker.connect(version, "other");
    other.subscribe("other", 0);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish_acknowledged("t", "to two", 1);
    publisher.publish_acknowledged("other", "to one", 1);

    first.expect_publish("t", "to two");
    second.accept_publish("t", "to two");
    other.expect_publish("other", "to one");
}

#[test]
fn clients_of_all_versions_talk_to_each_other() {
    let broker = Broker::start();
    let mut clients =
        [V3_1, V3_1_1, V5].map(|version| broker.connect(version, &format!("{version:?}")));
    for client in &mut clients {
        client.subscribe("t", 1);
    }

    for publisher in [V3_1, V3_1_1, V5] {
        broker.connect(publisher, "publisher").publish_acknowledged(
            "t",
            &format!("from {publisher:?}"),
            1,
        );
        for client in &mut clients {
            client.accept_publish("t", &format!("from {publisher:?}"));
        }
    }
}

fn a_client_receives_its_own_messages(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t", 0);

    client.publish_acknowledged("t", "own", 0);

    client.expect_publish("t", "own");
}

fn payload_is_delivered_byte_for_byte(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t", 0);
    let payload: Vec<u8> = (0..=255).collect();

    client.publish(&Publish::from_bytes(b"t", &payload));

    assert_eq!(client.expect(Kind::Publish).payload, payload);
}

fn empty_payload_is_delivered(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t", 1);

    client.publish_acknowledged("t", "", 1);

    client.accept_publish("t", "");
}

fn large_payload_is_delivered(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let payload = "x".repeat(500_000);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", &payload, 1);

    let message = subscriber.expect(Kind::Publish);
    assert!(message.text() == payload, "{} bytes", message.payload.len());
}

fn mqtt_3_3_1_2_dup_of_the_publisher_is_not_forwarded(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish(&Publish::new("t", "again").qos(1, 1).dup());

    assert!(
        !subscriber.accept_publish("t", "again").dup(),
        "[MQTT-3.3.1-3]"
    );
    publisher.expect_puback(1, 0);
}

fn mqtt_3_3_1_12_retain_is_0_for_an_established_subscription(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 0);

    broker
        .connect(version, "publisher")
        .publish_retained("t", "live", 0);

    assert!(!subscriber.expect_publish("t", "live").retain());
}

fn mqtt_3_3_2_2_wildcards_in_a_topic_name_end_the_connection(version: Version) {
    let broker = Broker::start();
    for topic in ["#", "+", "a/#", "a/+/b", "a+", "a#b"] {
        let mut client = broker.connect(version, "c");

        client.publish(&Publish::new(topic, "x"));

        client.expect_disconnect_with(&[0x90, 0x81, 0x82]);
    }
}

fn mqtt_4_7_3_1_empty_topic_name_ends_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.publish(&Publish::new("", "x"));

    client.expect_disconnect_with(&[0x82, 0x81, 0x90]);
}

fn publish_to_nobody_is_acknowledged(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.publish(&Publish::new("nobody", "x").qos(1, 1));
    let puback = client.expect(Kind::PubAck);
    client.publish(&Publish::new("nobody", "x").qos(2, 2));
    let pubrec = client.expect(Kind::PubRec);

    for acknowledgement in [puback, pubrec] {
        assert!(
            matches!(acknowledgement.reason(), 0x00 | 0x10),
            "{acknowledgement:?}"
        );
    }
}

fn publisher_may_end_at_once_after_qos0(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 0);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish(&Publish::new("t", "parting"));
    publisher.drop_connection();

    subscriber.expect_publish("t", "parting");
}

#[test]
fn mqtt_3_3_2_11_topic_alias_stands_for_its_topic() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("#", 0);
    let mut publisher = broker.connect(V5, "publisher");

    publisher.publish(&Publish::new("long/topic", "1").property(property::topic_alias(1)));
    publisher.publish(&Publish::new("", "2").property(property::topic_alias(1)));
    publisher.publish(&Publish::new("other/topic", "3").property(property::topic_alias(1)));
    publisher.publish(&Publish::new("", "4").property(property::topic_alias(1)));

    subscriber.expect_publish("long/topic", "1");
    subscriber.expect_publish("long/topic", "2");
    subscriber.expect_publish("other/topic", "3");
    let last = subscriber.expect_publish("other/topic", "4");
    assert_eq!(
        last.value(property::TOPIC_ALIAS),
        None,
        "an alias is between two parties only"
    );
}

#[test]
fn mqtt_3_3_2_12_every_topic_alias_up_to_the_maximum_is_accepted() {
    let broker = Broker::start_with(&[("limits.topic_alias_maximum", "20")]);
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("#", 0);
    let (mut publisher, connack) =
        broker.connect_with(&crate::support::Connect::new(V5, "publisher"));
    assert_eq!(connack.number(property::TOPIC_ALIAS_MAXIMUM), Some(20));

    for alias in 1..=20 {
        publisher.publish(
            &Publish::new(&format!("t/{alias}"), "a").property(property::topic_alias(alias)),
        );
    }
    for alias in 1..=20 {
        publisher.publish(&Publish::new("", "b").property(property::topic_alias(alias)));
    }

    for alias in 1..=20 {
        subscriber.expect_publish(&format!("t/{alias}"), "a");
    }
    for alias in 1..=20 {
        subscriber.expect_publish(&format!("t/{alias}"), "b");
    }
}

#[test]
fn mqtt_3_3_2_8_topic_alias_0_is_invalid() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.publish(&Publish::new("t", "x").property(property::topic_alias(0)));

    client.expect_disconnect_with(&[0x94, 0x82]);
}

#[test]
fn mqtt_3_3_2_9_topic_alias_above_the_maximum_is_invalid() {
    let broker = Broker::start_with(&[("limits.topic_alias_maximum", "20")]);
    let mut client = broker.connect(V5, "c");

    client.publish(&Publish::new("t", "x").property(property::topic_alias(21)));

    client.expect_disconnect(0x94);
}

#[test]
fn topic_alias_without_a_topic_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.publish(&Publish::new("", "x").property(property::topic_alias(1)));

    client.expect_disconnect_with(&[0x82, 0x94]);
}

#[test]
fn mqtt_3_3_2_7_topic_aliases_end_with_the_connection() {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(V5, "c", false);
    client.publish(&Publish::new("t", "x").property(property::topic_alias(1)));
    client.disconnect();

    let mut client = broker.connect_persistent(V5, "c", true);
    client.publish(&Publish::new("", "x").property(property::topic_alias(1)));

    client.expect_disconnect_with(&[0x82, 0x94]);
}

#[test]
fn topic_aliases_of_two_clients_are_apart() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("#", 0);
    let mut first = broker.connect(V5, "first");
    let mut second = broker.connect(V5, "second");
    first.complete(
        Publish::new("first", "1").property(property::topic_alias(1)),
        0,
    );
    second.complete(
        Publish::new("second", "2").property(property::topic_alias(1)),
        0,
    );

    first.complete(Publish::new("", "3").property(property::topic_alias(1)), 0);

    subscriber.expect_publish("first", "1");
    subscriber.expect_publish("second", "2");
    subscriber.expect_publish("first", "3");
}

#[test]
fn topic_alias_works_for_qos_1_and_2() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(V5, "publisher");

    publisher.complete(Publish::new("t", "1").property(property::topic_alias(3)), 1);
    publisher.complete(Publish::new("", "2").property(property::topic_alias(3)), 2);

    subscriber.accept_publish("t", "1");
    subscriber.accept_publish("t", "2");
}
