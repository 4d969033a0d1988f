//! How far a long command is, on stderr: a bar on a terminal, and lines now and then elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::time::Instant;

use crate::copy::{Progress, Step};

const BAR_WIDTH: usize = 30;

const BAR_INTERVAL: Duration = Duration::from_millis(100);
const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct Display {
    is_terminal: bool,
    shown: Option<(Step, Instant)>,
}

impl Display {
    pub(super) fn new() -> Self {
        Self {
            is_terminal: io::stderr().is_terminal(),
            shown: None,
        }
    }

    /// Shows a step when it begins and is done, and in between not too often.
    pub(super) fn show(&mut self, progress: Progress) {
        let interval = match self.is_terminal {
            true => BAR_INTERVAL,
            false => LINE_INTERVAL,
        };
        let is_due = match self.shown {
            Some((step, at)) => step != progress.step || at.elapsed() >= interval,
            None => true,
        };
        if !is_due && progress.done < progress.total {
            return;
        }
        self.shown = Some((progress.step, Instant::now()));
        // Nobody may be reading: that is no reason to stop.
        let _ = if self.is_terminal {
            write!(io::stderr(), "\r{}\x1b[K", bar(progress))
        } else {
            writeln!(io::stderr(), "{}", line(progress))
        };
    }

    /// Leaves the line of the bar.
    pub(super) fn finish(&self) {
        if self.is_terminal && self.shown.is_some() {
            let _ = writeln!(io::stderr());
        }
    }
}

fn line(Progress { step, done, total }: Progress) -> String {
    format!("{}: {done} of {total}", name(step))
}

fn bar(progress: Progress) -> String {
    let Progress { step, done, total } = progress;
    // Nothing to do is done.
    let (part, whole) = if total == 0 { (1, 1) } else { (done, total) };
    let filled = (BAR_WIDTH as u64 * part / whole) as usize;
    let percent = 100 * part / whole;
    format!(
        "{:<17} [{:-<BAR_WIDTH$}] {percent:>3} %  {done} of {total}",
        name(step),
        "#".repeat(filled)
    )
}

fn name(step: Step) -> &'static str {
    match step {
        Step::Sessions => "sessions",
        Step::Messages => "waiting messages",
        Step::Retained => "retained messages",
        Step::Check => "check",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64, total: u64) -> Progress {
        Progress {
            step: Step::Check,
            done,
            total,
        }
    }

    #[test]
    fn a_bar_is_as_long_as_what_is_done() {
        let half = format!("[{}{}]  50 %  1 of 2", "#".repeat(15), "-".repeat(15));
        let full = format!("[{}] 100 %  2 of 2", "#".repeat(30));

        assert!(bar(progress(1, 2)).ends_with(&half));
        assert!(bar(progress(2, 2)).ends_with(&full));
        assert!(bar(progress(0, 0)).ends_with("] 100 %  0 of 0"));
    }
}
