//! From the first packet to an accepted client: CONNECT is read, authenticated and agreed on, and the
//! session is taken.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use super::{CLOSE_TIMEOUT, Connection, ConnectionContext, Greeting, authorize, now};
use crate::auth::{Answer, AuthenticationError, Credentials, Identity, Request, Verdict};
use crate::broker::LastTopic;
use crate::broker::flush::Receipt;
use crate::broker::inspect::Presence;
use crate::broker::sessions::{NotOpened, Opened};
use crate::broker::sys::ClientEvent;
use crate::metrics::{
    Arrival, Asked, Authentication, ListenerTotals, Method, Rejected, Tally, Throttle, Totals,
    Violation,
};
use crate::mqtt::decode::{connack_version, decode};
use crate::mqtt::packet::PacketType;
use crate::mqtt::{Packet, ProtocolVersion, ReasonCode};
use crate::net::arrivals::Pace;
use crate::net::listener::Accepted;
use crate::net::packet_io::{PacketIo, ReadError};
use crate::session::Session;
use crate::session::connect::{ConnectLimits, Refusal, Terms, refuse as refusing_connack};

/// Ends a connection before there is a session.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("closed before the first byte")]
    Probe,
    #[error("no CONNECT within the connect timeout")]
    Timeout,
    #[error("{0}")]
    Malformed(#[from] ReadError),
    #[error("the first packet is not CONNECT")]
    NotConnect,
    #[error("{reason}")]
    Refused {
        reason: String,
        code: ReasonCode,
        version: ProtocolVersion,
        cause: Rejected,
    },
    #[error("{0}")]
    Unreadable(ReadError, ReasonCode, ProtocolVersion),
    #[error("another connection with the same client id came")]
    Superseded,
}

impl ConnectError {
    /// Counts a connection that is not established.
    pub(super) fn count(&self, totals: &Totals, listener: &ListenerTotals) {
        let violation = match self {
            Self::Malformed(ReadError::Malformed(error)) => Some(error.reason_code()),
            Self::Malformed(ReadError::TooLarge { .. }) => Some(ReasonCode::PacketTooLarge),
            Self::NotConnect => Some(ReasonCode::ProtocolError),
            Self::Unreadable(_, code, _) => Some(*code),
            Self::Io(_) | Self::Probe | Self::Timeout | Self::Refused { .. } | Self::Superseded => {
                None
            }
        };
        let is_version = |code: &ReasonCode| *code == ReasonCode::UnsupportedProtocolVersion;
        let cause = match self {
            Self::Probe => return listener.probes.inc(),
            Self::Io(_) => Rejected::NetworkError,
            Self::Timeout => Rejected::ConnectTimeout,
            Self::NotConnect => Rejected::NotMqtt,
            Self::Malformed(_) | Self::Unreadable(..)
                if violation.is_some_and(|c| is_version(&c)) =>
            {
                Rejected::UnsupportedVersion
            }
            Self::Malformed(_) | Self::Unreadable(..) => Rejected::Malformed,
            Self::Refused { cause, .. } => *cause,
            Self::Superseded => Rejected::SessionTakenOver,
        };
        listener.rejected.of(cause).inc();
        if let Some(code) = violation.filter(|code| !is_version(code)) {
            totals.violations.of(Violation::of(code)).inc();
        }
    }
}

/// Reads CONNECT, lets the client in and answers.
pub(super) async fn open(
    accepted: Accepted,
    context: &Arc<ConnectionContext>,
    count: usize,
) -> Result<Box<Connection>, Box<(ConnectError, PacketIo)>> {
    let Accepted {
        transport,
        peer,
        listener,
        certificate_name,
        is_over_rate,
    } = accepted;
    let limits = context.limits.load_full();
    let mut io = PacketIo::new(transport, limits.packet_bytes_max as usize);
    let mut since = Instant::now();
    let admitted = async {
        let frame = read_first_frame(&mut io, context.connect_timeout).await?;
        since = Instant::now();
        let newcomer = Newcomer {
            peer,
            certificate_name,
            is_over_rate,
            count,
        };
        admit(&frame, context, &limits, newcomer).await
    };
    let (terms, identity) = match admitted.await {
        Ok(admitted) => admitted,
        Err(error) => {
            listener.bytes_received.add(io.take_bytes_read());
            return Err(Box::new((error, io)));
        }
    };
    let node = &context.node;
    let opened = match node.connect(&terms).await {
        Ok(opened) => opened,
        Err(NotOpened::Superseded) => {
            return Err(Box::new((ConnectError::Superseded, io)));
        }
        Err(NotOpened::Store(error)) => {
            let refused = ConnectError::Refused {
                reason: error.to_string(),
                code: ReasonCode::ServerUnavailable,
                version: terms.version,
                cause: Rejected::StoreUnavailable,
            };
            return Err(Box::new((refused, io)));
        }
    };
    let Opened {
        connected,
        consumer,
        exchanges,
        session_present,
        receipt,
    } = opened;
    tracing::debug!(
        event = "client_connected",
        client_id = %terms.client_id,
        %peer,
        listener = %listener.name,
        user_name = identity.user_name.as_deref(),
        version = ?terms.version,
        session_present,
    );
    node.publish_event(&terms.client_id, ClientEvent::Connected);
    let now = now();
    let presence = Arc::new(Presence {
        peer,
        listener,
        user_name: identity.user_name.clone(),
        version: terms.version,
        keep_alive: terms.keep_alive,
        clean_start: terms.clean_start,
        expiry_interval: terms.expiry_interval,
        connected_at: now.unix_ms,
        in_flight: AtomicU16::new(0),
        unacknowledged: AtomicU16::new(0),
    });
    node.clients.introduce(&connected.mailbox, &presence);
    let durable = connected.mailbox.is_durable();
    let mut session = Session::new(&terms, connected.mailbox.session, durable, exchanges, now);
    session.resume();
    let timer = session
        .keep_alive_deadline()
        .map(|deadline| Box::pin(sleep_until(deadline)));
    Ok(Box::new(Connection {
        unanswered: Some(Box::new(Greeting {
            receipt,
            terms,
            session_present,
            since,
        })),
        io,
        session,
        identity,
        presence,
        connected,
        consumer,
        pending: VecDeque::new(),
        awaited_receipt: Receipt::NOTHING,
        last_receipt: Receipt::NOTHING,
        settled: Vec::new(),
        actions: Vec::new(),
        walks: VecDeque::new(),
        has_unsubscribed: false,
        last_topic: LastTopic::default(),
        crowded: None,
        timer,
        pace: Pace::default(),
        pause: None,
        pause_cause: Throttle::PublishRate,
        throttled: None,
        read_at: Arrival::NONE,
        tally: Tally::default(),
        input_left: true,
        context: context.clone(),
    }))
}

async fn read_first_frame(
    io: &mut PacketIo,
    connect_timeout: Duration,
) -> Result<Vec<u8>, ConnectError> {
    let read = async {
        loop {
            // Of another protocol: the rest of what would be its first packet may never come.
            if io.first_byte().is_some_and(|byte| byte >> 4 != 1) {
                return Err(ConnectError::NotConnect);
            }
            if let Some(frame) = io.next_frame()? {
                return Ok(frame.to_vec());
            }
            if let Err(error) = io.progress(true).await {
                let is_end = error.kind() == io::ErrorKind::UnexpectedEof;
                return Err(if is_end && io.take_bytes_read() == 0 {
                    ConnectError::Probe
                } else {
                    error.into()
                });
            }
        }
    };
    timeout(connect_timeout, read)
        .await
        .unwrap_or(Err(ConnectError::Timeout))
}

/// Who wants to be let in.
struct Newcomer {
    peer: SocketAddr,
    certificate_name: Option<Arc<str>>,
    is_over_rate: bool,
    /// Connections that there are, with this one.
    count: usize,
}

impl Newcomer {
    /// Why it is not even looked at, whoever it is.
    fn is_turned_away(
        &self,
        context: &ConnectionContext,
    ) -> Option<(&'static str, ReasonCode, Rejected)> {
        if context.sends_away.load(Ordering::Relaxed) {
            let reason = "the node is being drained";
            Some((reason, ReasonCode::UseAnotherServer, Rejected::Draining))
        } else if context.node.overload.refuses_connections() {
            let reason = "memory is short";
            Some((reason, ReasonCode::ServerBusy, Rejected::Overloaded))
        } else if self.is_over_rate {
            let reason = "too many connections in this second";
            let code = ReasonCode::ConnectionRateExceeded;
            Some((reason, code, Rejected::RateLimited))
        } else if self.count > context.connections_max.load(Ordering::Relaxed) {
            let reason = "too many connections";
            Some((reason, ReasonCode::ServerBusy, Rejected::ConnectionLimit))
        } else {
            None
        }
    }
}

async fn admit(
    frame: &[u8],
    context: &ConnectionContext,
    limits: &ConnectLimits,
    newcomer: Newcomer,
) -> Result<(Terms, Identity), ConnectError> {
    let connect = match decode(frame, ProtocolVersion::V5) {
        Ok(Packet::Connect(connect)) => connect,
        Ok(_) => return Err(ConnectError::NotConnect),
        Err(error) if frame[0] >> 4 == 1 => {
            let code = error.reason_code();
            return match connack_version(frame) {
                Some(version) => Err(ConnectError::Unreadable(error.into(), code, version)),
                None => Err(ReadError::from(error).into()),
            };
        }
        Err(_) => return Err(ConnectError::NotConnect),
    };
    let totals = &context.node.totals;
    totals.packets_received.of(PacketType::Connect).inc();
    let version = connect.version;
    let refused = |reason: String, code, cause| ConnectError::Refused {
        reason,
        code,
        version,
        cause,
    };
    if let Some((reason, code, cause)) = newcomer.is_turned_away(context) {
        return Err(refused(reason.to_owned(), code, cause));
    }
    let Newcomer {
        peer,
        certificate_name,
        ..
    } = newcomer;
    let mut terms =
        Terms::agree(&connect, limits, assigned_client_id).map_err(|refusal: Refusal| {
            let cause = match refusal {
                Refusal::EmptyClientId | Refusal::ClientIdTooLong { .. } => {
                    Rejected::ClientIdInvalid
                }
                Refusal::AuthenticationMethod | Refusal::WillTopic => Rejected::NotSupported,
            };
            refused(refusal.to_string(), refusal.reason_code(), cause)
        })?;
    let credentials = Credentials {
        client_id: terms.client_id.clone(),
        user_name: connect.user_name.map(Into::into),
        password: connect.password.map(Into::into),
        peer,
        certificate_name,
    };
    let method = match &credentials {
        Credentials {
            certificate_name: Some(_),
            password: None,
            ..
        } => Method::Certificate,
        Credentials {
            user_name: None,
            password: None,
            ..
        } => Method::Anonymous,
        _ => Method::Password,
    };
    let authentications = totals.authentications.of(method);
    let began = Instant::now();
    let answer = match context.authenticator.authenticate(credentials) {
        Answer::Now(answer) => answer,
        Answer::Later(answer) => answer.await,
    };
    totals.authentication.of(method).observe(began.elapsed());
    let user_name = match answer {
        Ok(user_name) => {
            authentications.of(Authentication::Allowed).inc();
            user_name
        }
        Err(error) => {
            let (outcome, cause) = match &error {
                AuthenticationError::BadCredentials => {
                    (Authentication::Denied, Rejected::BadCredentials)
                }
                AuthenticationError::NotAuthorized => {
                    (Authentication::Denied, Rejected::NotAuthorized)
                }
                AuthenticationError::Unavailable(_) => {
                    (Authentication::Error, Rejected::AuthUnavailable)
                }
            };
            authentications.of(outcome).inc();
            tracing::warn!(event = "connect_denied", client_id = %terms.client_id, %peer, user_name = connect.user_name, reason = %error);
            return Err(refused(error.to_string(), error.reason_code(), cause));
        }
    };
    let identity = Identity {
        client_id: terms.client_id.clone(),
        user_name,
    };
    if let Some(will) = &mut terms.will {
        will.user_name = identity.user_name.clone();
        let (topic, qos, retain) = (
            will.message.topic(),
            will.message.qos(),
            will.message.retain(),
        );
        let verdict = authorize(
            &context.node,
            &identity,
            Request::Publish { topic, qos, retain },
        )
        .await;
        totals.authorized(Asked::Publish, verdict == Verdict::Allow);
        if let Verdict::Deny { rule } = verdict {
            tracing::warn!(event = "will_denied", client_id = %terms.client_id, topic, rule = %rule);
            return Err(refused(
                format!("the will may not be published to {topic:?}"),
                ReasonCode::NotAuthorized,
                Rejected::NotAuthorized,
            ));
        }
    }
    Ok((terms, identity))
}

/// Answers a CONNECT that was not accepted, as far as its client can understand an answer.
pub(super) async fn refuse(
    mut io: PacketIo,
    error: &ConnectError,
    totals: &Totals,
    listener: &ListenerTotals,
) {
    let (code, version) = match error {
        ConnectError::Refused { code, version, .. }
        | ConnectError::Unreadable(_, code, version) => (*code, *version),
        ConnectError::Superseded => (ReasonCode::SessionTakenOver, ProtocolVersion::V5),
        ConnectError::Io(_)
        | ConnectError::Probe
        | ConnectError::Timeout
        | ConnectError::Malformed(_)
        | ConnectError::NotConnect => return,
    };
    let malformed = matches!(error, ConnectError::Unreadable(..))
        && code != ReasonCode::UnsupportedProtocolVersion;
    // Version 3 has no return code for a malformed packet: the connection is just closed.
    if malformed && !version.is_v5() || matches!(error, ConnectError::Superseded) {
        return;
    }
    let bytes = io.write(&Packet::ConnAck(Box::new(refusing_connack(code))), version);
    totals.packets_sent.of(PacketType::ConnAck).inc();
    listener.bytes_sent.add(bytes as u64);
    // The client may be gone; there is nobody else to tell.
    let _ = timeout(CLOSE_TIMEOUT, io.close()).await;
}

fn assigned_client_id() -> Arc<str> {
    let mut random = [0; 12];
    getrandom::fill(&mut random).expect("the system has random numbers");
    let hexadecimal: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("midge-{hexadecimal}").into()
}
