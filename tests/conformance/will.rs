//! Sections 3.1.2.5 to 3.1.2.7 and 3.1.3.2: the Will Message.

use tokio::time::{Duration, Instant};

use crate::support::{
    Broker, Client, Connect, V3_1_1, V5, Value, Version, Will, both_versions, property, wire,
};

both_versions! {
    mqtt_3_1_2_8_will_is_published_when_the_connection_is_lost,
    mqtt_3_1_2_8_will_is_published_after_a_keep_alive_timeout,
    mqtt_3_1_2_8_will_is_published_after_a_protocol_error,
    mqtt_3_1_2_8_will_is_published_after_a_malformed_packet,
    mqtt_3_1_2_8_will_is_published_when_another_connection_takes_over,
    mqtt_3_1_2_8_will_is_published_once,
    mqtt_3_1_2_9_will_is_published_with_its_qos,
    mqtt_3_1_2_10_will_of_an_earlier_connection_is_forgotten,
    mqtt_3_1_2_14_will_without_retain_is_not_retained,
    mqtt_3_1_2_15_will_with_retain_is_retained,
    mqtt_3_14_4_3_normal_disconnect_discards_the_will,
    empty_will_payload_is_published,
    will_with_retain_and_empty_payload_clears_the_retained_message,
    will_topic_with_wildcards_is_refused,
    will_reaches_a_persistent_session_that_is_offline,
}

fn observer(broker: &Broker, version: Version, qos: u8) -> Client {
    let mut observer = broker.connect(version, "observer");
    observer.subscribe("will", qos);
    observer
}

fn mqtt_3_1_2_8_will_is_published_when_the_connection_is_lost(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "gone")));

    client.drop_connection();

    let will = observer.expect_publish("will", "gone");
    assert!(!will.retain());
}

fn mqtt_3_1_2_8_will_is_published_after_a_keep_alive_timeout(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let connect = Connect::new(version, "c")
        .keep_alive(1)
        .will(Will::new("will", "silent"));

    let (_client, _) = broker.connect_with(&connect);

    observer.expect_publish("will", "silent");
}

fn mqtt_3_1_2_8_will_is_published_after_a_protocol_error(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let connect = Connect::new(version, "c").will(Will::new("will", "wrong"));
    let (mut client, _) = broker.connect_with(&connect);

    client.send(&connect.bytes());

    observer.expect_publish("will", "wrong");
}

fn mqtt_3_1_2_8_will_is_published_after_a_malformed_packet(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (mut client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "garbage")));

    client.send(&[0x00, 0x00]);

    observer.expect_publish("will", "garbage");
}

fn mqtt_3_1_2_8_will_is_published_when_another_connection_takes_over(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (_first, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "replaced")));

    let _second = broker.connect(version, "c");

    observer.expect_publish("will", "replaced");
}

fn mqtt_3_1_2_8_will_is_published_once(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 1);
    let connect = Connect::persistent(version, "c").will(Will::new("will", "gone").qos(1));
    let (client, _) = broker.connect_with(&connect);
    client.drop_connection();
    observer.accept_publish("will", "gone");

    broker
        .connect_persistent(version, "c", true)
        .drop_connection();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("will", "marker", 1);

    observer.accept_publish("will", "marker");
}

fn mqtt_3_1_2_9_will_is_published_with_its_qos(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 2);
    for qos in [0, 1, 2] {
        let connect = Connect::new(version, "c").will(Will::new("will", "gone").qos(qos));
        broker.connect_with(&connect).0.drop_connection();

        let will = observer.accept_publish("will", "gone");
        assert_eq!(will.qos(), qos);
    }
}

fn mqtt_3_1_2_10_will_of_an_earlier_connection_is_forgotten(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) =
        broker.connect_with(&Connect::persistent(version, "c").will(Will::new("will", "first")));
    client.disconnect();

    broker
        .connect_persistent(version, "c", true)
        .drop_connection();

    broker
        .connect(version, "publisher")
        .publish_acknowledged("will", "marker", 0);
    observer.expect_publish("will", "marker");
}

fn mqtt_3_1_2_14_will_without_retain_is_not_retained(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "gone")));
    client.drop_connection();
    observer.expect_publish("will", "gone");

    let mut late = broker.connect(version, "late");
    late.subscribe("will", 0);

    late.expect_nothing();
}

fn mqtt_3_1_2_15_will_with_retain_is_retained(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "gone").retain()));
    client.drop_connection();
    let live = observer.expect_publish("will", "gone");

    let mut late = broker.connect(version, "late");
    late.subscribe("will", 0);

    assert!(late.expect_publish("will", "gone").retain());
    assert!(
        !live.retain(),
        "an established subscription sees RETAIN 0, [MQTT-3.3.1-12]"
    );
}

fn mqtt_3_14_4_3_normal_disconnect_discards_the_will(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "gone")));

    client.disconnect();

    broker
        .connect(version, "publisher")
        .publish_acknowledged("will", "marker", 0);
    observer.expect_publish("will", "marker");
}

#[test]
fn mqtt_3_14_2_1_disconnect_with_will_message_publishes_the_will() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let (mut client, _) =
        broker.connect_with(&Connect::new(V5, "c").will(Will::new("will", "wanted")));

    client.send(&wire::disconnect_with(0x04, &[]));

    client.expect_closed();
    observer.expect_publish("will", "wanted");
}

#[test]
fn disconnect_with_an_error_publishes_the_will() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let (mut client, _) =
        broker.connect_with(&Connect::new(V5, "c").will(Will::new("will", "failed")));

    client.send(&wire::disconnect_with(0x80, &[]));

    observer.expect_publish("will", "failed");
}

fn empty_will_payload_is_published(version: Version) {
    let broker = Broker::start();
    let mut observer = observer(&broker, version, 0);
    let (client, _) = broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "")));

    client.drop_connection();

    observer.expect_publish("will", "");
}

fn will_with_retain_and_empty_payload_clears_the_retained_message(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("will", "online", 1);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "").retain()));
    let mut observer = observer(&broker, version, 0);
    observer.expect_publish("will", "online");

    client.drop_connection();
    observer.expect_publish("will", "");

    let mut late = broker.connect(version, "late");
    late.subscribe("will", 0);
    late.expect_nothing();
}

fn will_topic_with_wildcards_is_refused(version: Version) {
    let broker = Broker::start();
    for topic in ["a/#", "+/b"] {
        let mut client = broker.open(version);
        client.send(
            &Connect::new(version, "c")
                .will(Will::new(topic, "x"))
                .bytes(),
        );

        if let Some(connack) = client.next_packet() {
            assert_ne!(connack.reason(), 0, "will topic {topic}");
            assert_eq!(client.next_packet(), None);
        }
    }
}

fn will_reaches_a_persistent_session_that_is_offline(version: Version) {
    let broker = Broker::start();
    let mut offline = broker.connect_persistent(version, "offline", false);
    offline.subscribe("will", 1);
    offline.disconnect();
    let mut observer = observer(&broker, version, 1);
    let (client, _) =
        broker.connect_with(&Connect::new(version, "c").will(Will::new("will", "gone").qos(1)));
    client.drop_connection();
    observer.accept_publish("will", "gone");

    let mut offline = broker.connect_persistent(version, "offline", true);

    offline.accept_publish("will", "gone");
}

#[test]
fn mqtt_3_1_3_9_will_is_delayed() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "late").property(property::will_delay(1));
    let (client, _) = broker.connect_with(&Connect::persistent(V5, "c").will(will));

    let before = Instant::now();
    client.drop_connection();

    observer.expect_publish("will", "late");
    assert!(
        before.elapsed() >= Duration::from_secs(1),
        "published after {:?}",
        before.elapsed()
    );
}

#[test]
fn mqtt_3_1_2_8_delayed_will_is_published_when_the_session_ends_earlier() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "ended").property(property::will_delay(3600));
    let connect = Connect::new(V5, "c")
        .property(property::session_expiry(1))
        .will(will);

    broker.connect_with(&connect).0.drop_connection();

    observer.expect_publish("will", "ended");
}

#[test]
fn mqtt_3_1_2_8_delayed_will_of_a_session_without_expiry_is_published_at_once() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "ended").property(property::will_delay(3600));

    broker
        .connect_with(&Connect::new(V5, "c").will(will))
        .0
        .drop_connection();

    observer.expect_publish("will", "ended");
}

#[test]
fn mqtt_3_1_3_9_reconnecting_before_the_delay_has_passed_discards_the_will() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "late").property(property::will_delay(2));
    let (client, _) = broker.connect_with(&Connect::persistent(V5, "c").will(will));
    client.drop_connection();

    let mut client = broker.connect_persistent(V5, "c", true);

    // Three seconds altogether.
    broker.wait_for_keep_alive_timeout();
    broker.wait_for_keep_alive_timeout();
    client.publish_acknowledged("will", "marker", 0);
    observer.expect_publish("will", "marker");
}

#[test]
fn will_delay_is_not_forwarded() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "gone").property(property::will_delay(0));

    broker
        .connect_with(&Connect::new(V5, "c").will(will))
        .0
        .drop_connection();

    let will = observer.expect_publish("will", "gone");
    assert_eq!(will.value(property::WILL_DELAY_INTERVAL), None);
}

#[test]
fn mqtt_3_1_3_10_will_properties_are_published_in_order() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let properties = [
        property::payload_format_indicator(1),
        property::content_type("text/plain"),
        property::response_topic("answer"),
        property::correlation_data(&[0, 1, 255]),
        property::user_property("b", "1"),
        property::user_property("a", "2"),
        property::user_property("b", "3"),
    ];
    let will = properties
        .iter()
        .cloned()
        .fold(Will::new("will", "gone"), Will::property);

    broker
        .connect_with(&Connect::new(V5, "c").will(will))
        .0
        .drop_connection();

    let will = observer.expect_publish("will", "gone");
    for expected in &properties {
        assert!(
            will.properties.contains(expected),
            "{expected:?} in {will:?}"
        );
    }
    let pair = |name: &str, value: &str| Value::Pair(name.to_owned(), value.to_owned());
    assert_eq!(
        will.values(property::USER_PROPERTY),
        [&pair("b", "1"), &pair("a", "2"), &pair("b", "3")]
    );
}

#[test]
fn message_expiry_of_the_will_starts_when_it_is_published() {
    let broker = Broker::start();
    let mut observer = observer(&broker, V5, 0);
    let will = Will::new("will", "gone")
        .property(property::will_delay(1))
        .property(property::message_expiry(100));

    broker
        .connect_with(&Connect::persistent(V5, "c").will(will))
        .0
        .drop_connection();

    let will = observer.expect_publish("will", "gone");
    assert_eq!(will.number(property::MESSAGE_EXPIRY_INTERVAL), Some(100));
}

#[test]
fn delayed_will_survives_a_crash_of_the_broker() {
    let mut broker = Broker::start();
    let mut offline = broker.connect_persistent(V5, "offline", false);
    offline.subscribe("will", 1);
    let will = Will::new("will", "due")
        .qos(1)
        .property(property::will_delay(1));
    let (client, _) = broker.connect_with(&Connect::persistent(V5, "c").will(will));
    client.drop_connection();

    broker.crash_and_restart();

    let mut offline = broker.connect_persistent(V5, "offline", true);
    offline.accept_publish("will", "due");
}

/// A broker that is killed cannot publish the wills of its clients; it does when it is back.
#[test]
fn wills_of_clients_connected_during_a_crash_are_published_after_it() {
    for version in [V3_1_1, V5] {
        let mut broker = Broker::start();
        let mut offline = broker.connect_persistent(version, "offline", false);
        offline.subscribe("will", 1);
        let will = Will::new("will", "crashed").qos(1);
        let (_client, _) = broker.connect_with(&Connect::persistent(version, "c").will(will));

        broker.crash_and_restart();

        let mut offline = broker.connect_persistent(version, "offline", true);
        offline.accept_publish("will", "crashed");
    }
}
