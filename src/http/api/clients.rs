//! `/clients`

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::page::{self, Page};
use super::subscriptions::Subscription;
use crate::broker::inspect::{ClientView, ClientsFilter, IdFilter, Kicked};
use crate::http::Context;
use crate::http::problem::Problem;
use crate::http::time::rfc3339;
use crate::mqtt::packet::PacketType;
use crate::mqtt::{ProtocolVersion, ReasonCode};

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListParameters {
    /// Only this client, or, with `*` at the end, those whose ids begin so.
    client_id: Option<String>,
    /// Only those that are connected, or not.
    state: Option<ConnectionState>,
    /// Items of a page: 1 to 1000, and 100 if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ConnectionState {
    Connected,
    Disconnected,
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Client {
    client_id: String,
    state: ConnectionState,
    /// The name of the node that it is connected to, or, without a cluster, of the only one.
    node: Option<String>,
    /// `3.1`, `3.1.1` or `5.0`.
    protocol: &'static str,
    /// Seconds that the session outlives its connection; absent if it never ends.
    session_expiry_seconds: Option<u32>,
    /// When the session ends, unless its client comes back.
    session_ends_at: Option<String>,
    /// Known at the node that the client is connected to.
    connection: Option<Connection>,
    /// What waits for the client; known at the node that has it.
    queue: Option<Queue>,
    /// QoS 1 and 2 messages sent to the client that it has not finished; known at the node that has it.
    in_flight: Option<u64>,
}

/// An open connection.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Connection {
    address: String,
    listener: String,
    user_name: Option<String>,
    connected_at: String,
    clean_start: bool,
    /// Absent if the client need not be heard of.
    keep_alive_seconds: Option<u64>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Queue {
    /// Those in flight included.
    messages: u64,
    bytes: u64,
    /// Held in memory, QoS 0 included, and not yet sent.
    memory_messages: u64,
    memory_bytes: u64,
}

/// A session with its subscriptions.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ClientDetail {
    #[serde(flatten)]
    client: Client,
    subscriptions: Vec<Subscription>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct KickParameters {
    /// What a version 5 client is told: a Reason Code of DISCONNECT from 0x80 on, as a number or as
    /// `0x98`, Administrative action, which is the default.
    reason_code: Option<String>,
}

/// The clients of the whole cluster, in the order of their ids.
#[utoipa::path(get, path = "/clients", tag = "clients", operation_id = "list_clients", params(ListParameters), responses(
    (status = 200, body = Page<Client>, description = "A page of clients."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    Query(asked): Query<ListParameters>,
) -> Result<Json<Page<Client>>, Problem> {
    let limit = page::limit(asked.limit)?;
    let filter = ClientsFilter {
        after: page::read_cursor(asked.cursor.as_deref())?,
        id: match asked.client_id {
            None => IdFilter::All,
            Some(id) => match id.strip_suffix('*') {
                Some(prefix) => IdFilter::BeginsWith(prefix.to_owned()),
                None => IdFilter::Is(id),
            },
        },
        connected: asked.state.map(|state| state == ConnectionState::Connected),
    };
    let views = context.node()?.clients(&filter, limit).await?;
    let last = (views.len() == limit).then(|| views.last()).flatten();
    let next_cursor = last.map(|view| page::cursor(&view.client_id));
    let items = views.into_iter().map(Client::from).collect();
    Ok(Json(Page { items, next_cursor }))
}

/// One client with its subscriptions.
#[utoipa::path(get, path = "/clients/{client_id}", tag = "clients", operation_id = "show_client",
    params(("client_id" = String, Path)), responses(
    (status = 200, body = ClientDetail, description = "The client."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn show(
    State(context): State<Arc<Context>>,
    Path(client_id): Path<String>,
) -> Result<Json<ClientDetail>, Problem> {
    let client_id: Arc<str> = client_id.into();
    let found = context.node()?.client(&client_id).await?;
    let (view, subscriptions) = found.ok_or_else(no_such_client)?;
    Ok(Json(ClientDetail {
        client: view.into(),
        subscriptions: subscriptions.into_iter().map(Subscription::from).collect(),
    }))
}

/// Ends the connection of a client, at whichever node. Its session stays, and its Will is published.
#[utoipa::path(delete, path = "/clients/{client_id}", tag = "clients", operation_id = "disconnect_client",
    params(("client_id" = String, Path), KickParameters), responses(
    (status = 204, description = "The client is being told."),
    (status = 409, body = Problem, content_type = "application/problem+json",
        description = "It is not connected."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn kick(
    State(context): State<Arc<Context>>,
    Path(client_id): Path<String>,
    Query(asked): Query<KickParameters>,
) -> Result<StatusCode, Problem> {
    let reason = match asked.reason_code {
        None => ReasonCode::AdministrativeAction,
        Some(text) => reason_code(&text).ok_or_else(|| {
            Problem::invalid("reason_code should be one of DISCONNECT's from 0x80 on, such as 0x98")
        })?,
    };
    match context.node()?.kick(&client_id.into(), reason).await? {
        Kicked::Told => Ok(StatusCode::NO_CONTENT),
        Kicked::NotConnected => Err(Problem::new(
            StatusCode::CONFLICT,
            "not_connected",
            "the client is not connected",
        )),
        Kicked::Unknown => Err(no_such_client()),
    }
}

fn no_such_client() -> Problem {
    Problem::not_found("there is no client of this id")
}

fn reason_code(text: &str) -> Option<ReasonCode> {
    let byte = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u8::from_str_radix(digits, 16).ok()?,
        None => text.parse().ok()?,
    };
    ReasonCode::from_byte(byte)
        .filter(|reason| reason.is_error() && reason.is_allowed_in(PacketType::Disconnect))
}

impl From<ClientView> for Client {
    fn from(view: ClientView) -> Self {
        let seconds = |duration: Duration| duration.as_secs();
        let connection = view.presence.map(|presence| Connection {
            address: presence.peer.to_string(),
            listener: presence.listener.name.to_string(),
            user_name: presence.user_name.as_deref().map(str::to_owned),
            connected_at: rfc3339(presence.connected_at),
            clean_start: presence.clean_start,
            keep_alive_seconds: presence.keep_alive.map(seconds),
        });
        Self {
            client_id: view.client_id.to_string(),
            state: if view.connected {
                ConnectionState::Connected
            } else {
                ConnectionState::Disconnected
            },
            node: view.node.as_deref().map(str::to_owned),
            protocol: match view.version {
                ProtocolVersion::V3_1 => "3.1",
                ProtocolVersion::V3_1_1 => "3.1.1",
                ProtocolVersion::V5 => "5.0",
            },
            session_expiry_seconds: Some(view.expiry_interval)
                .filter(|seconds| *seconds != u32::MAX),
            session_ends_at: view.ends_at.map(rfc3339),
            connection,
            queue: view.waiting.map(|waiting| Queue {
                messages: waiting.messages,
                bytes: waiting.bytes,
                memory_messages: waiting.memory_messages,
                memory_bytes: waiting.memory_bytes,
            }),
            in_flight: view.in_flight,
        }
    }
}
