//! Where this process stands between its start and its end.
//!
//! Owned by [`crate::server`], which is told by signals and by the broker; whoever answers load
//! balancers only reads it.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

/// One process, from its start to its end. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Lifecycle {
    phase: Arc<Mutex<Phase>>,
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

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self {
            phase: Arc::new(Mutex::new(Phase::Starting)),
        }
    }

    pub(crate) fn enter(&self, phase: Phase) {
        *self.phase.lock() = phase;
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.lock()
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
