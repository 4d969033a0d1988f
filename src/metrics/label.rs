//! The values that a label can have: closed sets, so that every series is there from the start and
//! no client can add one.

use std::marker::PhantomData;

use crate::mqtt::packet::PacketType;
use crate::mqtt::{ProtocolVersion, QoS, ReasonCode};

/// A closed set of values of one label.
pub(crate) trait Label: Copy + 'static {
    const ALL: &'static [Self];

    /// Its place in [`Label::ALL`].
    fn index(self) -> usize;

    /// As Prometheus sees it.
    fn name(self) -> &'static str;
}

/// One `T` for each value of a label.
#[derive(Debug)]
pub(crate) struct By<L, T> {
    values: Box<[T]>,
    label: PhantomData<fn(L)>,
}

impl<L: Label, T: Default> Default for By<L, T> {
    fn default() -> Self {
        Self {
            values: L::ALL.iter().map(|_| T::default()).collect(),
            label: PhantomData,
        }
    }
}

impl<L: Label, T> By<L, T> {
    pub(crate) fn of(&self, label: L) -> &T {
        &self.values[label.index()]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (L, &T)> {
        L::ALL.iter().copied().zip(&self.values)
    }
}

/// Makes an enum whose variants are the values of a label.
macro_rules! labels {
    ($($(#[$meta:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $text:literal,)+ })+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name {
            $($(#[$inner])* $variant,)+
        }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn index(self) -> usize {
                self as usize
            }

            fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    )+};
}

labels! {
    /// Who publishes.
    Source {
        Client = "client",
        Will = "will",
        Api = "api",
        /// The program that midge is embedded in.
        Program = "program",
    }

    /// Why an established connection ended.
    Closed {
        ClientDisconnect = "client_disconnect",
        ClientDisconnectWithWill = "client_disconnect_with_will",
        /// Without DISCONNECT.
        NetworkError = "network_error",
        KeepAliveTimeout = "keepalive_timeout",
        SessionTakenOver = "session_taken_over",
        Kicked = "kicked",
        /// The node was drained, or stopped.
        Drained = "drained",
        ProtocolError = "protocol_error",
        PacketTooLarge = "packet_too_large",
        ReceiveMaximumExceeded = "receive_maximum_exceeded",
        SlowConsumer = "slow_consumer",
        /// The client's user is not let in any more.
        NotAuthorized = "not_authorized",
        StoreUnavailable = "store_unavailable",
    }

    /// Why a connection was not established.
    Rejected {
        BadCredentials = "bad_credentials",
        NotAuthorized = "not_authorized",
        AuthUnavailable = "auth_unavailable",
        UnsupportedVersion = "unsupported_version",
        ClientIdInvalid = "client_id_invalid",
        /// Something else that CONNECT asked for cannot be had.
        NotSupported = "not_supported",
        ConnectionLimit = "connection_limit",
        RateLimited = "rate_limited",
        Overloaded = "overloaded",
        Draining = "draining",
        StoreUnavailable = "store_unavailable",
        SessionTakenOver = "session_taken_over",
        TlsFailed = "tls_failed",
        WebSocketFailed = "websocket_failed",
        ProxyProtocolInvalid = "proxy_protocol_invalid",
        ConnectTimeout = "connect_timeout",
        Malformed = "malformed",
        NotMqtt = "not_mqtt",
        NetworkError = "network_error",
    }

    /// Why a message will never be delivered to a session.
    Dropped {
        QueueFull = "queue_full",
        Expired = "expired",
        /// QoS 0 for a client that does not take messages quickly enough.
        NotWritable = "qos0_not_writable",
        TooLarge = "too_large",
        AclDenied = "acl_denied",
    }

    /// How a client says who it is.
    Method {
        Anonymous = "anonymous",
        Password = "password",
        Certificate = "certificate",
    }

    /// What came of an authentication.
    Authentication {
        Allowed = "allowed",
        Denied = "denied",
        Error = "error",
    }

    /// What came of an authorization.
    Authorization {
        Allowed = "allowed",
        Denied = "denied",
    }

    /// What a client wants to do.
    Asked {
        Publish = "publish",
        Subscribe = "subscribe",
        /// Asked only where rules restrict what is forwarded to clients.
        Receive = "receive",
    }

    /// Why a client is not read from.
    Throttle {
        PublishRate = "publish_rate",
        /// Memory is short.
        Overload = "overload",
        /// Of a client that takes messages more slowly than this one publishes them.
        SlowSubscriber = "slow_subscriber",
        /// What it has published is not yet durable.
        Store = "store",
        /// It does not read what is sent to it.
        Output = "output",
    }

    /// Of lines of the log.
    Level {
        Warn = "warn",
        Error = "error",
    }

    FilterKind {
        Exact = "exact",
        Wildcard = "wildcard",
        Shared = "shared",
    }

    /// Where a session was last.
    Where {
        Local = "local",
        Remote = "remote",
    }

    Persistence {
        Persistent = "true",
        Clean = "false",
    }

    Direction {
        Inbound = "inbound",
        Outbound = "outbound",
    }

    /// What nodes tell each other.
    Traffic {
        /// For sessions that have no inbox.
        Publish = "publish",
        /// For inboxes.
        Deliver = "deliver",
        /// What need not be written, because it was acknowledged in time.
        Elision = "elision",
        /// Who has which session.
        Session = "session",
        /// Who wants what.
        Subscription = "subscription",
        /// What each has counted, for `$SYS`.
        Figures = "figures",
        /// Who of a share group is where, and what has become of its messages.
        ShareGroup = "share_group",
    }

    /// Why the bus did not take frames.
    BusFailure {
        Timeout = "timeout",
        Error = "error",
        /// They waited for too long, or were too large, and were left out.
        LeftOut = "left_out",
    }

    /// What is asked of the store.
    Operation {
        /// A group commit.
        Write = "write",
        ReadInbox = "read_inbox",
        ReadRetained = "read_retained",
        OpenSession = "open_session",
        Heartbeat = "heartbeat",
    }

    /// What came of it.
    Outcome {
        Ok = "ok",
        Error = "error",
    }

    /// The Reason Codes of violations of the specification.
    Violation {
        MalformedPacket = "malformed_packet",
        ProtocolError = "protocol_error",
        ReceiveMaximumExceeded = "receive_maximum_exceeded",
        TopicAliasInvalid = "topic_alias_invalid",
        TopicNameInvalid = "topic_name_invalid",
        PacketTooLarge = "packet_too_large",
    }
}

impl Violation {
    /// What is answered to it.
    pub(crate) fn of(reason: ReasonCode) -> Self {
        match reason {
            ReasonCode::MalformedPacket => Self::MalformedPacket,
            ReasonCode::ReceiveMaximumExceeded => Self::ReceiveMaximumExceeded,
            ReasonCode::TopicAliasInvalid => Self::TopicAliasInvalid,
            ReasonCode::TopicNameInvalid => Self::TopicNameInvalid,
            ReasonCode::PacketTooLarge => Self::PacketTooLarge,
            _ => Self::ProtocolError,
        }
    }
}

impl Label for QoS {
    const ALL: &'static [Self] = &[Self::AtMostOnce, Self::AtLeastOnce, Self::ExactlyOnce];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::AtMostOnce => "0",
            Self::AtLeastOnce => "1",
            Self::ExactlyOnce => "2",
        }
    }
}

impl Label for PacketType {
    const ALL: &'static [Self] = &[
        Self::Connect,
        Self::ConnAck,
        Self::Publish,
        Self::PubAck,
        Self::PubRec,
        Self::PubRel,
        Self::PubComp,
        Self::Subscribe,
        Self::SubAck,
        Self::Unsubscribe,
        Self::UnsubAck,
        Self::PingReq,
        Self::PingResp,
        Self::Disconnect,
        Self::Auth,
    ];

    fn index(self) -> usize {
        self as usize - 1
    }

    fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::ConnAck => "connack",
            Self::Publish => "publish",
            Self::PubAck => "puback",
            Self::PubRec => "pubrec",
            Self::PubRel => "pubrel",
            Self::PubComp => "pubcomp",
            Self::Subscribe => "subscribe",
            Self::SubAck => "suback",
            Self::Unsubscribe => "unsubscribe",
            Self::UnsubAck => "unsuback",
            Self::PingReq => "pingreq",
            Self::PingResp => "pingresp",
            Self::Disconnect => "disconnect",
            Self::Auth => "auth",
        }
    }
}

impl Label for ProtocolVersion {
    const ALL: &'static [Self] = &[Self::V3_1, Self::V3_1_1, Self::V5];

    fn index(self) -> usize {
        match self {
            Self::V3_1 => 0,
            Self::V3_1_1 => 1,
            Self::V5 => 2,
        }
    }

    /// The Protocol Version byte of CONNECT.
    fn name(self) -> &'static str {
        match self {
            Self::V3_1 => "3",
            Self::V3_1_1 => "4",
            Self::V5 => "5",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_of_a_label_has_its_own_place_and_name() {
        fn check<L: Label>() {
            for (index, label) in L::ALL.iter().enumerate() {
                assert_eq!(label.index(), index);
                let namesakes = L::ALL.iter().filter(|other| other.name() == label.name());
                assert_eq!(namesakes.count(), 1, "{}", label.name());
            }
        }

        check::<Closed>();
        check::<Rejected>();
        check::<PacketType>();
        check::<QoS>();
        check::<ProtocolVersion>();
    }
}
