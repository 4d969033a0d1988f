//! As much of an MQTT 5.0 client as these tests need.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::lines::DEADLINE;

pub(crate) struct Client(TcpStream);

fn text(text: &str) -> Vec<u8> {
    let length = u16::try_from(text.len()).unwrap().to_be_bytes();
    [&length, text.as_bytes()].concat()
}

impl Client {
    /// Connects with a session that lasts for an hour, and waits for CONNACK.
    #[track_caller]
    pub(crate) fn connect(address: SocketAddr, client_id: &str) -> Self {
        let (client, reason) = Self::try_connect(address, client_id);
        assert_eq!(reason, 0);
        client
    }

    /// The same, with the Reason Code of CONNACK.
    #[track_caller]
    pub(crate) fn try_connect(address: SocketAddr, client_id: &str) -> (Self, u8) {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut client = Self(stream);
        let mut body = text("MQTT");
        // Version 5, no Clean Start, Keep Alive 60 s, Session Expiry Interval 3600 s.
        body.extend([5, 0, 0, 60, 5, 0x11, 0, 0, 0x0E, 0x10]);
        body.extend(text(client_id));
        client.send(0x10, &body);
        let (kind, body) = client.receive();
        assert_eq!(kind, 0x20);
        (client, body[1])
    }

    /// Subscribes with QoS 1 and waits for SUBACK.
    #[track_caller]
    pub(crate) fn subscribe(&mut self, filter: &str) {
        let mut body = vec![0, 1, 0];
        body.extend(text(filter));
        body.push(1);
        self.send(0x82, &body);
        let (kind, body) = self.receive();
        assert_eq!((kind, body.last()), (0x90, Some(&1)));
    }

    /// Publishes with QoS 1 and waits for PUBACK.
    #[track_caller]
    pub(crate) fn publish(&mut self, topic: &str, payload: &[u8]) {
        let mut body = text(topic);
        body.extend([0, 1, 0]);
        body.extend(payload);
        self.send(0x32, &body);
        let (kind, _) = self.receive();
        assert_eq!(kind, 0x40);
    }

    /// Acknowledges a PUBLISH of QoS 1, given what follows its length.
    #[track_caller]
    pub(crate) fn acknowledge(&mut self, publish: &[u8]) {
        let topic_bytes = usize::from(u16::from_be_bytes([publish[0], publish[1]]));
        self.send(0x40, &publish[2 + topic_bytes..4 + topic_bytes]);
    }

    fn send(&mut self, first: u8, body: &[u8]) {
        let length = u8::try_from(body.len()).unwrap();
        assert!(length < 128);
        self.0
            .write_all(&[&[first, length], body].concat())
            .unwrap();
    }

    /// The first byte of the next packet, and what follows the length.
    #[track_caller]
    pub(crate) fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut header = [0; 2];
        self.0.read_exact(&mut header).unwrap();
        assert!(header[1] < 128);
        let mut body = vec![0; usize::from(header[1])];
        self.0.read_exact(&mut body).unwrap();
        (header[0], body)
    }
}
