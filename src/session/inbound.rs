//! Client to broker: PUBLISH and PUBREL, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT.

use std::collections::HashSet;
use std::sync::Arc;

use super::connect::Terms;
use super::{
    Action, Now, ProtocolError, Reply, ReplyKind, Session, SubscribeRequest, UnsubscribeRequest,
    count_levels,
};
use crate::mqtt::message::MessageParts;
use crate::mqtt::packet::{Acknowledgement, Disconnect, Publish, Subscribe, Unsubscribe};
use crate::mqtt::property::Property;
use crate::mqtt::topic::SubscriptionFilter;
use crate::mqtt::{Message, PacketId, QoS, ReasonCode};
use crate::store::Change;

/// QoS 2 identifiers answered with PUBREC and not yet released by PUBREL.
pub(crate) type AwaitingRelease = HashSet<PacketId>;

/// What is known of the client's publications.
#[derive(Debug)]
pub(super) struct Inbound {
    awaiting_release: AwaitingRelease,
    /// QoS 1 and 2 publications of this connection whose exchange has not ended.
    unacknowledged: u16,
    receive_maximum: u16,
    /// Index is the alias minus one; grows to the highest alias in use.
    topic_aliases: Vec<Option<Arc<str>>>,
    topic_alias_maximum: u16,
    topic_levels_max: usize,
    topic_bytes_max: usize,
    /// Whether the session was to outlive the connection when it began.
    expiry_interval: u32,
}

impl Inbound {
    pub(super) fn new(terms: &Terms, awaiting_release: AwaitingRelease) -> Self {
        Self {
            unacknowledged: 0,
            awaiting_release,
            receive_maximum: terms.receive_maximum,
            topic_aliases: Vec::new(),
            topic_alias_maximum: terms.topic_alias_maximum,
            topic_levels_max: terms.topic_levels_max,
            topic_bytes_max: terms.topic_bytes_max,
            expiry_interval: terms.expiry_interval,
        }
    }

    pub(super) fn into_awaiting_release(self) -> AwaitingRelease {
        self.awaiting_release
    }

    /// The topic that a PUBLISH means, which may be given by a Topic Alias, section 3.3.2.3.4.
    fn resolve_topic(
        &mut self,
        topic: &str,
        alias: Option<u16>,
    ) -> Result<Option<Arc<str>>, ProtocolError> {
        let Some(alias) = alias else {
            return if topic.is_empty() {
                Err(ProtocolError::NoTopic)
            } else {
                Ok(None)
            };
        };
        if alias > self.topic_alias_maximum {
            return Err(ProtocolError::TopicAliasTooLarge {
                alias,
                maximum: self.topic_alias_maximum,
            });
        }
        let index = usize::from(alias) - 1;
        if topic.is_empty() {
            let known = self.topic_aliases.get(index).and_then(Clone::clone);
            return known
                .map(Some)
                .ok_or(ProtocolError::UnknownTopicAlias { alias });
        }
        if self.topic_aliases.len() <= index {
            self.topic_aliases.resize(index + 1, None);
        }
        self.topic_aliases[index] = Some(topic.into());
        Ok(None)
    }
}

impl Session {
    pub(super) fn receive_publish(
        &mut self,
        publish: &Publish<'_>,
        now: Now,
    ) -> Result<(), ProtocolError> {
        let mut alias = None;
        let mut message_expiry_interval = None;
        for property in publish.properties.iter() {
            match property {
                Property::TopicAlias(number) => alias = Some(number),
                Property::MessageExpiryInterval(seconds) => message_expiry_interval = Some(seconds),
                Property::SubscriptionIdentifier(_) => {
                    return Err(ProtocolError::SubscriptionIdentifierInPublish);
                }
                _ => {}
            }
        }
        let resolved = self.inbound.resolve_topic(publish.topic, alias)?;
        let topic = resolved.as_deref().unwrap_or(publish.topic);
        if topic.len() > self.inbound.topic_bytes_max {
            return Err(ProtocolError::TopicTooLong {
                maximum: self.inbound.topic_bytes_max,
            });
        }
        if count_levels(topic) > self.inbound.topic_levels_max {
            return Err(ProtocolError::TooManyTopicLevels {
                maximum: self.inbound.topic_levels_max,
            });
        }
        if let Some(packet_id) = publish.packet_id {
            let exactly_once = publish.qos == QoS::ExactlyOnce;
            // A repeat before PUBREL is acknowledged again but not routed again, [MQTT-4.3.3-10].
            if exactly_once && self.inbound.awaiting_release.contains(&packet_id) {
                let topic = topic.into();
                self.actions.push(Action::Repeated { topic });
                let reply = Reply::new(ReplyKind::PubRec, packet_id, ReasonCode::Success);
                self.actions.push(Action::Reply(reply));
                return Ok(());
            }
            self.inbound.unacknowledged = self.inbound.unacknowledged.saturating_add(1);
            let maximum = self.inbound.receive_maximum;
            if self.version.is_v5() && self.inbound.unacknowledged > maximum {
                return Err(ProtocolError::ReceiveMaximumExceeded { maximum });
            }
            if exactly_once {
                self.inbound.awaiting_release.insert(packet_id);
            }
        }
        let expires_at =
            message_expiry_interval.map(|seconds| now.unix_ms + u64::from(seconds) * 1000);
        let parts = MessageParts {
            topic,
            qos: publish.qos,
            retain: publish.retain,
            expires_at,
            properties: &[],
            payload: publish.payload,
        };
        let message = if publish.properties.is_empty() {
            Message::new(parts)
        } else {
            let forwarded: Vec<_> = publish.properties.forwarded().collect();
            Message::new(MessageParts {
                properties: &forwarded,
                ..parts
            })
        };
        self.actions.push(Action::Publish {
            message,
            packet_id: publish.packet_id,
        });
        Ok(())
    }

    /// A QoS 1 or 2 publication was answered with this packet, so the client may send another.
    pub(crate) fn replied(&mut self, reply: Reply) {
        let ends_exchange = match reply.kind {
            ReplyKind::PubAck | ReplyKind::PubComp => true,
            ReplyKind::PubRec => reply.reason.is_error(),
            ReplyKind::PubRel => false,
        };
        if ends_exchange {
            self.inbound.unacknowledged = self.inbound.unacknowledged.saturating_sub(1);
        }
    }

    /// A publication was refused. In version 5 a PUBREC with an error ends the exchange, so that the
    /// identifier is free, [MQTT-4.3.3-4]; older clients are not told and go on to PUBREL.
    pub(crate) fn refuse_publish(&mut self, packet_id: PacketId) {
        if self.version.is_v5() {
            self.inbound.awaiting_release.remove(&packet_id);
        }
    }

    /// QoS 1 and 2 publications of this connection whose exchange has not ended.
    pub(crate) fn unacknowledged(&self) -> u16 {
        self.inbound.unacknowledged
    }

    /// QoS 1 and 2 publications that may wait for an answer of ours.
    pub(crate) fn receive_maximum(&self) -> u16 {
        self.inbound.receive_maximum
    }

    pub(super) fn receive_pubrel(&mut self, ack: &Acknowledgement<'_>) {
        let packet_id = ack.packet_id;
        let reason = if self.inbound.awaiting_release.remove(&packet_id) {
            // Durable before PUBCOMP: otherwise the identifier, used again, would be taken for a repeat.
            if self.durable {
                self.actions.push(Action::Persist(Change::Release {
                    session: self.id,
                    packet_id,
                }));
            }
            ReasonCode::Success
        } else {
            // PUBCOMP would lower the count of an exchange that was never counted.
            self.inbound.unacknowledged = self.inbound.unacknowledged.saturating_add(1);
            ReasonCode::PacketIdentifierNotFound
        };
        self.actions.push(Action::Reply(Reply::new(
            ReplyKind::PubComp,
            packet_id,
            reason,
        )));
    }

    pub(super) fn receive_subscribe(&mut self, subscribe: Subscribe<'_>) {
        let identifier = subscribe.properties.subscription_identifiers().next();
        let filters = subscribe
            .filters
            .into_iter()
            .map(|(filter, options)| (SubscriptionFilter::parse(filter), options))
            .collect();
        self.actions.push(Action::Subscribe(SubscribeRequest {
            packet_id: subscribe.packet_id,
            identifier,
            filters,
        }));
    }

    pub(super) fn receive_unsubscribe(&mut self, unsubscribe: &Unsubscribe<'_>) {
        let filters = unsubscribe
            .filters
            .iter()
            .map(|filter| SubscriptionFilter::parse(filter))
            .collect();
        self.actions.push(Action::Unsubscribe(UnsubscribeRequest {
            packet_id: unsubscribe.packet_id,
            filters,
        }));
    }

    pub(super) fn receive_disconnect(
        &mut self,
        disconnect: &Disconnect<'_>,
    ) -> Result<(), ProtocolError> {
        let expiry_interval = disconnect.properties.session_expiry_interval();
        if self.inbound.expiry_interval == 0 && expiry_interval.is_some_and(|interval| interval > 0)
        {
            return Err(ProtocolError::SessionExpiryFromZero);
        }
        self.actions.push(Action::Disconnect {
            // [MQTT-3.1.2-10]: any other reason than 0x00 leaves the Will in force.
            with_will: disconnect.reason != ReasonCode::Success,
            expiry_interval,
        });
        Ok(())
    }
}
