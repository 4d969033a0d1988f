//! The broker under test: the real binary, as a process of its own.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::client::Client;
use super::wire::{Connect, Packet, Version};

/// How long a start may take on a machine that does many other things.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A running broker on data of its own; killed when dropped.
pub(crate) struct Broker {
    process: Process,
    settings: Vec<(String, String)>,
    data: TempDir,
}

impl Broker {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts with these settings beside the defaults.
    pub(crate) fn start_with(settings: &[(&str, &str)]) -> Self {
        let data = tempfile::tempdir().expect("a temporary directory");
        let settings: Vec<_> = settings
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Self {
            process: Process::start(&settings, &data),
            settings,
            data,
        }
    }

    /// Opens a connection on which nothing has been sent.
    pub(crate) fn open(&self, version: Version) -> Client {
        Client::open(self.process.address, version)
    }

    /// Connects with a clean start.
    #[track_caller]
    pub(crate) fn connect(&self, version: Version, client_id: &str) -> Client {
        self.connect_with(&Connect::new(version, client_id)).0
    }

    /// Connects to a session that outlives the connection, and checks whether there was one.
    #[track_caller]
    pub(crate) fn connect_persistent(
        &self,
        version: Version,
        client_id: &str,
        session_present: bool,
    ) -> Client {
        let (client, connack) = self.connect_with(&Connect::persistent(version, client_id));
        assert_eq!(connack.session_present, session_present, "{connack:?}");
        client
    }

    /// Connects and returns the CONNACK, which must be a success.
    #[track_caller]
    pub(crate) fn connect_with(&self, connect: &Connect) -> (Client, Packet) {
        let mut client = self.open(connect.version);
        client.send(&connect.bytes());
        let connack = client.expect_connack(0);
        (client, connack)
    }

    /// Lets a second and a half pass, told by the broker: it closes a silent client after that.
    #[track_caller]
    pub(crate) fn wait_for_keep_alive_timeout(&self) {
        let (mut silent, _) =
            self.connect_with(&Connect::new(Version::V3_1_1, "silent").keep_alive(1));
        silent.expect_closed();
    }

    /// Shuts down in order and starts again on the same data.
    pub(crate) fn restart(&mut self) {
        self.process.terminate();
        self.process = Process::start(&self.settings, &self.data);
    }

    /// Kills without warning and starts again on the same data.
    pub(crate) fn crash_and_restart(&mut self) {
        self.process.kill();
        self.process = Process::start(&self.settings, &self.data);
    }
}

struct Process {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    log_reader: Option<JoinHandle<()>>,
}

impl Process {
    fn start(settings: &[(String, String)], data: &TempDir) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
        command.arg("serve");
        let path = data.path().display().to_string();
        let fixed = [
            ("listeners.tcp.bind", "127.0.0.1:0"),
            ("http.bind", "127.0.0.1:0"),
            ("store.path", path.as_str()),
            ("log.format", "json"),
        ];
        for (key, value) in fixed {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        for (key, value) in settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the midge binary");

        let log = Arc::new(Mutex::new(Vec::new()));
        let (started, listener) = mpsc::channel();
        let stderr = child.stderr.take().expect("stderr is piped");
        let log_reader = thread::spawn({
            let log = Arc::clone(&log);
            move || read_log(stderr, &log, &started)
        });
        let mut process = Self {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            log,
            log_reader: Some(log_reader),
        };
        process.address = listener
            .recv_timeout(START_DEADLINE)
            .expect("midge logs that its listener has started");
        process
    }

    fn terminate(&mut self) {
        let killed = Command::new("kill")
            .arg(self.child.id().to_string())
            .status();
        assert!(killed.expect("kill").success(), "SIGTERM is sent");
        self.child.wait().expect("a child that was not waited for");
    }

    fn kill(&mut self) {
        // It may have ended by itself, which the log tells.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.log_reader.take() {
            let _ = reader.join();
        }
        if thread::panicking() {
            let log = self
                .log
                .lock()
                .map(|lines| lines.join("\n"))
                .unwrap_or_default();
            eprintln!("── the broker's log ──\n{log}");
        }
    }
}

/// Collects what the broker logs and reports the address of its MQTT listener.
fn read_log(stderr: ChildStderr, log: &Mutex<Vec<String>>, started: &Sender<SocketAddr>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if let Some(address) = listener_address(&line) {
            // Nobody listens any more after the first one.
            let _ = started.send(address);
        }
        if let Ok(mut log) = log.lock() {
            log.push(line);
        }
    }
}

fn listener_address(line: &str) -> Option<SocketAddr> {
    let event: Value = serde_json::from_str(line).ok()?;
    let field = |name: &str| {
        event
            .get(name)
            .or_else(|| event.get("fields")?.get(name))?
            .as_str()
    };
    if field("event")? != "listener_started" {
        return None;
    }
    // An HTTP listener may start as well.
    if field("listener").is_some_and(|listener| listener != "tcp") {
        return None;
    }
    field("address")?.parse().ok()
}
