//! The broker inside a program: publishing and subscribing without a socket.
//!
//! ```
//! use midge::Broker;
//! use midge::config::{Config, Sources};
//! use midge::embed::Publish;
//! use midge::mqtt::QoS;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Port 0 lets the system choose; clients connect to `address`.
//! let config = Config::load(&Sources {
//!     set: vec![("listeners.tcp.bind".into(), "127.0.0.1:0".into())],
//!     ..Sources::default()
//! })?;
//! let broker = Broker::with_config(config).in_memory().start().await?;
//! let address = broker.local_addr("tcp").expect("the listener is configured");
//! println!("serving on {address}");
//!
//! let mut subscription = broker.subscribe("home/+", QoS::AtLeastOnce)?;
//! let publish = Publish::new("home/kitchen", b"21.5").qos(QoS::AtLeastOnce);
//! broker.publish(publish).await?;
//!
//! let message = subscription.next().await;
//! assert_eq!((message.topic(), message.payload()), ("home/kitchen", &b"21.5"[..]));
//! broker.shutdown().await;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::Arc;

use crate::broker::consumer::{Consumer, Inbox};
use crate::broker::{LastTopic, Publisher};
use crate::metrics::{Arrival, Source};
use crate::mqtt::message::MessageParts;
use crate::mqtt::topic::{InvalidTopic, SubscribeOptions, TopicFilter, validate_topic_name};
use crate::mqtt::{Message, QoS, SubscriptionFilter};
use crate::server::Broker;
use crate::session::{Delivery, Origin};

/// A message that a program publishes to its own broker.
#[derive(Clone, Debug)]
pub struct Publish<'a> {
    parts: MessageParts<'a>,
}

/// Why a program's own message was not taken.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("not a topic name: {0}")]
    Topic(#[from] InvalidTopic),
    /// The message may or may not survive a restart.
    #[error("the store has failed")]
    StoreFailed,
}

/// What a program subscribes to; ends when it is dropped.
///
/// It does not outlive the program, and what it does not take in time is dropped as it is for a
/// slow client with a clean session.
pub struct Subscription {
    consumer: Consumer,
    leave: Box<dyn Fn() + Send + Sync>,
}

/// The name under which a program's own messages are published.
const PROGRAM: &str = "$program";

impl<'a> Publish<'a> {
    /// A message of QoS 0 that is not retained.
    pub fn new(topic: &'a str, payload: &'a [u8]) -> Self {
        Self {
            parts: MessageParts {
                topic,
                payload,
                ..MessageParts::default()
            },
        }
    }

    #[must_use]
    pub fn qos(mut self, qos: QoS) -> Self {
        self.parts.qos = qos;
        self
    }

    #[must_use]
    pub fn retain(mut self) -> Self {
        self.parts.retain = true;
        self
    }
}

impl Broker {
    /// Publishes a message as the program's own: no rule is asked, and topics below `$SYS` are
    /// allowed too. Returns once it is as safe as an acknowledged message of a client.
    ///
    /// # Errors
    /// [`PublishError`] if the topic is none, or the store has failed.
    pub async fn publish(&self, publish: Publish<'_>) -> Result<(), PublishError> {
        validate_topic_name(publish.parts.topic)?;
        let message = Message::new(publish.parts);
        let publisher = Publisher {
            client_id: &Arc::from(PROGRAM),
            mailbox: None,
            arrival: Arrival::NONE,
        };
        let published = self
            .node
            .publish(&message, publisher, &mut LastTopic::default(), None);
        self.node
            .note_published(&message, Source::Program, &published);
        let durable = self.node.flusher.durable(published.receipt).await;
        durable.map_err(|_| PublishError::StoreFailed)
    }

    /// Subscribes the program itself. Retained messages that are there already do not come.
    ///
    /// # Errors
    /// [`InvalidTopic`] if `filter` is not a Topic Filter.
    pub fn subscribe(&self, filter: &str, maximum_qos: QoS) -> Result<Subscription, InvalidTopic> {
        let filter = TopicFilter::new(filter)?;
        let node = self.node.clone();
        let mailbox = node.new_mailbox(Arc::from(PROGRAM), false);
        let mut consumer = node.attach(&mailbox, Inbox::Known);
        let options = SubscribeOptions {
            maximum_qos,
            ..SubscribeOptions::default()
        };
        node.subscriptions
            .subscribe(&filter, &mailbox, options, None);
        let wanted = SubscriptionFilter {
            share: None,
            filter: filter.clone(),
        };
        node.want(&wanted, true);
        let mut walk = node.retained.walk(filter.clone(), false);
        let mut retained = Vec::new();
        while walk.step(&node.retained, &mut retained, usize::MAX) {}
        for retained in retained {
            let qos = retained.message.qos().min(maximum_qos);
            consumer.add(Delivery {
                message: retained.message,
                qos,
                retain: true,
                subscription_identifiers: None,
                origin: Origin::Memory,
                arrival: Arrival::NONE,
            });
        }
        let leave = Box::new(move || {
            node.subscriptions.unsubscribe(&filter, &mailbox);
            node.want(&wanted, false);
        });
        Ok(Subscription { consumer, leave })
    }
}

impl Subscription {
    /// The next message.
    pub async fn next(&mut self) -> Message {
        loop {
            if let Some(delivery) = self.consumer.next() {
                return delivery.message;
            }
            // Nothing of it is read from the store.
            let _ = std::future::poll_fn(|context| self.consumer.poll_ready(context)).await;
            // There is no connection to end because of a full queue.
            self.consumer.ignore_order();
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        (self.leave)();
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").finish_non_exhaustive()
    }
}
