//! What the tests of failures take for granted about MongoDB and its driver.

use std::future::IntoFuture;
use std::time::Duration;

use mongodb::bson::{Document, doc};
use mongodb::options::{ClientOptions, WriteConcern};
use mongodb::{Client, Collection};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::lines::DEADLINE;
use crate::mongod::{Database, ReplicaSet};
use crate::proxy::Proxy;

async fn collection(database: &Database) -> Collection<Document> {
    let mut options = ClientOptions::parse(&database.uri).await.unwrap();
    options.write_concern = Some(WriteConcern::majority());
    // Together they are how long the driver believes in a primary that is frozen; usually 20 s.
    options.heartbeat_freq = Some(Duration::from_secs(1));
    options.connect_timeout = Some(Duration::from_secs(1));
    let client = Client::with_options(options).unwrap();
    client.database(&database.name).collection("documents")
}

async fn insert_in_transaction(documents: &Collection<Document>, id: i32) {
    let mut session = documents.client().start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    let insert = documents.insert_one(doc! { "_id": id });
    insert.session(&mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_of_a_server_can_be_cut_off_while_another_writes() {
    let mut set = ReplicaSet::start(1).await;
    let database = Database::on(set.uri());
    let proxy = Proxy::start(set.mongod(0).address()).await;
    let near = collection(&database).await;
    let far = collection(&database.through(&proxy)).await;
    insert_in_transaction(&far, 1).await;

    proxy.pause();
    let held_back = insert_in_background(&far, 2);
    insert_in_transaction(&near, 3).await;
    assert_eq!(near.count_documents(doc! {}).await.unwrap(), 2);
    proxy.restore();
    held_back.await.unwrap();

    // The driver itself repeats a write whose connection has ended.
    proxy.cut();
    let cut_off = insert_in_background(&far, 4);
    proxy.restore();
    cut_off.await.unwrap();
    assert_eq!(near.count_documents(doc! {}).await.unwrap(), 4);
}

fn insert_in_background(documents: &Collection<Document>, id: i32) -> JoinHandle<()> {
    let documents = documents.clone();
    tokio::spawn(async move {
        let insert = documents.insert_one(doc! { "_id": id }).into_future();
        let inserted = timeout(DEADLINE, insert).await;
        inserted.expect("it is written").unwrap();
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_of_three_survives_whatever_becomes_of_its_primary() {
    let mut set = ReplicaSet::start_behind_proxies(3).await;
    let documents = collection(&Database::on(set.uri())).await;
    insert_in_transaction(&documents, 1).await;

    set.step_down().await;
    insert(&documents, 2).await;

    let primary = set.primary().await;
    set.mongod(primary).kill();
    set.primary_other_than(primary).await;
    insert(&documents, 3).await;
    set.mongod(primary).start_again();

    let primary = set.primary().await;
    set.mongod(primary).freeze();
    set.primary_other_than(primary).await;
    insert(&documents, 4).await;
    set.mongod(primary).thaw();

    let primary = set.primary().await;
    set.proxy(primary).cut();
    set.primary_other_than(primary).await;
    insert(&documents, 5).await;
    set.proxy(primary).restore();

    let primary = set.primary().await;
    set.mongod(primary).terminate();
    insert(&documents, 6).await;
    assert_eq!(documents.count_documents(doc! {}).await.unwrap(), 6);
}

/// Writes a document, however long that takes.
async fn insert(documents: &Collection<Document>, id: i32) {
    let inserted = async {
        while let Err(error) = documents.insert_one(doc! { "_id": id }).await {
            eprintln!("insert {id}: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, inserted).await.expect("a primary writes");
}
