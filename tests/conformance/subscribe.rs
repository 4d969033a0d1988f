//! Sections 3.8 and 3.9: SUBSCRIBE and SUBACK.

use crate::support::{Broker, Kind, V5, Version, both_versions, property, wire};

const NO_LOCAL: u8 = 0b0000_0100;
const RETAIN_AS_PUBLISHED: u8 = 0b0000_1000;
const RETAIN_HANDLING_IF_NEW: u8 = 0b0001_0000;
const RETAIN_HANDLING_NEVER: u8 = 0b0010_0000;

both_versions! {
    mqtt_3_8_4_2_suback_has_the_identifier_of_the_subscribe,
    mqtt_3_8_4_6_each_filter_gets_a_reason_code_in_order,
    mqtt_3_8_4_5_several_filters_in_one_subscribe_work_like_several_subscribes,
    mqtt_3_8_4_3_identical_filter_replaces_the_subscription,
    repeated_subscription_causes_no_duplicates,
    mqtt_3_8_4_4_repeated_subscription_sends_retained_messages_again,
    mqtt_3_3_4_2_overlapping_subscriptions_deliver_with_the_highest_qos,
    invalid_filters_are_refused,
    a_filter_that_is_refused_does_not_spoil_the_others,
    two_hundred_filters_in_one_subscribe_are_granted,
    subscribing_to_the_empty_filter_is_refused,
}

fn mqtt_3_8_4_2_suback_has_the_identifier_of_the_subscribe(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    for id in [1, 255, 256, 65535] {
        client.send(&wire::subscribe(version, id, &[("t", 0)], &[]));

        assert_eq!(client.expect(Kind::SubAck).id, id);
    }
}

fn mqtt_3_8_4_6_each_filter_gets_a_reason_code_in_order(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    let reasons = client.subscribe_all(&[("a", 2), ("b", 0), ("c", 1), ("d", 2)], &[]);

    assert_eq!(reasons, [2, 0, 1, 2]);
}

fn mqtt_3_8_4_5_several_filters_in_one_subscribe_work_like_several_subscribes(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe_all(&[("a", 2), ("b/+", 0), ("c/#", 1)], &[]);
    let mut publisher = broker.connect(version, "publisher");

    for (topic, qos) in [("a", 2), ("b/1", 0), ("c/1/2", 1)] {
        publisher.publish_acknowledged(topic, "x", 2);

        assert_eq!(client.accept_publish(topic, "x").qos(), qos);
    }
}

fn mqtt_3_8_4_3_identical_filter_replaces_the_subscription(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t", 2);
    client.subscribe("t", 0);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish_acknowledged("t", "x", 2);
    publisher.publish_acknowledged("t", "marker", 2);

    assert_eq!(client.expect_publish("t", "x").qos(), 0);
    client.expect_publish("t", "marker");
}

fn repeated_subscription_causes_no_duplicates(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.subscribe_all(&[("t", 1), ("t", 1)], &[]);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish_acknowledged("t", "online", 1);
    publisher.publish_acknowledged("t", "marker", 1);
    client.accept_publish("t", "online");
    client.accept_publish("t", "marker");
    client.disconnect();
    publisher.publish_acknowledged("t", "offline", 1);

    let mut client = broker.connect_persistent(version, "c", true);
    client.accept_publish("t", "offline");
    client.expect_nothing();
}

fn mqtt_3_8_4_4_repeated_subscription_sends_retained_messages_again(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "kept", 1);
    let mut client = broker.connect(version, "c");

    for _ in 0..2 {
        client.subscribe("t", 1);

        assert!(client.accept_publish("t", "kept").retain());
    }
}

/// One copy with the highest QoS, or one copy per subscription: both are allowed in 3.3.4, and
/// the highest QoS is among them.
fn mqtt_3_3_4_2_overlapping_subscriptions_deliver_with_the_highest_qos(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t/#", 0);
    client.subscribe("t/+", 2);
    client.subscribe("t/a", 1);
    let mut publisher = broker.connect(version, "publisher");

    client.subscribe("marker", 2);

    publisher.publish_acknowledged("t/a", "x", 2);
    publisher.publish_acknowledged("marker", "", 2);

    let mut delivered = Vec::new();
    loop {
        let message = client.expect(Kind::Publish);
        if message.topic == "marker" {
            break;
        }
        delivered.push(message.qos());
    }
    assert_eq!(delivered.into_iter().max(), Some(2));
}

fn invalid_filters_are_refused(version: Version) {
    let broker = Broker::start();
    let filters = [
        "a/#/b", "a#", "#a", "a/b#", "a+", "+a", "a/+b/c", "a/b+/c", "##", "++", "a/#b",
    ];
    for filter in filters {
        let mut client = broker.connect(version, "c");
        client.send(&wire::subscribe(version, 1, &[(filter, 0)], &[]));

        expect_filter_refused(&mut client, filter);
    }
}

fn subscribing_to_the_empty_filter_is_refused(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send(&wire::subscribe(version, 1, &[("", 0)], &[]));

    expect_filter_refused(&mut client, "");
}

/// A SUBACK that says so, or, as for any malformed packet, the end of the connection.
#[track_caller]
fn expect_filter_refused(client: &mut crate::support::Client, filter: &str) {
    match client.next_packet() {
        None => {}
        Some(packet) if packet.kind == Kind::SubAck => {
            let expected = if client.version().is_v5() { 0x8F } else { 0x80 };
            assert_eq!(packet.reason(), expected, "for {filter}");
            client.ping();
        }
        Some(packet) if packet.kind == Kind::Disconnect => {
            assert!(
                matches!(packet.reason(), 0x81 | 0x82 | 0x8F),
                "for {filter}: {packet:?}"
            );
        }
        Some(packet) => panic!("for {filter}: {packet:?}"),
    }
}

fn a_filter_that_is_refused_does_not_spoil_the_others(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    let reasons = client.subscribe_all(&[("a", 1), ("b/#/c", 1), ("d", 2)], &[]);

    let refused = if version.is_v5() { 0x8F } else { 0x80 };
    assert_eq!(reasons, [1, refused, 2]);
    client.publish_acknowledged("d", "x", 0);
    client.expect_publish("d", "x");
}

fn two_hundred_filters_in_one_subscribe_are_granted(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    let filters: Vec<String> = (0..200).map(|number| format!("t/{number}/+")).collect();
    let filters: Vec<(&str, u8)> = filters.iter().map(|filter| (filter.as_str(), 1)).collect();

    let reasons = client.subscribe_all(&filters, &[]);

    assert_eq!(reasons, [1; 200]);
    client.publish_acknowledged("t/199/x", "last", 0);
    client.expect_publish("t/199/x", "last");
}

#[test]
fn mqtt_3_3_1_9_retain_handling_0_sends_retained_messages() {
    let broker = Broker::start();
    broker
        .connect(V5, "publisher")
        .publish_retained("t", "kept", 1);
    let mut client = broker.connect(V5, "c");

    client.subscribe("t", 1);

    client.accept_publish("t", "kept");
}

#[test]
fn mqtt_3_3_1_10_retain_handling_1_sends_retained_messages_to_new_subscriptions_only() {
    let broker = Broker::start();
    broker
        .connect(V5, "publisher")
        .publish_retained("t", "kept", 1);
    let mut client = broker.connect(V5, "c");

    client.subscribe("t", RETAIN_HANDLING_IF_NEW | 1);
    client.accept_publish("t", "kept");
    client.subscribe("t", RETAIN_HANDLING_IF_NEW | 1);
    client.expect_nothing();

    client.unsubscribe(&["t"]);
    client.subscribe("t", RETAIN_HANDLING_IF_NEW | 1);
    client.accept_publish("t", "kept");
}

#[test]
fn mqtt_3_3_1_10_retain_handling_1_regards_a_resumed_subscription_as_existing() {
    let broker = Broker::start();
    broker
        .connect(V5, "publisher")
        .publish_retained("t", "kept", 1);
    let mut client = broker.connect_persistent(V5, "c", false);
    client.subscribe("t", RETAIN_HANDLING_NEVER | 1);
    client.disconnect();

    let mut client = broker.connect_persistent(V5, "c", true);
    client.subscribe("t", RETAIN_HANDLING_IF_NEW | 1);

    client.expect_nothing();
}

#[test]
fn mqtt_3_3_1_11_retain_handling_2_sends_no_retained_messages() {
    let broker = Broker::start();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.publish_retained("t", "kept", 1);
    let mut client = broker.connect(V5, "c");

    client.subscribe("t", RETAIN_HANDLING_NEVER | 1);

    client.expect_nothing();
    publisher.publish_acknowledged("t", "live", 1);
    client.accept_publish("t", "live");
}

#[test]
fn mqtt_3_8_3_3_no_local_keeps_own_messages_away() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe("t", NO_LOCAL | 1);

    client.publish_acknowledged("t", "own", 1);
    broker
        .connect(V5, "other")
        .publish_acknowledged("t", "other", 1);

    client.accept_publish("t", "other");
}

#[test]
fn no_local_concerns_its_own_subscription_only() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe("t/#", NO_LOCAL | 1);
    client.subscribe("t/a", 1);

    client.publish_acknowledged("t/a", "own", 0);

    client.expect_publish("t/a", "own");
}

#[test]
fn mqtt_3_8_3_4_no_local_on_a_shared_subscription_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::subscribe(
        V5,
        1,
        &[("$share/group/t", NO_LOCAL)],
        &[],
    ));

    client.expect_disconnect(0x82);
}

#[test]
fn mqtt_3_3_1_13_retain_as_published_keeps_the_flag() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe("t", RETAIN_AS_PUBLISHED | 1);
    let mut publisher = broker.connect(V5, "publisher");

    publisher.publish_retained("t", "retained", 1);
    publisher.publish_acknowledged("t", "not retained", 1);

    assert!(client.accept_publish("t", "retained").retain());
    assert!(!client.accept_publish("t", "not retained").retain());
}

#[test]
fn mqtt_3_8_3_5_reserved_bits_of_the_subscription_options_are_malformed() {
    let broker = Broker::start();
    for options in [0b0100_0000, 0b1000_0000, 0b1100_0001] {
        let mut client = broker.connect(V5, "c");

        client.send(&wire::subscribe(V5, 1, &[("t", options)], &[]));

        client.expect_disconnect_with(&[0x81, 0x82]);
    }
}

#[test]
fn retain_handling_3_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::subscribe(V5, 1, &[("t", 0b0011_0000)], &[]));

    client.expect_disconnect_with(&[0x82, 0x81]);
}

#[test]
fn mqtt_3_3_4_3_subscription_identifier_comes_with_the_message() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    for identifier in [1, 127, 128, 268_435_455] {
        client.subscribe_all(
            &[("t", 0)],
            &[property::subscription_identifier(identifier)],
        );

        client.publish_acknowledged("t", "x", 0);

        assert_eq!(
            client.expect_publish("t", "x").subscription_identifiers(),
            [identifier]
        );
    }
}

/// Either one copy with all identifiers or a copy for each subscription.
#[test]
fn mqtt_3_3_4_4_identifiers_of_all_matching_subscriptions_come_with_the_message() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe_all(&[("t/#", 0)], &[property::subscription_identifier(10)]);
    client.subscribe_all(&[("t/+", 0)], &[property::subscription_identifier(20)]);
    client.subscribe_all(&[("t/a", 0)], &[]);
    client.subscribe_all(&[("other", 0)], &[property::subscription_identifier(30)]);

    client.publish_acknowledged("t/a", "x", 0);
    client.publish_acknowledged("other", "marker", 0);

    let mut identifiers = Vec::new();
    loop {
        let message = client.expect(Kind::Publish);
        if message.topic == "other" {
            break;
        }
        identifiers.extend(message.subscription_identifiers());
    }
    identifiers.sort_unstable();
    assert_eq!(identifiers, [10, 20]);
}

#[test]
fn two_subscriptions_with_the_same_identifier_give_it_for_each() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe_all(
        &[("t/#", 0), ("t/+", 0)],
        &[property::subscription_identifier(7)],
    );

    client.publish_acknowledged("t/a", "x", 0);

    // The specification lets a server send it once or twice.
    let message = client.expect_publish("t/a", "x");
    assert!(
        message
            .subscription_identifiers()
            .iter()
            .all(|&identifier| identifier == 7),
        "{message:?}"
    );
    assert!(!message.subscription_identifiers().is_empty());
}

#[test]
fn retained_messages_come_with_the_subscription_identifier() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.publish_retained("t", "kept", 0);

    client.subscribe_all(&[("t", 0)], &[property::subscription_identifier(5)]);

    assert_eq!(
        client
            .expect_publish("t", "kept")
            .subscription_identifiers(),
        [5]
    );
}

#[test]
fn subscribing_again_without_an_identifier_removes_it() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe_all(&[("t", 0)], &[property::subscription_identifier(5)]);
    client.subscribe_all(&[("t", 0)], &[]);

    client.publish_acknowledged("t", "x", 0);

    assert_eq!(
        client.expect_publish("t", "x").subscription_identifiers(),
        [0; 0]
    );
}

#[test]
fn subscription_identifier_0_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::subscribe(
        V5,
        1,
        &[("t", 0)],
        &[property::subscription_identifier(0)],
    ));

    client.expect_disconnect_with(&[0x82, 0x81]);
}

#[test]
fn two_subscription_identifiers_in_a_subscribe_are_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    let identifiers = [
        property::subscription_identifier(1),
        property::subscription_identifier(2),
    ];

    client.send(&wire::subscribe(V5, 1, &[("t", 0)], &identifiers));

    client.expect_disconnect_with(&[0x82, 0x81]);
}

#[test]
fn user_properties_of_a_subscribe_are_accepted() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    let properties = [
        property::user_property("a", "1"),
        property::user_property("a", "2"),
    ];

    let reasons = client.subscribe_all(&[("t", 1)], &properties);

    assert_eq!(reasons, [1]);
}

#[test]
fn offline_messages_come_with_all_subscription_identifiers() {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(V5, "c", false);
    client.subscribe_all(&[("t/#", 1)], &[property::subscription_identifier(10)]);
    client.subscribe_all(&[("t/+", 1)], &[property::subscription_identifier(20)]);
    client.disconnect();
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t/a", "x", 1);

    let mut client = broker.connect_persistent(V5, "c", true);

    assert_eq!(
        client.accept_publish("t/a", "x").subscription_identifiers(),
        [10, 20]
    );
}
