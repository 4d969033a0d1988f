//! MQTT over WebSocket (section 6): a byte stream in binary frames.
//!
//! Owns the upgrade ([`handshake`]), the frames ([`frame`]) and the control frames that go with
//! them: pings are answered, a close is answered with a close. It holds no payload in either
//! direction: frames are taken apart in the reader's buffer, and written from the writer's.

pub(crate) mod frame;
pub(crate) mod handshake;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::frame::{ControlFrame, Decoder, End};

/// Status code of a close that is not the client's idea.
const CLOSE_NORMAL: u16 = 1000;

/// Slices handed to the stream below in one write, one of them for the header of the frame.
const SLICES_MAX: usize = 64;

/// The payload of a WebSocket connection, as a stream of bytes.
///
/// Each write is one binary frame, so a writer collects what belongs together before it writes.
/// One task owns it: reading also writes (answers to pings), and wakes up the task that read.
///
/// Shutting down sends a close frame and does not wait for the client's; reading on until the end
/// of the stream does.
#[derive(Debug)]
pub(crate) struct WebSocket<S> {
    stream: S,
    decoder: Decoder,
    /// Frames that came with the end of the HTTP request.
    early: Vec<u8>,
    /// The unwritten part of the data frame that is being written.
    header: frame::Bytes<10>,
    payload_remaining: usize,
    /// The unwritten part of the control frame that is being written; only between data frames.
    control: ControlFrame,
    is_flush_due: bool,
    is_shutting_down: bool,
    /// Our close frame is the last one we send.
    is_close_sent: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocket<S> {
    fn new(stream: S, early: Vec<u8>) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
            early,
            header: frame::Bytes::default(),
            payload_remaining: 0,
            control: ControlFrame::default(),
            is_flush_due: false,
            is_shutting_down: false,
            is_close_sent: false,
        }
    }

    fn is_inside_data_frame(&self) -> bool {
        self.payload_remaining > 0
    }

    /// Writes the control frames that are due. Does nothing inside a data frame: what is due then
    /// goes out after it.
    fn poll_control(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_inside_data_frame() {
            return Poll::Ready(Ok(()));
        }
        while let Some(control) = self.next_control() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, control.as_slice()))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.control.consume(written);
            self.is_flush_due = true;
        }
        if self.is_flush_due {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.is_flush_due = false;
        }
        Poll::Ready(Ok(()))
    }

    /// The control frame to write now, or the rest of it.
    fn next_control(&mut self) -> Option<ControlFrame> {
        if self.control.is_empty() && !self.is_close_sent {
            if let Some(end) = self.decoder.end() {
                self.control = frame::close(end.close_code());
                self.is_close_sent = true;
            } else if self.is_shutting_down {
                self.control = frame::close(Some(CLOSE_NORMAL));
                self.is_close_sent = true;
            } else if let Some(ping) = self.decoder.take_ping() {
                self.control = frame::pong(&ping);
            }
        }
        (!self.control.is_empty()).then_some(self.control)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let start = buf.filled().len();
        loop {
            // Reading goes on whether or not the client takes our control frames: a broken
            // connection shows when there is nothing left to read.
            let _ = this.poll_control(cx);
            if buf.filled().len() > start {
                return Poll::Ready(Ok(()));
            }
            match this.decoder.end() {
                None => {}
                Some(End::Close(_)) => return Poll::Ready(Ok(())),
                Some(End::Violation(violation)) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
                }
            }
            if this.early.is_empty() {
                ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            } else {
                let length = this.early.len().min(buf.remaining());
                buf.put_slice(&this.early[..length]);
                this.early.drain(..length);
                this.early.shrink_to_fit();
            }
            let received = &mut buf.filled_mut()[start..];
            if received.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let payload_bytes = this.decoder.decode(received);
            buf.set_filled(start + payload_bytes);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    /// Writes `bufs` as one frame. If only a part can be written now, what is written next
    /// continues that frame, as the next bytes of a stream do.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let offered = bufs.iter().map(|buf| buf.len()).sum();
        if offered == 0 {
            return Poll::Ready(Ok(0));
        }
        if !this.is_inside_data_frame() {
            ready!(this.poll_control(cx))?;
            if this.is_close_sent {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            this.header = frame::binary_header(offered);
            this.payload_remaining = offered;
        }
        loop {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = gather(
                this.header.as_slice(),
                bufs,
                this.payload_remaining,
                &mut slices,
            );
            let stream = Pin::new(&mut this.stream);
            let written = ready!(stream.poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let payload_bytes = written - this.header.consume(written);
            this.payload_remaining -= payload_bytes;
            if payload_bytes > 0 {
                return Poll::Ready(Ok(payload_bytes));
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_control(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.is_shutting_down = true;
        ready!(this.poll_control(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

/// Collects a header and up to `payload_bytes` of `bufs`; returns the number of slices.
fn gather<'a>(
    header: &'a [u8],
    bufs: &'a [IoSlice<'_>],
    mut payload_bytes: usize,
    slices: &mut [IoSlice<'a>; SLICES_MAX],
) -> usize {
    let mut count = 0;
    let parts = std::iter::once(header).chain(bufs.iter().map(|buf| {
        let part = &buf[..buf.len().min(payload_bytes)];
        payload_bytes -= part.len();
        part
    }));
    for (slice, part) in slices.iter_mut().zip(parts.filter(|part| !part.is_empty())) {
        *slice = IoSlice::new(part);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use futures_util::{SinkExt, StreamExt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_websockets::{ClientBuilder, Message};

    use super::frame::tests::frame;
    use super::handshake::{self, HandshakeError, Refusal, WebSocketRules};
    use super::*;

    async fn accept(
        stream: DuplexStream,
        rules: &WebSocketRules,
    ) -> Result<WebSocket<DuplexStream>, HandshakeError> {
        let peer = ([127, 0, 0, 1], 4711).into();
        let accepted = handshake::accept(stream, peer, rules).await;
        accepted.map(|(stream, _)| stream)
    }

    const REQUEST: &str = "GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
                           Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                           Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                           Sec-WebSocket-Protocol: mqtt\r\n\r\n";

    /// A client past its upgrade, and the server's side, with this many bytes between them.
    async fn connect(pipe_bytes: usize) -> (DuplexStream, WebSocket<DuplexStream>) {
        let (mut client, server) = duplex(pipe_bytes);
        let rules = WebSocketRules::default();
        let upgrade = async {
            client.write_all(REQUEST.as_bytes()).await.unwrap();
            let mut response = Vec::new();
            while !response.ends_with(b"\r\n\r\n") {
                response.push(client.read_u8().await.unwrap());
            }
            String::from_utf8(response).unwrap()
        };
        let (response, server) = tokio::join!(upgrade, accept(server, &rules));
        assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
        assert!(response.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(response.contains("Sec-WebSocket-Protocol: mqtt\r\n"));
        (client, server.unwrap())
    }

    async fn expect_bytes(stream: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
        let mut received = vec![0; expected.len()];
        stream.read_exact(&mut received).await.unwrap();
        assert_eq!(received, expected);
    }

    async fn refused_request(request: &str) -> (String, Refusal) {
        let (mut client, server) = duplex(64 * 1024);
        client.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        let rules = WebSocketRules::default();
        let (_, outcome) = tokio::join!(
            async {
                client.read_to_string(&mut response).await.unwrap();
                drop(client);
            },
            accept(server, &rules),
        );
        match outcome {
            Err(HandshakeError::Refused(refusal)) => (response, refusal),
            outcome => panic!("not refused: {outcome:?}"),
        }
    }

    #[tokio::test]
    async fn mqtt_6_0_0_2_packets_need_not_match_frames() {
        let (mut client, mut server) = connect(1024).await;

        let one_frame_with_two_packets = frame(0x82, &[0xC0, 0, 0xC0, 0]);
        let one_packet_in_three_frames = [
            frame(0x82, &[0x30]),
            frame(0x02, &[3, 0]),
            frame(0x80, &[1, b't']),
        ]
        .concat();
        client.write_all(&one_frame_with_two_packets).await.unwrap();
        client.write_all(&one_packet_in_three_frames).await.unwrap();

        expect_bytes(&mut server, &[0xC0, 0, 0xC0, 0, 0x30, 3, 0, 1, b't']).await;
    }

    #[tokio::test]
    async fn frames_sent_before_the_answer_to_the_request_are_not_lost() {
        let (mut client, server) = duplex(1024);
        let early = [REQUEST.as_bytes(), &frame(0x82, b"early")].concat();
        client.write_all(&early).await.unwrap();

        let mut server = accept(server, &WebSocketRules::default()).await.unwrap();

        expect_bytes(&mut server, b"ear").await;
        expect_bytes(&mut server, b"ly").await;
    }

    #[tokio::test]
    async fn mqtt_6_0_0_1_text_frame_closes_the_connection() {
        let (mut client, mut server) = connect(1024).await;

        client.write_all(&frame(0x81, b"text")).await.unwrap();

        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        expect_bytes(&mut client, &[0x88, 2, 0x03, 0xEB]).await;
    }

    #[tokio::test]
    async fn frame_without_mask_closes_the_connection() {
        let (mut client, mut server) = connect(1024).await;

        client.write_all(&[0x82, 1, b'x']).await.unwrap();

        assert_eq!(
            server.read_u8().await.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        expect_bytes(&mut client, &[0x88, 2, 0x03, 0xEA]).await;
    }

    #[tokio::test]
    async fn ping_is_answered_while_reading() {
        let (mut client, mut server) = connect(1024).await;

        client.write_all(&frame(0x89, b"ping")).await.unwrap();
        client.write_all(&frame(0x82, b"x")).await.unwrap();

        assert_eq!(server.read_u8().await.unwrap(), b'x');
        expect_bytes(&mut client, b"\x8A\x04ping").await;
    }

    #[tokio::test]
    async fn pong_waits_for_the_end_of_a_data_frame() {
        let (mut client, mut server) = connect(256).await;
        let payload = [7; 1000];
        // Fills the pipe, in the middle of the frame.
        let written = server.write(&payload).await.unwrap();
        assert!(written < payload.len());
        client
            .write_all(&[frame(0x89, b"ping"), frame(0x82, b"x")].concat())
            .await
            .unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');

        let rest = async {
            server.write_all(&payload[written..]).await.unwrap();
            server.flush().await.unwrap();
        };
        let received = async {
            expect_bytes(&mut client, &[0x82, 126, 0x03, 0xE8]).await;
            expect_bytes(&mut client, &payload).await;
            expect_bytes(&mut client, b"\x8A\x04ping").await;
        };
        tokio::join!(rest, received);
    }

    #[tokio::test]
    async fn a_vectored_write_is_one_frame() {
        let (mut client, mut server) = connect(1024).await;

        let slices = [
            IoSlice::new(b"one"),
            IoSlice::new(b""),
            IoSlice::new(b"two"),
        ];
        assert_eq!(server.write_vectored(&slices).await.unwrap(), 6);
        server.write_all(b"next").await.unwrap();

        expect_bytes(&mut client, b"\x82\x06onetwo\x82\x04next").await;
    }

    #[tokio::test]
    async fn more_slices_than_fit_into_one_write_are_still_one_frame() {
        let (mut client, mut server) = connect(1024).await;
        let slices = [IoSlice::new(b"x"); SLICES_MAX + 10];

        let written = server.write_vectored(&slices).await.unwrap();
        let rest = server.write_vectored(&slices[written..]).await.unwrap();

        assert_eq!(written + rest, slices.len());
        expect_bytes(&mut client, &[0x82, slices.len() as u8]).await;
        expect_bytes(&mut client, &[b'x'; SLICES_MAX + 10]).await;
    }

    #[tokio::test]
    async fn close_of_the_client_is_answered_and_ends_both_directions() {
        let (mut client, mut server) = connect(1024).await;

        client.write_all(&frame(0x82, b"x")).await.unwrap();
        client
            .write_all(&frame(0x88, &1001_u16.to_be_bytes()))
            .await
            .unwrap();

        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"x");
        expect_bytes(&mut client, &[0x88, 2, 0x03, 0xE9]).await;
        assert_eq!(
            server.write(b"y").await.unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
    }

    #[tokio::test]
    async fn shutting_down_sends_one_close_frame() {
        let (mut client, mut server) = connect(1024).await;

        server.write_all(b"bye").await.unwrap();
        server.shutdown().await.unwrap();
        client
            .write_all(&frame(0x88, &1000_u16.to_be_bytes()))
            .await
            .unwrap();

        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"\x82\x03bye\x88\x02\x03\xE8");
    }

    #[tokio::test]
    async fn refused_client_gets_a_line_of_text() {
        let (response, refusal) =
            refused_request("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert_eq!(refusal, Refusal::NoUpgrade);
        assert!(
            response.starts_with("HTTP/1.1 426 Upgrade Required\r\n"),
            "{response}"
        );
        assert!(response.contains("Upgrade: websocket\r\n"), "{response}");
        assert!(response.ends_with(
            "\r\n\r\nThis is an MQTT broker: connect with an MQTT client over WebSocket.\n"
        ));

        let (response, refusal) = refused_request(&REQUEST.replace("GET", "POST")).await;
        assert_eq!(refusal, Refusal::Method);
        assert!(
            response.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
            "{response}"
        );
        assert!(response.contains("Allow: GET\r\n"), "{response}");
    }

    #[tokio::test]
    async fn huge_request_is_refused_without_reading_it_all() {
        let header = format!("X: {}\r\nHost", "x".repeat(20_000));

        let (response, refusal) = refused_request(&REQUEST.replace("Host", &header)).await;

        assert_eq!(refusal, Refusal::TooLarge);
        assert!(response.starts_with("HTTP/1.1 431 "), "{response}");
    }

    #[tokio::test]
    async fn another_implementation_of_websocket_understands_us() {
        let (client, server) = duplex(1024);
        let (rules, payload) = (WebSocketRules::default(), vec![0xA5; 70_000]);
        let echo = async {
            let mut server = accept(server, &rules).await.unwrap();
            let mut received = vec![0; payload.len()];
            server.read_exact(&mut received).await.unwrap();
            server.write_all(&received).await.unwrap();
            assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
            server.shutdown().await.unwrap();
        };
        let talk = async {
            let (mut client, _) = ClientBuilder::new()
                .uri("ws://localhost/mqtt")
                .unwrap()
                .add_header(
                    "sec-websocket-protocol".try_into().unwrap(),
                    "mqtt".try_into().unwrap(),
                )
                .unwrap()
                .connect_on(client)
                .await
                .unwrap();
            client.send(Message::binary(payload.clone())).await.unwrap();
            let echoed = client.next().await.unwrap().unwrap();
            assert_eq!(&echoed.into_payload()[..], payload);
            client.close().await.unwrap();
        };
        tokio::join!(echo, talk);
    }
}
