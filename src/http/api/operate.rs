//! `/drain` and `/reload`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::Context;
use crate::http::problem::Problem;
use crate::http::time::rfc3339;
use crate::lifecycle::Wish;

/// How far the node that answers is in being drained.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Drain {
    /// The name of the node that answers.
    node: String,
    /// `serving` or `draining`.
    state: &'static str,
    /// Those that have not left yet.
    clients_connected: u64,
}

/// The last time that the files of the node that answers were read again, by whatever reason.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct LastReload {
    /// Absent if they never were since the start.
    last_successful: Option<bool>,
    /// Absent if it never was since the start.
    last_success_at: Option<String>,
}

/// What came of reading the files again.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Reloaded {
    /// Settings that have changed and take effect after a restart.
    needs_restart: Vec<String>,
}

/// Whether the node that answers is being drained, and who is left.
#[utoipa::path(get, path = "/drain", tag = "operation", operation_id = "show_drain", responses(
    (status = 200, body = Drain, description = "How far it is."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker is starting or stopping."),
))]
pub(super) async fn show_drain(
    State(context): State<Arc<Context>>,
) -> Result<Json<Drain>, Problem> {
    Ok(Json(context.drain()?))
}

/// Begins to drain the node that answers, as `[drain]` says: it asks load balancers for no more
/// clients, and after the grace tells those that it has to use another node. It goes on running.
#[utoipa::path(post, path = "/drain", tag = "operation", operation_id = "drain", responses(
    (status = 202, body = Drain, description = "It is being drained."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker is starting or stopping."),
))]
pub(super) async fn drain(
    State(context): State<Arc<Context>>,
) -> Result<(StatusCode, Json<Drain>), Problem> {
    context.wish(Wish::Drain).await?;
    Ok((StatusCode::ACCEPTED, Json(context.drain()?)))
}

/// Lets clients in again.
#[utoipa::path(delete, path = "/drain", tag = "operation", operation_id = "undrain", responses(
    (status = 200, body = Drain, description = "It serves as before."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker is starting or stopping."),
))]
pub(super) async fn undrain(State(context): State<Arc<Context>>) -> Result<Json<Drain>, Problem> {
    context.wish(Wish::Undrain).await?;
    Ok(Json(context.drain()?))
}

/// What came of the last time that the files of the node that answers were read again.
#[utoipa::path(get, path = "/reload", tag = "operation", operation_id = "show_reload", responses(
    (status = 200, body = LastReload, description = "What came of it."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker is starting or stopping."),
))]
pub(super) async fn show_reload(
    State(context): State<Arc<Context>>,
) -> Result<Json<LastReload>, Problem> {
    let last = context.steering()?.reload.last();
    Ok(Json(LastReload {
        last_successful: last.map(|last| last.is_successful),
        last_success_at: last.and_then(|last| last.succeeded_at).map(rfc3339),
    }))
}

/// Reads the configuration, users and certificates of the node that answers again, as SIGHUP does.
#[utoipa::path(post, path = "/reload", tag = "operation", operation_id = "reload", responses(
    (status = 200, body = Reloaded, description = "All of it is in effect, but for what needs a restart."),
    (status = 409, body = Problem, content_type = "application/problem+json",
        description = "A file is no good: everything stays as it was."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker is starting or stopping."),
))]
pub(super) async fn reload(State(context): State<Arc<Context>>) -> Result<Json<Reloaded>, Problem> {
    let outcome = context.steering()?.reload.ask_and_wait().await;
    match outcome.ok_or_else(|| context.not_serving())? {
        Ok(needs_restart) => Ok(Json(Reloaded { needs_restart })),
        Err(detail) => Err(Problem::new(StatusCode::CONFLICT, "reload_failed", detail)
            .hint("everything stays as it was")),
    }
}

impl Context {
    async fn wish(
        &self,
        wish: impl FnOnce(tokio::sync::oneshot::Sender<()>) -> Wish,
    ) -> Result<(), Problem> {
        if self.steering()?.wish(wish).await {
            Ok(())
        } else {
            Err(self.not_serving())
        }
    }

    fn drain(&self) -> Result<Drain, Problem> {
        let node = self.node()?;
        let (clients_connected, _) = node.clients.count();
        Ok(Drain {
            node: node.name.to_string(),
            state: self.lifecycle.phase().as_str(),
            clients_connected,
        })
    }
}
