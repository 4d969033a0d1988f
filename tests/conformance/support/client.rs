//! A client that does what a test tells it and nothing of its own accord.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use super::wire::{self, Kind, Packet, Property, Publish, Version};

/// How long a test waits for bytes before it calls the broker hung. Nothing that passes comes near.
pub(crate) const HUNG_AFTER: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    version: Version,
    received: Vec<u8>,
    /// Packets that came while another one was waited for.
    set_aside: VecDeque<Packet>,
    last_packet_id: u16,
}

impl Client {
    pub(crate) fn open(address: SocketAddr, version: Version) -> Self {
        let stream = TcpStream::connect(address).expect("the broker listens");
        stream
            .set_read_timeout(Some(HUNG_AFTER))
            .expect("a time-out above zero");
        stream
            .set_write_timeout(Some(HUNG_AFTER))
            .expect("a time-out above zero");
        stream.set_nodelay(true).expect("a TCP socket");
        Self {
            stream,
            version,
            received: Vec::new(),
            set_aside: VecDeque::new(),
            last_packet_id: 0,
        }
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// A Packet Identifier that this client has not used yet.
    pub(crate) fn next_packet_id(&mut self) -> u16 {
        self.last_packet_id += 1;
        self.last_packet_id
    }

    // ── sending ──────────────────────────────────────────────────────────────────────────────

    /// Sends `bytes` as they are. That the broker may have closed the connection by now is seen
    /// by whoever reads next.
    #[track_caller]
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        match self.stream.write_all(bytes) {
            Err(error) if !is_closed(error.kind()) => panic!("cannot write: {error}"),
            _ => {}
        }
    }

    #[track_caller]
    pub(crate) fn publish(&mut self, publish: &Publish) {
        self.send(&publish.bytes(self.version));
    }

    /// Publishes and waits until the broker has taken the message over.
    #[track_caller]
    pub(crate) fn publish_acknowledged(&mut self, topic: &str, payload: &str, qos: u8) {
        self.complete(Publish::new(topic, payload), qos);
    }

    /// Publishes with RETAIN and waits until the broker has taken the message over.
    #[track_caller]
    pub(crate) fn publish_retained(&mut self, topic: &str, payload: &str, qos: u8) {
        self.complete(Publish::new(topic, payload).retain(), qos);
    }

    /// Sends `publish` with this QoS and goes through the exchange that it asks for.
    #[track_caller]
    pub(crate) fn complete(&mut self, publish: Publish, qos: u8) {
        let id = self.next_packet_id();
        self.publish(&publish.qos(qos, id));
        match qos {
            0 => self.ping(),
            1 => {
                let puback = self.wait_for(Kind::PubAck);
                assert_eq!(puback.id, id, "the identifier of {puback:?}");
                assert!(puback.reason() < 0x80, "refused: {puback:?}");
            }
            _ => {
                let pubrec = self.wait_for(Kind::PubRec);
                assert_eq!(pubrec.id, id, "the identifier of {pubrec:?}");
                assert!(pubrec.reason() < 0x80, "refused: {pubrec:?}");
                self.send_pubrel(id);
                let pubcomp = self.wait_for(Kind::PubComp);
                assert_eq!((pubcomp.id, pubcomp.reason()), (id, 0), "{pubcomp:?}");
            }
        }
    }

    #[track_caller]
    pub(crate) fn send_puback(&mut self, id: u16) {
        self.send(&wire::acknowledgement(Kind::PubAck, id));
    }

    #[track_caller]
    pub(crate) fn send_pubrec(&mut self, id: u16) {
        self.send(&wire::acknowledgement(Kind::PubRec, id));
    }

    #[track_caller]
    pub(crate) fn send_pubrel(&mut self, id: u16) {
        self.send(&wire::acknowledgement(Kind::PubRel, id));
    }

    #[track_caller]
    pub(crate) fn send_pubcomp(&mut self, id: u16) {
        self.send(&wire::acknowledgement(Kind::PubComp, id));
    }

    /// Subscribes with these Subscription Options and expects the QoS in them to be granted.
    #[track_caller]
    pub(crate) fn subscribe(&mut self, filter: &str, options: u8) {
        let reasons = self.subscribe_all(&[(filter, options)], &[]);
        assert_eq!(reasons, [options & 0b11], "granted for {filter}");
    }

    /// Subscribes and returns the Reason Codes of the SUBACK.
    #[track_caller]
    pub(crate) fn subscribe_all(
        &mut self,
        filters: &[(&str, u8)],
        properties: &[Property],
    ) -> Vec<u8> {
        let id = self.next_packet_id();
        self.send(&wire::subscribe(self.version, id, filters, properties));
        let suback = self.wait_for(Kind::SubAck);
        assert_eq!(
            suback.id, id,
            "the identifier of {suback:?}, [MQTT-3.8.4-2]"
        );
        suback.reasons
    }

    /// Unsubscribes and returns the Reason Codes of the UNSUBACK.
    #[track_caller]
    pub(crate) fn unsubscribe(&mut self, filters: &[&str]) -> Vec<u8> {
        let id = self.next_packet_id();
        self.send(&wire::unsubscribe(self.version, id, filters));
        let unsuback = self.wait_for(Kind::UnsubAck);
        assert_eq!(
            unsuback.id, id,
            "the identifier of {unsuback:?}, [MQTT-3.10.4-5]"
        );
        unsuback.reasons
    }

    /// A round trip: whatever was sent before has been processed when it returns.
    #[track_caller]
    pub(crate) fn ping(&mut self) {
        self.send(&wire::pingreq());
        self.wait_for(Kind::PingResp);
    }

    /// Ends the connection in the regular way and waits until the broker has closed it.
    #[track_caller]
    pub(crate) fn disconnect(mut self) {
        self.send(&wire::disconnect());
        self.expect_closed();
    }

    /// Ends the connection without a DISCONNECT and waits until the broker has noticed.
    #[track_caller]
    pub(crate) fn drop_connection(mut self) {
        // The broker may have closed it already.
        let _ = self.stream.shutdown(Shutdown::Write);
        while self.read_packet().is_some() {}
    }

    // ── receiving ────────────────────────────────────────────────────────────────────────────

    /// The next packet; `None` when the broker has closed the connection.
    #[track_caller]
    pub(crate) fn next_packet(&mut self) -> Option<Packet> {
        match self.set_aside.pop_front() {
            Some(packet) => Some(packet),
            None => self.read_packet(),
        }
    }

    #[track_caller]
    fn read_packet(&mut self) -> Option<Packet> {
        loop {
            if let Some(packet) = Packet::take(self.version, &mut self.received) {
                return Some(packet);
            }
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    assert!(
                        self.received.is_empty(),
                        "closed in the middle of a packet: {:02x?}",
                        self.received
                    );
                    return None;
                }
                Ok(count) => self.received.extend(&chunk[..count]),
                Err(error) if is_closed(error.kind()) => return None,
                Err(error) => {
                    panic!("the broker neither answered nor closed the connection: {error}")
                }
            }
        }
    }

    /// The next packet of this kind; others are kept for later.
    #[track_caller]
    fn wait_for(&mut self, kind: Kind) -> Packet {
        loop {
            match self.read_packet() {
                Some(packet) if packet.kind == kind => return packet,
                Some(packet) if packet.kind == Kind::Disconnect => {
                    panic!("expected {kind:?}, got {packet:?}")
                }
                Some(packet) => self.set_aside.push_back(packet),
                None => panic!("expected {kind:?}, but the connection was closed"),
            }
        }
    }

    /// The next packet, which must be of this kind.
    #[track_caller]
    pub(crate) fn expect(&mut self, kind: Kind) -> Packet {
        match self.next_packet() {
            Some(packet) if packet.kind == kind => packet,
            Some(packet) => panic!("expected {kind:?}, got {packet:?}"),
            None => panic!("expected {kind:?}, but the connection was closed"),
        }
    }

    #[track_caller]
    pub(crate) fn expect_connack(&mut self, reason: u8) -> Packet {
        let connack = self.expect(Kind::ConnAck);
        assert_eq!(connack.reason(), reason, "{connack:?}");
        connack
    }

    /// A CONNACK with the code of this client's version, and the end of the connection.
    #[track_caller]
    pub(crate) fn expect_refused(&mut self, return_code: u8, reason: u8) {
        let connack = self.expect_connack(if self.version.is_v5() {
            reason
        } else {
            return_code
        });
        assert!(!connack.session_present, "[MQTT-3.2.2-6]");
        assert_eq!(self.next_packet(), None, "after a refusal, [MQTT-3.2.2-7]");
    }

    /// A message, which is not acknowledged.
    #[track_caller]
    pub(crate) fn expect_publish(&mut self, topic: &str, payload: &str) -> Packet {
        let publish = self.expect(Kind::Publish);
        assert_eq!(
            (publish.topic.as_str(), publish.text().as_str()),
            (topic, payload),
            "{publish:?}"
        );
        publish
    }

    /// A message, which is acknowledged in full.
    #[track_caller]
    pub(crate) fn accept_publish(&mut self, topic: &str, payload: &str) -> Packet {
        let publish = self.expect_publish(topic, payload);
        match publish.qos() {
            0 => {}
            1 => self.send_puback(publish.id),
            _ => {
                self.send_pubrec(publish.id);
                let pubrel = self.wait_for(Kind::PubRel);
                assert_eq!(pubrel.id, publish.id, "{pubrel:?}");
                self.send_pubcomp(publish.id);
            }
        }
        publish
    }

    #[track_caller]
    fn expect_acknowledgement(&mut self, kind: Kind, id: u16, reason: u8) -> Packet {
        let packet = self.expect(kind);
        let reason = if self.version.is_v5() { reason } else { 0 };
        assert_eq!((packet.id, packet.reason()), (id, reason), "{packet:?}");
        packet
    }

    #[track_caller]
    pub(crate) fn expect_puback(&mut self, id: u16, reason: u8) -> Packet {
        self.expect_acknowledgement(Kind::PubAck, id, reason)
    }

    #[track_caller]
    pub(crate) fn expect_pubrec(&mut self, id: u16, reason: u8) -> Packet {
        self.expect_acknowledgement(Kind::PubRec, id, reason)
    }

    #[track_caller]
    pub(crate) fn expect_pubrel(&mut self, id: u16) -> Packet {
        self.expect_acknowledgement(Kind::PubRel, id, 0)
    }

    #[track_caller]
    pub(crate) fn expect_pubcomp(&mut self, id: u16, reason: u8) -> Packet {
        self.expect_acknowledgement(Kind::PubComp, id, reason)
    }

    /// Nothing came before the answer to a PINGREQ. Where another client's message must not come,
    /// a later message that must come is the stronger proof.
    #[track_caller]
    pub(crate) fn expect_nothing(&mut self) {
        self.send(&wire::pingreq());
        self.expect(Kind::PingResp);
    }

    /// The end of the connection, which version 5 may announce by a DISCONNECT.
    #[track_caller]
    pub(crate) fn expect_closed(&mut self) {
        match self.next_packet() {
            None => return,
            Some(packet) if packet.kind == Kind::Disconnect => {}
            Some(packet) => panic!("expected the end of the connection, got {packet:?}"),
        }
        assert_eq!(
            self.next_packet(),
            None,
            "after DISCONNECT, [MQTT-3.14.4-1]"
        );
    }

    /// A DISCONNECT with this Reason Code, and the end of the connection.
    #[track_caller]
    pub(crate) fn expect_disconnect(&mut self, reason: u8) {
        self.expect_disconnect_with(&[reason]);
    }

    /// The end of the connection; in version 5 a DISCONNECT with one of these Reason Codes
    /// before it.
    #[track_caller]
    pub(crate) fn expect_disconnect_with(&mut self, reasons: &[u8]) {
        if self.version.is_v5() {
            let disconnect = self.expect(Kind::Disconnect);
            let reason = disconnect.reason();
            assert!(
                reasons.contains(&reason),
                "reason {reason:#04x}, expected {reasons:02x?}: {disconnect:?}"
            );
        }
        assert_eq!(self.next_packet(), None, "the connection ends here");
    }
}

fn is_closed(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted
    )
}
