//! Which nodes there are.
//!
//! Each node counts up a number in its document in the store once a second, and reads those of the
//! others. One that has not counted for a while, by the clock of whoever watches it, is declared
//! dead there; it finds out with its next write, whatever it was doing meanwhile.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

use crate::failpoint;
use crate::store::mongodb::{MongoStore, NodeRow, NodeState};
use crate::store::{LogPosition, StoreError};

/// How often a node counts.
pub(super) const BEAT_INTERVAL: Duration = Duration::from_secs(1);

/// How long a node that does not count is taken for alive.
const DEAD_AFTER: Duration = Duration::from_secs(6);

/// How long a node that does not count is waited for.
const SUSPECT_AFTER: Duration = Duration::from_secs(3);

/// How long a node that does not count, and is not heard of either, holds up what is read from
/// inboxes: one and a half of its intervals.
const SILENT_AFTER: Duration = Duration::from_millis(1500);

/// A pause of this length between two looks at the others says more about this node, or the store,
/// than about them.
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(3);

/// The other nodes.
#[derive(Debug, Default)]
pub(crate) struct Members {
    alive: RwLock<HashMap<u32, Member>>,
    /// Dead, or left, and it is for this node to look after their clients.
    gone: RwLock<Vec<u32>>,
    /// Of all that are gone: none of the clock values that they have used is beyond this one.
    reserved: RwLock<HashMap<u32, u64>>,
}

#[derive(Debug)]
struct Member {
    beats: u64,
    /// When it was last seen to count.
    seen: Instant,
}

/// What a look at the others has shown.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) joined: Vec<u32>,
    pub(super) left: Vec<u32>,
    /// How far the logs of all nodes have come, also of those that are gone.
    pub(super) positions: Vec<LogPosition>,
}

impl Members {
    pub(crate) fn others(&self) -> Vec<u32> {
        self.alive.read().keys().copied().collect()
    }

    /// How many other nodes count, how many have not for a while, and how many are gone and have to be
    /// looked after by this one.
    pub(crate) fn count(&self) -> [usize; 3] {
        let members = self.alive.read();
        let counts = |member: &&Member| member.seen.elapsed() < SUSPECT_AFTER;
        let alive = members.values().filter(counts).count();
        [alive, members.len() - alive, self.gone.read().len()]
    }

    /// Nodes that are gone and whose clients this node has to look after.
    pub(super) fn gone(&self) -> Vec<u32> {
        self.gone.read().clone()
    }

    /// The clock value beyond which a node that is gone has used none.
    pub(super) fn reserved_by_gone(&self, node: u32) -> Option<u64> {
        self.reserved.read().get(&node).copied()
    }

    /// Whether a node can be expected to answer.
    pub(crate) fn is_alive(&self, node: u32) -> bool {
        let members = self.alive.read();
        let member = members.get(&node);
        member.is_some_and(|member| member.seen.elapsed() < SUSPECT_AFTER)
    }

    /// Nodes that have missed a count, or have just begun to.
    pub(super) fn silent(&self) -> Vec<u32> {
        let members = self.alive.read();
        let silent = members
            .iter()
            .filter(|(_, member)| member.seen.elapsed() >= SILENT_AFTER);
        silent.map(|(node, _)| *node).collect()
    }

    /// Looks at the others, and declares dead who is. `last` is when that was done before.
    pub(super) async fn look(
        &self,
        store: &MongoStore,
        last: Instant,
    ) -> Result<Changes, StoreError> {
        let rows = store.nodes().await?;
        let now = Instant::now();
        let paused = now.duration_since(last) > LOOK_PAUSE_MAX;
        let mut changes = Changes {
            positions: rows.iter().map(NodeRow::position).collect(),
            ..Changes::default()
        };
        let mut silent = Vec::new();
        {
            let mut members = self.alive.write();
            let mut there = HashSet::new();
            for row in &rows {
                if row.node == store.node() || row.state != NodeState::Up {
                    continue;
                }
                there.insert(row.node);
                let member = members.entry(row.node).or_insert_with(|| {
                    changes.joined.push(row.node);
                    Member {
                        beats: row.beats,
                        seen: now,
                    }
                });
                if member.beats != row.beats || paused {
                    member.beats = row.beats;
                    member.seen = now;
                } else if now.duration_since(member.seen) >= DEAD_AFTER {
                    silent.push(row);
                }
            }
            members.retain(|node, _| {
                let stays = there.contains(node);
                if !stays {
                    changes.left.push(*node);
                }
                stays
            });
        }
        let is_gone = |row: &&NodeRow| row.state != NodeState::Up && row.node != store.node();
        let mut reserved: HashMap<u32, u64> = rows
            .iter()
            .filter(is_gone)
            .map(|row| (row.node, row.reserved_hlc))
            .collect();
        let mut gone = Vec::new();
        for row in silent {
            let node = row.node;
            if store.declare_dead(node, row.beats).await? {
                reserved.insert(node, row.reserved_hlc);
                failpoint::reach("after_declaring_dead");
                tracing::warn!(event = "node_dead", node);
                self.alive.write().remove(&node);
                changes.left.push(node);
                gone.push(node);
            }
        }
        let least = self.others().into_iter().chain([store.node()]).min();
        if least == Some(store.node()) {
            // Whoever declared it dead may have died before it was done.
            gone.extend(rows.iter().filter(is_gone).map(|row| row.node));
        }
        *self.gone.write() = gone;
        *self.reserved.write() = reserved;
        Ok(changes)
    }
}
