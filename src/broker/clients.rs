//! Every session by its client id: connected, or waiting for its client to come back.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::inspect::Presence;
use super::mailbox::{Mailbox, Order};
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{ProtocolVersion, SubscriptionFilter};
use crate::session::Exchanges;
use crate::store::SessionRecord;

/// The subscriptions of one session.
pub(crate) type SessionSubscriptions = HashMap<SubscriptionFilter, (SubscribeOptions, Option<u32>)>;

/// A session without a connection.
#[derive(Debug)]
pub(crate) struct Detached {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) subscriptions: SessionSubscriptions,
    pub(crate) exchanges: Exchanges,
    pub(crate) record: SessionRecord,
    /// Of its last connection.
    pub(super) epoch: u64,
}

/// All sessions of this node.
pub(crate) struct Clients {
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    /// No connection may have a session any more.
    closed: AtomicBool,
}

type Shard = HashMap<Arc<str>, Slot>;

enum Slot {
    Connected {
        mailbox: Arc<Mailbox>,
        /// Absent until the connection has introduced itself.
        presence: Option<Arc<Presence>>,
        /// The connection that is to have the session next.
        successor: Option<oneshot::Sender<Option<Box<Detached>>>>,
    },
    Detached(Box<Detached>),
}

const SHARDS: usize = 64;

/// What an onlooker sees of a session.
#[derive(Debug)]
pub(super) enum Seen {
    Connected {
        mailbox: Arc<Mailbox>,
        presence: Option<Arc<Presence>>,
    },
    Detached {
        mailbox: Arc<Mailbox>,
        version: ProtocolVersion,
        expiry_interval: u32,
        ends_at: Option<u64>,
        in_flight: u16,
    },
}

/// A session that a connection now has for itself.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) mailbox: Arc<Mailbox>,
    /// What there is to go on with; without it the session is new.
    pub(crate) resumed: Option<Box<Detached>>,
    /// An older session of the client that has to be ended.
    pub(crate) ended: Option<Box<Detached>>,
    /// Whether another connection had it, and was told to end.
    pub(crate) was_taken_over: bool,
}

enum Attempt {
    Claimed(Claim),
    /// The node is going down.
    Refused,
    /// A connection has the session and was told to end.
    WaitFor(oneshot::Receiver<Option<Box<Detached>>>),
}

/// Another connection with the same client id came while this one waited, or the node is going
/// down.
#[derive(Debug)]
pub(crate) struct Superseded;

impl Clients {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// Takes the session of a client, away from a connection that has it, [MQTT-3.1.4-3]. A session
    /// that is there goes on if `resumes` says so; otherwise `create` makes a new one.
    ///
    /// The future must be run to its end: dropping it may lose the session.
    pub(crate) async fn claim(
        &self,
        client_id: &Arc<str>,
        resumes: impl Fn(&Detached) -> bool,
        create: impl Fn() -> Arc<Mailbox>,
    ) -> Result<Claim, Superseded> {
        let mut handed_over = None;
        loop {
            match self.try_claim(client_id, &resumes, &create, handed_over) {
                Attempt::Claimed(claim) => return Ok(claim),
                Attempt::Refused => return Err(Superseded),
                Attempt::WaitFor(predecessor) => {
                    handed_over = Some(predecessor.await.map_err(|_| Superseded)?);
                }
            }
        }
    }

    /// `handed_over` is what a connection that had the session gave up, which may be nothing.
    fn try_claim(
        &self,
        client_id: &Arc<str>,
        resumes: impl Fn(&Detached) -> bool,
        create: impl Fn() -> Arc<Mailbox>,
        handed_over: Option<Option<Box<Detached>>>,
    ) -> Attempt {
        let mut shard = self.shard(client_id).lock();
        if self.closed.load(Ordering::Acquire) {
            return Attempt::Refused;
        }
        let mut successor = None;
        let was_taken_over = handed_over.is_some();
        let found = match (handed_over, shard.remove(client_id)) {
            (None, None) => None,
            (None, Some(Slot::Detached(detached))) => Some(detached),
            (
                None,
                Some(Slot::Connected {
                    mailbox, presence, ..
                }),
            ) => {
                let (sender, receiver) = oneshot::channel();
                mailbox.give(Order::TakenOver);
                shard.insert(
                    client_id.clone(),
                    Slot::Connected {
                        mailbox,
                        presence,
                        successor: Some(sender),
                    },
                );
                return Attempt::WaitFor(receiver);
            }
            (Some(found), slot) => {
                // Meanwhile somebody may wait for this connection to end already.
                if let Some(Slot::Connected {
                    successor: next, ..
                }) = slot
                {
                    successor = next;
                }
                found
            }
        };
        let (resumed, ended) = match found {
            Some(detached) if resumes(&detached) => (Some(detached), None),
            found => (None, found),
        };
        let mailbox = resumed
            .as_ref()
            .map_or_else(create, |detached| detached.mailbox.clone());
        mailbox.clear_order();
        if successor.is_some() {
            mailbox.give(Order::TakenOver);
        }
        shard.insert(
            client_id.clone(),
            Slot::Connected {
                mailbox: mailbox.clone(),
                presence: None,
                successor,
            },
        );
        Attempt::Claimed(Claim {
            mailbox,
            resumed,
            ended,
            was_taken_over,
        })
    }

    /// The claimed session turns out to have this mailbox. It is not taken over by whoever had it
    /// before.
    pub(super) fn rebind(&self, client_id: &Arc<str>, mailbox: &Arc<Mailbox>) {
        let mut shard = self.shard(client_id).lock();
        if let Some(Slot::Connected {
            mailbox: claimed,
            successor,
            ..
        }) = shard.get_mut(client_id)
        {
            let order = claimed.order();
            *claimed = mailbox.clone();
            mailbox.clear_order();
            if successor.is_some() {
                mailbox.give(Order::TakenOver);
            } else if let Some(order) = order.filter(|order| *order != Order::TakenOver) {
                mailbox.give(order);
            }
        }
    }

    /// The mailbox of a client that is connected here.
    pub(super) fn connected(&self, client_id: &str) -> Option<Arc<Mailbox>> {
        match self.shard(client_id).lock().get(client_id) {
            Some(Slot::Connected { mailbox, .. }) => Some(mailbox.clone()),
            _ => None,
        }
    }

    /// Says what there is to know of the connection that has the session.
    pub(crate) fn introduce(&self, mailbox: &Arc<Mailbox>, known: &Arc<Presence>) {
        let mut shard = self.shard(&mailbox.client_id).lock();
        if let Some(Slot::Connected {
            mailbox: own,
            presence,
            ..
        }) = shard.get_mut(&mailbox.client_id)
            && Arc::ptr_eq(own, mailbox)
        {
            *presence = Some(known.clone());
        }
    }

    /// How many parts [`Clients::visit_part`] knows.
    pub(super) const PARTS: usize = SHARDS;

    /// Shows the sessions of one part of all: their mailboxes, what is known of their connections, and
    /// whether they have one.
    pub(super) fn visit_part(
        &self,
        part: usize,
        mut visit: impl FnMut(&Mailbox, Option<&Presence>, bool),
    ) {
        for slot in self.shards[part].lock().values() {
            match slot {
                Slot::Connected {
                    mailbox, presence, ..
                } => visit(mailbox, presence.as_deref(), true),
                Slot::Detached(detached) => visit(&detached.mailbox, None, false),
            }
        }
    }

    /// Shows each client id, and whether its client is connected, in no order.
    pub(super) fn visit_ids(&self, mut visit: impl FnMut(&Arc<str>, bool)) {
        for shard in &self.shards {
            for (client_id, slot) in shard.lock().iter() {
                visit(client_id, matches!(slot, Slot::Connected { .. }));
            }
        }
    }

    /// What there is of a client.
    pub(super) fn see(&self, client_id: &str) -> Option<Seen> {
        Some(match self.shard(client_id).lock().get(client_id)? {
            Slot::Connected {
                mailbox, presence, ..
            } => Seen::Connected {
                mailbox: mailbox.clone(),
                presence: presence.clone(),
            },
            Slot::Detached(detached) => Seen::Detached {
                mailbox: detached.mailbox.clone(),
                version: detached.record.version,
                expiry_interval: detached.record.expiry_interval,
                ends_at: detached.record.ends_at,
                in_flight: detached.exchanges.outbound.count(),
            },
        })
    }

    /// Gives the session back when its connection has ended; `None` if it ended with it.
    pub(crate) fn release(&self, client_id: &Arc<str>, detached: Option<Box<Detached>>) {
        let mut shard = self.shard(client_id).lock();
        let successor = match shard.get_mut(client_id) {
            Some(Slot::Connected { successor, .. }) => successor.take(),
            _ => None,
        };
        let detached = match successor {
            Some(successor) => match successor.send(detached) {
                Ok(()) => return,
                Err(detached) => detached,
            },
            None => detached,
        };
        match detached {
            Some(detached) => {
                shard.insert(client_id.clone(), Slot::Detached(detached));
            }
            None => {
                shard.remove(client_id);
            }
        }
    }

    /// Adds a session read from the store.
    pub(crate) fn restore(&self, client_id: &Arc<str>, detached: Box<Detached>) {
        self.shard(client_id)
            .lock()
            .insert(client_id.clone(), Slot::Detached(detached));
    }

    /// Shows a session without a connection to `look`, which may take it away by returning true.
    pub(crate) fn with_detached(
        &self,
        client_id: &str,
        look: impl FnOnce(&mut Detached) -> bool,
    ) -> Option<Box<Detached>> {
        let mut shard = self.shard(client_id).lock();
        let Some(Slot::Detached(detached)) = shard.get_mut(client_id) else {
            return None;
        };
        if !look(detached) {
            return None;
        }
        match shard.remove(client_id) {
            Some(Slot::Detached(detached)) => Some(detached),
            _ => None,
        }
    }

    /// Tells every connection to end, and lets no other begin.
    pub(crate) fn close(&self, order: Order) {
        self.closed.store(true, Ordering::Release);
        self.order_connected(order);
    }

    /// Of all clients that are connected.
    pub(crate) fn connected_mailboxes(&self) -> Vec<Arc<Mailbox>> {
        let mut mailboxes = Vec::new();
        for shard in &self.shards {
            for slot in shard.lock().values() {
                if let Slot::Connected { mailbox, .. } = slot {
                    mailboxes.push(mailbox.clone());
                }
            }
        }
        mailboxes
    }

    pub(crate) fn order_connected(&self, order: Order) {
        for shard in &self.shards {
            for slot in shard.lock().values() {
                if let Slot::Connected { mailbox, .. } = slot {
                    mailbox.give(order);
                }
            }
        }
    }

    /// Sessions with and without a connection.
    pub(crate) fn count(&self) -> (u64, u64) {
        let mut counts = (0, 0);
        for shard in &self.shards {
            for slot in shard.lock().values() {
                match slot {
                    Slot::Connected { .. } => counts.0 += 1,
                    Slot::Detached(_) => counts.1 += 1,
                }
            }
        }
        counts
    }

    fn shard(&self, client_id: &str) -> &Mutex<Shard> {
        &self.shards[self.hasher.hash_one(client_id) as usize % SHARDS]
    }
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clients")
    }
}
