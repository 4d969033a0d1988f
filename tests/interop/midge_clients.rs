//! `midge pub` and `midge sub`, which take the flags of mosquitto's programs and get on with them.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    Version,
    broker::Broker,
    certificates::Certificates,
    mosquitto::{publish, subscribe},
    program::{Finished, Program},
    test_each_version,
};

test_each_version![
    midge_pub_reaches_mosquitto_sub_with_every_qos,
    mosquitto_pub_reaches_midge_sub_with_every_qos,
    lines_of_stdin_arrive_in_order,
    kept_session_gets_what_came_meanwhile,
    will_is_published_when_midge_sub_dies,
    retained_messages_are_shown_and_removed,
];

fn midge_pub_reaches_mosquitto_sub_with_every_qos(version: Version) {
    let broker = Broker::start();
    let arguments = ["-t", "qos/#", "-q", "2", "-C", "3", "-F", "%t %q %p"];
    let subscriber = subscribe(&broker, version, &arguments);

    for qos in ["0", "1", "2"] {
        let topic = format!("qos/{qos}");
        midge_pub(&broker, version, &["-t", &topic, "-q", qos, "-m", "-5 °C"]).succeed();
    }

    assert_eq!(
        subscriber.messages(),
        ["qos/0 0 -5 °C", "qos/1 1 -5 °C", "qos/2 2 -5 °C"]
    );
}

fn mosquitto_pub_reaches_midge_sub_with_every_qos(version: Version) {
    let broker = Broker::start();
    let arguments = ["-t", "qos/#", "-q", "2", "-C", "3", "-F", "%t %q %r %l %x"];
    let subscriber = midge_sub(&broker, version, &arguments);

    for qos in ["0", "1", "2"] {
        let topic = format!("qos/{qos}");
        publish(&broker, version, &["-t", &topic, "-q", qos, "-m", "°C"]);
    }

    assert_eq!(
        subscriber.succeed(),
        [
            "qos/0 0 0 3 c2b043",
            "qos/1 1 0 3 c2b043",
            "qos/2 2 0 3 c2b043"
        ]
    );
}

fn lines_of_stdin_arrive_in_order(version: Version) {
    let broker = Broker::start();
    let subscriber = midge_sub(&broker, version, &["-t", "lines", "-q", "1", "-C", "100"]);

    let mut publisher = midge_pub(&broker, version, &["-t", "lines", "-q", "1", "-l"]);
    let lines: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    for line in &lines {
        publisher.write_line(line);
    }
    publisher.succeed();

    assert_eq!(subscriber.succeed(), lines);
}

fn kept_session_gets_what_came_meanwhile(version: Version) {
    let broker = Broker::start();
    let session = ["-c", "-i", "kept", "-t", "offline", "-q", "1"];
    let mut arguments = session.to_vec();
    arguments.push("-E");
    start_midge_sub(&broker, version, &arguments).succeed();

    let repeated = ["-t", "offline", "-q", "1", "-m", "waited", "--repeat", "2"];
    midge_pub(&broker, version, &repeated).succeed();

    let mut arguments = session.to_vec();
    arguments.extend(["-C", "2"]);
    let messages = start_midge_sub(&broker, version, &arguments).succeed();
    assert_eq!(messages, ["waited", "waited"]);
}

fn will_is_published_when_midge_sub_dies(version: Version) {
    let broker = Broker::start();
    let watcher = midge_sub(&broker, version, &["-t", "wills", "-C", "1", "-v"]);
    let will = [
        "--will-topic",
        "wills",
        "--will-payload",
        "gone",
        "--will-qos",
        "1",
    ];
    let mut arguments = vec!["-t", "unused"];
    arguments.extend(will);

    midge_sub(&broker, version, &arguments).kill();

    assert_eq!(watcher.succeed(), ["wills gone"]);
}

fn retained_messages_are_shown_and_removed(version: Version) {
    let broker = Broker::start();
    midge_pub(
        &broker,
        version,
        &["-t", "kept", "-q", "1", "-r", "-m", "1"],
    )
    .succeed();

    let removing = ["-t", "kept", "--remove-retained", "-C", "1", "-F", "%r %p"];
    let removed = start_midge_sub(&broker, version, &removing).succeed();
    let left = start_midge_sub(&broker, version, &["-t", "kept", "-W", "1"]).finish();

    assert_eq!(removed, ["1 1"]);
    assert_eq!(left.status.code(), Some(27), "{left:?}");
    assert_eq!(
        (left.stdout.len(), &*left.stderr),
        (0, &["Timed out".to_owned()][..])
    );
}

#[test]
fn properties_travel_and_show_in_json() {
    let broker = Broker::start();
    let subscriber = midge_sub(&broker, Version::V5, &["-t", "a", "-C", "1", "-F", "%J"]);

    let mut arguments = vec!["-t", "a", "-m", r#"{"temperature":-5}"#];
    for property in [
        &["user-property", "unit", "celsius"][..],
        &["content-type", "application/json"],
        &["response-topic", "answers"],
        &["correlation-data", "7"],
    ] {
        arguments.extend(["-D", "publish"]);
        arguments.extend(property);
    }
    midge_pub(&broker, Version::V5, &arguments).succeed();

    let message: Value = serde_json::from_str(&subscriber.succeed()[0]).unwrap();
    assert_eq!(message["payload"]["temperature"], -5);
    let properties = &message["properties"];
    assert_eq!(properties["user-properties"]["unit"], "celsius");
    assert_eq!(properties["content-type"], "application/json");
    assert_eq!(properties["response-topic"], "answers");
    assert_eq!(properties["correlation-data"], "7");
}

#[test]
fn tls_verifies_the_server() {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let other_directory = TempDir::new().unwrap();
    let others = Certificates::create_in(other_directory.path());
    let broker = Broker::configure().encrypted("tls", &certificates).start();
    let publish = |flags: &[&str]| publish_with_tls(&broker, flags);

    let authority = text(&certificates.authority);
    expect_success(&publish(&["--cafile", authority]));
    let other = publish(&["--cafile", text(&others.authority)]);
    expect_failure(&other, 1, "invalid peer certificate");
    let without_tls = publish(&[]);
    expect_failure(&without_tls, 1, "--cafile");
}

#[test]
fn insecure_forgives_the_name_in_a_certificate_and_nothing_else() {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let other_directory = TempDir::new().unwrap();
    let others = Certificates::create_in(other_directory.path());
    // That of the client names no host.
    let nameless = &certificates.client;
    let broker = Broker::configure()
        .set("listeners.tls.kind", "tls")
        .set("listeners.tls.bind", "127.0.0.1:0")
        .set("listeners.tls.tls.certificate", text(&nameless.certificate))
        .set("listeners.tls.tls.key", text(&nameless.key))
        .start();
    let publish = |flags: &[&str]| publish_with_tls(&broker, flags);

    let authority = text(&certificates.authority);
    let strict = publish(&["--cafile", authority]);
    expect_failure(&strict, 1, "not valid for");
    expect_success(&publish(&["--cafile", authority, "--insecure"]));
    let other = text(&others.authority);
    let foreign = publish(&["--cafile", other, "--insecure"]);
    expect_failure(&foreign, 1, "invalid peer certificate");
}

#[test]
fn password_comes_from_a_file_and_a_wrong_one_is_refused() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (users, right, wrong) = (path("users"), path("right"), path("wrong"));
    fs::write(&right, "s3cret\n").unwrap();
    fs::write(&wrong, "guess\n").unwrap();
    let add = ["add", "--file", &users, "anna", "--password-file", &right];
    midge("user", &add, &[]).succeed();
    let broker = Broker::configure().set("auth.users_file", users).start();
    let publish = |flags: &[&str]| {
        let mut arguments = vec!["-t", "a", "-m", "b", "-q", "1"];
        arguments.extend(flags);
        midge_pub(&broker, Version::V5, &arguments).finish()
    };

    expect_success(&publish(&["-u", "anna", "--password-file", &right]));
    expect_success(&publish(&["-u", "anna", "-P", "s3cret"]));
    let refused = publish(&["-u", "anna", "--password-file", &wrong]);
    expect_failure(&refused, 1, "Connection refused: ");
}

#[test]
fn wrong_use_is_told_apart_from_failure() {
    let publish = |flags: &[&str]| midge("pub", flags, &[]).finish();
    let subscribe = |flags: &[&str]| midge("sub", flags, &[]).finish();

    expect_failure(
        &publish(&["-t", "a/#", "-m", "b"]),
        2,
        "a topic name has no wildcards",
    );
    expect_failure(
        &publish(&["-t", "a", "-m", "b", "-q", "3"]),
        2,
        "it is 0, 1 or 2",
    );
    expect_failure(&publish(&["-t", "a"]), 2, "--message");
    expect_failure(
        &publish(&["-t", "a", "-m", "b", "-n"]),
        2,
        "cannot be used with",
    );
    let early = ["-t", "a", "-n", "-D", "publish", "content-type", "b"];
    expect_failure(&publish(&early), 2, "-V 5");
    let unknown = ["-V", "5", "-t", "a", "-n", "-D", "publish", "colour", "b"];
    expect_failure(&publish(&unknown), 2, "publish has no property colour");
    let one_value = [
        "-V",
        "5",
        "-t",
        "a",
        "-n",
        "-D",
        "will",
        "user-property",
        "b",
    ];
    expect_failure(&publish(&one_value), 2, "a name and a value");
    expect_failure(&subscribe(&["-t", "a/#/b"]), 2, "`#` must stand alone");
    expect_failure(&subscribe(&["-t", "a", "-c"]), 2, "-c needs -i");
    expect_failure(&subscribe(&["-t", "a", "-F", "%z"]), 2, "%z");
    expect_failure(&subscribe(&["-L", "mqtts://host/a"]), 2, "--cafile");

    let unused_port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port().to_string()
    };
    let nobody = ["-h", "127.0.0.1", "-p", &unused_port, "-t", "a", "-n"];
    expect_failure(&publish(&nobody), 1, "nothing listens there");
    let nowhere = ["-h", "host.invalid", "-t", "a", "-n"];
    expect_failure(&publish(&nowhere), 1, "cannot find host host.invalid");
    let no_file = ["-t", "a", "-f", "/nowhere/file"];
    expect_failure(&publish(&no_file), 1, "/nowhere/file");
}

#[test]
fn refusal_has_a_plain_reason_in_every_version() {
    for (version, connack) in [
        (Version::V311, &[0x20, 2, 0, 5][..]),
        (Version::V5, &[0x20, 3, 0, 0x87, 0]),
    ] {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = midge_at(&server, "pub", version, &["-t", "a", "-n"]);

        let mut stream = accept(&server);
        stream.write_all(connack).unwrap();

        let reason = "Connection refused: not authorised (NotAuthorized)";
        expect_failure(&client.finish(), 1, reason);
    }
}

#[test]
fn a_server_that_does_not_speak_mqtt_is_recognised() {
    for (answer, reason) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
            "does not speak MQTT",
        ),
        (&[0x15, 3, 1, 0, 2, 2, 70], "--cafile"),
        (b"", "closed the connection without an answer"),
    ] {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = midge_at(&server, "pub", Version::V311, &["-t", "a", "-n"]);

        accept(&server).write_all(answer).unwrap();

        expect_failure(&client.finish(), 1, reason);
    }
}

#[test]
fn what_the_server_has_against_a_qos_0_message_is_told() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = midge_at(&server, "pub", Version::V5, &["-t", "a", "-m", "b"]);

    let mut stream = accept(&server);
    stream.write_all(&[0x20, 3, 0, 0, 0]).unwrap();
    assert_eq!(read_packet(&mut stream), [0x30, 5, 0, 1, b'a', 0, b'b']);
    stream.write_all(&[0xE0, 1, 0x97]).unwrap();

    expect_failure(&client.finish(), 1, "quota exceeded (QuotaExceeded)");
}

#[test]
fn a_lost_subscriber_comes_back_to_its_session() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let arguments = ["-t", "a", "-c", "-i", "kept", "-q", "2", "-C", "2"];
    let subscriber = midge_at(&server, "sub", Version::V311, &arguments);

    let mut stream = accept(&server);
    stream.write_all(&[0x20, 2, 0, 0]).unwrap();
    let subscribe = read_packet(&mut stream);
    assert_eq!(subscribe, [0x82, 6, 0, 1, 0, 1, b'a', 2]);
    stream.write_all(&[0x90, 3, 0, 1, 2]).unwrap();
    let first = [0x34, 6, 0, 1, b'a', 0, 9, b'1'];
    stream.write_all(&first).unwrap();
    assert_eq!(read_packet(&mut stream), [0x50, 2, 0, 9]);
    drop(stream);

    let mut stream = accept(&server);
    let session_present = [0x20, 2, 1, 0];
    stream.write_all(&session_present).unwrap();
    // It was shown before; PUBREC is all that was lost, [MQTT-4.3.3-10].
    let mut repeated = first;
    repeated[0] |= 0b1000;
    stream.write_all(&repeated).unwrap();
    assert_eq!(read_packet(&mut stream), [0x50, 2, 0, 9]);
    stream.write_all(&[0x62, 2, 0, 9]).unwrap();
    assert_eq!(read_packet(&mut stream), [0x70, 2, 0, 9]);
    stream.write_all(&[0x30, 4, 0, 1, b'a', b'2']).unwrap();
    let disconnect = [0xE0, 0];
    assert_eq!(read_packet(&mut stream), disconnect);
    drop(stream);

    let finished = subscriber.finish();
    expect_success(&finished);
    assert_eq!(finished.stdout, ["1", "2"]);
    assert_eq!(finished.stderr[0], "the server closed the connection");
}

#[test]
fn silence_is_answered_with_pings_until_the_server_is_given_up() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let arguments = ["-t", "a", "-k", "1"];
    let subscriber = midge_at(&server, "sub", Version::V311, &arguments);

    let mut stream = accept(&server);
    stream.write_all(&[0x20, 2, 0, 0]).unwrap();
    let _subscribe = read_packet(&mut stream);
    let ping = [0xC0, 0];
    assert_eq!(read_packet(&mut stream), ping);

    subscriber.wait_for_error("the server does not answer PINGREQ");
}

#[test]
fn interrupt_disconnects_cleanly() {
    let broker = Broker::start();
    let watcher = midge_sub(&broker, Version::V311, &["-t", "wills", "-C", "1"]);
    let will = ["--will-topic", "wills", "--will-payload", "will"];
    let subscriber = midge_sub(&broker, Version::V311, &[&["-t", "a"], &will[..]].concat());

    subscriber.interrupt();
    expect_success(&subscriber.finish());
    midge_pub(&broker, Version::V311, &["-t", "wills", "-m", "no will"]).succeed();

    assert_eq!(watcher.succeed(), ["no will"]);
}

#[test]
fn a_reader_that_leaves_ends_midge_sub_quietly() {
    let broker = Broker::start();
    let port = broker.port().to_string();
    let mut shell = Command::new("sh");
    shell.args(["-c", r#""$0" sub -h 127.0.0.1 -p "$1" -t a | head -n 1"#]);
    shell.args([env!("CARGO_BIN_EXE_midge"), &port]);
    let repeated = [
        "-t",
        "a",
        "-m",
        "1",
        "--repeat",
        "1000000",
        "--repeat-delay",
        "0.01",
    ];
    let publisher = midge_pub(&broker, Version::V311, &repeated);

    let finished = Program::start(&mut shell).finish();
    publisher.kill();

    expect_success(&finished);
    assert_eq!(
        (&*finished.stdout, &*finished.stderr),
        (&["1".to_owned()][..], &[][..])
    );
}

/// `midge pub` with these arguments, and the broker's address.
fn midge_pub(broker: &Broker, version: Version, arguments: &[&str]) -> Program {
    let port = broker.port().to_string();
    let address = ["-h", "127.0.0.1", "-p", &port, "-V", midge_name(version)];
    midge("pub", &address, arguments)
}

/// `midge sub` with these arguments, and the broker's address; it has SUBACK when this returns.
#[track_caller]
fn midge_sub(broker: &Broker, version: Version, arguments: &[&str]) -> Program {
    let subscriber = start_midge_sub(broker, version, &[&["-d"], arguments].concat());
    subscriber.wait_for_error("received SUBACK");
    subscriber
}

fn start_midge_sub(broker: &Broker, version: Version, arguments: &[&str]) -> Program {
    let port = broker.port().to_string();
    let address = ["-h", "127.0.0.1", "-p", &port, "-V", midge_name(version)];
    midge("sub", &address, arguments)
}

/// A client of a server that the test plays itself.
fn midge_at(
    server: &TcpListener,
    subcommand: &str,
    version: Version,
    arguments: &[&str],
) -> Program {
    let port = server.local_addr().unwrap().port().to_string();
    let address = ["-h", "127.0.0.1", "-p", &port, "-V", midge_name(version)];
    midge(subcommand, &address, arguments)
}

fn midge(subcommand: &str, flags: &[&str], more_flags: &[&str]) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_midge"));
    command.arg(subcommand).args(flags).args(more_flags);
    Program::start(&mut command)
}

/// The argument of `-V`.
fn midge_name(version: Version) -> &'static str {
    match version {
        Version::V31 => "31",
        Version::V311 => "311",
        Version::V5 => "5",
    }
}

/// One QoS 1 message to the listener `tls`.
fn publish_with_tls(broker: &Broker, flags: &[&str]) -> Finished {
    let port = broker.address("tls").port().to_string();
    let message = [
        "-h",
        "127.0.0.1",
        "-p",
        &port,
        "-t",
        "a",
        "-m",
        "b",
        "-q",
        "1",
    ];
    midge("pub", &message, flags).finish()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

/// Takes the connection of a client and its CONNECT.
fn accept(server: &TcpListener) -> TcpStream {
    let (mut stream, _) = server.accept().unwrap();
    assert_eq!(read_packet(&mut stream)[0], 0x10, "CONNECT comes first");
    stream
}

/// Reads a packet of less than 128 bytes.
fn read_packet(stream: &mut TcpStream) -> Vec<u8> {
    let mut packet = vec![0; 2];
    stream.read_exact(&mut packet).unwrap();
    let length = packet[1].into();
    stream.take(length).read_to_end(&mut packet).unwrap();
    packet
}

#[track_caller]
fn expect_success(finished: &Finished) {
    assert_eq!(finished.status.code(), Some(0), "{finished:#?}");
}

#[track_caller]
fn expect_failure(finished: &Finished, code: i32, reason: &str) {
    assert_eq!(finished.status.code(), Some(code), "{finished:#?}");
    assert!(finished.stderr[0].starts_with("error: "), "{finished:#?}");
    let told = finished.stderr.iter().any(|line| line.contains(reason));
    assert!(told, "no {reason:?} in {finished:#?}");
}
