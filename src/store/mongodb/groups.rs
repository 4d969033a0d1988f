//! Share groups: taken by the node that gives their messages to members.

use bson::raw::RawDocumentBuf;
use bson::{RawBson, rawdoc};

use super::commands::{Concern, Query, Verb, array, binary, update, write_commands};
use super::documents::{Document, EXCHANGES, SESSIONS, packets_of, version_number};
use super::held::{Held, Hold};
use super::{MongoStore, RANGES_MAX, read_exchange};
use crate::mqtt::{ProtocolVersion, SubscriptionFilter};
use crate::store::{OutgoingExchange, Owner, SessionId, StoreError, format};

/// A share group that somebody is to serve.
#[derive(Debug)]
pub(crate) struct GroupRequest<'a> {
    pub(crate) filter: &'a SubscriptionFilter,
    /// Used if the group is new, and never again.
    pub(crate) new_session: SessionId,
    /// Of other nodes none of these is deprived of it.
    pub(crate) alive: &'a [u32],
    pub(crate) epoch_min: u64,
}

/// Who serves a share group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupPlace {
    pub(crate) session: SessionId,
    pub(crate) epoch: u64,
    pub(crate) node: u32,
    /// Whether it has been saved since it was made: only then others know of it.
    pub(crate) is_saved: bool,
}

impl MongoStore {
    /// Takes a share group, or makes it, unless a node that is alive has it. Returns who has it now;
    /// `None` if that has changed meanwhile.
    ///
    /// # Errors
    /// `StoreError` when the outcome is unknown; it may be tried again.
    pub(crate) async fn open_group(
        &self,
        request: GroupRequest<'_>,
    ) -> Result<Option<GroupPlace>, StoreError> {
        let key = format::owner_key(&Owner::Group(request.filter.clone()));
        let token = || binary(request.new_session.0);
        let alive = array(request.alive.iter().map(|node| i64::from(*node)));
        let epoch_min = request.epoch_min.cast_signed();
        let free = rawdoc! {
            "_id": &*key,
            "$or": [{ "c": { "$ne": true } }, { "n": { "$nin": alive } }],
        };
        // A value, not an expression: the token may be any bytes.
        let literal = |value: RawBson| rawdoc! { "$literal": value };
        let take = rawdoc! { "$set": {
            "sid": { "$ifNull": ["$sid", literal(token().into())] },
            "s": { "$ifNull": ["$s", literal(RawDocumentBuf::new().into())] },
            "e": { "$max": [{ "$add": [{ "$ifNull": ["$e", 0_i64] }, 1_i64] }, epoch_min] },
            "n": i64::from(self.node),
            "c": true,
            "ct": literal(token().into()),
            "v": version_number(ProtocolVersion::V5),
            "exp": i64::from(u32::MAX),
            "sv": { "$add": [{ "$ifNull": ["$sv", 0_i64] }, 1_i64] },
        } };
        let take = [update(free, array([take]), true)];
        let mut time = None;
        // If its key is taken, another node has it.
        for batch in write_commands(Verb::Update, SESSIONS, take, Concern::Majority) {
            time = self.commands.write(batch.command).await?.time;
        }
        let query = Query::new(SESSIONS, rawdoc! { "_id": &*key }).limit(1);
        let found = self.commands.find(query.after(time)).await?;
        let Some(document) = found.first() else {
            return Ok(None);
        };
        let fields = Document::new("a share group", document);
        let (Some(session), Some(node)) = (fields.session("sid")?, fields.optional_node("n")?)
        else {
            return Ok(None);
        };
        let place = GroupPlace {
            session,
            epoch: fields.long("e")?.cast_unsigned(),
            node,
            is_saved: fields.has("h")?,
        };
        let is_taken = fields.session("ct")? == Some(request.new_session);
        if is_taken {
            let held = Held {
                key,
                epoch: place.epoch,
                is_known_to_others: place.is_saved,
            };
            self.held.insert(session, Hold::Session(held));
        }
        Ok((fields.flag("c")? && is_taken == (node == self.node)).then_some(place))
    }

    /// The exchanges of QoS 2 that these sessions have not finished.
    ///
    /// # Errors
    /// `StoreError` if they could not be read.
    pub(crate) async fn exchanges_of(
        &self,
        sessions: &[SessionId],
    ) -> Result<Vec<(SessionId, OutgoingExchange)>, StoreError> {
        let mut exchanges = Vec::new();
        for sessions in sessions.chunks(RANGES_MAX) {
            let ranges = array(sessions.iter().map(|session| packets_of(*session)));
            let query = Query::new(EXCHANGES, rawdoc! { "$or": ranges });
            self.commands
                .for_each(query, |document| {
                    exchanges.push(read_exchange(document)?);
                    Ok(())
                })
                .await?;
        }
        Ok(exchanges)
    }
}
