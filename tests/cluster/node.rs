//! The nodes of a cluster, as programs that a test can kill, freeze and start again.

use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;

use crate::lines::Lines;
use crate::mongod::Database;
use crate::process::Process;
use crate::proxy::Proxy;
use crate::traffic::Server;

/// Keys and values of a node's configuration; those that begin with `MIDGE_` are of its environment.
pub(crate) type Settings = Vec<(String, String)>;

impl Database {
    /// What makes a node use it.
    pub(crate) fn settings(&self) -> Settings {
        let pairs = [
            ("store.kind", "mongodb"),
            ("store.uri", &self.uri),
            ("store.database", &self.name),
        ];
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        pairs.map(owned).to_vec()
    }
}

/// Some nodes on one store. All are killed when it is dropped.
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    running: Arc<Running>,
}

/// The nodes that clients are sent to.
#[derive(Default)]
struct Running {
    servers: watch::Sender<Vec<Server>>,
    /// Starts of any node so far.
    runs: Mutex<u32>,
}

impl Cluster {
    /// Starts a node with each of these settings, all at once, and waits until they serve.
    pub(crate) async fn start(settings: Vec<Settings>) -> Self {
        let running = Arc::<Running>::default();
        let mut starting = Vec::new();
        for (number, mut settings) in (1..).zip(settings) {
            let name = format!("node-{number}");
            settings.push(("node.name".to_owned(), name.clone()));
            starting.push((spawn(&name, &settings), name, settings));
        }
        let mut nodes = Vec::new();
        for (process, name, settings) in starting {
            let address = wait_until_ready(&process);
            let mut node = Node {
                name,
                settings,
                process,
                front: Proxy::start(address).await,
                running: running.clone(),
                run: 0,
            };
            node.enter();
            nodes.push(node);
        }
        Self { nodes, running }
    }

    /// Numbers begin with 0.
    pub(crate) fn node(&mut self, number: usize) -> &mut Node {
        &mut self.nodes[number]
    }

    /// Where clients are sent to: the nodes that run and are not frozen.
    pub(crate) fn servers(&self) -> watch::Receiver<Vec<Server>> {
        self.running.servers.subscribe()
    }
}

/// A node. Clients reach it through a proxy, as they do through a load balancer: so its address
/// stays, and they notice when it is frozen.
pub(crate) struct Node {
    name: String,
    settings: Settings,
    process: Process,
    front: Proxy,
    running: Arc<Running>,
    run: u32,
}

impl Node {
    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.front.address()
    }

    /// Where it answers HTTP.
    pub(crate) fn http_address(&self) -> SocketAddr {
        address(&self.wait_for_event("http_started"))
    }

    /// Waits until it logs an event of this name.
    #[track_caller]
    pub(crate) fn wait_for_event(&self, name: &str) -> Value {
        self.process
            .log()
            .wait_for(&format!("the event `{name}`"), |lines| event(lines, name))
    }

    /// Waits until it has logged events of this name so many times since it was started.
    #[track_caller]
    pub(crate) fn wait_for_events(&self, name: &str, times: usize) {
        let what = format!("the event `{name}`, {times} times");
        self.process.log().wait_for(&what, |lines| {
            let events = lines.iter().filter(|line| is_event(line, name));
            (events.count() >= times).then_some(())
        });
    }

    /// Whether it has logged an event of this name until now.
    pub(crate) fn has_logged(&self, name: &str) -> bool {
        event(&self.process.log().so_far(), name).is_some()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.leave();
        self.process.kill();
    }

    /// How much memory it takes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.process.resident_bytes()
    }

    /// From its next start on it crashes or stops at these places: see `src/failpoint.rs`.
    pub(crate) fn fail_at(&mut self, failpoints: &str) {
        self.settings.retain(|(key, _)| key != FAILPOINTS);
        self.settings
            .push((FAILPOINTS.to_owned(), failpoints.to_owned()));
    }

    /// The place at which it has crashed, if it has.
    pub(crate) fn crashed_at(&self) -> Option<String> {
        if !self.process.has_ended() {
            return None;
        }
        let failpoint = event(&self.process.log().so_far(), "failpoint");
        let failpoint = failpoint.expect("it ends at a failpoint");
        Some(failpoint["name"].as_str().unwrap().to_owned())
    }

    /// Starts it again, after it has crashed.
    #[track_caller]
    pub(crate) fn start_after_crash(&mut self) {
        self.kill();
        self.start_again();
    }

    /// Starts it again, after it has ended.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        self.process = spawn(&self.name, &self.settings);
        self.front.retarget(wait_until_ready(&self.process));
        self.enter();
    }

    /// Stops it in the middle of whatever it does. Its clients are cut off and go elsewhere.
    pub(crate) fn freeze(&self) {
        self.leave();
        self.process.freeze();
        self.front.cut();
    }

    /// Lets it go on after [`Node::freeze`], and clients come back.
    pub(crate) fn thaw(&mut self) {
        self.process.thaw();
        self.front.restore();
        self.enter();
    }

    /// Stops it in the middle of whatever it does. Its clients stay.
    pub(crate) fn freeze_in_place(&self) {
        self.process.freeze();
    }

    /// Lets it go on after [`Node::freeze_in_place`], or after it has stopped by itself.
    pub(crate) fn thaw_in_place(&self) {
        self.process.thaw();
    }

    /// Waits until it serves again after the others had declared it dead.
    #[track_caller]
    pub(crate) fn wait_until_anew(&self) {
        let started = self.process.log().wait_for("a second `ready`", |lines| {
            let fenced = lines.iter().position(|line| is_event(line, "fenced"))?;
            let again = &lines[fenced..];
            event(again, "ready")?;
            event(again, "listener_started")
        });
        self.front.retarget(address(&started));
    }

    /// Sends clients to where it has started anew, if others had declared it dead.
    pub(crate) fn follow_new_starts(&self) {
        let lines = self.process.log().so_far();
        let start = lines.iter().rposition(|line| is_event(line, "fenced"));
        if let Some(start) = start
            && event(&lines[start..], "ready").is_some()
            && let Some(started) = event(&lines[start..], "listener_started")
        {
            self.front.retarget(address(&started));
        }
    }

    /// Ends it as an operator does.
    #[track_caller]
    pub(crate) fn terminate(&mut self) -> ExitStatus {
        self.leave();
        self.process.terminate()
    }

    fn enter(&mut self) {
        let mut runs = self.running.runs.lock();
        *runs += 1;
        self.run = *runs;
        let server = Server {
            run: self.run,
            address: self.address(),
        };
        self.running
            .servers
            .send_modify(|servers| servers.push(server));
    }

    fn leave(&self) {
        self.running
            .servers
            .send_modify(|servers| servers.retain(|server| server.run != self.run));
    }
}

/// What a node's failpoints are set by.
pub(crate) const FAILPOINTS: &str = "MIDGE_TEST_FAILPOINTS";

fn spawn(name: &str, settings: &Settings) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    command.args(["serve", "--set", "listeners.tcp.bind=127.0.0.1:0"]);
    command.args(["--set", "http.bind=127.0.0.1:0"]);
    for (key, value) in settings {
        if key.starts_with(char::is_uppercase) {
            command.env(key, value);
        } else {
            command.arg("--set").arg(format!("{key}={value}"));
        }
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let log = Lines::collect(child.stderr.take().expect("stderr is piped"));
    Process::new(name.to_owned(), child, log)
}

/// Waits until the node serves; returns where.
#[track_caller]
fn wait_until_ready(process: &Process) -> SocketAddr {
    let log = process.log();
    log.wait_for("the event `ready`", |lines| event(lines, "ready"));
    address(&event(&log.so_far(), "listener_started").expect("it comes before `ready`"))
}

fn address(started: &Value) -> SocketAddr {
    started["address"].as_str().unwrap().parse().unwrap()
}

fn is_event(line: &String, name: &str) -> bool {
    event(std::slice::from_ref(line), name).is_some()
}

fn event(lines: &[String], name: &str) -> Option<Value> {
    lines
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|record| record["event"] == name)
}
