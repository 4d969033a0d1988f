//! How far the other nodes are.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use tokio::time::Instant;

/// How long a node says nothing before it can be taken for one that says nothing any more.
const SILENCE: Duration = Duration::from_secs(1);

/// The mark of each node that is alive: it will write no message of that clock value or a smaller
/// one any more, and what it pushed to this node of those has been received.
///
/// A node that has died is alive until that is known for certain, and those who wait for its mark
/// would wait as long. So one that shows no sign of life is left out ([`Marks::suspect`]). Should it
/// go on after all, it hands on what it writes, and that is then read from the inbox.
#[derive(Debug)]
pub(crate) struct Marks {
    /// The least of all marks.
    safe: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// 0 until a node has been heard of.
    marks: HashMap<u32, u64>,
    /// When each was last heard of.
    heard: HashMap<u32, Instant>,
    /// Those that are not waited for.
    suspects: HashSet<u32>,
    /// Of nodes that have been heard of before they were known to be alive.
    early: HashMap<u32, u64>,
    /// By the clock value that they wait for.
    waiters: BTreeMap<u64, Vec<Waker>>,
}

impl Marks {
    pub(super) fn new() -> Self {
        Self {
            safe: AtomicU64::new(u64::MAX),
            state: Mutex::default(),
        }
    }

    /// Nothing of this clock value or a smaller one comes any more, from whatever node that is
    /// alive; `u64::MAX` if there is no other. Falls when a node joins, or goes on.
    pub(crate) fn safe(&self) -> u64 {
        self.safe.load(Ordering::Acquire)
    }

    /// Ready once [`Marks::safe`] has come to `hlc`.
    pub(crate) fn poll_reached(&self, hlc: u64, context: &mut Context<'_>) -> Poll<()> {
        if self.safe() >= hlc {
            return Poll::Ready(());
        }
        let mut state = self.state.lock();
        if self.safe() >= hlc {
            return Poll::Ready(());
        }
        let waiters = state.waiters.entry(hlc).or_default();
        if !waiters.iter().any(|waker| waker.will_wake(context.waker())) {
            waiters.push(context.waker().clone());
        }
        Poll::Pending
    }

    #[cfg(test)]
    pub(crate) async fn reached(&self, hlc: u64) {
        std::future::poll_fn(|context| self.poll_reached(hlc, context)).await;
    }

    pub(super) fn set_alive(&self, others: impl Iterator<Item = u32>) {
        let mut state = self.state.lock();
        let State {
            marks,
            heard,
            suspects,
            early,
            ..
        } = &mut *state;
        let known = std::mem::take(marks);
        *marks = others
            .map(|node| {
                let mark = known.get(&node).copied().or_else(|| early.remove(&node));
                (node, mark.unwrap_or(0))
            })
            .collect();
        heard.retain(|node, _| marks.contains_key(node));
        suspects.retain(|node| marks.contains_key(node));
        self.settle(state);
    }

    /// Does not wait for these nodes, which do not show in the store that they are alive, unless they
    /// have been heard of just now.
    pub(super) fn suspect(&self, nodes: impl Iterator<Item = u32>) {
        let mut state = self.state.lock();
        let State {
            marks,
            heard,
            suspects,
            ..
        } = &mut *state;
        let is_silent = |node: &u32| heard.get(node).is_none_or(|at| at.elapsed() >= SILENCE);
        *suspects = nodes
            .filter(|node| marks.contains_key(node) && is_silent(node))
            .collect();
        self.settle(state);
    }

    pub(super) fn hear(&self, node: u32, durable_hlc: u64) {
        let mut state = self.state.lock();
        let State {
            marks,
            heard,
            suspects,
            early,
            ..
        } = &mut *state;
        let Some(mark) = marks.get_mut(&node) else {
            early.insert(node, durable_hlc);
            return;
        };
        *mark = durable_hlc.max(*mark);
        heard.insert(node, Instant::now());
        suspects.remove(&node);
        self.settle(state);
    }

    /// A node that is never heard of again.
    pub(super) fn forget(&self, node: u32) {
        self.state.lock().early.remove(&node);
    }

    fn settle(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        let State {
            marks, suspects, ..
        } = &*state;
        let marks = marks.iter().filter(|(node, _)| !suspects.contains(*node));
        let safe = marks.map(|(_, mark)| *mark).min().unwrap_or(u64::MAX);
        self.safe.store(safe, Ordering::Release);
        let reached = match safe.checked_add(1) {
            Some(beyond) => {
                let later = state.waiters.split_off(&beyond);
                std::mem::replace(&mut state.waiters, later)
            }
            None => std::mem::take(&mut state.waiters),
        };
        drop(state);
        reached.into_values().flatten().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn safe_is_the_least_mark_of_the_others() {
        let marks = Marks::new();
        assert_eq!(marks.safe(), u64::MAX);

        marks.set_alive([2, 3].into_iter());
        assert_eq!(marks.safe(), 0, "neither was heard of");
        marks.hear(2, 20);
        marks.hear(3, 30);
        assert_eq!(marks.safe(), 20);
        marks.hear(2, 10);
        assert_eq!(marks.safe(), 20, "a mark never falls");
        marks.set_alive([3].into_iter());
        assert_eq!(marks.safe(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn silent_suspect_is_not_waited_for_until_it_goes_on() {
        let marks = Marks::new();
        marks.set_alive([2, 3].into_iter());
        marks.hear(2, 20);
        marks.hear(3, 30);
        marks.suspect([2].into_iter());
        assert_eq!(marks.safe(), 20, "it was heard of just now");

        tokio::time::advance(SILENCE).await;
        marks.hear(3, 40);
        marks.suspect([2].into_iter());
        assert_eq!(marks.safe(), 40);
        marks.hear(2, 21);
        assert_eq!(marks.safe(), 21);
    }

    #[tokio::test]
    async fn a_node_may_be_heard_of_before_it_is_known() {
        let marks = Marks::new();
        marks.hear(2, 20);
        assert_eq!(marks.safe(), u64::MAX);

        marks.set_alive([2].into_iter());
        assert_eq!(marks.safe(), 20);
    }

    #[tokio::test]
    async fn whoever_waits_for_a_mark_is_woken_by_it() {
        let marks = std::sync::Arc::new(Marks::new());
        marks.set_alive([2].into_iter());
        let waiting = tokio::spawn({
            let marks = marks.clone();
            async move { marks.reached(20).await }
        });
        while marks.state.lock().waiters.is_empty() {
            tokio::task::yield_now().await;
        }

        marks.hear(2, 19);
        assert_eq!(marks.state.lock().waiters.len(), 1);
        marks.hear(2, 20);
        waiting.await.unwrap();
    }
}
