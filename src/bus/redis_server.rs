//! A Redis server for tests, and a Redis Cluster.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::{FromRedisValue, RedisError};
use tempfile::TempDir;
use tokio::time::sleep;

use super::redis::{Location, RedisBus};

/// A server, and the name of a cluster that nobody else uses there.
pub(super) struct RedisServer {
    url: String,
    cluster: String,
    own: Option<Process>,
}

/// It is killed when dropped, and keeps nothing.
struct Process {
    port: u16,
    command: Command,
    child: Child,
    /// Of those that insist on a file that they can write.
    _directory: Option<TempDir>,
}

impl RedisServer {
    /// The server at `MIDGE_TEST_REDIS_URL`; without that, a new one.
    pub(super) fn shared() -> Self {
        match env::var("MIDGE_TEST_REDIS_URL") {
            Ok(url) => Self::at(url, None),
            Err(_) => Self::start(),
        }
    }

    /// A new one, which may be treated badly.
    pub(super) fn start() -> Self {
        let [port] = free_ports();
        Self::run(port, server(port), None)
    }

    /// A new one that only those can use who know the password.
    pub(super) fn start_with_password(password: &str) -> Self {
        let [port] = free_ports();
        let mut command = server(port);
        command.args(["--requirepass", password]);
        Self::run(port, command, None)
    }

    /// A sentinel that knows this server by the name of a service.
    pub(super) fn sentinel(&self, service: &str, password: Option<&str>) -> Self {
        let [port] = free_ports();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("sentinel.conf");
        let server = self.own.as_ref().unwrap().port;
        let mut configuration = format!(
            "bind 127.0.0.1\nport {port}\nsentinel monitor {service} 127.0.0.1 {server} 1\n"
        );
        if let Some(password) = password {
            configuration.push_str(&format!("requirepass {password}\n"));
        }
        std::fs::write(&file, configuration).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg(&file).arg("--sentinel");
        Self::run(port, command, Some(directory))
    }

    fn run(port: u16, mut command: Command, directory: Option<TempDir>) -> Self {
        let process = Process {
            port,
            child: spawn(&mut command),
            command,
            _directory: directory,
        };
        Self::at(format!("redis://127.0.0.1:{port}"), Some(process))
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.own.as_ref().unwrap().port)
    }

    fn at(url: String, own: Option<Process>) -> Self {
        Self {
            url,
            cluster: format!("test-{:016x}", RandomState::new().hash_one(0)),
            own,
        }
    }

    pub(super) fn bus(&self, node: u32) -> RedisBus {
        RedisBus::new(Location::parse(&self.url).unwrap(), &self.cluster, node)
    }

    pub(super) fn kill(&mut self) {
        self.own.as_mut().unwrap().kill();
    }

    /// Starts it again, after it was killed.
    pub(super) fn start_again(&mut self) {
        let process = self.own.as_mut().unwrap();
        process.child = spawn(&mut process.command);
    }

    /// Stops it in the middle of whatever it does, and leaves its connections open.
    pub(super) fn freeze(&self) {
        self.signal("STOP");
    }

    pub(super) fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        let process = self.own.as_ref().unwrap().child.id().to_string();
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &process])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// Lets a client of the server say something.
    pub(super) async fn command(&self, words: &[&str]) {
        self.ask::<redis::Value>(words).await.unwrap();
    }

    /// The same, and returns the answer.
    pub(super) async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> Result<T, RedisError> {
        let client = redis::Client::open(self.url.as_str())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let mut command = redis::Cmd::new();
        words.iter().for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut connection).await
    }
}

/// Three masters, each with a third of the hash slots, and a password.
pub(super) struct RedisCluster {
    pub(super) masters: Vec<RedisServer>,
}

/// In the order of the masters.
const SLOTS: [[&str; 2]; 3] = [["0", "5460"], ["5461", "10922"], ["10923", "16383"]];

impl RedisCluster {
    /// A new one, which may be treated badly.
    pub(super) async fn start() -> Self {
        let mut masters = Vec::new();
        let mut meet = Vec::new();
        for _ in SLOTS {
            let [port, bus_port] = free_ports();
            meet.push([port.to_string(), bus_port.to_string()]);
            masters.push(RedisServer::start_master(port, bus_port));
        }
        for (epoch, (master, [first, last])) in (1..).zip(masters.iter().zip(SLOTS)) {
            while master.ask::<String>(&["PING"]).await.is_err() {
                sleep(POLL_INTERVAL).await;
            }
            let epoch = format!("{epoch}");
            master
                .command(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch])
                .await;
            master
                .command(&["CLUSTER", "ADDSLOTSRANGE", first, last])
                .await;
            for [port, bus_port] in &meet {
                let meet = ["CLUSTER", "MEET", "127.0.0.1", port, bus_port];
                master.command(&meet).await;
            }
        }
        let cluster = Self { masters };
        cluster.wait_until_up().await;
        cluster
    }

    /// Waits until each master knows all of them.
    async fn wait_until_up(&self) {
        for master in &self.masters {
            let is_up = |info: String| {
                let all = [
                    "cluster_state:ok",
                    "cluster_known_nodes:3",
                    "cluster_size:3",
                ];
                all.iter().all(|line| info.lines().any(|it| it == *line))
            };
            while !is_up(master.ask(&["CLUSTER", "INFO"]).await.unwrap()) {
                sleep(POLL_INTERVAL).await;
            }
        }
    }

    /// What a node is told of it.
    pub(super) fn url(&self) -> String {
        let addresses: Vec<_> = self.masters.iter().map(RedisServer::address).collect();
        format!("redis+cluster://:{PASSWORD}@{}", addresses.join(","))
    }

    /// Gives a hash slot to another master.
    pub(super) async fn move_slot(&self, slot: u16, from: usize, to: usize) {
        let slot = slot.to_string();
        let [from, to] = [&self.masters[from], &self.masters[to]];
        let name_of_from: String = from.ask(&["CLUSTER", "MYID"]).await.unwrap();
        let name_of_to: String = to.ask(&["CLUSTER", "MYID"]).await.unwrap();
        let set = ["CLUSTER", "SETSLOT", &slot];
        to.command(&[&set[..], &["IMPORTING", &name_of_from]].concat())
            .await;
        from.command(&[&set[..], &["MIGRATING", &name_of_to]].concat())
            .await;
        for master in [to, from] {
            master
                .command(&[&set[..], &["NODE", &name_of_to]].concat())
                .await;
        }
    }
}

/// Between looks at a server that is not ready yet.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

const PASSWORD: &str = "secret";

impl RedisServer {
    fn start_master(port: u16, bus_port: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = server(port);
        command
            .args(["--cluster-enabled", "yes", "--requirepass", PASSWORD])
            .args(["--cluster-port", &bus_port.to_string()])
            .arg("--dir")
            .arg(directory.path());
        let mut server = Self::run(port, command, Some(directory));
        server.url = format!("redis://:{PASSWORD}@127.0.0.1:{port}");
        server
    }
}

impl Process {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails when it was killed already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each another one.
fn free_ports<const COUNT: usize>() -> [u16; COUNT] {
    let listeners = [(); COUNT].map(|()| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

const PROGRAM: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/test-tools/redis-server"
);

fn server(port: u16) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .arg("--port")
        .arg(port.to_string());
    command
}

fn spawn(command: &mut Command) -> Child {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{PROGRAM}: {error}; ./test installs it"))
}
