//! Section 3.1.4: a Client Identifier that is connected already.

use crate::support::{Broker, Connect, V3_1_1, V5, Version, Will, both_versions, property};

both_versions! {
    mqtt_3_1_4_3_earlier_connection_is_closed_with_session_taken_over,
    mqtt_3_1_4_3_session_moves_to_the_new_connection,
    mqtt_3_1_4_3_unacknowledged_messages_move_to_the_new_connection,
    mqtt_3_1_4_4_takeover_with_clean_start_begins_a_new_session,
    client_ids_that_differ_in_case_are_different_clients,
    many_takeovers_in_a_row_leave_the_last_one_connected,
}

fn mqtt_3_1_4_3_earlier_connection_is_closed_with_session_taken_over(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect(version, "same");

    let mut second = broker.connect(version, "same");

    first.expect_disconnect(0x8E);
    second.ping();
}

#[test]
fn mqtt_3_1_4_3_takeover_works_between_versions() {
    let broker = Broker::start();
    let mut old = broker.connect(V5, "same");

    let mut new = broker.connect(V3_1_1, "same");

    old.expect_disconnect(0x8E);
    new.ping();
}

fn mqtt_3_1_4_3_session_moves_to_the_new_connection(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect_persistent(version, "same", false);
    first.subscribe("t", 1);

    let mut second = broker.connect_persistent(version, "same", true);

    first.expect_disconnect(0x8E);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "after", 1);
    second.accept_publish("t", "after");
}

fn mqtt_3_1_4_3_unacknowledged_messages_move_to_the_new_connection(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect_persistent(version, "same", false);
    first.subscribe("t", 1);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "unacknowledged", 1);
    first.expect_publish("t", "unacknowledged");

    let mut second = broker.connect_persistent(version, "same", true);

    let again = second.accept_publish("t", "unacknowledged");
    assert!(again.dup());
}

fn mqtt_3_1_4_4_takeover_with_clean_start_begins_a_new_session(version: Version) {
    let broker = Broker::start();
    let mut first = broker.connect_persistent(version, "same", false);
    first.subscribe("old", 1);

    let mut second = broker.connect(version, "same");

    second.subscribe("new", 1);
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("old", "forgotten", 1);
    publisher.publish_acknowledged("new", "expected", 1);
    second.accept_publish("new", "expected");
}

fn client_ids_that_differ_in_case_are_different_clients(version: Version) {
    let broker = Broker::start();
    let mut lower = broker.connect(version, "client");

    let mut upper = broker.connect(version, "CLIENT");

    lower.ping();
    upper.ping();
}

fn many_takeovers_in_a_row_leave_the_last_one_connected(version: Version) {
    let broker = Broker::start();
    let mut earlier: Vec<_> = (0..20).map(|_| broker.connect(version, "same")).collect();
    let mut last = earlier.pop().expect("twenty of them");

    for client in &mut earlier {
        client.expect_disconnect(0x8E);
    }
    last.subscribe("t", 1);
    last.publish_acknowledged("t", "alive", 1);
    last.accept_publish("t", "alive");
}

/// The will of a session that has ended is published at its end, whatever its delay.
#[test]
fn mqtt_3_1_2_8_takeover_with_clean_start_publishes_a_delayed_will_at_once() {
    let broker = Broker::start();
    let mut observer = broker.connect(V5, "observer");
    observer.subscribe("will", 0);
    let will = Will::new("will", "gone").property(property::will_delay(300));
    let connect = Connect::new(V5, "same")
        .property(property::session_expiry(300))
        .will(will);
    let (_first, _) = broker.connect_with(&connect);

    let _second = broker.connect(V5, "same");

    observer.expect_publish("will", "gone");
}

#[test]
fn mqtt_3_1_3_9_takeover_of_the_session_before_the_delay_has_passed_discards_the_will() {
    let broker = Broker::start();
    let mut observer = broker.connect(V5, "observer");
    observer.subscribe("will", 0);
    let will = Will::new("will", "gone").property(property::will_delay(1));
    let (mut first, _) = broker.connect_with(&Connect::persistent(V5, "same").will(will));

    let mut second = broker.connect_persistent(V5, "same", true);
    first.expect_disconnect(0x8E);

    broker.wait_for_keep_alive_timeout();
    second.publish_acknowledged("will", "not the will", 0);
    observer.expect_publish("will", "not the will");
}
