//! Frames by the pub/sub of a Redis server: fast, and at most once.
//!
//! Every node listens to a channel of its own and to one for all. Two connections serve it, one
//! to listen and one to publish, so that Redis may cut off a node that reads too slowly without
//! taking its voice as well. A [`Keeper`] makes them, and proves all the time that both work: what
//! it publishes to a third channel, its echo, has to come back.

use std::convert::Infallible;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, PushInfo, PushKind, RedisError, Value,
};
use rustls::crypto::aws_lc_rs;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::{Bus, BusError, Destination, INTERRUPTION};
use crate::metrics::Counter;

/// How often the echo is called for.
const ECHO_INTERVAL: Duration = Duration::from_millis(250);

/// After which a missing echo means that the server, or the way to it, does not work.
const ECHO_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the server may take for an answer. Publishers of messages wait for it.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// Bytes of frames that the server has to answer for within that time.
const PIPELINE_BYTES: usize = 4 * 1024 * 1024;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a node that starts waits for the server.
pub(super) const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);

const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

/// Frames that have been read and wait for whoever subscribed. Those that do not fit are dropped:
/// Redis itself would drop the connection.
const READ_AHEAD_FRAMES: usize = 1024;

/// Where Redis is and how to log in there.
#[derive(Clone)]
pub(crate) enum Location {
    Server(Box<ConnectionInfo>),
    /// Whatever server the sentinels name at the time.
    Sentinels {
        sentinels: Vec<ConnectionInfo>,
        service: String,
        /// How to log in; its address is that of no server.
        server: Box<ConnectionInfo>,
    },
}

const SENTINEL_PORT: u16 = 26379;

impl Location {
    /// `None` if this is no such URL.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        match scheme {
            "redis" | "rediss" => connection_info(url).map(Box::new).map(Self::Server),
            "redis+sentinel" => Self::parse_sentinels("redis", rest),
            "rediss+sentinel" => Self::parse_sentinels("rediss", rest),
            _ => None,
        }
    }

    /// What follows the scheme: `user:password@host:port,host:port/service/database`, and how to log
    /// in at the sentinels: `?sentinel_user=…&sentinel_password=…`.
    fn parse_sentinels(scheme: &str, rest: &str) -> Option<Self> {
        let (rest, options) = rest.rsplit_once('?').unwrap_or((rest, ""));
        let (mut sentinel_user, mut sentinel_password) = ("", "");
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=')? {
                ("sentinel_user", user) => sentinel_user = user,
                ("sentinel_password", password) => sentinel_password = password,
                _ => return None,
            }
        }
        let sentinel_login = match (sentinel_user, sentinel_password) {
            ("", "") => String::new(),
            (_, "") => return None,
            (user, password) => format!("{user}:{password}@"),
        };
        let (user_info, rest) = match rest.rsplit_once('@') {
            Some((user_info, rest)) => (format!("{user_info}@"), rest),
            None => (String::new(), rest),
        };
        let (hosts, path) = rest.split_once('/')?;
        let (service, database) = path.split_once('/').unwrap_or((path, "0"));
        if service.is_empty() {
            return None;
        }
        let sentinels = hosts.split(',').map(|host| {
            let has_port = host
                .rsplit_once(':')
                .is_some_and(|(_, port)| !port.ends_with(']'));
            let url = match has_port {
                true => format!("{scheme}://{sentinel_login}{host}"),
                false => format!("{scheme}://{sentinel_login}{host}:{SENTINEL_PORT}"),
            };
            connection_info(&url)
        });
        Some(Self::Sentinels {
            sentinels: sentinels.collect::<Option<_>>()?,
            service: service.to_owned(),
            server: Box::new(connection_info(&format!(
                "{scheme}://{user_info}any/{database}"
            ))?),
        })
    }

    fn uses_tls(&self) -> bool {
        let (Self::Server(server) | Self::Sentinels { server, .. }) = self;
        matches!(server.addr(), ConnectionAddr::TcpTls { .. })
    }

    /// The server to use now.
    async fn find(&self) -> Result<ConnectionInfo, RedisError> {
        let (sentinels, service, server) = match self {
            Self::Server(server) => return Ok((**server).clone()),
            Self::Sentinels {
                sentinels,
                service,
                server,
            } => (sentinels, service, server),
        };
        let mut problem = failure("no sentinel knows the service");
        for sentinel in sentinels {
            match ask_sentinel(sentinel, service).await {
                Ok(Some((host, port))) => {
                    let address = match server.addr() {
                        ConnectionAddr::TcpTls { .. } => ConnectionAddr::TcpTls {
                            host,
                            port,
                            insecure: false,
                            tls_params: None,
                        },
                        ConnectionAddr::Tcp(..) | ConnectionAddr::Unix(_) | _ => {
                            ConnectionAddr::Tcp(host, port)
                        }
                    };
                    return Ok((**server).clone().set_addr(address));
                }
                Ok(None) => {}
                Err(error) => problem = error,
            }
        }
        Err(problem)
    }
}

/// Without what is secret.
impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(server) => write!(f, "{}", server.addr()),
            Self::Sentinels {
                sentinels, service, ..
            } => {
                let addresses = sentinels.iter().map(|sentinel| sentinel.addr().to_string());
                write!(
                    f,
                    "{service} of {}",
                    addresses.collect::<Vec<_>>().join(",")
                )
            }
        }
    }
}

fn connection_info(url: &str) -> Option<ConnectionInfo> {
    let info = url.into_connection_info().ok()?;
    let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) = info.addr() else {
        return None;
    };
    if host.is_empty() || host.contains(',') {
        return None;
    }
    // Without RESP3 a connection that listens could not be told from one that does not.
    let redis = info.redis_settings().clone();
    let redis = redis.set_protocol(ProtocolVersion::RESP3);
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    Some(info.set_redis_settings(redis).set_tcp_settings(tcp))
}

async fn ask_sentinel(
    sentinel: &ConnectionInfo,
    service: &str,
) -> Result<Option<(String, u16)>, RedisError> {
    let client = Client::open(sentinel.clone())?;
    let config = connection_config();
    let mut connection = client
        .get_multiplexed_async_connection_with_config(&config)
        .await?;
    redis::cmd("SENTINEL")
        .arg("GET-MASTER-ADDR-BY-NAME")
        .arg(service)
        .query_async(&mut connection)
        .await
}

fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(ANSWER_TIMEOUT))
}

fn failure(reason: &'static str) -> RedisError {
    (ErrorKind::Io, reason).into()
}

/// The names of the channels of a cluster.
#[derive(Clone, Debug)]
struct Channels {
    prefix: String,
    node: u32,
}

impl Channels {
    fn of(&self, destination: Destination) -> String {
        match destination {
            Destination::Node(node) => format!("{}:node:{node}", self.prefix),
            Destination::All => format!("{}:all", self.prefix),
        }
    }

    fn echo(&self) -> String {
        format!("{}:echo:{}", self.prefix, self.node)
    }
}

/// A bus that loses what is on its way when the server, or a connection to it, fails.
#[derive(Clone, Debug)]
pub(crate) struct RedisBus {
    location: Location,
    channels: Channels,
    /// There while the server is healthy; the keeper alone changes it.
    publisher: Arc<watch::Sender<Option<Publisher>>>,
    /// Times that the server has begun to work for this node.
    connects: Arc<Counter>,
}

/// The connection that publishes.
#[derive(Clone)]
struct Publisher {
    connection: MultiplexedConnection,
    /// Tells the keeper that something is wrong.
    failed: Arc<Notify>,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}

impl RedisBus {
    /// `cluster` tells the channels of one cluster from those of another on the same server.
    pub(crate) fn new(location: Location, cluster: &str, node: u32) -> Self {
        if location.uses_tls() {
            // Fails if there is one already, which will do.
            let _ = aws_lc_rs::default_provider().install_default();
        }
        Self {
            location,
            channels: Channels {
                prefix: format!("midge:{cluster}"),
                node,
            },
            publisher: Arc::new(watch::Sender::new(None)),
            connects: Arc::default(),
        }
    }

    /// Sends frames in one go; returns how many listened to the channel of each. One node may seem
    /// to listen when its connection is dead and the server does not know yet.
    ///
    /// # Errors
    /// `BusError` if any of them may not have been taken by the server. It comes at once while the
    /// server is known to be away, and else after half a second at most.
    pub(crate) async fn publish(
        &self,
        frames: &[(Destination, Bytes)],
    ) -> Result<Vec<u64>, BusError> {
        let publisher = self.publisher.borrow().clone();
        let Some(mut publisher) = publisher else {
            return Err(BusError::Unavailable("Redis is away".to_owned()));
        };
        let mut listeners = Vec::with_capacity(frames.len());
        let mut rest = frames;
        while !rest.is_empty() {
            let mut pipeline = redis::pipe();
            let (mut count, mut bytes) = (0, 0);
            for (to, frame) in rest {
                if count > 0 && bytes + frame.len() > PIPELINE_BYTES {
                    break;
                }
                count += 1;
                bytes += frame.len();
                let channel = self.channels.of(*to);
                pipeline.cmd("PUBLISH").arg(channel).arg(&frame[..]);
            }
            rest = &rest[count..];
            let published = pipeline.query_async(&mut publisher.connection).await;
            let heard: Vec<u64> = published.inspect_err(|_| publisher.failed.notify_one())?;
            listeners.extend(heard);
        }
        Ok(listeners)
    }

    /// Begins to listen, now or as soon as the server is there; to be called once. Where something
    /// may be missing, there is an [`INTERRUPTION`].
    pub(crate) fn listen(&self) -> mpsc::Receiver<Bytes> {
        let (sender, frames) = mpsc::channel(READ_AHEAD_FRAMES);
        let keeper = Keeper {
            bus: self.clone(),
            frames: sender,
        };
        // Ends when nobody takes frames any more.
        tokio::spawn(keeper.run());
        frames
    }

    /// Whether frames go both ways, and a way to wait for that to change.
    pub(crate) fn health(&self) -> Health {
        Health(self.publisher.subscribe())
    }
}

/// Watches whether the server works for this node.
#[derive(Debug)]
pub(crate) struct Health(watch::Receiver<Option<Publisher>>);

impl Health {
    pub(crate) fn is_up(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Waits until it does.
    pub(crate) async fn wait_until_up(&mut self) {
        // An error would mean that the bus is gone, and its user with it.
        let _ = self.0.wait_for(Option::is_some).await;
    }

    /// Waits until it has changed since the last call.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[async_trait]
impl Bus for RedisBus {
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        self.publish(&frames).await.map(drop)
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        let frames = self.listen();
        let up = timeout(SUBSCRIBE_TIMEOUT, self.health().wait_until_up()).await;
        up.map_err(|late| BusError::Unavailable(late.to_string()))?;
        Ok(frames)
    }

    fn is_connected(&self) -> bool {
        self.publisher.borrow().is_some()
    }

    fn reconnects(&self) -> u64 {
        self.connects.get().saturating_sub(1)
    }
}

/// Makes the connections, watches them, and makes them anew.
struct Keeper {
    bus: RedisBus,
    frames: mpsc::Sender<Bytes>,
}

impl Keeper {
    async fn run(self) {
        tokio::select! {
            () = self.frames.closed() => {}
            () = self.keep() => {}
        }
        self.bus.publisher.send_replace(None);
    }

    async fn keep(&self) {
        let mut delay = RECONNECT_DELAY_MIN;
        let mut is_said = false;
        loop {
            let Err(reason) = self.serve().await;
            let was_up = self.bus.publisher.send_replace(None).is_some();
            if was_up {
                delay = RECONNECT_DELAY_MIN;
                // Closed: whoever took frames is gone, and so is this task in a moment.
                let _ = self.frames.send(INTERRUPTION).await;
            }
            if was_up || !is_said {
                is_said = true;
                let location = &self.bus.location;
                tracing::warn!(event = "bus_down", redis = ?location, %reason, "Redis does not work");
            }
            sleep(jittered(delay)).await;
            delay = (delay * 2).min(RECONNECT_DELAY_MAX);
        }
    }

    /// Returns why it does not go on.
    async fn serve(&self) -> Result<Infallible, RedisError> {
        let Self { bus, frames } = self;
        let failed = Arc::new(Notify::new());
        let echoes = Arc::new(watch::Sender::new(0_u64));
        let client = Client::open(bus.location.find().await?)?;
        let listener = Listener {
            frames: frames.clone(),
            echo_channel: bus.channels.echo(),
            echoes: echoes.clone(),
            failed: failed.clone(),
        };
        let config = connection_config().set_push_sender(move |push| listener.receive(push));
        let mut listening = client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        let own = Destination::Node(bus.channels.node);
        let channels = [
            bus.channels.of(own),
            bus.channels.of(Destination::All),
            bus.channels.echo(),
        ];
        listening.subscribe(&channels[..]).await?;
        let connection = client
            .get_multiplexed_async_connection_with_config(&connection_config())
            .await?;
        for number in 1_u64.. {
            tokio::select! {
                echoed = timeout(ECHO_TIMEOUT, bus.call(connection.clone(), number, &echoes)) => {
                    echoed.map_err(|_| failure("the echo is missing"))??;
                }
                () = failed.notified() => return Err(failure("a connection has failed")),
            }
            if number == 1 {
                let publisher = Publisher {
                    connection: connection.clone(),
                    failed: failed.clone(),
                };
                bus.connects.inc();
                bus.publisher.send_replace(Some(publisher));
                tracing::info!(event = "bus_up", redis = ?bus.location);
            }
            tokio::select! {
                () = sleep(ECHO_INTERVAL) => {}
                () = failed.notified() => return Err(failure("a connection has failed")),
            }
        }
        Err(failure("numbers have run out"))
    }
}

impl RedisBus {
    /// Calls, and waits for the echo.
    async fn call(
        &self,
        mut connection: MultiplexedConnection,
        number: u64,
        echoes: &watch::Sender<u64>,
    ) -> Result<(), RedisError> {
        let () = redis::cmd("PUBLISH")
            .arg(self.channels.echo())
            .arg(number)
            .query_async(&mut connection)
            .await?;
        // The sender is there as long as this is.
        let _ = echoes.subscribe().wait_for(|echo| *echo >= number).await;
        Ok(())
    }
}

/// Takes what the listening connection reads; runs in its task, and must not wait.
struct Listener {
    frames: mpsc::Sender<Bytes>,
    echo_channel: String,
    echoes: Arc<watch::Sender<u64>>,
    failed: Arc<Notify>,
}

impl Listener {
    fn receive(&self, push: PushInfo) -> Result<(), Infallible> {
        match push.kind {
            PushKind::Disconnection => self.failed.notify_one(),
            PushKind::Message => {
                let mut data = push.data.into_iter();
                if let (Some(Value::BulkString(channel)), Some(Value::BulkString(payload))) =
                    (data.next(), data.next())
                {
                    self.receive_message(&channel, payload);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn receive_message(&self, channel: &[u8], payload: Vec<u8>) {
        if channel == self.echo_channel.as_bytes() {
            let number = str::from_utf8(&payload)
                .ok()
                .and_then(|text| text.parse().ok());
            if let Some(number) = number {
                self.echoes.send_replace(number);
            }
        } else if let Err(TrySendError::Full(_)) = self.frames.try_send(payload.into()) {
            // Its number is missing then, and it is asked for again.
            tracing::debug!(event = "frame_dropped");
        }
    }
}

/// Half of `delay` to all of it: nodes should not come back in step.
fn jittered(delay: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) % 1024;
    delay.mul_f64(0.5 + random as f64 / 2048.0)
}

impl From<RedisError> for BusError {
    fn from(error: RedisError) -> Self {
        Self::Unavailable(format!("Redis: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::contract::{self, frame, take, to, wait_for};
    use crate::bus::redis_server::RedisServer;

    #[tokio::test]
    async fn it_is_a_bus() {
        let server = RedisServer::shared();
        contract::frames_come_to_whom_they_were_sent_in_order(&server.bus(1), &server.bus(2)).await;
        contract::large_frames_come_whole(&server.bus(1)).await;
    }

    #[tokio::test]
    async fn it_says_how_many_listen() {
        let server = RedisServer::shared();
        let (one, two) = (server.bus(1), server.bus(2));
        let _at_one = one.subscribe().await.unwrap();
        let _at_two = two.subscribe().await.unwrap();

        let destinations = [Destination::Node(3), Destination::All, Destination::Node(2)];
        let frames = destinations.map(|destination| (destination, frame(7)));
        assert_eq!(one.publish(&frames).await.unwrap(), [0, 2, 1]);
    }

    #[tokio::test]
    async fn clusters_on_one_server_do_not_hear_each_other() {
        let server = RedisServer::shared();
        let here = server.bus(1);
        let elsewhere = RedisBus::new(here.location.clone(), "elsewhere", 1);
        let mut frames = here.subscribe().await.unwrap();
        let _others = elsewhere.subscribe().await.unwrap();

        elsewhere.send(to(Destination::All, 0..1)).await.unwrap();
        here.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_restarted_server_is_found_again() {
        let mut server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        assert_eq!(bus.reconnects(), 0);
        server.kill();
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.send(to(Destination::All, 0..1)).await.unwrap_err();
        server.start_again();
        bus.health().wait_until_up().await;
        assert_eq!(bus.reconnects(), 1);
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_frozen_server_is_noticed_without_sending() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        server.freeze();
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.send(to(Destination::All, 0..1)).await.unwrap_err();
        server.thaw();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut frames, 1).await;
    }

    #[tokio::test]
    async fn a_listener_that_the_server_cuts_off_comes_back() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_listener_that_is_too_slow_for_the_server_is_cut_off_and_comes_back() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();
        let limit = [
            "CONFIG",
            "SET",
            "client-output-buffer-limit",
            "pubsub 32kb 0 0",
        ];
        server.command(&limit).await;

        // All of it waits in the server before any of it goes out.
        let large = (Destination::Node(1), Bytes::from(vec![7; 64 * 1024]));
        bus.send(vec![large; 16]).await.unwrap();
        while frames.recv().await.unwrap() != INTERRUPTION {}
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut frames, 1).await;
    }

    #[tokio::test]
    async fn whoever_takes_frames_too_slowly_misses_some_and_hears_the_next() {
        let server = RedisServer::shared();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        let many = u32::try_from(READ_AHEAD_FRAMES).unwrap() + 10;
        bus.send(to(Destination::Node(1), 0..many)).await.unwrap();
        let kept = take(&mut frames, READ_AHEAD_FRAMES).await;
        assert_eq!(kept[0], frame(0));
        bus.send(to(Destination::Node(1), many..many + 1))
            .await
            .unwrap();
        wait_for(&mut frames, many).await;
    }

    #[tokio::test]
    async fn nothing_goes_on_when_nobody_takes_frames() {
        let server = RedisServer::shared();
        let bus = server.bus(1);
        let frames = bus.subscribe().await.unwrap();
        let mut health = bus.health();
        assert!(health.is_up());

        drop(frames);
        while health.is_up() {
            health.changed().await;
        }
    }

    #[test]
    fn urls_say_where_redis_is() {
        for (url, shown) in [
            ("redis://cache", "cache:6379"),
            ("redis://:secret@cache:7000/2", "cache:7000"),
            ("rediss://me:secret@cache", "cache:6379"),
            (
                "redis+sentinel://me:secret@one,two:7000,[::1]/main/3",
                "main of one:26379,two:7000,::1:26379",
            ),
            (
                "redis+sentinel://one/main?sentinel_user=me&sentinel_password=s%40cret",
                "main of one:26379",
            ),
        ] {
            let location = Location::parse(url).unwrap();
            assert_eq!(format!("{location:?}"), shown, "{url}");
        }
        for url in [
            "",
            "cache:6379",
            "redis://",
            "redis://one,two",
            "redis://cache/x",
            "redis+sentinel://one,two",
            "redis+sentinel://one,two/",
            "redis+sentinel://one/main?sentinel_user=me",
            "redis+sentinel://one/main?password=secret",
            "redis+cluster://one,two",
            "http://cache",
        ] {
            assert!(Location::parse(url).is_none(), "{url}");
        }
    }

    #[tokio::test]
    async fn sentinels_are_asked_one_after_the_other_for_the_server() {
        let server = RedisServer::start();
        let sentinel = server.sentinel("main", None);
        let nowhere = {
            let mut killed = RedisServer::start();
            killed.kill();
            killed.address()
        };
        let url = format!("redis+sentinel://{nowhere},{}/main", sentinel.address());
        let bus = RedisBus::new(Location::parse(&url).unwrap(), "test", 1);

        let mut frames = bus.listen();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(0)]);
    }

    #[tokio::test]
    async fn sentinels_and_the_server_have_passwords_of_their_own() {
        let server = RedisServer::start_with_password("s@cret");
        let sentinel = server.sentinel("main", Some("other"));
        let with = |server: &str, sentinel_password: &str| {
            let address = sentinel.address();
            let url = format!(
                "redis+sentinel://:{server}@{address}/main?sentinel_password={sentinel_password}"
            );
            RedisBus::new(Location::parse(&url).unwrap(), "test", 1)
        };

        let bus = with("s%40cret", "other");
        let mut frames = bus.listen();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(0)]);
        for (server, sentinel_password) in [("wrong", "other"), ("s%40cret", "wrong")] {
            let bus = with(server, sentinel_password);
            let served = async {
                let client = Client::open(bus.location.find().await?)?;
                client.get_multiplexed_async_connection().await
            };
            assert!(served.await.is_err());
        }
    }
}
