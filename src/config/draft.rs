//! The configuration in the making: assignments are carried out one after the other, and every value
//! remembers where it is from.

use std::collections::BTreeMap;

use super::listener::{ListenerDraft, TlsDraft};
use super::nearest::nearest;
use super::problem::{Origin, Problem};
use super::sources::{Assignment, PREFIX, SEPARATOR};
use super::value::{Section, Value};
use super::{Auth, Bus, Config, Drain, Http, Limits, Log, Node, Reload, Session, Store, Sys};

/// A [`Config`] in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    pub(super) node: Node,
    pub(super) store: Store,
    pub(super) bus: Bus,
    listeners: BTreeMap<String, (ListenerDraft, TlsDraft)>,
    pub(super) auth: Auth,
    pub(super) limits: Limits,
    pub(super) session: Session,
    pub(super) http: Http,
    pub(super) log: Log,
    sys: Sys,
    reload: Reload,
    drain: Drain,
    /// By dotted key; absent for defaults.
    origins: BTreeMap<String, Origin>,
}

pub(super) const LISTENERS: &str = "listeners";

impl Draft {
    /// In the order in which they are shown; the listeners follow.
    pub(super) fn sections(&self) -> [(&'static str, &dyn Section); 11] {
        [
            ("node", &self.node),
            ("store", &self.store),
            ("bus", &self.bus),
            ("auth", &self.auth),
            ("limits", &self.limits),
            ("session", &self.session),
            ("http", &self.http),
            ("log", &self.log),
            ("sys", &self.sys),
            ("reload", &self.reload),
            ("drain", &self.drain),
        ]
    }

    fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section> {
        Some(match name {
            "node" => &mut self.node,
            "store" => &mut self.store,
            "bus" => &mut self.bus,
            "auth" => &mut self.auth,
            "limits" => &mut self.limits,
            "session" => &mut self.session,
            "http" => &mut self.http,
            "log" => &mut self.log,
            "sys" => &mut self.sys,
            "reload" => &mut self.reload,
            "drain" => &mut self.drain,
            _ => return None,
        })
    }

    pub(super) fn assign(&mut self, assignment: Assignment) -> Result<(), Problem> {
        let Assignment {
            path,
            value,
            key,
            origin,
        } = assignment;
        let parts: Vec<&str> = path.iter().map(String::as_str).collect();
        let outcome = match parts.as_slice() {
            [LISTENERS, name, rest @ ..] => {
                if !is_listener_name(name) {
                    let what = "the name of a listener is made of a-z, 0-9, `-` and `_`";
                    return Err(Problem::new(key, what));
                }
                let (listener, tls) = self.listeners.entry((*name).to_owned()).or_default();
                match rest {
                    [] | ["tls"] if value == Value::Table => Some(Ok(())),
                    ["tls", key] => tls.set(key, &value),
                    [key] => listener.set(key, &value),
                    _ => None,
                }
            }
            [LISTENERS] if value == Value::Table => Some(Ok(())),
            [section] if value == Value::Table => self.section_mut(section).map(|_| Ok(())),
            [section, key] => self
                .section_mut(section)
                .and_then(|section| section.set(key, &value)),
            _ => None,
        };

        let dotted = path.join(".");
        match outcome {
            Some(Ok(())) => {
                self.origins.insert(dotted, origin);
                Ok(())
            }
            Some(Err(unfit)) => {
                let what = format!("{dotted} should be {}, and not {value}", unfit.expected);
                Err(Problem::new(origin, what))
            }
            None => Err(self.unknown(&path, key)),
        }
    }

    fn unknown(&self, path: &[String], key: Origin) -> Problem {
        let dotted = path.join(".");
        let known = self.known_keys(path);
        let is_section = known
            .iter()
            .any(|key| key.starts_with(&format!("{dotted}.")));
        if is_section {
            return Problem::new(
                key,
                format!("{dotted} is a table of settings, not a setting"),
            );
        }
        let meant = match path {
            // As others call it, and too short to be a misspelling.
            [section, name, key] if section == LISTENERS && ["port", "host"].contains(&&**key) => {
                Some(format!("{LISTENERS}.{name}.bind"))
            }
            _ => nearest(&dotted, known),
        };
        match (&key, meant) {
            (Origin::Environment(_), Some(meant)) => {
                let variable = format!("{PREFIX}{}", meant.replace('.', SEPARATOR).to_uppercase());
                Problem::new(key, format!("no such setting; did you mean {variable}?"))
            }
            (_, Some(meant)) => Problem::new(
                key,
                format!("no such setting: {dotted}; did you mean `{meant}`?"),
            ),
            (_, None) => Problem::new(key, format!("no such setting: {dotted}")),
        }
    }

    /// All that could stand where `path` does: keys, and sections for what is a section itself.
    fn known_keys(&self, path: &[String]) -> Vec<String> {
        let listener = match path {
            [section, name, ..] if section == LISTENERS => name.as_str(),
            _ => "tcp",
        };
        let listener = format!("{LISTENERS}.{listener}");
        let (listener_keys, tls_keys) =
            (ListenerDraft::default().keys(), TlsDraft::default().keys());
        let sections = self.sections();
        let mut known: Vec<String> = sections
            .iter()
            .flat_map(|(name, section)| {
                section
                    .keys()
                    .iter()
                    .map(move |key| format!("{name}.{key}"))
            })
            .chain(listener_keys.iter().map(|key| format!("{listener}.{key}")))
            .chain(tls_keys.iter().map(|key| format!("{listener}.tls.{key}")))
            .collect();
        // A misspelt section with a key that is right: [limit] connections_max.
        if let [section, rest @ ..] = path
            && section != LISTENERS
            && self.sections().iter().all(|(name, _)| name != section)
            && !rest.is_empty()
        {
            let suffix = format!(".{}", rest.join("."));
            if known.iter().any(|key| key.ends_with(&suffix)) {
                known.retain(|key| key.ends_with(&suffix));
            }
        }
        known
    }

    pub(super) fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Fills in what depends on other settings and checks what one setting alone cannot say.
    pub(super) fn complete(&mut self, problems: &mut Vec<Problem>) -> Option<Config> {
        if self.listeners.is_empty() {
            self.listeners.insert("tcp".to_owned(), Default::default());
        }
        let mut listeners = BTreeMap::new();
        let mut faults = Vec::new();
        for (name, (listener, tls)) in &mut self.listeners {
            match listener.complete(name, tls) {
                Ok(listener) => {
                    listeners.insert(name.clone(), listener);
                }
                Err(wrong) => faults.extend(wrong.into_iter().map(|fault| (name.clone(), fault))),
            }
        }
        for (name, (key, reason)) in faults {
            let key = format!("{LISTENERS}.{name}.{key}");
            problems.push(Problem::new(
                self.origin_of_any(&key),
                format!("{key} {reason}"),
            ));
        }
        self.check(&listeners, problems);
        Some(Config {
            node: self.node.clone(),
            store: self.store.clone(),
            bus: self.bus.clone(),
            listeners,
            auth: self.auth.clone(),
            limits: self.limits.clone(),
            session: self.session.clone(),
            http: self.http.clone(),
            log: self.log.clone(),
            sys: self.sys.clone(),
            reload: self.reload.clone(),
            drain: self.drain.clone(),
        })
    }

    /// Where the key is set, or else a neighbour that made it necessary.
    pub(super) fn origin_of_any(&self, key: &str) -> Origin {
        let parents = std::iter::successors(Some(key), |key| {
            key.rsplit_once('.').map(|(parent, _)| parent)
        });
        // Up to the name of the listener, and no further: the others are not to blame.
        let related = parents
            .take_while(|key| key.contains('.'))
            .find_map(|parent| {
                let is_below = |key: &str| {
                    key.strip_prefix(parent)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                };
                self.origins.iter().find(|(key, _)| is_below(key))
            });
        related.map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    pub(super) fn values(&self) -> BTreeMap<String, String> {
        let mut values = BTreeMap::new();
        let mut add = |name: &str, section: &dyn Section| {
            let settings = section.show().into_iter();
            values.extend(
                settings.filter_map(|(key, value)| Some((format!("{name}.{key}"), value?))),
            );
        };
        for (name, section) in self.sections() {
            add(name, section);
        }
        for (name, (listener, tls)) in &self.listeners {
            add(&format!("{LISTENERS}.{name}"), listener);
            add(&format!("{LISTENERS}.{name}.tls"), tls);
        }
        values
    }

    pub(super) fn to_toml(&self) -> String {
        let mut text = String::new();
        for (name, section) in self.sections() {
            self.show(name, section, &mut text);
        }
        for (name, (listener, tls)) in &self.listeners {
            self.show(&format!("{LISTENERS}.{name}"), listener, &mut text);
            if *tls != TlsDraft::default() {
                self.show(&format!("{LISTENERS}.{name}.tls"), tls, &mut text);
            }
        }
        text
    }

    fn show(&self, name: &str, section: &dyn Section, text: &mut String) {
        let separator = if text.is_empty() { "" } else { "\n" };
        let mut lines = format!("{separator}[{name}]\n");
        for (key, value) in section.show() {
            let Some(value) = value else {
                // Of listeners many keys are for other kinds.
                if !name.starts_with(LISTENERS) {
                    lines.push_str(&format!("# {key} is not set\n"));
                }
                continue;
            };
            let line = match self.origins.get(&format!("{name}.{key}")) {
                Some(origin) => format!("{key} = {value}  # {origin}\n"),
                None => format!("{key} = {value}\n"),
            };
            lines.push_str(&line);
        }
        text.push_str(&lines);
    }
}

fn is_listener_name(name: &str) -> bool {
    let allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
}
