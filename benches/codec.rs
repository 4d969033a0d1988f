//! The packets that come by the million, in and out: `cargo bench --bench codec`.

use std::hint::black_box;
use std::num::NonZeroU16;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use midge::mqtt::decode::{decode, frame_length};
use midge::mqtt::encode::{PublishHeader, TopicAlias, encode, encode_publish_head};
use midge::mqtt::message::MessageParts;
use midge::mqtt::packet::{Acknowledgement, Publish};
use midge::mqtt::property::{Properties, PropertiesBuffer, Property};
use midge::mqtt::{Message, Packet, PacketId, ProtocolVersion, QoS};

const TOPIC: &str = "factory/line-4/press-17/temperature";
const PAYLOAD: &[u8] = &[0x2A; 64];

const VERSIONS: [(&str, ProtocolVersion); 2] = [
    ("3.1.1", ProtocolVersion::V3_1_1),
    ("5.0", ProtocolVersion::V5),
];

fn packet_id() -> PacketId {
    PacketId::new(4711).expect("not zero")
}

fn publish(qos: QoS, properties: Properties<'_>) -> Packet<'_> {
    Packet::Publish(Publish {
        dup: false,
        qos,
        retain: false,
        topic: TOPIC,
        packet_id: (qos != QoS::AtMostOnce).then(packet_id),
        properties,
        payload: PAYLOAD,
    })
}

fn user_property() -> PropertiesBuffer {
    [Property::UserProperty("trace", "7d2f0a")]
        .into_iter()
        .collect()
}

fn decoding(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decode");
    let user_property = user_property();
    let none = Properties::default();
    let packets = [
        ("publish qos 0", publish(QoS::AtMostOnce, none)),
        ("publish qos 1", publish(QoS::AtLeastOnce, none)),
        (
            "publish qos 1, user property",
            publish(QoS::AtLeastOnce, user_property.as_properties()),
        ),
        (
            "puback",
            Packet::PubAck(Acknowledgement::success(packet_id())),
        ),
    ];
    for (version_name, version) in VERSIONS {
        for (name, packet) in &packets {
            let mut frame = Vec::new();
            encode(packet, version, &mut frame);
            group.throughput(Throughput::Bytes(frame.len() as u64));
            group.bench_function(format!("{name}/{version_name}"), |bencher| {
                bencher.iter(|| {
                    let frame = black_box(&*frame);
                    black_box(frame_length(frame).expect("a valid length"));
                    black_box(decode(frame, version).expect("a valid packet"));
                });
            });
        }
    }
}

fn delivering(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("deliver");
    let user_property = user_property();
    let properties: Vec<&[u8]> = user_property.as_properties().forwarded().collect();
    let message = Message::new(MessageParts {
        topic: TOPIC,
        qos: QoS::AtLeastOnce,
        properties: &properties,
        payload: PAYLOAD,
        ..MessageParts::default()
    });
    let at_most_once = PublishHeader::default();
    let at_least_once = PublishHeader {
        qos: QoS::AtLeastOnce,
        packet_id: Some(packet_id()),
        ..PublishHeader::default()
    };
    let everything = PublishHeader {
        topic_alias: Some(TopicAlias::Use(NonZeroU16::MIN)),
        message_expiry_interval: Some(60),
        subscription_identifiers: &[7, 300],
        ..at_least_once
    };
    for (version_name, version) in VERSIONS {
        for (name, header) in [
            ("qos 0", at_most_once),
            ("qos 1", at_least_once),
            ("qos 1, alias, expiry, identifiers", everything),
        ] {
            let mut out = Vec::new();
            group.bench_function(format!("{name}/{version_name}"), |bencher| {
                bencher.iter(|| {
                    out.clear();
                    encode_publish_head(black_box(&message), black_box(&header), version, &mut out);
                    out.extend_from_slice(message.payload());
                    black_box(&out);
                });
            });
        }
    }
}

criterion_group!(benches, decoding, delivering);
criterion_main!(benches);
