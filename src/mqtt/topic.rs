//! Topic Names and Topic Filters, section 4.7, and shared subscriptions, section 4.8.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
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

impl TopicFilter {
    /// # Errors
    /// [`InvalidTopic`] says which rule of section 4.7 is broken.
    pub fn new(filter: &str) -> Result<Self, InvalidTopic> {
        validate_text(filter)?;
        let mut levels = filter.split('/');
        while let Some(level) = levels.next() {
            if level.contains('#') && (level.len() > 1 || levels.next().is_some()) {
                return Err(InvalidTopic::MultiLevelWildcard);
            }
            if level.contains('+') && level.len() > 1 {
                return Err(InvalidTopic::SingleLevelWildcard);
            }
        }
        Ok(Self(filter.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn levels(&self) -> std::str::Split<'_, char> {
        self.0.split('/')
    }

    pub fn has_wildcard(&self) -> bool {
        has_wildcard(&self.0)
    }

    /// Such a filter matches no topic that begins with `$`, [MQTT-4.7.2-1].
    pub fn starts_with_wildcard(&self) -> bool {
        self.0.starts_with(['#', '+'])
    }

    /// Whether messages published to `topic` are for this filter.
    pub fn matches(&self, topic: &str) -> bool {
        if self.starts_with_wildcard() && topic.starts_with('$') {
            return false;
        }
        let mut names = topic.split('/');
        for level in self.levels() {
            match level {
                // Also the parent level, section 4.7.1.2.
                "#" => return true,
                "+" if names.next().is_some() => {}
                _ if names.next() == Some(level) => {}
                _ => return false,
            }
        }
        names.next().is_none()
    }
}

impl ShareName {
    /// # Errors
    /// [`InvalidTopic::ShareName`] if it is empty or contains `/`, `+` or `#`, and what is wrong
    /// with any text.
    pub fn new(name: &str) -> Result<Self, InvalidTopic> {
        if name.is_empty() || name.contains('/') || has_wildcard(name) {
            return Err(InvalidTopic::ShareName);
        }
        validate_text(name)?;
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SubscriptionFilter {
    /// Reads `{filter}` or `$share/{ShareName}/{filter}`.
    ///
    /// # Errors
    /// [`InvalidTopic::ShareName`] if what begins as a shared subscription is none; otherwise as
    /// [`TopicFilter::new`].
    pub fn parse(text: &str) -> Result<Self, InvalidTopic> {
        let Some(shared) = strip_share_prefix(text) else {
            return Ok(Self {
                share: None,
                filter: TopicFilter::new(text)?,
            });
        };
        let (name, filter) = shared.split_once('/').ok_or(InvalidTopic::ShareName)?;
        if filter.is_empty() {
            return Err(InvalidTopic::ShareName);
        }
        Ok(Self {
            share: Some(ShareName::new(name)?),
            filter: TopicFilter::new(filter)?,
        })
    }
}

/// What follows `$share/`, if `text` asks for a shared subscription at all.
pub(super) fn strip_share_prefix(text: &str) -> Option<&str> {
    let rest = text.strip_prefix("$share")?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_prefix('/')
    }
}

/// # Errors
/// [`InvalidTopic`] says which rule of section 4.7 is broken.
pub fn validate_topic_name(topic: &str) -> Result<(), InvalidTopic> {
    validate_text(topic)?;
    if has_wildcard(topic) {
        return Err(InvalidTopic::WildcardInName);
    }
    Ok(())
}

pub(super) fn has_wildcard(text: &str) -> bool {
    text.bytes().any(|byte| matches!(byte, b'#' | b'+'))
}

fn validate_text(text: &str) -> Result<(), InvalidTopic> {
    if text.is_empty() {
        Err(InvalidTopic::Empty)
    } else if text.len() > usize::from(u16::MAX) {
        Err(InvalidTopic::TooLong)
    } else if text.contains('\0') {
        Err(InvalidTopic::Null)
    } else {
        Ok(())
    }
}

macro_rules! text_newtype {
    ($name:ident) => {
        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

text_newtype!(TopicFilter);
text_newtype!(ShareName);

/// As a SUBSCRIBE names it: the text that [`SubscriptionFilter::parse`] reads.
impl fmt::Display for SubscriptionFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.share {
            Some(share) => write!(f, "$share/{share}/{}", self.filter),
            None => fmt::Display::fmt(&self.filter, f),
        }
    }
}

impl RetainHandling {
    /// `None` for 3, which is a Protocol Error.
    pub fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::SendAtSubscribe),
            1 => Some(Self::SendIfNew),
            2 => Some(Self::DoNotSend),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text).unwrap()
    }

    #[test]
    fn mqtt_4_7_1_1_the_multi_level_wildcard_stands_alone_and_last() {
        for text in ["#", "a/#", "/#", "+/#"] {
            assert!(TopicFilter::new(text).is_ok(), "{text}");
        }
        for text in ["a#", "#/a", "a/#/b", "a/b#", "##", "#/"] {
            assert_eq!(
                TopicFilter::new(text),
                Err(InvalidTopic::MultiLevelWildcard),
                "{text}"
            );
        }
    }

    #[test]
    fn mqtt_4_7_1_2_the_single_level_wildcard_fills_its_level() {
        for text in ["+", "+/+", "a/+/b", "/+", "+/"] {
            assert!(TopicFilter::new(text).is_ok(), "{text}");
        }
        for text in ["a+", "+a", "a/b+/c", "++"] {
            assert_eq!(
                TopicFilter::new(text),
                Err(InvalidTopic::SingleLevelWildcard),
                "{text}"
            );
        }
    }

    #[test]
    fn mqtt_4_7_2_1_a_leading_wildcard_matches_no_dollar_topics() {
        assert!(!filter("#").matches("$SYS/uptime"));
        assert!(!filter("+/uptime").matches("$SYS/uptime"));
        assert!(filter("$SYS/#").matches("$SYS/uptime"));
        assert!(filter("$SYS/+").matches("$SYS/uptime"));
        assert!(filter("a/#").matches("a/$b"));
    }

    #[test]
    fn mqtt_4_7_3_names_and_filters_are_texts_of_1_to_65535_bytes_without_null() {
        let longest = "x".repeat(65_535);
        let too_long = "x".repeat(65_536);
        for (text, expected) in [
            ("", Err(InvalidTopic::Empty)),
            ("a\0b", Err(InvalidTopic::Null)),
            (&too_long, Err(InvalidTopic::TooLong)),
            (&longest, Ok(())),
            ("/", Ok(())),
            (" ", Ok(())),
        ] {
            assert_eq!(validate_topic_name(text), expected);
            assert_eq!(TopicFilter::new(text).map(|_| ()), expected);
        }
    }

    #[test]
    fn mqtt_3_3_2_2_names_have_no_wildcards() {
        for text in ["#", "a/+", "a+b"] {
            assert_eq!(validate_topic_name(text), Err(InvalidTopic::WildcardInName));
        }
    }

    #[test]
    fn mqtt_4_7_3_4_levels_are_compared_one_by_one() {
        for (text, topic, expected) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            (
                "sport/tennis/player1/#",
                "sport/tennis/player1/score/wimbledon",
                true,
            ),
            ("sport/#", "sport", true),
            ("sport/#", "sports", false),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "/", true),
            ("a", "A", false),
            ("a/b", "a", false),
            ("a", "a/b", false),
            ("+/b/#", "a/b", true),
        ] {
            assert_eq!(filter(text).matches(topic), expected, "{text} {topic}");
        }
    }

    #[test]
    fn mqtt_4_8_2_1_shared_subscriptions_have_a_name_and_a_filter() {
        for text in [
            "$share",
            "$share/",
            "$share/g",
            "$share/g/",
            "$share//t",
            "$share/g+/t",
            "$share/#/t",
        ] {
            assert_eq!(
                SubscriptionFilter::parse(text),
                Err(InvalidTopic::ShareName),
                "{text}"
            );
        }
        assert_eq!(
            SubscriptionFilter::parse("$share/g/a/#/b"),
            Err(InvalidTopic::MultiLevelWildcard)
        );
        assert_eq!(SubscriptionFilter::parse("$shared").unwrap().share, None);
    }

    #[test]
    fn a_subscription_filter_is_shown_as_it_was_written() {
        for text in ["a/+", "$share/group/a/#", "$share/g//t", "$SYS/#"] {
            assert_eq!(SubscriptionFilter::parse(text).unwrap().to_string(), text);
        }
        let shared = SubscriptionFilter::parse("$share/group/a/#").unwrap();
        assert_eq!(shared.share.unwrap().as_str(), "group");
        assert_eq!(shared.filter.as_str(), "a/#");
    }
}
