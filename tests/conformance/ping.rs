//! Sections 3.12 and 3.13: PINGREQ and PINGRESP.

use crate::support::{Broker, Kind, Version, both_versions, wire};

both_versions! {
    mqtt_3_12_4_1_every_pingreq_is_answered,
    a_packet_that_is_split_anywhere_is_read_whole,
}

fn mqtt_3_12_4_1_every_pingreq_is_answered(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");

    client.send(&wire::pingreq().repeat(3));

    for _ in 0..3 {
        let pingresp = client.expect(Kind::PingResp);
        assert_eq!(pingresp.size, 2);
    }
}

fn a_packet_that_is_split_anywhere_is_read_whole(version: Version) {
    let broker = Broker::start();
    let mut client = broker.connect(version, "c");
    let subscribe = wire::subscribe(version, 7, &[("some/topic/+", 1), ("other/#", 2)], &[]);

    for at in 1..subscribe.len() {
        client.send(&subscribe[..at]);
        client.send(&subscribe[at..]);

        let suback = client.expect(Kind::SubAck);
        assert_eq!(
            (suback.id, suback.reasons),
            (7, vec![1, 2]),
            "split at {at}"
        );
    }
}
