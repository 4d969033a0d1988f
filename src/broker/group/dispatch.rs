//! A share group whose members are connected to several nodes.
//!
//! One node dispatches: the one that has taken the group in the store, as a client's node takes its
//! session. It asks all others who is there ([`Item::Dispatch`]) before it gives anything, so that
//! what members have got from the dispatcher before it is given to nobody else. From then on each
//! node says who comes and goes; who comes has a *seat*. What is given to a seat stays with it until
//! its node says what became of it, or is gone.
//!
//! The node that a member is connected to is [`seats`](crate::broker::seats).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::MutexGuard;

use super::{Bound, Given, Group, Member, Members, Online, Place, READ_AGAIN_AFTER, Step};
use crate::broker::Node;
use crate::broker::consumer::Inbox;
use crate::broker::mailbox::Mailbox;
use crate::bus::wire::{Item, Seat};
use crate::cluster::Cluster;
use crate::mqtt::QoS;
use crate::mqtt::topic::{RetainHandling, SubscribeOptions, SubscriptionFilter};
use crate::session::Delivery;
use crate::store::{MessageId, StoreError};

/// How long a dispatcher waits for nodes to answer before it asks again.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A seat among those of all nodes. None has the number 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::broker) struct SeatKey {
    pub(in crate::broker) node: u32,
    pub(in crate::broker) number: u64,
}

/// A message on its way to a seat.
pub(super) struct Handing {
    pub(super) seat: SeatKey,
    pub(super) id: MessageId,
    pub(super) delivery: Delivery,
}

/// This node dispatches.
pub(super) struct Serving {
    epoch: u64,
    /// Nodes that were up when this one took the group.
    others: HashSet<u32>,
    /// Those of them that have not yet said who is there. Nothing is given before they have.
    unheard: HashSet<u32>,
    /// Whether messages are read: all of them come by, and so do those that members have already.
    has_begun: bool,
}

/// A member has gone.
pub(in crate::broker) struct Departure<'a> {
    /// What it has begun to receive; not known if its node does not say so any more.
    pub(in crate::broker) begun: Option<&'a [MessageId]>,
    pub(in crate::broker) finished: &'a [MessageId],
    /// Whether it does not come back.
    pub(in crate::broker) has_left: bool,
}

impl Group {
    /// A group that nodes share.
    pub(in crate::broker) fn shared(
        filter: SubscriptionFilter,
        mailbox: Arc<Mailbox>,
        since: u64,
    ) -> Self {
        Self::empty(filter, mailbox, Some(since))
    }

    /// When it was made, if nodes share it.
    pub(in crate::broker) fn shared_since(&self) -> Option<u64> {
        self.shared_since
    }

    /// Dispatches until nobody is there, or another node does. At any of the `others` members may have
    /// something from an earlier dispatcher. Returns whether this node has the group still.
    pub(in crate::broker) async fn serve(
        &self,
        node: &Arc<Node>,
        cluster: &Cluster,
        epoch: u64,
        others: &[u32],
    ) -> bool {
        loop {
            self.until_idle().await;
            let mut members = self.members.lock();
            if members.consuming {
                continue;
            }
            *members = Members {
                consuming: true,
                closed: node.stopping.is_cancelled() || !node.dispatches(self, epoch),
                serving: Some(Serving {
                    epoch,
                    others: others.iter().copied().collect(),
                    unheard: others.iter().copied().collect(),
                    has_begun: false,
                }),
                ..Members::default()
            };
            break;
        }
        for seat in node.own_seats(self) {
            self.take_seat(cluster.node(), &seat, node);
        }
        cluster.broadcast(&self.dispatch_item(epoch));
        // Also what members that have just gone had begun to receive.
        let receipt = node.flusher.everything();
        let mut goes_on =
            node.flusher.durable(receipt).await.is_ok() && self.hear_all(cluster, epoch).await;
        if goes_on {
            goes_on = self.bind_unfinished(node, cluster).await;
        }
        while goes_on {
            goes_on = self.give_out(node).await;
        }
        let mut members = self.members.lock();
        let is_closed = members.closed;
        *members = Members::default();
        drop(members);
        self.may_begin.notify_waiters();
        !is_closed
    }

    fn dispatch_item(&self, epoch: u64) -> Item {
        Item::Dispatch {
            group: self.filter.clone(),
            session: self.session(),
            epoch,
        }
    }

    /// Waits until this node has done with the group, if it dispatched before.
    pub(in crate::broker) async fn until_idle(&self) {
        loop {
            let changed = self.may_begin.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.members.lock().consuming {
                return;
            }
            changed.await;
        }
    }

    /// Waits until all other nodes have said who is there; `false` if it does not come to that.
    async fn hear_all(&self, cluster: &Cluster, epoch: u64) -> bool {
        loop {
            let changed = self.may_begin.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let unheard: Vec<_> = {
                let members = self.members.lock();
                let Some(serving) = members.serving.as_ref().filter(|_| !members.closed) else {
                    return false;
                };
                serving.unheard.iter().copied().collect()
            };
            if unheard.is_empty() {
                return true;
            }
            if tokio::time::timeout(ASK_AGAIN_AFTER, changed)
                .await
                .is_err()
            {
                // One that died before it was noticed is not heard of again.
                let up = cluster.others_up().await;
                if let (Ok(up), Some(serving)) = (up, &mut self.members.lock().serving) {
                    serving.unheard.retain(|node| up.contains(node));
                }
                for node in unheard {
                    cluster.send(node, &self.dispatch_item(epoch));
                }
            }
        }
    }

    /// Finds out which messages only members that are away can finish, [MQTT-4.8.2-5].
    async fn bind_unfinished(&self, node: &Node, cluster: &Cluster) -> bool {
        let durable = node.shared.members_of(&self.filter);
        let sessions: Vec<_> = durable.iter().map(|(session, _)| *session).collect();
        let exchanges = loop {
            match cluster.store.exchanges_of(&sessions).await {
                Ok(exchanges) => break exchanges,
                Err(error @ StoreError::Unavailable(_)) => {
                    tracing::warn!(event = "exchanges_unreadable", group = %self.filter, %error);
                    tokio::time::sleep(READ_AGAIN_AFTER).await;
                    if self.members.lock().closed {
                        return false;
                    }
                }
                Err(error) => {
                    tracing::error!(event = "exchanges_unreadable", group = %self.filter, %error);
                    return false;
                }
            }
        };
        let mut members = self.members.lock();
        for (session, exchange) in exchanges {
            let owner = durable.iter().find(|(durable, _)| *durable == session);
            // Members that are there have said so themselves.
            if let Some((_, client_id)) = owner
                && exchange.inbox == self.session()
                && members.seat_of(client_id).is_none()
            {
                members
                    .bound
                    .entry(exchange.message)
                    .or_insert_with(|| Bound {
                        client_id: client_id.clone(),
                        held_by: None,
                    });
            }
        }
        if let Some(serving) = &mut members.serving {
            serving.has_begun = true;
        }
        !members.closed
    }

    /// Gives messages to members as long as there are any; returns whether to begin again.
    async fn give_out(&self, node: &Arc<Node>) -> bool {
        let mut consumer = Some(node.attach(&self.mailbox, Inbox::Shared(None)));
        let step = loop {
            let polled =
                std::future::poll_fn(|context| self.poll_dispatch(&mut consumer, node, context));
            match polled.await {
                Step::Unreadable => tokio::time::sleep(READ_AGAIN_AFTER).await,
                step => break step,
            }
        };
        if let Some(ending) = consumer.take() {
            ending.detach();
        }
        self.members.lock().forget_what_is_stored();
        node.store_partly_settled(&self.mailbox).await;
        matches!(step, Step::NobodyOnline) && {
            let members = self.members.lock();
            members.is_anybody_online() && !members.closed
        }
    }

    /// A node has said who of the members is there.
    pub(in crate::broker) fn hear_seats(
        &self,
        from: u32,
        epoch: u64,
        seats: &[Seat],
        node: &Node,
    ) -> bool {
        let gone: Vec<_> = {
            let members = self.members.lock();
            if !members.serves(epoch) {
                return false;
            }
            let mut known: Vec<_> = members.all.iter().filter_map(Member::seat).collect();
            known.extend(members.given.values().map(|given| given.seat));
            known.sort_unstable();
            known.dedup();
            let is_gone = |key: &SeatKey| {
                key.node == from && !seats.iter().any(|seat| seat.number == key.number)
            };
            known.into_iter().filter(is_gone).collect()
        };
        for key in gone {
            self.end_seat(key, &Departure::UNKNOWN, node);
        }
        for seat in seats {
            self.take_seat(from, seat, node);
        }
        let has_joined = {
            let mut members = self.members.lock();
            let Some(serving) = &mut members.serving else {
                return false;
            };
            serving.unheard.remove(&from);
            serving.others.insert(from)
        };
        self.may_begin.notify_waiters();
        if has_joined {
            // What it wrote before it knew of this dispatcher was for the one before.
            self.mailbox.doubt();
        }
        true
    }

    /// A member is connected somewhere; returns whether this node dispatches.
    pub(in crate::broker) fn take_seat(&self, from: u32, seat: &Seat, node: &Node) -> bool {
        let key = SeatKey {
            node: from,
            number: seat.number,
        };
        let mut members = self.members.lock();
        if members.serving.is_none() {
            return false;
        }
        let done = members.take_seat(key, seat);
        let doubtful = std::mem::take(&mut members.doubtful);
        members.wake_dispatcher();
        self.hand_over(members, node);
        self.mailbox.read_again(&doubtful);
        if !done.is_empty() {
            node.flusher.add().settle(&self.mailbox, &done);
        }
        true
    }

    /// A member is gone. What it was given goes to others, but for exchanges of QoS 2 that it has
    /// begun and may come back to finish.
    pub(in crate::broker) fn end_seat(&self, key: SeatKey, departure: &Departure<'_>, node: &Node) {
        let mut additions = node.flusher.add();
        let mut members = self.members.lock();
        let done = members.end_seat(key, departure, |client_id| {
            node.shared.is_member(client_id, &self.filter)
        });
        let doubtful = std::mem::take(&mut members.doubtful);
        members.wake_dispatcher();
        drop(members);
        self.mailbox.read_again(&doubtful);
        additions.settle(&self.mailbox, &done);
    }

    /// Nobody is at this node any more.
    pub(in crate::broker) fn node_gone(&self, gone: u32, node: &Node) {
        let seats: Vec<_> = {
            let members = self.members.lock();
            let online = members.all.iter().filter_map(Member::seat);
            let given = members.given.values().map(|given| given.seat);
            let mut seats: Vec<_> = online.chain(given).collect();
            seats.retain(|seat| seat.node == gone);
            seats.sort_unstable();
            seats.dedup();
            seats
        };
        for seat in seats {
            self.end_seat(seat, &Departure::UNKNOWN, node);
        }
        if let Some(serving) = &mut self.members.lock().serving {
            serving.unheard.remove(&gone);
        }
        self.may_begin.notify_waiters();
    }

    /// A member whose session or subscription has ended does not come back.
    pub(in crate::broker) fn member_ended(&self, client_id: &str) {
        let mut members = self.members.lock();
        if members.serving.is_none() || members.seat_of(client_id).is_some() {
            return;
        }
        members
            .bound
            .retain(|_, bound| &*bound.client_id != client_id);
        for id in members.held_by(client_id) {
            if members.given[&id].seat == SeatKey::default() {
                members.give_back_unless_gone(id);
            }
        }
        let doubtful = std::mem::take(&mut members.doubtful);
        members.wake_dispatcher();
        drop(members);
        self.mailbox.read_again(&doubtful);
    }

    /// Members have taken over messages that they were given by way of a seat.
    pub(in crate::broker) fn settle_seat(&self, key: SeatKey, ids: &[MessageId], node: &Node) {
        let mut additions = node.flusher.add();
        let mut members = self.members.lock();
        let done: Vec<_> = ids
            .iter()
            .copied()
            .filter(|id| members.settle(*id, key))
            .collect();
        members.wake_dispatcher();
        drop(members);
        additions.settle(&self.mailbox, &done);
    }

    /// Members whose sessions have ended had received these.
    pub(in crate::broker) fn finish_all(&self, ids: &[MessageId], node: &Node) {
        let mut additions = node.flusher.add();
        for id in ids {
            self.finish(*id, &mut additions);
        }
    }

    /// Asks a node again who is there: what it said, or was sent, may have been lost.
    pub(in crate::broker) fn ask_again(&self, other: u32, cluster: &Cluster) {
        let epoch = self.members.lock().serving.as_ref().map(|it| it.epoch);
        if let Some(epoch) = epoch {
            cluster.send(other, &self.dispatch_item(epoch));
        }
    }

    /// Sends what has been given to seats.
    pub(super) fn hand_over(&self, mut members: MutexGuard<'_, Members>, node: &Node) {
        if members.handing.is_empty() {
            return;
        }
        let handing = std::mem::take(&mut members.handing);
        let epoch = members.serving.as_ref().map_or(0, |serving| serving.epoch);
        drop(members);
        for Handing { seat, id, delivery } in handing {
            let arrival = delivery.arrival;
            let entry = delivery.into_entry(id);
            node.give(self.session(), epoch, seat, entry, arrival);
        }
    }
}

impl Departure<'_> {
    const UNKNOWN: Self = Self {
        begun: None,
        finished: &[],
        has_left: false,
    };
}

impl Member {
    fn seat(&self) -> Option<SeatKey> {
        self.online.as_ref().map(Online::seat)
    }
}

impl Members {
    fn serves(&self, epoch: u64) -> bool {
        let serving = self.serving.as_ref();
        serving.is_some_and(|serving| serving.epoch == epoch) && !self.closed
    }

    fn seat_of(&self, client_id: &str) -> Option<SeatKey> {
        let mut all = self.all.iter();
        all.find(|member| &*member.client_id == client_id)?.seat()
    }

    /// Returns the messages that the member turns out to have taken over.
    fn take_seat(&mut self, key: SeatKey, seat: &Seat) -> Vec<MessageId> {
        let client_id = &seat.client_id;
        let mut all = self.all.iter_mut();
        let known = all.find(|member| member.client_id == *client_id);
        if let Some(known) = &known
            && let Some(online) = &known.online
            && let Place::Seat { since, .. } = online.place
            && since > seat.since
        {
            return Vec::new();
        }
        let options = SubscribeOptions {
            maximum_qos: seat.maximum_qos,
            no_local: false,
            retain_as_published: seat.retain_as_published,
            retain_handling: RetainHandling::DoNotSend,
        };
        let member = Member {
            client_id: client_id.clone(),
            options,
            identifiers: seat.identifier.map(|identifier| Arc::from([identifier])),
            online: Some(Online {
                place: Place::Seat {
                    key,
                    since: seat.since,
                },
                window: seat.window,
                given: 0,
            }),
        };
        match known {
            Some(known) => *known = member,
            None => self.all.push(member),
        }

        let is_new = !self.serving.as_ref().is_some_and(|it| it.has_begun);
        let mut done = Vec::new();
        for id in &seat.settled {
            let holder = self.given.get(id).map(|given| &given.client_id);
            if holder == Some(client_id) {
                self.given.remove(id);
                self.bound.remove(id);
                done.push(*id);
            } else if is_new {
                self.finished.insert(*id);
            }
        }
        let begun: HashSet<_> = seat.begun.iter().copied().collect();
        let held: HashSet<_> = seat.held.iter().copied().collect();
        let mut again = Vec::new();
        for id in self.held_by(client_id) {
            let Some(given) = self.given.get_mut(&id) else {
                continue;
            };
            if given.seat == key || begun.contains(&id) {
                given.seat = key;
                if !held.contains(&id) {
                    again.push(id);
                }
            } else if given.seat == SeatKey::default() {
                self.give_back_unless_gone(id);
            }
            // What is still with an earlier seat is left there until that ends.
        }
        let is_here = |id: &MessageId| begun.contains(id) || held.contains(id);
        self.bound
            .retain(|id, bound| bound.client_id != *client_id || is_here(id));
        for id in begun.union(&held) {
            if self.given.contains_key(id) {
                continue;
            }
            let is_held = held.contains(id);
            if let Some(delivery) = self.returned.remove(id) {
                let given = Given {
                    delivery,
                    client_id: client_id.clone(),
                    seat: key,
                };
                self.given.insert(*id, given);
                if !is_held {
                    again.push(*id);
                }
            } else if is_new || !is_held {
                let bound = Bound {
                    client_id: client_id.clone(),
                    held_by: is_held.then_some(key),
                };
                self.bound.insert(*id, bound);
            }
        }
        again.sort_unstable();
        for id in again {
            let delivery = self.given[&id].delivery.clone();
            let delivery = self.tailored(delivery, client_id);
            let handing = Handing {
                seat: key,
                id,
                delivery,
            };
            self.handing.push(handing);
        }
        self.count_given(client_id, key);
        done
    }

    fn count_given(&mut self, client_id: &str, key: SeatKey) {
        let given = self.given.values().filter(|given| given.seat == key);
        let bound = self.bound.values();
        let held = bound.filter(|bound| bound.held_by == Some(key));
        let count = given.count() + held.count();
        let mut all = self.all.iter_mut();
        let member = all.find(|member| &*member.client_id == client_id);
        if let Some(online) = member.and_then(|member| member.online.as_mut()) {
            online.given = u16::try_from(count).unwrap_or(u16::MAX);
        }
    }

    /// Returns the messages that are done with. `comes_back` says of a client whether it may.
    fn end_seat(
        &mut self,
        key: SeatKey,
        departure: &Departure<'_>,
        comes_back: impl Fn(&str) -> bool,
    ) -> Vec<MessageId> {
        if self.serving.is_none() {
            return Vec::new();
        }
        let place = self
            .all
            .iter()
            .position(|member| member.seat() == Some(key));
        let client_id = place.map(|place| self.all.remove(place).client_id);
        self.turn = 0;
        // Of a client that is at another seat already, that one says what it has begun.
        let client_id = client_id.filter(|client_id| !departure.has_left && comes_back(client_id));
        let mut done = Vec::new();
        for id in departure.finished {
            if self.given.remove(id).is_some() {
                done.push(*id);
            } else {
                self.finished.insert(*id);
            }
        }
        let given = self.given.iter();
        let with_it: Vec<_> = given
            .filter(|(_, given)| given.seat == key)
            .map(|(id, given)| (*id, given.delivery.qos))
            .collect();
        let mut unread = Vec::new();
        self.bound.retain(|id, bound| {
            let is_with_it = bound.held_by == Some(key);
            if is_with_it {
                unread.push(*id);
            }
            !is_with_it
        });
        let has_begun = |id: MessageId, qos: QoS| match departure.begun {
            Some(begun) => begun.contains(&id),
            None => qos == QoS::ExactlyOnce,
        };
        for (id, qos) in with_it {
            match self.given.get_mut(&id) {
                Some(given) if client_id.is_some() && has_begun(id, qos) => {
                    given.seat = SeatKey::default();
                    unread.push(id);
                }
                _ if departure.begun.is_some() => self.give_back(id),
                _ => self.give_back_unless_gone(id),
            }
        }
        if let Some(client_id) = client_id {
            // Also what it has now is read again, if nobody is there for a while.
            let begun = departure.begun.unwrap_or(&unread);
            for id in begun {
                let bound = Bound {
                    client_id: client_id.clone(),
                    held_by: None,
                };
                self.bound.insert(*id, bound);
            }
        }
        done
    }

    /// Returns whether the message is to be removed from the inbox.
    fn settle(&mut self, id: MessageId, key: SeatKey) -> bool {
        let is_given = self.given.get(&id).is_some_and(|given| given.seat == key);
        let is_unread = !is_given
            && self
                .bound
                .get(&id)
                .is_some_and(|bound| bound.held_by == Some(key));
        if is_given {
            self.bound.remove(&id);
            self.forget(id);
        } else if is_unread {
            let bound = self.bound.remove(&id);
            self.finished.insert(id);
            if let Some(bound) = bound {
                self.count_given(&bound.client_id, key);
            }
        }
        is_given
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Arrival;
    use crate::mqtt::Message;
    use crate::mqtt::message::MessageParts;
    use crate::session::Origin;
    use crate::store::SessionId;

    const NODE: u32 = 1;

    fn seat(number: u64, since: u64) -> Seat {
        Seat {
            number,
            client_id: "member".into(),
            since,
            window: 10,
            maximum_qos: QoS::ExactlyOnce,
            retain_as_published: false,
            identifier: None,
            begun: Vec::new(),
            held: Vec::new(),
            settled: Vec::new(),
        }
    }

    fn stored(hlc: u64) -> MessageId {
        MessageId {
            hlc,
            node: NODE,
            index: 0,
        }
    }

    #[test]
    fn what_a_lost_seat_may_have_taken_over_is_read_again() {
        let mut members = Members {
            serving: Some(Serving {
                epoch: 1,
                others: HashSet::new(),
                unheard: HashSet::new(),
                has_begun: true,
            }),
            ..Members::default()
        };
        let key = |number| SeatKey { node: NODE, number };
        members.take_seat(key(1), &seat(1, 1));
        for (hlc, qos) in [(1, QoS::AtLeastOnce), (2, QoS::ExactlyOnce)] {
            let id = stored(hlc);
            let message = Message::new(MessageParts {
                topic: "jobs",
                qos,
                ..MessageParts::default()
            });
            let delivery = Delivery {
                message,
                qos,
                retain: false,
                subscription_identifiers: None,
                origin: Origin::Group(SessionId([0; 12]), id),
                arrival: Arrival::NONE,
            };
            members.returned.insert(id, delivery);
        }
        members.give_returned();
        assert_eq!(members.given.len(), 2);

        members.end_seat(key(1), &Departure::UNKNOWN, |_| true);
        assert!(
            members.returned.contains_key(&stored(1)),
            "once more does no harm"
        );
        assert!(
            members.given.contains_key(&stored(2)),
            "until its member is heard of"
        );

        members.take_seat(key(2), &seat(2, 2));
        assert!(!members.given.contains_key(&stored(2)));
        assert!(!members.returned.contains_key(&stored(2)));
        assert_eq!(members.doubtful, [stored(2)]);
    }
}
