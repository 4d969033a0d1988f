//! Wills: the last words of a client whose connection ended without its DISCONNECT.

use std::sync::Arc;

use super::flush::{Receipt, unix_ms};
use super::{LastTopic, Node, Publisher};
use crate::auth::{Answer, Identity, Request, Verdict};
use crate::metrics::{Arrival, Asked, Source};
use crate::mqtt::Message;
use crate::mqtt::message::MessageParts;
use crate::store::{Change, WillRecord};

impl Node {
    /// Publishes a Will. `with` makes durable that it has been, so that it is published once.
    pub(super) fn publish_will(
        &self,
        client_id: &Arc<str>,
        will: &WillRecord,
        with: Change,
    ) -> Receipt {
        let expires_at = will
            .message_expiry_interval
            .map(|seconds| unix_ms() + u64::from(seconds) * 1000);
        let message = Message::new(MessageParts {
            topic: will.message.topic(),
            qos: will.message.qos(),
            retain: will.message.retain() && self.may_retain(&will.message),
            expires_at,
            properties: &[will.message.properties()],
            payload: will.message.payload(),
        });
        // Rules may have changed since CONNECT, where an answer that takes time was waited for.
        let identity = Identity {
            client_id: client_id.clone(),
            user_name: will.user_name.clone(),
        };
        let request = Request::Publish {
            topic: message.topic(),
            qos: message.qos(),
            retain: message.retain(),
        };
        if let Answer::Now(Verdict::Deny { rule }) = self.authorizer.authorize(&identity, request) {
            self.totals.authorized(Asked::Publish, false);
            tracing::warn!(event = "will_denied", client_id = %client_id, topic = message.topic(), rule = %rule);
            return self.flusher.persist(with);
        }
        let publisher = Publisher {
            client_id,
            mailbox: None,
            arrival: Arrival::NONE,
        };
        let published = self.publish(&message, publisher, &mut LastTopic::default(), Some(with));
        self.note_published(&message, Source::Will, &published);
        published.receipt
    }
}
