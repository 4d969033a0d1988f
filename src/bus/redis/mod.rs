//! Frames by the pub/sub of Redis: fast, and at most once.
//!
//! Every node listens to a channel of its own and to one for all. Two connections serve it, one
//! to listen and one to publish, so that Redis may cut off a node that reads too slowly without
//! taking its voice as well. A [`Keeper`] makes them, and proves all the time that both work: what
//! it publishes to a third channel, its echo, has to come back.
//!
//! [`location`] is where Redis is by the configuration, [`servers`] what that comes to at the time.
//! In a Redis Cluster each of the [`channels`] is at one of several masters: a node has a
//! [`publisher`]'s connection to all of them, and a [`listener`] with an echo wherever it listens. Any
//! other Redis is one server that has everything. Whatever goes wrong with any of them ends all
//! connections, and the keeper looks anew where Redis is.

mod channels;
mod keeper;
mod listener;
mod location;
mod publisher;
mod servers;

#[cfg(test)]
mod cluster_tests;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use redis::RedisError;
use rustls::crypto::aws_lc_rs;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::{Bus, BusError, Destination};
use crate::metrics::Counter;

pub(crate) use location::Location;

use channels::Channels;
use keeper::Keeper;
use publisher::Publisher;

/// How long a node that starts waits for the server.
pub(super) const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Frames that have been read and wait for whoever subscribed. Those that do not fit are dropped:
/// Redis itself would drop the connection.
const READ_AHEAD_FRAMES: usize = 1024;

/// A bus that loses what is on its way when the server, or a connection to it, fails.
#[derive(Clone, Debug)]
pub(crate) struct RedisBus {
    location: Location,
    channels: Channels,
    /// There while Redis is healthy; the keeper alone changes it.
    publisher: Arc<watch::Sender<Option<Arc<Publisher>>>>,
    /// Times that Redis has begun to work for this node.
    connects: Arc<Counter>,
}

impl RedisBus {
    /// `cluster` tells the channels of one cluster from those of another on the same server.
    pub(crate) fn new(location: Location, cluster: &str, node: u32) -> Self {
        if location.uses_tls() {
            // Fails if there is one already, which will do.
            let _ = aws_lc_rs::default_provider().install_default();
        }
        Self {
            channels: Channels::new(cluster, node, location.is_cluster()),
            location,
            publisher: Arc::new(watch::Sender::new(None)),
            connects: Arc::default(),
        }
    }

    /// Sends frames in one go; returns how many listened to the channel of each. One node may seem
    /// to listen when its connection is dead and the server does not know yet.
    ///
    /// # Errors
    /// `BusError` if any of them may not have been taken by the server. It comes at once while the
    /// server is known to be away, and else after half a second at most.
    pub(crate) async fn publish(
        &self,
        frames: &[(Destination, Bytes)],
    ) -> Result<Vec<u64>, BusError> {
        let publisher = self.publisher.borrow().clone();
        let Some(publisher) = publisher else {
            return Err(BusError::Unavailable("Redis is away".to_owned()));
        };
        Ok(publisher.publish(frames).await?)
    }

    /// Begins to listen, now or as soon as the server is there; to be called once. Where something
    /// may be missing, there is an [`INTERRUPTION`](super::INTERRUPTION).
    pub(crate) fn listen(&self) -> mpsc::Receiver<Bytes> {
        let (sender, frames) = mpsc::channel(READ_AHEAD_FRAMES);
        let keeper = Keeper::new(self.clone(), sender);
        // Ends when nobody takes frames any more.
        tokio::spawn(keeper.run());
        frames
    }

    /// Whether frames go both ways, and a way to wait for that to change.
    pub(crate) fn health(&self) -> Health {
        Health(self.publisher.subscribe())
    }
}

/// Watches whether the server works for this node.
#[derive(Debug)]
pub(crate) struct Health(watch::Receiver<Option<Arc<Publisher>>>);

impl Health {
    pub(crate) fn is_up(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Waits until it does.
    pub(crate) async fn wait_until_up(&mut self) {
        // An error would mean that the bus is gone, and its user with it.
        let _ = self.0.wait_for(Option::is_some).await;
    }

    /// Waits until it has changed since the last call.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[async_trait]
impl Bus for RedisBus {
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        self.publish(&frames).await.map(drop)
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        let frames = self.listen();
        let up = timeout(SUBSCRIBE_TIMEOUT, self.health().wait_until_up()).await;
        up.map_err(|late| BusError::Unavailable(late.to_string()))?;
        Ok(frames)
    }

    fn is_connected(&self) -> bool {
        self.publisher.borrow().is_some()
    }

    fn reconnects(&self) -> u64 {
        self.connects.get().saturating_sub(1)
    }
}

impl From<RedisError> for BusError {
    fn from(error: RedisError) -> Self {
        Self::Unavailable(format!("Redis: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::servers::{connect, connection_config};
    use super::*;
    use crate::bus::INTERRUPTION;
    use crate::bus::contract::{self, frame, take, to, wait_for};
    use crate::bus::redis_server::RedisServer;

    #[tokio::test]
    async fn it_is_a_bus() {
        let server = RedisServer::shared();
        contract::frames_come_to_whom_they_were_sent_in_order(&server.bus(1), &server.bus(2)).await;
        contract::frames_for_each_destination_come_in_order(&server.bus(1), &server.bus(2)).await;
        contract::large_frames_come_whole(&server.bus(1)).await;
    }

    #[tokio::test]
    async fn it_says_how_many_listen() {
        let server = RedisServer::shared();
        let (one, two) = (server.bus(1), server.bus(2));
        let _at_one = one.subscribe().await.unwrap();
        let _at_two = two.subscribe().await.unwrap();

        let destinations = [Destination::Node(3), Destination::All, Destination::Node(2)];
        let frames = destinations.map(|destination| (destination, frame(7)));
        assert_eq!(one.publish(&frames).await.unwrap(), [0, 2, 1]);
    }

    #[tokio::test]
    async fn clusters_on_one_server_do_not_hear_each_other() {
        let server = RedisServer::shared();
        let here = server.bus(1);
        let elsewhere = RedisBus::new(here.location.clone(), "elsewhere", 1);
        let mut frames = here.subscribe().await.unwrap();
        let _others = elsewhere.subscribe().await.unwrap();

        elsewhere.send(to(Destination::All, 0..1)).await.unwrap();
        here.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_restarted_server_is_found_again() {
        let mut server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        assert_eq!(bus.reconnects(), 0);
        server.kill();
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.send(to(Destination::All, 0..1)).await.unwrap_err();
        server.start_again();
        bus.health().wait_until_up().await;
        assert_eq!(bus.reconnects(), 1);
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_frozen_server_is_noticed_without_sending() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        server.freeze();
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.send(to(Destination::All, 0..1)).await.unwrap_err();
        server.thaw();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut frames, 1).await;
    }

    #[tokio::test]
    async fn a_listener_that_the_server_cuts_off_comes_back() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        assert_eq!(frames.recv().await.unwrap(), INTERRUPTION);
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(1)]);
    }

    #[tokio::test]
    async fn a_listener_that_is_too_slow_for_the_server_is_cut_off_and_comes_back() {
        let server = RedisServer::start();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();
        let limit = [
            "CONFIG",
            "SET",
            "client-output-buffer-limit",
            "pubsub 32kb 0 0",
        ];
        server.command(&limit).await;

        // All of it waits in the server before any of it goes out.
        let large = (Destination::Node(1), Bytes::from(vec![7; 64 * 1024]));
        bus.send(vec![large; 16]).await.unwrap();
        while frames.recv().await.unwrap() != INTERRUPTION {}
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut frames, 1).await;
    }

    #[tokio::test]
    async fn whoever_takes_frames_too_slowly_misses_some_and_hears_the_next() {
        let server = RedisServer::shared();
        let bus = server.bus(1);
        let mut frames = bus.subscribe().await.unwrap();

        let many = u32::try_from(READ_AHEAD_FRAMES).unwrap() + 10;
        bus.send(to(Destination::Node(1), 0..many)).await.unwrap();
        let kept = take(&mut frames, READ_AHEAD_FRAMES).await;
        assert_eq!(kept[0], frame(0));
        bus.send(to(Destination::Node(1), many..many + 1))
            .await
            .unwrap();
        wait_for(&mut frames, many).await;
    }

    #[tokio::test]
    async fn nothing_goes_on_when_nobody_takes_frames() {
        let server = RedisServer::shared();
        let bus = server.bus(1);
        let frames = bus.subscribe().await.unwrap();
        let mut health = bus.health();
        assert!(health.is_up());

        drop(frames);
        while health.is_up() {
            health.changed().await;
        }
    }

    #[tokio::test]
    async fn sentinels_are_asked_one_after_the_other_for_the_server() {
        let server = RedisServer::start();
        let sentinel = server.sentinel("main", None);
        let nowhere = {
            let mut killed = RedisServer::start();
            killed.kill();
            killed.address()
        };
        let url = format!("redis+sentinel://{nowhere},{}/main", sentinel.address());
        let bus = RedisBus::new(Location::parse(&url).unwrap(), "test", 1);

        let mut frames = bus.listen();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(0)]);
    }

    #[tokio::test]
    async fn sentinels_and_the_server_have_passwords_of_their_own() {
        let server = RedisServer::start_with_password("s@cret");
        let sentinel = server.sentinel("main", Some("other"));
        let with = |server: &str, sentinel_password: &str| {
            let address = sentinel.address();
            let url = format!(
                "redis+sentinel://:{server}@{address}/main?sentinel_password={sentinel_password}"
            );
            RedisBus::new(Location::parse(&url).unwrap(), "test", 1)
        };

        let bus = with("s%40cret", "other");
        let mut frames = bus.listen();
        bus.health().wait_until_up().await;
        bus.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(take(&mut frames, 1).await, [frame(0)]);
        for (server, sentinel_password) in [("wrong", "other"), ("s%40cret", "wrong")] {
            let bus = with(server, sentinel_password);
            let served = async {
                let servers = bus.location.find().await?;
                let server = servers.iter().next().unwrap();
                connect(server, &connection_config()).await
            };
            assert!(served.await.is_err());
        }
    }
}
