//! `/retained`

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::page::{self, Page};
use super::publish::{Content, Encoding, PUBLISHER, check_topic, show_payload};
use crate::broker::Node;
use crate::http::Context;
use crate::http::problem::Problem;
use crate::http::time::rfc3339;
use crate::mqtt::Message;
use crate::mqtt::message::MessageParts;
use crate::mqtt::topic::TopicFilter;
use crate::store::Retained;

/// Messages that one request clears at most.
const CLEARED_MAX: usize = 10_000;

/// Messages looked up at a time.
const STEP: usize = 500;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListParameters {
    /// A topic filter; `#` if not given, which leaves out topics that begin with `$`.
    filter: Option<String>,
    /// Items of a page: 1 to 1000, and 100 if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ClearParameters {
    /// A topic filter.
    filter: String,
    /// Only says what would be cleared.
    #[serde(default)]
    dry_run: bool,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ClearOneParameters {
    /// Only says what would be cleared.
    #[serde(default)]
    dry_run: bool,
}

/// A retained message, without its payload.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RetainedItem {
    topic: String,
    qos: u8,
    payload_bytes: usize,
    /// The client id of whoever published it; `$api` for this API.
    publisher: String,
    expires_at: Option<String>,
}

/// A retained message.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RetainedMessage {
    #[serde(flatten)]
    item: RetainedItem,
    payload: String,
    /// How the payload is written.
    encoding: Encoding,
}

/// What was cleared, or would be.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Cleared {
    dry_run: bool,
    messages: usize,
    /// Some of the topics.
    topics: Vec<String>,
    /// Whether there are more: ask again.
    more: bool,
}

/// The retained messages that match a filter, in the order of their topics.
#[utoipa::path(get, path = "/retained", tag = "messages", operation_id = "list_retained", params(ListParameters), responses(
    (status = 200, body = Page<RetainedItem>, description = "A page of messages."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    Query(asked): Query<ListParameters>,
) -> Result<Json<Page<RetainedItem>>, Problem> {
    let limit = page::limit(asked.limit)?;
    let filter = read_filter(asked.filter.as_deref().unwrap_or("#"))?;
    let after = page::read_cursor(asked.cursor.as_deref())?;
    let node = context.node()?;
    let (found, more) = node.retained_page(&filter, after.as_deref(), limit).await?;
    let last = found.last().filter(|_| more);
    Ok(Json(Page {
        next_cursor: last.map(|retained| page::cursor(retained.message.topic())),
        items: found.iter().map(RetainedItem::from).collect(),
    }))
}

/// Clears the retained messages that match a filter, as publishing an empty one would.
#[utoipa::path(delete, path = "/retained", tag = "messages", operation_id = "clear_retained_matching", params(ClearParameters), responses(
    (status = 200, body = Cleared, description = "What was cleared."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn clear_matching(
    State(context): State<Arc<Context>>,
    Query(asked): Query<ClearParameters>,
) -> Result<Json<Cleared>, Problem> {
    let node = context.node()?;
    let cleared = clear_all(&node, &read_filter(&asked.filter)?, asked.dry_run).await?;
    Ok(Json(cleared))
}

/// One retained message.
#[utoipa::path(get, path = "/retained/{topic}", tag = "messages", operation_id = "show_retained",
    params(("topic" = String, Path, description = "URL-encoded: `a%2Fb`")), responses(
    (status = 200, body = RetainedMessage, description = "The message."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn show(
    State(context): State<Arc<Context>>,
    Path(topic): Path<String>,
) -> Result<Json<RetainedMessage>, Problem> {
    let node = context.node()?;
    let (found, _) = node.retained_page(&read_topic(&topic)?, None, 1).await?;
    let retained = found.first().ok_or_else(nothing_retained)?;
    let (payload, encoding) = show_payload(retained.message.payload());
    Ok(Json(RetainedMessage {
        item: retained.into(),
        payload,
        encoding,
    }))
}

/// Publishes a message and retains it.
#[utoipa::path(put, path = "/retained/{topic}", tag = "messages", operation_id = "put_retained", request_body = Content,
    params(("topic" = String, Path, description = "URL-encoded: `a%2Fb`")), responses(
    (status = 204, description = "It is retained."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn put(
    State(context): State<Arc<Context>>,
    Path(topic): Path<String>,
    Json(content): Json<Content>,
) -> Result<StatusCode, Problem> {
    let node = context.node()?;
    let message = content.message(&context, &node, &topic, true)?;
    if message.payload().is_empty() {
        return Err(Problem::invalid("an empty payload would clear the topic").hint("use DELETE"));
    }
    node.publish_from(&Arc::from(PUBLISHER), &message).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Clears one topic.
#[utoipa::path(delete, path = "/retained/{topic}", tag = "messages", operation_id = "clear_retained",
    params(("topic" = String, Path, description = "URL-encoded: `a%2Fb`"), ClearOneParameters),
    responses(
    (status = 200, body = Cleared, description = "What was cleared."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn clear(
    State(context): State<Arc<Context>>,
    Path(topic): Path<String>,
    Query(asked): Query<ClearOneParameters>,
) -> Result<Json<Cleared>, Problem> {
    let node = context.node()?;
    check_topic(&node, &topic)?;
    let cleared = clear_all(&node, &read_topic(&topic)?, asked.dry_run).await?;
    if cleared.messages == 0 {
        return Err(nothing_retained());
    }
    Ok(Json(cleared))
}

async fn clear_all(node: &Node, filter: &TopicFilter, dry_run: bool) -> Result<Cleared, Problem> {
    if filter.as_str().starts_with("$SYS") {
        return Err(Problem::invalid("topics below $SYS are the broker's own"));
    }
    let mut topics: Vec<String> = Vec::new();
    let mut more = true;
    while more && topics.len() < CLEARED_MAX {
        let last = topics.last().map(String::as_str);
        let (found, goes_on) = node.retained_page(filter, last, STEP).await?;
        topics.extend(
            found
                .iter()
                .map(|retained| retained.message.topic().to_owned()),
        );
        more = goes_on;
    }
    if !dry_run {
        let publisher = Arc::from(PUBLISHER);
        // All at once: one flush takes many.
        let clear = |topic: &String| {
            let message = Message::new(MessageParts {
                topic,
                retain: true,
                ..MessageParts::default()
            });
            let publisher = &publisher;
            async move { node.publish_from(publisher, &message).await }
        };
        futures_util::future::try_join_all(topics.iter().map(clear)).await?;
    }
    let messages = topics.len();
    topics.truncate(100);
    Ok(Cleared {
        dry_run,
        messages,
        topics,
        more,
    })
}

fn read_filter(filter: &str) -> Result<TopicFilter, Problem> {
    TopicFilter::new(filter)
        .map_err(|error| Problem::invalid(format!("filter should be a topic filter: {error}")))
}

/// A topic name is a filter for itself.
fn read_topic(topic: &str) -> Result<TopicFilter, Problem> {
    crate::mqtt::topic::validate_topic_name(topic)
        .and_then(|()| TopicFilter::new(topic))
        .map_err(|error| Problem::invalid(format!("topic should be a topic name: {error}")))
}

fn nothing_retained() -> Problem {
    Problem::not_found("there is no retained message of this topic")
}

impl From<&Retained> for RetainedItem {
    fn from(retained: &Retained) -> Self {
        let message = &retained.message;
        Self {
            topic: message.topic().to_owned(),
            qos: message.qos() as u8,
            payload_bytes: message.payload().len(),
            publisher: retained.publisher.to_string(),
            expires_at: message.expires_at().map(rfc3339),
        }
    }
}
