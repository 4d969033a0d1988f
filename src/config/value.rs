//! Values: how each type of setting is written, read and shown.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::time::Duration;

use super::network::Network;
use super::uri::without_passwords;

/// A value as somebody wrote it, before the setting gives it its type.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// From an environment variable or `--set`, where everything is text.
    Untyped(String),
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Self>),
    Table,
    /// Something that no setting takes, such as a date.
    Other(String),
}

/// A value that does not fit its setting.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Unfit {
    /// What would, such as "a number".
    pub(super) expected: String,
}

/// A type that a setting can have.
pub(super) trait Setting: Sized {
    fn parse(value: &Value) -> Result<Self, Unfit>;

    /// As it would be written in the file; `None` if it would be left out.
    fn show(&self) -> Option<String>;
}

/// A table of settings.
pub(super) trait Section {
    fn keys(&self) -> &'static [&'static str];

    /// `None` if there is no such key.
    fn set(&mut self, key: &str, value: &Value) -> Option<Result<(), Unfit>>;

    /// Each key with its value as it would be written in the file.
    fn show(&self) -> Vec<(&'static str, Option<String>)>;
}

/// Declares a struct together with its defaults and its [`Section`].
macro_rules! section {
    (
        $(#[$about:meta])*
        $visibility:vis struct $name:ident {
            $($(#[$field_about:meta])* $field_visibility:vis $field:ident: $type:ty = $default:expr,)*
        }
    ) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        $visibility struct $name {
            $($(#[$field_about])* $field_visibility $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $crate::config::value::Section for $name {
            fn keys(&self) -> &'static [&'static str] {
                &[$(stringify!($field)),*]
            }

            fn set(
                &mut self,
                key: &str,
                value: &$crate::config::value::Value,
            ) -> Option<Result<(), $crate::config::value::Unfit>> {
                use $crate::config::value::Setting;
                match key {
                    $(stringify!($field) => Some(Setting::parse(value).map(|value| self.$field = value)),)*
                    _ => None,
                }
            }

            fn show(&self) -> Vec<(&'static str, Option<String>)> {
                use $crate::config::value::Setting;
                vec![$((stringify!($field), Setting::show(&self.$field)),)*]
            }
        }
    };
}
pub(super) use section;

/// Declares an enum whose variants are written as words.
macro_rules! choices {
    (
        $(#[$about:meta])*
        $visibility:vis enum $name:ident { $($variant:ident = $word:literal,)* }
    ) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name { $($variant,)* }

        impl $name {
            /// The word for it in the configuration.
            $visibility fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)* _ => None }
            }
        }

        impl $crate::config::value::Setting for $name {
            fn parse(value: &$crate::config::value::Value) -> Result<Self, $crate::config::value::Unfit> {
                value.text().and_then(Self::from_word).ok_or_else(|| {
                    let words: &[&str] = &[$(concat!("\"", $word, "\"")),*];
                    $crate::config::value::Unfit { expected: words.join(" or ") }
                })
            }

            fn show(&self) -> Option<String> {
                Some(format!("\"{}\"", self.as_str()))
            }
        }
    };
}
pub(super) use choices;

impl Value {
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Untyped(text) | Self::Text(text) => Some(text),
            Self::Integer(_) | Self::Boolean(_) | Self::List(_) | Self::Table | Self::Other(_) => {
                None
            }
        }
    }

    fn integer(&self) -> Option<i64> {
        match self {
            Self::Integer(integer) => Some(*integer),
            Self::Untyped(text) => text.trim().replace('_', "").parse().ok(),
            Self::Text(_) | Self::Boolean(_) | Self::List(_) | Self::Table | Self::Other(_) => None,
        }
    }

    fn boolean(&self) -> Option<bool> {
        match self {
            Self::Boolean(boolean) => Some(*boolean),
            Self::Untyped(text) => text.trim().parse().ok(),
            Self::Text(_) | Self::Integer(_) | Self::List(_) | Self::Table | Self::Other(_) => None,
        }
    }

    /// A number and what follows it: an integer alone, or text such as `10s` and `1 MiB`.
    fn quantity(&self) -> Option<(u64, &str)> {
        if let Some(integer) = self.integer() {
            return Some((integer.try_into().ok()?, ""));
        }
        let text = self.text()?.trim();
        let digits_end = text.find(|c: char| !c.is_ascii_digit())?;
        Some((
            text[..digits_end].parse().ok()?,
            text[digits_end..].trim_start(),
        ))
    }
}

/// As a message quotes it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untyped(text) | Self::Text(text) => f.write_str(&quote(&without_passwords(text))),
            Self::Integer(integer) => write!(f, "{integer}"),
            Self::Boolean(boolean) => write!(f, "{boolean}"),
            Self::List(_) => f.write_str("a list"),
            Self::Table => f.write_str("a table"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// JSON strings are TOML strings.
pub(super) fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn unfit(expected: &str) -> Unfit {
    Unfit {
        expected: expected.to_owned(),
    }
}

impl Setting for bool {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        value.boolean().ok_or_else(|| unfit("true or false"))
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

/// Unset by default, and no word for it.
impl Setting for Option<bool> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        bool::parse(value).map(Some)
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(bool::show)
    }
}

impl Setting for usize {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let number = value
            .integer()
            .and_then(|integer| Self::try_from(integer).ok());
        number
            .filter(|number| *number > 0)
            .ok_or_else(|| unfit("a number above 0"))
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for u16 {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let number = value.integer().and_then(|integer| integer.try_into().ok());
        number.ok_or_else(|| unfit("a number from 0 to 65535"))
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for NonZeroU16 {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        u16::parse(value)
            .ok()
            .and_then(Self::new)
            .ok_or_else(|| unfit("a number from 1 to 65535"))
    }

    fn show(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for String {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let text = value.text().filter(|text| !text.is_empty());
        text.map(str::to_owned).ok_or_else(|| unfit("a text"))
    }

    fn show(&self) -> Option<String> {
        Some(quote(self))
    }
}

impl Setting for Vec<String> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let list = match value {
            Value::List(values) => values
                .iter()
                .map(|value| String::parse(value).ok())
                .collect(),
            Value::Untyped(text) => {
                Some(text.split(',').map(|part| part.trim().to_owned()).collect())
            }
            Value::Text(_)
            | Value::Integer(_)
            | Value::Boolean(_)
            | Value::Table
            | Value::Other(_) => None,
        };
        list.ok_or_else(|| unfit("a list of texts"))
    }

    fn show(&self) -> Option<String> {
        let parts: Self = self.iter().map(|part| quote(part)).collect();
        Some(format!("[{}]", parts.join(", ")))
    }
}

impl Setting for SocketAddr {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let text = value
            .text()
            .map(|text| text.trim().replace("localhost", "127.0.0.1"));
        text.and_then(|text| text.parse().ok()).ok_or_else(|| {
            unfit("an address and a port such as \"127.0.0.1:9883\" or \"[::]:9883\"")
        })
    }

    fn show(&self) -> Option<String> {
        Some(quote(&self.to_string()))
    }
}

impl Setting for Vec<Network> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let texts = Vec::<String>::parse(value).unwrap_or_default();
        let networks: Result<Self, ()> = texts.iter().map(|text| text.parse()).collect();
        networks
            .ok()
            .filter(|networks| !networks.is_empty())
            .ok_or_else(|| unfit("a list of addresses such as \"127.0.0.1\" and \"10.0.0.0/8\""))
    }

    fn show(&self) -> Option<String> {
        let parts: Vec<_> = self
            .iter()
            .map(|network| quote(&network.to_string()))
            .collect();
        Some(format!("[{}]", parts.join(", ")))
    }
}

impl Setting for PathBuf {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        String::parse(value)
            .map(Self::from)
            .map_err(|_| unfit("a path"))
    }

    fn show(&self) -> Option<String> {
        Some(quote(&self.to_string_lossy()))
    }
}

/// Unset by default, and no word for it.
impl Setting for Option<PathBuf> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        PathBuf::parse(value).map(Some)
    }

    fn show(&self) -> Option<String> {
        self.as_ref().and_then(PathBuf::show)
    }
}

const UNLIMITED: &str = "unlimited";

/// A bound that can be lifted.
impl Setting for Option<usize> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        match value.text() {
            Some(UNLIMITED) => Ok(None),
            _ => usize::parse(value)
                .map(Some)
                .map_err(|_| unfit("a number above 0 or \"unlimited\"")),
        }
    }

    fn show(&self) -> Option<String> {
        self.map_or_else(|| Some(quote(UNLIMITED)), |number| number.show())
    }
}

/// A bound that can be lifted.
impl Setting for Option<Duration> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        match value.text() {
            Some(UNLIMITED) => Ok(None),
            _ => Duration::parse(value).map(Some).map_err(|_| {
                unfit("a duration such as \"10s\", \"18h\" or \"7d\", or \"unlimited\"")
            }),
        }
    }

    fn show(&self) -> Option<String> {
        self.map_or_else(|| Some(quote(UNLIMITED)), |duration| duration.show())
    }
}

/// Milliseconds per unit, the largest first.
const DURATION_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];

impl Setting for Duration {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let milliseconds = value.quantity().and_then(|(number, unit)| {
            let unit = if unit.is_empty() { "s" } else { unit };
            let (_, factor) = DURATION_UNITS.iter().find(|(name, _)| *name == unit)?;
            number.checked_mul(*factor)
        });
        milliseconds.map(Self::from_millis).ok_or_else(|| {
            unfit("a duration such as \"500ms\", \"10s\", \"5m\", \"18h\" or \"7d\"")
        })
    }

    fn show(&self) -> Option<String> {
        let milliseconds = u64::try_from(self.as_millis()).unwrap_or(u64::MAX);
        if milliseconds == 0 {
            return Some("\"0s\"".to_owned());
        }
        let (unit, factor) = DURATION_UNITS
            .into_iter()
            .find(|(_, factor)| milliseconds.is_multiple_of(*factor))?;
        Some(format!("\"{}{unit}\"", milliseconds / factor))
    }
}

/// How often something happens, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval(Option<Duration>);

impl Interval {
    pub(super) const fn every(interval: Duration) -> Self {
        Self(Some(interval))
    }

    /// `None` if it is off.
    pub fn get(self) -> Option<Duration> {
        self.0
    }
}

impl Setting for Interval {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        match value.text() {
            Some("off") => Ok(Self(None)),
            _ => Duration::parse(value)
                .map(|interval| Self(Some(interval).filter(|interval| !interval.is_zero())))
                .map_err(|_| unfit("a duration such as \"500ms\" or \"10s\", or \"off\"")),
        }
    }

    fn show(&self) -> Option<String> {
        self.0
            .map_or_else(|| Some(quote("off")), |interval| interval.show())
    }
}

/// A duration that depends on other settings unless it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace(Option<Duration>);

impl Grace {
    pub(super) const AUTO: Self = Self(None);

    /// `None` if it is not given.
    pub fn get(self) -> Option<Duration> {
        self.0
    }
}

impl Setting for Grace {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        match value.text() {
            Some("auto") => Ok(Self::AUTO),
            _ => Duration::parse(value)
                .map(|duration| Self(Some(duration)))
                .map_err(|_| unfit("a duration such as \"10s\", or \"auto\"")),
        }
    }

    fn show(&self) -> Option<String> {
        self.0
            .map_or_else(|| Some(quote("auto")), |duration| duration.show())
    }
}

/// How much memory there is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLimit {
    /// As the system says.
    Auto,
    Bytes(ByteSize),
    Unlimited,
}

impl Setting for MemoryLimit {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        match value.text() {
            Some("auto") => Ok(Self::Auto),
            Some(UNLIMITED) => Ok(Self::Unlimited),
            _ => ByteSize::parse(value)
                .ok()
                .filter(|size| size.get() > 0)
                .map(Self::Bytes)
                .ok_or_else(|| unfit("a size such as \"512 MiB\", \"auto\" or \"unlimited\"")),
        }
    }

    fn show(&self) -> Option<String> {
        match self {
            Self::Auto => Some(quote("auto")),
            Self::Bytes(size) => size.show(),
            Self::Unlimited => Some(quote(UNLIMITED)),
        }
    }
}

/// A number of bytes, written with a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(usize);

impl ByteSize {
    pub const fn bytes(bytes: usize) -> Self {
        Self(bytes)
    }

    pub const fn mebibytes(mebibytes: usize) -> Self {
        Self(mebibytes * 1024 * 1024)
    }

    /// In bytes.
    pub const fn get(self) -> usize {
        self.0
    }
}

/// The units that a size is shown with, the largest first.
const BINARY_UNITS: [(&str, usize); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

impl Setting for ByteSize {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let bytes = value.quantity().and_then(|(number, unit)| {
            let factor: u64 = match unit.to_ascii_lowercase().as_str() {
                "" | "b" => 1,
                "kb" => 1000,
                "kib" => 1 << 10,
                "mb" => 1_000_000,
                "mib" => 1 << 20,
                "gb" => 1_000_000_000,
                "gib" => 1 << 30,
                _ => return None,
            };
            usize::try_from(number.checked_mul(factor)?).ok()
        });
        bytes
            .filter(|bytes| *bytes > 0)
            .map(Self)
            .ok_or_else(|| unfit("a size such as \"64 KiB\" or \"1 MiB\""))
    }

    fn show(&self) -> Option<String> {
        let unit = BINARY_UNITS
            .into_iter()
            .find(|(_, factor)| self.0.is_multiple_of(*factor));
        Some(match unit {
            Some((unit, factor)) => format!("\"{} {unit}\"", self.0 / factor),
            None => self.0.to_string(),
        })
    }
}

/// Without quotes, for messages.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.show().unwrap_or_default().trim_matches('"'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untyped(text: &str) -> Value {
        Value::Untyped(text.to_owned())
    }

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn durations_have_units_and_plain_numbers_are_seconds() {
        for (value, milliseconds) in [
            (text("500ms"), 500),
            (text("10s"), 10_000),
            (text("5 m"), 300_000),
            (text("18h"), 64_800_000),
            (text("7d"), 604_800_000),
            (Value::Integer(3), 3000),
            (untyped("3"), 3000),
            (untyped("3s"), 3000),
        ] {
            assert_eq!(
                Duration::parse(&value),
                Ok(Duration::from_millis(milliseconds)),
                "{value}"
            );
        }
    }

    #[test]
    fn wrong_durations_are_refused() {
        for value in [
            "",
            "s",
            "10",
            "10 parsecs",
            "-1s",
            "1.5s",
            "99999999999999999999s",
            "300000000000000d",
        ] {
            assert!(Duration::parse(&text(value)).is_err(), "{value}");
        }
        assert!(Duration::parse(&Value::Integer(-1)).is_err());
    }

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        for (value, bytes) in [
            (text("1 MiB"), 1 << 20),
            (text("64KiB"), 64 << 10),
            (text("1MB"), 1_000_000),
            (text("2 gib"), 2 << 30),
            (Value::Integer(77), 77),
            (untyped("1_000"), 1000),
        ] {
            assert_eq!(
                ByteSize::parse(&value),
                Ok(ByteSize::bytes(bytes)),
                "{value}"
            );
        }
        for value in ["1 M", "MiB", "0", "99999999999 GiB"] {
            assert!(ByteSize::parse(&text(value)).is_err(), "{value}");
        }
    }

    #[test]
    fn what_is_shown_reads_back_as_the_same_value() {
        for value in ["7d", "36h", "90s", "1500ms", "0s"] {
            let duration = Duration::parse(&text(value)).unwrap();
            assert_eq!(duration.show().unwrap(), format!("\"{value}\""));
        }
        assert_eq!(ByteSize::mebibytes(1).show().unwrap(), "\"1 MiB\"");
        assert_eq!(ByteSize::bytes(1500).show().unwrap(), "1500");
        assert_eq!(
            Interval::parse(&text("0s")).unwrap().show().unwrap(),
            "\"off\""
        );
    }

    #[test]
    fn text_that_looks_like_a_number_stays_text_where_text_is_wanted() {
        assert_eq!(String::parse(&untyped("123")), Ok("123".to_owned()));
        assert_eq!(u16::parse(&untyped("123")), Ok(123));
    }

    #[test]
    fn the_file_is_typed() {
        assert!(usize::parse(&text("10")).is_err());
        assert!(bool::parse(&text("true")).is_err());
        assert!(String::parse(&Value::Integer(1)).is_err());
    }

    #[test]
    fn lists_outside_the_file_are_separated_by_commas() {
        assert_eq!(
            Vec::parse(&untyped("a, b")),
            Ok(vec!["a".to_owned(), "b".to_owned()])
        );
    }
}
