//! Sections 3.3.4 and 4.9: flow control.

use crate::support::{
    Broker, Client, Connect, Kind, Publish, V5, Version, both_versions, property, wire,
};

both_versions! {
    messages_beyond_the_in_flight_window_follow_as_acknowledgements_come,
    a_slow_subscriber_does_not_hold_up_others,
}

/// A subscriber with this Receive Maximum, and a publisher of ten messages.
fn ten_messages(broker: &Broker, receive_maximum: u16, qos: u8) -> Client {
    let connect =
        Connect::new(V5, "subscriber").property(property::receive_maximum(receive_maximum));
    let (mut subscriber, _) = broker.connect_with(&connect);
    subscriber.subscribe("t", qos);
    let mut publisher = broker.connect(V5, "publisher");
    for number in 0..10 {
        publisher.publish_acknowledged("t", &number.to_string(), qos);
    }
    subscriber
}

#[test]
fn mqtt_3_3_4_9_no_more_than_receive_maximum_qos1_messages_are_in_flight() {
    let broker = Broker::start();
    let mut subscriber = ten_messages(&broker, 3, 1);

    let mut unacknowledged: Vec<u16> = (0..3)
        .map(|number| subscriber.expect_publish("t", &number.to_string()).id)
        .collect();
    subscriber.expect_nothing();
    for number in 3..10 {
        subscriber.send_puback(unacknowledged.remove(0));
        unacknowledged.push(subscriber.expect_publish("t", &number.to_string()).id);
        subscriber.expect_nothing();
    }
}

#[test]
fn mqtt_3_3_4_9_qos2_messages_are_in_flight_until_pubcomp() {
    let broker = Broker::start();
    let mut subscriber = ten_messages(&broker, 1, 2);

    for number in 0..10 {
        let id = subscriber.expect_publish("t", &number.to_string()).id;
        subscriber.send_pubrec(id);
        subscriber.expect_pubrel(id);
        subscriber.expect_nothing();
        subscriber.send_pubcomp(id);
    }
    subscriber.expect_nothing();
}

#[test]
fn mqtt_4_9_0_2_pubrec_with_an_error_gives_the_quota_back() {
    let broker = Broker::start();
    let mut subscriber = ten_messages(&broker, 1, 2);

    for number in 0..10 {
        let id = subscriber.expect_publish("t", &number.to_string()).id;
        subscriber.send(&wire::acknowledgement_with_reason(Kind::PubRec, id, 0x80));
    }
    subscriber.expect_nothing();
}

#[test]
fn mqtt_4_9_0_3_other_packets_are_answered_while_the_quota_is_used_up() {
    let broker = Broker::start();
    let mut subscriber = ten_messages(&broker, 1, 1);
    subscriber.expect_publish("t", "0");

    subscriber.ping();
    subscriber.subscribe("other", 0);
    subscriber.unsubscribe(&["other"]);
    subscriber.publish_acknowledged("nobody", "x", 1);
    subscriber.publish_acknowledged("nobody", "x", 2);
}

#[test]
fn receive_maximum_is_kept_on_resume() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V5, "subscriber", false);
    subscriber.subscribe("t", 1);
    subscriber.disconnect();
    let mut publisher = broker.connect(V5, "publisher");
    for number in 0..5 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }

    let connect = Connect::persistent(V5, "subscriber").property(property::receive_maximum(2));
    let (mut subscriber, _) = broker.connect_with(&connect);

    let first = subscriber.expect_publish("t", "0").id;
    subscriber.expect_publish("t", "1");
    subscriber.expect_nothing();
    subscriber.send_puback(first);
    subscriber.expect_publish("t", "2");
    subscriber.expect_nothing();
}

#[test]
fn receive_maximum_of_the_server_is_told_and_enforced() {
    let broker = Broker::start_with(&[("limits.receive_maximum", "10")]);
    let (mut publisher, connack) = broker.connect_with(&Connect::new(V5, "publisher"));
    assert_eq!(connack.number(property::RECEIVE_MAXIMUM), Some(10));

    // QoS 2 without PUBREL stays in flight.
    for id in 1..=10 {
        publisher.publish(&Publish::new("t", "x").qos(2, id));
        publisher.expect(Kind::PubRec);
    }
    publisher.ping();
    publisher.publish(&Publish::new("t", "x").qos(2, 11));

    publisher.expect_disconnect(0x93);
}

#[test]
fn pubcomp_gives_the_quota_of_the_publisher_back() {
    let broker = Broker::start_with(&[("limits.receive_maximum", "2")]);
    let mut publisher = broker.connect(V5, "publisher");

    for _ in 0..20 {
        publisher.publish_acknowledged("t", "x", 2);
        publisher.publish_acknowledged("t", "x", 1);
    }
}

#[test]
fn qos0_is_not_subject_to_receive_maximum() {
    let broker = Broker::start_with(&[("limits.receive_maximum", "1")]);
    let mut publisher = broker.connect(V5, "publisher");
    publisher.publish(&Publish::new("t", "x").qos(2, 1));
    publisher.expect(Kind::PubRec);

    for _ in 0..20 {
        publisher.publish(&Publish::new("t", "x"));
    }

    publisher.ping();
}

fn messages_beyond_the_in_flight_window_follow_as_acknowledgements_come(version: Version) {
    let broker = Broker::start_with(&[("session.in_flight_max", "5")]);
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");

    for number in 0..50 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }

    let mut unacknowledged: Vec<u16> = (0..5)
        .map(|number| subscriber.expect_publish("t", &number.to_string()).id)
        .collect();
    subscriber.expect_nothing();
    for number in 5..50 {
        subscriber.send_puback(unacknowledged.remove(0));
        unacknowledged.push(subscriber.expect_publish("t", &number.to_string()).id);
    }
}

fn a_slow_subscriber_does_not_hold_up_others(version: Version) {
    let broker = Broker::start();
    // It never reads what is sent to it.
    let mut slow = broker.connect(version, "slow");
    slow.subscribe("t", 0);
    let mut quick = broker.connect(version, "quick");
    quick.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");
    let payload = "x".repeat(100_000);

    for _ in 0..200 {
        publisher.publish_acknowledged("t", &payload, 1);
        let message = quick.expect(Kind::Publish);
        quick.send_puback(message.id);
    }
}
