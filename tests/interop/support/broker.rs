use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use serde_json::Value;
use tempfile::TempDir;

use super::{certificates::Certificates, lines::Lines};

/// A running broker with its own data directory, reachable on free ports of this machine only.
/// It is killed when dropped, and a failed test shows its log.
pub(crate) struct Broker {
    setup: Setup,
    directory: TempDir,
    process: Child,
    log: Lines,
    /// Where each listener, by its name in the configuration, accepts connections.
    addresses: HashMap<String, SocketAddr>,
}

/// What a broker is started with: `key = value` as in the configuration file.
#[derive(Clone)]
pub(crate) struct Setup {
    settings: Vec<(String, String)>,
}

impl Setup {
    pub(crate) fn set(mut self, key: &str, value: impl Into<String>) -> Self {
        self.settings.push((key.to_owned(), value.into()));
        self
    }

    /// Adds the listener `ws`.
    pub(crate) fn websocket(self) -> Self {
        self.set("listeners.ws.kind", "ws")
            .set("listeners.ws.bind", "127.0.0.1:0")
    }

    /// Adds the listener `tls` or `wss`.
    pub(crate) fn encrypted(self, kind: &str, certificates: &Certificates) -> Self {
        let server = &certificates.server;
        self.set(&format!("listeners.{kind}.kind"), kind)
            .set(&format!("listeners.{kind}.bind"), "127.0.0.1:0")
            .set(
                &format!("listeners.{kind}.tls.certificate"),
                path_text(&server.certificate),
            )
            .set(&format!("listeners.{kind}.tls.key"), path_text(&server.key))
    }

    #[track_caller]
    pub(crate) fn start(self) -> Broker {
        let directory = TempDir::new().expect("a temporary directory can be made");
        Broker::start_in(directory, self)
    }
}

impl Broker {
    /// A broker with one plain TCP listener that lets everybody in.
    #[track_caller]
    pub(crate) fn start() -> Self {
        Self::configure().start()
    }

    pub(crate) fn configure() -> Setup {
        let settings = Vec::new();
        Setup { settings }
            .set("listeners.tcp.bind", "127.0.0.1:0")
            .set("http.bind", "127.0.0.1:0")
    }

    #[track_caller]
    fn start_in(directory: TempDir, setup: Setup) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
        command.arg("serve").current_dir(&directory);
        command.arg("--set").arg(format!(
            "store.path={}",
            path_text(&directory.path().join("data"))
        ));
        for (key, value) in &setup.settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let mut process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the broker can be started");
        let log = Lines::collect(process.stderr.take().expect("stderr is piped"));

        log.wait_for("the event `ready`", |lines| {
            events(lines, "ready").next().map(drop)
        });
        let addresses = events(&log.so_far(), "listener_started")
            .map(|event| {
                let name = field(&event, "listener").expect("the event names the listener");
                let address = field(&event, "address").expect("the event has the address");
                (name, address.parse().expect("the address is IP:port"))
            })
            .collect();
        Self {
            setup,
            directory,
            process,
            log,
            addresses,
        }
    }

    /// Where the listener with this name accepts connections.
    #[track_caller]
    pub(crate) fn address(&self, listener: &str) -> SocketAddr {
        *self
            .addresses
            .get(listener)
            .unwrap_or_else(|| panic!("no listener {listener} in {:?}", self.addresses))
    }

    pub(crate) fn port(&self) -> u16 {
        self.address("tcp").port()
    }

    /// A URL for the listener of this name, in the form that MQTT.js takes.
    pub(crate) fn url(&self, listener: &str) -> String {
        let scheme = match listener {
            "tcp" => "mqtt",
            "tls" => "mqtts",
            websocket => websocket,
        };
        format!("{scheme}://{}", self.address(listener))
    }

    /// Stops the broker as an operator does and starts it again, on the same data and ports.
    pub(crate) fn restart(&mut self) {
        self.terminate();
        self.start_again();
    }

    /// Kills the broker as a power cut does and starts it again, on the same data and ports.
    pub(crate) fn crash_and_restart(&mut self) {
        self.process.kill().expect("the process can be killed");
        self.process.wait().expect("the process can be waited for");
        self.start_again();
    }

    fn terminate(&mut self) {
        let killed = Command::new("kill")
            .args(["-TERM", &self.process.id().to_string()])
            .status()
            .expect("the program kill exists");
        assert!(killed.success(), "the broker was not running any more");
        assert!(
            self.log.wait_for_end(),
            "the broker does not end after SIGTERM"
        );
        let status = self.process.wait().expect("the process can be waited for");
        assert!(status.success(), "the broker ended with {status}");
    }

    fn start_again(&mut self) {
        let unused = TempDir::new().expect("a temporary directory can be made");
        let directory = std::mem::replace(&mut self.directory, unused);
        let mut setup = self.setup.clone();
        for (name, address) in &self.addresses {
            setup = setup.set(&format!("listeners.{name}.bind"), address.to_string());
        }
        *self = Self::start_in(directory, setup);
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

/// The records of one event in a log of JSON lines.
fn events<'a>(lines: &'a [String], event: &'a str) -> impl Iterator<Item = Value> + 'a {
    lines
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(move |record| field(record, "event").as_deref() == Some(event))
}

/// A field of a log record, at the top or below `fields`.
fn field(record: &Value, name: &str) -> Option<String> {
    let value = record.get(name).or_else(|| record.get("fields")?.get(name));
    value?.as_str().map(str::to_owned)
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}
