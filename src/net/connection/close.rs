//! Why connections end, and what clients and counters are told of it.

use std::io;

use super::Connection;
use crate::broker::Node;
use crate::metrics::{Closed, Rejected, Violation, Where};
use crate::mqtt::ReasonCode;
use crate::net::packet_io::ReadError;
use crate::session::ProtocolError;
use crate::store::StoreError;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum CloseReason {
    #[error("the client disconnected")]
    ClientDisconnected {
        with_will: bool,
        expiry_interval: Option<u32>,
    },
    #[error("the client closed the connection")]
    ClientClosed,
    #[error("{0}")]
    Io(io::Error),
    #[error("malformed packet: {0}")]
    Malformed(ReadError),
    #[error("protocol error: {0}")]
    Protocol(#[from] ProtocolError),
    #[error("nothing was heard of the client for one and a half times its keep alive")]
    KeepAliveTimeout,
    #[error("another connection has the same client id")]
    TakenOver,
    #[error("the client's queue is full")]
    QueueFull,
    #[error("the client's user is not let in any more")]
    AccessRevoked,
    #[error("the broker is shutting down")]
    Shutdown,
    #[error("the node is being drained")]
    Drained(ReasonCode),
    #[error("disconnected by the operator")]
    Kicked(ReasonCode),
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl CloseReason {
    /// Counts the end of a connection, established or not.
    pub(super) fn count(&self, node: &Node, connection: &Connection) {
        let totals = &node.totals;
        let listener = &connection.presence.listener;
        if let Some(violation) = self.violation() {
            totals.violations.of(violation).inc();
        }
        if matches!(self, Self::TakenOver) {
            let by = match connection.connected.mailbox.is_lost() {
                true => Where::Remote,
                false => Where::Local,
            };
            totals.sessions_taken_over.of(by).inc();
        }
        if connection.unanswered.is_some() {
            listener.rejected.of(self.rejected()).inc();
        } else {
            listener.closed.of(self.closed()).inc();
            let version = connection.session.version();
            listener.connections.of(version).dec();
        }
    }

    fn violation(&self) -> Option<Violation> {
        match self {
            Self::Malformed(_) | Self::Protocol(_) => self.reason_code().map(Violation::of),
            _ => None,
        }
    }

    fn closed(&self) -> Closed {
        match self {
            Self::ClientDisconnected {
                with_will: false, ..
            } => Closed::ClientDisconnect,
            Self::ClientDisconnected {
                with_will: true, ..
            } => Closed::ClientDisconnectWithWill,
            Self::ClientClosed | Self::Io(_) => Closed::NetworkError,
            Self::Malformed(ReadError::TooLarge { .. }) => Closed::PacketTooLarge,
            Self::Protocol(ProtocolError::ReceiveMaximumExceeded { .. }) => {
                Closed::ReceiveMaximumExceeded
            }
            Self::Malformed(_) | Self::Protocol(_) => Closed::ProtocolError,
            Self::KeepAliveTimeout => Closed::KeepAliveTimeout,
            Self::TakenOver => Closed::SessionTakenOver,
            Self::QueueFull => Closed::SlowConsumer,
            Self::AccessRevoked => Closed::NotAuthorized,
            Self::Shutdown | Self::Drained(_) => Closed::Drained,
            Self::Kicked(_) => Closed::Kicked,
            Self::Store(_) => Closed::StoreUnavailable,
        }
    }

    /// The same before CONNACK was sent.
    fn rejected(&self) -> Rejected {
        match self {
            Self::TakenOver => Rejected::SessionTakenOver,
            Self::AccessRevoked => Rejected::NotAuthorized,
            Self::Shutdown | Self::Drained(_) | Self::Kicked(_) => Rejected::Draining,
            Self::Store(_) => Rejected::StoreUnavailable,
            Self::Malformed(_) | Self::Protocol(_) => Rejected::Malformed,
            Self::ClientDisconnected { .. }
            | Self::ClientClosed
            | Self::Io(_)
            | Self::KeepAliveTimeout
            | Self::QueueFull => Rejected::NetworkError,
        }
    }

    pub(super) fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::ClientClosed,
            _ => Self::Io(error),
        }
    }

    /// What a version 5 client is told, section 3.14.2.1; nothing if it is gone.
    pub(super) fn reason_code(&self) -> Option<ReasonCode> {
        match self {
            Self::ClientDisconnected { .. } | Self::ClientClosed | Self::Io(_) => None,
            Self::Malformed(ReadError::Malformed(error)) => Some(error.reason_code()),
            Self::Malformed(ReadError::TooLarge { .. }) => Some(ReasonCode::PacketTooLarge),
            Self::Protocol(error) => Some(error.reason_code()),
            Self::KeepAliveTimeout => Some(ReasonCode::KeepAliveTimeout),
            Self::TakenOver => Some(ReasonCode::SessionTakenOver),
            Self::QueueFull => Some(ReasonCode::QuotaExceeded),
            Self::AccessRevoked => Some(ReasonCode::NotAuthorized),
            Self::Shutdown => Some(ReasonCode::ServerShuttingDown),
            Self::Drained(reason) | Self::Kicked(reason) => Some(*reason),
            Self::Store(_) => Some(ReasonCode::ServerUnavailable),
        }
    }
}
