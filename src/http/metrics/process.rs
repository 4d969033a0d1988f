//! The metrics of every process that Prometheus' client libraries have. Outside of Linux those are left
//! out that are not known.

use std::fs;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::families;
use super::text::Exposition;

/// When the process began, to within what it did before.
static STARTED: OnceLock<f64> = OnceLock::new();

/// To be called as soon as the process begins.
pub(in crate::http) fn note_start() {
    STARTED.get_or_init(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0.0, |since| since.as_secs_f64())
    });
}

pub(super) fn write(into: &mut Exposition) {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    let cpu_seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
    into.value(&families::PROCESS_CPU, cpu_seconds);
    if let Some(started) = STARTED.get() {
        into.value(&families::PROCESS_START_TIME, started);
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kibibytes = |name| number(&status, name).map(|kibibytes| kibibytes * 1024);
    let figures = [
        (&families::PROCESS_RESIDENT_MEMORY, kibibytes("VmRSS:")),
        (&families::PROCESS_VIRTUAL_MEMORY, kibibytes("VmSize:")),
        (&families::PROCESS_THREADS, number(&status, "Threads:")),
        // Counting opens one.
        (
            &families::PROCESS_OPEN_FDS,
            fs::read_dir("/proc/self/fd")
                .ok()
                .map(|fds| fds.count() as u64 - 1),
        ),
        (
            &families::PROCESS_MAX_FDS,
            getrlimit(Resource::Nofile).current,
        ),
    ];
    for (family, value) in figures {
        if let Some(value) = value {
            into.value(family, value);
        }
    }
}

/// The number in a line of `/proc/self/status`.
fn number(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}
