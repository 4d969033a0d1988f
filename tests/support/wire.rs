//! The packets that these tests need, written and read without any code of midge's.

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Version {
    V311,
    V5,
}

/// What a CONNECT says.
#[derive(Clone, Debug)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    pub(crate) client_id: String,
    pub(crate) clean_start: bool,
    /// Seconds; version 3.1.1 has only "for ever", without a clean start, and 0.
    pub(crate) expiry_interval: u32,
    pub(crate) receive_maximum: u16,
    pub(crate) will: Option<Will>,
    /// Name and password.
    pub(crate) user: Option<(&'static str, &'static str)>,
}

#[derive(Clone, Debug)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: String,
    pub(crate) qos: u8,
    pub(crate) delay_interval: u32,
}

impl Connect {
    /// A session that lasts.
    pub(crate) fn persistent(version: Version, client_id: &str) -> Self {
        Self {
            version,
            client_id: client_id.to_owned(),
            clean_start: false,
            expiry_interval: u32::MAX,
            receive_maximum: u16::MAX,
            will: None,
            user: None,
        }
    }

    /// A session that begins and ends with its connection.
    pub(crate) fn fleeting(version: Version, client_id: &str) -> Self {
        Self {
            clean_start: true,
            expiry_interval: 0,
            ..Self::persistent(version, client_id)
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        put_text(&mut body, "MQTT");
        body.push(match self.version {
            Version::V311 => 4,
            Version::V5 => 5,
        });
        let will_flags = self.will.as_ref().map_or(0, |will| 0x04 | will.qos << 3);
        let user_flags = self.user.map_or(0, |_| 0xc0);
        body.push(user_flags | will_flags | u8::from(self.clean_start) << 1);
        body.extend([0, 0]);
        if self.version == Version::V5 {
            let mut properties = vec![0x11];
            properties.extend(self.expiry_interval.to_be_bytes());
            properties.push(0x21);
            properties.extend(self.receive_maximum.to_be_bytes());
            put_properties(&mut body, &properties);
        }
        put_text(&mut body, &self.client_id);
        if let Some(will) = &self.will {
            if self.version == Version::V5 {
                let mut properties = vec![0x18];
                properties.extend(will.delay_interval.to_be_bytes());
                put_properties(&mut body, &properties);
            }
            put_text(&mut body, &will.topic);
            put_text(&mut body, &will.payload);
        }
        if let Some((name, password)) = self.user {
            put_text(&mut body, name);
            put_text(&mut body, password);
        }
        frame(0x10, &body)
    }
}

/// A PUBLISH, in either direction.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Publish {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) dup: bool,
    /// 0 with QoS 0.
    pub(crate) packet_id: u16,
    /// Seconds.
    pub(crate) expiry_interval: Option<u32>,
}

impl Publish {
    pub(crate) fn new(topic: &str, payload: &str, qos: u8) -> Self {
        Self {
            topic: topic.to_owned(),
            payload: payload.as_bytes().to_vec(),
            qos,
            packet_id: u16::from(qos > 0),
            ..Self::default()
        }
    }

    pub(crate) fn retained(self) -> Self {
        Self {
            retain: true,
            ..self
        }
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.payload).expect("payloads of tests are text")
    }

    pub(crate) fn encode(&self, version: Version) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.topic.len() + self.payload.len() + 16);
        put_text(&mut body, &self.topic);
        if self.qos > 0 {
            body.extend(self.packet_id.to_be_bytes());
        }
        if version == Version::V5 {
            let mut properties = Vec::new();
            if let Some(seconds) = self.expiry_interval {
                properties.push(0x02);
                properties.extend(seconds.to_be_bytes());
            }
            put_properties(&mut body, &properties);
        }
        body.extend(&self.payload);
        let flags = u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain);
        frame(0x30 | flags, &body)
    }
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP, by the first byte of its frame.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(clippy::enum_variant_names, reason = "the specification names them")]
pub(crate) enum Answer {
    PubAck = 0x40,
    PubRec = 0x50,
    PubRel = 0x62,
    PubComp = 0x70,
}

impl Answer {
    pub(crate) fn encode(self, packet_id: u16) -> Vec<u8> {
        frame(self as u8, &packet_id.to_be_bytes())
    }
}

pub(crate) fn subscribe(version: Version, packet_id: u16, filter: &str, qos: u8) -> Vec<u8> {
    subscribe_to_all(version, packet_id, &[filter], qos)
}

pub(crate) fn subscribe_to_all(
    version: Version,
    packet_id: u16,
    filters: &[impl AsRef<str>],
    qos: u8,
) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    for filter in filters {
        put_text(&mut body, filter.as_ref());
        body.push(qos);
    }
    frame(0x82, &body)
}

pub(crate) fn unsubscribe(version: Version, packet_id: u16, filter: &str) -> Vec<u8> {
    let mut body = packet_id.to_be_bytes().to_vec();
    if version == Version::V5 {
        body.push(0);
    }
    put_text(&mut body, filter);
    frame(0xa2, &body)
}

pub(crate) const DISCONNECT: [u8; 2] = [0xe0, 0];
pub(crate) const PINGREQ: [u8; 2] = [0xc0, 0];

/// What a server sends.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Packet {
    ConnAck { session_present: bool, reason: u8 },
    Publish(Publish),
    Answer(Answer, u16, u8),
    SubAck(u8),
    UnsubAck,
    PingResp,
    Disconnect(u8),
}

impl Packet {
    /// Takes a packet off the front of `input`, if there is a whole one.
    pub(crate) fn take(input: &mut Vec<u8>, version: Version) -> Option<Self> {
        let mut length = 0;
        let mut at = 1;
        loop {
            let byte = *input.get(at)?;
            length |= usize::from(byte & 0x7f) << (7 * (at - 1));
            at += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        if input.len() < at + length {
            return None;
        }
        let packet = Self::decode(input[0], &input[at..at + length], version);
        input.drain(..at + length);
        Some(packet)
    }

    fn decode(first: u8, body: &[u8], version: Version) -> Self {
        let number = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
        let answer = |answer| Self::Answer(answer, number(0), body.get(2).copied().unwrap_or(0));
        match first >> 4 {
            2 => Self::ConnAck {
                session_present: body[0] & 1 == 1,
                reason: body[1],
            },
            3 => Self::Publish(decode_publish(first, body, version)),
            4 => answer(Answer::PubAck),
            5 => answer(Answer::PubRec),
            6 => answer(Answer::PubRel),
            7 => answer(Answer::PubComp),
            9 => Self::SubAck(*body.last().expect("there is a reason")),
            11 => Self::UnsubAck,
            13 => Self::PingResp,
            14 => Self::Disconnect(body.first().copied().unwrap_or(0)),
            other => panic!("a server does not send packets of type {other}"),
        }
    }
}

fn decode_publish(first: u8, body: &[u8], version: Version) -> Publish {
    let qos = first >> 1 & 0b11;
    let topic_length = usize::from(u16::from_be_bytes([body[0], body[1]]));
    let mut at = 2 + topic_length;
    let topic = String::from_utf8(body[2..at].to_vec()).expect("topics are UTF-8");
    let mut packet_id = 0;
    if qos > 0 {
        packet_id = u16::from_be_bytes([body[at], body[at + 1]]);
        at += 2;
    }
    if version == Version::V5 {
        // No test makes midge send 128 bytes of properties.
        at += 1 + usize::from(body[at]);
    }
    Publish {
        topic,
        payload: body[at..].to_vec(),
        qos,
        retain: first & 1 == 1,
        dup: first & 8 == 8,
        packet_id,
        expiry_interval: None,
    }
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).expect("texts are short");
    body.extend(length.to_be_bytes());
    body.extend(text.as_bytes());
}

fn put_properties(body: &mut Vec<u8>, properties: &[u8]) {
    body.push(u8::try_from(properties.len()).expect("properties are few"));
    body.extend(properties);
}

fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(body.len() + 5);
    frame.push(first);
    let mut length = body.len();
    loop {
        let byte = (length & 0x7f) as u8;
        length >>= 7;
        if length == 0 {
            frame.push(byte);
            break;
        }
        frame.push(byte | 0x80);
    }
    frame.extend(body);
    frame
}
