//! Packets as bytes, written from the specification alone: a fault in midge's own codec cannot
//! hide behind the same fault here.

/// What a CONNECT names as its protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V3_1,
    V3_1_1,
    V5,
}

impl Version {
    pub(crate) fn is_v5(self) -> bool {
        self == Self::V5
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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

impl Kind {
    const ALL: [Self; 15] = [
        Self::Connect,
        Self::ConnAck,
        Self::Publish,
        Self::PubAck,
        Self::PubRec,
        Self::PubRel,
        Self::PubComp,
        Self::Subscribe,
        Self::SubAck,
        Self::Unsubscribe,
        Self::UnsubAck,
        Self::PingReq,
        Self::PingResp,
        Self::Disconnect,
        Self::Auth,
    ];

    fn from_bits(bits: u8) -> Self {
        *Self::ALL
            .get(usize::from(bits).wrapping_sub(1))
            .expect("packet type 0 is forbidden")
    }
}

/// The value of a property, by its type on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Byte(u8),
    Two(u16),
    Four(u32),
    Variable(u32),
    Text(String),
    Binary(Vec<u8>),
    Pair(String, String),
}

/// A property: its identifier and value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Property(pub(crate) u8, pub(crate) Value);

pub(crate) mod property {
    use super::{Property, Value};

    pub(crate) const PAYLOAD_FORMAT_INDICATOR: u8 = 0x01;
    pub(crate) const MESSAGE_EXPIRY_INTERVAL: u8 = 0x02;
    pub(crate) const CONTENT_TYPE: u8 = 0x03;
    pub(crate) const RESPONSE_TOPIC: u8 = 0x08;
    pub(crate) const CORRELATION_DATA: u8 = 0x09;
    pub(crate) const SUBSCRIPTION_IDENTIFIER: u8 = 0x0B;
    pub(crate) const SESSION_EXPIRY_INTERVAL: u8 = 0x11;
    pub(crate) const ASSIGNED_CLIENT_IDENTIFIER: u8 = 0x12;
    pub(crate) const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub(crate) const AUTHENTICATION_METHOD: u8 = 0x15;
    pub(crate) const AUTHENTICATION_DATA: u8 = 0x16;
    pub(crate) const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;
    pub(crate) const WILL_DELAY_INTERVAL: u8 = 0x18;
    pub(crate) const REQUEST_RESPONSE_INFORMATION: u8 = 0x19;
    pub(crate) const RESPONSE_INFORMATION: u8 = 0x1A;
    pub(crate) const SERVER_REFERENCE: u8 = 0x1C;
    pub(crate) const REASON_STRING: u8 = 0x1F;
    pub(crate) const RECEIVE_MAXIMUM: u8 = 0x21;
    pub(crate) const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub(crate) const TOPIC_ALIAS: u8 = 0x23;
    pub(crate) const MAXIMUM_QOS: u8 = 0x24;
    pub(crate) const RETAIN_AVAILABLE: u8 = 0x25;
    pub(crate) const USER_PROPERTY: u8 = 0x26;
    pub(crate) const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub(crate) const WILDCARD_SUBSCRIPTION_AVAILABLE: u8 = 0x28;
    pub(crate) const SUBSCRIPTION_IDENTIFIERS_AVAILABLE: u8 = 0x29;
    pub(crate) const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 0x2A;

    pub(crate) fn payload_format_indicator(indicator: u8) -> Property {
        Property(PAYLOAD_FORMAT_INDICATOR, Value::Byte(indicator))
    }

    pub(crate) fn message_expiry(seconds: u32) -> Property {
        Property(MESSAGE_EXPIRY_INTERVAL, Value::Four(seconds))
    }

    pub(crate) fn content_type(text: &str) -> Property {
        Property(CONTENT_TYPE, Value::Text(text.to_owned()))
    }

    pub(crate) fn response_topic(topic: &str) -> Property {
        Property(RESPONSE_TOPIC, Value::Text(topic.to_owned()))
    }

    pub(crate) fn correlation_data(data: &[u8]) -> Property {
        Property(CORRELATION_DATA, Value::Binary(data.to_vec()))
    }

    pub(crate) fn subscription_identifier(identifier: u32) -> Property {
        Property(SUBSCRIPTION_IDENTIFIER, Value::Variable(identifier))
    }

    pub(crate) fn session_expiry(seconds: u32) -> Property {
        Property(SESSION_EXPIRY_INTERVAL, Value::Four(seconds))
    }

    pub(crate) fn authentication_method(name: &str) -> Property {
        Property(AUTHENTICATION_METHOD, Value::Text(name.to_owned()))
    }

    pub(crate) fn authentication_data(data: &[u8]) -> Property {
        Property(AUTHENTICATION_DATA, Value::Binary(data.to_vec()))
    }

    pub(crate) fn request_problem_information(wanted: u8) -> Property {
        Property(REQUEST_PROBLEM_INFORMATION, Value::Byte(wanted))
    }

    pub(crate) fn request_response_information(wanted: u8) -> Property {
        Property(REQUEST_RESPONSE_INFORMATION, Value::Byte(wanted))
    }

    pub(crate) fn will_delay(seconds: u32) -> Property {
        Property(WILL_DELAY_INTERVAL, Value::Four(seconds))
    }

    pub(crate) fn reason_string(text: &str) -> Property {
        Property(REASON_STRING, Value::Text(text.to_owned()))
    }

    pub(crate) fn receive_maximum(maximum: u16) -> Property {
        Property(RECEIVE_MAXIMUM, Value::Two(maximum))
    }

    pub(crate) fn topic_alias_maximum(maximum: u16) -> Property {
        Property(TOPIC_ALIAS_MAXIMUM, Value::Two(maximum))
    }

    pub(crate) fn topic_alias(alias: u16) -> Property {
        Property(TOPIC_ALIAS, Value::Two(alias))
    }

    pub(crate) fn user_property(name: &str, value: &str) -> Property {
        Property(
            USER_PROPERTY,
            Value::Pair(name.to_owned(), value.to_owned()),
        )
    }

    pub(crate) fn maximum_packet_size(bytes: u32) -> Property {
        Property(MAXIMUM_PACKET_SIZE, Value::Four(bytes))
    }

    pub(crate) fn server_keep_alive(seconds: u16) -> Property {
        Property(SERVER_KEEP_ALIVE, Value::Two(seconds))
    }
}

pub(crate) fn variable_byte_integer(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let digit = u8::try_from(value % 128).expect("below 128");
        value /= 128;
        if value == 0 {
            bytes.push(digit);
            return bytes;
        }
        bytes.push(digit | 0x80);
    }
}

/// A two byte length and the bytes: what UTF-8 Encoded Strings and Binary Data look like.
pub(crate) fn prefixed(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).expect("a u16 length");
    [&length.to_be_bytes()[..], bytes].concat()
}

/// A whole packet: the first byte as given, the Remaining Length, and the rest.
pub(crate) fn frame(first_byte: u8, body: &[u8]) -> Vec<u8> {
    [&[first_byte][..], &variable_byte_integer(body.len()), body].concat()
}

pub(crate) fn encode_properties(properties: &[Property]) -> Vec<u8> {
    let mut encoded = Vec::new();
    for Property(id, value) in properties {
        encoded.push(*id);
        match value {
            Value::Byte(byte) => encoded.push(*byte),
            Value::Two(number) => encoded.extend(number.to_be_bytes()),
            Value::Four(number) => encoded.extend(number.to_be_bytes()),
            Value::Variable(number) => encoded.extend(variable_byte_integer(*number as usize)),
            Value::Text(text) => encoded.extend(prefixed(text.as_bytes())),
            Value::Binary(data) => encoded.extend(prefixed(data)),
            Value::Pair(name, text) => {
                encoded.extend(prefixed(name.as_bytes()));
                encoded.extend(prefixed(text.as_bytes()));
            }
        }
    }
    [variable_byte_integer(encoded.len()), encoded].concat()
}

#[derive(Clone, Debug)]
pub(crate) struct Will {
    pub(crate) topic: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) properties: Vec<Property>,
}

impl Will {
    pub(crate) fn new(topic: &str, payload: &str) -> Self {
        Self {
            topic: topic.into(),
            payload: payload.into(),
            qos: 0,
            retain: false,
            properties: Vec::new(),
        }
    }

    pub(crate) fn qos(mut self, qos: u8) -> Self {
        self.qos = qos;
        self
    }

    pub(crate) fn retain(mut self) -> Self {
        self.retain = true;
        self
    }

    pub(crate) fn property(mut self, property: Property) -> Self {
        self.properties.push(property);
        self
    }
}

/// A CONNECT: by default a clean start with a keep alive of a minute.
#[derive(Clone, Debug)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    protocol_name: Vec<u8>,
    protocol_level: u8,
    client_id: Vec<u8>,
    clean_start: bool,
    keep_alive: u16,
    will: Option<Will>,
    user_name: Option<Vec<u8>>,
    password: Option<Vec<u8>>,
    properties: Vec<Property>,
    flags: Option<u8>,
}

impl Connect {
    pub(crate) fn new(version: Version, client_id: &str) -> Self {
        let (name, level) = match version {
            Version::V3_1 => ("MQIsdp", 3),
            Version::V3_1_1 => ("MQTT", 4),
            Version::V5 => ("MQTT", 5),
        };
        Self {
            version,
            protocol_name: name.into(),
            protocol_level: level,
            client_id: client_id.into(),
            clean_start: true,
            keep_alive: 60,
            will: None,
            user_name: None,
            password: None,
            properties: Vec::new(),
            flags: None,
        }
    }

    /// Resumes the session if there is one, and keeps it when the connection ends.
    pub(crate) fn persistent(version: Version, client_id: &str) -> Self {
        let connect = Self::new(version, client_id).clean_start(false);
        if version.is_v5() {
            connect.property(property::session_expiry(300))
        } else {
            connect
        }
    }

    pub(crate) fn clean_start(mut self, clean_start: bool) -> Self {
        self.clean_start = clean_start;
        self
    }

    pub(crate) fn keep_alive(mut self, seconds: u16) -> Self {
        self.keep_alive = seconds;
        self
    }

    pub(crate) fn will(mut self, will: Will) -> Self {
        self.will = Some(will);
        self
    }

    pub(crate) fn user_name(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.user_name = Some(name.into());
        self
    }

    pub(crate) fn password(mut self, password: impl Into<Vec<u8>>) -> Self {
        self.password = Some(password.into());
        self
    }

    pub(crate) fn property(mut self, property: Property) -> Self {
        self.properties.push(property);
        self
    }

    pub(crate) fn client_id_bytes(mut self, client_id: &[u8]) -> Self {
        self.client_id = client_id.to_vec();
        self
    }

    pub(crate) fn protocol(mut self, name: &str, level: u8) -> Self {
        self.protocol_name = name.into();
        self.protocol_level = level;
        self
    }

    /// Sends these Connect Flags, whatever the payload holds.
    pub(crate) fn flags(mut self, flags: u8) -> Self {
        self.flags = Some(flags);
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut flags = u8::from(self.clean_start) << 1;
        let mut payload = prefixed(&self.client_id);
        if let Some(will) = &self.will {
            flags |= 0x04 | will.qos << 3 | u8::from(will.retain) << 5;
            if self.version.is_v5() {
                payload.extend(encode_properties(&will.properties));
            }
            payload.extend(prefixed(&will.topic));
            payload.extend(prefixed(&will.payload));
        }
        if let Some(name) = &self.user_name {
            flags |= 0x80;
            payload.extend(prefixed(name));
        }
        if let Some(password) = &self.password {
            flags |= 0x40;
            payload.extend(prefixed(password));
        }
        let mut body = prefixed(&self.protocol_name);
        body.push(self.protocol_level);
        body.push(self.flags.unwrap_or(flags));
        body.extend(self.keep_alive.to_be_bytes());
        if self.version.is_v5() {
            body.extend(encode_properties(&self.properties));
        }
        body.extend(payload);
        frame(0x10, &body)
    }
}

/// A PUBLISH to send: by default QoS 0.
#[derive(Clone, Debug)]
pub(crate) struct Publish {
    topic: Vec<u8>,
    payload: Vec<u8>,
    qos: u8,
    id: u16,
    dup: bool,
    retain: bool,
    properties: Vec<Property>,
}

impl Publish {
    pub(crate) fn new(topic: &str, payload: &str) -> Self {
        Self::from_bytes(topic.as_bytes(), payload.as_bytes())
    }

    pub(crate) fn from_bytes(topic: &[u8], payload: &[u8]) -> Self {
        Self {
            topic: topic.to_vec(),
            payload: payload.to_vec(),
            qos: 0,
            id: 0,
            dup: false,
            retain: false,
            properties: Vec::new(),
        }
    }

    pub(crate) fn qos(mut self, qos: u8, id: u16) -> Self {
        self.qos = qos;
        self.id = id;
        self
    }

    pub(crate) fn dup(mut self) -> Self {
        self.dup = true;
        self
    }

    pub(crate) fn retain(mut self) -> Self {
        self.retain = true;
        self
    }

    pub(crate) fn property(mut self, property: Property) -> Self {
        self.properties.push(property);
        self
    }

    pub(crate) fn bytes(&self, version: Version) -> Vec<u8> {
        let flags = u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain);
        let mut body = prefixed(&self.topic);
        if self.qos > 0 {
            body.extend(self.id.to_be_bytes());
        }
        if version.is_v5() {
            body.extend(encode_properties(&self.properties));
        }
        body.extend(&self.payload);
        frame(0x30 | flags, &body)
    }
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP without a Reason Code.
pub(crate) fn acknowledgement(kind: Kind, id: u16) -> Vec<u8> {
    frame(first_byte(kind), &id.to_be_bytes())
}

/// The version 5 form with a Reason Code.
pub(crate) fn acknowledgement_with_reason(kind: Kind, id: u16, reason: u8) -> Vec<u8> {
    frame(
        first_byte(kind),
        &[&id.to_be_bytes()[..], &[reason]].concat(),
    )
}

/// The packet type with the flags that section 2.1.3 demands.
pub(crate) fn first_byte(kind: Kind) -> u8 {
    let flags = match kind {
        Kind::PubRel | Kind::Subscribe | Kind::Unsubscribe => 0b0010,
        _ => 0,
    };
    (kind as u8) << 4 | flags
}

pub(crate) fn subscribe(
    version: Version,
    id: u16,
    filters: &[(&str, u8)],
    properties: &[Property],
) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    if version.is_v5() {
        body.extend(encode_properties(properties));
    }
    for (filter, options) in filters {
        body.extend(prefixed(filter.as_bytes()));
        body.push(*options);
    }
    frame(first_byte(Kind::Subscribe), &body)
}

pub(crate) fn unsubscribe(version: Version, id: u16, filters: &[&str]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    if version.is_v5() {
        body.push(0);
    }
    for filter in filters {
        body.extend(prefixed(filter.as_bytes()));
    }
    frame(first_byte(Kind::Unsubscribe), &body)
}

pub(crate) fn pingreq() -> Vec<u8> {
    frame(0xC0, &[])
}

pub(crate) fn disconnect() -> Vec<u8> {
    frame(0xE0, &[])
}

/// The version 5 form with a Reason Code and properties.
pub(crate) fn disconnect_with(reason: u8, properties: &[Property]) -> Vec<u8> {
    frame(
        0xE0,
        &[vec![reason], encode_properties(properties)].concat(),
    )
}

/// A packet from the server. Fields that its kind does not have are empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    pub(crate) session_present: bool,
    /// Zero if it carries none.
    pub(crate) id: u16,
    pub(crate) reasons: Vec<u8>,
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) properties: Vec<Property>,
    /// Bytes of the whole packet.
    pub(crate) size: usize,
}

impl Packet {
    pub(crate) fn qos(&self) -> u8 {
        self.flags >> 1 & 0b11
    }

    pub(crate) fn retain(&self) -> bool {
        self.flags & 1 != 0
    }

    pub(crate) fn dup(&self) -> bool {
        self.flags & 0b1000 != 0
    }

    /// The payload as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// The only Reason Code.
    #[track_caller]
    pub(crate) fn reason(&self) -> u8 {
        assert_eq!(self.reasons.len(), 1, "one reason code in {self:?}");
        self.reasons[0]
    }

    /// All values of a property, in order.
    pub(crate) fn values(&self, id: u8) -> Vec<&Value> {
        self.properties
            .iter()
            .filter(|property| property.0 == id)
            .map(|property| &property.1)
            .collect()
    }

    /// The value of a property that may occur once.
    #[track_caller]
    pub(crate) fn value(&self, id: u8) -> Option<&Value> {
        let values = self.values(id);
        assert!(
            values.len() <= 1,
            "property {id:#x} occurs once in {self:?}"
        );
        values.first().copied()
    }

    /// The value of a property that is a number of any width.
    #[track_caller]
    pub(crate) fn number(&self, id: u8) -> Option<u32> {
        self.value(id).map(|value| match value {
            Value::Byte(number) => u32::from(*number),
            Value::Two(number) => u32::from(*number),
            Value::Four(number) | Value::Variable(number) => *number,
            Value::Text(_) | Value::Binary(_) | Value::Pair(..) => {
                panic!("property {id:#x} is a number")
            }
        })
    }

    #[track_caller]
    pub(crate) fn subscription_identifiers(&self) -> Vec<u32> {
        let mut identifiers: Vec<u32> = self
            .values(property::SUBSCRIPTION_IDENTIFIER)
            .into_iter()
            .map(|value| match value {
                Value::Variable(identifier) => *identifier,
                other => panic!("a subscription identifier is not {other:?}"),
            })
            .collect();
        identifiers.sort_unstable();
        identifiers
    }

    /// Takes a whole packet off the front of `received`; `None` if it is not complete yet.
    ///
    /// # Panics
    /// If a server may not send such a packet.
    pub(crate) fn take(version: Version, received: &mut Vec<u8>) -> Option<Self> {
        let length_bytes = received.iter().skip(1).position(|byte| byte & 0x80 == 0)? + 1;
        assert!(
            length_bytes <= 4,
            "a Remaining Length has four bytes at most"
        );
        let remaining = received[1..=length_bytes]
            .iter()
            .rev()
            .fold(0, |length, byte| length << 7 | usize::from(byte & 0x7F));
        let size = 1 + length_bytes + remaining;
        if received.len() < size {
            return None;
        }
        let bytes: Vec<u8> = received.drain(..size).collect();
        let mut packet = Self::parse(version, bytes[0], &bytes[1 + length_bytes..]);
        packet.size = size;
        Some(packet)
    }

    fn parse(version: Version, first_byte: u8, body: &[u8]) -> Self {
        let mut packet = Self {
            kind: Kind::from_bits(first_byte >> 4),
            flags: first_byte & 0x0F,
            session_present: false,
            id: 0,
            reasons: Vec::new(),
            topic: String::new(),
            payload: Vec::new(),
            properties: Vec::new(),
            size: 0,
        };
        if packet.kind != Kind::Publish {
            assert_eq!(
                first_byte,
                self::first_byte(packet.kind),
                "flags of {:?}, [MQTT-2.1.3-1]",
                packet.kind
            );
        }
        let mut body = Reader(body);
        match packet.kind {
            Kind::ConnAck => {
                let flags = body.byte();
                assert_eq!(
                    flags & 0xFE,
                    0,
                    "reserved Connect Acknowledge Flags, [MQTT-3.2.2-1]"
                );
                packet.session_present = flags == 1;
                packet.reasons.push(body.byte());
                // A refusal may be in the form of an older version than the one asked for.
                if version.is_v5() && !body.0.is_empty() {
                    packet.properties = body.properties();
                }
            }
            Kind::Publish => {
                packet.topic = body.text();
                if packet.qos() > 0 {
                    packet.id = body.two();
                    assert_ne!(
                        packet.id, 0,
                        "a Packet Identifier is not zero, [MQTT-2.2.1-4]"
                    );
                }
                if version.is_v5() {
                    packet.properties = body.properties();
                }
                packet.payload = body.rest().to_vec();
            }
            Kind::PubAck | Kind::PubRec | Kind::PubRel | Kind::PubComp => {
                packet.id = body.two();
                packet.reasons.push(0);
                if version.is_v5() && !body.0.is_empty() {
                    packet.reasons[0] = body.byte();
                    if !body.0.is_empty() {
                        packet.properties = body.properties();
                    }
                }
            }
            Kind::SubAck | Kind::UnsubAck => {
                packet.id = body.two();
                if version.is_v5() {
                    packet.properties = body.properties();
                }
                if version.is_v5() || packet.kind == Kind::SubAck {
                    packet.reasons = body.rest().to_vec();
                }
            }
            Kind::PingResp => {}
            Kind::Disconnect | Kind::Auth => {
                assert!(
                    version.is_v5(),
                    "a server sends no {:?} before version 5",
                    packet.kind
                );
                packet
                    .reasons
                    .push(if body.0.is_empty() { 0 } else { body.byte() });
                if !body.0.is_empty() {
                    packet.properties = body.properties();
                }
            }
            Kind::Connect | Kind::Subscribe | Kind::Unsubscribe | Kind::PingReq => {
                panic!("a server sends no {:?}", packet.kind)
            }
        }
        assert!(body.0.is_empty(), "bytes after the end of {packet:?}");
        packet
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at_checked(count).expect("the packet goes on");
        self.0 = rest;
        taken
    }

    fn rest(&mut self) -> &'a [u8] {
        self.take(self.0.len())
    }

    fn byte(&mut self) -> u8 {
        self.take(1)[0]
    }

    fn two(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().expect("two bytes"))
    }

    fn four(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().expect("four bytes"))
    }

    fn variable(&mut self) -> u32 {
        let mut value = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte();
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return value;
            }
        }
        panic!("a Variable Byte Integer has four bytes at most");
    }

    fn binary(&mut self) -> &'a [u8] {
        let length = self.two();
        self.take(usize::from(length))
    }

    fn text(&mut self) -> String {
        String::from_utf8(self.binary().to_vec()).expect("a server sends UTF-8")
    }

    fn properties(&mut self) -> Vec<Property> {
        let length = self.variable() as usize;
        let mut body = Reader(self.take(length));
        let mut properties = Vec::new();
        while !body.0.is_empty() {
            let id = body.byte();
            let value = match id {
                0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2A => Value::Byte(body.byte()),
                0x13 | 0x21 | 0x22 | 0x23 => Value::Two(body.two()),
                0x02 | 0x11 | 0x18 | 0x27 => Value::Four(body.four()),
                0x0B => Value::Variable(body.variable()),
                0x03 | 0x08 | 0x12 | 0x15 | 0x1A | 0x1C | 0x1F => Value::Text(body.text()),
                0x09 | 0x16 => Value::Binary(body.binary().to_vec()),
                0x26 => Value::Pair(body.text(), body.text()),
                other => panic!("unknown property {other:#x}"),
            };
            properties.push(Property(id, value));
        }
        properties
    }
}
