//! The fifteen Control Packets, borrowed from the buffer that they were read into.

use std::num::NonZeroU16;

use super::ReasonCode;
use super::property::{ConnAckProperties, ConnectProperties, Properties, WillProperties};
use super::topic::{RetainHandling, SubscribeOptions};

/// The protocol level a client asked for in its CONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProtocolVersion {
    /// `MQIsdp`, level 3.
    V3_1,
    /// `MQTT`, level 4.
    V3_1_1,
    /// `MQTT`, level 5.
    V5,
}

impl ProtocolVersion {
    /// Whether packets of this version carry properties and reason codes.
    pub fn is_v5(self) -> bool {
        self == Self::V5
    }
}

/// Quality of Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QoS {
    #[default]
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl QoS {
    /// `None` for 3, which is malformed, [MQTT-3.3.1-4].
    pub fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::AtMostOnce),
            1 => Some(Self::AtLeastOnce),
            2 => Some(Self::ExactlyOnce),
            _ => None,
        }
    }
}

/// A Packet Identifier; zero is not one, [MQTT-2.2.1-3].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PacketId(NonZeroU16);

impl PacketId {
    pub fn new(value: u16) -> Option<Self> {
        NonZeroU16::new(value).map(Self)
    }

    pub fn get(self) -> u16 {
        self.0.get()
    }
}

/// The kind of a Control Packet: the first four bits on the wire, section 2.1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PacketType {
    Connect = 1,
    ConnAck = 2,
    Publish = 3,
    PubAck = 4,
    PubRec = 5,
    PubRel = 6,
    PubComp = 7,
    Subscribe = 8,
    SubAck = 9,
    Unsubscribe = 10,
    UnsubAck = 11,
    PingReq = 12,
    PingResp = 13,
    Disconnect = 14,
    Auth = 15,
}

impl PacketType {
    /// `None` for 0, which is reserved, and for more than four bits.
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            1 => Self::Connect,
            2 => Self::ConnAck,
            3 => Self::Publish,
            4 => Self::PubAck,
            5 => Self::PubRec,
            6 => Self::PubRel,
            7 => Self::PubComp,
            8 => Self::Subscribe,
            9 => Self::SubAck,
            10 => Self::Unsubscribe,
            11 => Self::UnsubAck,
            12 => Self::PingReq,
            13 => Self::PingResp,
            14 => Self::Disconnect,
            15 => Self::Auth,
            _ => return None,
        })
    }

    /// The other four bits of the first byte, which every type but PUBLISH reserves,
    /// [MQTT-2.1.3-1].
    pub(super) fn reserved_flags(self) -> u8 {
        match self {
            Self::PubRel | Self::Subscribe | Self::Unsubscribe => 0b0010,
            _ => 0,
        }
    }
}

/// One Control Packet. Both protocol families and both directions use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    Connect(Box<Connect<'a>>),
    ConnAck(Box<ConnAck<'a>>),
    Publish(Publish<'a>),
    PubAck(Acknowledgement<'a>),
    PubRec(Acknowledgement<'a>),
    PubRel(Acknowledgement<'a>),
    PubComp(Acknowledgement<'a>),
    Subscribe(Subscribe<'a>),
    SubAck(SubscribeAcknowledgement<'a>),
    Unsubscribe(Unsubscribe<'a>),
    UnsubAck(SubscribeAcknowledgement<'a>),
    PingReq,
    PingResp,
    Disconnect(Disconnect<'a>),
    Auth(Auth<'a>),
}

/// CONNECT, section 3.1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connect<'a> {
    pub version: ProtocolVersion,
    /// Clean Start; Clean Session before version 5.
    pub clean_start: bool,
    /// Seconds; zero turns it off.
    pub keep_alive: u16,
    /// May be empty.
    pub client_id: &'a str,
    pub will: Option<Will<'a>>,
    pub user_name: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    pub properties: ConnectProperties<'a>,
}

/// The Will Message of a CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub qos: QoS,
    pub retain: bool,
    pub properties: WillProperties<'a>,
}

/// CONNACK, section 3.2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnAck<'a> {
    pub session_present: bool,
    /// Encoded as the Connect Return Code of the older versions where the client speaks one.
    pub reason: ReasonCode,
    pub properties: ConnAckProperties<'a>,
}

/// PUBLISH, section 3.3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish<'a> {
    pub dup: bool,
    pub qos: QoS,
    pub retain: bool,
    /// Empty where a topic alias stands for it.
    pub topic: &'a str,
    /// Present exactly if the QoS is not 0.
    pub packet_id: Option<PacketId>,
    pub properties: Properties<'a>,
    pub payload: &'a [u8],
}

/// PUBACK, PUBREC, PUBREL and PUBCOMP, sections 3.4 to 3.7.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledgement<'a> {
    pub packet_id: PacketId,
    /// [`ReasonCode::Success`] before version 5.
    pub reason: ReasonCode,
    pub properties: Properties<'a>,
}

impl Acknowledgement<'_> {
    pub fn success(packet_id: PacketId) -> Self {
        Self::with_reason(packet_id, ReasonCode::Success)
    }

    pub fn with_reason(packet_id: PacketId, reason: ReasonCode) -> Self {
        Self {
            packet_id,
            reason,
            properties: Properties::default(),
        }
    }
}

/// SUBSCRIBE, section 3.8. The filters are as sent: not yet checked, so that each gets a reason
/// code of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscribe<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    /// At least one, [MQTT-3.8.3-2].
    pub filters: Vec<(&'a str, SubscribeOptions)>,
}

/// SUBACK and UNSUBACK, sections 3.9 and 3.11. A version 3 UNSUBACK has no reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeAcknowledgement<'a> {
    pub packet_id: PacketId,
    pub reasons: Vec<ReasonCode>,
    pub properties: Properties<'a>,
}

/// UNSUBSCRIBE, section 3.10.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsubscribe<'a> {
    pub packet_id: PacketId,
    pub properties: Properties<'a>,
    /// At least one, [MQTT-3.10.3-2].
    pub filters: Vec<&'a str>,
}

/// DISCONNECT, section 3.14.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disconnect<'a> {
    pub reason: ReasonCode,
    pub properties: Properties<'a>,
}

/// AUTH, section 3.15.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth<'a> {
    pub reason: ReasonCode,
    pub properties: Properties<'a>,
}

impl Packet<'_> {
    pub fn packet_type(&self) -> PacketType {
        match self {
            Self::Connect(_) => PacketType::Connect,
            Self::ConnAck(_) => PacketType::ConnAck,
            Self::Publish(_) => PacketType::Publish,
            Self::PubAck(_) => PacketType::PubAck,
            Self::PubRec(_) => PacketType::PubRec,
            Self::PubRel(_) => PacketType::PubRel,
            Self::PubComp(_) => PacketType::PubComp,
            Self::Subscribe(_) => PacketType::Subscribe,
            Self::SubAck(_) => PacketType::SubAck,
            Self::Unsubscribe(_) => PacketType::Unsubscribe,
            Self::UnsubAck(_) => PacketType::UnsubAck,
            Self::PingReq => PacketType::PingReq,
            Self::PingResp => PacketType::PingResp,
            Self::Disconnect(_) => PacketType::Disconnect,
            Self::Auth(_) => PacketType::Auth,
        }
    }
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            maximum_qos: QoS::AtMostOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: RetainHandling::SendAtSubscribe,
        }
    }
}
