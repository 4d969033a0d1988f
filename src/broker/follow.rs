//! The persistent subscriptions of the whole cluster: every node knows them all.
//!
//! A node loads them when it starts, and follows the logs of the others from then on. One that writes
//! a message asks the store which subscriptions have been logged until then, and writes it once more
//! for those that it did not know of ([`Node::missed`]).

use std::collections::HashMap;
use std::sync::Arc;

use super::Node;
use super::flush::{Matched, MissedIds};
use super::mailbox::Mailbox;
use super::sessions::Connected;
use super::shared::{self, Learned, Noted, Place};
use crate::bus::wire::Item;
use crate::cluster::Cluster;
use crate::metrics::Arrival;
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{Message, QoS, SubscriptionFilter};
use crate::session::Origin;
use crate::store::mongodb::{GroupPlace, SharedSession};
use crate::store::{
    Chunk, InboxSummary, LogAction, LogEntry, LogOp, LogPosition, Owner, SessionId, StoreError,
};

/// Operations of a log entry that other nodes are told of; they read what has more.
const ANNOUNCED_OPS_MAX: usize = 32;

/// How much of each node's subscription log is in the subscriptions.
#[derive(Default)]
pub(super) struct Followed(
    #[expect(
        clippy::disallowed_types,
        reason = "held while the store is read, so that entries are applied once and in order"
    )]
    tokio::sync::Mutex<HashMap<u32, u64>>,
);

/// How far this node has followed the subscriptions of others.
#[derive(Default)]
pub(super) struct Known {
    /// Of the subscriptions that have it.
    pub(super) version: u64,
    /// How much of other nodes' logs is in them.
    pub(super) followed: Vec<LogPosition>,
}

/// A message that is missing in an inbox.
pub(super) struct MissedChunk {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) chunk: Chunk,
    /// As the message's own.
    pub(super) guard: Option<SessionId>,
}

impl Node {
    /// Takes up all sessions of the cluster as the node starts.
    pub(crate) async fn load_shared(&self, cluster: &Cluster) -> Result<(), StoreError> {
        let mut followed = self.followed.0.lock().await;
        let positions = cluster
            .store
            .load_subscriptions(|session| self.take_up(session))
            .await?;
        followed.extend(
            positions
                .iter()
                .map(|position| (position.node, position.entry)),
        );
        Ok(())
    }

    fn take_up(&self, session: SharedSession) {
        let client_id = match &session.owner {
            Owner::Client(client_id) => client_id,
            Owner::Group(filter) => return self.take_up_group(filter, &session),
        };
        let place = Place {
            session: Some(session.session),
            epoch: session.epoch,
            node: session.node.filter(|node| *node != self.flusher.node),
        };
        let mailbox = self.shared.mailbox_or(session.session, || {
            self.shared_mailbox(session.session, client_id.clone())
        });
        self.place(&mailbox, place);
        for subscription in session.subscriptions {
            self.learn(
                &mailbox,
                session.epoch,
                subscription.filter,
                subscription.options,
                subscription.identifier,
            );
        }
    }

    fn take_up_group(&self, filter: &SubscriptionFilter, session: &SharedSession) {
        let group = self.learn_group(filter, session.session, session.epoch);
        let node = session.node.filter(|node| *node != self.flusher.node);
        if let (Some(group), Some(node)) = (group, node) {
            let place = GroupPlace {
                session: session.session,
                epoch: session.epoch,
                node,
                is_saved: true,
            };
            self.place_group(&group, place);
        }
    }

    /// Tells other nodes how this one has changed subscriptions, and asks when they know it: some
    /// client may wait for that.
    pub(super) fn announce_log(&self, entries: Vec<LogEntry>) {
        let Some(cluster) = self.cluster.as_ref().filter(|_| !entries.is_empty()) else {
            return;
        };
        for mut entry in entries {
            if entry.ops.len() > ANNOUNCED_OPS_MAX {
                entry.ops.clear();
            }
            cluster.broadcast(&Item::Log(entry));
        }
        self.ask(cluster);
    }

    /// Notes what a client of this node subscribes to, for when it is at another one.
    pub(super) fn note_subscription(
        &self,
        connected: &Connected,
        filter: &SubscriptionFilter,
        terms: Option<shared::Terms>,
        is_new: bool,
    ) {
        if self.cluster.is_none() {
            return;
        }
        let mailbox = &connected.mailbox;
        if mailbox.is_durable() {
            self.shared
                .note(mailbox.session, filter, connected.epoch, terms);
        } else if is_new {
            self.want(filter, terms.is_some());
        }
    }

    /// Follows the logs of other nodes up to `positions`, at least.
    pub(super) async fn follow_to(&self, positions: &[LogPosition]) -> Result<Known, StoreError> {
        let Some(cluster) = &self.cluster else {
            return Ok(Known::default());
        };
        self.follow(cluster, positions).await?;
        // While nothing more is followed: both are of the same moment.
        let followed = self.followed.0.lock().await;
        let positions = followed.iter();
        Ok(Known {
            followed: positions
                .map(|(node, entry)| LogPosition {
                    node: *node,
                    entry: *entry,
                })
                .collect(),
            version: self.subscriptions.version(),
        })
    }

    /// Applies an entry that another node has told of, after all that came before it.
    pub(crate) async fn follow_announced(
        &self,
        cluster: &Cluster,
        entry: LogEntry,
    ) -> Result<(), StoreError> {
        let LogPosition {
            node,
            entry: number,
        } = entry.position;
        {
            let mut followed = self.followed.0.lock().await;
            let last = followed.entry(node).or_default();
            if *last + 1 == number && !entry.ops.is_empty() {
                *last = number;
                self.apply(entry);
                return Ok(());
            }
        }
        self.follow(cluster, &[entry.position]).await
    }

    /// Applies what other nodes have logged, up to `positions`.
    pub(crate) async fn follow(
        &self,
        cluster: &Cluster,
        positions: &[LogPosition],
    ) -> Result<(), StoreError> {
        let mut followed = self.followed.0.lock().await;
        for position in positions {
            let entry = followed.get(&position.node).copied().unwrap_or(0);
            if position.node == self.flusher.node || position.entry <= entry {
                continue;
            }
            let from = LogPosition { entry, ..*position };
            match cluster.store.read_log(from).await? {
                Some(entries) => {
                    for entry in entries {
                        followed.insert(entry.position.node, entry.position.entry);
                        self.apply(entry);
                    }
                }
                None => {
                    let mut sessions = Vec::new();
                    let positions = cluster
                        .store
                        .load_subscriptions(|session| sessions.push(session))
                        .await?;
                    for session in sessions {
                        self.take_up(session);
                    }
                    for position in positions {
                        followed.insert(position.node, position.entry);
                    }
                }
            }
        }
        Ok(())
    }

    fn apply(&self, entry: LogEntry) {
        for LogOp {
            session,
            epoch,
            action,
        } in entry.ops
        {
            match action {
                LogAction::Subscribe {
                    owner: Owner::Client(client_id),
                    filter,
                    options,
                    identifier,
                } => {
                    if self.shared.has_ended(session) {
                        continue;
                    }
                    let mailbox = self
                        .shared
                        .mailbox_or(session, || self.shared_mailbox(session, client_id));
                    self.learn(&mailbox, epoch, filter, options, identifier);
                }
                LogAction::Unsubscribe(filter) => {
                    if self.shared.note(session, &filter, epoch, None) != Noted::Nothing
                        && let Some(mailbox) = self.shared.mailbox(session)
                    {
                        self.remove_subscription(&filter, &mailbox);
                    }
                }
                LogAction::End => self.forget_session(session),
                LogAction::OpenGroup(filter) => {
                    self.learn_group(&filter, session, epoch);
                }
                LogAction::Subscribe { .. } => {}
            }
        }
    }

    /// A session has subscribed somewhere.
    pub(super) fn learn(
        &self,
        mailbox: &Arc<Mailbox>,
        epoch: u64,
        filter: SubscriptionFilter,
        options: SubscribeOptions,
        identifier: Option<u32>,
    ) {
        let terms = Some((options, identifier));
        // Nothing is gathered meanwhile: each message has been matched either before or after it.
        let mut additions = self.flusher.add();
        let noted = self.shared.note(mailbox.session, &filter, epoch, terms);
        // A group has messages of its own.
        if noted == Noted::Nothing || filter.share.is_some() {
            return;
        }
        let version = self
            .subscriptions
            .subscribe(&filter.filter, mailbox, options, identifier);
        if noted == Noted::Changed {
            return;
        }
        let learned = Learned {
            version,
            mailbox: mailbox.clone(),
            filter,
            options,
            identifier,
        };
        additions.catch_up(mailbox, version, |message| learned.delivery(message));
        self.shared.learn(learned);
    }

    /// Nothing more is for a session that has ended.
    pub(super) fn forget_session(&self, session: SessionId) {
        if let Some(cluster) = &self.cluster {
            cluster.store.forget(session, u64::MAX);
        }
        if let Some((mailbox, filters)) = self.shared.end(session) {
            for filter in filters {
                self.remove_subscription(&filter, &mailbox);
            }
            if mailbox.group.is_some() {
                self.forget_group(session);
            }
        }
    }

    /// A session that is known everywhere is not subscribed any more.
    pub(super) fn remove_subscription(&self, filter: &SubscriptionFilter, mailbox: &Arc<Mailbox>) {
        if filter.share.is_some() {
            self.member_ended(filter, &mailbox.client_id);
        } else {
            self.subscriptions.unsubscribe(&filter.filter, mailbox);
        }
    }

    /// The mailbox of a session that other nodes write to as well.
    pub(super) fn shared_mailbox(&self, session: SessionId, client_id: Arc<str>) -> Arc<Mailbox> {
        self.mailbox(session, client_id, None, true, InboxSummary::default())
    }

    /// Messages for subscriptions that other nodes had made before these were written, but that this
    /// node did not know of: they have to be written too before anything is acknowledged. What was
    /// learned after `known` is left to the next look.
    pub(super) fn missed(
        &self,
        messages: &[Matched],
        known: u64,
        ids: &mut MissedIds,
    ) -> Vec<MissedChunk> {
        let mut missed = Vec::new();
        for Matched {
            message,
            version,
            guard,
        } in messages
        {
            let Some(learned) = self.shared.learned_since(*version) else {
                // So many at a time: it is matched with all subscriptions again. Whoever had it
                // before gets a QoS 1 message twice.
                missed.extend(self.match_whole(message, *guard, ids));
                continue;
            };
            for learned in learned {
                if learned.version > known {
                    continue;
                }
                let Some(delivery) = learned.delivery(message) else {
                    continue;
                };
                let id = ids.next();
                let entry = delivery.into_entry(id);
                let chunk = Chunk {
                    key: id,
                    entries: vec![entry],
                };
                missed.push(MissedChunk {
                    mailbox: learned.mailbox,
                    chunk,
                    guard: *guard,
                });
            }
        }
        missed
    }

    /// A message for the inboxes of all sessions that want it.
    fn match_whole(
        &self,
        message: &Message,
        guard: Option<SessionId>,
        ids: &mut MissedIds,
    ) -> Vec<MissedChunk> {
        let (matches, _) = self.subscriptions.matches(message.topic());
        let durable = matches
            .sessions
            .iter()
            .filter(|found| found.mailbox.is_durable());
        let sessions =
            durable.map(|found| (&found.mailbox, found.terms.delivery(message, Arrival::NONE)));
        let groups = matches.groups.iter();
        let groups = groups.map(|group| {
            let delivery = group.delivery(message, Origin::Memory, Arrival::NONE);
            (group.mailbox(), delivery)
        });
        sessions
            .chain(groups)
            .filter_map(|(mailbox, delivery)| {
                let id = ids.next();
                let entry = delivery.into_entry(id);
                let qos = entry.qos;
                let entries = vec![entry];
                (qos > QoS::AtMostOnce).then(|| MissedChunk {
                    mailbox: mailbox.clone(),
                    chunk: Chunk { key: id, entries },
                    guard,
                })
            })
            .collect()
    }
}
