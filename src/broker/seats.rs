//! The members of share groups that are connected to this node of a cluster, and where their groups
//! are dispatched.
//!
//! A group is dispatched by one node, which need not be this one: [`dispatch`](super::group::dispatch).
//! That one is told who comes here and who goes, gives messages to the *seats* here, and hears what
//! becomes of them. When a group has a member here and nobody dispatches it, this node takes it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Node;
use super::flush::Receipt;
use super::group::Group;
use super::group::dispatch::{Departure, SeatKey};
use super::mailbox::Mailbox;
use super::sessions::group_record;
use super::shared::Learned;
use crate::bus::wire::{Item, Seat};
use crate::cluster::Cluster;
use crate::metrics::Arrival;
use crate::mqtt::QoS;
use crate::mqtt::SubscriptionFilter;
use crate::mqtt::topic::{RetainHandling, SubscribeOptions};
use crate::session::{Delivery, IN_MEMORY, Origin};
use crate::store::mongodb::{GroupPlace, GroupRequest};
use crate::store::{Change, Entry, InboxSummary, MessageId, SessionId, StoreError};

/// How long a SUBACK waits for a group that nobody can dispatch, because the store is not available.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait before a group is looked up again that somebody else is about to make or to end.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// How long to wait after the store did not answer.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Messages of a seat that are remembered after the member has taken them over: whoever dispatched
/// the group may have died before it knew.
const SETTLED_MAX: usize = 256;

/// The share groups of the cluster, as this node sees them.
#[derive(Default)]
pub(super) struct Seats {
    stations: Mutex<HashMap<SubscriptionFilter, Station>>,
    /// The last that a seat was given.
    number: AtomicU64,
    errands: Mutex<Vec<Errand>>,
    has_errands: Notify,
    /// Some group has been found to be dispatched.
    placed: Notify,
}

/// One group.
#[derive(Default)]
struct Station {
    /// Who dispatches it.
    place: Option<GroupPlace>,
    /// The incarnation whose messages its members have, also while nobody dispatches it.
    session: Option<SessionId>,
    /// This node is about to find out, or to take it.
    is_sought: bool,
    /// By client id.
    seats: HashMap<Arc<str>, OwnSeat>,
    clients: HashMap<u64, Arc<str>>,
    /// How many have gone that had begun to receive a message.
    departures: u64,
}

/// A member that is connected here.
struct OwnSeat {
    number: u64,
    membership: SeatedMember,
    /// Of the exchanges that an earlier connection began, those whose messages have not come again.
    begun: Vec<(SessionId, MessageId)>,
    held: HashSet<MessageId>,
    settled: VecDeque<MessageId>,
    /// The largest that it was given: later ones are new to it.
    last_given: MessageId,
}

/// A member as its connection knows it.
pub(super) struct SeatedMember {
    pub(super) mailbox: Arc<Mailbox>,
    /// The epoch of its session.
    pub(super) since: u64,
    pub(super) window: u16,
    pub(super) options: SubscribeOptions,
    pub(super) identifier: Option<u32>,
}

/// What of share groups takes time.
enum Errand {
    /// Find out who dispatches a group with members here, or take it.
    Seek(SubscriptionFilter),
    /// Tell the node that dispatches a group who is here.
    Answer {
        group: Arc<Group>,
        place: GroupPlace,
    },
}

impl OwnSeat {
    fn describe(&self, session: SessionId) -> Seat {
        let member = &self.membership;
        let begun = self.begun.iter();
        let begun = begun.filter_map(|(inbox, id)| (*inbox == session).then_some(*id));
        Seat {
            number: self.number,
            client_id: member.mailbox.client_id.clone(),
            since: member.since,
            window: member.window,
            maximum_qos: member.options.maximum_qos,
            retain_as_published: member.options.retain_as_published,
            identifier: member.identifier,
            begun: begun.collect(),
            held: self.held.iter().copied().collect(),
            settled: self.settled.iter().copied().collect(),
        }
    }

    /// Returns whether the client had it.
    fn settle(&mut self, session: SessionId, id: MessageId) -> bool {
        let begun = self.begun.len();
        self.begun.retain(|begun| *begun != (session, id));
        let had = self.held.remove(&id) || self.begun.len() < begun;
        if had {
            if self.settled.len() == SETTLED_MAX {
                self.settled.pop_front();
            }
            self.settled.push_back(id);
        }
        had
    }
}

impl Station {
    fn is_empty(&self) -> bool {
        self.place.is_none() && self.seats.is_empty() && !self.is_sought
    }

    fn is_at(&self, session: SessionId, node: u32, epoch: u64) -> bool {
        let place = self.place.as_ref();
        place.is_some_and(|it| (it.session, it.node, it.epoch) == (session, node, epoch))
    }

    /// What members have of another incarnation is nothing: that one is over.
    fn set_session(&mut self, session: SessionId) {
        if self.session.replace(session) == Some(session) {
            return;
        }
        for seat in self.seats.values_mut() {
            seat.held.clear();
            seat.settled.clear();
            seat.last_given = MessageId::MIN;
        }
    }

    fn describe_all(&self, session: SessionId) -> Vec<Seat> {
        let seats = self.seats.values();
        seats.map(|seat| seat.describe(session)).collect()
    }
}

impl Node {
    /// Makes sure that there is a group for a subscription that is about to be made; `false` if there
    /// cannot be one now.
    pub(crate) async fn open_group(&self, filter: &SubscriptionFilter) -> bool {
        if self.cluster.is_none() {
            return true;
        }
        let opening = async {
            loop {
                let placed = self.seats.placed.notified();
                tokio::pin!(placed);
                placed.as_mut().enable();
                if self.is_dispatched(filter) {
                    return;
                }
                self.seek(filter);
                placed.await;
            }
        };
        timeout(OPEN_TIMEOUT, opening).await.is_ok()
    }

    fn is_dispatched(&self, filter: &SubscriptionFilter) -> bool {
        let stations = self.seats.stations.lock();
        stations.get(filter).is_some_and(|it| it.place.is_some())
    }

    /// Whether this node dispatches a group, as of this epoch.
    pub(super) fn dispatches(&self, group: &Group, epoch: u64) -> bool {
        let stations = self.seats.stations.lock();
        let station = stations.get(group.filter());
        station.is_some_and(|it| it.is_at(group.session(), self.flusher.node, epoch))
    }

    /// What has to be durable before a member may count on its group.
    pub(super) fn receipt_of_group(&self) -> Receipt {
        self.flusher.everything()
    }

    /// Has it found out who dispatches a group.
    fn seek(&self, filter: &SubscriptionFilter) {
        {
            let mut stations = self.seats.stations.lock();
            let station = stations.entry(filter.clone()).or_default();
            if std::mem::replace(&mut station.is_sought, true) {
                return;
            }
        }
        self.send_on(Errand::Seek(filter.clone()));
    }

    fn send_on(&self, errand: Errand) {
        self.seats.errands.lock().push(errand);
        self.seats.has_errands.notify_one();
    }

    /// Does what of share groups takes time, until the node stops.
    pub(crate) async fn run_groups(self: Arc<Self>) {
        let Some(cluster) = self.cluster.clone() else {
            return;
        };
        loop {
            let errands = std::mem::take(&mut *self.seats.errands.lock());
            for errand in errands {
                let (node, cluster) = (self.clone(), cluster.clone());
                self.tasks.spawn(async move {
                    match errand {
                        Errand::Seek(filter) => node.find_or_take(&cluster, &filter).await,
                        Errand::Answer { group, place } => {
                            node.answer(&cluster, &group, place).await;
                        }
                    }
                });
            }
            tokio::select! {
                () = self.seats.has_errands.notified() => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    /// Finds out who dispatches a group, and does it itself if nobody does.
    async fn find_or_take(self: Arc<Self>, cluster: &Arc<Cluster>, filter: &SubscriptionFilter) {
        let (place, others) = loop {
            if self.stopping.is_cancelled() {
                return;
            }
            match self.open_shared_group(cluster, filter).await {
                Ok(Some((place, others))) if place.is_saved || place.node == cluster.node() => {
                    break (place, others);
                }
                // Somebody is about to make it, or to end it.
                Ok(_) => tokio::time::sleep(LOOK_AGAIN_AFTER).await,
                Err(error @ StoreError::Unavailable(_)) => {
                    tracing::warn!(event = "group_unavailable", group = %filter, %error);
                    tokio::time::sleep(TRY_AGAIN_AFTER).await;
                }
                Err(error) => {
                    tracing::error!(event = "group_unavailable", group = %filter, %error);
                    return self.sought(filter);
                }
            }
        };
        let is_own = place.node == cluster.node();
        if is_own && !place.is_saved {
            // Before anything is written to its inbox.
            let mut record = group_record(filter, place.session);
            record.connected = true;
            self.flusher.persist(Change::SaveSession(Box::new(record)));
        }
        let group = self.learn_group(filter, place.session, place.epoch);
        let group = group.filter(|group| self.place_group(group, place));
        self.sought(filter);
        let Some(group) = group else {
            // It has ended just now.
            return self.seek_if_needed(filter);
        };
        if is_own {
            let (node, cluster) = (self.clone(), cluster.clone());
            self.tasks
                .spawn(async move { node.serve(&cluster, &group, place, &others).await });
        } else {
            self.answer(cluster, &group, place).await;
        }
    }

    /// Takes a group in the store, if no other node dispatches it; returns who does, and which others
    /// are up.
    async fn open_shared_group(
        &self,
        cluster: &Cluster,
        filter: &SubscriptionFilter,
    ) -> Result<Option<(GroupPlace, Vec<u32>)>, StoreError> {
        let alive = cluster.others_up().await?;
        let request = GroupRequest {
            filter,
            new_session: SessionId::random(),
            alive: &alive,
            epoch_min: self.flusher.add().tick(),
        };
        let place = cluster.store.open_group(request).await?;
        // Whoever comes up from now on finds out that it is taken.
        let others = cluster.others_up().await?;
        Ok(place.map(|place| (place, others)))
    }

    fn sought(&self, filter: &SubscriptionFilter) {
        let mut stations = self.seats.stations.lock();
        if let Some(station) = stations.get_mut(filter) {
            station.is_sought = false;
            if station.is_empty() {
                stations.remove(filter);
            }
        }
        drop(stations);
        self.seats.placed.notify_waiters();
    }

    /// Looks for a dispatcher if there are members here and none is known.
    fn seek_if_needed(&self, filter: &SubscriptionFilter) {
        let needs_one = {
            let stations = self.seats.stations.lock();
            let station = stations.get(filter);
            station.is_some_and(|it| !it.seats.is_empty() && it.place.is_none())
        };
        if needs_one {
            self.seek(filter);
        }
    }

    /// Looks again for dispatchers at nodes that are not known: they have come just now, or were gone
    /// before that was seen.
    pub(crate) fn look_for_dispatchers(&self, cluster: &Cluster) {
        let known = cluster.members.others();
        let doubtful: Vec<_> = {
            let stations = self.seats.stations.lock();
            let is_doubtful = |station: &Station| {
                let node = station.place.map(|place| place.node);
                !station.seats.is_empty()
                    && node.is_none_or(|node| node != cluster.node() && !known.contains(&node))
            };
            let doubtful = stations.iter().filter(|(_, it)| is_doubtful(it));
            doubtful.map(|(filter, _)| filter.clone()).collect()
        };
        for filter in &doubtful {
            self.seek(filter);
        }
    }

    /// Dispatches a group until nobody is there.
    async fn serve(
        self: Arc<Self>,
        cluster: &Arc<Cluster>,
        group: &Arc<Group>,
        place: GroupPlace,
        others: &[u32],
    ) {
        // Others hear of it once it is certain that they can find it.
        if self
            .flusher
            .durable(self.flusher.everything())
            .await
            .is_err()
        {
            return;
        }
        tracing::debug!(event = "group_taken", group = %group.filter());
        if !group.serve(&self, cluster, place.epoch, others).await {
            return;
        }
        let is_deserted = self.shared.members_of(group.filter()).is_empty();
        let receipt = if is_deserted {
            self.flusher.persist(Change::EndSession(group.session()))
        } else {
            let record = group_record(group.filter(), group.session());
            self.flusher.persist(Change::SaveSession(Box::new(record)))
        };
        // Whoever looks for a dispatcher from now on has to find none.
        if self.flusher.durable(receipt).await.is_err() {
            return;
        }
        tracing::debug!(event = "group_released", group = %group.filter());
        {
            let mut stations = self.seats.stations.lock();
            if let Some(station) = stations.get_mut(group.filter())
                && station.is_at(place.session, place.node, place.epoch)
            {
                station.place = None;
            }
            // While it is locked: whoever takes a seat now looks for a dispatcher.
            cluster.broadcast(&Item::Disown {
                session: place.session,
                epoch: place.epoch,
            });
        }
        self.seek_if_needed(group.filter());
    }

    /// A group that nodes share, as of now if it was not known; `None` if it has ended.
    pub(super) fn learn_group(
        &self,
        filter: &SubscriptionFilter,
        session: SessionId,
        epoch: u64,
    ) -> Option<Arc<Group>> {
        let mut groups = self.groups.lock();
        let known = groups.get(filter);
        if let Some(known) = known {
            if known.session() == session {
                return Some(known.clone());
            }
            if known.shared_since().is_some_and(|since| since > epoch) {
                return None;
            }
        }
        if self.shared.has_ended(session) {
            return None;
        }
        // Nothing is gathered meanwhile: each message has been matched either before or after it.
        let mut additions = self.flusher.add();
        let mailbox = self.shared.mailbox_or(session, || {
            self.new_group_mailbox(filter, session, InboxSummary::default(), true)
        });
        let group = Arc::new(Group::shared(filter.clone(), mailbox.clone(), epoch));
        if let Some(before) = groups.insert(filter.clone(), group.clone()) {
            self.subscriptions.remove_group(&before);
            self.groups_by_session.lock().remove(&before.session());
            before.close();
        }
        self.groups_by_session.lock().insert(session, group.clone());
        let version = self.subscriptions.add_group(&group);
        let learned = Learned {
            version,
            mailbox: mailbox.clone(),
            filter: filter.clone(),
            options: SubscribeOptions {
                maximum_qos: QoS::ExactlyOnce,
                no_local: false,
                retain_as_published: true,
                retain_handling: RetainHandling::DoNotSend,
            },
            identifier: None,
        };
        additions.catch_up(&mailbox, version, |message| learned.delivery(message));
        self.shared.learn(learned);
        Some(group)
    }

    /// Notes who dispatches a group; `false` if that is known to be out of date.
    pub(super) fn place_group(&self, group: &Arc<Group>, place: GroupPlace) -> bool {
        let own = self.flusher.node;
        let was_own = {
            // Whoever adds a message from now on hands it on to that node.
            let mut additions = self.flusher.add();
            let mut stations = self.seats.stations.lock();
            let station = stations.entry(group.filter().clone()).or_default();
            let before = station.place;
            if before.is_some_and(|before| before.epoch > place.epoch) {
                return false;
            }
            station.place = Some(place);
            station.set_session(place.session);
            let holder = (place.node != own).then_some(place.node);
            group.mailbox().set_holder(holder);
            additions.tick();
            before.is_some_and(|before| before.node == own)
        };
        if was_own && place.node != own {
            group.close();
        }
        self.seats.placed.notify_waiters();
        true
    }

    /// Nobody dispatches a group any more, as of this epoch.
    fn displace_group(&self, group: &Group, epoch: u64) -> bool {
        let mut stations = self.seats.stations.lock();
        let Some(station) = stations.get_mut(group.filter()) else {
            return false;
        };
        let is_meant =
            |place: &mut GroupPlace| place.session == group.session() && place.epoch <= epoch;
        let was = station.place.take_if(is_meant);
        if was.is_some() {
            group.mailbox().set_holder(None);
        }
        was.is_some_and(|place| place.node == self.flusher.node)
    }

    /// Tells whoever dispatches a group who is here, once it can read from the store what those have
    /// begun to receive who are not here any more.
    async fn answer(&self, cluster: &Cluster, group: &Group, place: GroupPlace) {
        group.until_idle().await;
        loop {
            let departures = {
                let stations = self.seats.stations.lock();
                let station = stations.get(group.filter());
                station.map_or(0, |station| station.departures)
            };
            let receipt = self.flusher.everything();
            if self.flusher.durable(receipt).await.is_err()
                || self.tell_seats(cluster, group, place, departures)
            {
                return;
            }
        }
    }

    /// Returns `false` if somebody has gone since there were so many `departures`.
    fn tell_seats(
        &self,
        cluster: &Cluster,
        group: &Group,
        place: GroupPlace,
        departures: u64,
    ) -> bool {
        let stations = self.seats.stations.lock();
        let Some(station) = stations.get(group.filter()) else {
            return true;
        };
        if !station.is_at(place.session, place.node, place.epoch) {
            return true;
        }
        if station.departures != departures {
            return false;
        }
        // While they are locked: whatever becomes of them is told afterwards.
        cluster.send(
            place.node,
            &Item::Seats {
                session: place.session,
                epoch: place.epoch,
                seats: station.describe_all(place.session),
            },
        );
        true
    }

    /// The members of a group that are connected here.
    pub(super) fn own_seats(&self, group: &Group) -> Vec<Seat> {
        let stations = self.seats.stations.lock();
        let station = stations.get(group.filter());
        station.map_or_else(Vec::new, |station| station.describe_all(group.session()))
    }

    /// How clients that are connected here have subscribed to groups.
    pub(super) fn seats_of(
        &self,
        client_id: &str,
    ) -> Vec<(SubscriptionFilter, SubscribeOptions, Option<u32>)> {
        let stations = self.seats.stations.lock();
        let seats = stations.iter().filter_map(|(filter, station)| {
            let member = &station.seats.get(client_id)?.membership;
            Some((filter.clone(), member.options, member.identifier))
        });
        seats.collect()
    }

    /// The members of a group: all whose sessions are persistent, and of the others those that are
    /// known here.
    pub(crate) fn members_of_group(&self, group: &Group) -> Vec<Arc<str>> {
        let mut members = group.member_ids();
        if group.shared_since().is_some() {
            let persistent = self.shared.members_of(group.filter()).into_iter();
            members.extend(persistent.map(|(_, client_id)| client_id));
            if let Some(station) = self.seats.stations.lock().get(group.filter()) {
                members.extend(station.seats.keys().cloned());
            }
            members.sort_unstable();
            members.dedup();
        }
        members
    }

    /// A member is connected here, or has subscribed anew.
    pub(super) fn take_seat(
        &self,
        cluster: &Cluster,
        filter: &SubscriptionFilter,
        member: SeatedMember,
        begun: Vec<(SessionId, MessageId)>,
    ) {
        let client_id = member.mailbox.client_id.clone();
        let own = {
            let mut stations = self.seats.stations.lock();
            let station = stations.entry(filter.clone()).or_default();
            match station.seats.get_mut(&client_id) {
                Some(seat) if Arc::ptr_eq(&seat.membership.mailbox, &member.mailbox) => {
                    seat.membership = member;
                }
                _ => {
                    let number = self.seats.number.fetch_add(1, Ordering::Relaxed) + 1;
                    let seat = OwnSeat {
                        number,
                        membership: member,
                        begun,
                        held: HashSet::new(),
                        settled: VecDeque::new(),
                        last_given: MessageId::MIN,
                    };
                    station.clients.insert(number, client_id.clone());
                    if let Some(before) = station.seats.insert(client_id.clone(), seat) {
                        station.clients.remove(&before.number);
                    }
                }
            }
            let seat = &station.seats[&client_id];
            match station.place {
                Some(place) if place.node == cluster.node() => {
                    Some((place.session, seat.describe(place.session)))
                }
                Some(place) => {
                    // While it is locked: what a dispatcher hears is in the order of what happens.
                    let item = Item::Seat {
                        session: place.session,
                        epoch: place.epoch,
                        seat: seat.describe(place.session),
                    };
                    cluster.send(place.node, &item);
                    None
                }
                None => None,
            }
        };
        if let Some((session, seat)) = own
            && let Some(group) = self.group_of_inbox(session)
        {
            group.take_seat(cluster.node(), &seat, self);
        }
        self.seek_if_needed(filter);
    }

    /// A member is not connected here any more, or no member.
    pub(super) fn leave_seat(
        &self,
        cluster: &Cluster,
        filter: &SubscriptionFilter,
        mailbox: &Arc<Mailbox>,
        exchanges: &[(SessionId, MessageId, bool)],
        has_left: bool,
    ) {
        let own = {
            let mut stations = self.seats.stations.lock();
            let Some(station) = stations.get_mut(filter) else {
                return;
            };
            let seat = station.seats.get(&mailbox.client_id);
            if seat.is_none_or(|seat| !Arc::ptr_eq(&seat.membership.mailbox, mailbox)) {
                return;
            }
            let Some(seat) = station.seats.remove(&mailbox.client_id) else {
                return;
            };
            station.clients.remove(&seat.number);
            station.departures += u64::from(!exchanges.is_empty());
            let Some(place) = station.place else {
                return;
            };
            let of_group = exchanges
                .iter()
                .filter(|(inbox, ..)| *inbox == place.session);
            let (mut begun, mut finished) = (Vec::new(), Vec::new());
            for (_, id, is_received) in of_group {
                if !has_left {
                    begun.push(*id);
                } else if *is_received {
                    finished.push(*id);
                }
            }
            if place.node == cluster.node() {
                Some((place.session, seat.number, begun, finished))
            } else {
                let item = Item::Unseat {
                    session: place.session,
                    number: seat.number,
                    begun,
                    finished,
                    has_left,
                };
                cluster.send(place.node, &item);
                None
            }
        };
        if let Some((session, number, begun, finished)) = own
            && let Some(group) = self.group_of_inbox(session)
        {
            let key = SeatKey {
                node: cluster.node(),
                number,
            };
            let departure = Departure {
                begun: Some(&begun),
                finished: &finished,
                has_left,
            };
            group.end_seat(key, &departure, self);
        }
    }

    /// A client that is connected here has taken over a message of a share group.
    pub(crate) fn settle_in_group(&self, session: SessionId, id: MessageId, client_id: &str) {
        let Some(group) = self.group_of_inbox(session) else {
            return;
        };
        let Some(cluster) = &self.cluster else {
            return group.settle(id, client_id, &mut self.flusher.add());
        };
        let own = {
            let mut stations = self.seats.stations.lock();
            let Some(station) = stations.get_mut(group.filter()) else {
                return;
            };
            let place = station.place;
            let Some(seat) = station.seats.get_mut(client_id) else {
                return;
            };
            if !seat.settle(session, id) {
                return;
            }
            match place {
                Some(place) if place.session != session => None,
                Some(place) if place.node == cluster.node() => Some(SeatKey {
                    node: place.node,
                    number: seat.number,
                }),
                Some(place) => {
                    let item = Item::Settled {
                        session,
                        seat: seat.number,
                        ids: vec![id],
                    };
                    cluster.send(place.node, &item);
                    None
                }
                None => None,
            }
        };
        if let Some(key) = own {
            group.settle_seat(key, &[id], self);
        }
    }

    /// A member whose session has ended had received messages, so that no other may have them.
    pub(super) fn finish_in_group(&self, session: SessionId, ids: &[MessageId]) {
        let Some(group) = self.group_of_inbox(session) else {
            return;
        };
        let Some(cluster) = &self.cluster else {
            return;
        };
        let place = {
            let stations = self.seats.stations.lock();
            stations.get(group.filter()).and_then(|it| it.place)
        };
        match place {
            Some(place) if place.node == cluster.node() => group.finish_all(ids, self),
            Some(place) => {
                let item = Item::Settled {
                    session,
                    seat: 0,
                    ids: ids.to_vec(),
                };
                cluster.send(place.node, &item);
            }
            None => {}
        }
    }

    /// Sends a message of a group that is dispatched here to a member.
    pub(super) fn give(
        &self,
        session: SessionId,
        epoch: u64,
        seat: SeatKey,
        entry: Entry,
        arrival: Arrival,
    ) {
        if seat.node == self.flusher.node {
            self.receive_give(seat.node, session, epoch, seat.number, entry, arrival);
        } else if let Some(cluster) = &self.cluster {
            let item = Item::Give {
                session,
                epoch,
                seat: seat.number,
                entry,
            };
            cluster.send(seat.node, &item);
        }
    }

    /// A message for a member that is connected here.
    pub(super) fn receive_give(
        &self,
        from: u32,
        session: SessionId,
        epoch: u64,
        number: u64,
        entry: Entry,
        arrival: Arrival,
    ) {
        let Some(group) = self.group_of_inbox(session) else {
            return;
        };
        let mut stations = self.seats.stations.lock();
        let Some(station) = stations.get_mut(group.filter()) else {
            return;
        };
        if !station.is_at(session, from, epoch) {
            return;
        }
        let Some(client_id) = station.clients.get(&number) else {
            return;
        };
        let Some(seat) = station.seats.get_mut(client_id) else {
            return;
        };
        let id = entry.id;
        let origin = if id.node == IN_MEMORY && entry.qos == QoS::AtMostOnce {
            Origin::Memory
        } else {
            if id <= seat.last_given && seat.settled.contains(&id) {
                // It was not heard.
                if let Some(cluster) = &self.cluster {
                    let ids = vec![id];
                    let seat = number;
                    cluster.send(from, &Item::Settled { session, seat, ids });
                }
                return;
            }
            if !seat.held.insert(id) {
                return;
            }
            seat.last_given = seat.last_given.max(id);
            seat.begun.retain(|begun| *begun != (session, id));
            Origin::Group(session, id)
        };
        // If its connection is over, that will be told.
        seat.membership.mailbox.push_from_group(Delivery {
            message: entry.message,
            qos: entry.qos,
            retain: entry.retain,
            subscription_identifiers: entry.subscription_identifiers,
            origin,
            arrival,
        });
    }

    /// Another node dispatches a group from now on.
    pub(super) fn receive_dispatch(
        &self,
        from: u32,
        filter: &SubscriptionFilter,
        session: SessionId,
        epoch: u64,
    ) {
        let place = GroupPlace {
            session,
            epoch,
            node: from,
            is_saved: true,
        };
        if let Some(group) = self.learn_group(filter, session, epoch)
            && self.place_group(&group, place)
        {
            self.send_on(Errand::Answer { group, place });
        }
    }

    /// Members at another node: all of them, or one.
    pub(super) fn receive_seats(
        &self,
        cluster: &Cluster,
        from: u32,
        session: SessionId,
        epoch: u64,
        told: Result<&[Seat], &Seat>,
    ) {
        let group = self.group_of_inbox(session);
        let is_heard = group.is_some_and(|group| match told {
            Ok(all) => group.hear_seats(from, epoch, all, self),
            Err(seat) => self.dispatches(&group, epoch) && group.take_seat(from, seat, self),
        });
        if !is_heard {
            // It has not heard so before.
            cluster.send(from, &Item::Disown { session, epoch });
        }
    }

    /// What became of a member at another node, or of messages that it was given.
    pub(super) fn receive_from_seat(&self, from: u32, item: Item) {
        match item {
            Item::Unseat {
                session,
                number,
                begun,
                finished,
                has_left,
            } => {
                if let Some(group) = self.group_of_inbox(session) {
                    let key = SeatKey { node: from, number };
                    let departure = Departure {
                        begun: Some(&begun),
                        finished: &finished,
                        has_left,
                    };
                    group.end_seat(key, &departure, self);
                }
            }
            Item::Settled { session, seat, ids } => {
                if let Some(group) = self.group_of_inbox(session) {
                    if seat == 0 {
                        group.finish_all(&ids, self);
                    } else {
                        let key = SeatKey {
                            node: from,
                            number: seat,
                        };
                        group.settle_seat(key, &ids, self);
                    }
                }
            }
            _ => {}
        }
    }

    /// A node does not dispatch a group any more; `false` if that is not what `session` is.
    pub(super) fn group_disowned(&self, session: SessionId, epoch: u64) -> bool {
        let Some(group) = self.group_of_inbox(session) else {
            return false;
        };
        if group.shared_since().is_none() {
            return false;
        }
        self.displace_group(&group, epoch);
        self.seek_if_needed(group.filter());
        true
    }

    /// Another node has taken a group that this one dispatched, as a write has shown.
    pub(super) fn group_lost(&self, session: SessionId) -> bool {
        let Some(group) = self.group_of_inbox(session) else {
            return false;
        };
        if self.displace_group(&group, u64::MAX) {
            group.close();
        }
        self.seek_if_needed(group.filter());
        true
    }

    /// A group has ended. Members that are here make another one.
    pub(super) fn forget_group(&self, session: SessionId) {
        let Some(group) = self.groups_by_session.lock().remove(&session) else {
            return;
        };
        {
            let mut groups = self.groups.lock();
            if groups
                .get(group.filter())
                .is_some_and(|known| known.session() == session)
            {
                groups.remove(group.filter());
            }
        }
        self.subscriptions.remove_group(&group);
        group.close();
        let mut stations = self.seats.stations.lock();
        let Some(station) = stations.get_mut(group.filter()) else {
            return;
        };
        station.place.take_if(|place| place.session == session);
        if station.is_empty() {
            stations.remove(group.filter());
        }
        drop(stations);
        self.seek_if_needed(group.filter());
    }

    /// A client is no member of a group any more, or its session has ended.
    pub(super) fn member_ended(&self, filter: &SubscriptionFilter, client_id: &str) {
        if let Some(group) = self.group(filter) {
            group.member_ended(client_id);
        }
    }

    /// A node is gone.
    pub(super) fn node_of_groups_left(&self, cluster: &Cluster, node: u32) {
        for group in self.shared_groups() {
            let place = {
                let stations = self.seats.stations.lock();
                stations.get(group.filter()).and_then(|it| it.place)
            };
            match place {
                Some(place) if place.node == node => {
                    self.displace_group(&group, place.epoch);
                    self.seek_if_needed(group.filter());
                }
                Some(place) if place.node == cluster.node() => group.node_gone(node, self),
                _ => {}
            }
        }
    }

    /// Frames from another node have been lost: who is there, and what they have, is told anew.
    pub(crate) fn resynchronize_groups(&self, node: u32) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        for group in self.shared_groups() {
            let place = {
                let stations = self.seats.stations.lock();
                stations.get(group.filter()).and_then(|it| it.place)
            };
            match place {
                Some(place) if place.node == cluster.node() => group.ask_again(node, cluster),
                Some(place) if place.node == node => {
                    self.send_on(Errand::Answer { group, place });
                }
                _ => {}
            }
        }
    }

    fn shared_groups(&self) -> Vec<Arc<Group>> {
        self.groups.lock().values().cloned().collect()
    }

    /// Forgets dispatchers that were gone before this node came.
    pub(crate) fn forget_absent_dispatchers(&self, cluster: &Cluster) {
        for group in self.shared_groups() {
            let place = {
                let stations = self.seats.stations.lock();
                stations.get(group.filter()).and_then(|it| it.place)
            };
            let known = cluster.members.others();
            let is_there = |node: u32| node == cluster.node() || known.contains(&node);
            if let Some(place) = place.filter(|place| !is_there(place.node)) {
                self.displace_group(&group, place.epoch);
            }
        }
    }

    /// Ends groups that have no members any more and whose dispatcher could not.
    pub(crate) async fn end_deserted_groups(&self, cluster: &Cluster) {
        for group in self.shared_groups() {
            let filter = group.filter();
            let is_deserted = {
                let stations = self.seats.stations.lock();
                let station = stations.get(filter);
                self.shared.members_of(filter).is_empty() && station.is_none_or(Station::is_empty)
            };
            if !is_deserted {
                continue;
            }
            match self.open_shared_group(cluster, filter).await {
                Ok(Some((place, _))) if place.node == cluster.node() => {
                    self.flusher.persist(Change::EndSession(place.session));
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(event = "group_unavailable", group = %filter, %error);
                }
            }
        }
    }
}
