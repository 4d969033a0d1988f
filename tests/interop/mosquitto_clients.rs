//! `mosquitto_pub` and `mosquitto_sub`, the clients that everybody has at hand.

use std::{fs, process::Command};

use tempfile::TempDir;

use crate::support::{
    Version,
    broker::Broker,
    certificates::Certificates,
    mosquitto::{make_session, mosquitto_pub, publish, resume, subscribe},
    program::Program,
    test_each_version, test_tool,
};

test_each_version![
    every_qos_arrives,
    granted_qos_limits_the_delivery,
    retained_message_is_kept_replaced_and_removed,
    will_is_published_when_the_client_dies,
    will_is_not_published_after_disconnect,
    offline_messages_arrive_in_order,
    offline_messages_survive_a_restart_of_the_broker,
    wildcards_match,
    large_payload_arrives_unchanged,
];

fn every_qos_arrives(version: Version) {
    let broker = Broker::start();
    let format = ["-F", "%t %q %r %p"];
    let subscriber = subscribe(
        &broker,
        version,
        &[&["-t", "qos/#", "-q", "2", "-C", "3"], &format[..]].concat(),
    );

    for qos in ["0", "1", "2"] {
        let topic = format!("qos/{qos}");
        publish(
            &broker,
            version,
            &["-t", &topic, "-q", qos, "-m", "21.5 °C"],
        );
    }

    assert_eq!(
        subscriber.messages(),
        [
            "qos/0 0 0 21.5 °C",
            "qos/1 1 0 21.5 °C",
            "qos/2 2 0 21.5 °C"
        ]
    );
}

fn granted_qos_limits_the_delivery(version: Version) {
    let broker = Broker::start();
    let subscriber = subscribe(
        &broker,
        version,
        &["-t", "topic", "-q", "1", "-C", "3", "-F", "%q"],
    );

    for qos in ["0", "1", "2"] {
        publish(&broker, version, &["-t", "topic", "-q", qos, "-m", "m"]);
    }

    assert_eq!(subscriber.messages(), ["0", "1", "1"]);
}

fn retained_message_is_kept_replaced_and_removed(version: Version) {
    let broker = Broker::start();
    let retain = |topic, message| {
        publish(
            &broker,
            version,
            &["-r", "-q", "1", "-t", topic, "-m", message],
        );
    };
    retain("room/1", "first");
    retain("room/1", "second");
    retain("room/2", "removed");
    publish(&broker, version, &["-r", "-q", "1", "-n", "-t", "room/2"]);
    retain("room/3", "last");

    let subscriber = subscribe(
        &broker,
        version,
        &["-t", "room/#", "-q", "1", "-C", "3", "-F", "%t %r %p"],
    );
    let mut retained = subscriber.wait_for_messages(2);
    retained.sort();
    retain("room/1", "live");

    assert_eq!(retained, ["room/1 1 second", "room/3 1 last"]);
    assert_eq!(subscriber.messages().last().unwrap(), "room/1 0 live");
}

fn will_is_published_when_the_client_dies(version: Version) {
    let broker = Broker::start();
    let watcher = subscribe(
        &broker,
        version,
        &["-t", "status/#", "-q", "1", "-C", "1", "-F", "%t %q %r %p"],
    );
    let will = ["--will-topic", "status/pump", "--will-payload", "gone"];
    let options = ["--will-qos", "1", "--will-retain", "-t", "unused"];
    let dying = subscribe(&broker, version, &[&will[..], &options[..]].concat());

    dying.kill();

    assert_eq!(watcher.messages(), ["status/pump 1 0 gone"]);
    let late = subscribe(
        &broker,
        version,
        &["-t", "status/#", "-q", "1", "-C", "1", "-F", "%t %q %r %p"],
    );
    assert_eq!(late.messages(), ["status/pump 1 1 gone"]);
}

fn will_is_not_published_after_disconnect(version: Version) {
    let broker = Broker::start();
    let watcher = subscribe(&broker, version, &["-t", "status/#", "-C", "2", "-v"]);

    let will = ["--will-topic", "status/will", "--will-payload", "gone"];
    let message = ["-q", "1", "-t", "status/message", "-m", "here"];
    publish(&broker, version, &[&will[..], &message[..]].concat());
    publish(&broker, version, &["-t", "status/end", "-m", "end"]);

    assert_eq!(
        watcher.messages(),
        ["status/message here", "status/end end"]
    );
}

fn offline_messages_arrive_in_order(version: Version) {
    let broker = Broker::start();
    make_session(&broker, version, "sleeper", "queue/+", "1");

    publish_numbers(&broker, version, "queue/a", 0..200);

    let numbers = wake(&broker, version, "sleeper", "queue/+", "200");
    assert_eq!(numbers, (0..200).map(|n| n.to_string()).collect::<Vec<_>>());
}

fn offline_messages_survive_a_restart_of_the_broker(version: Version) {
    let mut broker = Broker::start();
    make_session(&broker, version, "sleeper", "queue/+", "1");
    publish_numbers(&broker, version, "queue/a", 0..50);
    publish(
        &broker,
        version,
        &["-r", "-q", "1", "-t", "kept", "-m", "kept"],
    );

    broker.restart();

    publish_numbers(&broker, version, "queue/a", 50..60);
    let numbers = wake(&broker, version, "sleeper", "queue/+", "60");
    assert_eq!(numbers, (0..60).map(|n| n.to_string()).collect::<Vec<_>>());
    let retained = subscribe(&broker, version, &["-t", "kept", "-C", "1", "-F", "%r %p"]);
    assert_eq!(retained.messages(), ["1 kept"]);
}

#[test]
fn acknowledged_messages_survive_the_death_of_the_broker() {
    let mut broker = Broker::start();
    make_session(&broker, Version::V5, "sleeper", "queue/+", "2");
    publish_numbers(&broker, Version::V5, "queue/a", 0..50);

    broker.crash_and_restart();

    let numbers = wake(&broker, Version::V5, "sleeper", "queue/+", "50");
    assert_eq!(numbers, (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
}

fn wildcards_match(version: Version) {
    let broker = Broker::start();
    let one_level = subscribe(
        &broker,
        version,
        &["-t", "home/+/light", "-C", "2", "-F", "%t"],
    );
    let all_levels = subscribe(&broker, version, &["-t", "home/#", "-C", "4", "-F", "%t"]);

    for topic in [
        "home",
        "home/kitchen/light",
        "home/a/b/light",
        "home//light",
        "homes",
    ] {
        publish(&broker, version, &["-t", topic, "-m", "on"]);
    }

    assert_eq!(one_level.messages(), ["home/kitchen/light", "home//light"]);
    assert_eq!(
        all_levels.messages(),
        [
            "home",
            "home/kitchen/light",
            "home/a/b/light",
            "home//light"
        ]
    );
}

fn large_payload_arrives_unchanged(version: Version) {
    let broker = Broker::start();
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("payload");
    // No period of the pattern is a power of two, so a lost or repeated block would show.
    let payload: String = (0..512 * 1024)
        .map(|index: u32| char::from(b'a' + (index % 23) as u8))
        .collect();
    fs::write(&file, &payload).unwrap();
    let subscriber = subscribe(&broker, version, &["-t", "image", "-q", "1", "-C", "1"]);

    publish(
        &broker,
        version,
        &["-q", "1", "-t", "image", "-f", file.to_str().unwrap()],
    );

    assert!(subscriber.messages() == [payload]);
}

#[test]
fn lines_of_one_publisher_stay_in_order() {
    // MQTT 3.1.1: with MQTT 5, QoS 2 and a full window, mosquitto_sub 2.0.11 reports a protocol error.
    let broker = Broker::start();
    for qos in ["0", "1", "2"] {
        let subscriber = subscribe(
            &broker,
            Version::V311,
            &["-t", "lines", "-q", qos, "-C", "500"],
        );
        let mut publisher =
            mosquitto_pub(&broker, Version::V311, &["-l", "-t", "lines", "-q", qos]);
        for number in 0..500 {
            publisher.write_line(&number.to_string());
        }
        publisher.succeed();

        let expected = (0..500).map(|n| n.to_string()).collect::<Vec<_>>();
        assert_eq!(subscriber.messages(), expected, "QoS {qos}");
    }
}

#[test]
fn versions_understand_each_other() {
    let broker = Broker::start();
    let versions = [Version::V31, Version::V311, Version::V5];
    let subscribers = versions.map(|version| {
        subscribe(
            &broker,
            version,
            &["-t", "mixed", "-q", "2", "-C", "3", "-F", "%q %p"],
        )
    });

    for version in versions {
        publish(
            &broker,
            version,
            &["-q", "2", "-t", "mixed", "-m", version.level()],
        );
    }

    for subscriber in subscribers {
        assert_eq!(subscriber.messages(), ["2 3", "2 4", "2 5"]);
    }
}

#[test]
fn properties_arrive_as_they_were_sent() {
    let broker = Broker::start();
    let format = "%P|%R|%D|%C|%E|%F|%p";
    let subscriber = subscribe(
        &broker,
        Version::V5,
        &["-t", "request", "-q", "1", "-C", "1", "-F", format],
    );

    let property = |name, value| ["-D", "publish", name, value];
    publish(
        &broker,
        Version::V5,
        &[
            &["-t", "request", "-q", "1", "-m", "ping"][..],
            &["-D", "publish", "user-property", "b", "2"],
            &["-D", "publish", "user-property", "a", "1"],
            &["-D", "publish", "user-property", "b", "2"],
            &property("response-topic", "answers/7"),
            &property("correlation-data", "no. 7"),
            &property("content-type", "text/plain"),
            &property("message-expiry-interval", "3600"),
            &property("payload-format-indicator", "1"),
        ]
        .concat(),
    );

    assert_eq!(
        subscriber.messages(),
        ["b:2 a:1 b:2|answers/7|no. 7|text/plain|3600|1|ping"]
    );
}

#[test]
fn properties_of_a_retained_and_of_an_offline_message_are_kept() {
    let broker = Broker::start();
    make_session(&broker, Version::V5, "sleeper", "request", "1");
    publish(
        &broker,
        Version::V5,
        &[
            &["-r", "-t", "request", "-q", "1", "-m", "ping"][..],
            &["-D", "publish", "user-property", "unit", "°C"],
            &["-D", "publish", "response-topic", "answers/7"],
        ]
        .concat(),
    );

    let format = ["-F", "%r|%P|%R|%p", "-C", "1", "-q", "1"];
    let offline = resume(
        &broker,
        Version::V5,
        &[&["-c", "-i", "sleeper", "-t", "request"], &format[..]].concat(),
    );
    let late = subscribe(
        &broker,
        Version::V5,
        &[&["-t", "request"], &format[..]].concat(),
    );

    // The Server forwards the retain flag of a queued message as 0, [MQTT-3.3.1-12].
    assert_eq!(offline.messages(), ["0|unit:°C|answers/7|ping"]);
    assert_eq!(late.messages(), ["1|unit:°C|answers/7|ping"]);
}

#[test]
fn shared_subscription_gives_each_message_to_one_member() {
    let broker = Broker::start();
    let members = [(); 2].map(|()| {
        subscribe(
            &broker,
            Version::V5,
            &[
                "-t",
                "$share/workers/jobs/+",
                "-t",
                "end",
                "-q",
                "1",
                "-F",
                "%p",
            ],
        )
    });
    let everything = subscribe(
        &broker,
        Version::V5,
        &["-t", "jobs/+", "-q", "1", "-C", "20"],
    );

    publish_numbers(&broker, Version::V5, "jobs/a", 0..20);
    publish(&broker, Version::V5, &["-q", "1", "-t", "end", "-m", "end"]);

    let mut shared = Vec::new();
    for member in &members {
        // `end` is not shared: each member gets it, after all jobs.
        let mut count = 1;
        let mut messages = member.wait_for_messages(count);
        while messages.last().is_none_or(|message| message != "end") {
            count = messages.len() + 1;
            messages = member.wait_for_messages(count);
        }
        messages.pop();
        assert!(!messages.is_empty(), "one member did all the work");
        shared.extend(messages);
    }
    shared.sort_by_key(|number| number.parse::<u32>().unwrap());
    assert_eq!(shared, everything.messages());
}

#[test]
fn persistent_session_ends_with_a_clean_start() {
    let broker = Broker::start();
    make_session(&broker, Version::V311, "sleeper", "queue", "1");
    publish(
        &broker,
        Version::V311,
        &["-q", "1", "-t", "queue", "-m", "old"],
    );

    let clean = ["-i", "sleeper", "-t", "other", "-E"];
    subscribe(&broker, Version::V311, &clean).messages();

    let again = subscribe(
        &broker,
        Version::V311,
        &["-c", "-i", "sleeper", "-t", "queue", "-q", "1", "-C", "1"],
    );
    publish(
        &broker,
        Version::V311,
        &["-q", "1", "-t", "queue", "-m", "new"],
    );
    assert_eq!(again.messages(), ["new"]);
}

#[test]
fn tls_client_trusts_the_authority() {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let broker = Broker::configure().encrypted("tls", &certificates).start();
    let authority = certificates.authority.to_str().unwrap();
    let trusting = |program: &str| {
        let mut command = Command::new("stdbuf");
        command
            .args(["--output=L", program, "-h", "127.0.0.1"])
            .args(["-p", &broker.address("tls").port().to_string()])
            .args(["--cafile", authority, "-t", "secret", "-q", "1"]);
        command
    };

    let subscriber = Program::start(trusting("mosquitto_sub").args(["-d", "-C", "1"]));
    subscriber.wait_for_line("Subscribed (mid:");
    Program::start(trusting("mosquitto_pub").args(["-m", "sealed"])).succeed();

    assert!(subscriber.succeed().contains(&"sealed".to_owned()));
}

#[test]
fn tls_listener_wants_a_client_certificate() {
    let directory = TempDir::new().unwrap();
    let certificates = Certificates::create_in(directory.path());
    let authority = certificates.authority.to_str().unwrap();
    let broker = Broker::configure()
        .encrypted("tls", &certificates)
        .set("listeners.tls.tls.client_ca", authority)
        .set("listeners.tls.tls.client_auth", "required")
        .start();
    let port = broker.address("tls").port().to_string();
    let publisher = || {
        let mut command = Command::new("mosquitto_pub");
        command
            .args(["-h", "127.0.0.1", "-p", &port, "--cafile", authority])
            .args(["-t", "secret", "-q", "1", "-m", "sealed"]);
        command
    };

    let anonymous = Program::start(&mut publisher()).finish();
    let known = Program::start(
        publisher()
            .args([
                "--cert".as_ref(),
                certificates.client.certificate.as_os_str(),
            ])
            .args(["--key".as_ref(), certificates.client.key.as_os_str()]),
    )
    .finish();

    assert!(!anonymous.status.success(), "{anonymous:?}");
    assert!(known.status.success(), "{known:?}");
}

#[test]
fn password_file_of_mosquitto_decides_who_may_connect() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("passwords");
    let made = Command::new(test_tool("mosquitto/mosquitto_passwd"))
        .args(["-b", "-c", file.to_str().unwrap(), "alice", "right"])
        .status();
    assert!(made.unwrap().success());
    let broker = Broker::configure()
        .set("auth.users_file", file.to_str().unwrap())
        .start();

    for version in [Version::V31, Version::V311, Version::V5] {
        let message = ["-q", "1", "-t", "topic", "-m", "hello"];
        let publisher = |credentials: &[&str]| {
            mosquitto_pub(&broker, version, &[&message[..], credentials].concat()).finish()
        };

        let known = publisher(&["-u", "alice", "-P", "right"]);
        assert!(known.status.success(), "{version:?}: {known:?}");
        for credentials in [
            &["-u", "alice", "-P", "wrong"][..],
            &["-u", "bob", "-P", "right"],
            &[],
        ] {
            let refused = publisher(credentials);
            // "Bad user name or password" or "Not authorized", of version 3 and of version 5.
            let codes = if version == Version::V5 {
                [134, 135]
            } else {
                [4, 5]
            };
            let code = refused.status.code().unwrap();
            assert!(
                codes.contains(&code),
                "{version:?} {credentials:?}: {refused:?}"
            );
            assert!(
                refused.stderr[0].starts_with("Connection error: "),
                "{refused:?}"
            );
        }
    }
}

/// Publishes each number as a message of its own, QoS 1, from one client.
#[track_caller]
fn publish_numbers(broker: &Broker, version: Version, topic: &str, numbers: std::ops::Range<u32>) {
    let mut publisher = mosquitto_pub(broker, version, &["-l", "-q", "1", "-t", topic]);
    for number in numbers {
        publisher.write_line(&number.to_string());
    }
    publisher.succeed();
}

/// Resumes the session of `client_id` and returns the first `count` payloads that it gets.
#[track_caller]
fn wake(
    broker: &Broker,
    version: Version,
    client_id: &str,
    filter: &str,
    count: &str,
) -> Vec<String> {
    let arguments = ["-c", "-i", client_id, "-t", filter, "-q", "1", "-C", count];
    resume(broker, version, &arguments).messages()
}
