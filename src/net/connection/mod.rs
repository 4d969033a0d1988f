//! One client's connection: where a session meets a socket and the node.
//!
//! One task owns the socket, the session and the taking end of the mailbox; nobody else locks them.
//! The task says in [`CloseReason`] why it ended, and [`Connection::end`] alone decides what follows
//! from it, which [`close`] tells clients and counters. What comes before there is a session is in
//! [`admission`], what is asked of topics in [`subscriptions`].

mod admission;
mod close;
mod subscriptions;

use std::collections::VecDeque;
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep, sleep, timeout};

use self::admission::ConnectError;
use self::close::CloseReason;
use self::subscriptions::{Walk, retained_page};
use super::arrivals::{Arrivals, Pace};
use super::listener::Accepted;
use super::packet_io::PacketIo;
use crate::auth::{Answer, Authenticator, Identity, Request, Verdict};
use crate::broker::consumer::Consumer;
use crate::broker::flush::{Flusher, Receipt, unix_ms};
use crate::broker::inspect::Presence;
use crate::broker::mailbox::{Mailbox, Order};
use crate::broker::sessions::{Connected, WillFate};
use crate::broker::sys::ClientEvent;
use crate::broker::{Crowded, LastTopic, Node, Publisher};
use crate::failpoint;
use crate::metrics::{Arrival, Asked, Dropped, Tally, Throttle, Where};
use crate::mqtt::packet::{Acknowledgement, Disconnect, PacketType, SubscribeAcknowledgement};
use crate::mqtt::property::Properties;
use crate::mqtt::{Message, Packet, PacketId, QoS, ReasonCode};
use crate::session::connect::{ConnectLimits, Terms, refuse};
use crate::session::{
    Action, Delivery, Now, Origin, Outgoing, Reply, ReplyKind, Session, publish_reply,
};
use crate::store::{Change, MessageId, StoreError};

/// What all connections of a node share.
#[derive(Debug)]
pub(crate) struct ConnectionContext {
    pub(crate) node: Arc<Node>,
    pub(crate) authenticator: Arc<dyn Authenticator>,
    pub(crate) limits: ArcSwap<ConnectLimits>,
    pub(crate) connect_timeout: Duration,
    pub(crate) connections_max: AtomicUsize,
    pub(crate) arrivals: Arc<Arrivals>,
    /// Messages per second of one client; 0 sets no limit.
    pub(crate) publish_rate: AtomicU32,
    pub(crate) connections: AtomicUsize,
    /// The node is being drained: whoever comes is sent to another one.
    pub(crate) sends_away: AtomicBool,
}

/// Output that is not read by its client for this long is given up when the connection ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Output from which on a client that does not read is not read from either.
const OUTPUT_MAX: usize = 1024 * 1024;

/// How long a publisher waits for a client, or a node, that is behind but takes messages.
const CROWDED_WAIT: Duration = Duration::from_millis(20);

/// After each message of a client while memory is short.
const OVERLOADED_PAUSE: Duration = Duration::from_millis(100);

/// Runs one connection from its first packet to its last.
pub(crate) async fn serve(accepted: Accepted, context: Arc<ConnectionContext>) {
    let count = context.connections.fetch_add(1, Ordering::Relaxed) + 1;
    let totals = &context.node.totals;
    totals.connections.inc();
    totals
        .connected_maximum
        .fetch_max(count as u64, Ordering::Relaxed);
    let peer = accepted.peer;
    let listener = accepted.listener.clone();
    match Box::pin(admission::open(accepted, &context, count)).await {
        Ok(mut connection) => {
            let reason = connection.run().await;
            // Boxed: an idle connection need not hold room for its end.
            Box::pin(connection.end(&reason)).await;
        }
        Err(refused) => {
            let (error, io) = *refused;
            if !matches!(error, ConnectError::Probe) {
                let listener = &listener.name;
                tracing::debug!(event = "connect_refused", %peer, %listener, reason = %error);
            }
            error.count(totals, &listener);
            Box::pin(admission::refuse(io, &error, totals, &listener)).await;
        }
    }
    context.connections.fetch_sub(1, Ordering::Relaxed);
}

/// A CONNACK that has to wait until the session is durable.
struct Greeting {
    receipt: Receipt,
    terms: Terms,
    session_present: bool,
    /// When CONNECT had been read.
    since: Instant,
}

/// An accepted client.
struct Connection {
    /// Until CONNACK is sent.
    unanswered: Option<Box<Greeting>>,
    io: PacketIo,
    session: Session,
    identity: Identity,
    presence: Arc<Presence>,
    connected: Connected,
    consumer: Consumer,
    /// What is sent once it is durable, oldest first.
    pending: VecDeque<(Receipt, Pending)>,
    /// What this task already waits for the flusher to make durable.
    awaited_receipt: Receipt,
    /// Of everything that has been persisted or published for this client.
    last_receipt: Receipt,
    /// Messages of the inbox that the client has taken over.
    settled: Vec<MessageId>,
    actions: Vec<Action>,
    walks: VecDeque<Walk>,
    /// Whether the client has ended a subscription, which other nodes may not know yet.
    has_unsubscribed: bool,
    last_topic: LastTopic,
    /// A client that this one publishes to and that is behind, or its node, and until when to wait.
    crowded: Option<(Crowded, Instant)>,
    timer: Option<Pin<Box<Sleep>>>,
    /// Of what the client publishes.
    pace: Pace,
    /// Until then nothing is read of a client that publishes too fast.
    pause: Option<Pin<Box<Sleep>>>,
    pause_cause: Throttle,
    /// Why nothing is read of it, as the totals know.
    throttled: Option<Throttle>,
    /// When the packets that are handled were read.
    read_at: Arrival,
    tally: Tally,
    /// Whether packets may have been read and not yet been handled.
    input_left: bool,
    context: Arc<ConnectionContext>,
}

/// Times that a client's input is looked at for its DISCONNECT after another node has taken its session.
const GOODBYE_READS_MAX: usize = 16;

enum Pending {
    /// With when the publication came that it answers, if it is the first answer.
    Reply(Reply, Arrival),
    SubAck {
        packet_id: PacketId,
        reasons: Vec<ReasonCode>,
        walks: Vec<Walk>,
        /// Resolves when other nodes know of the subscriptions.
        known: Option<BoxFuture<'static, ()>>,
    },
    UnsubAck {
        packet_id: PacketId,
        reasons: Vec<ReasonCode>,
    },
    Publish(Box<Outgoing>),
}

impl Pending {
    /// What it waits for besides its receipt.
    fn known(&mut self) -> Option<&mut BoxFuture<'static, ()>> {
        match self {
            Self::SubAck { known, .. } => known.as_mut(),
            Self::Reply(..) | Self::UnsubAck { .. } | Self::Publish(_) => None,
        }
    }

    fn is_known(&mut self) {
        if let Self::SubAck { known, .. } = self {
            *known = None;
        }
    }
}

impl Connection {
    /// Runs until either side ends the connection; returns why.
    async fn run(&mut self) -> CloseReason {
        match self.exchange().await {
            Ok(never) => match never {},
            Err(CloseReason::TakenOver) => self.goodbye().unwrap_or(CloseReason::TakenOver),
            Err(reason) => reason,
        }
    }

    /// The DISCONNECT of a client that has come back elsewhere, if it lies here unread. What lies
    /// before it was not acknowledged.
    fn goodbye(&mut self) -> Option<CloseReason> {
        for _ in 0..GOODBYE_READS_MAX {
            // A stream that has failed may have brought something before.
            let read = self.io.progress(true).now_or_never();
            while let Ok(Some(packet)) = self.io.next_packet(self.session.version()) {
                if matches!(packet, Packet::Disconnect(_)) {
                    self.session.receive(packet, now()).ok()?;
                    self.session.take_actions(&mut self.actions);
                }
            }
            for action in self.actions.drain(..) {
                if let Action::Disconnect {
                    with_will,
                    expiry_interval,
                } = action
                {
                    return Some(CloseReason::ClientDisconnected {
                        with_will,
                        expiry_interval,
                    });
                }
            }
            if !matches!(read, Some(Ok(()))) {
                break;
            }
        }
        None
    }

    async fn exchange(&mut self) -> Result<std::convert::Infallible, CloseReason> {
        self.check_access()?;
        self.answer_connect().await?;
        self.session.take_actions(&mut self.actions);
        self.perform_actions().await?;
        loop {
            if let Some(order) = self.connected.mailbox.order() {
                self.obey(order)?;
            }
            if self.input_left && self.may_read() {
                self.receive_packets().await?;
            }
            self.send_durable();
            self.walk_retained();
            self.deliver_messages().await;
            self.io.write_some().await.map_err(CloseReason::Io)?;
            self.count();

            let may_read = self.note_throttle();
            if (self.input_left && may_read) || self.may_walk() {
                tokio::task::yield_now().await;
                continue;
            }
            let may_deliver = self.may_deliver();
            let flusher = &self.context.node.flusher;
            let awaits = !self.pending.is_empty();
            // Each branch only waits, and may be dropped and tried again without loss.
            tokio::select! {
                order = ordered(&self.connected.mailbox), if !may_deliver => self.obey(order)?,
                result = self.io.progress(may_read) => {
                    result.map_err(CloseReason::from_io)?;
                    self.input_left = true;
                }
                result = std::future::poll_fn(|context| self.consumer.poll_ready(context)), if may_deliver => {
                    result?;
                }
                result = sendable(flusher, self.pending.front_mut(), &mut self.awaited_receipt), if awaits => {
                    result?;
                }
                result = retained_page(&mut self.walks) => result?,
                () = until(&mut self.timer) => self.check_keep_alive()?,
                () = until(&mut self.pause), if self.pause.is_some() => self.pause = None,
                () = std::future::poll_fn(|context| flusher.poll_room(context)), if !flusher.has_room() => {}
                () = space(&self.context.node, &self.crowded), if self.crowded.is_some() => {
                    self.crowded = None;
                }
            }
        }
    }

    /// Adds up what this turn has counted.
    fn count(&mut self) {
        let totals = &self.context.node.totals;
        if self.tally.has_answered_at_once()
            && let Some((took, _)) = self.read_at.age(Instant::now())
        {
            self.tally.turn_took(took, totals);
        }
        self.tally.add_to(totals, &self.presence.listener);
        let in_flight = self.session.in_flight();
        self.presence.in_flight.store(in_flight, Ordering::Relaxed);
        let unacknowledged = self.session.unacknowledged();
        self.presence
            .unacknowledged
            .store(unacknowledged, Ordering::Relaxed);
    }

    fn obey(&mut self, order: Order) -> Result<(), CloseReason> {
        match order {
            Order::CheckAccess => {
                self.connected.mailbox.withdraw_order(order);
                self.check_access()
            }
            Order::TakenOver => Err(CloseReason::TakenOver),
            Order::QueueFull => Err(CloseReason::QueueFull),
            Order::Shutdown => Err(CloseReason::Shutdown),
            Order::Leave(reason) => Err(CloseReason::Drained(reason)),
            Order::Kicked(reason) => Err(CloseReason::Kicked(reason)),
        }
    }

    /// Users may have been removed since the client was let in.
    fn check_access(&self) -> Result<(), CloseReason> {
        if self.context.node.authorizer.may_stay(&self.identity) {
            Ok(())
        } else {
            Err(CloseReason::AccessRevoked)
        }
    }

    async fn answer_connect(&mut self) -> Result<(), CloseReason> {
        let Some(greeting) = &self.unanswered else {
            return Ok(());
        };
        let flusher = &self.context.node.flusher;
        flusher.durable(greeting.receipt).await?;
        if let Some(greeting) = self.unanswered.take() {
            let answer = greeting.terms.accept(greeting.session_present);
            self.send(&Packet::ConnAck(Box::new(answer)));
            let listener = &self.presence.listener;
            listener.connect.observe(greeting.since.elapsed());
            listener.opened.inc();
            listener.connections.of(self.session.version()).inc();
        }
        Ok(())
    }

    /// Whether packets may be taken from the client now: it has to wait for what it published
    /// before, for the flush, for a subscriber that is behind, or because it publishes too fast.
    fn may_read(&self) -> bool {
        self.throttle().is_none()
    }

    /// What it has to wait for.
    fn throttle(&self) -> Option<Throttle> {
        if self.io.output_bytes() >= OUTPUT_MAX {
            Some(Throttle::Output)
        } else if self.pending.len() >= usize::from(self.session.receive_maximum())
            || !self.context.node.flusher.has_room()
        {
            Some(Throttle::Store)
        } else if self.crowded.is_some() {
            Some(Throttle::SlowSubscriber)
        } else {
            self.pause.as_ref().map(|_| self.pause_cause)
        }
    }

    /// Counts it, and returns whether there is nothing to wait for.
    fn note_throttle(&mut self) -> bool {
        let throttle = self.throttle();
        if throttle == self.throttled {
            return throttle.is_none();
        }
        let gauges = &self.context.node.totals.throttled;
        if let Some(before) = std::mem::replace(&mut self.throttled, throttle) {
            gauges.of(before).dec();
        }
        if let Some(now) = throttle {
            gauges.of(now).inc();
        }
        throttle.is_none()
    }

    fn may_deliver(&self) -> bool {
        self.io.has_room()
            && match self.consumer.peek() {
                Some(delivery) => self.session.can_deliver(delivery),
                None => self.session.has_send_quota(),
            }
    }

    fn may_walk(&self) -> bool {
        let front = self.walks.front();
        front.is_some_and(|walk| !walk.is_reading())
            && self.io.has_room()
            && self.consumer.is_nearly_empty()
            && self.connected.mailbox.has_ample_room()
            && self.context.node.flusher.has_room()
    }

    fn check_keep_alive(&mut self) -> Result<(), CloseReason> {
        let Some(deadline) = self.session.keep_alive_deadline() else {
            return Ok(());
        };
        // A client that we do not read from cannot be heard of; one that does not read has itself
        // to blame.
        let listening = self.may_read() || self.io.output_bytes() >= OUTPUT_MAX;
        if listening && Instant::now() >= deadline {
            return Err(CloseReason::KeepAliveTimeout);
        }
        if !listening {
            self.session.heard_of(Instant::now());
        }
        if let (Some(timer), Some(deadline)) = (&mut self.timer, self.session.keep_alive_deadline())
        {
            timer.as_mut().reset(deadline);
        }
        Ok(())
    }

    /// Handles the packets that have been read.
    async fn receive_packets(&mut self) -> Result<(), CloseReason> {
        let now = now();
        self.read_at = Arrival::new(now.instant, Where::Local);
        let version = self.session.version();
        loop {
            if !self.may_read() {
                break;
            }
            let Some(packet) = self
                .io
                .next_packet(version)
                .map_err(CloseReason::Malformed)?
            else {
                self.input_left = false;
                break;
            };
            let packet_type = packet.packet_type();
            self.tally.packet_received(packet_type);
            let in_flight = self.session.in_flight();
            // A PUBREC with an error ends an exchange as well, and acknowledges nothing.
            let acknowledged = match &packet {
                Packet::PubAck(ack) => Some((QoS::AtLeastOnce, ack.packet_id)),
                Packet::PubComp(ack) => Some((QoS::ExactlyOnce, ack.packet_id)),
                _ => None,
            };
            let acknowledged = acknowledged.map(|(qos, id)| (qos, self.session.sent_at(id)));
            self.session.receive(packet, now)?;
            if let Some((qos, sent)) = acknowledged
                && self.session.in_flight() < in_flight
            {
                let after = sent.age(now.instant).map(|(after, _)| after);
                let totals = &self.context.node.totals;
                self.tally.acknowledged(qos, after, totals);
            }
            self.session.take_actions(&mut self.actions);
            self.perform_actions().await?;
        }
        self.tally.bytes_received += self.io.take_bytes_read();
        self.settle();
        Ok(())
    }

    async fn perform_actions(&mut self) -> Result<(), CloseReason> {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Publish { message, packet_id } => self.publish(message, packet_id).await,
                // Rare and large: boxed, so that an idle connection does not hold room for it.
                Action::Subscribe(request) => Box::pin(self.subscribe(request)).await,
                Action::Disconnect {
                    with_will,
                    expiry_interval,
                } => {
                    return Err(CloseReason::ClientDisconnected {
                        with_will,
                        expiry_interval,
                    });
                }
                action => self.perform(action),
            }
        }
        self.actions = actions;
        Ok(())
    }

    /// Performs an action that takes no time.
    fn perform(&mut self, action: Action) {
        match action {
            Action::Repeated { topic } => {
                if self.connected.is_abandoned {
                    self.context.node.ring(&topic);
                }
            }
            Action::Persist(change) => self.persist(change),
            Action::Reply(reply) => self.reply(self.last_receipt, reply, Arrival::NONE),
            Action::Unsubscribe(request) => self.unsubscribe(request),
            Action::Settle(origin) => self.settle_later(origin),
            Action::EndExchange { origin, packet_id } => self.end_exchange(origin, packet_id),
            Action::PingResponse => self.send(&Packet::PingResp),
            Action::Publish { .. } | Action::Subscribe(_) | Action::Disconnect { .. } => {
                unreachable!("only packets of the client lead to these")
            }
        }
    }

    /// Counts a message, and stops reading if it came too early.
    fn keep_pace(&mut self) {
        let context = &self.context;
        let mut wait = Duration::ZERO;
        self.pause_cause = Throttle::PublishRate;
        if let Some(limit) = NonZeroU32::new(context.publish_rate.load(Ordering::Relaxed)) {
            let turn = self.pace.take(Instant::now(), limit, Duration::MAX);
            wait = turn.unwrap_or_default();
        }
        if context.node.overload.paces_publishers() {
            wait = wait.max(OVERLOADED_PAUSE);
            self.pause_cause = Throttle::Overload;
        }
        if !wait.is_zero() {
            self.pause = Some(Box::pin(sleep(wait)));
        }
    }

    async fn publish(&mut self, message: Message, packet_id: Option<PacketId>) {
        self.keep_pace();
        let qos = message.qos();
        let request = Request::Publish {
            topic: message.topic(),
            qos,
            retain: message.retain(),
        };
        let verdict = match self
            .context
            .node
            .authorizer
            .authorize(&self.identity, request)
        {
            Answer::Now(verdict) => verdict,
            Answer::Later(verdict) => verdict.await,
        };
        let refused = match verdict {
            Verdict::Deny { rule } => {
                let client_id = &self.identity.client_id;
                self.context.node.totals.authorized(Asked::Publish, false);
                tracing::warn!(event = "publish_denied", %client_id, topic = message.topic(), rule = %rule);
                Some(ReasonCode::NotAuthorized)
            }
            Verdict::Allow if message.retain() && !self.context.node.may_retain(&message) => {
                Some(ReasonCode::QuotaExceeded)
            }
            Verdict::Allow => None,
        };
        if let Some(reason) = refused {
            if let Some(packet_id) = packet_id {
                self.session.refuse_publish(packet_id);
                let reply = publish_reply(qos, packet_id, reason);
                self.reply(self.last_receipt, reply, self.read_at);
            }
            return;
        }
        let mailbox = &self.connected.mailbox;
        let with = packet_id.filter(|_| qos == QoS::ExactlyOnce && mailbox.is_durable());
        let with = with.map(|packet_id| Change::AwaitRelease {
            session: mailbox.session,
            packet_id,
        });
        let publisher = Publisher {
            client_id: &self.identity.client_id,
            mailbox: Some(mailbox),
            arrival: self.read_at,
        };
        let published = self
            .context
            .node
            .publish(&message, publisher, &mut self.last_topic, with);
        let totals = &self.context.node.totals;
        self.tally.published(&message, published.recipients, totals);
        self.last_receipt = self.last_receipt.max(published.receipt);
        if let Some(crowded) = published.crowded
            && !matches!(&crowded, Crowded::Mailbox(crowded) if Arc::ptr_eq(crowded, mailbox))
        {
            self.crowded = Some((crowded, Instant::now() + CROWDED_WAIT));
        }
        if let Some(packet_id) = packet_id {
            let reason = if published.recipients > 0 {
                ReasonCode::Success
            } else {
                ReasonCode::NoMatchingSubscribers
            };
            let reply = publish_reply(qos, packet_id, reason);
            self.reply(self.last_receipt, reply, self.read_at);
        }
    }

    fn persist(&mut self, change: Change) {
        self.last_receipt = self.context.node.flusher.persist(change);
    }

    fn settle_later(&mut self, origin: Origin) {
        match origin {
            Origin::Memory => {}
            Origin::Inbox(id) => self.settled.push(id),
            Origin::Group(group, id) => {
                let client_id = &self.identity.client_id;
                self.context.node.settle_in_group(group, id, client_id);
            }
        }
    }

    /// In one step, so that no crash leaves a message whose exchange is forgotten: it would be
    /// delivered a second time.
    fn end_exchange(&mut self, origin: Origin, packet_id: PacketId) {
        let node = &self.context.node;
        let mailbox = &self.connected.mailbox;
        let group = match origin {
            Origin::Group(group, _) => node.group_of_inbox(group),
            Origin::Memory | Origin::Inbox(_) => None,
        };
        let is_shared = node.cluster.is_some();
        let mut additions = node.flusher.add();
        match (origin, group) {
            // Nobody waits for a message of QoS 2 before writing it.
            (Origin::Inbox(id), _) => drop(additions.settle(mailbox, &[id])),
            (Origin::Group(session, key), _) if is_shared => {
                // Whoever dispatches the group hears of it later.
                let guard = Some(mailbox.session);
                additions.persist(Change::Dequeue {
                    session,
                    key,
                    guard,
                });
            }
            (Origin::Group(_, id), Some(group)) => {
                group.settle(id, &self.identity.client_id, &mut additions);
            }
            _ => {}
        }
        additions.persist(Change::EndExchange {
            session: mailbox.session,
            packet_id,
        });
        drop(additions);
        if let (Origin::Group(session, id), true) = (origin, is_shared) {
            node.settle_in_group(session, id, &self.identity.client_id);
        }
    }

    fn settle(&mut self) {
        if !self.settled.is_empty() {
            let (node, mailbox) = (&self.context.node, &self.connected.mailbox);
            let elsewhere = node.flusher.add().settle(mailbox, &self.settled);
            self.settled.clear();
            node.say_taken_over(mailbox.session, &elsewhere);
        }
    }

    /// Sends a reply once `receipt` is durable, and after all replies before it. `asked` is when the
    /// publication came that it answers.
    fn reply(&mut self, receipt: Receipt, reply: Reply, asked: Arrival) {
        if self.pending.is_empty()
            && self.context.node.flusher.is_durable(receipt)
            && !self.connected.mailbox.is_lost()
        {
            self.send_reply(reply);
            if asked != Arrival::NONE {
                self.tally.answered_at_once(qos_of(reply));
            }
        } else {
            self.pending
                .push_back((receipt, Pending::Reply(reply, asked)));
        }
    }

    fn send_reply(&mut self, reply: Reply) {
        self.session.replied(reply);
        let ack = Acknowledgement::with_reason(reply.packet_id, reply.reason);
        failpoint::reach(match reply.kind {
            ReplyKind::PubAck => "before_puback",
            ReplyKind::PubRec => "before_pubrec",
            ReplyKind::PubRel => "before_pubrel",
            ReplyKind::PubComp => "before_pubcomp",
        });
        let packet = match reply.kind {
            ReplyKind::PubAck => Packet::PubAck(ack),
            ReplyKind::PubRec => Packet::PubRec(ack),
            ReplyKind::PubRel => Packet::PubRel(ack),
            ReplyKind::PubComp => Packet::PubComp(ack),
        };
        self.send(&packet);
    }

    fn send(&mut self, packet: &Packet<'_>) {
        self.tally.packet_sent(packet.packet_type());
        self.tally.bytes_sent += self.io.write(packet, self.session.version()) as u64;
    }

    fn send_publish(&mut self, outgoing: &Outgoing, now: Instant) {
        let (qos, totals) = (outgoing.delivery.qos, &self.context.node.totals);
        self.tally.packet_sent(PacketType::Publish);
        let age = outgoing.delivery.arrival.age(now);
        self.tally.delivered(qos, age, totals);
        if outgoing.dup {
            totals.messages_redelivered.of(qos).inc();
        }
        if let Some(packet_id) = outgoing.packet_id {
            self.session.sent(packet_id, now);
        }
        self.tally.bytes_sent += self.io.write_publish(outgoing, self.session.version()) as u64;
    }

    /// Sends what has become durable.
    fn send_durable(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((receipt, pending)) = self.pending.front_mut()
            && pending.known().is_none()
            && self.context.node.flusher.is_durable(*receipt)
            && !self.connected.mailbox.is_lost()
        {
            let Some((_, pending)) = self.pending.pop_front() else {
                return;
            };
            match pending {
                Pending::Reply(reply, asked) => {
                    self.send_reply(reply);
                    if let Some((after, _)) = asked.age(now) {
                        let totals = &self.context.node.totals;
                        self.tally.answered(qos_of(reply), after, totals);
                    }
                }
                Pending::SubAck {
                    packet_id,
                    reasons,
                    walks,
                    known: _,
                } => {
                    let properties = Properties::default();
                    self.send(&Packet::SubAck(SubscribeAcknowledgement {
                        packet_id,
                        reasons,
                        properties,
                    }));
                    self.walks.extend(walks);
                }
                Pending::UnsubAck { packet_id, reasons } => {
                    let properties = Properties::default();
                    self.send(&Packet::UnsubAck(SubscribeAcknowledgement {
                        packet_id,
                        reasons,
                        properties,
                    }));
                }
                Pending::Publish(outgoing) => {
                    failpoint::reach("before_qos2_publish");
                    self.send_publish(&outgoing, now);
                }
            }
        }
    }

    /// Delivers messages as long as the socket and the client take them.
    async fn deliver_messages(&mut self) {
        let now = now();
        let restricted = self.context.node.authorizer.restricts_receive();
        while self.io.has_room()
            && let Some(delivery) = self.consumer.peek()
            && self.session.can_deliver(delivery)
        {
            let Some(delivery) = self.consumer.next() else {
                break;
            };
            if delivery
                .origin
                .place_in(self.connected.mailbox.session)
                .is_some()
                && self.connected.mailbox.is_over_limit()
                && !self.session.is_unfinished(delivery.origin)
            {
                self.settle_later(delivery.origin);
                self.settle();
                continue;
            }
            if self.is_unwanted(&delivery) {
                self.settle_later(delivery.origin);
                continue;
            }
            if restricted && !self.session.is_unfinished(delivery.origin) {
                let request = Request::Receive {
                    topic: delivery.message.topic(),
                };
                let verdict = authorize(&self.context.node, &self.identity, request).await;
                let totals = &self.context.node.totals;
                totals.authorized(Asked::Receive, verdict == Verdict::Allow);
                if verdict != Verdict::Allow {
                    totals.dropped.of(Dropped::AclDenied).inc();
                    self.settle_later(delivery.origin);
                    continue;
                }
            }
            let outgoing = self.session.deliver(delivery, now);
            self.session.take_actions(&mut self.actions);
            let mut actions = std::mem::take(&mut self.actions);
            actions.drain(..).for_each(|action| self.perform(action));
            self.actions = actions;
            match outgoing {
                Ok(Some(outgoing)) if outgoing.after_durable => {
                    self.pending
                        .push_back((self.last_receipt, Pending::Publish(Box::new(outgoing))));
                }
                Ok(Some(outgoing)) => self.send_publish(&outgoing, now.instant),
                Ok(None) => {}
                Err(reason) => self.context.node.totals.dropped.of(reason).inc(),
            }
        }
        self.settle();
    }

    /// Whether another node has added a message after its subscription had ended, [MQTT-3.10.4-2].
    fn is_unwanted(&self, delivery: &Delivery) -> bool {
        let Origin::Inbox(id) = delivery.origin else {
            return false;
        };
        let topic = delivery.message.topic();
        let mut filters = self.connected.subscriptions.keys();
        self.has_unsubscribed
            && id.node != self.context.node.flusher.node
            && !self.session.is_unfinished(delivery.origin)
            && !filters.any(|filter| filter.filter.matches(topic))
    }

    /// Ends the connection as its reason demands.
    async fn end(mut self: Box<Self>, reason: &CloseReason) {
        let version = self.session.version();
        let will = match reason {
            CloseReason::ClientDisconnected {
                with_will,
                expiry_interval,
            } => {
                if let Some(interval) = expiry_interval {
                    self.connected.record.expiry_interval =
                        (*interval).min(self.context.node.limits.session_expiry_max);
                }
                if *with_will {
                    WillFate::Publish
                } else {
                    WillFate::Discard
                }
            }
            CloseReason::Shutdown => WillFate::Keep,
            CloseReason::Drained(_) => WillFate::Defer,
            _ => WillFate::Publish,
        };
        if let Some(throttled) = self.throttled.take() {
            self.context.node.totals.throttled.of(throttled).dec();
        }
        reason.count(&self.context.node, &self);
        if let (Some(_), Some(code)) = (self.unanswered.take(), reason.reason_code()) {
            self.send(&Packet::ConnAck(Box::new(refuse(code))));
        } else if let (Some(code), true) = (reason.reason_code(), version.is_v5()) {
            self.send(&Packet::Disconnect(Disconnect {
                reason: code,
                properties: Properties::default(),
            }));
        }
        self.settle();
        let Self {
            io,
            session,
            connected,
            consumer,
            context,
            mut tally,
            identity,
            presence,
            ..
        } = *self;
        let node = &context.node;
        tally.add_to(&node.totals, &presence.listener);
        node.disconnect(connected, consumer, session.into_exchanges(), will)
            .await;
        tracing::debug!(event = "client_disconnected", client_id = %identity.client_id, reason = %reason);
        node.publish_event(&identity.client_id, ClientEvent::Disconnected);
        // The client may be gone; there is nobody else to tell.
        let _ = timeout(CLOSE_TIMEOUT, io.close()).await;
    }
}

/// Of the publication that a reply of ours answers first.
fn qos_of(reply: Reply) -> QoS {
    match reply.kind {
        ReplyKind::PubAck => QoS::AtLeastOnce,
        ReplyKind::PubRec | ReplyKind::PubRel | ReplyKind::PubComp => QoS::ExactlyOnce,
    }
}

async fn authorize(node: &Node, identity: &Identity, request: Request<'_>) -> Verdict {
    match node.authorizer.authorize(identity, request) {
        Answer::Now(verdict) => verdict,
        Answer::Later(verdict) => verdict.await,
    }
}

/// Ready when the connection is told something.
async fn ordered(mailbox: &Mailbox) -> Order {
    std::future::poll_fn(|context| match mailbox.order() {
        Some(order) => Poll::Ready(order),
        None if mailbox.wait(context.waker(), false) => Poll::Pending,
        None => {
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

/// Ready once what is to be sent next may be.
async fn sendable(
    flusher: &Flusher,
    next: Option<&mut (Receipt, Pending)>,
    awaited: &mut Receipt,
) -> Result<(), StoreError> {
    let Some((receipt, pending)) = next else {
        return Ok(());
    };
    durable(flusher, *receipt, awaited).await?;
    if let Some(known) = pending.known() {
        known.await;
        pending.is_known();
    }
    Ok(())
}

/// Ready once `receipt` is durable. The flusher is asked once for each receipt, however often this
/// is polled: it wakes the task, not the future.
async fn durable(
    flusher: &Flusher,
    receipt: Receipt,
    awaited: &mut Receipt,
) -> Result<(), StoreError> {
    std::future::poll_fn(|context| {
        if flusher.is_durable(receipt) {
            Poll::Ready(Ok(()))
        } else if *awaited == receipt && !flusher.has_failed() {
            Poll::Pending
        } else {
            *awaited = receipt;
            flusher.poll_durable(receipt, context)
        }
    })
    .await
}

async fn until(timer: &mut Option<Pin<Box<Sleep>>>) {
    match timer {
        Some(timer) => timer.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Ready when there is space again, or has had time enough.
async fn space(node: &Node, crowded: &Option<(Crowded, Instant)>) {
    let Some((crowded, until)) = crowded else {
        return;
    };
    let wait = std::future::poll_fn(|context| {
        if node.wait_for_space(crowded, context.waker()) {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    });
    // Either way the publisher goes on.
    let _ = tokio::time::timeout_at(*until, wait).await;
}

fn now() -> Now {
    Now {
        instant: Instant::now(),
        unix_ms: unix_ms(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an idle connection costs of ours; the rest is tokio's task and socket and the entry in
    /// the registry. See docs/benchmarks.md for all of it.
    #[test]
    fn state_of_an_idle_connection_is_small() {
        fn future_size<F>(_: impl FnOnce(Accepted, Arc<ConnectionContext>) -> F) -> usize {
            size_of::<F>()
        }

        let sizes = [
            future_size(serve),
            size_of::<Connection>(),
            size_of::<Mailbox>(),
        ];

        assert!(sizes.iter().sum::<usize>() <= 3072, "{sizes:?}");
    }
}
