//! `/publish`, and what messages look like in JSON.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::broker::Node;
use crate::broker::flush::unix_ms;
use crate::http::Context;
use crate::http::problem::Problem;
use crate::mqtt::message::MessageParts;
use crate::mqtt::property::{PropertiesBuffer, Property};
use crate::mqtt::topic::validate_topic_name;
use crate::mqtt::{Message, QoS};

/// The name under which messages of the API are published.
pub(super) const PUBLISHER: &str = "$api";

/// How a payload is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Encoding {
    #[default]
    Text,
    Base64,
}

/// A message without its topic.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct Content {
    #[serde(default)]
    pub(super) payload: String,
    /// How the payload is written: `text` if not given.
    #[serde(default)]
    encoding: Encoding,
    /// 0, 1 or 2.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    qos: u8,
    content_type: Option<String>,
    response_topic: Option<String>,
    /// In base64.
    correlation_data: Option<String>,
    /// Seconds after which it is no longer delivered.
    message_expiry_seconds: Option<u32>,
    #[serde(default)]
    user_properties: Vec<UserProperty>,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub(super) struct UserProperty {
    name: String,
    value: String,
}

/// A message to publish.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Publish {
    topic: String,
    #[serde(default)]
    retain: bool,
    #[serde(flatten)]
    content: Content,
}

/// What became of a message.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Published {
    /// Whether any subscription matches the topic.
    matched: bool,
}

/// Publishes a message; no rule of `[auth]` is asked. Answers once the message is as safe as one
/// that a client has been acknowledged: 200 if somebody wants it, 202 if nobody does.
#[utoipa::path(post, path = "/publish", tag = "messages", operation_id = "publish", request_body = Publish, responses(
    (status = 200, body = Published, description = "Somebody wants it."),
    (status = 202, body = Published, description = "No subscription matches."),
    (status = "4XX", body = Problem, content_type = "application/problem+json",
        description = "The request is wrong, or not allowed."),
    (status = 503, body = Problem, content_type = "application/problem+json",
        description = "The broker or its store is not available."),
))]
pub(super) async fn publish(
    State(context): State<Arc<Context>>,
    Json(publish): Json<Publish>,
) -> Result<(StatusCode, Json<Published>), Problem> {
    let node = context.node()?;
    let message = publish
        .content
        .message(&context, &node, &publish.topic, publish.retain)?;
    let matched = node.publish_from(&Arc::from(PUBLISHER), &message).await?;
    let status = if matched {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Json(Published { matched })))
}

impl Content {
    /// The message, if the broker takes it.
    pub(super) fn message(
        &self,
        context: &Context,
        node: &Node,
        topic: &str,
        retain: bool,
    ) -> Result<Message, Problem> {
        check_topic(node, topic)?;
        let payload = match self.encoding {
            Encoding::Text => self.payload.clone().into_bytes(),
            Encoding::Base64 => decode("payload", &self.payload)?,
        };
        let qos =
            QoS::from_bits(self.qos).ok_or_else(|| Problem::invalid("qos should be 0, 1 or 2"))?;
        let properties = self.properties()?;
        let encoded: Vec<&[u8]> = properties.as_properties().forwarded().collect();
        let expires_at = self
            .message_expiry_seconds
            .map(|seconds| unix_ms() + u64::from(seconds) * 1000);
        let message = Message::new(MessageParts {
            topic,
            qos,
            retain,
            expires_at,
            properties: &encoded,
            payload: &payload,
        });
        if message.len() > context.message_bytes_max {
            let detail = "the message is larger than limits.packet_bytes_max";
            return Err(Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                detail,
            ));
        }
        if retain && !node.may_retain(&message) {
            let detail = "there are limits.retained_messages_max retained messages already";
            return Err(Problem::new(StatusCode::CONFLICT, "retained_limit", detail));
        }
        Ok(message)
    }

    fn properties(&self) -> Result<PropertiesBuffer, Problem> {
        let mut properties = PropertiesBuffer::new();
        if let Some(content_type) = &self.content_type {
            check_text("content_type", content_type)?;
            properties.push(Property::ContentType(content_type));
        }
        if let Some(topic) = &self.response_topic {
            validate_topic_name(topic).map_err(|error| {
                Problem::invalid(format!("response_topic should be a topic name: {error}"))
            })?;
            properties.push(Property::ResponseTopic(topic));
        }
        if let Some(data) = &self.correlation_data {
            let data = decode("correlation_data", data)?;
            if data.len() > usize::from(u16::MAX) {
                return Err(Problem::invalid("correlation_data is too long"));
            }
            properties.push(Property::CorrelationData(&data));
        }
        for UserProperty { name, value } in &self.user_properties {
            check_text("user_properties", name)?;
            check_text("user_properties", value)?;
            properties.push(Property::UserProperty(name, value));
        }
        Ok(properties)
    }
}

/// Whether messages may be published to a topic.
pub(super) fn check_topic(node: &Node, topic: &str) -> Result<(), Problem> {
    validate_topic_name(topic)
        .map_err(|error| Problem::invalid(format!("topic should be a topic name: {error}")))?;
    if topic.starts_with("$SYS/") {
        return Err(Problem::invalid("topics below $SYS are the broker's own"));
    }
    let limits = &node.limits;
    if topic.len() > limits.topic_bytes_max || topic.split('/').count() > limits.topic_levels_max {
        return Err(Problem::invalid(
            "the topic is longer than limits.topic_bytes_max, or has more levels than \
             limits.topic_levels_max",
        ));
    }
    Ok(())
}

/// What a UTF-8 string of MQTT can hold, section 1.5.4.
fn check_text(name: &str, text: &str) -> Result<(), Problem> {
    if text.len() > usize::from(u16::MAX) || text.contains('\0') {
        let detail = format!("{name} should have at most 65535 bytes, and no U+0000");
        return Err(Problem::invalid(detail));
    }
    Ok(())
}

fn decode(name: &str, text: &str) -> Result<Vec<u8>, Problem> {
    STANDARD
        .decode(text)
        .map_err(|_| Problem::invalid(format!("{name} should be base64")))
}

/// A payload as it is shown: as text if it is one.
pub(super) fn show_payload(payload: &[u8]) -> (String, Encoding) {
    match std::str::from_utf8(payload) {
        Ok(text) => (text.to_owned(), Encoding::Text),
        Err(_) => (STANDARD.encode(payload), Encoding::Base64),
    }
}
