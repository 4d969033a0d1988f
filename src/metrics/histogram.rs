//! Distributions of durations, in buckets that suit a broker: from a tenth of a millisecond to ten
//! seconds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The upper bounds of all buckets but the last, in microseconds, and as they are shown in seconds.
pub(crate) const BOUNDS: [(u64, &str); 16] = [
    (100, "0.0001"),
    (250, "0.00025"),
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1.0"),
    (2_500_000, "2.5"),
    (5_000_000, "5.0"),
    (10_000_000, "10.0"),
];

/// How often something took how long.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_us: AtomicU64,
}

/// What a [`Histogram`] held at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Distribution {
    /// Those in each bucket, without those in the ones before it.
    pub(crate) buckets: [u64; BOUNDS.len() + 1],
    pub(crate) sum_us: u64,
}

impl Histogram {
    pub(crate) fn observe(&self, duration: Duration) {
        self.observe_many(duration, 1);
    }

    /// `count` of them that took the same time.
    pub(crate) fn observe_many(&self, duration: Duration, count: u64) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.add(bucket(us), count, us.saturating_mul(count));
    }

    fn add(&self, bucket: usize, count: u64, sum_us: u64) {
        self.buckets[bucket].fetch_add(count, Ordering::Relaxed);
        self.sum_us.fetch_add(sum_us, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Distribution {
        let read = |bucket: &AtomicU64| bucket.load(Ordering::Relaxed);
        Distribution {
            buckets: self.buckets.each_ref().map(read),
            sum_us: read(&self.sum_us),
        }
    }
}

fn bucket(us: u64) -> usize {
    BOUNDS.partition_point(|(bound, _)| *bound < us)
}

/// Durations that a connection has seen and not yet added to a [`Histogram`]. Those that follow each
/// other mostly fall into one bucket: only that one is held.
#[derive(Debug, Default)]
pub(crate) struct Run {
    bucket: u8,
    count: u32,
    sum_us: u64,
}

impl Run {
    pub(crate) fn observe(&mut self, duration: Duration, into: &Histogram) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = bucket(us) as u8;
        if bucket != self.bucket {
            self.add_to(into);
            self.bucket = bucket;
        }
        self.count += 1;
        self.sum_us = self.sum_us.saturating_add(us);
    }

    pub(crate) fn add_to(&mut self, histogram: &Histogram) {
        if self.count > 0 {
            histogram.add(self.bucket.into(), self.count.into(), self.sum_us);
            self.count = 0;
            self.sum_us = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_the_first_bucket_that_it_is_not_above() {
        let histogram = Histogram::default();

        for us in [0, 100, 101, 10_000_000, 10_000_001] {
            histogram.observe(Duration::from_micros(us));
        }

        let seen = histogram.read();
        assert_eq!(seen.buckets[..2], [2, 1]);
        assert_eq!(seen.buckets[15..], [1, 1]);
        assert_eq!(seen.sum_us, 20_000_202);
    }

    #[test]
    fn a_run_adds_up_to_the_same() {
        let (direct, by_run) = (Histogram::default(), Histogram::default());
        let mut run = Run::default();

        for us in [50, 70, 300, 300, 90, 2_000_000] {
            direct.observe(Duration::from_micros(us));
            run.observe(Duration::from_micros(us), &by_run);
        }
        run.add_to(&by_run);
        run.add_to(&by_run);

        assert_eq!(by_run.read(), direct.read());
    }
}
