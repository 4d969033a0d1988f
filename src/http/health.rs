//! What load balancers, Kubernetes and `midge healthcheck` ask.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use serde_json::json;

use super::Context;
use super::problem::Problem;
use crate::broker::inspect::StoreHealth;
use crate::lifecycle::Phase;

/// Whether to send clients here, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Starting,
    Ready,
    /// Nothing can be stored at the moment, or memory is short.
    Degraded,
    Draining,
    Stopping,
}

impl Status {
    pub(super) const ALL: [Self; 5] = [
        Self::Starting,
        Self::Ready,
        Self::Degraded,
        Self::Draining,
        Self::Stopping,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Degraded => "degraded",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
        }
    }
}

/// One of the things that readiness consists of.
#[derive(Debug, Serialize)]
struct Check {
    #[serde(skip)]
    name: &'static str,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug)]
pub(super) struct Health {
    pub(super) status: Status,
    checks: [Check; 4],
}

impl Context {
    pub(super) fn health(&self) -> Health {
        let phase = self.lifecycle.phase();
        let node = self.node.load();
        let store = node.as_ref().map(|node| node.store_health());
        let overload = node.as_ref().map(|node| &node.overload);
        let overload = overload.filter(|overload| overload.refuses_connections());
        let is_overloaded = overload.is_some();
        let status = match (phase, &store) {
            (Phase::Starting, _) | (Phase::Serving, None) => Status::Starting,
            (Phase::Stopping, _) => Status::Stopping,
            (Phase::Draining, _) => Status::Draining,
            (Phase::Serving, Some(_)) if is_overloaded => Status::Degraded,
            (Phase::Serving, Some(StoreHealth::Available)) => Status::Ready,
            (Phase::Serving, Some(StoreHealth::Unavailable { .. })) => Status::Degraded,
        };
        let check = |name, error: Option<String>| Check {
            name,
            ok: error.is_none(),
            error,
        };
        let is_listening = matches!(phase, Phase::Serving | Phase::Draining);
        let listeners =
            (!is_listening).then(|| format!("closed: the broker is {}", phase.as_str()));
        let store = match store {
            None => Some("not opened".to_owned()),
            Some(StoreHealth::Available) => None,
            Some(StoreHealth::Unavailable { reason }) => Some(reason),
        };
        let drain = matches!(phase, Phase::Draining | Phase::Stopping)
            .then(|| format!("the broker is {}", phase.as_str()));
        let overload = overload.map(|overload| {
            let limit = overload.limit_bytes().unwrap_or(0);
            format!("memory is short: the limit is {limit} bytes")
        });
        Health {
            status,
            checks: [
                check("listeners", listeners),
                check("store", store),
                check("drain", drain),
                check("overload", overload),
            ],
        }
    }

    fn node_name(&self) -> Option<String> {
        self.node.load().as_ref().map(|node| node.name.to_string())
    }
}

pub(super) fn router() -> Router<Arc<Context>> {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/readyz/{check}", get(readyz_check))
        .route("/healthz", get(readyz))
        .route("/lbz", get(lbz))
}

/// The process answers. It says nothing about the store: to restart a node because of that would
/// only add to the trouble.
async fn livez() -> Response {
    uncached(StatusCode::OK, "ok\n")
}

/// 200 if clients can be sent here.
async fn readyz(State(context): State<Arc<Context>>, RawQuery(query): RawQuery) -> Response {
    let health = context.health();
    let status = health.http_status();
    let asked = query.unwrap_or_default();
    let is_verbose = asked
        .split('&')
        .any(|parameter| parameter == "verbose" || parameter.starts_with("verbose="));
    if is_verbose {
        return uncached(status, health.lines());
    }
    let mut checks = serde_json::Map::new();
    for check in &health.checks {
        checks.insert(check.name.to_owned(), json!(check));
    }
    let body = axum::Json(json!({
        "status": health.status,
        "node": context.node_name(),
        "checks": checks,
    }));
    uncached(status, body)
}

/// One check alone.
async fn readyz_check(State(context): State<Arc<Context>>, Path(name): Path<String>) -> Response {
    let health = context.health();
    match health.checks.iter().find(|check| check.name == name) {
        Some(check) => uncached(status_of(check.ok), check.line()),
        None => Problem::not_found("there is no such check").into_response(),
    }
}

/// 200 to send clients here, 404 to send no new ones and keep those that are here, 503 to send none
/// and expect those that are here to go.
async fn lbz(State(context): State<Arc<Context>>) -> Response {
    let (status, text) = match context.health().status {
        Status::Ready => (StatusCode::OK, "ready\n"),
        Status::Draining => (StatusCode::NOT_FOUND, "draining\n"),
        Status::Degraded => (StatusCode::NOT_FOUND, "degraded\n"),
        Status::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        Status::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
    };
    uncached(status, text)
}

impl Health {
    fn http_status(&self) -> StatusCode {
        status_of(self.status == Status::Ready)
    }

    /// As the API server of Kubernetes shows its checks.
    fn lines(&self) -> String {
        let mut lines: String = self.checks.iter().map(Check::line).collect();
        lines.push_str(if self.status == Status::Ready {
            "readyz check passed\n"
        } else {
            "readyz check failed\n"
        });
        lines
    }
}

impl Check {
    fn line(&self) -> String {
        match &self.error {
            None => format!("[+]{} ok\n", self.name),
            Some(error) => format!("[-]{} failed: {error}\n", self.name),
        }
    }
}

fn status_of(ok: bool) -> StatusCode {
    if ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

fn uncached(status: StatusCode, body: impl IntoResponse) -> Response {
    (status, [(header::CACHE_CONTROL, "no-store")], body).into_response()
}
