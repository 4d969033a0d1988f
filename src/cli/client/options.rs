//! The flags that `midge pub` and `midge sub` share: where to connect, as whom, how.

use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{ArgAction, Args};
use rustls::ClientConfig;

use super::property_args::{Command, CommandProperties, PropertyArgs, PropertyError};
use super::tls::{self, TlsError};
use crate::mqtt::packet::{Connect, Will};
use crate::mqtt::property::{ConnectProperties, PropertiesBuffer, Property, WillProperties};
use crate::mqtt::topic::{InvalidTopic, SubscriptionFilter, validate_topic_name};
use crate::mqtt::{ProtocolVersion, QoS};

/// No documentation comment, where brackets are links.
const URL_HELP: &str = "Server and topic in one: mqtt[s]://[USER[:PASSWORD]@]HOST[:PORT]/TOPIC";

const DEFAULT_PORT: u16 = 1883;
const DEFAULT_TLS_PORT: u16 = 8883;

#[derive(Args, Debug)]
pub(in crate::cli) struct ConnectionArgs {
    /// Show this help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
    /// Host to connect to
    #[arg(
        short = 'h',
        long,
        default_value = "localhost",
        allow_hyphen_values = true
    )]
    host: String,
    /// Port to connect to [default: 1883, with TLS 8883]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    #[arg(short = 'L', long, value_name = "URL", help = URL_HELP, value_parser = parse_url, conflicts_with_all = ["host", "port"])]
    url: Option<Url>,
    /// Client identifier [default: the server chooses]
    #[arg(short, long, value_parser = parse_text, conflicts_with = "id_prefix", allow_hyphen_values = true)]
    id: Option<String>,
    /// Client identifier that begins so and ends with the process id
    #[arg(short = 'I', long, value_name = "PREFIX", value_parser = parse_text, allow_hyphen_values = true)]
    id_prefix: Option<String>,
    /// User name
    #[arg(short, long, value_name = "USER", value_parser = parse_text, allow_hyphen_values = true)]
    username: Option<String>,
    /// Password; everybody on this machine can see it, so better use --password-file
    #[arg(
        short = 'P',
        long = "pw",
        value_name = "PASSWORD",
        allow_hyphen_values = true
    )]
    password: Option<OsString>,
    /// Read the password from the first line of this file
    #[arg(long, value_name = "FILE", conflicts_with = "password")]
    password_file: Option<PathBuf>,
    /// Keep alive in seconds; 0 turns it off
    #[arg(
        short,
        long = "keepalive",
        value_name = "SECONDS",
        default_value_t = 60
    )]
    keep_alive: u16,
    /// Keep the session on the server (Clean Start off); needs -i
    #[arg(short = 'c', long = "disable-clean-session")]
    persistent: bool,
    /// Seconds that the session outlives the connection; -1 is for ever [default: 0, with -c -1]
    #[arg(short = 'x', long, value_name = "SECONDS", value_parser = parse_session_expiry, allow_negative_numbers = true)]
    session_expiry_interval: Option<u32>,
    /// Version of MQTT: 31, 311 or 5 (also mqttv31, mqttv311, mqttv5)
    #[arg(short = 'V', long = "protocol-version", value_name = "VERSION", default_value = "311", value_parser = parse_version)]
    version: ProtocolVersion,
    #[command(flatten)]
    properties: PropertyArgs,
    /// Topic of the Will
    #[arg(long, value_name = "TOPIC", value_parser = parse_topic)]
    will_topic: Option<String>,
    /// Payload of the Will [default: empty]
    #[arg(
        long,
        value_name = "PAYLOAD",
        requires = "will_topic",
        allow_hyphen_values = true
    )]
    will_payload: Option<OsString>,
    /// QoS of the Will
    #[arg(long, value_name = "QOS", default_value = "0", value_parser = parse_qos, requires = "will_topic")]
    will_qos: QoS,
    /// Retain the Will
    #[arg(long, requires = "will_topic")]
    will_retain: bool,
    /// Use TLS, and trust the certificate authorities in this PEM file and no others
    #[arg(long, value_name = "FILE")]
    cafile: Option<PathBuf>,
    /// Certificate of this client, PEM
    #[arg(long, value_name = "FILE", requires_all = ["key", "cafile"])]
    cert: Option<PathBuf>,
    /// Private key of this client, PEM
    #[arg(long, value_name = "FILE", requires_all = ["cert", "cafile"])]
    key: Option<PathBuf>,
    /// Accept a server certificate that is for another host
    #[arg(long, requires = "cafile")]
    insecure: bool,
    /// Show the packets, on stderr
    #[arg(short, long)]
    debug: bool,
    /// Show no errors
    #[arg(long)]
    pub(in crate::cli) quiet: bool,
}

/// What [`ConnectionArgs`] come to.
pub(in crate::cli) struct ConnectOptions {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) version: ProtocolVersion,
    pub(super) keep_alive: u16,
    pub(super) is_debug: bool,
    pub(in crate::cli) properties: CommandProperties,
    clean_start: bool,
    client_id: String,
    user_name: Option<String>,
    password: Option<Vec<u8>>,
    session_expiry_interval: Option<u32>,
    will: Option<WillOptions>,
}

struct WillOptions {
    topic: String,
    payload: Vec<u8>,
    qos: QoS,
    retain: bool,
    properties: PropertiesBuffer,
}

/// The parts of `-L`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Url {
    is_tls: bool,
    user_name: Option<String>,
    password: Option<String>,
    host: String,
    port: Option<u16>,
    topic: String,
}

/// Flags that do not go together, or files that are not as they must be.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum OptionsError {
    #[error("-c needs -i: the server finds the session by the client identifier")]
    PersistentWithoutId,
    #[error("-D and -x need -V 5: older versions of MQTT have no properties")]
    PropertiesBeforeVersion5,
    #[error("--retain-as-published needs -V 5")]
    RetainAsPublishedBeforeVersion5,
    #[error("-x and -D connect session-expiry-interval are the same; use one")]
    SessionExpiryTwice,
    #[error("-D will needs --will-topic")]
    WillPropertiesWithoutWill,
    #[error("a password needs a user name (-u) before MQTT 5")]
    PasswordWithoutUserName,
    #[error("a {0} can have 65535 bytes at most")]
    TooLong(&'static str),
    #[error("mqtts:// needs --cafile FILE")]
    TlsWithoutAuthorities,
    #[error("the topic in -L is none: {0}")]
    UrlTopic(InvalidTopic),
    #[error("-D {words}: {error}")]
    Property { words: String, error: PropertyError },
    #[error("-D {0} is for packets that this command does not send")]
    UselessProperty(Command),
    #[error("cannot read the password from {}: {error}", file.display())]
    PasswordFile { file: PathBuf, error: io::Error },
    #[error("cannot read {}: {error}", file.display())]
    MessageFile { file: PathBuf, error: io::Error },
    #[error("cannot read standard input: {0}")]
    StandardInput(io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl OptionsError {
    /// Whether the command line itself is wrong, and not a file that it names.
    pub(in crate::cli) fn is_wrong_use(&self) -> bool {
        match self {
            Self::PersistentWithoutId
            | Self::PropertiesBeforeVersion5
            | Self::RetainAsPublishedBeforeVersion5
            | Self::SessionExpiryTwice
            | Self::WillPropertiesWithoutWill
            | Self::PasswordWithoutUserName
            | Self::TooLong(_)
            | Self::TlsWithoutAuthorities
            | Self::UrlTopic(_)
            | Self::Property { .. }
            | Self::UselessProperty(_) => true,
            Self::PasswordFile { .. }
            | Self::MessageFile { .. }
            | Self::StandardInput(_)
            | Self::Tls(_) => false,
        }
    }
}

impl ConnectionArgs {
    /// The topic in `-L`.
    pub(in crate::cli) fn url_topic(&self) -> Option<&str> {
        self.url.as_ref().map(|url| url.topic.as_str())
    }

    /// `commands` are those that `-D` may name.
    pub(in crate::cli) fn into_options(
        self,
        commands: &[Command],
    ) -> Result<ConnectOptions, OptionsError> {
        let properties = self
            .properties
            .parse()
            .map_err(|(words, error)| OptionsError::Property { words, error })?;
        if let Some(command) = properties
            .commands()
            .find(|command| !commands.contains(command))
        {
            return Err(OptionsError::UselessProperty(command));
        }
        let is_v5 = self.version.is_v5();
        let has_properties = !properties.is_empty() || self.session_expiry_interval.is_some();
        if has_properties && !is_v5 {
            return Err(OptionsError::PropertiesBeforeVersion5);
        }
        if self.persistent && self.id.is_none() && self.id_prefix.is_none() {
            return Err(OptionsError::PersistentWithoutId);
        }
        let password = self.password()?;
        let (url_user_name, host, url_port, is_url_tls) = match self.url {
            Some(url) => (url.user_name, url.host, url.port, url.is_tls),
            None => (None, self.host, None, false),
        };
        let user_name = self.username.or(url_user_name);
        if password.is_some() && user_name.is_none() && !is_v5 {
            return Err(OptionsError::PasswordWithoutUserName);
        }

        let tls = match &self.cafile {
            None if is_url_tls => return Err(OptionsError::TlsWithoutAuthorities),
            None => None,
            Some(ca_file) => {
                let client = self.cert.as_deref().zip(self.key.as_deref());
                Some(tls::client_config(ca_file, client, self.insecure)?)
            }
        };
        let default_port = if tls.is_some() {
            DEFAULT_TLS_PORT
        } else {
            DEFAULT_PORT
        };
        let expiry_property = properties
            .iter(Command::Connect)
            .any(|property| matches!(property, Property::SessionExpiryInterval(_)));
        if expiry_property && self.session_expiry_interval.is_some() {
            return Err(OptionsError::SessionExpiryTwice);
        }
        let never = (self.persistent && !expiry_property).then_some(u32::MAX);
        let will_properties = properties.of(Command::Will);
        let will = match self.will_topic {
            None if !will_properties.as_properties().is_empty() => {
                return Err(OptionsError::WillPropertiesWithoutWill);
            }
            None => None,
            Some(topic) => Some(WillOptions {
                topic,
                payload: binary(
                    self.will_payload.unwrap_or_default().into_encoded_bytes(),
                    "Will payload",
                )?,
                qos: self.will_qos,
                retain: self.will_retain,
                properties: will_properties,
            }),
        };
        Ok(ConnectOptions {
            host,
            port: self.port.or(url_port).unwrap_or(default_port),
            tls,
            version: self.version,
            keep_alive: self.keep_alive,
            is_debug: self.debug,
            clean_start: !self.persistent,
            client_id: match (self.id, self.id_prefix) {
                (Some(id), _) => id,
                (None, Some(prefix)) => format!("{prefix}{}", std::process::id()),
                // MQTT 3.1 knows no empty one.
                (None, None) if self.version == ProtocolVersion::V3_1 => random_client_id(),
                (None, None) => String::new(),
            },
            user_name,
            password,
            session_expiry_interval: self.session_expiry_interval.or(never).filter(|_| is_v5),
            will,
            properties,
        })
    }

    fn password(&self) -> Result<Option<Vec<u8>>, OptionsError> {
        let password = if let Some(file) = &self.password_file {
            let mut contents = fs::read(file).map_err(|error| OptionsError::PasswordFile {
                file: file.clone(),
                error,
            })?;
            if let Some(end) = contents.iter().position(|&byte| byte == b'\n') {
                contents.truncate(end);
            }
            if contents.last() == Some(&b'\r') {
                contents.pop();
            }
            contents
        } else if let Some(password) = &self.password {
            password.as_encoded_bytes().to_owned()
        } else if let Some(password) = self.url.as_ref().and_then(|url| url.password.clone()) {
            password.into_bytes()
        } else {
            return Ok(None);
        };
        binary(password, "password").map(Some)
    }
}

impl ConnectOptions {
    /// For people.
    pub(super) fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub(in crate::cli) fn is_v5(&self) -> bool {
        self.version.is_v5()
    }

    pub(super) fn connect(&self) -> Connect<'_> {
        Connect {
            version: self.version,
            clean_start: self.clean_start,
            keep_alive: self.keep_alive,
            client_id: &self.client_id,
            will: self.will.as_ref().map(WillOptions::will),
            user_name: self.user_name.as_deref(),
            password: self.password.as_deref(),
            properties: self.connect_properties(),
        }
    }

    fn connect_properties(&self) -> ConnectProperties<'_> {
        let mut all = ConnectProperties {
            session_expiry_interval: self.session_expiry_interval,
            ..ConnectProperties::default()
        };
        for property in self.properties.iter(Command::Connect) {
            match property {
                Property::SessionExpiryInterval(it) => all.session_expiry_interval = Some(it),
                Property::ReceiveMaximum(it) => all.receive_maximum = Some(it),
                Property::MaximumPacketSize(it) => all.maximum_packet_size = Some(it),
                Property::TopicAliasMaximum(it) => all.topic_alias_maximum = Some(it),
                Property::RequestResponseInformation(it) => all.request_response_information = it,
                Property::RequestProblemInformation(it) => {
                    all.request_problem_information = Some(it);
                }
                Property::AuthenticationMethod(it) => all.authentication_method = Some(it),
                Property::AuthenticationData(it) => all.authentication_data = Some(it),
                Property::UserProperty(name, value) => all.user_properties.push((name, value)),
                _ => unreachable!("connect has no other properties"),
            }
        }
        all
    }
}

impl WillOptions {
    fn will(&self) -> Will<'_> {
        let all = self.properties.as_properties();
        let delay_interval = all.iter().find_map(|property| match property {
            Property::WillDelayInterval(seconds) => Some(seconds),
            _ => None,
        });
        Will {
            topic: &self.topic,
            payload: &self.payload,
            qos: self.qos,
            retain: self.retain,
            properties: WillProperties {
                delay_interval: delay_interval.unwrap_or(0),
                message_expiry_interval: all.message_expiry_interval(),
                all,
            },
        }
    }
}

/// Of 22 characters; MQTT 3.1 allows 23.
fn random_client_id() -> String {
    format!("midge-{:016x}", RandomState::new().hash_one(()))
}

/// What the wire carries with a length of two bytes.
fn binary(data: Vec<u8>, what: &'static str) -> Result<Vec<u8>, OptionsError> {
    if data.len() > usize::from(u16::MAX) {
        return Err(OptionsError::TooLong(what));
    }
    Ok(data)
}

pub(in crate::cli) fn parse_qos(text: &str) -> Result<QoS, &'static str> {
    text.parse()
        .ok()
        .and_then(QoS::from_bits)
        .ok_or("it is 0, 1 or 2")
}

pub(in crate::cli) fn parse_topic(text: &str) -> Result<String, InvalidTopic> {
    validate_topic_name(text)?;
    Ok(text.to_owned())
}

pub(in crate::cli) fn parse_filter(text: &str) -> Result<String, InvalidTopic> {
    SubscriptionFilter::parse(text)?;
    Ok(text.to_owned())
}

fn parse_text(text: &str) -> Result<String, &'static str> {
    if text.len() > usize::from(u16::MAX) {
        return Err("it can have 65535 bytes at most");
    }
    Ok(text.to_owned())
}

fn parse_version(text: &str) -> Result<ProtocolVersion, &'static str> {
    match text.strip_prefix("mqttv").unwrap_or(text) {
        "31" | "3.1" => Ok(ProtocolVersion::V3_1),
        "311" | "3.1.1" => Ok(ProtocolVersion::V3_1_1),
        "5" | "5.0" => Ok(ProtocolVersion::V5),
        _ => Err("it is 31, 311 or 5"),
    }
}

fn parse_session_expiry(text: &str) -> Result<u32, &'static str> {
    match text {
        "-1" | "∞" => Ok(u32::MAX),
        number => number
            .parse()
            .map_err(|_| "it is 0 to 4294967295, or -1 for ever"),
    }
}

fn parse_url(text: &str) -> Result<Url, &'static str> {
    let (is_tls, rest) = if let Some(rest) = text.strip_prefix("mqtt://") {
        (false, rest)
    } else if let Some(rest) = text.strip_prefix("mqtts://") {
        (true, rest)
    } else {
        return Err("it begins with mqtt:// or mqtts://");
    };
    let (authority, topic) = rest
        .split_once('/')
        .filter(|(_, topic)| !topic.is_empty())
        .ok_or("no /TOPIC follows the host")?;
    let (credentials, server) = match authority.rsplit_once('@') {
        Some((credentials, server)) => (Some(credentials), server),
        None => (None, authority),
    };
    let (user_name, password) = match credentials.map(|text| text.split_once(':')) {
        None => (None, None),
        Some(None) => (credentials, None),
        Some(Some((user_name, password))) => (Some(user_name), Some(password)),
    };
    let (host, port) = match server.strip_prefix('[') {
        // An IPv6 address.
        Some(bracketed) => {
            let (host, rest) = bracketed.split_once(']').ok_or("`]` is missing")?;
            (host, rest.strip_prefix(':'))
        }
        None => match server.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (server, None),
        },
    };
    if host.is_empty() {
        return Err("it names no host");
    }
    let port = port
        .map(|port| port.parse().map_err(|_| "the port is 1 to 65535"))
        .transpose()?;
    Ok(Url {
        is_tls,
        user_name: user_name.map(str::to_owned),
        password: password.map(str::to_owned),
        host: host.to_owned(),
        port,
        topic: topic.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_every_part() {
        let url = parse_url("mqtts://me:s@cret@[::1]:8884/a/b").unwrap();

        let expected = Url {
            is_tls: true,
            user_name: Some("me".to_owned()),
            password: Some("s@cret".to_owned()),
            host: "::1".to_owned(),
            port: Some(8884),
            topic: "a/b".to_owned(),
        };
        assert_eq!(url, expected);
    }

    #[test]
    fn a_url_without_topic_or_host_or_with_another_scheme_is_refused() {
        for url in [
            "mqtt://host",
            "mqtt://host/",
            "mqtt:///a",
            "http://host/a",
            "mqtt://h:x/a",
        ] {
            assert!(parse_url(url).is_err(), "{url}");
        }
    }
}
