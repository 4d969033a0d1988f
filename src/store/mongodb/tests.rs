//! What only this adapter promises; the rest is in `store::contract`.

mod server;

use self::server::Server;
use super::held::{Held, Hold};
use super::*;
use crate::mqtt::message::MessageParts;
use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::mqtt::{Message, ProtocolVersion, QoS};
use crate::store::contract::{
    Fixture, chunk, enqueue, everything_of, filter, load, message, read_all, record, session,
    store_contract, subscribe,
};
use crate::store::{
    LogAction, LogEntry, LogOp, LogPosition, MessageId, Messages, Owner, Retained, SessionRecord,
    WillRecord,
};

/// A database of its own on a server that tests share.
struct MongoFixture {
    store: Arc<MongoStore>,
    database: String,
    server: Server,
}

impl MongoFixture {
    fn options(&self) -> MongoOptions {
        options(&self.server.uri, &self.database)
    }

    async fn on(server: Server) -> Self {
        let mut random = [0; 8];
        aws_lc_rs::rand::fill(&mut random).unwrap();
        let database = format!("midge_test_{:016x}", u64::from_be_bytes(random));
        Self {
            store: join(options(&server.uri, &database)).await,
            database,
            server,
        }
    }

    /// The database with other options in the URI.
    fn options_with(&self, more: &str) -> MongoOptions {
        options(&format!("{}&{more}", self.server.uri), &self.database)
    }

    /// Another node on the same database.
    async fn another_node(&self) -> Arc<MongoStore> {
        join(self.options()).await
    }
}

async fn join(options: MongoOptions) -> Arc<MongoStore> {
    let store = MongoStore::connect(options).await.unwrap();
    store.join(0).await.unwrap();
    store
}

fn options(uri: &str, database: &str) -> MongoOptions {
    MongoOptions {
        uri: uri.to_owned(),
        database: database.to_owned(),
        node_name: "$name".to_owned(),
        timeout: Duration::from_secs(30),
    }
}

impl Fixture for MongoFixture {
    async fn new() -> Self {
        Self::on(Server::find().await).await
    }

    fn store(&self) -> &dyn Store {
        &*self.store
    }

    async fn reopen(self) -> Self {
        let store = self.another_node().await;
        Self { store, ..self }
    }
}

store_contract!(MongoFixture);

fn request(client_id: &str, new_session: SessionId) -> OpenRequest {
    OpenRequest {
        client_id: client_id.into(),
        new_session,
        clean_start: false,
        version: ProtocolVersion::V5,
        expiry_interval: 3600,
        will: None,
        durable: true,
        epoch_min: 0,
    }
}

fn will(topic: &str, delay_interval: u32) -> WillRecord {
    WillRecord {
        message: message(topic, b"$payload"),
        message_expiry_interval: None,
        delay_interval,
        due_at: None,
        user_name: Some("$user".into()),
    }
}

async fn open(store: &MongoStore, request: OpenRequest) -> OpenedSession {
    let mut opened = store.open(vec![request]).await.unwrap();
    opened.remove(0).expect("nobody else connects")
}

async fn written(store: &MongoStore, changes: impl IntoIterator<Item = Change>) -> Written {
    let changes = Arc::new(changes.into_iter().collect());
    store.write(changes, Messages::Present).await.unwrap()
}

fn offline(opened: &OpenedSession, ends_at: u64) -> Change {
    Change::SaveSession(Box::new(SessionRecord {
        connected: false,
        ends_at: Some(ends_at),
        ..opened.session.record.clone()
    }))
}

fn await_release(session: SessionId) -> Change {
    let packet_id = PacketId::new(1).unwrap();
    Change::AwaitRelease { session, packet_id }
}

fn guarded(session: SessionId, chunk: Chunk, guard: SessionId) -> Change {
    let guard = Some(guard);
    Change::Enqueue {
        session,
        chunk,
        guard,
    }
}

/// A moment that has passed for every clock.
const LONG_AGO: u64 = 1;

#[tokio::test]
async fn first_connect_makes_a_session() {
    let fixture = MongoFixture::new().await;

    let opened = open(&fixture.store, request("$client", session(1))).await;
    assert!(!opened.present);
    assert_eq!((opened.previous_epoch, opened.epoch), (0, 1));
    assert_eq!(opened.previous_node, None);
    assert_eq!(opened.session.record.session, session(1));
    assert!(opened.leftovers.is_empty());
}

#[tokio::test]
async fn session_is_resumed_at_another_node_with_everything_of_it() {
    let fixture = MongoFixture::new().await;
    let first = open(&fixture.store, request("client", session(1))).await;
    let [_, changes @ ..] = everything_of(session(1));
    written(&fixture.store, changes).await;
    let other = fixture.another_node().await;

    let opened = open(&other, request("client", session(2))).await;
    assert!(opened.present);
    assert_eq!(opened.previous_epoch, first.epoch);
    assert_eq!(opened.previous_node, Some(fixture.store.node()));
    assert_eq!(opened.session.record, first.session.record);
    assert_eq!(opened.session.subscriptions[0].filter, filter("a/#"));
    assert_eq!(opened.session.awaiting_release.len(), 1);
    assert_eq!(opened.session.exchanges.len(), 1);
    assert_eq!(read_all(&*other, session(1)).await, [chunk(3, 2)]);
}

#[tokio::test]
async fn request_that_is_repeated_opens_once() {
    let fixture = MongoFixture::new().await;
    let first = open(&fixture.store, request("client", session(1))).await;

    let again = open(&fixture.store, request("client", session(1))).await;
    assert!(!again.present);
    assert_eq!(again.epoch, first.epoch);
}

#[tokio::test]
async fn newer_connect_of_the_same_batch_wins() {
    let fixture = MongoFixture::new().await;
    let requests = vec![request("client", session(1)), request("client", session(2))];

    let opened = fixture.store.open(requests).await.unwrap();
    assert!(opened[0].is_none());
    assert!(opened[1].as_ref().is_some_and(|opened| opened.present));
}

#[tokio::test]
async fn many_clients_connect_at_two_nodes_at_once() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    let requests = |offset: u32| {
        let each = (0..300).map(|number| request(&format!("{number}"), session(offset + number)));
        each.collect::<Vec<_>>()
    };

    let (here, there) = tokio::join!(fixture.store.open(requests(0)), other.open(requests(1000)));
    let (here, there) = (here.unwrap(), there.unwrap());
    for (here, there) in here.iter().zip(&there) {
        let last = [here, there].into_iter().flatten();
        let last = last.max_by_key(|opened| opened.epoch).unwrap();
        assert_eq!(last.epoch, 2);
        assert!(last.present);
    }
}

#[tokio::test]
async fn many_clients_come_back_at_two_nodes_at_once() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    let requests = |offset: u32| {
        let each = (0..300).map(|number| request(&format!("{number}"), session(offset + number)));
        each.collect::<Vec<_>>()
    };
    let first = fixture.store.open(requests(0)).await.unwrap();
    let in_an_hour = bson::DateTime::now().timestamp_millis() + 3_600_000;
    let left = first.iter().flatten();
    let left = left.map(|opened| offline(opened, in_an_hour.try_into().unwrap()));
    written(&fixture.store, left).await;

    let (here, there) = tokio::join!(
        fixture.store.open(requests(1000)),
        other.open(requests(2000))
    );
    for ((first, here), there) in first.iter().zip(here.unwrap()).zip(there.unwrap()) {
        let first = first.as_ref().unwrap();
        let mut epoch = first.epoch;
        let mut taken: Vec<_> = [here, there].into_iter().flatten().collect();
        taken.sort_by_key(|opened| opened.epoch);
        for opened in &taken {
            assert!(opened.present);
            assert_eq!(opened.session.record, first.session.record);
            assert!(opened.previous_epoch >= epoch && opened.previous_epoch < opened.epoch);
            epoch = opened.epoch;
        }
        // Whoever finds that somebody came between takes it again, though it may have been behind.
        assert!((first.epoch + 2..=first.epoch + 3).contains(&epoch));
    }
}

#[tokio::test]
async fn session_with_a_will_goes_on_without_it() {
    let fixture = MongoFixture::new().await;
    let with_will = OpenRequest {
        will: Some(will("will", 5)),
        ..request("client", session(1))
    };
    open(&fixture.store, with_will).await;

    let opened = open(&fixture.store, request("client", session(2))).await;
    assert!(opened.present);
    assert!(opened.leftovers.is_empty());
    assert_eq!(opened.session.record.will, None);
    let stored = load(&*fixture.store).await;
    assert_eq!(stored.sessions[0].record.will, None);
}

#[tokio::test]
async fn clean_start_ends_the_session_before() {
    let fixture = MongoFixture::new().await;
    open(&fixture.store, request("client", session(1))).await;
    written(&fixture.store, everything_of_opened(session(1))).await;
    let clean_start = OpenRequest {
        clean_start: true,
        ..request("client", session(2))
    };

    let opened = open(&fixture.store, clean_start).await;
    assert!(!opened.present);
    assert!(opened.session.subscriptions.is_empty());
    let [leftover] = &*opened.leftovers else {
        panic!("{opened:?}");
    };
    assert_eq!((leftover.session, leftover.ended), (session(1), true));
    let written = written(&fixture.store, [Change::EndSession(session(1))]).await;
    assert_eq!(written.lost, []);
    assert_eq!(
        last_op(&fixture.store, &written).await.action,
        LogAction::End
    );
    assert_eq!(read_all(&*fixture.store, session(1)).await, []);
    assert_eq!(load(&*fixture.store).await.sessions.len(), 1);
}

#[tokio::test]
async fn expired_session_is_not_resumed() {
    let fixture = MongoFixture::new().await;
    let first = open(&fixture.store, request("client", session(1))).await;
    written(&fixture.store, [offline(&first, LONG_AGO)]).await;

    let opened = open(&fixture.store, request("client", session(2))).await;
    assert!(!opened.present);
    assert_eq!(opened.session.record.session, session(2));
    assert_eq!(opened.previous_node, None);
}

#[tokio::test]
async fn session_without_expiry_ends_with_the_next_connect() {
    let fixture = MongoFixture::new().await;
    let clean = OpenRequest {
        expiry_interval: 0,
        durable: false,
        epoch_min: 0,
        will: Some(will("$will/topic", 5)),
        ..request("client", session(1))
    };
    open(&fixture.store, clean.clone()).await;

    let opened = open(&fixture.store, request("client", session(2))).await;
    assert!(!opened.present);
    assert_eq!(opened.leftovers[0].will, clean.will);
}

#[tokio::test]
async fn clean_session_without_will_is_not_stored() {
    let fixture = MongoFixture::new().await;
    let clean = |number| OpenRequest {
        durable: false,
        epoch_min: 0,
        expiry_interval: 0,
        clean_start: true,
        ..request("client", session(number))
    };
    let opened = open(&fixture.store, clean(1)).await;
    assert!(opened.leftovers.is_empty());
    open(&fixture.store, request("client", session(2))).await;

    let opened = open(&fixture.store, clean(3)).await;
    assert_eq!(opened.leftovers[0].session, session(2));
    assert_eq!(opened.session.record.session, session(3));
    let written = written(&fixture.store, [Change::EndSession(session(2))]).await;
    assert_eq!(written.lost, []);
    let documents = Query::new(SESSIONS, bson::rawdoc! {});
    assert!(
        fixture
            .store
            .commands
            .find(documents)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn will_of_a_connection_that_was_taken_over_is_published_once() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    let with_will = OpenRequest {
        will: Some(will("$will", 0)),
        ..request("client", session(1))
    };
    open(&fixture.store, with_will.clone()).await;
    open(&fixture.store, request("subscriber", session(9))).await;

    let opened = open(&other, request("client", session(2))).await;
    assert!(opened.present);
    let [leftover] = &*opened.leftovers else {
        panic!("{opened:?}");
    };
    assert_eq!((&leftover.will, leftover.ended), (&with_will.will, false));
    // A third node meets it too, as if the other one had been stopped.
    let third = fixture.another_node().await;
    assert_eq!(
        third.adopt_leftovers(Duration::ZERO, 10).await.unwrap(),
        opened.leftovers
    );
    let publish = |hlc| {
        [
            guarded(session(9), chunk(hlc, 1), leftover.session),
            Change::EndSession(leftover.session),
        ]
    };
    assert_eq!(written(&other, publish(5)).await.lost, []);
    assert_eq!(written(&third, publish(6)).await.lost, [leftover.session]);
    assert_eq!(read_all(&*other, session(9)).await, [chunk(5, 1)]);
    assert_eq!(load(&*other).await.sessions.len(), 2);
}

#[tokio::test]
async fn delayed_will_is_dropped_when_its_client_is_back() {
    let fixture = MongoFixture::new().await;
    let with_will = OpenRequest {
        will: Some(will("will", 1)),
        ..request("client", session(1))
    };
    open(&fixture.store, with_will).await;

    let opened = open(&fixture.store, request("client", session(2))).await;
    assert!(opened.leftovers.is_empty());
    assert_eq!(opened.session.record.will, None);
}

#[tokio::test]
async fn node_that_lost_a_session_writes_nothing_for_it() {
    let fixture = MongoFixture::new().await;
    let publisher = open(&fixture.store, request("publisher", session(1))).await;
    open(&fixture.store, request("subscriber", session(2))).await;
    let other = fixture.another_node().await;
    open(&other, request("publisher", session(3))).await;

    let changes = [
        await_release(session(1)),
        guarded(session(2), chunk(1, 1), session(1)),
        enqueue(session(2), &chunk(2, 1)),
        subscribe(session(2), "kept"),
        subscribe(session(1), "lost"),
    ];
    assert_eq!(written(&fixture.store, changes).await.lost, [session(1)]);
    assert_eq!(read_all(&*other, session(2)).await, [chunk(2, 1)]);
    // Not even by saving it, which is how a session that is new is made.
    let late = written(&fixture.store, [offline(&publisher, LONG_AGO)]).await;
    assert_eq!(late.lost, [session(1)]);
    let stored = load(&*other).await;
    assert!(stored.sessions[0].record.connected);
    assert!(stored.sessions[0].subscriptions.is_empty());
    assert!(stored.sessions[0].awaiting_release.is_empty());
    assert_eq!(stored.sessions[1].subscriptions.len(), 1);
}

#[tokio::test]
async fn guard_alone_keeps_a_chunk_from_being_written() {
    let fixture = MongoFixture::new().await;
    open(&fixture.store, request("publisher", session(1))).await;
    let other = fixture.another_node().await;
    open(&other, request("publisher", session(3))).await;

    let changes = [guarded(session(2), chunk(1, 1), session(1))];
    assert_eq!(written(&fixture.store, changes).await.lost, [session(1)]);
    assert_eq!(read_all(&*other, session(2)).await, []);
}

#[tokio::test]
async fn write_that_is_behind_the_logs_of_others_counts_for_nothing() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    open(&fixture.store, request("publisher", session(1))).await;
    open(&other, request("subscriber", session(2))).await;
    let logged = written(&other, [subscribe(session(2), "a")]).await;
    let changes = Arc::new(vec![
        await_release(session(1)),
        guarded(session(2), chunk(1, 1), session(1)),
    ]);

    let behind = fixture
        .store
        .write(changes.clone(), Messages::MatchedTo(Vec::new()))
        .await;
    let behind = behind.unwrap();
    assert!(behind.behind);
    assert_eq!(behind.subscriptions, logged.subscriptions);
    assert_eq!(read_all(&*other, session(2)).await, []);
    let followed = Messages::MatchedTo(behind.subscriptions);
    let written = fixture.store.write(changes, followed).await.unwrap();
    assert!(!written.behind);
    assert_eq!(read_all(&*other, session(2)).await, [chunk(1, 1)]);
    let stored = load(&*other).await;
    assert_eq!(stored.sessions[0].awaiting_release.len(), 1);
}

#[test]
fn session_stays_held_at_its_latest_epoch() {
    let held = HeldSessions::default();
    let at = |epoch| {
        Hold::Session(Held {
            key: "c:client".into(),
            epoch,
            is_known_to_others: false,
        })
    };
    held.insert(session(1), at(2));

    held.insert(session(1), at(1));
    held.lose(session(1), &at(1));
    let holds = held.of([session(1)].into_iter());
    assert_eq!(holds.get(&session(1)), Some(&at(2)));
    held.lose(session(1), &at(2));
    assert!(!held.is_held(session(1)));
}

#[tokio::test]
async fn options_of_the_uri_weaken_nothing() {
    let fixture = MongoFixture::new().await;
    let weak = "readPreference=secondaryPreferred&readConcernLevel=local&w=1";
    let store = join(fixture.options_with(weak)).await;
    open(&store, request("client", session(1))).await;

    let changes = [await_release(session(1)), enqueue(session(1), &chunk(1, 1))];
    assert_eq!(written(&store, changes).await.lost, []);
}

#[tokio::test]
async fn leftovers_are_adopted_by_one_node() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    for number in 0..20 {
        let client = format!("client{number}");
        open(&fixture.store, request(&client, session(number))).await;
        let clean_start = OpenRequest {
            clean_start: true,
            ..request(&client, session(100 + number))
        };
        open(&fixture.store, clean_start).await;
    }
    let sessions = fixture.store.commands.database();
    let sessions = sessions.collection::<bson::Document>(SESSIONS);
    let long_ago = bson::DateTime::from_millis(unix_ms() - 3_600_000);
    let long_ago = bson::doc! { "$set": { "og.0.at": long_ago } };
    sessions.update_many(bson::doc! {}, long_ago).await.unwrap();

    let late = Duration::from_secs(600);
    let (here, there) = tokio::join!(
        fixture.store.adopt_leftovers(late, 100),
        other.adopt_leftovers(late, 100)
    );
    let mut adopted = [here.unwrap(), there.unwrap()].concat();
    adopted.sort_by_key(|leftover| leftover.session);
    assert!(
        adopted
            .iter()
            .map(|leftover| leftover.session)
            .eq((0..20).map(session))
    );
}

#[tokio::test]
async fn node_that_was_declared_dead_is_fenced() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    fixture.store.heartbeat(7).await.unwrap();
    open(&fixture.store, request("client", session(1))).await;
    let row = |rows: Vec<NodeRow>| rows.into_iter().next().unwrap();
    let alive = row(other.nodes().await.unwrap());
    assert_eq!((alive.state, alive.reserved_hlc), (NodeState::Up, 7));
    assert_eq!(alive.name, "$name");

    let node = fixture.store.node();
    assert!(!other.declare_dead(node, alive.beats - 1).await.unwrap());
    assert!(other.declare_dead(node, alive.beats).await.unwrap());
    let is_fenced = |error| matches!(error, Err(StoreError::Fenced));
    assert!(is_fenced(fixture.store.heartbeat(8).await));
    for (change, messages) in [
        (subscribe(session(1), "a"), Messages::Absent),
        (subscribe(session(1), "a"), Messages::Present),
        (enqueue(session(2), &chunk(1, 1)), Messages::Present),
    ] {
        let outcome = fixture.store.write(Arc::new(vec![change]), messages).await;
        assert!(is_fenced(outcome.map(|_| ())));
    }
    assert!(load(&*other).await.sessions[0].subscriptions.is_empty());
}

#[tokio::test]
async fn node_whose_number_another_has_after_the_database_was_dropped_is_fenced() {
    let fixture = MongoFixture::new().await;
    open(&fixture.store, request("client", session(1))).await;
    fixture.store.database().drop().await.unwrap();
    let other = fixture.another_node().await;
    assert_eq!(other.node(), fixture.store.node());

    let is_fenced = |error| matches!(error, Err(StoreError::Fenced));
    for (change, messages) in [
        (subscribe(session(1), "a"), Messages::Absent),
        (subscribe(session(1), "a"), Messages::Present),
        (enqueue(session(2), &chunk(1, 1)), Messages::Present),
    ] {
        let outcome = fixture.store.write(Arc::new(vec![change]), messages).await;
        assert!(is_fenced(outcome.map(|_| ())));
    }
    assert!(is_fenced(fixture.store.heartbeat(8).await));
    fixture.store.leave().await.unwrap();
    other.heartbeat(1).await.unwrap();
}

#[tokio::test]
async fn node_that_leaves_keeps_the_end_of_its_log() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    open(&fixture.store, request("client", session(1))).await;
    written(&fixture.store, [subscribe(session(1), "a")]).await;
    fixture.store.leave().await.unwrap();

    let positions = written(&other, []).await.subscriptions;
    let node = fixture.store.node();
    assert!(positions.contains(&LogPosition { node, entry: 1 }));
    assert_eq!(other.nodes().await.unwrap()[0].state, NodeState::Leaving);
}

#[tokio::test]
async fn node_is_up_once_it_has_joined() {
    let fixture = MongoFixture::new().await;
    let starting = MongoStore::connect(fixture.options()).await.unwrap();
    assert_eq!(fixture.store.nodes().await.unwrap().len(), 1);

    starting.join(5).await.unwrap();
    let row = fixture.store.nodes().await.unwrap().remove(1);
    assert_eq!(row.node, starting.node());
    assert_eq!(
        (row.state, row.beats, row.reserved_hlc),
        (NodeState::Up, 0, 5)
    );
    let dead = fixture.store.declare_dead(row.node, row.beats).await;
    assert!(dead.unwrap());
    // A repeated attempt to join does not bring it back.
    starting.join(5).await.unwrap();
    let heartbeat = starting.heartbeat(6).await;
    assert!(matches!(heartbeat, Err(StoreError::Fenced)));
}

/// Puts documents of nodes there that left a day ago, with these log entries.
async fn nodes_of_yesterday(store: &MongoStore, entries: impl IntoIterator<Item = i64>) {
    let yesterday = bson::DateTime::from_millis(unix_ms() - 86_400_000);
    let rows = entries.into_iter().zip(10_i64..).map(|(entry, node)| {
        bson::doc! { "_id": node, "name": "", "st": "leaving", "hb": yesterday, "hbn": 1, "hr": 1, "k": entry }
    });
    let rows: Vec<_> = rows.collect();
    let count = rows.len() as i64;
    let database = store.commands.database();
    database
        .collection("nodes")
        .insert_many(rows)
        .await
        .unwrap();
    let numbered = bson::doc! { "$inc": { "n": 10 + count } };
    let meta = database.collection::<bson::Document>("meta");
    meta.update_one(bson::doc! { "_id": "nid" }, numbered)
        .await
        .unwrap();
}

fn unix_ms() -> i64 {
    bson::DateTime::now().timestamp_millis()
}

#[tokio::test]
async fn node_sees_itself_behind_very_many_others() {
    let fixture = MongoFixture::new().await;
    nodes_of_yesterday(&fixture.store, (0..300).map(|_| 1)).await;
    let last = fixture.another_node().await;

    assert_eq!(written(&last, []).await.subscriptions.len(), 302);
}

#[tokio::test]
async fn documents_of_nodes_that_are_gone_are_removed_once_nothing_of_them_is_left() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    let other = fixture.another_node().await;
    open(&other, request("client", session(1))).await;
    nodes_of_yesterday(store, [0, 3]).await;
    let nodes = store
        .commands
        .database()
        .collection::<bson::Document>("nodes");
    let change = async |node: u32, fields: bson::Document| {
        let row = bson::doc! { "_id": i64::from(node) };
        nodes
            .update_one(row, bson::doc! { "$set": fields })
            .await
            .unwrap();
    };
    // One has only just gone, and has written to its log; another one has left clients behind.
    let at = |minutes: i64| bson::DateTime::from_millis(unix_ms() - minutes * 60_000);
    change(10, bson::doc! { "hb": at(20), "k": 1 }).await;
    change(other.node(), bson::doc! { "hb": at(1000), "st": "dead" }).await;

    let left = async || {
        store.collect_garbage().await.unwrap();
        let rows = store.nodes().await.unwrap();
        rows.iter().map(|row| row.node).collect::<Vec<_>>()
    };
    assert_eq!(left().await, [store.node(), other.node(), 10]);
    store
        .release_sessions_of(other.node(), Duration::ZERO)
        .await
        .unwrap();
    change(10, bson::doc! { "hb": at(80) }).await;
    assert_eq!(left().await, [store.node()]);
}

/// What a clean start puts an end to.
fn everything_of_opened(session: SessionId) -> Vec<Change> {
    let [_, changes @ ..] = everything_of(session);
    changes.into()
}

/// The last thing that a node had logged with a write.
async fn last_op(store: &MongoStore, written: &Written) -> LogOp {
    let mut own = written.subscriptions.iter();
    let own = own.find(|position| position.node == store.node()).unwrap();
    let before = LogPosition {
        entry: own.entry - 1,
        ..*own
    };
    let mut entries = store.read_log(before).await.unwrap().unwrap();
    entries.remove(0).ops.pop().unwrap()
}

#[tokio::test]
async fn subscriptions_are_known_to_other_nodes() {
    let fixture = MongoFixture::new().await;
    let other = fixture.another_node().await;
    let owner = Owner::Client("client".into());
    open(&fixture.store, request("client", session(1))).await;
    let start = written(&fixture.store, [subscribe(session(1), "a/#")]).await;

    let mut shared = Vec::new();
    let positions = other
        .load_subscriptions(|session| shared.push(session))
        .await
        .unwrap();
    assert_eq!(positions, start.subscriptions);
    assert_eq!(shared.len(), 1);
    assert_eq!((&shared[0].owner, shared[0].session), (&owner, session(1)));
    assert_eq!(shared[0].node, Some(fixture.store.node()));
    assert_eq!(shared[0].subscriptions[0].filter, filter("a/#"));

    let subscribed = Change::Subscribe {
        session: session(1),
        filter: filter("$share/g/b"),
        options: SubscribeOptions {
            maximum_qos: QoS::ExactlyOnce,
            no_local: false,
            retain_as_published: true,
            retain_handling: RetainHandling::DoNotSend,
        },
        identifier: Some(3),
    };
    written(&fixture.store, [subscribed.clone()]).await;
    let unsubscribe = Change::Unsubscribe {
        session: session(1),
        filter: filter("a/#"),
    };
    let end = written(&fixture.store, [unsubscribe]).await;
    let from = |entry| LogPosition {
        node: fixture.store.node(),
        entry,
    };
    let entries = other.read_log(from(1)).await.unwrap().unwrap();
    let op = |action| LogOp {
        session: session(1),
        epoch: 1,
        action,
    };
    let Change::Subscribe {
        filter: shared_filter,
        options,
        identifier,
        ..
    } = subscribed
    else {
        unreachable!("made above");
    };
    let expected = [
        LogAction::Subscribe {
            owner,
            filter: shared_filter,
            options,
            identifier,
        },
        LogAction::Unsubscribe(filter("a/#")),
    ];
    let expected = expected
        .into_iter()
        .zip(2..)
        .map(|(action, entry)| LogEntry {
            position: from(entry),
            ops: vec![op(action)],
        });
    assert_eq!(entries, expected.collect::<Vec<_>>());
    assert_eq!(end.logged, entries[1..]);
    assert!(end.subscriptions.contains(&from(3)));
    assert_eq!(other.read_log(from(3)).await.unwrap(), Some(Vec::new()));
}

#[tokio::test]
async fn who_has_no_messages_is_not_told_of_subscriptions() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;

    let changes = Arc::new(vec![subscribe(session(1), "a")]);
    let written = store.write(changes, Messages::Absent).await.unwrap();
    assert_eq!(written.subscriptions, []);
    assert_eq!(written.logged.len(), 1);
    let changes = Arc::new(Vec::new());
    let written = store.write(changes, Messages::Present).await.unwrap();
    assert_eq!(written.subscriptions.len(), 1);
}

#[tokio::test]
async fn log_with_a_gap_has_to_be_loaded_again() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    for text in ["a", "b"] {
        written(store, [subscribe(session(1), text)]).await;
    }
    let node = store.node();
    let first = Query::new(documents::SUBLOG, bson::rawdoc! {}).limit(1);
    let first = store.commands.find(first).await.unwrap().remove(0);
    let sublog = store
        .commands
        .database()
        .collection::<bson::Document>(documents::SUBLOG);
    let first: bson::Document = (&*first).try_into().unwrap();
    sublog.delete_one(first).await.unwrap();

    let read = |entry| store.read_log(LogPosition { node, entry });
    assert_eq!(read(0).await.unwrap(), None);
    assert_eq!(read(1).await.unwrap().unwrap().len(), 1);
}

async fn open_group(store: &MongoStore, group: &str, new: u32, alive: &[u32]) -> GroupPlace {
    let request = GroupRequest {
        filter: &filter(group),
        new_session: session(new),
        alive,
        epoch_min: 7,
    };
    let place = store.open_group(request).await.unwrap();
    place.expect("nobody else opens it")
}

#[tokio::test]
async fn share_group_is_known_to_other_nodes_once_it_is_saved() {
    let fixture = MongoFixture::new().await;
    let save = |number, group| {
        let group = SessionRecord {
            owner: Owner::Group(filter(group)),
            connected: true,
            ..record(session(number))
        };
        written(&fixture.store, [Change::SaveSession(Box::new(group))])
    };
    open_group(&fixture.store, "$share/g/a", 1, &[]).await;
    let opened = save(1, "$share/g/a").await;
    let created = save(2, "$share/g/b").await;

    let action = last_op(&fixture.store, &opened).await.action;
    assert_eq!(action, LogAction::OpenGroup(filter("$share/g/a")));
    let action = last_op(&fixture.store, &created).await.action;
    assert_eq!(action, LogAction::OpenGroup(filter("$share/g/b")));
}

#[tokio::test]
async fn share_group_is_dispatched_by_one_node() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    let group = "$share/$g/$a";
    let taken = open_group(store, group, 1, &[]).await;
    assert_eq!((taken.session, taken.node), (session(1), store.node()));
    assert_eq!((taken.epoch, taken.is_saved), (7, false));
    let mut record = SessionRecord {
        owner: Owner::Group(filter(group)),
        connected: true,
        ..record(session(1))
    };
    let save = |record: &SessionRecord| Change::SaveSession(Box::new(record.clone()));
    written(store, [save(&record)]).await;

    // While its node is alive nobody takes it away.
    let other = fixture.another_node().await;
    let held = open_group(&other, group, 2, &[store.node()]).await;
    assert_eq!(
        (held.session, held.node, held.is_saved),
        (session(1), store.node(), true)
    );
    record.connected = false;
    assert_eq!(written(store, [save(&record)]).await.lost, []);
    let released = open_group(&other, group, 3, &[store.node()]).await;
    assert_eq!(
        (released.session, released.node),
        (session(1), other.node())
    );
    assert!(released.epoch > taken.epoch);
    assert_eq!(written(store, [save(&record)]).await.lost, [session(1)]);

    // One that is not alive does not keep it.
    let inherited = open_group(store, group, 4, &[]).await;
    assert_eq!(
        (inherited.session, inherited.node),
        (session(1), store.node())
    );
    assert!(inherited.epoch > released.epoch);
}

#[tokio::test]
async fn chunk_goes_with_the_exchange_that_it_ends_or_when_its_group_is_done_with_it() {
    let fixture = MongoFixture::new().await;
    open(&fixture.store, request("one", session(1))).await;
    open(&fixture.store, request("two", session(2))).await;
    let of_group = [1, 2, 3].map(|hlc| chunk(hlc, 1));
    let added = of_group.iter().map(|chunk| enqueue(session(3), chunk));
    written(&fixture.store, added).await;
    let other = fixture.another_node().await;
    open(&other, request("one", session(4))).await;

    let ended = [(1, 1, false), (2, 2, false), (1, 3, true)];
    let ended = ended.into_iter().flat_map(|(member, hlc, is_settled)| {
        let end = Change::EndExchange {
            session: session(member),
            packet_id: PacketId::new(u16::try_from(hlc).unwrap()).unwrap(),
        };
        let key = chunk(hlc, 1).key;
        let remove = |guard| Change::Dequeue {
            session: session(3),
            key,
            guard,
        };
        let by_group = is_settled.then(|| remove(None));
        [end, remove(Some(session(member)))]
            .into_iter()
            .chain(by_group)
    });
    assert_eq!(written(&fixture.store, ended).await.lost, [session(1)]);
    assert_eq!(read_all(&*other, session(3)).await, [chunk(1, 1)]);
}

#[tokio::test]
async fn sessions_of_a_dead_node_are_released_and_adopted_once() {
    let fixture = MongoFixture::new().await;
    let (other, third) = (fixture.another_node().await, fixture.another_node().await);
    let with_will = OpenRequest {
        will: Some(will("$will", 0)),
        ..request("client", session(1))
    };
    open(&fixture.store, with_will.clone()).await;
    written(&fixture.store, everything_of_opened(session(1))).await;
    let node = fixture.store.node();

    assert!(
        !other
            .release_sessions_of(node, Duration::ZERO)
            .await
            .unwrap()
    );
    let late = written(&fixture.store, [subscribe(session(1), "late")]).await;
    assert_eq!(late.lost, [session(1)]);
    let hour = Duration::from_secs(3600);
    assert!(other.adopt_due(hour, 10).await.unwrap().is_empty());
    let (here, there) = tokio::join!(
        other.adopt_due(Duration::ZERO, 10),
        third.adopt_due(Duration::ZERO, 10)
    );
    let (here, there) = (here.unwrap(), there.unwrap());
    assert_eq!(here.len() + there.len(), 1, "{here:?} {there:?}");
    let (holder, adopted) = if here.is_empty() {
        (third, &there[0])
    } else {
        (other, &here[0])
    };
    assert!(!adopted.record.connected);
    assert!(adopted.record.ends_at.is_some());
    let stored_will = adopted.record.will.clone().unwrap();
    assert!(stored_will.due_at.is_some());
    assert_eq!(stored_will.message, will("$will", 0).message);
    assert_eq!(adopted.exchanges.len(), 1);
    let published = SessionRecord {
        will: None,
        ..adopted.record.clone()
    };
    let published = [Change::SaveSession(Box::new(published))];
    assert_eq!(written(&holder, published).await.lost, []);
}

#[tokio::test]
async fn later_retained_message_stays_whichever_is_written_last() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    let at = |hlc| chunk(hlc, 1).key;
    let retain = |topic: &str, payload: &str, hlc| Change::Retain {
        retained: Retained {
            message: message(topic, payload.as_bytes()),
            publisher: "$publisher".into(),
        },
        at: at(hlc),
    };
    let clear = |topic: &str, hlc| Change::ClearRetained {
        topic: topic.into(),
        at: at(hlc),
    };
    for change in [
        retain("$up/a", "1", 1),
        retain("$up/a", "2", 2),
        retain("$up/b", "2", 2),
        retain("$up/b", "1", 1),
        clear("$up/c", 2),
        retain("$up/c", "1", 1),
        retain("$up/d", "2", 2),
        clear("$up/d", 1),
        retain("$up0", "1", 1),
    ] {
        written(store, [change]).await;
    }

    let prefix = |after: Option<&str>| RetainedRange::Prefix {
        prefix: "$up/".into(),
        after: after.map(Into::into),
        at_most: 2,
    };
    let topics = |found: &[Retained]| -> Vec<_> {
        let each = found.iter().map(|found| {
            let payload = String::from_utf8_lossy(found.message.payload()).into_owned();
            (found.message.topic().to_owned(), payload)
        });
        each.collect()
    };
    let stored = |topic: &str| (topic.to_owned(), "2".to_owned());
    let page = store.read_retained(prefix(None)).await.unwrap();
    assert_eq!(topics(&page), [stored("$up/a"), stored("$up/b")]);
    let page = store.read_retained(prefix(Some("$up/b"))).await.unwrap();
    assert_eq!(topics(&page), [stored("$up/d")]);
    let page = store.read_retained(prefix(Some("$up/d"))).await.unwrap();
    assert!(page.is_empty());
    for (topic, found) in [("$up/a", 1), ("$up/c", 0), ("$up", 0)] {
        let exact = RetainedRange::Topic(topic.into());
        assert_eq!(store.read_retained(exact).await.unwrap().len(), found);
    }
}

#[tokio::test]
async fn expired_retained_message_is_not_read() {
    let fixture = MongoFixture::new().await;
    let expired = Retained {
        message: Message::new(MessageParts {
            topic: "a",
            expires_at: Some(LONG_AGO),
            ..MessageParts::default()
        }),
        publisher: "".into(),
    };
    let at = chunk(1, 1).key;
    let retained = expired;
    written(&fixture.store, [Change::Retain { retained, at }]).await;

    let exact = RetainedRange::Topic("a".into());
    assert!(fixture.store.read_retained(exact).await.unwrap().is_empty());
}

#[tokio::test]
async fn standalone_server_is_refused() {
    let server = Server::standalone().await;

    let refused = MongoStore::connect(options(&server.uri, "midge")).await;
    let error = refused.unwrap_err();
    assert!(
        matches!(&error, StoreError::Unusable { reason, .. } if reason.contains("--replSet")),
        "{error}"
    );
}

#[tokio::test]
async fn newer_schema_is_refused() {
    let fixture = MongoFixture::new().await;
    let meta = fixture
        .store
        .commands
        .database()
        .collection::<bson::Document>("meta");
    let newer = bson::doc! { "$inc": { "version": 1 } };
    meta.update_one(bson::doc! { "_id": "schema" }, newer)
        .await
        .unwrap();

    let error = MongoStore::connect(fixture.options()).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Unusable { reason, .. } if reason.contains("newer midge")),
        "{error}"
    );
}

#[tokio::test]
async fn server_that_is_not_there_is_unavailable() {
    let options = MongoOptions {
        timeout: Duration::from_millis(100),
        ..options("mongodb://127.0.0.1:1/", "midge")
    };

    let error = MongoStore::connect(options).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn write_that_a_statement_of_failed_is_an_error() {
    let fixture = MongoFixture::new().await;
    let invalid = commands::update(
        bson::rawdoc! { "_id": 1 },
        bson::rawdoc! { "$unknown": { "a": 1 } },
        true,
    );
    let batches = commands::write_commands(
        commands::Verb::Update,
        INBOX,
        [invalid],
        commands::Concern::Majority,
    );

    // The server answers `ok: 1`.
    for batch in batches {
        fixture
            .store
            .commands
            .write(batch.command)
            .await
            .unwrap_err();
    }
}

#[tokio::test]
async fn session_that_becomes_too_large_stops_no_other() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    open(store, request("greedy", session(1))).await;
    open(store, request("modest", session(2))).await;
    let many = |number: u32| {
        let filters = (0..50).map(move |each| format!("{number}/{each}/{}", "x".repeat(65_000)));
        filters.map(|filter| subscribe(session(1), &filter))
    };
    for number in 0..5 {
        assert_eq!(written(store, many(number)).await.lost, []);
    }

    // One subscription more than a document holds, and more at once than a command does.
    for greedy in [
        many(5).collect::<Vec<_>>(),
        (5..11).flat_map(many).collect(),
    ] {
        let changes = greedy.into_iter().chain([subscribe(session(2), "a")]);
        assert_eq!(written(store, changes).await.lost, [session(1)]);
    }
    let stored = load(&**store).await;
    assert_eq!(stored.sessions[0].subscriptions.len(), 250);
    assert_eq!(stored.sessions[1].subscriptions.len(), 1);
}

/// Makes the next command of this name fail once.
async fn fail_next(fixture: &MongoFixture, command: &str, how: bson::Document) {
    fail(fixture, command, bson::doc! { "times": 1 }, how).await;
}

async fn fail(
    fixture: &MongoFixture,
    command: &str,
    mode: impl Into<bson::Bson>,
    how: bson::Document,
) {
    let mut data = bson::doc! { "failCommands": [command] };
    data.extend(how);
    let failpoint = bson::doc! {
        "configureFailPoint": "failCommand",
        "mode": mode,
        "data": data,
    };
    let client = fixture.store.commands.database().client();
    let admin = client.database("admin");
    admin.run_command(failpoint).await.unwrap();
}

#[tokio::test]
async fn insert_that_failed_or_seemed_to_may_be_repeated() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let ways = [
        // Another server is the primary now.
        bson::doc! { "errorCode": 10_107 },
        // The disk is full.
        bson::doc! { "errorCode": 14_031 },
        bson::doc! { "closeConnection": true },
        // It has been inserted, and may be lost with the primary.
        bson::doc! { "writeConcernError": { "code": 64, "errmsg": "too slow" } },
    ];
    for (hlc, how) in (1..).zip(ways) {
        fail_next(&fixture, "insert", how).await;
        let changes = Arc::new(vec![enqueue(session(1), &chunk(hlc, 1))]);

        let failed = fixture
            .store
            .write(changes.clone(), Messages::Present)
            .await
            .unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
        fixture
            .store
            .write(changes, Messages::Present)
            .await
            .unwrap();
        let inbox = read_all(&*fixture.store, session(1)).await;
        assert_eq!(inbox.last(), Some(&chunk(hlc, 1)));
        assert_eq!(inbox.len() as u64, hlc);
    }
}

#[tokio::test]
async fn error_passes_unless_somebody_has_to_mend_it_or_the_command_is_wrong() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    let retryable = bson::doc! { "errorCode": 2, "errorLabels": ["RetryableWriteError"] };
    let overloaded = bson::doc! { "errorCode": 2, "errorLabels": ["SystemOverloadedError"] };
    let code = |code: i32| bson::doc! { "errorCode": code };
    // InternalError, UnknownError, ConflictingOperationInProgress, ExceededTimeLimit,
    // TemporarilyUnavailable, OutOfDiskSpace, one that only a later server knows.
    let passing = [1, 8, 117, 262, 365, 14_031, 999_999].map(code);
    for how in passing.into_iter().chain([retryable, overloaded]) {
        fail_next(&fixture, "insert", how.clone()).await;
        let changes = Arc::new(vec![enqueue(session(1), &chunk(1, 1))]);
        let failed = store.write(changes, Messages::Present).await.unwrap_err();
        assert!(
            matches!(failed, StoreError::Unavailable(_)),
            "{how}: {failed}"
        );
        fail(&fixture, "find", "alwaysOn", how.clone()).await;
        let failed = store.read_inbox(everything_in(session(1))).await;
        fail(&fixture, "find", "off", bson::doc! {}).await;
        assert!(
            matches!(failed, Err(StoreError::Unavailable(_))),
            "{how}: {failed:?}"
        );
    }
    // Unauthorized, AuthenticationFailed, AtlasError.
    for refused in [13, 18, 8000] {
        fail_next(&fixture, "insert", code(refused)).await;
        let changes = Arc::new(vec![enqueue(session(1), &chunk(1, 1))]);
        let failed = store.write(changes, Messages::Present).await.unwrap_err();
        assert!(
            matches!(failed, StoreError::Unusable { .. }),
            "{refused}: {failed}"
        );
        assert_eq!(failed.to_string().contains("readWrite"), refused == 13);
    }
    // BadValue, FailedToParse, BSONObjectTooLarge.
    for nonsense in [2, 9, 10_334] {
        fail_next(&fixture, "insert", code(nonsense)).await;
        let changes = Arc::new(vec![enqueue(session(1), &chunk(1, 1))]);
        let failed = store.write(changes, Messages::Present).await.unwrap_err();
        assert!(matches!(failed, StoreError::Io(_)), "{nonsense}: {failed}");
    }
}

fn everything_in(session: SessionId) -> InboxRange {
    InboxRange {
        session,
        from: MessageId::MIN,
        before: MessageId::MAX,
        bytes_max: usize::MAX,
    }
}

/// Takes the session of a client, although that may not succeed at once.
async fn open_at_last(store: &MongoStore, request: OpenRequest) -> OpenedSession {
    loop {
        match store.open(vec![request.clone()]).await {
            Ok(mut opened) => return opened.remove(0).expect("nobody else connects"),
            Err(error) => assert!(error.may_pass(), "{error}"),
        }
    }
}

#[tokio::test]
async fn connect_that_failed_or_seemed_to_opens_once() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    let too_slow = bson::doc! { "writeConcernError": { "code": 64, "errmsg": "too slow" } };
    let ways = [
        ("update", bson::doc! { "errorCode": 91 }),
        ("update", bson::doc! { "errorCode": 1 }),
        ("update", bson::doc! { "closeConnection": true }),
        // It has been taken, and that may be lost with the primary.
        ("update", too_slow),
        ("find", bson::doc! { "errorCode": 262 }),
        ("find", bson::doc! { "closeConnection": true }),
    ];
    for (number, (command, how)) in (1..).zip(ways) {
        fail_next(&fixture, command, how).await;

        let opened = open_at_last(store, request("client", session(number))).await;
        assert_eq!(opened.epoch, u64::from(number));
        assert_eq!(opened.present, number > 1);
        assert_eq!(opened.session.record.session, session(1));
    }
}

#[tokio::test]
async fn transaction_that_fails_for_no_known_reason_is_written_once_in_the_end() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    for (entry, command, how) in [
        (1, "insert", bson::doc! { "errorCode": 1 }),
        (2, "update", bson::doc! { "errorCode": 262 }),
        (3, "update", bson::doc! { "closeConnection": true }),
        (4, "commitTransaction", bson::doc! { "errorCode": 1 }),
        (5, "commitTransaction", bson::doc! { "errorCode": 13 }),
        (6, "abortTransaction", bson::doc! { "errorCode": 1 }),
    ] {
        fail_next(&fixture, command, how).await;
        let changes = Arc::new(vec![
            subscribe(session(1), "a"),
            guarded(session(2), chunk(entry, 1), session(1)),
        ]);

        let written = loop {
            match store.write(changes.clone(), Messages::Present).await {
                Ok(written) => break written,
                Err(error) => assert!(error.may_pass(), "{command}: {error}"),
            }
        };
        assert_eq!(written.lost, []);
        assert_eq!(written.subscriptions[0].entry, entry);
        assert_eq!(
            read_all(&**store, session(2)).await.len() as u64,
            entry,
            "{command}"
        );
    }
}

/// A publisher that sends it again is answered without another look.
#[tokio::test]
async fn exactly_once_message_is_taken_over_only_after_it_is_retained() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    let retained = Change::Retain {
        retained: Retained {
            message: message("topic", b"payload"),
            publisher: "client".into(),
        },
        at: chunk(1, 1).key,
    };
    let changes = Arc::new(vec![await_release(session(1)), retained]);
    let namespace = format!("{}.{RETAINED}", fixture.database);
    let how = bson::doc! { "errorCode": 91, "namespace": namespace };
    fail_next(&fixture, "insert", how).await;

    let failed = store
        .write(changes.clone(), Messages::Present)
        .await
        .unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
    let stored = load(&**store).await;
    assert!(stored.sessions[0].awaiting_release.is_empty());
    store.write(changes, Messages::Present).await.unwrap();
    let stored = load(&**store).await;
    assert_eq!(stored.sessions[0].awaiting_release.len(), 1);
    assert_eq!(stored.retained.len(), 1);
}

#[tokio::test]
async fn transaction_is_repeated_until_it_is_committed_once() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    let transient = bson::doc! { "errorCode": 112, "errorLabels": ["TransientTransactionError"] };
    let unknown = bson::doc! { "writeConcernError": { "code": 64, "errmsg": "too slow" } };
    for (entry, command, how) in [
        (1, "update", transient.clone()),
        (2, "commitTransaction", transient),
        (3, "commitTransaction", unknown),
        (
            4,
            "commitTransaction",
            bson::doc! { "closeConnection": true },
        ),
    ] {
        fail_next(&fixture, command, how).await;

        let changes = [subscribe(session(1), "a"), await_release(session(1))];
        let written = written(store, changes).await;
        assert_eq!(written.lost, []);
        assert_eq!(written.subscriptions[0].entry, entry);
    }
}

#[tokio::test]
async fn committed_transaction_is_not_repeated_when_what_follows_it_failed() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    // The positions are not read.
    let too_slow = bson::doc! { "errorCode": 50 };
    fail(&fixture, "find", "alwaysOn", too_slow).await;
    let changes = Arc::new(vec![subscribe(session(1), "a"), await_release(session(2))]);

    let failed = store
        .write(changes.clone(), Messages::Present)
        .await
        .unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
    fail(&fixture, "find", "off", bson::doc! {}).await;
    let again = store.write(changes, Messages::Present).await.unwrap();
    assert_eq!(again.lost, [session(2)]);
    assert_eq!(again.subscriptions[0].entry, 1);
    let next = written(store, [subscribe(session(1), "b")]).await;
    assert_eq!((next.lost, next.subscriptions[0].entry), (vec![], 2));
}

#[tokio::test]
async fn commit_of_which_nothing_was_heard_is_repeated_before_anything_else() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = join(MongoOptions {
        timeout: Duration::from_secs(2),
        ..fixture.options()
    })
    .await;
    open(&store, request("client", session(1))).await;
    let unknown = bson::doc! { "writeConcernError": { "code": 64, "errmsg": "too slow" } };
    fail(&fixture, "commitTransaction", "alwaysOn", unknown).await;
    let changes = Arc::new(vec![
        subscribe(session(1), "a"),
        Change::SaveSession(Box::new(record(session(3)))),
    ]);

    let failed = store
        .write(changes.clone(), Messages::Present)
        .await
        .unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
    fail(&fixture, "commitTransaction", "off", bson::doc! {}).await;
    let again = store.write(changes, Messages::Present).await.unwrap();
    assert_eq!(again.lost, []);
    assert_eq!(again.subscriptions[1].entry, 1);
    let next = written(&store, [subscribe(session(3), "b")]).await;
    assert_eq!((next.lost, next.subscriptions[1].entry), (vec![], 2));
}

#[tokio::test]
async fn transaction_of_a_dead_node_is_ended() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let other = fixture.another_node().await;
    open(&fixture.store, request("client", session(1))).await;
    let stopped = bson::doc! { "blockConnection": true, "blockTimeMS": 300_000 };
    fail_next(&fixture, "commitTransaction", stopped).await;
    let changes = Arc::new(vec![subscribe(session(1), "a")]);
    let writing = tokio::spawn({
        let (store, changes) = (fixture.store.clone(), changes.clone());
        async move { store.write(changes, Messages::Present).await }
    });
    let admin = other.commands.database().client().database("admin");
    let entered = bson::doc! {
        "waitForFailPoint": "failCommand",
        "timesEntered": 1_i64,
        "maxTimeMS": 30_000,
    };
    admin.run_command(entered).await.unwrap();

    let node = fixture.store.node();
    assert!(other.declare_dead(node, 0).await.unwrap());
    other.end_transactions_of(node).await.unwrap();
    // Sooner than the server gives up the transaction by itself, in a minute.
    assert!(open(&other, request("client", session(2))).await.present);
    let mut outcome = writing.await.unwrap();
    while let Err(StoreError::Unavailable(_)) = outcome {
        outcome = fixture
            .store
            .write(changes.clone(), Messages::Present)
            .await;
    }
    assert!(matches!(outcome, Err(StoreError::Fenced)), "{outcome:?}");
}

#[tokio::test]
async fn transaction_that_was_repeated_by_the_flush_is_harmless() {
    let fixture = MongoFixture::on(Server::with_failpoints().await).await;
    let store = &fixture.store;
    open(store, request("client", session(1))).await;
    let changes = [
        await_release(session(1)),
        subscribe(session(1), "a"),
        guarded(session(2), chunk(1, 1), session(1)),
        Change::SaveSession(Box::new(record(session(3)))),
    ];
    written(store, changes.clone()).await;
    // As if the answer to the commit had been lost.
    *store.log_entry.lock() = 0;
    store.forget(session(3), u64::MAX);

    let again = written(store, changes).await;
    assert_eq!(again.lost, []);
    assert_eq!(again.subscriptions[0].entry, 2);
    assert_eq!(read_all(&**store, session(2)).await, [chunk(1, 1)]);
    let stored = load(&**store).await;
    assert_eq!(stored.sessions.len(), 2);
    assert_eq!(stored.sessions[0].subscriptions.len(), 1);
}

#[tokio::test]
async fn garbage_of_an_ended_session_is_collected() {
    let fixture = MongoFixture::new().await;
    let store = &fixture.store;
    written(store, everything_of(session(1))).await;
    written(store, everything_of(session(2))).await;
    written(store, [Change::EndSession(session(1))]).await;
    let gc = store
        .commands
        .database()
        .collection::<bson::Document>(GARBAGE);
    let long_ago = bson::doc! { "$set": { "at": bson::DateTime::from_millis(0) } };
    gc.update_many(bson::doc! {}, long_ago).await.unwrap();

    store.collect_garbage().await.unwrap();
    for collection in [INBOX, EXCHANGES, AWAITING] {
        let rows = Query::new(collection, milestones::except());
        assert_eq!(store.commands.find(rows).await.unwrap().len(), 1);
    }
    assert_eq!(gc.count_documents(bson::doc! {}).await.unwrap(), 0);
}

#[tokio::test]
async fn a_milestone_stands_behind_every_session() {
    let fixture = MongoFixture::new().await;
    for (collection, range) in [
        (INBOX, documents::all_of as fn(SessionId) -> RawDocumentBuf),
        (EXCHANGES, documents::packets_of),
        (AWAITING, documents::packets_of),
    ] {
        for first in [0, 0x0F, 0x10, 0x7FFF, 0xFFEF_u16] {
            let mut session = SessionId::random();
            session.0[..2].copy_from_slice(&first.to_be_bytes());
            let range = range(session);
            let end = range.get_document("_id").unwrap().get("$lte").unwrap();
            let behind = bson::rawdoc! { "_id": { "$gt": bson::RawBson::from(end.unwrap()) } };
            let next = Query::new(collection, behind).limit(1);
            let next = fixture.store.commands.find(next).await.unwrap().remove(0);

            let key = next.get_binary("_id").unwrap().bytes;
            assert_eq!(key[..2], ((first | 0x0F) + 1).to_be_bytes(), "{collection}");
            assert!(next.get_bool("milestone").unwrap());
        }
    }
}
