//! How a message is shown: `-F`, and what stands for it.

use std::fmt::Write as _;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::IgnoredAny;

use crate::cli::client::IncomingMessage;
use crate::mqtt::property::Property;
use crate::mqtt::{PacketId, QoS};

/// A format string, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Format(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Topic,
    Payload,
    /// "(null)" where there is none, as mosquitto_sub -v shows it.
    PayloadOrNull,
    HexLower,
    HexUpper,
    PayloadLength,
    Qos,
    Retain,
    PacketId,
    JsonText,
    JsonValue,
    IsoTime,
    UnixTime,
    ContentType,
    CorrelationData,
    MessageExpiry,
    PayloadFormat,
    UserProperties,
    ResponseTopic,
    SubscriptionIdentifiers,
}

/// Why a format string is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("nothing follows the last %")]
    IncompleteSpecifier,
    #[error("%{0} is unknown or not supported; see --help")]
    Specifier(char),
    #[error("nothing follows the last \\")]
    IncompleteEscape,
    #[error("\\{0} is unknown; see --help")]
    Escape(char),
    #[error("@ times are not supported; %I and %U show the time, and @@ is an @")]
    Time,
}

/// Why a message cannot be shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum RenderError {
    #[error("the payload is not valid JSON on topic {topic}")]
    NotJson { topic: String },
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            match character {
                '%' => match characters.next().ok_or(FormatError::IncompleteSpecifier)? {
                    '%' => literal.push('%'),
                    specifier => {
                        let piece =
                            Piece::new(specifier).ok_or(FormatError::Specifier(specifier))?;
                        if !literal.is_empty() {
                            pieces.push(Piece::Literal(std::mem::take(&mut literal)));
                        }
                        pieces.push(piece);
                    }
                },
                '@' => match characters.next() {
                    Some('@') => literal.push('@'),
                    _ => return Err(FormatError::Time),
                },
                '\\' => literal.push(
                    match characters.next().ok_or(FormatError::IncompleteEscape)? {
                        '\\' => '\\',
                        '0' => '\0',
                        'a' => '\x07',
                        'e' => '\x1B',
                        'n' => '\n',
                        'r' => '\r',
                        't' => '\t',
                        'v' => '\x0B',
                        other => return Err(FormatError::Escape(other)),
                    },
                ),
                other => literal.push(other),
            }
        }
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        Ok(Self(pieces))
    }
}

impl Piece {
    fn new(specifier: char) -> Option<Self> {
        Some(match specifier {
            't' => Self::Topic,
            'p' => Self::Payload,
            'x' => Self::HexLower,
            'X' => Self::HexUpper,
            'l' => Self::PayloadLength,
            'q' => Self::Qos,
            'r' => Self::Retain,
            'm' => Self::PacketId,
            'j' => Self::JsonText,
            'J' => Self::JsonValue,
            'I' => Self::IsoTime,
            'U' => Self::UnixTime,
            'C' => Self::ContentType,
            'D' => Self::CorrelationData,
            'E' => Self::MessageExpiry,
            'F' => Self::PayloadFormat,
            'P' => Self::UserProperties,
            'R' => Self::ResponseTopic,
            'S' => Self::SubscriptionIdentifiers,
            _ => return None,
        })
    }
}

impl Format {
    /// What is shown without `-F`.
    pub(super) fn plain(is_verbose: bool) -> Self {
        if is_verbose {
            let space = Piece::Literal(" ".to_owned());
            Self(vec![Piece::Topic, space, Piece::PayloadOrNull])
        } else {
            Self(vec![Piece::Payload])
        }
    }

    pub(super) fn with_newline(mut self) -> Self {
        self.0.push(Piece::Literal("\n".to_owned()));
        self
    }

    pub(super) fn render(&self, message: &IncomingMessage) -> Result<Vec<u8>, RenderError> {
        let arrived = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.render_at(message, arrived)
    }

    /// `arrived` is since the Unix epoch.
    fn render_at(
        &self,
        message: &IncomingMessage,
        arrived: Duration,
    ) -> Result<Vec<u8>, RenderError> {
        let mut out = Vec::new();
        let payload = &message.payload;
        for piece in &self.0 {
            match piece {
                Piece::Payload => out.extend_from_slice(payload),
                Piece::PayloadOrNull if payload.is_empty() => out.extend_from_slice(b"(null)"),
                Piece::PayloadOrNull => out.extend_from_slice(payload),
                Piece::CorrelationData => {
                    for property in message.properties.as_properties().iter() {
                        if let Property::CorrelationData(data) = property {
                            out.extend_from_slice(data);
                        }
                    }
                }
                piece => out.extend_from_slice(piece.text(message, arrived)?.as_bytes()),
            }
        }
        Ok(out)
    }
}

impl Piece {
    fn text(&self, message: &IncomingMessage, arrived: Duration) -> Result<String, RenderError> {
        let payload = &message.payload;
        let properties = || message.properties.as_properties().iter();
        let each = |text: fn(Property<'_>) -> Option<String>| {
            let texts: Vec<String> = properties().filter_map(text).collect();
            texts.join(" ")
        };
        Ok(match self {
            Self::Literal(text) => text.clone(),
            Self::Topic => message.topic.clone(),
            Self::Payload | Self::PayloadOrNull | Self::CorrelationData => {
                unreachable!("these are bytes, and were written as such")
            }
            Self::HexLower => hex(payload),
            Self::HexUpper => hex(payload).to_uppercase(),
            Self::PayloadLength => payload.len().to_string(),
            Self::Qos => (message.qos as u8).to_string(),
            Self::Retain => u8::from(message.retain).to_string(),
            Self::PacketId => message.packet_id.map_or(0, PacketId::get).to_string(),
            Self::JsonText => json(message, arrived, &quote(&String::from_utf8_lossy(payload))),
            Self::JsonValue => {
                let not_json = || RenderError::NotJson {
                    topic: message.topic.clone(),
                };
                let value = std::str::from_utf8(payload).map_err(|_| not_json())?;
                serde_json::from_str::<IgnoredAny>(value).map_err(|_| not_json())?;
                json(message, arrived, value)
            }
            Self::IsoTime => format!("{}+0000", date_and_time(arrived)),
            Self::UnixTime => format!("{}.{:09}", arrived.as_secs(), arrived.subsec_nanos()),
            Self::ContentType => each(|property| match property {
                Property::ContentType(text) => Some(text.to_owned()),
                _ => None,
            }),
            Self::MessageExpiry => each(|property| match property {
                Property::MessageExpiryInterval(seconds) => Some(seconds.to_string()),
                _ => None,
            }),
            Self::PayloadFormat => each(|property| match property {
                Property::PayloadFormatIndicator(is_utf8) => Some(u8::from(is_utf8).to_string()),
                _ => None,
            }),
            Self::UserProperties => each(|property| match property {
                Property::UserProperty(name, value) => Some(format!("{name}:{value}")),
                _ => None,
            }),
            Self::ResponseTopic => each(|property| match property {
                Property::ResponseTopic(topic) => Some(topic.to_owned()),
                _ => None,
            }),
            Self::SubscriptionIdentifiers => each(|property| match property {
                Property::SubscriptionIdentifier(identifier) => Some(identifier.to_string()),
                _ => None,
            }),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a String takes everything");
    }
    text
}

fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The members in the order in which mosquitto_sub writes them. `payload` is JSON already.
fn json(message: &IncomingMessage, arrived: Duration, payload: &str) -> String {
    let mut out = format!(
        r#"{{"tst":"{}.{:06}Z+0000","topic":{},"qos":{},"retain":{},"payloadlen":{}"#,
        date_and_time(arrived),
        arrived.subsec_micros(),
        quote(&message.topic),
        message.qos as u8,
        u8::from(message.retain),
        message.payload.len(),
    );
    let mut put = |member: &str, value: &str| {
        out.push_str(member);
        out.push_str(value);
    };
    if message.qos != QoS::AtMostOnce {
        let packet_id = message.packet_id.map_or(0, PacketId::get);
        put(r#","mid":"#, &packet_id.to_string());
    }
    let properties = json_properties(message);
    if !properties.is_empty() {
        put(
            r#","properties":"#,
            &format!("{{{}}}", properties.join(",")),
        );
    }
    put(r#","payload":"#, payload);
    out.push('}');
    out
}

/// The members of "properties".
fn json_properties(message: &IncomingMessage) -> Vec<String> {
    let properties = message.properties.as_properties();
    let user_properties: Vec<String> = properties
        .user_properties()
        .map(|(name, value)| format!("{}:{}", quote(name), quote(value)))
        .collect();
    let mut members = Vec::new();
    if !user_properties.is_empty() {
        members.push(format!(
            r#""user-properties":{{{}}}"#,
            user_properties.join(",")
        ));
    }
    let identifiers: Vec<String> = properties
        .subscription_identifiers()
        .map(|identifier| identifier.to_string())
        .collect();
    if !identifiers.is_empty() {
        members.push(format!(
            r#""subscription-identifier":[{}]"#,
            identifiers.join(",")
        ));
    }
    members.extend(properties.iter().filter_map(|property| {
        Some(match property {
            Property::PayloadFormatIndicator(is_utf8) => {
                format!(r#""payload-format-indicator":{}"#, u8::from(is_utf8))
            }
            Property::MessageExpiryInterval(seconds) => {
                format!(r#""message-expiry-interval":{seconds}"#)
            }
            Property::ContentType(text) => format!(r#""content-type":{}"#, quote(text)),
            Property::ResponseTopic(topic) => format!(r#""response-topic":{}"#, quote(topic)),
            Property::CorrelationData(data) => format!(
                r#""correlation-data":{}"#,
                quote(&String::from_utf8_lossy(data))
            ),
            _ => return None,
        })
    }));
    members
}

/// UTC, to the second: `2020-05-06T22:12:00`.
fn date_and_time(since_epoch: Duration) -> String {
    const SECONDS_PER_DAY: u64 = 86_400;
    let seconds = since_epoch.as_secs();
    let (day, second) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
    // The calendar repeats every 400 years of 146097 days. Counted from 1 March of year 0, the
    // leap day is the last of its year, and months have 30.6 days on average: this is
    // civil_from_days of Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms".
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    let year = era * 400 + year + next_year;
    format!(
        "{year:04}-{month:02}-{day_of_month:02}T{:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn message() -> IncomingMessage {
        IncomingMessage {
            topic: "a/\"b".to_owned(),
            payload: Bytes::from_static(br#"{"z":1}"#),
            qos: QoS::AtLeastOnce,
            retain: true,
            packet_id: PacketId::new(7),
            properties: [
                Property::UserProperty("k", "v"),
                Property::ContentType("text"),
                Property::CorrelationData(b"\x01"),
            ]
            .into_iter()
            .collect(),
        }
    }

    #[track_caller]
    fn render(format: &str, message: &IncomingMessage) -> String {
        let format: Format = format.parse().unwrap();
        let rendered = format.render_at(message, Duration::new(1_588_803_120, 1_000));
        String::from_utf8(rendered.unwrap()).unwrap()
    }

    #[test]
    fn every_specifier_shows_its_part() {
        let rendered = render(r"%t|%x|%X|%l|%q|%r|%m|%U|%I|%P|%C|%E|%%@@\t%p", &message());

        assert_eq!(
            rendered,
            "a/\"b|7b227a223a317d|7B227A223A317D|7|1|1|7|1588803120.000001000|\
             2020-05-06T22:12:00+0000|k:v|text||%@\t{\"z\":1}"
        );
    }

    #[test]
    fn json_has_the_members_of_mosquitto_sub() {
        let members = r#"{"tst":"2020-05-06T22:12:00.000001Z+0000","topic":"a/\"b","qos":1,"retain":1,"payloadlen":7,"mid":7,"properties":{"user-properties":{"k":"v"},"content-type":"text","correlation-data":"\u0001"},"payload":"#;

        assert_eq!(render("%J", &message()), format!(r#"{members}{{"z":1}}}}"#));
        assert_eq!(
            render("%j", &message()),
            format!(r#"{members}"{{\"z\":1}}"}}"#)
        );
    }

    #[test]
    fn a_payload_that_is_no_json_cannot_be_shown_as_json() {
        let mut message = message();
        message.payload = Bytes::from_static(b"plain");
        let format: Format = "%J".parse().unwrap();

        assert!(matches!(
            format.render(&message),
            Err(RenderError::NotJson { topic }) if topic == "a/\"b"
        ));
    }

    #[test]
    fn unknown_specifiers_are_refused() {
        let parse = |text: &str| text.parse::<Format>().unwrap_err();

        assert_eq!(parse("%z"), FormatError::Specifier('z'));
        assert_eq!(parse("%5t"), FormatError::Specifier('5'));
        assert_eq!(parse("%"), FormatError::IncompleteSpecifier);
        assert_eq!(parse(r"\q"), FormatError::Escape('q'));
        assert_eq!(parse("@H"), FormatError::Time);
    }

    #[test]
    fn dates_know_leap_years() {
        let date = |seconds| date_and_time(Duration::from_secs(seconds));

        assert_eq!(date(0), "1970-01-01T00:00:00");
        assert_eq!(date(951_782_399), "2000-02-28T23:59:59");
        assert_eq!(date(951_782_400), "2000-02-29T00:00:00");
        assert_eq!(date(1_709_251_199), "2024-02-29T23:59:59");
        assert_eq!(date(4_107_542_400), "2100-03-01T00:00:00");
    }
}
