use std::{
    ffi::OsStr,
    io::Write,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use super::lines::Lines;

/// A running client program. It is killed when dropped, and a failed test shows what it printed.
pub(crate) struct Program {
    name: String,
    process: Child,
    stdout: Lines,
    stderr: Lines,
}

/// What a program that ended by itself leaves behind.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<String>,
    pub(crate) stderr: Vec<String>,
}

impl Program {
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let name = display_name(command);
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("cannot start {name}: {error}; ./test installs what the tests need")
            });
        let stdout = Lines::collect(process.stdout.take().expect("stdout is piped"));
        let stderr = Lines::collect(process.stderr.take().expect("stderr is piped"));
        Self {
            name,
            process,
            stdout,
            stderr,
        }
    }

    pub(crate) fn stdout(&self) -> &Lines {
        &self.stdout
    }

    /// Waits for a line of standard output that contains `text`.
    #[track_caller]
    pub(crate) fn wait_for_line(&self, text: &str) {
        self.stdout.wait_for(&format!("{text:?}"), |lines| {
            lines.iter().any(|line| line.contains(text)).then_some(())
        });
    }

    /// Waits for a line of standard error that contains `text`.
    #[track_caller]
    pub(crate) fn wait_for_error(&self, text: &str) {
        self.stderr.wait_for(&format!("{text:?}"), |lines| {
            lines.iter().any(|line| line.contains(text)).then_some(())
        });
    }

    /// Waits for `count` lines of standard output and returns all that are there then.
    #[track_caller]
    pub(crate) fn wait_for_lines(&self, count: usize) -> Vec<String> {
        self.stdout.wait_for(&format!("{count} lines"), |lines| {
            (lines.len() >= count).then(|| lines.to_vec())
        })
    }

    /// Sends `line` to the program's standard input.
    #[track_caller]
    pub(crate) fn write_line(&mut self, line: &str) {
        let stdin = self.process.stdin.as_mut().expect("stdin is piped");
        writeln!(stdin, "{line}").expect("the program reads its standard input");
    }

    /// Closes standard input and waits for the program to end by itself.
    #[track_caller]
    pub(crate) fn finish(mut self) -> Finished {
        drop(self.process.stdin.take());
        assert!(
            self.stdout.wait_for_end() && self.stderr.wait_for_end(),
            "{} does not end",
            self.name
        );
        let status = self.process.wait().expect("the process can be waited for");
        Finished {
            status,
            stdout: self.stdout.so_far(),
            stderr: self.stderr.so_far(),
        }
    }

    /// Waits for the program to end by itself with success; returns what it printed.
    #[track_caller]
    pub(crate) fn succeed(self) -> Vec<String> {
        let name = self.name.clone();
        let finished = self.finish();
        assert!(finished.status.success(), "{name}: {finished:#?}");
        finished.stdout
    }

    /// Asks the program to end, as Ctrl-C does.
    #[track_caller]
    pub(crate) fn interrupt(&self) {
        let killed = Command::new("kill")
            .args(["-INT", &self.process.id().to_string()])
            .status()
            .expect("the program kill exists");
        assert!(killed.success(), "{} was not running any more", self.name);
    }

    /// Ends the program without warning, as a crash or a lost machine would.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.process.kill().expect("the process can be killed");
        self.process.wait().expect("the process can be waited for");
        self.stdout.wait_for_end();
        self.stdout.so_far()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            for (stream, lines) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
                eprintln!(
                    "--- {stream} of {}\n{}",
                    self.name,
                    lines.so_far().join("\n")
                );
            }
        }
    }
}

fn display_name(command: &Command) -> String {
    [command.get_program()]
        .into_iter()
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}
