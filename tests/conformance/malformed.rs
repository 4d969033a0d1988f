//! Sections 1.5, 2 and 4.13: packets that no client may send. Each ends its own connection, with
//! a reason in version 5, and leaves everybody else alone.

use crate::support::wire::{self, Kind};
use crate::support::{Broker, Connect, Publish, V3_1_1, V5, Version, both_versions, property};

/// Sends `bytes` on a connection that is established, expects its end with one of these reasons,
/// and checks that another client has not noticed.
#[track_caller]
fn refuses(version: Version, bytes: &[u8], reasons: &[u8]) {
    let broker = Broker::start();
    let mut bystander = broker.connect(version, "bystander");
    bystander.subscribe("t", 1);
    let mut client = broker.connect(version, "culprit");

    client.send(bytes);

    client.expect_disconnect_with(reasons);
    bystander.publish_acknowledged("t", "undisturbed", 1);
    bystander.accept_publish("t", "undisturbed");
}

/// The specification calls some of these malformed and some a protocol error, and a few both.
const INVALID: &[u8] = &[0x81, 0x82];
const MALFORMED: &[u8] = &[0x81];
const PROTOCOL_ERROR: &[u8] = &[0x82];

both_versions! {
    mqtt_1_5_5_1_remaining_length_of_five_bytes,
    packet_type_0,
    mqtt_2_1_3_1_reserved_flags_of_subscribe,
    mqtt_2_1_3_1_reserved_flags_of_unsubscribe,
    mqtt_2_1_3_1_reserved_flags_of_pubrel,
    mqtt_2_1_3_1_reserved_flags_of_puback,
    mqtt_2_1_3_1_reserved_flags_of_pubrec,
    mqtt_2_1_3_1_reserved_flags_of_pubcomp,
    mqtt_2_1_3_1_reserved_flags_of_pingreq,
    mqtt_3_14_1_1_reserved_flags_of_disconnect,
    mqtt_3_3_1_4_publish_with_qos_3,
    mqtt_3_3_1_2_publish_with_qos_0_and_dup,
    mqtt_2_2_1_3_publish_with_packet_identifier_0,
    mqtt_2_2_1_3_subscribe_with_packet_identifier_0,
    mqtt_2_2_1_3_unsubscribe_with_packet_identifier_0,
    puback_with_packet_identifier_0,
    mqtt_3_8_3_2_subscribe_without_filters,
    mqtt_3_10_3_2_unsubscribe_without_filters,
    subscribe_with_qos_3,
    subscribe_without_options,
    publish_without_packet_identifier,
    publish_with_a_topic_longer_than_the_packet,
    subscribe_with_a_filter_longer_than_the_packet,
    mqtt_1_5_4_1_topic_that_is_not_utf8,
    mqtt_1_5_4_1_topic_with_a_surrogate,
    mqtt_1_5_4_1_topic_in_overlong_utf8,
    mqtt_1_5_4_1_filter_that_is_not_utf8,
    mqtt_1_5_4_1_unsubscribe_filter_that_is_not_utf8,
    empty_puback,
    pingreq_with_a_body,
    connack_from_a_client,
    suback_from_a_client,
    unsuback_from_a_client,
    pingresp_from_a_client,
    random_bytes_end_their_connection_only,
    random_changes_of_valid_packets_disturb_nobody_else,
    a_packet_that_never_ends_holds_up_nobody_else,
}

fn mqtt_1_5_5_1_remaining_length_of_five_bytes(version: Version) {
    refuses(version, &[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], MALFORMED);
}

fn packet_type_0(version: Version) {
    refuses(version, &[0x00, 0x00], MALFORMED);
}

/// The packet with one more flag.
fn with_flag(mut packet: Vec<u8>, flag: u8) -> Vec<u8> {
    packet[0] ^= flag;
    packet
}

fn mqtt_2_1_3_1_reserved_flags_of_subscribe(version: Version) {
    refuses(
        version,
        &with_flag(wire::subscribe(version, 1, &[("t", 0)], &[]), 0b0010),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_unsubscribe(version: Version) {
    refuses(
        version,
        &with_flag(wire::unsubscribe(version, 1, &["t"]), 0b0001),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_pubrel(version: Version) {
    refuses(
        version,
        &with_flag(wire::acknowledgement(Kind::PubRel, 1), 0b0010),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_puback(version: Version) {
    refuses(
        version,
        &with_flag(wire::acknowledgement(Kind::PubAck, 1), 0b0010),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_pubrec(version: Version) {
    refuses(
        version,
        &with_flag(wire::acknowledgement(Kind::PubRec, 1), 0b1000),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_pubcomp(version: Version) {
    refuses(
        version,
        &with_flag(wire::acknowledgement(Kind::PubComp, 1), 0b0001),
        MALFORMED,
    );
}

fn mqtt_2_1_3_1_reserved_flags_of_pingreq(version: Version) {
    refuses(version, &with_flag(wire::pingreq(), 0b0100), MALFORMED);
}

fn mqtt_3_14_1_1_reserved_flags_of_disconnect(version: Version) {
    refuses(version, &with_flag(wire::disconnect(), 0b0010), MALFORMED);
}

fn mqtt_3_3_1_4_publish_with_qos_3(version: Version) {
    refuses(
        version,
        &Publish::new("t", "x").qos(3, 1).bytes(version),
        MALFORMED,
    );
}

fn mqtt_3_3_1_2_publish_with_qos_0_and_dup(version: Version) {
    refuses(
        version,
        &Publish::new("t", "x").dup().bytes(version),
        INVALID,
    );
}

fn mqtt_2_2_1_3_publish_with_packet_identifier_0(version: Version) {
    refuses(
        version,
        &Publish::new("t", "x").qos(1, 0).bytes(version),
        INVALID,
    );
}

fn mqtt_2_2_1_3_subscribe_with_packet_identifier_0(version: Version) {
    refuses(
        version,
        &wire::subscribe(version, 0, &[("t", 0)], &[]),
        INVALID,
    );
}

fn mqtt_2_2_1_3_unsubscribe_with_packet_identifier_0(version: Version) {
    refuses(version, &wire::unsubscribe(version, 0, &["t"]), INVALID);
}

fn puback_with_packet_identifier_0(version: Version) {
    refuses(version, &wire::acknowledgement(Kind::PubAck, 0), INVALID);
}

fn mqtt_3_8_3_2_subscribe_without_filters(version: Version) {
    refuses(version, &wire::subscribe(version, 1, &[], &[]), INVALID);
}

fn mqtt_3_10_3_2_unsubscribe_without_filters(version: Version) {
    refuses(version, &wire::unsubscribe(version, 1, &[]), INVALID);
}

fn subscribe_with_qos_3(version: Version) {
    refuses(
        version,
        &wire::subscribe(version, 1, &[("t", 3)], &[]),
        INVALID,
    );
}

#[test]
fn mqtt311_3_8_3_4_subscribe_with_reserved_bits_beside_the_qos() {
    refuses(
        V3_1_1,
        &wire::subscribe(V3_1_1, 1, &[("t", 0b0000_0101)], &[]),
        INVALID,
    );
}

fn subscribe_without_options(version: Version) {
    refuses(
        version,
        &shortened(&wire::subscribe(version, 1, &[("t", 0)], &[]), 1),
        MALFORMED,
    );
}

/// The packet without its last bytes, with a Remaining Length that says so.
fn shortened(packet: &[u8], by: usize) -> Vec<u8> {
    wire::frame(packet[0], &packet[2..packet.len() - by])
}

fn publish_without_packet_identifier(version: Version) {
    let body = wire::prefixed(b"t");
    refuses(version, &wire::frame(0x32, &body), MALFORMED);
}

fn publish_with_a_topic_longer_than_the_packet(version: Version) {
    refuses(version, &wire::frame(0x30, &[0x00, 0x10, b't']), MALFORMED);
}

fn subscribe_with_a_filter_longer_than_the_packet(version: Version) {
    let mut packet = wire::subscribe(version, 1, &[("t", 0)], &[]);
    let length_at = packet.len() - 4;
    packet[length_at] = 0x7F;
    refuses(version, &packet, MALFORMED);
}

fn mqtt_1_5_4_1_topic_that_is_not_utf8(version: Version) {
    refuses(
        version,
        &Publish::from_bytes(b"t\xC3\x28", b"x").bytes(version),
        &[0x81, 0x90],
    );
}

fn mqtt_1_5_4_1_topic_with_a_surrogate(version: Version) {
    refuses(
        version,
        &Publish::from_bytes(b"t\xED\xA0\x80", b"x").bytes(version),
        &[0x81, 0x90],
    );
}

fn mqtt_1_5_4_1_topic_in_overlong_utf8(version: Version) {
    refuses(
        version,
        &Publish::from_bytes(b"t\xC0\xAF", b"x").bytes(version),
        &[0x81, 0x90],
    );
}

fn mqtt_1_5_4_1_filter_that_is_not_utf8(version: Version) {
    let mut packet = wire::subscribe(version, 1, &[("t", 0)], &[]);
    let filter_at = packet.len() - 2;
    packet[filter_at] = 0xFF;
    refuses(version, &packet, &[0x81, 0x8F]);
}

fn mqtt_1_5_4_1_unsubscribe_filter_that_is_not_utf8(version: Version) {
    let mut packet = wire::unsubscribe(version, 1, &["t"]);
    let filter_at = packet.len() - 1;
    packet[filter_at] = 0xFF;
    refuses(version, &packet, &[0x81, 0x8F]);
}

fn empty_puback(version: Version) {
    refuses(version, &wire::frame(0x40, &[]), MALFORMED);
}

fn pingreq_with_a_body(version: Version) {
    refuses(version, &wire::frame(0xC0, &[0]), MALFORMED);
}

fn connack_from_a_client(version: Version) {
    let body: &[u8] = if version.is_v5() { &[0, 0, 0] } else { &[0, 0] };
    refuses(version, &wire::frame(0x20, body), INVALID);
}

fn suback_from_a_client(version: Version) {
    let body: &[u8] = if version.is_v5() {
        &[0, 1, 0, 0]
    } else {
        &[0, 1, 0]
    };
    refuses(version, &wire::frame(0x90, body), INVALID);
}

fn unsuback_from_a_client(version: Version) {
    let body: &[u8] = if version.is_v5() {
        &[0, 1, 0, 0]
    } else {
        &[0, 1]
    };
    refuses(version, &wire::frame(0xB0, body), INVALID);
}

fn pingresp_from_a_client(version: Version) {
    refuses(version, &wire::frame(0xD0, &[]), INVALID);
}

#[test]
fn mqtt311_packet_type_15_is_forbidden() {
    refuses(V3_1_1, &wire::frame(0xF0, &[]), INVALID);
}

#[test]
fn mqtt311_bytes_after_the_end_of_a_puback() {
    refuses(V3_1_1, &wire::frame(0x40, &[0, 1, 0]), MALFORMED);
}

// ── properties ───────────────────────────────────────────────────────────────────────────────

/// A QoS 0 PUBLISH whose properties are these bytes.
fn publish_with_properties(properties: &[u8]) -> Vec<u8> {
    let length = wire::variable_byte_integer(properties.len());
    wire::frame(
        0x30,
        &[wire::prefixed(b"t"), length, properties.to_vec()].concat(),
    )
}

#[test]
fn unknown_property() {
    refuses(V5, &publish_with_properties(&[0x7E, 0x00]), INVALID);
}

#[test]
fn property_of_another_packet() {
    // Receive Maximum belongs to CONNECT and CONNACK.
    refuses(V5, &publish_with_properties(&[0x21, 0x00, 0x01]), INVALID);
}

#[test]
fn property_without_its_value() {
    refuses(V5, &publish_with_properties(&[0x02, 0x00]), MALFORMED);
}

#[test]
fn property_length_beyond_the_packet() {
    let body = [wire::prefixed(b"t"), vec![0x20, 0x01]].concat();
    refuses(V5, &wire::frame(0x30, &body), MALFORMED);
}

#[test]
fn property_length_of_five_bytes() {
    let body = [wire::prefixed(b"t"), vec![0x80, 0x80, 0x80, 0x80, 0x01]].concat();
    refuses(V5, &wire::frame(0x30, &body), MALFORMED);
}

#[test]
fn missing_property_length() {
    refuses(V5, &wire::frame(0x30, &wire::prefixed(b"t")), MALFORMED);
}

#[test]
fn payload_format_indicator_twice() {
    refuses(
        V5,
        &publish_with_properties(&[0x01, 0x00, 0x01, 0x00]),
        PROTOCOL_ERROR,
    );
}

#[test]
fn payload_format_indicator_of_2() {
    refuses(V5, &publish_with_properties(&[0x01, 0x02]), INVALID);
}

#[test]
fn message_expiry_twice() {
    refuses(
        V5,
        &publish_with_properties(&[0x02, 0, 0, 0, 1, 0x02, 0, 0, 0, 1]),
        PROTOCOL_ERROR,
    );
}

#[test]
fn topic_alias_twice() {
    refuses(
        V5,
        &publish_with_properties(&[0x23, 0, 1, 0x23, 0, 1]),
        PROTOCOL_ERROR,
    );
}

#[test]
fn response_topic_twice() {
    let properties = [
        &[0x08][..],
        &wire::prefixed(b"a"),
        &[0x08],
        &wire::prefixed(b"b"),
    ]
    .concat();
    refuses(V5, &publish_with_properties(&properties), PROTOCOL_ERROR);
}

#[test]
fn correlation_data_twice() {
    let properties = [
        &[0x09][..],
        &wire::prefixed(b"a"),
        &[0x09],
        &wire::prefixed(b"b"),
    ]
    .concat();
    refuses(V5, &publish_with_properties(&properties), PROTOCOL_ERROR);
}

#[test]
fn content_type_twice() {
    let properties = [
        &[0x03][..],
        &wire::prefixed(b"a"),
        &[0x03],
        &wire::prefixed(b"b"),
    ]
    .concat();
    refuses(V5, &publish_with_properties(&properties), PROTOCOL_ERROR);
}

#[test]
fn mqtt_3_3_2_19_content_type_that_is_not_utf8() {
    let properties = [&[0x03][..], &wire::prefixed(b"\xFF")].concat();
    refuses(V5, &publish_with_properties(&properties), MALFORMED);
}

#[test]
fn mqtt_1_5_7_1_user_property_that_is_not_utf8() {
    let properties = [
        &[0x26][..],
        &wire::prefixed(b"name"),
        &wire::prefixed(b"\xC3\x28"),
    ]
    .concat();
    refuses(V5, &publish_with_properties(&properties), MALFORMED);
}

#[test]
fn user_property_without_its_value() {
    let properties = [&[0x26][..], &wire::prefixed(b"name")].concat();
    refuses(V5, &publish_with_properties(&properties), MALFORMED);
}

#[test]
fn session_expiry_twice_in_disconnect() {
    let properties = [property::session_expiry(0), property::session_expiry(0)];
    refuses(V5, &wire::disconnect_with(0, &properties), PROTOCOL_ERROR);
}

#[test]
fn reason_code_that_a_puback_cannot_have() {
    refuses(
        V5,
        &wire::acknowledgement_with_reason(Kind::PubAck, 1, 0x42),
        INVALID,
    );
}

#[test]
fn reason_code_that_a_disconnect_cannot_have() {
    refuses(V5, &wire::disconnect_with(0x42, &[]), INVALID);
}

/// CONNECT packets that are refused, with a CONNACK that says why or without.
#[test]
fn invalid_properties_of_connect_are_refused() {
    let broker = Broker::start();
    let connect = || Connect::new(V5, "c");
    let once_only = [
        property::session_expiry(1),
        property::receive_maximum(1),
        property::maximum_packet_size(100),
        property::topic_alias_maximum(1),
        property::request_response_information(0),
        property::request_problem_information(0),
        property::authentication_method("m"),
    ];
    let mut refused: Vec<Connect> = once_only
        .into_iter()
        .map(|twice| connect().property(twice.clone()).property(twice))
        .collect();
    refused.extend([
        connect().property(property::receive_maximum(0)),
        connect().property(property::maximum_packet_size(0)),
        connect().property(property::request_problem_information(2)),
        connect().property(property::request_response_information(2)),
        connect().property(property::topic_alias(1)),
        connect().property(property::will_delay(1)),
        connect().property(property::server_keep_alive(1)),
        connect().property(property::content_type("text/plain")),
    ]);

    for connect in refused {
        let mut client = broker.open(V5);
        client.send(&connect.bytes());

        if let Some(connack) = client.next_packet() {
            assert_eq!(connack.kind, Kind::ConnAck, "after {connect:?}");
            assert!(
                matches!(connack.reason(), 0x81 | 0x82),
                "{connack:?} after {connect:?}"
            );
            assert_eq!(client.next_packet(), None);
        }
    }
}

// ── anything at all ──────────────────────────────────────────────────────────────────────────

/// A generator of bytes that look random and are the same in each run (xorshift).
struct Bytes(u64);

impl Bytes {
    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.to_be_bytes()[0]
    }
}

fn random_bytes_end_their_connection_only(version: Version) {
    let broker = Broker::start();
    let mut bystander = broker.connect(version, "bystander");
    bystander.subscribe("bystander", 1);
    let mut bytes = Bytes(0x9E37_79B9_7F4A_7C15);

    for _ in 0..200 {
        let garbage: Vec<u8> = (0..64).map(|_| bytes.next()).collect();
        let mut client = broker.connect(version, "culprit");
        client.send(&garbage);
        client.drop_connection();
        let mut client = broker.open(version);
        client.send(&garbage);
        client.drop_connection();
    }

    bystander.publish_acknowledged("bystander", "undisturbed", 1);
    bystander.accept_publish("bystander", "undisturbed");
}

fn random_changes_of_valid_packets_disturb_nobody_else(version: Version) {
    let broker = Broker::start();
    let mut bystander = broker.connect(version, "bystander");
    bystander.subscribe("bystander", 1);
    let mut bytes = Bytes(0x2545_F491_4F6C_DD1D);
    let packets = [
        Publish::new("topic/a", "payload")
            .qos(1, 1)
            .property(property::content_type("x"))
            .bytes(version),
        wire::subscribe(version, 2, &[("a/+", 1), ("$share/g/b/#", 2)], &[]),
        wire::unsubscribe(version, 3, &["a/+"]),
        wire::acknowledgement(Kind::PubRec, 4),
    ];

    for round in 0..50 {
        for packet in &packets {
            let mut packet = packet.clone();
            let at = usize::from(bytes.next()) % packet.len();
            packet[at] ^= bytes.next() | 1;
            let mut client = broker.connect(version, &format!("culprit{round}"));
            client.send(&packet);
            client.drop_connection();
        }
    }

    bystander.publish_acknowledged("bystander", "undisturbed", 1);
    bystander.accept_publish("bystander", "undisturbed");
}

fn a_packet_that_never_ends_holds_up_nobody_else(version: Version) {
    let broker = Broker::start();
    let mut unfinished = broker.connect(version, "unfinished");
    unfinished.send(&[0x30, 0xFF, 0x7F, 0x00]);

    let mut other = broker.connect(version, "other");

    other.subscribe("t", 1);
    other.publish_acknowledged("t", "through", 1);
    other.accept_publish("t", "through");
}
