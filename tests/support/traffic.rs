//! Publishers and subscribers that go on whatever happens to the broker, and write the history.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::client::Client;
use crate::history::{self, Event, Message, Stream};
use crate::lines::DEADLINE;
use crate::seed::Seed;
use crate::wire::{self, Answer, Connect, DISCONNECT, PINGREQ, Packet, Publish, Version};

/// A broker that runs. Each start of each broker has a `run` of its own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Server {
    pub(crate) run: u32,
    pub(crate) address: SocketAddr,
}

/// What publishers and subscribers share: the way to the brokers, and the history.
pub(crate) struct World {
    /// Those that run.
    servers: watch::Receiver<Vec<Server>>,
    /// Which of them a client tries next.
    choice: Mutex<Seed>,
    history: Mutex<Vec<Event>>,
    progress: watch::Sender<Progress>,
}

/// Bounds the wait for what other members of a share group have in flight.
const GROUP_DEADLINE: Duration = Duration::from_secs(10);

/// What a client that was not let in leaves to others.
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// What a subscriber that has nothing to receive lets pass before it sends PINGREQ.
const SILENCE: Duration = Duration::from_secs(20);

/// Bounds the wait for what a cluster has to find, such as the Wills of a node that was killed.
const CLUSTER_DEADLINE: Duration = Duration::from_secs(40);

/// How far the traffic has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) acknowledged: u64,
    pub(crate) received: u64,
    /// Marks that were published.
    ends: u32,
    /// The last mark that somebody received, with QoS 1 and with QoS 2.
    ends_received: [u32; 2],
}

impl World {
    /// With one broker.
    pub(crate) fn new(server: watch::Receiver<Vec<Server>>) -> Arc<Self> {
        Self::across(server, Seed::fixed())
    }

    /// With many brokers: each connection is made to any of them.
    pub(crate) fn across(servers: watch::Receiver<Vec<Server>>, choice: Seed) -> Arc<Self> {
        Arc::new(Self {
            servers,
            choice: Mutex::new(choice),
            history: Mutex::default(),
            progress: watch::Sender::default(),
        })
    }

    pub(crate) fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    /// Waits until the traffic has come as far as `enough` wants.
    pub(crate) async fn wait_until(&self, enough: impl Fn(Progress) -> bool) {
        let mut progress = self.progress.subscribe();
        let reached = progress.wait_for(|progress| enough(*progress));
        let reached = timeout(DEADLINE, reached).await;
        drop(reached.expect("the traffic goes on").unwrap());
    }

    pub(crate) fn record(&self, event: Event) {
        let (is_acknowledged, is_received) = (
            matches!(event, Event::Acknowledged(_)),
            matches!(event, Event::Received { .. }),
        );
        // Whoever sees the progress finds it in the history.
        self.history.lock().push(event);
        self.progress.send_modify(|progress| {
            progress.acknowledged += u64::from(is_acknowledged);
            progress.received += u64::from(is_received);
        });
    }

    /// Connects to a broker, as soon as one runs and lets the client in.
    pub(crate) async fn connect(&self, connect: &Connect) -> (Client, Server) {
        loop {
            let server = self.choose().await;
            match Client::try_connect(server.address, connect).await {
                Ok(client) => return (client, server),
                // It was killed, or a connection with the same client id has been faster.
                Err(_) => sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// A broker that runs, as soon as there is one.
    pub(crate) async fn choose(&self) -> Server {
        let mut servers = self.servers.clone();
        let running = servers.wait_for(|servers| !servers.is_empty());
        let running = timeout(DEADLINE, running).await;
        let running = running
            .expect("a broker is started")
            .expect("the test holds the brokers");
        let place = self.choice.lock().below(running.len() as u64);
        running[usize::try_from(place).unwrap()]
    }

    /// Publishes marks that come after everything that has been acknowledged, and waits until all
    /// `subscribers` have received them: whatever they did not get until then, they never will.
    pub(crate) async fn settle(self: &Arc<Self>, subscribers: Vec<Subscriber>) -> Vec<Subscriber> {
        let end = self.publish_end().await;
        let mut settling = JoinSet::new();
        for mut subscriber in subscribers {
            let world = self.clone();
            settling.spawn(async move {
                subscriber.run_to_end(&world, end).await;
                subscriber
            });
        }
        let settled = timeout(DEADLINE, settling.join_all()).await;
        settled.unwrap_or_else(|_| panic!("not everything arrives: {:?}", self.progress()))
    }

    /// Like [`World::settle`], with many brokers: a mark that one of them takes may overtake what
    /// another one had taken before.
    pub(crate) async fn settle_cluster(
        self: &Arc<Self>,
        subscribers: Vec<Subscriber>,
    ) -> Vec<Subscriber> {
        let names: Vec<_> = subscribers.iter().map(Subscriber::name).collect();
        let stop = watch::Sender::new(false);
        let receiving: Vec<_> = subscribers
            .into_iter()
            .map(|subscriber| subscriber.start(self, stop.subscribe()))
            .collect();
        // What is missing then is what the check reports.
        let _ = timeout(CLUSTER_DEADLINE, self.wait_for_missing(&names)).await;
        stop.send_replace(true);
        let mut subscribers = Vec::new();
        for subscriber in receiving {
            subscribers.push(subscriber.await.unwrap());
        }
        self.settle(subscribers).await
    }

    /// Waits until these subscribers have received all that they must have.
    async fn wait_for_missing(&self, subscribers: &[String]) {
        let mut progress = self.progress.subscribe();
        loop {
            let received = self.progress().received;
            let violations = history::check_cluster(&self.history.lock(), subscribers);
            let is_lost = |violation: &&_| matches!(violation, history::Violation::Lost(..));
            let missing = violations.iter().filter(is_lost).count() as u64;
            if missing == 0 {
                return;
            }
            let enough = progress.wait_for(|now| now.received >= received + missing);
            drop(enough.await.expect("the sender is part of the world"));
        }
    }

    /// Like [`World::settle`], with the members of a share group.
    pub(crate) async fn settle_group(
        self: &Arc<Self>,
        members: Vec<Subscriber>,
    ) -> Vec<Subscriber> {
        let names: Vec<_> = members.iter().map(Subscriber::name).collect();
        let stop = watch::Sender::new(false);
        let receiving: Vec<_> = members
            .into_iter()
            .map(|member| member.start(self, stop.subscribe()))
            .collect();
        let end = self.publish_end().await;
        self.wait_until(|now| now.ends_received == [end; 2]).await;
        // The members that have the marks may be ahead of the others.
        let mut progress = self.progress.subscribe();
        let all = progress.wait_for(|_| self.group_has_all(&names));
        // What is missing then is what the check reports.
        let _ = timeout(GROUP_DEADLINE, all).await;
        stop.send_replace(true);
        let mut members = Vec::new();
        for member in receiving {
            members.push(member.await.unwrap());
        }
        members
    }

    /// Like [`World::settle_group`], with many brokers: no mark tells when everything has come.
    pub(crate) async fn settle_group_of_cluster(
        self: &Arc<Self>,
        members: Vec<Subscriber>,
    ) -> Vec<Subscriber> {
        let names: Vec<_> = members.iter().map(Subscriber::name).collect();
        let stop = watch::Sender::new(false);
        let receiving: Vec<_> = members
            .into_iter()
            .map(|member| member.start(self, stop.subscribe()))
            .collect();
        let mut progress = self.progress.subscribe();
        let all = progress.wait_for(|_| self.group_has_all(&names));
        // What is missing then is what the check reports.
        let _ = timeout(CLUSTER_DEADLINE, all).await;
        stop.send_replace(true);
        let mut members = Vec::new();
        for member in receiving {
            members.push(member.await.unwrap());
        }
        members
    }

    async fn publish_end(&self) -> u32 {
        self.progress.send_modify(|progress| progress.ends += 1);
        let end = self.progress().ends;
        let connect = Connect::fleeting(Version::V311, "end");
        let (mut client, _) = self.connect(&connect).await;
        // One for each QoS: only messages of the same one stay behind each other.
        for qos in [1, 2] {
            let mark = Publish::new("load/end", &end.to_string(), qos);
            client.publish(&mark).await.unwrap();
        }
        end
    }

    /// Fails the test if a promise was broken to one of these subscribers.
    #[track_caller]
    pub(crate) fn check(&self, subscribers: &[Subscriber]) {
        let names: Vec<_> = subscribers.iter().map(Subscriber::name).collect();
        let violations = history::check(&self.history.lock(), &names);
        self.report(&violations.into_iter().collect::<Vec<_>>());
    }

    /// Fails the test if a cluster broke a promise to one of these subscribers.
    #[track_caller]
    pub(crate) fn check_cluster(&self, subscribers: &[Subscriber]) {
        let names: Vec<_> = subscribers.iter().map(Subscriber::name).collect();
        let violations = history::check_cluster(&self.history.lock(), &names);
        self.report(&violations.into_iter().collect::<Vec<_>>());
    }

    /// Fails the test if a promise was broken to this share group.
    #[track_caller]
    pub(crate) fn check_group(&self, members: &[Subscriber]) {
        let names: Vec<_> = members.iter().map(Subscriber::name).collect();
        let violations = history::check_group(&self.history.lock(), &names);
        self.report(&violations.into_iter().collect::<Vec<_>>());
    }

    /// Fails the test if a cluster broke a promise to this share group.
    #[track_caller]
    pub(crate) fn check_group_of_cluster(&self, members: &[Subscriber]) {
        let names: Vec<_> = members.iter().map(Subscriber::name).collect();
        let violations = history::check_group_of_cluster(&self.history.lock(), &names);
        self.report(&violations.into_iter().collect::<Vec<_>>());
    }

    /// Whether members of a share group have together received all that was acknowledged.
    fn group_has_all(&self, members: &[String]) -> bool {
        let lost = history::check_group(&self.history.lock(), members);
        !lost
            .iter()
            .any(|violation| matches!(violation, history::Violation::Lost(..)))
    }

    #[track_caller]
    fn report(&self, violations: &[history::Violation]) {
        assert!(self.progress().acknowledged > 0, "nothing was published");
        let some = &violations[..violations.len().min(20)];
        assert!(
            violations.is_empty(),
            "{} violations, {some:#?}",
            violations.len()
        );
    }
}

/// Publishes to `load/{number}/{topic}`, and repeats what is not acknowledged when it must
/// reconnect, as the specification demands: same identifiers, same order, DUP set.
#[derive(Clone)]
pub(crate) struct Publisher {
    pub(crate) number: u16,
    pub(crate) version: Version,
    pub(crate) topics: u16,
    pub(crate) qos: &'static [u8],
    /// In each stream.
    pub(crate) messages: u32,
    pub(crate) payload_bytes: usize,
    pub(crate) window: usize,
    /// Answers after which it cuts its connection and makes another one.
    pub(crate) stay: u32,
    /// Ends it before it has published everything.
    pub(crate) stop: Option<watch::Receiver<bool>>,
    /// Makes it wait for subscribers.
    pub(crate) lead: Option<Lead>,
}

/// How far subscribers may be behind before publishers wait for them.
#[derive(Clone, Copy)]
pub(crate) struct Lead {
    pub(crate) subscribers: u64,
    /// To each of them, on average.
    pub(crate) messages: u64,
}

impl Lead {
    fn is_used_up(self, progress: Progress) -> bool {
        progress.acknowledged > progress.received / self.subscribers + self.messages
    }
}

struct Exchange {
    packet_id: u16,
    message: Message,
    /// PUBREC has come.
    received: bool,
}

impl Publisher {
    pub(crate) fn new(number: u16, version: Version, messages: u32) -> Self {
        Self {
            number,
            version,
            topics: 2,
            qos: &[1, 2],
            messages,
            payload_bytes: 100,
            window: 40,
            stay: u32::MAX,
            stop: None,
            lead: None,
        }
    }

    /// Publishes everything, in the background.
    pub(crate) fn start(self, world: &Arc<World>) -> JoinHandle<()> {
        let world = world.clone();
        tokio::spawn(async move {
            let mut exchanges = VecDeque::new();
            let mut next = 0;
            loop {
                let run = self.publish(&world, &mut exchanges, &mut next);
                match run.await {
                    Ok(()) => return,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
    }

    fn message(&self, place: u32) -> Option<Message> {
        let qos_count = u32::try_from(self.qos.len()).unwrap();
        let streams = u32::from(self.topics) * qos_count;
        let (sequence, stream) = (place / streams, place % streams);
        let stream = Stream {
            publisher: self.number,
            topic: u16::try_from(stream / qos_count).unwrap(),
            qos: self.qos[(stream % qos_count) as usize],
        };
        let is_over = self.stop.as_ref().is_some_and(|stop| *stop.borrow());
        (sequence < self.messages && !is_over).then_some(Message { stream, sequence })
    }

    fn is_ahead(&self, progress: Progress) -> bool {
        self.lead.is_some_and(|lead| lead.is_used_up(progress))
    }

    /// Until it is not ahead any more, or may stop.
    async fn wait_for_subscribers(&self, world: &World) {
        let mut stop = self.stop.clone();
        let stopped = async {
            match &mut stop {
                Some(stop) => drop(stop.wait_for(|stop| *stop).await),
                None => std::future::pending().await,
            }
        };
        let mut progress = world.progress.subscribe();
        tokio::select! {
            _ = progress.wait_for(|now| !self.is_ahead(*now)) => {}
            () = stopped => {}
        }
    }

    fn encode(&self, exchange: &Exchange, dup: bool) -> Vec<u8> {
        let Exchange {
            message, packet_id, ..
        } = exchange;
        let Stream { topic, qos, .. } = message.stream;
        let text = format!("{} {topic} {qos} {} ", self.number, message.sequence);
        let publish = Publish {
            topic: format!("load/{}/{topic}", self.number),
            payload: format!("{text:.<width$}", width = self.payload_bytes).into_bytes(),
            qos,
            dup,
            packet_id: *packet_id,
            ..Publish::default()
        };
        publish.encode(self.version)
    }

    /// Until the connection ends, which is an error, or all is acknowledged.
    async fn publish(
        &self,
        world: &World,
        exchanges: &mut VecDeque<Exchange>,
        next: &mut u32,
    ) -> io::Result<()> {
        let name = format!("publisher-{}", self.number);
        let connect = Connect::persistent(self.version, &name);
        let (mut client, _) = world.connect(&connect).await;
        let mut answers_left = self.stay;
        assert!(
            client.session_present || exchanges.is_empty(),
            "{name}: the session is gone"
        );
        let mut output = Vec::new();
        for exchange in &*exchanges {
            if exchange.received {
                output.extend(Answer::PubRel.encode(exchange.packet_id));
            } else {
                output.extend(self.encode(exchange, true));
                world.record(Event::SentAgain(exchange.message));
            }
        }
        loop {
            while exchanges.len() < self.window
                && !self.is_ahead(world.progress())
                && let Some(message) = self.message(*next)
            {
                let is_free = |id: &u16| exchanges.iter().all(|one| one.packet_id != *id);
                let start = u16::try_from(*next % 60_000).unwrap() + 1;
                let packet_id = (start..).find(is_free).unwrap();
                let exchange = Exchange {
                    packet_id,
                    message,
                    received: false,
                };
                output.extend(self.encode(&exchange, false));
                world.record(Event::Published(message));
                exchanges.push_back(exchange);
                *next += 1;
            }
            if exchanges.is_empty() {
                if self.message(*next).is_none() {
                    return client.disconnect().await;
                }
                self.wait_for_subscribers(world).await;
                continue;
            }
            if answers_left == 0 {
                return Err(io::Error::other("it goes elsewhere"));
            }
            client.send(&std::mem::take(&mut output)).await?;
            let mut packet = Some(client.receive().await?);
            while let Some(received) = packet {
                handle(world, exchanges, &mut output, &received)?;
                answers_left = answers_left.saturating_sub(1);
                packet = client.received();
            }
        }
    }
}

/// Handles what the broker sends to a publisher.
fn handle(
    world: &World,
    exchanges: &mut VecDeque<Exchange>,
    output: &mut Vec<u8>,
    packet: &Packet,
) -> io::Result<()> {
    let Packet::Answer(answer, packet_id, reason) = *packet else {
        return Err(io::Error::other(format!("{packet:?}")));
    };
    let at = exchanges.iter().position(|one| one.packet_id == packet_id);
    let at = at.unwrap_or_else(|| panic!("{answer:?} for {packet_id}, which is not in use"));
    // After a crash PUBREL may be repeated of what the broker has finished, reason 0x92.
    assert!(
        reason < 0x80 || (answer, reason) == (Answer::PubComp, 0x92),
        "{answer:?} with reason {reason:#x}"
    );
    let exchange = &mut exchanges[at];
    let acknowledged = Event::Acknowledged(exchange.message);
    match (answer, exchange.message.stream.qos) {
        (Answer::PubAck, 1) => {
            exchanges.remove(at);
            world.record(acknowledged);
        }
        (Answer::PubRec, 2) => {
            if !exchange.received {
                exchange.received = true;
                world.record(acknowledged);
            }
            output.extend(Answer::PubRel.encode(packet_id));
        }
        (Answer::PubComp, 2) if exchange.received => {
            exchanges.remove(at);
        }
        unexpected => panic!("{unexpected:?} for {:?}", exchange.message),
    }
    Ok(())
}

/// Receives everything below `load` in a session that lasts.
pub(crate) struct Subscriber {
    connect: Connect,
    filter: String,
    subscription: Subscription,
    connection: Option<(Client, Server)>,
    /// QoS 2 identifiers between PUBLISH and PUBREL.
    awaiting_release: HashSet<u16>,
    /// QoS 1 messages acknowledged on this connection.
    acknowledged: Vec<Message>,
    output: Vec<u8>,
}

#[derive(PartialEq)]
enum Subscription {
    Wanted,
    Made,
    Ended,
}

/// What a subscriber got.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Got {
    Message,
    End {
        mark: u32,
        qos: u8,
    },
    /// A packet that carries on a QoS 2 exchange, or PINGRESP.
    Other,
}

impl Subscriber {
    pub(crate) fn new(name: &str, version: Version) -> Self {
        Self {
            connect: Connect::persistent(version, name),
            filter: "load/#".to_owned(),
            subscription: Subscription::Wanted,
            connection: None,
            awaiting_release: HashSet::new(),
            acknowledged: Vec::new(),
            output: Vec::new(),
        }
    }

    /// A member of a share group, which does not get the marks of [`World::settle`].
    pub(crate) fn member(name: &str, version: Version) -> Self {
        Self {
            filter: "$share/group/load/#".to_owned(),
            ..Self::new(name, version)
        }
    }

    pub(crate) fn receive_maximum(mut self, maximum: u16) -> Self {
        self.connect.receive_maximum = maximum;
        self
    }

    pub(crate) fn name(&self) -> String {
        self.connect.client_id.clone()
    }

    /// Makes the subscription, and goes.
    pub(crate) async fn register(mut self, world: &World) -> Self {
        loop {
            if self.open(world).await.is_ok() && self.disconnect(world).await.is_ok() {
                return self;
            }
            // Its node has crashed.
            self.connection = None;
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Connects if it is not connected.
    pub(crate) async fn open(&mut self, world: &World) -> io::Result<()> {
        if self.connection.is_some() {
            return Ok(());
        }
        let (mut client, server) = world.connect(&self.connect).await;
        self.acknowledged.clear();
        self.output.clear();
        if self.subscription == Subscription::Wanted {
            world.record(Event::Subscribing(self.name()));
            let earlier = client.subscribe(&self.filter, 2).await?;
            world.record(Event::Subscribed(self.name()));
            self.subscription = Subscription::Made;
            self.connection = Some((client, server));
            for publish in earlier {
                self.accept(world, server.run, &publish, true);
            }
            return self.flush().await;
        }
        assert!(
            client.session_present,
            "{}: the session is gone",
            self.name()
        );
        self.connection = Some((client, server));
        Ok(())
    }

    /// Receives something; an acknowledgement goes out if `acknowledge`.
    ///
    /// # Errors
    /// When the connection ends; the next call makes a new one.
    pub(crate) async fn step(&mut self, world: &World, acknowledge: bool) -> io::Result<Got> {
        let step = self.try_step(world, acknowledge).await;
        if step.is_err() {
            self.connection = None;
        }
        step
    }

    async fn try_step(&mut self, world: &World, acknowledge: bool) -> io::Result<Got> {
        self.open(world).await?;
        let (client, server) = self.connection.as_mut().expect("it was opened");
        let run = server.run;
        let packet = match client.received() {
            Some(packet) => packet,
            None => {
                self.flush().await?;
                let (client, _) = self.connection.as_mut().expect("it was opened");
                match timeout(SILENCE, client.receive()).await {
                    Ok(packet) => packet?,
                    Err(_) => {
                        client.send(&PINGREQ).await?;
                        client.receive().await?
                    }
                }
            }
        };
        self.take(world, run, packet, acknowledge)
    }

    fn take(
        &mut self,
        world: &World,
        run: u32,
        packet: Packet,
        acknowledge: bool,
    ) -> io::Result<Got> {
        match packet {
            Packet::Publish(publish) => Ok(self.accept(world, run, &publish, acknowledge)),
            Packet::Answer(Answer::PubRel, packet_id, _) => {
                self.awaiting_release.remove(&packet_id);
                self.output.extend(Answer::PubComp.encode(packet_id));
                Ok(Got::Other)
            }
            Packet::PingResp => Ok(Got::Other),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    }

    async fn flush(&mut self) -> io::Result<()> {
        let (client, _) = self.connection.as_mut().expect("it was opened");
        client.send(&std::mem::take(&mut self.output)).await
    }

    fn accept(&mut self, world: &World, run: u32, publish: &Publish, acknowledge: bool) -> Got {
        let packet_id = publish.packet_id;
        if acknowledge {
            let answer = [Answer::PubAck, Answer::PubRec][usize::from(publish.qos) - 1];
            self.output.extend(answer.encode(packet_id));
        }
        if publish.qos == 2 && !self.awaiting_release.insert(packet_id) {
            return Got::Other;
        }
        if publish.topic == "load/end" {
            let end = publish.text().parse().unwrap();
            let progress = &world.progress;
            let place = usize::from(publish.qos) - 1;
            progress.send_modify(|progress| progress.ends_received[place] = end);
            return Got::End {
                mark: end,
                qos: publish.qos,
            };
        }
        let message = parse(publish);
        world.record(Event::Received {
            subscriber: self.name(),
            message,
            dup: publish.dup,
            run,
        });
        if acknowledge && publish.qos == 1 {
            self.acknowledged.push(message);
        }
        Got::Message
    }

    /// Receives and acknowledges until this mark comes.
    async fn run_to_end(&mut self, world: &World, end: u32) {
        let mut missing = HashSet::from([1, 2]);
        if self.subscription == Subscription::Ended {
            missing.clear();
            while self.drain(world).await.is_err() {}
        }
        while !missing.is_empty() {
            if let Ok(Got::End { mark, qos }) = self.step(world, true).await
                && mark == end
            {
                missing.remove(&qos);
            }
        }
        self.disconnect(world).await.unwrap();
    }

    /// Receives and acknowledges for ever, in the background, and whatever happens.
    pub(crate) fn start(
        mut self,
        world: &Arc<World>,
        stop: watch::Receiver<bool>,
    ) -> JoinHandle<Self> {
        let (world, mut stop) = (world.clone(), stop);
        tokio::spawn(async move {
            loop {
                // Whoever stops it may cut a connection that is being made: that is a client that
                // vanishes.
                tokio::select! {
                    _ = self.step(&world, true) => {}
                    _ = stop.wait_for(|stop| *stop) => break,
                }
            }
            self.abort();
            self
        })
    }

    /// Ends the connection in good order. What was acknowledged on it is taken over then.
    pub(crate) async fn disconnect(&mut self, world: &World) -> io::Result<()> {
        if self.connection.is_none() {
            return Ok(());
        }
        self.output.extend(DISCONNECT);
        let flushed = self.flush().await;
        let Some((mut client, server)) = self.connection.take() else {
            return Ok(());
        };
        flushed?;
        client.wait_for_end().await;
        // Otherwise the broker may have been killed meanwhile.
        if world.servers.borrow().contains(&server) {
            for message in self.acknowledged.drain(..) {
                world.record(Event::TakenOver {
                    subscriber: self.connect.client_id.clone(),
                    message,
                    run: server.run,
                });
            }
        }
        Ok(())
    }

    /// Ends the subscription for good. What was published before may still come, until UNSUBACK
    /// or later.
    ///
    /// # Errors
    /// When the connection ends before UNSUBACK; the next call makes a new one.
    pub(crate) async fn unsubscribe(&mut self, world: &World) -> io::Result<()> {
        self.open(world).await?;
        world.record(Event::Unsubscribing(self.name()));
        let packet = wire::unsubscribe(self.connect.version, 1, &self.filter);
        self.receive_until(world, &packet, &Packet::UnsubAck)
            .await?;
        self.subscription = Subscription::Ended;
        world.record(Event::Unsubscribed(self.name()));
        Ok(())
    }

    /// Receives and acknowledges what the broker has for it at once.
    ///
    /// # Errors
    /// When the connection ends before; the next call makes a new one.
    pub(crate) async fn drain(&mut self, world: &World) -> io::Result<()> {
        self.open(world).await?;
        self.receive_until(world, &PINGREQ, &Packet::PingResp).await
    }

    /// Sends `packet`, and receives and acknowledges until its `answer` comes.
    async fn receive_until(
        &mut self,
        world: &World,
        packet: &[u8],
        answer: &Packet,
    ) -> io::Result<()> {
        self.output.extend(packet);
        loop {
            self.flush().await?;
            let (client, server) = self.connection.as_mut().expect("it was opened");
            let run = server.run;
            let received = client.receive().await;
            if received.is_err() {
                self.connection = None;
            }
            match received? {
                received if received == *answer => return Ok(()),
                received => self.take(world, run, received, true)?,
            };
        }
    }

    /// Connects again without ending the connection that is there: nothing more is read from that.
    pub(crate) async fn take_over(&mut self, world: &World) {
        let _old = self.connection.take();
        self.open(world).await.unwrap();
    }

    /// Whether the broker has sent no message but those that were received.
    pub(crate) async fn is_silent(&mut self) -> bool {
        let (client, _) = self.connection.as_mut().expect("it is connected");
        client.ping().await.unwrap().is_empty()
    }

    /// Vanishes.
    pub(crate) fn abort(&mut self) {
        self.connection = None;
    }
}

fn parse(publish: &Publish) -> Message {
    let mut numbers = publish.text().split(' ');
    let mut number = || numbers.next()?.parse::<u32>().ok();
    let mut part = || number().expect("it was sent by these tests");
    let stream = Stream {
        publisher: part().try_into().unwrap(),
        topic: part().try_into().unwrap(),
        qos: part().try_into().unwrap(),
    };
    assert_eq!(publish.qos, stream.qos, "it comes with the QoS it has");
    Message {
        stream,
        sequence: part(),
    }
}
