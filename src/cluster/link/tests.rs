//! Two nodes over a real bus that loses, repeats and reorders frames.

use std::collections::VecDeque;
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::task::Poll;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use tokio::task::JoinHandle;

use super::*;
use crate::bus::BusError;
use crate::bus::mongod::Mongod;
use crate::bus::mongodb::MongoBus;
use crate::bus::wire::Frame;
use crate::mqtt::Message;
use crate::mqtt::message::MessageParts;
use crate::store::SessionId;

const MEBIBYTE: u64 = 1024 * 1024;

/// A bus, and what becomes of each frame on it.
struct FaultyBus {
    bus: MongoBus,
    fault: Box<dyn Fn(&Frame) -> Fault + Send + Sync>,
    /// A frame that waits to be overtaken.
    late: Mutex<VecDeque<(Destination, Bytes)>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Lose,
    Repeat,
    /// Sends it after the next one.
    Delay,
}

impl fmt::Debug for FaultyBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bus.fmt(f)
    }
}

#[async_trait]
impl Bus for FaultyBus {
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        let mut sent = Vec::new();
        for (to, frame) in frames {
            match (self.fault)(&Frame::read(&frame).unwrap()) {
                Fault::Lose => {}
                Fault::Delay => {
                    self.late.lock().push_back((to, frame));
                    continue;
                }
                Fault::Repeat => sent.extend([(to, frame.clone()), (to, frame)]),
                Fault::None => sent.push((to, frame)),
            }
            sent.extend(self.late.lock().drain(..));
        }
        if sent.is_empty() {
            return Ok(());
        }
        self.bus.send(sent).await
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        self.bus.subscribe().await
    }
}

#[derive(Default)]
struct TestClock {
    durable_hlc: AtomicU64,
}

impl Clock for TestClock {
    fn stamp(&self) -> Stamp {
        let durable_hlc = self.durable_hlc.load(Ordering::Acquire);
        Stamp {
            hlc: durable_hlc + 1,
            durable_hlc,
            store_ok: true,
        }
    }

    fn observe(&self, _: &Header) {}
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// The epoch of an [`Item::Disown`]; others are not recorded.
    Received(Stream, u64),
    Lost,
    Interrupted,
}

#[derive(Default)]
struct Recorder {
    events: Mutex<Vec<Event>>,
    changed: Notify,
}

impl Recorder {
    fn record(&self, event: Event) {
        self.events.lock().push(event);
        self.changed.notify_one();
    }

    async fn wait_for(&self, is_enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
        loop {
            let changed = self.changed.notified();
            let events = self.events.lock().clone();
            if is_enough(&events) {
                return events;
            }
            changed.await;
        }
    }

    async fn wait_for_count(&self, count: usize) -> Vec<Event> {
        self.wait_for(|events| events.len() >= count).await
    }
}

impl Handler for Arc<Recorder> {
    fn receive(&mut self, header: &Header, _: Arrival, item: Item) {
        if let Item::Disown { epoch, .. } = item {
            self.record(Event::Received(header.stream, epoch));
        }
    }

    fn lost(&mut self, _: u32) {
        self.record(Event::Lost);
    }

    fn interrupted(&mut self) {
        self.record(Event::Interrupted);
    }
}

/// A node, with nothing but links.
struct Node {
    links: Arc<Links>,
    clock: Arc<TestClock>,
    heard: Arc<Recorder>,
    frames: Option<mpsc::Receiver<Bytes>>,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Node {
    async fn start(
        mongod: &Mongod,
        number: u32,
        fault: impl Fn(&Frame) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let mut node = Self::start_deaf(mongod, number, fault).await;
        node.listen();
        node
    }

    /// One that does not read its frames before [`Node::listen`].
    async fn start_deaf(
        mongod: &Mongod,
        number: u32,
        fault: impl Fn(&Frame) -> Fault + Send + Sync + 'static,
    ) -> Self {
        let database = mongod.database().await;
        let bus = FaultyBus {
            bus: MongoBus::open(&database, number, 20 * MEBIBYTE)
                .await
                .unwrap(),
            fault: Box::new(fault),
            late: Mutex::default(),
        };
        let frames = bus.subscribe().await.unwrap();
        let clock = Arc::new(TestClock::default());
        let links = Arc::new(Links::new(number, Arc::new(bus), clock.clone()));
        let stop = CancellationToken::new();
        let sender = tokio::spawn({
            let (links, stop) = (links.clone(), stop.clone());
            async move { links.send_frames(&stop).await }
        });
        Self {
            links,
            clock,
            heard: Arc::default(),
            frames: Some(frames),
            stop,
            tasks: vec![sender],
        }
    }

    fn listen(&mut self) {
        let frames = self.frames.take().unwrap();
        let (links, stop) = (self.links.clone(), self.stop.clone());
        let mut heard = self.heard.clone();
        let receiver =
            tokio::spawn(async move { links.receive_frames(frames, &mut heard, &stop).await });
        self.tasks.push(receiver);
    }

    fn say(&self, to: Destination, numbers: std::ops::Range<u64>) {
        for epoch in numbers {
            self.links.send(to, &item(epoch));
        }
    }

    fn advance(&self, durable_hlc: u64) {
        self.clock.durable_hlc.store(durable_hlc, Ordering::Release);
        self.links.durable_advanced();
    }

    async fn stop(self) {
        self.stop.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

fn item(epoch: u64) -> Item {
    Item::Disown {
        session: SessionId([7; 12]),
        epoch,
    }
}

fn received(stream: Stream, numbers: std::ops::Range<u64>) -> Vec<Event> {
    numbers
        .map(|number| Event::Received(stream, number))
        .collect()
}

fn of_stream(events: &[Event], stream: Stream) -> Vec<Event> {
    let is_of_stream = |event: &&Event| matches!(event, Event::Received(of, _) if *of == stream);
    events.iter().filter(is_of_stream).copied().collect()
}

fn no_fault(_: &Frame) -> Fault {
    Fault::None
}

fn is_of_order(frame: &Frame) -> bool {
    frame.header.sequence > 0
}

/// Waits for what nothing tells of.
async fn until(is_so: impl Fn() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Faults by a printed seed, once the bus is rough.
fn chance(is_rough: &Arc<AtomicBool>) -> impl Fn(&Frame) -> Fault + Send + Sync + 'static {
    let seed = env::var("MIDGE_TEST_SEED").map_or_else(
        |_| RandomState::new().hash_one(0),
        |text| text.parse().unwrap(),
    );
    eprintln!("MIDGE_TEST_SEED={seed}");
    let drawn = AtomicU64::new(0);
    let is_rough = is_rough.clone();
    move |_| {
        if !is_rough.load(Ordering::Acquire) {
            return Fault::None;
        }
        // SplitMix64.
        let step = drawn.fetch_add(1, Ordering::Relaxed) + 1;
        let mut mixed = seed.wrapping_add(step.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        match (mixed ^ (mixed >> 31)) % 10 {
            0 => Fault::Lose,
            1 => Fault::Repeat,
            2 => Fault::Delay,
            _ => Fault::None,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_comes_once_and_in_order_over_a_bus_that_loses_repeats_and_reorders() {
    const ITEMS: u64 = 10_000;
    let mongod = Mongod::shared().await;
    let is_rough = Arc::default();
    let one = Node::start(&mongod, 1, chance(&is_rough)).await;
    let two = Node::start(&mongod, 2, chance(&is_rough)).await;
    // What node 1 sends to all begins, for node 2, with the first frame that it hears.
    one.say(Destination::All, 0..1);
    two.heard.wait_for_count(1).await;
    is_rough.store(true, Ordering::Release);

    for begin in (1..ITEMS).step_by(100) {
        let numbers = begin..(begin + 100).min(ITEMS);
        one.say(Destination::Node(2), numbers.clone());
        one.say(Destination::All, numbers.clone());
        two.say(Destination::Node(1), numbers);
        tokio::task::yield_now().await;
    }

    let count = usize::try_from(ITEMS).unwrap();
    let events = two.heard.wait_for_count(2 * count - 1).await;
    assert_eq!(
        of_stream(&events, Stream::All),
        received(Stream::All, 0..ITEMS)
    );
    let direct = received(Stream::Direct, 1..ITEMS);
    assert_eq!(of_stream(&events, Stream::Direct), direct);
    assert_eq!(one.heard.wait_for_count(count - 1).await, direct);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test]
async fn an_interruption_of_the_bus_is_reported() {
    let mongod = Mongod::shared().await;
    let mut node = Node::start_deaf(&mongod, 1, no_fault).await;
    let (bus, frames) = mpsc::channel(1);
    node.frames = Some(frames);
    node.listen();

    bus.send(crate::bus::INTERRUPTION).await.unwrap();
    assert_eq!(node.heard.wait_for_count(1).await, [Event::Interrupted]);
    node.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_frame_before_silence_is_missed() {
    let mongod = Mongod::shared().await;
    let lost = AtomicU32::new(0);
    let lose_first = move |frame: &Frame| {
        let is_first = frame.header.stream == Stream::Direct
            && is_of_order(frame)
            && lost.fetch_add(1, Ordering::Relaxed) == 0;
        if is_first { Fault::Lose } else { Fault::None }
    };
    let one = Node::start(&mongod, 1, lose_first).await;
    let two = Node::start(&mongod, 2, no_fault).await;

    one.say(Destination::Node(2), 0..3);

    let events = two.heard.wait_for_count(3).await;
    assert_eq!(events, received(Stream::Direct, 0..3));
    assert_eq!(two.links.counters.gaps.get(), 1);
    assert_eq!(one.links.counters.resends.get(), 1);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

/// What goes to all may take another way.
#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_a_beat_has_overtaken_is_not_missed() {
    let mongod = Mongod::shared().await;
    let overtake = |frame: &Frame| match frame.header.stream {
        Stream::Direct => Fault::Delay,
        Stream::All => Fault::None,
    };
    let one = Node::start(&mongod, 1, overtake).await;
    let two = Node::start(&mongod, 2, no_fault).await;

    for number in 0..3 {
        one.say(Destination::Node(2), number..number + 1);
        let count = usize::try_from(number).unwrap() + 1;
        two.heard.wait_for_count(count).await;
    }
    assert_eq!(two.links.counters.gaps.get(), 0);
    assert_eq!(one.links.counters.resends.get(), 0);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_overwritten_before_it_was_read_is_lost_and_the_rest_comes() {
    let mongod = Mongod::shared().await;
    let one = Node::start(&mongod, 1, no_fault).await;
    let mut two = Node::start_deaf(&mongod, 2, no_fault).await;
    let large = Item::Publish {
        message: Message::new(MessageParts {
            topic: "large",
            payload: &[0; 64 * 1024],
            ..MessageParts::default()
        }),
        publisher: "publisher".into(),
    };

    // More than the collection, the reader's buffers and the frames kept to be sent again.
    one.say(Destination::Node(2), 0..1);
    for _ in 0..12 {
        let sent = one.links.counters.frames_sent.get();
        for _ in 0..100 {
            one.links.send(Destination::Node(2), &large);
        }
        until(|| one.links.counters.frames_sent.get() >= sent + 100).await;
    }
    one.say(Destination::Node(2), 1..3);
    two.heard = Arc::default();
    two.listen();

    let events = two
        .heard
        .wait_for(|events| events.ends_with(&received(Stream::Direct, 1..3)))
        .await;
    assert!(events.contains(&Event::Lost));
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_from_a_node_that_is_gone_is_lost() {
    let mongod = Mongod::shared().await;
    let lose_first = |frame: &Frame| {
        let is_lost = frame.header.stream == Stream::Direct && frame.header.sequence <= 1;
        if is_lost { Fault::Lose } else { Fault::None }
    };
    let one = Node::start(&mongod, 1, lose_first).await;
    let two = Node::start(&mongod, 2, no_fault).await;
    two.links.set_alive(&[1, 2]);
    one.say(Destination::Node(2), 0..1);
    until(|| two.links.counters.gaps.get() > 0).await;

    two.links.set_alive(&[2]);

    assert_eq!(two.heard.wait_for_count(1).await, [Event::Lost]);
    assert_eq!(two.links.marks().safe(), u64::MAX);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_sends_again_is_lost_and_the_rest_comes() {
    let mongod = Mongod::shared().await;
    let lose_first = |frame: &Frame| {
        let is_lost = frame.header.stream == Stream::Direct && frame.header.sequence == 1;
        if is_lost { Fault::Lose } else { Fault::None }
    };
    let one = Node::start(&mongod, 1, lose_first).await;
    let two = Node::start(&mongod, 2, no_fault).await;

    one.say(Destination::Node(2), 0..1);
    until(|| two.links.counters.gaps.get() > 0).await;
    one.say(Destination::Node(2), 1..2);

    let events = two.heard.wait_for_count(2).await;
    assert_eq!(events, [Event::Lost, Event::Received(Stream::Direct, 1)]);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_joins_hears_no_history() {
    let mongod = Mongod::shared().await;
    let one = Node::start(&mongod, 1, no_fault).await;
    let two = Node::start(&mongod, 2, no_fault).await;
    one.say(Destination::All, 0..10);
    two.heard.wait_for_count(10).await;

    let three = Node::start(&mongod, 3, no_fault).await;
    one.say(Destination::All, 10..20);

    let events = three.heard.wait_for_count(10).await;
    assert_eq!(events, received(Stream::All, 10..20));
    assert_eq!(three.links.counters.gaps.get(), 0);
    for node in [one, two, three] {
        node.stop().await;
    }
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_frame_of_a_node_that_joins_is_missed() {
    let mongod = Mongod::shared().await;
    let lost = AtomicU32::new(0);
    let lose_first = move |frame: &Frame| {
        let is_first = frame.header.stream == Stream::All
            && frame.header.sequence == 1
            && lost.fetch_add(1, Ordering::Relaxed) == 0;
        if is_first { Fault::Lose } else { Fault::None }
    };
    let one = Node::start(&mongod, 1, no_fault).await;
    let two = Node::start(&mongod, 2, lose_first).await;
    two.say(Destination::All, 0..10);

    let events = one.heard.wait_for_count(10).await;
    assert_eq!(events, received(Stream::All, 0..10));
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn marks_follow_the_nodes_that_are_alive() {
    let mongod = Mongod::shared().await;
    let one = Node::start(&mongod, 1, no_fault).await;
    let two = Node::start(&mongod, 2, no_fault).await;
    two.links.set_alive(&[1, 2]);
    assert_eq!(two.links.marks().safe(), 0);

    // A beat tells it.
    one.advance(10);
    two.links.marks().reached(10).await;
    // And so does a frame that was asked for.
    two.links.want_marks(20);
    until(|| one.links.mark_promised.load(Ordering::Acquire)).await;
    assert!(two.links.marks().safe() < 20);
    one.advance(20);
    two.links.marks().reached(20).await;
    assert_eq!(two.links.marks().safe(), 20);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_does_not_overtake_what_was_sent_before_it() {
    let mongod = Mongod::shared().await;
    let is_mended = Arc::new(AtomicBool::new(false));
    let lose_direct = {
        let is_mended = is_mended.clone();
        move |frame: &Frame| {
            let is_lost =
                frame.header.stream == Stream::Direct && !is_mended.load(Ordering::Acquire);
            if is_lost { Fault::Lose } else { Fault::None }
        }
    };
    let one = Node::start(&mongod, 1, lose_direct).await;
    let two = Node::start(&mongod, 2, no_fault).await;
    two.links.set_alive(&[1]);

    one.say(Destination::Node(2), 0..1);
    one.advance(10);
    until(|| two.links.counters.gaps.get() > 0).await;
    assert_eq!(two.links.marks().safe(), 0, "beats came, the item did not");
    is_mended.store(true, Ordering::Release);
    two.links.marks().reached(10).await;

    assert_eq!(
        two.heard.events.lock().clone(),
        received(Stream::Direct, 0..1)
    );
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}

/// A bus that takes nothing at first.
#[derive(Debug)]
struct RefusingBus {
    refusals: AtomicU32,
    /// How long it takes for frames.
    takes: Duration,
}

#[async_trait]
impl Bus for RefusingBus {
    async fn send(&self, _: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        tokio::time::sleep(self.takes).await;
        let refuse = |left: u32| left.checked_sub(1);
        let order = Ordering::Relaxed;
        match self.refusals.fetch_update(order, order, refuse) {
            Ok(_) => Err(BusError::Unavailable("refused".to_owned())),
            Err(_) => Ok(()),
        }
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        Err(BusError::Unavailable("refused".to_owned()))
    }
}

/// A node that sends to a bus which refuses so many times and takes so long.
fn start_sending(
    refusals: u32,
    takes: Duration,
) -> (Arc<Links>, CancellationToken, JoinHandle<()>) {
    let refusals = AtomicU32::new(refusals);
    let bus = Arc::new(RefusingBus { refusals, takes });
    let links = Arc::new(Links::new(1, bus, Arc::new(TestClock::default())));
    let stop = CancellationToken::new();
    let sending = tokio::spawn({
        let (links, stop) = (links.clone(), stop.clone());
        async move { links.send_frames(&stop).await }
    });
    (links, stop, sending)
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_sent_in_the_end_and_no_beat_after_it() {
    let (links, stop, sending) = start_sending(0, 2 * BEAT_INTERVAL);
    tokio::task::yield_now().await;
    let item = Item::Ask { number: 1 };
    links.send(Destination::Node(2), &item);

    let begin = Instant::now();
    stop.cancel();
    sending.await.unwrap();
    assert!(begin.elapsed() < 10 * BEAT_INTERVAL);
    assert!(links.carried().await);
}

/// Whether something that is sent is carried, on a bus that refuses so many times.
async fn is_carried(refusals: u32) -> bool {
    let (links, stop, sending) = start_sending(refusals, Duration::ZERO);
    tokio::task::yield_now().await;

    let item = Item::Ask { number: 1 };
    links.send(Destination::Node(2), &item);
    let carried = links.carried().await;
    stop.cancel();
    sending.await.unwrap();
    carried
}

#[tokio::test(start_paused = true)]
async fn what_the_bus_refuses_is_sent_again_and_waited_for() {
    assert!(is_carried(0).await);
    assert!(is_carried(1).await);
}

#[tokio::test(start_paused = true)]
async fn a_bus_that_refuses_everything_is_not_waited_for() {
    assert!(!is_carried(u32::MAX).await);
}

/// A message of this size that waits in no inbox.
fn publish(qos: QoS, bytes: usize) -> Item {
    let payload = vec![0; bytes];
    Item::Publish {
        message: Message::new(MessageParts {
            topic: "large",
            qos,
            payload: &payload,
            ..MessageParts::default()
        }),
        publisher: "publisher".into(),
    }
}

/// A node that sends to a bus, where nobody hears it, and has heard from node 2 how far it is.
fn start_unheard() -> (Arc<Links>, CancellationToken, JoinHandle<()>) {
    let (links, stop, sending) = start_sending(0, Duration::ZERO);
    links.confirm(2, 0);
    (links, stop, sending)
}

/// More than may be on its way; returns after which of them their publisher had better wait.
fn send_six(links: &Links, qos: QoS) -> [bool; 6] {
    [0; 6].map(|_| links.send(Destination::Node(2), &publish(qos, 1024 * 1024)))
}

#[tokio::test(start_paused = true)]
async fn publishers_wait_for_a_node_that_is_behind_but_not_for_long_and_only_once() {
    let (links, stop, sending) = start_unheard();
    tokio::task::yield_now().await;
    let begin = Instant::now();
    let to = Destination::Node(2);
    send_six(&links, QoS::AtMostOnce);

    assert!(links.carried().await);
    assert_eq!(begin.elapsed(), Duration::ZERO, "nobody waits for QoS 0");
    links.send(to, &publish(QoS::AtLeastOnce, 10));
    assert!(links.carried().await);
    let waited = begin.elapsed();
    assert!(waited >= Duration::from_millis(500), "{waited:?}");
    assert!(waited < CARRY_TIMEOUT, "{waited:?}");
    assert_eq!(links.counters.dropped.of(QoS::AtLeastOnce).get(), 1);
    links.send(to, &publish(QoS::AtLeastOnce, 10));
    assert!(links.carried().await);
    assert_eq!(begin.elapsed(), waited);
    assert_eq!(links.counters.dropped.of(QoS::AtLeastOnce).get(), 2);

    stop.cancel();
    sending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn publishers_go_on_as_soon_as_a_node_has_caught_up() {
    let (links, stop, sending) = start_unheard();
    tokio::task::yield_now().await;
    let begin = Instant::now();
    send_six(&links, QoS::AtLeastOnce);
    let waiting = tokio::spawn({
        let links = links.clone();
        async move { links.carried().await }
    });
    while links.counters.bytes_sent.get() < 4 * MEBIBYTE {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());

    links.confirm(2, 6);
    assert!(waiting.await.unwrap());
    assert_eq!(begin.elapsed(), Duration::ZERO);
    assert_eq!(links.counters.dropped.of(QoS::AtLeastOnce).get(), 0);
    stop.cancel();
    sending.await.unwrap();
}

/// Of QoS 0, which no acknowledgement holds up.
#[tokio::test(start_paused = true)]
async fn publishers_wait_for_space_while_messages_are_held_back() {
    let (links, stop, sending) = start_unheard();
    tokio::task::yield_now().await;
    let begin = Instant::now();
    let space = || {
        std::future::poll_fn(|context| match links.wait_for_space(2, context.waker()) {
            true => Poll::Pending,
            false => Poll::Ready(()),
        })
    };

    let waits = send_six(&links, QoS::AtMostOnce);
    assert_eq!(waits, [false, false, false, false, true, true]);
    let mut waiting = Box::pin(space());
    assert!(waiting.as_mut().now_or_never().is_none());
    while links.counters.bytes_sent.get() < 4 * MEBIBYTE {
        tokio::task::yield_now().await;
    }
    links.confirm(2, 6);
    waiting.await;
    assert_eq!(begin.elapsed(), Duration::ZERO);

    send_six(&links, QoS::AtMostOnce);
    space().await;
    let waited = begin.elapsed();
    assert!(waited < CARRY_TIMEOUT, "{waited:?}");
    let waits = send_six(&links, QoS::AtMostOnce);
    assert_eq!(waits, [false; 6], "nobody waits for who does not catch up");

    stop.cancel();
    sending.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_held_back_is_sent_at_the_end() {
    let (links, stop, sending) = start_unheard();
    send_six(&links, QoS::AtLeastOnce);

    stop.cancel();
    sending.await.unwrap();
    assert!(links.counters.bytes_sent.get() > 6 * MEBIBYTE);
    assert_eq!(links.counters.dropped.of(QoS::AtLeastOnce).get(), 0);
}

/// Ten times what may be on its way.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_and_handed_on_is_forgotten_and_more_is_sent() {
    const ITEMS: u64 = 80;
    let mongod = Mongod::shared().await;
    let one = Node::start(&mongod, 1, no_fault).await;
    let two = Node::start(&mongod, 2, no_fault).await;
    one.say(Destination::Node(2), 0..1);
    let is_limited = || {
        let sending = one.links.sending.lock();
        let outgoing = sending.direct.get(&2);
        outgoing.is_some_and(|outgoing| outgoing.pending_bytes() == 0)
    };
    until(is_limited).await;

    for number in 1..=ITEMS {
        one.links.send(
            Destination::Node(2),
            &publish(QoS::AtLeastOnce, 1024 * 1024),
        );
        one.say(Destination::Node(2), number..number + 1);
        until(|| one.links.pending_bytes() < 2 * 1024 * 1024).await;
    }

    let count = usize::try_from(ITEMS).unwrap() + 1;
    let events = two.heard.wait_for_count(count).await;
    assert_eq!(events, received(Stream::Direct, 0..ITEMS + 1));
    until(|| one.links.pending_bytes() == 0).await;
    assert_eq!(two.links.counters.lost.get(), 0);
    one.stop().await;
    two.stop().await;
    mongod.end().await;
}
