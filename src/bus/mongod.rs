//! A MongoDB server for tests, and a database for one.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use mongodb::bson::doc;
use mongodb::{Client, Database};
use tempfile::TempDir;

/// A server, and the name of a database that nobody else uses.
pub(crate) struct Mongod {
    uri: String,
    database: String,
    own: Option<Process>,
}

/// A replica set of one member on a free port, with a directory of its own; both go with it.
struct Process {
    directory: TempDir,
    port: u16,
    child: Child,
}

impl Mongod {
    /// The server at `MIDGE_TEST_MONGODB_URI`; without that, a new one.
    pub(crate) async fn shared() -> Self {
        match env::var("MIDGE_TEST_MONGODB_URI") {
            Ok(uri) => Self::at(uri, None),
            Err(_) => Self::start().await,
        }
    }

    /// A new one, which may be treated badly.
    pub(crate) async fn start() -> Self {
        let process = Process::start();
        let member = format!("127.0.0.1:{}", process.port);
        let direct = Client::with_uri_str(format!("mongodb://{member}/?directConnection=true"))
            .await
            .unwrap();
        let members = doc! { "_id": "test", "members": [{ "_id": 0, "host": &member }] };
        direct
            .database("admin")
            .run_command(doc! { "replSetInitiate": members })
            .await
            .unwrap();
        Self::at(
            format!("mongodb://{member}/?replicaSet=test"),
            Some(process),
        )
    }

    fn at(uri: String, own: Option<Process>) -> Self {
        Self {
            uri,
            database: format!("midge_test_{:016x}", RandomState::new().hash_one(0)),
            own,
        }
    }

    /// Through a client of its own.
    pub(crate) async fn database(&self) -> Database {
        let client = Client::with_uri_str(&self.uri).await.unwrap();
        client.database(&self.database)
    }

    /// Kills it and starts it again.
    pub(crate) fn restart(&mut self) {
        let process = self.own.as_mut().unwrap();
        process.kill();
        process.child = spawn(&process.directory, process.port);
    }

    /// Leaves nothing behind on a server that lives on.
    pub(crate) async fn end(self) {
        if self.own.is_none() {
            self.database().await.drop().await.unwrap();
        }
    }
}

impl Process {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = free_port();
        let child = spawn(&directory, port);
        Self {
            directory,
            port,
            child,
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(directory: &TempDir, port: u16) -> Child {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/target/test-tools/mongod");
    Command::new(program)
        .args(["--replSet", "test", "--bind_ip", "127.0.0.1"])
        .args(["--wiredTigerCacheSizeGB", "0.25"])
        .args(["--setParameter", "diagnosticDataCollectionEnabled=false"])
        .arg("--port")
        .arg(port.to_string())
        .arg("--dbpath")
        .arg(directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; ./test installs it"))
}
