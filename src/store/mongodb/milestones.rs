//! Milestones: documents among those of the sessions that are never deleted, at equal distances.
//!
//! The server keeps what was deleted for as long as somebody may read the past, five minutes unless
//! `minSnapshotHistoryWindowInSeconds` says otherwise. A query for a range of keys goes over all of
//! that, beyond the end of its range, up to the first document that is there. Most inboxes are empty,
//! so that was once what all sessions had been sent in five minutes: after two million messages
//! each look into an empty inbox took MongoDB 6.0 0.3 to 1 s. Now it comes no further than to the next
//! milestone.

use bson::raw::RawDocumentBuf;
use bson::{Binary, RawBson, rawdoc};

use super::commands::{Commands, Query, Verb, binary};
use super::documents::{AWAITING, EXCHANGES, INBOX};
use crate::store::StoreError;
use crate::store::format::{MESSAGE_ID_BYTES, PACKET_ID_BYTES, SESSION_BYTES};

/// In each collection: one for all sessions whose ids, which are random, have the same first 12 bits.
pub(super) const MILESTONES: u16 = 4096;

/// The collections, and the length of their keys: the server sorts by that first. The last one
/// tells whether the milestones are there.
const COLLECTIONS: [(&str, usize); 3] = [
    (INBOX, SESSION_BYTES + MESSAGE_ID_BYTES),
    (EXCHANGES, SESSION_BYTES + PACKET_ID_BYTES),
    (AWAITING, SESSION_BYTES + PACKET_ID_BYTES),
];

/// Puts up what is missing. If that is cut short, some may be missing for ever, which costs time and
/// nothing else.
pub(super) async fn put_up(commands: &Commands) -> Result<(), StoreError> {
    let (collection, length) = COLLECTIONS[COLLECTIONS.len() - 1];
    let last = rawdoc! { "_id": key(MILESTONES - 1, length) };
    let last = commands.find(Query::new(collection, last).limit(1)).await?;
    if !last.is_empty() {
        return Ok(());
    }
    for (collection, length) in COLLECTIONS {
        let milestone = |number| rawdoc! { "_id": key(number, length), "milestone": true };
        let milestones: Vec<_> = (0..MILESTONES).map(milestone).collect();
        // Another node may put them up as well.
        commands
            .write_all(Verb::Insert, collection, &milestones)
            .await?;
    }
    Ok(())
}

fn key(number: u16, length: usize) -> Binary {
    let mut key = vec![0; length];
    key[..2].copy_from_slice(&(number << 4).to_be_bytes());
    binary(key)
}

/// A filter for everything else.
pub(super) fn except() -> RawDocumentBuf {
    rawdoc! { "milestone": RawBson::Null }
}
