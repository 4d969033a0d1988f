//! The nodes of the cluster: each keeps its own document alive, and any may declare another dead.

use bson::raw::RawDocumentBuf;
use bson::{cstr, rawdoc};

use super::MongoStore;
use super::commands::{Commands, Concern, Query, Verb, array, integer, update, write_commands};
use super::documents::{Document, META, NODES};
use crate::store::{LogPosition, StoreError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeState {
    Up,
    /// It has left by itself: nothing of it is left to be taken over.
    Leaving,
    Dead,
}

/// What a node has told about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeRow {
    pub(crate) node: u32,
    pub(crate) name: String,
    pub(crate) state: NodeState,
    /// Heartbeats so far: it is alive if they become more.
    pub(crate) beats: u64,
    /// It uses no clock value above this one before its next heartbeat.
    pub(crate) reserved_hlc: u64,
    /// The last entry of its subscription log.
    pub(crate) entry: u64,
}

impl NodeRow {
    pub(crate) fn position(&self) -> LogPosition {
        LogPosition {
            node: self.node,
            entry: self.entry,
        }
    }
}

/// A number that no node has had.
pub(super) async fn new_number(commands: &Commands) -> Result<u32, StoreError> {
    let next = rawdoc! {
        "findAndModify": META,
        "query": { "_id": "nid" },
        "update": { "$inc": { "n": 1_i64 } },
        "upsert": true,
        "new": true,
        "writeConcern": { "w": "majority" },
    };
    let answer = commands.run(next).await?;
    answer
        .get_document("value")
        .ok()
        .and_then(|value| integer(value, "n"))
        .and_then(|node| u32::try_from(node).ok())
        .ok_or(StoreError::Damaged {
            what: "the number of the last node",
        })
}

impl MongoStore {
    /// Becomes one of the nodes that are up: from now on, those that do not show that they are alive
    /// are declared dead. Nothing can be written before.
    ///
    /// # Errors
    /// `Unusable` if the database is [being filled](mod@super::import), any other `StoreError` when
    /// the outcome is unknown; it may be repeated.
    pub(crate) async fn join(&self, reserved_hlc: u64) -> Result<(), StoreError> {
        self.enter(reserved_hlc).await?;
        // Afterwards: whoever begins to fill the database now finds this node.
        if let Err(error) = self.verify_complete().await {
            self.leave().await?;
            return Err(error);
        }
        Ok(())
    }

    /// Adds this node to those that are up.
    pub(super) async fn enter(&self, reserved_hlc: u64) -> Result<(), StoreError> {
        let fields = rawdoc! {
            "name": &*self.name,
            "st": "up",
            "hbn": 0_i64,
            "hr": reserved_hlc.cast_signed(),
            "k": 0_i64,
            "ls": (*self.run).clone(),
        };
        // Once it is there, it may have been declared dead already.
        let row = rawdoc! { "$setOnInsert": fields, "$currentDate": { "hb": true } };
        let join = update(rawdoc! { "_id": i64::from(self.node) }, row, true);
        self.update_node(join).await.map(|_| ())
    }

    /// Shows that this node is alive, and up to which clock value it may go.
    ///
    /// # Errors
    /// `Fenced` if others have declared it dead.
    pub(crate) async fn heartbeat(&self, reserved_hlc: u64) -> Result<(), StoreError> {
        let fields = rawdoc! {
            "hb": "$$NOW",
            "hbn": { "$add": ["$hbn", 1_i64] },
            "hr": reserved_hlc.cast_signed(),
        };
        let beat = update(self.itself(), array([rawdoc! { "$set": fields }]), false);
        if self.update_node(beat).await? {
            Ok(())
        } else {
            Err(StoreError::Fenced)
        }
    }

    /// All nodes that there are, or were until an hour ago.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn nodes(&self) -> Result<Vec<NodeRow>, StoreError> {
        let mut rows = Vec::new();
        let all = Query::new(NODES, rawdoc! {});
        self.commands
            .for_each(all, |document| {
                let fields = Document::new("a node", document);
                rows.push(NodeRow {
                    node: fields.node("_id")?,
                    name: fields.text("name")?.to_owned(),
                    state: match fields.text("st")? {
                        "up" => NodeState::Up,
                        "leaving" => NodeState::Leaving,
                        "dead" => NodeState::Dead,
                        _ => return Err(fields.damaged()),
                    },
                    beats: fields.long("hbn")?.cast_unsigned(),
                    reserved_hlc: fields.long("hr")?.cast_unsigned(),
                    entry: fields.long("k")?.cast_unsigned(),
                });
                Ok(())
            })
            .await?;
        Ok(rows)
    }

    /// Declares a node dead whose heartbeats have stopped at `beats`; false if they have not, or if
    /// it is not up any more.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown.
    pub(crate) async fn declare_dead(&self, node: u32, beats: u64) -> Result<bool, StoreError> {
        let silent = rawdoc! {
            "_id": i64::from(node),
            "st": "up",
            "hbn": beats.cast_signed(),
        };
        // One that was stopped just before a commit has its own document locked. If it is alive after
        // all, it begins the transaction again.
        if let Err(error) = self.end_transactions(silent.clone()).await {
            tracing::warn!(event = "transactions_unended", node, %error);
        }
        let mut dead = rawdoc! { "st": "dead" };
        dead.append(cstr!("by"), i64::from(self.node));
        self.update_node(update(silent, rawdoc! { "$set": dead }, false))
            .await
    }

    /// Ends what a dead node has begun and not committed: others would have to wait for it.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown.
    pub(crate) async fn end_transactions_of(&self, node: u32) -> Result<(), StoreError> {
        let dead = rawdoc! { "_id": i64::from(node), "st": "dead" };
        self.end_transactions(dead).await
    }

    async fn end_transactions(&self, nodes: RawDocumentBuf) -> Result<(), StoreError> {
        for document in self.commands.find(Query::new(NODES, nodes)).await? {
            let Ok(transactions) = document.get_document("ls") else {
                continue;
            };
            let sessions = array([transactions.to_owned()]);
            let kill = rawdoc! { "killSessions": sessions };
            self.commands.run(kill).await?;
        }
        Ok(())
    }

    /// Leaves the cluster; nothing can be written afterwards. All sessions must have been saved as
    /// not connected. The document stays for the others to read the end of the log by, and is
    /// removed by [`MongoStore::collect_garbage`].
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown.
    pub(crate) async fn leave(&self) -> Result<(), StoreError> {
        let leave = update(
            self.itself(),
            rawdoc! { "$set": { "st": "leaving" } },
            false,
        );
        self.update_node(leave).await.map(|_| ())
    }

    /// The query for this node, as long as it is up. Its number alone would not do: in a database that
    /// was dropped and made anew another node may have the same.
    pub(super) fn itself(&self) -> RawDocumentBuf {
        rawdoc! { "_id": i64::from(self.node), "st": "up", "ls": (*self.run).clone() }
    }

    /// Whether the document was there.
    async fn update_node(&self, statement: RawDocumentBuf) -> Result<bool, StoreError> {
        let mut matched = 0;
        for batch in write_commands(Verb::Update, NODES, [statement], Concern::Majority) {
            matched += self.commands.write(batch.command).await?.matched;
        }
        Ok(matched == 1)
    }
}
