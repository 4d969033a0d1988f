//! Sections 3.1 and 3.2: CONNECT and CONNACK.

use crate::support::{
    Broker, Connect, Kind, Publish, V3_1, V3_1_1, V5, Value, Version, both_versions, property, wire,
};

both_versions! {
    mqtt_3_1_0_1_first_packet_other_than_connect_closes_the_connection,
    mqtt_3_1_0_2_second_connect_closes_the_connection,
    mqtt_3_1_2_1_other_protocol_name_closes_the_connection,
    mqtt_3_1_2_2_unknown_protocol_level_is_refused,
    mqtt_3_1_2_3_reserved_connect_flag_closes_the_connection,
    mqtt_3_1_2_12_will_qos_3_closes_the_connection,
    mqtt_3_1_2_11_will_qos_without_will_flag_closes_the_connection,
    mqtt_3_1_2_13_will_retain_without_will_flag_closes_the_connection,
    mqtt_3_1_3_4_client_id_that_is_not_utf8_closes_the_connection,
    mqtt_3_1_3_4_client_id_with_null_character_closes_the_connection,
    mqtt_3_1_3_5_client_ids_of_1_to_23_letters_and_digits_are_allowed,
    client_ids_longer_than_23_characters_are_allowed,
    mqtt_3_1_3_6_empty_client_id_with_clean_start_is_allowed,
    mqtt_3_1_3_11_will_topic_that_is_not_utf8_closes_the_connection,
    mqtt_3_1_3_12_user_name_that_is_not_utf8_closes_the_connection,
    mqtt_3_1_4_1_connect_without_client_id_field_closes_the_connection,
    mqtt_3_1_4_1_connect_with_bytes_after_its_end_closes_the_connection,
    mqtt_3_1_4_1_user_name_flag_without_user_name_closes_the_connection,
    mqtt_3_1_4_6_packets_sent_before_connack_are_processed_after_a_success,
    mqtt_3_1_4_6_packets_after_a_refused_connect_are_not_processed,
    mqtt_3_2_0_1_connack_is_the_first_packet,
    mqtt_3_2_0_2_only_one_connack_is_sent,
    mqtt_3_2_2_2_session_present_is_0_after_a_clean_start,
    mqtt_3_2_2_3_session_present_is_0_without_a_session,
    mqtt_3_2_2_3_session_present_is_1_with_a_session,
    a_connect_that_arrives_byte_by_byte_is_accepted,
}

fn mqtt_3_1_0_1_first_packet_other_than_connect_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let first_packets = [
        wire::pingreq(),
        wire::disconnect(),
        Publish::new("t", "x").bytes(version),
        wire::subscribe(version, 1, &[("#", 0)], &[]),
        wire::unsubscribe(version, 1, &["#"]),
        wire::acknowledgement(Kind::PubAck, 1),
        wire::acknowledgement(Kind::PubRel, 1),
        wire::frame(0xF0, &[]),
    ];
    for first_packet in first_packets {
        let mut client = broker.open(version);
        client.send(&first_packet);

        // Without a CONNECT the server does not know that it may send a DISCONNECT, [MQTT-3.14.0-1].
        assert_eq!(client.next_packet(), None, "after {first_packet:02x?}");
    }
}

fn mqtt_3_1_0_2_second_connect_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "twice");

    client.send(&Connect::new(version, "twice").bytes());

    client.expect_disconnect(0x82);
}

fn mqtt_3_1_2_1_other_protocol_name_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let level = if version.is_v5() { 5 } else { 4 };
    for name in ["MQTY", "mqtt", "MQTTT", "", "HTTP"] {
        let mut client = broker.open(version);
        client.send(&Connect::new(version, "c").protocol(name, level).bytes());

        // A CONNACK may come before the end; a success may not.
        if let Some(packet) = client.next_packet() {
            assert_eq!(packet.kind, Kind::ConnAck);
            assert_ne!(packet.reason(), 0, "protocol name {name:?}");
            assert_eq!(client.next_packet(), None);
        }
    }
}

fn mqtt_3_1_2_2_unknown_protocol_level_is_refused(version: Version) {
    let broker = Broker::start();
    let levels: &[u8] = if version.is_v5() {
        &[6, 7, 127, 255]
    } else {
        &[0, 1, 2]
    };
    for &level in levels {
        let mut client = broker.open(version);
        client.send(&Connect::new(version, "c").protocol("MQTT", level).bytes());

        let connack = client.expect(Kind::ConnAck);
        assert!(
            matches!(connack.reason(), 0x01 | 0x84),
            "level {level}: {connack:?}"
        );
        assert_eq!(client.next_packet(), None);
    }
}

#[test]
fn mqtt31_mqisdp_level_3_is_accepted() {
    let broker = Broker::start();

    let (mut client, connack) = broker.connect_with(&Connect::new(V3_1, "old"));

    assert!(!connack.session_present);
    client.subscribe("t", 1);
    client.publish_acknowledged("t", "works", 1);
    client.accept_publish("t", "works");
}

#[test]
fn mqtt31_connack_never_tells_of_a_session() {
    let broker = Broker::start();
    broker.connect_persistent(V3_1, "old", false).disconnect();

    // The byte is reserved in 3.1, and clients of that time reject anything else.
    broker.connect_persistent(V3_1, "old", false);
}

#[test]
fn mqtt31_session_is_resumed() {
    let broker = Broker::start();
    let mut old = broker.connect_persistent(V3_1, "old", false);
    old.subscribe("t", 1);
    old.disconnect();
    broker
        .connect(V3_1_1, "publisher")
        .publish_acknowledged("t", "kept", 1);

    let mut old = broker.connect_persistent(V3_1, "old", false);

    old.accept_publish("t", "kept");
}

fn mqtt_3_1_2_3_reserved_connect_flag_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").flags(0b0000_0011).bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_2_12_will_qos_3_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);
    let will = crate::support::Will::new("will", "x").qos(3);

    client.send(&Connect::new(version, "c").will(will).bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_2_11_will_qos_without_will_flag_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").flags(0b0000_1010).bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_2_13_will_retain_without_will_flag_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").flags(0b0010_0010).bytes());

    expect_malformed_connect(client);
}

#[test]
fn mqtt311_3_1_2_22_password_without_user_name_closes_the_connection() {
    let broker = Broker::start();
    let mut client = broker.open(V3_1_1);

    client.send(&Connect::new(V3_1_1, "c").password("secret").bytes());

    expect_malformed_connect(client);
}

#[test]
fn password_without_user_name_is_allowed_in_version_5() {
    let broker = Broker::start();

    let (mut client, _) = broker.connect_with(&Connect::new(V5, "c").password("secret"));

    client.ping();
}

fn mqtt_3_1_3_4_client_id_that_is_not_utf8_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(
        &Connect::new(version, "")
            .client_id_bytes(b"c\xC3\x28")
            .bytes(),
    );

    expect_malformed_connect(client);
}

fn mqtt_3_1_3_4_client_id_with_null_character_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "a\0b").bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_3_5_client_ids_of_1_to_23_letters_and_digits_are_allowed(version: Version) {
    let broker = Broker::start();

    for client_id in [
        "a",
        "Z",
        "0",
        "0123456789abcdefghijklm",
        "nopqrstuvwxyzABCDEFGHIJ",
        "KLMNOPQRSTUVWXYZ",
    ] {
        broker.connect(version, client_id).ping();
    }
}

fn client_ids_longer_than_23_characters_are_allowed(version: Version) {
    let broker = Broker::start();

    for client_id in [
        "mqttjs_0123456789abcdef0123456789",
        "sensor/ä/温度 #+$ \u{1F321}",
    ] {
        broker.connect(version, client_id).ping();
    }
}

fn mqtt_3_1_3_6_empty_client_id_with_clean_start_is_allowed(version: Version) {
    let broker = Broker::start();

    let mut first = broker.connect(version, "");
    let mut second = broker.connect(version, "");

    first.ping();
    second.ping();
}

#[test]
fn mqtt311_3_1_3_8_empty_client_id_without_clean_session_is_refused() {
    let broker = Broker::start();
    let mut client = broker.open(V3_1_1);

    client.send(&Connect::new(V3_1_1, "").clean_start(false).bytes());

    client.expect_refused(0x02, 0x85);
}

#[test]
fn mqtt_3_1_3_7_assigned_client_id_is_returned_and_names_the_session() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "").property(property::session_expiry(300));

    let (mut client, connack) = broker.connect_with(&connect);

    let Some(Value::Text(assigned)) = connack.value(property::ASSIGNED_CLIENT_IDENTIFIER) else {
        panic!("an assigned client id in {connack:?}");
    };
    client.subscribe("t", 0);
    client.disconnect();
    broker.connect_persistent(V5, assigned, true);
}

#[test]
fn mqtt_3_2_2_16_assigned_client_ids_differ() {
    let broker = Broker::start();

    let (_first, first) = broker.connect_with(&Connect::new(V5, ""));
    let (_second, second) = broker.connect_with(&Connect::new(V5, ""));

    let id = property::ASSIGNED_CLIENT_IDENTIFIER;
    assert!(first.value(id).is_some());
    assert_ne!(first.value(id), second.value(id));
}

#[test]
fn no_client_id_is_assigned_to_a_client_that_has_one() {
    let broker = Broker::start();

    let (_client, connack) = broker.connect_with(&Connect::new(V5, "mine"));

    assert_eq!(connack.value(property::ASSIGNED_CLIENT_IDENTIFIER), None);
}

fn mqtt_3_1_3_11_will_topic_that_is_not_utf8_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);
    let mut will = crate::support::Will::new("", "x");
    will.topic = b"w\xFF".to_vec();

    client.send(&Connect::new(version, "c").will(will).bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_3_12_user_name_that_is_not_utf8_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(
        &Connect::new(version, "c")
            .user_name(&b"\xED\xA0\x80"[..])
            .bytes(),
    );

    expect_malformed_connect(client);
}

fn mqtt_3_1_4_1_connect_without_client_id_field_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);
    let mut bytes = Connect::new(version, "").bytes();
    bytes.truncate(bytes.len() - 2);
    bytes[1] -= 2;

    client.send(&bytes);

    expect_malformed_connect(client);
}

fn mqtt_3_1_4_1_connect_with_bytes_after_its_end_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);
    let mut bytes = Connect::new(version, "c").bytes();
    bytes.push(0);
    bytes[1] += 1;

    client.send(&bytes);

    expect_malformed_connect(client);
}

fn mqtt_3_1_4_1_user_name_flag_without_user_name_closes_the_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    client.send(&Connect::new(version, "c").flags(0b1000_0010).bytes());

    expect_malformed_connect(client);
}

fn mqtt_3_1_4_6_packets_sent_before_connack_are_processed_after_a_success(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);
    let mut bytes = Connect::new(version, "hasty").bytes();
    bytes.extend(wire::subscribe(version, 1, &[("t", 0)], &[]));
    bytes.extend(Publish::new("t", "at once").bytes(version));

    client.send(&bytes);

    client.expect_connack(0);
    client.expect(Kind::SubAck);
    client.expect_publish("t", "at once");
}

fn mqtt_3_1_4_6_packets_after_a_refused_connect_are_not_processed(version: Version) {
    let broker = Broker::start();
    let mut observer = broker.connect(version, "observer");
    observer.subscribe("t", 0);
    let mut bytes = Connect::new(version, "c").flags(0b0000_0011).bytes();
    bytes.extend(Publish::new("t", "not allowed").bytes(version));
    let mut client = broker.open(version);

    client.send(&bytes);
    expect_malformed_connect(client);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "allowed", 0);
    observer.expect_publish("t", "allowed");
}

fn mqtt_3_2_0_1_connack_is_the_first_packet(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "waiting", 1);
    let mut client = broker.open(version);

    client.send(&Connect::persistent(version, "c").bytes());

    client.expect_connack(0);
    client.accept_publish("t", "waiting");
}

fn mqtt_3_2_0_2_only_one_connack_is_sent(version: Version) {
    let broker = Broker::start();

    let mut client = broker.connect(version, "c");

    client.expect_nothing();
}

fn mqtt_3_2_2_2_session_present_is_0_after_a_clean_start(version: Version) {
    let broker = Broker::start();
    broker.connect_persistent(version, "c", false).disconnect();

    let (_client, connack) =
        broker.connect_with(&Connect::persistent(version, "c").clean_start(true));

    assert!(!connack.session_present);
}

fn mqtt_3_2_2_3_session_present_is_0_without_a_session(version: Version) {
    let broker = Broker::start();
    broker.connect(version, "c").disconnect();

    broker.connect_persistent(version, "c", false);
}

fn mqtt_3_2_2_3_session_present_is_1_with_a_session(version: Version) {
    let broker = Broker::start();
    broker.connect_persistent(version, "c", false).disconnect();

    broker.connect_persistent(version, "c", true);
}

fn a_connect_that_arrives_byte_by_byte_is_accepted(version: Version) {
    let broker = Broker::start();
    let mut client = broker.open(version);

    for byte in Connect::new(version, "slow").bytes() {
        client.send(&[byte]);
    }

    client.expect_connack(0);
}

/// The end of the connection, before which version 5 may say why in a CONNACK.
#[track_caller]
fn expect_malformed_connect(mut client: crate::support::Client) {
    match client.next_packet() {
        None => {}
        Some(connack) if client.version().is_v5() && connack.kind == Kind::ConnAck => {
            assert!(
                matches!(connack.reason(), 0x81 | 0x82 | 0x85),
                "{connack:?}"
            );
            assert_eq!(client.next_packet(), None);
        }
        Some(packet) => panic!("expected the end of the connection, got {packet:?}"),
    }
}
