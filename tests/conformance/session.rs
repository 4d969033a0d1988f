//! Sections 3.1.2.4, 3.1.2.11.2 and 4.1: session state, and what survives what.

use crate::support::{
    Broker, Connect, Kind, Publish, V3_1_1, V5, Version, both_versions, property, wire,
};

both_versions! {
    mqtt_3_1_2_4_clean_start_discards_the_session,
    mqtt_3_1_2_5_subscriptions_are_resumed,
    mqtt_3_1_2_23_session_is_kept_when_the_connection_is_lost,
    mqtt_4_1_0_1_session_is_kept_while_the_connection_is_open,
    mqtt_4_5_0_1_messages_are_queued_for_an_offline_session_in_order,
    mqtt_4_4_0_1_unacknowledged_publishes_are_resent_in_order_with_dup_and_their_ids,
    mqtt_4_4_0_1_pubrel_is_resent_with_its_id,
    mqtt_4_4_0_1_qos2_publish_without_pubrec_is_resent,
    acknowledged_messages_are_not_sent_again,
    messages_that_were_queued_come_before_live_ones,
    offline_messages_have_the_granted_qos,
    mqtt_3_10_4_3_unsubscribing_does_not_take_back_what_is_in_flight,
    clean_session_ends_with_its_connection,
    clean_start_discards_queued_messages,
    session_survives_a_restart,
    session_survives_a_crash,
    offline_messages_survive_a_restart_in_order,
    offline_messages_survive_a_crash_in_order,
    unsubscription_survives_a_crash,
    discarded_session_stays_discarded_after_a_crash,
    qos2_identifier_awaiting_pubrel_survives_a_crash,
    qos2_message_awaiting_pubcomp_survives_a_crash,
    unacknowledged_message_survives_a_crash,
    acknowledged_message_is_not_sent_again_after_a_restart,
    mqtt_3_1_2_6_session_is_created_where_there_is_none,
}

fn mqtt_3_1_2_4_clean_start_discards_the_session(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("old", 1);
    client.disconnect();

    let mut client = broker.connect(version, "c");

    client.subscribe("new", 1);
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("old", "forgotten", 1);
    publisher.publish_acknowledged("new", "expected", 1);
    client.accept_publish("new", "expected");
}

fn mqtt_3_1_2_5_subscriptions_are_resumed(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t/+", 1);
    client.disconnect();

    let mut client = broker.connect_persistent(version, "c", true);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t/1", "live", 1);
    client.accept_publish("t/1", "live");
}

fn mqtt_3_1_2_6_session_is_created_where_there_is_none(version: Version) {
    let broker = Broker::start();

    let mut client = broker.connect_persistent(version, "new", false);

    client.subscribe("t", 0);
    client.publish_acknowledged("t", "works", 0);
    client.expect_publish("t", "works");
}

fn mqtt_3_1_2_23_session_is_kept_when_the_connection_is_lost(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.drop_connection();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "kept", 1);

    let mut client = broker.connect_persistent(version, "c", true);

    client.accept_publish("t", "kept");
}

fn mqtt_4_1_0_1_session_is_kept_while_the_connection_is_open(version: Version) {
    let broker = Broker::start();
    let connect = Connect::new(version, "c");
    let connect = if version.is_v5() {
        connect.property(property::session_expiry(1))
    } else {
        connect
    };
    let (mut client, _) = broker.connect_with(&connect);
    client.subscribe("t", 0);

    broker.wait_for_keep_alive_timeout();

    client.publish_acknowledged("t", "still here", 0);
    client.expect_publish("t", "still here");
}

#[test]
fn mqtt_4_1_0_2_session_is_discarded_when_it_has_expired() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c").property(property::session_expiry(1));
    let (mut client, _) = broker.connect_with(&connect);
    client.subscribe("t", 1);
    client.disconnect();

    broker.wait_for_keep_alive_timeout();

    broker.connect_persistent(V5, "c", false);
}

#[test]
fn session_expiry_of_the_last_connection_counts() {
    let broker = Broker::start();
    let (client, _) = broker.connect_with(&Connect::persistent(V5, "c"));
    client.disconnect();

    // Without the property it is 0: the session ends with this connection.
    let (client, connack) = broker.connect_with(&Connect::new(V5, "c").clean_start(false));
    assert!(connack.session_present);
    client.disconnect();

    broker.connect_persistent(V5, "c", false);
}

#[test]
fn session_expiry_0xffffffff_is_accepted() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c").property(property::session_expiry(u32::MAX));
    broker.connect_with(&connect).0.disconnect();

    broker.connect_persistent(V5, "c", true);
}

#[test]
fn session_expiry_is_limited_by_the_server_and_told() {
    let broker = Broker::start_with(&[("session.expiry_max", "1s")]);

    let (client, connack) = broker.connect_with(&Connect::persistent(V5, "c"));

    assert_eq!(connack.number(property::SESSION_EXPIRY_INTERVAL), Some(1));
    client.disconnect();
    broker.wait_for_keep_alive_timeout();
    broker.connect_persistent(V5, "c", false);
}

#[test]
fn session_moves_between_protocol_versions() {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(V5, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.complete(
        Publish::new("t", "with properties").property(property::content_type("text/plain")),
        1,
    );

    let mut client = broker.connect_persistent(V3_1_1, "c", true);

    client.accept_publish("t", "with properties");
}

fn mqtt_4_5_0_1_messages_are_queued_for_an_offline_session_in_order(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    client.disconnect();
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..100 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }

    let mut client = broker.connect_persistent(version, "c", true);

    for number in 0..100 {
        let message = client.accept_publish("t", &number.to_string());
        assert!(!message.dup(), "the first delivery of {message:?}");
    }
}

fn mqtt_4_4_0_1_unacknowledged_publishes_are_resent_in_order_with_dup_and_their_ids(
    version: Version,
) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");
    let mut ids = Vec::new();
    for number in 0..5 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
        ids.push(client.expect_publish("t", &number.to_string()).id);
    }
    client.drop_connection();

    let mut client = broker.connect_persistent(version, "c", true);

    for (number, id) in ids.into_iter().enumerate() {
        let again = client.accept_publish("t", &number.to_string());
        assert_eq!((again.id, again.dup()), (id, true), "{again:?}");
    }
}

fn mqtt_4_4_0_1_pubrel_is_resent_with_its_id(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "once", 2);
    let id = client.expect_publish("t", "once").id;
    client.send_pubrec(id);
    client.expect_pubrel(id);
    client.drop_connection();

    let mut client = broker.connect_persistent(version, "c", true);

    client.expect_pubrel(id);
    client.send_pubcomp(id);
    client.expect_nothing();
}

fn mqtt_4_4_0_1_qos2_publish_without_pubrec_is_resent(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "once", 2);
    let first = client.expect_publish("t", "once");
    client.drop_connection();

    let mut client = broker.connect_persistent(version, "c", true);

    let again = client.accept_publish("t", "once");
    assert_eq!((again.id, again.dup(), again.qos()), (first.id, true, 2));
}

fn acknowledged_messages_are_not_sent_again(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");
    for qos in [1, 2] {
        publisher.publish_acknowledged("t", "done", qos);
        client.accept_publish("t", "done");
    }
    client.disconnect();

    let mut client = broker.connect_persistent(version, "c", true);

    publisher.publish_acknowledged("t", "next", 1);
    client.accept_publish("t", "next");
}

fn messages_that_were_queued_come_before_live_ones(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..50 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }

    let mut client = broker.connect_persistent(version, "c", true);
    for number in 50..100 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }

    for number in 0..100 {
        client.accept_publish("t", &number.to_string());
    }
}

fn offline_messages_have_the_granted_qos(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("t", "1", 1);
    publisher.publish_acknowledged("t", "2", 2);

    let mut client = broker.connect_persistent(version, "c", true);

    assert_eq!(client.accept_publish("t", "1").qos(), 1);
    assert_eq!(client.accept_publish("t", "2").qos(), 1);
}

/// The session had the right to them when they were published.
fn mqtt_3_10_4_3_unsubscribing_does_not_take_back_what_is_in_flight(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("t", "in flight", 1);
    let message = client.expect_publish("t", "in flight");

    client.unsubscribe(&["t"]);
    client.drop_connection();

    let mut client = broker.connect_persistent(version, "c", true);
    assert_eq!(client.accept_publish("t", "in flight").id, message.id);
}

fn clean_session_ends_with_its_connection(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("t", 1);
    client.drop_connection();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "too late", 1);

    let mut client = broker.connect_persistent(version, "c", false);

    client.expect_nothing();
}

fn clean_start_discards_queued_messages(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "queued", 1);
    broker.connect(version, "c").disconnect();

    let mut client = broker.connect_persistent(version, "c", false);

    client.subscribe("t", 1);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "new", 1);
    client.accept_publish("t", "new");
}

fn session_survives_a_restart(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t/#", 1);
    client.disconnect();

    broker.restart();

    let mut client = broker.connect_persistent(version, "c", true);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t/1", "after", 1);
    client.accept_publish("t/1", "after");
}

fn session_survives_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t/#", 1);

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(version, "c", true);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t/1", "after", 1);
    client.accept_publish("t/1", "after");
}

fn offline_messages_survive_a_restart_in_order(version: Version) {
    let mut broker = Broker::start();
    queue_twenty(&broker, version);

    broker.restart();

    expect_twenty(&broker, version);
}

fn offline_messages_survive_a_crash_in_order(version: Version) {
    let mut broker = Broker::start();
    queue_twenty(&broker, version);

    broker.crash_and_restart();

    expect_twenty(&broker, version);
}

#[track_caller]
fn queue_twenty(broker: &Broker, version: Version) {
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    client.disconnect();
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..20 {
        publisher.publish_acknowledged("t", &number.to_string(), 1);
    }
}

#[track_caller]
fn expect_twenty(broker: &Broker, version: Version) {
    let mut client = broker.connect_persistent(version, "c", true);
    for number in 0..20 {
        client.accept_publish("t", &number.to_string());
    }
    client.expect_nothing();
}

fn unsubscription_survives_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("a", 1);
    client.subscribe("b", 1);
    client.unsubscribe(&["a"]);

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(version, "c", true);
    let mut publisher = broker.connect(version, "publisher");
    publisher.publish_acknowledged("a", "not subscribed", 1);
    publisher.publish_acknowledged("b", "subscribed", 1);
    client.accept_publish("b", "subscribed");
}

fn discarded_session_stays_discarded_after_a_crash(version: Version) {
    let mut broker = Broker::start();
    broker.connect_persistent(version, "c", false).disconnect();
    broker.connect(version, "c").disconnect();

    broker.crash_and_restart();

    broker.connect_persistent(version, "c", false);
}

fn qos2_identifier_awaiting_pubrel_survives_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut observer = broker.connect_persistent(version, "observer", false);
    observer.subscribe("t", 2);
    observer.disconnect();
    let mut publisher = broker.connect_persistent(version, "publisher", false);
    publisher.publish(&Publish::new("t", "once").qos(2, 7));
    publisher.expect_pubrec(7, 0);

    broker.crash_and_restart();

    let mut publisher = broker.connect_persistent(version, "publisher", true);
    publisher.publish(&Publish::new("t", "once").qos(2, 7).dup());
    publisher.expect_pubrec(7, 0);
    publisher.send_pubrel(7);
    publisher.expect_pubcomp(7, 0);
    let mut observer = broker.connect_persistent(version, "observer", true);
    observer.accept_publish("t", "once");
    observer.expect_nothing();
}

fn qos2_message_awaiting_pubcomp_survives_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "once", 2);
    let id = client.expect_publish("t", "once").id;
    client.send_pubrec(id);
    client.expect_pubrel(id);

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(version, "c", true);
    client.expect_pubrel(id);
    client.send_pubcomp(id);
    client.expect_nothing();
}

fn unacknowledged_message_survives_a_crash(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 1);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "unacknowledged", 1);
    client.expect_publish("t", "unacknowledged");

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(version, "c", true);
    client.accept_publish("t", "unacknowledged");
}

fn acknowledged_message_is_not_sent_again_after_a_restart(version: Version) {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(version, "c", false);
    client.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");
    for qos in [1, 2] {
        publisher.publish_acknowledged("t", "done", qos);
        client.accept_publish("t", "done");
    }
    client.disconnect();

    broker.restart();

    let mut client = broker.connect_persistent(version, "c", true);
    client.expect_nothing();
}

#[test]
fn clients_are_told_that_the_broker_shuts_down() {
    let mut broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    broker.restart();

    client.expect_disconnect(0x8B);
}

#[test]
fn subscription_options_and_identifiers_survive_a_crash() {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(V5, "c", false);
    // No Local and Retain As Published.
    let granted = client.subscribe_all(
        &[("t", 0b0000_1101)],
        &[property::subscription_identifier(42)],
    );
    assert_eq!(granted, [1]);

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(V5, "c", true);
    client.publish_acknowledged("t", "own", 1);
    broker
        .connect(V5, "publisher")
        .publish_retained("t", "other", 1);
    let message = client.accept_publish("t", "other");
    assert_eq!(message.subscription_identifiers(), [42]);
    assert!(message.retain());
}

#[test]
fn properties_of_offline_messages_survive_a_crash() {
    let mut broker = Broker::start();
    let mut client = broker.connect_persistent(V5, "c", false);
    client.subscribe("t", 1);
    client.disconnect();
    let properties = [
        property::content_type("text/plain"),
        property::correlation_data(&[0, 255]),
        property::user_property("name", "value"),
    ];
    let publish = properties
        .iter()
        .cloned()
        .fold(Publish::new("t", "kept"), Publish::property);
    broker.connect(V5, "publisher").complete(publish, 1);

    broker.crash_and_restart();

    let mut client = broker.connect_persistent(V5, "c", true);
    let message = client.accept_publish("t", "kept");
    for expected in &properties {
        assert!(
            message.properties.contains(expected),
            "{expected:?} in {message:?}"
        );
    }
}

/// Everything is answered in the order it was sent, also in one segment with the DISCONNECT.
#[test]
fn messages_before_a_disconnect_in_the_same_segment_are_published() {
    for version in [V3_1_1, V5] {
        let broker = Broker::start();
        let mut observer = broker.connect(version, "observer");
        observer.subscribe("t", 1);
        let mut client = broker.connect(version, "c");
        let mut bytes = Publish::new("t", "0").bytes(version);
        bytes.extend(Publish::new("t", "1").qos(1, 1).bytes(version));
        bytes.extend(wire::disconnect());

        client.send(&bytes);

        observer.expect_publish("t", "0");
        observer.accept_publish("t", "1");
        while let Some(packet) = client.next_packet() {
            assert_eq!(packet.kind, Kind::PubAck);
        }
    }
}
