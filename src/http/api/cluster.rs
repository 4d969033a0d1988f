//! `/version`, `/cluster` and `/nodes`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::broker::inspect::{NodeView, StoreHealth};
use crate::http::problem::Problem;
use crate::http::{Context, build};
use crate::store::mongodb::NodeState;

/// What runs here.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Version {
    name: &'static str,
    version: &'static str,
    /// The commit that it was made of, or `unknown`.
    revision: &'static str,
    /// Of the compiler.
    rust_version: &'static str,
}

/// The cluster, as this node sees it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Cluster {
    /// Whether there is a store that nodes share.
    shared: bool,
    /// The name of the node that answers.
    node: String,
    /// Whether that node's store takes what is written.
    store_available: bool,
    nodes_up: usize,
    /// Of the node that answers.
    clients_connected: u64,
    /// Of the node that answers: sessions whose clients are away.
    clients_disconnected: u64,
    /// That the node which answers knows of: in a cluster, all persistent ones and its own.
    subscriptions: u64,
}

/// A node of the cluster.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Node {
    /// No two nodes ever have the same.
    number: u32,
    /// For people.
    name: String,
    /// `up`, `leaving` or `dead`. Nodes that are gone are shown for an hour.
    state: &'static str,
    /// Whether it is the one that answers.
    this: bool,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Nodes {
    items: Vec<Node>,
}

/// The version of this node.
#[utoipa::path(get, path = "/version", tag = "cluster", operation_id = "show_version", responses(
    (status = 200, body = Version, description = "What runs here."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
))]
pub(super) async fn version() -> Json<Version> {
    Json(Version {
        name: "midge",
        version: build::VERSION,
        revision: build::REVISION,
        rust_version: build::RUST,
    })
}

/// A summary.
#[utoipa::path(get, path = "/cluster", tag = "cluster", operation_id = "show_cluster", responses(
    (status = 200, body = Cluster, description = "The cluster."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn cluster(State(context): State<Arc<Context>>) -> Result<Json<Cluster>, Problem> {
    let node = context.node()?;
    let nodes = node.nodes().await?;
    let (clients_connected, clients_disconnected) = node.clients.count();
    Ok(Json(Cluster {
        shared: node.cluster.is_some(),
        node: node.name.to_string(),
        store_available: node.store_health() == StoreHealth::Available,
        nodes_up: nodes
            .iter()
            .filter(|node| node.state == NodeState::Up)
            .count(),
        clients_connected,
        clients_disconnected,
        subscriptions: node.subscriptions.count(),
    }))
}

/// All nodes.
#[utoipa::path(get, path = "/nodes", tag = "cluster", operation_id = "list_nodes", responses(
    (status = 200, body = Nodes, description = "The nodes."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn nodes(State(context): State<Arc<Context>>) -> Result<Json<Nodes>, Problem> {
    let nodes = context.node()?.nodes().await?;
    let items = nodes.into_iter().map(Node::from).collect();
    Ok(Json(Nodes { items }))
}

impl From<NodeView> for Node {
    fn from(view: NodeView) -> Self {
        Self {
            number: view.number,
            name: view.name,
            state: match view.state {
                NodeState::Up => "up",
                NodeState::Leaving => "leaving",
                NodeState::Dead => "dead",
            },
            this: view.is_this,
        }
    }
}
