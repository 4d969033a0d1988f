//! What the broker counts.
//!
//! A connection counts for itself and adds up at the end of each turn, so that the counters of all
//! connections do not share a cache line per message.

use std::sync::atomic::{AtomicU64, Ordering};

/// Totals since the start.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    pub(crate) bytes_received: AtomicU64,
    pub(crate) bytes_sent: AtomicU64,
    pub(crate) packets_received: AtomicU64,
    pub(crate) packets_sent: AtomicU64,
    pub(crate) publishes_received: AtomicU64,
    pub(crate) publishes_sent: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) connected_maximum: AtomicU64,
    pub(crate) sessions_expired: AtomicU64,
    /// New connections that had to wait for their turn.
    pub(crate) connections_delayed: AtomicU64,
    /// New connections that were refused because too many came.
    pub(crate) connections_over_rate: AtomicU64,
    /// Times that a client was not read from because it had published too much.
    pub(crate) publishers_paused: AtomicU64,
}

/// What one connection has counted and not yet added up.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bytes_received: u64,
    pub(crate) bytes_sent: u64,
    pub(crate) packets_received: u64,
    pub(crate) packets_sent: u64,
    pub(crate) publishes_received: u64,
    pub(crate) publishes_sent: u64,
}

impl Totals {
    /// Adds a tally up and empties it.
    pub(crate) fn add(&self, tally: &mut Tally) {
        let add = |total: &AtomicU64, count: &mut u64| {
            if *count > 0 {
                total.fetch_add(std::mem::take(count), Ordering::Relaxed);
            }
        };
        add(&self.bytes_received, &mut tally.bytes_received);
        add(&self.bytes_sent, &mut tally.bytes_sent);
        add(&self.packets_received, &mut tally.packets_received);
        add(&self.packets_sent, &mut tally.packets_sent);
        add(&self.publishes_received, &mut tally.publishes_received);
        add(&self.publishes_sent, &mut tally.publishes_sent);
    }
}
