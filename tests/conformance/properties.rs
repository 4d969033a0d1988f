//! Section 3.3.2.3: the properties that travel with a message.

use crate::support::{Broker, Connect, Kind, Property, Publish, V3_1_1, V5, Value, property};

/// Publishes a message with these properties and returns what a subscriber sees.
#[track_caller]
fn forwarded(properties: &[Property]) -> crate::support::Packet {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("t", 1);
    let publish = properties
        .iter()
        .cloned()
        .fold(Publish::new("t", "x"), Publish::property);
    broker.connect(V5, "publisher").complete(publish, 1);
    subscriber.accept_publish("t", "x")
}

#[test]
fn mqtt_3_3_2_4_payload_format_indicator_is_forwarded() {
    for indicator in [0, 1] {
        let message = forwarded(&[property::payload_format_indicator(indicator)]);

        // Its absence means the same as 0.
        let forwarded = message
            .number(property::PAYLOAD_FORMAT_INDICATOR)
            .unwrap_or(0);
        assert_eq!(forwarded, u32::from(indicator));
    }
}

#[test]
fn mqtt_3_3_2_15_response_topic_is_forwarded() {
    let properties = [property::response_topic("answer/here")];
    assert_eq!(forwarded(&properties).properties, properties);
}

#[test]
fn mqtt_3_3_2_16_correlation_data_is_forwarded() {
    let properties = [property::correlation_data(&[0, 1, 2, 0xFF])];
    assert_eq!(forwarded(&properties).properties, properties);
}

#[test]
fn mqtt_3_3_2_17_user_properties_are_forwarded_in_order() {
    let properties = [
        property::user_property("z", "first"),
        property::user_property("a", "second"),
        property::user_property("z", "third"),
        property::user_property("", ""),
        property::user_property("z", "first"),
    ];
    assert_eq!(
        forwarded(&properties).properties,
        properties,
        "[MQTT-3.3.2-18]"
    );
}

#[test]
fn mqtt_3_3_2_20_content_type_is_forwarded() {
    let properties = [property::content_type("application/json; charset=utf-8 ✓")];
    assert_eq!(forwarded(&properties).properties, properties);
}

#[test]
fn all_properties_together_are_forwarded() {
    let properties = [
        property::user_property("a", "1"),
        property::content_type("text/plain"),
        property::payload_format_indicator(1),
        property::user_property("b", "2"),
        property::correlation_data(b"id"),
        property::response_topic("answer"),
        property::message_expiry(1000),
    ];

    let message = forwarded(&properties);

    for expected in &properties {
        assert!(
            message.properties.contains(expected),
            "{expected:?} in {message:?}"
        );
    }
    assert_eq!(
        message.properties.len(),
        properties.len(),
        "nothing was added: {message:?}"
    );
}

#[test]
fn properties_do_not_reach_version_3_subscribers() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V3_1_1, "subscriber");
    subscriber.subscribe("t", 0);

    let publish = Publish::new("t", "payload only").property(property::content_type("text/plain"));
    broker.connect(V5, "publisher").complete(publish, 0);

    subscriber.expect_publish("t", "payload only");
}

#[test]
fn mqtt_3_3_2_14_wildcards_in_a_response_topic_end_the_connection() {
    let broker = Broker::start();
    for topic in ["answer/#", "+/answer"] {
        let mut client = broker.connect(V5, "c");

        client.publish(&Publish::new("t", "x").property(property::response_topic(topic)));

        client.expect_disconnect_with(&[0x81, 0x82, 0x90]);
    }
}

#[test]
fn mqtt_3_3_4_6_subscription_identifier_from_a_client_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.publish(&Publish::new("t", "x").property(property::subscription_identifier(1)));

    client.expect_disconnect_with(&[0x82, 0x81]);
}

#[test]
fn mqtt_3_3_2_6_message_expiry_is_counted_down_while_a_message_waits() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V5, "subscriber", false);
    subscriber.subscribe("t", 1);
    subscriber.disconnect();
    broker.connect(V5, "publisher").complete(
        Publish::new("t", "x").property(property::message_expiry(100)),
        1,
    );

    broker.wait_for_keep_alive_timeout();

    let mut subscriber = broker.connect_persistent(V5, "subscriber", true);
    let message = subscriber.accept_publish("t", "x");
    let left = message.number(property::MESSAGE_EXPIRY_INTERVAL);
    assert!(
        left.is_some_and(|left| (1..=99).contains(&left)),
        "{left:?} seconds left"
    );
}

#[test]
fn mqtt_3_3_2_5_expired_message_is_not_delivered() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V5, "subscriber", false);
    subscriber.subscribe("t", 1);
    subscriber.disconnect();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.complete(
        Publish::new("t", "short").property(property::message_expiry(1)),
        1,
    );
    publisher.complete(
        Publish::new("t", "long").property(property::message_expiry(100)),
        1,
    );

    broker.wait_for_keep_alive_timeout();

    let mut subscriber = broker.connect_persistent(V5, "subscriber", true);
    subscriber.accept_publish("t", "long");
}

#[test]
fn message_without_expiry_does_not_get_one() {
    let message = forwarded(&[]);

    assert_eq!(message.properties, []);
}

#[test]
fn expired_message_is_not_delivered_to_a_version_3_session() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V3_1_1, "subscriber", false);
    subscriber.subscribe("t", 1);
    subscriber.disconnect();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.complete(
        Publish::new("t", "short").property(property::message_expiry(1)),
        1,
    );
    publisher.complete(Publish::new("t", "lasting"), 1);

    broker.wait_for_keep_alive_timeout();

    let mut subscriber = broker.connect_persistent(V3_1_1, "subscriber", true);
    subscriber.accept_publish("t", "lasting");
}

#[test]
fn mqtt_3_1_2_29_no_reason_strings_or_user_properties_without_request_problem_information() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c").property(property::request_problem_information(0));
    let (mut client, _) = broker.connect_with(&connect);

    client.send(&crate::support::wire::subscribe(
        V5,
        1,
        &[("a/#/b", 0)],
        &[],
    ));
    client.send(&crate::support::wire::unsubscribe(V5, 2, &["never"]));
    client.publish(&Publish::new("nobody", "x").qos(1, 3));
    client.send_pubrel(99);

    for kind in [Kind::SubAck, Kind::UnsubAck, Kind::PubAck, Kind::PubComp] {
        let packet = client.expect(kind);
        assert_eq!(packet.value(property::REASON_STRING), None, "{packet:?}");
        assert!(
            packet.values(property::USER_PROPERTY).is_empty(),
            "{packet:?}"
        );
    }
}

#[test]
fn mqtt_3_1_2_28_no_response_information_unless_requested() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c").property(property::request_response_information(0));

    let (_client, connack) = broker.connect_with(&connect);

    assert_eq!(connack.value(property::RESPONSE_INFORMATION), None);
}

#[test]
fn mqtt_3_2_2_response_information_is_the_prefix_and_the_client_id() {
    let broker = Broker::start_with(&[("session.response_prefix", "responses")]);
    let connect = Connect::new(V5, "c").property(property::request_response_information(1));

    let (_client, connack) = broker.connect_with(&connect);

    let told = Value::Text("responses/c".to_owned());
    assert_eq!(connack.value(property::RESPONSE_INFORMATION), Some(&told));
}

#[test]
fn connect_with_every_property_is_accepted() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c")
        .property(property::session_expiry(10))
        .property(property::receive_maximum(100))
        .property(property::maximum_packet_size(100_000))
        .property(property::topic_alias_maximum(10))
        .property(property::request_response_information(1))
        .property(property::request_problem_information(1))
        .property(property::user_property("a", "1"))
        .property(property::user_property("a", "2"));

    let (mut client, _) = broker.connect_with(&connect);

    client.ping();
}

/// What CONNACK does not limit is available.
#[test]
fn connack_announces_no_feature_as_missing() {
    let broker = Broker::start();

    let (_client, connack) = broker.connect_with(&Connect::new(V5, "c"));

    assert_eq!(connack.number(property::MAXIMUM_QOS), None);
    for feature in [
        property::RETAIN_AVAILABLE,
        property::WILDCARD_SUBSCRIPTION_AVAILABLE,
        property::SUBSCRIPTION_IDENTIFIERS_AVAILABLE,
        property::SHARED_SUBSCRIPTION_AVAILABLE,
    ] {
        assert_ne!(connack.number(feature), Some(0), "{connack:?}");
    }
    assert_eq!(connack.value(property::SERVER_REFERENCE), None);
}
