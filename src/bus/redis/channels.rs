//! The names of the channels, and the commands for them.

use crate::bus::Destination;

/// The channels of the nodes that share a database.
#[derive(Clone, Debug)]
pub(super) struct Channels {
    cluster: String,
    node: u32,
    /// In a Redis Cluster each is at one master alone: the one that has the hash slot of its name.
    are_sharded: bool,
}

impl Channels {
    pub(super) fn new(cluster: &str, node: u32, are_sharded: bool) -> Self {
        Self {
            cluster: cluster.to_owned(),
            node,
            are_sharded,
        }
    }

    pub(super) fn of(&self, destination: Destination) -> String {
        let cluster = &self.cluster;
        let name = match destination {
            Destination::Node(node) => format!("{cluster}:node:{node}"),
            Destination::All => format!("{cluster}:all"),
        };
        match self.are_sharded {
            true => format!("midge:{{{name}}}"),
            false => format!("midge:{name}"),
        }
    }

    /// By which this node proves the way to `destination`: only what is in braces counts for the hash
    /// slot, and so it is at the same server.
    pub(super) fn echo(&self, destination: Destination) -> String {
        let Self { cluster, node, .. } = self;
        match self.are_sharded {
            true => format!("{}:echo:{node}", self.of(destination)),
            false => format!("midge:{cluster}:echo:{node}"),
        }
    }

    /// Whose frames are for this node.
    pub(super) fn own(&self) -> [Destination; 2] {
        [Destination::Node(self.node), Destination::All]
    }

    pub(super) fn subscribe(&self) -> &'static str {
        match self.are_sharded {
            true => "SSUBSCRIBE",
            false => "SUBSCRIBE",
        }
    }

    pub(super) fn publish(&self) -> &'static str {
        match self.are_sharded {
            true => "SPUBLISH",
            false => "PUBLISH",
        }
    }
}
