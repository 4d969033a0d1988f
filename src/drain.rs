//! A node that others can stand in for is emptied: clients leave one after the other, so that their
//! new nodes are not overrun.

use std::time::Duration;

use tokio::time::{sleep, timeout};

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
    /// Returns when every client has been given `order`, at the latest when the deadline has passed.
    /// After the grace, `close` has to see to it that nobody is let in any more.
    pub(crate) async fn carry_out(self, node: &Node, order: Order, close: impl FnOnce()) {
        let (connected, _) = node.clients.count();
        tracing::info!(
            event = "draining",
            connected,
            grace = ?self.grace,
            evict_rate = self.evict_rate,
            deadline = ?self.deadline,
        );
        let mut close = Some(close);
        let work = async {
            sleep(self.grace).await;
            if let Some(close) = close.take() {
                close();
            }
            self.evict(node, order).await;
        };
        if timeout(self.deadline, work).await.is_err() {
            let (left, _) = node.clients.count();
            tracing::warn!(
                event = "drain_deadline",
                left,
                "the remaining clients are told to leave at once",
            );
        }
        if let Some(close) = close.take() {
            close();
        }
        // Those as well that were being let in just now.
        node.clients.order_connected(order);
    }

    async fn evict(&self, node: &Node, order: Order) {
        let mut leaving = node.clients.connected_mailboxes();
        // Who comes back to a queue first: the sooner, the shorter it is.
        leaving.sort_by_key(|mailbox| !mailbox.is_durable());
        let turn = self.evict_rate.div_ceil(TURNS_PER_SECOND);
        let mut turns = leaving.chunks(turn).peekable();
        while let Some(mailboxes) = turns.next() {
            for mailbox in mailboxes {
                mailbox.give(order);
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
