//! Broker to client: PUBLISH with flow control, PUBACK, PUBREC, PUBCOMP.

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::sync::Arc;

use tokio::time::Instant;

use super::connect::Terms;
use super::{Action, Now, Reply, ReplyKind, Session};
use crate::metrics::{Arrival, Dropped, Where};
use crate::mqtt::encode::{PublishHeader, TopicAlias, publish_length};
use crate::mqtt::packet::Acknowledgement;
use crate::mqtt::{Message, PacketId, QoS, ReasonCode};
use crate::store::{Change, Entry, MessageId, OutgoingExchange, SessionId};

/// A message on its way to one client.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Delivery {
    pub(crate) message: Message,
    /// The lower of the publication's QoS and the subscription's, [MQTT-3.8.4-8].
    pub(crate) qos: QoS,
    /// The RETAIN flag to send.
    pub(crate) retain: bool,
    /// Of all matching subscriptions that have one, [MQTT-3.3.4-3].
    pub(crate) subscription_identifiers: Option<Arc<[u32]>>,
    pub(crate) origin: Origin,
    /// None if it has waited in an inbox.
    pub(crate) arrival: Arrival,
}

impl Delivery {
    /// As it waits in an inbox.
    pub(crate) fn into_entry(self, id: MessageId) -> Entry {
        Entry {
            id,
            qos: self.qos,
            retain: self.retain,
            subscription_identifiers: self.subscription_identifiers,
            message: self.message,
        }
    }
}

/// Where a message waits until the client has taken it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// Nowhere: QoS 0, or the session does not outlive its connection.
    Memory,
    /// In the session's own inbox.
    Inbox(MessageId),
    /// In the inbox of a share group, until this member or another one has it.
    Group(SessionId, MessageId),
}

impl Origin {
    /// The message's place in the inbox of this session or group, if that is where it waits.
    pub(crate) fn place_in(self, inbox: SessionId) -> Option<MessageId> {
        match self {
            Self::Inbox(id) => Some(id),
            Self::Group(group, id) if group == inbox && id.node != IN_MEMORY => Some(id),
            Self::Memory | Self::Group(..) => None,
        }
    }
}

/// The node number in the ids of messages that a share group holds in memory only.
pub(crate) const IN_MEMORY: u32 = u32::MAX;

/// A PUBLISH ready to be encoded.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Outgoing {
    pub(crate) delivery: Delivery,
    pub(crate) packet_id: Option<PacketId>,
    pub(crate) dup: bool,
    pub(crate) topic_alias: Option<TopicAlias>,
    /// Seconds that are left.
    pub(crate) message_expiry_interval: Option<u32>,
    /// Whether it may be sent only once the actions before it are durable.
    pub(crate) after_durable: bool,
}

/// What is known of the deliveries to the client.
#[derive(Debug)]
pub(super) struct Outbound {
    in_flight: InFlight,
    send_maximum: u16,
    maximum_packet_size: u32,
    topic_aliases: Option<Box<TopicAliases>>,
}

#[derive(Debug)]
struct TopicAliases {
    maximum: u16,
    numbers: HashMap<Arc<str>, NonZeroU16>,
}

/// The QoS 1 and 2 deliveries that the client has not finished. The Packet Identifier is the
/// place in `slots` plus one, so that every look-up is an index and identifiers stay small.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    slots: Vec<Option<Exchange>>,
    free: Vec<u16>,
    count: u16,
    next_sequence: u64,
    /// Deliveries of an earlier connection that have to be repeated with their identifier.
    unfinished: HashMap<Origin, PacketId>,
}

#[derive(Clone, Copy, Debug)]
struct Exchange {
    origin: Origin,
    state: ExchangeState,
    /// The order in which exchanges began.
    sequence: u64,
    /// When the PUBLISH was last sent on this connection.
    sent: Arrival,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExchangeState {
    AwaitingPubAck,
    AwaitingPubRec,
    AwaitingPubComp,
    /// The client has finished it, but the message has not yet been read from the inbox again, where
    /// it must not be taken for a new one.
    Finished,
}

/// There are no more Packet Identifiers than these.
const PACKET_IDS: u16 = u16::MAX - 1;

/// Slots for which an idle client keeps the memory; a larger window is given back.
const IDLE_SLOTS: usize = 16;

impl InFlight {
    /// QoS 1 and 2 deliveries that are not finished.
    pub(crate) fn count(&self) -> u16 {
        self.count
    }

    /// Exchanges read back from the store, and QoS 1 deliveries of which another node knows.
    pub(crate) fn restore(
        session: SessionId,
        exchanges: &[OutgoingExchange],
        at_least_once: &[(PacketId, MessageId)],
    ) -> Self {
        let mut in_flight = Self::default();
        let exactly_once = exchanges.iter().map(|exchange| {
            let origin = if exchange.inbox == session {
                Origin::Inbox(exchange.message)
            } else {
                Origin::Group(exchange.inbox, exchange.message)
            };
            let state = if exchange.received {
                ExchangeState::AwaitingPubComp
            } else {
                ExchangeState::AwaitingPubRec
            };
            (exchange.message, exchange.packet_id, origin, state)
        });
        let at_least_once = at_least_once.iter().map(|(packet_id, message)| {
            let origin = Origin::Inbox(*message);
            (*message, *packet_id, origin, ExchangeState::AwaitingPubAck)
        });
        let mut all: Vec<_> = exactly_once.chain(at_least_once).collect();
        // In the order in which they began, [MQTT-4.6.0-4], which is that of their messages.
        all.sort_by_key(|(message, ..)| *message);
        for (_, packet_id, origin, state) in all {
            let index = usize::from(packet_id.get()) - 1;
            if in_flight.slots.len() <= index {
                in_flight.slots.resize(index + 1, None);
            }
            if in_flight.slots[index].is_some() {
                continue;
            }
            let sequence = in_flight.next_sequence;
            in_flight.next_sequence += 1;
            in_flight.slots[index] = Some(Exchange {
                origin,
                state,
                sequence,
                sent: Arrival::NONE,
            });
            in_flight.count += 1;
        }
        let taken = |index: &u16| in_flight.slots[usize::from(*index)].is_some();
        let slots = u16::try_from(in_flight.slots.len()).unwrap_or(u16::MAX);
        in_flight.free = (0..slots).rev().filter(|index| !taken(index)).collect();
        in_flight
    }

    fn begin(&mut self, origin: Origin, state: ExchangeState) -> PacketId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u16::try_from(self.slots.len() - 1).expect("the send quota is below 65535")
        });
        self.slots[usize::from(index)] = Some(Exchange {
            origin,
            state,
            sequence: self.next_sequence,
            sent: Arrival::NONE,
        });
        self.next_sequence += 1;
        self.count += 1;
        PacketId::new(index + 1).expect("one is added")
    }

    fn get(&mut self, packet_id: PacketId) -> Option<&mut Exchange> {
        self.slots
            .get_mut(usize::from(packet_id.get()) - 1)?
            .as_mut()
    }

    fn end(&mut self, packet_id: PacketId) -> Option<Exchange> {
        let index = packet_id.get() - 1;
        let exchange = self.slots.get_mut(usize::from(index))?.take()?;
        self.count -= 1;
        if self.count > 0 {
            self.free.push(index);
        } else if self.slots.len() <= IDLE_SLOTS {
            self.slots.clear();
            self.free.clear();
        } else {
            self.slots = Vec::new();
            self.free = Vec::new();
        }
        Some(exchange)
    }

    fn in_order(&self) -> Vec<(PacketId, Exchange)> {
        let mut exchanges: Vec<_> = (1..)
            .zip(&self.slots)
            .filter_map(|(id, slot)| Some((PacketId::new(id)?, (*slot)?)))
            .collect();
        exchanges.sort_by_key(|(_, exchange)| exchange.sequence);
        exchanges
    }

    /// The deliveries that came from share groups and may go to another member now: QoS 1, since
    /// an exchange of QoS 2 must be finished with the client it was begun with, [MQTT-4.8.2-5].
    pub(crate) fn take_redistributable(&mut self) -> Vec<(SessionId, MessageId)> {
        let mut taken = Vec::new();
        for (packet_id, exchange) in self.in_order() {
            if let Origin::Group(group, message) = exchange.origin
                && exchange.state == ExchangeState::AwaitingPubAck
            {
                self.end(packet_id);
                taken.push((group, message));
            }
        }
        taken
    }

    /// QoS 1 deliveries from the session's own inbox that the client has not acknowledged.
    pub(crate) fn at_least_once(&self) -> Vec<(PacketId, MessageId)> {
        let unacknowledged = |(packet_id, exchange): (PacketId, Exchange)| match exchange.origin {
            Origin::Inbox(id) if exchange.state == ExchangeState::AwaitingPubAck => {
                Some((packet_id, id))
            }
            _ => None,
        };
        self.in_order()
            .into_iter()
            .filter_map(unacknowledged)
            .collect()
    }

    /// The last message of an inbox that is in flight.
    pub(crate) fn last_in(&self, inbox: SessionId) -> Option<MessageId> {
        let in_flight = self.slots.iter().flatten();
        in_flight
            .filter_map(|exchange| exchange.origin.place_in(inbox))
            .max()
    }

    /// Gives up an exchange whose message is not there any more.
    pub(crate) fn forget(&mut self, origin: Origin) -> Option<PacketId> {
        let exchanges = self.in_order();
        let (packet_id, _) = exchanges
            .iter()
            .find(|(_, exchange)| exchange.origin == origin)?;
        self.end(*packet_id)?;
        Some(*packet_id)
    }

    /// The QoS 2 deliveries of share groups that only this client can finish, and whether it has
    /// received them.
    pub(crate) fn bound_to_groups(&self) -> Vec<(SessionId, MessageId, bool)> {
        let bound = |(_, exchange): (PacketId, Exchange)| match exchange.origin {
            Origin::Group(group, message) => Some((
                group,
                message,
                matches!(
                    exchange.state,
                    ExchangeState::AwaitingPubComp | ExchangeState::Finished
                ),
            )),
            Origin::Memory | Origin::Inbox(_) => None,
        };
        self.in_order().into_iter().filter_map(bound).collect()
    }
}

impl Outbound {
    pub(super) fn new(terms: &Terms, mut in_flight: InFlight) -> Self {
        for exchange in in_flight.slots.iter_mut().flatten() {
            exchange.sent = Arrival::NONE;
        }
        Self {
            in_flight,
            send_maximum: terms.send_maximum,
            maximum_packet_size: terms.maximum_packet_size,
            topic_aliases: (terms.send_topic_alias_maximum > 0).then(|| {
                Box::new(TopicAliases {
                    maximum: terms.send_topic_alias_maximum,
                    numbers: HashMap::new(),
                })
            }),
        }
    }

    pub(super) fn into_in_flight(self) -> InFlight {
        self.in_flight
    }
}

impl TopicAliases {
    /// The first topics get an alias each, until they are used up.
    fn assign(&mut self, topic: &str) -> Option<TopicAlias> {
        if let Some(number) = self.numbers.get(topic) {
            return Some(TopicAlias::Use(*number));
        }
        let number = u16::try_from(self.numbers.len() + 1)
            .ok()
            .filter(|number| *number <= self.maximum)?;
        let number = NonZeroU16::new(number)?;
        self.numbers.insert(topic.into(), number);
        Some(TopicAlias::Define(number))
    }
}

impl Outgoing {
    pub(crate) fn header(&self) -> PublishHeader<'_> {
        PublishHeader {
            dup: self.dup,
            qos: self.delivery.qos,
            retain: self.delivery.retain,
            packet_id: self.packet_id,
            topic_alias: self.topic_alias,
            message_expiry_interval: self.message_expiry_interval,
            subscription_identifiers: self
                .delivery
                .subscription_identifiers
                .as_deref()
                .unwrap_or(&[]),
        }
    }
}

impl Session {
    /// QoS 1 and 2 deliveries that are not finished.
    pub(crate) fn in_flight(&self) -> u16 {
        self.outbound.in_flight.count()
    }

    /// The PUBLISH with this identifier is sent.
    pub(crate) fn sent(&mut self, packet_id: PacketId, now: Instant) {
        if let Some(exchange) = self.outbound.in_flight.get(packet_id) {
            exchange.sent = Arrival::new(now, Where::Local);
        }
    }

    /// When the PUBLISH of this delivery was sent; none if that was on an earlier connection.
    pub(crate) fn sent_at(&mut self, packet_id: PacketId) -> Arrival {
        let exchange = self.outbound.in_flight.get(packet_id);
        exchange.map_or(Arrival::NONE, |exchange| exchange.sent)
    }

    /// Whether another QoS 1 or 2 message may be sent, [MQTT-3.3.4-9]. Those of an earlier
    /// connection count from when they are sent on this one: the client may allow fewer now.
    pub(crate) fn has_send_quota(&self) -> bool {
        let in_flight = &self.outbound.in_flight;
        let sent = usize::from(in_flight.count).saturating_sub(in_flight.unfinished.len());
        sent < usize::from(self.outbound.send_maximum) && in_flight.count < PACKET_IDS
    }

    /// Whether a delivery is one of an earlier connection that has to be repeated.
    pub(crate) fn is_unfinished(&self, origin: Origin) -> bool {
        let unfinished = &self.outbound.in_flight.unfinished;
        !unfinished.is_empty() && unfinished.contains_key(&origin)
    }

    /// Whether a message may be delivered now: QoS 0 always may, [MQTT-3.3.4-10].
    pub(crate) fn can_deliver(&self, delivery: &Delivery) -> bool {
        delivery.qos == QoS::AtMostOnce || self.has_send_quota()
    }

    /// Begins to resume: PUBREL goes out again at once, in the order of the first time, [MQTT-4.4.0-1];
    /// PUBLISH does as its messages come from the inbox again, which has them in the same order.
    pub(crate) fn resume(&mut self) {
        self.outbound.in_flight.unfinished.clear();
        for (packet_id, exchange) in self.outbound.in_flight.in_order() {
            if exchange.state == ExchangeState::AwaitingPubComp {
                self.actions.push(Action::Reply(Reply::new(
                    ReplyKind::PubRel,
                    packet_id,
                    ReasonCode::Success,
                )));
            }
            self.outbound
                .in_flight
                .unfinished
                .insert(exchange.origin, packet_id);
        }
    }

    /// Turns a message into the PUBLISH that carries it; `None` if it is half-way through an exchange
    /// already.
    ///
    /// # Errors
    /// Why it will never be delivered: it has expired, or is larger than the client takes,
    /// [MQTT-3.1.2-25].
    pub(crate) fn deliver(
        &mut self,
        delivery: Delivery,
        now: Now,
    ) -> Result<Option<Outgoing>, Dropped> {
        let unfinished = match delivery.origin {
            Origin::Memory => None,
            origin if self.outbound.in_flight.unfinished.is_empty() => {
                debug_assert!(origin != Origin::Memory);
                None
            }
            origin => self.outbound.in_flight.unfinished.remove(&origin),
        };
        if let Some(packet_id) = unfinished {
            return Ok(self.deliver_again(packet_id, delivery, now));
        }
        if delivery.message.is_expired(now.unix_ms) {
            self.settle(delivery.origin);
            return Err(Dropped::Expired);
        }
        let mut outgoing = Outgoing {
            message_expiry_interval: remaining(&delivery.message, now),
            delivery,
            packet_id: None,
            dup: false,
            topic_alias: None,
            after_durable: false,
        };
        if self.outbound.maximum_packet_size != u32::MAX {
            let placeholder = PacketId::new(1);
            outgoing.packet_id = if outgoing.delivery.qos == QoS::AtMostOnce {
                None
            } else {
                placeholder
            };
            let length =
                publish_length(&outgoing.delivery.message, &outgoing.header(), self.version);
            if length > self.outbound.maximum_packet_size as usize {
                self.settle(outgoing.delivery.origin);
                return Err(Dropped::TooLarge);
            }
        }
        let origin = outgoing.delivery.origin;
        match outgoing.delivery.qos {
            // Even of a stored message: a member of a share group may have subscribed with QoS 0.
            QoS::AtMostOnce => self.settle(origin),
            QoS::AtLeastOnce => {
                outgoing.packet_id = Some(
                    self.outbound
                        .in_flight
                        .begin(origin, ExchangeState::AwaitingPubAck),
                );
            }
            QoS::ExactlyOnce => {
                let packet_id = self
                    .outbound
                    .in_flight
                    .begin(origin, ExchangeState::AwaitingPubRec);
                outgoing.packet_id = Some(packet_id);
                outgoing.after_durable = self.save_exchange(packet_id, origin, false);
            }
        }
        // An alias would save nothing on a topic as short as itself.
        if let Some(aliases) = &mut self.outbound.topic_aliases
            && outgoing.delivery.message.topic().len() > 3
        {
            outgoing.topic_alias = aliases.assign(outgoing.delivery.message.topic());
            // With its topic and an alias a message might just no longer fit.
            if matches!(outgoing.topic_alias, Some(TopicAlias::Define(_)))
                && self.outbound.maximum_packet_size != u32::MAX
                && publish_length(&outgoing.delivery.message, &outgoing.header(), self.version)
                    > self.outbound.maximum_packet_size as usize
            {
                aliases.numbers.remove(outgoing.delivery.message.topic());
                outgoing.topic_alias = None;
            }
        }
        Ok(Some(outgoing))
    }

    /// Repeats a delivery of an earlier connection, if the client has not finished it meanwhile.
    fn deliver_again(
        &mut self,
        packet_id: PacketId,
        mut delivery: Delivery,
        now: Now,
    ) -> Option<Outgoing> {
        // As it was begun, even if the client has subscribed with another QoS since.
        delivery.qos = match self.outbound.in_flight.get(packet_id)?.state {
            ExchangeState::Finished => {
                self.end_exchange(packet_id);
                return None;
            }
            ExchangeState::AwaitingPubComp => return None,
            ExchangeState::AwaitingPubAck => QoS::AtLeastOnce,
            ExchangeState::AwaitingPubRec => QoS::ExactlyOnce,
        };
        // Whatever its age: an exchange once begun must be finished, [MQTT-4.3.3-7].
        Some(Outgoing {
            message_expiry_interval: remaining(&delivery.message, now),
            delivery,
            packet_id: Some(packet_id),
            dup: true,
            topic_alias: None,
            after_durable: false,
        })
    }

    pub(super) fn receive_puback(&mut self, ack: &Acknowledgement<'_>) {
        let exchange = self.outbound.in_flight.get(ack.packet_id);
        if exchange.is_some_and(|exchange| exchange.state == ExchangeState::AwaitingPubAck) {
            self.end_exchange(ack.packet_id);
        }
    }

    pub(super) fn receive_pubrec(&mut self, ack: &Acknowledgement<'_>) {
        let packet_id = ack.packet_id;
        let reply = |reason| Action::Reply(Reply::new(ReplyKind::PubRel, packet_id, reason));
        let Some(exchange) = self.outbound.in_flight.get(packet_id) else {
            self.actions
                .push(reply(ReasonCode::PacketIdentifierNotFound));
            return;
        };
        match exchange.state {
            // A QoS 1 exchange has no PUBREC; it goes on as it was.
            ExchangeState::AwaitingPubAck | ExchangeState::Finished => {}
            // An error ends the exchange: the message must not be repeated, [MQTT-4.3.3-5].
            ExchangeState::AwaitingPubRec if ack.reason.is_error() => self.end_exchange(packet_id),
            ExchangeState::AwaitingPubRec => {
                exchange.state = ExchangeState::AwaitingPubComp;
                let origin = exchange.origin;
                // Durable before PUBREL: after PUBREL the message must not be sent again, [MQTT-4.3.3-7].
                self.save_exchange(packet_id, origin, true);
                self.actions.push(reply(ReasonCode::Success));
            }
            ExchangeState::AwaitingPubComp => self.actions.push(reply(ReasonCode::Success)),
        }
    }

    pub(super) fn receive_pubcomp(&mut self, ack: &Acknowledgement<'_>) {
        let exchange = self.outbound.in_flight.get(ack.packet_id);
        if exchange.is_some_and(|exchange| exchange.state == ExchangeState::AwaitingPubComp) {
            self.end_exchange(ack.packet_id);
        }
    }

    fn end_exchange(&mut self, packet_id: PacketId) {
        let in_flight = &mut self.outbound.in_flight;
        let Some(exchange) = in_flight.get(packet_id).copied() else {
            return;
        };
        if in_flight.unfinished.contains_key(&exchange.origin) {
            in_flight.get(packet_id).expect("found above").state = ExchangeState::Finished;
            return;
        }
        in_flight.end(packet_id);
        if exchange.state == ExchangeState::AwaitingPubAck || !self.is_recorded(exchange.origin) {
            self.settle(exchange.origin);
        } else {
            self.actions.push(Action::EndExchange {
                origin: exchange.origin,
                packet_id,
            });
        }
    }

    /// Whether the store knows of the exchange of a message from here.
    fn is_recorded(&self, origin: Origin) -> bool {
        self.durable
            && match origin {
                Origin::Memory => false,
                Origin::Inbox(_) => true,
                Origin::Group(_, message) => message.node != IN_MEMORY,
            }
    }

    /// Returns whether there is anything to wait for.
    fn save_exchange(&mut self, packet_id: PacketId, origin: Origin, received: bool) -> bool {
        let (inbox, message) = match origin {
            Origin::Inbox(message) => (self.id, message),
            Origin::Group(group, message) => (group, message),
            Origin::Memory => return false,
        };
        if !self.is_recorded(origin) {
            return false;
        }
        let exchange = OutgoingExchange {
            packet_id,
            inbox,
            message,
            received,
        };
        self.actions.push(Action::Persist(Change::SaveExchange {
            session: self.id,
            exchange,
        }));
        true
    }

    fn settle(&mut self, origin: Origin) {
        if origin != Origin::Memory {
            self.actions.push(Action::Settle(origin));
        }
    }
}

/// Whole seconds until the message expires, at least one, [MQTT-3.3.2-6].
fn remaining(message: &Message, now: Now) -> Option<u32> {
    let left_ms = message.expires_at()?.saturating_sub(now.unix_ms);
    Some(
        u32::try_from(left_ms.div_ceil(1000))
            .unwrap_or(u32::MAX)
            .max(1),
    )
}
