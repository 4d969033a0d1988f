//! Everything fails, in any order: nodes, MongoDB, Redis, and the connections between them.
//!
//! Each round has servers of its own and a seed, which it prints. Faults come one after the other, and
//! sometimes two at once, while a workload goes on; then all of them are undone, and the history is
//! checked. `MIDGE_TEST_FAULTS_SECONDS` says for how long; without it there is one short round.

use std::collections::BTreeMap;
use std::env;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::mongod::{Database, ReplicaSet};
use crate::node::{Cluster, Settings};
use crate::proxy::Proxy;
use crate::redis::{self, Redis};
use crate::seed::Seed;
use crate::workload::{Size, Workload};

const NODES: usize = 3;

/// Faults of a round, if there is time for more than one.
const FAULTS_PER_ROUND: u64 = 25;
/// Otherwise.
const FAULTS_OF_QUICK_ROUND: u64 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_fails() {
    let seconds = env::var("MIDGE_TEST_FAULTS_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("it is a number of seconds"));
    let faults = match seconds {
        Some(_) => FAULTS_PER_ROUND,
        None => FAULTS_OF_QUICK_ROUND,
    };
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    loop {
        let mut seed = Seed::new();
        let stage = Stage::set(&mut seed).await;
        stage.run(&mut seed, faults).await;
        if Instant::now() >= end {
            return;
        }
    }
}

/// All that can fail.
struct Stage {
    cluster: Cluster,
    set: ReplicaSet,
    /// In front of the only member of the set, for each node; none if there are three members.
    mongodb_proxies: Vec<Proxy>,
    redis: Option<Redis>,
    /// In front of Redis, for each node.
    redis_proxies: Vec<Proxy>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    NodeIsKilled(usize),
    NodeIsStopped(usize),
    NodeIsFrozen(usize),
    PrimaryStepsDown,
    MongodIsKilled(usize),
    MongodIsFrozen(usize),
    MongodbIsCutOff(usize),
    MongodbIsPaused(usize),
    MongodbIsSlow(usize),
    RedisIsKilled,
    RedisIsFrozen,
    RedisIsCutOff(usize),
    RedisIsPaused(usize),
    RedisIsSlow(usize),
    RedisCutsOffListeners,
}

impl Fault {
    /// What may fail at the same time is another thing.
    fn collides(self, other: Self) -> bool {
        let target = |fault| match fault {
            Self::NodeIsKilled(_) | Self::NodeIsStopped(_) | Self::NodeIsFrozen(_) => 0,
            Self::PrimaryStepsDown
            | Self::MongodIsKilled(_)
            | Self::MongodIsFrozen(_)
            | Self::MongodbIsCutOff(_)
            | Self::MongodbIsPaused(_)
            | Self::MongodbIsSlow(_) => 1,
            Self::RedisIsKilled
            | Self::RedisIsFrozen
            | Self::RedisIsCutOff(_)
            | Self::RedisIsPaused(_)
            | Self::RedisIsSlow(_)
            | Self::RedisCutsOffListeners => 2,
        };
        target(self) == target(other)
    }

    /// Without its number.
    fn name(self) -> String {
        let name = format!("{self:?}");
        name.split('(').next().unwrap_or_default().to_owned()
    }
}

impl Stage {
    /// Chosen by the seed: one member or three, with Redis or without it, with write elision or without;
    /// with both in any case if `MIDGE_TEST_ELISION` is set.
    async fn set(seed: &mut Seed) -> Self {
        let members = [1, 3][usize::from(seed.percent(50))];
        let set = ReplicaSet::start(members).await;
        let database = Database::on(set.uri());
        let must_elide = env::var_os("MIDGE_TEST_ELISION").is_some();
        let redis = (seed.percent(60) || must_elide).then(Redis::start);
        let elides = seed.percent(50) || must_elide;
        let mut mongodb_proxies = Vec::new();
        let mut redis_proxies = Vec::new();
        let mut settings = Vec::new();
        for _ in 0..NODES {
            let database = if members == 1 {
                let proxy = Proxy::start(set.address(0)).await;
                let database = database.through(&proxy);
                mongodb_proxies.push(proxy);
                database
            } else {
                database.clone()
            };
            let mut of_node: Settings = database.settings();
            if let Some(redis) = &redis {
                let proxy = Proxy::start(redis.address()).await;
                let address: SocketAddr = proxy.address();
                redis_proxies.push(proxy);
                of_node = redis::settings(&database, address);
            }
            of_node.push(("store.write_elision".to_owned(), elides.to_string()));
            // While MongoDB is away a node that is told to stop waits for all of it.
            of_node.push(("drain.deadline".to_owned(), "20s".to_owned()));
            settings.push(of_node);
        }
        eprintln!(
            "{members} mongod, {}, {} write elision",
            redis.as_ref().map_or("no Redis", |_| "Redis"),
            if elides { "with" } else { "no" },
        );
        Self {
            cluster: Cluster::start(settings).await,
            set,
            mongodb_proxies,
            redis,
            redis_proxies,
        }
    }

    async fn run(mut self, seed: &mut Seed, faults: u64) {
        let begun = Instant::now();
        let size = Size {
            goes_on: true,
            ..Size::small()
        };
        let workload = Workload::start(self.cluster.servers(), seed, size).await;
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        let mut left = faults;
        while left > 0 {
            let mut together = vec![self.choose(seed)];
            let second = self.choose(seed);
            if seed.percent(25) && !second.collides(together[0]) {
                together.push(second);
            }
            for fault in &together {
                eprintln!("{:6.1} s: {fault:?}", begun.elapsed().as_secs_f32());
                *counts.entry(fault.name()).or_default() += 1;
                left = left.saturating_sub(1);
                self.begin(*fault).await;
            }
            // Nine in ten are over before a node is declared dead.
            let longest = [3_000, 9_000][usize::from(seed.percent(10))];
            self.wait(Duration::from_millis(seed.between(50, longest)))
                .await;
            // A node that is to start again needs MongoDB.
            together.sort_by_key(|fault| fault.collides(Fault::NodeIsKilled(0)));
            for fault in &together {
                self.end(*fault).await;
            }
            self.wait(Duration::from_millis(seed.between(0, 1_500)))
                .await;
        }
        let progress = workload.progress();
        let counts = counts.iter().map(|(name, count)| format!("{name} {count}"));
        let counts: Vec<_> = counts.collect();
        eprintln!(
            "{} acknowledged, {} received, in {:.0} s with: {}",
            progress.acknowledged,
            progress.received,
            begun.elapsed().as_secs_f32(),
            counts.join(", "),
        );

        let finish = workload.finish();
        let mut finish = std::pin::pin!(finish);
        loop {
            tokio::select! {
                () = &mut finish => return,
                () = sleep(LOOK_INTERVAL) => self.look(),
            }
        }
    }

    /// Waits, and sees to it that clients find nodes that have started anew meanwhile.
    async fn wait(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            sleep(LOOK_INTERVAL.min(end - Instant::now())).await;
            self.look();
        }
    }

    fn look(&mut self) {
        for number in 0..NODES {
            self.cluster.node(number).follow_new_starts();
        }
    }

    fn choose(&self, seed: &mut Seed) -> Fault {
        let node = usize::try_from(seed.below(NODES as u64)).unwrap();
        let of_node = [
            Fault::NodeIsKilled(node),
            Fault::NodeIsStopped(node),
            Fault::NodeIsFrozen(node),
        ];
        let of_mongodb = if self.mongodb_proxies.is_empty() {
            let member = usize::try_from(seed.below(3)).unwrap();
            vec![
                Fault::PrimaryStepsDown,
                Fault::MongodIsKilled(member),
                Fault::MongodIsFrozen(member),
            ]
        } else {
            vec![
                Fault::MongodIsKilled(0),
                Fault::MongodIsFrozen(0),
                Fault::MongodbIsCutOff(node),
                Fault::MongodbIsPaused(node),
                Fault::MongodbIsSlow(node),
            ]
        };
        let of_redis = [
            Fault::RedisIsKilled,
            Fault::RedisIsFrozen,
            Fault::RedisIsCutOff(node),
            Fault::RedisIsPaused(node),
            Fault::RedisIsSlow(node),
            Fault::RedisCutsOffListeners,
        ];
        let kinds: &[&[Fault]] = match self.redis {
            Some(_) => &[&of_node, &of_mongodb, &of_redis],
            None => &[&of_node, &of_mongodb],
        };
        let kind = kinds[usize::try_from(seed.below(kinds.len() as u64)).unwrap()];
        kind[usize::try_from(seed.below(kind.len() as u64)).unwrap()]
    }

    async fn begin(&mut self, fault: Fault) {
        const SLOWLY: Duration = Duration::from_millis(100);
        match fault {
            Fault::NodeIsKilled(node) => self.cluster.node(node).kill(),
            Fault::NodeIsStopped(node) => {
                let status = self.cluster.node(node).terminate();
                assert!(status.success(), "node {node}: {status}");
            }
            Fault::NodeIsFrozen(node) => self.cluster.node(node).freeze(),
            Fault::PrimaryStepsDown => {
                self.set.step_down().await;
            }
            Fault::MongodIsKilled(member) => self.set.mongod(member).kill(),
            Fault::MongodIsFrozen(member) => self.set.mongod(member).freeze(),
            Fault::MongodbIsCutOff(node) => self.mongodb_proxies[node].cut(),
            Fault::MongodbIsPaused(node) => self.mongodb_proxies[node].pause(),
            Fault::MongodbIsSlow(node) => self.mongodb_proxies[node].delay(SLOWLY),
            Fault::RedisIsKilled => self.redis().kill(),
            Fault::RedisIsFrozen => self.redis().process.freeze(),
            Fault::RedisIsCutOff(node) => self.redis_proxies[node].cut(),
            Fault::RedisIsPaused(node) => self.redis_proxies[node].pause(),
            Fault::RedisIsSlow(node) => self.redis_proxies[node].delay(SLOWLY),
            Fault::RedisCutsOffListeners => self.redis().cut_off_listeners_if_any().await,
        }
    }

    async fn end(&mut self, fault: Fault) {
        match fault {
            Fault::NodeIsKilled(node) | Fault::NodeIsStopped(node) => {
                // Without MongoDB it would not start.
                self.set.primary().await;
                self.cluster.node(node).start_again();
            }
            Fault::NodeIsFrozen(node) => self.cluster.node(node).thaw(),
            Fault::MongodIsKilled(member) => {
                self.set.mongod(member).start_again();
                self.set.primary().await;
            }
            Fault::MongodIsFrozen(member) => {
                self.set.mongod(member).thaw();
                self.set.primary().await;
            }
            Fault::MongodbIsCutOff(node)
            | Fault::MongodbIsPaused(node)
            | Fault::MongodbIsSlow(node) => self.mongodb_proxies[node].restore(),
            Fault::RedisIsKilled => self.redis().start_again(),
            Fault::RedisIsFrozen => self.redis().process.thaw(),
            Fault::RedisIsCutOff(node) | Fault::RedisIsPaused(node) | Fault::RedisIsSlow(node) => {
                self.redis_proxies[node].restore()
            }
            Fault::PrimaryStepsDown | Fault::RedisCutsOffListeners => {}
        }
    }

    fn redis(&mut self) -> &mut Redis {
        let redis = self.redis.as_mut();
        redis.expect("its faults are chosen only if there is one")
    }
}

/// Between two looks at the nodes.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
