//! A MongoDB that wants TLS and a password.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use mongodb::Client as MongoClient;
use mongodb::bson::{Document, doc};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::certificates::Certificates;
use crate::client::Client;
use crate::lines::DEADLINE;
use crate::mongod::{Database, POLL_PAUSE, SET, spawn, wait_until_ready};
use crate::node::Cluster;
use crate::wire::{Connect, Publish, Version};

/// With characters that a URI needs escaped.
const PASSWORD: &str = "p@ss:w/1";
const ESCAPED: &str = "p%40ss%3Aw%2F1";

/// A user's `readWrite` is all that midge needs.
async fn add_user(admin: &mongodb::Database, name: &str, password: &str, roles: Document) {
    let create = doc! { "createUser": name, "pwd": password, "roles": [roles] };
    admin.run_command(create).await.unwrap();
}

async fn wait_until_primary(admin: &mongodb::Database) {
    let end = Instant::now() + DEADLINE;
    loop {
        let hello = admin.run_command(doc! { "hello": 1 }).await.unwrap();
        if hello.get_bool("isWritablePrimary").unwrap() {
            return;
        }
        assert!(Instant::now() < end, "it does not become primary");
        sleep(POLL_PAUSE).await;
    }
}

/// What a node that cannot start says. The URI is in a file, as it is with secrets of Kubernetes.
fn start_in_vain(directory: &TempDir, database: &str, uri: &str) -> String {
    let file = directory.path().join("uri");
    fs::write(&file, format!("{uri}\n")).unwrap();
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_midge"))
        .args(["serve", "--set", "listeners.tcp.bind=127.0.0.1:0"])
        .args([
            "--set",
            "http.bind=127.0.0.1:0",
            "--set",
            "store.kind=mongodb",
        ])
        .args(["--set", &format!("store.uri_file={}", file.display())])
        .args(["--set", &format!("store.database={database}")])
        .output()
        .unwrap();
    assert!(!status.success());
    String::from_utf8(stderr).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mongodb_is_used_with_tls_and_a_password() {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let [server, key_file] = ["server.pem", "key"].map(|name| directory.path().join(name));
    let identity = [&certificates.server.certificate, &certificates.server.key];
    let identity = identity.map(|path| fs::read_to_string(path).unwrap());
    fs::write(&server, identity.concat()).unwrap();
    fs::write(&key_file, "between the members of the set").unwrap();
    fs::set_permissions(&key_file, Permissions::from_mode(0o600)).unwrap();
    let authority = certificates.authority.to_str().unwrap();
    let data = TempDir::new().unwrap();
    let more = [
        ["--keyFile", key_file.to_str().unwrap()],
        ["--tlsMode", "requireTLS"],
        ["--tlsCertificateKeyFile", server.to_str().unwrap()],
        ["--tlsCAFile", authority],
    ];
    let mut more = more.concat();
    more.push("--tlsAllowConnectionsWithoutCertificates");
    let mongod = spawn(&data, 0, &more);
    let address = format!("127.0.0.1:{}", wait_until_ready(&mongod));
    let tls = format!("tls=true&tlsCAFile={authority}");

    // As long as there is no user, whoever is on the same machine may make one.
    let uri = format!("mongodb://{address}/?directConnection=true&{tls}");
    let admin = MongoClient::with_uri_str(uri).await.unwrap();
    let admin = admin.database("admin");
    let members = doc! { "_id": SET, "members": [{ "_id": 0, "host": &address }] };
    let initiate = doc! { "replSetInitiate": members };
    admin.run_command(initiate).await.unwrap();
    wait_until_primary(&admin).await;
    add_user(
        &admin,
        "root",
        "root",
        doc! { "role": "root", "db": "admin" },
    )
    .await;
    let uri = format!("mongodb://root:root@{address}/?directConnection=true&{tls}");
    let admin = MongoClient::with_uri_str(uri).await.unwrap();
    let admin = admin.database("admin");
    let uri = |user: &str, password: &str| {
        format!("mongodb://{user}:{password}@{address}/?replicaSet={SET}&authSource=admin&{tls}")
    };
    let database = Database::on(uri("midge", ESCAPED));
    let role = |name: &str| doc! { "role": name, "db": &database.name };
    add_user(&admin, "midge", PASSWORD, role("readWrite")).await;
    add_user(&admin, "reader", "reader", role("read")).await;

    let mut cluster = Cluster::start(vec![database.settings(); 2]).await;
    let subscriber = Connect::persistent(Version::V5, "subscriber");
    let mut subscriber = Client::connect(cluster.node(0).address(), &subscriber).await;
    subscriber.subscribe("news", 2).await.unwrap();
    let publisher = Connect::persistent(Version::V5, "publisher");
    let mut publisher = Client::connect(cluster.node(1).address(), &publisher).await;
    for qos in [1, 2] {
        let publish = Publish {
            packet_id: 1,
            ..Publish::new("news", &qos.to_string(), qos)
        };
        publisher.publish(&publish).await.unwrap();
        assert_eq!(subscriber.message().await.unwrap().text(), qos.to_string());
    }

    let said = start_in_vain(&directory, &database.name, &uri("midge", "wrong"));
    assert!(said.contains("Authentication failed"), "{said}");
    assert!(!said.contains("wrong"), "{said}");
    let said = start_in_vain(&directory, &database.name, &uri("reader", "reader"));
    assert!(said.contains("the role readWrite"), "{said}");
}
