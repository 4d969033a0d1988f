//! Lists in pages. A cursor stands for the last item of a page, so that nothing is shown twice or
//! left out because other items come and go.

use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use utoipa::ToSchema;

use crate::http::problem::Problem;

/// Items of a page if nothing else is asked for.
const LIMIT: usize = 100;
const LIMIT_MAX: usize = 1000;

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// To be given as `cursor` for the next page; absent on the last one.
    pub(super) next_cursor: Option<String>,
}

pub(super) fn limit(asked: Option<usize>) -> Result<usize, Problem> {
    match asked {
        None => Ok(LIMIT),
        Some(limit @ 1..=LIMIT_MAX) => Ok(limit),
        Some(_) => Err(Problem::invalid("limit should be from 1 to 1000")),
    }
}

pub(super) fn cursor(last: &str) -> String {
    URL_SAFE_NO_PAD.encode(last)
}

pub(super) fn read_cursor(cursor: Option<&str>) -> Result<Option<String>, Problem> {
    let Some(cursor) = cursor else {
        return Ok(None);
    };
    let last = URL_SAFE_NO_PAD.decode(cursor).ok();
    match last.and_then(|last| String::from_utf8(last).ok()) {
        Some(last) => Ok(Some(last)),
        None => Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_cursor",
            "the cursor is none that a page was answered with",
        )),
    }
}
