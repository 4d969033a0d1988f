//! Distributions: durations from a tenth of a millisecond to ten seconds, and sizes of things.

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a histogram is about.
pub(crate) trait Scale: 'static {
    /// The upper bounds of all buckets but the last, and how they are shown.
    const BOUNDS: &'static [(u64, &'static str)];
    /// What is counted is shown divided by this.
    const DIVISOR: f64;
}

/// Durations, in microseconds.
#[derive(Debug)]
pub(crate) enum Seconds {}

impl Scale for Seconds {
    const BOUNDS: &'static [(u64, &'static str)] = &[
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
    const DIVISOR: f64 = 1e6;
}

/// Sizes of payloads.
#[derive(Debug)]
pub(crate) enum Bytes {}

impl Scale for Bytes {
    const BOUNDS: &'static [(u64, &'static str)] = &[
        (64, "64.0"),
        (256, "256.0"),
        (1024, "1024.0"),
        (4096, "4096.0"),
        (16_384, "16384.0"),
        (65_536, "65536.0"),
        (262_144, "262144.0"),
        (1_048_576, "1048576.0"),
    ];
    const DIVISOR: f64 = 1.0;
}

/// How many of something go together.
#[derive(Debug)]
pub(crate) enum Count {}

impl Scale for Count {
    const BOUNDS: &'static [(u64, &'static str)] = &[
        (0, "0.0"),
        (1, "1.0"),
        (2, "2.0"),
        (5, "5.0"),
        (10, "10.0"),
        (20, "20.0"),
        (50, "50.0"),
        (100, "100.0"),
        (200, "200.0"),
        (500, "500.0"),
        (1000, "1000.0"),
        (2000, "2000.0"),
        (5000, "5000.0"),
        (10_000, "10000.0"),
    ];
    const DIVISOR: f64 = 1.0;
}

/// How often there was how much of something.
pub(crate) struct Histogram<S = Seconds> {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    scale: PhantomData<fn(S)>,
}

/// What a [`Histogram`] held at one time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Distribution {
    pub(crate) bounds: &'static [(u64, &'static str)],
    /// Those in each bucket, without those in the ones before it.
    pub(crate) buckets: Vec<u64>,
    pub(crate) sum: f64,
}

impl<S: Scale> Default for Histogram<S> {
    fn default() -> Self {
        Self {
            buckets: (0..=S::BOUNDS.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            scale: PhantomData,
        }
    }
}

impl<S: Scale> Histogram<S> {
    /// `count` of them that are alike.
    pub(crate) fn add_many(&self, value: u64, count: u64) {
        self.add(bucket::<S>(value), count, value.saturating_mul(count));
    }

    fn add(&self, bucket: usize, count: u64, sum: u64) {
        self.buckets[bucket].fetch_add(count, Ordering::Relaxed);
        self.sum.fetch_add(sum, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Distribution {
        let read = |bucket: &AtomicU64| bucket.load(Ordering::Relaxed);
        Distribution {
            bounds: S::BOUNDS,
            buckets: self.buckets.iter().map(read).collect(),
            sum: read(&self.sum) as f64 / S::DIVISOR,
        }
    }
}

impl Histogram {
    pub(crate) fn observe(&self, duration: Duration) {
        self.observe_many(duration, 1);
    }

    /// `count` of them that took the same time.
    pub(crate) fn observe_many(&self, duration: Duration, count: u64) {
        self.add_many(microseconds(duration), count);
    }
}

impl<S: Scale> fmt::Debug for Histogram<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.read().fmt(f)
    }
}

pub(crate) fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn bucket<S: Scale>(value: u64) -> usize {
    S::BOUNDS.partition_point(|(bound, _)| *bound < value)
}

/// What a connection has seen and not yet added to a [`Histogram`]. Values that follow each other mostly
/// fall into one bucket: only that one is held.
#[derive(Debug, Default)]
pub(crate) struct Run {
    bucket: u8,
    count: u32,
    sum: u64,
}

impl Run {
    pub(crate) fn observe<S: Scale>(&mut self, value: u64, into: &Histogram<S>) {
        let bucket = bucket::<S>(value) as u8;
        if bucket != self.bucket {
            self.add_to(into);
            self.bucket = bucket;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
    }

    pub(crate) fn add_to<S: Scale>(&mut self, histogram: &Histogram<S>) {
        if self.count > 0 {
            histogram.add(self.bucket.into(), self.count.into(), self.sum);
            self.count = 0;
            self.sum = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_the_first_bucket_that_it_is_not_above() {
        let histogram = Histogram::<Seconds>::default();

        for us in [0, 100, 101, 10_000_000, 10_000_001] {
            histogram.observe(Duration::from_micros(us));
        }

        let seen = histogram.read();
        assert_eq!(seen.buckets[..2], [2, 1]);
        assert_eq!(seen.buckets[15..], [1, 1]);
        assert!((seen.sum - 20.000_202).abs() < 1e-9);
    }

    #[test]
    fn a_run_adds_up_to_the_same() {
        let (direct, by_run) = (
            Histogram::<Seconds>::default(),
            Histogram::<Seconds>::default(),
        );
        let mut run = Run::default();

        for us in [50, 70, 300, 300, 90, 2_000_000] {
            direct.observe(Duration::from_micros(us));
            run.observe(us, &by_run);
        }
        run.add_to(&by_run);
        run.add_to(&by_run);

        assert_eq!(by_run.read(), direct.read());
    }
}
