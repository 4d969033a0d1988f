//! Section 4.8.2: shared subscriptions.

use crate::support::client::HUNG_AFTER;
use crate::support::{
    Broker, Client, Kind, Publish, V3_1_1, V5, Version, both_versions, property, wire,
};

both_versions! {
    mqtt_4_8_2_each_message_goes_to_one_member,
    every_member_of_a_group_gets_a_share,
    groups_are_independent_of_each_other_and_of_ordinary_subscriptions,
    shared_subscriptions_get_no_retained_messages,
    mqtt_4_8_2_3_messages_are_delivered_with_the_granted_qos_of_the_member,
    mqtt_4_8_2_1_invalid_share_names_are_refused,
    shared_subscription_may_have_wildcards,
    unsubscribing_leaves_the_group,
    messages_go_to_members_that_are_connected,
    unacknowledged_messages_of_a_member_that_is_gone_go_to_another,
    messages_wait_for_a_group_whose_members_are_all_offline,
    a_share_filter_without_the_prefix_is_an_ordinary_topic,
}

#[track_caller]
fn member(broker: &Broker, version: Version, client_id: &str, filter: &str, qos: u8) -> Client {
    let mut member = broker.connect(version, client_id);
    member.subscribe(filter, qos);
    member
}

/// What each client has received once all of them together have received `count` messages.
#[track_caller]
fn received<const N: usize>(mut clients: [&mut Client; N], count: usize) -> [Vec<String>; N] {
    let mut payloads = [const { Vec::new() }; N];
    let deadline = tokio::time::Instant::now() + HUNG_AFTER;
    loop {
        for (client, payloads) in clients.iter_mut().zip(&mut payloads) {
            client.send(&wire::pingreq());
            loop {
                let packet = client.next_packet().expect("the connection was closed");
                match packet.kind {
                    Kind::PingResp => break,
                    _ => {
                        payloads.push(packet.text());
                        if packet.qos() == 1 {
                            client.send_puback(packet.id);
                        }
                    }
                }
            }
        }
        let total: usize = payloads.iter().map(Vec::len).sum();
        if total >= count {
            return payloads;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{total} of {count} messages came"
        );
    }
}

#[track_caller]
fn publish_ten(broker: &Broker, version: Version, topic: &str, qos: u8) {
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..10 {
        publisher.publish_acknowledged(topic, &number.to_string(), qos);
    }
}

fn numbers() -> Vec<String> {
    (0..10).map(|number| number.to_string()).collect()
}

fn mqtt_4_8_2_each_message_goes_to_one_member(version: Version) {
    let broker = Broker::start();
    let mut members = ["1", "2", "3"].map(|id| member(&broker, version, id, "$share/group/t", 1));

    publish_ten(&broker, version, "t", 1);

    let mut all = received(members.each_mut(), 10).concat();
    all.sort();
    assert_eq!(all, numbers());
}

fn every_member_of_a_group_gets_a_share(version: Version) {
    let broker = Broker::start();
    let mut members = ["1", "2"].map(|id| member(&broker, version, id, "$share/group/t", 1));

    for _ in 0..5 {
        publish_ten(&broker, version, "t", 1);
    }

    for payloads in received(members.each_mut(), 50) {
        assert!(!payloads.is_empty());
    }
}

#[test]
fn a_group_may_have_members_of_both_versions() {
    let broker = Broker::start();
    let mut old = member(&broker, V3_1_1, "old", "$share/group/t", 1);
    let mut new = member(&broker, V5, "new", "$share/group/t", 1);

    publish_ten(&broker, V5, "t", 1);

    let mut all = received([&mut old, &mut new], 10).concat();
    all.sort();
    assert_eq!(all, numbers());
}

fn groups_are_independent_of_each_other_and_of_ordinary_subscriptions(version: Version) {
    let broker = Broker::start();
    let mut first = member(&broker, version, "first", "$share/first/t", 1);
    let mut second = member(&broker, version, "second", "$share/second/t", 1);
    let mut ordinary = member(&broker, version, "ordinary", "t", 1);

    publish_ten(&broker, version, "t", 1);

    for client in [&mut first, &mut second, &mut ordinary] {
        assert_eq!(received([client], 10), [numbers()]);
    }
}

fn shared_subscriptions_get_no_retained_messages(version: Version) {
    let broker = Broker::start();
    broker
        .connect(version, "publisher")
        .publish_retained("t", "kept", 1);

    let mut member = member(&broker, version, "member", "$share/group/t", 1);

    member.expect_nothing();
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "live", 1);
    member.accept_publish("t", "live");
}

fn mqtt_4_8_2_3_messages_are_delivered_with_the_granted_qos_of_the_member(version: Version) {
    let broker = Broker::start();
    for qos in [0, 1, 2] {
        let mut member = member(&broker, version, "member", "$share/group/t", qos);

        broker
            .connect(version, "publisher")
            .publish_acknowledged("t", "x", 2);

        assert_eq!(member.accept_publish("t", "x").qos(), qos);
    }
}

fn mqtt_4_8_2_1_invalid_share_names_are_refused(version: Version) {
    let broker = Broker::start();
    for filter in [
        "$share//t",
        "$share/+/t",
        "$share/#/t",
        "$share/a+b/t",
        "$share/group",
        "$share/group/",
        "$share/",
    ] {
        let mut client = broker.connect(version, "c");
        client.send(&wire::subscribe(version, 1, &[(filter, 0)], &[]));

        match client.next_packet() {
            None => {}
            Some(packet) if packet.kind == Kind::SubAck => {
                let refused = if version.is_v5() { 0x8F } else { 0x80 };
                assert_eq!(packet.reason(), refused, "for {filter}");
            }
            Some(packet) if packet.kind == Kind::Disconnect => {
                assert!(
                    matches!(packet.reason(), 0x81 | 0x82 | 0x8F),
                    "for {filter}: {packet:?}"
                );
            }
            Some(packet) => panic!("for {filter}: {packet:?}"),
        }
    }
}

fn shared_subscription_may_have_wildcards(version: Version) {
    let broker = Broker::start();
    let mut member = member(&broker, version, "member", "$share/group/a/+/c/#", 1);

    broker
        .connect(version, "publisher")
        .publish_acknowledged("a/b/c/d", "x", 1);

    member.accept_publish("a/b/c/d", "x");
}

fn unsubscribing_leaves_the_group(version: Version) {
    let broker = Broker::start();
    let mut leaving = member(&broker, version, "leaving", "$share/group/t", 1);
    let mut staying = member(&broker, version, "staying", "$share/group/t", 1);

    let reasons = leaving.unsubscribe(&["$share/group/t"]);

    if version.is_v5() {
        assert_eq!(reasons, [0]);
    }
    publish_ten(&broker, version, "t", 1);
    assert_eq!(received([&mut staying], 10), [numbers()]);
}

fn messages_go_to_members_that_are_connected(version: Version) {
    let broker = Broker::start();
    let mut offline = broker.connect_persistent(version, "offline", false);
    offline.subscribe("$share/group/t", 1);
    let mut online = member(&broker, version, "online", "$share/group/t", 1);
    offline.disconnect();

    publish_ten(&broker, version, "t", 1);

    assert_eq!(received([&mut online], 10), [numbers()]);
}

/// What a member whose session has ended did not acknowledge belongs to the group again.
fn unacknowledged_messages_of_a_member_that_is_gone_go_to_another(version: Version) {
    let broker = Broker::start();
    let mut leaving = member(&broker, version, "leaving", "$share/group/t", 1);
    publish_ten(&broker, version, "t", 1);
    for number in 0..10 {
        leaving.expect_publish("t", &number.to_string());
    }
    let mut staying = member(&broker, version, "staying", "$share/group/t", 1);

    leaving.drop_connection();

    let mut all: Vec<String> = (0..10)
        .map(|_| {
            let message = staying.expect(Kind::Publish);
            staying.send_puback(message.id);
            message.text()
        })
        .collect();
    all.sort();
    assert_eq!(all, numbers());
}

fn messages_wait_for_a_group_whose_members_are_all_offline(version: Version) {
    let broker = Broker::start();
    let mut only = broker.connect_persistent(version, "only", false);
    only.subscribe("$share/group/t", 1);
    only.disconnect();

    publish_ten(&broker, version, "t", 1);

    let mut only = broker.connect_persistent(version, "only", true);
    for number in 0..10 {
        only.accept_publish("t", &number.to_string());
    }
}

fn a_share_filter_without_the_prefix_is_an_ordinary_topic(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("share/group/t", 0);

    client.publish_acknowledged("t", "not this", 0);
    client.publish_acknowledged("share/group/t", "this", 0);

    client.expect_publish("share/group/t", "this");
}

#[test]
fn mqtt_4_8_2_4_qos2_exchange_is_completed_with_the_member_that_it_was_begun_with() {
    let broker = Broker::start();
    let mut chosen = broker.connect_persistent(V5, "chosen", false);
    chosen.subscribe("$share/group/t", 2);
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t", "once", 2);
    let id = chosen.expect_publish("t", "once").id;
    let mut other = member(&broker, V5, "other", "$share/group/t", 2);
    chosen.send_pubrec(id);
    chosen.expect_pubrel(id);
    chosen.drop_connection();

    let mut chosen = broker.connect_persistent(V5, "chosen", true);

    chosen.expect_pubrel(id);
    chosen.send_pubcomp(id);
    chosen.expect_nothing();
    other.expect_nothing();
}

#[test]
fn mqtt_4_8_2_6_message_refused_by_a_member_is_not_offered_to_another() {
    let broker = Broker::start();
    let mut first = member(&broker, V5, "first", "$share/group/t", 1);
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t", "refused", 1);
    let id = first.expect_publish("t", "refused").id;
    let mut second = member(&broker, V5, "second", "$share/group/t", 1);

    first.send(&wire::acknowledgement_with_reason(Kind::PubAck, id, 0x80));
    first.ping();

    second.expect_nothing();
    first.expect_nothing();
}

#[test]
fn shared_subscription_has_its_identifier() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    let granted = client.subscribe_all(
        &[("$share/group/t", 0)],
        &[property::subscription_identifier(9)],
    );
    assert_eq!(granted, [0]);

    broker
        .connect(V5, "publisher")
        .complete(Publish::new("t", "x"), 0);

    assert_eq!(
        client.expect_publish("t", "x").subscription_identifiers(),
        [9]
    );
}

/// A client with an ordinary and a shared subscription gets what is due to each of them.
#[test]
fn ordinary_and_shared_subscription_of_one_client_both_count() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");
    client.subscribe_all(&[("t", 0)], &[property::subscription_identifier(1)]);
    client.subscribe_all(
        &[("$share/group/t", 0)],
        &[property::subscription_identifier(2)],
    );
    let mut publisher = broker.connect(V5, "publisher");

    publisher.publish_acknowledged("t", "x", 0);

    let mut identifiers = client.expect(Kind::Publish).subscription_identifiers();
    identifiers.extend(client.expect(Kind::Publish).subscription_identifiers());
    identifiers.sort_unstable();
    assert_eq!(identifiers, [1, 2]);
}
