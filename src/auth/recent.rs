//! Passwords that were right a short while ago, so that a thousand clients that reconnect at once
//! cost a thousand look-ups and not a thousand slow hashes.

use std::collections::HashSet;
use std::fmt;

use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use parking_lot::Mutex;

/// A set of tags that forgets those that were not asked for in a while.
///
/// Two generations: when the young one is full it becomes the old one, and the old one is dropped.
/// Only right passwords get in, so nobody can push others out by guessing.
pub(super) struct RecentPasswords {
    /// Of this process alone: what memory holds is worth nothing elsewhere.
    key: hmac::Key,
    generations: Mutex<Generations>,
    generation_max: usize,
}

#[derive(Default)]
struct Generations {
    young: HashSet<Tag>,
    old: HashSet<Tag>,
}

/// A keyed hash of user name, stored hash and password.
type Tag = [u8; 32];

/// Tags per generation: some MiB when both are full.
const GENERATION_MAX: usize = 32_768;

impl RecentPasswords {
    pub(super) fn new() -> Result<Self, aws_lc_rs::error::Unspecified> {
        Ok(Self {
            key: hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())?,
            generations: Mutex::default(),
            generation_max: GENERATION_MAX,
        })
    }

    pub(super) fn tag(&self, user_name: &str, hash_text: &str, password: &[u8]) -> Tag {
        let mut context = hmac::Context::with_key(&self.key);
        // The lengths keep `ab` + `c` apart from `a` + `bc`.
        for part in [user_name.as_bytes(), hash_text.as_bytes(), password] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        let mut tag = Tag::default();
        tag.copy_from_slice(context.sign().as_ref());
        tag
    }

    pub(super) fn contains(&self, tag: &Tag) -> bool {
        let mut generations = self.generations.lock();
        if generations.young.contains(tag) {
            return true;
        }
        if generations.old.contains(tag) {
            generations.add(*tag, self.generation_max);
            return true;
        }
        false
    }

    pub(super) fn insert(&self, tag: Tag) {
        self.generations.lock().add(tag, self.generation_max);
    }
}

impl Generations {
    fn add(&mut self, tag: Tag, generation_max: usize) {
        if self.young.len() >= generation_max {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(tag);
    }
}

impl fmt::Debug for RecentPasswords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecentPasswords").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts_and_so_does_where_it_ends() {
        let recent = RecentPasswords::new().unwrap();
        let tag = recent.tag("ab", "h", b"c");

        for (user_name, hash, password) in [
            ("a", "h", "bc"),
            ("abh", "", "c"),
            ("ab", "h", "d"),
            ("ab", "i", "c"),
        ] {
            assert_ne!(recent.tag(user_name, hash, password.as_bytes()), tag);
        }
        assert_ne!(
            RecentPasswords::new().unwrap().tag("ab", "h", b"c"),
            tag,
            "the key is random"
        );
    }

    #[test]
    fn what_is_asked_for_stays_and_the_rest_goes() {
        let recent = RecentPasswords {
            generation_max: 2,
            ..RecentPasswords::new().unwrap()
        };
        let [kept, forgotten, third, fourth, fifth] =
            ["1", "2", "3", "4", "5"].map(|name| recent.tag(name, "", b""));

        recent.insert(kept);
        recent.insert(forgotten);
        recent.insert(third);
        assert!(recent.contains(&kept));
        recent.insert(fourth);
        recent.insert(fifth);

        assert!(recent.contains(&kept));
        assert!(!recent.contains(&forgotten));
    }
}
