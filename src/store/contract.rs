//! What every [`Store`] must do, as tests that each adapter instantiates with [`store_contract!`].
//!
//! A case gets a [`Fixture`]: a store, and a way to see what a restart would find.

use std::sync::Arc;

use super::{
    Change, Chunk, Entry, InboxRange, InboxSummary, MessageId, Messages, OutgoingExchange, Owner,
    Retained, SessionId, SessionRecord, Store, Stored, StoredSubscription, WillRecord,
};
use crate::mqtt::message::MessageParts;
use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::mqtt::{Message, PacketId, ProtocolVersion, QoS, SubscriptionFilter};

/// A store under test.
pub(crate) trait Fixture: Sized {
    /// An empty store.
    async fn new() -> Self;
    fn store(&self) -> &dyn Store;
    /// The same data in a store that has just been opened, where data outlives a store.
    async fn reopen(self) -> Self;
}

/// Makes a test of every case for the [`Fixture`] `$fixture`.
macro_rules! store_contract {
    ($fixture:ty) => {
        $crate::store::contract::store_contract!(
            $fixture:
            empty_store_is_empty,
            session_is_saved_and_replaced,
            session_keeps_every_field,
            client_identifiers_are_any_text,
            group_owns_a_session,
            subscriptions_are_made_replaced_and_removed,
            longest_filters_are_kept_apart,
            identifiers_await_release,
            exchanges_are_saved_replaced_and_ended,
            retained_messages_are_replaced_and_cleared,
            chunk_keeps_every_field,
            chunks_are_read_in_key_order_across_flushes,
            range_is_half_open,
            range_stops_at_bytes_max_but_never_before_the_first_chunk,
            empty_or_inverted_range_is_empty,
            chunk_is_replaced_by_one_with_fewer_entries,
            big_chunk_is_read_whole,
            inboxes_are_separate,
            ended_session_is_gone_at_once,
            ended_session_stays_gone_whatever_is_written_for_it,
            new_incarnation_inherits_nothing,
            last_change_of_a_write_wins,
            changes_may_be_applied_twice,
            removing_what_is_not_there_does_nothing,
            inbox_is_summarised,
            last_clock_value_is_found,
            many_sessions_are_loaded,
            empty_write_succeeds
        );
    };
    ($fixture:ty: $($case:ident),+) => {
        $(
            #[tokio::test]
            async fn $case() {
                $crate::store::contract::$case::<$fixture>().await;
            }
        )+
    };
}
pub(crate) use store_contract;

pub(crate) fn session(number: u32) -> SessionId {
    let mut id = [0xAB; 12];
    id[4..8].copy_from_slice(&number.to_be_bytes());
    SessionId(id)
}

pub(crate) fn record(session: SessionId) -> SessionRecord {
    SessionRecord {
        owner: Owner::Client(format!("{session:?}").into()),
        session,
        version: ProtocolVersion::V5,
        connected: true,
        expiry_interval: 3600,
        ends_at: None,
        will: None,
        clock: 0,
    }
}

pub(crate) fn save(session: SessionId) -> Change {
    Change::SaveSession(Box::new(record(session)))
}

pub(crate) fn filter(text: &str) -> SubscriptionFilter {
    SubscriptionFilter::parse(text).unwrap()
}

pub(crate) fn subscribe(session: SessionId, text: &str) -> Change {
    Change::Subscribe {
        session,
        filter: filter(text),
        options: options(QoS::AtLeastOnce),
        identifier: None,
    }
}

fn options(maximum_qos: QoS) -> SubscribeOptions {
    SubscribeOptions {
        maximum_qos,
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::SendAtSubscribe,
    }
}

pub(crate) fn message(topic: &str, payload: &[u8]) -> Message {
    Message::new(MessageParts {
        topic,
        qos: QoS::AtLeastOnce,
        payload,
        ..MessageParts::default()
    })
}

fn at(hlc: u64) -> MessageId {
    MessageId {
        hlc,
        node: 1,
        index: 0,
    }
}

fn entry(id: MessageId, payload: &[u8]) -> Entry {
    Entry {
        id,
        qos: QoS::AtLeastOnce,
        retain: false,
        subscription_identifiers: None,
        message: message("topic", payload),
    }
}

/// A chunk of `entries` messages, all different.
pub(crate) fn chunk(hlc: u64, entries: u16) -> Chunk {
    let ids = (0..entries).map(|index| MessageId { index, ..at(hlc) });
    Chunk {
        key: at(hlc),
        entries: ids
            .map(|id| entry(id, format!("{id:?}").as_bytes()))
            .collect(),
    }
}

pub(crate) fn enqueue(session: SessionId, chunk: &Chunk) -> Change {
    Change::Enqueue {
        session,
        chunk: chunk.clone(),
        guard: None,
    }
}

/// Retains a message; of the same topic the one with the highest `hlc` counts.
fn retain(retained: Retained, hlc: u64) -> Change {
    let at = at(hlc);
    Change::Retain { retained, at }
}

fn clear(topic: &str, hlc: u64) -> Change {
    Change::ClearRetained {
        topic: topic.into(),
        at: at(hlc),
    }
}

fn bytes(chunks: &[Chunk]) -> u64 {
    let entries = chunks.iter().flat_map(|chunk| &chunk.entries);
    entries.map(|entry| entry.message.len() as u64).sum()
}

fn packet_id(value: u16) -> PacketId {
    PacketId::new(value).unwrap()
}

pub(crate) async fn write(store: &dyn Store, changes: impl IntoIterator<Item = Change>) {
    store
        .write(Arc::new(changes.into_iter().collect()), Messages::Present)
        .await
        .unwrap();
}

pub(crate) fn whole_inbox(session: SessionId) -> InboxRange {
    InboxRange {
        session,
        from: MessageId::MIN,
        before: MessageId::MAX,
        bytes_max: usize::MAX,
    }
}

pub(crate) async fn read_all(store: &dyn Store, session: SessionId) -> Vec<Chunk> {
    store.read_inbox(whole_inbox(session)).await.unwrap()
}

/// What is stored, each list in a fixed order.
pub(crate) async fn load(store: &dyn Store) -> Stored {
    let mut stored = store.load().await.unwrap();
    stored.sessions.sort_by_key(|stored| stored.record.session);
    for session in &mut stored.sessions {
        session
            .subscriptions
            .sort_by(|a, b| a.filter.cmp(&b.filter));
        session.awaiting_release.sort();
        session.exchanges.sort_by_key(|exchange| exchange.packet_id);
    }
    stored
        .retained
        .sort_by(|a, b| a.message.topic().cmp(b.message.topic()));
    stored
}

fn records(stored: &Stored) -> Vec<&SessionRecord> {
    stored
        .sessions
        .iter()
        .map(|stored| &stored.record)
        .collect()
}

/// Writes `changes`, and checks the same before and after the store is opened again.
async fn check<F: Fixture>(changes: impl IntoIterator<Item = Change>, check: impl Fn(&Stored)) {
    let fixture = F::new().await;
    write(fixture.store(), changes).await;
    check(&load(fixture.store()).await);
    let fixture = fixture.reopen().await;
    check(&load(fixture.store()).await);
}

pub(crate) async fn empty_store_is_empty<F: Fixture>() {
    check::<F>([], |stored| {
        assert!(stored.sessions.is_empty());
        assert!(stored.retained.is_empty());
        assert_eq!(stored.last_hlc, 0);
    })
    .await;
}

pub(crate) async fn session_is_saved_and_replaced<F: Fixture>() {
    let offline = SessionRecord {
        connected: false,
        ends_at: Some(1_700_000_000_000),
        ..record(session(1))
    };
    let changes = [
        save(session(1)),
        subscribe(session(1), "a"),
        Change::SaveSession(Box::new(offline.clone())),
    ];
    check::<F>(changes, |stored| {
        assert_eq!(records(stored), [&offline]);
        assert_eq!(stored.sessions[0].subscriptions.len(), 1);
    })
    .await;
}

pub(crate) async fn session_keeps_every_field<F: Fixture>() {
    let will = WillRecord {
        message: Message::new(MessageParts {
            topic: "will",
            qos: QoS::ExactlyOnce,
            retain: true,
            properties: &[&[0x01, 0x01]],
            payload: &[0, 0xFF],
            ..MessageParts::default()
        }),
        message_expiry_interval: Some(0),
        delay_interval: 30,
        due_at: Some(0),
        user_name: Some("".into()),
    };
    let bare = WillRecord {
        message_expiry_interval: None,
        due_at: None,
        user_name: None,
        ..will.clone()
    };
    let expected = [
        SessionRecord {
            version: ProtocolVersion::V3_1,
            will: Some(will.clone()),
            ..record(session(1))
        },
        SessionRecord {
            version: ProtocolVersion::V3_1_1,
            will: Some(bare),
            ..record(session(2))
        },
        SessionRecord {
            connected: false,
            expiry_interval: u32::MAX,
            ends_at: Some(u64::MAX),
            will: Some(WillRecord {
                user_name: Some("Zoë".into()),
                ..will
            }),
            ..record(session(3))
        },
    ];
    let changes = expected
        .clone()
        .map(|record| Change::SaveSession(Box::new(record)));
    check::<F>(changes, |stored| {
        assert_eq!(records(stored), expected.each_ref())
    })
    .await;
}

pub(crate) async fn client_identifiers_are_any_text<F: Fixture>() {
    let longest = "x".repeat(65_535);
    let expected: Vec<_> = [
        "",
        "a/b$#+",
        "\u{10FFFF}",
        "Ωμέγα 🚀",
        "\u{1}\n\"'",
        &longest,
    ]
    .iter()
    .zip(1..)
    .map(|(&client_id, number)| SessionRecord {
        owner: Owner::Client(client_id.into()),
        ..record(session(number))
    })
    .collect();
    let changes = expected
        .iter()
        .map(|record| Change::SaveSession(Box::new(record.clone())));
    check::<F>(changes, |stored| {
        assert_eq!(records(stored), expected.iter().collect::<Vec<_>>())
    })
    .await;
}

pub(crate) async fn group_owns_a_session<F: Fixture>() {
    let group = SessionRecord {
        owner: Owner::Group(filter("$share/gröup/a/+/#")),
        ..record(session(1))
    };
    check::<F>([Change::SaveSession(Box::new(group.clone()))], |stored| {
        assert_eq!(records(stored), [&group])
    })
    .await;
}

pub(crate) async fn subscriptions_are_made_replaced_and_removed<F: Fixture>() {
    let all_set = SubscribeOptions {
        maximum_qos: QoS::ExactlyOnce,
        no_local: true,
        retain_as_published: true,
        retain_handling: RetainHandling::DoNotSend,
    };
    let new_only = SubscribeOptions {
        retain_handling: RetainHandling::SendIfNew,
        ..options(QoS::AtMostOnce)
    };
    let make = |text: &str, options, identifier| Change::Subscribe {
        session: session(1),
        filter: filter(text),
        options,
        identifier,
    };
    let changes = [
        save(session(1)),
        make("a/#", options(QoS::AtLeastOnce), Some(7)),
        make("b", new_only, None),
        make(
            "$share/group/a/#",
            options(QoS::AtMostOnce),
            Some(268_435_455),
        ),
        make("gone", all_set, None),
        make("a/#", all_set, Some(1)),
        Change::Unsubscribe {
            session: session(1),
            filter: filter("gone"),
        },
    ];
    let stored_as = |text, options, identifier| StoredSubscription {
        filter: filter(text),
        options,
        identifier,
    };
    let mut expected = vec![
        stored_as(
            "$share/group/a/#",
            options(QoS::AtMostOnce),
            Some(268_435_455),
        ),
        stored_as("a/#", all_set, Some(1)),
        stored_as("b", new_only, None),
    ];
    expected.sort_by(|a, b| a.filter.cmp(&b.filter));
    check::<F>(changes, |stored| {
        assert_eq!(stored.sessions[0].subscriptions, expected)
    })
    .await;
}

pub(crate) async fn longest_filters_are_kept_apart<F: Fixture>() {
    let filters = ["a", "b"].map(|last| format!("{}{last}", "x".repeat(65_534)));
    let changes = [
        save(session(1)),
        subscribe(session(1), &filters[0]),
        subscribe(session(1), &filters[1]),
    ];
    check::<F>(changes, |stored| {
        let stored: Vec<_> = stored.sessions[0]
            .subscriptions
            .iter()
            .map(|stored| stored.filter.clone())
            .collect();
        assert_eq!(stored, filters.each_ref().map(|text| filter(text)));
    })
    .await;
}

pub(crate) async fn identifiers_await_release<F: Fixture>() {
    let await_release = |id| Change::AwaitRelease {
        session: session(1),
        packet_id: packet_id(id),
    };
    let changes = [
        save(session(1)),
        await_release(65_535),
        await_release(1),
        await_release(300),
        Change::Release {
            session: session(1),
            packet_id: packet_id(300),
        },
    ];
    let expected = [packet_id(1), packet_id(65_535)];
    check::<F>(changes, |stored| {
        assert_eq!(stored.sessions[0].awaiting_release, expected)
    })
    .await;
}

pub(crate) async fn exchanges_are_saved_replaced_and_ended<F: Fixture>() {
    let sent = |id| OutgoingExchange {
        packet_id: packet_id(id),
        inbox: session(9),
        message: MessageId {
            hlc: 5,
            node: u32::MAX,
            index: u16::MAX,
        },
        received: false,
    };
    let save_exchange = |exchange| Change::SaveExchange {
        session: session(1),
        exchange,
    };
    let received = OutgoingExchange {
        received: true,
        ..sent(2)
    };
    let changes = [
        save(session(1)),
        save_exchange(sent(1)),
        save_exchange(sent(2)),
        save_exchange(sent(3)),
        save_exchange(received),
        Change::EndExchange {
            session: session(1),
            packet_id: packet_id(3),
        },
    ];
    check::<F>(changes, |stored| {
        assert_eq!(stored.sessions[0].exchanges, [sent(1), received])
    })
    .await;
}

pub(crate) async fn retained_messages_are_replaced_and_cleared<F: Fixture>() {
    let retained = |topic: &str, payload: &[u8]| Retained {
        message: message(topic, payload),
        publisher: "publisher".into(),
    };
    let longest = "t".repeat(65_535);
    let changes = [
        retain(retained("a", b"old"), 1),
        retain(retained("a/b", &[0, 0xFF]), 2),
        retain(retained("gone", b"x"), 3),
        retain(retained(&longest, b"y"), 4),
        retain(retained("a", b"new"), 5),
        clear("gone", 6),
    ];
    let expected = [
        retained("a", b"new"),
        retained("a/b", &[0, 0xFF]),
        retained(&longest, b"y"),
    ];
    check::<F>(changes, |stored| assert_eq!(stored.retained, expected)).await;
}

pub(crate) async fn chunk_keeps_every_field<F: Fixture>() {
    let fixture = F::new().await;
    let every_byte: Vec<u8> = (0..=255).collect();
    let message = Message::new(MessageParts {
        topic: "κόσμε/🚀",
        qos: QoS::ExactlyOnce,
        retain: true,
        expires_at: Some(1_700_000_000_000),
        properties: &[&[0x01, 0x01], &[0x26, 0, 1, b'k', 0, 1, b'v']],
        payload: &every_byte,
    });
    let key = MessageId {
        hlc: u64::MAX - 1,
        node: u32::MAX,
        index: u16::MAX,
    };
    let mut entries = vec![
        Entry {
            id: key,
            qos: QoS::ExactlyOnce,
            retain: true,
            subscription_identifiers: Some([1, 268_435_455].into()),
            message,
        },
        entry(
            MessageId {
                hlc: u64::MAX,
                node: 0,
                index: 1,
            },
            b"",
        ),
    ];
    entries[1].subscription_identifiers = Some([].into());
    let expected = Chunk { key, entries };
    write(
        fixture.store(),
        [save(session(1)), enqueue(session(1), &expected)],
    )
    .await;

    assert_eq!(
        read_all(fixture.store(), session(1)).await,
        std::slice::from_ref(&expected)
    );
    let fixture = fixture.reopen().await;
    assert_eq!(read_all(fixture.store(), session(1)).await, [expected]);
}

pub(crate) async fn chunks_are_read_in_key_order_across_flushes<F: Fixture>() {
    let fixture = F::new().await;
    let keys = [
        MessageId {
            hlc: 1,
            node: 0,
            index: 0,
        },
        MessageId {
            hlc: 1,
            node: 0,
            index: 1,
        },
        MessageId {
            hlc: 1,
            node: 256,
            index: 0,
        },
        MessageId {
            hlc: 255,
            node: 0,
            index: 0,
        },
        MessageId {
            hlc: 256,
            node: 0,
            index: 0,
        },
        MessageId {
            hlc: 1 << 40,
            node: 0,
            index: 0,
        },
    ];
    write(fixture.store(), [save(session(1))]).await;
    for at in [3, 0, 5, 2, 4, 1] {
        let chunk = Chunk {
            key: keys[at],
            entries: vec![entry(keys[at], b"x")],
        };
        write(fixture.store(), [enqueue(session(1), &chunk)]).await;
    }

    let read: Vec<_> = read_all(fixture.store(), session(1))
        .await
        .iter()
        .map(|chunk| chunk.key)
        .collect();
    assert_eq!(read, keys);
}

pub(crate) async fn range_is_half_open<F: Fixture>() {
    let fixture = F::new().await;
    let chunks: Vec<_> = (1..=5).map(|hlc| chunk(hlc, 1)).collect();
    write(fixture.store(), [save(session(1))]).await;
    write(
        fixture.store(),
        chunks.iter().map(|chunk| enqueue(session(1), chunk)),
    )
    .await;
    let range = |from, before| InboxRange {
        from,
        before,
        ..whole_inbox(session(1))
    };

    assert_eq!(
        fixture
            .store()
            .read_inbox(range(at(2), at(4)))
            .await
            .unwrap(),
        chunks[1..3]
    );
    let after_second = MessageId { index: 1, ..at(2) };
    assert_eq!(
        fixture
            .store()
            .read_inbox(range(after_second, MessageId::MAX))
            .await
            .unwrap(),
        chunks[2..]
    );
    assert_eq!(
        fixture
            .store()
            .read_inbox(range(MessageId::MIN, at(1)))
            .await
            .unwrap(),
        []
    );
}

pub(crate) async fn range_stops_at_bytes_max_but_never_before_the_first_chunk<F: Fixture>() {
    let fixture = F::new().await;
    let chunks: Vec<_> = (1..=4).map(|hlc| chunk(hlc, 2)).collect();
    write(fixture.store(), [save(session(1))]).await;
    write(
        fixture.store(),
        chunks.iter().map(|chunk| enqueue(session(1), chunk)),
    )
    .await;
    let up_to = |bytes_max| InboxRange {
        bytes_max,
        ..whole_inbox(session(1))
    };
    let two = usize::try_from(bytes(&chunks[..2])).unwrap();

    assert_eq!(
        fixture.store().read_inbox(up_to(two)).await.unwrap(),
        chunks[..2]
    );
    assert_eq!(
        fixture.store().read_inbox(up_to(two - 1)).await.unwrap(),
        chunks[..1]
    );
    assert_eq!(
        fixture.store().read_inbox(up_to(0)).await.unwrap(),
        chunks[..1]
    );
}

pub(crate) async fn empty_or_inverted_range_is_empty<F: Fixture>() {
    let fixture = F::new().await;
    write(
        fixture.store(),
        [save(session(1)), enqueue(session(1), &chunk(2, 1))],
    )
    .await;
    let range = |from, before| InboxRange {
        from,
        before,
        ..whole_inbox(session(1))
    };

    assert_eq!(
        fixture
            .store()
            .read_inbox(range(at(2), at(2)))
            .await
            .unwrap(),
        []
    );
    assert_eq!(
        fixture
            .store()
            .read_inbox(range(at(3), at(1)))
            .await
            .unwrap(),
        []
    );
}

pub(crate) async fn chunk_is_replaced_by_one_with_fewer_entries<F: Fixture>() {
    let fixture = F::new().await;
    let (first, second) = (chunk(1, 3), chunk(2, 1));
    write(
        fixture.store(),
        [
            save(session(1)),
            enqueue(session(1), &first),
            enqueue(session(1), &second),
        ],
    )
    .await;
    let fewer = Chunk {
        key: first.key,
        entries: first.entries[2..].to_vec(),
    };
    write(fixture.store(), [enqueue(session(1), &fewer)]).await;

    let expected = [fewer, second];
    assert_eq!(read_all(fixture.store(), session(1)).await, expected);
    let fixture = fixture.reopen().await;
    assert_eq!(read_all(fixture.store(), session(1)).await, expected);
}

pub(crate) async fn big_chunk_is_read_whole<F: Fixture>() {
    let fixture = F::new().await;
    let payload: Vec<u8> = (0..3 << 19)
        .map(|at: u32| at.to_be_bytes()[3] ^ at.to_be_bytes()[2])
        .collect();
    let big = Chunk {
        key: at(1),
        entries: vec![entry(at(1), &payload), entry(at(2), &payload)],
    };
    write(
        fixture.store(),
        [save(session(1)), enqueue(session(1), &big)],
    )
    .await;

    let fixture = fixture.reopen().await;
    assert_eq!(read_all(fixture.store(), session(1)).await, [big]);
}

pub(crate) async fn inboxes_are_separate<F: Fixture>() {
    let fixture = F::new().await;
    let sessions = [session(0), session(1), session(u32::MAX)];
    write(fixture.store(), sessions.map(save)).await;
    write(
        fixture.store(),
        [
            enqueue(session(0), &chunk(9, 1)),
            enqueue(session(u32::MAX), &chunk(1, 1)),
        ],
    )
    .await;

    assert_eq!(read_all(fixture.store(), session(0)).await, [chunk(9, 1)]);
    assert_eq!(read_all(fixture.store(), session(1)).await, []);
    assert_eq!(
        read_all(fixture.store(), session(u32::MAX)).await,
        [chunk(1, 1)]
    );
}

/// One of everything that belongs to a session.
pub(crate) fn everything_of(session: SessionId) -> [Change; 5] {
    let exchange = OutgoingExchange {
        packet_id: packet_id(1),
        inbox: session,
        message: at(3),
        received: true,
    };
    [
        save(session),
        subscribe(session, "a/#"),
        enqueue(session, &chunk(3, 2)),
        Change::AwaitRelease {
            session,
            packet_id: packet_id(1),
        },
        Change::SaveExchange { session, exchange },
    ]
}

pub(crate) async fn ended_session_is_gone_at_once<F: Fixture>() {
    let fixture = F::new().await;
    write(fixture.store(), everything_of(session(1))).await;
    write(fixture.store(), everything_of(session(2))).await;
    write(fixture.store(), [Change::EndSession(session(1))]).await;

    assert_eq!(read_all(fixture.store(), session(1)).await, []);
    assert_eq!(read_all(fixture.store(), session(2)).await, [chunk(3, 2)]);
    assert_eq!(records(&load(fixture.store()).await), [&record(session(2))]);
    let fixture = fixture.reopen().await;
    assert_eq!(read_all(fixture.store(), session(1)).await, []);
    let stored = load(fixture.store()).await;
    assert_eq!(records(&stored), [&record(session(2))]);
    assert_eq!(stored.sessions[0].subscriptions.len(), 1);
    assert_eq!(stored.sessions[0].exchanges.len(), 1);
}

pub(crate) async fn ended_session_stays_gone_whatever_is_written_for_it<F: Fixture>() {
    let fixture = F::new().await;
    write(fixture.store(), everything_of(session(1))).await;
    let [_, late @ ..] = everything_of(session(1));
    write(
        fixture.store(),
        [Change::EndSession(session(1))]
            .into_iter()
            .chain(late.clone()),
    )
    .await;
    write(fixture.store(), late).await;

    assert_eq!(read_all(fixture.store(), session(1)).await, []);
    let fixture = fixture.reopen().await;
    assert!(load(fixture.store()).await.sessions.is_empty());
    assert_eq!(read_all(fixture.store(), session(1)).await, []);
}

pub(crate) async fn new_incarnation_inherits_nothing<F: Fixture>() {
    let (old, new) = (session(1), session(2));
    let renewed = SessionRecord {
        owner: record(old).owner,
        ..record(new)
    };
    let changes = everything_of(old).into_iter().chain([
        Change::EndSession(old),
        Change::SaveSession(Box::new(renewed.clone())),
    ]);
    check::<F>(changes, |stored| {
        assert_eq!(records(stored), [&renewed]);
        assert!(stored.sessions[0].subscriptions.is_empty());
        assert!(stored.sessions[0].exchanges.is_empty());
        assert!(stored.sessions[0].awaiting_release.is_empty());
        assert_eq!(stored.sessions[0].inbox, InboxSummary::default());
    })
    .await;
}

pub(crate) async fn last_change_of_a_write_wins<F: Fixture>() {
    let fixture = F::new().await;
    let (kept, gone) = (chunk(1, 1), chunk(2, 1));
    let unsubscribe = |text| Change::Unsubscribe {
        session: session(1),
        filter: filter(text),
    };
    let dequeue = |key| Change::Dequeue {
        session: session(1),
        key,
        guard: None,
    };
    let retained = Retained {
        message: message("a", b"x"),
        publisher: "p".into(),
    };
    let changes = [
        save(session(1)),
        subscribe(session(1), "gone"),
        unsubscribe("gone"),
        unsubscribe("kept"),
        subscribe(session(1), "kept"),
        enqueue(session(1), &gone),
        dequeue(gone.key),
        dequeue(kept.key),
        enqueue(session(1), &chunk(1, 3)),
        enqueue(session(1), &kept),
        retain(retained, 1),
        clear("a", 2),
    ];
    write(fixture.store(), changes).await;

    let fixture = fixture.reopen().await;
    let stored = load(fixture.store()).await;
    assert_eq!(stored.sessions[0].subscriptions.len(), 1);
    assert_eq!(stored.sessions[0].subscriptions[0].filter, filter("kept"));
    assert!(stored.retained.is_empty());
    assert_eq!(read_all(fixture.store(), session(1)).await, [kept]);
}

pub(crate) async fn changes_may_be_applied_twice<F: Fixture>() {
    let retain = |topic| {
        let message = message(topic, b"x");
        let publisher = "p".into();
        retain(Retained { message, publisher }, 1)
    };
    let set_up = everything_of(session(1))
        .into_iter()
        .chain(everything_of(session(2)))
        .chain([
            subscribe(session(1), "b"),
            enqueue(session(1), &chunk(4, 1)),
            retain("a"),
            retain("b"),
        ]);
    let take_down = [
        Change::Unsubscribe {
            session: session(1),
            filter: filter("b"),
        },
        Change::Dequeue {
            session: session(1),
            key: chunk(4, 1).key,
            guard: None,
        },
        Change::Release {
            session: session(1),
            packet_id: packet_id(1),
        },
        Change::EndExchange {
            session: session(1),
            packet_id: packet_id(1),
        },
        clear("b", 2),
        Change::EndSession(session(2)),
    ];
    // Each change twice in one write, and every write twice.
    let fixture = F::new().await;
    let twice = |change: Change| [change.clone(), change];
    let (set_up, take_down) = (
        set_up.flat_map(twice),
        take_down.into_iter().flat_map(twice),
    );
    for changes in [set_up.collect::<Vec<_>>(), take_down.collect()] {
        write(fixture.store(), changes.clone()).await;
        write(fixture.store(), changes).await;
    }

    let fixture = fixture.reopen().await;
    let stored = load(fixture.store()).await;
    assert_eq!(records(&stored), [&record(session(1))]);
    let only = &stored.sessions[0];
    assert_eq!(only.subscriptions.len(), 1);
    assert!(only.awaiting_release.is_empty());
    assert!(only.exchanges.is_empty());
    assert_eq!(stored.retained.len(), 1);
    assert_eq!(read_all(fixture.store(), session(1)).await, [chunk(3, 2)]);
}

pub(crate) async fn removing_what_is_not_there_does_nothing<F: Fixture>() {
    let changes = [
        save(session(1)),
        Change::Unsubscribe {
            session: session(1),
            filter: filter("a"),
        },
        Change::Dequeue {
            session: session(1),
            key: at(1),
            guard: None,
        },
        Change::Release {
            session: session(1),
            packet_id: packet_id(1),
        },
        Change::EndExchange {
            session: session(1),
            packet_id: packet_id(1),
        },
        Change::EndSession(session(2)),
        clear("a", 1),
    ];
    check::<F>(changes, |stored| {
        assert_eq!(records(stored), [&record(session(1))])
    })
    .await;
}

pub(crate) async fn inbox_is_summarised<F: Fixture>() {
    let chunks = [chunk(3, 2), chunk(5, 1), chunk(4, 4)];
    let changes = [
        save(session(1)),
        save(session(2)),
        enqueue(session(1), &chunk(1, 9)),
    ]
    .into_iter()
    .chain(chunks.iter().map(|chunk| enqueue(session(1), chunk)))
    .chain([Change::Dequeue {
        session: session(1),
        key: at(1),
        guard: None,
    }]);
    let expected = InboxSummary {
        head: Some(at(3)),
        messages: 7,
        bytes: bytes(&chunks),
    };
    check::<F>(changes, |stored| {
        assert_eq!(stored.sessions[0].inbox, expected);
        assert_eq!(stored.sessions[1].inbox, InboxSummary::default());
    })
    .await;
}

pub(crate) async fn last_clock_value_is_found<F: Fixture>() {
    let exchange = OutgoingExchange {
        packet_id: packet_id(1),
        inbox: session(1),
        message: at(80),
        received: true,
    };
    let waiting = [
        save(session(1)),
        save(session(2)),
        enqueue(session(1), &chunk(70, 1)),
        enqueue(session(2), &chunk(9, 1)),
    ];
    check::<F>(waiting.clone(), |stored| assert_eq!(stored.last_hlc, 70)).await;
    let exchanged = waiting.into_iter().chain([Change::SaveExchange {
        session: session(2),
        exchange,
    }]);
    check::<F>(exchanged, |stored| assert_eq!(stored.last_hlc, 80)).await;
}

pub(crate) async fn many_sessions_are_loaded<F: Fixture>() {
    let numbers = 0..2_000;
    let of = |number| {
        [
            save(session(number)),
            subscribe(session(number), "a"),
            enqueue(session(number), &chunk(u64::from(number) + 1, 1)),
        ]
    };
    check::<F>(numbers.clone().rev().flat_map(of), |stored| {
        assert_eq!(stored.sessions.len(), numbers.len());
        for (stored, number) in stored.sessions.iter().zip(numbers.clone()) {
            assert_eq!(stored.record, record(session(number)));
            assert_eq!(stored.subscriptions.len(), 1);
            assert_eq!(stored.inbox.head, Some(at(u64::from(number) + 1)));
            assert_eq!(stored.inbox.messages, 1);
        }
    })
    .await;
}

pub(crate) async fn empty_write_succeeds<F: Fixture>() {
    let fixture = F::new().await;
    write(fixture.store(), []).await;
}
