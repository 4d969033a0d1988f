use std::fs;

use serde_json::json;
use tempfile::TempDir;

use crate::broker::{Answer, Broker, midge};

pub(crate) fn make_token(folder: &TempDir, name: &str, scope: &str) -> String {
    let mut command = midge(folder);
    let arguments = ["token", "add", "--file", "tokens", "--scope", scope, name];
    let output = command.args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[track_caller]
fn ask(broker: &Broker, method: &str, path: &str, token: &str) -> Answer {
    let headers = format!("Authorization: Bearer {token}\r\nContent-Type: application/json\r\n");
    let body = match method {
        "GET" => String::new(),
        _ => json!({ "topic": "a", "payload": "b" }).to_string(),
    };
    broker.ask(method, path, &headers, &body)
}

#[test]
fn tokens_open_what_their_scope_says() {
    let folder = tempfile::tempdir().unwrap();
    let reader = make_token(&folder, "reader", "read");
    let writer = make_token(&folder, "writer", "write");
    let broker = Broker::start_in(folder, &["http.tokens_file=tokens"]);

    let answer = broker.get("/api/v1/version");
    assert!(answer.head.contains("www-authenticate: bearer"));
    answer.expect_problem(401, "token_missing");
    ask(&broker, "GET", "/api/v1/version", "mdg_guessed").expect_problem(401, "token_unknown");
    ask(&broker, "GET", "/api/v1/version", &reader).expect(200);
    ask(&broker, "POST", "/api/v1/publish", &reader).expect_problem(403, "token_scope");
    ask(&broker, "POST", "/api/v1/publish", &writer).expect(202);
    // Who it was is in the log, and the token is not.
    let written = broker.wait_for_event("api_write");
    assert_eq!(written["token"], "writer");
    assert!(!broker.log().contains(&writer));
    // Health checks need none.
    broker.get("/readyz").expect(200);
}

#[test]
fn a_removed_token_is_not_known_after_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let token = make_token(&folder, "ann", "read");
    make_token(&folder, "bob", "write");

    let mut command = midge(&folder);
    let list = command.args(["token", "list", "--file", "tokens"]).output();
    assert_eq!(list.unwrap().stdout, b"ann\tread\nbob\twrite\n");
    let mut command = midge(&folder);
    let remove = ["token", "remove", "--file", "tokens", "ann"];
    assert!(command.args(remove).output().unwrap().status.success());
    let mut command = midge(&folder);
    assert_eq!(
        command.args(remove).output().unwrap().status.code(),
        Some(1)
    );
    let broker = Broker::start_in(folder, &["http.tokens_file=tokens"]);

    ask(&broker, "GET", "/api/v1/version", &token).expect_problem(401, "token_unknown");
}

#[test]
fn tokens_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let writer = make_token(&folder, "writer", "write");
    let reader = make_token(&folder, "reader", "read");
    let tokens = path.join("tokens");
    let both = fs::read_to_string(&tokens).unwrap();
    let settings = ["http.tokens_file=tokens", "reload.interval=off"];
    let broker = Broker::start_in(folder, &settings);
    ask(&broker, "GET", "/api/v1/version", &reader).expect(200);

    fs::write(&tokens, format!("{both}no token\n")).unwrap();
    let problem = ask(&broker, "POST", "/api/v1/reload", &writer);
    let problem = problem.expect_problem(409, "reload_failed");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("http.tokens_file: tokens:3"), "{detail}");
    ask(&broker, "GET", "/api/v1/version", &reader).expect(200);

    let others = both.lines().filter(|line| !line.starts_with("reader "));
    let others: String = others.map(|line| format!("{line}\n")).collect();
    fs::write(&tokens, others).unwrap();
    ask(&broker, "POST", "/api/v1/reload", &writer).expect(200);
    ask(&broker, "GET", "/api/v1/version", &reader).expect_problem(401, "token_unknown");
    ask(&broker, "GET", "/api/v1/version", &writer).expect(200);
}

#[test]
fn the_log_names_who_is_behind_a_trusted_proxy() {
    for (trusted, expected) in [("127.0.0.0/8", "203.0.113.7:0"), ("10.0.0.1", "127.0.0.1:")] {
        let folder = tempfile::tempdir().unwrap();
        let writer = make_token(&folder, "writer", "write");
        let proxies = format!("http.trusted_proxies={trusted}");
        let broker = Broker::start_in(folder, &["http.tokens_file=tokens", &proxies]);

        let headers =
            format!("Authorization: Bearer {writer}\r\nX-Forwarded-For: 6.6.6.6, 203.0.113.7\r\n");
        broker
            .ask("POST", "/api/v1/reload", &headers, "")
            .expect(200);

        let written = broker.wait_for_event("api_write");
        let peer = written["peer"].as_str().unwrap();
        assert!(peer.starts_with(expected), "{written}");
    }
}

#[test]
fn without_tokens_only_this_machine_is_served() {
    let broker = Broker::start();

    broker.get("/api/v1/version").expect(200);
    // A proxy speaks for others.
    for header in ["X-Forwarded-For: 10.1.2.3", "Forwarded: for=10.1.2.3"] {
        let answer = broker.ask("GET", "/api/v1/version", &format!("{header}\r\n"), "");
        answer.expect_problem(403, "tokens_needed");
    }
    // A browser that was led here by a foreign name.
    let rebound = "GET /api/v1/version HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    broker.raw(rebound).expect_problem(403, "tokens_needed");
    // And one that was made to post a form.
    let body = json!({ "topic": "a" }).to_string();
    let answer = broker.ask(
        "POST",
        "/api/v1/publish",
        "Content-Type: text/plain\r\n",
        &body,
    );
    answer.expect_problem(415, "invalid_request");
}

#[test]
fn an_address_that_others_can_reach_needs_tokens_for_the_api_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::start_in(folder, &["http.bind=0.0.0.0:0"]);

    broker.wait_for_event("api_refused");
    broker
        .get("/api/v1/version")
        .expect_problem(403, "tokens_needed");
    broker.get("/livez").expect(200);
    broker.get("/readyz").expect(200);
}

#[test]
fn a_tokens_file_that_is_wrong_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokens"), "# mine\nann\n").unwrap();

    let mut command = midge(&folder);
    let check = ["check", "--set", "http.tokens_file=tokens"];
    let output = command.args(check).output().unwrap();

    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("tokens:2: "), "{errors}");
}
