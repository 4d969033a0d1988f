//! `midge sub`

mod format;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep, timeout};

use self::format::Format;
use super::client::options::{OptionsError, parse_filter, parse_qos};
use super::client::{
    self, Client, ClientError, Command, ConnectOptions, ConnectionArgs, Event, IncomingMessage,
};
use crate::mqtt::QoS;
use crate::mqtt::property::PropertiesBuffer;
use crate::mqtt::topic::{
    InvalidTopic, RetainHandling, SubscribeOptions, SubscriptionFilter, TopicFilter,
};

#[derive(Args, Debug)]
#[command(disable_help_flag = true)]
pub(super) struct Arguments {
    /// Topic filter to subscribe to; may be repeated
    #[arg(short, long, value_name = "FILTER", value_parser = parse_filter, required_unless_present_any = ["url", "unsubscribe"], allow_hyphen_values = true)]
    topic: Vec<String>,
    /// Show nothing of the topics that match; may be repeated
    #[arg(short = 'T', long, value_name = "FILTER", value_parser = parse_topic_filter, allow_hyphen_values = true)]
    filter_out: Vec<TopicFilter>,
    /// Unsubscribe from a topic filter that a kept session has; may be repeated
    #[arg(short = 'U', long, value_name = "FILTER", value_parser = parse_filter, allow_hyphen_values = true)]
    unsubscribe: Vec<String>,
    /// Quality of service: 0, 1 or 2
    #[arg(short, long, default_value = "0", value_parser = parse_qos)]
    qos: QoS,
    /// Show the topic before each payload
    #[arg(short, long)]
    verbose: bool,
    /// Leave after so many messages
    #[arg(short = 'C', value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Leave after so many seconds, with exit code 27
    #[arg(short = 'W', value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// Leave when the server has answered the subscriptions
    #[arg(short = 'E')]
    exit_after_subscribe: bool,
    /// Show no retained messages
    #[arg(short = 'R', conflicts_with = "retained_only")]
    no_retained: bool,
    /// Show retained messages only, and leave at the first other one
    #[arg(long)]
    retained_only: bool,
    /// Remove every retained message that comes from the server; -T spares some
    #[arg(long, conflicts_with = "no_retained")]
    remove_retained: bool,
    /// Let the server send the retain flag as the message was published with (MQTT 5)
    #[arg(long)]
    retain_as_published: bool,
    /// End no message with a new line
    #[arg(short = 'N')]
    no_newline: bool,
    /// Show messages in a format of your own
    ///
    /// %t topic, %p payload, %x and %X payload in hexadecimal, %l length of the payload, %q QoS,
    /// %r retain flag, %m packet identifier, %j JSON with the payload as text, %J JSON with a
    /// payload that is JSON itself, %I time of arrival as ISO 8601 in UTC, %U the same as seconds
    /// since 1970, %C content type, %D correlation data, %E message expiry, %F payload format, %P
    /// user properties, %R response topic, %S subscription identifiers, %% a percent sign. In
    /// \\\\, \\0, \\a, \\e, \\n, \\r, \\t and \\v the backslash is that of C. Field widths and @ times of
    /// mosquitto_sub are not supported.
    #[arg(
        short = 'F',
        value_name = "FORMAT",
        conflicts_with = "verbose",
        allow_hyphen_values = true
    )]
    format: Option<Format>,
    #[command(flatten)]
    connection: ConnectionArgs,
}

fn parse_topic_filter(text: &str) -> Result<TopicFilter, InvalidTopic> {
    TopicFilter::new(text)
}

/// The packets that `-D` may name.
const COMMANDS: [Command; 5] = [
    Command::Connect,
    Command::Subscribe,
    Command::Unsubscribe,
    Command::Disconnect,
    Command::Will,
];

/// As mosquitto_sub.
const EXIT_TIMEOUT: u8 = 27;

/// How long to try to say goodbye.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait before the first reconnect; each further wait is twice as long.
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(500);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(30);

/// Subscribes and shows what comes, until something says that it is enough.
pub(super) fn run(arguments: Arguments) -> ExitCode {
    let is_quiet = arguments.connection.quiet;
    match Subscriber::new(arguments) {
        Ok(subscriber) => client::run(subscriber.run(), is_quiet),
        Err(error) => client::refuse_options(&error, "sub", is_quiet),
    }
}

struct Subscriber {
    options: ConnectOptions,
    filters: Vec<String>,
    subscribe_options: SubscribeOptions,
    unsubscribe: Vec<String>,
    filters_out: Vec<TopicFilter>,
    format: Format,
    timeout: Option<Duration>,
    is_quiet: bool,
    exit_after_subscribe: bool,
    retained: Retained,
    remove_retained: bool,
    /// Messages that are still to be shown, if there is an end to it.
    count_left: Option<u64>,
    stdout: Stdout,
}

/// Which retained messages to show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Retained {
    Shown,
    Hidden,
    Only,
}

/// Why nothing more is shown.
enum End {
    Enough,
    /// Whoever read our output has gone.
    OutputClosed,
    TimedOut,
    Interrupted,
}

#[derive(Debug, thiserror::Error)]
enum SubscribeError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the server refused all subscriptions")]
    AllRefused,
    #[error("cannot write the output: {0}")]
    Output(io::Error),
    #[error("cannot listen for signals: {0}")]
    Signals(io::Error),
}

impl Subscriber {
    fn new(arguments: Arguments) -> Result<Self, OptionsError> {
        let mut filters = arguments.topic;
        if let Some(filter) = arguments.connection.url_topic() {
            SubscriptionFilter::parse(filter).map_err(OptionsError::UrlTopic)?;
            filters.push(filter.to_owned());
        }
        let is_quiet = arguments.connection.quiet;
        let options = arguments.connection.into_options(&COMMANDS)?;
        if arguments.retain_as_published && !options.is_v5() {
            return Err(OptionsError::RetainAsPublishedBeforeVersion5);
        }
        let format = arguments
            .format
            .unwrap_or_else(|| Format::plain(arguments.verbose));
        Ok(Self {
            options,
            filters,
            subscribe_options: SubscribeOptions {
                maximum_qos: arguments.qos,
                no_local: false,
                retain_as_published: arguments.retain_as_published,
                retain_handling: RetainHandling::SendAtSubscribe,
            },
            unsubscribe: arguments.unsubscribe,
            filters_out: arguments.filter_out,
            format: if arguments.no_newline {
                format
            } else {
                format.with_newline()
            },
            timeout: arguments.timeout.map(Duration::from_secs),
            is_quiet,
            exit_after_subscribe: arguments.exit_after_subscribe,
            retained: if arguments.no_retained {
                Retained::Hidden
            } else if arguments.retained_only {
                Retained::Only
            } else {
                Retained::Shown
            },
            remove_retained: arguments.remove_retained,
            count_left: arguments.count,
            stdout: tokio::io::stdout(),
        })
    }

    async fn run(mut self) -> Result<ExitCode, SubscribeError> {
        let mut client = None;
        let time_out = self.timeout;
        let mut interrupt = Interrupt::new().map_err(SubscribeError::Signals)?;
        let end = tokio::select! {
            end = self.show_messages(&mut client) => end,
            () = sleep(time_out.unwrap_or_default()), if time_out.is_some() => Ok(End::TimedOut),
            () = interrupt.wait() => Ok(End::Interrupted),
        };
        if let Some(client) = &mut client {
            let properties = self.options.properties.of(Command::Disconnect);
            // We leave in any case; a server that does not read must not keep us.
            let _ = timeout(DISCONNECT_TIMEOUT, client.disconnect(&properties)).await;
        }
        Ok(match end? {
            End::Enough | End::OutputClosed | End::Interrupted => ExitCode::SUCCESS,
            End::TimedOut => {
                self.complain("Timed out");
                ExitCode::from(EXIT_TIMEOUT)
            }
        })
    }

    /// Connects, and connects again whenever the connection is lost.
    ///
    /// `client` is the caller's, who disconnects it even if this future is dropped.
    async fn show_messages(&mut self, client: &mut Option<Client>) -> Result<End, SubscribeError> {
        let mut client = client.insert(Client::connect(&self.options).await?);
        self.subscribe(client);
        loop {
            let error = match self.show_until_lost(client).await {
                Err(SubscribeError::Client(error)) if error.is_temporary() => error,
                outcome => return outcome,
            };
            self.complain(&error.to_string());
            client = self.reconnect(client).await?;
            if !client.session_present() {
                self.subscribe(client);
            }
        }
    }

    async fn reconnect<'a>(
        &self,
        client: &'a mut Client,
    ) -> Result<&'a mut Client, SubscribeError> {
        let mut delay = RECONNECT_DELAY_MIN;
        loop {
            self.complain(&format!("reconnecting in {} s", delay.as_secs_f32()));
            sleep(delay).await;
            match client.reconnect(&self.options).await {
                Ok(()) => return Ok(client),
                Err(error) if error.is_temporary() => self.complain(&error.to_string()),
                Err(error) => return Err(error.into()),
            }
            delay = (delay * 2).min(RECONNECT_DELAY_MAX);
        }
    }

    fn subscribe(&self, client: &mut Client) {
        let properties = &self.options.properties;
        if !self.filters.is_empty() {
            let properties = properties.of(Command::Subscribe);
            client.subscribe(&self.filters, self.subscribe_options, &properties);
        }
        if !self.unsubscribe.is_empty() {
            client.unsubscribe(&self.unsubscribe, &properties.of(Command::Unsubscribe));
        }
    }

    async fn show_until_lost(&mut self, client: &mut Client) -> Result<End, SubscribeError> {
        let mut is_enough = false;
        while !is_enough || client.unacknowledged() > 0 {
            match client.next().await? {
                // What comes after the last one stays with the server.
                Event::Message(_) if is_enough => {}
                Event::Message(message) => {
                    match self.show(client, &message).await {
                        Ok(enough) => is_enough = enough,
                        Err(SubscribeError::Output(error))
                            if error.kind() == io::ErrorKind::BrokenPipe =>
                        {
                            return Ok(End::OutputClosed);
                        }
                        Err(error) => return Err(error),
                    }
                    // Only now: a message that was not shown is delivered again.
                    client.acknowledge(&message);
                }
                Event::Subscribed(answers) => {
                    let mut is_any_granted = false;
                    for (answer, filter) in answers.iter().zip(&self.filters) {
                        if answer.reason.is_error() {
                            self.complain(&format!("subscription to {filter} refused: {answer}"));
                        } else {
                            is_any_granted = true;
                        }
                    }
                    if !is_any_granted {
                        return Err(SubscribeError::AllRefused);
                    }
                    is_enough |= self.exit_after_subscribe;
                }
                Event::Unsubscribed(answers) => {
                    for (answer, filter) in answers.iter().zip(&self.unsubscribe) {
                        if answer.reason.is_error() {
                            self.complain(&format!("unsubscribe from {filter} refused: {answer}"));
                        }
                    }
                    is_enough |= self.exit_after_subscribe;
                }
                Event::Published(answer) if answer.reason.is_error() => {
                    self.complain(&format!("a retained message was not removed: {answer}"));
                }
                Event::Published(_) | Event::Sent => {}
            }
        }
        Ok(End::Enough)
    }

    /// Returns whether it was the last one.
    async fn show(
        &mut self,
        client: &mut Client,
        message: &IncomingMessage,
    ) -> Result<bool, SubscribeError> {
        match (self.retained, message.retain) {
            (Retained::Only, false) => return Ok(true),
            (Retained::Hidden, true) => return Ok(false),
            _ => {}
        }
        let topic = &message.topic;
        if self.filters_out.iter().any(|filter| filter.matches(topic)) {
            return Ok(false);
        }
        if self.remove_retained && message.retain {
            // QoS 1, to leave only when it has been done.
            let properties = PropertiesBuffer::new();
            client.publish(topic, &[], QoS::AtLeastOnce, true, &properties)?;
        }
        match self.format.render(message) {
            Ok(text) => {
                let output = SubscribeError::Output;
                self.stdout.write_all(&text).await.map_err(output)?;
                self.stdout.flush().await.map_err(output)?;
            }
            Err(error) => self.complain(&error.to_string()),
        }
        if let Some(left) = &mut self.count_left {
            *left -= 1;
        }
        Ok(self.count_left == Some(0))
    }

    fn complain(&self, what: &str) {
        if !self.is_quiet {
            client::complain(format_args!("{what}"));
        }
    }
}

/// Ctrl-C and SIGTERM.
struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupt {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
