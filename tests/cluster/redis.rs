//! Nodes on one database that tell each other by Redis: what clients see while Redis fails.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, FromRedisValue};

use crate::lines::Lines;
use crate::mongod::Database;
use crate::node::{Cluster, Settings};
use crate::process::Process;
use crate::proxy::Proxy;
use crate::seed::Seed;
use crate::workload::{Size, Workload};

/// A server that keeps nothing. It is killed when dropped.
pub(crate) struct Redis {
    pub(crate) process: Process,
    port: u16,
    arguments: Vec<String>,
}

impl Redis {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let [port] = free_ports();
        Self::start_at(port, Vec::new())
    }

    /// With more arguments.
    #[track_caller]
    pub(crate) fn start_at(port: u16, arguments: Vec<String>) -> Self {
        Self {
            process: spawn(port, &arguments),
            port,
            arguments,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Ends it as a power cut would.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again, after it has ended.
    #[track_caller]
    pub(crate) fn start_again(&mut self) {
        self.process = spawn(self.port, &self.arguments);
    }

    /// Has it end the connections of those who listen and for whom more than this waits.
    pub(crate) async fn limit_listeners(&self, mebibytes: u32) {
        let limit = format!("pubsub {mebibytes}mb 0 0");
        let set = ["CONFIG", "SET", "client-output-buffer-limit", &limit];
        let () = self.ask(&set).await;
    }

    /// Whether it has done so, to anyone.
    pub(crate) fn has_ended_slow_connections(&self) -> bool {
        let lines = self.process.log().so_far();
        lines
            .iter()
            .any(|line| line.contains("output buffer limits"))
    }

    /// Ends the connections of all who listen, as Redis itself does with those who are too slow.
    pub(crate) async fn cut_off_listeners(&self) {
        assert!(self.try_cut_off_listeners().await > 0);
    }

    /// The same, when nobody may be listening just now.
    pub(crate) async fn cut_off_listeners_if_any(&self) {
        self.try_cut_off_listeners().await;
    }

    async fn try_cut_off_listeners(&self) -> u32 {
        self.ask(&["CLIENT", "KILL", "TYPE", "pubsub"]).await
    }

    /// The answer to a command.
    pub(crate) async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut connection = self.connect().await;
        let mut command = redis::Cmd::new();
        words.iter().for_each(|word| {
            command.arg(word);
        });
        command.query_async(&mut connection).await.unwrap()
    }

    pub(crate) async fn connect(&self) -> MultiplexedConnection {
        let client = redis::Client::open(format!("redis://{}", self.address())).unwrap();
        // Some of what tests ask for takes longer than what others do.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let connection = client.get_multiplexed_async_connection_with_config(&config);
        connection.await.unwrap()
    }
}

/// Each another one.
pub(crate) fn free_ports<const COUNT: usize>() -> [u16; COUNT] {
    let listeners = [(); COUNT].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// `./test` installs it.
fn spawn(port: u16, arguments: &[String]) -> Process {
    let program = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/target/test-tools/redis-server"
    );
    let mut child = Command::new(program)
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--port", &port.to_string()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; `./test` installs it"));
    let log = Lines::collect(child.stdout.take().expect("stdout is piped"));
    log.wait_for("\"Ready to accept connections\"", |lines| {
        lines
            .iter()
            .find(|line| line.contains("Ready to accept"))
            .cloned()
    });
    Process::new("redis-server".to_owned(), child, log)
}

/// What makes a node use `database`, and Redis at `address`.
pub(crate) fn settings(database: &Database, address: SocketAddr) -> Settings {
    settings_with_url(database, format!("redis://{address}"))
}

pub(crate) fn settings_with_url(database: &Database, url: String) -> Settings {
    let mut settings = database.settings();
    settings.push(("bus.kind".to_owned(), "redis".to_owned()));
    settings.push(("bus.url".to_owned(), url));
    settings
}

pub(crate) async fn start(nodes: usize, redis: &Redis) -> Cluster {
    let database = Database::shared();
    let settings = (0..nodes).map(|_| settings(&database, redis.address()));
    let mut cluster = Cluster::start(settings.collect()).await;
    for node in 0..nodes {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    cluster
}

/// Two nodes, of which the first reaches Redis through the proxy.
async fn start_with_one_behind(redis: &Redis) -> (Cluster, Proxy) {
    let proxy = Proxy::start(redis.address()).await;
    let database = Database::shared();
    let cluster = Cluster::start(vec![
        settings(&database, proxy.address()),
        settings(&database, redis.address()),
    ])
    .await;
    (cluster, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes_on_redis() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    workload.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_redis_is_killed_and_another_starts() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let mut cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 30)).await;
    cluster.node(0).kill();
    workload.wait_for_percent(seed.between(30, 50)).await;
    cluster.node(1).kill();
    cluster.node(0).start_again();
    workload.wait_for_percent(seed.between(50, 80)).await;
    cluster.node(1).start_again();

    workload.finish().await;
}

/// Scenario 7.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_killed_and_starts_again() {
    let mut seed = Seed::new();
    let mut redis = Redis::start();
    let mut cluster = start(2, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    redis.kill();
    cluster.node(0).wait_for_events("bus_down", 1);
    workload.wait_for_percent(seed.between(40, 70)).await;
    redis.start_again();
    cluster.node(0).wait_for_events("bus_up", 2);
    cluster.node(1).wait_for_events("bus_up", 2);

    workload.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_away_when_nodes_start() {
    let mut seed = Seed::new();
    let mut redis = Redis::start();
    redis.kill();
    let database = Database::shared();
    let settings = (0..2).map(|_| settings(&database, redis.address()));
    let mut cluster = Cluster::start(settings.collect()).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 50)).await;
    redis.start_again();
    cluster.node(0).wait_for_events("bus_up", 1);
    cluster.node(1).wait_for_events("bus_up", 1);

    workload.finish().await;
}

/// Scenario 8: the node knows at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_is_cut_off_from_redis() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let (mut cluster, proxy) = start_with_one_behind(&redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    proxy.cut();
    cluster.node(0).wait_for_events("bus_down", 1);
    workload.wait_for_percent(seed.between(40, 70)).await;
    proxy.restore();
    cluster.node(0).wait_for_events("bus_up", 2);

    workload.finish().await;
}

/// Scenario 8: nobody knows until the echo is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_connections_of_one_node_to_redis_are_half_open() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let (mut cluster, proxy) = start_with_one_behind(&redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    proxy.pause();
    cluster.node(0).wait_for_events("bus_down", 1);
    workload.wait_for_percent(seed.between(40, 70)).await;
    proxy.restore();
    cluster.node(0).wait_for_events("bus_up", 2);

    workload.finish().await;
}

/// Scenario 9.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_frozen() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let mut cluster = start(2, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    redis.process.freeze();
    cluster.node(0).wait_for_events("bus_down", 1);
    workload.wait_for_percent(seed.between(40, 70)).await;
    redis.process.thaw();
    cluster.node(0).wait_for_events("bus_up", 2);
    cluster.node(1).wait_for_events("bus_up", 2);

    workload.finish().await;
}

/// Scenario 10: whatever waits in Redis for a node is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_cuts_off_listeners_again_and_again() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let mut cluster = start(2, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    for cut in 1..=4 {
        workload.wait_for_percent(20 * cut).await;
        redis.cut_off_listeners().await;
        let times = usize::try_from(cut).unwrap() + 1;
        cluster.node(0).wait_for_events("bus_up", times);
        cluster.node(1).wait_for_events("bus_up", times);
    }

    workload.finish().await;
}
