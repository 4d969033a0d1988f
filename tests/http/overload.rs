use serde_json::json;

use crate::broker::Broker;
use crate::mqtt::Client;

const SERVER_BUSY: u8 = 0x89;

/// Retained messages that take more memory than the limit leaves.
const MESSAGES_MAX: usize = 1000;

#[test]
fn a_node_that_is_short_of_memory_lets_nobody_in_until_there_is_some_again() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_in(folder, &["limits.memory_max=192MiB"]);
    let mut client = Client::connect(broker.mqtt, "ann");
    let content = json!({ "payload": "x".repeat(900_000) });

    let filled = (0..MESSAGES_MAX).find(|number| {
        let path = format!("/api/v1/retained/{number}");
        broker.send("PUT", &path, &content).expect(204);
        broker.get("/readyz/overload").status == 503
    });
    assert!(filled.is_some(), "memory does not become short");
    assert_eq!(broker.get("/lbz").expect(404).body, "degraded\n");
    broker.get("/livez").expect(200);
    let (_, refused) = Client::try_connect(broker.mqtt, "bob");
    assert_eq!(refused, SERVER_BUSY);
    // Who is there is served.
    client.subscribe("a");
    assert_eq!(broker.wait_for_event("overload")["limit_bytes"], 192 << 20);

    broker.delete("/api/v1/retained?filter=%23").expect(200);
    while broker.get("/readyz").status != 200 {
        std::thread::yield_now();
    }
    Client::connect(broker.mqtt, "bob");
}
