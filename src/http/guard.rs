//! Who may use the API.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::problem::Problem;
use super::tokens::Scope;
use super::{Context, Peer};
use crate::net::proxy::forwarded_client;

/// Lets through whoever shows a token that is good for the request; without any tokens, whoever is
/// on this machine.
pub(super) async fn authorize(
    State(context): State<Arc<Context>>,
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    match check(&context, peer, &request) {
        Ok(who) => {
            if needed_scope(request.method()) == Scope::Write {
                let (method, path) = (request.method(), request.uri().path());
                let client = client(&context, peer, request.headers());
                tracing::info!(event = "api_write", token = who, peer = %client, %method, path);
            }
            next.run(request).await
        }
        Err(problem) => {
            let is_unauthorized = problem.status() == StatusCode::UNAUTHORIZED;
            let mut response = problem.into_response();
            if is_unauthorized {
                let challenge = HeaderValue::from_static("Bearer realm=\"midge\"");
                response
                    .headers_mut()
                    .insert(header::WWW_AUTHENTICATE, challenge);
            }
            response
        }
    }
}

/// Who is behind the proxies that the request has come through.
fn client(context: &Context, peer: Peer, headers: &HeaderMap) -> SocketAddr {
    let values = headers.get_all("x-forwarded-for").iter();
    let lists = values.filter_map(|value| value.to_str().ok());
    let forwarded_for: Vec<_> = lists
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .collect();
    forwarded_client(&context.trusted_proxies, peer.0, &forwarded_for)
}

/// Returns the name of the token.
fn check(context: &Context, peer: Peer, request: &Request) -> Result<String, Problem> {
    let tokens = context.tokens.get();
    if tokens.is_empty() {
        return check_local(context, peer, request.headers()).map(|()| String::new());
    }
    let shown = request.headers().get(header::AUTHORIZATION);
    let shown = shown
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim());
    let Some((name, scope)) = shown.and_then(|shown| tokens.find(shown)) else {
        let (code, detail) = match shown {
            None => ("token_missing", "the API needs a token"),
            Some(_) => ("token_unknown", "the token is not known"),
        };
        return Err(Problem::new(StatusCode::UNAUTHORIZED, code, detail)
            .hint("send it as `Authorization: Bearer mdg_…`; `midge token add` makes one"));
    };
    if scope < needed_scope(request.method()) {
        let detail = "the token is for reading only";
        return Err(Problem::new(StatusCode::FORBIDDEN, "token_scope", detail));
    }
    Ok(name.to_owned())
}

fn needed_scope(method: &Method) -> Scope {
    if method.is_safe() {
        Scope::Read
    } else {
        Scope::Write
    }
}

fn check_local(context: &Context, peer: Peer, headers: &HeaderMap) -> Result<(), Problem> {
    // A proxy on this machine speaks for others, and a browser that a name was made to lead here
    // (DNS rebinding) for whatever page it shows.
    let is_forwarded = headers.contains_key("forwarded") || headers.contains_key("x-forwarded-for");
    let is_local = context.is_local
        && peer.0.ip().to_canonical().is_loopback()
        && !is_forwarded
        && headers.get(header::HOST).is_some_and(names_this_machine);
    if is_local {
        return Ok(());
    }
    let detail = "there are no tokens, and without any the API is for this machine only";
    Err(
        Problem::new(StatusCode::FORBIDDEN, "tokens_needed", detail).hint(
            "make one with `midge token add --file tokens NAME` and set http.tokens_file to the file",
        ),
    )
}

fn names_this_machine(host: &HeaderValue) -> bool {
    let Ok(host) = host.to_str() else {
        return false;
    };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_count() {
        for (host, is_local) in [
            ("localhost", true),
            ("LocalHost:9883", true),
            ("127.0.0.1:9883", true),
            ("[::1]:9883", true),
            ("evil.example", false),
            ("evil.example:9883", false),
            ("127.0.0.1.evil.example:80", false),
            ("10.0.0.1", false),
            ("", false),
        ] {
            let value = HeaderValue::from_static(host);
            assert_eq!(names_this_machine(&value), is_local, "{host}");
        }
    }
}
