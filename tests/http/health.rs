use std::net::TcpListener;

use crate::broker::{Broker, midge, spawn};

#[test]
fn a_broker_that_serves_is_alive_and_ready() {
    let broker = Broker::start();

    assert_eq!(broker.get("/livez").expect(200).body, "ok\n");
    assert_eq!(broker.get("/lbz").expect(200).body, "ready\n");
    for path in ["/readyz", "/healthz"] {
        let health = broker.get(path).expect(200).json();
        assert_eq!(health["status"], "ready");
        assert_eq!(health["node"], "here");
        assert_eq!(health["checks"]["store"]["ok"], true);
    }
    let lines = broker.get("/readyz?verbose").expect(200).body;
    assert!(lines.contains("[+]store ok\n") && lines.ends_with("readyz check passed\n"));
    assert_eq!(
        broker.get("/readyz/store").expect(200).body,
        "[+]store ok\n"
    );
    broker.get("/readyz/beer").expect_problem(404, "not_found");
}

#[test]
fn nothing_else_is_there() {
    let broker = Broker::start();

    for path in ["/", "/api", "/api/v2/version", "/api/v1/beer", "/livez/x"] {
        broker.get(path).expect_problem(404, "no_such_path");
    }
    let answer = broker.send("POST", "/api/v1/version", &serde_json::json!({}));
    assert!(answer.head.contains("allow: get"), "{answer:?}");
    answer.expect_problem(405, "method_not_allowed");
    broker.ask("POST", "/livez", "", "").expect(405);
}

#[test]
fn healthcheck_asks_where_the_configuration_says() {
    let broker = Broker::start();
    let bind = format!("http.bind={}", broker.http);
    let check = |arguments: &[&str]| {
        let mut command = midge(&broker.folder);
        command.arg("healthcheck").args(arguments);
        command.output().unwrap()
    };

    for arguments in [&["--set", &bind][..], &["--live", "--set", &bind]] {
        let output = check(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    // Bound, and never answered by HTTP: nobody listens there any more.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http.bind={}", free.local_addr().unwrap());
    drop(free);
    for setting in [nobody.as_str(), "http.enabled=false"] {
        let output = check(&["--set", setting]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stderr.starts_with(b"error: "), "{output:?}");
    }
}

#[test]
fn a_taken_port_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let bind = format!("http.bind={}", taken.local_addr().unwrap());

    let (mut child, log) = spawn(&folder, &[&bind]);
    let status = child.wait().unwrap();
    assert!(log.wait_for_end());

    let lines = log.so_far();
    assert_eq!((status.code(), lines.len()), (Some(1), 1), "{lines:?}");
    assert!(
        lines[0].contains("http") && lines[0].contains("already listens"),
        "{lines:?}"
    );
}

#[test]
fn http_can_be_switched_off() {
    let folder = tempfile::tempdir().unwrap();

    let (mut child, log) = spawn(&folder, &["http.enabled=false"]);
    log.wait_for("the event `ready`", |lines| {
        lines
            .iter()
            .find(|line| line.contains("\"ready\""))
            .cloned()
    });
    child.kill().unwrap();
    child.wait().unwrap();

    assert!(!log.so_far().join("\n").contains("http_started"));
}

#[test]
fn a_broker_that_is_told_to_end_ends_with_idle_http_connections() {
    let mut broker = Broker::start();
    let _idle = broker.open();

    broker.terminate();

    broker.wait_for_event("stopped");
    assert!(broker.wait().success());
}
