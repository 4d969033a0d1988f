//! What nodes of a cluster send each other for their clients.
//!
//! The node that a message is published at writes it into the inbox of every session, wherever the
//! client of that is. Once it is written it is handed on to the node that has the client.

use std::sync::Arc;

use super::flush::Unstored;
use super::mailbox::Mailbox;
use super::shared::Place;
use super::takeover::LetGo;
use super::{LastTopic, Node};
use crate::bus::wire::Item;
use crate::cluster::{Announced, Cluster};
use crate::metrics::Arrival;
use crate::mqtt::Message;
use crate::session::{Delivery, Origin};
use crate::store::Chunk;

impl Node {
    /// Something that another node has sent; `last_topic` is of what it published before.
    pub(crate) fn receive(
        &self,
        cluster: &Cluster,
        from: u32,
        arrival: Arrival,
        item: Item,
        last_topic: &mut LastTopic,
    ) {
        match item {
            Item::Deliver { session, chunk } => {
                if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.push_committed(&chunk, arrival);
                }
            }
            Item::Stored { session, key } => {
                if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.read_committed(key);
                }
            }
            Item::Pass {
                session,
                qos,
                retain,
                subscription_identifiers,
                message,
            } => {
                if let Some(group) = self.group_of_inbox(session) {
                    group.push(&message, arrival);
                } else if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.push(Delivery {
                        message,
                        qos,
                        retain,
                        subscription_identifiers,
                        origin: Origin::Memory,
                        arrival,
                    });
                }
            }
            Item::Publish { message, publisher } => {
                self.publish_from_elsewhere(&message, &publisher, arrival, last_topic);
            }
            Item::Own {
                client_id,
                session,
                epoch,
            } => {
                self.client_moved(&client_id, session, epoch, from);
                cluster.send(from, &Item::OwnAck { client_id, epoch });
            }
            Item::OwnAck { client_id, epoch } => self.is_aware(&(client_id, epoch), from),
            Item::Taken {
                client_id,
                epoch,
                in_flight,
                will_discarded,
            } => {
                self.session_let_go(
                    from,
                    &client_id,
                    epoch,
                    LetGo {
                        in_flight,
                        will_discarded,
                    },
                );
            }
            Item::Disown { session, epoch } => {
                if self.group_disowned(session, epoch) {
                    return;
                }
                let place = Place {
                    session: Some(session),
                    epoch,
                    node: None,
                };
                if let Some(mailbox) = self.shared.mailbox(session) {
                    self.place(&mailbox, place);
                }
            }
            Item::Route { reset, add, remove } => {
                self.receive_route(from, reset, add, remove);
            }
            Item::Kick { client_id, reason } => {
                self.kick_here(&client_id, reason);
            }
            Item::Figures { name, figures } => self.receive_figures(from, name, &figures),
            Item::Log(entry) => cluster.follow_later(Announced::Log(entry)),
            Item::Ask { number } => cluster.follow_later(Announced::Ask { from, number }),
            Item::Answer { number } => self.receive_answer(cluster, from, number),
            Item::Offer { session, chunk } => {
                self.receive_offer(cluster, from, session, &chunk, arrival);
            }
            Item::Decline { session, key } => self.flusher.declined(session, key),
            Item::Acknowledge { session, key, ids } => self.flusher.taken_over(session, key, &ids),
            Item::Decide { written } => self.receive_decision(from, &written),
            Item::Dispatch {
                group,
                session,
                epoch,
            } => self.receive_dispatch(from, &group, session, epoch),
            Item::Seats {
                session,
                epoch,
                seats,
            } => self.receive_seats(cluster, from, session, epoch, Ok(&seats)),
            Item::Seat {
                session,
                epoch,
                seat,
            } => self.receive_seats(cluster, from, session, epoch, Err(&seat)),
            Item::Give {
                session,
                epoch,
                seat,
                entry,
            } => self.receive_give(from, session, epoch, seat, entry, arrival),
            item @ (Item::Unseat { .. } | Item::Settled { .. }) => {
                self.receive_from_seat(from, item);
            }
            Item::Ring { session } => {
                if let Some(mailbox) = self.shared.mailbox(session) {
                    mailbox.doubt();
                }
            }
        }
    }

    /// Delivers what a client of another node has published, to the clients here whose sessions end
    /// with their connections. The inboxes of the others were seen to there.
    fn publish_from_elsewhere(
        &self,
        message: &Message,
        publisher: &Arc<str>,
        arrival: Arrival,
        last_topic: &mut LastTopic,
    ) {
        let matches = self.matches(message.topic(), last_topic);
        for found in &matches.sessions {
            if !found.mailbox.is_durable() {
                // [MQTT-3.8.3-3], of a client that has moved here meanwhile.
                let own = found.mailbox.client_id == *publisher;
                let terms = if own {
                    found.own_terms.as_ref()
                } else {
                    Some(&found.terms)
                };
                if let Some(terms) = terms {
                    found.mailbox.push(terms.delivery(message, arrival));
                }
            }
        }
    }

    /// Hands chunks that are in the store to whoever empties their inbox.
    pub(super) fn hand_on(&self, chunks: Vec<(Arc<Mailbox>, Chunk)>) {
        for (mailbox, chunk) in chunks {
            match (mailbox.holder(), &self.cluster) {
                (Some(node), Some(cluster)) => {
                    let session = mailbox.session;
                    cluster.send(node, &Item::Deliver { session, chunk });
                }
                _ => mailbox.push_committed(&chunk, Arrival::NONE),
            }
        }
    }

    /// Does what had to wait.
    pub(super) fn deliver_unstored(&self, unstored: Unstored) {
        match unstored {
            Unstored::One { mailbox, delivery } if mailbox.holder().is_some() => {
                self.pass(&mailbox, delivery);
            }
            Unstored::One { mailbox, delivery } => {
                mailbox.push(delivery);
            }
            Unstored::Nodes {
                message,
                publisher,
                nodes,
            } => {
                self.pass_to_nodes(&message, &publisher, &nodes);
            }
            Unstored::Retain { message, publisher } => {
                self.retain(&message, &publisher, &mut self.flusher.add());
            }
        }
    }

    /// Gives a message that is not stored to the node that has the client; returns that node if it is
    /// behind.
    pub(super) fn pass(&self, mailbox: &Mailbox, delivery: Delivery) -> Option<u32> {
        let (node, cluster) = (mailbox.holder()?, self.cluster.as_ref()?);
        let item = Item::Pass {
            session: mailbox.session,
            qos: delivery.qos,
            retain: delivery.retain,
            subscription_identifiers: delivery.subscription_identifiers,
            message: delivery.message,
        };
        cluster.send(node, &item).then_some(node)
    }

    /// Gives a message to nodes where clients want it whose sessions end with their connections;
    /// returns one that is behind.
    pub(super) fn pass_to_nodes(
        &self,
        message: &Message,
        publisher: &Arc<str>,
        nodes: &[u32],
    ) -> Option<u32> {
        let cluster = self.cluster.as_ref()?;
        // Each node has its own.
        if message.topic().starts_with("$SYS/") {
            return None;
        }
        let item = Item::Publish {
            message: message.clone(),
            publisher: publisher.clone(),
        };
        let behind = nodes.iter().filter(|node| cluster.send(**node, &item));
        behind.copied().last()
    }

    /// A message to this topic has been taken over by a node that may have died before it handed it on.
    /// It lies in the inboxes of whoever wants it, and comes before whatever its publisher sends from
    /// now on.
    pub(crate) fn ring(&self, topic: &str) {
        let Some(cluster) = &self.cluster else {
            return;
        };
        let (matches, _) = self.subscriptions.matches(topic);
        for found in &matches.sessions {
            let mailbox = &found.mailbox;
            match mailbox.holder() {
                _ if !mailbox.is_durable() => {}
                Some(node) => {
                    let session = mailbox.session;
                    cluster.send(node, &Item::Ring { session });
                }
                None => mailbox.doubt(),
            }
        }
    }

    /// A node is gone: nothing is expected of it any more, and what it may have written and not
    /// handed on has to be looked for.
    pub(crate) fn node_left(&self, node: u32) {
        if let Some(cluster) = &self.cluster {
            self.forget_routes(cluster, node);
        }
        self.miss_decisions(node);
        if let Some(cluster) = &self.cluster {
            self.node_of_groups_left(cluster, node);
        }
        self.expect_nothing_of(node);
        for (client_id, place) in self.shared.clients_at(node) {
            let place = Place {
                node: None,
                ..place
            };
            match place
                .session
                .and_then(|session| self.shared.mailbox(session))
            {
                Some(mailbox) => self.place(&mailbox, place),
                None => self.shared.place(&client_id, place),
            };
        }
        self.look_for_messages();
    }

    /// Reads every inbox of this node's clients again: messages may have got lost on their way from
    /// another node.
    pub(crate) fn look_for_messages(&self) {
        for mailbox in self.shared.mailboxes() {
            mailbox.doubt();
        }
    }
}
