//! How near this process is to its limit of memory, and what gives way then.
//!
//! Owns the level, which [`Overload::run`] alone writes; whoever lets clients in, reads from them, or
//! answers load balancers reads it. Memory that is lacking is refused to those who come before it is
//! taken from those who are there: at the limit the system would end the process, and with it every
//! connection.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;

/// Percent of the limit from which on the levels 1, 2 and 3 hold.
const THRESHOLDS: [u64; 3] = [80, 90, 95];

/// Percent below its threshold at which a level ends, so that it does not come and go.
const MARGIN: u64 = 5;

/// Between two looks. A client sends at most some dozens of MiB in that time.
const INTERVAL: Duration = Duration::from_millis(250);

/// 0: all is well. 1: new connections are paced. 2: publishers as well. 3: nobody is let in.
#[derive(Debug, Default)]
pub(crate) struct Overload {
    level: AtomicU8,
    /// 0 if there is no limit.
    limit_bytes: AtomicU64,
}

impl Overload {
    pub(crate) fn level(&self) -> u8 {
        self.level.load(Ordering::Relaxed)
    }

    /// The limit that the level is about, if there is one.
    pub(crate) fn limit_bytes(&self) -> Option<u64> {
        Some(self.limit_bytes.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    pub(crate) fn paces_connections(&self) -> bool {
        self.level() >= 1
    }

    pub(crate) fn paces_publishers(&self) -> bool {
        self.level() >= 2
    }

    pub(crate) fn refuses_connections(&self) -> bool {
        self.level() >= 3
    }

    /// Looks at the memory of this process for ever. Returns if it cannot be known.
    pub(crate) async fn run(&self, limit_bytes: u64) {
        self.limit_bytes.store(limit_bytes, Ordering::Relaxed);
        while let Some(used) = resident_bytes() {
            let before = self.level();
            let level = next_level(before, used, limit_bytes);
            if level != before {
                self.level.store(level, Ordering::Relaxed);
                if level > before {
                    tracing::warn!(
                        event = "overload",
                        level,
                        used_bytes = used,
                        limit_bytes,
                        "memory is short: new connections and publishers have to wait, or are refused",
                    );
                } else {
                    tracing::info!(event = "overload", level, used_bytes = used, limit_bytes);
                }
            }
            sleep(INTERVAL).await;
        }
    }
}

fn next_level(level: u8, used: u64, limit: u64) -> u8 {
    let reached = |percent: u64| {
        let is_reached = |threshold: &&u64| percent >= **threshold;
        THRESHOLDS.iter().filter(is_reached).count() as u8
    };
    let percent = used.saturating_mul(100) / limit.max(1);
    // What holds without a margin, and what still holds with it.
    level.clamp(reached(percent), reached(percent.saturating_add(MARGIN)))
}

/// What the kernel holds in memory for this process.
pub(crate) fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// What the control group of this process may use, as containers and systemd set it.
pub(crate) fn control_group_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    limit_of(&groups, Path::new("/sys/fs/cgroup"))
}

/// The lowest limit of the group and those that it is in.
fn limit_of(groups: &str, root: &Path) -> Option<u64> {
    let mut lowest = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
            continue;
        };
        let (folder, file) = match controllers {
            "" => (root.to_owned(), "memory.max"),
            other if other.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let group = PathBuf::from(group.trim_start_matches('/'));
        for path in group.ancestors() {
            let text = std::fs::read_to_string(folder.join(path).join(file));
            // No limit is `max`, or a number beyond all memory.
            let limit = text.ok().and_then(|text| text.trim().parse::<u64>().ok());
            let limit = limit.filter(|limit| *limit < 1 << 60);
            lowest = limit.into_iter().chain(lowest).min();
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_level_begins_at_its_threshold_and_ends_below_it() {
        let levels = [10, 79, 80, 89, 90, 95, 91, 90, 89, 85, 84, 75, 74, 99, 10]
            .iter()
            .scan(0, |level, percent| {
                *level = next_level(*level, *percent, 100);
                Some(*level)
            });

        let expected = [0, 0, 1, 1, 2, 3, 3, 3, 2, 2, 1, 1, 0, 3, 0];
        assert_eq!(levels.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_memory_of_this_process_is_known() {
        let before = resident_bytes().unwrap();
        let block = vec![1u8; 64 << 20];

        assert!(resident_bytes().unwrap() >= before + (32 << 20));
        assert_eq!(
            block.iter().map(|byte| u64::from(*byte)).sum::<u64>(),
            64 << 20
        );
    }

    #[test]
    fn the_lowest_limit_of_a_control_group_and_its_parents_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/b/memory.max", "max\n");
        write("memory/c/memory.limit_in_bytes", "2000\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");

        assert_eq!(limit_of("0::/a/b\n", root.path()), Some(1000));
        assert_eq!(limit_of("0::/\n", root.path()), None);
        assert_eq!(
            limit_of("5:cpu,memory:/c\n1:name=x:/\n", root.path()),
            Some(2000)
        );
        assert_eq!(limit_of("nonsense", root.path()), None);
    }
}
