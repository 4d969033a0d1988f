//! One address that clients connect to: binding, accepting, and the handshakes before MQTT.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::InvalidMessage;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::{self, Instant};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::arrivals::{Arrival, Arrivals};
use super::proxy::{ProxyError, ProxyRules};
use super::tls::{self, CurrentTls, TlsError, TlsFiles};
use super::transport::Transport;
use super::websocket::handshake::{self, HandshakeError, WebSocketRules};
use crate::metrics::{ListenerTotals, Rejected};

/// Connections that the kernel completes while we are busy. When a large fleet reconnects, those
/// beyond it wait for their next SYN, a second or more. The kernel may cap it (`somaxconn`).
const BACKLOG: i32 = 4096;

/// How long accepting pauses after an error that trying again at once would only repeat.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// New connections that are taken before those taken get their turn. While a fleet connects,
/// clients and broker then work at the same time, instead of waiting for each other's batch.
const ACCEPTED_AT_ONCE: usize = 8;

const ALPN_MQTT: &[u8] = b"mqtt";
const ALPN_HTTP: &[u8] = b"http/1.1";

/// A listener as configured.
#[derive(Clone, Debug)]
pub(crate) struct ListenerConfig {
    /// What it counts, and its name.
    pub(crate) totals: Arc<ListenerTotals>,
    /// Port 0 lets the system choose; see [`Listener::local_addr`]. The IPv6 wildcard accepts
    /// IPv4 as well.
    pub(crate) bind: SocketAddr,
    pub(crate) kind: ListenerKind,
    /// From the accepted connection to the end of the TLS and WebSocket handshakes. Too short, and
    /// clients on slow links never get in; too long, and connections that say nothing add up.
    pub(crate) handshake_timeout: Duration,
    /// Handshakes going on at once; more clients wait in the kernel. Too few, and clients that
    /// stall delay the others; too many, and after an outage all handshakes advance so slowly
    /// that none finishes in time.
    pub(crate) handshakes_max: usize,
    /// Whether proxies say who their clients are.
    pub(crate) proxy: Option<ProxyRules>,
}

/// What a listener speaks below MQTT.
#[derive(Clone, Debug)]
pub(crate) enum ListenerKind {
    Tcp,
    Tls(TlsFiles),
    WebSocket(WebSocketRules),
    WebSocketTls(TlsFiles, WebSocketRules),
}

/// Why a listener cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    #[error(
        "listener {name}: something else already listens on {address}; stop it, or choose \
         another port"
    )]
    AddressInUse { name: Arc<str>, address: SocketAddr },
    #[error(
        "listener {name}: not allowed to listen on {address}; ports below 1024 usually need root \
         or CAP_NET_BIND_SERVICE"
    )]
    NotPermitted { name: Arc<str>, address: SocketAddr },
    #[error("listener {name}: {} is not an address of this machine", address.ip())]
    NoSuchAddress { name: Arc<str>, address: SocketAddr },
    #[error("listener {name}: cannot listen on {address}: {error}")]
    Bind {
        name: Arc<str>,
        address: SocketAddr,
        error: io::Error,
    },
    #[error("listener {name}: {error}")]
    Tls { name: Arc<str>, error: TlsError },
}

/// A client's connection, ready for its CONNECT.
pub(crate) struct Accepted {
    pub(crate) transport: Transport,
    pub(crate) peer: SocketAddr,
    pub(crate) listener: Arc<ListenerTotals>,
    /// The Common Name of a verified client certificate.
    pub(crate) certificate_name: Option<Arc<str>>,
    /// Too many have come: it is to be refused.
    pub(crate) is_over_rate: bool,
}

/// A bound socket; connections wait in the kernel until [`Listener::run`].
pub(crate) struct Listener {
    totals: Arc<ListenerTotals>,
    socket: TcpListener,
    local_addr: SocketAddr,
    handshake: Handshake,
    proxy: Option<Arc<ProxyRules>>,
    handshake_timeout: Duration,
    handshakes_max: usize,
}

/// What happens between the TCP connection and MQTT.
#[derive(Clone)]
enum Handshake {
    None,
    Tls(Arc<CurrentTls>),
    WebSocket(Arc<WebSocketRules>),
    WebSocketTls(Arc<CurrentTls>, Arc<WebSocketRules>),
}

impl Listener {
    /// Reads the TLS files and binds the address.
    ///
    /// # Errors
    /// What the operator has to mend, in one line.
    pub(crate) async fn bind(config: ListenerConfig) -> Result<Self, ListenError> {
        let ListenerConfig {
            totals,
            bind: address,
            kind,
            handshake_timeout,
            handshakes_max,
            proxy,
        } = config;
        let name = &totals.name;
        let handshake = Handshake::new(kind)
            .await
            .map_err(|error| ListenError::Tls {
                name: Arc::clone(name),
                error,
            })?;
        let bound = listen(address).and_then(|socket| Ok((socket.local_addr()?, socket)));
        let (local_addr, socket) = bound.map_err(|error| {
            let name = Arc::clone(name);
            match error.kind() {
                io::ErrorKind::AddrInUse => ListenError::AddressInUse { name, address },
                io::ErrorKind::PermissionDenied => ListenError::NotPermitted { name, address },
                io::ErrorKind::AddrNotAvailable => ListenError::NoSuchAddress { name, address },
                _ => ListenError::Bind {
                    name,
                    address,
                    error,
                },
            }
        })?;
        Ok(Self {
            totals,
            socket,
            local_addr,
            handshake,
            proxy: proxy.map(Arc::new),
            handshake_timeout,
            handshakes_max,
        })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The certificates, to replace them.
    pub(crate) fn tls(&self) -> Option<Arc<CurrentTls>> {
        match &self.handshake {
            Handshake::Tls(tls) | Handshake::WebSocketTls(tls, _) => Some(Arc::clone(tls)),
            Handshake::None | Handshake::WebSocket(_) => None,
        }
    }

    /// Calls `accepted` for each connection until `shutdown`, then drops unfinished handshakes.
    ///
    /// `accepted` is called on the accepting task or that of the handshake, and must not block.
    pub(crate) async fn run<F>(
        self,
        shutdown: CancellationToken,
        arrivals: Arc<Arrivals>,
        accepted: F,
    ) where
        F: Fn(Accepted) + Send + Sync + 'static,
    {
        let accepted = Arc::new(accepted);
        if matches!(self.handshake, Handshake::None) && self.proxy.is_none() {
            self.run_plain(&shutdown, &arrivals, accepted).await;
        } else {
            self.run_handshakes(&shutdown, &arrivals, accepted).await;
        }
    }

    async fn run_plain<F>(
        &self,
        shutdown: &CancellationToken,
        arrivals: &Arrivals,
        accepted: Arc<F>,
    ) where
        F: Fn(Accepted) + Send + Sync + 'static,
    {
        let waiting = TaskTracker::new();
        let accept_all = async {
            let mut failure = AcceptFailure::default();
            loop {
                for _ in 0..ACCEPTED_AT_ONCE {
                    let (stream, peer) = self.accept(&mut failure).await;
                    let arrival = arrivals.next();
                    let connection = Accepted {
                        transport: Transport::Tcp(stream),
                        peer,
                        listener: Arc::clone(&self.totals),
                        certificate_name: None,
                        is_over_rate: arrival == Arrival::TooMany,
                    };
                    match arrival {
                        Arrival::Now | Arrival::TooMany => accepted(connection),
                        Arrival::After(wait) => {
                            let (shutdown, accepted) = (shutdown.clone(), Arc::clone(&accepted));
                            waiting.spawn(async move {
                                let turn = shutdown.run_until_cancelled(time::sleep(wait));
                                if turn.await.is_some() {
                                    accepted(connection);
                                }
                            });
                        }
                    }
                }
                yield_now().await;
            }
        };
        shutdown.run_until_cancelled(accept_all).await;
        waiting.close();
        waiting.wait().await;
    }

    async fn run_handshakes<F>(
        &self,
        shutdown: &CancellationToken,
        arrivals: &Arrivals,
        accepted: Arc<F>,
    ) where
        F: Fn(Accepted) + Send + Sync + 'static,
    {
        let permits = Arc::new(Semaphore::new(self.handshakes_max));
        let handshakes = TaskTracker::new();
        let accept_all = async {
            let mut failure = AcceptFailure::default();
            // The semaphore is never closed.
            while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
                let (mut stream, mut peer) = self.accept(&mut failure).await;
                let arrival = arrivals.next();
                let is_over_rate = arrival == Arrival::TooMany;
                if is_over_rate && self.handshake.is_costly() {
                    // It would take a handshake to say so.
                    self.totals.rejected.of(Rejected::RateLimited).inc();
                    continue;
                }
                let (shutdown, handshake) = (shutdown.clone(), self.handshake.clone());
                let (proxy, timeout) = (self.proxy.clone(), self.handshake_timeout);
                let totals = Arc::clone(&self.totals);
                let accepted = Arc::clone(&accepted);
                handshakes.spawn(async move {
                    if let Arrival::After(wait) = arrival
                        && shutdown
                            .run_until_cancelled(time::sleep(wait))
                            .await
                            .is_none()
                    {
                        return;
                    }
                    let established = time::timeout(timeout, async {
                        if let Some(proxy) = proxy {
                            peer = canonical(proxy.client(&mut stream, peer).await?);
                        }
                        handshake.perform(stream, &mut peer, &totals).await
                    });
                    let outcome = match shutdown.run_until_cancelled(established).await {
                        None => return,
                        Some(Ok(outcome)) => outcome,
                        Some(Err(_elapsed)) => Err(HandshakeFailure::TimedOut(timeout)),
                    };
                    drop(permit);
                    match outcome {
                        Ok((transport, certificate_name)) => accepted(Accepted {
                            transport,
                            peer,
                            listener: totals,
                            certificate_name,
                            is_over_rate,
                        }),
                        Err(HandshakeFailure::Proxy(ProxyError::Probe)) => totals.probes.inc(),
                        Err(error) => {
                            totals.rejected.of(error.rejected()).inc();
                            tracing::debug!(
                                event = "handshake_failed",
                                listener = %totals.name,
                                %peer,
                                %error,
                            );
                        }
                    }
                });
            }
        };
        shutdown.run_until_cancelled(accept_all).await;
        handshakes.close();
        handshakes.wait().await;
    }

    /// The next connection, however long it takes. Loses none if dropped.
    async fn accept(&self, failure: &mut AcceptFailure) -> (TcpStream, SocketAddr) {
        loop {
            match self.socket.accept().await {
                Ok((stream, peer)) => {
                    if failure.clear() {
                        tracing::info!(event = "accept_recovered", listener = %self.totals.name);
                    }
                    return (stream, canonical(peer));
                }
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) => {
                    if failure.record() {
                        tracing::error!(
                            event = "accept_failed",
                            listener = %self.totals.name,
                            %error,
                            "no new connections until this is over; if files ran out, raise the \
                             limit (ulimit -n)",
                        );
                    }
                    time::sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
}

impl Handshake {
    async fn new(kind: ListenerKind) -> Result<Self, TlsError> {
        Ok(match kind {
            ListenerKind::Tcp => Self::None,
            ListenerKind::Tls(files) => {
                let tls = CurrentTls::read(&files, ALPN_MQTT).await?;
                Self::Tls(Arc::new(tls))
            }
            ListenerKind::WebSocket(rules) => Self::WebSocket(Arc::new(rules)),
            ListenerKind::WebSocketTls(files, rules) => {
                let tls = CurrentTls::read(&files, ALPN_HTTP).await?;
                Self::WebSocketTls(Arc::new(tls), Arc::new(rules))
            }
        })
    }

    /// Whether it takes much more of the broker than of the client.
    fn is_costly(&self) -> bool {
        match self {
            Self::Tls(_) | Self::WebSocketTls(..) => true,
            Self::None | Self::WebSocket(_) => false,
        }
    }

    async fn perform(
        &self,
        stream: TcpStream,
        peer: &mut SocketAddr,
        totals: &ListenerTotals,
    ) -> Result<(Transport, Option<Arc<str>>), HandshakeFailure> {
        match self {
            Self::None => Ok((Transport::Tcp(stream), None)),
            Self::Tls(tls) => {
                let (stream, name) = accept_tls(&tls.acceptor(), stream, totals).await?;
                Ok((Transport::Tls(Box::new(stream)), name))
            }
            Self::WebSocket(rules) => {
                let (stream, client) = handshake::accept(stream, *peer, rules).await?;
                *peer = client;
                Ok((Transport::WebSocket(Box::new(stream)), None))
            }
            Self::WebSocketTls(tls, rules) => {
                let (stream, name) = accept_tls(&tls.acceptor(), stream, totals).await?;
                let (stream, client) = handshake::accept(stream, *peer, rules).await?;
                *peer = client;
                Ok((Transport::WebSocketTls(Box::new(stream)), name))
            }
        }
    }
}

async fn accept_tls(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    totals: &ListenerTotals,
) -> Result<(TlsStream<TcpStream>, Option<Arc<str>>), HandshakeFailure> {
    let began = Instant::now();
    let stream = acceptor
        .accept(stream)
        .await
        .map_err(HandshakeFailure::from_tls)?;
    totals.tls_handshake.observe(began.elapsed());
    let name = tls::common_name(stream.get_ref().1);
    Ok((stream, name))
}

/// Why a client did not get as far as MQTT.
#[derive(Debug, thiserror::Error)]
enum HandshakeFailure {
    #[error("not finished within {0:?}")]
    TimedOut(Duration),
    #[error("PROXY: {0}")]
    Proxy(#[from] ProxyError),
    #[error("the client does not speak TLS; this listener does")]
    NotTls,
    #[error("TLS: {0}")]
    Tls(io::Error),
    #[error("WebSocket: {0}")]
    WebSocket(#[from] HandshakeError),
}

impl HandshakeFailure {
    fn rejected(&self) -> Rejected {
        match self {
            Self::TimedOut(_) => Rejected::ConnectTimeout,
            Self::Proxy(_) => Rejected::ProxyProtocolInvalid,
            Self::NotTls | Self::Tls(_) => Rejected::TlsFailed,
            Self::WebSocket(_) => Rejected::WebSocketFailed,
        }
    }

    fn from_tls(error: io::Error) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
        match cause {
            Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => Self::NotTls,
            _ => Self::Tls(error),
        }
    }
}

/// Whether accepting fails for now; so that it is logged once, not at every attempt.
#[derive(Debug, Default)]
struct AcceptFailure {
    is_failing: bool,
}

impl AcceptFailure {
    /// Returns whether this is the first failure in a row.
    fn record(&mut self) -> bool {
        !std::mem::replace(&mut self.is_failing, true)
    }

    /// Returns whether there was a failure.
    fn clear(&mut self) -> bool {
        std::mem::take(&mut self.is_failing)
    }
}

/// Whether an error of `accept` says that the connection at hand is gone, and nothing about the
/// next one. Linux reports errors of the network this way (accept(2)).
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::Interrupted
    )
}

/// An IPv4 client of an IPv6 socket under its IPv4 address.
fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Lets a restarted broker bind while old connections are in TIME_WAIT. On Windows it would
    // mean that two programs can share the port.
    if cfg!(not(windows)) {
        socket.set_reuse_address(true)?;
    }
    // Accepted connections inherit it, which saves a system call for each of them.
    socket.set_tcp_nodelay(true)?;
    // Tokio expects it, and does not check.
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_of_accept_failures_is_logged_once() {
        let mut failure = AcceptFailure::default();

        assert!(!failure.clear());
        assert!(failure.record());
        assert!(!failure.record());
        assert!(failure.clear());
        assert!(failure.record());
    }

    #[test]
    fn only_running_out_of_something_pauses_accepting() {
        let out_of_files = io::Error::from_raw_os_error(24); // EMFILE
        let gone = io::Error::from(io::ErrorKind::ConnectionAborted);

        assert!(!concerns_one_connection(&out_of_files));
        assert!(concerns_one_connection(&gone));
    }

    #[test]
    fn ipv4_client_of_an_ipv6_socket_is_shown_as_ipv4() {
        let mapped = "[::ffff:192.0.2.1]:7".parse().unwrap();

        assert_eq!(canonical(mapped), "192.0.2.1:7".parse().unwrap());
    }
}
