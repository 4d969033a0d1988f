//! Section 4.7: Topic Names and Topic Filters.

use crate::support::{Broker, Publish, Version, both_versions, wire};

both_versions! {
    mqtt_4_7_1_filters_match_topics_as_in_the_table,
    mqtt_4_7_1_retained_messages_match_filters_as_in_the_table,
    mqtt_4_7_3_4_topics_are_not_normalised,
    mqtt_4_7_2_1_wildcards_do_not_match_topics_that_start_with_a_dollar,
    topics_that_start_with_a_dollar_are_matched_by_filters_that_do,
    a_dollar_elsewhere_in_a_topic_is_an_ordinary_character,
    mqtt_4_7_3_2_null_character_in_a_topic_ends_the_connection,
    mqtt_4_7_3_2_null_character_in_a_filter_is_refused,
    mqtt_4_7_3_3_topic_of_65535_bytes_is_delivered,
    mqtt_1_5_4_3_byte_order_mark_is_an_ordinary_character,
    deep_topics_are_delivered,
}

/// Topic Filter, Topic Name, whether they match.
const MATCHES: &[(&str, &str, bool)] = &[
    ("sport/tennis/player1/#", "sport/tennis/player1", true),
    (
        "sport/tennis/player1/#",
        "sport/tennis/player1/ranking",
        true,
    ),
    (
        "sport/tennis/player1/#",
        "sport/tennis/player1/score/wimbledon",
        true,
    ),
    ("sport/tennis/player1/#", "sport/tennis/player2", false),
    ("sport/tennis/player1/#", "sport/tennis/player10", false),
    ("sport/#", "sport", true),
    ("sport/#", "sports", false),
    ("#", "sport", true),
    ("#", "/", true),
    ("#", "/finance/x", true),
    ("sport/tennis/+", "sport/tennis/player1", true),
    ("sport/tennis/+", "sport/tennis/player1/ranking", false),
    ("sport/+", "sport", false),
    ("sport/+", "sport/", true),
    ("+", "sport", true),
    ("+", "/finance", false),
    ("+/+", "/finance", true),
    ("/+", "/finance", true),
    ("+/tennis/#", "sport/tennis", true),
    ("+/tennis/#", "sport/tennis/x/y", true),
    ("+/tennis/#", "sport/golf", false),
    ("sport/+/player1", "sport/tennis/player1", true),
    ("sport/+/player1", "sport//player1", true),
    ("sport/+/player1", "sport/player1", false),
    ("+/+/+", "a/b/c", true),
    ("+/+/+", "//", true),
    ("+/+/+", "a/b", false),
    ("+/#", "a", true),
    ("+/#", "/", true),
    ("/#", "/a", true),
    ("/#", "a", false),
    ("a/+/#", "a/b", true),
    ("a/+/#", "a/b/c/d", true),
    ("a/+/#", "a", false),
    ("a", "a", true),
    ("a", "a/", false),
    ("a/", "a", false),
    ("/a", "a", false),
    ("a//b", "a//b", true),
    ("a//b", "a/b", false),
    ("ACCOUNTS", "Accounts", false),
    ("Accounts payable", "Accounts payable", true),
    ("测试/+/温度", "测试/客厅/温度", true),
    ("ä/ö", "a/o", false),
    ("\u{1F321}/#", "\u{1F321}/x", true),
];

fn mqtt_4_7_1_filters_match_topics_as_in_the_table(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    for (filter, topic, matches) in MATCHES {
        client.subscribe(filter, 0);

        client.publish_acknowledged(topic, filter, 0);

        if *matches {
            client.expect_publish(topic, filter);
        }
        client.expect_nothing();
        client.unsubscribe(&[filter]);
    }
}

fn mqtt_4_7_1_retained_messages_match_filters_as_in_the_table(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    for (filter, topic, matches) in MATCHES {
        client.publish_retained(topic, filter, 0);

        client.subscribe(filter, 0);

        if *matches {
            client.expect_publish(topic, filter);
        }
        client.expect_nothing();
        client.unsubscribe(&[filter]);
        client.publish_retained(topic, "", 0);
    }
}

fn mqtt_4_7_3_4_topics_are_not_normalised(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    // The same letter, composed and decomposed.
    client.subscribe("\u{E9}", 0);

    client.publish_acknowledged("e\u{301}", "decomposed", 0);
    client.publish_acknowledged("\u{E9}", "composed", 0);

    client.expect_publish("\u{E9}", "composed");
}

fn mqtt_4_7_2_1_wildcards_do_not_match_topics_that_start_with_a_dollar(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe_all(&[("#", 0), ("+/private", 0), ("+/#", 0)], &[]);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish_acknowledged("$internal/private", "hidden", 0);
    publisher.publish_acknowledged("plain", "visible", 0);

    client.expect_publish("plain", "visible");
}

fn topics_that_start_with_a_dollar_are_matched_by_filters_that_do(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    for filter in ["$internal/#", "$internal/+", "$internal/private"] {
        client.subscribe(filter, 0);

        client.publish_acknowledged("$internal/private", filter, 0);

        client.expect_publish("$internal/private", filter);
        client.unsubscribe(&[filter]);
    }
}

fn a_dollar_elsewhere_in_a_topic_is_an_ordinary_character(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("#", 0);

    for topic in ["a/$SYS", "a$", "/$SYS/x"] {
        client.publish_acknowledged(topic, "visible", 0);

        client.expect_publish(topic, "visible");
    }
}

fn mqtt_4_7_3_2_null_character_in_a_topic_ends_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.publish(&Publish::new("a\0b", "x"));

    client.expect_disconnect_with(&[0x81, 0x82, 0x90]);
}

fn mqtt_4_7_3_2_null_character_in_a_filter_is_refused(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send(&wire::subscribe(version, 1, &[("a\0b", 0)], &[]));

    client.expect_disconnect_with(&[0x81, 0x82, 0x8F]);
}

fn mqtt_4_7_3_3_topic_of_65535_bytes_is_delivered(version: Version) {
    let broker = Broker::start_with(&[("limits.topic_bytes_max", "65535")]);
    let mut client = broker.connect(version, "c");
    client.subscribe("#", 0);
    let topic = "x".repeat(65535);

    client.publish_acknowledged(&topic, "long", 0);

    client.expect_publish(&topic, "long");
}

fn mqtt_1_5_4_3_byte_order_mark_is_an_ordinary_character(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("#", 0);

    client.publish_acknowledged("\u{FEFF}topic", "x", 0);

    client.expect_publish("\u{FEFF}topic", "x");
}

fn deep_topics_are_delivered(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    let topic = vec!["level"; 50].join("/");
    client.subscribe(&topic, 0);

    client.publish_acknowledged(&topic, "x", 0);

    client.expect_publish(&topic, "x");
}
