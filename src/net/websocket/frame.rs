//! The frames of RFC 6455: taking those of a client apart, and building those of a server.

/// Longest payload of a control frame (RFC 6455, section 5.5).
const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;

const OPCODE_CONTINUATION: u8 = 0x0;
const OPCODE_TEXT: u8 = 0x1;
const OPCODE_BINARY: u8 = 0x2;
const OPCODE_CLOSE: u8 = 0x8;
const OPCODE_PING: u8 = 0x9;
const OPCODE_PONG: u8 = 0xA;

/// What a client did that ends its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    /// [MQTT-6.0.0-1]
    #[error("text frame: MQTT needs binary frames")]
    TextFrame,
    #[error("frame with an unknown opcode")]
    UnknownOpcode,
    #[error("frame with reserved bits set")]
    ReservedBits,
    #[error("frame that is not masked")]
    NotMasked,
    #[error("frame length that is not in its shortest form")]
    LengthEncoding,
    #[error("control frame that is fragmented or longer than 125 bytes")]
    ControlFrame,
    #[error("continuation frame without a message to continue")]
    NothingToContinue,
    #[error("new message inside a fragmented one")]
    MessageInsideMessage,
    #[error("close frame with a malformed status code")]
    CloseCode,
}

impl Violation {
    /// The status code of the close frame that answers it.
    fn close_code(self) -> u16 {
        match self {
            Self::TextFrame => 1003,
            Self::UnknownOpcode
            | Self::ReservedBits
            | Self::NotMasked
            | Self::LengthEncoding
            | Self::ControlFrame
            | Self::NothingToContinue
            | Self::MessageInsideMessage
            | Self::CloseCode => 1002,
        }
    }
}

/// Why no more payload comes from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The client sent a close frame, with this status code if any.
    Close(Option<u16>),
    Violation(Violation),
}

impl End {
    /// The status code of our own close frame; a client's is echoed.
    pub(super) fn close_code(self) -> Option<u16> {
        match self {
            Self::Close(code) => code,
            Self::Violation(violation) => Some(violation.close_code()),
        }
    }
}

/// Turns the frames of a client into their payload, in the buffer that they were read into.
///
/// Frames and messages leave no trace in the payload: an MQTT packet may span frames, and a frame
/// may hold many packets, [MQTT-6.0.0-2]. So nothing is ever collected here, and the length of a
/// frame needs no limit.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The part of a frame header that has been seen.
    header: Bytes<14>,
    frame: Option<Frame>,
    /// Whether a fragmented message waits for its continuation.
    is_message_open: bool,
    /// Payload of the control frame that is being received.
    control: ControlPayload,
    /// The last ping that has not been answered; older ones need no answer (section 5.5.3).
    ping: Option<ControlPayload>,
    end: Option<End>,
}

/// The frame whose payload is being received.
#[derive(Clone, Copy, Debug)]
struct Frame {
    kind: FrameKind,
    /// Masking key, rotated so that its first byte applies to the next byte of payload.
    mask: [u8; 4],
    /// Payload not yet received.
    remaining: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameKind {
    Data,
    Close,
    Ping,
    Pong,
}

pub(super) type ControlPayload = Bytes<CONTROL_PAYLOAD_BYTES_MAX>;

impl Decoder {
    /// Replaces the bytes in `data`, the next ones from the client, by the payload in them.
    /// Returns its length.
    pub(super) fn decode(&mut self, data: &mut [u8]) -> usize {
        let mut position = 0;
        let mut payload_end = 0;
        while position < data.len() && self.end.is_none() {
            let Some(frame) = &mut self.frame else {
                position += self.read_header(&data[position..]);
                continue;
            };
            let available = data.len() - position;
            let length = usize::try_from(frame.remaining).map_or(available, |n| n.min(available));
            let part = position..position + length;
            unmask(&mut data[part.clone()], frame.mask);
            frame.mask.rotate_left(length % 4);
            frame.remaining -= length as u64;
            position += length;
            let is_complete = frame.remaining == 0;
            match frame.kind {
                FrameKind::Data => {
                    data.copy_within(part, payload_end);
                    payload_end += length;
                }
                FrameKind::Close | FrameKind::Ping | FrameKind::Pong => {
                    self.control.push(&data[part]);
                }
            }
            if is_complete {
                self.finish_frame();
            }
        }
        payload_end
    }

    /// The payload of a ping that must be answered.
    pub(super) fn take_ping(&mut self) -> Option<ControlPayload> {
        self.ping.take()
    }

    pub(super) fn end(&self) -> Option<End> {
        self.end
    }

    /// Takes what belongs to a frame header from the front of `data`; returns how much that was.
    fn read_header(&mut self, data: &[u8]) -> usize {
        let mut taken = 0;
        while let Some(&byte) = data.get(taken) {
            self.header.push(&[byte]);
            taken += 1;
            match parse_header(self.header.as_slice(), self.is_message_open) {
                Ok(None) => {}
                Ok(Some(header)) => {
                    self.header = Bytes::default();
                    self.is_message_open = header.is_message_open;
                    self.frame = Some(header.frame);
                    if header.frame.remaining == 0 {
                        self.finish_frame();
                    }
                    break;
                }
                Err(violation) => {
                    self.end = Some(End::Violation(violation));
                    break;
                }
            }
        }
        taken
    }

    fn finish_frame(&mut self) {
        let Some(frame) = self.frame.take() else {
            return;
        };
        match frame.kind {
            FrameKind::Data => {}
            FrameKind::Pong => self.control = Bytes::default(),
            FrameKind::Ping => self.ping = Some(std::mem::take(&mut self.control)),
            FrameKind::Close => {
                self.end = Some(match parse_close_code(self.control.as_slice()) {
                    Ok(code) => End::Close(code),
                    Err(violation) => End::Violation(violation),
                });
            }
        }
    }
}

struct Header {
    frame: Frame,
    /// Whether a fragmented message waits for its continuation after this frame.
    is_message_open: bool,
}

/// The frame that a complete header begins; `None` while the header is incomplete.
fn parse_header(bytes: &[u8], is_message_open: bool) -> Result<Option<Header>, Violation> {
    let &[first, second, ref rest @ ..] = bytes else {
        return Ok(None);
    };
    let is_final = first & 0x80 != 0;
    if first & 0x70 != 0 {
        return Err(Violation::ReservedBits);
    }
    let kind = match first & 0x0f {
        OPCODE_CONTINUATION if is_message_open => FrameKind::Data,
        OPCODE_CONTINUATION => return Err(Violation::NothingToContinue),
        OPCODE_BINARY if is_message_open => return Err(Violation::MessageInsideMessage),
        OPCODE_BINARY => FrameKind::Data,
        OPCODE_TEXT => return Err(Violation::TextFrame),
        OPCODE_CLOSE => FrameKind::Close,
        OPCODE_PING => FrameKind::Ping,
        OPCODE_PONG => FrameKind::Pong,
        _ => return Err(Violation::UnknownOpcode),
    };
    if second & 0x80 == 0 {
        return Err(Violation::NotMasked);
    }
    let short_length = second & 0x7f;
    if kind != FrameKind::Data
        && (!is_final || usize::from(short_length) > CONTROL_PAYLOAD_BYTES_MAX)
    {
        return Err(Violation::ControlFrame);
    }
    let (length, mask) = match (short_length, rest) {
        (126, &[a, b, ref mask @ ..]) => (u64::from(u16::from_be_bytes([a, b])), mask),
        (127, &[a, b, c, d, e, f, g, h, ref mask @ ..]) => {
            (u64::from_be_bytes([a, b, c, d, e, f, g, h]), mask)
        }
        (126 | 127, _) => return Ok(None),
        (length, mask) => (u64::from(length), mask),
    };
    let shortest = match short_length {
        127 => u64::from(u16::MAX) + 1,
        126 => 126,
        _ => 0,
    };
    if length < shortest || length > i64::MAX as u64 {
        return Err(Violation::LengthEncoding);
    }
    let &[a, b, c, d] = mask else { return Ok(None) };
    let frame = Frame {
        kind,
        mask: [a, b, c, d],
        remaining: length,
    };
    // Control frames may come between the fragments of a message and do not change it.
    let is_message_open = if kind == FrameKind::Data {
        !is_final
    } else {
        is_message_open
    };
    Ok(Some(Header {
        frame,
        is_message_open,
    }))
}

/// The status code in the payload of a close frame; there may be none.
fn parse_close_code(payload: &[u8]) -> Result<Option<u16>, Violation> {
    let code = match *payload {
        [] => return Ok(None),
        [high, low, ..] => u16::from_be_bytes([high, low]),
        [_] => return Err(Violation::CloseCode),
    };
    // The codes that may be sent (section 7.4); the rest exist only in APIs.
    match code {
        1000..=1003 | 1007..=1014 | 3000..=4999 => Ok(Some(code)),
        _ => Err(Violation::CloseCode),
    }
}

fn unmask(data: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (chunks, rest) = data.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The header of a binary frame.
pub(super) fn binary_header(payload_bytes: usize) -> Bytes<10> {
    let mut header = Bytes::default();
    header.push(&[0x80 | OPCODE_BINARY]);
    if let Ok(length @ 0..126) = u8::try_from(payload_bytes) {
        header.push(&[length]);
    } else if let Ok(length) = u16::try_from(payload_bytes) {
        header.push(&[126]);
        header.push(&length.to_be_bytes());
    } else {
        header.push(&[127]);
        header.push(&(payload_bytes as u64).to_be_bytes());
    }
    header
}

/// A whole control frame.
pub(super) type ControlFrame = Bytes<{ 2 + CONTROL_PAYLOAD_BYTES_MAX }>;

pub(super) fn pong(payload: &ControlPayload) -> ControlFrame {
    control_frame(OPCODE_PONG, payload)
}

pub(super) fn close(code: Option<u16>) -> ControlFrame {
    let mut payload = ControlPayload::default();
    if let Some(code) = code {
        payload.push(&code.to_be_bytes());
    }
    control_frame(OPCODE_CLOSE, &payload)
}

fn control_frame(opcode: u8, payload: &ControlPayload) -> ControlFrame {
    let payload = payload.as_slice();
    let mut frame = ControlFrame::default();
    // A control payload is at most 125 bytes, so its length fits.
    frame.push(&[0x80 | opcode, payload.len() as u8]);
    frame.push(payload);
    frame
}

/// A few bytes stored in place: filled at the end, consumed at the front.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes<const N: usize> {
    bytes: [u8; N],
    start: u8,
    end: u8,
}

impl<const N: usize> Default for Bytes<N> {
    fn default() -> Self {
        const { assert!(N <= u8::MAX as usize) };
        Self {
            bytes: [0; N],
            start: 0,
            end: 0,
        }
    }
}

impl<const N: usize> Bytes<N> {
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..usize::from(self.end)]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Appends `bytes`; the caller knows that they fit.
    fn push(&mut self, bytes: &[u8]) {
        let end = usize::from(self.end) + bytes.len();
        self.bytes[usize::from(self.end)..end].copy_from_slice(bytes);
        self.end = end as u8;
    }

    /// Removes up to `count` bytes from the front; returns how many were removed.
    pub(super) fn consume(&mut self, count: usize) -> usize {
        let count = count.min(self.as_slice().len());
        self.start += count as u8;
        count
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    const MASK: [u8; 4] = [0x11, 0x22, 0x33, 0x44];

    /// A masked frame as a client sends it, its length in the shortest form.
    pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = binary_header(payload.len()).as_slice().to_vec();
        bytes[0] = first;
        bytes[1] |= 0x80;
        bytes.extend(MASK);
        bytes.extend(
            payload
                .iter()
                .zip(MASK.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        bytes
    }

    /// What a decoder makes of `bytes` that arrive all at once.
    fn decode(bytes: &[u8]) -> (Vec<u8>, Option<End>) {
        let mut decoder = Decoder::default();
        let mut data = bytes.to_vec();
        let length = decoder.decode(&mut data);
        data.truncate(length);
        (data, decoder.end())
    }

    #[track_caller]
    fn expect_violation(bytes: &[u8], expected: Violation) {
        assert_eq!(decode(bytes), (Vec::new(), Some(End::Violation(expected))));
    }

    #[test]
    fn mqtt_6_0_0_2_frames_leave_no_trace_in_the_payload() {
        let bytes = [
            frame(0x02, b"one"),
            frame(0x00, b""),
            frame(0x80, b"two"),
            frame(0x82, b"3"),
        ];

        assert_eq!(decode(&bytes.concat()), (b"onetwo3".to_vec(), None));
    }

    #[test]
    fn mqtt_6_0_0_1_text_frame_is_a_violation() {
        expect_violation(&frame(0x81, b"text"), Violation::TextFrame);
    }

    #[test]
    fn payload_before_a_violation_is_kept() {
        let bytes = [frame(0x82, b"kept"), frame(0x81, b"text")].concat();

        assert_eq!(
            decode(&bytes),
            (b"kept".to_vec(), Some(End::Violation(Violation::TextFrame)))
        );
    }

    #[test]
    fn malformed_headers_are_violations() {
        let long_ping = frame(0x89, &[0; 126]);
        expect_violation(&[0x82, 0x01, b'x'], Violation::NotMasked);
        expect_violation(&frame(0xC2, b""), Violation::ReservedBits);
        expect_violation(&frame(0x83, b""), Violation::UnknownOpcode);
        expect_violation(&frame(0x8B, b""), Violation::UnknownOpcode);
        expect_violation(&frame(0x09, b""), Violation::ControlFrame);
        expect_violation(&long_ping, Violation::ControlFrame);
        expect_violation(&frame(0x80, b""), Violation::NothingToContinue);
        let nested = [frame(0x02, b""), frame(0x82, b"")].concat();
        expect_violation(&nested, Violation::MessageInsideMessage);
        expect_violation(&[0x82, 0xFE, 0, 125], Violation::LengthEncoding);
        expect_violation(
            &[0x82, 0xFF, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF],
            Violation::LengthEncoding,
        );
        expect_violation(
            &[0x82, 0xFF, 0x80, 0, 0, 0, 0, 0, 0, 0],
            Violation::LengthEncoding,
        );
    }

    #[test]
    fn close_frame_ends_the_payload() {
        let bytes = [
            frame(0x88, &[0x03, 0xE8, b'b', b'y', b'e']),
            frame(0x82, b"late"),
        ]
        .concat();

        assert_eq!(decode(&bytes), (Vec::new(), Some(End::Close(Some(1000)))));
        assert_eq!(decode(&frame(0x88, b"")).1, Some(End::Close(None)));
        expect_violation(&frame(0x88, b"x"), Violation::CloseCode);
        expect_violation(&frame(0x88, &1005_u16.to_be_bytes()), Violation::CloseCode);
    }

    #[test]
    fn the_last_ping_between_fragments_is_kept_for_an_answer() {
        let mut data = [
            frame(0x02, b"one"),
            frame(0x89, b"first"),
            frame(0x89, b"second"),
            frame(0x8A, b"pong"),
            frame(0x80, b"two"),
        ]
        .concat();
        let mut decoder = Decoder::default();

        let length = decoder.decode(&mut data);

        assert_eq!(&data[..length], b"onetwo");
        assert_eq!(decoder.take_ping().unwrap().as_slice(), b"second");
        assert!(decoder.take_ping().is_none());
    }

    #[test]
    fn lengths_are_written_in_the_shortest_form() {
        assert_eq!(binary_header(125).as_slice(), [0x82, 125]);
        assert_eq!(binary_header(126).as_slice(), [0x82, 126, 0, 126]);
        assert_eq!(binary_header(65_535).as_slice(), [0x82, 126, 0xFF, 0xFF]);
        assert_eq!(
            binary_header(65_536).as_slice(),
            [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]
        );
    }

    proptest! {
        #[test]
        fn any_split_of_the_bytes_gives_the_same_payload(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..6),
            split in 1_usize..40,
        ) {
            let mut bytes = Vec::new();
            for payload in &payloads {
                bytes.extend(frame(0x82, payload));
                bytes.extend(frame(0x89, b"ping"));
            }
            let mut decoder = Decoder::default();
            let mut decoded = Vec::new();

            for part in bytes.chunks_mut(split) {
                let length = decoder.decode(part);
                decoded.extend_from_slice(&part[..length]);
            }

            prop_assert_eq!(decoded, payloads.concat());
            prop_assert_eq!(decoder.end(), None);
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 0..400),
            split in 1_usize..40,
        ) {
            let mut decoder = Decoder::default();
            for part in bytes.chunks_mut(split) {
                let length = decoder.decode(part);
                prop_assert!(length <= part.len());
            }
        }
    }
}
