//! The Topic Filters of rules, in which `%c` stands for the Client Identifier and `%u` for the
//! user name: `sensors/%c/#`.

use super::Identity;

/// A Topic Filter that is different for each client.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    text: Box<str>,
    names_client: bool,
    names_user: bool,
}

/// Why a text is no [`Pattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum InvalidPattern {
    #[error("an empty topic filter")]
    Empty,
    #[error("`#` must stand alone in the last level")]
    MultiLevelWildcard,
    #[error("`+` must stand alone in its level")]
    SingleLevelWildcard,
}

const CLIENT_ID: &str = "%c";
const USER_NAME: &str = "%u";

impl Pattern {
    pub(super) fn new(text: &str) -> Result<Self, InvalidPattern> {
        if text.is_empty() {
            return Err(InvalidPattern::Empty);
        }
        let mut levels = text.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(InvalidPattern::MultiLevelWildcard);
            }
            if level.contains('+') && level != "+" {
                return Err(InvalidPattern::SingleLevelWildcard);
            }
        }
        Ok(Self {
            text: text.into(),
            names_client: text.contains(CLIENT_ID),
            names_user: text.contains(USER_NAME),
        })
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether what it names of the client can stand in a filter without changing the filter's
    /// meaning: a Client Identifier `+` would turn `sensors/%c/set` into everybody's.
    pub(super) fn is_usable_for(&self, identity: &Identity) -> bool {
        let harmless = |value: &str| !value.contains(['/', '+', '#']) && !value.starts_with('$');
        (!self.names_client || harmless(&identity.client_id))
            && (!self.names_user || identity.user_name.as_deref().is_some_and(harmless))
    }

    /// Whether every topic that `filter` matches is matched too, section 4.7; a Topic Name is a
    /// filter without wildcards. Only if usable for the client.
    pub(super) fn covers(&self, filter: &str, identity: &Identity) -> bool {
        // [MQTT-4.7.2-1]
        if filter.starts_with('$') && self.text.starts_with(['+', '#']) {
            return false;
        }
        let mut wanted = filter.split('/');
        for level in self.text.split('/') {
            // Also what has no more levels: `a/#` matches `a`.
            if level == "#" {
                return true;
            }
            let covered = match wanted.next() {
                None | Some("#") => false,
                Some(_) if level == "+" => true,
                Some(wanted) => level_equals(level, wanted, identity),
            };
            if !covered {
                return false;
            }
        }
        wanted.next().is_none()
    }
}

/// Compares a level with `pattern` without writing the substituted text down.
fn level_equals(mut pattern: &str, mut level: &str, identity: &Identity) -> bool {
    while let Some(at) = pattern.find('%') {
        let (literal, rest) = pattern.split_at(at);
        let (value, rest) = if let Some(rest) = rest.strip_prefix(CLIENT_ID) {
            (&*identity.client_id, rest)
        } else if let Some(rest) = rest.strip_prefix(USER_NAME) {
            (identity.user_name.as_deref().unwrap_or_default(), rest)
        } else {
            rest.split_at(1)
        };
        let Some(remaining) = level
            .strip_prefix(literal)
            .and_then(|level| level.strip_prefix(value))
        else {
            return false;
        };
        (pattern, level) = (rest, remaining);
    }
    pattern == level
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(client_id: &str, user_name: Option<&str>) -> Identity {
        Identity {
            client_id: client_id.into(),
            user_name: user_name.map(Into::into),
        }
    }

    #[track_caller]
    fn covers(pattern: &str, filter: &str) -> bool {
        Pattern::new(pattern)
            .unwrap()
            .covers(filter, &identity("c1", Some("ann")))
    }

    #[test]
    fn a_pattern_matches_topics_like_a_topic_filter() {
        for (pattern, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/B", false),
            ("a/b", "a", false),
            ("a", "a/b", false),
            ("a/+", "a/b", true),
            ("a/+", "a/", true),
            ("a/+", "a", false),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("#", "a", true),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
            ("/+", "/a", true),
        ] {
            assert_eq!(covers(pattern, topic), expected, "{pattern} and {topic}");
        }
    }

    #[test]
    fn a_pattern_covers_the_filters_that_ask_for_no_more() {
        for (pattern, filter, expected) in [
            ("a/#", "a/+/b", true),
            ("a/#", "a/#", true),
            ("a/#", "a/b/#", true),
            ("a/#", "+/b", false),
            ("a/+", "a/+", true),
            ("a/+", "a/#", false),
            ("a/b", "a/+", false),
            ("+/+", "+/a", true),
            ("#", "#", true),
            ("#", "+/#", true),
            ("#", "$SYS/#", false),
            ("+/#", "a/b", true),
            ("a/b/#", "a/#", false),
        ] {
            assert_eq!(covers(pattern, filter), expected, "{pattern} and {filter}");
        }
    }

    #[test]
    fn names_stand_for_a_level_or_a_part_of_one() {
        for (pattern, topic, expected) in [
            ("sensors/%c/#", "sensors/c1/t", true),
            ("sensors/%c/#", "sensors/c2/t", false),
            ("sensors/dev-%c", "sensors/dev-c1", true),
            ("sensors/dev-%c", "sensors/dev-c11", false),
            ("%u-%c", "ann-c1", true),
            ("%c%u/x", "c1ann/x", true),
            ("100%/x", "100%/x", true),
            ("%x/%c", "%x/c1", true),
            ("%u/#", "%u/x", false),
        ] {
            assert_eq!(covers(pattern, topic), expected, "{pattern} and {topic}");
        }
    }

    #[test]
    fn names_that_would_change_the_filter_are_not_used() {
        let pattern = Pattern::new("sensors/%c/%u").unwrap();

        assert!(pattern.is_usable_for(&identity("c1", Some("ann"))));
        for (client_id, user_name) in [
            ("a/b", "ann"),
            ("+", "ann"),
            ("#", "ann"),
            ("c1", "+"),
            ("c1", "a/#"),
            ("$SYS", "ann"),
        ] {
            assert!(
                !pattern.is_usable_for(&identity(client_id, Some(user_name))),
                "{client_id} {user_name}"
            );
        }
        assert!(!pattern.is_usable_for(&identity("c1", None)));
        assert!(
            Pattern::new("a/+")
                .unwrap()
                .is_usable_for(&identity("#", None))
        );
    }

    #[test]
    fn patterns_obey_the_rules_of_topic_filters() {
        for (text, error) in [
            ("", InvalidPattern::Empty),
            ("a/#/b", InvalidPattern::MultiLevelWildcard),
            ("a#", InvalidPattern::MultiLevelWildcard),
            ("a/b+", InvalidPattern::SingleLevelWildcard),
            ("%c+", InvalidPattern::SingleLevelWildcard),
        ] {
            assert_eq!(Pattern::new(text).unwrap_err(), error, "{text}");
        }
    }
}
