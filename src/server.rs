//! The composition root: from a configuration to a running broker, and back to nothing.
//!
//! The only place that names concrete stores and listeners, but for `copy`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending};
use tokio::sync::mpsc::{self, Receiver};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::{Authenticator, Authorizer, CurrentAccess};
use crate::broker::flush::{Flusher, unix_ms};
use crate::broker::mailbox::{MailboxLimits, Order, QueueFull};
use crate::broker::{Node, NodeLimits};
use crate::bus::fallback::FallbackBus;
use crate::bus::mongodb::{CAPPED_BYTES, MongoBus};
use crate::bus::redis::{Location, RedisBus};
use crate::bus::{Bus, BusError};
use crate::cluster::link::Links;
use crate::cluster::{Announced, Cluster, Reception};
use crate::config::{self, Config, Loaded};
use crate::drain::DrainPlan;
use crate::http;
use crate::http::tokens::{CurrentTokens, Tokens, TokensError};
use crate::lifecycle::{Lifecycle, Phase, Steering, Wish};
use crate::metrics::{ListenerTotals, StoreTotals, Totals};
use crate::mqtt::ReasonCode;
use crate::net::arrivals::Arrivals;
use crate::net::connection::{ConnectionContext, serve};
use crate::net::proxy::ProxyRules;
use crate::net::tls::{ClientCa, CurrentTls, TlsFiles};
use crate::net::websocket::handshake::WebSocketRules;
use crate::net::{ListenError, Listener, ListenerConfig, ListenerKind};
use crate::overload;
use crate::reload::{Reload, Reloader};
use crate::session::connect::ConnectLimits;
use crate::store::embedded::{EmbeddedOptions, EmbeddedStore};
use crate::store::memory::MemoryStore;
use crate::store::metered::MeteredStore;
use crate::store::mongodb::{MongoOptions, MongoStore};
use crate::store::{Store, StoreError, Stored};
use crate::systemd;

/// A broker inside this process.
///
/// It serves until [`Broker::shutdown`]; dropping it without ends nothing.
#[derive(Debug)]
pub struct Broker {
    pub(crate) node: Arc<Node>,
    store: Arc<dyn Store>,
    addresses: BTreeMap<String, SocketAddr>,
    pub(crate) reload: Arc<Reload>,
    drain_plan: DrainPlan,
    /// By the name of the listener.
    tls: BTreeMap<String, Arc<CurrentTls>>,
    context: Arc<ConnectionContext>,
    /// Ends the listeners, and reading files again.
    stop_listening: CancellationToken,
    /// Listeners and what runs beside them.
    tasks: TaskTracker,
    connections: TaskTracker,
    failed: watch::Receiver<Option<StoreError>>,
    /// Ends the writer.
    everything_written: CancellationToken,
}

/// Says what a [`Broker`] shall be like.
#[derive(Debug)]
pub struct BrokerBuilder {
    config: Config,
    /// Where the configuration is from, to read it again.
    loaded: Option<Loaded>,
    /// Of the HTTP server, if there is one.
    tokens: Option<Arc<CurrentTokens>>,
    authenticator: Option<Arc<dyn Authenticator>>,
    authorizer: Option<Arc<dyn Authorizer>>,
}

/// Why a broker cannot start. The text says what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StartError(StartErrorKind);

#[derive(Debug, thiserror::Error)]
enum StartErrorKind {
    #[error("{0}")]
    Listen(#[from] ListenError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    Auth(#[from] config::ConfigError),
    #[error("http.tokens_file: {0}")]
    Tokens(#[from] TokensError),
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
    #[error(
        "{0}; nothing was acknowledged that was not written, start midge again when that is mended"
    )]
    StoreFailed(StoreError),
}

impl<E: Into<StartErrorKind>> From<E> for StartError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// How long connections may take to say goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(10);

/// In which clients that were sent away find another node.
const HAND_OVER_TIME: Duration = Duration::from_secs(2);

/// Handshakes of TLS and WebSocket that one listener has going on at a time.
const HANDSHAKES_MAX: usize = 512;

impl BrokerBuilder {
    /// Decides who is let in, instead of `[auth]`.
    #[must_use]
    pub fn authenticator(mut self, authenticator: Arc<dyn Authenticator>) -> Self {
        self.authenticator = Some(authenticator);
        self
    }

    /// Decides what clients may do, instead of `[auth]`.
    #[must_use]
    pub fn authorizer(mut self, authorizer: Arc<dyn Authorizer>) -> Self {
        self.authorizer = Some(authorizer);
        self
    }

    /// Keeps everything in memory, until the broker is shut down.
    #[must_use]
    pub fn in_memory(mut self) -> Self {
        self.config.store.kind = config::StoreKind::Memory;
        self
    }

    /// Opens the store, binds the listeners, and serves.
    ///
    /// # Errors
    /// [`StartError`] if any of it is not possible; nothing is left running then.
    pub async fn start(self) -> Result<Broker, StartError> {
        let config = self.config;
        let access = Arc::new(CurrentAccess::new(crate::auth::from_config(&config.auth)?));
        let authenticator = self.authenticator.unwrap_or_else(|| access.clone());
        let authorizer = self.authorizer.unwrap_or_else(|| access.clone());
        let totals = Arc::new(Totals::new(config.listeners.keys().map(String::as_str)));
        let mut listeners = Vec::new();
        for (name, listener) in &config.listeners {
            let totals = totals.listeners[name.as_str()].clone();
            let config = listener_config(totals, listener, &config.limits);
            listeners.push(Listener::bind(config).await?);
        }
        let opened = open_store(&config).await?;
        let stored = match &opened {
            OpenedStore::Own(store) => store.load().await?,
            OpenedStore::Shared(_) => Stored::default(),
        };
        let number = opened.node();
        let metered = MeteredStore::new(opened.port(), totals.store.clone());
        let store: Arc<dyn Store> = Arc::new(metered);
        let (last_hlc, elides) = (stored.last_hlc, config.store.write_elision);
        let flusher = Arc::new(Flusher::new(store.clone(), number, last_hlc, elides));
        let joining = match opened {
            OpenedStore::Shared(store) => {
                let bus = open_bus(&config, &store).await?;
                Some(Joining::new(store, bus, &flusher, totals.store.clone()).await?)
            }
            OpenedStore::Own(_) => None,
        };
        let node = Node::new(
            config.node.name.as_str().into(),
            node_limits(&config),
            authorizer,
            store.clone(),
            flusher,
            joining.as_ref().map(|joining| joining.cluster.clone()),
            totals,
        );
        let node = Arc::new(node.in_zone(config.node.zone.as_deref().unwrap_or_default()));
        node.restore(stored);
        let (fail, failed) = watch::channel(None);
        let tasks = TaskTracker::new();
        let everything_written = CancellationToken::new();
        if let Some(joining) = joining {
            let (written, fail) = (everything_written.clone(), fail.clone());
            joining.join(&node, &tasks, written, fail).await?;
        }
        let context = Arc::new(ConnectionContext {
            node: node.clone(),
            authenticator,
            limits: ArcSwap::from_pointee(connect_limits(&config)),
            connect_timeout: config.limits.connect_timeout,
            connections_max: config.limits.connections_max.unwrap_or(usize::MAX).into(),
            arrivals: Arc::new(Arrivals::new(
                rate(config.limits.connect_rate),
                node.overload.clone(),
                node.totals.clone(),
            )),
            publish_rate: AtomicU32::new(rate(config.limits.publish_rate).unwrap_or(0)),
            connections: AtomicUsize::new(0),
            sends_away: AtomicBool::new(false),
        });
        let writer = node.clone();
        let written = everything_written.clone();
        // Not among `tasks`: it has to write what the others leave behind as they end.
        tokio::spawn(async move {
            let error = tokio::select! {
                error = writer.flusher.run(&writer) => error,
                () = written.cancelled() => return,
            };
            log_failure(&error);
            fail.send_replace(Some(error));
        });
        let trimming = node.clone();
        tasks.spawn(async move { trimming.run_trimming().await });
        let runtime = node.clone();
        tasks.spawn(async move { runtime.watch_runtime().await });
        tasks.spawn(node.clone().run_groups());
        let deadlines = node.clone();
        tasks.spawn(async move { deadlines.run_deadlines().await });
        if let Some(interval) = config.sys.interval.get() {
            let sys = node.clone();
            tasks.spawn(async move { sys.run_sys(interval).await });
        }
        let memory_limit = match config.limits.memory_max {
            config::MemoryLimit::Auto => overload::control_group_limit(),
            config::MemoryLimit::Bytes(size) => Some(size.get() as u64),
            config::MemoryLimit::Unlimited => None,
        };
        if let Some(limit) = memory_limit {
            let node = node.clone();
            tasks.spawn(async move {
                let watching = node.overload.run(limit);
                node.stopping.run_until_cancelled(watching).await
            });
        }
        let stop_listening = CancellationToken::new();
        let reload = Arc::new(Reload::default());
        let tls = listeners.iter().zip(config.listeners.keys());
        let tls: BTreeMap<_, _> = tls
            .filter_map(|(listener, name)| Some((name.clone(), listener.tls()?)))
            .collect();
        let reloader = Reloader::new(
            reload.clone(),
            config.clone(),
            self.loaded.as_ref(),
            self.tokens,
            access,
            tls.clone(),
            context.clone(),
        );
        tasks.spawn(reloader.run(stop_listening.clone()));
        let connections = TaskTracker::new();
        let mut addresses = BTreeMap::new();
        for (listener, name) in listeners.into_iter().zip(config.listeners.keys()) {
            let address = listener.local_addr();
            let kind = config.listeners[name].kind();
            tracing::info!(event = "listener_started", listener = %name, %address, kind = %kind);
            addresses.insert(name.clone(), address);
            let (context, connections) = (context.clone(), connections.clone());
            let arrivals = context.arrivals.clone();
            let accept = move |accepted| {
                connections.spawn(serve(accepted, context.clone()));
            };
            tasks.spawn(listener.run(stop_listening.clone(), arrivals, accept));
        }
        tracing::info!(event = "ready", node = %node.name, version = env!("CARGO_PKG_VERSION"));
        Ok(Broker {
            node,
            store,
            addresses,
            reload,
            drain_plan: DrainPlan {
                grace: config.drain.grace(config.store.kind),
                evict_rate: config.drain.evict_rate,
                deadline: config.drain.deadline,
            },
            tls,
            context,
            stop_listening,
            tasks,
            connections,
            failed,
            everything_written,
        })
    }
}

impl Broker {
    /// Begins with the defaults: the embedded store in `./midge-data`, one listener on
    /// 127.0.0.1:1883.
    pub fn builder() -> BrokerBuilder {
        Self::with_config(Config::default())
    }

    /// With a configuration that is read again when its file changes.
    pub fn with_loaded(loaded: Loaded) -> BrokerBuilder {
        BrokerBuilder {
            loaded: Some(loaded.clone()),
            ..Self::with_config(loaded.config)
        }
    }

    pub fn with_config(config: Config) -> BrokerBuilder {
        BrokerBuilder {
            config,
            loaded: None,
            tokens: None,
            authenticator: None,
            authorizer: None,
        }
    }

    /// Where a listener accepts connections; useful with port 0.
    pub fn local_addr(&self, listener: &str) -> Option<SocketAddr> {
        self.addresses.get(listener).copied()
    }

    /// Tells the clients, writes everything that is not yet written, and closes the store.
    pub async fn shutdown(self) {
        tracing::info!(event = "shutting_down", node = %self.node.name);
        self.stop_listening.cancel();
        self.node.clients.close(Order::Shutdown);
        self.connections.close();
        if tokio::time::timeout(GOODBYE_TIMEOUT, self.connections.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                event = "connections_abandoned",
                "some clients did not let go in time"
            );
        }
        self.node.stop().await;
        self.tasks.close();
        self.tasks.wait().await;
        let flusher = &self.node.flusher;
        // If the store has failed, that has been said already.
        let _ = flusher.durable(flusher.everything()).await;
        self.everything_written.cancel();
        if let Some(cluster) = &self.node.cluster {
            cluster.leave().await;
        }
        self.store.close().await;
        tracing::info!(event = "stopped", node = %self.node.name);
    }

    /// Sends the clients elsewhere, in the time that `[drain]` gives. What is left is
    /// [`Broker::shutdown`].
    pub async fn drain(&self) {
        self.drain_after(Duration::ZERO).await;
    }

    /// The same, when balancers have had some of the grace already.
    async fn drain_after(&self, elapsed: Duration) {
        let plan = DrainPlan {
            grace: self.drain_plan.grace.saturating_sub(elapsed),
            ..self.drain_plan
        };
        let close = || self.stop_listening.cancel();
        if self.node.cluster.is_none() {
            plan.carry_out(&self.node, Order::Shutdown, close).await;
            return;
        }
        let (connected, _) = self.node.clients.count();
        let order = Order::Leave(ReasonCode::ServerShuttingDown);
        plan.carry_out(&self.node, order, close).await;
        // What was in flight to clients only this node can tell: the last of them come for it now.
        if connected > 0 {
            tokio::time::sleep(HAND_OVER_TIME).await;
        }
    }

    /// Sends the clients elsewhere, those too that come, until [`Broker::undrain`].
    async fn drain_for_now(&self) {
        let close = || self.context.sends_away.store(true, Ordering::Relaxed);
        self.drain_plan
            .carry_out(
                &self.node,
                Order::Leave(ReasonCode::UseAnotherServer),
                close,
            )
            .await;
        tracing::info!(event = "drained");
    }

    fn undrain(&self) {
        self.context.sends_away.store(false, Ordering::Relaxed);
        tracing::info!(event = "undrained");
    }

    /// Resolves if the store fails; the broker can then only be shut down.
    async fn failure(&self) -> StoreError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error
                .clone()
                .unwrap_or_else(|| StoreError::Io("unknown".to_owned())),
            Err(_) => std::future::pending().await,
        }
    }
}

/// Serves until SIGTERM, which drains the node, or SIGINT, then ends in good order; a second signal
/// ends at once. A node
/// that the others of its cluster have declared dead starts anew.
///
/// # Errors
/// [`StartError`] if the broker cannot start, or its store fails while it runs.
pub async fn run(mut loaded: Loaded) -> Result<(), StartError> {
    let mut signals = Signals::new().map_err(StartErrorKind::Signals)?;
    let lifecycle = Lifecycle::new();
    // Before anything else: it answers while the store opens.
    let http = start_http(&loaded.config, &lifecycle).await?;
    while run_once(loaded.clone(), &mut signals, &lifecycle, http.as_ref()).await? == Ended::Fenced
    {
        // If the files are no good now, that has been said.
        if let Ok(now) = Loaded::new(loaded.sources()) {
            loaded = now;
        }
    }
    if let Some(http) = http {
        http.stop().await;
    }
    Ok(())
}

async fn start_http(
    config: &Config,
    lifecycle: &Lifecycle,
) -> Result<Option<http::Server>, StartError> {
    if !config.http.enabled {
        return Ok(None);
    }
    let tokens = match &config.http.tokens_file {
        Some(path) => Tokens::read(path)?,
        None => Tokens::default(),
    };
    let message_bytes_max = config.limits.packet_bytes_max.get();
    let server = http::Server::start(&config.http, tokens, lifecycle.clone(), message_bytes_max);
    Ok(Some(server.await?))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Stopped,
    Fenced,
}

async fn run_once(
    loaded: Loaded,
    signals: &mut Signals,
    lifecycle: &Lifecycle,
    http: Option<&http::Server>,
) -> Result<Ended, StartError> {
    lifecycle.enter(Phase::Starting);
    let builder = BrokerBuilder {
        tokens: http.map(|http| http.tokens().clone()),
        ..Broker::with_loaded(loaded)
    };
    let broker = builder.start().await?;
    let (wishes, wished) = mpsc::channel(WISHES_MAX);
    let steering = Arc::new(Steering {
        wishes,
        reload: broker.reload.clone(),
        started_at: unix_ms(),
        connections: broker.context.clone(),
        tls: broker.tls.clone(),
    });
    if let Some(http) = http {
        http.attach(Some((broker.node.clone(), steering.clone())));
    }
    lifecycle.enter(Phase::Serving);
    systemd::notify(systemd::READY);
    let ended = tokio::select! {
        name = told_to_end(&broker, signals, wished, lifecycle) => Ok(name),
        error = broker.failure() => Err(error),
        never = systemd::keep_watchdog_quiet() => match never {},
    };
    if !matches!(ended, Err(StoreError::Fenced)) {
        systemd::notify(systemd::STOPPING);
    }
    let reload = broker.reload.clone();
    let failure = ended.as_ref().err().cloned();
    let end = async move {
        if let Ok(name) = ended {
            tracing::info!(event = "signal", signal = name);
            if name == SIGTERM {
                let drained_for = match lifecycle.phase() {
                    Phase::Draining => lifecycle.phase_age(),
                    Phase::Starting | Phase::Serving | Phase::Stopping => Duration::ZERO,
                };
                lifecycle.enter(Phase::Draining);
                tokio::select! {
                    () = broker.drain_after(drained_for) => {}
                    _ = broker.failure() => {}
                }
            }
        }
        lifecycle.enter(Phase::Stopping);
        if let Some(http) = http {
            http.attach(None);
        }
        broker.shutdown().await;
    };
    tokio::select! {
        () = end => {}
        never = systemd::keep_watchdog_quiet() => match never {},
        name = signals.next_to_end(&reload) => {
            tracing::warn!(event = "signal", signal = name, "ending at once");
            std::process::exit(1);
        }
    }
    match failure {
        Some(StoreError::Fenced) => Ok(Ended::Fenced),
        Some(error) => Err(StartErrorKind::StoreFailed(error).into()),
        None => Ok(Ended::Stopped),
    }
}

const SIGTERM: &str = "SIGTERM";

/// Wishes that wait; whoever has another one waits with it.
const WISHES_MAX: usize = 8;

/// Does what it is asked for until a signal says to end; returns which one.
async fn told_to_end(
    broker: &Broker,
    signals: &mut Signals,
    mut wished: Receiver<Wish>,
    lifecycle: &Lifecycle,
) -> &'static str {
    let mut draining: BoxFuture<'_, ()> = pending().boxed();
    loop {
        tokio::select! {
            name = signals.next_to_end(&broker.reload) => return name,
            () = &mut draining => draining = pending().boxed(),
            Some(wish) = wished.recv() => {
                let done = match wish {
                    Wish::Drain(done) => {
                        if lifecycle.phase() == Phase::Serving {
                            lifecycle.enter(Phase::Draining);
                            draining = broker.drain_for_now().boxed();
                        }
                        done
                    }
                    Wish::Undrain(done) => {
                        if lifecycle.phase() == Phase::Draining {
                            draining = pending().boxed();
                            broker.undrain();
                            lifecycle.enter(Phase::Serving);
                        }
                        done
                    }
                };
                // Who has asked may have gone.
                let _ = done.send(());
            }
        }
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal to end. SIGHUP has the files read again.
    async fn next_to_end(&mut self, reload: &Reload) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return SIGTERM,
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hang_up.recv() => {
                    tracing::info!(event = "signal", signal = "SIGHUP");
                    reload.ask();
                }
            }
        }
    }
}

/// How long one operation waits for MongoDB; a fail-over takes a few seconds.
const STORE_OPERATION_TIMEOUT: Duration = Duration::from_secs(10);

/// A store, of this node alone or of several.
enum OpenedStore {
    Own(Arc<dyn Store>),
    Shared(Arc<MongoStore>),
}

impl OpenedStore {
    fn port(&self) -> Arc<dyn Store> {
        match self {
            Self::Own(store) => store.clone(),
            Self::Shared(store) => store.clone(),
        }
    }

    fn node(&self) -> u32 {
        match self {
            Self::Own(_) => 0,
            Self::Shared(store) => store.node(),
        }
    }
}

async fn open_store(config: &Config) -> Result<OpenedStore, StartError> {
    let own: Arc<dyn Store> = match config.store.kind {
        config::StoreKind::Embedded => Arc::new(EmbeddedStore::open(
            &config.store.path,
            EmbeddedOptions::default(),
        )?),
        config::StoreKind::Memory => Arc::new(MemoryStore::default()),
        config::StoreKind::MongoDb => {
            let store = MongoStore::connect(mongo_options(config)?).await?;
            return Ok(OpenedStore::Shared(store));
        }
    };
    Ok(OpenedStore::Own(own))
}

/// What carries frames between the nodes that share `store`.
async fn open_bus(config: &Config, store: &MongoStore) -> Result<Arc<dyn Bus>, StartError> {
    let node = store.node();
    let mongodb = Arc::new(MongoBus::open(store.database(), node, CAPPED_BYTES).await?);
    let url = config.bus.redis_url()?;
    let Some(location) = url.and_then(|url| Location::parse(url.secret())) else {
        return Ok(mongodb);
    };
    let redis = RedisBus::new(location, store.cluster(), node);
    Ok(Arc::new(FallbackBus::new(node, redis, mongodb)))
}

/// The MongoDB that `config` names.
pub(crate) fn mongo_options(config: &Config) -> Result<MongoOptions, config::ConfigError> {
    Ok(MongoOptions {
        uri: config.store.mongodb_uri()?.secret().to_owned(),
        database: config.store.database.clone(),
        node_name: config.node.name.clone(),
        timeout: STORE_OPERATION_TIMEOUT,
    })
}

/// A node that is about to take part in a cluster.
struct Joining {
    cluster: Arc<Cluster>,
    announced: Receiver<Announced>,
    frames: Receiver<Bytes>,
}

impl Joining {
    async fn new(
        store: Arc<MongoStore>,
        bus: Arc<dyn Bus>,
        flusher: &Arc<Flusher>,
        totals: Arc<StoreTotals>,
    ) -> Result<Self, StartError> {
        // Before anything is loaded: what changes meanwhile is told.
        let frames = bus.subscribe().await?;
        let links = Links::new(store.node(), bus, flusher.clone());
        let (cluster, announced) = Cluster::new(store, links, totals);
        Ok(Self {
            cluster: Arc::new(cluster),
            announced,
            frames,
        })
    }

    /// Takes up what the others have, and goes on beside the node.
    async fn join(
        self,
        node: &Arc<Node>,
        tasks: &TaskTracker,
        everything_written: CancellationToken,
        fail: watch::Sender<Option<StoreError>>,
    ) -> Result<(), StartError> {
        let Self {
            cluster,
            announced,
            frames,
        } = self;
        node.load_shared(&cluster).await?;
        cluster.join(node).await?;
        let (sending, stop) = (cluster.clone(), node.stopping.clone());
        tasks.spawn(async move { sending.links.send_frames(&stop).await });
        let (receiving, stop) = (cluster.clone(), node.stopping.clone());
        let mut reception = Reception::new(node.clone());
        tasks.spawn(async move {
            receiving
                .links
                .receive_frames(frames, &mut reception, &stop)
                .await;
        });
        let (beating, beaten) = (cluster.clone(), node.clone());
        // Not among `tasks` either: what they leave behind is written only as long as this node is
        // alive for the others, and may need another reservation.
        tokio::spawn(async move {
            let (cluster, node) = (beating, beaten);
            tokio::select! {
                error = cluster.run(&node, announced) => {
                    log_failure(&error);
                    node.flusher.fail(&error);
                    fail.send_replace(Some(error));
                }
                () = everything_written.cancelled() => {}
            }
        });
        node.until_greeted(&cluster).await;
        Ok(())
    }
}

/// Whether it is the flush or the heartbeat that finds out.
fn log_failure(error: &StoreError) {
    match error {
        StoreError::Fenced => tracing::error!(event = "fenced", %error),
        _ => {
            tracing::error!(event = "store_failed", %error, "nothing is acknowledged any more");
        }
    }
}

fn listener_config(
    totals: Arc<ListenerTotals>,
    listener: &config::Listener,
    limits: &config::Limits,
) -> ListenerConfig {
    let tls = listener.tls.as_ref().map(tls_files);
    let kind = match (&listener.transport, tls) {
        (config::Transport::Tcp, None) => ListenerKind::Tcp,
        (config::Transport::Tcp, Some(tls)) => ListenerKind::Tls(tls),
        (
            config::Transport::WebSocket {
                path,
                allowed_origins,
            },
            tls,
        ) => {
            let all = allowed_origins.iter().any(|origin| origin == "*");
            let origins = if all {
                Vec::new()
            } else {
                allowed_origins.clone()
            };
            let rules = WebSocketRules {
                path: Some(path.clone()),
                origins,
                trusted_proxies: listener.trusted_proxies.clone(),
            };
            match tls {
                None => ListenerKind::WebSocket(rules),
                Some(tls) => ListenerKind::WebSocketTls(tls, rules),
            }
        }
    };
    ListenerConfig {
        totals,
        bind: listener.bind,
        kind,
        handshake_timeout: limits.connect_timeout,
        handshakes_max: HANDSHAKES_MAX,
        proxy: proxy_rules(listener),
    }
}

fn proxy_rules(listener: &config::Listener) -> Option<ProxyRules> {
    let is_required = match listener.proxy_protocol {
        config::ProxyProtocol::Off => return None,
        config::ProxyProtocol::Optional => false,
        config::ProxyProtocol::Required => true,
    };
    Some(ProxyRules {
        is_required,
        trusted: listener.trusted_proxies.clone(),
    })
}

pub(crate) fn tls_files(tls: &config::Tls) -> TlsFiles {
    let client_ca = match &tls.client_auth {
        config::ClientAuth::None => None,
        config::ClientAuth::Optional { ca } => Some((ca, false)),
        config::ClientAuth::Required { ca } => Some((ca, true)),
    };
    TlsFiles {
        certificate: tls.certificate.clone(),
        key: tls.key.clone(),
        client_ca: client_ca.map(|(file, is_certificate_required)| ClientCa {
            file: file.clone(),
            is_certificate_required,
        }),
    }
}

pub(crate) fn connect_limits(config: &Config) -> ConnectLimits {
    let limits = &config.limits;
    ConnectLimits {
        client_id_bytes_max: limits.client_id_bytes_max.get(),
        topic_bytes_max: limits.topic_bytes_max.get(),
        topic_levels_max: limits.topic_levels_max,
        packet_bytes_max: u32::try_from(limits.packet_bytes_max.get()).unwrap_or(u32::MAX),
        receive_maximum: limits.receive_maximum.get(),
        topic_alias_maximum: limits.topic_alias_maximum,
        keep_alive_max: limits.keep_alive_max.map_or(u16::MAX, |max| {
            u16::try_from(max.as_secs()).unwrap_or(u16::MAX)
        }),
        session_expiry_max: session_expiry_max(config),
        response_prefix: config.session.response_prefix.as_deref().map(Into::into),
        in_flight_max: config.session.in_flight_max.get(),
    }
}

/// So many per second.
pub(crate) fn rate(limit: Option<usize>) -> Option<u32> {
    limit.map(|limit| u32::try_from(limit).unwrap_or(u32::MAX))
}

fn node_limits(config: &Config) -> NodeLimits {
    let session = &config.session;
    NodeLimits {
        mailbox: MailboxLimits {
            queue_messages_max: session.queue_messages_max as u64,
            queue_bytes_max: session.queue_bytes_max.get() as u64,
            queue_full: match session.queue_full {
                config::QueueFull::DropOldest => QueueFull::DropOldest,
                config::QueueFull::DropNew => QueueFull::DropNew,
                config::QueueFull::Disconnect => QueueFull::Disconnect,
            },
            memory_messages_max: session.memory_messages_max,
            memory_bytes_max: session.memory_bytes_max.get(),
        },
        subscriptions_per_client_max: config.limits.subscriptions_per_client_max,
        retained_messages_max: config
            .limits
            .retained_messages_max
            .map_or(u64::MAX, |max| max as u64),
        topic_levels_max: config.limits.topic_levels_max,
        topic_bytes_max: config.limits.topic_bytes_max.get(),
        session_expiry_max: session_expiry_max(config),
    }
}

fn session_expiry_max(config: &Config) -> u32 {
    config.session.expiry_max.map_or(u32::MAX, |max| {
        u32::try_from(max.as_secs()).unwrap_or(u32::MAX)
    })
}
