//! Nodes behind the HAProxy of `deploy/`: clients know one address, and nodes come and go behind it.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use crate::client::Client;
use crate::http::ask;
use crate::lines::{DEADLINE, Lines};
use crate::mongod::{Database, POLL_PAUSE};
use crate::node::{Cluster, Settings};
use crate::process::Process;
use crate::program::Program;
use crate::redis::{self, Redis};
use crate::seed::Seed;
use crate::traffic::{Publisher, Server, Subscriber, World};
use crate::wire::{Connect, PINGREQ, Packet, Version};
use crate::workload::{Size, Workload, version};

/// Clients per second that a node which ends tells to leave.
const EVICT_RATE: u32 = 20;

/// A part of the loopback network, on which every node and the balancer have an address of their
/// own. So all of them have the ports that the configuration in `deploy/` names, a node has the same
/// address when it starts again, and nobody else has taken it meanwhile.
#[derive(Clone, Copy)]
struct Network([u8; 2]);

impl Network {
    fn new() -> Self {
        let [_, second, third, ..] = RandomState::new().hash_one(0).to_ne_bytes();
        // 127.0.0.x is everybody's.
        Self([second.max(1), third])
    }

    /// Numbers begin with 1.
    fn node(self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.0[0], self.0[1], number)
    }

    fn balancer(self) -> Ipv4Addr {
        self.node(u8::MAX - 1)
    }
}

/// HAProxy. It is killed when dropped.
struct Balancer {
    address: Ipv4Addr,
    _process: Process,
    _folder: TempDir,
    servers: watch::Sender<Vec<Server>>,
}

impl Balancer {
    /// With the configuration in `deploy/`, but for addresses: there, they come from Docker.
    #[track_caller]
    fn start(network: Network, nodes: u8) -> Self {
        let address = network.balancer();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/haproxy/haproxy.cfg");
        let mut in_resolvers = false;
        let mut configuration = String::new();
        for line in fs::read_to_string(file).unwrap().lines() {
            let begins_section = line.starts_with(|letter: char| letter.is_ascii_lowercase());
            if begins_section {
                in_resolvers = line.starts_with("resolvers ");
            }
            let trimmed = line.trim_start();
            if in_resolvers {
                continue;
            } else if let Some(port) = trimmed.strip_prefix("bind :") {
                configuration.push_str(&format!("    bind {address}:{port}\n"));
            } else if let Some(template) = trimmed.strip_prefix("server-template midge 1-16 midge:")
            {
                let port = template.split(' ').next().unwrap();
                for number in 1..=nodes {
                    let node = network.node(number);
                    configuration.push_str(&format!("    server node-{number} {node}:{port}\n"));
                }
            } else if trimmed.starts_with("maxconn ") {
                // What the descriptors of any machine allow.
                configuration.push_str("    maxconn 1000\n");
            } else {
                configuration.push_str(line);
                configuration.push('\n');
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("haproxy.cfg");
        fs::write(&file, configuration).unwrap();
        let mut child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("haproxy: {error}; `./test` installs it"));
        let log = Lines::collect(child.stdout.take().expect("stdout is piped"));
        let server = Server {
            run: 0,
            address: (address, 1883).into(),
        };
        Self {
            address,
            _process: Process::new("haproxy".to_owned(), child, log),
            _folder: folder,
            servers: watch::Sender::new(vec![server]),
        }
    }

    fn mqtt(&self) -> SocketAddr {
        (self.address, 1883).into()
    }

    /// For clients that need not know that there are several nodes.
    fn servers(&self) -> watch::Receiver<Vec<Server>> {
        self.servers.subscribe()
    }

    /// What it thinks of a node; numbers begin with 1.
    fn status(&self, node: usize) -> Option<String> {
        let (_, table) = ask((self.address, 8404).into(), "GET", "/stats;csv").ok()?;
        let mut lines = table.lines();
        let columns = lines.find(|line| line.starts_with("# pxname"))?;
        let column = columns.split(',').position(|name| name == "status")?;
        let row = lines.find(|line| line.starts_with(&format!("midge_mqtt,node-{node},")))?;
        row.split(',').nth(column).map(str::to_owned)
    }

    /// Numbers begin with 1.
    async fn wait_for_status(&self, node: usize, status: &str) {
        let end = Instant::now() + DEADLINE;
        loop {
            let now = self.status(node);
            if now.as_deref() == Some(status) {
                return;
            }
            let late = Instant::now() >= end;
            assert!(!late, "node {node} does not become {status}: {now:?}");
            sleep(POLL_PAUSE).await;
        }
    }
}

/// Nodes behind a balancer, which takes them for up.
async fn start(redis: &Redis, nodes: u8) -> (Cluster, Balancer) {
    let network = Network::new();
    let database = Database::shared();
    let settings = (1..=nodes).map(|number| {
        let node = network.node(number);
        let mut settings = redis::settings(&database, redis.address());
        let own = [
            ("listeners.tcp.bind", format!("{node}:1883")),
            ("listeners.tcp.proxy_protocol", "required".to_owned()),
            ("listeners.tcp.trusted_proxies", "127.0.0.0/8".to_owned()),
            ("http.bind", format!("{node}:9883")),
            // Three looks of the balancer.
            ("drain.grace", "3s".to_owned()),
            ("drain.evict_rate", EVICT_RATE.to_string()),
        ];
        settings.extend(own.map(|(key, value)| (key.to_owned(), value)));
        settings
    });
    let settings: Vec<Settings> = settings.collect();
    let mut cluster = Cluster::start(settings).await;
    for node in 0..usize::from(nodes) {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    let balancer = Balancer::start(network, nodes);
    for node in 1..=usize::from(nodes) {
        balancer.wait_for_status(node, "UP").await;
    }
    (cluster, balancer)
}

/// A client that has nothing to do but to be there, and what happens to it.
struct Idler {
    connect: Connect,
    address: SocketAddr,
    farewells: Farewells,
}

/// When clients were told to leave, and with which reason.
type Farewells = Arc<Mutex<Vec<(Instant, Option<u8>)>>>;

impl Idler {
    /// Stays connected, in the background.
    fn start(self) -> JoinHandle<()> {
        tokio::spawn(async move {
            let mut has_session = false;
            loop {
                // The balancer knows in time which node not to ask any more.
                let mut client = Client::connect(self.address, &self.connect).await;
                assert_eq!(client.session_present, has_session);
                has_session = !self.connect.clean_start;
                let reason = loop {
                    tokio::select! {
                        packet = client.receive() => match packet {
                            Ok(Packet::Disconnect(reason)) => break Some(reason),
                            Ok(Packet::PingResp) => {}
                            Ok(other) => panic!("an idle client got {other:?}"),
                            Err(_) => break None,
                        },
                        // `receive` gives up on a broker that is silent for long.
                        () = sleep(DEADLINE / 4) => drop(client.send(&PINGREQ).await),
                    }
                };
                self.farewells.lock().push((Instant::now(), reason));
            }
        })
    }
}

/// A program of a client library, which finds the broker at `address`.
fn program(interpreter: &str, script: &str, address: SocketAddr) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let tools = root.join("target/test-tools");
    let mut command = match interpreter {
        "node" => Command::new("node"),
        _ => Command::new(tools.join("python/bin/python")),
    };
    command
        .arg(root.join("tests").join(script))
        .env("NODE_PATH", tools.join("js/mqtt-5"))
        .env("PYTHONPATH", tools.join("paho-2"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONUNBUFFERED", "1")
        .env("BROKER_URL", format!("mqtt://{address}"))
        .env("BROKER_HOST", address.ip().to_string())
        .env("BROKER_PORT", address.port().to_string());
    command
}

/// What a program of a client library received of one topic, as it printed it.
fn received(lines: &[String], topic: &str) -> Vec<u32> {
    let of_topic = lines.iter().filter_map(|line| line.strip_prefix(topic));
    of_topic
        .map(|number| number.trim().parse().unwrap())
        .collect()
}

/// Every node is ended as an operator does, and started again. Nothing is lost, nothing comes twice
/// with QoS 2, nobody is refused, and those that have to go do not go all at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_behind_a_balancer_are_restarted_one_by_one() {
    const IDLERS: usize = 60;
    let redis = Redis::start();
    let (mut cluster, balancer) = start(&redis, 3).await;
    let farewells = Farewells::default();
    let idlers: Vec<_> = (0..IDLERS)
        .map(|number| {
            let client_id = format!("idler-{number}");
            let connect = if number % 3 == 0 {
                Connect::fleeting(Version::V5, &client_id)
            } else {
                Connect::persistent(Version::V5, &client_id)
            };
            let (address, farewells) = (balancer.mqtt(), farewells.clone());
            let idler = Idler {
                connect,
                address,
                farewells,
            };
            idler.start()
        })
        .collect();
    let mut receive = program("node", "cluster/clients/receive.js", balancer.mqtt());
    let receiver = Program::start(&mut receive);
    receiver.wait_for_line("subscribed");
    let mut publish = program("python", "cluster/clients/publish.py", balancer.mqtt());
    let publisher = Program::start(&mut publish);
    publisher.wait_for_line("publishing");
    let world = World::new(balancer.servers());
    let stop = watch::Sender::new(false);
    let mut subscribers = Vec::new();
    for number in 0..3 {
        let subscriber = Subscriber::new(&format!("subscriber-{number}"), version(number));
        subscribers.push(subscriber.register(&world).await);
    }
    let away = Subscriber::new("away", Version::V5).register(&world).await;
    let subscribers: Vec<_> = subscribers
        .into_iter()
        .map(|subscriber| subscriber.start(&world, stop.subscribe()))
        .collect();
    let publishers: Vec<_> = (0..3)
        .map(|number| {
            let publisher = Publisher {
                // Enough to have some under way all the time.
                window: 4,
                stop: Some(stop.subscribe()),
                ..Publisher::new(number, version(number), u32::MAX)
            };
            publisher.start(&world)
        })
        .collect();

    for node in 0..3 {
        let enough = world.progress().acknowledged + 100;
        world.wait_until(|now| now.acknowledged >= enough).await;
        let before = farewells.lock().len();
        assert!(cluster.node(node).terminate().success());
        let told = farewells.lock()[before..].to_vec();
        assert!(told.len() > 2, "hardly anybody was at node {node}");
        // Server shutting down.
        assert!(
            told.iter().all(|(_, reason)| *reason == Some(0x8b)),
            "{told:?}"
        );
        let times = told.iter().map(|(at, _)| *at);
        let lasted = times.clone().max().unwrap() - times.min().unwrap();
        let planned = Duration::from_secs(1) / EVICT_RATE * u32::try_from(told.len()).unwrap();
        assert!(lasted >= planned / 2, "{} left in {lasted:?}", told.len());
        balancer.wait_for_status(node + 1, "DOWN").await;
        cluster.node(node).start_again();
        balancer.wait_for_status(node + 1, "UP").await;
    }
    stop.send_replace(true);
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let mut returned = vec![away];
    for subscriber in subscribers {
        returned.push(subscriber.await.unwrap());
    }
    let subscribers = world.settle_cluster(returned).await;
    let published = publisher.succeed();

    world.check_cluster(&subscribers);
    let count: u32 = published.last().unwrap().parse().unwrap();
    let all: Vec<u32> = (0..count).collect();
    let lines = receiver.stdout().wait_for("the last messages", |lines| {
        let last = |topic| received(lines, topic).last() == Some(&(count - 1));
        (last("clients/1") && last("clients/2")).then(|| lines.to_vec())
    });
    assert_eq!(received(&lines, "clients/2"), all);
    let mut once = received(&lines, "clients/1");
    let mut latest = None;
    // Repeats of what was there before.
    once.retain(|number| {
        let is_new = latest.is_none_or(|latest| *number > latest);
        latest = latest.max(Some(*number));
        is_new
    });
    assert_eq!(once, all);
    for idler in idlers {
        assert!(!idler.is_finished(), "{:?}", idler.await);
        idler.abort();
    }
}

/// The balancer notices by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_behind_a_balancer_is_killed() {
    let mut seed = Seed::new();
    let redis = Redis::start();
    let (mut cluster, balancer) = start(&redis, 2).await;
    let workload = Workload::start(balancer.servers(), &mut seed, Size::small()).await;

    workload.wait_for_percent(seed.between(5, 40)).await;
    cluster.node(0).kill();
    balancer.wait_for_status(1, "DOWN").await;
    workload.wait_for_percent(seed.between(50, 80)).await;
    cluster.node(0).start_again();
    balancer.wait_for_status(1, "UP").await;

    workload.finish().await;
}

/// The tutorials' scenario, on three nodes: who was away gets everything once, in order, at another
/// node than the one it left and the one that it was published at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_the_tutorials_wait_for_a_client_that_moves() {
    const COUNT: usize = 500;
    let redis = Redis::start();
    let mut cluster = redis::start(3, &redis).await;
    let mut program = |node: usize, name: &str, count: usize| {
        let script = format!("interop/tutorials/{name}.js");
        let mut command = program("node", &script, cluster.node(node).address());
        Program::start(command.env("COUNT", count.to_string()))
    };
    program(0, "chat_subscribe", 0).succeed();
    program(1, "chat_publish", COUNT).succeed();

    let receiver = program(2, "chat_receive", 0);
    receiver.wait_for_lines(COUNT);
    // Whatever came twice would come before this.
    program(0, "chat_publish", 1).succeed();
    let lines = receiver.wait_for_lines(COUNT + 1);

    let sent = (0..COUNT).chain([0]);
    let expected: Vec<_> = sent
        .map(|number| format!("message: 发布new测试信息{number}"))
        .collect();
    assert_eq!(lines, expected);
}
