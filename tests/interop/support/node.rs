use std::{fmt, process::Command};

use super::{Version, broker::Broker, program::Program, source_file, test_tool};

/// A major version of the package `mqtt`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MqttJs {
    /// 0.3, of the time of the first tutorials; it speaks only MQTT 3.1.
    V0,
    V4,
    V5,
}

impl fmt::Display for MqttJs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V0 => "0",
            Self::V4 => "4",
            Self::V5 => "5",
        })
    }
}

/// A script below `tests/interop`, whose `require('mqtt')` finds this version of MQTT.js.
///
/// The script finds the broker in `BROKER_URL`, `BROKER_HOST` and `BROKER_PORT`.
pub(crate) struct Script(Command);

pub(crate) fn script(path: &str, mqtt_js: MqttJs, broker: &Broker) -> Script {
    let modules = test_tool("js/node_modules");
    let chosen = test_tool(&format!("js/mqtt-{mqtt_js}"));
    let mut command = Command::new("node");
    command
        .arg(source_file(path))
        .env(
            "NODE_PATH",
            format!("{}:{}", chosen.display(), modules.display()),
        )
        // The broker under test listens on IPv4; `localhost` may be both.
        .env("NODE_OPTIONS", "--dns-result-order=ipv4first")
        .env("BROKER_URL", broker.url("tcp"))
        .env("BROKER_HOST", "127.0.0.1")
        .env("BROKER_PORT", broker.port().to_string());
    Script(command)
}

impl Script {
    pub(crate) fn environment(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    pub(crate) fn version(self, version: Version) -> Self {
        self.environment("PROTOCOL_VERSION", version.level())
    }

    #[track_caller]
    pub(crate) fn start(mut self) -> Program {
        Program::start(&mut self.0)
    }

    /// Runs the script to its end, which must be a success.
    #[track_caller]
    pub(crate) fn succeed(self) -> Vec<String> {
        self.start().succeed()
    }
}
