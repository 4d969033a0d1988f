//! Packets on a byte stream: reading many at a time, writing many at a time.
//!
//! An idle connection holds no buffer. Buffers are lent by the thread that runs the connection, and
//! returned when there is nothing in them.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio_util::io::poll_read_buf;

use super::transport::Transport;
use crate::mqtt::decode::{DecodeError, decode, frame_length};
use crate::mqtt::encode::{encode, encode_publish_head};
use crate::mqtt::{Message, Packet, ProtocolVersion};
use crate::session::Outgoing;

/// Bytes read at a time, and written at a time.
const BUFFER_BYTES: usize = 64 * 1024;

/// Output that waits for the socket from which on no more is added, but for replies.
pub(crate) const OUTPUT_HIGH_WATER: usize = BUFFER_BYTES;

/// Payloads from here on are written from the message itself, not copied.
const COPIED_PAYLOAD_MAX: usize = 8 * 1024;

/// Buffers that a thread keeps.
const POOLED_BUFFERS: usize = 8;

thread_local! {
    static INPUT_POOL: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
    static OUTPUT_POOL: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// A byte stream that packets are read from and written to.
pub(crate) struct PacketIo {
    transport: Transport,
    packet_bytes_max: usize,
    /// Bytes that have been read; those before `consumed` have been decoded.
    input: BytesMut,
    consumed: usize,
    /// Bytes read since they were last asked for.
    bytes_read: u64,
    /// Bytes to be written; those before `written` have been.
    output: Vec<u8>,
    written: usize,
    /// A payload that follows `output`, from its offset.
    payload: Option<(Message, usize)>,
    /// Whether the transport may hold bytes that it has taken and not sent, as TLS does.
    unflushed: bool,
}

/// Why no packet could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// [MQTT-3.2.2-15]
    #[error("packet of {length} bytes")]
    TooLarge { length: usize },
}

impl PacketIo {
    pub(crate) fn new(transport: Transport, packet_bytes_max: usize) -> Self {
        Self {
            transport,
            packet_bytes_max,
            input: BytesMut::new(),
            consumed: 0,
            bytes_read: 0,
            output: Vec::new(),
            written: 0,
            payload: None,
            unflushed: false,
        }
    }

    /// Of the next packet, if it has come.
    pub(crate) fn first_byte(&self) -> Option<u8> {
        self.input.get(self.consumed).copied()
    }

    /// Writes what waits and, if `may_read`, reads what has come; ready when either got on.
    ///
    /// # Errors
    /// When the stream has failed, and `UnexpectedEof` when the peer has closed it.
    pub(crate) async fn progress(&mut self, may_read: bool) -> io::Result<()> {
        std::future::poll_fn(|context| {
            let writes = self.has_output() || self.unflushed;
            let wrote = writes && self.poll_write(context)?.is_ready();
            if may_read && self.poll_read(context)?.is_ready() || wrote {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        })
        .await
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let parked = self.input.len();
        let mut buffer = if parked >= BUFFER_BYTES / 2 {
            // The beginning of a large packet stays where it is.
            let mut own = std::mem::take(&mut self.input);
            own.reserve(parked.min(BUFFER_BYTES * 16));
            own
        } else {
            let pooled = INPUT_POOL.with_borrow_mut(Vec::pop);
            let mut pooled = pooled.unwrap_or_else(|| BytesMut::with_capacity(BUFFER_BYTES));
            pooled.extend_from_slice(&self.input);
            pooled
        };
        let result = poll_read_buf(Pin::new(&mut self.transport), context, &mut buffer);
        match result {
            Poll::Ready(Ok(count)) if count > 0 => {
                self.bytes_read += count as u64;
                self.input = buffer;
                Poll::Ready(Ok(()))
            }
            unsuccessful => {
                if self.input.is_empty() && parked > 0 {
                    self.input = buffer;
                } else {
                    give_back_input(buffer);
                }
                ready!(unsuccessful)?;
                Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()))
            }
        }
    }

    /// How many bytes were read since the last time this was asked.
    pub(crate) fn take_bytes_read(&mut self) -> u64 {
        std::mem::take(&mut self.bytes_read)
    }

    /// The next whole packet that has been read.
    ///
    /// # Errors
    /// [`ReadError`] if what has been read is not MQTT or too large.
    #[inline]
    pub(crate) fn next_packet(
        &mut self,
        version: ProtocolVersion,
    ) -> Result<Option<Packet<'_>>, ReadError> {
        match self.next_frame()? {
            Some(frame) => Ok(Some(decode(frame, version)?)),
            None => Ok(None),
        }
    }

    /// The bytes of the next whole packet that has been read.
    pub(crate) fn next_frame(&mut self) -> Result<Option<&[u8]>, ReadError> {
        let waiting = &self.input[self.consumed..];
        let length = if waiting.is_empty() {
            None
        } else {
            frame_length(waiting)?
        };
        match length {
            Some(length) if length > self.packet_bytes_max => Err(ReadError::TooLarge { length }),
            Some(length) if length <= waiting.len() => {
                let start = self.consumed;
                self.consumed += length;
                Ok(Some(&self.input[start..start + length]))
            }
            _ => {
                self.park_input();
                Ok(None)
            }
        }
    }

    /// Keeps the beginning of a packet, if there is one, and returns the buffer.
    fn park_input(&mut self) {
        let left = self.input.len() - self.consumed;
        if left >= BUFFER_BYTES / 2 {
            if self.consumed > 0 {
                let _ = self.input.split_to(self.consumed);
            }
        } else {
            let rest = BytesMut::from(&self.input[self.consumed..]);
            give_back_input(std::mem::replace(&mut self.input, rest));
        }
        self.consumed = 0;
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.output.is_empty() || self.payload.is_some()
    }

    /// Bytes that wait for the socket.
    pub(crate) fn output_bytes(&self) -> usize {
        let payload = self
            .payload
            .as_ref()
            .map_or(0, |(message, at)| message.payload().len() - at);
        self.output.len() - self.written + payload
    }

    /// Whether a message may be added: the socket keeps up.
    pub(crate) fn has_room(&self) -> bool {
        self.payload.is_none() && self.output.len() - self.written < OUTPUT_HIGH_WATER
    }

    /// Adds a packet.
    pub(crate) fn write(&mut self, packet: &Packet<'_>, version: ProtocolVersion) -> usize {
        let before = self.begin_output();
        encode(packet, version, &mut self.output);
        self.output.len() - before
    }

    /// Adds a PUBLISH. Returns its bytes.
    pub(crate) fn write_publish(&mut self, outgoing: &Outgoing, version: ProtocolVersion) -> usize {
        let before = self.begin_output();
        let message = &outgoing.delivery.message;
        encode_publish_head(message, &outgoing.header(), version, &mut self.output);
        let payload = message.payload();
        if payload.len() <= COPIED_PAYLOAD_MAX {
            self.output.extend_from_slice(payload);
            return self.output.len() - before;
        }
        self.payload = Some((message.clone(), 0));
        self.output.len() - before + payload.len()
    }

    fn begin_output(&mut self) -> usize {
        if let Some((message, at)) = self.payload.take() {
            // Rare: a reply behind a payload that is still being written.
            self.output.extend_from_slice(&message.payload()[at..]);
        } else if self.output.capacity() == 0 {
            let pooled = OUTPUT_POOL.with_borrow_mut(Vec::pop);
            self.output =
                pooled.unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES + COPIED_PAYLOAD_MAX));
        }
        self.output.len()
    }

    /// Writes until nothing waits any more.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.has_output() {
            self.unflushed = true;
            let head = &self.output[self.written..];
            let transport = Pin::new(&mut self.transport);
            let count = match &self.payload {
                None => ready!(transport.poll_write(context, head))?,
                Some((message, at)) => {
                    let slices = [
                        io::IoSlice::new(head),
                        io::IoSlice::new(&message.payload()[*at..]),
                    ];
                    ready!(transport.poll_write_vectored(context, &slices))?
                }
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let of_head = count.min(self.output.len() - self.written);
            self.written += of_head;
            if let Some((message, at)) = &mut self.payload {
                *at += count - of_head;
                if *at == message.payload().len() {
                    self.payload = None;
                }
            }
            if self.written == self.output.len() && self.payload.is_none() {
                self.written = 0;
                give_back_output(std::mem::take(&mut self.output));
            }
        }
        ready!(Pin::new(&mut self.transport).poll_flush(context))?;
        self.unflushed = false;
        Poll::Ready(Ok(()))
    }

    /// Writes what the socket takes without waiting.
    pub(crate) async fn write_some(&mut self) -> io::Result<()> {
        std::future::poll_fn(|context| match self.poll_write(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(())),
        })
        .await
    }

    /// Writes all that waits, and ends the stream.
    pub(crate) async fn close(mut self) -> io::Result<()> {
        std::future::poll_fn(|context| self.poll_write(context)).await?;
        self.transport.shutdown().await
    }
}

fn give_back_input(mut buffer: BytesMut) {
    buffer.clear();
    if buffer.capacity() == BUFFER_BYTES {
        INPUT_POOL.with_borrow_mut(|pool| {
            if pool.len() < POOLED_BUFFERS {
                pool.push(buffer);
            }
        });
    }
}

fn give_back_output(mut buffer: Vec<u8>) {
    buffer.clear();
    if buffer.capacity() <= 2 * BUFFER_BYTES {
        OUTPUT_POOL.with_borrow_mut(|pool| {
            if pool.len() < POOLED_BUFFERS {
                pool.push(buffer);
            }
        });
    }
}

impl std::fmt::Debug for PacketIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketIo")
            .field("input_bytes", &self.input.len())
            .field("output_bytes", &self.output_bytes())
            .finish_non_exhaustive()
    }
}
