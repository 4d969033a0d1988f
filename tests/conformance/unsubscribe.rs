//! Sections 3.10 and 3.11: UNSUBSCRIBE and UNSUBACK.

use crate::support::{Broker, Kind, V5, Version, both_versions, wire};

both_versions! {
    mqtt_3_10_4_2_no_messages_come_after_unsuback,
    mqtt_3_10_4_5_unsuback_has_the_identifier_of_the_unsubscribe,
    mqtt_3_10_4_5_unsuback_comes_even_if_nothing_was_subscribed,
    mqtt_3_10_4_6_several_filters_in_one_unsubscribe_are_all_removed,
    mqtt_3_10_4_1_filters_are_compared_character_by_character,
    unsubscribing_leaves_overlapping_subscriptions,
    unsubscribing_leaves_other_clients,
}

fn mqtt_3_10_4_2_no_messages_come_after_unsuback(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("gone", 1);
    client.subscribe("stays", 1);

    client.unsubscribe(&["gone"]);

    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("gone", "x", 1);
    publisher.publish_acknowledged("stays", "x", 1);
    client.accept_publish("stays", "x");
}

fn mqtt_3_10_4_5_unsuback_has_the_identifier_of_the_unsubscribe(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    for id in [1, 256, 65535] {
        client.send(&wire::unsubscribe(version, id, &["t"]));

        assert_eq!(client.expect(Kind::UnsubAck).id, id);
    }
}

fn mqtt_3_10_4_5_unsuback_comes_even_if_nothing_was_subscribed(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    let reasons = client.unsubscribe(&["never/subscribed"]);

    assert_eq!(reasons, if version.is_v5() { vec![0x11] } else { vec![] });
}

#[test]
fn mqtt_3_11_3_1_each_filter_gets_a_reason_code_in_order() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe_all(&[("a", 1), ("b", 1)], &[]);

    let reasons = client.unsubscribe(&["a", "never", "b", "a"]);

    assert_eq!(reasons, [0x00, 0x11, 0x00, 0x11]);
}

fn mqtt_3_10_4_6_several_filters_in_one_unsubscribe_are_all_removed(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe_all(&[("a/+", 0), ("b/#", 1), ("c", 2), ("marker", 0)], &[]);

    client.unsubscribe(&["a/+", "c", "b/#"]);

    for topic in ["a/1", "b/1", "c", "marker"] {
        client.publish_acknowledged(topic, "x", 0);
    }
    client.expect_publish("marker", "x");
}

fn mqtt_3_10_4_1_filters_are_compared_character_by_character(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("a/b", 0);

    client.unsubscribe(&["a/+", "a/#", "#", "A/b", "a/b/"]);

    client.publish_acknowledged("a/b", "still subscribed", 0);
    client.expect_publish("a/b", "still subscribed");
}

fn unsubscribing_leaves_overlapping_subscriptions(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t/#", 1);
    client.subscribe("t/a", 2);

    client.unsubscribe(&["t/a"]);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t/a", "x", 2);
    assert_eq!(client.accept_publish("t/a", "x").qos(), 1);
}

fn unsubscribing_leaves_other_clients(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect(version, "first");
    first.subscribe("t", 1);
    let mut second = broker.connect(version, "second");
    second.subscribe("t", 1);

    first.unsubscribe(&["t"]);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "x", 1);
    second.accept_publish("t", "x");
}
