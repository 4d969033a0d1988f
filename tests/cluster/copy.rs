//! `midge store copy`: what a node with a store of its own has left, clients find on MongoDB.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use mongodb::bson::{Document, doc};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::client::Client;
use crate::lines::Lines;
use crate::mongod::{Database, POLL_PAUSE, ReplicaSet};
use crate::node::Cluster;
use crate::process::Process;
use crate::proxy::Proxy;
use crate::wire::{Answer, Connect, Packet, Publish, Version, Will};

/// An embedded store, and the node that uses it.
struct Source {
    directory: TempDir,
    cluster: Cluster,
}

impl Source {
    async fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("data").to_str().unwrap().to_owned();
        let settings = vec![("store.path".to_owned(), path)];
        Self {
            directory,
            cluster: Cluster::start(vec![settings]).await,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    async fn connect(&mut self, connect: &Connect) -> Client {
        Client::connect(self.cluster.node(0).address(), connect).await
    }

    /// A session that lasts, subscribes, and whose client is gone.
    async fn subscribe_and_leave(&mut self, client_id: &str, filter: &str, qos: u8) {
        let mut client = self.connect(&persistent(client_id)).await;
        client.subscribe(filter, qos).await.unwrap();
        client.disconnect().await.unwrap();
    }

    fn copy_command(&self, database: &Database) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
        command.args(["store", "copy", "--json", "--from"]);
        command.arg(self.path());
        for (key, value) in database.settings() {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        command.stdin(Stdio::null());
        command
    }

    fn copy_to(&self, database: &Database) -> Output {
        self.copy_command(database).output().unwrap()
    }

    fn spawn_copy_to(&self, database: &Database) -> Process {
        let mut child = self
            .copy_command(database)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Lines::collect(child.stderr.take().expect("stderr is piped"));
        Process::new("midge store copy".to_owned(), child, log)
    }
}

fn persistent(client_id: &str) -> Connect {
    Connect::persistent(Version::V5, client_id)
}

#[track_caller]
fn expect_copied(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn expect_refused(output: &Output, reason: &str) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    let refusal = errors.lines().find(|line| line.starts_with("error: "));
    assert!(
        refusal.is_some_and(|line| line.contains(reason)),
        "{reason:?} is not in {errors}"
    );
}

async fn receive_texts(client: &mut Client, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        let message = client.message().await.unwrap();
        texts.push(message.text().to_owned());
    }
    texts
}

/// Of the numbered message.
fn qos_of(number: u32) -> u8 {
    1 + u8::from(number.is_multiple_of(3))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_of_an_embedded_store_is_found_on_mongodb() {
    let mut source = Source::start().await;
    source.subscribe_and_leave("reader", "data/#", 2).await;
    source
        .subscribe_and_leave("member", "$share/group/work/#", 1)
        .await;
    source.subscribe_and_leave("heir", "will/#", 1).await;
    let mut publisher = source.connect(&persistent("publisher")).await;
    for number in 0..200 {
        let message = Publish::new("data/numbers", &number.to_string(), qos_of(number));
        publisher.publish(&message).await.unwrap();
    }
    for number in 0..20 {
        let message = Publish::new("work/numbers", &number.to_string(), 1);
        publisher.publish(&message).await.unwrap();
    }
    for name in ["a", "b", "c"] {
        let message = Publish::new(&format!("kept/{name}"), name, 1).retained();
        publisher.publish(&message).await.unwrap();
    }
    // Received, and not yet released by the client.
    let unreleased = Publish {
        packet_id: 7,
        ..Publish::new("data/once", "once", 2)
    };
    publisher
        .send(&unreleased.encode(Version::V5))
        .await
        .unwrap();
    let received = publisher.receive().await.unwrap();
    assert_eq!(received, Packet::Answer(Answer::PubRec, 7, 0));
    // Received by the client, and not yet completed.
    let mut halfway = source.connect(&persistent("halfway")).await;
    halfway.subscribe("half/#", 2).await.unwrap();
    publisher
        .publish(&Publish {
            packet_id: 8,
            ..Publish::new("half/way", "half", 2)
        })
        .await
        .unwrap();
    let Packet::Publish(half) = halfway.receive().await.unwrap() else {
        panic!("a message comes");
    };
    halfway.acknowledge(&half).await.unwrap();
    let release = halfway.receive().await.unwrap();
    assert_eq!(release, Packet::Answer(Answer::PubRel, half.packet_id, 0));
    let mortal = Connect {
        will: Some(Will {
            topic: "will/mortal".to_owned(),
            payload: "last words".to_owned(),
            qos: 1,
            delay_interval: 0,
        }),
        ..persistent("mortal")
    };
    let _mortal = source.connect(&mortal).await;
    source.cluster.node(0).kill();

    let database = Database::shared();
    let copied = expect_copied(&source.copy_to(&database));
    expect_refused(
        &source.copy_to(&database),
        "this database already has sessions",
    );

    let expected = json!({
        "identical": true,
        "sessions": 7,
        "subscriptions": 4,
        "exchanges": 2,
        "messages": 222,
        "retained": 3,
        "expired": 0,
        "differences": 0,
    });
    assert_eq!(copied, expected);
    let mut cluster = Cluster::start(vec![database.settings()]).await;
    let address = cluster.node(0).address();
    let mut reader = Client::connect(address, &persistent("reader")).await;
    assert!(reader.session_present);
    let texts = receive_texts(&mut reader, 201).await;
    // Those of one QoS are in order.
    let (second, first): (Vec<_>, Vec<_>) = (0..200).partition(|number| qos_of(*number) == 2);
    let in_order = |numbers: Vec<u32>| numbers.into_iter().map(|number| number.to_string());
    let mut expected: Vec<_> = in_order(first).collect();
    let (received_second, received_first): (Vec<_>, Vec<_>) =
        texts.into_iter().partition(|text| !expected.contains(text));
    assert_eq!(received_first, expected);
    expected = in_order(second).chain(["once".to_owned()]).collect();
    assert_eq!(received_second, expected);
    let mut publisher = Client::connect(address, &persistent("publisher")).await;
    assert!(publisher.session_present);
    let repeated = Publish {
        dup: true,
        ..unreleased
    };
    publisher.publish(&repeated).await.unwrap();
    let new = Publish::new("data/new", "new", 1);
    publisher.publish(&new).await.unwrap();
    assert_eq!(receive_texts(&mut reader, 1).await, ["new"]);

    let mut halfway = Client::connect(address, &persistent("halfway")).await;
    let release = halfway.receive().await.unwrap();
    assert_eq!(release, Packet::Answer(Answer::PubRel, half.packet_id, 0));

    let mut kept = Client::connect(address, &Connect::fleeting(Version::V5, "kept")).await;
    let mut retained = kept.subscribe("kept/#", 1).await.unwrap();
    while retained.len() < 3 {
        retained.push(kept.message().await.unwrap());
    }
    retained.sort_by(|one, other| one.topic.cmp(&other.topic));
    let texts: Vec<_> = retained.iter().map(Publish::text).collect();
    assert_eq!(texts, ["a", "b", "c"]);

    let mut heir = Client::connect(address, &persistent("heir")).await;
    assert_eq!(receive_texts(&mut heir, 1).await, ["last words"]);
}

/// Messages that make a copy long enough to be killed in its middle, with [`DELAY`] on the network.
const LARGE_MESSAGES: u16 = 1000;
const LARGE_BYTES: usize = 16 << 10;
const DELAY: Duration = Duration::from_millis(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_copy_is_not_served_and_begins_anew() {
    let mut source = Source::start().await;
    source.subscribe_and_leave("reader", "data/#", 2).await;
    let mut publisher = source.connect(&persistent("publisher")).await;
    for number in 0..LARGE_MESSAGES {
        let message = Publish {
            packet_id: number + 1,
            ..Publish::new("data/large", &large(number), 2)
        };
        let sent = publisher.send(&message.encode(Version::V5)).await;
        sent.unwrap();
    }
    let mut completed = 0;
    while completed < LARGE_MESSAGES {
        match publisher.receive().await.unwrap() {
            Packet::Answer(Answer::PubRec, id, _) => {
                publisher.send(&Answer::PubRel.encode(id)).await.unwrap();
            }
            Packet::Answer(Answer::PubComp, ..) => completed += 1,
            other => panic!("instead of an answer came {other:?}"),
        }
    }
    source.cluster.node(0).kill();
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let proxy = Proxy::start(set.mongod(0).address()).await;
    proxy.delay(DELAY);
    let inbox = set.mongod(0).client().await.database(&database.name);
    let inbox = inbox.collection::<Document>("inbox");

    let mut copying = source.spawn_copy_to(&database.through(&proxy));
    while inbox
        .find_one(doc! { "milestone": null })
        .await
        .unwrap()
        .is_none()
    {
        sleep(POLL_PAUSE).await;
    }
    copying.kill();
    expect_refused(&serve(&database), "`midge store copy` into this database");
    source.cluster.node(0).start_again();
    let mut reader = source.connect(&persistent("reader")).await;
    let mut texts = receive_texts(&mut reader, 10).await;
    reader.disconnect().await.unwrap();
    assert!(source.cluster.node(0).terminate().success());
    let copied = expect_copied(&source.copy_to(&database));

    assert_eq!(copied["identical"], true);
    let mut cluster = Cluster::start(vec![database.settings()]).await;
    let mut reader = Client::connect(cluster.node(0).address(), &persistent("reader")).await;
    let rest = usize::from(LARGE_MESSAGES) - texts.len();
    texts.extend(receive_texts(&mut reader, rest).await);
    let numbers = texts.iter().map(|text| text.parse::<u16>().unwrap());
    assert!(numbers.eq(0..LARGE_MESSAGES));
}

fn large(number: u16) -> String {
    format!("{number:0LARGE_BYTES$}")
}

/// A node that is expected not to start.
fn serve(database: &Database) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    command.args(["serve", "--set", "listeners.tcp.bind=127.0.0.1:0"]);
    command.args(["--set", "http.bind=127.0.0.1:0"]);
    for (key, value) in database.settings() {
        command.arg("--set").arg(format!("{key}={value}"));
    }
    command.stdin(Stdio::null()).output().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_refused_where_it_would_do_harm() {
    let mut source = Source::start().await;
    source.subscribe_and_leave("reader", "data/#", 1).await;

    let database = Database::shared();
    expect_refused(&source.copy_to(&database), "is in use by another midge");
    assert!(source.cluster.node(0).terminate().success());

    let mut target = Cluster::start(vec![database.settings()]).await;
    expect_refused(
        &source.copy_to(&database),
        "the node `node-1` uses this database",
    );
    let fleeting = Connect::fleeting(Version::V5, "publisher");
    let mut publisher = Client::connect(target.node(0).address(), &fleeting).await;
    let retained = Publish::new("kept", "kept", 1).retained();
    publisher.publish(&retained).await.unwrap();
    assert!(target.node(0).terminate().success());
    expect_refused(
        &source.copy_to(&database),
        "this database already has retained messages",
    );
    // The refusals have left nothing that would stop it.
    target.node(0).start_again();

    let nothing = Source {
        directory: TempDir::new().unwrap(),
        ..source
    };
    expect_refused(
        &nothing.copy_to(&Database::shared()),
        "there is no store of midge",
    );
    assert!(!nothing.path().exists());
}

/// Nobody was there to notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_dead_does_not_stop_a_copy() {
    let mut source = Source::start().await;
    source.subscribe_and_leave("reader", "data/#", 1).await;
    assert!(source.cluster.node(0).terminate().success());
    let database = Database::shared();
    let mut target = Cluster::start(vec![database.settings()]).await;
    target.node(0).kill();

    let copied = expect_copied(&source.copy_to(&database));

    assert_eq!(copied["sessions"], 1);
}
