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
    /// The broker has taken the message over: PUBACK or PUBREC came.
    Acknowledged(Message),
    /// The publisher did not know whether the broker had it, and sent it once more.
    SentAgain(Message),
    Received {
        subscriber: String,
        message: Message,
        dup: bool,
        /// Which start of the broker sent it.
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
    /// Acknowledged, and never received (I1, I2).
    Lost(String, Message),
    /// Received for the first time after a later message of its stream (I4).
    Reordered(String, Message),
    /// A second delivery of a QoS 2 message (I5).
    RepeatedExactlyOnce(String, Message),
    /// A second delivery of a QoS 1 message that was sent once, without DUP, and without a crash in
    /// between.
    RepeatedWithoutDup(String, Message),
    /// A delivery of a QoS 1 message that was sent once, after its acknowledgement, and without a
    /// crash in between (I2).
    RepeatedAfterAcknowledgement(String, Message),
}

/// Checks what each of `subscribers` received, all of which wanted everything.
pub(crate) fn check(history: &[Event], subscribers: &[String]) -> BTreeSet<Violation> {
    let mut violations = BTreeSet::new();
    for subscriber in subscribers {
        let is_own = |name: &str| name == subscriber;
        check_consumer(history, subscriber, is_own, true, &mut violations);
    }
    violations
}

/// Checks what the `members` of a share group received together. Their order is not looked at:
/// what one of them leaves behind goes to another one, which may have had later messages.
pub(crate) fn check_group(history: &[Event], members: &[String]) -> BTreeSet<Violation> {
    let mut violations = BTreeSet::new();
    let is_member = |name: &str| members.iter().any(|member| member == name);
    check_consumer(history, "the group", is_member, false, &mut violations);
    violations
}

fn check_consumer(
    history: &[Event],
    name: &str,
    is_own: impl Fn(&str) -> bool,
    alone: bool,
    violations: &mut BTreeSet<Violation>,
) {
    let mut acknowledged = BTreeSet::new();
    // In which run of the broker each was received last, and taken over.
    let mut received: HashMap<Message, u32> = HashMap::new();
    let mut taken_over = HashSet::new();
    let mut sent_again = HashSet::new();
    let mut latest: HashMap<Stream, u32> = HashMap::new();
    for event in history {
        match event {
            Event::Acknowledged(message) => {
                acknowledged.insert(*message);
            }
            Event::SentAgain(message) => {
                sent_again.insert(*message);
            }
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
                let Some(before) = before else {
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
            Event::Received { .. } | Event::TakenOver { .. } => {}
        }
    }
    let lost = acknowledged.iter().filter(|m| !received.contains_key(m));
    violations.extend(lost.map(|message| Violation::Lost(name.to_owned(), *message)));
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

    /// Ten messages that were all acknowledged and received once, in order.
    fn faultless(qos: u8) -> Vec<Event> {
        let acknowledged = (0..10).map(|sequence| Event::Acknowledged(message(qos, sequence)));
        let received = (0..10).map(|sequence| received(qos, sequence, false, 1));
        acknowledged.chain(received).collect()
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
        history.remove(10 + 4);

        let lost = Violation::Lost("s".to_owned(), message(1, 4));
        assert_eq!(violations(&history), std::slice::from_ref(&lost));
        history.retain(|event| !matches!(event, Event::Received { .. }));
        assert_eq!(violations(&history).len(), 10);
    }

    #[test]
    fn swapped_messages_are_found() {
        let mut history = faultless(1);
        history.swap(10 + 4, 10 + 5);

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
    fn a_group_has_each_message_once_in_any_order() {
        let members = ["s".to_owned(), "t".to_owned()];
        let mut history = faultless(2);
        history.swap(10 + 4, 10 + 5);
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
