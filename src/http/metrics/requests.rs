//! Requests that were answered.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::families;
use super::text::Exposition;
use crate::http::Context;
use crate::metrics::Histogram;

/// By the templates of their paths, which are ours.
#[derive(Debug, Default)]
pub(in crate::http) struct Requests {
    routes: Mutex<BTreeMap<String, Route>>,
}

#[derive(Debug, Default)]
struct Route {
    answers: BTreeMap<(&'static str, u16), u64>,
    duration: Histogram,
}

/// Counts a request. Those for paths that there are not have one route, and methods that nobody knows
/// one name: a client cannot make series.
pub(in crate::http) async fn measure(
    State(context): State<Arc<Context>>,
    request: Request,
    next: Next,
) -> Response {
    let began = Instant::now();
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("other", MatchedPath::as_str).to_owned();
    let method = name_of(request.method());
    let response = next.run(request).await;
    let mut routes = context.requests.routes.lock();
    let route = routes.entry(route).or_default();
    let answer = (method, response.status().as_u16());
    *route.answers.entry(answer).or_default() += 1;
    route.duration.observe(began.elapsed());
    response
}

fn name_of(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

impl Requests {
    pub(super) fn write(&self, into: &mut Exposition) {
        let routes = self.routes.lock();
        let mut samples = into.family(&families::HTTP_REQUESTS);
        for (route, counted) in &*routes {
            for ((method, code), count) in &counted.answers {
                samples.sample(&[route, method, &code.to_string()], count);
            }
        }
        let mut samples = into.family(&families::HTTP_REQUEST_DURATION);
        for (route, counted) in &*routes {
            samples.distribution(&[route], &counted.duration.read());
        }
    }
}
