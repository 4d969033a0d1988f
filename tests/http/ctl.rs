//! `midge ctl`, against a node that runs.

use std::net::TcpListener;
use std::process::Output;

use serde_json::{Value, json};

use crate::access::make_token;
use crate::broker::{Broker, midge};
use crate::mqtt::Client;

/// Runs it, with the words of `arguments`.
fn ctl(broker: &Broker, arguments: &str) -> Output {
    let mut command = midge(&broker.folder);
    let url = format!("http://{}", broker.http);
    command.args(["ctl", "--url", &url]);
    command.args(arguments.split(' ')).output().unwrap()
}

/// What it prints if it succeeds.
#[track_caller]
fn shown(broker: &Broker, arguments: &str) -> String {
    let output = ctl(broker, arguments);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What it says if it fails.
#[track_caller]
fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(error.starts_with("error: "), "{error}");
    error
}

#[test]
fn the_node_and_its_clients_are_shown_as_text_and_as_json() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "sensor-1");
    client.subscribe("home/#");
    let _other = Client::connect(broker.mqtt, "other");

    assert_eq!(
        shown(&broker, "nodes"),
        "NUMBER  NAME  STATE  THIS\n0       here  up     true\n"
    );
    assert!(shown(&broker, "status").contains("\nnode: here\n"));
    let clients = shown(&broker, "clients sensor-*");
    let lines: Vec<_> = clients.lines().collect();
    assert_eq!(lines.len(), 2, "{clients}");
    assert!(
        lines[1].starts_with("sensor-1   connected  here  5.0"),
        "{clients}"
    );
    assert_eq!(
        shown(&broker, "clients --state disconnected")
            .lines()
            .count(),
        1
    );
    let client = shown(&broker, "client sensor-1");
    assert!(
        client.contains("\nsubscriptions.0.filter: home/#\n"),
        "{client}"
    );
    assert!(shown(&broker, "subscribers home/x").contains("clients.0.client_id: sensor-1\n"));
    let lines = shown(&broker, "--json clients");
    let ids: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["client_id"].take())
        .collect();
    assert_eq!(ids, ["other", "sensor-1"]);
}

#[test]
fn a_client_is_kicked() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "a/1");

    assert_eq!(shown(&broker, "kick a/1"), "client a/1 was told to go\n");

    let (kind, body) = client.receive();
    assert_eq!((kind, body[0]), (0xE0, 0x98));
    let error = failure(&ctl(&broker, "kick nobody"));
    assert_eq!(error, "error: there is no client of this id\n");
}

#[test]
fn a_node_is_drained_and_undrained() {
    let broker = Broker::start();
    let client = Client::connect(broker.mqtt, "ann");

    let told = shown(&broker, "drain --wait");
    assert!(
        told.ends_with("node here is being drained; clients left: 0\n"),
        "{told}"
    );
    drop(client);
    assert_eq!(shown(&broker, "undrain"), "node here lets clients in\n");
    Client::connect(broker.mqtt, "ann");
    assert!(shown(&broker, "reload").starts_with("the files were read again"));
}

#[test]
fn retained_messages_are_listed_and_cleared() {
    let broker = Broker::start();
    for topic in ["a%2Fb", "a%2Fc", "d"] {
        let content = json!({ "payload": "x" });
        let path = format!("/api/v1/retained/{topic}");
        broker.send("PUT", &path, &content).expect(204);
    }

    assert_eq!(shown(&broker, "retained a/#").lines().count(), 3);
    let would = shown(&broker, "clear-retained a/# --dry-run");
    assert_eq!(would, "a/b\na/c\n2 messages would be cleared\n");
    let cleared = shown(&broker, "clear-retained a/#");
    assert_eq!(cleared, "a/b\na/c\n2 messages were cleared\n");
    assert_eq!(shown(&broker, "retained").lines().count(), 2);
}

#[test]
fn what_cannot_be_reached_or_is_refused_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let reader = make_token(&folder, "reader", "read");
    let file = folder.path().join("reader.token");
    std::fs::write(&file, format!("{reader}\n")).unwrap();
    std::fs::write(folder.path().join("wrong.token"), "mdg_guessed\n").unwrap();
    let broker = Broker::start_in(folder, &["http.tokens_file=tokens"]);

    let error = failure(&ctl(&broker, "nodes"));
    assert!(
        error.contains("needs a token") && error.contains("--token-file"),
        "{error}"
    );
    let error = failure(&ctl(&broker, "nodes --token-file wrong.token"));
    assert!(
        error.contains("refuses the token: the token is not known"),
        "{error}"
    );
    let error = failure(&ctl(&broker, "nodes --token-file none.token"));
    assert!(error.contains("none.token"), "{error}");
    assert!(shown(&broker, "nodes --token-file reader.token").contains("here"));
    let error = failure(&ctl(&broker, "drain --token-file reader.token"));
    assert!(error.contains("for reading only"), "{error}");

    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let mut command = midge(&broker.folder);
    let output = command.args(["ctl", "nodes"]).env("MIDGE_CTL_URL", &nobody);
    let error = failure(&output.output().unwrap());
    assert!(
        error.contains(&format!("cannot reach midge at {nobody}")),
        "{error}"
    );
    let mut command = midge(&broker.folder);
    let output = command.args(["ctl", "nodes", "--url", "https://here"]);
    assert!(failure(&output.output().unwrap()).contains("http://HOST:PORT"));
    // What answers there speaks MQTT.
    let mut command = midge(&broker.folder);
    let mqtt = format!("http://{}", broker.mqtt);
    let output = command.args(["ctl", "nodes", "--url", &mqtt]);
    assert!(failure(&output.output().unwrap()).contains("is not the API of midge"));
}
