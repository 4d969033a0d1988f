//! An MQTT client for the command line.
//!
//! [`Client`] speaks the protocol: CONNECT, both directions of all QoS, subscriptions. What
//! messages are for is its user's business. It keeps what a session needs across connections, so
//! that QoS 2 stays exactly once when [`Client::reconnect`] resumes it. Start reading at
//! [`Client::next`].

mod connection;
pub(super) mod options;
mod outcome;
mod property_args;
mod tls;

use std::collections::{HashMap, HashSet};
use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use self::connection::Connection;
pub(super) use self::options::{ConnectOptions, ConnectionArgs};
pub(super) use self::outcome::{complain, refuse_options, run};
pub(super) use self::property_args::Command;
use crate::mqtt::decode::DecodeError;
use crate::mqtt::encode::PACKET_BYTES_MAX;
use crate::mqtt::packet::{
    Acknowledgement, ConnAck, Disconnect, PacketType, Publish, Subscribe, Unsubscribe,
};
use crate::mqtt::property::{ConnAckProperties, PropertiesBuffer};
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{Packet, PacketId, ProtocolVersion, QoS, ReasonCode};

/// How long a server may take from the first SYN to its CONNACK.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a server may take to close the connection after DISCONNECT.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes that may wait for the socket before [`Client::can_publish`] says no.
const QUEUED_BYTES_MAX: usize = 256 * 1024;

/// One client and its session.
pub(super) struct Client {
    connection: Connection,
    server: ServerLimits,
    version: ProtocolVersion,
    session_present: bool,
    /// QoS 2 messages that came, and whose PUBREL has not.
    awaiting_release: HashSet<PacketId>,
    /// What the server has not acknowledged: publishes, subscriptions.
    unacknowledged: HashSet<PacketId>,
    /// What the server's topic aliases stand for.
    topic_aliases: HashMap<u16, String>,
    last_packet_id: u16,
}

/// What happened.
pub(super) enum Event {
    /// A message came; [`Client::acknowledge`] it once it is safe.
    Message(IncomingMessage),
    /// The server has taken a QoS 1 or 2 message, or refused it.
    Published(Answer),
    Subscribed(Vec<Answer>),
    Unsubscribed(Vec<Answer>),
    /// Everything queued so far has been written to the socket.
    Sent,
}

/// A Reason Code, and what the server adds in words.
pub(super) struct Answer {
    pub(super) reason: ReasonCode,
    explanation: Option<String>,
}

pub(super) struct IncomingMessage {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    pub(super) qos: QoS,
    pub(super) retain: bool,
    /// Present exactly if the QoS is not 0.
    pub(super) packet_id: Option<PacketId>,
    pub(super) properties: PropertiesBuffer,
}

/// What CONNACK says the server will not do.
struct ServerLimits {
    receive_maximum: u16,
    maximum_qos: QoS,
    is_retain_available: bool,
    maximum_packet_bytes: usize,
}

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("cannot find host {host}: {error}")]
    Resolve { host: String, error: io::Error },
    #[error("cannot connect to {address}: {error}{}", connect_hint(.error))]
    Connect { address: String, error: io::Error },
    #[error("TLS with {address} failed: {error}{}", tls_hint(.error))]
    Tls { address: String, error: io::Error },
    #[error("{address} has not answered for {} seconds; it may not speak MQTT", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout { address: String },
    #[error("{address} does not speak MQTT")]
    NotMqtt { address: String },
    #[error("{address} answers with TLS: --cafile FILE turns it on here too")]
    NeedsTls { address: String },
    #[error(
        "{address} closed the connection without an answer: it may not speak this version of MQTT \
         (-V), or may expect TLS (--cafile)"
    )]
    ClosedBeforeConnAck { address: String },
    #[error("Connection refused: {0}")]
    Refused(Answer),
    #[error("the server wants an authentication exchange, which this client does not know")]
    AuthenticationExchange,

    #[error("the server closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Lost(io::Error),
    #[error("the server disconnected: {0}")]
    Disconnected(Answer),
    #[error("the server does not answer PINGREQ")]
    PingTimeout,
    #[error("the server broke the protocol: {0}")]
    Decode(#[from] DecodeError),
    #[error("the server broke the protocol: it sent {}", packet_name(*.0))]
    UnexpectedPacket(PacketType),
    #[error("the server broke the protocol: it used a topic alias that it had not set")]
    UnknownTopicAlias,

    #[error("the server takes QoS {} at most", *.0 as u8)]
    QoSNotSupported(QoS),
    #[error("the server does not keep retained messages")]
    RetainNotSupported,
    #[error("the message makes a packet of {bytes} bytes, and the server takes {maximum} at most")]
    PacketTooLarge { bytes: usize, maximum: usize },
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "; nothing listens there",
        _ => "",
    }
}

fn tls_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            "; it may not be a TLS port"
        }
        // What `openssl req -x509` makes by itself. The type of the error is webpki's own.
        _ if error.to_string().contains("CaUsedAsEndEntity") => {
            "; its certificate is that of an authority and not of a server, it needs \
             basicConstraints=CA:FALSE"
        }
        _ => "",
    }
}

impl ClientError {
    /// Whether the same CONNECT may succeed a little later.
    pub(super) fn is_temporary(&self) -> bool {
        match self {
            Self::Refused(answer) | Self::Disconnected(answer) => !matches!(
                answer.reason,
                ReasonCode::MalformedPacket
                    | ReasonCode::ProtocolError
                    | ReasonCode::UnsupportedProtocolVersion
                    | ReasonCode::ClientIdentifierNotValid
                    | ReasonCode::BadUserNameOrPassword
                    | ReasonCode::NotAuthorized
                    | ReasonCode::Banned
                    | ReasonCode::BadAuthenticationMethod
                    // Whoever took it would be thrown out by us, and then we by him.
                    | ReasonCode::SessionTakenOver
                    | ReasonCode::UseAnotherServer
                    | ReasonCode::ServerMoved
            ),
            Self::Resolve { .. }
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::ClosedBeforeConnAck { .. }
            | Self::Closed
            | Self::Lost(_)
            | Self::PingTimeout => true,
            // A server that restarts cuts handshakes off; a bad certificate stays bad.
            Self::Tls { error, .. } => error.kind() != io::ErrorKind::InvalidData,
            Self::NotMqtt { .. }
            | Self::NeedsTls { .. }
            | Self::AuthenticationExchange
            | Self::Decode(_)
            | Self::UnexpectedPacket(_)
            | Self::UnknownTopicAlias
            | Self::QoSNotSupported(_)
            | Self::RetainNotSupported
            | Self::PacketTooLarge { .. } => false,
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({:?})", self.reason, self.reason)?;
        match &self.explanation {
            Some(explanation) => write!(f, ": {explanation}"),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Answer {
    fn new(reason: ReasonCode, explanation: Option<&str>) -> Self {
        Self {
            reason,
            explanation: explanation.map(str::to_owned),
        }
    }
}

impl Client {
    pub(super) async fn connect(options: &ConnectOptions) -> Result<Self, ClientError> {
        let (connection, accepted) = open(options).await?;
        Ok(Self {
            connection,
            server: accepted.limits,
            version: options.version,
            session_present: accepted.session_present,
            awaiting_release: HashSet::new(),
            unacknowledged: HashSet::new(),
            topic_aliases: HashMap::new(),
            last_packet_id: 0,
        })
    }

    /// Replaces the connection; what the session remembers stays if the server has kept it too.
    pub(super) async fn reconnect(&mut self, options: &ConnectOptions) -> Result<(), ClientError> {
        let (connection, accepted) = open(options).await?;
        self.connection = connection;
        self.server = accepted.limits;
        self.session_present = accepted.session_present;
        if !self.session_present {
            self.awaiting_release.clear();
        }
        self.unacknowledged.clear();
        self.topic_aliases.clear();
        Ok(())
    }

    /// Whether the server had the session of this client.
    pub(super) fn session_present(&self) -> bool {
        self.session_present
    }

    /// Packets that the server has yet to answer.
    pub(super) fn unacknowledged(&self) -> usize {
        self.unacknowledged.len()
    }

    /// Whether another message may be sent while at most `in_flight_max` are on their way. If not,
    /// an [`Event`] will come that changes it.
    pub(super) fn can_publish(&self, in_flight_max: u16) -> bool {
        self.unacknowledged() < usize::from(in_flight_max.min(self.server.receive_maximum))
            && self.connection.queued_bytes() < QUEUED_BYTES_MAX
    }

    /// Sends a message and returns its packet identifier, which is in the answer of the server.
    pub(super) fn publish(
        &mut self,
        topic: &str,
        payload: &[u8],
        qos: QoS,
        retain: bool,
        properties: &PropertiesBuffer,
    ) -> Result<(), ClientError> {
        if qos > self.server.maximum_qos {
            return Err(ClientError::QoSNotSupported(self.server.maximum_qos));
        }
        if retain && !self.server.is_retain_available {
            return Err(ClientError::RetainNotSupported);
        }
        let packet_id = (qos != QoS::AtMostOnce).then(|| self.next_packet_id());
        let packet = Packet::Publish(Publish {
            dup: false,
            qos,
            retain,
            topic,
            packet_id,
            properties: properties.as_properties(),
            payload,
        });
        let bytes =
            topic.len() + payload.len() + properties.encoded_length() + PUBLISH_OVERHEAD_BYTES_MAX;
        if bytes > PACKET_BYTES_MAX {
            let maximum = PACKET_BYTES_MAX;
            return Err(ClientError::PacketTooLarge { bytes, maximum });
        }
        self.connection
            .queue_if_at_most(self.server.maximum_packet_bytes, &packet)?;
        self.unacknowledged.extend(packet_id);
        Ok(())
    }

    pub(super) fn subscribe(
        &mut self,
        filters: &[String],
        options: SubscribeOptions,
        properties: &PropertiesBuffer,
    ) {
        let packet_id = self.next_packet_id();
        self.unacknowledged.insert(packet_id);
        self.connection.queue(&Packet::Subscribe(Subscribe {
            packet_id,
            properties: properties.as_properties(),
            filters: filters
                .iter()
                .map(|filter| (filter.as_str(), options))
                .collect(),
        }));
    }

    pub(super) fn unsubscribe(&mut self, filters: &[String], properties: &PropertiesBuffer) {
        let packet_id = self.next_packet_id();
        self.unacknowledged.insert(packet_id);
        self.connection.queue(&Packet::Unsubscribe(Unsubscribe {
            packet_id,
            properties: properties.as_properties(),
            filters: filters.iter().map(String::as_str).collect(),
        }));
    }

    /// Tells the server that `message` is ours now.
    pub(super) fn acknowledge(&mut self, message: &IncomingMessage) {
        let Some(packet_id) = message.packet_id else {
            return;
        };
        let acknowledgement = Acknowledgement::success(packet_id);
        if message.qos == QoS::ExactlyOnce {
            self.awaiting_release.insert(packet_id);
            self.connection.queue(&Packet::PubRec(acknowledgement));
        } else {
            self.connection.queue(&Packet::PubAck(acknowledgement));
        }
    }

    /// Waits for what happens next, and does whatever the protocol asks for meanwhile.
    ///
    /// May be dropped and called again without loss.
    pub(super) async fn next(&mut self) -> Result<Event, ClientError> {
        loop {
            let Some(frame) = self.connection.next().await? else {
                return Ok(Event::Sent);
            };
            match frame.packet()? {
                Packet::Publish(publish) => {
                    let topic = self.resolve_topic(&publish)?;
                    if let (QoS::ExactlyOnce, Some(packet_id)) = (publish.qos, publish.packet_id)
                        && self.awaiting_release.contains(&packet_id)
                    {
                        // A repeat of what we have, [MQTT-4.3.3-10].
                        let acknowledgement = Acknowledgement::success(packet_id);
                        self.connection.queue(&Packet::PubRec(acknowledgement));
                        continue;
                    }
                    return Ok(Event::Message(IncomingMessage {
                        topic,
                        payload: frame.share(publish.payload),
                        qos: publish.qos,
                        retain: publish.retain,
                        packet_id: publish.packet_id,
                        properties: publish.properties.iter().collect(),
                    }));
                }
                Packet::PubRel(release) => {
                    self.awaiting_release.remove(&release.packet_id);
                    let acknowledgement = Acknowledgement::success(release.packet_id);
                    self.connection.queue(&Packet::PubComp(acknowledgement));
                }
                Packet::PubRec(received) if !received.reason.is_error() => {
                    let acknowledgement = Acknowledgement::success(received.packet_id);
                    self.connection.queue(&Packet::PubRel(acknowledgement));
                }
                Packet::PubAck(end) | Packet::PubRec(end) | Packet::PubComp(end) => {
                    if self.unacknowledged.remove(&end.packet_id) {
                        let explanation = end.properties.reason_string();
                        return Ok(Event::Published(Answer::new(end.reason, explanation)));
                    }
                }
                Packet::SubAck(end) => {
                    self.unacknowledged.remove(&end.packet_id);
                    let explanation = end.properties.reason_string();
                    let answer = |reason| Answer::new(reason, explanation);
                    return Ok(Event::Subscribed(
                        end.reasons.into_iter().map(answer).collect(),
                    ));
                }
                Packet::UnsubAck(end) => {
                    self.unacknowledged.remove(&end.packet_id);
                    let explanation = end.properties.reason_string();
                    let answer = |reason| Answer::new(reason, explanation);
                    return Ok(Event::Unsubscribed(
                        end.reasons.into_iter().map(answer).collect(),
                    ));
                }
                Packet::Disconnect(end) if self.version.is_v5() => {
                    let explanation = end.properties.reason_string();
                    let answer = Answer::new(end.reason, explanation);
                    return Err(ClientError::Disconnected(answer));
                }
                unexpected => {
                    return Err(ClientError::UnexpectedPacket(unexpected.packet_type()));
                }
            }
        }
    }

    /// Sends what is queued, then DISCONNECT, so that the server does not publish the Will.
    ///
    /// # Errors
    /// Also what the server had against the last messages, should it say so: QoS 0 has no other
    /// answer.
    pub(super) async fn disconnect(
        &mut self,
        properties: &PropertiesBuffer,
    ) -> Result<(), ClientError> {
        self.connection.queue(&Packet::Disconnect(Disconnect {
            reason: ReasonCode::Success,
            properties: properties.as_properties(),
        }));
        self.connection.flush().await?;
        self.connection.shut_down().await?;
        // To leave with bytes unread would reset the connection, and could cost the server what it
        // has not read yet.
        match timeout(LINGER_TIMEOUT, self.last_words()).await {
            Ok(Some(answer)) => Err(ClientError::Disconnected(answer)),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Reads until the server closes the connection, or says what was wrong.
    async fn last_words(&mut self) -> Option<Answer> {
        loop {
            let Some(frame) = self.connection.next().await.ok()? else {
                continue;
            };
            if let Ok(Packet::Disconnect(end)) = frame.packet()
                && end.reason.is_error()
            {
                return Some(Answer::new(end.reason, end.properties.reason_string()));
            }
        }
    }

    fn resolve_topic(&mut self, publish: &Publish<'_>) -> Result<String, ClientError> {
        match publish.properties.topic_alias() {
            Some(alias) if publish.topic.is_empty() => self
                .topic_aliases
                .get(&alias)
                .cloned()
                .ok_or(ClientError::UnknownTopicAlias),
            Some(alias) => {
                let topic = publish.topic.to_owned();
                self.topic_aliases.insert(alias, topic.clone());
                Ok(topic)
            }
            None => Ok(publish.topic.to_owned()),
        }
    }

    fn next_packet_id(&mut self) -> PacketId {
        loop {
            self.last_packet_id = self.last_packet_id.wrapping_add(1);
            if let Some(packet_id) = PacketId::new(self.last_packet_id)
                && !self.unacknowledged.contains(&packet_id)
            {
                return packet_id;
            }
        }
    }
}

/// What a PUBLISH has besides topic, properties and payload: fixed header, the length of the topic,
/// packet identifier, Property Length.
const PUBLISH_OVERHEAD_BYTES_MAX: usize = 5 + 2 + 2 + 4;

struct Accepted {
    session_present: bool,
    limits: ServerLimits,
}

async fn open(options: &ConnectOptions) -> Result<(Connection, Accepted), ClientError> {
    timeout(CONNECT_TIMEOUT, handshake(options))
        .await
        .unwrap_or_else(|_| {
            Err(ClientError::ConnectTimeout {
                address: options.address(),
            })
        })
}

async fn handshake(options: &ConnectOptions) -> Result<(Connection, Accepted), ClientError> {
    let address = || options.address();
    let mut connection = Connection::open(options).await?;
    connection.queue(&Packet::Connect(Box::new(options.connect())));
    connection.flush().await?;
    connection.read_some().await.map_err(|error| match error {
        ClientError::Closed | ClientError::Lost(_) => {
            ClientError::ClosedBeforeConnAck { address: address() }
        }
        error => error,
    })?;
    const TLS_ALERT: u8 = 0x15;
    match connection.peek() {
        [TLS_ALERT, ..] => return Err(ClientError::NeedsTls { address: address() }),
        [first, ..] if !matches!(first >> 4, CONNACK | AUTH) => {
            return Err(ClientError::NotMqtt { address: address() });
        }
        _ => {}
    }
    let frame = loop {
        if let Some(frame) = connection.next().await? {
            break frame;
        }
    };
    match frame.packet()? {
        Packet::ConnAck(connack) if connack.reason.is_error() => {
            let explanation = connack.properties.reason_string;
            let answer = Answer::new(connack.reason, explanation);
            Err(ClientError::Refused(answer))
        }
        Packet::ConnAck(connack) => {
            let server_keep_alive = connack.properties.server_keep_alive;
            let keep_alive = server_keep_alive.unwrap_or(options.keep_alive);
            connection.set_keep_alive(Duration::from_secs(keep_alive.into()));
            let accepted = Accepted::from(&*connack);
            Ok((connection, accepted))
        }
        Packet::Auth(_) => Err(ClientError::AuthenticationExchange),
        unexpected => Err(ClientError::UnexpectedPacket(unexpected.packet_type())),
    }
}

const CONNACK: u8 = PacketType::ConnAck as u8;
const AUTH: u8 = PacketType::Auth as u8;

impl From<&ConnAck<'_>> for Accepted {
    fn from(connack: &ConnAck<'_>) -> Self {
        let ConnAckProperties {
            receive_maximum,
            maximum_qos,
            retain_available,
            maximum_packet_size,
            ..
        } = connack.properties;
        Self {
            session_present: connack.session_present,
            limits: ServerLimits {
                receive_maximum: receive_maximum.unwrap_or(u16::MAX),
                maximum_qos: maximum_qos.unwrap_or(QoS::ExactlyOnce),
                is_retain_available: retain_available.unwrap_or(true),
                maximum_packet_bytes: maximum_packet_size
                    .map_or(PACKET_BYTES_MAX, |bytes| bytes as usize),
            },
        }
    }
}

/// Writes one line about `packet` to stderr; of payloads and passwords nothing.
fn trace(direction: &str, packet: &Packet<'_>) {
    let name = packet_name(packet.packet_type());
    match packet {
        Packet::Connect(connect) => complain(format_args!(
            "{direction} {name} (client id {:?}, clean start {}, keep alive {} s)",
            connect.client_id, connect.clean_start, connect.keep_alive
        )),
        Packet::ConnAck(connack) => complain(format_args!(
            "{direction} {name} ({}, session present {})",
            connack.reason, connack.session_present
        )),
        Packet::Publish(publish) => complain(format_args!(
            "{direction} {name} (d{}, q{}, r{}, m{}, '{}', {} bytes)",
            u8::from(publish.dup),
            publish.qos as u8,
            u8::from(publish.retain),
            publish.packet_id.map_or(0, PacketId::get),
            publish.topic,
            publish.payload.len()
        )),
        Packet::PubAck(acknowledgement)
        | Packet::PubRec(acknowledgement)
        | Packet::PubRel(acknowledgement)
        | Packet::PubComp(acknowledgement) => complain(format_args!(
            "{direction} {name} (m{}, {})",
            acknowledgement.packet_id.get(),
            acknowledgement.reason
        )),
        Packet::Subscribe(subscribe) => {
            for (filter, options) in &subscribe.filters {
                let qos = options.maximum_qos as u8;
                complain(format_args!("{direction} {name} (q{qos}, '{filter}')"));
            }
        }
        Packet::SubAck(acknowledgement) | Packet::UnsubAck(acknowledgement) => {
            complain(format_args!(
                "{direction} {name} ({:?})",
                acknowledgement.reasons
            ));
        }
        Packet::Unsubscribe(unsubscribe) => {
            complain(format_args!(
                "{direction} {name} ({:?})",
                unsubscribe.filters
            ));
        }
        Packet::Disconnect(disconnect) => {
            complain(format_args!("{direction} {name} ({})", disconnect.reason))
        }
        Packet::PingReq | Packet::PingResp | Packet::Auth(_) => {
            complain(format_args!("{direction} {name}"))
        }
    }
}

/// As the specification writes it.
fn packet_name(packet_type: PacketType) -> String {
    format!("{packet_type:?}").to_uppercase()
}
