//! A web page in a real browser that talks to the broker over WebSocket.

use std::{path::Path, process::Command};

use serde_json::json;
use tempfile::TempDir;

use crate::support::{
    Version,
    broker::Broker,
    mosquitto::{publish, subscribe},
    page::PageServer,
    program::Program,
};

#[test]
fn page_and_device_talk_to_each_other() {
    let broker = Broker::configure().websocket().start();
    let server = PageServer::start();
    let profile = TempDir::new().unwrap();
    let device = subscribe(
        &broker,
        Version::V311,
        &["-t", "to/device", "-q", "2", "-C", "1"],
    );
    publish(
        &broker,
        Version::V311,
        &["-r", "-q", "1", "-t", "own/state", "-m", "on"],
    );

    let _browser = open_in_browser(&server.url(&broker.url("ws")), profile.path());

    // The retained message may come before SUBACK is seen.
    let mut first = [server.next_report(), server.next_report()];
    first.sort_by_key(|report| report.get("granted").is_none());
    assert_eq!(
        first,
        [
            json!({"granted": [2, 1]}),
            json!({"topic": "own/state", "payload": "on", "qos": 1, "retain": true}),
        ]
    );
    assert_eq!(
        server.next_report(),
        json!({"topic": "own/greeting", "payload": "Grüße aus dem Browser", "qos": 1, "retain": false})
    );

    publish(
        &broker,
        Version::V311,
        &["-q", "2", "-t", "to/page", "-m", "21.5 °C"],
    );
    assert_eq!(
        server.next_report(),
        json!({"topic": "to/page", "payload": "21.5 °C", "qos": 2, "retain": false})
    );
    assert_eq!(device.messages(), ["seen: 21.5 °C"]);
}

fn open_in_browser(url: &str, profile: &Path) -> Program {
    Program::start(
        Command::new("chromium")
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
            ])
            .args([
                "--no-first-run",
                "--disable-sync",
                "--disable-component-update",
            ])
            .args(["--disable-background-networking", "--disable-dev-shm-usage"])
            // Without it, headless Chromium ends as soon as the page is loaded.
            .arg("--remote-debugging-port=0")
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg(url),
    )
}
