//! The broker as a process that can be killed and started again on the same data.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::{fs, thread};

use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::lines::Lines;
use crate::traffic::Server;

/// A running broker. It is killed when dropped, and a failed test shows its log.
pub(crate) struct Broker {
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    data: PathBuf,
    _directory: TempDir,
    process: Child,
    log: Lines,
    run: u32,
    /// Empty while the broker is being killed and started.
    server: watch::Sender<Vec<Server>>,
}

impl Broker {
    #[track_caller]
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    #[track_caller]
    pub(crate) fn start_with(settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let data = directory.path().join("data");
        Self::start_on(&data, directory, settings)
    }

    /// With a configuration file.
    #[track_caller]
    pub(crate) fn start_from(config: &Path, settings: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let data = directory.path().join("data");
        let config = config.to_str().expect("paths of tests are UTF-8");
        Self::start_as(&[("MIDGE_CONFIG", config)], &data, directory, settings)
    }

    #[track_caller]
    pub(crate) fn start_in(environment: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let data = directory.path().join("data");
        Self::start_as(environment, &data, directory, &[])
    }

    /// On the data directory `data`, which lies in `directory`.
    #[track_caller]
    pub(crate) fn start_on(data: &Path, directory: TempDir, settings: &[(&str, &str)]) -> Self {
        Self::start_as(&[], data, directory, settings)
    }

    #[track_caller]
    fn start_as(
        environment: &[(&str, &str)],
        data: &Path,
        directory: TempDir,
        settings: &[(&str, &str)],
    ) -> Self {
        let owned = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            let pairs = pairs.iter();
            pairs
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let (settings, environment) = (owned(settings), owned(environment));
        let (process, log) = spawn(&environment, data, &settings);
        let address = wait_until_ready(&log);
        let first = Server { run: 1, address };
        Self {
            settings,
            environment,
            data: data.to_owned(),
            _directory: directory,
            process,
            log,
            run: 1,
            server: watch::Sender::new(vec![first]),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        let running = self.server.borrow();
        running.first().expect("the broker runs").address
    }

    pub(crate) fn server(&self) -> watch::Receiver<Vec<Server>> {
        self.server.subscribe()
    }

    pub(crate) fn data(&self) -> &Path {
        &self.data
    }

    /// Kills the broker as a power cut would.
    pub(crate) fn crash(&mut self) {
        self.server.send_replace(Vec::new());
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts the broker again, after it has ended, on the same data.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        (self.process, self.log) = spawn(&self.environment, &self.data, &self.settings);
        let address = wait_until_ready(&self.log);
        self.run += 1;
        let run = self.run;
        self.server.send_replace(vec![Server { run, address }]);
    }

    #[track_caller]
    pub(crate) fn crash_and_restart(&mut self) {
        self.crash();
        self.start_again();
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &self.process.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success(), "the broker is not running any more");
    }

    /// Waits for the broker to end by itself.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.server.send_replace(Vec::new());
        assert!(self.log.wait_for_end(), "the broker does not end");
        self.process.wait().unwrap()
    }

    /// Stops the broker as an operator does.
    #[track_caller]
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.server.send_replace(Vec::new());
        self.signal("TERM");
        self.wait()
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.so_far()
    }

    #[track_caller]
    pub(crate) fn wait_for_log<T>(
        &self,
        what: &str,
        find: impl FnMut(&[String]) -> Option<T>,
    ) -> T {
        self.log.wait_for(what, find)
    }

    /// Memory that the process has in use.
    pub(crate) fn memory_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!("--- log of the broker\n{}", self.log.so_far().join("\n"));
        }
    }
}

/// `midge serve` on a data directory and a free port, not yet started.
pub(crate) fn command(data: &Path, settings: &[(String, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    command.arg("serve");
    let path = data.to_str().expect("paths of tests are UTF-8");
    command.arg("--set").arg(format!("store.path={path}"));
    command.args(["--set", "listeners.tcp.bind=127.0.0.1:0"]);
    command.args(["--set", "http.bind=127.0.0.1:0"]);
    for (key, value) in settings {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn spawn(
    environment: &[(String, String)],
    data: &Path,
    settings: &[(String, String)],
) -> (Child, Lines) {
    let environment = environment.iter().map(|(name, value)| (name, value));
    let mut process = command(data, settings).envs(environment).spawn().unwrap();
    let log = Lines::collect(process.stderr.take().expect("stderr is piped"));
    (process, log)
}

#[track_caller]
fn wait_until_ready(log: &Lines) -> SocketAddr {
    let event = |lines: &[String], name: &str| {
        lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find(|record| record["event"] == name)
    };
    log.wait_for("the event `ready`", |lines| event(lines, "ready"));
    let started = event(&log.so_far(), "listener_started").expect("it comes before `ready`");
    started["address"].as_str().unwrap().parse().unwrap()
}
