//! Section 3.1.2.10: Keep Alive.

use tokio::time::{Duration, Instant};

use crate::support::{Broker, Connect, V3_1_1, V5, Version, both_versions, property};

both_versions! {
    mqtt_3_1_2_22_silent_client_is_closed_after_one_and_a_half_keep_alive,
    mqtt_3_1_2_22_packets_keep_the_connection_open,
    keep_alive_0_turns_the_mechanism_off,
}

fn mqtt_3_1_2_22_silent_client_is_closed_after_one_and_a_half_keep_alive(version: Version) {
    let broker = Broker::start();
    let before = Instant::now();
    let (mut client, _) = broker.connect_with(&Connect::new(version, "silent").keep_alive(1));

    client.expect_disconnect(0x8D);

    assert!(
        before.elapsed() >= Duration::from_millis(1500),
        "closed after {:?}",
        before.elapsed()
    );
}

fn mqtt_3_1_2_22_packets_keep_the_connection_open(version: Version) {
    let broker = Broker::start();
    let (mut client, _) = broker.connect_with(&Connect::new(version, "awake").keep_alive(3));

    // One wait is much shorter than the four and a half seconds that are allowed, all are longer.
    for _ in 0..4 {
        broker.wait_for_keep_alive_timeout();
        client.ping();
    }
}

fn keep_alive_0_turns_the_mechanism_off(version: Version) {
    let broker = Broker::start();
    let (mut client, _) = broker.connect_with(&Connect::new(version, "forever").keep_alive(0));

    broker.wait_for_keep_alive_timeout();

    client.ping();
}

#[test]
fn mqtt_3_1_2_21_server_keep_alive_is_told_and_used() {
    let broker = Broker::start_with(&[("limits.keep_alive_max", "1s")]);

    let (mut client, connack) = broker.connect_with(&Connect::new(V5, "long").keep_alive(600));

    assert_eq!(connack.number(property::SERVER_KEEP_ALIVE), Some(1));
    client.expect_disconnect(0x8D);
}

#[test]
fn mqtt_3_1_2_21_server_keep_alive_replaces_keep_alive_0() {
    let broker = Broker::start_with(&[("limits.keep_alive_max", "1s")]);

    let (mut client, connack) = broker.connect_with(&Connect::new(V5, "forever").keep_alive(0));

    assert_eq!(connack.number(property::SERVER_KEEP_ALIVE), Some(1));
    client.expect_disconnect(0x8D);
}

#[test]
fn mqtt_3_2_2_22_keep_alive_of_the_client_is_used_without_server_keep_alive() {
    let broker = Broker::start_with(&[("limits.keep_alive_max", "600s")]);

    let (mut client, connack) = broker.connect_with(&Connect::new(V5, "short").keep_alive(1));

    assert_eq!(connack.number(property::SERVER_KEEP_ALIVE), None);
    client.expect_disconnect(0x8D);
}

/// A version 3 client cannot be told of another Keep Alive; a server may close the connection of
/// an inactive client at any time.
#[test]
fn version_3_clients_are_held_to_keep_alive_max() {
    let broker = Broker::start_with(&[("limits.keep_alive_max", "1s")]);

    let (mut client, _) = broker.connect_with(&Connect::new(V3_1_1, "long").keep_alive(600));

    client.expect_closed();
}
