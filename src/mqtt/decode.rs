//! From bytes to packets.
//!
//! [`frame_length`] finds the end of the first packet in a buffer, [`decode`] reads it. Nothing
//! is copied, and nothing is allocated for the packets that come by the million.

use super::packet::{
    Acknowledgement, Auth, ConnAck, Connect, Disconnect, PacketType, Publish, Subscribe,
    SubscribeAcknowledgement, Unsubscribe, Will,
};
use super::property::{ConnAckProperties, ConnectProperties, Place, Properties, WillProperties};
use super::topic::{
    InvalidTopic, RetainHandling, SubscribeOptions, has_wildcard, strip_share_prefix,
};
use super::{Packet, PacketId, ProtocolVersion, QoS, ReasonCode};

/// The peer broke the protocol; the Network Connection cannot go on, [MQTT-4.13.1-1].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// [MQTT-1.5.5-1], section 2.1.4.
    #[error("a Variable Byte Integer is longer than four bytes or than it needs to be")]
    VariableByteInteger,
    #[error("the packet ends inside a field")]
    Truncated,
    #[error("bytes follow the last field of the packet")]
    TrailingBytes,
    /// Type 0, and 15 before version 5.
    #[error("reserved packet type")]
    ReservedPacketType,
    /// [MQTT-2.1.3-1]; in CONNECT and CONNACK [MQTT-3.1.2-3], [MQTT-3.2.2-1]; in SUBSCRIBE
    /// [MQTT-3.8.3-5].
    #[error("reserved bits are not as they must be")]
    ReservedBits,
    /// [MQTT-1.5.4-1].
    #[error("text is not UTF-8")]
    InvalidUtf8,
    /// [MQTT-1.5.4-2].
    #[error("text contains U+0000")]
    NullCharacter,
    /// [MQTT-3.3.1-4], [MQTT-3.1.2-12].
    #[error("QoS 3")]
    InvalidQoS,
    /// [MQTT-3.3.1-2].
    #[error("DUP on a QoS 0 PUBLISH")]
    DuplicateAtMostOnce,
    /// [MQTT-3.1.2-11], [MQTT-3.1.2-13], version 5 ids.
    #[error("Will QoS or Will Retain without a Will")]
    WillFlags,
    /// Of 3.1.1: [MQTT-3.1.2-22].
    #[error("a password without a user name")]
    PasswordWithoutUserName,
    #[error("a property is unknown or not allowed in this packet")]
    PropertyNotAllowed,

    /// [MQTT-3.1.2-1].
    #[error("not the name of MQTT")]
    UnknownProtocolName,
    /// [MQTT-3.1.2-2]. [`connack_version`] says how to answer.
    #[error("protocol level {level} is not supported")]
    UnsupportedProtocolLevel { level: u8 },

    #[error("invalid topic name: {0}")]
    TopicName(InvalidTopic),

    #[error("neither a topic nor a topic alias")]
    MissingTopic,
    /// [MQTT-2.2.1-3].
    #[error("packet identifier 0")]
    PacketIdZero,
    #[error("a property occurs twice")]
    DuplicateProperty,
    #[error("a property has a value that it must not have")]
    PropertyValue,
    /// [MQTT-3.3.2-14].
    #[error("invalid response topic: {0}")]
    ResponseTopic(InvalidTopic),
    #[error("authentication data without an authentication method")]
    AuthenticationDataWithoutMethod,
    /// [MQTT-3.8.3-2], [MQTT-3.10.3-2].
    #[error("no topic filter")]
    NoTopicFilter,
    #[error("invalid subscription options")]
    SubscribeOptions,
    /// [MQTT-3.8.3-4].
    #[error("No Local on a shared subscription")]
    NoLocalOnShared,
    #[error("a reason code that this packet does not have")]
    ReasonCode,
}

impl DecodeError {
    /// The Reason Code of the DISCONNECT or CONNACK that ends the connection, section 4.13.
    pub fn reason_code(&self) -> ReasonCode {
        match self {
            Self::VariableByteInteger
            | Self::Truncated
            | Self::TrailingBytes
            | Self::ReservedPacketType
            | Self::ReservedBits
            | Self::InvalidUtf8
            | Self::NullCharacter
            | Self::InvalidQoS
            | Self::DuplicateAtMostOnce
            | Self::WillFlags
            | Self::PasswordWithoutUserName
            | Self::PropertyNotAllowed => ReasonCode::MalformedPacket,
            Self::UnknownProtocolName | Self::UnsupportedProtocolLevel { .. } => {
                ReasonCode::UnsupportedProtocolVersion
            }
            Self::TopicName(_) => ReasonCode::TopicNameInvalid,
            Self::MissingTopic
            | Self::PacketIdZero
            | Self::DuplicateProperty
            | Self::PropertyValue
            | Self::ResponseTopic(_)
            | Self::AuthenticationDataWithoutMethod
            | Self::NoTopicFilter
            | Self::SubscribeOptions
            | Self::NoLocalOnShared
            | Self::ReasonCode => ReasonCode::ProtocolError,
        }
    }
}

/// The bytes of the first packet in `buffer`, its fixed header included; the buffer may hold fewer
/// or more. `None` while the header is incomplete.
///
/// # Errors
/// [`DecodeError::VariableByteInteger`] if the Remaining Length is none.
#[inline]
pub fn frame_length(buffer: &[u8]) -> Result<Option<usize>, DecodeError> {
    let mut remaining = 0;
    for (index, &byte) in buffer.iter().skip(1).take(4).enumerate() {
        remaining |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some(2 + index + remaining));
        }
    }
    if buffer.len() < 5 {
        Ok(None)
    } else {
        Err(DecodeError::VariableByteInteger)
    }
}

/// Reads `frame`, which is exactly one packet.
///
/// A CONNECT says itself which version it is; for all others it is that of the connection. Packets
/// of both directions are read: whether this one may come from that side is the session's question.
///
/// # Errors
/// [`DecodeError`] says which rule the peer has broken.
pub fn decode(frame: &[u8], version: ProtocolVersion) -> Result<Packet<'_>, DecodeError> {
    match frame_length(frame)? {
        None => return Err(DecodeError::Truncated),
        Some(length) if length > frame.len() => return Err(DecodeError::Truncated),
        Some(length) if length < frame.len() => return Err(DecodeError::TrailingBytes),
        Some(_) => {}
    }
    let first = frame[0];
    let header_bytes = 1
        + frame[1..]
            .iter()
            .take_while(|&byte| byte & 0x80 != 0)
            .count()
        + 1;
    let overlong = header_bytes > 2 && frame[header_bytes - 1] == 0;
    let mut reader = Reader::new(&frame[header_bytes..]);

    let packet_type = PacketType::from_bits(first >> 4).ok_or(DecodeError::ReservedPacketType)?;
    let flags = first & 0x0F;
    // MQTT 3.1 gives no meaning to these flags, and its clients set DUP when they repeat a
    // SUBSCRIBE, UNSUBSCRIBE or PUBREL.
    let flags_are_free = packet_type == PacketType::Publish
        || version == ProtocolVersion::V3_1 && packet_type != PacketType::Connect;
    if !flags_are_free && flags != packet_type.reserved_flags() {
        return Err(DecodeError::ReservedBits);
    }

    let packet = match packet_type {
        PacketType::Publish => Packet::Publish(publish(&mut reader, flags, version)?),
        PacketType::PubAck => Packet::PubAck(acknowledgement(&mut reader, packet_type, version)?),
        PacketType::PubRec => Packet::PubRec(acknowledgement(&mut reader, packet_type, version)?),
        PacketType::PubRel => Packet::PubRel(acknowledgement(&mut reader, packet_type, version)?),
        PacketType::PubComp => Packet::PubComp(acknowledgement(&mut reader, packet_type, version)?),
        PacketType::Connect => Packet::Connect(Box::new(connect(&mut reader)?)),
        PacketType::ConnAck => Packet::ConnAck(Box::new(connack(&mut reader, version)?)),
        PacketType::Subscribe => Packet::Subscribe(subscribe(&mut reader, version)?),
        PacketType::SubAck => Packet::SubAck(suback(&mut reader, version)?),
        PacketType::Unsubscribe => Packet::Unsubscribe(unsubscribe(&mut reader, version)?),
        PacketType::UnsubAck => Packet::UnsubAck(unsuback(&mut reader, version)?),
        PacketType::PingReq => Packet::PingReq,
        PacketType::PingResp => Packet::PingResp,
        PacketType::Disconnect => {
            let (reason, properties) = reason_and_properties(&mut reader, packet_type, version)?;
            Packet::Disconnect(Disconnect { reason, properties })
        }
        PacketType::Auth if !version.is_v5() => return Err(DecodeError::ReservedPacketType),
        PacketType::Auth => {
            let (reason, properties) = reason_and_properties(&mut reader, packet_type, version)?;
            Packet::Auth(Auth { reason, properties })
        }
    };
    reader.finish()?;

    // Version 3 allows a Remaining Length that is padded with zeros, [MQTT-1.5.5-1] does not.
    if overlong {
        let version = match &packet {
            Packet::Connect(connect) => connect.version,
            _ => version,
        };
        if version.is_v5() {
            return Err(DecodeError::VariableByteInteger);
        }
    }
    Ok(packet)
}

/// The version in which the sender of this CONNECT understands a CONNACK, also where [`decode`]
/// has refused it; `None` if it does not speak MQTT.
pub fn connack_version(connect_frame: &[u8]) -> Option<ProtocolVersion> {
    let header_bytes = 2 + connect_frame
        .get(1..)?
        .iter()
        .take_while(|&byte| byte & 0x80 != 0)
        .count();
    let mut reader = Reader::new(connect_frame.get(header_bytes..)?);
    match protocol_version(&mut reader) {
        Ok(version) => Some(version),
        Err(DecodeError::UnsupportedProtocolLevel { level }) if level > 5 => {
            Some(ProtocolVersion::V5)
        }
        Err(DecodeError::UnsupportedProtocolLevel { .. }) => Some(ProtocolVersion::V3_1_1),
        Err(_) => None,
    }
}

/// Set in the protocol level by bridges of mosquitto.
const BRIDGE: u8 = 0x80;

fn protocol_version(reader: &mut Reader<'_>) -> Result<ProtocolVersion, DecodeError> {
    const LEVEL_3_1_BRIDGE: u8 = 3 | BRIDGE;
    const LEVEL_3_1_1_BRIDGE: u8 = 4 | BRIDGE;
    let name = reader.binary()?;
    let level = reader.u8()?;
    match (name, level) {
        (b"MQIsdp", 3 | LEVEL_3_1_BRIDGE) => Ok(ProtocolVersion::V3_1),
        (b"MQTT", 4 | LEVEL_3_1_1_BRIDGE) => Ok(ProtocolVersion::V3_1_1),
        (b"MQTT", 5) => Ok(ProtocolVersion::V5),
        (b"MQIsdp" | b"MQTT", _) => Err(DecodeError::UnsupportedProtocolLevel { level }),
        _ => Err(DecodeError::UnknownProtocolName),
    }
}

fn connect<'a>(reader: &mut Reader<'a>) -> Result<Connect<'a>, DecodeError> {
    let version = protocol_version(reader)?;
    let flags = reader.u8()?;
    let clean_start = flags & 0b0000_0010 != 0;
    let has_will = flags & 0b0000_0100 != 0;
    let will_qos = QoS::from_bits(flags >> 3 & 0b11).ok_or(DecodeError::InvalidQoS)?;
    let will_retain = flags & 0b0010_0000 != 0;
    let has_password = flags & 0b0100_0000 != 0;
    let has_user_name = flags & 0b1000_0000 != 0;
    // MQTT 3.1 calls all of these "don't care".
    if version > ProtocolVersion::V3_1 {
        if flags & 0b0000_0001 != 0 {
            return Err(DecodeError::ReservedBits);
        }
        if !has_will && (will_qos != QoS::AtMostOnce || will_retain) {
            return Err(DecodeError::WillFlags);
        }
    }
    if version == ProtocolVersion::V3_1_1 && has_password && !has_user_name {
        return Err(DecodeError::PasswordWithoutUserName);
    }

    let keep_alive = reader.u16()?;
    let properties = if version.is_v5() {
        ConnectProperties::decode(reader)?
    } else {
        ConnectProperties::default()
    };
    let client_id = reader.string()?;
    let will = if has_will {
        let properties = if version.is_v5() {
            WillProperties::decode(reader)?
        } else {
            WillProperties::default()
        };
        let topic = reader.topic_name()?;
        if topic.is_empty() {
            return Err(DecodeError::TopicName(InvalidTopic::Empty));
        }
        Some(Will {
            topic,
            payload: reader.binary()?,
            qos: will_qos,
            retain: will_retain,
            properties,
        })
    } else {
        None
    };
    // In MQTT 3.1 the Remaining Length takes precedence over these two flags.
    let is_absent = |reader: &Reader<'_>| version == ProtocolVersion::V3_1 && reader.is_empty();
    let user_name = if has_user_name && !is_absent(reader) {
        Some(reader.string()?)
    } else {
        None
    };
    let password = if has_password && !is_absent(reader) {
        Some(reader.binary()?)
    } else {
        None
    };
    Ok(Connect {
        version,
        clean_start,
        keep_alive,
        client_id,
        will,
        user_name,
        password,
        properties,
    })
}

fn connack<'a>(
    reader: &mut Reader<'a>,
    version: ProtocolVersion,
) -> Result<ConnAck<'a>, DecodeError> {
    let flags = reader.u8()?;
    if version > ProtocolVersion::V3_1 && flags > 1 {
        return Err(DecodeError::ReservedBits);
    }
    let code = reader.u8()?;
    let (reason, properties) = if version.is_v5() {
        let reason =
            ReasonCode::from_byte(code).filter(|reason| reason.is_allowed_in(PacketType::ConnAck));
        (reason, ConnAckProperties::decode(reader)?)
    } else {
        (
            ReasonCode::from_connect_return_code(code),
            ConnAckProperties::default(),
        )
    };
    Ok(ConnAck {
        session_present: version > ProtocolVersion::V3_1 && flags == 1,
        reason: reason.ok_or(DecodeError::ReasonCode)?,
        properties,
    })
}

#[inline]
fn publish<'a>(
    reader: &mut Reader<'a>,
    flags: u8,
    version: ProtocolVersion,
) -> Result<Publish<'a>, DecodeError> {
    let dup = flags & 0b1000 != 0;
    let qos = QoS::from_bits(flags >> 1 & 0b11).ok_or(DecodeError::InvalidQoS)?;
    if dup && qos == QoS::AtMostOnce {
        return Err(DecodeError::DuplicateAtMostOnce);
    }
    let topic = reader.topic_name()?;
    let packet_id = match qos {
        QoS::AtMostOnce => None,
        QoS::AtLeastOnce | QoS::ExactlyOnce => Some(reader.packet_id()?),
    };
    let properties = reader.properties(PacketType::Publish, version)?;
    if topic.is_empty() {
        if !version.is_v5() {
            return Err(DecodeError::TopicName(InvalidTopic::Empty));
        }
        if properties.topic_alias().is_none() {
            return Err(DecodeError::MissingTopic);
        }
    }
    Ok(Publish {
        dup,
        qos,
        retain: flags & 0b0001 != 0,
        topic,
        packet_id,
        properties,
        payload: reader.rest(),
    })
}

#[inline]
fn acknowledgement<'a>(
    reader: &mut Reader<'a>,
    packet_type: PacketType,
    version: ProtocolVersion,
) -> Result<Acknowledgement<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let (reason, properties) = reason_and_properties(reader, packet_type, version)?;
    Ok(Acknowledgement {
        packet_id,
        reason,
        properties,
    })
}

/// The end of an acknowledgement, DISCONNECT or AUTH: properties may be left out, and the Reason
/// Code too if it is Success.
#[inline]
fn reason_and_properties<'a>(
    reader: &mut Reader<'a>,
    packet_type: PacketType,
    version: ProtocolVersion,
) -> Result<(ReasonCode, Properties<'a>), DecodeError> {
    if !version.is_v5() || reader.is_empty() {
        return Ok((ReasonCode::Success, Properties::default()));
    }
    let reason = reader.reason(packet_type)?;
    let properties = if reader.is_empty() {
        Properties::default()
    } else {
        reader.properties(packet_type, version)?
    };
    Ok((reason, properties))
}

fn subscribe<'a>(
    reader: &mut Reader<'a>,
    version: ProtocolVersion,
) -> Result<Subscribe<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let properties = reader.properties(PacketType::Subscribe, version)?;
    let mut filters = Vec::new();
    while !reader.is_empty() {
        let filter = reader.string()?;
        let options = subscribe_options(reader.u8()?, version)?;
        if options.no_local && strip_share_prefix(filter).is_some() {
            return Err(DecodeError::NoLocalOnShared);
        }
        filters.push((filter, options));
    }
    if filters.is_empty() {
        return Err(DecodeError::NoTopicFilter);
    }
    Ok(Subscribe {
        packet_id,
        properties,
        filters,
    })
}

fn subscribe_options(bits: u8, version: ProtocolVersion) -> Result<SubscribeOptions, DecodeError> {
    let reserved = match version {
        ProtocolVersion::V3_1 => 0,
        ProtocolVersion::V3_1_1 => 0b1111_1100,
        ProtocolVersion::V5 => 0b1100_0000,
    };
    if bits & reserved != 0 {
        return Err(DecodeError::ReservedBits);
    }
    let maximum_qos = QoS::from_bits(bits & 0b11).ok_or(DecodeError::SubscribeOptions)?;
    if !version.is_v5() {
        return Ok(SubscribeOptions {
            maximum_qos,
            ..SubscribeOptions::default()
        });
    }
    Ok(SubscribeOptions {
        maximum_qos,
        no_local: bits & 0b0000_0100 != 0,
        retain_as_published: bits & 0b0000_1000 != 0,
        retain_handling: RetainHandling::from_bits(bits >> 4 & 0b11)
            .ok_or(DecodeError::SubscribeOptions)?,
    })
}

fn suback<'a>(
    reader: &mut Reader<'a>,
    version: ProtocolVersion,
) -> Result<SubscribeAcknowledgement<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let properties = reader.properties(PacketType::SubAck, version)?;
    let mut reasons = Vec::new();
    while !reader.is_empty() {
        let reason = reader.reason(PacketType::SubAck)?;
        // Version 3 knows one failure only, [MQTT-3.9.3-2] of 3.1.1.
        if !version.is_v5() && reason.is_error() && reason != ReasonCode::UnspecifiedError {
            return Err(DecodeError::ReasonCode);
        }
        reasons.push(reason);
    }
    Ok(SubscribeAcknowledgement {
        packet_id,
        reasons,
        properties,
    })
}

fn unsubscribe<'a>(
    reader: &mut Reader<'a>,
    version: ProtocolVersion,
) -> Result<Unsubscribe<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let properties = reader.properties(PacketType::Unsubscribe, version)?;
    let mut filters = Vec::new();
    while !reader.is_empty() {
        filters.push(reader.string()?);
    }
    if filters.is_empty() {
        return Err(DecodeError::NoTopicFilter);
    }
    Ok(Unsubscribe {
        packet_id,
        properties,
        filters,
    })
}

fn unsuback<'a>(
    reader: &mut Reader<'a>,
    version: ProtocolVersion,
) -> Result<SubscribeAcknowledgement<'a>, DecodeError> {
    let packet_id = reader.packet_id()?;
    let properties = reader.properties(PacketType::UnsubAck, version)?;
    let mut reasons = Vec::new();
    while version.is_v5() && !reader.is_empty() {
        reasons.push(reader.reason(PacketType::UnsubAck)?);
    }
    Ok(SubscribeAcknowledgement {
        packet_id,
        reasons,
        properties,
    })
}

/// The bytes of a packet that are still to be read, and the data representations of section 1.5.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What has not been read yet, without reading it.
    pub(super) fn remaining(&self) -> &'a [u8] {
        self.0
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn finish(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::TrailingBytes)
        }
    }

    #[inline]
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*array)
    }

    #[inline]
    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    #[inline]
    pub(super) fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    #[inline]
    pub(super) fn variable_byte_integer(&mut self) -> Result<u32, DecodeError> {
        let mut value = 0;
        for index in 0..4 {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << (7 * index);
            if byte & 0x80 == 0 {
                // [MQTT-1.5.5-1]
                let overlong = byte == 0 && index > 0;
                return if overlong {
                    Err(DecodeError::VariableByteInteger)
                } else {
                    Ok(value)
                };
            }
        }
        Err(DecodeError::VariableByteInteger)
    }

    #[inline]
    pub(super) fn binary(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    #[inline]
    pub(super) fn string(&mut self) -> Result<&'a str, DecodeError> {
        let bytes = self.binary()?;
        if bytes.contains(&0) {
            return Err(DecodeError::NullCharacter);
        }
        std::str::from_utf8(bytes).map_err(|_| DecodeError::InvalidUtf8)
    }

    /// May be empty.
    #[inline]
    fn topic_name(&mut self) -> Result<&'a str, DecodeError> {
        let topic = self.string()?;
        // [MQTT-3.3.2-2]
        if has_wildcard(topic) {
            return Err(DecodeError::TopicName(InvalidTopic::WildcardInName));
        }
        Ok(topic)
    }

    #[inline]
    fn packet_id(&mut self) -> Result<PacketId, DecodeError> {
        PacketId::new(self.u16()?).ok_or(DecodeError::PacketIdZero)
    }

    fn reason(&mut self, packet_type: PacketType) -> Result<ReasonCode, DecodeError> {
        ReasonCode::from_byte(self.u8()?)
            .filter(|reason| reason.is_allowed_in(packet_type))
            .ok_or(DecodeError::ReasonCode)
    }

    #[inline]
    fn properties(
        &mut self,
        packet_type: PacketType,
        version: ProtocolVersion,
    ) -> Result<Properties<'a>, DecodeError> {
        if version.is_v5() {
            Properties::decode(self, Place::Packet(packet_type))
        } else {
            Ok(Properties::default())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::ProtocolVersion::{V3_1, V3_1_1, V5};
    use super::*;
    use crate::mqtt::arbitrary;
    use crate::mqtt::encode::encode;

    /// A packet of this first byte and these bytes after a Remaining Length below 128.
    fn frame(first: u8, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let length = u8::try_from(body.len()).unwrap();
        assert!(length < 0x80);
        [&[first, length], &*body].concat()
    }

    #[track_caller]
    fn assert_refused(frame: &[u8], version: ProtocolVersion, error: DecodeError) {
        assert_eq!(decode(frame, version), Err(error));
    }

    /// An otherwise valid version 5 PUBLISH to `t` with these properties.
    fn publish_with(properties: &[u8]) -> Vec<u8> {
        let length = u8::try_from(properties.len()).unwrap();
        frame(0x30, &[b"\0\x01t", &[length], properties])
    }

    fn connect_with(level: u8, flags: u8, rest: &[u8]) -> Vec<u8> {
        frame(0x10, &[b"\0\x04MQTT", &[level, flags, 0, 60], rest])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn what_is_encoded_decodes_to_the_same_packet(
            (version, packet) in arbitrary::version()
                .prop_flat_map(|version| (Just(version), arbitrary::packet(version)))
        ) {
            let mut bytes = Vec::new();
            encode(&packet, version, &mut bytes);

            prop_assert_eq!(frame_length(&bytes), Ok(Some(bytes.len())));
            prop_assert_eq!(decode(&bytes, version), Ok(packet));
        }

        #[test]
        fn a_stream_cut_anywhere_gives_the_same_packets(
            (version, packets) in arbitrary::version().prop_flat_map(|version| {
                (Just(version), prop::collection::vec(arbitrary::packet(version), 1..6))
            }),
            chunk_bytes in prop::collection::vec(1..300_usize, 1..20),
        ) {
            let mut stream = Vec::new();
            packets.iter().for_each(|packet| encode(packet, version, &mut stream));
            let mut rest = &*stream;
            let mut chunk_bytes = chunk_bytes.iter().cycle();
            let mut buffer = Vec::new();
            let mut expected = packets.iter();

            while !rest.is_empty() {
                let (chunk, after) = rest.split_at(rest.len().min(*chunk_bytes.next().unwrap()));
                buffer.extend_from_slice(chunk);
                rest = after;
                while let Some(length) = frame_length(&buffer).unwrap().filter(|&l| l <= buffer.len()) {
                    prop_assert_eq!(&decode(&buffer[..length], version).unwrap(), expected.next().unwrap());
                    buffer.drain(..length);
                }
            }
            prop_assert_eq!(expected.next(), None);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..64),
            version in arbitrary::version(),
        ) {
            let _ = frame_length(&bytes);
            let _ = connack_version(&bytes);
            let _ = decode(&bytes, version);
            if bytes.len() < 0x80 {
                let _ = decode(&frame(bytes.first().copied().unwrap_or(0x10), &[&bytes]), version);
            }
        }

        #[test]
        fn a_damaged_packet_does_not_panic_and_is_still_one_if_it_is_accepted(
            (version, packet) in arbitrary::version()
                .prop_flat_map(|version| (Just(version), arbitrary::packet(version))),
            read_as in arbitrary::version(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = Vec::new();
            encode(&packet, version, &mut bytes);
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
                // A length that fits, so that the fields are looked at.
                if (2..0x80).contains(&bytes.len()) {
                    bytes[1] = bytes.len() as u8 - 2;
                }
            }
            for (at, byte) in damage.iter().filter(|_| !bytes.is_empty()).collect::<Vec<_>>() {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }

            let _ = connack_version(&bytes);
            if let Ok(packet) = decode(&bytes, read_as) {
                let mut again = Vec::new();
                encode(&packet, read_as, &mut again);
                let repeated = decode(&again, read_as);
                // The properties of a Will are encoded in an order of ours.
                if !matches!(packet, Packet::Connect(_)) {
                    prop_assert_eq!(repeated, Ok(packet));
                }
            }
        }
    }

    #[test]
    fn mqtt_1_5_5_1_a_remaining_length_has_at_most_four_bytes() {
        assert_eq!(frame_length(&[0x30]), Ok(None));
        assert_eq!(frame_length(&[0x30, 0xFF, 0xFF, 0xFF]), Ok(None));
        assert_eq!(
            frame_length(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F]),
            Ok(Some(5 + 268_435_455))
        );
        assert_eq!(
            frame_length(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF]),
            Err(DecodeError::VariableByteInteger)
        );
    }

    #[test]
    fn mqtt_1_5_5_1_a_padded_length_is_malformed_in_version_5_only() {
        let padded = [0xC0, 0x80, 0x00];

        assert_refused(&padded, V5, DecodeError::VariableByteInteger);
        assert_eq!(decode(&padded, V3_1_1), Ok(Packet::PingReq));
    }

    #[test]
    fn a_frame_is_exactly_one_packet() {
        assert_refused(&[0xC0], V5, DecodeError::Truncated);
        assert_refused(&[0x40, 2, 0], V5, DecodeError::Truncated);
        assert_refused(&[0xC0, 0, 0], V5, DecodeError::TrailingBytes);
        assert_refused(&[0xC0, 1, 0], V5, DecodeError::TrailingBytes);
        assert_refused(&[0x40, 3, 0, 1, 0], V3_1_1, DecodeError::TrailingBytes);
    }

    #[test]
    fn mqtt_1_5_4_1_text_is_utf_8() {
        for text in [&b"\xC3\x28"[..], b"\xED\xA0\x80", b"\xFF\xFE"] {
            let length = [0, text.len() as u8];
            assert_refused(
                &frame(0x30, &[&length, text, b"\0"]),
                V5,
                DecodeError::InvalidUtf8,
            );
        }
    }

    #[test]
    fn mqtt_1_5_4_2_text_has_no_null() {
        assert_refused(b"\x30\x05\0\x03a\0b", V3_1_1, DecodeError::NullCharacter);
    }

    #[test]
    fn mqtt_1_5_4_3_a_byte_order_mark_stays() {
        let Ok(Packet::Publish(publish)) = decode(b"\x30\x05\0\x03\xEF\xBB\xBF", V3_1_1) else {
            panic!("refused");
        };

        assert_eq!(publish.topic, "\u{FEFF}");
    }

    #[test]
    fn mqtt_2_1_3_1_reserved_flags_must_be_as_listed() {
        let packets: [&[u8]; 4] = [b"\x60\x02\0\x01", b"\x41\x02\0\x01", b"\xC4\0", b"\xE1\0"];
        for packet in packets {
            assert_refused(packet, V5, DecodeError::ReservedBits);
            assert_refused(packet, V3_1_1, DecodeError::ReservedBits);
        }
    }

    #[test]
    fn mqtt_3_8_1_1_subscribe_flags_must_be_0010() {
        assert_refused(
            b"\x80\x06\0\x01\0\x01a\0",
            V3_1_1,
            DecodeError::ReservedBits,
        );
    }

    #[test]
    fn mqtt31_a_repeated_subscribe_may_have_dup() {
        assert!(decode(b"\x8A\x06\0\x01\0\x01a\0", V3_1).is_ok());
    }

    #[test]
    fn reserved_types_are_malformed() {
        assert_refused(&[0x00, 0], V5, DecodeError::ReservedPacketType);
        assert_refused(&[0xF0, 0], V3_1_1, DecodeError::ReservedPacketType);
        assert!(decode(&[0xF0, 0], V5).is_ok());
    }

    #[test]
    fn mqtt_2_2_1_3_packet_identifier_0_is_refused() {
        for packet in [
            &b"\x40\x02\0\0"[..],
            b"\x32\x05\0\x01t\0\0",
            b"\x82\x06\0\0\0\x01a\0",
        ] {
            assert_refused(packet, V3_1_1, DecodeError::PacketIdZero);
        }
    }

    #[test]
    fn mqtt_3_1_2_1_other_protocol_names_are_refused() {
        let connect = frame(0x10, &[b"\0\x04HTTP\x05\x02\0\x3C\0\0\0"]);

        assert_refused(&connect, V5, DecodeError::UnknownProtocolName);
        assert_eq!(connack_version(&connect), None);
    }

    #[test]
    fn mqtt_3_1_2_2_unsupported_levels_can_be_answered() {
        for (level, answer) in [(0, V3_1_1), (3, V3_1_1), (6, V5), (0x85, V5)] {
            let connect = connect_with(level, 2, b"\0\0");
            let error = DecodeError::UnsupportedProtocolLevel { level };
            assert_refused(&connect, V5, error);
            assert_eq!(error.reason_code(), ReasonCode::UnsupportedProtocolVersion);
            assert_eq!(error.reason_code().connect_return_code(), 1);
            assert_eq!(connack_version(&connect), Some(answer));
        }
    }

    #[test]
    fn a_malformed_connect_can_be_answered_in_its_own_version() {
        let connect = connect_with(5, 0b0000_0001, b"\0\0\0");

        assert_refused(&connect, V3_1_1, DecodeError::ReservedBits);
        assert_eq!(connack_version(&connect), Some(V5));
    }

    #[test]
    fn bridges_of_mosquitto_are_let_in() {
        let bridge = connect_with(4 | BRIDGE, 2, b"\0\0");

        let Ok(Packet::Connect(connect)) = decode(&bridge, V5) else {
            panic!("refused");
        };
        assert_eq!(connect.version, V3_1_1);
    }

    #[test]
    fn mqtt_3_1_2_3_the_reserved_connect_flag_is_0() {
        assert_refused(
            &connect_with(4, 0b11, b"\0\0"),
            V5,
            DecodeError::ReservedBits,
        );
    }

    #[test]
    fn mqtt_3_1_2_11_will_qos_and_retain_need_a_will() {
        for flags in [0b0000_1000, 0b0001_0000, 0b0010_0000] {
            assert_refused(&connect_with(4, flags, b"\0\0"), V5, DecodeError::WillFlags);
            assert_refused(
                &connect_with(5, flags, b"\0\0\0"),
                V5,
                DecodeError::WillFlags,
            );
        }
    }

    #[test]
    fn mqtt_3_1_2_12_will_qos_3_is_malformed() {
        assert_refused(
            &connect_with(5, 0b0001_1100, b"\0\0\0\0\0\x01w\0\0"),
            V5,
            DecodeError::InvalidQoS,
        );
    }

    #[test]
    fn mqtt311_3_1_2_22_a_password_needs_a_user_name() {
        let flags = 0b0100_0010;

        assert_refused(
            &connect_with(4, flags, b"\0\0\0\x01p"),
            V5,
            DecodeError::PasswordWithoutUserName,
        );
        assert!(decode(&connect_with(5, flags, b"\0\0\0\0\x01p"), V5).is_ok());
    }

    #[test]
    fn mqtt31_a_user_name_and_password_may_be_missing() {
        let connect = frame(0x10, &[b"\0\x06MQIsdp\x03\xC2\0\x3C\0\x01c"]);

        let Ok(Packet::Connect(connect)) = decode(&connect, V5) else {
            panic!("refused");
        };
        assert_eq!((connect.user_name, connect.password), (None, None));
        assert_eq!(connect.client_id, "c");
    }

    #[test]
    fn authentication_data_needs_a_method() {
        let connect = connect_with(5, 2, b"\x04\x16\0\x01d\0\0");

        assert_refused(&connect, V5, DecodeError::AuthenticationDataWithoutMethod);
    }

    #[test]
    fn mqtt_3_3_1_2_dup_needs_a_qos() {
        assert_refused(b"\x38\x03\0\x01t", V3_1_1, DecodeError::DuplicateAtMostOnce);
    }

    #[test]
    fn mqtt_3_3_1_4_qos_3_is_malformed() {
        assert_refused(b"\x36\x05\0\x01t\0\x01", V5, DecodeError::InvalidQoS);
    }

    #[test]
    fn mqtt_3_3_2_2_a_topic_name_has_no_wildcards() {
        let error = DecodeError::TopicName(InvalidTopic::WildcardInName);

        assert_refused(b"\x30\x03\0\x01#", V3_1_1, error);
        assert_refused(b"\x30\x06\0\x03a/+\0", V5, error);
        assert_eq!(error.reason_code(), ReasonCode::TopicNameInvalid);
    }

    #[test]
    fn mqtt_3_3_2_1_an_empty_topic_needs_an_alias() {
        assert_refused(b"\x30\x03\0\0\0", V5, DecodeError::MissingTopic);
        assert!(decode(b"\x30\x06\0\0\x03\x23\0\x01", V5).is_ok());
        assert_refused(
            b"\x30\x02\0\0",
            V3_1_1,
            DecodeError::TopicName(InvalidTopic::Empty),
        );
    }

    #[test]
    fn mqtt_3_3_2_8_topic_alias_0_is_refused() {
        assert_refused(&publish_with(b"\x23\0\0"), V5, DecodeError::PropertyValue);
    }

    #[test]
    fn mqtt_3_3_2_14_a_response_topic_has_no_wildcards() {
        let error = DecodeError::ResponseTopic(InvalidTopic::WildcardInName);

        assert_refused(&publish_with(b"\x08\0\x03a/#"), V5, error);
        assert_eq!(error.reason_code(), ReasonCode::ProtocolError);
    }

    #[test]
    fn a_property_of_another_packet_is_malformed() {
        for property in [&b"\x21\0\x01"[..], b"\x1F\0\0", b"\x7F", b"\xA6\0"] {
            assert_refused(&publish_with(property), V5, DecodeError::PropertyNotAllowed);
        }
    }

    #[test]
    fn properties_occur_once_but_for_user_properties_and_identifiers() {
        assert_refused(
            &publish_with(b"\x01\0\x01\0"),
            V5,
            DecodeError::DuplicateProperty,
        );
        assert!(
            decode(
                &publish_with(b"\x26\0\0\0\0\x26\0\0\0\0\x0B\x01\x0B\x01"),
                V5
            )
            .is_ok()
        );
        assert_refused(
            b"\x82\x0B\0\x01\x04\x0B\x01\x0B\x01\0\x01a\0",
            V5,
            DecodeError::DuplicateProperty,
        );
    }

    #[test]
    fn properties_out_of_range_are_protocol_errors() {
        let receive_maximum = connect_with(5, 2, b"\x03\x21\0\0\0\0");
        let maximum_packet_size = connect_with(5, 2, b"\x05\x27\0\0\0\0\0\0");
        let flag = connect_with(5, 2, b"\x02\x17\x02\0\0");
        let subscription_identifier = publish_with(b"\x0B\0");

        for frame in [
            receive_maximum,
            maximum_packet_size,
            flag,
            subscription_identifier,
        ] {
            assert_refused(&frame, V5, DecodeError::PropertyValue);
        }
    }

    #[test]
    fn a_property_length_beyond_the_packet_is_malformed() {
        assert_refused(b"\x30\x04\0\x01t\x05", V5, DecodeError::Truncated);
        assert_refused(&publish_with(b"\x02\0"), V5, DecodeError::Truncated);
    }

    #[test]
    fn mqtt_3_4_2_1_reason_and_properties_of_an_acknowledgement_may_be_missing() {
        let id = PacketId::new(7).unwrap();
        let refused = Acknowledgement::with_reason(id, ReasonCode::QuotaExceeded);

        assert_eq!(
            decode(b"\x40\x02\0\x07", V5),
            Ok(Packet::PubAck(Acknowledgement::success(id)))
        );
        assert_eq!(
            decode(b"\x40\x03\0\x07\x97", V5),
            Ok(Packet::PubAck(refused.clone()))
        );
        assert_eq!(
            decode(b"\x40\x04\0\x07\x97\0", V5),
            Ok(Packet::PubAck(refused))
        );
    }

    #[test]
    fn mqtt_3_4_2_1_reason_codes_of_other_packets_are_refused() {
        for code in [0x01, 0x92, 0x03, 0xFF] {
            assert_refused(&[0x40, 3, 0, 1, code], V5, DecodeError::ReasonCode);
        }
    }

    #[test]
    fn mqtt_3_8_3_2_a_subscribe_has_a_filter() {
        assert_refused(b"\x82\x03\0\x01\0", V5, DecodeError::NoTopicFilter);
        assert_refused(b"\x82\x02\0\x01", V3_1_1, DecodeError::NoTopicFilter);
    }

    #[test]
    fn mqtt_3_10_3_2_an_unsubscribe_has_a_filter() {
        assert_refused(b"\xA2\x03\0\x01\0", V5, DecodeError::NoTopicFilter);
        assert_refused(b"\xA2\x02\0\x01", V3_1_1, DecodeError::NoTopicFilter);
    }

    #[test]
    fn mqtt_3_8_3_4_no_local_on_a_shared_subscription_is_a_protocol_error() {
        let no_local = |filter: &[u8]| {
            frame(
                0x82,
                &[b"\0\x01\0\0", &[filter.len() as u8], filter, &[0b0100]],
            )
        };

        assert_refused(&no_local(b"$share/g/t"), V5, DecodeError::NoLocalOnShared);
        assert!(decode(&no_local(b"$shared/g/t"), V5).is_ok());
    }

    #[test]
    fn mqtt_3_8_3_5_reserved_option_bits_are_0() {
        assert_refused(
            b"\x82\x07\0\x01\0\0\x01a\x40",
            V5,
            DecodeError::ReservedBits,
        );
        assert_refused(
            b"\x82\x06\0\x01\0\x01a\x04",
            V3_1_1,
            DecodeError::ReservedBits,
        );
    }

    #[test]
    fn subscription_options_out_of_range_are_protocol_errors() {
        for options in [0b0000_0011, 0b0011_0000] {
            let subscribe = [0x82, 7, 0, 1, 0, 0, 1, b'a', options];
            assert_refused(&subscribe, V5, DecodeError::SubscribeOptions);
        }
    }

    #[test]
    fn a_disconnect_may_be_empty() {
        let normal = Disconnect {
            reason: ReasonCode::Success,
            properties: Properties::default(),
        };

        assert_eq!(
            decode(&[0xE0, 0], V5),
            Ok(Packet::Disconnect(normal.clone()))
        );
        assert_eq!(decode(&[0xE0, 1, 0], V5), Ok(Packet::Disconnect(normal)));
        assert_refused(&[0xE0, 1, 0], V3_1_1, DecodeError::TrailingBytes);
    }
}
