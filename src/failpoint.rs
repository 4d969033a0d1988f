//! What tests do to a node from inside: end or stop it at a place that has a name, or put its clock
//! wrong. Only a build with debug assertions obeys.
//!
//! `MIDGE_TEST_FAILPOINTS` has `name=action` or `name=action@n`, separated by `;`: the action is done
//! when the place is reached for the nth time. `crash` ends the process as a power cut would, `stop`
//! halts it until it is sent SIGCONT. Before it does, it logs the event `failpoint`.
//! `MIDGE_TEST_CLOCK_OFFSET_MS` is added to the time of day.

use std::collections::HashMap;
use std::env;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// All places. What happens between two of them is in docs/development.md.
pub(crate) const PLACES: [&str; 17] = [
    "before_write",
    "before_commit",
    "after_commit",
    "after_insert",
    "after_write",
    "after_hand_on",
    "before_puback",
    "before_pubrec",
    "before_pubrel",
    "before_pubcomp",
    "before_qos2_publish",
    "before_claim",
    "after_claim",
    "before_taken",
    "after_declaring_dead",
    "after_releasing",
    "before_will",
];

/// In which a signal has certainly done its work.
const SIGNAL_TIME: Duration = Duration::from_millis(200);

/// What is to be done, by the name of the place.
static FAILPOINTS: LazyLock<HashMap<String, Failpoint>> = LazyLock::new(|| {
    let text = env::var("MIDGE_TEST_FAILPOINTS").unwrap_or_default();
    parse(&text).unwrap_or_else(|problem| panic!("MIDGE_TEST_FAILPOINTS: {problem}"))
});

static CLOCK_OFFSET_MS: LazyLock<i64> = LazyLock::new(|| {
    let offset = env::var("MIDGE_TEST_CLOCK_OFFSET_MS");
    offset.map_or(0, |text| {
        text.parse()
            .expect("MIDGE_TEST_CLOCK_OFFSET_MS is a number")
    })
});

#[derive(Debug)]
struct Failpoint {
    signal: Signal,
    /// How often the place is still to be reached.
    left: AtomicU64,
}

fn parse(text: &str) -> Result<HashMap<String, Failpoint>, String> {
    let parts = text
        .split(';')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let unknown =
                || format!("`{part}` is not name=crash, name=stop or one of them with @n");
            let (name, action) = part.split_once('=').ok_or_else(unknown)?;
            if !PLACES.contains(&name) {
                return Err(format!("there is no place `{name}`"));
            }
            let (action, times) = action.split_once('@').unwrap_or((action, "1"));
            let signal = match action {
                "crash" => Signal::KILL,
                "stop" => Signal::STOP,
                _ => return Err(unknown()),
            };
            let left = times.parse().map_err(|_| unknown())?;
            let left = AtomicU64::new(left);
            Ok((name.to_owned(), Failpoint { signal, left }))
        })
        .collect()
}

/// Says that a place has been reached.
pub(crate) fn reach(name: &'static str) {
    if !cfg!(debug_assertions) {
        return;
    }
    debug_assert!(PLACES.contains(&name), "`{name}` is not among the places");
    let Some(failpoint) = FAILPOINTS.get(name) else {
        return;
    };
    // Wraps around after the last time: that is never reached.
    if failpoint.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        tracing::warn!(event = "failpoint", name);
        kill_process(getpid(), failpoint.signal).expect("a process may send signals to itself");
        // Another thread may be the first to see it, and this one must not go on until then.
        std::thread::sleep(SIGNAL_TIME);
    }
}

/// What is to be added to the time of day.
pub(crate) fn clock_offset_ms() -> i64 {
    if cfg!(debug_assertions) {
        *CLOCK_OFFSET_MS
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_actions_and_counts() {
        let failpoints = parse("before_write=crash; after_write=stop@3;").unwrap();
        let of = |name| {
            let failpoint: &Failpoint = &failpoints[name];
            (failpoint.signal, failpoint.left.load(Ordering::Relaxed))
        };
        assert_eq!(of("before_write"), (Signal::KILL, 1));
        assert_eq!(of("after_write"), (Signal::STOP, 3));
        assert_eq!(failpoints.len(), 2);
        assert!(parse("").unwrap().is_empty());
    }

    #[test]
    fn mistakes_are_told() {
        for wrong in [
            "nowhere=crash",
            "before_write",
            "before_write=explode",
            "before_write=crash@soon",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
