//! MQTT.js in Node: versions 5 and 4 of the package, and 0.3 from the time of the first tutorials.
//!
//! A scenario is a script in `js/` that plays all clients, checks what they see and ends with 0.

use tempfile::TempDir;

use crate::support::{
    Version,
    broker::Broker,
    certificates::Certificates,
    node::{MqttJs, script},
    test_each_version,
};

test_each_version![
    every_qos,
    exactly_once,
    offline_queue,
    reconnect_storm,
    resubscribe,
    retained,
    takeover,
    will,
];

fn every_qos(version: Version) {
    succeeds("every_qos.js", version);
}

fn exactly_once(version: Version) {
    succeeds("exactly_once.js", version);
}

fn offline_queue(version: Version) {
    succeeds("offline_queue.js", version);
}

fn reconnect_storm(version: Version) {
    succeeds("reconnect_storm.js", version);
}

fn resubscribe(version: Version) {
    succeeds("resubscribe.js", version);
}

fn retained(version: Version) {
    succeeds("retained.js", version);
}

fn takeover(version: Version) {
    succeeds("takeover.js", version);
}

fn will(version: Version) {
    succeeds("will.js", version);
}

#[test]
fn properties() {
    succeeds("properties.js", Version::V5);
}

#[test]
fn shared_subscription() {
    succeeds("shared_subscription.js", Version::V5);
}

#[test]
fn topic_alias() {
    succeeds("topic_alias.js", Version::V5);
}

#[test]
fn heritage_client_resumes_its_session() {
    let broker = Broker::start();
    script("js/heritage.js", MqttJs::V0, &broker).succeed();
}

#[test]
fn round_trip_over_tls() {
    round_trip_encrypted("tls");
}

#[test]
fn round_trip_over_websocket() {
    let broker = Broker::configure().websocket().start();
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        for path in ["", "/mqtt"] {
            let url = broker.url("ws") + path;
            script("js/round_trip.js", mqtt_js, &broker)
                .environment("BROKER_URL", &url)
                .succeed();
        }
    }
}

#[test]
fn round_trip_over_encrypted_websocket() {
    round_trip_encrypted("wss");
}

fn round_trip_encrypted(kind: &str) {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let broker = Broker::configure().encrypted(kind, &certificates).start();
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        script("js/round_trip.js", mqtt_js, &broker)
            .environment("BROKER_URL", &broker.url(kind))
            .environment(
                "CERTIFICATE_AUTHORITY",
                certificates.authority.to_str().unwrap(),
            )
            .succeed();
    }
}

/// Runs a scenario with both current versions of MQTT.js, each against a broker of its own.
#[track_caller]
fn succeeds(scenario: &str, version: Version) {
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        let broker = Broker::start();
        script(&format!("js/{scenario}"), mqtt_js, &broker)
            .version(version)
            .succeed();
    }
}
