use serde_json::{Value, json};

use crate::broker::Broker;
use crate::mqtt::Client;

fn ids(page: &Value) -> Vec<&str> {
    let items = page["items"].as_array().unwrap();
    items
        .iter()
        .map(|item| item["client_id"].as_str().unwrap())
        .collect()
}

#[test]
fn the_node_tells_of_itself() {
    let broker = Broker::start();
    let _client = Client::connect(broker.mqtt, "ann");

    let version = broker.get("/api/v1/version").expect(200).json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    let cluster = broker.get("/api/v1/cluster").expect(200).json();
    assert_eq!(cluster["node"], "here");
    assert_eq!(cluster["nodes_up"], 1);
    assert_eq!(cluster["clients_connected"], 1);
    assert_eq!(cluster["store_available"], true);
    let nodes = broker.get("/api/v1/nodes").expect(200).json();
    assert_eq!(
        nodes["items"],
        json!([{ "number": 0, "name": "here", "state": "up", "this": true }])
    );
}

#[test]
fn clients_come_in_pages_by_their_ids() {
    let broker = Broker::start();
    let names = ["a/1", "b", "b1", "b2", "ü"];
    let _clients = names.map(|name| Client::connect(broker.mqtt, name));

    let mut seen = Vec::new();
    let mut path = "/api/v1/clients?limit=2".to_owned();
    loop {
        let page = broker.get(&path).expect(200).json();
        seen.extend(ids(&page).iter().map(|id| (*id).to_owned()));
        match page["next_cursor"].as_str() {
            Some(cursor) => path = format!("/api/v1/clients?limit=2&cursor={cursor}"),
            None => break,
        }
    }
    assert_eq!(seen, names);

    let some = |query: &str| broker.get(&format!("/api/v1/clients?{query}")).expect(200);
    assert_eq!(ids(&some("client_id=b*").json()), ["b", "b1", "b2"]);
    assert_eq!(ids(&some("client_id=b").json()), ["b"]);
    assert_eq!(ids(&some("state=connected").json()).len(), 5);
    assert_eq!(ids(&some("state=disconnected").json()).len(), 0);
}

#[test]
fn wrong_parameters_are_refused() {
    let broker = Broker::start();

    for query in ["limit=0", "limit=1001", "limit=x", "state=gone", "beer=1"] {
        let answer = broker.get(&format!("/api/v1/clients?{query}"));
        answer.expect_problem(400, "invalid_request");
    }
    broker
        .get("/api/v1/clients?cursor=!")
        .expect_problem(400, "invalid_cursor");
    broker
        .get("/api/v1/subscriptions")
        .expect_problem(400, "invalid_request");
    broker
        .get("/api/v1/subscriptions?matches=a%2F%23")
        .expect_problem(400, "invalid_request");
}

#[test]
fn a_client_is_shown_with_its_subscriptions_its_queue_and_what_is_in_flight() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "ann/1");
    client.subscribe("home/+/#");
    client.subscribe("$share/group/home/x");
    for payload in ["1", "2"] {
        let message = json!({ "topic": "home/y", "payload": payload, "qos": 1 });
        broker.send("POST", "/api/v1/publish", &message).expect(200);
        client.receive();
    }

    let shown = broker.get("/api/v1/clients/ann%2F1").expect(200).json();
    assert_eq!(shown["state"], "connected");
    assert_eq!(shown["protocol"], "5.0");
    assert_eq!(shown["session_expiry_seconds"], 3600);
    assert_eq!(shown["connection"]["listener"], "tcp");
    assert_eq!(shown["connection"]["keep_alive_seconds"], 60);
    assert_eq!(shown["queue"]["messages"], 2);
    assert_eq!(shown["in_flight"], 2);
    let filters = shown["subscriptions"].as_array().unwrap().iter();
    let filters: Vec<_> = filters.map(|one| one["filter"].as_str().unwrap()).collect();
    assert_eq!(filters, ["home/+/#", "$share/group/home/x"]);

    let who = broker.get("/api/v1/subscriptions?matches=home%2Fx");
    let who = who.expect(200).json();
    assert_eq!(who["clients"][0]["client_id"], "ann/1");
    assert_eq!(who["groups"][0]["filter"], "$share/group/home/x");
    assert_eq!(who["groups"][0]["members"], json!(["ann/1"]));
    broker
        .get("/api/v1/clients/nobody")
        .expect_problem(404, "not_found");
}

#[test]
fn a_client_can_be_disconnected_with_a_reason() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "ann");

    for reason in ["x", "0x00", "0x04", "300", "0x85"] {
        let answer = broker.delete(&format!("/api/v1/clients/ann?reason_code={reason}"));
        answer.expect_problem(400, "invalid_request");
    }
    broker
        .delete("/api/v1/clients/ann?reason_code=0x97")
        .expect(204);
    let (kind, body) = client.receive();
    assert_eq!((kind, body[0]), (0xE0, 0x97));

    // Its session waits for it.
    while broker.get("/api/v1/clients/ann").json()["state"] == "connected" {
        std::thread::yield_now();
    }
    let shown = broker.get("/api/v1/clients/ann").expect(200).json();
    assert!(shown["session_ends_at"].is_string(), "{shown}");
    broker
        .delete("/api/v1/clients/ann")
        .expect_problem(409, "not_connected");
    broker
        .delete("/api/v1/clients/bob")
        .expect_problem(404, "not_found");
}
