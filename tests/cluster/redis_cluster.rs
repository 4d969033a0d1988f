//! Nodes on one database that tell each other by a Redis Cluster: what clients see while it fails.

use std::time::Duration;

use tempfile::TempDir;
use tokio::time::sleep;

use crate::http;
use crate::mongod::Database;
use crate::node::{Cluster, Settings};
use crate::redis::{self as one_redis, Redis};
use crate::seed::Seed;
use crate::workload::{Size, Workload};

/// Three masters, each with a third of the hash slots.
struct RedisCluster {
    masters: Vec<Redis>,
    replicas: Vec<Redis>,
    /// Where each finds the others again when it is started again.
    directories: Vec<TempDir>,
}

/// Where a server of a cluster is reached, by clients and by the others.
struct Ports([String; 2]);

/// In the order of the masters.
const SLOTS: [[u16; 2]; 3] = [[0, 5460], [5461, 10922], [10923, 16383]];

/// Between looks at what is not ready yet.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// After this, the others elect a replica of a master that they do not hear of.
const NODE_TIMEOUT_MS: &str = "2000";

impl RedisCluster {
    async fn start() -> Self {
        let mut cluster = Self {
            masters: Vec::new(),
            replicas: Vec::new(),
            directories: Vec::new(),
        };
        let mut all_ports = Vec::new();
        for _ in SLOTS {
            let (master, ports) = cluster.start_server();
            cluster.masters.push(master);
            all_ports.push(ports);
        }
        for (epoch, (master, slots)) in (1..).zip(cluster.masters.iter().zip(SLOTS)) {
            let epoch = format!("{epoch}");
            let [first, last] = slots.map(|slot| slot.to_string());
            let set_epoch = ["CLUSTER", "SET-CONFIG-EPOCH", &epoch];
            let () = master.ask(&set_epoch).await;
            let add_slots = ["CLUSTER", "ADDSLOTSRANGE", &first, &last];
            let () = master.ask(&add_slots).await;
            for ports in &all_ports {
                meet(master, ports).await;
            }
        }
        cluster.wait_for_info("cluster_known_nodes:3").await;
        cluster.wait_for_info("cluster_size:3").await;
        cluster.wait_for_info("cluster_state:ok").await;
        cluster
    }

    /// One that belongs to none yet.
    fn start_server(&mut self) -> (Redis, Ports) {
        let directory = tempfile::tempdir().unwrap();
        let [port, bus_port] = one_redis::free_ports();
        let ports = [port, bus_port].map(|port| port.to_string());
        let path = directory.path().to_str().unwrap();
        let arguments = ["--cluster-enabled", "yes", "--cluster-port", &ports[1]];
        let arguments = [&arguments[..], &["--dir", path]].concat();
        let arguments = arguments.iter().map(|argument| (*argument).to_owned());
        let server = Redis::start_at(port, arguments.collect());
        self.directories.push(directory);
        (server, Ports(ports))
    }

    /// Gives each master a replica, in the same order.
    async fn add_replicas(&mut self) {
        for _ in SLOTS {
            let (replica, ports) = self.start_server();
            meet(&self.masters[0], &ports).await;
            self.replicas.push(replica);
        }
        self.wait_for_info("cluster_known_nodes:6").await;
        for (master, replica) in self.masters.iter().zip(&self.replicas) {
            let master: String = master.ask(&["CLUSTER", "MYID"]).await;
            let () = replica.ask(&["CLUSTER", "REPLICATE", &master]).await;
        }
        for server in self.servers() {
            let hurry = ["CONFIG", "SET", "cluster-node-timeout", NODE_TIMEOUT_MS];
            let () = server.ask(&hurry).await;
        }
        // A replica that has nothing yet is not elected, nor one that the masters do not know of.
        for replica in &self.replicas {
            wait_for_line(replica, &["INFO", "replication"], "master_link_status:up").await;
        }
        for master in &self.masters {
            let replicas_of = |nodes: String| nodes.matches(" slave ").count();
            while replicas_of(master.ask(&["CLUSTER", "NODES"]).await) < SLOTS.len() {
                sleep(POLL_INTERVAL).await;
            }
        }
    }

    fn servers(&self) -> impl Iterator<Item = &Redis> {
        self.masters.iter().chain(&self.replicas)
    }

    /// Waits until all servers say this of the cluster.
    async fn wait_for_info(&self, line: &str) {
        for server in self.servers() {
            wait_for_line(server, &["CLUSTER", "INFO"], line).await;
        }
    }

    /// What makes a node use it.
    fn settings(&self, database: &Database) -> Settings {
        let addresses = self.masters.iter().map(|it| it.address().to_string());
        let addresses = addresses.collect::<Vec<_>>().join(",");
        one_redis::settings_with_url(database, format!("redis+cluster://{addresses}"))
    }

    /// The master at which all nodes listen to what is for all of them.
    async fn master_of_all(&self) -> usize {
        for (place, master) in self.masters.iter().enumerate() {
            let channels = ["PUBSUB", "SHARDCHANNELS", "midge:*:all}"];
            if !master.ask::<Vec<String>>(&channels).await.is_empty() {
                return place;
            }
        }
        panic!("nobody listens")
    }

    /// Gives all hash slots of one master to another.
    async fn move_slots(&self, from: usize, to: usize) {
        let [first, last] = SLOTS[from];
        let [from, to] = [&self.masters[from], &self.masters[to]];
        let name_of_from: String = from.ask(&["CLUSTER", "MYID"]).await;
        let name_of_to: String = to.ask(&["CLUSTER", "MYID"]).await;
        // The one that has given away everything hears of it as the third does, and becomes a replica.
        for (master, state, name) in [
            (to, "IMPORTING", &name_of_from),
            (from, "MIGRATING", &name_of_to),
            (to, "NODE", &name_of_to),
        ] {
            let mut moving = redis::pipe();
            for slot in first..=last {
                let set_slot = moving.cmd("CLUSTER").arg("SETSLOT");
                set_slot.arg(slot).arg(state).arg(name);
            }
            let mut connection = master.connect().await;
            moving.exec_async(&mut connection).await.unwrap();
        }
    }
}

async fn meet(server: &Redis, Ports([port, bus_port]): &Ports) {
    let meet = ["CLUSTER", "MEET", "127.0.0.1", port, bus_port];
    let () = server.ask(&meet).await;
}

/// Waits until this is a line of the answer.
pub(crate) async fn wait_for_line(server: &Redis, question: &[&str], line: &str) {
    let says = |answer: String| answer.lines().any(|it| it == line);
    while !says(server.ask(question).await) {
        sleep(POLL_INTERVAL).await;
    }
}

async fn start(nodes: usize, redis: &RedisCluster) -> Cluster {
    let database = Database::shared();
    let settings = (0..nodes).map(|_| redis.settings(&database));
    let mut cluster = Cluster::start(settings.collect()).await;
    for node in 0..nodes {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_move_between_nodes_on_a_redis_cluster() {
    let mut seed = Seed::new();
    let redis = RedisCluster::start().await;
    let mut cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    // Those that start at the same time miss each other's first frames.
    let gaps = gaps_of(&mut cluster);
    workload.finish().await;

    assert_eq!(gaps_of(&mut cluster), gaps);
    for node in 0..3 {
        assert!(!cluster.node(node).has_logged("bus_down"));
    }
}

/// How often each of three nodes has asked for frames of others.
fn gaps_of(cluster: &mut Cluster) -> [f64; 3] {
    [0, 1, 2].map(|node| {
        let address = cluster.node(node).http_address();
        http::sample(address, "midge_cluster_bus_gaps_total").unwrap()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_of_a_redis_cluster_is_killed_and_starts_again() {
    let mut seed = Seed::new();
    let mut redis = RedisCluster::start().await;
    let mut cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    let master = usize::try_from(seed.below(3)).unwrap();
    let master = &mut redis.masters[master];
    master.kill();
    for node in 0..3 {
        cluster.node(node).wait_for_events("bus_down", 1);
    }
    workload.wait_for_percent(seed.between(40, 70)).await;
    master.start_again();
    for node in 0..3 {
        cluster.node(node).wait_for_events("bus_up", 2);
    }

    workload.finish().await;
}

/// Its replica is elected in its place, at an address that no node was told of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_of_a_redis_cluster_is_killed_and_its_replica_takes_over() {
    let mut seed = Seed::new();
    let mut redis = RedisCluster::start().await;
    redis.add_replicas().await;
    let mut cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    let master = redis.master_of_all().await;
    redis.masters[master].kill();
    for node in 0..3 {
        cluster.node(node).wait_for_events("bus_down", 1);
        cluster.node(node).wait_for_events("bus_up", 2);
    }

    workload.finish().await;
    let channels = ["PUBSUB", "SHARDCHANNELS", "midge:*:all}"];
    let heard_there: Vec<String> = redis.replicas[master].ask(&channels).await;
    assert_eq!(heard_there.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slots_of_a_redis_cluster_move() {
    let mut seed = Seed::new();
    let redis = RedisCluster::start().await;
    let mut cluster = start(3, &redis).await;
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    let from = redis.master_of_all().await;
    redis.move_slots(from, (from + 1) % 3).await;
    for node in 0..3 {
        cluster.node(node).wait_for_events("bus_down", 1);
        cluster.node(node).wait_for_events("bus_up", 2);
    }

    workload.finish().await;
}
