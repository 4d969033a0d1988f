//! Section 3.14: DISCONNECT.

use crate::support::{Broker, Connect, V5, Version, both_versions, property, wire};

both_versions! {
    mqtt_3_14_4_2_the_connection_is_closed_after_disconnect,
    packets_after_disconnect_are_not_processed,
}

fn mqtt_3_14_4_2_the_connection_is_closed_after_disconnect(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send(&wire::disconnect());

    assert_eq!(client.next_packet(), None);
}

fn packets_after_disconnect_are_not_processed(version: Version) {
    let broker = Broker::start();
    let mut observer = broker.connect(version, "observer");
    observer.subscribe("t", 0);
    let mut client = broker.connect(version, "c");
    let mut bytes = wire::disconnect();
    bytes.extend(crate::support::Publish::new("t", "too late").bytes(version));

    client.send(&bytes);
    client.expect_closed();

    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "in time", 0);
    observer.expect_publish("t", "in time");
}

#[test]
fn disconnect_with_reason_and_properties_is_accepted() {
    let broker = Broker::start();
    for reason in [0x00, 0x04, 0x80, 0x83, 0x95] {
        let mut client = broker.connect(V5, "c");
        let properties = [
            property::reason_string("because"),
            property::user_property("a", "b"),
        ];

        client.send(&wire::disconnect_with(reason, &properties));

        assert_eq!(client.next_packet(), None, "reason {reason:#x}");
    }
}

#[test]
fn disconnect_may_change_the_session_expiry() {
    let broker = Broker::start();
    let (mut client, _) = broker.connect_with(&Connect::persistent(V5, "c"));

    client.send(&wire::disconnect_with(0, &[property::session_expiry(0)]));
    client.expect_closed();

    broker.connect_persistent(V5, "c", false);
}

#[test]
fn disconnect_may_prolong_the_session() {
    let broker = Broker::start();
    let connect = Connect::new(V5, "c").property(property::session_expiry(1));
    let (mut client, _) = broker.connect_with(&connect);

    client.send(&wire::disconnect_with(0, &[property::session_expiry(300)]));
    client.expect_closed();

    broker.wait_for_keep_alive_timeout();
    broker.connect_persistent(V5, "c", true);
}

#[test]
fn disconnect_that_sets_a_session_expiry_where_connect_had_none_is_a_protocol_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::disconnect_with(0, &[property::session_expiry(300)]));

    client.expect_disconnect(0x82);
    broker.connect_persistent(V5, "c", false);
}

#[test]
fn disconnect_with_a_session_expiry_again_of_0_is_no_error() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::disconnect_with(0, &[property::session_expiry(0)]));

    assert_eq!(client.next_packet(), None);
}

#[test]
fn mqtt_3_14_1_1_reserved_flags_of_disconnect_are_malformed() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send(&wire::frame(0xE1, &[]));

    client.expect_disconnect(0x81);
}
