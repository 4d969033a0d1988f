//! When a message came to this node, for as long as it is on its way to a subscriber, and when it was sent
//! to one that has not acknowledged it.

use std::num::NonZeroU64;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

use super::label::Where;

/// When and from where a message came; 8 bytes, because every waiting message has one. There is none
/// for what was read from an inbox: it has waited, for however long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arrival(Option<NonZeroU64>);

/// Times count from here.
static BEGINNING: OnceLock<Instant> = OnceLock::new();

impl Arrival {
    pub(crate) const NONE: Self = Self(None);

    /// It was read at `at`.
    pub(crate) fn new(at: Instant, from: Where) -> Self {
        let beginning = *BEGINNING.get_or_init(|| at);
        let us = at.saturating_duration_since(beginning).as_micros() as u64;
        let is_remote = u64::from(from == Where::Remote);
        Self(NonZeroU64::new((us << 2) | (is_remote << 1) | 1))
    }

    /// Another node sent it: the clocks of two nodes cannot be compared, so it is from here on that
    /// its way is measured.
    pub(crate) fn from_peer() -> Self {
        Self::new(Instant::now(), Where::Remote)
    }

    /// How long ago that was.
    pub(crate) fn age(self, now: Instant) -> Option<(Duration, Where)> {
        let packed = self.0?.get();
        let from = match packed & 2 {
            0 => Where::Local,
            _ => Where::Remote,
        };
        let at = *BEGINNING.get()? + Duration::from_micros(packed >> 2);
        Some((now.saturating_duration_since(at), from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_arrival_knows_when_and_from_where_it_was() {
        let at = Instant::now();
        let arrivals = [Where::Local, Where::Remote].map(|from| Arrival::new(at, from));
        tokio::time::advance(Duration::from_millis(7)).await;
        let now = Instant::now();

        let ages = arrivals.map(|arrival| arrival.age(now).unwrap());

        assert_eq!(ages.map(|(_, from)| from), [Where::Local, Where::Remote]);
        assert_eq!(Arrival::NONE.age(now), None);
        assert_eq!(size_of::<Arrival>(), 8);
        // Another test may have begun the count with a clock of its own.
        assert!(ages.iter().all(|(age, _)| *age >= Duration::from_millis(7)));
    }
}
