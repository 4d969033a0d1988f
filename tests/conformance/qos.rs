//! Sections 3.4 to 3.7, 4.3 and 4.6: Quality of Service and the order of packets.

use crate::support::{Broker, Connect, Kind, Publish, V5, Version, both_versions, property, wire};

both_versions! {
    mqtt_4_3_1_1_qos0_is_delivered_without_identifier_or_acknowledgement,
    mqtt_4_3_2_4_qos1_publish_is_acknowledged_with_its_identifier,
    mqtt_4_3_2_5_identifier_is_free_again_after_puback,
    mqtt_4_3_3_8_qos2_publish_is_answered_by_pubrec,
    mqtt_4_3_3_10_repeated_qos2_publish_is_not_delivered_twice,
    mqtt_4_3_3_11_pubrel_is_answered_by_pubcomp,
    mqtt_4_3_3_12_identifier_after_pubcomp_is_a_new_message,
    qos2_publish_repeated_after_a_reconnect_is_not_delivered_twice,
    pubrel_repeated_after_a_reconnect_is_answered,
    mqtt_4_3_3_2_outgoing_qos2_exchange_runs_to_its_end,
    pubrec_that_is_repeated_is_answered_by_pubrel,
    pubrel_for_an_unknown_identifier_is_answered_by_pubcomp,
    acknowledgements_for_unknown_identifiers_do_no_harm,
    mqtt_4_6_0_2_pubacks_come_in_the_order_of_the_publishes,
    mqtt_4_6_0_3_pubrecs_come_in_the_order_of_the_publishes,
    mqtt_4_6_0_4_pubrels_come_in_the_order_of_the_pubrecs,
    mqtt_4_6_0_6_messages_of_one_topic_and_qos_are_delivered_in_order,
    mqtt_3_8_4_8_delivered_qos_is_the_lower_of_published_and_granted,
    mqtt_2_2_1_4_outgoing_identifiers_are_not_used_twice,
    identifiers_of_both_directions_are_independent,
    qos1_publish_repeated_with_dup_is_acknowledged_again,
}

fn mqtt_4_3_1_1_qos0_is_delivered_without_identifier_or_acknowledgement(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish(&Publish::new("t", "x"));

    publisher.expect_nothing();
    assert_eq!(subscriber.expect_publish("t", "x").qos(), 0);
}

fn mqtt_4_3_2_4_qos1_publish_is_acknowledged_with_its_identifier(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");

    for id in [1, 1000, 65535] {
        publisher.publish(&Publish::new("t", "x").qos(1, id));

        publisher.expect_puback(id, 0);
        assert_eq!(subscriber.accept_publish("t", "x").qos(), 1);
    }
}

fn mqtt_4_3_2_5_identifier_is_free_again_after_puback(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(version, "publisher");

    for payload in ["first", "second"] {
        publisher.publish(&Publish::new("t", payload).qos(1, 5));
        publisher.expect_puback(5, 0);

        subscriber.accept_publish("t", payload);
    }
}

fn qos1_publish_repeated_with_dup_is_acknowledged_again(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    publisher.subscribe("elsewhere", 0);

    for _ in 0..2 {
        publisher.publish(&Publish::new("t", "x").qos(1, 5).dup());

        let puback = publisher.expect(Kind::PubAck);
        assert_eq!(puback.id, 5);
    }
}

fn mqtt_4_3_3_8_qos2_publish_is_answered_by_pubrec(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish(&Publish::new("t", "x").qos(2, 77));

    publisher.expect_pubrec(77, 0);
    publisher.send_pubrel(77);
    publisher.expect_pubcomp(77, 0);
    assert_eq!(subscriber.accept_publish("t", "x").qos(), 2);
}

fn mqtt_4_3_3_10_repeated_qos2_publish_is_not_delivered_twice(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");

    publisher.publish(&Publish::new("t", "once").qos(2, 7));
    publisher.expect_pubrec(7, 0);
    publisher.publish(&Publish::new("t", "once").qos(2, 7).dup());
    publisher.expect(Kind::PubRec);
    publisher.send_pubrel(7);
    publisher.expect_pubcomp(7, 0);

    publisher.publish_acknowledged("t", "marker", 2);
    subscriber.accept_publish("t", "once");
    subscriber.accept_publish("t", "marker");
}

fn mqtt_4_3_3_11_pubrel_is_answered_by_pubcomp(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    for id in [3, 1, 2] {
        publisher.publish(&Publish::new("t", "x").qos(2, id));
        publisher.expect(Kind::PubRec);
    }

    for id in [1, 3, 2] {
        publisher.send_pubrel(id);

        publisher.expect_pubcomp(id, 0);
    }
}

fn mqtt_4_3_3_12_identifier_after_pubcomp_is_a_new_message(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");

    for payload in ["first", "second"] {
        publisher.publish(&Publish::new("t", payload).qos(2, 7));
        publisher.expect_pubrec(7, 0);
        publisher.send_pubrel(7);
        publisher.expect_pubcomp(7, 0);

        subscriber.accept_publish("t", payload);
    }
}

fn qos2_publish_repeated_after_a_reconnect_is_not_delivered_twice(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect_persistent(version, "publisher", false);
    publisher.publish(&Publish::new("t", "once").qos(2, 7));
    publisher.expect_pubrec(7, 0);
    publisher.drop_connection();

    let mut publisher = broker.connect_persistent(version, "publisher", true);
    publisher.publish(&Publish::new("t", "once").qos(2, 7).dup());
    publisher.expect(Kind::PubRec);
    publisher.send_pubrel(7);
    publisher.expect_pubcomp(7, 0);

    publisher.publish_acknowledged("t", "marker", 2);
    subscriber.accept_publish("t", "once");
    subscriber.accept_publish("t", "marker");
}

fn pubrel_repeated_after_a_reconnect_is_answered(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect_persistent(version, "publisher", false);
    publisher.publish(&Publish::new("t", "once").qos(2, 7));
    publisher.expect(Kind::PubRec);
    publisher.send_pubrel(7);
    publisher.expect_pubcomp(7, 0);
    publisher.drop_connection();

    let mut publisher = broker.connect_persistent(version, "publisher", true);
    publisher.send_pubrel(7);

    publisher.expect_pubcomp(7, 0x92);
}

fn mqtt_4_3_3_2_outgoing_qos2_exchange_runs_to_its_end(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "x", 2);
    let id = subscriber.expect_publish("t", "x").id;

    subscriber.expect_nothing();
    subscriber.send_pubrec(id);
    subscriber.expect_pubrel(id);
    subscriber.send_pubcomp(id);
    subscriber.expect_nothing();
}

fn pubrec_that_is_repeated_is_answered_by_pubrel(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("t", "x", 2);
    let id = subscriber.expect_publish("t", "x").id;

    for _ in 0..2 {
        subscriber.send_pubrec(id);
        subscriber.expect_pubrel(id);
    }

    subscriber.send_pubcomp(id);
    subscriber.expect_nothing();
}

fn pubrel_for_an_unknown_identifier_is_answered_by_pubcomp(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send_pubrel(99);

    client.expect_pubcomp(99, 0x92);
}

fn acknowledgements_for_unknown_identifiers_do_no_harm(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send_puback(99);
    client.send_pubcomp(99);

    client.ping();
}

#[test]
fn pubrec_for_an_unknown_identifier_is_answered_by_packet_identifier_not_found() {
    let broker = Broker::start();
    let mut client = broker.connect(V5, "c");

    client.send_pubrec(99);

    let pubrel = client.expect(Kind::PubRel);
    assert_eq!((pubrel.id, pubrel.reason()), (99, 0x92));
}

#[test]
fn mqtt_4_4_0_2_pubrec_with_an_error_ends_the_exchange() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V5, "subscriber", false);
    subscriber.subscribe("t", 2);
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t", "unwanted", 2);
    let id = subscriber.expect_publish("t", "unwanted").id;

    subscriber.send(&wire::acknowledgement_with_reason(Kind::PubRec, id, 0x83));

    subscriber.expect_nothing();
    subscriber.drop_connection();
    broker
        .connect_persistent(V5, "subscriber", true)
        .expect_nothing();
}

#[test]
fn mqtt_4_4_0_2_puback_with_an_error_ends_the_exchange() {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(V5, "subscriber", false);
    subscriber.subscribe("t", 1);
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t", "unwanted", 1);
    let id = subscriber.expect_publish("t", "unwanted").id;

    subscriber.send(&wire::acknowledgement_with_reason(Kind::PubAck, id, 0x97));

    subscriber.expect_nothing();
    subscriber.drop_connection();
    broker
        .connect_persistent(V5, "subscriber", true)
        .expect_nothing();
}

#[test]
fn acknowledgements_with_reason_and_properties_are_accepted() {
    let broker = Broker::start();
    let mut subscriber = broker.connect(V5, "subscriber");
    subscriber.subscribe("t", 1);
    broker
        .connect(V5, "publisher")
        .publish_acknowledged("t", "x", 1);
    let id = subscriber.expect_publish("t", "x").id;
    let properties = [
        property::reason_string("fine"),
        property::user_property("a", "b"),
    ];
    let body = [
        &id.to_be_bytes()[..],
        &[0],
        &wire::encode_properties(&properties),
    ]
    .concat();

    subscriber.send(&wire::frame(wire::first_byte(Kind::PubAck), &body));

    subscriber.expect_nothing();
}

#[test]
fn publish_with_an_identifier_in_use_by_qos2_is_answered_by_packet_identifier_in_use_or_as_a_repeat()
 {
    let broker = Broker::start();
    let mut publisher = broker.connect(V5, "publisher");
    publisher.publish(&Publish::new("t", "first").qos(2, 7));
    publisher.expect(Kind::PubRec);

    publisher.publish(&Publish::new("t", "second, without DUP").qos(2, 7));

    let pubrec = publisher.expect(Kind::PubRec);
    assert_eq!(pubrec.id, 7);
    assert!(matches!(pubrec.reason(), 0x00 | 0x10 | 0x91), "{pubrec:?}");
}

fn mqtt_4_6_0_2_pubacks_come_in_the_order_of_the_publishes(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect_persistent(version, "subscriber", false);
    subscriber.subscribe("durable", 1);
    let mut publisher = broker.connect(version, "publisher");
    let ids = [9, 4, 65535, 1, 300, 2];

    // Every other one has to be stored for a persistent session before its PUBACK.
    let topics = ["durable", "nobody"].into_iter().cycle();
    let bytes: Vec<u8> = ids
        .iter()
        .zip(topics)
        .flat_map(|(&id, topic)| Publish::new(topic, "x").qos(1, id).bytes(version))
        .collect();
    publisher.send(&bytes);

    let acknowledged = ids.map(|_| publisher.expect(Kind::PubAck).id);
    assert_eq!(acknowledged, ids);
}

fn mqtt_4_6_0_3_pubrecs_come_in_the_order_of_the_publishes(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    let ids = [9, 4, 65535, 1, 300, 2];

    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| Publish::new("t", "x").qos(2, id).bytes(version))
        .collect();
    publisher.send(&bytes);

    let acknowledged = ids.map(|_| publisher.expect(Kind::PubRec).id);
    assert_eq!(acknowledged, ids);
}

fn mqtt_4_6_0_4_pubrels_come_in_the_order_of_the_pubrecs(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");
    for number in 0..5 {
        publisher.publish_acknowledged("t", &number.to_string(), 2);
    }
    let mut ids =
        [0, 1, 2, 3, 4].map(|number| subscriber.expect_publish("t", &number.to_string()).id);
    ids.reverse();

    for id in ids {
        subscriber.send_pubrec(id);
    }

    let released = ids.map(|_| subscriber.expect(Kind::PubRel).id);
    assert_eq!(released, ids);
}

fn mqtt_4_6_0_6_messages_of_one_topic_and_qos_are_delivered_in_order(version: Version) {
    let broker = Broker::start();
    for qos in [0, 1, 2] {
        let mut subscriber = broker.connect(version, "subscriber");
        subscriber.subscribe("t", qos);
        let mut publisher = broker.connect(version, "publisher");

        for number in 0..100 {
            publisher.publish_acknowledged("t", &number.to_string(), qos);
        }

        for number in 0..100 {
            subscriber.accept_publish("t", &number.to_string());
        }
    }
}

fn mqtt_3_8_4_8_delivered_qos_is_the_lower_of_published_and_granted(version: Version) {
    let broker = Broker::start();
    let mut publisher = broker.connect(version, "publisher");
    for granted in [0, 1, 2] {
        let mut subscriber = broker.connect(version, "subscriber");
        subscriber.subscribe("t", granted);
        for published in [0, 1, 2] {
            publisher.publish_acknowledged("t", "x", published);

            let delivered = subscriber.accept_publish("t", "x").qos();
            assert_eq!(
                delivered,
                published.min(granted),
                "published {published}, granted {granted}"
            );
        }
    }
}

fn mqtt_2_2_1_4_outgoing_identifiers_are_not_used_twice(version: Version) {
    let broker = Broker::start();
    let mut subscriber = broker.connect(version, "subscriber");
    subscriber.subscribe("t", 2);
    let mut publisher = broker.connect(version, "publisher");
    let mut ids: Vec<u16> = (0..10)
        .map(|number| {
            publisher.publish_acknowledged("t", "x", 1 + number % 2);
            subscriber.expect_publish("t", "x").id
        })
        .collect();

    ids.sort_unstable();
    ids.dedup();

    assert_eq!(ids.len(), 10);
}

fn identifiers_of_both_directions_are_independent(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    client.subscribe("in", 2);
    broker
        .connect(version, "publisher")
        .publish_acknowledged("in", "inbound", 2);
    let id = client.expect_publish("in", "inbound").id;

    // The same identifier in the other direction, while the first exchange is under way.
    client.publish(&Publish::new("out", "x").qos(2, id));
    client.expect(Kind::PubRec);
    client.send_pubrec(id);
    client.expect_pubrel(id);
    client.send_pubrel(id);
    client.expect_pubcomp(id, 0);
    client.send_pubcomp(id);

    client.expect_nothing();
}

#[test]
fn mqtt_2_2_1_4_identifier_never_becomes_zero() {
    let broker = Broker::start();
    let (mut subscriber, _) = broker.connect_with(&Connect::new(V5, "subscriber"));
    subscriber.subscribe("t", 1);
    let mut publisher = broker.connect(V5, "publisher");
    let batch: Vec<u8> = (1..=20)
        .flat_map(|id| Publish::new("t", "").qos(1, id).bytes(V5))
        .collect();

    // The support module refuses an identifier of zero; 65,536 messages wrap it round.
    for _ in 0..3500 {
        publisher.send(&batch);
        for _ in 0..20 {
            publisher.expect(Kind::PubAck);
            let id = subscriber.expect(Kind::Publish).id;
            subscriber.send_puback(id);
        }
    }
}
