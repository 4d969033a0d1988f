//! The API below `/api/v1`: what there is to see of a node and its cluster, and a few ways to act.
//!
//! The OpenAPI document comes from the handlers; docs/openapi.json is a copy that a test compares.

#![expect(
    unused_qualifications,
    reason = "they are in what utoipa makes of handlers with a query"
)]

mod clients;
mod cluster;
mod operate;
mod page;
mod publish;
mod retained;
mod subscriptions;

use std::sync::Arc;

use axum::http::StatusCode;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi, openapi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Context;
use super::problem::Problem;
use crate::broker::Node;
use crate::lifecycle::Steering;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "midge",
        description = "The API of a midge broker. Identifiers and topics in paths are URL-encoded."
    ),
    servers((url = "/api/v1")),
    modifiers(&Bearer),
    security(("token" = []), ()),
    tags(
        (name = "cluster", description = "Nodes"),
        (name = "clients", description = "Sessions, whether their clients are connected or not"),
        (name = "operation", description = "Draining the node that answers, and reading its files again"),
        (name = "messages", description = "Publishing and retained messages"),
    ),
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut openapi::OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", scheme);
    }
}

pub(super) fn router() -> (axum::Router<Arc<Context>>, openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(cluster::version))
        .routes(routes!(cluster::cluster))
        .routes(routes!(cluster::nodes))
        .routes(routes!(
            operate::show_drain,
            operate::drain,
            operate::undrain
        ))
        .routes(routes!(operate::show_reload, operate::reload))
        .routes(routes!(clients::list))
        .routes(routes!(clients::show, clients::kick))
        .routes(routes!(subscriptions::list))
        .routes(routes!(retained::list, retained::clear_matching))
        .routes(routes!(retained::show, retained::put, retained::clear))
        .routes(routes!(publish::publish))
        .split_for_parts()
}

impl Context {
    /// The node, if there is one to ask.
    fn node(&self) -> Result<Arc<Node>, Problem> {
        self.node.load_full().ok_or_else(|| self.not_serving())
    }

    /// The way to steer it.
    fn steering(&self) -> Result<Arc<Steering>, Problem> {
        self.steering.load_full().ok_or_else(|| self.not_serving())
    }

    fn not_serving(&self) -> Problem {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let detail = format!("the broker is {}", self.lifecycle.phase().as_str());
        Problem::new(status, "not_serving", detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `MIDGE_TEST_UPDATE=1` writes it anew.
    #[test]
    fn the_openapi_document_in_docs_is_that_of_the_handlers() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
        let (_, document) = router();
        let document = document.to_pretty_json().unwrap() + "\n";
        if std::env::var_os("MIDGE_TEST_UPDATE").is_some() {
            std::fs::write(&path, &document).unwrap();
        }

        assert!(
            std::fs::read_to_string(&path).unwrap_or_default() == document,
            "docs/openapi.json is not what the handlers say; run this test with MIDGE_TEST_UPDATE=1"
        );
    }
}
