//! Where this process stands between its start and its end, and what it is asked for meanwhile.
//!
//! Owned by [`crate::server`], which is told by signals, by the broker and by wishes; whoever answers
//! load balancers only reads it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::net::connection::ConnectionContext;
use crate::net::tls::CurrentTls;
use crate::reload::Reload;

/// One process, from its start to its end. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Lifecycle {
    state: Arc<Mutex<State>>,
}

struct State {
    phase: Phase,
    since: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The store opens, or the node joins its cluster.
    Starting,
    Serving,
    /// Clients are asked to go elsewhere; they are served until they do.
    Draining,
    /// Nobody is served any more.
    Stopping,
}

/// What whoever operates a serving process wants of it, besides what signals say. Each is answered
/// when it has taken effect.
#[derive(Debug)]
pub(crate) enum Wish {
    /// Send the clients elsewhere, and let nobody in any more.
    Drain(oneshot::Sender<()>),
    /// Serve on, and let clients in again.
    Undrain(oneshot::Sender<()>),
}

/// The way to ask a serving process for something.
#[derive(Debug)]
pub(crate) struct Steering {
    pub(crate) wishes: mpsc::Sender<Wish>,
    pub(crate) reload: Arc<Reload>,
    /// Unix milliseconds.
    pub(crate) started_at: u64,
    pub(crate) connections: Arc<ConnectionContext>,
    /// By the name of the listener.
    pub(crate) tls: BTreeMap<String, Arc<CurrentTls>>,
}

impl Steering {
    /// Asks, and waits until it has taken effect; false if the process is ending.
    pub(crate) async fn wish(&self, wish: impl FnOnce(oneshot::Sender<()>) -> Wish) -> bool {
        let (done, is_done) = oneshot::channel();
        self.wishes.send(wish(done)).await.is_ok() && is_done.await.is_ok()
    }
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        let state = State {
            phase: Phase::Starting,
            since: Instant::now(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        let mut state = self.state.lock();
        if state.phase != phase {
            *state = State {
                phase,
                since: Instant::now(),
            };
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// For how long it has been in its phase.
    pub(crate) fn phase_age(&self) -> Duration {
        self.state.lock().since.elapsed()
    }
}

impl Phase {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        }
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lifecycle").field(&self.phase()).finish()
    }
}
