//! Chance that can be repeated.

use std::env;
use std::hash::{BuildHasher, RandomState};

/// Random numbers from a printed seed (SplitMix64).
pub(crate) struct Seed(u64);

impl Seed {
    /// The seed in `MIDGE_TEST_SEED`, or a new one; either way a failed test shows it.
    pub(crate) fn new() -> Self {
        let seed = env::var("MIDGE_TEST_SEED").map_or_else(
            |_| RandomState::new().hash_one(0),
            |text| text.parse().expect("MIDGE_TEST_SEED is a number"),
        );
        eprintln!("MIDGE_TEST_SEED={seed}");
        Self(seed)
    }

    /// For what has one outcome anyway.
    pub(crate) fn fixed() -> Self {
        Self(0)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low)
    }

    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// For a task of its own.
    pub(crate) fn split(&mut self) -> Self {
        Self(self.next())
    }
}

/// `usual` rounds, or as many times more as `MIDGE_TEST_ROUNDS` says.
pub(crate) fn rounds(usual: u64) -> u64 {
    let factor = env::var("MIDGE_TEST_ROUNDS").map_or(1, |text| {
        text.parse().expect("MIDGE_TEST_ROUNDS is a number")
    });
    usual * factor
}
