//! The programs of five tutorials for MQTT with Node, as people copy them.
//!
//! They are in `tutorials/`, unchanged but for the address of the broker, which comes from the
//! environment. Their intervals are theirs too: they set how long these tests take.

use crate::support::{
    broker::Broker,
    node::{MqttJs, script},
    program::Program,
};

#[test]
fn greeting_reaches_the_other_client() {
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        greeting_arrives("greeting", mqtt_js);
    }
}

#[test]
fn greeting_of_the_heritage_clients_reaches_the_other_client() {
    greeting_arrives("greeting_heritage", MqttJs::V0);
}

/// `client2` only says that it has started, not that it has subscribed. So `client1` is run, as a
/// person would, until a greeting comes through.
#[track_caller]
fn greeting_arrives(programs: &str, mqtt_js: MqttJs) {
    let broker = Broker::start();
    let program = |number| {
        script(
            &format!("tutorials/{programs}_client{number}.js"),
            mqtt_js,
            &broker,
        )
    };
    let listener = program(2).start();
    listener.wait_for_line("client started ...");

    let greeting = "Client 1 is alive.. Test Ping! ";
    let arrived = |listener: &Program| {
        let lines = listener.stdout().so_far();
        lines.iter().any(|line| line.starts_with(greeting))
    };
    for _ in 0..20 {
        assert_eq!(program(1).succeed(), ["Client publishing.."]);
        if arrived(&listener) {
            break;
        }
    }
    listener.wait_for_line(greeting);
}

#[test]
fn temperature_reaches_live_and_late_subscribers() {
    let broker = Broker::start();
    let program = |name| script(name, MqttJs::V5, &broker).start();
    let display = program("tutorials/temperature_subscribe.js");
    display.wait_for_line("服务器连接成功");

    let sensor = program("tutorials/temperature_publish.js");
    assert_eq!(display.wait_for_lines(3)[1], "当前topic： temperature");
    sensor.kill();

    let late = program("tutorials/temperature_subscribe.js").wait_for_lines(3);
    display
        .stdout()
        .wait_for("the value that was retained", |lines| {
            (lines.last() == late.last()).then_some(())
        });
    let degrees: u32 = late[2]
        .strip_prefix("当前温度： ")
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=40).contains(&degrees), "{degrees}");
}

#[test]
fn retained_json_reaches_a_late_subscriber() {
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        let broker = Broker::start();
        let publisher = script("tutorials/json_publisher.js", mqtt_js, &broker).start();
        publisher.wait_for_line("client connected");
        publisher.wait_for_line("Message published");

        let subscriber = script("tutorials/json_subscriber.js", mqtt_js, &broker).start();

        subscriber.wait_for_line("[ { topic: 'test/connection', qos: 0 } ] granted");
        subscriber.wait_for_line("retain: true");
        subscriber.wait_for_line("{ '1': 'Hello world', '2': 'Welcome to the test connection' }");
        let lines = publisher.kill();
        assert!(
            !lines.iter().any(|line| line.contains("closed")),
            "{lines:?}"
        );
    }
}

#[test]
fn hello_reaches_two_subscribers_that_were_away_in_order() {
    let broker = Broker::start();
    let subscriber = |client_id| {
        script("tutorials/hello_sub.js", MqttJs::V5, &broker)
            .environment("CLIENT_ID", client_id)
            .start()
    };
    let hello = |numbers: std::ops::RangeInclusive<usize>| {
        numbers
            .map(|number| format!("received message:  Hello mqtt {number}"))
            .collect::<Vec<_>>()
    };
    let publisher = script("tutorials/hello_pub.js", MqttJs::V5, &broker).start();
    let first = subscriber("cli_sub");
    let second = subscriber("cli2_sub");
    // Both have subscribed, since both receive. They leave without DISCONNECT.
    first.wait_for_lines(1);
    second.wait_for_lines(1);
    let first_until = number(first.kill().last().unwrap());
    let second_until = number(second.kill().last().unwrap());

    let acknowledged = first_until.max(second_until) + 2;
    publisher.wait_for_line(&acknowledged.to_string());

    // What was printed just before the end may not have been acknowledged, and then comes again.
    // The second is back later, with its own copies.
    for (client_id, until) in [("cli_sub", first_until), ("cli2_sub", second_until)] {
        let resumed = subscriber(client_id);
        resumed.wait_for_line(&format!("Hello mqtt {}", acknowledged + 1));
        let lines = resumed.kill();
        let from = number(&lines[0]);
        assert!(from == until || from == until + 1, "{lines:?}");
        assert_eq!(lines, hello(from..=from + lines.len() - 1));
    }
}

#[test]
fn chat_messages_arrive_in_order() {
    offline_chat(4, |subscribe| subscribe);
}

#[test]
fn long_chat_arrives_in_order() {
    offline_chat(500, |subscribe| subscribe);
}

#[test]
fn chat_of_a_client_that_left_without_end_arrives_in_order() {
    offline_chat(4, |subscribe| {
        subscribe.environment("LEAVE_WITHOUT_END", "1")
    });
}

/// Sends `count` messages to a client that is away, and checks what it gets when it is back.
#[track_caller]
fn offline_chat(
    count: usize,
    leave: impl Fn(crate::support::node::Script) -> crate::support::node::Script,
) {
    for mqtt_js in [MqttJs::V4, MqttJs::V5] {
        let broker = Broker::start();
        let program = |name| script(name, mqtt_js, &broker);
        leave(program("tutorials/chat_subscribe.js")).succeed();
        program("tutorials/chat_publish.js")
            .environment("COUNT", &count.to_string())
            .succeed();

        let receiver = program("tutorials/chat_receive.js").start();

        let expected: Vec<_> = (0..count)
            .map(|number| format!("message: 发布new测试信息{number}"))
            .collect();
        assert_eq!(receiver.wait_for_lines(count), expected);
    }
}

/// The number at the end of "received message:  Hello mqtt 7".
fn number(line: &str) -> usize {
    let number = line.rsplit(' ').next().expect("rsplit yields something");
    number.parse().expect("the line ends with a number")
}
