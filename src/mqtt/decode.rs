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
