//! The end of a node that others can stand in for: clients leave one after the other, so that their
//! new nodes are not overrun.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::broker::Node;
use crate::broker::mailbox::Order;

/// How a node is drained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DrainPlan {
    /// How long clients are still accepted, for load balancers to notice.
    pub(crate) grace: Duration,
    /// Clients per second that are told to leave.
    pub(crate) evict_rate: usize,
    /// For all of it.
    pub(crate) deadline: Duration,
}

/// Groups of clients per second; what a group is told at once its new nodes see at once.
const TURNS_PER_SECOND: usize = 10;

impl DrainPlan {
    /// Returns when every client has been told to leave, or the deadline has passed.
    pub(crate) async fn carry_out(self, node: &Arc<Node>, stop_listening: &CancellationToken) {
        let (connected, _) = node.clients.count();
        tracing::info!(
            event = "draining",
            connected,
            grace = ?self.grace,
            evict_rate = self.evict_rate,
            deadline = ?self.deadline,
        );
        let work = async {
            sleep(self.grace).await;
            stop_listening.cancel();
            self.evict(node).await;
        };
        if timeout(self.deadline, work).await.is_err() {
            let (left, _) = node.clients.count();
            tracing::warn!(
                event = "drain_deadline",
                left,
                "the remaining clients are told to leave at once",
            );
        }
    }

    async fn evict(&self, node: &Node) {
        let mut leaving = node.clients.connected_mailboxes();
        // Who comes back to a queue first: the sooner, the shorter it is.
        leaving.sort_by_key(|mailbox| !mailbox.is_durable());
        let turn = self.evict_rate.div_ceil(TURNS_PER_SECOND);
        let mut turns = leaving.chunks(turn).peekable();
        while let Some(mailboxes) = turns.next() {
            for mailbox in mailboxes {
                mailbox.give(Order::Shutdown);
            }
            if turns.peek().is_some() {
                sleep(Duration::from_secs_f64(
                    turn as f64 / self.evict_rate as f64,
                ))
                .await;
            }
        }
    }
}
