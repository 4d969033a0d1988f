//! Durability: the port to whatever keeps sessions, inboxes, retained messages and wills.
//!
//! Owns the contract and the names of what is stored; the adapters own their formats. It decides
//! nothing: what to write and when is the flush's business (`broker::flush`). All adapters pass
//! the suite in `store::contract`.
//!
//! Start reading at [`Store`].

pub(crate) mod embedded;
pub(crate) mod memory;
pub(crate) mod metered;
pub(crate) mod mongodb;

mod format;

#[cfg(test)]
mod contract;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::metrics::Operation;
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{Message, PacketId, ProtocolVersion, QoS, SubscriptionFilter};

pub(crate) use self::format::{log_op_value, read_log_op};

/// Durable state of all sessions. One writer: `write` is never called twice at a time.
#[async_trait]
pub(crate) trait Store: fmt::Debug + Send + Sync {
    /// Everything needed to serve after a restart, except the messages that wait in inboxes, in no
    /// particular order. Called before the first `write`.
    ///
    /// # Errors
    /// `StoreError` if what is stored cannot be read; nothing must be served then.
    async fn load(&self) -> Result<Stored, StoreError>;

    /// Applies `changes` in order, all or none; on `Ok` they survive the loss of power.
    ///
    /// Each change may be applied twice without harm: replacing what is there, removing what is not.
    /// What belongs to a session counts from the [`Change::SaveSession`] that makes it to its
    /// [`Change::EndSession`]; whatever is written for it before or after may be forgotten, and is
    /// never read again once it has ended. A caller that stops waiting does not undo the write.
    ///
    /// If one of other nodes' subscription logs is longer when this is written than the [`Messages`]
    /// had been matched up to, nothing counts and [`Written::behind`] says so.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; the caller must acknowledge nothing of it. After
    /// [`StoreError::Unavailable`] the same changes, in the same `Arc`, may be written again, and
    /// nothing else before; after any other error
    /// later writes may fail for the same reason.
    async fn write(
        &self,
        changes: Arc<Vec<Change>>,
        messages: Messages,
    ) -> Result<Written, StoreError>;

    /// The chunks of an inbox in key order, from the one whose key is `range.from` or follows it,
    /// up to but without the key `range.before`; as many as fit into `range.bytes_max` (the sum of
    /// [`Message::len`]), but at least one if there is any. Sees every change of a `write` that has
    /// returned, and of one that has not either all or none.
    ///
    /// Give the oldest key that can still be there as `range.from`: finding the first chunk may
    /// cost time for every one that was removed before it.
    ///
    /// # Errors
    /// `StoreError` if they cannot be read; none of them is lost.
    async fn read_inbox(&self, range: InboxRange) -> Result<Vec<Chunk>, StoreError>;

    /// Notes that this is asked again, which was not available before.
    fn note_retry(&self, _operation: Operation) {}

    /// What it is, in the words of `store.kind`.
    fn kind(&self) -> &'static str;

    /// Finishes the writes and reads that have begun; afterwards another process may open the same
    /// data. The last call to a store.
    async fn close(&self);
}

/// The outside failed us.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("{path}: {reason}")]
    Unusable { path: String, reason: String },
    #[error("{path} is in use by another midge")]
    InUse { path: String },
    #[error("store: {0}")]
    Io(String),
    #[error("store: {what} is damaged")]
    Damaged { what: &'static str },
    /// For now: what failed may succeed when it is tried again.
    #[error("store: not available: {0}")]
    Unavailable(String),
    /// Other nodes have declared this one dead: nothing that it does counts any more.
    #[error("store: this node was declared dead")]
    Fenced,
}

impl StoreError {
    /// Whether the same may succeed later, without a new start: by itself, or, of what has been
    /// usable, when somebody mends it. Until then nothing of it may be acknowledged.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Unusable { .. } => true,
            Self::InUse { .. } | Self::Io(_) | Self::Damaged { .. } | Self::Fenced => false,
        }
    }
}

/// What of a write is for subscribers, whom other nodes may have more of.
#[derive(Clone, Debug)]
pub(crate) enum Messages {
    /// Nothing.
    Absent,
    /// There may be something.
    Present,
    /// All of them have been matched with what other nodes had logged up to there.
    MatchedTo(Vec<LogPosition>),
}

/// What a write came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Written {
    /// Sessions that another node has taken since, or that became too large for the store: of the
    /// changes that are theirs, nothing was written.
    pub(crate) lost: Vec<SessionId>,
    /// The messages have to be matched with `subscriptions` before anything of it counts.
    pub(crate) behind: bool,
    /// How far the subscription log of each node that is alive had come when the write was
    /// durable; empty if this node is the only one, or nobody has to know.
    pub(crate) subscriptions: Vec<LogPosition>,
    /// What it has added to the log of this node.
    pub(crate) logged: Vec<LogEntry>,
}

/// The last entry of a node's subscription log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LogPosition {
    pub(crate) node: u32,
    pub(crate) entry: u64,
}

/// One entry of a node's subscription log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogEntry {
    pub(crate) position: LogPosition,
    pub(crate) ops: Vec<LogOp>,
}

/// What happened to the subscriptions of `session`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogOp {
    pub(crate) session: SessionId,
    /// The entries of one node are in order. For what two nodes did to one session, the higher
    /// epoch is the later.
    pub(crate) epoch: u64,
    pub(crate) action: LogAction,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LogAction {
    Subscribe {
        owner: Owner,
        filter: SubscriptionFilter,
        options: SubscribeOptions,
        identifier: Option<u32>,
    },
    Unsubscribe(SubscriptionFilter),
    /// A share group has an inbox from now on: that of the session.
    OpenGroup(SubscriptionFilter),
    /// Nothing is ever to be written to its inbox again.
    End,
}

/// One incarnation of a session. A clean start makes a new one, so that whatever was written for
/// the old one can never be read again. No id is ever used for a second one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SessionId(pub(crate) [u8; 12]);

impl SessionId {
    pub(crate) fn random() -> Self {
        let mut id = [0; 12];
        getrandom::fill(&mut id).expect("the system has random numbers");
        Self(id)
    }
}

/// Where a message stands among all messages: the key order of every inbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct MessageId {
    /// Hybrid logical clock of its flush: 48 bits of Unix milliseconds, 16 bits of counter.
    pub(crate) hlc: u64,
    /// The node that accepted it.
    pub(crate) node: u32,
    /// Its place in the flush.
    pub(crate) index: u16,
}

/// Who a session belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Owner {
    Client(Arc<str>),
    /// The subscribers of `$share/{share}/{filter}`, who empty one inbox together.
    Group(SubscriptionFilter),
}

/// What is kept of a session besides its subscriptions and messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub(crate) owner: Owner,
    pub(crate) session: SessionId,
    pub(crate) version: ProtocolVersion,
    /// Whether a Network Connection is open.
    pub(crate) connected: bool,
    /// Seconds that it outlives its connection; `u32::MAX` is for ever.
    pub(crate) expiry_interval: u32,
    /// Unix milliseconds at which it ends; absent while connected, or if it never does.
    pub(crate) ends_at: Option<u64>,
    pub(crate) will: Option<WillRecord>,
    /// The clock value of the node that saved it: what the client published there has smaller ones.
    /// Kept only where other nodes may take the session.
    pub(crate) clock: u64,
}

/// A Will that may still have to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WillRecord {
    /// `expires_at` of the message is not set: its Message Expiry Interval starts when it is published.
    pub(crate) message: Message,
    /// Seconds.
    pub(crate) message_expiry_interval: Option<u32>,
    /// Seconds.
    pub(crate) delay_interval: u32,
    /// Unix milliseconds at which it is to be published; absent while connected.
    pub(crate) due_at: Option<u64>,
    /// For the authorisation when it is published.
    pub(crate) user_name: Option<Arc<str>>,
}

/// One message waiting for one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: MessageId,
    /// The QoS it is to be delivered with: 1 or 2.
    pub(crate) qos: QoS,
    /// The RETAIN flag it is to be delivered with.
    pub(crate) retain: bool,
    pub(crate) subscription_identifiers: Option<Arc<[u32]>>,
    pub(crate) message: Message,
}

/// The messages of one flush for one session: one stored value. Its key is the id of the first
/// entry that it was written with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) key: MessageId,
    /// In order; never empty.
    pub(crate) entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct InboxRange {
    pub(crate) session: SessionId,
    pub(crate) from: MessageId,
    pub(crate) before: MessageId,
    pub(crate) bytes_max: usize,
}

/// A retained message, and who published it: a subscription with No Local must not get it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Retained {
    pub(crate) message: Message,
    pub(crate) publisher: Arc<str>,
}

/// An outgoing QoS 2 exchange: which message a Packet Identifier stands for until PUBCOMP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutgoingExchange {
    pub(crate) packet_id: PacketId,
    /// The session in whose inbox the message lies: its own, or that of a share group.
    pub(crate) inbox: SessionId,
    pub(crate) message: MessageId,
    /// PUBREC has come; only PUBREL and PUBCOMP are left.
    pub(crate) received: bool,
}

/// One thing to make durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Creates or replaces the record of `record.session`.
    SaveSession(Box<SessionRecord>),
    /// Removes a session with its subscriptions, exchanges and inbox. The inbox may be emptied
    /// later, in the background, but can no longer be read.
    EndSession(SessionId),
    Subscribe {
        session: SessionId,
        filter: SubscriptionFilter,
        options: SubscribeOptions,
        identifier: Option<u32>,
    },
    Unsubscribe {
        session: SessionId,
        filter: SubscriptionFilter,
    },
    /// Adds a chunk to an inbox, or replaces the one of the same key.
    Enqueue {
        session: SessionId,
        chunk: Chunk,
        /// The session of whoever published it, if nothing may be written once another node has
        /// taken that.
        guard: Option<SessionId>,
    },
    /// Replaces a chunk by what of it has not been acknowledged, if it is still there.
    Shorten { session: SessionId, chunk: Chunk },
    /// Removes a chunk whose messages are all done with.
    Dequeue {
        session: SessionId,
        key: MessageId,
        /// The session of the member of a share group whose exchange ends with it: neither may be
        /// written without the other, nor once another node has taken that session, unless the group
        /// is done with the chunk as well.
        guard: Option<SessionId>,
    },
    /// An incoming QoS 2 PUBLISH was accepted: its identifier is in use until PUBREL.
    AwaitRelease {
        session: SessionId,
        packet_id: PacketId,
    },
    Release {
        session: SessionId,
        packet_id: PacketId,
    },
    /// Creates or replaces the exchange of `exchange.packet_id`.
    SaveExchange {
        session: SessionId,
        exchange: OutgoingExchange,
    },
    EndExchange {
        session: SessionId,
        packet_id: PacketId,
    },
    /// Replaces the retained message of its topic, unless that was written later.
    Retain { retained: Retained, at: MessageId },
    /// Removes the retained message of a topic, unless that was written later.
    ClearRetained { topic: Arc<str>, at: MessageId },
}

/// All that a restarted broker has to know.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    pub(crate) sessions: Vec<StoredSession>,
    pub(crate) retained: Vec<Retained>,
    /// The largest clock value in the key of any chunk and the message of any exchange; new ones
    /// must be greater. Zero if there are none.
    pub(crate) last_hlc: u64,
}

#[derive(Debug)]
pub(crate) struct StoredSession {
    pub(crate) record: SessionRecord,
    pub(crate) subscriptions: Vec<StoredSubscription>,
    pub(crate) awaiting_release: Vec<PacketId>,
    pub(crate) exchanges: Vec<OutgoingExchange>,
    pub(crate) inbox: InboxSummary,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredSubscription {
    pub(crate) filter: SubscriptionFilter,
    pub(crate) options: SubscribeOptions,
    pub(crate) identifier: Option<u32>,
}

/// What waits in an inbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct InboxSummary {
    /// The key of the first chunk: reading from here skips what deletions left behind.
    pub(crate) head: Option<MessageId>,
    pub(crate) messages: u64,
    /// The sum of [`Message::len`].
    pub(crate) bytes: u64,
}

impl Change {
    /// The session that the change is to; messages for an inbox are to nobody's.
    pub(crate) fn session(&self) -> Option<SessionId> {
        match self {
            Self::SaveSession(record) => Some(record.session),
            Self::EndSession(session)
            | Self::Subscribe { session, .. }
            | Self::Unsubscribe { session, .. }
            | Self::AwaitRelease { session, .. }
            | Self::Release { session, .. }
            | Self::SaveExchange { session, .. }
            | Self::EndExchange { session, .. } => Some(*session),
            Self::Enqueue { .. }
            | Self::Dequeue { .. }
            | Self::Shorten { .. }
            | Self::Retain { .. }
            | Self::ClearRetained { .. } => None,
        }
    }

    /// The chunk that is not written if these sessions are another node's.
    pub(crate) fn guarded_by(&self, sessions: &[SessionId]) -> Option<MessageId> {
        match self {
            Self::Enqueue {
                chunk,
                guard: Some(guard),
                ..
            } if sessions.contains(guard) => Some(chunk.key),
            _ => None,
        }
    }
}

impl MessageId {
    pub(crate) const MIN: Self = Self {
        hlc: 0,
        node: 0,
        index: 0,
    };
    pub(crate) const MAX: Self = Self {
        hlc: u64::MAX,
        node: u32::MAX,
        index: u16::MAX,
    };

    /// The next key that can be.
    pub(crate) fn successor(self) -> Self {
        match (self.index.checked_add(1), self.node.checked_add(1)) {
            (Some(index), _) => Self { index, ..self },
            (None, Some(node)) => Self {
                node,
                index: 0,
                ..self
            },
            (None, None) => Self {
                hlc: self.hlc + 1,
                ..Self::MIN
            },
        }
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
