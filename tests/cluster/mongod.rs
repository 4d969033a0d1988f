//! MongoDB servers that a test can kill, freeze and cut off.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, process};

use mongodb::Client;
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::ClientOptions;
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use crate::lines::{DEADLINE, Lines};
use crate::process::Process;
use crate::proxy::Proxy;

/// One server, with a directory and a port of its own. It is killed when dropped.
pub(crate) struct Mongod {
    process: Process,
    directory: TempDir,
    port: u16,
}

/// The name of every replica set.
pub(crate) const SET: &str = "midge";

impl Mongod {
    /// Starts servers, which are no replica set yet.
    #[track_caller]
    fn start_many(count: usize) -> Vec<Self> {
        let starting: Vec<_> = (0..count)
            .map(|_| {
                let directory = TempDir::new().unwrap();
                // Any free port, as long as there is no other one to come back to.
                (spawn(&directory, 0, &[]), directory)
            })
            .collect();
        let started = starting.into_iter().map(|(process, directory)| Self {
            port: wait_until_ready(&process),
            process,
            directory,
        });
        started.collect()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it as an operator does.
    #[track_caller]
    pub(crate) fn terminate(&mut self) {
        let status = self.process.terminate();
        assert!(status.success(), "mongod: {status}");
    }

    /// Starts it again, after it has ended, on the same data and port.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        self.process = spawn(&self.directory, self.port, &[]);
        wait_until_ready(&self.process);
    }

    pub(crate) fn freeze(&self) {
        self.process.freeze();
    }

    pub(crate) fn thaw(&self) {
        self.process.thaw();
    }

    /// A client of this server alone, whatever its state.
    pub(crate) async fn client(&self) -> Client {
        let uri = direct_uri(self.address());
        let mut options = ClientOptions::parse(uri).await.unwrap();
        options.server_selection_timeout = Some(ANSWER_TIMEOUT);
        Client::with_options(options).unwrap()
    }

    /// Makes everything slow that a client of the name `client` inserts into `collection`.
    pub(crate) async fn slow_down(&self, client: &str, collection: &str, delay: Duration) {
        let delay = i64::try_from(delay.as_millis()).unwrap();
        let how = doc! {
            "namespace": collection,
            "blockConnection": true,
            "blockTimeMS": delay,
        };
        self.fail(client, &["insert"], "alwaysOn", how).await;
    }

    /// Makes `commands` fail that a client of the name `client` sends, when and as MongoDB's
    /// failpoint `failCommand` understands `mode` and `how`; that undoes what was said before.
    pub(crate) async fn fail(
        &self,
        client: &str,
        commands: &[&str],
        mode: impl Into<Bson>,
        how: Document,
    ) {
        let mut data = doc! { "failCommands": commands.to_vec(), "appName": client };
        data.extend(how);
        let failpoint = doc! {
            "configureFailPoint": "failCommand",
            "mode": mode.into(),
            "data": data,
        };
        let admin = self.client().await.database("admin");
        admin.run_command(failpoint).await.unwrap();
    }

    /// Finds it directly, whatever its state.
    pub(crate) fn uri(&self) -> String {
        direct_uri(self.address())
    }

    /// Writes something that no other member has.
    pub(crate) async fn write_alone(&self, database: &Database) {
        let collection = self.client().await.database(&database.name);
        let insert = doc! {
            "insert": "alone",
            "documents": [{ "_id": 1 }],
            "writeConcern": { "w": 1 },
        };
        collection.run_command(insert).await.unwrap();
    }

    /// Waits until it has undone what no other member had.
    #[track_caller]
    pub(crate) fn wait_until_rolled_back(&self) {
        let log = self.process.log();
        log.wait_for("\"Rollback complete\"", |lines| {
            let done = |line: &&String| line.contains("\"Rollback complete\"");
            lines.iter().find(done).cloned()
        });
    }

    /// Whether it is the primary; it is not when it does not answer.
    async fn is_primary(&self) -> bool {
        let admin = self.client().await.database("admin");
        let hello = admin.run_command(doc! { "hello": 1 });
        match timeout(ANSWER_TIMEOUT, hello).await {
            Ok(Ok(hello)) => hello.get_bool("isWritablePrimary").unwrap(),
            Ok(Err(_)) | Err(_) => false,
        }
    }
}

/// How long a server that ends lets its clients find another one; usually 15 s.
const SHORT_SHUTDOWN: &str = "shutdownTimeoutMillisForSignaledShutdown=500";

/// After which a server that does not answer is taken for frozen.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Where a client connects to one member and asks for no other.
pub(crate) fn direct_uri(address: SocketAddr) -> String {
    format!("mongodb://{address}/?directConnection=true")
}

/// With `more` arguments than all servers have.
pub(crate) fn spawn(directory: &TempDir, port: u16, more: &[&str]) -> Process {
    let program = program();
    let mut child = Command::new(&program)
        .args(["--replSet", SET, "--bind_ip", "127.0.0.1", "--nounixsocket"])
        .args(["--port", &port.to_string()])
        .arg("--dbpath")
        .arg(directory.path())
        .args(["--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"])
        .args(["--setParameter", "diagnosticDataCollectionEnabled=false"])
        .args(["--setParameter", "enableTestCommands=1"])
        .args(["--setParameter", SHORT_SHUTDOWN])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; `./test` installs it", program.display()));
    let log = Lines::collect(child.stdout.take().expect("stdout is piped"));
    Process::new(format!("mongod {}", child.id()), child, log)
}

/// As `./test` installs it.
fn program() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "target/test-tools/mongod"]
        .iter()
        .collect()
}

/// Waits for the server to listen; returns its port.
#[track_caller]
pub(crate) fn wait_until_ready(process: &Process) -> u16 {
    process
        .log()
        .wait_for("\"Waiting for connections\"", |lines| {
            let records = lines
                .iter()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let mut ready = records.filter(|record| record["msg"] == "Waiting for connections");
            let port = ready.next()?["attr"]["port"].as_u64()?;
            Some(u16::try_from(port).unwrap())
        })
}

/// A replica set, which elects a new primary two seconds after the old one was last heard.
pub(crate) struct ReplicaSet {
    members: Vec<Member>,
}

struct Member {
    mongod: Mongod,
    /// In front of it for everybody, the other members included.
    proxy: Option<Proxy>,
}

impl Member {
    /// Where clients and other members find it.
    fn address(&self) -> SocketAddr {
        let proxy = self.proxy.as_ref().map(Proxy::address);
        proxy.unwrap_or_else(|| self.mongod.address())
    }
}

impl ReplicaSet {
    /// Starts a replica set, and waits until it can be written to.
    pub(crate) async fn start(members: usize) -> Self {
        let members = Mongod::start_many(members);
        let members = members.into_iter().map(|mongod| Member {
            mongod,
            proxy: None,
        });
        Self::initiate(members.collect()).await
    }

    /// Starts one whose members can be cut off from each other and from clients. Who is cut off can
    /// still connect to the others.
    pub(crate) async fn start_behind_proxies(members: usize) -> Self {
        let mut behind_proxies = Vec::new();
        for mongod in Mongod::start_many(members) {
            let proxy = Some(Proxy::start(mongod.address()).await);
            behind_proxies.push(Member { mongod, proxy });
        }
        Self::initiate(behind_proxies).await
    }

    async fn initiate(members: Vec<Member>) -> Self {
        let hosts: Vec<Document> = (0..)
            .zip(&members)
            .map(|(id, member): (i32, _)| doc! { "_id": id, "host": member.address().to_string() })
            .collect();
        let config = doc! {
            "_id": SET,
            "members": hosts,
            "settings": {
                "electionTimeoutMillis": 2000,
                "heartbeatIntervalMillis": 500,
                "heartbeatTimeoutSecs": 2,
            },
        };
        let admin = members[0].mongod.client().await.database("admin");
        let initiate = doc! { "replSetInitiate": config };
        admin.run_command(initiate).await.unwrap();
        let set = Self { members };
        set.primary().await;
        set
    }

    /// For clients that shall find the primary, wherever it is.
    pub(crate) fn uri(&self) -> String {
        let addresses: Vec<_> = self
            .members
            .iter()
            .map(|member| member.address().to_string())
            .collect();
        format!("mongodb://{}/?replicaSet={SET}", addresses.join(","))
    }

    pub(crate) fn mongod(&mut self, member: usize) -> &mut Mongod {
        &mut self.members[member].mongod
    }

    /// Where a member itself is, without a proxy.
    pub(crate) fn address(&self, member: usize) -> SocketAddr {
        self.members[member].mongod.address()
    }

    /// The only proxy in front of this member.
    pub(crate) fn proxy(&self, member: usize) -> &Proxy {
        let proxy = self.members[member].proxy.as_ref();
        proxy.expect("the set was started behind proxies")
    }

    /// Waits until a member is primary; returns its number. A member that is frozen or cut off may
    /// think that it is one: it is not asked through its proxy.
    pub(crate) async fn primary(&self) -> usize {
        self.primary_other_than(None).await
    }

    /// Waits until another member than `old` is primary; returns its number.
    pub(crate) async fn primary_other_than(&self, old: impl Into<Option<usize>>) -> usize {
        let old = old.into();
        let end = Instant::now() + DEADLINE;
        loop {
            for (number, member) in self.members.iter().enumerate() {
                if Some(number) != old && member.mongod.is_primary().await {
                    return number;
                }
            }
            assert!(Instant::now() < end, "no member becomes primary");
            sleep(POLL_PAUSE).await;
        }
    }

    /// Makes the primary give way to another member, as before maintenance; returns the number of
    /// the new one.
    pub(crate) async fn step_down(&self) -> usize {
        let old = self.primary().await;
        let admin = self.members[old].mongod.client().await.database("admin");
        let step_down = doc! { "replSetStepDown": 10, "secondaryCatchUpPeriodSecs": 10 };
        admin.run_command(step_down).await.unwrap();
        self.primary_other_than(old).await
    }
}

/// Between two looks at all members.
pub(crate) const POLL_PAUSE: Duration = Duration::from_millis(50);

/// A database that no other test uses.
#[derive(Clone)]
pub(crate) struct Database {
    pub(crate) uri: String,
    pub(crate) name: String,
}

impl Database {
    /// On a server of this test.
    pub(crate) fn on(uri: String) -> Self {
        static DATABASES: AtomicU32 = AtomicU32::new(0);

        let number = DATABASES.fetch_add(1, Ordering::Relaxed);
        Self {
            uri,
            name: format!("midge-test-{}-{number}", process::id()),
        }
    }

    /// On the server that `./test` has started.
    #[track_caller]
    pub(crate) fn shared() -> Self {
        let uri = env::var("MIDGE_TEST_MONGODB_URI");
        Self::on(uri.expect("`./test` sets MIDGE_TEST_MONGODB_URI"))
    }

    /// Documents in a collection, without milestones.
    pub(crate) async fn count(&self, collection: &str) -> u64 {
        let client = Client::with_uri_str(&self.uri).await.unwrap();
        let database = client.database(&self.name);
        let documents = database.collection::<Document>(collection);
        documents
            .count_documents(doc! { "milestone": null })
            .await
            .unwrap()
    }

    /// Drops it, with all that is in it.
    pub(crate) async fn remove(&self) {
        let client = Client::with_uri_str(&self.uri).await.unwrap();
        client.database(&self.name).drop().await.unwrap();
    }

    /// The same database for a client that the server knows by this name.
    pub(crate) fn named(&self, client: &str) -> Self {
        Self {
            uri: format!("{}&appName={client}", self.uri),
            name: self.name.clone(),
        }
    }

    /// The same database for a client that reaches the server, the only member of its set, through
    /// `proxy`.
    pub(crate) fn through(&self, proxy: &Proxy) -> Self {
        Self {
            uri: direct_uri(proxy.address()),
            name: self.name.clone(),
        }
    }
}
