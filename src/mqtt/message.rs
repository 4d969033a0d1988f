//! The Application Message: what is left of a PUBLISH once it has been accepted.

use std::fmt;
use std::sync::Arc;

use super::QoS;

/// An Application Message in one shared allocation.
///
/// The same bytes wait in memory, lie in an inbox on disk, and are copied to the sockets of its
/// subscribers; cloning one is a reference count.
///
/// Layout, integers big-endian: `expires_at u64`, `properties_length u32`, `flags u8`,
/// `reserved u8`, `topic_length u16`, topic, properties, payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Message(Arc<[u8]>);

const HEADER_BYTES: usize = 16;
const FLAG_QOS: u8 = 0b0011;
const FLAG_RETAIN: u8 = 0b0100;

/// Bytes that are not a [`Message`].
#[derive(Debug, thiserror::Error)]
#[error("not a stored message")]
pub struct InvalidMessage;

/// The parts of a [`Message`] that is to be made.
#[derive(Clone, Copy, Debug, Default)]
pub struct MessageParts<'a> {
    pub topic: &'a str,
    pub qos: QoS,
    pub retain: bool,
    /// Milliseconds since the Unix epoch after which it is no longer delivered.
    pub expires_at: Option<u64>,
    /// Encoded properties that travel with the message, in the order they came, [MQTT-3.3.2-18].
    pub properties: &'a [&'a [u8]],
    pub payload: &'a [u8],
}

impl Message {
    /// # Panics
    /// If the topic is longer than 65,535 bytes, which no packet can carry.
    pub fn new(parts: MessageParts<'_>) -> Self {
        let properties_length: usize = parts.properties.iter().map(|property| property.len()).sum();
        let length = HEADER_BYTES + parts.topic.len() + properties_length + parts.payload.len();
        let mut shared: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
        let bytes = Arc::get_mut(&mut shared).expect("just made, not yet shared");

        let topic_length = u16::try_from(parts.topic.len()).expect("a topic has a u16 length");
        let properties_length = u32::try_from(properties_length).expect("a packet is below 4 GiB");
        bytes[..8].copy_from_slice(&parts.expires_at.unwrap_or(0).to_be_bytes());
        bytes[8..12].copy_from_slice(&properties_length.to_be_bytes());
        bytes[12] = parts.qos as u8 | if parts.retain { FLAG_RETAIN } else { 0 };
        bytes[14..16].copy_from_slice(&topic_length.to_be_bytes());
        let mut at = HEADER_BYTES;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(parts.topic.as_bytes());
        parts.properties.iter().copied().for_each(&mut put);
        put(parts.payload);
        Self(shared)
    }

    /// Reads back [`Message::as_bytes`].
    ///
    /// # Errors
    /// [`InvalidMessage`] if the bytes were not written by this type.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidMessage> {
        if bytes.len() < HEADER_BYTES {
            return Err(InvalidMessage);
        }
        let message = Self(bytes.into());
        let (topic_end, properties_end) = (message.topic_end(), message.properties_end());
        if properties_end > bytes.len()
            || std::str::from_utf8(&bytes[HEADER_BYTES..topic_end]).is_err()
            || QoS::from_bits(bytes[12] & FLAG_QOS).is_none()
        {
            return Err(InvalidMessage);
        }
        Ok(message)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn topic(&self) -> &str {
        std::str::from_utf8(&self.0[HEADER_BYTES..self.topic_end()])
            .expect("checked when it was made")
    }

    /// The Topic Name with its two length bytes, as a PUBLISH carries it.
    pub fn encoded_topic(&self) -> &[u8] {
        &self.0[HEADER_BYTES - 2..self.topic_end()]
    }

    /// The QoS it was published with.
    pub fn qos(&self) -> QoS {
        QoS::from_bits(self.0[12] & FLAG_QOS).expect("checked when it was made")
    }

    /// The RETAIN flag it was published with.
    pub fn retain(&self) -> bool {
        self.0[12] & FLAG_RETAIN != 0
    }

    /// Milliseconds since the Unix epoch.
    pub fn expires_at(&self) -> Option<u64> {
        let at = u64::from_be_bytes(self.0[..8].try_into().expect("eight bytes"));
        (at != 0).then_some(at)
    }

    pub fn is_expired(&self, now_unix_ms: u64) -> bool {
        self.expires_at().is_some_and(|at| at <= now_unix_ms)
    }

    /// The encoded properties that travel with it.
    pub fn properties(&self) -> &[u8] {
        &self.0[self.topic_end()..self.properties_end()]
    }

    pub fn payload(&self) -> &[u8] {
        &self.0[self.properties_end()..]
    }

    /// Bytes it holds in memory and in an inbox.
    #[expect(clippy::len_without_is_empty, reason = "never empty: it has a header")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn topic_end(&self) -> usize {
        HEADER_BYTES + usize::from(u16::from_be_bytes([self.0[14], self.0[15]]))
    }

    fn properties_end(&self) -> usize {
        let length = u32::from_be_bytes(self.0[8..12].try_into().expect("four bytes"));
        self.topic_end() + length as usize
    }
}

/// Never shows the payload: messages end up in logs.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("topic", &self.topic())
            .field("qos", &self.qos())
            .field("retain", &self.retain())
            .field("payload_bytes", &self.payload().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> Message {
        Message::new(MessageParts {
            topic: "a/ü",
            qos: QoS::ExactlyOnce,
            retain: true,
            expires_at: Some(1_000),
            properties: &[b"\x01\x01", b"\x03\0\x01t"],
            payload: b"secret",
        })
    }

    #[test]
    fn a_message_has_what_it_was_made_of() {
        let message = message();

        assert_eq!(message.topic(), "a/ü");
        assert_eq!(message.encoded_topic(), "\0\x04a/ü".as_bytes());
        assert_eq!(message.qos(), QoS::ExactlyOnce);
        assert!(message.retain());
        assert_eq!(message.expires_at(), Some(1_000));
        assert_eq!(message.properties(), b"\x01\x01\x03\0\x01t");
        assert_eq!(message.payload(), b"secret");
    }

    #[test]
    fn a_message_reads_back_from_its_bytes() {
        let empty = Message::new(MessageParts::default());

        for message in [message(), empty] {
            assert_eq!(Message::from_bytes(message.as_bytes()).unwrap(), message);
        }
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let bytes = message().as_bytes().to_vec();
        let payload_begins = bytes.len() - b"secret".len();
        for length in 0..payload_begins {
            assert!(Message::from_bytes(&bytes[..length]).is_err(), "{length}");
        }
        for (at, byte) in [(8, 0xFF), (12, 3), (14, 0xFF), (HEADER_BYTES, 0xFF)] {
            let mut damaged = bytes.clone();
            damaged[at] = byte;
            assert!(Message::from_bytes(&damaged).is_err(), "{at}");
        }
    }

    #[test]
    fn a_message_expires_when_its_time_has_come() {
        assert!(!message().is_expired(999));
        assert!(message().is_expired(1_000));
        assert!(!Message::new(MessageParts::default()).is_expired(u64::MAX));
    }

    #[test]
    fn the_payload_is_not_shown() {
        assert!(!format!("{:?}", message()).contains("secret"));
    }
}
