//! Between nodes: the port to whatever carries frames, and what is in them.
//!
//! A bus may lose frames, repeat them and change their order; `cluster::link` sees to it that
//! nobody notices. It never looks into a frame. [`wire`] is the format of the frames, the same on
//! every bus.
//!
//! Start reading at [`Bus`].

pub(crate) mod fallback;
pub(crate) mod mongodb;
pub(crate) mod redis;
pub(crate) mod wire;

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod mongod;
#[cfg(test)]
mod redis_server;

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

/// Who is to get a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Destination {
    Node(u32),
    /// Every node, the sending one included.
    All,
}

/// Carries frames of a few KiB, at most [`FRAME_BYTES_MAX`], to other nodes.
///
/// Implementations: [`mongodb`], [`redis`], and [`fallback`], which makes one of the two. All of them
/// pass the tests in `contract`.
#[async_trait]
pub(crate) trait Bus: fmt::Debug + Send + Sync {
    /// Sends frames, and does so in this order. A caller that stops waiting does not undo it.
    /// Returns when a server has them all: they survive the loss of this node.
    ///
    /// # Errors
    /// `BusError` if any of them may not have been sent.
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError>;

    /// Yields the frames for this node and for all of them that are sent once this has returned,
    /// mostly in order. After a lost connection it goes on by itself, and may then leave out
    /// frames and repeat old ones. Whoever does not take them quickly enough misses some. An
    /// [`INTERRUPTION`] may tell where frames are missing, before any of those that come after.
    ///
    /// # Errors
    /// `BusError` if that cannot begin.
    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError>;

    /// Whether frames go by the way that they should, as far as is known.
    fn is_connected(&self) -> bool {
        true
    }

    /// Whether a frame and an answer to it take less time than a write to the store.
    fn is_quick(&self) -> bool {
        true
    }

    /// How often a connection that was lost has been made anew.
    fn reconnects(&self) -> u64 {
        0
    }
}

/// No frame is empty.
pub(crate) const INTERRUPTION: Bytes = Bytes::new();

/// The largest frame that every bus can carry: a document of MongoDB has 16 MiB.
pub(crate) const FRAME_BYTES_MAX: usize = 15 * 1024 * 1024;

/// The outside failed us.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum BusError {
    #[error("bus: not available: {0}")]
    Unavailable(String),
    #[error(
        "bus: the collection {0} is not midge's; it needs a database of its own (store.database)"
    )]
    NotOurs(String),
}
