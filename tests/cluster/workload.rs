//! Clients of all kinds, on all nodes, for as long as a test disturbs them.

use std::io;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::history::{Event, Message, Stream};
use crate::seed::Seed;
use crate::traffic::{Lead, Progress, Publisher, Server, Subscriber, World};
use crate::wire::{Connect, Version, Will};

/// How much there is to do.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) publishers: u16,
    /// Those that want everything from the beginning to the end.
    pub(crate) subscribers: u16,
    /// Of each publisher, in each of its four streams.
    pub(crate) messages: u32,
    /// Clients with a Will.
    pub(crate) mortals: u16,
    /// Publishers go on after that, until [`Workload::finish`], but wait for subscribers.
    pub(crate) goes_on: bool,
}

/// Messages of a workload that goes on which a subscriber is behind at most, on average: what is left
/// at the end arrives in the time that [`World::settle_cluster`] gives it.
const LEAD: u64 = 10_000;

impl Size {
    /// For a test that takes seconds.
    pub(crate) fn small() -> Self {
        Self {
            publishers: 3,
            subscribers: 3,
            messages: 150,
            mortals: 12,
            goes_on: false,
        }
    }

    fn acknowledgements(self) -> u64 {
        u64::from(self.publishers) * u64::from(self.messages) * 4
    }
}

/// Publishers and subscribers that go from node to node: they leave with and without a word, and
/// come back wherever a seed sends them.
pub(crate) struct Workload {
    world: Arc<World>,
    size: Size,
    publishers: Vec<JoinHandle<()>>,
    subscribers: Vec<JoinHandle<Subscriber>>,
    mortals: JoinHandle<()>,
    /// Said to publishers, and to subscribers.
    enough: watch::Sender<bool>,
    stop: watch::Sender<bool>,
}

impl Workload {
    /// Returns when all subscribers have subscribed and the publishers are at work.
    pub(crate) async fn start(
        servers: watch::Receiver<Vec<Server>>,
        seed: &mut Seed,
        size: Size,
    ) -> Self {
        let world = World::across(servers, seed.split());
        let stop = watch::Sender::new(false);
        let enough = watch::Sender::new(false);
        let mut subscribers = Vec::new();
        for number in 0..size.subscribers {
            let subscriber = Subscriber::new(&format!("subscriber-{number}"), version(number));
            let subscriber = subscriber.register(&world).await;
            let roaming = roam(subscriber, world.clone(), seed.split(), stop.subscribe());
            subscribers.push(tokio::spawn(roaming));
        }
        let third = size.acknowledgements() / 3;
        let newcomer = join_late(world.clone(), third, seed.split(), stop.subscribe());
        subscribers.push(tokio::spawn(newcomer));
        let leaver = Subscriber::new("leaver", Version::V311);
        let leaver = leaver.register(&world).await;
        subscribers.push(tokio::spawn(leave_early(leaver, world.clone(), third * 2)));

        let publishers = (0..size.publishers).map(|number| {
            let messages = if size.goes_on {
                u32::MAX
            } else {
                size.messages
            };
            let publisher = Publisher {
                stay: u32::try_from(seed.between(50, 300)).unwrap(),
                stop: Some(enough.subscribe()),
                lead: size.goes_on.then_some(Lead {
                    subscribers: u64::from(size.subscribers),
                    messages: LEAD,
                }),
                ..Publisher::new(number, version(number), messages)
            };
            publisher.start(&world)
        });
        let publishers = publishers.collect();
        let mortals = tokio::spawn(live_and_die(world.clone(), seed.split(), size));
        Self {
            world,
            size,
            publishers,
            subscribers,
            mortals,
            enough,
            stop,
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        self.world.progress()
    }

    /// Waits until so much of all messages has been acknowledged.
    pub(crate) async fn wait_for_percent(&self, percent: u64) {
        let enough = self.size.acknowledgements() * percent / 100;
        self.world
            .wait_until(|progress| progress.acknowledged >= enough)
            .await;
    }

    /// Waits until everything is published and received, and fails the test if a promise was
    /// broken. At least one node must run.
    pub(crate) async fn finish(self) {
        if self.size.goes_on {
            self.wait_for_percent(100).await;
            self.enough.send_replace(true);
        }
        for publisher in self.publishers {
            publisher.await.unwrap();
        }
        self.mortals.await.unwrap();
        self.stop.send_replace(true);
        let mut subscribers = Vec::new();
        for subscriber in self.subscribers {
            subscribers.push(subscriber.await.unwrap());
        }
        let subscribers = self.world.settle_cluster(subscribers).await;

        self.world.check_cluster(&subscribers);
    }
}

pub(crate) fn version(number: u16) -> Version {
    [Version::V5, Version::V311][usize::from(number % 2)]
}

/// Receives, and acknowledges nearly everything, now here and now there.
async fn roam(
    mut subscriber: Subscriber,
    world: Arc<World>,
    mut seed: Seed,
    mut stop: watch::Receiver<bool>,
) -> Subscriber {
    loop {
        for _ in 0..seed.between(10, 200) {
            tokio::select! {
                // After an error the next step makes a new connection.
                _ = subscriber.step(&world, seed.percent(95)) => {}
                _ = stop.wait_for(|stop| *stop) => {
                    subscriber.abort();
                    return subscriber;
                }
            }
        }
        if seed.percent(50) {
            // When this fails, its node was killed, and it is disconnected as well.
            let _ = subscriber.disconnect(&world).await;
        }
        subscriber.abort();
    }
}

/// Subscribes when messages have been flowing for a while.
async fn join_late(
    world: Arc<World>,
    acknowledged: u64,
    seed: Seed,
    stop: watch::Receiver<bool>,
) -> Subscriber {
    world
        .wait_until(|progress| progress.acknowledged >= acknowledged)
        .await;
    let mut newcomer = Subscriber::new("newcomer", Version::V5);
    while newcomer.open(&world).await.is_err() {}
    roam(newcomer, world, seed, stop).await
}

/// Unsubscribes while messages go on flowing.
async fn leave_early(mut leaver: Subscriber, world: Arc<World>, acknowledged: u64) -> Subscriber {
    while world.progress().acknowledged < acknowledged {
        let _ = leaver.step(&world, true).await;
    }
    while leaver.unsubscribe(&world).await.is_err() {}
    leaver
}

/// Clients that are alive at the same time.
const MORTALS_ALIVE: usize = 4;

/// Connects clients with a Will, which say goodbye or vanish.
async fn live_and_die(world: Arc<World>, mut seed: Seed, size: Size) {
    let mut numbers = 0..;
    let mut alive = Vec::new();
    for born in 0..size.mortals {
        let acknowledged = size.acknowledgements() * u64::from(born) / u64::from(size.mortals);
        world
            .wait_until(|progress| progress.acknowledged >= acknowledged)
            .await;
        let mortal = loop {
            let number = numbers.next().expect("there are enough");
            if let Ok(mortal) = Mortal::connect(&world, number).await {
                break mortal;
            }
        };
        alive.push(mortal);
        if alive.len() == MORTALS_ALIVE {
            let next = usize::try_from(seed.below(MORTALS_ALIVE as u64)).unwrap();
            alive.swap_remove(next).end(&world, &mut seed).await;
        }
    }
    for mortal in alive {
        mortal.end(&world, &mut seed).await;
    }
}

/// A client with a Will.
struct Mortal {
    client: Client,
    will: Message,
}

/// The publisher that Wills seem to be of.
const WILLS: u16 = u16::MAX;

impl Mortal {
    /// No number can be used twice: the Will of a client that gets no CONNACK may be published.
    async fn connect(world: &World, number: u16) -> io::Result<Self> {
        let will = Message {
            stream: Stream {
                publisher: WILLS,
                topic: number,
                qos: 2,
            },
            sequence: 0,
        };
        let mut connect = Connect::persistent(version(number), &format!("mortal-{number}"));
        connect.will = Some(Will {
            topic: format!("load/will/{number}"),
            payload: format!("{WILLS} {number} 2 0"),
            qos: 2,
            delay_interval: 0,
        });
        let server = world.choose().await;
        world.record(Event::Published(will));
        let client = Client::try_connect(server.address, &connect).await?;
        Ok(Self { client, will })
    }

    async fn end(self, world: &World, seed: &mut Seed) {
        if seed.percent(50) {
            // Its node may be killed before it has heard, so that the Will may come, once.
            let _ = self.client.disconnect().await;
        } else {
            world.record(Event::WillDue(self.will));
        }
    }
}
