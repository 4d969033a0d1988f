//! From frames to items and signals.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::store::{LogPosition, read_log_op};

impl Frame {
    /// Copies what it holds, so that nothing keeps `bytes` alive.
    ///
    /// # Errors
    /// [`Malformed`] if it was not made by [`seal`] of this version.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(bytes);
        let checksum = reader.u64().ok_or(Malformed::Damaged)?;
        if checksum != xxh3_64(reader.0) {
            return Err(Malformed::Damaged);
        }
        let (version, flags, from) = reader.beginning().ok_or(Malformed::Damaged)?;
        if version != VERSION {
            return Err(Malformed::Version { from, version });
        }
        let (header, contents) =
            Self::read_rest(&mut reader, flags, from).ok_or(Malformed::Contents { from })?;
        Ok(Self {
            header,
            contents,
            bytes: bytes.len(),
        })
    }

    fn read_rest(reader: &mut Reader<'_>, flags: u8, from: u32) -> Option<(Header, Vec<Content>)> {
        let header = Header {
            from,
            stream: Stream::from_bit(flags & FLAG_TO_ALL != 0),
            sequence: reader.u64()?,
            stamp: Stamp {
                hlc: reader.u64()?,
                durable_hlc: reader.u64()?,
                store_ok: flags & FLAG_STORE_OK != 0,
            },
        };
        let mut contents = Vec::with_capacity(Reader(reader.0).count());
        let mut last_publisher = Arc::default();
        while !reader.0.is_empty() {
            contents.extend(Reader(reader.bytes()?).content(&mut last_publisher)?);
        }
        Some((header, contents))
    }
}

/// Takes a frame apart; `None` is what makes no sense.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    /// How many `bytes` there are.
    fn count(mut self) -> usize {
        let mut count = 0;
        while self.bytes().is_some() {
            count += 1;
        }
        count
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// Most often the same as `last`.
    fn shared_text(&mut self, last: &mut Arc<str>) -> Option<Arc<str>> {
        let text = self.text()?;
        if **last != *text {
            *last = text.into();
        }
        Some(last.clone())
    }

    /// Asks for no memory before the members are seen to be there.
    fn list<T>(&mut self, mut member: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()?;
        let mut members = Vec::new();
        for _ in 0..count {
            members.push(member(self)?);
        }
        Some(members)
    }

    /// Version, flags and sender.
    fn beginning(&mut self) -> Option<(u8, u8, u32)> {
        Some((self.u8()?, self.u8()?, self.u32()?))
    }

    fn session(&mut self) -> Option<SessionId> {
        self.array().map(SessionId)
    }

    fn message_id(&mut self) -> Option<MessageId> {
        Some(MessageId {
            hlc: self.u64()?,
            node: self.u32()?,
            index: self.u16()?,
        })
    }

    fn message(&mut self) -> Option<Message> {
        Message::from_bytes(self.bytes()?).ok()
    }

    fn filter(&mut self) -> Option<SubscriptionFilter> {
        SubscriptionFilter::parse(self.text()?).ok()
    }

    fn identifiers(&mut self, flags: u8) -> Option<Option<Arc<[u32]>>> {
        if flags & DELIVERY_IDENTIFIERS == 0 {
            return Some(None);
        }
        Some(Some(self.list(Self::u32)?.into()))
    }

    fn entry(&mut self) -> Option<Entry> {
        let id = self.message_id()?;
        let flags = self.u8()?;
        Some(Entry {
            id,
            qos: QoS::from_bits(flags & DELIVERY_QOS)?,
            retain: flags & DELIVERY_RETAIN != 0,
            subscription_identifiers: self.identifiers(flags)?,
            message: self.message()?,
        })
    }

    fn chunk(&mut self) -> Option<Chunk> {
        let key = self.message_id()?;
        let entries = self.list(Self::entry)?;
        (!entries.is_empty()).then_some(Chunk { key, entries })
    }

    fn seat(&mut self) -> Option<Seat> {
        let (number, client_id) = (self.u64()?, self.text()?.into());
        let (since, window) = (self.u64()?, self.u16()?);
        let flags = self.u8()?;
        Some(Seat {
            number,
            client_id,
            since,
            window,
            maximum_qos: QoS::from_bits(flags & DELIVERY_QOS)?,
            retain_as_published: flags & DELIVERY_RETAIN != 0,
            identifier: match flags & DELIVERY_IDENTIFIERS {
                0 => None,
                _ => Some(self.u32()?),
            },
            begun: self.list(Self::message_id)?,
            held: self.list(Self::message_id)?,
            settled: self.list(Self::message_id)?,
        })
    }

    fn numbers(&mut self) -> Option<Vec<(u32, u64)>> {
        self.list(|reader| Some((reader.u32()?, reader.u64()?)))
    }

    fn range(&mut self) -> Option<(Stream, u64, u64)> {
        let stream = Stream::from_bit(self.u8()? & FLAG_TO_ALL != 0);
        Some((stream, self.u64()?, self.u64()?))
    }

    /// Nothing in it if it is of a later version.
    fn content(&mut self, last_publisher: &mut Arc<str>) -> Option<Option<Content>> {
        let item = match self.u8()? {
            DELIVER => Item::Deliver {
                session: self.session()?,
                chunk: self.chunk()?,
            },
            STORED => Item::Stored {
                session: self.session()?,
                key: self.message_id()?,
            },
            PASS => {
                let session = self.session()?;
                let flags = self.u8()?;
                Item::Pass {
                    session,
                    qos: QoS::from_bits(flags & DELIVERY_QOS)?,
                    retain: flags & DELIVERY_RETAIN != 0,
                    subscription_identifiers: self.identifiers(flags)?,
                    message: self.message()?,
                }
            }
            PUBLISH => Item::Publish {
                publisher: self.shared_text(last_publisher)?,
                message: self.message()?,
            },
            OWN => Item::Own {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
                session: match self.u8()? {
                    0 => None,
                    _ => Some(self.session()?),
                },
            },
            OWN_ACK => Item::OwnAck {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
            },
            TAKEN => Item::Taken {
                client_id: self.text()?.into(),
                epoch: self.u64()?,
                in_flight: self
                    .list(|reader| Some((PacketId::new(reader.u16()?)?, reader.message_id()?)))?,
                will_discarded: self.u8()? != 0,
            },
            DISOWN => Item::Disown {
                session: self.session()?,
                epoch: self.u64()?,
            },
            ROUTE => Item::Route {
                reset: self.u8()? != 0,
                add: self.list(Self::filter)?,
                remove: self.list(Self::filter)?,
            },
            KICK => Item::Kick {
                client_id: self.text()?.into(),
                reason: ReasonCode::from_byte(self.u8()?)?,
            },
            FIGURES => Item::Figures {
                name: self.text()?.into(),
                figures: self.list(Self::u64)?,
            },
            LOG => Item::Log(LogEntry {
                position: LogPosition {
                    node: self.u32()?,
                    entry: self.u64()?,
                },
                // Of another version there may be none, or some that this one does not know.
                ops: self
                    .list(|reader| read_log_op(reader.bytes()?).ok())
                    .unwrap_or_default(),
            }),
            ASK => Item::Ask {
                number: self.u64()?,
            },
            ANSWER => Item::Answer {
                number: self.u64()?,
            },
            OFFER => Item::Offer {
                session: self.session()?,
                chunk: self.chunk()?,
            },
            DECLINE => Item::Decline {
                session: self.session()?,
                key: self.message_id()?,
            },
            ACKNOWLEDGE => Item::Acknowledge {
                session: self.session()?,
                key: self.message_id()?,
                ids: self.list(Self::message_id)?,
            },
            DECIDE => Item::Decide {
                written: self.list(|reader| Some((reader.session()?, reader.message_id()?)))?,
            },
            DISPATCH => Item::Dispatch {
                group: self.filter()?,
                session: self.session()?,
                epoch: self.u64()?,
            },
            SEATS => Item::Seats {
                session: self.session()?,
                epoch: self.u64()?,
                seats: self.list(Self::seat)?,
            },
            SEAT => Item::Seat {
                session: self.session()?,
                epoch: self.u64()?,
                seat: self.seat()?,
            },
            UNSEAT => Item::Unseat {
                session: self.session()?,
                number: self.u64()?,
                begun: self.list(Self::message_id)?,
                finished: self.list(Self::message_id)?,
                has_left: self.u8()? != 0,
            },
            GIVE => Item::Give {
                session: self.session()?,
                epoch: self.u64()?,
                seat: self.u64()?,
                entry: self.entry()?,
            },
            SETTLED => Item::Settled {
                session: self.session()?,
                seat: self.u64()?,
                ids: self.list(Self::message_id)?,
            },
            RING => Item::Ring {
                session: self.session()?,
            },
            kind => return self.signal(kind),
        };
        Some(Some(Content::Item(item)))
    }

    fn signal(&mut self, kind: u8) -> Option<Option<Content>> {
        let signal = match kind {
            WANT_MARK => Signal::WantMark { hlc: self.u64()? },
            BEAT => Signal::Beat {
                sent: self.numbers()?,
                received: match self.0 {
                    // It was sent by a version that says nothing of it.
                    [] => Vec::new(),
                    _ => self.numbers()?,
                },
            },
            NACK => {
                let (stream, first, last) = self.range()?;
                Signal::Nack {
                    stream,
                    first,
                    last,
                }
            }
            GONE => {
                let (stream, first, last) = self.range()?;
                Signal::Gone {
                    stream,
                    first,
                    last,
                }
            }
            RECEIVED => Signal::Received { last: self.u64()? },
            _ => return Some(None),
        };
        Some(Some(Content::Signal(signal)))
    }
}
