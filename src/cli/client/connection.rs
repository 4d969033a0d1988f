//! The socket of a client: whole packets in, whole packets out, and the keep alive between them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, sleep_until};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::options::ConnectOptions;
use super::{ClientError, trace};
use crate::mqtt::decode::{decode, frame_length};
use crate::mqtt::encode::encode;
use crate::mqtt::{Packet, ProtocolVersion};

/// A TCP or TLS connection.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(super) struct Connection {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    version: ProtocolVersion,
    incoming: BytesMut,
    outgoing: BytesMut,
    /// Whether something was queued since the last complete flush.
    is_unflushed: bool,
    /// Why nothing can be sent any more. What the server had to say about it may still be read.
    write_error: Option<io::Error>,
    keep_alive: Option<Duration>,
    last_queued: Instant,
    /// When the answer to the last PINGREQ is overdue.
    ping_deadline: Option<Instant>,
    is_debug: bool,
}

/// The bytes of one packet.
pub(super) struct Frame {
    bytes: Bytes,
    version: ProtocolVersion,
}

impl Frame {
    pub(super) fn packet(&self) -> Result<Packet<'_>, ClientError> {
        Ok(decode(&self.bytes, self.version)?)
    }

    /// `part`, which lies within this frame, without copying it.
    pub(super) fn share(&self, part: &[u8]) -> Bytes {
        self.bytes.slice_ref(part)
    }
}

impl Connection {
    pub(super) async fn open(options: &ConnectOptions) -> Result<Self, ClientError> {
        let tcp = connect_tcp(options).await?;
        let stream: Box<dyn Stream> = match &options.tls {
            None => Box::new(tcp),
            Some(config) => {
                let tls_error = |error| ClientError::Tls {
                    address: options.address(),
                    error,
                };
                let name = ServerName::try_from(options.host.clone())
                    .map_err(|error| tls_error(io::Error::other(error)))?;
                let connector = TlsConnector::from(Arc::clone(config));
                Box::new(connector.connect(name, tcp).await.map_err(tls_error)?)
            }
        };
        let (reader, writer) = tokio::io::split(stream);
        Ok(Self {
            reader,
            writer,
            version: options.version,
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
            is_unflushed: false,
            write_error: None,
            keep_alive: None,
            last_queued: Instant::now(),
            ping_deadline: None,
            is_debug: options.is_debug,
        })
    }

    /// Sends PINGREQ whenever nothing else was sent for so long; never if it is zero.
    pub(super) fn set_keep_alive(&mut self, keep_alive: Duration) {
        self.keep_alive = (!keep_alive.is_zero()).then_some(keep_alive);
    }

    /// Queues `packet`; [`Connection::next`] and [`Connection::flush`] send it.
    pub(super) fn queue(&mut self, packet: &Packet<'_>) {
        let mut encoded = Vec::new();
        encode(packet, self.version, &mut encoded);
        self.queue_encoded(packet, &encoded);
    }

    /// Queues `packet` unless it has more than `maximum` bytes on the wire.
    pub(super) fn queue_if_at_most(
        &mut self,
        maximum: usize,
        packet: &Packet<'_>,
    ) -> Result<(), ClientError> {
        let mut encoded = Vec::new();
        encode(packet, self.version, &mut encoded);
        let bytes = encoded.len();
        if bytes > maximum {
            return Err(ClientError::PacketTooLarge { bytes, maximum });
        }
        self.queue_encoded(packet, &encoded);
        Ok(())
    }

    fn queue_encoded(&mut self, packet: &Packet<'_>, encoded: &[u8]) {
        if self.is_debug {
            trace("sending", packet);
        }
        self.outgoing.extend_from_slice(encoded);
        self.is_unflushed = true;
        self.last_queued = Instant::now();
    }

    /// Bytes that wait to be written.
    pub(super) fn queued_bytes(&self) -> usize {
        self.outgoing.len()
    }

    /// The first bytes from the server, as far as they are here.
    pub(super) fn peek(&self) -> &[u8] {
        &self.incoming
    }

    /// Waits until bytes have come.
    pub(super) async fn read_some(&mut self) -> Result<(), ClientError> {
        match self.reader.read_buf(&mut self.incoming).await {
            Ok(0) => Err(ClientError::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(ClientError::Lost(error)),
        }
    }

    /// The next packet other than PINGRESP, or `None` whenever all that was queued has been sent.
    ///
    /// May be dropped and called again without loss.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, ClientError> {
        loop {
            if let Some(frame) = self.take_frame()? {
                let packet = frame.packet()?;
                if self.is_debug {
                    trace("received", &packet);
                }
                if packet == Packet::PingResp {
                    self.ping_deadline = None;
                    continue;
                }
                return Ok(Some(frame));
            }
            let keep_alive = self.keep_alive.unwrap_or(Duration::MAX);
            let timer = self
                .ping_deadline
                .or_else(|| self.last_queued.checked_add(keep_alive));
            tokio::select! {
                read = self.reader.read_buf(&mut self.incoming) => match read {
                    Ok(0) => return Err(self.write_error.take().map_or(ClientError::Closed, ClientError::Lost)),
                    Ok(_) => {}
                    Err(error) => return Err(ClientError::Lost(error)),
                },
                written = write_all(&mut self.writer, &mut self.outgoing), if self.is_unflushed => {
                    self.is_unflushed = false;
                    match written {
                        Ok(()) => return Ok(None),
                        Err(error) => self.write_error = Some(error),
                    }
                }
                () = sleep_until(timer.unwrap_or(self.last_queued)), if timer.is_some() => {
                    if self.ping_deadline.is_some() {
                        return Err(ClientError::PingTimeout);
                    }
                    self.queue(&Packet::PingReq);
                    self.ping_deadline = self.last_queued.checked_add(keep_alive);
                }
            }
        }
    }

    /// Sends all that was queued, and reads nothing.
    pub(super) async fn flush(&mut self) -> Result<(), ClientError> {
        write_all(&mut self.writer, &mut self.outgoing)
            .await
            .map_err(ClientError::Lost)?;
        self.is_unflushed = false;
        Ok(())
    }

    /// Closes the sending side, which TLS tells the server.
    pub(super) async fn shut_down(&mut self) -> Result<(), ClientError> {
        self.writer.shutdown().await.map_err(ClientError::Lost)
    }

    fn take_frame(&mut self) -> Result<Option<Frame>, ClientError> {
        match frame_length(&self.incoming)? {
            Some(length) if length <= self.incoming.len() => Ok(Some(Frame {
                bytes: self.incoming.split_to(length).freeze(),
                version: self.version,
            })),
            _ => Ok(None),
        }
    }
}

/// Both steps may be dropped and tried again: what was written has left `outgoing`.
async fn write_all(
    writer: &mut WriteHalf<Box<dyn Stream>>,
    outgoing: &mut BytesMut,
) -> io::Result<()> {
    while !outgoing.is_empty() {
        if writer.write_buf(outgoing).await? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    writer.flush().await
}

/// Tries every address of the host in turn.
async fn connect_tcp(options: &ConnectOptions) -> Result<TcpStream, ClientError> {
    let addresses = lookup_host((options.host.as_str(), options.port))
        .await
        .map_err(|error| ClientError::Resolve {
            host: options.host.clone(),
            error,
        })?;
    let mut last_error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(ClientError::Lost)?;
                return Ok(stream);
            }
            Err(error) => last_error = error,
        }
    }
    Err(ClientError::Connect {
        address: options.address(),
        error: last_error,
    })
}
