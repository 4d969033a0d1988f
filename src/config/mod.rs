//! What the operator decides: every setting, its default, and what becomes of it when it is wrong.
//!
//! Owns the settings, the order of their sources (command line, environment, file, default) and
//! the errors about them. It opens no socket and no store, and what may change after the start is in
//! `Config::take_over`.
//!
//! Start reading at [`Config`]; [`load`] brings the sources together, [`listener`] holds the one
//! section that can be there many times.

mod check;
mod draft;
pub mod listener;
pub mod load;
mod nearest;
mod network;
pub(crate) mod problem;
mod sources;
mod uri;
pub mod value;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

pub use listener::{ClientAuth, Listener, ListenerKind, ProxyProtocol, Tls, Transport};
pub use load::Loaded;
pub use network::Network;
pub use problem::ConfigError;
pub use sources::Sources;
pub use uri::{MongoUri, RedisUrl};
pub use value::{ByteSize, Grace, Interval, MemoryLimit};

use problem::Problem;
use value::{Setting, Unfit, Value, choices, section};

/// Everything that can be set, complete and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub node: Node,
    pub store: Store,
    pub bus: Bus,
    /// By name. The ones that some source names, or else `tcp` on 127.0.0.1:1883.
    pub listeners: BTreeMap<String, Listener>,
    pub auth: Auth,
    pub limits: Limits,
    pub session: Session,
    pub http: Http,
    pub log: Log,
    pub sys: Sys,
    pub reload: Reload,
    pub drain: Drain,
}

impl Config {
    /// Reads all sources.
    ///
    /// # Errors
    /// Every problem that was found, not just the first.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        Ok(Loaded::new(sources)?.config)
    }

    /// Takes over what can change while the broker runs.
    pub(crate) fn take_over(&mut self, new: &Self) {
        let old = self.clone();
        for (name, listener) in &mut self.listeners {
            if let (Some(tls), Some(new)) = (&mut listener.tls, new.listeners.get(name))
                && let Some(new) = &new.tls
            {
                tls.clone_from(new);
            }
        }
        self.auth.clone_from(&new.auth);
        // The new file is not careless, but it may be together with addresses that stay.
        if self.is_open_unasked() {
            self.auth = old.auth;
            self.listeners = old.listeners;
        }
        let (limits, new_limits) = (&mut self.limits, &new.limits);
        limits.client_id_bytes_max = new_limits.client_id_bytes_max;
        limits.connections_max = new_limits.connections_max;
        limits.connect_rate = new_limits.connect_rate;
        limits.publish_rate = new_limits.publish_rate;
        limits.keep_alive_max = new_limits.keep_alive_max;
        limits.packet_bytes_max = new_limits.packet_bytes_max;
        limits.receive_maximum = new_limits.receive_maximum;
        limits.topic_alias_maximum = new_limits.topic_alias_maximum;
        self.session.in_flight_max = new.session.in_flight_max;
        self.log.level.clone_from(&new.log.level);
    }

    /// Whether others can connect although nobody has said who may.
    fn is_open_unasked(&self) -> bool {
        self.auth.is_undecided() && self.listeners.values().any(Listener::is_exposed)
    }
}

/// What is in effect when no source says anything.
impl Default for Config {
    fn default() -> Self {
        Self::load(&Sources::default()).expect("the defaults are valid")
    }
}

section! {
    /// `[node]`
    pub struct Node {
        /// How logs, `$SYS` topics and metrics call this broker. Default: the name of the host.
        pub name: String = host_name(),
        /// Where this broker is, such as an availability zone: a label of `midge_node_info`.
        pub zone: Option<String> = None,
    }
}

section! {
    /// `[store]`: where sessions, queued and retained messages live.
    pub struct Store {
        /// `"embedded"` keeps them on disk; `"memory"` forgets them when midge stops; `"mongodb"`
        /// shares them with the other nodes of a cluster.
        pub kind: StoreKind = StoreKind::Embedded,
        /// The folder of the embedded store, made if it is missing. One midge at a time can use
        /// it. A relative path, here as everywhere, starts at the working directory.
        pub path: PathBuf = "./midge-data".into(),
        /// Only mongodb: the members of the replica set, and all else that a MongoDB URI can
        /// hold. The password in it is never shown.
        pub uri: Option<MongoUri> = None,
        /// Only mongodb: a file that holds the URI, instead of `store.uri`.
        pub uri_file: Option<PathBuf> = None,
        /// Only mongodb: the name of the database. Its nodes, and nobody else, use one.
        pub database: String = "midge".into(),
        /// Only mongodb: whether what clients acknowledge at once is left unwritten. What is to be
        /// written waits for a moment, 5 ms at most, for the QoS 1 messages in it that are on their
        /// way to connected clients; those that their clients have taken over by then never get into
        /// an inbox. All nodes should have the same.
        pub write_elision: bool = true,
    }
}

impl Store {
    /// The URI of MongoDB, wherever it is.
    ///
    /// # Errors
    /// When no setting names it, or what is in the file is none.
    pub fn mongodb_uri(&self) -> Result<MongoUri, ConfigError> {
        match (&self.uri, &self.uri_file) {
            (Some(uri), _) => Ok(uri.clone()),
            (None, Some(path)) => uri::read_mongodb(path)
                .map_err(|what| Problem::without_place(format!("store.uri_file: {what}")).into()),
            (None, None) => Err(Problem::without_place("store.uri is not set").into()),
        }
    }
}

choices! {
    pub enum StoreKind {
        Embedded = "embedded",
        Memory = "memory",
        MongoDb = "mongodb",
    }
}

section! {
    /// `[bus]`: how the nodes of a cluster tell each other what is new.
    pub struct Bus {
        /// `"redis"` is fast, and falls back on MongoDB while Redis is away; `"mongodb"` needs
        /// nothing else; `"none"` is for a node alone. Unset, it is mongodb if the store is.
        pub kind: Option<BusKind> = None,
        /// Only redis: where Redis is, by `redis://`, `redis+sentinel://` or `redis+cluster://`, or with
        /// `rediss` for TLS. The password in it is never shown.
        pub url: Option<RedisUrl> = None,
        /// Only redis: a file that holds the URL, instead of `bus.url`.
        pub url_file: Option<PathBuf> = None,
    }
}

impl Bus {
    /// The URL of Redis, wherever it is; `None` if the bus is another one.
    ///
    /// # Errors
    /// When what is in the file is none.
    pub fn redis_url(&self) -> Result<Option<RedisUrl>, ConfigError> {
        match (&self.url, &self.url_file) {
            (Some(url), _) => Ok(Some(url.clone())),
            (None, Some(path)) => uri::read_redis(path)
                .map(Some)
                .map_err(|what| Problem::without_place(format!("bus.url_file: {what}")).into()),
            (None, None) => Ok(None),
        }
    }
}

choices! {
    pub enum BusKind {
        None = "none",
        MongoDb = "mongodb",
        Redis = "redis",
    }
}

/// Unset by default, and no word for it.
impl Setting for Option<BusKind> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        BusKind::parse(value).map(Some)
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(BusKind::show)
    }
}

section! {
    /// `[auth]`: who is let in.
    pub struct Auth {
        /// Whether clients need no user name. Unset, they need none as long as there is no users
        /// file and no listener can be reached from another machine.
        pub anonymous: Option<bool> = None,
        /// Users, their passwords and what they may do: a file that `midge user` writes, or a
        /// password file of Mosquitto.
        pub users_file: Option<PathBuf> = None,
    }
}

impl Auth {
    /// Whether nothing says who may connect.
    fn is_undecided(&self) -> bool {
        self.anonymous.is_none() && self.users_file.is_none()
    }

    /// Whether a client that names no user is let in.
    pub fn allows_anonymous(&self) -> bool {
        self.anonymous.unwrap_or_else(|| self.users_file.is_none())
    }
}

section! {
    /// `[limits]`: what one client, or all of them together, may ask of the broker.
    pub struct Limits {
        /// Open Network Connections; further ones are refused as Server busy. Unlimited by
        /// default: the number of file descriptors is the bound. Too low turns clients away; too
        /// high lets them use up the memory, at a few KiB for an idle one.
        pub connections_max: Option<usize> = None,
        /// New connections per second, of all listeners together, with as many at once after a pause.
        /// More than that wait up to 5 s before anything is done for them; who would have to wait
        /// longer is refused as Connection rate exceeded (before version 5: Server unavailable), or,
        /// with TLS, disconnected. Too low, and a fleet takes long to come back; too high, and TLS and
        /// passwords take what connected clients need.
        pub connect_rate: Option<usize> = None,
        /// From accepting a connection to its CONNECT, TLS and WebSocket handshakes included. Too
        /// short loses clients on slow links; too long keeps silent ones.
        pub connect_timeout: Duration = Duration::from_secs(10),
        /// Messages per second that one client may publish, with as many at once after a pause; who
        /// sends more is read from more slowly, and nothing is lost. Too low, and clients that have
        /// been away are long in sending what they have gathered.
        pub publish_rate: Option<usize> = None,
        /// The memory that midge may take. `"auto"` is the limit of its control group, as containers
        /// and systemd set it, if it has one. From 80 % of it new connections are let in slowly, from
        /// 90 % publishers are read from slowly, and from 95 % nobody is let in; at the limit itself
        /// the system would end the process. Linux only.
        pub memory_max: MemoryLimit = MemoryLimit::Auto,
        /// The largest packet a client may send, at most 268435455 bytes; version 5 clients are
        /// told. Too low refuses messages; too high lets every client claim that much memory.
        pub packet_bytes_max: ByteSize = ByteSize::mebibytes(1),
        /// The longest Client Identifier, 23 to 65535 bytes. Each session keeps its own.
        pub client_id_bytes_max: ByteSize = ByteSize::bytes(1024),
        /// Levels of a Topic Name or Topic Filter. Too low refuses deep topics; too high makes
        /// matching against `#` and `+` slow for whoever wants to.
        pub topic_levels_max: usize = 128,
        /// The longest Topic Name or Topic Filter, at most 65535 bytes. Every subscription keeps
        /// its filter in memory.
        pub topic_bytes_max: ByteSize = ByteSize::bytes(4096),
        /// Subscriptions of one session; further ones are refused with Quota exceeded. Each costs
        /// a few hundred bytes of memory.
        pub subscriptions_per_client_max: usize = 100_000,
        /// PUBLISH packets with QoS 1 and 2 that a client may have unacknowledged; version 5
        /// clients are told. Too low slows publishers on links with a long round trip; too high
        /// lets them fill the memory while the store is slow.
        pub receive_maximum: NonZeroU16 = const { NonZeroU16::new(1024).expect("not zero") },
        /// Topic Aliases that a client may use, 0 for none. Each holds one topic in memory.
        pub topic_alias_maximum: u16 = 32,
        /// The longest Keep Alive, at most 65535 s; who asks for more, or for none, is given this
        /// one (version 5) or held to it (before). Unlimited by default. Low values notice dead
        /// connections early, at the price of more PINGREQ.
        pub keep_alive_max: Option<Duration> = None,
        /// Topics with a retained message, those below `$SYS` included. A retained PUBLISH to a
        /// further one is refused with Quota exceeded, and before version 5 dropped. Unlimited
        /// by default; all of them are in memory.
        pub retained_messages_max: Option<usize> = None,
    }
}

section! {
    /// `[session]`: what is kept for a client while it is away or slow.
    pub struct Session {
        /// The longest Session Expiry Interval, and that of sessions without Clean Session before
        /// version 5. Too short loses messages of clients that are away for longer; `"unlimited"`
        /// keeps the queues of clients that never come back.
        pub expiry_max: Option<Duration> = Some(Duration::from_secs(7 * 24 * 60 * 60)),
        /// The topic below which clients find theirs for responses: a version 5 client that asks
        /// for Response Information is told this, a slash and its client id. Unset, it is told
        /// nothing.
        pub response_prefix: Option<String> = None,
        /// Messages with QoS 1 and 2 sent to a client and not yet acknowledged; the Receive
        /// Maximum of the client may lower it. Too low slows delivery on links with a long round
        /// trip; too high overruns small devices that speak version 3.
        pub in_flight_max: NonZeroU16 = const { NonZeroU16::new(512).expect("not zero") },
        /// Messages that wait for one session, in memory and in the store.
        pub queue_messages_max: usize = 100_000,
        /// Bytes that wait for one session, some dozens per message on top of topic and payload
        /// included. Larger than `limits.packet_bytes_max`, or the largest messages never fit.
        pub queue_bytes_max: ByteSize = ByteSize::mebibytes(64),
        /// What a full queue does. `"drop_oldest"` keeps what is new, as a client that was away
        /// for long mostly wants; `"drop_new"` keeps the beginning, as Mosquitto does;
        /// `"disconnect"` ends the connection of a client that is too slow, and drops new
        /// messages for one that is away. With `"drop_oldest"` up to a sixteenth more may wait
        /// on the disk while the client is away.
        pub queue_full: QueueFull = QueueFull::DropOldest,
        /// Messages of the queue that are held in memory for a client. Beyond it, a persistent
        /// session reads them from the store when it is their turn, and QoS 0 and clean sessions
        /// drop them. Too low makes short bursts slow or lossy; too high costs memory for every
        /// slow client.
        pub memory_messages_max: usize = 10_000,
        /// The same in bytes; one message always fits.
        pub memory_bytes_max: ByteSize = ByteSize::mebibytes(1),
    }
}

choices! {
    /// What becomes of a message for a session whose queue is full.
    pub enum QueueFull {
        DropOldest = "drop_oldest",
        DropNew = "drop_new",
        Disconnect = "disconnect",
    }
}

section! {
    /// `[http]`: health checks and the API, of `midge serve`.
    pub struct Http {
        /// Whether there is any.
        pub enabled: bool = true,
        /// An address and a port. On one that other machines can reach, the API needs tokens;
        /// health checks need none.
        pub bind: SocketAddr = (Ipv4Addr::LOCALHOST, 9883).into(),
        /// Who may use the API: a file that `midge token` writes. Unset, whoever is on this machine.
        pub tokens_file: Option<PathBuf> = None,
        /// Addresses, such as `"10.0.0.0/8"`, of proxies whose `X-Forwarded-For` says in the log who
        /// has used the API.
        pub trusted_proxies: Option<Vec<Network>> = None,
    }
}

section! {
    /// `[log]`
    pub struct Log {
        /// A level (`error`, `warn`, `info`, `debug`, `trace`), or one per part of the program,
        /// such as `"info,midge::net=debug"`. Two lines per connection are written at `debug`.
        pub level: String = "info".into(),
        /// `"auto"` is text on a terminal and JSON elsewhere.
        pub format: LogFormat = LogFormat::Auto,
    }
}

choices! {
    pub enum LogFormat {
        Auto = "auto",
        Text = "text",
        Json = "json",
    }
}

section! {
    /// `[sys]`: the `$SYS` topics.
    pub struct Sys {
        /// How often they are published; `"off"` or 0 for never.
        pub interval: Interval = Interval::every(Duration::from_secs(10)),
    }
}

section! {
    /// `[reload]`: files that are read again without a restart.
    pub struct Reload {
        /// How often midge looks whether the configuration file, the users file or a certificate
        /// has other content than before; `"off"` or 0 leaves it to SIGHUP.
        pub interval: Interval = Interval::every(Duration::from_secs(10)),
    }
}

section! {
    /// `[drain]`: what SIGTERM does to the clients of a node.
    pub struct Drain {
        /// How long the node accepts clients although it wants to end, so that load balancers
        /// notice. `"auto"` is 10 s with mongodb, where other nodes stand in, and nothing
        /// otherwise. Too short, and clients are sent to a node that is gone.
        pub grace: Grace = Grace::AUTO,
        /// Clients per second that are told to leave. Too many, and they overrun the other nodes;
        /// too few, and the deadline cuts them off all together.
        pub evict_rate: usize = 500,
        /// How long all of that may take. What starts midge must allow for 15 s more before it
        /// kills it.
        pub deadline: Duration = Duration::from_secs(60),
    }
}

impl Drain {
    /// How long clients are still accepted.
    pub fn grace(&self, store: StoreKind) -> Duration {
        let automatic = match store {
            StoreKind::Embedded | StoreKind::Memory => Duration::ZERO,
            StoreKind::MongoDb => Duration::from_secs(10),
        };
        self.grace.get().unwrap_or(automatic)
    }
}

fn host_name() -> String {
    let from_file = |path| std::fs::read_to_string(path).ok();
    std::env::var("HOSTNAME")
        .ok()
        .or_else(|| from_file("/proc/sys/kernel/hostname"))
        .or_else(|| from_file("/etc/hostname"))
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "midge".to_owned())
}
