//! `midge pub`

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncBufReadExt, BufReader, Stdin};
use tokio::time::{Instant, sleep_until};

use super::client::options::{OptionsError, parse_qos, parse_topic};
use super::client::{self, Client, ClientError, Command, ConnectOptions, ConnectionArgs, Event};
use crate::mqtt::QoS;
use crate::mqtt::property::PropertiesBuffer;
use crate::mqtt::topic::validate_topic_name;

#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub(super) struct Arguments {
    /// Topic to publish to
    #[arg(short, long, value_parser = parse_topic, required_unless_present = "url", conflicts_with = "url", allow_hyphen_values = true)]
    topic: Option<String>,
    #[command(flatten)]
    payload: PayloadArguments,
    /// Quality of service: 0, 1 or 2
    #[arg(short, long, default_value = "0", value_parser = parse_qos)]
    qos: QoS,
    /// Let the server keep the message for later subscribers
    #[arg(short, long)]
    retain: bool,
    /// Publish the same message so often
    #[arg(long, value_name = "COUNT", default_value_t = 1, conflicts_with = "stdin_line", value_parser = clap::value_parser!(u64).range(1..))]
    repeat: u64,
    /// Wait between repeats
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = parse_seconds)]
    repeat_delay: Duration,
    /// QoS 1 and 2 messages that may be on their way at the same time
    #[arg(short = 'M', long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    max_inflight: u16,
    #[command(flatten)]
    connection: ConnectionArgs,
}

/// What to publish; one of these.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct PayloadArguments {
    /// Payload
    #[arg(short, long, value_name = "PAYLOAD", allow_hyphen_values = true)]
    message: Option<OsString>,
    /// Publish the contents of a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Publish all of standard input as one message
    #[arg(short, long)]
    stdin_file: bool,
    /// Publish every line of standard input as a message
    #[arg(short = 'l', long)]
    stdin_line: bool,
    /// Publish an empty payload; with -r this removes the retained message
    #[arg(short, long)]
    null_message: bool,
}

fn parse_seconds(text: &str) -> Result<Duration, &'static str> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or("it is a number of seconds")
}

/// The packets that `-D` may name.
const COMMANDS: [Command; 4] = [
    Command::Connect,
    Command::Publish,
    Command::Disconnect,
    Command::Will,
];

/// Publishes, and returns the exit code: 0 when the server has taken everything.
pub(super) fn run(arguments: Arguments) -> ExitCode {
    let is_quiet = arguments.connection.quiet;
    let publisher = match Publisher::new(arguments) {
        Ok(publisher) => publisher,
        Err(error) => return client::refuse_options(&error, "pub", is_quiet),
    };
    client::run(publisher.run(), is_quiet)
}

struct Publisher {
    options: ConnectOptions,
    topic: String,
    qos: QoS,
    retain: bool,
    properties: PropertiesBuffer,
    source: Source,
    in_flight_max: u16,
    is_quiet: bool,
}

/// Where messages come from.
enum Source {
    Repeated {
        payload: Vec<u8>,
        left: u64,
        delay: Duration,
        /// When the next is due.
        next_at: Instant,
    },
    Lines {
        stdin: BufReader<Stdin>,
        line: Vec<u8>,
    },
}

/// Why not everything was published.
#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{error}; {unacknowledged} messages are not acknowledged")]
    Interrupted {
        error: ClientError,
        unacknowledged: usize,
    },
    #[error("cannot read standard input: {0}")]
    StandardInput(#[from] io::Error),
    #[error("the server refused {0} of the messages")]
    Refused(u64),
}

impl Source {
    fn new(arguments: &Arguments) -> Result<Self, OptionsError> {
        let payload = &arguments.payload;
        let payload = if payload.stdin_line {
            return Ok(Self::Lines {
                stdin: BufReader::new(tokio::io::stdin()),
                line: Vec::new(),
            });
        } else if let Some(message) = &payload.message {
            message.as_encoded_bytes().to_owned()
        } else if let Some(file) = &payload.file {
            fs::read(file).map_err(|error| OptionsError::MessageFile {
                file: file.clone(),
                error,
            })?
        } else if payload.stdin_file {
            let mut contents = Vec::new();
            io::stdin()
                .read_to_end(&mut contents)
                .map_err(OptionsError::StandardInput)?;
            contents
        } else {
            Vec::new()
        };
        Ok(Self::Repeated {
            payload,
            left: arguments.repeat,
            delay: arguments.repeat_delay,
            next_at: Instant::now(),
        })
    }

    /// Waits until there is something to publish, and returns whether there is. May be dropped and
    /// called again without loss.
    async fn ready(&mut self) -> io::Result<bool> {
        match self {
            Self::Repeated { left: 0, .. } => Ok(false),
            Self::Repeated { next_at, .. } => {
                sleep_until(*next_at).await;
                Ok(true)
            }
            // A line that was read in part stays in `line`.
            Self::Lines { stdin, line } => {
                stdin.read_until(b'\n', line).await?;
                Ok(!line.is_empty())
            }
        }
    }

    /// What [`Source::ready`] has waited for.
    fn payload(&self) -> &[u8] {
        match self {
            Self::Repeated { payload, .. } => payload,
            Self::Lines { line, .. } => line.strip_suffix(b"\n").unwrap_or(line),
        }
    }

    fn advance(&mut self) {
        match self {
            Self::Repeated {
                left,
                delay,
                next_at,
                ..
            } => {
                *left -= 1;
                *next_at = Instant::now() + *delay;
            }
            Self::Lines { line, .. } => line.clear(),
        }
    }
}

impl Publisher {
    fn new(arguments: Arguments) -> Result<Self, OptionsError> {
        let topic = arguments
            .topic
            .as_deref()
            .or_else(|| arguments.connection.url_topic())
            .expect("clap asks for one of the two")
            .to_owned();
        validate_topic_name(&topic).map_err(OptionsError::UrlTopic)?;
        let source = Source::new(&arguments)?;
        let is_quiet = arguments.connection.quiet;
        let options = arguments.connection.into_options(&COMMANDS)?;
        Ok(Self {
            properties: options.properties.of(Command::Publish),
            options,
            topic,
            qos: arguments.qos,
            retain: arguments.retain,
            source,
            in_flight_max: arguments.max_inflight,
            is_quiet,
        })
    }

    async fn run(mut self) -> Result<ExitCode, PublishError> {
        let mut client = Client::connect(&self.options).await?;
        let refused = self.publish_all(&mut client).await?;
        client
            .disconnect(&self.options.properties.of(Command::Disconnect))
            .await?;
        if refused > 0 {
            return Err(PublishError::Refused(refused));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Returns how many messages the server has refused.
    async fn publish_all(&mut self, client: &mut Client) -> Result<u64, PublishError> {
        let mut refused = 0;
        let mut is_exhausted = false;
        while !is_exhausted || client.unacknowledged() > 0 {
            tokio::select! {
                is_ready = self.source.ready(), if !is_exhausted && client.can_publish(self.in_flight_max) => {
                    if is_ready? {
                        let payload = self.source.payload();
                        client.publish(&self.topic, payload, self.qos, self.retain, &self.properties)?;
                        self.source.advance();
                    } else {
                        is_exhausted = true;
                    }
                }
                event = client.next() => match event {
                    Ok(Event::Published(answer)) if answer.reason.is_error() => {
                        refused += 1;
                        if !self.is_quiet {
                            client::complain(format_args!("error: publish to {} refused: {answer}", self.topic));
                        }
                    }
                    // A server may deliver to a session that is resumed; whoever subscribes to it
                    // gets the messages, since they are not acknowledged here.
                    Ok(Event::Published(_) | Event::Message(_) | Event::Subscribed(_) | Event::Unsubscribed(_) | Event::Sent) => {}
                    Err(error) => return Err(PublishError::Interrupted {
                        error,
                        unacknowledged: client.unacknowledged(),
                    }),
                },
            }
        }
        Ok(refused)
    }
}
