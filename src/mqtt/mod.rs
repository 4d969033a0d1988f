//! The protocol: packets, properties, reason codes and topics of MQTT 3.1, 3.1.1 and 5.0.
//!
//! Owns the wire format and nothing else. It never awaits, never reads a clock or a socket and
//! holds no state between packets. Both protocol families decode into one [`Packet`]; they differ
//! only here and in the few places that ask for the [`ProtocolVersion`].
//!
//! Start reading at [`packet`], then [`decode`] and [`encode`]. What the broker keeps of a
//! PUBLISH is a [`Message`].

pub mod decode;
pub mod encode;
pub mod message;
pub mod packet;
pub mod property;
pub mod reason;
pub mod topic;
pub mod topic_tree;

#[cfg(test)]
mod arbitrary;

pub use message::Message;
pub use packet::{Packet, PacketId, ProtocolVersion, QoS};
pub use reason::ReasonCode;
pub use topic::{ShareName, SubscriptionFilter, TopicFilter};
