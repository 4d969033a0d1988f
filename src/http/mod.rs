//! HTTP: health checks and the API, for load balancers, scripts and people.
//!
//! Owns one address and what is answered there. It reads from the broker through the few methods of
//! `broker::inspect`; the broker knows nothing of it. It is bound before anything else, and answers
//! while the store opens.
//!
//! Start reading at [`Server`]; [`health`] is what load balancers ask, [`metrics`] what Prometheus does,
//! [`api`] the rest.

mod api;
mod guard;
mod health;
mod metrics;
mod problem;
mod stall;
mod time;
pub(crate) mod tokens;

/// What this program was made of.
mod build {
    pub(super) const VERSION: &str = env!("CARGO_PKG_VERSION");
    /// The commit, or `unknown`.
    pub(super) const REVISION: &str = env!("BUILD_REVISION");
    pub(super) const RUST: &str = env!("BUILD_RUST_VERSION");
}

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Request, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::TimeoutLayer;

use crate::broker::Node;
use crate::config;
use crate::lifecycle::{Lifecycle, Steering};
use crate::metrics::ListenerTotals;
use crate::net::arrivals::Arrivals;
use crate::net::transport::Transport;
use crate::net::{ListenError, Listener, ListenerConfig, ListenerKind};
use metrics::{Observatory, Requests};
use problem::Problem;
use stall::WriteTimeout;
use tokens::{CurrentTokens, Tokens};

/// From the first byte of a request, or the end of the last one, to the end of its header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// From the header to the answer, the body included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a client may read nothing of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long requests that have begun may go on when the server ends.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes of a request's header; also what one connection reads ahead.
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// Open connections of everybody together.
const CONNECTIONS_MAX: usize = 1024;

/// Open connections from one address: nobody alone can lock out the health checks of the others.
const CONNECTIONS_PER_PEER_MAX: usize = 128;

/// The HTTP server of a process.
#[derive(Debug)]
pub(crate) struct Server {
    context: Arc<Context>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// What all requests share.
pub(crate) struct Context {
    lifecycle: Lifecycle,
    /// Set while there is a node to ask.
    node: ArcSwapOption<Node>,
    /// Set together with it.
    steering: ArcSwapOption<Steering>,
    observatory: Observatory,
    requests: Requests,
    tokens: Arc<CurrentTokens>,
    /// Whether only this machine can reach the server.
    is_local: bool,
    message_bytes_max: usize,
    /// Those that say who their clients are.
    trusted_proxies: Vec<config::Network>,
}

/// Who sent a request.
#[derive(Clone, Copy, Debug)]
struct Peer(SocketAddr);

impl Server {
    /// Binds the address and begins to answer.
    ///
    /// # Errors
    /// What the operator has to mend, in one line.
    pub(crate) async fn start(
        config: &config::Http,
        tokens: Tokens,
        lifecycle: Lifecycle,
        message_bytes_max: usize,
    ) -> Result<Self, ListenError> {
        metrics::note_start();
        let listener = Listener::bind(ListenerConfig {
            totals: Arc::new(ListenerTotals::new("http")),
            bind: config.bind,
            kind: ListenerKind::Tcp,
            handshake_timeout: HEADER_TIMEOUT,
            handshakes_max: CONNECTIONS_MAX,
            proxy: None,
        })
        .await?;
        let address = listener.local_addr();
        tracing::info!(event = "http_started", %address);
        let is_local = address.ip().is_loopback();
        if !is_local && tokens.is_empty() {
            tracing::warn!(
                event = "api_refused",
                %address,
                "other machines can reach it and there are no tokens: only health checks and metrics \
                 are served; make a token with `midge token add`, and name its file in \
                 http.tokens_file",
            );
        }
        let context = Arc::new(Context {
            lifecycle,
            node: ArcSwapOption::empty(),
            steering: ArcSwapOption::empty(),
            observatory: Observatory::default(),
            requests: Requests::default(),
            tokens: Arc::new(CurrentTokens::new(tokens)),
            is_local,
            message_bytes_max,
            trusted_proxies: config.trusted_proxies.clone().unwrap_or_default(),
        });
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let router = router(&context);
        let connections = Connections {
            router,
            places: Arc::default(),
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        // Health checks are never too many.
        let arrivals = Arc::new(Arrivals::new(None, Arc::default(), Arc::default()));
        tasks.spawn(listener.run(stop.clone(), arrivals, move |accepted| {
            if let Transport::Tcp(stream) = accepted.transport {
                connections.serve(stream, accepted.peer);
            }
        }));
        Ok(Self {
            context,
            stop,
            tasks,
        })
    }

    /// Those that are let in.
    pub(crate) fn tokens(&self) -> &Arc<CurrentTokens> {
        &self.context.tokens
    }

    /// Says which node there is to ask, and how to steer it, or that there is none.
    pub(crate) fn attach(&self, attached: Option<(Arc<Node>, Arc<Steering>)>) {
        let (node, steering) = attached.unzip();
        self.context.node.store(node);
        self.context.steering.store(steering);
    }

    /// Finishes the requests that have begun.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        // Whoever is slow has been given time enough.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, self.tasks.wait()).await;
    }
}

fn router(context: &Arc<Context>) -> Router {
    // In base64 and with what belongs to it, the largest message fits.
    let body_bytes_max = context.message_bytes_max.saturating_mul(2);
    let (api, document) = api::router();
    let document = Arc::new(document);
    let api = api
        .route(
            "/openapi.json",
            axum::routing::get(move || {
                let document = document.clone();
                async move { axum::Json((*document).clone()) }
            }),
        )
        .fallback(no_such_path)
        .layer(from_fn_with_state(context.clone(), guard::authorize))
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .layer(TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            REQUEST_TIMEOUT,
        ))
        .layer(CatchPanicLayer::new())
        .layer(from_fn(problem::describe_errors));
    Router::new()
        .nest("/api/v1", api)
        .merge(health::router())
        .route("/metrics", axum::routing::get(metrics::metrics))
        .fallback(no_such_path)
        .layer(from_fn_with_state(context.clone(), metrics::measure))
        .with_state(context.clone())
}

async fn no_such_path() -> Problem {
    let status = StatusCode::NOT_FOUND;
    Problem::new(status, "no_such_path", "there is nothing at this path")
        .hint("docs/http.md lists what there is")
}

/// Everything that makes connections.
struct Connections {
    router: Router,
    places: Arc<Places>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Connections {
    /// Serves a connection, or closes it if there are too many.
    fn serve(&self, stream: tokio::net::TcpStream, peer: SocketAddr) {
        let Some(place) = Places::take(&self.places, peer.ip()) else {
            tracing::debug!(event = "http_refused", %peer, "too many connections");
            return;
        };
        let (router, stop) = (self.router.clone(), self.stop.clone());
        self.tasks.spawn(async move {
            let answer = service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(Peer(peer));
                TowerToHyperService::new(router.clone()).call(request)
            });
            let io = TokioIo::new(WriteTimeout::new(stream, WRITE_TIMEOUT));
            let mut connection = std::pin::pin!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(HEADER_BYTES_MAX)
                    .serve_connection(io, answer)
            );
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(event = "http_connection_failed", %peer, %error);
            }
            drop(place);
        });
    }
}

/// How many connections there are, by peer.
#[derive(Default)]
struct Places {
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// The right to one connection.
struct Place {
    places: Arc<Places>,
    peer: IpAddr,
}

impl Places {
    fn take(places: &Arc<Self>, peer: IpAddr) -> Option<Place> {
        let mut taken = places.taken.lock();
        let all: usize = taken.values().sum();
        let own = taken.get(&peer).copied().unwrap_or(0);
        if all >= CONNECTIONS_MAX || own >= CONNECTIONS_PER_PEER_MAX {
            return None;
        }
        taken.insert(peer, own + 1);
        Some(Place {
            places: places.clone(),
            peer,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        if let Some(own) = taken.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("lifecycle", &self.lifecycle)
            .finish_non_exhaustive()
    }
}
