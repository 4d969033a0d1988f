//! `-D COMMAND PROPERTY VALUE`: properties of version 5 on the command line.

use std::fmt;
use std::str::FromStr;

use clap::{Arg, ArgAction, ArgMatches, FromArgMatches};

use crate::mqtt::property::{PropertiesBuffer, Property};
use crate::mqtt::topic::validate_topic_name;

/// The packet that a property is for, or the Will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Command {
    Connect,
    Publish,
    Subscribe,
    Unsubscribe,
    Disconnect,
    Will,
}

const COMMANDS: [Command; 6] = [
    Command::Connect,
    Command::Publish,
    Command::Subscribe,
    Command::Unsubscribe,
    Command::Disconnect,
    Command::Will,
];

/// All `-D` of one command line, in words.
#[derive(Clone, Debug)]
pub(in crate::cli) struct PropertyArgs(Vec<Vec<String>>);

/// What [`PropertyArgs`] say.
#[derive(Debug, Default)]
pub(in crate::cli) struct CommandProperties(Vec<(Command, PropertiesBuffer)>);

/// What is wrong with a `-D`.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum PropertyError {
    #[error(
        "there is no command {0}: it is connect, publish, subscribe, unsubscribe, disconnect or will"
    )]
    UnknownCommand(String),
    #[error("{command} has no property {name}: it has {}", command.properties().join(", "))]
    UnknownProperty { command: Command, name: String },
    #[error("{name} takes {expected}")]
    ValueCount {
        name: String,
        expected: &'static str,
    },
    #[error("{name} is {expected}, not {value:?}")]
    Value {
        name: String,
        value: String,
        expected: String,
    },
    #[error("{command} has {name} twice")]
    Twice { command: Command, name: String },
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Publish => "publish",
            Self::Subscribe => "subscribe",
            Self::Unsubscribe => "unsubscribe",
            Self::Disconnect => "disconnect",
            Self::Will => "will",
        }
    }

    /// What a client may send in it, table 2-4.
    fn properties(self) -> &'static [&'static str] {
        match self {
            Self::Connect => &[
                "authentication-data",
                "authentication-method",
                "maximum-packet-size",
                "receive-maximum",
                "request-problem-information",
                "request-response-information",
                "session-expiry-interval",
                "topic-alias-maximum",
                "user-property",
            ],
            Self::Publish => &[
                "content-type",
                "correlation-data",
                "message-expiry-interval",
                "payload-format-indicator",
                "response-topic",
                "topic-alias",
                "user-property",
            ],
            Self::Subscribe => &["subscription-identifier", "user-property"],
            Self::Unsubscribe => &["user-property"],
            Self::Disconnect => &["reason-string", "session-expiry-interval", "user-property"],
            Self::Will => &[
                "content-type",
                "correlation-data",
                "message-expiry-interval",
                "payload-format-indicator",
                "response-topic",
                "user-property",
                "will-delay-interval",
            ],
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PropertyArgs {
    /// # Errors
    /// What is wrong with the first that is wrong, and its words.
    pub(super) fn parse(&self) -> Result<CommandProperties, (String, PropertyError)> {
        let mut properties = CommandProperties::default();
        for words in &self.0 {
            properties
                .add(words)
                .map_err(|error| (words.join(" "), error))?;
        }
        Ok(properties)
    }
}

impl CommandProperties {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn commands(&self) -> impl Iterator<Item = Command> {
        self.0.iter().map(|(command, _)| *command)
    }

    pub(in crate::cli) fn of(&self, command: Command) -> PropertiesBuffer {
        self.iter(command).collect()
    }

    pub(super) fn iter(&self, command: Command) -> impl Iterator<Item = Property<'_>> {
        self.0
            .iter()
            .filter(move |(of, _)| *of == command)
            .flat_map(|(_, property)| property.as_properties().iter())
    }

    fn add(&mut self, words: &[String]) -> Result<(), PropertyError> {
        let [command_name, name, values @ ..] = words else {
            unreachable!("clap has counted three at least");
        };
        let command = COMMANDS
            .into_iter()
            .find(|command| command.name() == command_name)
            .ok_or_else(|| PropertyError::UnknownCommand(command_name.clone()))?;
        if !command.properties().contains(&name.as_str()) {
            let name = name.clone();
            return Err(PropertyError::UnknownProperty { command, name });
        }
        let property = parse(name, values)?;
        let is_same = |other: Property<'_>| {
            std::mem::discriminant(&other) == std::mem::discriminant(&property)
        };
        if !matches!(property, Property::UserProperty(..)) && self.iter(command).any(is_same) {
            let name = name.clone();
            return Err(PropertyError::Twice { command, name });
        }
        self.0.push((command, [property].into_iter().collect()));
        Ok(())
    }
}

fn parse<'a>(name: &str, values: &'a [String]) -> Result<Property<'a>, PropertyError> {
    if name == "user-property" {
        return match values {
            [key, value] => Ok(Property::UserProperty(text(name, key)?, text(name, value)?)),
            _ => Err(PropertyError::ValueCount {
                name: name.to_owned(),
                expected: "a name and a value",
            }),
        };
    }
    let [value] = values else {
        return Err(PropertyError::ValueCount {
            name: name.to_owned(),
            expected: "one value",
        });
    };
    let value = value.as_str();
    Ok(match name {
        "authentication-data" => Property::AuthenticationData(text(name, value)?.as_bytes()),
        "authentication-method" => Property::AuthenticationMethod(text(name, value)?),
        "content-type" => Property::ContentType(text(name, value)?),
        "correlation-data" => Property::CorrelationData(text(name, value)?.as_bytes()),
        "maximum-packet-size" => Property::MaximumPacketSize(number(name, value, 1, u32::MAX)?),
        "message-expiry-interval" => {
            Property::MessageExpiryInterval(number(name, value, 0, u32::MAX)?)
        }
        "payload-format-indicator" => {
            Property::PayloadFormatIndicator(number(name, value, 0, 1)? == 1)
        }
        "reason-string" => Property::ReasonString(text(name, value)?),
        "receive-maximum" => Property::ReceiveMaximum(number(name, value, 1, u16::MAX)?),
        "request-problem-information" => {
            Property::RequestProblemInformation(number(name, value, 0, 1)? == 1)
        }
        "request-response-information" => {
            Property::RequestResponseInformation(number(name, value, 0, 1)? == 1)
        }
        "response-topic" => {
            validate_topic_name(value).map_err(|error| PropertyError::Value {
                name: name.to_owned(),
                value: value.to_owned(),
                expected: format!("a topic name ({error})"),
            })?;
            Property::ResponseTopic(value)
        }
        "session-expiry-interval" => {
            Property::SessionExpiryInterval(number(name, value, 0, u32::MAX)?)
        }
        "subscription-identifier" => {
            Property::SubscriptionIdentifier(number(name, value, 1, 268_435_455)?)
        }
        "topic-alias" => Property::TopicAlias(number(name, value, 1, u16::MAX)?),
        "topic-alias-maximum" => Property::TopicAliasMaximum(number(name, value, 0, u16::MAX)?),
        "will-delay-interval" => Property::WillDelayInterval(number(name, value, 0, u32::MAX)?),
        _ => unreachable!("every name that a command has is above"),
    })
}

fn number<T: Copy + FromStr + PartialOrd + fmt::Display>(
    name: &str,
    value: &str,
    minimum: T,
    maximum: T,
) -> Result<T, PropertyError> {
    value
        .parse()
        .ok()
        .filter(|number| (minimum..=maximum).contains(number))
        .ok_or_else(|| PropertyError::Value {
            name: name.to_owned(),
            value: value.to_owned(),
            expected: format!("a number from {minimum} to {maximum}"),
        })
}

fn text<'a>(name: &str, value: &'a str) -> Result<&'a str, PropertyError> {
    if value.len() > usize::from(u16::MAX) {
        return Err(PropertyError::Value {
            name: name.to_owned(),
            value: format!("{} bytes", value.len()),
            expected: "at most 65535 bytes long".to_owned(),
        });
    }
    Ok(value)
}

/// By hand, since derived arguments cannot tell one `-D` from the next.
impl clap::Args for PropertyArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.arg(
            Arg::new("property")
                .short('D')
                .long("property")
                .value_names(["COMMAND", "PROPERTY", "VALUE"])
                .num_args(3..=4)
                .allow_negative_numbers(true)
                .action(ArgAction::Append)
                .help("MQTT 5 property, as in: publish content-type text/plain")
                .long_help(
                    "MQTT 5 property of a packet that is sent, or of the Will, as in: \
                     -D publish content-type text/plain. COMMAND is connect, publish, subscribe, \
                     unsubscribe, disconnect or will. A user-property takes two values, and may \
                     be repeated.",
                ),
        )
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for PropertyArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let occurrences = matches.get_occurrences::<String>("property");
        Ok(Self(
            occurrences
                .into_iter()
                .flatten()
                .map(|words| words.cloned().collect())
                .collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
