//! Strategies that make any packet an honest peer could send.
//!
//! Packets borrow, so what they borrow is leaked: a few megabytes in a test process.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::decode::Reader;
use super::encode::put_variable_byte_integer;
use super::packet::{
    Acknowledgement, Auth, ConnAck, Connect, Disconnect, PacketType, Publish, Subscribe,
    SubscribeAcknowledgement, Unsubscribe, Will,
};
use super::property::{
    ConnAckProperties, ConnectProperties, Place, Properties, PropertiesBuffer, Property,
    WillProperties,
};
use super::topic::{RetainHandling, SubscribeOptions, strip_share_prefix};
use super::{Packet, PacketId, ProtocolVersion, QoS, ReasonCode};

pub(super) fn version() -> impl Strategy<Value = ProtocolVersion> {
    use ProtocolVersion::{V3_1, V3_1_1, V5};
    prop_oneof![Just(V3_1), Just(V3_1_1), Just(V5)]
}

/// Of either direction.
pub(super) fn packet(version: ProtocolVersion) -> BoxedStrategy<Packet<'static>> {
    let of_every_version = prop_oneof![
        connect(version).prop_map(|connect| Packet::Connect(Box::new(connect))),
        connack(version).prop_map(|connack| Packet::ConnAck(Box::new(connack))),
        publish(version).prop_map(Packet::Publish),
        acknowledgement(PacketType::PubAck, version).prop_map(Packet::PubAck),
        acknowledgement(PacketType::PubRec, version).prop_map(Packet::PubRec),
        acknowledgement(PacketType::PubRel, version).prop_map(Packet::PubRel),
        acknowledgement(PacketType::PubComp, version).prop_map(Packet::PubComp),
        subscribe(version).prop_map(Packet::Subscribe),
        subscribe_acknowledgement(PacketType::SubAck, version).prop_map(Packet::SubAck),
        unsubscribe(version).prop_map(Packet::Unsubscribe),
        subscribe_acknowledgement(PacketType::UnsubAck, version).prop_map(Packet::UnsubAck),
        Just(Packet::PingReq),
        Just(Packet::PingResp),
        (
            reason(PacketType::Disconnect, version),
            properties(PacketType::Disconnect, version),
        )
            .prop_map(|(reason, properties)| Packet::Disconnect(Disconnect { reason, properties })),
    ];
    if !version.is_v5() {
        return of_every_version.boxed();
    }
    let auth = (
        reason(PacketType::Auth, version),
        properties(PacketType::Auth, version),
    );
    prop_oneof![
        14 => of_every_version,
        1 => auth.prop_map(|(reason, properties)| Packet::Auth(Auth { reason, properties })),
    ]
    .boxed()
}

pub(super) fn publish(version: ProtocolVersion) -> impl Strategy<Value = Publish<'static>> {
    (
        any::<(bool, bool)>(),
        qos(),
        packet_id(),
        topic_name(),
        properties(PacketType::Publish, version),
        // Long enough for a Remaining Length of one, two and three bytes.
        prop_oneof![data(0..8), data(100..200), data(16_300..16_500)],
    )
        .prop_map(
            |((dup, retain), qos, packet_id, topic, properties, payload)| Publish {
                dup: dup && qos != QoS::AtMostOnce,
                qos,
                retain,
                topic,
                packet_id: (qos != QoS::AtMostOnce).then_some(packet_id),
                properties,
                payload,
            },
        )
}

fn connect(version: ProtocolVersion) -> impl Strategy<Value = Connect<'static>> {
    (
        any::<bool>(),
        any::<u16>(),
        text(),
        option::of(will(version)),
        option::of(text()),
        option::of(data(0..8)),
        properties_in(Place::Packet(PacketType::Connect), version),
    )
        .prop_map(
            move |(clean_start, keep_alive, client_id, will, user_name, password, properties)| {
                // Before version 5 a password needs a user name.
                let password = password.filter(|_| user_name.is_some() || version.is_v5());
                Connect {
                    version,
                    clean_start,
                    keep_alive,
                    client_id,
                    will,
                    user_name,
                    password,
                    properties: ConnectProperties::decode(&mut encoded(properties))
                        .unwrap_or_default(),
                }
            },
        )
}

fn will(version: ProtocolVersion) -> impl Strategy<Value = Will<'static>> {
    (
        topic_name(),
        data(0..200),
        qos(),
        any::<bool>(),
        properties_in(Place::Will, version),
    )
        .prop_map(|(topic, payload, qos, retain, properties)| {
            // Encoded once, so that they are in the order in which they are encoded.
            let unordered = WillProperties::decode(&mut encoded(properties)).unwrap();
            let mut ordered = Vec::new();
            unordered.encode(&mut ordered);
            let ordered = Properties(ordered.leak());
            Will {
                topic,
                payload,
                qos,
                retain,
                properties: WillProperties::decode(&mut encoded(ordered)).unwrap(),
            }
        })
}

fn connack(version: ProtocolVersion) -> impl Strategy<Value = ConnAck<'static>> {
    (
        any::<bool>(),
        reason(PacketType::ConnAck, version),
        properties(PacketType::ConnAck, version),
    )
        .prop_map(move |(session_present, reason, properties)| ConnAck {
            session_present: session_present && version != ProtocolVersion::V3_1,
            reason,
            properties: ConnAckProperties::decode(&mut encoded(properties)).unwrap(),
        })
}

fn acknowledgement(
    packet_type: PacketType,
    version: ProtocolVersion,
) -> impl Strategy<Value = Acknowledgement<'static>> {
    (
        packet_id(),
        reason(packet_type, version),
        properties(packet_type, version),
    )
        .prop_map(|(packet_id, reason, properties)| Acknowledgement {
            packet_id,
            reason,
            properties,
        })
}

fn subscribe(version: ProtocolVersion) -> impl Strategy<Value = Subscribe<'static>> {
    (
        packet_id(),
        properties(PacketType::Subscribe, version),
        vec((text(), subscribe_options(version)), 1..5),
    )
        .prop_map(|(packet_id, properties, mut filters)| {
            for (filter, options) in &mut filters {
                options.no_local &= strip_share_prefix(filter).is_none();
            }
            Subscribe {
                packet_id,
                properties,
                filters,
            }
        })
}

fn subscribe_options(version: ProtocolVersion) -> impl Strategy<Value = SubscribeOptions> {
    let retain_handling = prop_oneof![
        Just(RetainHandling::SendAtSubscribe),
        Just(RetainHandling::SendIfNew),
        Just(RetainHandling::DoNotSend),
    ];
    (qos(), any::<(bool, bool)>(), retain_handling).prop_map(
        move |(maximum_qos, (no_local, retain_as_published), retain_handling)| {
            let options = SubscribeOptions {
                maximum_qos,
                ..SubscribeOptions::default()
            };
            if !version.is_v5() {
                return options;
            }
            SubscribeOptions {
                no_local,
                retain_as_published,
                retain_handling,
                ..options
            }
        },
    )
}

fn unsubscribe(version: ProtocolVersion) -> impl Strategy<Value = Unsubscribe<'static>> {
    (
        packet_id(),
        properties(PacketType::Unsubscribe, version),
        vec(text(), 1..5),
    )
        .prop_map(|(packet_id, properties, filters)| Unsubscribe {
            packet_id,
            properties,
            filters,
        })
}

fn subscribe_acknowledgement(
    packet_type: PacketType,
    version: ProtocolVersion,
) -> impl Strategy<Value = SubscribeAcknowledgement<'static>> {
    let has_reasons = packet_type == PacketType::SubAck || version.is_v5();
    (
        packet_id(),
        properties(packet_type, version),
        vec(reason(packet_type, version), 0..5),
    )
        .prop_map(
            move |(packet_id, properties, reasons)| SubscribeAcknowledgement {
                packet_id,
                reasons: if has_reasons { reasons } else { Vec::new() },
                properties,
            },
        )
}

fn reason(packet_type: PacketType, version: ProtocolVersion) -> impl Strategy<Value = ReasonCode> {
    let all = (0..=u8::MAX).filter_map(ReasonCode::from_byte);
    let mut allowed: Vec<ReasonCode> = match (packet_type, version.is_v5()) {
        (_, true) => all
            .filter(|reason| reason.is_allowed_in(packet_type))
            .collect(),
        (PacketType::ConnAck, false) => (0..=u8::MAX)
            .filter_map(ReasonCode::from_connect_return_code)
            .collect(),
        (PacketType::SubAck, false) => [0, 1, 2, 0x80]
            .map(|byte| ReasonCode::from_byte(byte).unwrap())
            .into(),
        (_, false) => Vec::new(),
    };
    if allowed.is_empty() {
        allowed.push(ReasonCode::Success);
    }
    proptest::sample::select(allowed)
}

fn properties(
    packet_type: PacketType,
    version: ProtocolVersion,
) -> impl Strategy<Value = Properties<'static>> {
    properties_in(Place::Packet(packet_type), version)
}

fn properties_in(
    place: Place,
    version: ProtocolVersion,
) -> impl Strategy<Value = Properties<'static>> {
    let most = if version.is_v5() { 30 } else { 0 };
    vec(property(), 0..=most).prop_map(move |properties| {
        let mut once = Vec::<Property<'_>>::new();
        for property in properties {
            let is_repeated = once
                .iter()
                .any(|other| std::mem::discriminant(other) == std::mem::discriminant(&property));
            if property.is_allowed_in(place) && (!is_repeated || property.may_repeat_in(place)) {
                once.push(property);
            }
        }
        let buffer: &PropertiesBuffer = Box::leak(Box::new(once.into_iter().collect()));
        buffer.as_properties()
    })
}

fn property() -> impl Strategy<Value = Property<'static>> {
    let of_messages = prop_oneof![
        any::<bool>().prop_map(Property::PayloadFormatIndicator),
        any::<u32>().prop_map(Property::MessageExpiryInterval),
        text().prop_map(Property::ContentType),
        topic_name().prop_map(Property::ResponseTopic),
        data(0..8).prop_map(Property::CorrelationData),
        (1..=268_435_455_u32).prop_map(Property::SubscriptionIdentifier),
        any::<u32>().prop_map(Property::WillDelayInterval),
        (1..=u16::MAX).prop_map(Property::TopicAlias),
        (text(), text()).prop_map(|(name, value)| Property::UserProperty(name, value)),
    ];
    let of_connections = prop_oneof![
        any::<u32>().prop_map(Property::SessionExpiryInterval),
        text().prop_map(Property::AssignedClientIdentifier),
        any::<u16>().prop_map(Property::ServerKeepAlive),
        text().prop_map(Property::AuthenticationMethod),
        data(0..8).prop_map(Property::AuthenticationData),
        any::<bool>().prop_map(Property::RequestProblemInformation),
        any::<bool>().prop_map(Property::RequestResponseInformation),
        text().prop_map(Property::ResponseInformation),
        text().prop_map(Property::ServerReference),
        text().prop_map(Property::ReasonString),
    ];
    let of_limits = prop_oneof![
        (1..=u16::MAX).prop_map(Property::ReceiveMaximum),
        any::<u16>().prop_map(Property::TopicAliasMaximum),
        prop_oneof![Just(QoS::AtMostOnce), Just(QoS::AtLeastOnce)].prop_map(Property::MaximumQoS),
        any::<bool>().prop_map(Property::RetainAvailable),
        (1..=u32::MAX).prop_map(Property::MaximumPacketSize),
        any::<bool>().prop_map(Property::WildcardSubscriptionAvailable),
        any::<bool>().prop_map(Property::SubscriptionIdentifierAvailable),
        any::<bool>().prop_map(Property::SharedSubscriptionAvailable),
    ];
    prop_oneof![of_messages, of_connections, of_limits]
}

/// With their length before them.
fn encoded(properties: Properties<'static>) -> Reader<'static> {
    let mut bytes = Vec::new();
    put_variable_byte_integer(properties.0.len(), &mut bytes);
    bytes.extend_from_slice(properties.0);
    Reader::new(bytes.leak())
}

fn qos() -> impl Strategy<Value = QoS> {
    prop_oneof![
        Just(QoS::AtMostOnce),
        Just(QoS::AtLeastOnce),
        Just(QoS::ExactlyOnce)
    ]
}

fn packet_id() -> impl Strategy<Value = PacketId> {
    (1..=u16::MAX).prop_map(|id| PacketId::new(id).unwrap())
}

fn topic_name() -> impl Strategy<Value = &'static str> {
    "[^\0#+]{1,12}".prop_map(|topic| &*topic.leak())
}

fn text() -> impl Strategy<Value = &'static str> {
    "([$]share/)?[^\0]{0,12}".prop_map(|text| &*text.leak())
}

fn data(bytes: std::ops::Range<usize>) -> impl Strategy<Value = &'static [u8]> {
    vec(any::<u8>(), bytes).prop_map(|data| &*data.leak())
}
