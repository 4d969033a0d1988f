//! Brings the sources together: each becomes a list of assignments, and those are carried out in
//! the order of their weight. So every error knows whom to blame, and every value where it is from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::listener::{ListenerDraft, TlsDraft};
use super::nearest::nearest;
use super::problem::{Origin, Problem, SourceFile};
use super::value::{Section, Value};
use super::{
    Auth, Bus, BusKind, ByteSize, Config, ConfigError, Drain, Http, Limits, Listener, Log, Node,
    Reload, Session, Store, StoreKind, Sys,
};
use crate::mqtt::topic::validate_topic_name;

/// Where settings come from; the later ones outweigh the earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub file: Option<PathBuf>,
    /// Variables of the environment; only `MIDGE_…` ones count.
    pub environment: Vec<(String, String)>,
    /// `--set` arguments: dotted keys and values.
    pub set: Vec<(String, String)>,
}

/// Enough to tell the settings of nodes apart; nobody tries to make two alike.
const FINGERPRINT_BYTES: usize = 4;

/// The variable that names the file.
const FILE_VARIABLE: &str = "MIDGE_CONFIG";
const PREFIX: &str = "MIDGE_";
/// Variables of our own tests and of `midge ctl`, which are no settings.
const OTHER_PREFIXES: [&str; 2] = ["MIDGE_TEST_", "MIDGE_CTL_"];
/// Separates the parts of a key in a variable; in `--set` and in the file it is a dot.
const SEPARATOR: &str = "__";

impl Sources {
    /// With the environment of this process, which may name the file too.
    pub fn from_process(file: Option<PathBuf>, set: Vec<(String, String)>) -> Self {
        let lossy = |text: OsString| text.to_string_lossy().into_owned();
        Self {
            file: file.or_else(|| std::env::var_os(FILE_VARIABLE).map(PathBuf::from)),
            environment: std::env::vars_os()
                .map(|(name, value)| (lossy(name), lossy(value)))
                .collect(),
            set,
        }
    }
}

/// A [`Config`] that remembers where its values come from.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    sources: Sources,
    draft: Draft,
}

impl Loaded {
    /// # Errors
    /// Every problem that was found, not just the first.
    pub fn new(sources: &Sources) -> Result<Self, ConfigError> {
        let mut draft = Draft::default();
        let assignments = sources
            .read()
            .map_err(|problem| ConfigError(vec![problem]))?;
        let mut problems: Vec<Problem> = assignments
            .into_iter()
            .filter_map(|assignment| draft.assign(assignment).err())
            .collect();
        // What a wrong value leads to would only be noise.
        if problems.is_empty() {
            match draft.complete(&mut problems) {
                Some(config) if problems.is_empty() => {
                    let sources = sources.clone();
                    return Ok(Self {
                        config,
                        sources,
                        draft,
                    });
                }
                _ => {}
            }
        }
        Err(ConfigError(problems))
    }

    /// All that is in effect, as a file that would set the same, passwords apart; what is not a
    /// default says where it comes from.
    pub fn to_toml(&self) -> String {
        self.draft.to_toml()
    }

    /// A few digits that nodes with the same settings have in common: of a hash of all that is in effect
    /// but passwords, the name and zone of the node, and its addresses.
    pub(crate) fn fingerprint(values: &BTreeMap<String, String>) -> String {
        let is_own = |key: &str| {
            key == "node.name"
                || key == "node.zone"
                || key == "http.bind"
                || (key.starts_with("listeners.") && key.ends_with(".bind"))
        };
        let mut hash = digest::Context::new(&digest::SHA256);
        for (key, value) in values.iter().filter(|(key, _)| !is_own(key)) {
            hash.update(format!("{key} = {value}\n").as_bytes());
        }
        let hash = hash.finish();
        let digits = hash.as_ref().iter().take(FINGERPRINT_BYTES);
        digits.map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Every setting by its dotted key, as it would be written in a file; not those without a
    /// value.
    pub(crate) fn values(&self) -> BTreeMap<String, String> {
        self.draft.values()
    }

    /// Reports a file that a setting names and that is of no use.
    pub(crate) fn blame(&self, key: &str, what: impl Into<String>) -> Problem {
        Problem::new(self.draft.origin(key), what)
    }
}

/// One setting, from one source.
struct Assignment {
    path: Vec<String>,
    value: Value,
    /// Where the key is written, for errors about the key.
    key: Origin,
    /// Where the value is written, for errors about the value.
    origin: Origin,
}

impl Sources {
    fn read(&self) -> Result<Vec<Assignment>, Problem> {
        let mut assignments = self
            .file
            .as_ref()
            .map_or_else(|| Ok(Vec::new()), read_file)?;
        let variables = self.environment.iter().filter(|(name, _)| is_setting(name));
        assignments.extend(variables.map(|(name, value)| {
            let key = name[PREFIX.len()..].to_lowercase();
            untyped(
                key.split(SEPARATOR),
                value,
                Origin::Environment(name.clone()),
            )
        }));
        let arguments = self.set.iter();
        assignments.extend(
            arguments.map(|(key, value)| {
                untyped(key.split('.'), value, Origin::CommandLine(key.clone()))
            }),
        );
        Ok(assignments)
    }
}

fn untyped<'a>(path: impl Iterator<Item = &'a str>, value: &str, origin: Origin) -> Assignment {
    Assignment {
        path: path.map(str::to_owned).collect(),
        value: Value::Untyped(value.to_owned()),
        key: origin.clone(),
        origin,
    }
}

fn is_setting(variable: &str) -> bool {
    variable.starts_with(PREFIX)
        && variable != FILE_VARIABLE
        && !OTHER_PREFIXES
            .iter()
            .any(|prefix| variable.starts_with(prefix))
        && !is_service_link(variable)
}

/// Kubernetes tells every container where the services are: a service that is called `midge`, or
/// `midge-metrics`, becomes `MIDGE_SERVICE_HOST`, `MIDGE_METRICS_PORT_9883_TCP_ADDR` and so on.
fn is_service_link(variable: &str) -> bool {
    // `LISTENERS__X__PORT` has two underscores together, the name of a service never has.
    if variable.contains(SEPARATOR) {
        return false;
    }
    let words: Vec<&str> = variable.split('_').collect();
    let is_port = |words: &[&str]| match words {
        [number, "TCP" | "UDP" | "SCTP", rest @ ..] => {
            number.bytes().all(|byte| byte.is_ascii_digit())
                && matches!(rest, [] | ["PROTO" | "PORT" | "ADDR"])
        }
        words => words.is_empty(),
    };
    words.ends_with(&["SERVICE", "HOST"])
        || words.windows(2).any(|pair| pair == ["SERVICE", "PORT"])
        || (0..words.len()).any(|at| words[at] == "PORT" && is_port(&words[at + 1..]))
}

fn read_file(path: &PathBuf) -> Result<Vec<Assignment>, Problem> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Problem::without_place(format!("cannot read {}: {error}", path.display()))
            .with_hint("`--config` or MIDGE_CONFIG names it; midge needs no file at all")
    })?;
    let file = Arc::new(SourceFile {
        path: path.clone(),
        text,
    });
    let at = |span| Origin::File {
        file: Arc::clone(&file),
        span,
    };
    let table = DeTable::parse(&file.text).map_err(|error| {
        let what = error.message().trim_end().replace('\n', ", ");
        Problem::new(at(error.span().unwrap_or_default()), what)
    })?;
    let mut assignments = Vec::new();
    flatten(table.get_ref(), &[], &at, &mut assignments);
    Ok(assignments)
}

fn flatten(
    table: &DeTable<'_>,
    parents: &[String],
    at: &impl Fn(std::ops::Range<usize>) -> Origin,
    assignments: &mut Vec<Assignment>,
) {
    // Tables are sorted by key; people read from the top.
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let mut path = parents.to_vec();
        path.push(key.get_ref().clone().into_owned());
        match value.get_ref() {
            // `[limits]` with nothing below sets nothing, but `[listeners.tcp]` names a listener.
            DeValue::Table(table) if !table.is_empty() => flatten(table, &path, at, assignments),
            other => assignments.push(Assignment {
                path,
                value: typed(other),
                key: at(key.span()),
                origin: at(value.span()),
            }),
        }
    }
}

fn typed(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.clone().into_owned()),
        DeValue::Integer(integer) => {
            let digits = i64::from_str_radix(integer.as_str(), integer.radix());
            digits.map_or_else(
                |_| Value::Other("a number that large".to_owned()),
                Value::Integer,
            )
        }
        DeValue::Boolean(boolean) => Value::Boolean(*boolean),
        DeValue::Array(values) => {
            Value::List(values.iter().map(Spanned::get_ref).map(typed).collect())
        }
        DeValue::Table(_) => Value::Table,
        DeValue::Float(_) | DeValue::Datetime(_) => Value::Other(format!("a {}", value.type_str())),
    }
}

/// A [`Config`] in the making.
#[derive(Clone, Debug, Default)]
struct Draft {
    node: Node,
    store: Store,
    bus: Bus,
    listeners: BTreeMap<String, (ListenerDraft, TlsDraft)>,
    auth: Auth,
    limits: Limits,
    session: Session,
    http: Http,
    log: Log,
    sys: Sys,
    reload: Reload,
    drain: Drain,
    /// By dotted key; absent for defaults.
    origins: BTreeMap<String, Origin>,
}

const LISTENERS: &str = "listeners";

impl Draft {
    /// In the order in which they are shown; the listeners follow.
    fn sections(&self) -> [(&'static str, &dyn Section); 11] {
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

    fn assign(&mut self, assignment: Assignment) -> Result<(), Problem> {
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

    fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Fills in what depends on other settings and checks what one setting alone cannot say.
    fn complete(&mut self, problems: &mut Vec<Problem>) -> Option<Config> {
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
        self.check_addresses(&listeners, problems);
        self.check_access(&listeners, problems);
        self.check_store(problems);
        self.check_bus(problems);
        self.check_ranges(problems);
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
    fn origin_of_any(&self, key: &str) -> Origin {
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

    fn check_addresses(&self, listeners: &BTreeMap<String, Listener>, problems: &mut Vec<Problem>) {
        let mut taken: BTreeMap<SocketAddr, &str> = BTreeMap::new();
        for (name, listener) in listeners {
            // Any number may ask the system for a free port.
            if listener.bind.port() == 0 {
                continue;
            }
            if let Some(other) = taken.insert(listener.bind, name) {
                let origin = self.origin_of_any(&format!("{LISTENERS}.{name}.bind"));
                let what = format!(
                    "listeners `{other}` and `{name}` both want {}",
                    listener.bind
                );
                problems.push(Problem::new(origin, what));
            }
        }
        if let (true, Some(name)) = (self.http.enabled, taken.get(&self.http.bind)) {
            let what = format!(
                "http and the listener `{name}` both want {}",
                self.http.bind
            );
            problems.push(Problem::new(self.origin("http.bind"), what));
        }
    }

    /// Nobody opens the broker to the world by leaving something out.
    fn check_access(&self, listeners: &BTreeMap<String, Listener>, problems: &mut Vec<Problem>) {
        let undecided = self.auth.is_undecided();
        for (name, listener) in listeners {
            if undecided && listener.is_exposed() {
                let origin = self.origin_of_any(&format!("{LISTENERS}.{name}.bind"));
                let what = format!(
                    "listener `{name}` can be reached from other machines ({}), and nothing says who may connect",
                    listener.bind
                );
                problems.push(Problem::new(origin, what).with_hint(
                    "either set auth.users_file to a file made with `midge user add --file users.toml NAME`, \
                     or let everybody in with auth.anonymous = true",
                ));
            }
        }
        let certificates = listeners.values().any(|listener| {
            listener
                .tls
                .as_ref()
                .is_some_and(|tls| tls.client_auth != super::ClientAuth::None)
        });
        if self.auth.anonymous == Some(false) && self.auth.users_file.is_none() && !certificates {
            let what =
                "auth.anonymous = false, but there is no auth.users_file: nobody could connect";
            problems.push(
                Problem::new(self.origin("auth.anonymous"), what)
                    .with_hint("make one with `midge user add --file users.toml NAME`"),
            );
        }
    }

    fn check_store(&self, problems: &mut Vec<Problem>) {
        let Store {
            kind,
            uri,
            uri_file,
            write_elision,
            ..
        } = &self.store;
        let mut report = |key: &str, what: &str, hint: &str| {
            problems.push(Problem::new(self.origin(key), what).with_hint(hint));
        };
        let given = [
            ("store.uri", uri.is_some()),
            ("store.uri_file", uri_file.is_some()),
        ];
        let mut given = given
            .into_iter()
            .filter_map(|(key, is_given)| is_given.then_some(key));
        match (kind, given.next(), given.next()) {
            (StoreKind::MongoDb, None, _) => report(
                "store.kind",
                "store.kind = \"mongodb\", but nothing says where MongoDB is",
                "set store.uri, such as \"mongodb://db1,db2,db3/?replicaSet=rs0\", \
                 or store.uri_file to a file that holds it",
            ),
            (StoreKind::MongoDb, Some(_), Some(_)) => report(
                "store.uri_file",
                "store.uri and store.uri_file are both set",
                "take one of them out",
            ),
            (StoreKind::Embedded | StoreKind::Memory, Some(key), _) => report(
                key,
                &format!(
                    "{key} has no effect with store.kind = \"{}\"",
                    kind.as_str()
                ),
                "set store.kind = \"mongodb\", or take it out",
            ),
            (StoreKind::MongoDb, Some(_), None)
            | (StoreKind::Embedded | StoreKind::Memory, None, _) => {}
        }
        if *write_elision && *kind != StoreKind::MongoDb {
            report(
                "store.write_elision",
                &format!(
                    "store.write_elision has no effect with store.kind = \"{}\"",
                    kind.as_str()
                ),
                "set store.kind = \"mongodb\", or take it out",
            );
        }
    }

    fn check_bus(&self, problems: &mut Vec<Problem>) {
        let Bus {
            kind,
            url,
            url_file,
        } = &self.bus;
        let mut report = |key: &str, what: &str, hint: &str| {
            problems.push(Problem::new(self.origin(key), what).with_hint(hint));
        };
        let is_shared = self.store.kind == StoreKind::MongoDb;
        match kind {
            Some(BusKind::Redis | BusKind::MongoDb) if !is_shared => {
                return report(
                    "bus.kind",
                    &format!(
                        "store.kind = \"{}\" is for one node alone, and a bus is between several",
                        self.store.kind.as_str()
                    ),
                    "set store.kind = \"mongodb\", or take bus.kind out",
                );
            }
            Some(BusKind::None) if is_shared => {
                return report(
                    "bus.kind",
                    "store.kind = \"mongodb\" is for several nodes, and they need a bus",
                    "set bus.kind = \"redis\" or \"mongodb\", or take it out",
                );
            }
            Some(_) | None => {}
        }
        let is_redis = *kind == Some(BusKind::Redis);
        match (is_redis, url, url_file) {
            (true, None, None) => report(
                "bus.kind",
                "bus.kind = \"redis\", but nothing says where Redis is",
                "set bus.url, such as \"redis://cache:6379\", or bus.url_file to a file that \
                 holds it",
            ),
            (true, Some(_), Some(_)) => report(
                "bus.url_file",
                "bus.url and bus.url_file are both set",
                "take one of them out",
            ),
            (false, Some(_), _) => report(
                "bus.url",
                "bus.url has no effect without bus.kind = \"redis\"",
                "set bus.kind = \"redis\", or take it out",
            ),
            (false, None, Some(_)) => report(
                "bus.url_file",
                "bus.url_file has no effect without bus.kind = \"redis\"",
                "set bus.kind = \"redis\", or take it out",
            ),
            (true, Some(_), None) | (true, None, Some(_)) | (false, None, None) => {}
        }
    }

    fn check_ranges(&self, problems: &mut Vec<Problem>) {
        let Self {
            limits,
            session,
            log,
            node,
            store,
            ..
        } = self;
        let mut check = |key: &str, fits: bool, should: &str| {
            if !fits {
                problems.push(Problem::new(
                    self.origin(key),
                    format!("{key} should be {should}"),
                ));
            }
        };
        let within = |size: ByteSize, range: RangeInclusive<usize>| range.contains(&size.get());
        let seconds = |duration: Option<Duration>, range: RangeInclusive<u64>| {
            duration.is_none_or(|duration| range.contains(&duration.as_secs()))
        };

        let name_fits = node.name.len() <= 255
            && !node
                .name
                .contains(|c: char| c.is_control() || "/+#".contains(c));
        check(
            "node.name",
            name_fits,
            "at most 255 bytes, without `/`, `+` and `#`",
        );
        let zone_fits = |zone: &String| zone.len() <= 255 && !zone.contains(char::is_control);
        check(
            "node.zone",
            node.zone.iter().all(zone_fits),
            "at most 255 bytes",
        );
        let database_fits = store.database.len() <= 63
            && !store
                .database
                .contains(|c: char| c.is_control() || "/\\. \"$".contains(c))
            && !["admin", "config", "local"].contains(&store.database.as_str());
        check(
            "store.database",
            database_fits,
            "at most 63 bytes, without space, `/`, `\\`, `.`, `\"` and `$`, and none of MongoDB's own",
        );
        let prefix = session.response_prefix.as_deref();
        check(
            "session.response_prefix",
            prefix.is_none_or(|prefix| validate_topic_name(prefix).is_ok()),
            "the beginning of a topic name, without wildcards",
        );
        check(
            "limits.connect_timeout",
            !limits.connect_timeout.is_zero(),
            "longer than nothing",
        );
        // The largest Remaining Length, section 2.1.4; below 128 not even a CONNECT fits.
        let packet_fits = within(limits.packet_bytes_max, 128..=268_435_455);
        check(
            "limits.packet_bytes_max",
            packet_fits,
            "from 128 to 268435455 bytes",
        );
        // A document of MongoDB has 16 MiB, and holds a message with what belongs to it.
        let document_fits = within(limits.packet_bytes_max, 0..=15 * 1024 * 1024);
        check(
            "limits.packet_bytes_max",
            self.store.kind != StoreKind::MongoDb || document_fits,
            "at most 15 MiB with store.kind = \"mongodb\"",
        );
        // [MQTT-3.1.3-5] asks for 23.
        let client_id_fits = within(limits.client_id_bytes_max, 23..=65_535);
        check(
            "limits.client_id_bytes_max",
            client_id_fits,
            "from 23 to 65535 bytes",
        );
        check(
            "limits.topic_bytes_max",
            within(limits.topic_bytes_max, 1..=65_535),
            "from 1 to 65535 bytes",
        );
        let levels_fit = limits.topic_levels_max <= 65_536;
        check(
            "limits.topic_levels_max",
            levels_fit,
            "at most 65536, which is one more than a topic has bytes",
        );
        let keep_alive_fits = seconds(limits.keep_alive_max, 1..=65_535);
        check(
            "limits.keep_alive_max",
            keep_alive_fits,
            "from 1s to 65535s, or \"unlimited\"",
        );
        let expiry_fits = seconds(session.expiry_max, 0..=u64::from(u32::MAX) - 1);
        check(
            "session.expiry_max",
            expiry_fits,
            "at most 4294967294s, or \"unlimited\"",
        );
        check(
            "log.level",
            crate::telemetry::is_filter(&log.level),
            "a level such as \"info\", or levels for parts such as \"info,midge::net=debug\"",
        );
    }

    fn values(&self) -> BTreeMap<String, String> {
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

    fn to_toml(&self) -> String {
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{ClientAuth, QueueFull, Transport};
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("midge.toml");
        std::fs::write(&path, text).unwrap();
        (
            folder,
            Sources {
                file: Some(path),
                ..Sources::default()
            },
        )
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn from_file(text: &str) -> Result<Config, ConfigError> {
        let (_folder, sources) = file(text);
        Config::load(&sources)
    }

    fn from_environment(variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::load(&Sources {
            environment: pairs(variables),
            ..Sources::default()
        })
    }

    fn from_set(arguments: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::load(&Sources {
            set: pairs(arguments),
            ..Sources::default()
        })
    }

    #[track_caller]
    fn assert_error(result: Result<Config, ConfigError>, parts: &[&str]) {
        let error = result.unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }

    fn example() -> String {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/midge.toml"))
            .unwrap()
    }

    #[test]
    fn the_example_sets_every_key_to_its_default() {
        assert_eq!(from_file(&example()).unwrap(), Config::default());
    }

    #[test]
    fn the_example_has_every_key_and_no_other() {
        let example = example();
        for (section, keys) in Draft::default()
            .sections()
            .map(|(name, section)| (name, section.keys()))
        {
            assert!(example.contains(&format!("[{section}]")), "{section}");
            for key in keys {
                assert!(example.contains(&format!("{key} = ")), "{section}.{key}");
            }
        }
        // What is commented out must be right as well, of the URIs the first one.
        let all: String = example
            .replace("kind = \"embedded\"", "kind = \"mongodb\"")
            .lines()
            .filter(|line| !line.starts_with("# uri_file") && !line.starts_with("# url_file"))
            .map(|line| {
                line.strip_prefix("# ")
                    .filter(|line| line.starts_with('[') || line.contains(" = "))
                    .unwrap_or(line)
            })
            .filter(|line| !line.contains("MIDGE_"))
            .flat_map(|line| [line, "\n"])
            .collect();
        let config = from_file(&all).unwrap();
        assert_eq!(
            config.listeners.keys().collect::<Vec<_>>(),
            ["tcp", "tls", "ws"]
        );
    }

    /// The rows of the tables in docs/configuration.md: key, default, variable.
    fn documented() -> Vec<[String; 3]> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        let text = std::fs::read_to_string(path).unwrap();
        let cells = |line: &str| -> Vec<String> {
            let inner = line.trim_start_matches("| ").trim_end_matches(" |");
            inner.split(" | ").map(str::to_owned).collect()
        };
        let rows = text.lines().filter(|line| line.contains("| `MIDGE_"));
        rows.map(|line| {
            let cells = cells(line);
            assert_eq!(cells.len(), 4, "{line}");
            [0, 1, 2].map(|at| cells[at].trim_matches('`').to_owned())
        })
        .collect()
    }

    #[test]
    fn the_documentation_has_every_key_and_no_other_with_its_default() {
        let documented = documented();
        let draft = Draft::default();
        let defaults = draft.sections().into_iter().flat_map(|(name, section)| {
            let shown = section.show().into_iter();
            shown.map(move |(key, value)| (format!("{name}.{key}"), value))
        });
        let mut expected: Vec<[String; 3]> = defaults
            .map(|(key, value)| {
                let variable = format!("{PREFIX}{}", key.replace('.', SEPARATOR).to_uppercase());
                let value = match key.as_str() {
                    "node.name" => "the name of the host".to_owned(),
                    _ => value.unwrap_or_else(|| "unset".to_owned()),
                };
                [key, value, variable]
            })
            .collect();

        let (listeners, mut others): (Vec<_>, Vec<_>) = documented
            .into_iter()
            .partition(|[key, ..]| key.starts_with(LISTENERS));
        expected.sort();
        others.sort();
        assert_eq!(others, expected);
        let keys: Vec<_> = listeners.iter().map(|[key, ..]| key.as_str()).collect();
        let tls = TlsDraft::default().keys().iter();
        let expected: Vec<_> = ListenerDraft::default()
            .keys()
            .iter()
            .map(|key| format!("listeners.NAME.{key}"))
            .chain(tls.map(|key| format!("listeners.NAME.tls.{key}")))
            .collect();
        assert_eq!(keys, expected);
    }

    /// What depends on the kind has no default of its own that could be compared.
    #[test]
    fn the_documented_defaults_of_listeners_are_those_in_effect() {
        let documented = documented();
        let loaded = Loaded::new(&Sources {
            set: pairs(&[
                ("listeners.wss.tls.certificate", "c"),
                ("listeners.wss.tls.key", "k"),
            ]),
            ..Sources::default()
        })
        .unwrap();
        let shown = loaded.to_toml();
        for key in ["path", "allowed_origins"] {
            let wanted = format!("listeners.NAME.{key}");
            let [_, default, _] = documented.iter().find(|[key, ..]| *key == wanted).unwrap();
            assert!(shown.contains(&format!("{key} = {default}\n")), "{shown}");
        }
    }

    #[test]
    fn without_any_source_only_this_machine_can_connect() {
        let config = Config::default();

        assert_eq!(config.listeners.len(), 1);
        assert_eq!(config.listeners["tcp"].bind, ([127, 0, 0, 1], 1883).into());
        assert!(config.auth.allows_anonymous());
    }

    #[test]
    fn the_command_line_outweighs_the_environment_and_that_the_file() {
        let (_folder, mut sources) = file(
            "[limits]\ntopic_alias_maximum = 1\nconnections_max = 1\n[session]\nqueue_full = \"disconnect\"\n",
        );
        sources.environment = pairs(&[
            ("MIDGE_LIMITS__TOPIC_ALIAS_MAXIMUM", "2"),
            ("MIDGE_LIMITS__CONNECTIONS_MAX", "2"),
        ]);
        sources.set = pairs(&[("limits.topic_alias_maximum", "3")]);

        let config = Config::load(&sources).unwrap();

        assert_eq!(config.session.queue_full, QueueFull::Disconnect);
        assert_eq!(config.limits.connections_max, Some(2));
        assert_eq!(config.limits.topic_alias_maximum, 3);
    }

    #[test]
    fn an_unknown_key_is_shown_where_it_is_with_the_nearest_one() {
        assert_error(
            from_file("[limits]\npacket_byte_max = 1\n"),
            &[
                "limits.packet_byte_max",
                "midge.toml:2:1",
                "did you mean `limits.packet_bytes_max`?",
            ],
        );
        assert_error(
            from_file("max_connections = 1\n"),
            &["did you mean `limits.connections_max`?"],
        );
        assert_error(
            from_file("[limit]\nconnections_max = 1\n"),
            &["did you mean `limits.connections_max`?"],
        );
        assert_error(
            from_file("[listeners.ws]\nbnd = 1\n"),
            &["did you mean `listeners.ws.bind`?"],
        );
        assert_error(
            from_set(&[("listeners.ws.port", "1")]),
            &["did you mean `listeners.ws.bind`?"],
        );
        assert_error(
            from_file("[listeners.x.tls]\ncert = \"c\"\n"),
            &["no such setting: listeners.x.tls.cert"],
        );
        assert_error(from_file("limits = 1\n"), &["limits is a table"]);
        assert_error(
            from_file("[colours]\nred = 1\n"),
            &["no such setting: colours.red"],
        );
    }

    #[test]
    fn a_wrong_value_is_shown_where_it_is() {
        assert_error(
            from_file("[limits]\nconnections_max = \"many\"\n"),
            &[
                "limits.connections_max should be a number above 0 or \"unlimited\", and not \"many\"",
                "midge.toml:2:19",
            ],
        );
        assert_error(
            from_file("[store]\nkind = \"mongo\"\n"),
            &["\"embedded\" or \"memory\" or \"mongodb\", and not \"mongo\""],
        );
        assert_error(
            from_file("[log]\nlevel = 3\n"),
            &["log.level should be a text, and not 3"],
        );
        assert_error(
            from_file("[log]\nlevel = \"loud\"\n"),
            &["log.level should be a level", "midge.toml:2:9"],
        );
    }

    #[test]
    fn a_file_that_is_not_toml_is_shown_with_the_line() {
        assert_error(from_file("[limits\n"), &["midge.toml:1:8"]);
        let sources = Sources {
            file: Some("/nowhere/midge.toml".into()),
            ..Sources::default()
        };
        assert_error(
            Config::load(&sources),
            &["cannot read /nowhere/midge.toml", "hint: "],
        );
    }

    #[test]
    fn variables_and_arguments_are_named_in_errors() {
        assert_error(
            from_environment(&[("MIDGE_LIMITS__CONECTIONS_MAX", "1")]),
            &[
                "MIDGE_LIMITS__CONECTIONS_MAX: ",
                "did you mean MIDGE_LIMITS__CONNECTIONS_MAX?",
            ],
        );
        assert_error(
            from_environment(&[("MIDGE_AUTH_ANONYMOUS", "true")]),
            &["did you mean MIDGE_AUTH__ANONYMOUS?"],
        );
        assert_error(
            from_set(&[("limits.connections_max", "x")]),
            &["--set limits.connections_max: "],
        );
    }

    #[test]
    fn all_problems_are_reported() {
        let error = from_file("[limits]\nfoo = 1\ntopic_levels_max = 0\n").unwrap_err();
        assert_eq!(error.0.len(), 2, "{error}");

        let error = from_set(&[
            ("limits.client_id_bytes_max", "22"),
            ("limits.keep_alive_max", "1d"),
        ])
        .unwrap_err();
        assert_eq!(error.0.len(), 2, "{error}");
    }

    #[test]
    fn variables_that_are_no_settings_are_left_alone() {
        let config = from_environment(&[
            ("PATH", "/bin"),
            ("MIDGE_CONFIG", "x"),
            ("MIDGE_TEST_URL", "x"),
            ("MIDGE_SERVICE_HOST", "10.0.0.1"),
            ("MIDGE_SERVICE_PORT", "1883"),
            ("MIDGE_SERVICE_PORT_MQTT", "1883"),
            ("MIDGE_PORT", "tcp://10.0.0.1:1883"),
            ("MIDGE_PORT_1883_TCP", "tcp://10.0.0.1:1883"),
            ("MIDGE_PORT_1883_TCP_ADDR", "10.0.0.1"),
            ("MIDGE_METRICS_SERVICE_HOST", "10.0.0.2"),
        ]);

        assert_eq!(config.unwrap(), Config::default());
    }

    #[test]
    fn text_that_looks_like_a_number_is_text_for_a_text() {
        assert_eq!(
            from_environment(&[("MIDGE_NODE__NAME", "7")])
                .unwrap()
                .node
                .name,
            "7"
        );
        assert_eq!(
            from_set(&[("store.kind", "memory")]).unwrap().store.kind,
            StoreKind::Memory
        );
    }

    #[test]
    fn a_variable_rebinds_the_default_listener() {
        let config = from_environment(&[
            ("MIDGE_LISTENERS__TCP__BIND", "0.0.0.0:1884"),
            ("MIDGE_AUTH__ANONYMOUS", "true"),
        ]);

        let listeners = config.unwrap().listeners;
        assert_eq!(listeners.len(), 1);
        assert_eq!(listeners["tcp"].bind, ([0, 0, 0, 0], 1884).into());
    }

    #[test]
    fn configured_listeners_replace_the_default_one() {
        let listeners = from_file("[listeners.ws]\n").unwrap().listeners;

        assert_eq!(listeners.len(), 1);
        assert_eq!(listeners["ws"].bind, ([127, 0, 0, 1], 8083).into());
        assert!(
            matches!(&listeners["ws"].transport, Transport::WebSocket { path, .. } if path == "/mqtt")
        );
    }

    #[test]
    fn a_bind_is_an_address_a_port_or_both() {
        for (bind, address) in [
            ("\"0.0.0.0:1\"", "0.0.0.0:1"),
            ("\"[::1]:2\"", "[::1]:2"),
            ("\"::1\"", "[::1]:1883"),
            ("\"localhost:3\"", "127.0.0.1:3"),
            ("\"10.0.0.1\"", "10.0.0.1:1883"),
            ("\"4\"", "0.0.0.0:4"),
            ("\":5\"", "0.0.0.0:5"),
            ("6", "0.0.0.0:6"),
        ] {
            let config = from_file(&format!(
                "auth.anonymous = true\n[listeners.x]\nbind = {bind}\n"
            ));
            assert_eq!(
                config.unwrap().listeners["x"].bind.to_string(),
                address,
                "{bind}"
            );
        }
        for bind in [
            "\"\"",
            "\"example.org:1883\"",
            "\"1.2.3.4:99999\"",
            "70000",
            "-1",
            "true",
        ] {
            assert_error(
                from_file(&format!("listeners.x.bind = {bind}\n")),
                &["listeners.x.bind should be an address"],
            );
        }
    }

    #[test]
    fn an_open_listener_needs_a_decision_about_who_may_connect() {
        let open = "listeners.tcp.bind = \"0.0.0.0:1883\"\n";

        assert_error(
            from_file(open),
            &[
                "listener `tcp` can be reached",
                "midge.toml:1:22",
                "auth.users_file",
                "auth.anonymous = true",
            ],
        );
        assert!(
            from_file(&format!("{open}auth.anonymous = true\n"))
                .unwrap()
                .auth
                .allows_anonymous()
        );
        let with_users = from_file(&format!("{open}auth.users_file = \"users.toml\"\n")).unwrap();
        assert!(!with_users.auth.allows_anonymous());
        assert_error(
            from_file("auth.anonymous = false\n"),
            &["nobody could connect"],
        );
    }

    #[test]
    fn mongodb_needs_one_uri_and_the_other_stores_none() {
        let config = from_file("[store]\nkind = \"mongodb\"\nuri = \"mongodb://db1\"\n").unwrap();
        assert_eq!(
            config.store.mongodb_uri().unwrap().secret(),
            "mongodb://db1"
        );
        assert_eq!(config.store.database, "midge");

        assert_error(
            from_file("[store]\nkind = \"mongodb\"\n"),
            &[
                "nothing says where MongoDB is",
                "midge.toml:2:8",
                "store.uri_file",
            ],
        );
        assert_error(
            from_set(&[
                ("store.kind", "mongodb"),
                ("store.uri", "mongodb://db1"),
                ("store.uri_file", "uri"),
            ]),
            &["both set"],
        );
        assert_error(
            from_environment(&[("MIDGE_STORE__URI", "mongodb://db1")]),
            &["MIDGE_STORE__URI: store.uri has no effect with store.kind = \"embedded\""],
        );
        assert_error(
            from_set(&[("store.uri", "db1:27017")]),
            &["store.uri should be a URI such as", "and not \"db1:27017\""],
        );
        assert_error(
            from_set(&[("store.write_elision", "true")]),
            &["store.write_elision has no effect with store.kind = \"embedded\""],
        );
        for database in ["a/b", "local", "sp ace"] {
            assert_error(
                from_set(&[("store.database", database)]),
                &["store.database should be"],
            );
        }
    }

    #[test]
    fn redis_needs_one_url_and_a_store_that_nodes_share() {
        let shared = [("store.kind", "mongodb"), ("store.uri", "mongodb://db1")];
        let with = |pairs: &[(&str, &str)]| from_set(&[&shared, pairs].concat());
        let config = with(&[("bus.kind", "redis"), ("bus.url", "redis://cache")]).unwrap();
        let url = config.bus.redis_url().unwrap().unwrap();
        assert_eq!(url.secret(), "redis://cache");

        assert_error(with(&[("bus.kind", "redis")]), &["where Redis is"]);
        assert_error(with(&[("bus.kind", "none")]), &["they need a bus"]);
        assert_error(
            with(&[("bus.url", "redis://cache")]),
            &["bus.url has no effect"],
        );
        assert_error(
            with(&[
                ("bus.kind", "redis"),
                ("bus.url", "redis://cache"),
                ("bus.url_file", "url"),
            ]),
            &["both set"],
        );
        assert_error(
            from_set(&[("bus.kind", "redis"), ("bus.url", "redis://cache")]),
            &["store.kind = \"embedded\" is for one node alone"],
        );
        assert_error(
            from_file("[bus]\nurl = \"cache:6379\"\n"),
            &[
                "bus.url should be a URL such as \"redis://cache:6379\"",
                "midge.toml:2:7",
            ],
        );
    }

    #[test]
    fn the_url_of_redis_can_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("url");
        let bus = Bus {
            url_file: Some(path.clone()),
            ..Bus::default()
        };
        std::fs::write(&path, "rediss://:secret@cache\n").unwrap();
        let url = bus.redis_url().unwrap().unwrap();
        assert_eq!(url.secret(), "rediss://:secret@cache");

        std::fs::write(&path, "cache").unwrap();
        let error = bus.redis_url().unwrap_err().to_string();
        assert!(error.contains("should hold a URL such as"), "{error}");
    }

    #[test]
    fn the_uri_of_mongodb_can_be_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("uri");
        std::fs::write(&path, "mongodb://me:pass@db1/\n").unwrap();
        let path = path.to_str().unwrap();
        let variables = [
            ("MIDGE_STORE__KIND", "mongodb"),
            ("MIDGE_STORE__URI_FILE", path),
        ];
        let store = from_environment(&variables).unwrap().store;
        assert_eq!(
            store.mongodb_uri().unwrap().secret(),
            "mongodb://me:pass@db1/"
        );

        std::fs::write(path, "me:pass@db1").unwrap();
        let error = store.mongodb_uri().unwrap_err().to_string();
        assert!(error.contains("should hold a URI"), "{error}");
        assert!(!error.contains("pass"), "{error}");
    }

    #[test]
    fn the_password_of_mongodb_is_in_no_message() {
        let uri = "\"mongodb://me:pass@db1/\"";
        let wrong = [
            format!("[store]\nuri = {uri}\n"),
            format!("[store]\nuri = {uri} oops\n"),
            format!("[store]\nkind = {uri}\n"),
            format!("[store]\nuri = [{uri}]\n"),
        ];
        for text in wrong {
            let error = from_file(&text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("pass"), "{error}");
            assert!(
                error.to_string().contains("mongodb://me:****@db1/"),
                "{error}"
            );
        }

        let (_folder, sources) = file(&format!("[store]\nkind = \"mongodb\"\nuri = {uri}\n"));
        let loaded = Loaded::new(&sources).unwrap();
        assert!(
            loaded
                .to_toml()
                .contains("uri = \"mongodb://me:****@db1/\"")
        );
        assert!(!format!("{loaded:?}").contains("pass"));
    }

    #[test]
    fn required_certificates_say_who_may_connect() {
        let config = from_file(
            "[listeners.tls]\nbind = 8883\n\
             tls = { certificate = \"c\", key = \"k\", client_ca = \"ca\", client_auth = \"required\" }\n",
        )
        .unwrap();

        let client_auth = &config.listeners["tls"].tls.as_ref().unwrap().client_auth;
        assert_eq!(*client_auth, ClientAuth::Required { ca: "ca".into() });
    }

    #[test]
    fn a_listener_has_what_its_kind_needs_and_nothing_else() {
        assert_error(
            from_file("[listeners.tls]\n"),
            &[
                "tls.certificate is missing",
                "tls.key is missing",
                "midge.toml:1:",
            ],
        );
        assert_error(
            from_file("[listeners.tcp]\npath = \"/\"\n"),
            &["is only for the kinds \"ws\" and \"wss\""],
        );
        assert_error(
            from_file("[listeners.tcp.tls]\nkey = \"k\"\n"),
            &["is only for the kinds \"tls\" and \"wss\""],
        );
        assert_error(
            from_file("[listeners.ws]\npath = \"mqtt\"\n"),
            &["must begin with `/`"],
        );
        assert_error(
            from_file(
                "[listeners.tls.tls]\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"ca\"\n",
            ),
            &["has no effect without tls.client_auth"],
        );
        assert_error(
            from_file("[listeners.a]\n[listeners.b]\n"),
            &["listeners `a` and `b` both want 127.0.0.1:1883"],
        );
        assert_error(from_file("[listeners.A]\n"), &["the name of a listener"]);
    }

    #[test]
    fn what_is_shown_sets_the_same_and_says_where_it_is_from() {
        let (_folder, mut sources) = file(
            "[limits]\ntopic_alias_maximum = 7\n[listeners.wss]\n\
             tls = { certificate = \"c\", key = \"k\" }\n",
        );
        sources.set = pairs(&[("session.expiry_max", "unlimited"), ("sys.interval", "off")]);
        let loaded = Loaded::new(&sources).unwrap();

        let shown = loaded.to_toml();

        assert_eq!(from_file(&shown).unwrap(), loaded.config, "{shown}");
        assert!(shown.contains("midge.toml:2"), "{shown}");
        assert!(shown.contains("# --set session.expiry_max"), "{shown}");
        assert!(shown.contains("# anonymous is not set\n"), "{shown}");
    }
}
