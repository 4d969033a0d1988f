//! What either side limits: packet sizes, topic aliases, queues, names.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{
    Broker, Connect, Kind, Publish, V3_1_1, V5, Version, both_versions, property, wire,
};

both_versions! {
    packet_larger_than_the_limit_ends_the_connection,
    connection_without_a_connect_is_closed,
    connection_with_half_a_connect_is_closed,
    client_id_longer_than_the_limit_is_refused,
    topic_with_more_levels_than_the_limit_is_refused,
    filter_with_more_levels_than_the_limit_is_refused,
    full_queue_drops_the_oldest_messages,
    full_queue_drops_the_newest_messages,
    too_many_connections_in_a_second_wait_or_are_refused,
    fast_publisher_is_read_from_slowly_and_loses_nothing,
}

#[test]
fn mqtt_3_1_2_24_packets_larger_than_the_client_accepts_are_not_sent() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "small").property(property::maximum_packet_size(100));
    let (mut small, _) = broker.connect_with(&connect);
    small.subscribe("t", 1);
    let mut other = broker.connect(V5, "other");
    other.subscribe("t", 1);
    let mut publisher = broker.connect(V5, "publisher");
    let large = "x".repeat(200);

    publisher.publish_acknowledged("t", &large, 1);
    publisher.publish_acknowledged("t", "small", 1);

    other.accept_publish("t", &large);
    other.accept_publish("t", "small");
    small.accept_publish("t", "small");
}

#[test]
fn mqtt_3_1_2_25_message_too_large_for_the_client_counts_as_delivered() {
    let broker = Broker::start();
    let connect = Connect::persistent(V5, "small")
        .property(property::maximum_packet_size(100))
        .property(property::receive_maximum(1));
    let (mut small, _) = broker.connect_with(&connect);
    small.subscribe("t", 1);
    let mut publisher = broker.connect(V5, "publisher");
    for _ in 0..3 {
        publisher.publish_acknowledged("t", &"x".repeat(200), 1);
    }

    // With a Receive Maximum of 1 any of them would hold up what follows.
    publisher.publish_acknowledged("t", "small", 1);
    small.accept_publish("t", "small");
    small.disconnect();

    let mut roomy = broker.connect_persistent(V5, "small", true);
    roomy.expect_nothing();
}

#[test]
fn packet_of_exactly_the_maximum_size_is_sent() {
    let broker = Broker::start();
    // Fixed header 2, topic 3, Property Length 1, payload 94.
    let payload = "x".repeat(94);
    for (maximum, expected) in [(100, payload.as_str()), (99, "marker")] {
        let connect = Connect::new(V5, "small").property(property::maximum_packet_size(maximum));
        let (mut small, _) = broker.connect_with(&connect);
        small.subscribe("t", 0);
        let mut publisher = broker.connect(V5, "publisher");

        publisher.publish_acknowledged("t", &payload, 0);
        publisher.publish_acknowledged("t", "marker", 0);

        small.expect_publish("t", expected);
    }
}

#[test]
fn retained_message_larger_than_the_client_accepts_is_not_sent() {
    let broker = Broker::start();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.publish_retained("t", &"x".repeat(200), 1);
    let connect = Connect::new(V5, "small").property(property::maximum_packet_size(100));
    let (mut small, _) = broker.connect_with(&connect);

    small.subscribe("t", 1);

    publisher.publish_acknowledged("t", "small", 1);
    small.accept_publish("t", "small");
}

/// Maximum Packet Size of version 5 says that the broker closes the connection, 3.2.2.3.6.
fn packet_larger_than_the_limit_ends_the_connection(version: Version) {
    let broker = Broker::start_with(&[("limits.packet_bytes_max", "1000")]);
    let (mut client, connack) = broker.connect_with(&Connect::new(version, "c"));
    if version.is_v5() {
        assert_eq!(connack.number(property::MAXIMUM_PACKET_SIZE), Some(1000));
    }
    client.publish_acknowledged("t", &"x".repeat(900), 1);

    client.publish(&Publish::new("t", &"x".repeat(1000)));

    client.expect_disconnect(0x95);
}

#[test]
fn the_size_of_a_packet_is_judged_by_its_first_bytes() {
    let broker = Broker::start_with(&[("limits.packet_bytes_max", "1000")]);
    let mut client = broker.connect(V5, "c");

    // A Remaining Length of 256 MiB; the packet itself never follows.
    client.send(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F]);

    client.expect_disconnect(0x95);
}

#[test]
fn mqtt_3_1_2_27_no_topic_alias_is_sent_to_a_client_that_accepts_none() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("#", 0);
    let mut publisher = broker.connect(V5, "publisher");

    for _ in 0..10 {
        publisher.publish_acknowledged("some/topic", "x", 0);

        let message = subscriber.expect_publish("some/topic", "x");
        assert_eq!(message.value(property::TOPIC_ALIAS), None);
    }
}

#[test]
fn mqtt_3_1_2_26_topic_aliases_sent_stay_within_the_maximum_of_the_client() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "subscriber").property(property::topic_alias_maximum(2));
    let (mut subscriber, _) = broker.connect_with(&connect);
    subscriber.subscribe("#", 0);
    let mut publisher = broker.connect(V5, "publisher");
    let mut aliases = std::collections::HashMap::new();

    for number in 0..20 {
        let topic = format!("topic/{}", number % 4);
        publisher.publish_acknowledged(&topic, "x", 0);

        let message = subscriber.expect(Kind::Publish);
        let alias = message.number(property::TOPIC_ALIAS);
        if let Some(alias) = alias {
            assert!((1..=2).contains(&alias), "{message:?}");
            if !message.topic.is_empty() {
                aliases.insert(alias, message.topic.clone());
            }
        }
        let named = if message.topic.is_empty() {
            alias.and_then(|alias| aliases.get(&alias).cloned())
        } else {
            Some(message.topic)
        };
        assert_eq!(named, Some(topic));
    }
}

fn connection_without_a_connect_is_closed(version: Version) {
    let broker = Broker::start_with(&[("limits.connect_timeout", "1s")]);
    let mut client = broker.open(version);

    client.expect_closed();
}

fn connection_with_half_a_connect_is_closed(version: Version) {
    let broker = Broker::start_with(&[("limits.connect_timeout", "1s")]);
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").bytes()[..5]);

    client.expect_closed();
}

fn client_id_longer_than_the_limit_is_refused(version: Version) {
    let broker = Broker::start_with(&[("limits.client_id_bytes_max", "30")]);
    broker.connect(version, &"x".repeat(30)).ping();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, &"x".repeat(31)).bytes());

    client.expect_refused(0x02, 0x85);
}

fn topic_with_more_levels_than_the_limit_is_refused(version: Version) {
    let broker = Broker::start_with(&[("limits.topic_levels_max", "3")]);
    let mut client = broker.connect(version, "c");
    client.publish_acknowledged("1/2/3", "x", 1);

    client.publish(&Publish::new("1/2/3/4", "x").qos(1, 100));

    if version.is_v5() {
        // Refused in its acknowledgement or by the end of the connection.
        let packet = client.next_packet().expect("a reason");
        assert!(
            matches!(packet.kind, Kind::PubAck | Kind::Disconnect),
            "{packet:?}"
        );
        assert_eq!(packet.reason(), 0x90, "{packet:?}");
    } else {
        client.expect_closed();
    }
}

fn filter_with_more_levels_than_the_limit_is_refused(version: Version) {
    let broker = Broker::start_with(&[("limits.topic_levels_max", "3")]);
    let mut client = broker.connect(version, "c");

    let reasons = client.subscribe_all(&[("1/2/3", 1), ("1/2/3/4", 1)], &[]);

    assert_eq!(reasons[0], 1);
    assert!(reasons[1] >= 0x80, "{reasons:02x?}");
}

/// Publishes ten messages to an offline session whose queue holds five.
#[track_caller]
fn overflow(broker: &Broker, version: Version) {
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..10 {
        // That the queue is full may be told to a version 5 publisher.
        let id = publisher.next_packet_id();
        publisher.publish(&Publish::new("t", &number.to_string()).qos(1, id));
        publisher.expect(Kind::PubAck);
    }
}

fn full_queue_drops_the_oldest_messages(version: Version) {
    let settings = [
        ("session.queue_messages_max", "5"),
        ("session.queue_full", "drop_oldest"),
    ];
    let broker = Broker::start_with(&settings);
    overflow(&broker, version);

    let mut client = broker.connect_persistent(version, "c", true);

    for number in 5..10 {
        client.accept_publish("t", &number.to_string());
    }
    client.expect_nothing();
}

fn full_queue_drops_the_newest_messages(version: Version) {
    let settings = [
        ("session.queue_messages_max", "5"),
        ("session.queue_full", "drop_new"),
    ];
    let broker = Broker::start_with(&settings);
    overflow(&broker, version);

    let mut client = broker.connect_persistent(version, "c", true);

    for number in 0..5 {
        client.accept_publish("t", &number.to_string());
    }
    client.expect_nothing();
}

#[test]
fn the_largest_client_id_has_65535_bytes_where_no_limit_is_set_lower() {
    let broker = Broker::start_with(&[("limits.client_id_bytes_max", "65535")]);

    let mut client = broker.connect(V3_1_1, &"x".repeat(65535));

    client.send(&wire::pingreq());
    client.expect(Kind::PingResp);
}

fn too_many_connections_in_a_second_wait_or_are_refused(version: Version) {
    let broker = Broker::start_with(&[("limits.connect_rate", "2")]);
    // Three go at once and ten wait; what is behind them would have to wait for longer than 5 s.
    let mut clients: Vec<_> = (0..30).map(|_| broker.open(version)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send(&Connect::new(version, &format!("client-{number}")).bytes());
    }

    clients[0].expect_connack(0);
    // 0x9F: Connection rate exceeded.
    clients[29].expect_refused(3, 0x9F);
    clients[5].expect_connack(0);
    // Whoever comes later is welcome.
    clients[9].expect_connack(0);
}

fn fast_publisher_is_read_from_slowly_and_loses_nothing(version: Version) {
    let broker = Broker::start_with(&[("limits.publish_rate", "20")]);
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");
    let begun = Instant::now();

    for number in 0..50u16 {
        publisher.publish(&Publish::new("t", &number.to_string()).qos(1, number + 1));
    }
    for number in 0..50 {
        publisher.expect_puback(number + 1, 0);
    }

    // 21 go at once.
    let planned = Duration::from_secs(29) / 20;
    assert!(begun.elapsed() >= planned - Duration::from_millis(100));
    for number in 0..50 {
        subscriber.accept_publish("t", &number.to_string());
    }
}
