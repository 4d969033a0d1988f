//! CONNECT and CONNACK: what client and broker agree on.

use std::sync::Arc;
use std::time::Duration;

use crate::mqtt::message::MessageParts;
use crate::mqtt::packet::{ConnAck, Connect, ProtocolVersion};
use crate::mqtt::property::ConnAckProperties;
use crate::mqtt::{Message, ReasonCode};
use crate::store::WillRecord;

/// What the operator allows, as far as CONNECT is concerned.
#[derive(Clone, Debug)]
pub(crate) struct ConnectLimits {
    pub(crate) client_id_bytes_max: usize,
    pub(crate) topic_bytes_max: usize,
    pub(crate) topic_levels_max: usize,
    pub(crate) packet_bytes_max: u32,
    /// QoS 1 and 2 messages that one client may have unacknowledged, inbound.
    pub(crate) receive_maximum: u16,
    pub(crate) topic_alias_maximum: u16,
    /// Seconds; 65,535 sets no limit.
    pub(crate) keep_alive_max: u16,
    /// Seconds; `u32::MAX` sets no limit.
    pub(crate) session_expiry_max: u32,
    /// Where clients that ask are told to find their response topics.
    pub(crate) response_prefix: Option<Arc<str>>,
    /// Messages that may be in flight to one client, whatever its Receive Maximum says.
    pub(crate) in_flight_max: u16,
}

/// What was agreed on with one client.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) version: ProtocolVersion,
    pub(crate) client_id: Arc<str>,
    pub(crate) client_id_assigned: bool,
    pub(crate) clean_start: bool,
    /// Seconds the session outlives its connection.
    pub(crate) expiry_interval: u32,
    /// Whether the client asked for another expiry interval than it got.
    expiry_capped: bool,
    pub(crate) keep_alive: Option<Duration>,
    server_keep_alive: Option<u16>,
    /// QoS 1 and 2 messages that may be in flight to the client.
    pub(crate) send_maximum: u16,
    /// Bytes of the largest packet the client takes.
    pub(crate) maximum_packet_size: u32,
    /// Topic aliases that the broker may use.
    pub(crate) send_topic_alias_maximum: u16,
    /// Inbound counterparts, from the operator's limits.
    pub(crate) receive_maximum: u16,
    pub(crate) topic_alias_maximum: u16,
    pub(crate) topic_levels_max: usize,
    pub(crate) topic_bytes_max: usize,
    packet_bytes_max: u32,
    response_information: Option<String>,
    pub(crate) will: Option<WillRecord>,
}

/// The CONNECT is refused with this reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// [MQTT-3.1.3-8] (3.1.1): without Clean Session an empty client id names no session.
    #[error("an empty client id needs a clean session")]
    EmptyClientId,
    #[error("the client id is longer than {maximum} bytes")]
    ClientIdTooLong { maximum: usize },
    /// Enhanced authentication is not offered, [MQTT-4.12.0-1].
    #[error("the authentication method is not supported")]
    AuthenticationMethod,
    #[error("the topic of the will is too long or too deep")]
    WillTopic,
}

impl Refusal {
    pub(crate) fn reason_code(self) -> ReasonCode {
        match self {
            Self::EmptyClientId | Self::ClientIdTooLong { .. } => {
                ReasonCode::ClientIdentifierNotValid
            }
            Self::AuthenticationMethod => ReasonCode::BadAuthenticationMethod,
            Self::WillTopic => ReasonCode::TopicNameInvalid,
        }
    }
}

impl Terms {
    /// Agrees on a CONNECT. `assigned_client_id` is used if the client has none of its own.
    ///
    /// # Errors
    /// [`Refusal`], to be answered with a CONNACK of its reason.
    pub(crate) fn agree(
        connect: &Connect<'_>,
        limits: &ConnectLimits,
        assigned_client_id: impl FnOnce() -> Arc<str>,
    ) -> Result<Self, Refusal> {
        let properties = &connect.properties;
        if properties.authentication_method.is_some() {
            return Err(Refusal::AuthenticationMethod);
        }
        if connect.client_id.len() > limits.client_id_bytes_max {
            return Err(Refusal::ClientIdTooLong {
                maximum: limits.client_id_bytes_max,
            });
        }
        let client_id_assigned = connect.client_id.is_empty();
        if client_id_assigned && !connect.version.is_v5() && !connect.clean_start {
            return Err(Refusal::EmptyClientId);
        }
        let asked_expiry = match connect.version {
            ProtocolVersion::V5 => properties.session_expiry_interval.unwrap_or(0),
            // A session without Clean Session has no end of its own, so the limit is its end.
            ProtocolVersion::V3_1 | ProtocolVersion::V3_1_1 if connect.clean_start => 0,
            ProtocolVersion::V3_1 | ProtocolVersion::V3_1_1 => u32::MAX,
        };
        let expiry_interval = asked_expiry.min(limits.session_expiry_max);
        let over = connect.keep_alive == 0 || connect.keep_alive > limits.keep_alive_max;
        let keep_alive = if over && limits.keep_alive_max != u16::MAX {
            limits.keep_alive_max
        } else {
            connect.keep_alive
        };
        // Older clients cannot be told, but are held to it all the same, [MQTT-3.1.2-21].
        let server_keep_alive =
            (connect.version.is_v5() && keep_alive != connect.keep_alive).then_some(keep_alive);
        let will = connect.will.as_ref().map(|will| {
            if will.topic.len() > limits.topic_bytes_max
                || super::count_levels(will.topic) > limits.topic_levels_max
            {
                return Err(Refusal::WillTopic);
            }
            let forwarded: Vec<_> = will.properties.all.forwarded().collect();
            Ok(WillRecord {
                message: Message::new(MessageParts {
                    topic: will.topic,
                    qos: will.qos,
                    retain: will.retain,
                    expires_at: None,
                    properties: &forwarded,
                    payload: will.payload,
                }),
                message_expiry_interval: will.properties.message_expiry_interval,
                delay_interval: will.properties.delay_interval,
                due_at: None,
                user_name: None,
            })
        });
        let client_id: Arc<str> = if client_id_assigned {
            assigned_client_id()
        } else {
            connect.client_id.into()
        };
        let prefix = limits.response_prefix.as_deref();
        let prefix = prefix.filter(|_| properties.request_response_information);
        let response_information = prefix.map(|prefix| format!("{prefix}/{client_id}"));
        Ok(Self {
            version: connect.version,
            client_id,
            client_id_assigned,
            clean_start: connect.clean_start,
            expiry_interval,
            expiry_capped: expiry_interval != asked_expiry,
            keep_alive: (keep_alive != 0).then(|| Duration::from_secs(keep_alive.into())),
            server_keep_alive,
            send_maximum: properties
                .receive_maximum
                .unwrap_or(u16::MAX)
                .min(limits.in_flight_max),
            maximum_packet_size: properties.maximum_packet_size.unwrap_or(u32::MAX),
            send_topic_alias_maximum: properties.topic_alias_maximum.unwrap_or(0),
            receive_maximum: limits.receive_maximum,
            topic_alias_maximum: limits.topic_alias_maximum,
            topic_levels_max: limits.topic_levels_max,
            topic_bytes_max: limits.topic_bytes_max,
            packet_bytes_max: limits.packet_bytes_max,
            response_information,
            will: will.transpose()?,
        })
    }

    /// The CONNACK that accepts the client.
    pub(crate) fn accept(&self, session_present: bool) -> ConnAck<'_> {
        let properties = if self.version.is_v5() {
            ConnAckProperties {
                session_expiry_interval: self.expiry_capped.then_some(self.expiry_interval),
                receive_maximum: Some(self.receive_maximum),
                maximum_packet_size: Some(self.packet_bytes_max),
                topic_alias_maximum: (self.topic_alias_maximum > 0)
                    .then_some(self.topic_alias_maximum),
                // [MQTT-3.2.2-16]
                assigned_client_identifier: self.client_id_assigned.then_some(&*self.client_id),
                server_keep_alive: self.server_keep_alive,
                // [MQTT-3.1.2-28]
                response_information: self.response_information.as_deref(),
                ..ConnAckProperties::default()
            }
        } else {
            ConnAckProperties::default()
        };
        ConnAck {
            session_present,
            reason: ReasonCode::Success,
            properties,
        }
    }
}

/// The CONNACK that refuses a client. Session Present is 0, [MQTT-3.2.2-6].
pub(crate) fn refuse(reason: ReasonCode) -> ConnAck<'static> {
    ConnAck {
        session_present: false,
        reason,
        properties: ConnAckProperties::default(),
    }
}
