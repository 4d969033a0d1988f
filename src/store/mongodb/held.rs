//! Which sessions this node holds, and with which epoch.

use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::store::SessionId;

/// All sessions that this node may write to, and those that it lost.
#[derive(Debug, Default)]
pub(super) struct HeldSessions(Mutex<HashMap<SessionId, Hold>>);

/// What this node knows of its right to write to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// It may, as long as the document is at this epoch.
    Session(Held),
    /// It may finish it, as long as the document under this key still names it as left over.
    Leftover { key: Arc<str>, ended: bool },
    /// Another node has taken it. Remembered so that a later `SaveSession` does not take it back.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Of the document.
    pub(super) key: Arc<str>,
    pub(super) epoch: u64,
    /// Other nodes know subscriptions of it, and have to be told when it ends.
    pub(super) is_known_to_others: bool,
}

impl HeldSessions {
    /// Those of `sessions` that anything is known of.
    pub(super) fn of(&self, sessions: impl Iterator<Item = SessionId>) -> HashMap<SessionId, Hold> {
        let all = self.0.lock();
        let known = sessions.filter_map(|session| Some((session, all.get(&session)?.clone())));
        known.collect()
    }

    pub(super) fn is_held(&self, session: SessionId) -> bool {
        matches!(self.0.lock().get(&session), Some(Hold::Session(_)))
    }

    /// Unless it is held at a later epoch already: it may have been taken from another node again
    /// while a write was under way.
    pub(super) fn insert(&self, session: SessionId, hold: Hold) {
        let mut all = self.0.lock();
        if let Some(Hold::Session(known)) = all.get(&session)
            && let Hold::Session(held) = &hold
            && known.epoch > held.epoch
        {
            return;
        }
        all.insert(session, hold);
    }

    pub(super) fn remove(&self, session: SessionId) {
        self.0.lock().remove(&session);
    }

    /// Forgets what is known of a session from before `epoch`.
    pub(super) fn forget(&self, session: SessionId, epoch: u64) {
        let mut all = self.0.lock();
        let is_old = match all.get(&session) {
            Some(Hold::Session(held)) => held.epoch < epoch,
            Some(Hold::Lost) => true,
            Some(Hold::Leftover { .. }) | None => false,
        };
        if is_old {
            all.remove(&session);
        }
    }

    /// Remembers that a session which this node held so is another's now, unless it has been taken
    /// again since.
    pub(super) fn lose(&self, session: SessionId, lost: &Hold) {
        if let Some(hold) = self.0.lock().get_mut(&session)
            && hold == lost
        {
            *hold = Hold::Lost;
        }
    }
}
