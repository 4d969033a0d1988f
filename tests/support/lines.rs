use std::{
    io::{BufRead, BufReader, Read},
    panic::Location,
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

/// Bounds a hang; no test relies on its length.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The lines that a process has printed so far to one of its streams.
#[derive(Clone)]
pub(crate) struct Lines {
    shared: Arc<Shared>,
}

struct Shared {
    printed: Mutex<Printed>,
    changed: Condvar,
}

#[derive(Default)]
struct Printed {
    lines: Vec<String>,
    /// The process closed the stream: no line will follow.
    ended: bool,
}

impl Lines {
    pub(crate) fn collect(stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            printed: Mutex::default(),
            changed: Condvar::new(),
        });
        let collected = Self {
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(stream.read_until(b'\n', &mut line), Ok(1..)) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                shared.printed.lock().lines.push(text);
                shared.changed.notify_all();
                line.clear();
            }
            shared.printed.lock().ended = true;
            shared.changed.notify_all();
        });
        collected
    }

    pub(crate) fn so_far(&self) -> Vec<String> {
        self.shared.printed.lock().lines.clone()
    }

    /// Whether the process has closed the stream.
    #[allow(dead_code, reason = "the cluster tests use it")]
    pub(crate) fn has_ended(&self) -> bool {
        self.shared.printed.lock().ended
    }

    /// Waits until `find` sees what it looks for in all lines up to now.
    ///
    /// # Panics
    /// When the stream ends, or [`DEADLINE`] passes, without it.
    #[track_caller]
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        mut find: impl FnMut(&[String]) -> Option<T>,
    ) -> T {
        let mut printed = self.shared.printed.lock();
        loop {
            if let Some(found) = find(&printed.lines) {
                return found;
            }
            let problem = if printed.ended {
                "the stream ended without"
            } else if self
                .shared
                .changed
                .wait_for(&mut printed, DEADLINE)
                .timed_out()
            {
                "waited too long for"
            } else {
                continue;
            };
            let lines = printed.lines.join("\n");
            drop(printed);
            panic!("{}: {problem} {what}, in:\n{lines}", Location::caller());
        }
    }

    /// Waits for the end of the stream; `false` when [`DEADLINE`] passes first.
    pub(crate) fn wait_for_end(&self) -> bool {
        let mut printed = self.shared.printed.lock();
        while !printed.ended {
            if self
                .shared
                .changed
                .wait_for(&mut printed, DEADLINE)
                .timed_out()
            {
                return printed.ended;
            }
        }
        true
    }
}
