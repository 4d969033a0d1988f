//! The mongod that tests use: the one that `MIDGE_TEST_MONGODB_URI` names, or one of their own.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bson::doc;
use mongodb::Client;
use mongodb::options::ClientOptions;
use tempfile::TempDir;

/// Where `./test` puts the program.
const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/test-tools/mongod");

pub(super) struct Server {
    pub(super) uri: String,
    /// Stopped with the fixture.
    _own: Option<Process>,
}

struct Process {
    child: Child,
    _directory: TempDir,
}

impl Server {
    /// A replica set with one member.
    pub(super) async fn find() -> Self {
        if let Ok(uri) = std::env::var("MIDGE_TEST_MONGODB_URI") {
            return Self { uri, _own: None };
        }
        Self::start_replica_set(&[]).await
    }

    /// A replica set of its own that obeys `configureFailPoint`.
    pub(super) async fn with_failpoints() -> Self {
        Self::start_replica_set(&["--setParameter", "enableTestCommands=1"]).await
    }

    async fn start_replica_set(arguments: &[&str]) -> Self {
        let server = Self::start(&[&["--replSet", "test"], arguments].concat()).await;
        let client = server.client().await;
        let admin = client.database("admin");
        let initiated = admin.run_command(doc! { "replSetInitiate": {} }).await;
        initiated.unwrap();
        // It elects itself.
        loop {
            let hello = admin.run_command(doc! { "hello": 1 }).await.unwrap();
            if hello.get_bool("isWritablePrimary").unwrap() {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A server that belongs to no replica set.
    pub(super) async fn standalone() -> Self {
        Self::start(&[]).await
    }

    async fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let child = Command::new(PROGRAM)
            .args(["--bind_ip", "127.0.0.1", "--nounixsocket"])
            .args(["--wiredTigerCacheSizeGB", "0.25"])
            .args(["--port", &port.to_string()])
            .arg("--dbpath")
            .arg(directory.path())
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{PROGRAM}: {error}: run ./test once"));
        let process = Process {
            child,
            _directory: directory,
        };
        let server = Self {
            uri: format!("mongodb://127.0.0.1:{port}/?directConnection=true"),
            _own: Some(process),
        };
        let ping = server.client().await.database("admin");
        ping.run_command(doc! { "ping": 1 }).await.unwrap();
        server
    }

    /// Waits for the server.
    async fn client(&self) -> Client {
        let mut options = ClientOptions::parse(&self.uri).await.unwrap();
        options.server_selection_timeout = Some(Duration::from_secs(60));
        Client::with_options(options).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let stopped = self.child.kill().and_then(|()| self.child.wait());
        stopped.expect("a child can be killed");
    }
}
