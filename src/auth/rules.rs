//! What one user may do: filters that allow and filters that deny, for each direction.

use std::sync::{Arc, LazyLock};

use super::pattern::Pattern;
use super::{Identity, Request, Verdict};

/// The rules of one user. Without any, everything is allowed but what belongs to the broker.
#[derive(Clone, Debug, Default)]
pub(super) struct Rules {
    pub(super) publish: Permissions,
    pub(super) subscribe: Permissions,
}

/// A filter that denies wins over those that allow.
#[derive(Clone, Debug, Default)]
pub(super) struct Permissions {
    /// Absent: all that is not denied.
    pub(super) allow: Option<AllowList>,
    pub(super) deny: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub(super) struct AllowList {
    pub(super) patterns: Vec<Pattern>,
    /// What the log calls the list that does not have it.
    pub(super) name: Arc<str>,
}

/// A filter, and what the log calls it.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) pattern: Pattern,
    pub(super) name: Arc<str>,
}

impl Rules {
    pub(super) fn judge(&self, identity: &Identity, request: Request<'_>) -> Verdict {
        match request {
            Request::Publish { topic, .. } => self.judge_publish(identity, topic),
            // Both directions of one permission: a filter is refused if all of it is denied; of
            // one that is denied in part, the denied messages are withheld one by one.
            Request::Subscribe { filter } => self.subscribe.judge(identity, filter),
            Request::Receive { topic } => match self.subscribe.denial(identity, topic) {
                Some(rule) => Verdict::Deny { rule },
                None => Verdict::Allow,
            },
        }
    }

    fn judge_publish(&self, identity: &Identity, topic: &str) -> Verdict {
        if is_reserved(topic) {
            return deny(&RESERVED);
        }
        self.publish.judge(identity, topic)
    }
}

impl Permissions {
    fn judge(&self, identity: &Identity, filter: &str) -> Verdict {
        if let Some(rule) = self.denial(identity, filter) {
            return Verdict::Deny { rule };
        }
        match &self.allow {
            Some(list) if !list.covers(identity, filter) => deny(&list.name),
            _ => Verdict::Allow,
        }
    }

    fn denial(&self, identity: &Identity, filter: &str) -> Option<Arc<str>> {
        let denying = self.deny.iter().find(|rule| {
            // What cannot be said of this client must not become harmless by that.
            !rule.pattern.is_usable_for(identity) || rule.pattern.covers(filter, identity)
        });
        denying.map(|rule| Arc::clone(&rule.name))
    }
}

impl AllowList {
    fn covers(&self, identity: &Identity, filter: &str) -> bool {
        let covers =
            |pattern: &Pattern| pattern.is_usable_for(identity) && pattern.covers(filter, identity);
        self.patterns.iter().any(covers)
    }
}

static RESERVED: LazyLock<Arc<str>> = LazyLock::new(|| "only the broker publishes to $SYS".into());

fn is_reserved(topic: &str) -> bool {
    topic
        .strip_prefix("$SYS")
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn deny(rule: &Arc<str>) -> Verdict {
    Verdict::Deny {
        rule: Arc::clone(rule),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::QoS;

    fn permissions(allow: Option<&[&str]>, deny: &[&str]) -> Permissions {
        let pattern = |text: &&str| Pattern::new(text).unwrap();
        Permissions {
            allow: allow.map(|texts| AllowList {
                patterns: texts.iter().map(pattern).collect(),
                name: "allow".into(),
            }),
            deny: deny
                .iter()
                .map(|text| Rule {
                    pattern: pattern(text),
                    name: format!("deny {text}").into(),
                })
                .collect(),
        }
    }

    fn publishing(allow: Option<&[&str]>, deny: &[&str]) -> Rules {
        Rules {
            publish: permissions(allow, deny),
            ..Rules::default()
        }
    }

    fn subscribing(allow: Option<&[&str]>, deny: &[&str]) -> Rules {
        Rules {
            subscribe: permissions(allow, deny),
            ..Rules::default()
        }
    }

    fn client(client_id: &str) -> Identity {
        Identity {
            client_id: client_id.into(),
            user_name: Some("ann".into()),
        }
    }

    fn may_publish(rules: &Rules, client_id: &str, topic: &str) -> bool {
        let request = Request::Publish {
            topic,
            qos: QoS::AtMostOnce,
            retain: false,
        };
        rules.judge(&client(client_id), request) == Verdict::Allow
    }

    fn may_subscribe(rules: &Rules, filter: &str) -> bool {
        rules.judge(&client("c"), Request::Subscribe { filter }) == Verdict::Allow
    }

    fn may_receive(rules: &Rules, topic: &str) -> bool {
        rules.judge(&client("c"), Request::Receive { topic }) == Verdict::Allow
    }

    #[test]
    fn without_rules_all_but_the_topics_of_the_broker_is_allowed() {
        let rules = Rules::default();

        assert!(may_publish(&rules, "c", "a/b"));
        assert!(may_subscribe(&rules, "#"));
        assert!(may_subscribe(&rules, "$SYS/#"));
        assert!(may_publish(&rules, "c", "$internal"));
        for topic in ["$SYS", "$SYS/broker/uptime"] {
            assert!(!may_publish(&rules, "c", topic), "{topic}");
        }
    }

    #[test]
    fn with_an_allow_list_topics_with_a_dollar_need_a_rule_and_sys_stays_closed() {
        let rules = publishing(Some(&["#", "$aws/#", "$SYS/#"]), &[]);

        assert!(may_publish(&rules, "c", "$aws/things"));
        assert!(!may_publish(&rules, "c", "$other"));
        assert!(!may_publish(&rules, "c", "$SYS/x"));
    }

    #[test]
    fn a_list_of_what_is_allowed_denies_the_rest_and_deny_wins() {
        let rules = publishing(Some(&["a/#"]), &["a/secret/#"]);

        assert!(may_publish(&rules, "c", "a/b"));
        assert!(!may_publish(&rules, "c", "b"));
        assert!(!may_publish(&rules, "c", "a/secret/x"));
        assert!(!may_publish(&publishing(Some(&[]), &[]), "c", "a"));
    }

    #[test]
    fn a_denial_names_its_rule() {
        let rules = publishing(None, &["secret/#"]);
        let request = Request::Publish {
            topic: "secret/x",
            qos: QoS::AtMostOnce,
            retain: false,
        };

        assert_eq!(
            rules.judge(&client("c"), request),
            Verdict::Deny {
                rule: "deny secret/#".into()
            }
        );
    }

    #[test]
    fn wildcards_in_a_client_id_neither_widen_an_allow_nor_escape_a_deny() {
        let allowing = publishing(Some(&["sensors/%c/#"]), &[]);
        let denying = publishing(None, &["private/%c"]);

        assert!(may_publish(&allowing, "c", "sensors/c/t"));
        assert!(!may_publish(&allowing, "+", "sensors/c/t"));
        assert!(!may_publish(&allowing, "c/t", "sensors/c/t/x"));
        assert!(may_publish(&denying, "c", "a"));
        assert!(!may_publish(&denying, "x/y", "private/x/y"));
    }

    #[test]
    fn a_filter_must_be_allowed_whole() {
        let rules = subscribing(Some(&["a/#"]), &[]);

        assert!(may_subscribe(&rules, "a/+/b"));
        assert!(!may_subscribe(&rules, "+/b"));
        assert!(!may_subscribe(&rules, "#"));
    }

    #[test]
    fn of_a_filter_that_is_denied_in_part_only_those_messages_are_withheld() {
        let rules = subscribing(None, &["a/secret/#"]);

        assert!(may_subscribe(&rules, "a/#"));
        assert!(!may_subscribe(&rules, "a/secret/+"));
        assert!(may_receive(&rules, "a/b"));
        assert!(!may_receive(&rules, "a/secret/x"));
    }
}
