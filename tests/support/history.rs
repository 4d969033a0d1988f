//! What happened, as the clients saw it, and which promises of midge it breaks.

use std::collections::{BTreeSet, HashMap, HashSet};

/// A message that a publisher numbered: one of a stream of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Message {
    pub(crate) stream: Stream,
    pub(crate) sequence: u32,
}

/// Messages of one publisher, topic and QoS: they must stay in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Stream {
    pub(crate) publisher: u16,
    pub(crate) topic: u16,
    pub(crate) qos: u8,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// The publisher sends it for the first time. A Will may be published as soon as its client
    /// connects.
    Published(Message),
    /// The broker has taken the message over: PUBACK or PUBREC came.
    Acknowledged(Message),
    /// The client of this Will has vanished: sooner or later it is published.
    WillDue(Message),
    /// The publisher did not know whether the broker had it, and sent it once more.
    SentAgain(Message),
    /// The subscriber is about to ask for all messages.
    Subscribing(String),
    /// SUBACK came.
    Subscribed(String),
    /// The subscriber is about to ask for no more of them.
    Unsubscribing(String),
    /// UNSUBACK came.
    Unsubscribed(String),
    Received {
        subscriber: String,
        message: Message,
        dup: bool,
        /// Which start of which broker sent it.
        run: u32,
    },
    /// The broker has certainly handled the subscriber's PUBACK of the message.
    TakenOver {
        subscriber: String,
        message: Message,
        run: u32,
    },
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Violation {
    /// Published after SUBACK, acknowledged or due, and never received (I1, I2, I7).
    Lost(String, Message),
    /// Received for the first time after a later message of its stream, both published after
    /// SUBACK (I4).
    Reordered(String, Message),
    /// A second delivery of a QoS 2 message (I5, I8).
    RepeatedExactlyOnce(String, Message),
    /// A second delivery of a QoS 1 message that was sent once, without DUP, and without a crash in
    /// between.
    RepeatedWithoutDup(String, Message),
    /// A delivery of a QoS 1 message that was sent once, after its acknowledgement, and without a
    /// crash in between (I2).
    RepeatedAfterAcknowledgement(String, Message),
    /// Received though it was published after UNSUBACK.
    Unwanted(String, Message),
    /// Received though nobody published it.
    NeverPublished(String, Message),
}

/// Checks what each of `subscribers` received of one broker.
pub(crate) fn check(history: &[Event], subscribers: &[String]) -> BTreeSet<Violation> {
    let checked = subscribers.iter().flat_map(|subscriber| {
        let is_own = |name: &str| name == subscriber;
        check_consumer(history, subscriber, is_own, true)
    });
    checked.collect()
}

/// Checks what each of `subscribers` received of the nodes of a cluster. With QoS 1 a message may
/// come twice: what a node that died has sent, and what has been acknowledged to it, the next one
/// cannot know.
pub(crate) fn check_cluster(history: &[Event], subscribers: &[String]) -> BTreeSet<Violation> {
    without_repetitions(check(history, subscribers))
}

/// The same for the `members` of a share group together.
pub(crate) fn check_group_of_cluster(history: &[Event], members: &[String]) -> BTreeSet<Violation> {
    without_repetitions(check_group(history, members))
}

/// Without those that a cluster allows itself with QoS 1.
fn without_repetitions(mut violations: BTreeSet<Violation>) -> BTreeSet<Violation> {
    violations.retain(|violation| match violation {
        Violation::RepeatedWithoutDup(..) | Violation::RepeatedAfterAcknowledgement(..) => false,
        Violation::Lost(..)
        | Violation::Reordered(..)
        | Violation::RepeatedExactlyOnce(..)
        | Violation::Unwanted(..)
        | Violation::NeverPublished(..) => true,
    });
    violations
}

/// Checks what the `members` of a share group received together. Their order is not looked at:
/// what one of them leaves behind goes to another one, which may have had later messages.
pub(crate) fn check_group(history: &[Event], members: &[String]) -> BTreeSet<Violation> {
    let is_member = |name: &str| members.iter().any(|member| member == name);
    check_consumer(history, "the group", is_member, false)
}

/// Messages that a consumer must have, or must not have.
#[derive(Default)]
struct Wishes {
    is_subscribed: bool,
    is_unsubscribed: bool,
    /// What the broker has taken over; it has met all subscriptions that it can meet.
    acknowledged: HashSet<Message>,
    wills_due: HashSet<Message>,
    /// Published while it was subscribed, and it still is.
    wanted: BTreeSet<Message>,
    /// Published while it was not, if the broker cannot have met them later.
    unwanted: HashSet<Message>,
}

impl Wishes {
    fn new() -> Self {
        Self {
            is_unsubscribed: true,
            ..Self::default()
        }
    }

    fn published(&mut self, message: Message) {
        if self.is_subscribed {
            self.wanted.insert(message);
        }
        if self.is_unsubscribed {
            self.unwanted.insert(message);
        }
    }

    fn subscribing(&mut self, sent_again: &HashSet<Message>) {
        self.is_unsubscribed = false;
        // The others may still be on their way to the broker; so may be the first copy of what was sent
        // again with QoS 1, when its node stood still and the acknowledgement is of another one.
        let has_other_copy =
            |message: &Message| message.stream.qos == 1 && sent_again.contains(message);
        let acknowledged = &self.acknowledged;
        self.unwanted
            .retain(|message| acknowledged.contains(message) && !has_other_copy(message));
    }

    fn unsubscribing(&mut self) {
        self.is_subscribed = false;
        self.wanted.clear();
    }

    /// What must have been received at the end.
    fn due(&self) -> impl Iterator<Item = &Message> {
        self.wanted.iter().filter(|message| {
            self.acknowledged.contains(message) || self.wills_due.contains(message)
        })
    }
}

fn check_consumer(
    history: &[Event],
    name: &str,
    is_own: impl Fn(&str) -> bool,
    alone: bool,
) -> BTreeSet<Violation> {
    let mut violations = BTreeSet::new();
    let mut wishes = Wishes::new();
    let published: HashSet<Message> = history
        .iter()
        .filter_map(|event| match event {
            Event::Published(message) => Some(*message),
            _ => None,
        })
        .collect();
    // In which run of the broker each was received last, and taken over.
    let mut received: HashMap<Message, u32> = HashMap::new();
    let mut taken_over = HashSet::new();
    let mut sent_again = HashSet::new();
    let mut latest: HashMap<Stream, u32> = HashMap::new();
    for event in history {
        match event {
            Event::Published(message) => wishes.published(*message),
            Event::Acknowledged(message) => {
                wishes.acknowledged.insert(*message);
            }
            Event::WillDue(message) => {
                wishes.wills_due.insert(*message);
            }
            Event::SentAgain(message) => {
                sent_again.insert(*message);
            }
            Event::Subscribing(subscriber) if is_own(subscriber) => wishes.subscribing(&sent_again),
            Event::Subscribed(subscriber) if is_own(subscriber) => wishes.is_subscribed = true,
            Event::Unsubscribing(subscriber) if is_own(subscriber) => wishes.unsubscribing(),
            Event::Unsubscribed(subscriber) if is_own(subscriber) => wishes.is_unsubscribed = true,
            Event::TakenOver {
                subscriber,
                message,
                run,
            } if is_own(subscriber) => {
                taken_over.insert((*message, *run));
            }
            Event::Received {
                subscriber,
                message,
                dup,
                run,
            } if is_own(subscriber) => {
                let before = received.insert(*message, *run);
                let name = name.to_owned();
                if !published.contains(message) {
                    violations.insert(Violation::NeverPublished(name, *message));
                    continue;
                }
                if wishes.unwanted.contains(message) {
                    violations.insert(Violation::Unwanted(name, *message));
                    continue;
                }
                let Some(before) = before else {
                    // What was published while it subscribed may have passed by the first time,
                    // and come when the publisher sends it again.
                    if !wishes.wanted.contains(message) {
                        continue;
                    }
                    let latest = latest.entry(message.stream).or_insert(message.sequence);
                    if alone && *latest > message.sequence {
                        violations.insert(Violation::Reordered(name, *message));
                    }
                    *latest = message.sequence.max(*latest);
                    continue;
                };
                if message.stream.qos == 2 {
                    violations.insert(Violation::RepeatedExactlyOnce(name, *message));
                } else if sent_again.contains(message) {
                    // Two messages, as far as the broker can know.
                } else if alone && before == *run && !dup {
                    violations.insert(Violation::RepeatedWithoutDup(name, *message));
                } else if taken_over.contains(&(*message, *run)) {
                    violations.insert(Violation::RepeatedAfterAcknowledgement(name, *message));
                }
            }
            Event::Subscribing(_)
            | Event::Subscribed(_)
            | Event::Unsubscribing(_)
            | Event::Unsubscribed(_)
            | Event::Received { .. }
            | Event::TakenOver { .. } => {}
        }
    }
    let lost = wishes.due().filter(|m| !received.contains_key(m));
    violations.extend(lost.map(|message| Violation::Lost(name.to_owned(), *message)));
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(qos: u8, sequence: u32) -> Message {
        let stream = Stream {
            publisher: 1,
            topic: 1,
            qos,
        };
        Message { stream, sequence }
    }

    fn received(qos: u8, sequence: u32, dup: bool, run: u32) -> Event {
        Event::Received {
            subscriber: "s".to_owned(),
            message: message(qos, sequence),
            dup,
            run,
        }
    }

    /// Where the receptions begin in [`faultless`].
    const RECEIVED: usize = 2 + 10 + 10;

    /// Ten messages that were all acknowledged and received once, in order.
    fn faultless(qos: u8) -> Vec<Event> {
        let me = || "s".to_owned();
        let mut history = vec![Event::Subscribing(me()), Event::Subscribed(me())];
        history.extend((0..10).map(|sequence| Event::Published(message(qos, sequence))));
        history.extend((0..10).map(|sequence| Event::Acknowledged(message(qos, sequence))));
        history.extend((0..10).map(|sequence| received(qos, sequence, false, 1)));
        history
    }

    fn violations(history: &[Event]) -> Vec<Violation> {
        check(history, &["s".to_owned()]).into_iter().collect()
    }

    #[test]
    fn a_faultless_history_breaks_nothing() {
        assert_eq!(violations(&faultless(1)), []);
        assert_eq!(violations(&faultless(2)), []);
    }

    #[test]
    fn a_lost_message_is_found() {
        let mut history = faultless(1);
        history.remove(RECEIVED + 4);

        let lost = Violation::Lost("s".to_owned(), message(1, 4));
        assert_eq!(violations(&history), std::slice::from_ref(&lost));
        history.retain(|event| !matches!(event, Event::Received { .. }));
        assert_eq!(violations(&history).len(), 10);
    }

    #[test]
    fn swapped_messages_are_found() {
        let mut history = faultless(1);
        history.swap(RECEIVED + 4, RECEIVED + 5);

        let reordered = Violation::Reordered("s".to_owned(), message(1, 4));
        assert_eq!(violations(&history), [reordered]);
    }

    #[test]
    fn a_repeated_qos_2_message_is_found_even_with_dup_and_after_a_crash() {
        for (dup, run) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
            let mut history = faultless(2);
            history.push(received(2, 4, dup, run));

            let repeated = Violation::RepeatedExactlyOnce("s".to_owned(), message(2, 4));
            assert_eq!(violations(&history), [repeated]);
        }
    }

    #[test]
    fn a_repeated_qos_1_message_needs_dup_or_a_crash() {
        let repeated = |dup, run| {
            let mut history = faultless(1);
            history.push(received(1, 4, dup, run));
            violations(&history)
        };

        let violation = Violation::RepeatedWithoutDup("s".to_owned(), message(1, 4));
        assert_eq!(repeated(false, 1), [violation]);
        assert_eq!(repeated(true, 1), []);
        assert_eq!(repeated(false, 2), []);
    }

    #[test]
    fn a_qos_1_message_that_was_sent_again_may_be_repeated() {
        let mut history = faultless(1);
        history.push(Event::SentAgain(message(1, 4)));
        history.push(received(1, 4, false, 1));

        assert_eq!(violations(&history), []);
    }

    #[test]
    fn what_was_taken_over_is_not_repeated_even_with_dup() {
        let mut history = faultless(1);
        let message = message(1, 4);
        history.push(Event::TakenOver {
            subscriber: "s".to_owned(),
            message,
            run: 1,
        });
        history.push(received(1, 4, true, 1));

        let repeated = Violation::RepeatedAfterAcknowledgement("s".to_owned(), message);
        assert_eq!(violations(&history), [repeated]);
    }

    #[test]
    fn a_cluster_breaks_its_promises_too() {
        let check = |history: &[Event]| -> Vec<_> {
            let violations = check_cluster(history, &["s".to_owned()]);
            violations.into_iter().collect()
        };
        assert_eq!(check(&faultless(1)), []);
        assert_eq!(check(&faultless(2)), []);

        let mut lost = faultless(1);
        lost.remove(RECEIVED + 4);
        let violation = Violation::Lost("s".to_owned(), message(1, 4));
        assert_eq!(check(&lost), [violation]);

        let mut swapped = faultless(2);
        swapped.swap(RECEIVED + 4, RECEIVED + 5);
        let violation = Violation::Reordered("s".to_owned(), message(2, 4));
        assert_eq!(check(&swapped), [violation]);

        let mut repeated = faultless(2);
        repeated.push(received(2, 4, true, 2));
        let violation = Violation::RepeatedExactlyOnce("s".to_owned(), message(2, 4));
        assert_eq!(check(&repeated), [violation]);

        let mut repeated = faultless(1);
        repeated.push(received(1, 4, false, 1));
        assert_eq!(check(&repeated), []);
    }

    #[test]
    fn only_what_is_published_after_suback_must_come() {
        let mut history = faultless(1);
        // Number 0 is sent while the subscriber subscribes, and never comes.
        history.swap(1, 2);
        history.remove(RECEIVED);

        assert_eq!(violations(&history), []);
    }

    #[test]
    fn what_was_published_before_suback_may_come_when_it_is_sent_again() {
        let mut history = faultless(1);
        // Number 0 is sent while the subscriber subscribes, and passes by.
        history.swap(1, 2);
        history.remove(RECEIVED);
        history.push(Event::SentAgain(message(1, 0)));
        history.push(received(1, 0, false, 1));

        assert_eq!(violations(&history), []);
    }

    #[test]
    fn nothing_published_after_unsuback_may_come() {
        let unsubscribe = |at: usize| {
            let mut history = faultless(1);
            history.insert(at, Event::Unsubscribed("s".to_owned()));
            history.insert(at, Event::Unsubscribing("s".to_owned()));
            history
        };
        // After all were published, nothing must come any more, and everything may.
        let mut history = unsubscribe(RECEIVED);
        assert_eq!(violations(&history), []);
        history.truncate(RECEIVED + 2);
        assert_eq!(violations(&history), []);

        // Before the last one was published.
        let unwanted = Violation::Unwanted("s".to_owned(), message(1, 9));
        assert_eq!(violations(&unsubscribe(2 + 9)), [unwanted]);
    }

    #[test]
    fn a_copy_that_was_kept_somewhere_may_come_with_qos_1() {
        for (qos, may_come) in [(1, true), (2, false)] {
            let kept = message(qos, 0);
            let history = [
                Event::Published(kept),
                Event::SentAgain(kept),
                Event::Acknowledged(kept),
                Event::Subscribing("s".to_owned()),
                Event::Subscribed("s".to_owned()),
                received(qos, 0, false, 1),
            ];
            assert_eq!(violations(&history).is_empty(), may_come);
        }
    }

    #[test]
    fn a_message_sent_while_the_subscriber_comes_back_may_come() {
        let mut history = faultless(1);
        // All are published before SUBSCRIBE; of number 4 that is known, the others may be late.
        history.rotate_left(2);
        history.truncate(10);
        history.push(Event::Acknowledged(message(1, 4)));
        history.push(Event::Subscribing("s".to_owned()));
        history.push(Event::Subscribed("s".to_owned()));
        history.extend((4..6).map(|sequence| received(1, sequence, false, 1)));

        let unwanted = Violation::Unwanted("s".to_owned(), message(1, 4));
        assert_eq!(violations(&history), [unwanted]);
    }

    #[test]
    fn a_will_must_come_once_its_client_has_vanished() {
        let me = || "s".to_owned();
        let will = message(2, 0);
        let subscribed = [Event::Subscribing(me()), Event::Subscribed(me())];
        let died = [Event::Published(will), Event::WillDue(will)];

        let lost = Violation::Lost(me(), will);
        assert_eq!(violations(&[&subscribed[..], &died].concat()), [lost]);
        // Whoever subscribes then may still get it.
        let late = [&died[..], &subscribed].concat();
        assert_eq!(violations(&late), []);
        assert_eq!(
            violations(&[late, vec![received(2, 0, false, 1)]].concat()),
            []
        );
        // Its client said goodbye to a broker that was killed before it heard.
        let goodbye = [Event::Published(will)];
        assert_eq!(violations(&[&subscribed[..], &goodbye].concat()), []);
    }

    #[test]
    fn a_message_that_nobody_published_is_found() {
        let mut history = faultless(1);
        history.push(received(1, 10, false, 1));

        let strange = Violation::NeverPublished("s".to_owned(), message(1, 10));
        assert_eq!(violations(&history), [strange]);
    }

    #[test]
    fn a_group_has_each_message_once_in_any_order() {
        let members = ["s".to_owned(), "t".to_owned()];
        let mut history = faultless(2);
        history.swap(RECEIVED + 4, RECEIVED + 5);
        assert!(check_group(&history, &members).is_empty());

        history.push(Event::Received {
            subscriber: "t".to_owned(),
            message: message(2, 3),
            dup: false,
            run: 1,
        });
        let repeated = Violation::RepeatedExactlyOnce("the group".to_owned(), message(2, 3));
        assert_eq!(check_group(&history, &members), [repeated].into());
    }
}
