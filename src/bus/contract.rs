//! What every bus does, whatever carries its frames.

use std::ops::Range;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Bus, Destination};

pub(super) fn frame(number: u32) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

pub(super) fn to(destination: Destination, numbers: Range<u32>) -> Vec<(Destination, Bytes)> {
    numbers.map(|number| (destination, frame(number))).collect()
}

pub(super) fn numbered(numbers: Range<u32>) -> Vec<Bytes> {
    numbers.map(frame).collect()
}

pub(super) async fn take(frames: &mut mpsc::Receiver<Bytes>, count: usize) -> Vec<Bytes> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.push(frames.recv().await.unwrap());
    }
    taken
}

/// Waits for a frame, whatever comes before it.
pub(super) async fn wait_for(frames: &mut mpsc::Receiver<Bytes>, number: u32) {
    while frames.recv().await.unwrap() != frame(number) {}
}

/// `one` and `two` are the buses of the nodes 1 and 2 of one cluster.
pub(super) async fn frames_come_to_whom_they_were_sent_in_order(one: &dyn Bus, two: &dyn Bus) {
    let mut at_one = one.subscribe().await.unwrap();
    one.send(to(Destination::All, 0..5)).await.unwrap();
    let mut at_two = two.subscribe().await.unwrap();

    // As many at a time as may wait to be taken.
    for begin in (10..2_000).step_by(199) {
        let numbers = begin..begin + 199;
        one.send(to(Destination::Node(2), numbers.clone()))
            .await
            .unwrap();
        assert_eq!(take(&mut at_two, 199).await, numbered(numbers));
    }
    two.send(to(Destination::Node(1), 2_000..2_100))
        .await
        .unwrap();
    two.send(to(Destination::All, 2_100..2_102)).await.unwrap();
    one.send(to(Destination::Node(2), 2_102..2_103))
        .await
        .unwrap();

    assert_eq!(take(&mut at_two, 3).await, numbered(2_100..2_103));
    let expected = [numbered(0..5), numbered(2_000..2_102)].concat();
    assert_eq!(take(&mut at_one, expected.len()).await, expected);
}

/// The same without an order between what is for one node and what is for all: where channels are at
/// different servers there is none.
pub(super) async fn frames_for_each_destination_come_in_order(one: &dyn Bus, two: &dyn Bus) {
    let mut at_one = one.subscribe().await.unwrap();
    let mut at_two = two.subscribe().await.unwrap();
    let destinations = [Destination::Node(1), Destination::All, Destination::Node(2)];

    for batch in 0..20 {
        let numbers = batch * 300..(batch + 1) * 300;
        let destination = |number: u32| destinations[number as usize % 3];
        let frames = numbers
            .clone()
            .map(|number| (destination(number), frame(number)));
        let sender = if batch % 2 == 0 { one } else { two };
        sender.send(frames.collect()).await.unwrap();
        for (node, receiver) in [(1, &mut at_one), (2, &mut at_two)] {
            let taken = take(receiver, 200).await;
            for to in [Destination::Node(node), Destination::All] {
                let sent = numbers.clone().filter(|number| destination(*number) == to);
                let sent: Vec<_> = sent.map(frame).collect();
                let came = taken.iter().filter(|frame| sent.contains(frame));
                assert_eq!(came.cloned().collect::<Vec<_>>(), sent);
            }
        }
    }
}

/// A full frame of links, and one with a message as large as most brokers allow. Redis has to take
/// them within half a second, however busy the machine.
pub(super) async fn large_frames_come_whole(bus: &dyn Bus) {
    let mut frames = bus.subscribe().await.unwrap();
    let sizes = [64 * 1024, 1024 * 1024, 1];
    let large = sizes.map(|bytes| Bytes::from(vec![7; bytes]));
    bus.send(
        large
            .iter()
            .map(|frame| (Destination::Node(1), frame.clone()))
            .collect(),
    )
    .await
    .unwrap();
    for frame in large {
        assert!(frames.recv().await.unwrap() == frame, "{}", frame.len());
    }
}
