//! Where settings come from. Each source becomes a list of assignments.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Origin, Problem, SourceFile};
use super::value::Value;

/// Where settings come from; the later ones outweigh the earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    pub file: Option<PathBuf>,
    /// Variables of the environment; only `MIDGE_…` ones count.
    pub environment: Vec<(String, String)>,
    /// `--set` arguments: dotted keys and values.
    pub set: Vec<(String, String)>,
}

/// The variable that names the file.
const FILE_VARIABLE: &str = "MIDGE_CONFIG";
pub(super) const PREFIX: &str = "MIDGE_";
/// Variables of our own tests and of `midge ctl`, which are no settings.
const OTHER_PREFIXES: [&str; 2] = ["MIDGE_TEST_", "MIDGE_CTL_"];
/// Separates the parts of a key in a variable; in `--set` and in the file it is a dot.
pub(super) const SEPARATOR: &str = "__";

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

/// One setting, from one source.
pub(super) struct Assignment {
    pub(super) path: Vec<String>,
    pub(super) value: Value,
    /// Where the key is written, for errors about the key.
    pub(super) key: Origin,
    /// Where the value is written, for errors about the value.
    pub(super) origin: Origin,
}

impl Sources {
    /// In the order of their weight.
    pub(super) fn read(&self) -> Result<Vec<Assignment>, Problem> {
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
