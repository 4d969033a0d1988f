//! `/subscriptions`

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::broker::inspect::SubscriptionView;
use crate::http::Context;
use crate::http::problem::Problem;
use crate::mqtt::topic::{RetainHandling, validate_topic_name};

/// A subscription of one client.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Subscription {
    /// With `$share/…` in front if it is shared.
    filter: String,
    maximum_qos: u8,
    no_local: bool,
    retain_as_published: bool,
    /// 0, 1 or 2, as in SUBSCRIBE.
    retain_handling: u8,
    identifier: Option<u32>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Parameters {
    /// A topic name.
    matches: String,
}

/// Who gets a message to one topic.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Recipients {
    clients: Vec<Recipient>,
    /// Of each, one member gets it.
    groups: Vec<RecipientGroup>,
    /// Nodes, by number, whose clients with sessions that end with their connections want it.
    other_nodes: Vec<u32>,
}

/// What all matching subscriptions of a client say together.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Recipient {
    client_id: String,
    maximum_qos: u8,
    /// Whether it gets what it publishes itself.
    own_messages: bool,
    identifiers: Vec<u32>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RecipientGroup {
    filter: String,
    /// Client ids.
    members: Vec<String>,
}

/// Who would get a message to the topic `matches`.
#[utoipa::path(get, path = "/subscriptions", tag = "clients", operation_id = "list_recipients", params(Parameters), responses(
    (status = 200, body = Recipients, description = "Who gets it."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    Query(asked): Query<Parameters>,
) -> Result<Json<Recipients>, Problem> {
    validate_topic_name(&asked.matches)
        .map_err(|error| Problem::invalid(format!("matches should be a topic name: {error}")))?;
    let node = context.node()?;
    let found = node.recipients(&asked.matches);
    let clients = found.sessions.iter().map(|session| Recipient {
        client_id: session.mailbox.client_id.to_string(),
        maximum_qos: session.terms.maximum_qos as u8,
        own_messages: session.own_terms.is_some(),
        identifiers: session
            .terms
            .identifiers
            .as_deref()
            .map_or_else(Vec::new, <[u32]>::to_vec),
    });
    let groups = found.groups.iter().map(|group| RecipientGroup {
        filter: group.filter().to_string(),
        members: node
            .members_of_group(group)
            .iter()
            .map(|client_id| client_id.to_string())
            .collect(),
    });
    Ok(Json(Recipients {
        clients: clients.collect(),
        groups: groups.collect(),
        other_nodes: found.nodes.clone(),
    }))
}

impl From<SubscriptionView> for Subscription {
    fn from(view: SubscriptionView) -> Self {
        Self {
            filter: view.filter.to_string(),
            maximum_qos: view.options.maximum_qos as u8,
            no_local: view.options.no_local,
            retain_as_published: view.options.retain_as_published,
            retain_handling: match view.options.retain_handling {
                RetainHandling::SendAtSubscribe => 0,
                RetainHandling::SendIfNew => 1,
                RetainHandling::DoNotSend => 2,
            },
            identifier: view.identifier,
        }
    }
}
