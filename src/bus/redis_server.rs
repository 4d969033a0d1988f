//! A Redis server for tests.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

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
    child: Child,
    /// Of a sentinel, which insists on a file that it can write.
    _configuration: Option<TempDir>,
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
        let port = free_port();
        let child = spawn(port);
        Self::at(
            format!("redis://127.0.0.1:{port}"),
            Some(Process {
                port,
                child,
                _configuration: None,
            }),
        )
    }

    /// A new one that only those can use who know the password.
    pub(super) fn start_with_password(password: &str) -> Self {
        let port = free_port();
        let mut command = server(port);
        let child = run(command.args(["--requirepass", password]));
        Self::at(
            format!("redis://127.0.0.1:{port}"),
            Some(Process {
                port,
                child,
                _configuration: None,
            }),
        )
    }

    /// A sentinel that knows this server by the name of a service.
    pub(super) fn sentinel(&self, service: &str, password: Option<&str>) -> Self {
        let port = free_port();
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
        let child = run(Command::new(PROGRAM).arg(&file).arg("--sentinel"));
        Self::at(
            format!("redis://127.0.0.1:{port}"),
            Some(Process {
                port,
                child,
                _configuration: Some(directory),
            }),
        )
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
        process.child = spawn(process.port);
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
        let client = redis::Client::open(self.url.as_str()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let mut command = redis::Cmd::new();
        words.iter().for_each(|word| {
            command.arg(word);
        });
        let _: redis::Value = command.query_async(&mut connection).await.unwrap();
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

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

const PROGRAM: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/test-tools/redis-server"
);

fn spawn(port: u16) -> Child {
    run(&mut server(port))
}

fn server(port: u16) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .arg("--port")
        .arg(port.to_string());
    command
}

fn run(command: &mut Command) -> Child {
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{PROGRAM}: {error}; ./test installs it"))
}
