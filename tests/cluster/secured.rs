//! Servers that want TLS and a password.

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
use crate::node::{Cluster, Settings};
use crate::redis::{self, Redis};
use crate::redis_cluster::wait_for_line;
use crate::seed::Seed;
use crate::wire::{Connect, Publish, Version};
use crate::workload::{Size, Workload};

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

/// All that midge needs, besides its channels.
const RIGHTS: &str =
    "resetchannels &midge:* -@all +@connection +@pubsub +cluster|info +cluster|slots";

/// Makes nodes use a Redis with TLS and a certificate of its own, as a user with the least rights.
async fn use_redis(scheme: &str, is_cluster: bool) {
    let mut seed = Seed::new();
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let server = &certificates.server;
    let paths = [&server.certificate, &server.key, &certificates.authority];
    let [certificate, key, authority] = paths.map(|path| path.to_str().unwrap());
    // Tests ask it things without TLS.
    let [port, tls_port, bus_port] = redis::free_ports();
    let [tls_port, bus_port] = [tls_port, bus_port].map(|port| port.to_string());
    let mut arguments = vec![
        ["--tls-port", &tls_port],
        ["--tls-auth-clients", "no"],
        ["--tls-cert-file", certificate],
        ["--tls-key-file", key],
        ["--tls-ca-cert-file", authority],
        ["--dir", directory.path().to_str().unwrap()],
    ];
    if is_cluster {
        arguments.extend([
            ["--cluster-enabled", "yes"],
            ["--cluster-port", &bus_port],
            ["--tls-cluster", "yes"],
        ]);
    }
    let arguments = arguments.concat().into_iter().map(str::to_owned);
    let server = Redis::start_at(port, arguments.collect());
    if is_cluster {
        let all_slots = ["CLUSTER", "ADDSLOTSRANGE", "0", "16383"];
        let () = server.ask(&all_slots).await;
        wait_for_line(&server, &["CLUSTER", "INFO"], "cluster_state:ok").await;
    }
    let password = format!(">{PASSWORD}");
    let mut user = vec!["ACL", "SETUSER", "midge", "on", &password];
    user.extend(RIGHTS.split(' '));
    let () = server.ask(&user).await;
    let () = server.ask(&["ACL", "SETUSER", "default", "off"]).await;

    let database = Database::shared();
    let settings = |password: &str, authority: &str| -> Settings {
        let url = format!("{scheme}://midge:{password}@127.0.0.1:{tls_port}");
        let mut settings = redis::settings_with_url(&database, url);
        settings.push(("SSL_CERT_FILE".to_owned(), authority.to_owned()));
        settings
    };
    let good = || settings(ESCAPED, authority);
    let mut cluster = Cluster::start(vec![good(), good()]).await;
    for node in 0..2 {
        cluster.node(node).wait_for_events("bus_up", 1);
    }
    let workload = Workload::start(cluster.servers(), &mut seed, Size::small()).await;
    workload.finish().await;
    for node in 0..2 {
        assert!(!cluster.node(node).has_logged("bus_down"));
    }

    for (settings, reason) in [
        (settings("wrong", authority), "WRONGPASS"),
        (settings(ESCAPED, "/dev/null"), "certificate"),
    ] {
        let mut cluster = Cluster::start(vec![settings]).await;
        let said = cluster.node(0).wait_for_event("bus_down").to_string();
        assert!(said.contains(reason), "{said}");
        assert!(
            !said.contains("wrong") && !said.contains(PASSWORD),
            "{said}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_used_with_tls_and_a_password() {
    use_redis("rediss", false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_cluster_is_used_with_tls_and_a_password() {
    use_redis("rediss+cluster", true).await;
}
