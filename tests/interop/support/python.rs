use std::{fmt, process::Command};

use super::{Version, broker::Broker, program::Program, source_file, test_tool};

/// A major version of the package `paho-mqtt`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Paho {
    V1,
    V2,
}

impl fmt::Display for Paho {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V1 => "1",
            Self::V2 => "2",
        })
    }
}

/// Runs a script of `tests/interop/py` to its end, which must be a success.
///
/// The script finds the broker in `BROKER_PORT` and `PROTOCOL_VERSION`; `TRANSPORT` is the name
/// of the listener that it uses.
#[track_caller]
pub(crate) fn succeed(script: &str, paho: Paho, version: Version, broker: &Broker, listener: &str) {
    let mut command = Command::new(test_tool("python/bin/python"));
    command
        .arg(source_file("py").join(script))
        .env("PYTHONPATH", test_tool(&format!("paho-{paho}")))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("PYTHONUNBUFFERED", "1")
        .env("BROKER_PORT", broker.address(listener).port().to_string())
        .env("PROTOCOL_VERSION", version.level())
        .env("TRANSPORT", listener);
    Program::start(&mut command).succeed();
}
