//! A program that a test starts, disturbs, and ends.

use std::process::{Child, Command, ExitStatus};
use std::thread;

use crate::lines::Lines;

/// It is killed when dropped, and a failed test shows the end of its log.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: Lines,
}

/// Lines of the log that a failed test shows.
const SHOWN_LINES: usize = 200;

impl Process {
    pub(crate) fn new(name: String, child: Child, log: Lines) -> Self {
        Self { name, child, log }
    }

    pub(crate) fn log(&self) -> &Lines {
        &self.log
    }

    /// How much memory it takes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kibibytes = line.unwrap().split_whitespace().nth(1).unwrap();
        kibibytes.parse::<u64>().unwrap() * 1024
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.log.has_ended()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops it in the middle of whatever it does, and leaves its connections open.
    pub(crate) fn freeze(&self) {
        self.signal("STOP");
    }

    /// Lets it go on after [`Process::freeze`].
    pub(crate) fn thaw(&self) {
        self.signal("CONT");
    }

    /// Ends it as an operator does.
    #[track_caller]
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM");
        self.wait()
    }

    /// Waits for it to end by itself.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        assert!(self.log.wait_for_end(), "{} does not end", self.name);
        self.child.wait().unwrap()
    }

    #[track_caller]
    fn signal(&self, signal: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success(), "{} is not running any more", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let lines = self.log.so_far();
            let shown = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
            eprintln!("--- log of {}\n{}", self.name, shown.join("\n"));
        }
    }
}
