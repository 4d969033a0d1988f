//! SIGHUP, and files that change.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::broker::Broker;
use crate::client::Client;
use crate::wire::{Connect, Version};

/// A configuration file and a users file.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new(users: &[&str]) -> Self {
        let files = Self {
            directory: TempDir::new().unwrap(),
        };
        files.configure("");
        files.set_users(users);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn configure(&self, more: &str) {
        let users = self.path("users.toml");
        let text = format!("auth.users_file = {users:?}\n{more}");
        fs::write(self.path("midge.toml"), text).unwrap();
    }

    fn set_users(&self, names: &[&str]) {
        let next = self.path("next.toml");
        for name in names {
            add_user(&next, name);
        }
        // As Kubernetes switches a link over: never half a file.
        fs::rename(&next, self.path("users.toml")).unwrap();
    }

    fn start(&self, settings: &[(&str, &str)]) -> Broker {
        let config = self.path("midge.toml");
        Broker::start_from(&config, settings)
    }
}

fn add_user(file: &Path, name: &str) {
    use std::io::Write;

    let mut child = Command::new(env!("CARGO_BIN_EXE_midge"))
        .args(["user", "add", "--file"])
        .arg(file)
        .arg(name)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"secret\n").unwrap();
    assert!(child.wait().unwrap().success());
}

fn as_user(name: &'static str) -> Connect {
    Connect {
        user: Some((name, "secret")),
        ..Connect::fleeting(Version::V5, name)
    }
}

/// The record of the `count`th event of this name.
#[track_caller]
fn wait_for_event(broker: &Broker, name: &str, count: usize) -> Value {
    broker.wait_for_log(name, |lines| {
        lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|record| record["event"] == name)
            .nth(count - 1)
    })
}

#[tokio::test]
async fn a_users_file_is_read_again_when_it_changes() {
    let files = Files::new(&["ann"]);
    let broker = files.start(&[("reload.interval", "50ms")]);
    let mut ann = Client::connect(broker.address(), &as_user("ann")).await;

    files.set_users(&["ann", "bob"]);
    wait_for_event(&broker, "reloaded", 1);

    Client::connect(broker.address(), &as_user("bob")).await;
    ann.ping().await.unwrap();
}

#[tokio::test]
async fn sighup_ends_the_connections_of_a_removed_user_and_no_others() {
    let files = Files::new(&["ann", "bob"]);
    let broker = files.start(&[("reload.interval", "off")]);
    let mut ann = Client::connect(broker.address(), &as_user("ann")).await;
    let mut bob = Client::connect(broker.address(), &as_user("bob")).await;

    files.set_users(&["ann"]);
    broker.signal("HUP");

    assert_eq!(bob.wait_for_end().await, Some(0x87));
    ann.ping().await.unwrap();
    assert!(
        Client::try_connect(broker.address(), &as_user("bob"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_bad_users_file_is_named_with_its_line_and_changes_nothing() {
    let files = Files::new(&["ann"]);
    let broker = files.start(&[("reload.interval", "off")]);
    let mut ann = Client::connect(broker.address(), &as_user("ann")).await;

    fs::write(files.path("users.toml"), "[users.bob]\npasword = 1\n").unwrap();
    broker.signal("HUP");
    let failed = wait_for_event(&broker, "reload_failed", 1);

    let error = failed["error"].as_str().unwrap();
    assert!(error.contains("users.toml:2:1"), "{error}");
    ann.ping().await.unwrap();
    Client::connect(broker.address(), &as_user("ann")).await;
}

#[tokio::test]
async fn what_can_change_in_the_configuration_does_and_the_rest_is_named() {
    let files = Files::new(&["ann"]);
    let broker = files.start(&[("reload.interval", "off")]);

    files.configure("log.level = \"debug\"\nlimits.connections_max = 1\nsys.interval = \"7s\"\n");
    broker.signal("HUP");
    let reloaded = wait_for_event(&broker, "reloaded", 1);

    assert_eq!(reloaded["needs_restart"], "sys.interval");
    let _first = Client::connect(broker.address(), &as_user("ann")).await;
    wait_for_event(&broker, "client_connected", 1);
    let second = Client::try_connect(broker.address(), &as_user("ann")).await;
    assert!(second.is_err());
}
