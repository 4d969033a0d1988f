//! Logs: where they go and what they look like.
//!
//! Every event has a field `event` with a name that never changes, so that alerts and searches
//! can rely on it: `tracing::info!(event = "listener_started", %bind, "listening")`. The name is a
//! noun and what happened to it, in snake case; everything that varies is a field of its own, and
//! the message is a fixed text. Payloads, passwords and keys are never logged.
//!
//! Levels: `error` means that a person must act, `warn` that something outside failed us, `info`
//! is what an operator wants to know of a healthy broker, `debug` is about single clients, their
//! mistakes included.

use std::fmt;
use std::io::IsTerminal;
use std::sync::{LazyLock, OnceLock};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{Log, LogFormat};
use crate::metrics::{By, Counter, Level};

/// The database tells of every file that it writes. `log.level` can ask for that by name.
const LIBRARIES: &str = "fjall=warn,lsm_tree=warn";

/// Lines of the log, as global as the log itself.
static LOGGED: LazyLock<By<Level, Counter>> = LazyLock::new(By::default);

/// How many there were.
pub(crate) fn logged() -> &'static By<Level, Counter> {
    &LOGGED
}

/// Counts what is logged.
#[derive(Debug)]
struct Counting;

impl<S: Subscriber> Layer<S> for Counting {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        if level == tracing::Level::WARN {
            LOGGED.of(Level::Warn).inc();
        } else if level == tracing::Level::ERROR {
            LOGGED.of(Level::Error).inc();
        }
    }
}

/// Changes what is logged. As global as the log itself; unset if somebody else set that up.
static SET_FILTER: OnceLock<SetFilter> = OnceLock::new();

type SetFilter = Box<dyn Fn(EnvFilter) -> bool + Send + Sync>;

fn filter(level: &str) -> EnvFilter {
    EnvFilter::new(format!("{LIBRARIES},{level}"))
}

/// Logs what `level` says from now on; without effect if the program around has its own log.
pub(crate) fn set_level(level: &str) {
    let set = SET_FILTER.get().is_some_and(|set| set(filter(level)));
    if set {
        tracing::info!(event = "log_level_changed", level);
    }
}

/// Sends all events of this process to stderr, one per line, with UTC times of RFC 3339. Does
/// nothing if that has been arranged before, as a program around this library may have.
pub fn start(log: &Log) {
    let text = match log.format {
        LogFormat::Auto => std::io::stderr().is_terminal(),
        LogFormat::Text => true,
        LogFormat::Json => false,
    };
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr);
    let filter = filter(&log.level);
    let started = if text {
        let colours = std::io::stderr().is_terminal()
            && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let builder = builder
            .with_ansi(colours)
            .with_target(false)
            .fmt_fields(TextFields)
            .with_env_filter(filter)
            .with_filter_reloading();
        let handle = builder.reload_handle();
        let set: SetFilter = Box::new(move |filter| handle.reload(filter).is_ok());
        builder.finish().with(Counting).try_init().map(|()| set)
    } else {
        let builder = builder
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_env_filter(filter)
            .with_filter_reloading();
        let handle = builder.reload_handle();
        let set: SetFilter = Box::new(move |filter| handle.reload(filter).is_ok());
        builder.finish().with(Counting).try_init().map(|()| set)
    };
    match started {
        // Nobody else can have set it: the log can be set up once.
        Ok(set) => drop(SET_FILTER.set(set)),
        Err(error) => {
            tracing::debug!(event = "log_kept", %error, "the program around has its own log");
        }
    }
}

/// Whether `text` says what to log.
pub(crate) fn is_filter(text: &str) -> bool {
    // A single word that is no level is the name of a module to the parser, and nothing a level.
    let known = |directive: &str| {
        directive.contains(['=', '[', ':'])
            || (!directive.is_empty() && directive.parse::<LevelFilter>().is_ok())
    };
    text.split(',').all(known) && EnvFilter::try_new(text).is_ok()
}

/// The message and then `name=value`. The name of the event is only shown where there is no
/// message: it says to a program what the message says to a person.
#[derive(Debug)]
struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = TextVisitor {
            writer,
            empty: true,
            result: Ok(()),
        };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct TextVisitor<'writer> {
    writer: Writer<'writer>,
    empty: bool,
    result: fmt::Result,
}

impl TextVisitor<'_> {
    fn write(&mut self, text: fmt::Arguments<'_>) {
        let separator = if std::mem::take(&mut self.empty) {
            ""
        } else {
            " "
        };
        self.result = self
            .result
            .and_then(|()| write!(self.writer, "{separator}{text}"));
    }
}

impl Visit for TextVisitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.write(format_args!("{value:?}")),
            // Where in its source a library that uses the `log` crate is.
            name if name.starts_with("log.") => {}
            name => self.write(format_args!("{name}={value:?}")),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            // The message, if there is one, comes first.
            "event" if self.empty => self.write(format_args!("{}", value.replace('_', " "))),
            "event" => {}
            _ => self.record_debug(field, &value),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    /// What is written of the events in `emit`.
    fn text(emit: impl FnOnce()) -> String {
        let written: Arc<Mutex<Vec<u8>>> = Arc::default();
        let writer = Arc::clone(&written);
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || Shared(Arc::clone(&writer)))
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .fmt_fields(TextFields)
            .finish();
        tracing::subscriber::with_default(subscriber, emit);
        let written = written.lock().clone();
        String::from_utf8(written).unwrap()
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn text_has_the_message_or_else_the_name_of_the_event() {
        assert_eq!(
            text(|| tracing::info!(event = "listener_started", listener = %"tcp", kind = "ws")),
            " INFO listener started listener=tcp kind=\"ws\"\n"
        );
        assert_eq!(
            text(|| tracing::warn!(event = "signal", signal = %"SIGINT", "ending at once")),
            " WARN ending at once signal=SIGINT\n"
        );
    }

    #[test]
    fn filters_are_levels_for_all_or_for_parts() {
        for filter in ["info", "DEBUG", "off", "info,midge::net=debug"] {
            assert!(is_filter(filter), "{filter}");
        }
        for filter in ["", "loud", "midge=loud", "info,,", "warn, midge=trace"] {
            assert!(!is_filter(filter), "{filter}");
        }
    }
}
