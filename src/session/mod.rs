//! One client: the protocol state between its packets.
//!
//! Owns what MQTT calls Session state, except the messages themselves (they wait in a mailbox and
//! the store). Pure: no socket, no clock, no store. A [`Session`] takes a packet, or a message to
//! deliver, and says in ordered [`Action`]s what has to happen; `net::connection` performs them.
//!
//! Start reading at [`connect`] (what is agreed on at CONNECT), then [`inbound`] (client to broker)
//! and [`outbound`] (broker to client).

pub(crate) mod connect;
pub(crate) mod inbound;
pub(crate) mod outbound;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::mqtt::packet::{Packet, PacketId, ProtocolVersion};
use crate::mqtt::reason::ReasonCode;
use crate::mqtt::topic::{InvalidTopic, SubscribeOptions, SubscriptionFilter};
use crate::mqtt::{Message, QoS};
use crate::store::{Change, SessionId};

use connect::Terms;
use inbound::Inbound;
use outbound::Outbound;
pub(crate) use outbound::{Delivery, IN_MEMORY, Origin, Outgoing};

/// The moment at which something happens, on both clocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) unix_ms: u64,
}

/// The protocol state of one client.
#[derive(Debug)]
pub(crate) struct Session {
    version: ProtocolVersion,
    id: SessionId,
    /// Whether its state outlives the connection, so that changes of it are persisted.
    durable: bool,
    inbound: Inbound,
    outbound: Outbound,
    keep_alive: Option<Duration>,
    last_received: Instant,
    actions: Vec<Action>,
}

/// What outlives a connection besides subscriptions and messages.
#[derive(Debug, Default)]
pub(crate) struct Exchanges {
    pub(crate) inbound: inbound::AwaitingRelease,
    pub(crate) outbound: outbound::InFlight,
}

/// What the connection task must do next; performed strictly in this order.
#[derive(Debug, PartialEq)]
pub(crate) enum Action {
    /// Takes over an application message, then acknowledges it if `packet_id` is set. That a QoS 2
    /// identifier is in use now becomes durable with the message, or neither does.
    Publish {
        message: Message,
        packet_id: Option<PacketId>,
    },
    /// A message of QoS 2 to this topic came again. Whoever took it over may have died before it told
    /// those who want it.
    Repeated {
        topic: Arc<str>,
    },
    /// Becomes durable before any later reply is sent.
    Persist(Change),
    /// Answers once everything before it is durable, in order, [MQTT-4.6.0-2] to [MQTT-4.6.0-4].
    Reply(Reply),
    Subscribe(SubscribeRequest),
    Unsubscribe(UnsubscribeRequest),
    /// The client has taken over the message that came from here.
    Settle(Origin),
    /// The same at the end of an exchange of QoS 2: message and exchange are forgotten together.
    EndExchange {
        origin: Origin,
        packet_id: PacketId,
    },
    PingResponse,
    Disconnect {
        /// Whether the Will is published all the same: Reason Code 0x04.
        with_will: bool,
        /// Replaces the Session Expiry Interval, in seconds.
        expiry_interval: Option<u32>,
    },
}

/// One of the four packets that carry a publication forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) kind: ReplyKind,
    pub(crate) packet_id: PacketId,
    pub(crate) reason: ReasonCode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::enum_variant_names,
    reason = "these are the names of the packets"
)]
pub(crate) enum ReplyKind {
    PubAck,
    PubRec,
    PubRel,
    PubComp,
}

#[derive(Debug, PartialEq)]
pub(crate) struct SubscribeRequest {
    pub(crate) packet_id: PacketId,
    pub(crate) identifier: Option<u32>,
    pub(crate) filters: Vec<(Result<SubscriptionFilter, InvalidTopic>, SubscribeOptions)>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct UnsubscribeRequest {
    pub(crate) packet_id: PacketId,
    pub(crate) filters: Vec<Result<SubscriptionFilter, InvalidTopic>>,
}

/// The peer broke the protocol. Nothing here is our fault, and nothing here is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProtocolError {
    /// [MQTT-3.1.0-2]
    #[error("second CONNECT on one connection")]
    SecondConnect,
    #[error("{0} is not sent by a client")]
    ServerPacket(&'static str),
    /// [MQTT-3.3.4-9]
    #[error("more than {maximum} PUBLISH packets are unacknowledged")]
    ReceiveMaximumExceeded { maximum: u16 },
    /// [MQTT-3.3.2-9]
    #[error("topic alias {alias} is above the maximum of {maximum}")]
    TopicAliasTooLarge { alias: u16, maximum: u16 },
    #[error("topic alias {alias} was never set")]
    UnknownTopicAlias { alias: u16 },
    #[error("PUBLISH without a topic")]
    NoTopic,
    #[error("the topic has more than {maximum} levels")]
    TooManyTopicLevels { maximum: usize },
    #[error("the topic is longer than {maximum} bytes")]
    TopicTooLong { maximum: usize },
    /// [MQTT-3.3.4-6]
    #[error("PUBLISH from a client with a Subscription Identifier")]
    SubscriptionIdentifierInPublish,
    /// [MQTT-3.14.2-2]
    #[error("DISCONNECT sets a Session Expiry Interval though CONNECT did not")]
    SessionExpiryFromZero,
    /// [MQTT-4.12.0-6] and section 4.12.1: no method was agreed on in CONNECT.
    #[error("AUTH without an Authentication Method")]
    UnexpectedAuth,
}

impl ProtocolError {
    /// The Reason Code of the DISCONNECT that ends the connection, section 4.13.
    pub(crate) fn reason_code(&self) -> ReasonCode {
        match self {
            Self::SecondConnect
            | Self::ServerPacket(_)
            | Self::UnknownTopicAlias { .. }
            | Self::NoTopic
            | Self::SubscriptionIdentifierInPublish
            | Self::SessionExpiryFromZero
            | Self::UnexpectedAuth => ReasonCode::ProtocolError,
            Self::ReceiveMaximumExceeded { .. } => ReasonCode::ReceiveMaximumExceeded,
            Self::TopicAliasTooLarge { .. } => ReasonCode::TopicAliasInvalid,
            Self::TooManyTopicLevels { .. } | Self::TopicTooLong { .. } => {
                ReasonCode::TopicNameInvalid
            }
        }
    }
}

impl Session {
    /// A session whose CONNECT was accepted on `terms`, with what is left of earlier connections.
    pub(crate) fn new(
        terms: &Terms,
        id: SessionId,
        durable: bool,
        exchanges: Exchanges,
        now: Now,
    ) -> Self {
        Self {
            version: terms.version,
            id,
            durable,
            inbound: Inbound::new(terms, exchanges.inbound),
            outbound: Outbound::new(terms, exchanges.outbound),
            keep_alive: terms.keep_alive,
            last_received: now.instant,
            actions: Vec::new(),
        }
    }

    pub(crate) fn version(&self) -> ProtocolVersion {
        self.version
    }

    /// Takes one packet of the client; what follows from it is in [`Session::take_actions`].
    ///
    /// # Errors
    /// [`ProtocolError`] if the connection must be closed.
    pub(crate) fn receive(&mut self, packet: Packet<'_>, now: Now) -> Result<(), ProtocolError> {
        self.last_received = now.instant;
        match packet {
            Packet::Publish(publish) => self.receive_publish(&publish, now)?,
            Packet::PubAck(ack) => self.receive_puback(&ack),
            Packet::PubRec(ack) => self.receive_pubrec(&ack),
            Packet::PubRel(ack) => self.receive_pubrel(&ack),
            Packet::PubComp(ack) => self.receive_pubcomp(&ack),
            Packet::Subscribe(subscribe) => self.receive_subscribe(subscribe),
            Packet::Unsubscribe(unsubscribe) => self.receive_unsubscribe(&unsubscribe),
            Packet::PingReq => self.actions.push(Action::PingResponse),
            Packet::Disconnect(disconnect) => self.receive_disconnect(&disconnect)?,
            Packet::Auth(_) => return Err(ProtocolError::UnexpectedAuth),
            Packet::Connect(_) => return Err(ProtocolError::SecondConnect),
            Packet::ConnAck(_) => return Err(ProtocolError::ServerPacket("CONNACK")),
            Packet::SubAck(_) => return Err(ProtocolError::ServerPacket("SUBACK")),
            Packet::UnsubAck(_) => return Err(ProtocolError::ServerPacket("UNSUBACK")),
            Packet::PingResp => return Err(ProtocolError::ServerPacket("PINGRESP")),
        }
        Ok(())
    }

    /// Moves the actions that are due into `into`, oldest first.
    pub(crate) fn take_actions(&mut self, into: &mut Vec<Action>) {
        into.append(&mut self.actions);
    }

    /// When the client will have been silent for too long: one and a half times its Keep Alive,
    /// [MQTT-3.1.2-22].
    pub(crate) fn keep_alive_deadline(&self) -> Option<Instant> {
        self.keep_alive
            .map(|keep_alive| self.last_received + keep_alive * 3 / 2)
    }

    /// Counts a moment as one at which a packet came.
    pub(crate) fn heard_of(&mut self, now: Instant) {
        self.last_received = now;
    }

    /// Ends the connection's part of the session; the rest is for the next connection.
    pub(crate) fn into_exchanges(self) -> Exchanges {
        Exchanges {
            inbound: self.inbound.into_awaiting_release(),
            outbound: self.outbound.into_in_flight(),
        }
    }
}

/// Splits text into levels no deeper than `levels_max`, for the limits of the operator.
fn count_levels(topic: &str) -> usize {
    topic.bytes().filter(|byte| *byte == b'/').count() + 1
}

impl Reply {
    fn new(kind: ReplyKind, packet_id: PacketId, reason: ReasonCode) -> Self {
        Self {
            kind,
            packet_id,
            reason,
        }
    }
}

/// The acknowledgement that a PUBLISH of this QoS asks for.
pub(crate) fn publish_reply(qos: QoS, packet_id: PacketId, reason: ReasonCode) -> Reply {
    let kind = match qos {
        QoS::AtMostOnce | QoS::AtLeastOnce => ReplyKind::PubAck,
        QoS::ExactlyOnce => ReplyKind::PubRec,
    };
    Reply::new(kind, packet_id, reason)
}
