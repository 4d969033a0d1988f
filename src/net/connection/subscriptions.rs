//! SUBSCRIBE and UNSUBSCRIBE, and the retained messages that a subscription asks for.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{Connection, Pending, authorize};
use crate::auth::{Request, Verdict};
use crate::broker::retained::RetainedWalk;
use crate::broker::sys::ClientEvent;
use crate::metrics::{Arrival, Asked};
use crate::mqtt::topic::SubscribeOptions;
use crate::mqtt::{QoS, ReasonCode};
use crate::session::{Delivery, Origin, SubscribeRequest, UnsubscribeRequest};
use crate::store::{Retained, StoreError};

/// Retained messages looked up at a time.
const RETAINED_STEP: usize = 256;

/// Retained messages that are being sent because of a subscription.
pub(super) struct Walk {
    walk: RetainedWalk,
    options: SubscribeOptions,
    identifiers: Option<Arc<[u32]>>,
    page: RetainedPage,
}

/// Retained messages from a store that is shared with other nodes.
enum RetainedPage {
    None,
    Reading(BoxFuture<'static, Result<Vec<Retained>, StoreError>>),
    Read(Vec<Retained>),
}

impl Walk {
    /// Whether a page of it is on its way from the store.
    pub(super) fn is_reading(&self) -> bool {
        matches!(self.page, RetainedPage::Reading(_))
    }
}

impl Connection {
    pub(super) async fn subscribe(&mut self, request: SubscribeRequest) {
        let mut reasons = Vec::with_capacity(request.filters.len());
        let mut walks = Vec::new();
        let mut known = None;
        for (filter, options) in request.filters {
            let limits = &self.context.node.limits;
            let subscriptions = &self.connected.subscriptions;
            let filter = match filter {
                Ok(filter)
                    if filter.filter.levels().count() <= limits.topic_levels_max
                        && filter.filter.as_str().len() <= limits.topic_bytes_max =>
                {
                    filter
                }
                Ok(_) | Err(_) => {
                    reasons.push(ReasonCode::TopicFilterInvalid);
                    continue;
                }
            };
            if subscriptions.len() >= limits.subscriptions_per_client_max
                && !subscriptions.contains_key(&filter)
            {
                reasons.push(ReasonCode::QuotaExceeded);
                continue;
            }
            let asked = Request::Subscribe {
                filter: filter.filter.as_str(),
            };
            let verdict = authorize(&self.context.node, &self.identity, asked).await;
            let totals = &self.context.node.totals;
            totals.authorized(Asked::Subscribe, verdict == Verdict::Allow);
            if let Verdict::Deny { rule } = verdict {
                let client_id = &self.identity.client_id;
                tracing::warn!(event = "subscribe_denied", %client_id, topic = %filter, rule = %rule);
                reasons.push(ReasonCode::NotAuthorized);
                continue;
            }
            let node = &self.context.node;
            if filter.share.is_some() && !node.open_group(&filter).await {
                reasons.push(ReasonCode::UnspecifiedError);
                continue;
            }
            let subscribed =
                node.subscribe(&mut self.connected, &filter, options, request.identifier);
            self.last_receipt = self.last_receipt.max(subscribed.receipt);
            // Whoever knows of the last one knows of all.
            known = subscribed.known.or(known);
            walks.extend(subscribed.retained.map(|walk| Walk {
                walk,
                options,
                identifiers: request.identifier.map(|identifier| Arc::from([identifier])),
                page: RetainedPage::None,
            }));
            reasons.push(match options.maximum_qos {
                QoS::AtMostOnce => ReasonCode::Success,
                QoS::AtLeastOnce => ReasonCode::GrantedQoS1,
                QoS::ExactlyOnce => ReasonCode::GrantedQoS2,
            });
            node.publish_event(
                &self.identity.client_id,
                ClientEvent::Subscribed(&filter.to_string()),
            );
        }
        let pending = Pending::SubAck {
            packet_id: request.packet_id,
            reasons,
            walks,
            known,
        };
        self.pending.push_back((self.last_receipt, pending));
    }

    pub(super) fn unsubscribe(&mut self, request: UnsubscribeRequest) {
        let mut reasons = Vec::with_capacity(request.filters.len());
        for filter in request.filters {
            let Ok(filter) = filter else {
                reasons.push(ReasonCode::TopicFilterInvalid);
                continue;
            };
            let node = &self.context.node;
            reasons.push(match node.unsubscribe(&mut self.connected, &filter) {
                Some(receipt) => {
                    self.has_unsubscribed = true;
                    self.last_receipt = self.last_receipt.max(receipt);
                    node.publish_event(
                        &self.identity.client_id,
                        ClientEvent::Unsubscribed(&filter.to_string()),
                    );
                    ReasonCode::Success
                }
                None => ReasonCode::NoSubscriptionExisted,
            });
        }
        let pending = Pending::UnsubAck {
            packet_id: request.packet_id,
            reasons,
        };
        self.pending.push_back((self.last_receipt, pending));
    }

    /// Takes some of the retained messages that new subscriptions ask for.
    pub(super) fn walk_retained(&mut self) {
        if !self.may_walk() {
            return;
        }
        let Some(walk) = self.walks.front_mut() else {
            return;
        };
        let node = &self.context.node;
        let mailbox = &self.connected.mailbox;
        let mut found = Vec::new();
        // Opened before the look-up: a newer message cannot come between the two.
        let mut additions = mailbox.is_durable().then(|| node.flusher.add());
        let step = mailbox.retained_step(RETAINED_STEP);
        let mut more = match std::mem::replace(&mut walk.page, RetainedPage::None) {
            RetainedPage::Read(page) => {
                walk.walk.take_read(page, &mut found);
                false
            }
            _ => walk.walk.step(&node.retained, &mut found, step),
        };
        if !more && let Some(reading) = node.read_retained(&mut walk.walk, step) {
            walk.page = RetainedPage::Reading(reading);
            more = true;
        }
        for retained in found {
            // [MQTT-3.8.3-3]
            if walk.options.no_local && retained.publisher == self.identity.client_id {
                continue;
            }
            let qos = retained.message.qos().min(walk.options.maximum_qos);
            let delivery = Delivery {
                message: retained.message,
                qos,
                retain: true,
                subscription_identifiers: walk.identifiers.clone(),
                origin: Origin::Memory,
                arrival: Arrival::NONE,
            };
            node.totals.retained_delivered.inc();
            match &mut additions {
                Some(additions) if qos > QoS::AtMostOnce => {
                    additions.enqueue(mailbox, delivery, None);
                }
                _ => self.consumer.add(delivery),
            }
        }
        if !more {
            self.walks.pop_front();
        }
    }
}

/// Ready when retained messages that are looked up in the store are there.
pub(super) async fn retained_page(walks: &mut VecDeque<Walk>) -> Result<(), StoreError> {
    match walks.front_mut().map(|walk| &mut walk.page) {
        Some(page @ RetainedPage::Reading(_)) => {
            if let RetainedPage::Reading(reading) = page {
                *page = RetainedPage::Read(reading.await?);
            }
            Ok(())
        }
        _ => std::future::pending().await,
    }
}
