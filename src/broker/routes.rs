//! Where messages go that wait in no inbox: each node tells the others what its clients want, and
//! knows when all of them have heard it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;

use super::Node;
use super::flush::Receipt;
use crate::bus::wire::Item;
use crate::cluster::Cluster;
use crate::mqtt::SubscriptionFilter;

/// How long a SUBACK waits for nodes that do not say that they know of the subscription.
const KNOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a node that starts waits to hear from the others. They look once a second who is there.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// What this node's clients want of the others, and theirs of it.
#[derive(Default)]
pub(super) struct Routes {
    /// What sessions of this node want that do not outlive their connection: other nodes are told of
    /// the first and the last that wants a filter.
    interest: Mutex<HashMap<SubscriptionFilter, Interest>>,
    /// What such sessions of each other node want.
    of_nodes: Mutex<HashMap<u32, HashSet<SubscriptionFilter>>>,
    asked: Mutex<Asked>,
    /// All nodes have answered up to this question.
    answered: watch::Sender<u64>,
    /// Nodes that have said what all of their clients want.
    greeted: watch::Sender<HashSet<u32>>,
}

#[derive(Default)]
struct Interest {
    sessions: usize,
    /// Whoever answers a later question than this one knows of it.
    asked_before: u64,
}

/// Questions whether the others know what they were told.
#[derive(Default)]
struct Asked {
    last: u64,
    /// The last that each node has answered.
    answers: HashMap<u32, u64>,
}

/// What has to be known everywhere before a subscription may be acknowledged.
pub(super) enum News {
    /// What was told before this question was asked.
    ToldBefore(u64),
    /// What is told until this is durable.
    ToldUntil(Receipt),
    /// What is logged with this, told when it is durable, and asked at once: see
    /// [`Node::announce_log`].
    Logged(Receipt),
}

impl Node {
    /// Notes that a session which ends with its connection wants a filter, or no longer does.
    pub(crate) fn want(&self, filter: &SubscriptionFilter, wants: bool) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let mut all = self.routes.interest.lock();
        let interest = all.entry(filter.clone()).or_default();
        let (mut add, mut remove) = (Vec::new(), Vec::new());
        if wants {
            interest.sessions += 1;
            if interest.sessions > 1 {
                return;
            }
            add.push(filter.clone());
        } else {
            interest.sessions = interest.sessions.saturating_sub(1);
            if interest.sessions > 0 {
                return;
            }
            all.remove(filter);
            remove.push(filter.clone());
        }
        // While the counts are locked: what is sent is in their order.
        cluster.broadcast(&Item::Route {
            reset: false,
            add,
            remove,
        });
        if let Some(interest) = all.get_mut(filter) {
            interest.asked_before = self.routes.asked.lock().last;
        }
    }

    /// What the others have to be told of a filter that [`Node::want`] has noted.
    pub(super) fn news_of(&self, filter: &SubscriptionFilter) -> News {
        let all = self.routes.interest.lock();
        let asked_before = all.get(filter).map_or(0, |interest| interest.asked_before);
        News::ToldBefore(asked_before)
    }

    /// Resolves when all other nodes know, or should. To be waited for before SUBACK: from then on
    /// whatever is published anywhere comes.
    pub(super) fn known_everywhere(self: &Arc<Self>, news: News) -> Option<BoxFuture<'static, ()>> {
        let cluster = self.cluster.clone()?;
        if cluster.members.others().is_empty() {
            return None;
        }
        let node = self.clone();
        Some(Box::pin(async move {
            if let News::ToldUntil(receipt) | News::Logged(receipt) = news
                && node.flusher.durable(receipt).await.is_err()
            {
                return;
            }
            let mut answered = node.routes.answered.subscribe();
            let number = match news {
                News::ToldBefore(asked) if *answered.borrow() > asked => return,
                News::ToldBefore(_) | News::ToldUntil(_) => node.ask(&cluster),
                News::Logged(_) => node.routes.asked.lock().last,
            };
            let answers = answered.wait_for(|answered| *answered >= number);
            if timeout(KNOWN_TIMEOUT, answers).await.is_err() {
                tracing::debug!(event = "subscription_not_confirmed");
            }
        }))
    }

    /// Asks all other nodes to say when they know what they were told before; returns the number of
    /// the question.
    pub(super) fn ask(&self, cluster: &Cluster) -> u64 {
        let mut asked = self.routes.asked.lock();
        asked.last += 1;
        let number = asked.last;
        // While it is locked: questions are in order.
        cluster.broadcast(&Item::Ask { number });
        number
    }

    /// A node knows everything that it was told before this question.
    pub(super) fn receive_answer(&self, cluster: &Cluster, from: u32, number: u64) {
        self.routes.asked.lock().answers.insert(from, number);
        self.count_answers(cluster);
    }

    fn count_answers(&self, cluster: &Cluster) {
        let nodes = cluster.members.others();
        let asked = self.routes.asked.lock();
        let answers = nodes
            .iter()
            .filter(|node| cluster.members.is_alive(**node))
            .map(|node| asked.answers.get(node).copied().unwrap_or(0));
        let answered = answers.min().unwrap_or(asked.last);
        self.routes.answered.send_if_modified(|last| {
            let rises = answered > *last;
            *last = answered.max(*last);
            rises
        });
    }

    /// Tells a node that has just come what the clients of this one want.
    pub(crate) fn greet(&self, cluster: &Cluster, node: u32) {
        {
            // It was not there to be asked before.
            let mut asked = self.routes.asked.lock();
            let last = asked.last;
            asked.answers.entry(node).or_insert(last);
        }
        let interest = self.routes.interest.lock();
        let add = interest.keys().cloned().collect();
        let item = Item::Route {
            reset: true,
            add,
            remove: Vec::new(),
        };
        cluster.send(node, &item);
    }

    /// Waits until the nodes that are there have said what their clients want.
    pub(crate) async fn until_greeted(&self, cluster: &Cluster) {
        let nodes = cluster.members.others();
        let mut greeted = self.routes.greeted.subscribe();
        let all = greeted.wait_for(|greeted| nodes.iter().all(|node| greeted.contains(node)));
        if timeout(GREETING_TIMEOUT, all).await.is_err() {
            // One of them may have died just now.
            tracing::info!(event = "nodes_silent");
        }
    }

    /// What clients of another node want: a change, or everything.
    pub(super) fn receive_route(
        &self,
        from: u32,
        reset: bool,
        add: Vec<SubscriptionFilter>,
        remove: Vec<SubscriptionFilter>,
    ) {
        let mut of_nodes = self.routes.of_nodes.lock();
        let known = of_nodes.entry(from).or_default();
        if reset {
            for filter in known.drain() {
                self.subscriptions.remove_node(&filter.filter, from);
            }
        }
        for filter in add {
            self.subscriptions.add_node(&filter.filter, from);
            known.insert(filter);
        }
        for filter in remove {
            self.subscriptions.remove_node(&filter.filter, from);
            known.remove(&filter);
        }
        drop(of_nodes);
        if reset {
            let insert = |greeted: &mut HashSet<u32>| greeted.insert(from);
            self.routes.greeted.send_if_modified(insert);
        }
    }

    /// Nobody is at this node any more.
    pub(super) fn forget_routes(&self, cluster: &Cluster, node: u32) {
        let routes = self.routes.of_nodes.lock().remove(&node);
        for filter in routes.into_iter().flatten() {
            self.subscriptions.remove_node(&filter.filter, node);
        }
        self.routes.greeted.send_if_modified(|greeted| {
            greeted.remove(&node);
            false
        });
        self.routes.asked.lock().answers.remove(&node);
        self.count_answers(cluster);
    }
}
