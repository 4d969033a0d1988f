//! What goes through a frame comes out as it was; what is none is refused.

use bytes::{BufMut, Bytes};
use proptest::collection::vec;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::encode::{put_length, put_sized};
use super::*;
use crate::mqtt::message::MessageParts;
use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::store::{LogAction, LogOp, LogPosition, Owner};

fn qos() -> impl Strategy<Value = QoS> {
    prop_oneof![
        Just(QoS::AtMostOnce),
        Just(QoS::AtLeastOnce),
        Just(QoS::ExactlyOnce)
    ]
}

fn message() -> impl Strategy<Value = Message> {
    (
        "[a-z/]{0,9}",
        qos(),
        any::<bool>(),
        any::<Option<u64>>(),
        vec(any::<u8>(), 0..40),
    )
        .prop_map(|(topic, qos, retain, expires_at, payload)| {
            Message::new(MessageParts {
                topic: &topic,
                qos,
                retain,
                expires_at,
                properties: &[],
                payload: &payload,
            })
        })
}

fn message_id() -> impl Strategy<Value = MessageId> {
    any::<(u64, u32, u16)>().prop_map(|(hlc, node, index)| MessageId { hlc, node, index })
}

fn session() -> impl Strategy<Value = SessionId> {
    any::<[u8; 12]>().prop_map(SessionId)
}

fn identifiers() -> impl Strategy<Value = Option<Arc<[u32]>>> {
    any::<Option<Vec<u32>>>().prop_map(|identifiers| identifiers.map(Arc::from))
}

fn entry() -> impl Strategy<Value = Entry> {
    (message_id(), qos(), any::<bool>(), identifiers(), message()).prop_map(
        |(id, qos, retain, subscription_identifiers, message)| Entry {
            id,
            qos,
            retain,
            subscription_identifiers,
            message,
        },
    )
}

fn client_id() -> impl Strategy<Value = Arc<str>> {
    "\\PC{0,12}".prop_map(Arc::from)
}

fn filters() -> impl Strategy<Value = Vec<SubscriptionFilter>> {
    let filter =
        "([$]share/g/)?[a-z+]/#".prop_map(|filter| SubscriptionFilter::parse(&filter).unwrap());
    vec(filter, 0..4)
}

fn log_op() -> impl Strategy<Value = LogOp> {
    let filter = || filters().prop_filter_map("one", |mut filters| filters.pop());
    let options = (qos(), any::<bool>(), any::<bool>());
    let options =
        options.prop_map(
            |(maximum_qos, no_local, retain_as_published)| SubscribeOptions {
                maximum_qos,
                no_local,
                retain_as_published,
                retain_handling: RetainHandling::SendIfNew,
            },
        );
    let subscribe = (client_id(), filter(), options, any::<Option<u32>>());
    let action = prop_oneof![
        subscribe.prop_map(|(client_id, filter, options, identifier)| {
            LogAction::Subscribe {
                owner: Owner::Client(client_id),
                filter,
                options,
                identifier,
            }
        }),
        filter().prop_map(LogAction::Unsubscribe),
        filter().prop_map(LogAction::OpenGroup),
        Just(LogAction::End),
    ];
    (session(), any::<u64>(), action).prop_map(|(session, epoch, action)| LogOp {
        session,
        epoch,
        action,
    })
}

fn message_ids() -> impl Strategy<Value = Vec<MessageId>> {
    vec(message_id(), 0..4)
}

fn seat() -> impl Strategy<Value = Seat> {
    let who = (any::<u64>(), client_id(), any::<u64>(), any::<u16>());
    let terms = (qos(), any::<bool>(), any::<Option<u32>>());
    let messages = (message_ids(), message_ids(), message_ids());
    (who, terms, messages).prop_map(|(who, terms, (begun, held, settled))| {
        let (number, client_id, since, window) = who;
        let (maximum_qos, retain_as_published, identifier) = terms;
        Seat {
            number,
            client_id,
            since,
            window,
            maximum_qos,
            retain_as_published,
            identifier,
            begun,
            held,
            settled,
        }
    })
}

fn of_share_group() -> impl Strategy<Value = Item> {
    let group = "[$]share/g/[a-z+]/#";
    prop_oneof![
        (group, session(), any::<u64>()).prop_map(|(group, session, epoch)| Item::Dispatch {
            group: SubscriptionFilter::parse(&group).unwrap(),
            session,
            epoch,
        }),
        (session(), any::<u64>(), vec(seat(), 0..3)).prop_map(|(session, epoch, seats)| {
            Item::Seats {
                session,
                epoch,
                seats,
            }
        }),
        (session(), any::<u64>(), seat()).prop_map(|(session, epoch, seat)| Item::Seat {
            session,
            epoch,
            seat
        }),
        (
            session(),
            any::<u64>(),
            message_ids(),
            message_ids(),
            any::<bool>()
        )
            .prop_map(|(session, number, begun, finished, has_left)| {
                Item::Unseat {
                    session,
                    number,
                    begun,
                    finished,
                    has_left,
                }
            }),
        (session(), any::<u64>(), any::<u64>(), entry()).prop_map(
            |(session, epoch, seat, entry)| Item::Give {
                session,
                epoch,
                seat,
                entry,
            }
        ),
        (session(), any::<u64>(), message_ids()).prop_map(|(session, seat, ids)| Item::Settled {
            session,
            seat,
            ids
        }),
    ]
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        of_share_group(),
        (session(), message_id(), vec(entry(), 1..4)).prop_map(|(session, key, entries)| {
            Item::Deliver {
                session,
                chunk: Chunk { key, entries },
            }
        }),
        (session(), message_id()).prop_map(|(session, key)| Item::Stored { session, key }),
        (session(), qos(), any::<bool>(), identifiers(), message()).prop_map(
            |(session, qos, retain, subscription_identifiers, message)| Item::Pass {
                session,
                qos,
                retain,
                subscription_identifiers,
                message,
            }
        ),
        (message(), client_id())
            .prop_map(|(message, publisher)| Item::Publish { message, publisher }),
        (client_id(), proptest::option::of(session()), any::<u64>()).prop_map(
            |(client_id, session, epoch)| Item::Own {
                client_id,
                session,
                epoch,
            }
        ),
        (client_id(), any::<u64>())
            .prop_map(|(client_id, epoch)| Item::OwnAck { client_id, epoch }),
        (
            client_id(),
            any::<u64>(),
            vec(
                (
                    (1..=u16::MAX).prop_map(|id| PacketId::new(id).unwrap()),
                    message_id()
                ),
                0..4
            ),
            any::<bool>()
        )
            .prop_map(|(client_id, epoch, in_flight, will_discarded)| {
                Item::Taken {
                    client_id,
                    epoch,
                    in_flight,
                    will_discarded,
                }
            }),
        (session(), any::<u64>()).prop_map(|(session, epoch)| Item::Disown { session, epoch }),
        (any::<bool>(), filters(), filters()).prop_map(|(reset, add, remove)| Item::Route {
            reset,
            add,
            remove
        }),
        (any::<u32>(), any::<u64>(), vec(log_op(), 0..3)).prop_map(|(node, entry, ops)| {
            Item::Log(LogEntry {
                position: LogPosition { node, entry },
                ops,
            })
        }),
        client_id().prop_map(|client_id| Item::Kick {
            client_id,
            reason: ReasonCode::ServerMoved,
        }),
        (".{0,9}", vec(any::<u64>(), 0..4)).prop_map(|(name, figures)| Item::Figures {
            name: name.into(),
            figures,
        }),
        any::<u64>().prop_map(|number| Item::Ask { number }),
        any::<u64>().prop_map(|number| Item::Answer { number }),
        (session(), message_id(), vec(entry(), 1..4)).prop_map(|(session, key, entries)| {
            Item::Offer {
                session,
                chunk: Chunk { key, entries },
            }
        }),
        (session(), message_id()).prop_map(|(session, key)| Item::Decline { session, key }),
        (session(), message_id(), vec(message_id(), 0..4))
            .prop_map(|(session, key, ids)| Item::Acknowledge { session, key, ids }),
        vec((session(), message_id()), 0..4).prop_map(|written| Item::Decide { written }),
        session().prop_map(|session| Item::Ring { session }),
    ]
}

fn stream() -> impl Strategy<Value = Stream> {
    any::<bool>().prop_map(Stream::from_bit)
}

fn numbers() -> impl Strategy<Value = Vec<(u32, u64)>> {
    vec(any::<(u32, u64)>(), 0..4)
}

fn signal() -> impl Strategy<Value = Signal> {
    let range = || (stream(), any::<u64>(), any::<u64>());
    prop_oneof![
        any::<u64>().prop_map(|hlc| Signal::WantMark { hlc }),
        (numbers(), numbers()).prop_map(|(sent, received)| Signal::Beat { sent, received }),
        any::<u64>().prop_map(|last| Signal::Received { last }),
        range().prop_map(|(stream, first, last)| Signal::Nack {
            stream,
            first,
            last
        }),
        range().prop_map(|(stream, first, last)| Signal::Gone {
            stream,
            first,
            last
        }),
    ]
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        item().prop_map(Content::Item),
        signal().prop_map(Content::Signal)
    ]
}

fn header() -> impl Strategy<Value = Header> {
    (
        any::<u32>(),
        stream(),
        any::<u64>(),
        any::<(u64, u64, bool)>(),
    )
        .prop_map(
            |(from, stream, sequence, (hlc, durable_hlc, store_ok))| Header {
                from,
                stream,
                sequence,
                stamp: Stamp {
                    hlc,
                    durable_hlc,
                    store_ok,
                },
            },
        )
}

fn frame_of(header: Header, contents: &[Content]) -> Bytes {
    let mut frame = begin();
    for content in contents {
        match content {
            Content::Item(item) => item.put(&mut frame),
            Content::Signal(signal) => signal.put(&mut frame),
        }
    }
    seal(frame, header)
}

/// With a checksum that fits, as damage on the way would never have.
fn checked(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() > CHECKSUM_BYTES {
        let checksum = xxh3_64(&bytes[CHECKSUM_BYTES..]);
        bytes[..CHECKSUM_BYTES].copy_from_slice(&checksum.to_be_bytes());
    }
    bytes
}

#[test]
fn another_version_is_refused_by_name() {
    let header = Header {
        from: 7,
        stream: Stream::Direct,
        sequence: 1,
        stamp: Stamp::default(),
    };
    let mut bytes = seal(begin(), header).to_vec();
    bytes[CHECKSUM_BYTES] = 9;

    let malformed = Frame::read(&checked(bytes)).unwrap_err();
    assert_eq!(
        malformed,
        Malformed::Version {
            from: 7,
            version: 9
        }
    );
}

#[test]
fn what_a_later_version_adds_is_skipped() {
    let header = Header {
        from: 7,
        stream: Stream::Direct,
        sequence: 1,
        stamp: Stamp::default(),
    };
    let mut frame = begin();
    put_sized(&mut frame, |to| to.put_slice(&[u8::MAX, 1, 2, 3]));
    put_sized(&mut frame, |to| {
        Item::Ask { number: 5 }.put_fields(to);
        to.put_u64(6);
    });
    Signal::WantMark { hlc: 9 }.put(&mut frame);

    let contents = Frame::read(&seal(frame, header)).unwrap().contents;
    let expected = [
        Content::Item(Item::Ask { number: 5 }),
        Content::Signal(Signal::WantMark { hlc: 9 }),
    ];
    assert_eq!(contents, expected);
}

#[test]
fn beat_of_an_earlier_version_says_nothing_of_what_was_received() {
    let header = Header {
        from: 7,
        stream: Stream::All,
        sequence: 1,
        stamp: Stamp::default(),
    };
    let mut frame = begin();
    put_sized(&mut frame, |to| {
        to.put_u8(BEAT);
        put_length(to, 1);
        to.put_u32(8);
        to.put_u64(9);
    });

    let contents = Frame::read(&seal(frame, header)).unwrap().contents;
    let beat = Signal::Beat {
        sent: vec![(8, 9)],
        received: Vec::new(),
    };
    assert_eq!(contents, [Content::Signal(beat)]);
}

proptest! {
    #[test]
    fn frame_reads_back(header in header(), contents in vec(content(), 0..6)) {
        let bytes = frame_of(header, &contents);

        let frame = Frame::read(&bytes).unwrap();
        prop_assert_eq!(frame, Frame { header, contents, bytes: bytes.len() });
    }

    #[test]
    fn damaged_frame_is_refused(
        contents in vec(content(), 0..4),
        header in header(),
        at in any::<proptest::sample::Index>(),
        flipped in 1..=u8::MAX,
    ) {
        let mut bytes = frame_of(header, &contents).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flipped;

        prop_assert_eq!(Frame::read(&bytes), Err(Malformed::Damaged));
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = Frame::read(&bytes);
        let _ = Frame::read(&checked(bytes));
    }

    #[test]
    fn nonsense_with_a_right_checksum_is_read_without_panic(
        contents in vec(content(), 1..4),
        header in header(),
        at in any::<proptest::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut bytes = frame_of(header, &contents).to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = Frame::read(&checked(bytes.clone()));
        bytes.truncate(cut.index(bytes.len()));
        let _ = Frame::read(&checked(bytes));
    }
}
