use std::io::{Read, Write};

use serde_json::json;

use crate::broker::Broker;

/// Nobody alone can take all connections, nor hold one for ever by sending nothing.
#[test]
fn connections_that_say_nothing_are_closed_and_do_not_add_up() {
    let broker = Broker::start();
    let mut idle: Vec<_> = (0..128).map(|_| broker.open()).collect();
    // Begins a header, and never ends it.
    idle[0].write_all(b"GET /livez HTTP/1.1\r\nX: ").unwrap();

    // One more from here is not served.
    let mut refused = broker.open();
    // It may be closed before it is written to.
    let _ = refused.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(matches!(refused.read(&mut [0; 1]), Ok(0) | Err(_)));
    // All of them are closed, by the timeout.
    for stream in &mut idle {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    while broker.open_and_ask_livez().is_none() {
        std::thread::yield_now();
    }
}

#[test]
fn a_body_that_is_too_large_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_in(folder, &["limits.packet_bytes_max=1024"]);
    let post = |payload: usize| {
        let message = json!({ "topic": "a", "payload": "x".repeat(payload) });
        broker.send("POST", "/api/v1/publish", &message)
    };

    post(500).expect(202);
    // Fits into the body, and not into a packet.
    post(1500).expect_problem(413, "too_large");
    post(4000).expect_problem(413, "too_large");
}

#[test]
fn a_header_that_is_too_large_is_refused() {
    let broker = Broker::start();

    let header = format!("X: {}\r\n", "x".repeat(20_000));
    broker.ask("GET", "/livez", &header, "").expect(431);
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    let broker = Broker::start();

    let request = format!(
        "POST /api/v1/publish HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
         Content-Length: 100\r\nConnection: close\r\n\r\n{{",
        broker.http
    );
    broker.raw(&request).expect_problem(408, "too_slow");
}

#[test]
fn what_is_no_http_is_answered_with_an_error_or_closed() {
    let broker = Broker::start();

    for garbage in [
        &b"\x10\x10\0\x04MQTT\r\n\r\n"[..],
        b"\xFF\xFF\xFF\xFF\r\n\r\n",
    ] {
        let mut stream = broker.open();
        stream.write_all(garbage).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"));
    }
    broker.get("/livez").expect(200);
}
