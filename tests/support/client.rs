//! One connection of an MQTT client, packet by packet.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::lines::DEADLINE;
use crate::wire::{self, Answer, Connect, DISCONNECT, PINGREQ, Packet, Publish, Version};

pub(crate) struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    version: Version,
    pub(crate) session_present: bool,
}

impl Client {
    /// Connects and waits for CONNACK.
    ///
    /// # Errors
    /// When the broker is gone, or closes the connection instead; a refusal is an error, too.
    pub(crate) async fn try_connect(address: SocketAddr, connect: &Connect) -> io::Result<Self> {
        match Self::ask_for_connection(address, connect).await? {
            (client, 0) => Ok(client),
            (_, reason) => Err(io::Error::other(format!("CONNACK {reason:#x}"))),
        }
    }

    /// Connects where it is refused; returns the reason.
    pub(crate) async fn refusal(address: SocketAddr, connect: &Connect) -> u8 {
        let asked = Self::ask_for_connection(address, connect).await;
        let (_, reason) = asked.unwrap();
        assert_ne!(reason, 0, "it is let in");
        reason
    }

    async fn ask_for_connection(address: SocketAddr, connect: &Connect) -> io::Result<(Self, u8)> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let mut client = Self {
            stream,
            input: Vec::new(),
            version: connect.version,
            session_present: false,
        };
        client.send(&connect.encode()).await?;
        let Packet::ConnAck {
            session_present,
            reason,
        } = client.receive().await?
        else {
            return Err(io::Error::other("no CONNACK"));
        };
        client.session_present = session_present;
        Ok((client, reason))
    }

    pub(crate) async fn connect(address: SocketAddr, connect: &Connect) -> Self {
        Self::try_connect(address, connect).await.unwrap()
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next packet; may be dropped and called again without loss.
    ///
    /// # Errors
    /// `UnexpectedEof` when the broker closes the connection.
    ///
    /// # Panics
    /// When nothing comes until [`DEADLINE`].
    pub(crate) async fn receive(&mut self) -> io::Result<Packet> {
        loop {
            if let Some(packet) = Packet::take(&mut self.input, self.version) {
                return Ok(packet);
            }
            let read = timeout(DEADLINE, self.stream.read_buf(&mut self.input));
            if read.await.expect("the broker sends nothing")? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// The next packet that is already here, without waiting for the network.
    pub(crate) fn received(&mut self) -> Option<Packet> {
        Packet::take(&mut self.input, self.version)
    }

    /// Subscribes and waits for SUBACK; messages that come before it are returned.
    pub(crate) async fn subscribe(&mut self, filter: &str, qos: u8) -> io::Result<Vec<Publish>> {
        self.send(&wire::subscribe(self.version, 1, filter, qos))
            .await?;
        let mut earlier = Vec::new();
        loop {
            match self.receive().await? {
                Packet::SubAck(granted) => {
                    assert_eq!(granted, qos, "the subscription to {filter} is granted");
                    return Ok(earlier);
                }
                Packet::Publish(publish) => earlier.push(publish),
                Packet::Answer(..) => {}
                Packet::Disconnect(reason) => {
                    let reason = format!("the broker ended the connection: 0x{reason:02X}");
                    return Err(io::Error::other(reason));
                }
                other => panic!("instead of SUBACK came {other:?}"),
            }
        }
    }

    pub(crate) async fn unsubscribe(&mut self, filter: &str) -> io::Result<()> {
        self.send(&wire::unsubscribe(self.version, 1, filter))
            .await?;
        while self.receive().await? != Packet::UnsubAck {}
        Ok(())
    }

    /// Publishes and waits until the broker has taken the message over.
    pub(crate) async fn publish(&mut self, publish: &Publish) -> io::Result<()> {
        self.send(&publish.encode(self.version)).await?;
        let last = match publish.qos {
            0 => return Ok(()),
            1 => Answer::PubAck,
            _ => Answer::PubComp,
        };
        loop {
            match self.receive().await? {
                Packet::Answer(answer, id, reason) => {
                    assert!(reason < 0x80, "{answer:?} with reason {reason:#x}");
                    if answer == Answer::PubRec {
                        self.send(&Answer::PubRel.encode(id)).await?;
                    }
                    if answer == last && id == publish.packet_id {
                        return Ok(());
                    }
                }
                Packet::Publish(_) => {}
                other => panic!("instead of {last:?} came {other:?}"),
            }
        }
    }

    /// Waits until the broker has taken over the next message that was sent with QoS 1.
    pub(crate) async fn acknowledged(&mut self, packet_id: u16) -> io::Result<()> {
        loop {
            match self.receive().await? {
                Packet::Answer(Answer::PubAck, id, reason) => {
                    assert!(reason < 0x80, "PUBACK with reason {reason:#x}");
                    assert_eq!(id, packet_id);
                    return Ok(());
                }
                Packet::Publish(_) => {}
                other => panic!("instead of PUBACK came {other:?}"),
            }
        }
    }

    /// Waits until the broker has handled all that was sent before; returns the messages that came.
    pub(crate) async fn ping(&mut self) -> io::Result<Vec<Publish>> {
        self.send(&PINGREQ).await?;
        let mut received = Vec::new();
        loop {
            match self.receive().await? {
                Packet::PingResp => return Ok(received),
                Packet::Publish(publish) => received.push(publish),
                _ => {}
            }
        }
    }

    /// Receives a message and acknowledges it.
    pub(crate) async fn message(&mut self) -> io::Result<Publish> {
        loop {
            match self.receive().await? {
                Packet::Publish(publish) => {
                    self.acknowledge(&publish).await?;
                    return Ok(publish);
                }
                Packet::Answer(Answer::PubRel, id, _) => {
                    self.send(&Answer::PubComp.encode(id)).await?;
                }
                Packet::Disconnect(reason) => {
                    return Err(io::Error::other(format!("DISCONNECT {reason:#x}")));
                }
                _ => {}
            }
        }
    }

    pub(crate) async fn acknowledge(&mut self, publish: &Publish) -> io::Result<()> {
        match publish.qos {
            0 => Ok(()),
            1 => self.send(&Answer::PubAck.encode(publish.packet_id)).await,
            _ => self.send(&Answer::PubRec.encode(publish.packet_id)).await,
        }
    }

    /// Sends DISCONNECT and waits until the broker has closed the connection.
    pub(crate) async fn disconnect(mut self) -> io::Result<()> {
        self.send(&DISCONNECT).await?;
        self.wait_for_end().await;
        Ok(())
    }

    /// Reads until the broker closes the connection; returns the reason of its DISCONNECT.
    pub(crate) async fn wait_for_end(&mut self) -> Option<u8> {
        let mut reason = None;
        while let Ok(packet) = self.receive().await {
            if let Packet::Disconnect(code) = packet {
                reason = Some(code);
            }
        }
        reason
    }
}
