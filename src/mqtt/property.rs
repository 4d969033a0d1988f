//! Properties, section 2.2.2.
//!
//! A decoded packet keeps its properties as the validated bytes of the wire ([`Properties`]) and
//! reads from them what it needs; those of CONNECT and CONNACK are few, long lived and read all
//! at once, so they are structs.

use std::fmt;

use super::QoS;
use super::decode::{DecodeError, Reader};
use super::encode::{put_binary, put_variable_byte_integer};
use super::packet::PacketType;
use super::topic::validate_topic_name;

/// One property. The names are the specification's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property<'a> {
    PayloadFormatIndicator(bool),
    MessageExpiryInterval(u32),
    ContentType(&'a str),
    ResponseTopic(&'a str),
    CorrelationData(&'a [u8]),
    /// 1 to 268,435,455.
    SubscriptionIdentifier(u32),
    SessionExpiryInterval(u32),
    AssignedClientIdentifier(&'a str),
    ServerKeepAlive(u16),
    AuthenticationMethod(&'a str),
    AuthenticationData(&'a [u8]),
    RequestProblemInformation(bool),
    WillDelayInterval(u32),
    RequestResponseInformation(bool),
    ResponseInformation(&'a str),
    ServerReference(&'a str),
    ReasonString(&'a str),
    ReceiveMaximum(u16),
    TopicAliasMaximum(u16),
    TopicAlias(u16),
    MaximumQoS(QoS),
    RetainAvailable(bool),
    UserProperty(&'a str, &'a str),
    MaximumPacketSize(u32),
    WildcardSubscriptionAvailable(bool),
    SubscriptionIdentifierAvailable(bool),
    SharedSubscriptionAvailable(bool),
}

/// Validated properties as they stand on the wire, without the leading Property Length. Empty
/// before version 5.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Properties<'a>(pub(super) &'a [u8]);

/// What a CONNECT says beyond its flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectProperties<'a> {
    /// Seconds; `u32::MAX` never expires. `None` is 0.
    pub session_expiry_interval: Option<u32>,
    pub receive_maximum: Option<u16>,
    pub maximum_packet_size: Option<u32>,
    pub topic_alias_maximum: Option<u16>,
    pub request_response_information: bool,
    /// Absent means wanted.
    pub request_problem_information: Option<bool>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
    pub user_properties: Vec<(&'a str, &'a str)>,
}

/// The properties of a Will: the delay, and those that travel with the message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WillProperties<'a> {
    /// Seconds.
    pub delay_interval: u32,
    /// Seconds.
    pub message_expiry_interval: Option<u32>,
    /// All properties of the Will, of which [`Properties::forwarded`] travel with the message.
    pub all: Properties<'a>,
}

/// What a server says of itself in CONNACK.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnAckProperties<'a> {
    pub session_expiry_interval: Option<u32>,
    pub receive_maximum: Option<u16>,
    pub maximum_qos: Option<QoS>,
    pub retain_available: Option<bool>,
    pub maximum_packet_size: Option<u32>,
    pub assigned_client_identifier: Option<&'a str>,
    pub topic_alias_maximum: Option<u16>,
    pub reason_string: Option<&'a str>,
    pub user_properties: Vec<(&'a str, &'a str)>,
    pub wildcard_subscription_available: Option<bool>,
    pub subscription_identifier_available: Option<bool>,
    pub shared_subscription_available: Option<bool>,
    pub server_keep_alive: Option<u16>,
    pub response_information: Option<&'a str>,
    pub server_reference: Option<&'a str>,
    pub authentication_method: Option<&'a str>,
    pub authentication_data: Option<&'a [u8]>,
}

/// What may have properties: a packet, or the Will in a CONNECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Packet(PacketType),
    Will,
}

impl<'a> Property<'a> {
    /// Table 2-4.
    fn identifier(&self) -> u8 {
        match self {
            Self::PayloadFormatIndicator(_) => 0x01,
            Self::MessageExpiryInterval(_) => 0x02,
            Self::ContentType(_) => 0x03,
            Self::ResponseTopic(_) => 0x08,
            Self::CorrelationData(_) => 0x09,
            Self::SubscriptionIdentifier(_) => 0x0B,
            Self::SessionExpiryInterval(_) => 0x11,
            Self::AssignedClientIdentifier(_) => 0x12,
            Self::ServerKeepAlive(_) => 0x13,
            Self::AuthenticationMethod(_) => 0x15,
            Self::AuthenticationData(_) => 0x16,
            Self::RequestProblemInformation(_) => 0x17,
            Self::WillDelayInterval(_) => 0x18,
            Self::RequestResponseInformation(_) => 0x19,
            Self::ResponseInformation(_) => 0x1A,
            Self::ServerReference(_) => 0x1C,
            Self::ReasonString(_) => 0x1F,
            Self::ReceiveMaximum(_) => 0x21,
            Self::TopicAliasMaximum(_) => 0x22,
            Self::TopicAlias(_) => 0x23,
            Self::MaximumQoS(_) => 0x24,
            Self::RetainAvailable(_) => 0x25,
            Self::UserProperty(..) => 0x26,
            Self::MaximumPacketSize(_) => 0x27,
            Self::WildcardSubscriptionAvailable(_) => 0x28,
            Self::SubscriptionIdentifierAvailable(_) => 0x29,
            Self::SharedSubscriptionAvailable(_) => 0x2A,
        }
    }

    fn decode(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        // The identifier is a Variable Byte Integer, but none is above 127.
        Ok(match reader.u8()? {
            0x01 => Self::PayloadFormatIndicator(flag(reader)?),
            0x02 => Self::MessageExpiryInterval(reader.u32()?),
            0x03 => Self::ContentType(reader.string()?),
            0x08 => {
                let topic = reader.string()?;
                validate_topic_name(topic).map_err(DecodeError::ResponseTopic)?;
                Self::ResponseTopic(topic)
            }
            0x09 => Self::CorrelationData(reader.binary()?),
            0x0B => Self::SubscriptionIdentifier(not_zero(reader.variable_byte_integer()?)?),
            0x11 => Self::SessionExpiryInterval(reader.u32()?),
            0x12 => Self::AssignedClientIdentifier(reader.string()?),
            0x13 => Self::ServerKeepAlive(reader.u16()?),
            0x15 => Self::AuthenticationMethod(reader.string()?),
            0x16 => Self::AuthenticationData(reader.binary()?),
            0x17 => Self::RequestProblemInformation(flag(reader)?),
            0x18 => Self::WillDelayInterval(reader.u32()?),
            0x19 => Self::RequestResponseInformation(flag(reader)?),
            0x1A => Self::ResponseInformation(reader.string()?),
            0x1C => Self::ServerReference(reader.string()?),
            0x1F => Self::ReasonString(reader.string()?),
            0x21 => Self::ReceiveMaximum(not_zero(reader.u16()?)?),
            0x22 => Self::TopicAliasMaximum(reader.u16()?),
            0x23 => Self::TopicAlias(not_zero(reader.u16()?)?),
            0x24 => Self::MaximumQoS(if flag(reader)? {
                QoS::AtLeastOnce
            } else {
                QoS::AtMostOnce
            }),
            0x25 => Self::RetainAvailable(flag(reader)?),
            0x26 => Self::UserProperty(reader.string()?, reader.string()?),
            0x27 => Self::MaximumPacketSize(not_zero(reader.u32()?)?),
            0x28 => Self::WildcardSubscriptionAvailable(flag(reader)?),
            0x29 => Self::SubscriptionIdentifierAvailable(flag(reader)?),
            0x2A => Self::SharedSubscriptionAvailable(flag(reader)?),
            _ => return Err(DecodeError::PropertyNotAllowed),
        })
    }

    /// Appends it as it stands on the wire. A Maximum QoS of 2 appends nothing: that is how it is
    /// said, section 3.2.2.3.4.
    ///
    /// # Panics
    /// If text or data is longer than 65,535 bytes, or a Subscription Identifier above 268,435,455.
    pub fn encode(&self, out: &mut Vec<u8>) {
        if *self == Self::MaximumQoS(QoS::ExactlyOnce) {
            return;
        }
        out.push(self.identifier());
        match *self {
            Self::PayloadFormatIndicator(flag)
            | Self::RequestProblemInformation(flag)
            | Self::RequestResponseInformation(flag)
            | Self::RetainAvailable(flag)
            | Self::WildcardSubscriptionAvailable(flag)
            | Self::SubscriptionIdentifierAvailable(flag)
            | Self::SharedSubscriptionAvailable(flag) => out.push(flag.into()),
            Self::MaximumQoS(qos) => out.push(qos as u8),
            Self::ServerKeepAlive(number)
            | Self::ReceiveMaximum(number)
            | Self::TopicAliasMaximum(number)
            | Self::TopicAlias(number) => out.extend_from_slice(&number.to_be_bytes()),
            Self::MessageExpiryInterval(number)
            | Self::SessionExpiryInterval(number)
            | Self::WillDelayInterval(number)
            | Self::MaximumPacketSize(number) => out.extend_from_slice(&number.to_be_bytes()),
            Self::SubscriptionIdentifier(number) => put_variable_byte_integer(number as usize, out),
            Self::ContentType(text)
            | Self::ResponseTopic(text)
            | Self::AssignedClientIdentifier(text)
            | Self::AuthenticationMethod(text)
            | Self::ResponseInformation(text)
            | Self::ServerReference(text)
            | Self::ReasonString(text) => put_binary(text.as_bytes(), out),
            Self::CorrelationData(data) | Self::AuthenticationData(data) => put_binary(data, out),
            Self::UserProperty(name, value) => {
                put_binary(name.as_bytes(), out);
                put_binary(value.as_bytes(), out);
            }
        }
    }

    /// Whether it belongs to the Application Message rather than to the packet that carries it:
    /// a server forwards it unaltered, [MQTT-3.3.2-4], [MQTT-3.3.2-15], [MQTT-3.3.2-16],
    /// [MQTT-3.3.2-17], [MQTT-3.3.2-20].
    fn is_forwarded(&self) -> bool {
        matches!(
            self,
            Self::PayloadFormatIndicator(_)
                | Self::ContentType(_)
                | Self::ResponseTopic(_)
                | Self::CorrelationData(_)
                | Self::UserProperty(..)
        )
    }

    /// Table 2-4.
    pub(super) fn is_allowed_in(&self, place: Place) -> bool {
        use PacketType::*;
        match self {
            Self::PayloadFormatIndicator(_)
            | Self::MessageExpiryInterval(_)
            | Self::ContentType(_)
            | Self::ResponseTopic(_)
            | Self::CorrelationData(_) => {
                matches!(place, Place::Packet(Publish) | Place::Will)
            }
            Self::WillDelayInterval(_) => place == Place::Will,
            Self::TopicAlias(_) => place == Place::Packet(Publish),
            Self::SubscriptionIdentifier(_) => {
                matches!(place, Place::Packet(Publish | Subscribe))
            }
            Self::SessionExpiryInterval(_) => {
                matches!(place, Place::Packet(Connect | ConnAck | Disconnect))
            }
            Self::AuthenticationMethod(_) | Self::AuthenticationData(_) => {
                matches!(place, Place::Packet(Connect | ConnAck | Auth))
            }
            Self::ReceiveMaximum(_) | Self::TopicAliasMaximum(_) | Self::MaximumPacketSize(_) => {
                matches!(place, Place::Packet(Connect | ConnAck))
            }
            Self::RequestProblemInformation(_) | Self::RequestResponseInformation(_) => {
                place == Place::Packet(Connect)
            }
            Self::AssignedClientIdentifier(_)
            | Self::ServerKeepAlive(_)
            | Self::ResponseInformation(_)
            | Self::MaximumQoS(_)
            | Self::RetainAvailable(_)
            | Self::WildcardSubscriptionAvailable(_)
            | Self::SubscriptionIdentifierAvailable(_)
            | Self::SharedSubscriptionAvailable(_) => place == Place::Packet(ConnAck),
            Self::ServerReference(_) => matches!(place, Place::Packet(ConnAck | Disconnect)),
            Self::ReasonString(_) => matches!(
                place,
                Place::Packet(
                    ConnAck
                        | PubAck
                        | PubRec
                        | PubRel
                        | PubComp
                        | SubAck
                        | UnsubAck
                        | Disconnect
                        | Auth
                )
            ),
            Self::UserProperty(..) => true,
        }
    }

    pub(super) fn may_repeat_in(&self, place: Place) -> bool {
        match self {
            Self::UserProperty(..) => true,
            Self::SubscriptionIdentifier(_) => place == Place::Packet(PacketType::Publish),
            _ => false,
        }
    }
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, DecodeError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(DecodeError::PropertyValue),
    }
}

fn not_zero<T: Default + PartialEq>(value: T) -> Result<T, DecodeError> {
    if value == T::default() {
        Err(DecodeError::PropertyValue)
    } else {
        Ok(value)
    }
}

impl<'a> Properties<'a> {
    /// Reads the Property Length and what follows it, and checks everything that
    /// [`Properties::iter`] then relies on.
    #[inline]
    pub(super) fn decode(reader: &mut Reader<'a>, place: Place) -> Result<Self, DecodeError> {
        let length = reader.variable_byte_integer()?;
        let bytes = reader.take(length as usize)?;
        if !bytes.is_empty() {
            validate(bytes, place)?;
        }
        Ok(Self(bytes))
    }

    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// In the order of the wire.
    pub fn iter(self) -> impl Iterator<Item = Property<'a>> {
        let mut reader = Reader::new(self.0);
        std::iter::from_fn(move || Property::decode(&mut reader).ok())
    }

    /// The encoded properties that travel with an Application Message, in order, [MQTT-3.3.2-18]:
    /// Payload Format Indicator, Content Type, Response Topic, Correlation Data, User Property.
    pub fn forwarded(self) -> impl Iterator<Item = &'a [u8]> {
        let mut reader = Reader::new(self.0);
        std::iter::from_fn(move || {
            loop {
                let before = reader.remaining();
                let property = Property::decode(&mut reader).ok()?;
                if property.is_forwarded() {
                    return Some(&before[..before.len() - reader.remaining().len()]);
                }
            }
        })
    }

    pub fn user_properties(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.iter().filter_map(|property| match property {
            Property::UserProperty(name, value) => Some((name, value)),
            _ => None,
        })
    }

    pub fn subscription_identifiers(self) -> impl Iterator<Item = u32> {
        self.iter().filter_map(|property| match property {
            Property::SubscriptionIdentifier(identifier) => Some(identifier),
            _ => None,
        })
    }

    /// Of a SUBSCRIBE, which has one at most.
    pub fn subscription_identifier(self) -> Option<u32> {
        self.subscription_identifiers().next()
    }

    /// Seconds.
    pub fn message_expiry_interval(self) -> Option<u32> {
        self.iter().find_map(|property| match property {
            Property::MessageExpiryInterval(seconds) => Some(seconds),
            _ => None,
        })
    }

    /// Never 0.
    pub fn topic_alias(self) -> Option<u16> {
        self.iter().find_map(|property| match property {
            Property::TopicAlias(alias) => Some(alias),
            _ => None,
        })
    }

    /// Seconds; `u32::MAX` never expires.
    pub fn session_expiry_interval(self) -> Option<u32> {
        self.iter().find_map(|property| match property {
            Property::SessionExpiryInterval(seconds) => Some(seconds),
            _ => None,
        })
    }

    pub fn response_topic(self) -> Option<&'a str> {
        self.iter().find_map(|property| match property {
            Property::ResponseTopic(topic) => Some(topic),
            _ => None,
        })
    }

    pub fn reason_string(self) -> Option<&'a str> {
        self.iter().find_map(|property| match property {
            Property::ReasonString(text) => Some(text),
            _ => None,
        })
    }

    pub fn authentication_method(self) -> Option<&'a str> {
        self.iter().find_map(|property| match property {
            Property::AuthenticationMethod(method) => Some(method),
            _ => None,
        })
    }
}

fn validate(bytes: &[u8], place: Place) -> Result<(), DecodeError> {
    let mut reader = Reader::new(bytes);
    let mut seen = 0_u64;
    while !reader.is_empty() {
        let property = Property::decode(&mut reader)?;
        if !property.is_allowed_in(place) {
            return Err(DecodeError::PropertyNotAllowed);
        }
        let bit = 1 << property.identifier();
        if seen & bit != 0 && !property.may_repeat_in(place) {
            return Err(DecodeError::DuplicateProperty);
        }
        seen |= bit;
    }
    Ok(())
}

impl fmt::Debug for Properties<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Properties that are to be sent.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PropertiesBuffer(Vec<u8>);

impl PropertiesBuffer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the packet may carry it is for its receiver to judge.
    ///
    /// # Panics
    /// As [`Property::encode`].
    pub fn push(&mut self, property: Property<'_>) {
        property.encode(&mut self.0);
    }

    /// Bytes on the wire, without the Property Length.
    pub fn encoded_length(&self) -> usize {
        self.0.len()
    }

    pub fn as_properties(&self) -> Properties<'_> {
        Properties(&self.0)
    }
}

impl<'a> FromIterator<Property<'a>> for PropertiesBuffer {
    fn from_iter<I: IntoIterator<Item = Property<'a>>>(properties: I) -> Self {
        let mut buffer = Self::new();
        for property in properties {
            buffer.push(property);
        }
        buffer
    }
}

impl fmt::Debug for PropertiesBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_properties().fmt(f)
    }
}

impl<'a> ConnectProperties<'a> {
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let mut all = Self::default();
        for property in Properties::decode(reader, Place::Packet(PacketType::Connect))?.iter() {
            match property {
                Property::SessionExpiryInterval(it) => all.session_expiry_interval = Some(it),
                Property::ReceiveMaximum(it) => all.receive_maximum = Some(it),
                Property::MaximumPacketSize(it) => all.maximum_packet_size = Some(it),
                Property::TopicAliasMaximum(it) => all.topic_alias_maximum = Some(it),
                Property::RequestResponseInformation(it) => all.request_response_information = it,
                Property::RequestProblemInformation(it) => {
                    all.request_problem_information = Some(it);
                }
                Property::AuthenticationMethod(it) => all.authentication_method = Some(it),
                Property::AuthenticationData(it) => all.authentication_data = Some(it),
                Property::UserProperty(name, value) => all.user_properties.push((name, value)),
                _ => return Err(DecodeError::PropertyNotAllowed),
            }
        }
        if all.authentication_data.is_some() && all.authentication_method.is_none() {
            return Err(DecodeError::AuthenticationDataWithoutMethod);
        }
        Ok(all)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let request_response = self.request_response_information.then_some(true);
        let single = [
            self.session_expiry_interval
                .map(Property::SessionExpiryInterval),
            self.receive_maximum.map(Property::ReceiveMaximum),
            self.maximum_packet_size.map(Property::MaximumPacketSize),
            self.topic_alias_maximum.map(Property::TopicAliasMaximum),
            request_response.map(Property::RequestResponseInformation),
            self.request_problem_information
                .map(Property::RequestProblemInformation),
            self.authentication_method
                .map(Property::AuthenticationMethod),
            self.authentication_data.map(Property::AuthenticationData),
        ];
        encode_all(&single, &self.user_properties, out);
    }
}

impl<'a> WillProperties<'a> {
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let all = Properties::decode(reader, Place::Will)?;
        let delay_interval = all.iter().find_map(|property| match property {
            Property::WillDelayInterval(seconds) => Some(seconds),
            _ => None,
        });
        Ok(Self {
            delay_interval: delay_interval.unwrap_or(0),
            message_expiry_interval: all.message_expiry_interval(),
            all,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        if self.delay_interval != 0 {
            Property::WillDelayInterval(self.delay_interval).encode(out);
        }
        if let Some(seconds) = self.message_expiry_interval {
            Property::MessageExpiryInterval(seconds).encode(out);
        }
        self.all
            .forwarded()
            .for_each(|property| out.extend_from_slice(property));
    }
}

impl<'a> ConnAckProperties<'a> {
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let mut all = Self::default();
        for property in Properties::decode(reader, Place::Packet(PacketType::ConnAck))?.iter() {
            match property {
                Property::SessionExpiryInterval(it) => all.session_expiry_interval = Some(it),
                Property::ReceiveMaximum(it) => all.receive_maximum = Some(it),
                Property::MaximumQoS(it) => all.maximum_qos = Some(it),
                Property::RetainAvailable(it) => all.retain_available = Some(it),
                Property::MaximumPacketSize(it) => all.maximum_packet_size = Some(it),
                Property::AssignedClientIdentifier(it) => {
                    all.assigned_client_identifier = Some(it);
                }
                Property::TopicAliasMaximum(it) => all.topic_alias_maximum = Some(it),
                Property::ReasonString(it) => all.reason_string = Some(it),
                Property::UserProperty(name, value) => all.user_properties.push((name, value)),
                Property::WildcardSubscriptionAvailable(it) => {
                    all.wildcard_subscription_available = Some(it);
                }
                Property::SubscriptionIdentifierAvailable(it) => {
                    all.subscription_identifier_available = Some(it);
                }
                Property::SharedSubscriptionAvailable(it) => {
                    all.shared_subscription_available = Some(it);
                }
                Property::ServerKeepAlive(it) => all.server_keep_alive = Some(it),
                Property::ResponseInformation(it) => all.response_information = Some(it),
                Property::ServerReference(it) => all.server_reference = Some(it),
                Property::AuthenticationMethod(it) => all.authentication_method = Some(it),
                Property::AuthenticationData(it) => all.authentication_data = Some(it),
                _ => return Err(DecodeError::PropertyNotAllowed),
            }
        }
        Ok(all)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let single = [
            self.session_expiry_interval
                .map(Property::SessionExpiryInterval),
            self.receive_maximum.map(Property::ReceiveMaximum),
            self.maximum_qos.map(Property::MaximumQoS),
            self.retain_available.map(Property::RetainAvailable),
            self.maximum_packet_size.map(Property::MaximumPacketSize),
            self.assigned_client_identifier
                .map(Property::AssignedClientIdentifier),
            self.topic_alias_maximum.map(Property::TopicAliasMaximum),
            self.reason_string.map(Property::ReasonString),
            self.wildcard_subscription_available
                .map(Property::WildcardSubscriptionAvailable),
            self.subscription_identifier_available
                .map(Property::SubscriptionIdentifierAvailable),
            self.shared_subscription_available
                .map(Property::SharedSubscriptionAvailable),
            self.server_keep_alive.map(Property::ServerKeepAlive),
            self.response_information.map(Property::ResponseInformation),
            self.server_reference.map(Property::ServerReference),
            self.authentication_method
                .map(Property::AuthenticationMethod),
            self.authentication_data.map(Property::AuthenticationData),
        ];
        encode_all(&single, &self.user_properties, out);
    }
}

fn encode_all(
    single: &[Option<Property<'_>>],
    user_properties: &[(&str, &str)],
    out: &mut Vec<u8>,
) {
    for property in single.iter().flatten() {
        property.encode(out);
    }
    for (name, value) in user_properties {
        Property::UserProperty(name, value).encode(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_a_message() -> PropertiesBuffer {
        [
            Property::UserProperty("a", "1"),
            Property::MessageExpiryInterval(60),
            Property::ContentType("text"),
            Property::SubscriptionIdentifier(300),
            Property::TopicAlias(2),
            Property::UserProperty("a", "2"),
            Property::SubscriptionIdentifier(1),
        ]
        .into_iter()
        .collect()
    }

    #[test]
    fn properties_are_read_as_they_were_written() {
        let buffer = of_a_message();
        let properties = buffer.as_properties();

        assert_eq!(properties.iter().count(), 7);
        assert_eq!(properties.message_expiry_interval(), Some(60));
        assert_eq!(properties.topic_alias(), Some(2));
        assert_eq!(properties.response_topic(), None);
        assert!(properties.subscription_identifiers().eq([300, 1]));
        assert!(properties.user_properties().eq([("a", "1"), ("a", "2")]));
    }

    #[test]
    fn mqtt_3_3_2_18_what_is_forwarded_keeps_its_order() {
        let buffer = of_a_message();
        let forwarded: Vec<u8> = buffer
            .as_properties()
            .forwarded()
            .collect::<Vec<_>>()
            .concat();

        let expected = [
            Property::UserProperty("a", "1"),
            Property::ContentType("text"),
            Property::UserProperty("a", "2"),
        ];
        assert!(Properties(&forwarded).iter().eq(expected));
    }

    #[test]
    fn maximum_qos_2_is_said_by_leaving_it_out() {
        let buffer: PropertiesBuffer = [Property::MaximumQoS(QoS::ExactlyOnce)]
            .into_iter()
            .collect();

        assert!(buffer.as_properties().is_empty());
    }

    #[test]
    fn every_field_of_connack_is_sent() {
        let all = ConnAckProperties {
            session_expiry_interval: Some(1),
            receive_maximum: Some(2),
            maximum_qos: Some(QoS::AtLeastOnce),
            retain_available: Some(false),
            maximum_packet_size: Some(3),
            assigned_client_identifier: Some("c"),
            topic_alias_maximum: Some(4),
            reason_string: Some("r"),
            user_properties: vec![("n", "v"), ("n", "w")],
            wildcard_subscription_available: Some(true),
            subscription_identifier_available: Some(false),
            shared_subscription_available: Some(true),
            server_keep_alive: Some(5),
            response_information: Some("i"),
            server_reference: Some("s"),
            authentication_method: Some("m"),
            authentication_data: Some(b"d"),
        };
        let mut bytes = vec![0];
        all.encode(&mut bytes);
        bytes[0] = u8::try_from(bytes.len() - 1).unwrap();

        assert_eq!(ConnAckProperties::decode(&mut Reader::new(&bytes)), Ok(all));
    }

    #[test]
    fn every_field_of_connect_is_sent() {
        let all = ConnectProperties {
            session_expiry_interval: Some(u32::MAX),
            receive_maximum: Some(2),
            maximum_packet_size: Some(3),
            topic_alias_maximum: Some(4),
            request_response_information: true,
            request_problem_information: Some(false),
            authentication_method: Some("m"),
            authentication_data: Some(b"d"),
            user_properties: vec![("n", "v"), ("n", "w")],
        };
        let mut bytes = vec![0];
        all.encode(&mut bytes);
        bytes[0] = u8::try_from(bytes.len() - 1).unwrap();

        assert_eq!(ConnectProperties::decode(&mut Reader::new(&bytes)), Ok(all));
    }
}
