//! How fast clients come in, and how fast they may publish.
//!
//! Owns the time at which the next new connection of a node is due. Whoever comes early waits, before
//! anything is spent on it; whoever would wait for long is refused.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::metrics::Totals;
use crate::overload::Overload;

/// How long a new connection waits for its turn at most. Longer, and its client has given up; too
/// short, and a fleet that comes back is refused and comes again.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// What may come at once after a pause: as many as in this time.
const BURST: Duration = Duration::from_secs(1);

/// New connections per second while memory is short.
const OVERLOADED_RATE: NonZeroU32 = const { NonZeroU32::new(50).expect("not zero") };

/// A token bucket, seen from its end: when the next one would be due if all came evenly.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    next: Option<Instant>,
}

impl Pace {
    /// Takes a turn and returns how long it is until then; `None` if that would be longer than
    /// `at_most`, and then no turn is taken.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        per_second: NonZeroU32,
        at_most: Duration,
    ) -> Option<Duration> {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let next = self.next.map_or(earliest, |next| next.max(earliest));
        let wait = next.saturating_duration_since(now);
        if wait > at_most {
            return None;
        }
        self.next = Some(next + Duration::from_secs(1) / per_second.get());
        Some(wait)
    }
}

/// The new connections of all listeners of a node.
#[derive(Debug)]
pub(crate) struct Arrivals {
    /// 0 sets no limit.
    per_second: AtomicU32,
    pace: Mutex<Pace>,
    overload: Arc<Overload>,
    totals: Arc<Totals>,
}

/// What to do with a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    Now,
    After(Duration),
    /// Refuse it.
    TooMany,
}

impl Arrivals {
    pub(crate) fn new(
        per_second: Option<u32>,
        overload: Arc<Overload>,
        totals: Arc<Totals>,
    ) -> Self {
        Self {
            per_second: AtomicU32::new(per_second.unwrap_or(0)),
            pace: Mutex::default(),
            overload,
            totals,
        }
    }

    pub(crate) fn set_limit(&self, per_second: Option<u32>) {
        let per_second = per_second.unwrap_or(0);
        self.per_second.store(per_second, Ordering::Relaxed);
    }

    pub(crate) fn next(&self) -> Arrival {
        let configured = NonZeroU32::new(self.per_second.load(Ordering::Relaxed));
        let limit = if self.overload.paces_connections() {
            Some(configured.map_or(OVERLOADED_RATE, |limit| limit.min(OVERLOADED_RATE)))
        } else {
            configured
        };
        let Some(limit) = limit else {
            return Arrival::Now;
        };
        match self.pace.lock().take(Instant::now(), limit, WAIT_MAX) {
            Some(Duration::ZERO) => Arrival::Now,
            Some(wait) => {
                self.totals.connections_delayed.inc();
                Arrival::After(wait)
            }
            None => Arrival::TooMany,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let mut pace = Pace::default();
        let limit = NonZeroU32::new(10).unwrap();
        let now = Instant::now() + Duration::from_secs(60);
        let mut take = |now| pace.take(now, limit, Duration::from_secs(1));

        // The turn of the next one is a tenth of a second after that of the last one.
        let waits: Vec<_> = (0..30).map(|_| take(now)).collect();
        let at_once = waits.iter().filter(|wait| **wait == Some(Duration::ZERO));
        assert_eq!(at_once.count(), 11);
        assert_eq!(waits[20], Some(Duration::from_secs(1)));
        // Beyond that nobody waits, and nobody who has not waited has taken a turn.
        assert!(waits[21..].iter().all(Option::is_none));
        assert_eq!(
            take(now + Duration::from_millis(100)),
            Some(Duration::from_secs(1))
        );
        assert_eq!(take(now + Duration::from_secs(60)), Some(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nobody_waits() {
        let arrivals = Arrivals::new(None, Arc::default(), Arc::default());

        assert!((0..10_000).all(|_| arrivals.next() == Arrival::Now));
        arrivals.set_limit(Some(1));
        assert_eq!(arrivals.next(), Arrival::Now);
        assert_eq!(arrivals.next(), Arrival::Now);
        assert!(matches!(arrivals.next(), Arrival::After(_)));
    }
}
