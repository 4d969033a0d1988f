use std::fs;

use serde_json::json;

use crate::broker::Broker;
use crate::mqtt::Client;

const SERVER_SHUTTING_DOWN: u8 = 0x8B;
const USE_ANOTHER_SERVER: u8 = 0x9C;

#[test]
fn a_node_is_drained_and_lets_clients_in_again() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "ann");
    assert_eq!(
        broker.get("/api/v1/drain").expect(200).json(),
        json!({ "node": "here", "state": "serving", "clients_connected": 1 })
    );

    let answer = broker.post("/api/v1/drain").expect(202).json();
    assert_eq!(answer["state"], "draining");
    let (kind, body) = client.receive();
    assert_eq!((kind, body[0]), (0xE0, USE_ANOTHER_SERVER));
    assert_eq!(broker.get("/lbz").expect(404).body, "draining\n");
    broker.get("/readyz/drain").expect(503);
    broker.get("/livez").expect(200);
    // Once more changes nothing.
    broker.post("/api/v1/drain").expect(202);
    broker.wait_for_event("drained");
    let (_, refused) = Client::try_connect(broker.mqtt, "bob");
    assert_eq!(refused, USE_ANOTHER_SERVER);

    let answer = broker.delete("/api/v1/drain").expect(200).json();
    assert_eq!(answer["state"], "serving");
    broker.get("/lbz").expect(200);
    // Its session has waited.
    let (mut client, accepted) = Client::try_connect(broker.mqtt, "ann");
    assert_eq!(accepted, 0);
    client.subscribe("a");
    broker.delete("/api/v1/drain").expect(200);
}

/// A node that is alone ends at once, and one that has sent its clients away has nobody to wait for.
#[test]
fn a_node_that_is_being_drained_can_be_told_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["drain.grace=1h", "drain.deadline=2h"];
    let mut broker = Broker::start_in(folder, &settings);
    broker.post("/api/v1/drain").expect(202);
    broker.delete("/api/v1/drain").expect(200);
    broker.post("/api/v1/drain").expect(202);
    // The grace has begun: clients are still let in.
    let _client = Client::connect(broker.mqtt, "ann");

    broker.terminate();
    broker.wait_for_event("signal");
    broker.terminate();

    assert!(!broker.wait().success());
}

#[test]
fn who_is_told_to_leave_by_a_signal_knows_that_the_node_ends() {
    let mut broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "ann");

    broker.terminate();

    let (kind, body) = client.receive();
    assert_eq!((kind, body[0]), (0xE0, SERVER_SHUTTING_DOWN));
    assert!(broker.wait().success());
}

#[test]
fn files_are_read_again_on_request_and_bad_ones_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("midge.toml");
    fs::write(&file, "[log]\nlevel = \"info\"\n").unwrap();
    let config = file.to_str().unwrap().to_owned();
    let broker = Broker::start_from(folder, &config, &["reload.interval=off"]);
    let before = broker.get("/api/v1/reload").expect(200).json();
    assert_eq!(
        before,
        json!({ "last_successful": null, "last_success_at": null })
    );

    fs::write(
        &file,
        "[log]\nlevel = \"debug\"\n[sys]\ninterval = \"1m\"\n",
    )
    .unwrap();
    let answer = broker.post("/api/v1/reload").expect(200).json();
    assert_eq!(answer, json!({ "needs_restart": ["sys.interval"] }));
    broker.wait_for_event("log_level_changed");

    fs::write(&file, "[log]\nlevel = 7\n").unwrap();
    let problem = broker
        .post("/api/v1/reload")
        .expect_problem(409, "reload_failed");
    let detail = problem["detail"].as_str().unwrap();
    assert!(
        detail.contains("log.level") && detail.contains("midge.toml:2"),
        "{detail}"
    );
    let after = broker.get("/api/v1/reload").expect(200).json();
    assert_eq!(after["last_successful"], false);
    assert!(after["last_success_at"].is_string());
}
