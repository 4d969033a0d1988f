//! What the database must be like: checked, and made where it is missing, before anything else.

use bson::oid::ObjectId;
use bson::raw::RawDocumentBuf;
use bson::{cstr, rawdoc};

use super::commands::{
    Commands, Concern, Failure, Query, Verb, array, delete, integer, update, write_commands,
};
use super::documents::{
    AWAITING, Document, EXCHANGES, GARBAGE, INBOX, META, NODES, RETAINED, SESSIONS, SUBLOG,
};
use super::log::LOG_SECONDS;
use super::milestones;
use crate::store::StoreError;

/// Raised when an older midge could no longer work with what this one writes.
pub(super) const SCHEMA: i64 = 1;

/// The wire version of MongoDB 6.0.
const WIRE_VERSION_MIN: i64 = 17;

const COLLECTIONS: [&str; 9] = [
    META, NODES, SESSIONS, SUBLOG, INBOX, EXCHANGES, AWAITING, RETAINED, GARBAGE,
];

pub(super) async fn verify_server(commands: &Commands) -> Result<(), StoreError> {
    let hello = commands.run(rawdoc! { "hello": 1 }).await?;
    let is_router = hello
        .get_str("msg")
        .is_ok_and(|message| message == "isdbgrid");
    if !hello.contains_key("setName") && !is_router {
        return Err(commands.unusable(
            "this is a standalone mongod, and midge needs a replica set, which may have one \
             member: start mongod with --replSet and run rs.initiate() once",
        ));
    }
    if integer(&hello, "maxWireVersion").unwrap_or(0) < WIRE_VERSION_MIN {
        return Err(commands.unusable("this MongoDB is older than 6.0"));
    }
    Ok(())
}

pub(super) async fn prepare(commands: &Commands) -> Result<(), StoreError> {
    verify_version(commands).await?;
    for collection in COLLECTIONS {
        let create = rawdoc! { "create": collection, "writeConcern": { "w": "majority" } };
        match commands.run(create).await {
            Ok(_) | Err(Failure::Exists) => {}
            Err(failure) => return Err(failure.into()),
        }
        verify_rights(commands, collection).await?;
    }
    let indexes = [
        // The connections of a node that has died.
        (
            SESSIONS,
            rawdoc! { "n": 1 },
            rawdoc! { "partialFilterExpression": { "c": true } },
        ),
        (SESSIONS, rawdoc! { "due": 1 }, rawdoc! { "sparse": true }),
        (SESSIONS, rawdoc! { "og.at": 1 }, rawdoc! { "sparse": true }),
        (
            SUBLOG,
            rawdoc! { "at": 1 },
            rawdoc! { "expireAfterSeconds": LOG_SECONDS },
        ),
        (INBOX, rawdoc! { "x": 1 }, expires_when_due()),
        (RETAINED, rawdoc! { "x": 1 }, expires_when_due()),
        (
            GARBAGE,
            rawdoc! { "swept": 1, "at": 1 },
            RawDocumentBuf::new(),
        ),
    ];
    for (collection, key, mut index) in indexes {
        let field = key.iter().flatten().next().map(|(field, _)| field.as_str());
        index.append(cstr!("name"), field.unwrap_or("key"));
        index.append(cstr!("key"), key);
        let create = rawdoc! {
            "createIndexes": collection,
            "indexes": array([index]),
            "writeConcern": { "w": "majority" },
        };
        commands.run(create).await?;
    }
    milestones::put_up(commands).await?;
    // Last: whoever finds it finds everything else as well.
    let version = rawdoc! { "$setOnInsert": { "version": SCHEMA } };
    let version = update(rawdoc! { "_id": "schema" }, version, true);
    for batch in write_commands(Verb::Update, META, [version], Concern::Majority) {
        commands.write(batch.command).await?;
    }
    Ok(())
}

/// The name of the database, and what tells it from others of this name; made when it is first asked
/// for.
pub(super) async fn cluster_name(commands: &Commands) -> Result<String, StoreError> {
    let find_or_make = rawdoc! {
        "findAndModify": META,
        "query": { "_id": "cluster" },
        "update": { "$setOnInsert": { "id": ObjectId::new() } },
        "upsert": true,
        "new": true,
        "writeConcern": { "w": "majority" },
    };
    let answer = commands.run(find_or_make).await?;
    let id = answer
        .get_document("value")
        .and_then(|cluster| cluster.get_object_id("id"))
        .map_err(|_| StoreError::Damaged {
            what: "the name of the cluster",
        })?;
    Ok(format!("{}:{id}", commands.database().name()))
}

fn expires_when_due() -> RawDocumentBuf {
    rawdoc! { "sparse": true, "expireAfterSeconds": 0_i64 }
}

async fn verify_version(commands: &Commands) -> Result<(), StoreError> {
    let schema = Query::new(META, rawdoc! { "_id": "schema" }).limit(1);
    let found = commands.find(schema).await?;
    let Some(schema) = found.first() else {
        return Ok(());
    };
    let version = Document::new("the schema", schema).long("version")?;
    if version > SCHEMA {
        return Err(commands.unusable(format!(
            "a newer midge wrote it (schema {version}, this one knows {SCHEMA})"
        )));
    }
    Ok(())
}

/// Fails now rather than in the middle of the night: writes that match nothing need the same rights
/// as those that do.
async fn verify_rights(commands: &Commands, collection: &'static str) -> Result<(), StoreError> {
    let nothing = || rawdoc! { "_id": { "$in": [] } };
    commands
        .find(Query::new(collection, nothing()).limit(1))
        .await?;
    let touch = rawdoc! { "$set": { "_": 1 } };
    let touch = write_commands(
        Verb::Update,
        collection,
        [update(nothing(), touch, false)],
        Concern::Primary,
    );
    let remove = write_commands(
        Verb::Delete,
        collection,
        [delete(nothing())],
        Concern::Primary,
    );
    for batch in touch.into_iter().chain(remove) {
        commands.write(batch.command).await?;
    }
    Ok(())
}
