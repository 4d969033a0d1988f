use serde_json::json;

use crate::broker::Broker;
use crate::mqtt::Client;

#[test]
fn a_published_message_comes_as_it_was_sent() {
    let broker = Broker::start();
    let mut client = Client::connect(broker.mqtt, "ann");
    client.subscribe("a/b");

    let message = json!({ "topic": "a/b", "payload": "AP8=", "encoding": "base64", "qos": 1,
        "content_type": "t", "user_properties": [{ "name": "n", "value": "v" }] });
    let answer = broker.send("POST", "/api/v1/publish", &message);
    assert_eq!(answer.expect(200).json(), json!({ "matched": true }));

    let (kind, body) = client.receive();
    assert_eq!(kind, 0x32);
    let properties = b"\x03\0\x01t\x26\0\x01n\0\x01v";
    let expected = [&b"\0\x03a/b\0\x01\x0B"[..], properties, b"\0\xFF"].concat();
    assert_eq!(body, expected);
    let nobody = json!({ "topic": "x" });
    broker.send("POST", "/api/v1/publish", &nobody).expect(202);
}

#[test]
fn messages_that_mqtt_does_not_know_are_refused() {
    let broker = Broker::start();

    for message in [
        json!({ "topic": "" }),
        json!({ "topic": "a/#" }),
        json!({ "topic": "$SYS/broker/version" }),
        json!({ "topic": "a/".repeat(200) }),
        json!({ "topic": "a", "qos": 3 }),
        json!({ "topic": "a", "payload": "x", "encoding": "base64" }),
        json!({ "topic": "a", "correlation_data": "x" }),
        json!({ "topic": "a", "response_topic": "+" }),
        json!({ "topic": "a", "content_type": "\0" }),
    ] {
        let answer = broker.send("POST", "/api/v1/publish", &message);
        answer.expect_problem(400, "invalid_request");
    }
    for message in [
        json!({}),
        json!({ "topic": 1 }),
        json!({ "topic": "a", "qos": "1" }),
    ] {
        let answer = broker.send("POST", "/api/v1/publish", &message);
        answer.expect_problem(422, "invalid_request");
    }
    let headers = "Content-Type: application/json\r\n";
    let answer = broker.ask("POST", "/api/v1/publish", headers, "{");
    answer.expect_problem(400, "invalid_request");
}

#[test]
fn retained_messages_are_listed_put_shown_and_cleared() {
    let broker = Broker::start();
    for topic in ["a", "a/b", "a/c", "d"] {
        let path = format!("/api/v1/retained/{}", topic.replace('/', "%2F"));
        let content = json!({ "payload": topic, "qos": 1 });
        broker.send("PUT", &path, &content).expect(204);
    }
    let topics = |query: &str| {
        let page = broker.get(&format!("/api/v1/retained?{query}"));
        let page = page.expect(200).json();
        let items = page["items"].as_array().unwrap().iter();
        let topics: Vec<_> = items.map(|item| item["topic"].as_str().unwrap()).collect();
        (
            topics.join(" "),
            page["next_cursor"].as_str().map(str::to_owned),
        )
    };

    assert_eq!(topics("").0, "a a/b a/c d");
    assert_eq!(topics("filter=a%2F%23").0, "a a/b a/c");
    assert_eq!(topics("filter=%2B").0, "a d");
    let (first, cursor) = topics("limit=3");
    assert_eq!(first, "a a/b a/c");
    assert_eq!(
        topics(&format!("limit=3&cursor={}", cursor.unwrap())).0,
        "d"
    );

    let shown = broker.get("/api/v1/retained/a%2Fb").expect(200).json();
    assert_eq!(
        (&shown["payload"], &shown["qos"]),
        (&json!("a/b"), &json!(1))
    );
    assert_eq!(shown["publisher"], "$api");
    let path = "/api/v1/retained?filter=a%2F%23";
    let would = broker
        .delete(&format!("{path}&dry_run=true"))
        .expect(200)
        .json();
    assert_eq!(would["topics"], json!(["a", "a/b", "a/c"]));
    assert_eq!(topics("").0, "a a/b a/c d");
    assert_eq!(broker.delete(path).expect(200).json()["messages"], 3);
    assert_eq!(topics("").0, "d");
    broker.delete("/api/v1/retained/d?dry_run=true").expect(200);
    broker.delete("/api/v1/retained/d").expect(200);
    broker
        .delete("/api/v1/retained/d")
        .expect_problem(404, "not_found");
    broker
        .get("/api/v1/retained/d")
        .expect_problem(404, "not_found");
}

#[test]
fn wrong_requests_for_retained_messages_are_refused() {
    let broker = Broker::start();

    for path in [
        "/api/v1/retained?filter=a%23",
        "/api/v1/retained?limit=0",
        "/api/v1/retained/a%2F%23",
    ] {
        broker.get(path).expect_problem(400, "invalid_request");
    }
    for path in [
        "/api/v1/retained",
        "/api/v1/retained?filter=%24SYS%2F%23",
        "/api/v1/retained/%24SYS%2Fbroker%2Fversion",
    ] {
        broker.delete(path).expect_problem(400, "invalid_request");
    }
    let empty = json!({ "payload": "" });
    broker
        .send("PUT", "/api/v1/retained/a", &empty)
        .expect_problem(400, "invalid_request");
}

#[test]
fn the_limit_of_retained_messages_holds_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_in(folder, &["limits.retained_messages_max=1"]);
    let content = json!({ "payload": "x" });

    broker
        .send("PUT", "/api/v1/retained/a", &content)
        .expect(204);
    broker
        .send("PUT", "/api/v1/retained/b", &content)
        .expect_problem(409, "retained_limit");
}
