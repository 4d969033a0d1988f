use std::process::Command;

use super::{Version, broker::Broker, program::Program};

impl Version {
    /// The argument of `-V`.
    fn mosquitto_name(self) -> &'static str {
        match self {
            Self::V31 => "mqttv31",
            Self::V311 => "mqttv311",
            Self::V5 => "mqttv5",
        }
    }
}

/// `mosquitto_pub` with these arguments, and the broker's address.
pub(crate) fn mosquitto_pub(broker: &Broker, version: Version, arguments: &[&str]) -> Program {
    let mut command = Command::new("mosquitto_pub");
    address(&mut command, broker, version).args(arguments);
    Program::start(&mut command)
}

/// Publishes one message and waits until `mosquitto_pub` has ended with success.
#[track_caller]
pub(crate) fn publish(broker: &Broker, version: Version, arguments: &[&str]) {
    mosquitto_pub(broker, version, arguments).succeed();
}

/// `mosquitto_sub` with these arguments, and the broker's address; it has SUBACK when this returns.
#[track_caller]
pub(crate) fn subscribe(broker: &Broker, version: Version, arguments: &[&str]) -> Subscriber {
    let subscriber = resume(broker, version, arguments);
    subscriber.0.wait_for_line("Subscribed (mid:");
    subscriber
}

/// [`subscribe`] for a session that has messages waiting: these come before SUBACK, and the last
/// one of `-C` ends the program.
#[track_caller]
pub(crate) fn resume(broker: &Broker, version: Version, arguments: &[&str]) -> Subscriber {
    let mut command = line_buffered("mosquitto_sub");
    address(&mut command, broker, version)
        .arg("-d")
        .args(arguments);
    Subscriber(Program::start(&mut command))
}

/// Makes the persistent session of `client_id` with one subscription, and leaves.
#[track_caller]
pub(crate) fn make_session(
    broker: &Broker,
    version: Version,
    client_id: &str,
    filter: &str,
    qos: &str,
) {
    let mut command = Command::new("mosquitto_sub");
    address(&mut command, broker, version)
        .args(["-E", "-c", "-i", client_id, "-t", filter, "-q", qos]);
    Program::start(&mut command).succeed();
}

/// A `mosquitto_sub` whose debug output tells when it has subscribed.
pub(crate) struct Subscriber(Program);

impl Subscriber {
    /// What it printed for messages, as `-v` or `-F` say, once `count` lines are there.
    #[track_caller]
    pub(crate) fn wait_for_messages(&self, count: usize) -> Vec<String> {
        let what = format!("{count} messages");
        self.0.stdout().wait_for(&what, |lines| {
            let messages = without_debug_output(lines);
            (messages.len() >= count).then_some(messages)
        })
    }

    /// Waits for its end, which `-C` or `-W` cause; returns what it printed for messages.
    #[track_caller]
    pub(crate) fn messages(self) -> Vec<String> {
        without_debug_output(&self.0.succeed())
    }

    /// Ends it without DISCONNECT.
    pub(crate) fn kill(self) {
        self.0.kill();
    }
}

fn without_debug_output(lines: &[String]) -> Vec<String> {
    let is_message =
        |line: &&String| !line.starts_with("Client ") && !line.starts_with("Subscribed (mid:");
    lines.iter().filter(is_message).cloned().collect()
}

fn address<'a>(command: &'a mut Command, broker: &Broker, version: Version) -> &'a mut Command {
    command
        .args(["-h", "127.0.0.1", "-p", &broker.port().to_string()])
        .args(["-V", version.mosquitto_name()])
}

/// Makes a program that uses C's standard output print each line at once, although to a pipe.
fn line_buffered(program: &str) -> Command {
    let mut command = Command::new("stdbuf");
    command.args(["--output=L", program]);
    command
}
