//! From packets to bytes.
//!
//! [`encode`] writes any packet. Deliveries do not become a [`Packet`] first: the [`Message`]
//! already holds most of their bytes, and [`encode_publish_head`] adds the rest.

use std::num::NonZeroU16;

use super::packet::{
    Acknowledgement, ConnAck, Connect, PacketType, Publish, Subscribe, SubscribeAcknowledgement,
    Unsubscribe,
};
use super::property::{Properties, Property};
use super::topic::SubscribeOptions;
use super::{Message, Packet, PacketId, ProtocolVersion, QoS, ReasonCode};

/// The most that a packet can have on the wire: its type, four bytes of Remaining Length, and
/// what those can say.
pub const PACKET_BYTES_MAX: usize = 1 + 4 + VARIABLE_BYTE_INTEGER_MAX;

const VARIABLE_BYTE_INTEGER_MAX: usize = 268_435_455;

/// What one delivery of a message has of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct PublishHeader<'a> {
    pub dup: bool,
    pub qos: QoS,
    pub retain: bool,
    /// Present exactly if the QoS is not 0.
    pub packet_id: Option<PacketId>,
    /// Not sent before version 5, as are the next two.
    pub topic_alias: Option<TopicAlias>,
    /// Seconds that are left.
    pub message_expiry_interval: Option<u32>,
    pub subscription_identifiers: &'a [u32],
}

/// How a delivery uses a Topic Alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopicAlias {
    /// Sends topic and alias, and so sets or replaces what the alias stands for.
    Define(NonZeroU16),
    /// Sends the alias alone.
    Use(NonZeroU16),
}

impl TopicAlias {
    fn number(self) -> u16 {
        match self {
            Self::Define(number) | Self::Use(number) => number.get(),
        }
    }
}

/// Appends `packet`. A CONNECT is encoded in its own version, and AUTH, which exists in version 5
/// only, as it is there.
///
/// # Panics
/// If a text is longer than 65,535 bytes, or the packet than [`PACKET_BYTES_MAX`].
pub fn encode(packet: &Packet<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    if let Packet::Publish(publish) = packet {
        return encode_publish(publish, version, out);
    }
    let packet_type = packet.packet_type();
    out.push((packet_type as u8) << 4 | packet_type.reserved_flags());
    put_with_length(out, |out| match packet {
        Packet::PubAck(acknowledgement)
        | Packet::PubRec(acknowledgement)
        | Packet::PubRel(acknowledgement)
        | Packet::PubComp(acknowledgement) => put_acknowledgement(acknowledgement, version, out),
        Packet::Connect(connect) => put_connect(connect, out),
        Packet::ConnAck(connack) => put_connack(connack, version, out),
        Packet::Subscribe(subscribe) => put_subscribe(subscribe, version, out),
        Packet::SubAck(acknowledgement) => put_suback(acknowledgement, version, out),
        Packet::Unsubscribe(unsubscribe) => put_unsubscribe(unsubscribe, version, out),
        Packet::UnsubAck(acknowledgement) => put_unsuback(acknowledgement, version, out),
        Packet::Disconnect(disconnect) if version.is_v5() => {
            put_reason_and_properties(disconnect.reason, disconnect.properties, out);
        }
        Packet::Auth(auth) => put_reason_and_properties(auth.reason, auth.properties, out),
        Packet::Disconnect(_) | Packet::PingReq | Packet::PingResp => {}
        Packet::Publish(_) => unreachable!("has been returned"),
    });
}

/// Appends the PUBLISH that delivers `message`, up to but without the payload.
///
/// # Panics
/// If [`publish_length`] is above [`PACKET_BYTES_MAX`], or the packet identifier and the QoS do not
/// go together.
#[inline]
pub fn encode_publish_head(
    message: &Message,
    header: &PublishHeader<'_>,
    version: ProtocolVersion,
    out: &mut Vec<u8>,
) {
    let lengths = PublishLengths::of(message, header, version);
    out.reserve(lengths.total() - message.payload().len());
    out.push(publish_type(header.dup, header.qos, header.retain));
    put_variable_byte_integer(lengths.remaining, out);
    out.extend_from_slice(sent_topic(message, header, version));
    put_publish_packet_id(header.qos, header.packet_id, out);
    if version.is_v5() {
        put_variable_byte_integer(lengths.properties, out);
        if let Some(seconds) = header.message_expiry_interval {
            Property::MessageExpiryInterval(seconds).encode(out);
        }
        if let Some(alias) = header.topic_alias {
            Property::TopicAlias(alias.number()).encode(out);
        }
        for &identifier in header.subscription_identifiers {
            Property::SubscriptionIdentifier(identifier).encode(out);
        }
        out.extend_from_slice(message.properties());
    }
}

/// Bytes of that PUBLISH on the wire, fixed header and payload included. One that is longer than
/// the client's Maximum Packet Size, [MQTT-3.1.2-24], or [`PACKET_BYTES_MAX`] must not be sent.
#[inline]
pub fn publish_length(
    message: &Message,
    header: &PublishHeader<'_>,
    version: ProtocolVersion,
) -> usize {
    PublishLengths::of(message, header, version).total()
}

struct PublishLengths {
    /// The Property Length.
    properties: usize,
    /// The Remaining Length.
    remaining: usize,
}

impl PublishLengths {
    #[inline]
    fn of(message: &Message, header: &PublishHeader<'_>, version: ProtocolVersion) -> Self {
        let mut properties = 0;
        let mut remaining = sent_topic(message, header, version).len()
            + packet_id_length(header.qos)
            + message.payload().len();
        if version.is_v5() {
            let identifiers = header.subscription_identifiers.iter();
            properties = message.properties().len()
                + header.message_expiry_interval.map_or(0, |_| 5)
                + header.topic_alias.map_or(0, |_| 3)
                + identifiers
                    .map(|&identifier| 1 + variable_byte_integer_length(identifier as usize))
                    .sum::<usize>();
            remaining += variable_byte_integer_length(properties) + properties;
        }
        Self {
            properties,
            remaining,
        }
    }

    fn total(&self) -> usize {
        1 + variable_byte_integer_length(self.remaining) + self.remaining
    }
}

/// With its length bytes.
#[inline]
fn sent_topic<'a>(
    message: &'a Message,
    header: &PublishHeader<'_>,
    version: ProtocolVersion,
) -> &'a [u8] {
    match header.topic_alias {
        Some(TopicAlias::Use(_)) if version.is_v5() => &[0, 0],
        _ => message.encoded_topic(),
    }
}

fn publish_type(dup: bool, qos: QoS, retain: bool) -> u8 {
    (PacketType::Publish as u8) << 4 | u8::from(dup) << 3 | (qos as u8) << 1 | u8::from(retain)
}

fn packet_id_length(qos: QoS) -> usize {
    match qos {
        QoS::AtMostOnce => 0,
        QoS::AtLeastOnce | QoS::ExactlyOnce => 2,
    }
}

fn put_publish_packet_id(qos: QoS, packet_id: Option<PacketId>, out: &mut Vec<u8>) {
    assert_eq!(
        qos == QoS::AtMostOnce,
        packet_id.is_none(),
        "a PUBLISH has a packet identifier exactly if its QoS is not 0"
    );
    if let Some(packet_id) = packet_id {
        put_packet_id(packet_id, out);
    }
}

fn encode_publish(publish: &Publish<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    let properties = publish.properties.0;
    let mut remaining =
        2 + publish.topic.len() + packet_id_length(publish.qos) + publish.payload.len();
    if version.is_v5() {
        remaining += variable_byte_integer_length(properties.len()) + properties.len();
    }
    out.push(publish_type(publish.dup, publish.qos, publish.retain));
    put_variable_byte_integer(remaining, out);
    put_binary(publish.topic.as_bytes(), out);
    put_publish_packet_id(publish.qos, publish.packet_id, out);
    put_properties(publish.properties, version, out);
    out.extend_from_slice(publish.payload);
}

fn put_acknowledgement(
    acknowledgement: &Acknowledgement<'_>,
    version: ProtocolVersion,
    out: &mut Vec<u8>,
) {
    put_packet_id(acknowledgement.packet_id, out);
    if version.is_v5() {
        put_reason_and_properties(acknowledgement.reason, acknowledgement.properties, out);
    }
}

/// Leaves out what may be left out: empty properties, and before them Success.
fn put_reason_and_properties(reason: ReasonCode, properties: Properties<'_>, out: &mut Vec<u8>) {
    if reason != ReasonCode::Success || !properties.is_empty() {
        out.push(reason as u8);
    }
    if !properties.is_empty() {
        put_properties(properties, ProtocolVersion::V5, out);
    }
}

fn put_connect(connect: &Connect<'_>, out: &mut Vec<u8>) {
    let (name, level): (&[u8], u8) = match connect.version {
        ProtocolVersion::V3_1 => (b"MQIsdp", 3),
        ProtocolVersion::V3_1_1 => (b"MQTT", 4),
        ProtocolVersion::V5 => (b"MQTT", 5),
    };
    put_binary(name, out);
    out.push(level);
    let will_flags = connect.will.as_ref().map_or(0, |will| {
        0b0000_0100 | (will.qos as u8) << 3 | u8::from(will.retain) << 5
    });
    out.push(
        u8::from(connect.clean_start) << 1
            | will_flags
            | u8::from(connect.password.is_some()) << 6
            | u8::from(connect.user_name.is_some()) << 7,
    );
    out.extend_from_slice(&connect.keep_alive.to_be_bytes());
    if connect.version.is_v5() {
        put_with_length(out, |out| connect.properties.encode(out));
    }
    put_binary(connect.client_id.as_bytes(), out);
    if let Some(will) = &connect.will {
        if connect.version.is_v5() {
            put_with_length(out, |out| will.properties.encode(out));
        }
        put_binary(will.topic.as_bytes(), out);
        put_binary(will.payload, out);
    }
    if let Some(user_name) = connect.user_name {
        put_binary(user_name.as_bytes(), out);
    }
    if let Some(password) = connect.password {
        put_binary(password, out);
    }
}

fn put_connack(connack: &ConnAck<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    // MQTT 3.1 reserves the byte in which the others say whether a session is present.
    out.push((connack.session_present && version > ProtocolVersion::V3_1).into());
    if version.is_v5() {
        out.push(connack.reason as u8);
        put_with_length(out, |out| connack.properties.encode(out));
    } else {
        out.push(connack.reason.connect_return_code());
    }
}

fn put_subscribe(subscribe: &Subscribe<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    put_packet_id(subscribe.packet_id, out);
    put_properties(subscribe.properties, version, out);
    for (filter, options) in &subscribe.filters {
        put_binary(filter.as_bytes(), out);
        out.push(subscribe_options_bits(options, version));
    }
}

fn subscribe_options_bits(options: &SubscribeOptions, version: ProtocolVersion) -> u8 {
    let qos = options.maximum_qos as u8;
    if !version.is_v5() {
        return qos;
    }
    qos | u8::from(options.no_local) << 2
        | u8::from(options.retain_as_published) << 3
        | (options.retain_handling as u8) << 4
}

fn put_suback(
    acknowledgement: &SubscribeAcknowledgement<'_>,
    version: ProtocolVersion,
    out: &mut Vec<u8>,
) {
    put_packet_id(acknowledgement.packet_id, out);
    put_properties(acknowledgement.properties, version, out);
    out.extend(acknowledgement.reasons.iter().map(|&reason| {
        // Version 3 knows one failure only.
        if !version.is_v5() && reason.is_error() {
            ReasonCode::UnspecifiedError as u8
        } else {
            reason as u8
        }
    }));
}

fn put_unsubscribe(unsubscribe: &Unsubscribe<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    put_packet_id(unsubscribe.packet_id, out);
    put_properties(unsubscribe.properties, version, out);
    for filter in &unsubscribe.filters {
        put_binary(filter.as_bytes(), out);
    }
}

fn put_unsuback(
    acknowledgement: &SubscribeAcknowledgement<'_>,
    version: ProtocolVersion,
    out: &mut Vec<u8>,
) {
    put_packet_id(acknowledgement.packet_id, out);
    if version.is_v5() {
        put_properties(acknowledgement.properties, version, out);
        out.extend(acknowledgement.reasons.iter().map(|&reason| reason as u8));
    }
}

fn put_properties(properties: Properties<'_>, version: ProtocolVersion, out: &mut Vec<u8>) {
    if version.is_v5() {
        put_variable_byte_integer(properties.0.len(), out);
        out.extend_from_slice(properties.0);
    }
}

fn put_packet_id(packet_id: PacketId, out: &mut Vec<u8>) {
    out.extend_from_slice(&packet_id.get().to_be_bytes());
}

/// Binary Data, section 1.5.6, and so also a UTF-8 Encoded String.
pub(super) fn put_binary(data: &[u8], out: &mut Vec<u8>) {
    let length = u16::try_from(data.len()).expect("text and data have a u16 length");
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends what `put` appends, with its length as a Variable Byte Integer before it.
fn put_with_length(out: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.push(0);
    put(out);
    let length = out.len() - start - 1;
    if length < 0x80 {
        out[start] = length as u8;
    } else {
        let mut encoded = Vec::with_capacity(4);
        put_variable_byte_integer(length, &mut encoded);
        out.splice(start..=start, encoded);
    }
}

#[inline]
pub(super) fn put_variable_byte_integer(mut value: usize, out: &mut Vec<u8>) {
    assert!(
        value <= VARIABLE_BYTE_INTEGER_MAX,
        "{value} is too large for the wire"
    );
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[inline]
fn variable_byte_integer_length(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::ProtocolVersion::{V3_1, V3_1_1, V5};
    use super::*;
    use crate::mqtt::arbitrary;
    use crate::mqtt::decode::decode;
    use crate::mqtt::message::MessageParts;
    use crate::mqtt::packet::Disconnect;
    use crate::mqtt::property::ConnAckProperties;

    fn encoded(packet: &Packet<'_>, version: ProtocolVersion) -> Vec<u8> {
        let mut out = Vec::new();
        encode(packet, version, &mut out);
        out
    }

    fn id(value: u16) -> PacketId {
        PacketId::new(value).unwrap()
    }

    fn delivered(
        message: &Message,
        header: &PublishHeader<'_>,
        version: ProtocolVersion,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        encode_publish_head(message, header, version, &mut out);
        out.extend_from_slice(message.payload());
        assert_eq!(out.len(), publish_length(message, header, version));
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn mqtt_3_3_2_18_a_delivery_carries_the_message_unaltered(
            published in arbitrary::publish(V5),
            version in arbitrary::version(),
            alias in prop_oneof![Just(None), (any::<bool>(), 1..=u16::MAX).prop_map(Some)],
            message_expiry_interval in any::<Option<u32>>(),
            subscription_identifiers in prop::collection::vec(1..=268_435_455_u32, 0..4),
        ) {
            let properties: Vec<&[u8]> = published.properties.forwarded().collect();
            let message = Message::new(MessageParts {
                topic: published.topic,
                qos: published.qos,
                retain: published.retain,
                expires_at: None,
                properties: &properties,
                payload: published.payload,
            });
            let alias = alias.map(|(defines, number)| {
                let number = NonZeroU16::new(number).unwrap();
                if defines { TopicAlias::Define(number) } else { TopicAlias::Use(number) }
            });
            let header = PublishHeader {
                dup: published.dup,
                qos: published.qos,
                retain: published.retain,
                packet_id: published.packet_id,
                topic_alias: alias,
                message_expiry_interval,
                subscription_identifiers: &subscription_identifiers,
            };

            let bytes = delivered(&message, &header, version);
            let Ok(Packet::Publish(delivered)) = decode(&bytes, version) else {
                panic!("not a PUBLISH");
            };

            prop_assert_eq!(delivered.dup, published.dup);
            prop_assert_eq!(delivered.qos, published.qos);
            prop_assert_eq!(delivered.retain, published.retain);
            prop_assert_eq!(delivered.packet_id, published.packet_id);
            prop_assert_eq!(delivered.payload, published.payload);
            if version.is_v5() {
                let uses_alias = matches!(alias, Some(TopicAlias::Use(_)));
                prop_assert_eq!(delivered.topic, if uses_alias { "" } else { published.topic });
                prop_assert_eq!(delivered.properties.forwarded().collect::<Vec<_>>(), properties);
                prop_assert_eq!(delivered.properties.topic_alias(), alias.map(TopicAlias::number));
                prop_assert_eq!(delivered.properties.message_expiry_interval(), message_expiry_interval);
                let identifiers: Vec<_> = delivered.properties.subscription_identifiers().collect();
                prop_assert_eq!(identifiers, subscription_identifiers);
            } else {
                prop_assert_eq!(delivered.topic, published.topic);
                prop_assert!(delivered.properties.is_empty());
            }
        }
    }

    #[test]
    fn mqtt_3_4_2_1_success_and_empty_properties_are_left_out() {
        let success = Packet::PubAck(Acknowledgement::success(id(7)));
        let failure = Packet::PubRec(Acknowledgement::with_reason(
            id(7),
            ReasonCode::QuotaExceeded,
        ));

        assert_eq!(encoded(&success, V5), b"\x40\x02\0\x07");
        assert_eq!(encoded(&failure, V5), b"\x50\x03\0\x07\x97");
        assert_eq!(encoded(&failure, V3_1_1), b"\x50\x02\0\x07");
    }

    #[test]
    fn mqtt_3_6_1_1_pubrel_has_its_reserved_flags() {
        let pubrel = Packet::PubRel(Acknowledgement::success(id(1)));

        assert_eq!(encoded(&pubrel, V3_1_1), b"\x62\x02\0\x01");
    }

    #[test]
    fn mqtt311_3_2_2_3_connack_has_a_return_code() {
        let connack = |session_present, reason| {
            Packet::ConnAck(Box::new(ConnAck {
                session_present,
                reason,
                properties: ConnAckProperties::default(),
            }))
        };

        assert_eq!(
            encoded(&connack(true, ReasonCode::Success), V3_1_1),
            b"\x20\x02\x01\0"
        );
        assert_eq!(
            encoded(&connack(true, ReasonCode::Success), V3_1),
            b"\x20\x02\0\0"
        );
        assert_eq!(
            encoded(&connack(false, ReasonCode::Banned), V3_1_1),
            b"\x20\x02\0\x05"
        );
        assert_eq!(
            encoded(&connack(false, ReasonCode::Banned), V5),
            b"\x20\x03\0\x8A\0"
        );
    }

    #[test]
    fn mqtt311_3_9_3_2_every_failure_in_a_suback_is_0x80() {
        let suback = Packet::SubAck(SubscribeAcknowledgement {
            packet_id: id(1),
            reasons: vec![ReasonCode::GrantedQoS1, ReasonCode::NotAuthorized],
            properties: Properties::default(),
        });

        assert_eq!(encoded(&suback, V3_1_1), b"\x90\x04\0\x01\x01\x80");
        assert_eq!(encoded(&suback, V5), b"\x90\x05\0\x01\0\x01\x87");
    }

    #[test]
    fn mqtt311_3_11_3_an_unsuback_has_no_payload() {
        let unsuback = Packet::UnsubAck(SubscribeAcknowledgement {
            packet_id: id(1),
            reasons: vec![ReasonCode::Success],
            properties: Properties::default(),
        });

        assert_eq!(encoded(&unsuback, V3_1_1), b"\xB0\x02\0\x01");
    }

    #[test]
    fn a_normal_disconnect_is_two_bytes() {
        let disconnect = |reason| {
            Packet::Disconnect(Disconnect {
                reason,
                properties: Properties::default(),
            })
        };

        assert_eq!(encoded(&disconnect(ReasonCode::Success), V5), b"\xE0\0");
        assert_eq!(
            encoded(&disconnect(ReasonCode::ServerBusy), V5),
            b"\xE0\x01\x89"
        );
        assert_eq!(
            encoded(&disconnect(ReasonCode::ServerBusy), V3_1_1),
            b"\xE0\0"
        );
    }

    #[test]
    fn a_packet_is_appended_to_what_is_there() {
        let long = "l".repeat(300);
        let unsubscribe = Packet::Unsubscribe(Unsubscribe {
            packet_id: id(1),
            properties: Properties::default(),
            filters: vec![&long],
        });
        let mut out = b"before".to_vec();

        encode(&unsubscribe, V3_1_1, &mut out);

        assert_eq!(out[..6], *b"before");
        assert_eq!(decode(&out[6..], V3_1_1), Ok(unsubscribe));
    }

    #[test]
    fn variable_byte_integers_have_the_length_of_table_1_1() {
        for (value, length) in [
            (0, 1),
            (127, 1),
            (128, 2),
            (16_383, 2),
            (16_384, 3),
            (2_097_151, 3),
            (2_097_152, 4),
            (VARIABLE_BYTE_INTEGER_MAX, 4),
        ] {
            let mut out = Vec::new();
            put_variable_byte_integer(value, &mut out);
            assert_eq!(out.len(), length, "{value}");
            assert_eq!(variable_byte_integer_length(value), length, "{value}");
        }
    }
}
