//! Topic Names and Topic Filters, section 4.7, and shared subscriptions, section 4.8.

use std::fmt;
use std::sync::Arc;

use super::QoS;

/// A Topic Filter that obeys section 4.7: non-empty, `#` only alone and last, `+` only alone in
/// its level, no U+0000.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicFilter(Arc<str>);

/// The ShareName of `$share/{ShareName}/{filter}`: not empty, without `/`, `+` and `#`,
/// [MQTT-4.8.2-1], [MQTT-4.8.2-2].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShareName(Arc<str>);

/// What a SUBSCRIBE names: a Topic Filter, for itself or for a share group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionFilter {
    pub share: Option<ShareName>,
    pub filter: TopicFilter,
}

/// Whether retained messages are sent when a subscription is made, section 3.8.3.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RetainHandling {
    #[default]
    SendAtSubscribe = 0,
    SendIfNew = 1,
    DoNotSend = 2,
}

/// Subscription Options, section 3.8.3.1. Before version 5 only the QoS is ever set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SubscribeOptions {
    pub maximum_qos: QoS,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub retain_handling: RetainHandling,
}

/// Why text is not a Topic Name or Topic Filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTopic {
    #[error("it is empty")] // [MQTT-4.7.3-1]
    Empty,
    #[error("it contains U+0000")] // [MQTT-4.7.3-2]
    Null,
    #[error("it is longer than 65535 bytes")] // [MQTT-4.7.3-3]
    TooLong,
    #[error("`#` must stand alone in the last level")] // [MQTT-4.7.1-1]
    MultiLevelWildcard,
    #[error("`+` must stand alone in its level")] // [MQTT-4.7.1-2]
    SingleLevelWildcard,
    #[error("a topic name has no wildcards")] // [MQTT-3.3.2-2]
    WildcardInName,
    #[error("the share name is empty or contains `/`, `+` or `#`, or no filter follows it")]
    ShareName,
}
