//! Who wants a topic: the tree of all subscriptions.
//!
//! What a topic matched is remembered until the tree changes.

use std::fmt;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::{DefaultHashBuilder, HashMap};
use parking_lot::{Mutex, RwLock};

use super::group::Group;
use super::inspect::SubscriptionView;
use super::mailbox::Mailbox;
use crate::metrics::Arrival;
use crate::mqtt::topic::{SubscribeOptions, SubscriptionFilter, TopicFilter};
use crate::mqtt::topic_tree::TopicTree;
use crate::mqtt::{Message, QoS};
use crate::session::{Delivery, Origin};

/// All subscriptions of this node.
pub(crate) struct Subscriptions {
    tree: RwLock<TopicTree<Target>>,
    /// Changes whenever a subscription does.
    version: AtomicU64,
    count: AtomicU64,
    remembered: Box<[Mutex<Remembered>]>,
    hasher: DefaultHashBuilder,
}

/// What topics matched in one version of the tree.
#[derive(Default)]
struct Remembered {
    version: u64,
    topics: HashMap<Arc<str>, Arc<Matches>>,
    /// Topics and the sessions that each of them matched.
    size: usize,
}

/// Topics, and sessions that they matched, remembered in each of [`REMEMBERED_SHARDS`].
const REMEMBERED_MAX: usize = 65_536;
const REMEMBERED_SHARDS: usize = 16;

#[derive(Clone, Debug)]
enum Target {
    Session {
        mailbox: Arc<Mailbox>,
        options: SubscribeOptions,
        identifier: Option<u32>,
    },
    Group(Arc<Group>),
    /// Another node, where sessions that end with their connections want it.
    Node(u32),
}

impl Target {
    fn is_session(&self, mailbox: &Arc<Mailbox>) -> bool {
        matches!(self, Self::Session { mailbox: own, .. } if Arc::ptr_eq(own, mailbox))
    }

    fn is_node(&self, node: u32) -> bool {
        matches!(self, Self::Node(own) if *own == node)
    }

    fn is_group(&self, group: &Arc<Group>) -> bool {
        matches!(self, Self::Group(own) if Arc::ptr_eq(own, group))
    }
}

/// Everybody who gets a message to one topic, each once.
#[derive(Debug, Default)]
pub(crate) struct Matches {
    pub(crate) sessions: Vec<Match>,
    pub(crate) groups: Vec<Arc<Group>>,
    /// Other nodes, each once.
    pub(crate) nodes: Vec<u32>,
}

impl Matches {
    /// Whether a message of QoS 1 or 2 has to go through an inbox.
    pub(crate) fn anything_stored(&self) -> bool {
        self.sessions.iter().any(|found| found.mailbox.is_durable())
            || self.groups.iter().any(|group| group.mailbox().is_durable())
    }
}

/// One session, and what its matching subscriptions say together.
#[derive(Debug)]
pub(crate) struct Match {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) terms: MatchTerms,
    /// Without the subscriptions that have No Local: for what the session published itself. `None`
    /// if there are no others.
    pub(crate) own_terms: Option<MatchTerms>,
}

/// Of overlapping subscriptions the highest QoS counts, and one copy is sent with the identifiers
/// of all of them, [MQTT-3.3.4-2], [MQTT-3.3.4-3].
#[derive(Clone, Debug, Default)]
pub(crate) struct MatchTerms {
    pub(crate) maximum_qos: QoS,
    pub(crate) retain_as_published: bool,
    pub(crate) identifiers: Option<Arc<[u32]>>,
}

impl MatchTerms {
    /// A message as these terms want it.
    pub(super) fn delivery(&self, message: &Message, arrival: Arrival) -> Delivery {
        Delivery {
            message: message.clone(),
            qos: message.qos().min(self.maximum_qos),
            retain: message.retain() && self.retain_as_published,
            subscription_identifiers: self.identifiers.clone(),
            origin: Origin::Memory,
            arrival,
        }
    }

    fn merge(&mut self, options: &SubscribeOptions, identifier: Option<u32>) {
        self.maximum_qos = self.maximum_qos.max(options.maximum_qos);
        self.retain_as_published |= options.retain_as_published;
        if let Some(identifier) = identifier {
            let mut all = self
                .identifiers
                .take()
                .map_or_else(Vec::new, |known| known.to_vec());
            all.push(identifier);
            self.identifiers = Some(all.into());
        }
    }
}

impl Subscriptions {
    pub(crate) fn new() -> Self {
        Self {
            tree: RwLock::new(TopicTree::new()),
            version: AtomicU64::new(0),
            count: AtomicU64::new(0),
            remembered: (0..REMEMBERED_SHARDS).map(|_| Mutex::default()).collect(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// Adds or replaces the session's subscription to `filter`; returns the version that has it.
    pub(crate) fn subscribe(
        &self,
        filter: &TopicFilter,
        mailbox: &Arc<Mailbox>,
        options: SubscribeOptions,
        identifier: Option<u32>,
    ) -> u64 {
        let target = Target::Session {
            mailbox: mailbox.clone(),
            options,
            identifier,
        };
        self.change(|tree| tree.insert(filter.as_str(), target, |known| known.is_session(mailbox)))
    }

    pub(crate) fn unsubscribe(&self, filter: &TopicFilter, mailbox: &Arc<Mailbox>) {
        self.change(|tree| tree.remove(filter.as_str(), |target| target.is_session(mailbox)));
    }

    /// Returns the version that has it.
    pub(crate) fn add_group(&self, group: &Arc<Group>) -> u64 {
        let target = Target::Group(group.clone());
        self.change(|tree| {
            tree.insert(group.filter().filter.as_str(), target, |known| {
                known.is_group(group)
            })
        })
    }

    pub(crate) fn remove_group(&self, group: &Arc<Group>) {
        self.change(|tree| {
            tree.remove(group.filter().filter.as_str(), |target| {
                target.is_group(group)
            })
        });
    }

    /// Another node wants what matches `filter`.
    pub(super) fn add_node(&self, filter: &TopicFilter, node: u32) {
        self.change(|tree| {
            tree.insert(filter.as_str(), Target::Node(node), |known| {
                known.is_node(node)
            })
        });
    }

    pub(super) fn remove_node(&self, filter: &TopicFilter, node: u32) {
        self.change(|tree| tree.remove(filter.as_str(), |target| target.is_node(node)));
    }

    /// Returns the version that has the change.
    fn change(&self, change: impl FnOnce(&mut TopicTree<Target>) -> bool) -> u64 {
        let mut tree = self.tree.write();
        change(&mut tree);
        self.count.store(tree.len() as u64, Ordering::Relaxed);
        // While the tree is locked: whoever sees the new tree sees the new version.
        self.version.fetch_add(1, Ordering::Release) + 1
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Changes with every change of a subscription.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Who gets a message to `topic`, as of the version of the subscriptions that is returned.
    pub(crate) fn matches(&self, topic: &str) -> (Arc<Matches>, u64) {
        let version = self.version();
        let shard = &self.remembered[self.hasher.hash_one(topic) as usize % REMEMBERED_SHARDS];
        {
            let shard = shard.lock();
            if shard.version == version
                && let Some(matches) = shard.topics.get(topic)
            {
                return (matches.clone(), version);
            }
        }
        let (matches, version) = self.find(topic);
        let matches = Arc::new(matches);
        let mut shard = shard.lock();
        let size = 1 + matches.sessions.len() + matches.groups.len() + matches.nodes.len();
        if shard.version < version || shard.size + size > REMEMBERED_MAX {
            shard.topics.clear();
            shard.size = 0;
            shard.version = shard.version.max(version);
        }
        if shard.version == version {
            shard.size += size;
            shard.topics.insert(topic.into(), matches.clone());
        }
        (matches, version)
    }

    /// The subscriptions of one session, those of share groups aside. It looks at all there are.
    pub(super) fn of(&self, mailbox: &Arc<Mailbox>) -> Vec<SubscriptionView> {
        let tree = self.tree.read();
        let found = tree.filters_of(|target| target.is_session(mailbox));
        let view = |(filter, target): (String, &Target)| match target {
            Target::Session {
                options,
                identifier,
                ..
            } => Some(SubscriptionView {
                filter: SubscriptionFilter {
                    share: None,
                    filter: TopicFilter::new(&filter).ok()?,
                },
                options: *options,
                identifier: *identifier,
            }),
            Target::Group(_) | Target::Node(_) => None,
        };
        found.into_iter().filter_map(view).collect()
    }

    fn find(&self, topic: &str) -> (Matches, u64) {
        let mut found = Matches::default();
        let mut places: HashMap<*const Mailbox, usize> = HashMap::new();
        let tree = self.tree.read();
        tree.visit_matches(topic, |target| match target {
            Target::Group(group) => found.groups.push(group.clone()),
            Target::Node(node) if found.nodes.contains(node) => {}
            Target::Node(node) => found.nodes.push(*node),
            Target::Session {
                mailbox,
                options,
                identifier,
            } => {
                let place = *places.entry(Arc::as_ptr(mailbox)).or_insert_with(|| {
                    found.sessions.push(Match {
                        mailbox: mailbox.clone(),
                        terms: MatchTerms::default(),
                        own_terms: None,
                    });
                    found.sessions.len() - 1
                });
                let session = &mut found.sessions[place];
                session.terms.merge(options, *identifier);
                if !options.no_local {
                    session
                        .own_terms
                        .get_or_insert_default()
                        .merge(options, *identifier);
                }
            }
        });
        (found, self.version())
    }
}

impl fmt::Debug for Subscriptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriptions")
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}
