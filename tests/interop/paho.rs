//! paho-mqtt in Python: versions 1.6 and 2.
//!
//! A scenario is a script in `py/` that plays all clients, checks what they see and ends with 0.

use crate::support::{
    Version,
    broker::Broker,
    python::{Paho, succeed},
    test_each_version,
};

test_each_version![
    every_qos,
    persistent_session,
    will,
    persistent_session_over_websocket
];

fn every_qos(version: Version) {
    succeeds("every_qos.py", version, "tcp");
}

fn persistent_session(version: Version) {
    succeeds("persistent_session.py", version, "tcp");
}

fn will(version: Version) {
    succeeds("will.py", version, "tcp");
}

fn persistent_session_over_websocket(version: Version) {
    succeeds("persistent_session.py", version, "ws");
}

#[test]
fn properties() {
    succeeds("properties.py", Version::V5, "tcp");
}

/// Runs a scenario with both versions of paho, each against a broker of its own.
#[track_caller]
fn succeeds(scenario: &str, version: Version, listener: &str) {
    for paho in [Paho::V1, Paho::V2] {
        let broker = Broker::configure().websocket().start();
        succeed(scenario, paho, version, &broker, listener);
    }
}
