//! Redis while it works, MongoDB while it does not.
//!
//! Every node listens to both. A frame goes by Redis, unless Redis does not work for its sender, or
//! nobody there listens for its destination. A node for which Redis does not work is *deaf*, and
//! says so by notes on the sure bus, again and again: what is for it, and what is for all, is sent
//! to it that way. Links put up with what comes twice, or out of order, when the way changes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::redis::{Health, RedisBus, SUBSCRIBE_TIMEOUT};
use super::{Bus, BusError, Destination};

/// How often a deaf node says so.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);

/// How long others believe it.
const NOTE_LIFETIME: Duration = Duration::from_secs(4);

/// Frames that wait for whoever subscribed; the rest waits on the two buses.
const READ_AHEAD_FRAMES: usize = 64;

/// Two buses as one.
#[derive(Clone, Debug)]
pub(crate) struct FallbackBus {
    node: u32,
    fast: RedisBus,
    sure: Arc<dyn Bus>,
    /// Other nodes that do not hear what goes by Redis, and until when that is believed.
    deaf: Arc<Mutex<HashMap<u32, Instant>>>,
}

impl FallbackBus {
    pub(crate) fn new(node: u32, fast: RedisBus, sure: Arc<dyn Bus>) -> Self {
        Self {
            node,
            fast,
            sure,
            deaf: Arc::default(),
        }
    }

    /// Tells all nodes whether this one hears what goes by Redis.
    async fn tell(&self, is_deaf: bool) -> Result<(), BusError> {
        let note = Note {
            node: self.node,
            is_deaf,
        };
        self.sure.send(vec![(Destination::All, note.write())]).await
    }

    fn hear(&self, note: Note) {
        if note.node == self.node {
            return;
        }
        let mut deaf = self.deaf.lock();
        if note.is_deaf {
            deaf.insert(note.node, Instant::now() + NOTE_LIFETIME);
        } else {
            deaf.remove(&note.node);
        }
    }

    fn deaf_nodes(&self) -> Vec<u32> {
        let mut deaf = self.deaf.lock();
        let now = Instant::now();
        deaf.retain(|_, until| *until > now);
        deaf.keys().copied().collect()
    }

    /// Makes one stream of the two, until nobody takes it.
    async fn merge(
        self,
        mut fast: mpsc::Receiver<Bytes>,
        mut sure: mpsc::Receiver<Bytes>,
        merged: mpsc::Sender<Bytes>,
    ) {
        loop {
            let frame = tokio::select! {
                // First what was sent before the way changed.
                biased;
                Some(frame) = fast.recv() => frame,
                Some(frame) = sure.recv() => match Note::read(&frame) {
                    Some(note) => {
                        self.hear(note);
                        continue;
                    }
                    None => frame,
                },
                () = merged.closed() => return,
            };
            if merged.send(frame).await.is_err() {
                return;
            }
        }
    }

    /// Keeps the others informed, who may know it for deaf, until nobody listens here.
    async fn announce(
        self,
        mut is_known_deaf: bool,
        mut health: Health,
        listener: mpsc::Sender<Bytes>,
    ) {
        loop {
            let is_deaf = !health.is_up();
            if is_deaf || is_known_deaf {
                match self.tell(is_deaf).await {
                    Ok(()) => is_known_deaf = is_deaf,
                    Err(error) => tracing::debug!(event = "bus_note_failed", %error),
                }
            }
            tokio::select! {
                () = health.changed() => {}
                () = sleep(NOTE_INTERVAL), if is_deaf || is_known_deaf => {}
                () = listener.closed() => return,
            }
        }
    }
}

#[async_trait]
impl Bus for FallbackBus {
    async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
        let listeners = match self.fast.publish(&frames).await {
            Ok(listeners) => listeners,
            Err(error) => {
                tracing::trace!(event = "bus_fallback", %error);
                return self.sure.send(frames).await;
            }
        };
        let deaf = self.deaf_nodes();
        let is_unheard = |to: Destination, listeners: u64| match to {
            Destination::Node(node) => listeners == 0 || deaf.contains(&node),
            Destination::All => !deaf.is_empty(),
        };
        let unheard: Vec<_> = frames
            .into_iter()
            .zip(listeners)
            .filter(|((to, _), listeners)| is_unheard(*to, *listeners))
            .map(|(frame, _)| frame)
            .collect();
        if unheard.is_empty() {
            return Ok(());
        }
        self.sure.send(unheard).await
    }

    async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
        let sure = self.sure.subscribe().await?;
        let fast = self.fast.listen();
        let mut health = self.fast.health();
        let up = timeout(SUBSCRIBE_TIMEOUT, health.wait_until_up()).await;
        let is_deaf = up.is_err();
        if is_deaf {
            self.tell(true).await?;
        }
        let (merged, frames) = mpsc::channel(READ_AHEAD_FRAMES);
        // Both end when nobody takes frames any more.
        tokio::spawn(self.clone().announce(is_deaf, health, merged.clone()));
        tokio::spawn(self.clone().merge(fast, sure, merged));
        Ok(frames)
    }

    fn is_connected(&self) -> bool {
        self.fast.is_connected()
    }

    fn is_quick(&self) -> bool {
        self.fast.is_connected()
    }

    fn reconnects(&self) -> u64 {
        self.fast.reconnects() + self.sure.reconnects()
    }
}

/// What a node says about itself on the sure bus, among the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    node: u32,
    is_deaf: bool,
}

/// A frame begins with a checksum, and is longer.
const NOTE_MAGIC: &[u8] = b"midge-note:";

impl Note {
    fn write(self) -> Bytes {
        let mut note = BytesMut::from(NOTE_MAGIC);
        note.put_u32(self.node);
        note.put_u8(self.is_deaf.into());
        note.freeze()
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let note = bytes.strip_prefix(NOTE_MAGIC)?;
        let (node, is_deaf) = note.split_first_chunk()?;
        Some(Self {
            node: u32::from_be_bytes(*node),
            is_deaf: match is_deaf {
                [0] => false,
                [1] => true,
                _ => return None,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::broadcast;

    use super::*;
    use crate::bus::INTERRUPTION;
    use crate::bus::contract::{self, frame, take, to, wait_for};
    use crate::bus::mongod::Mongod;
    use crate::bus::mongodb::MongoBus;
    use crate::bus::redis_server::RedisServer;

    /// A bus that loses nothing, in place of MongoDB.
    #[derive(Clone, Debug)]
    struct Sure {
        node: u32,
        sent: broadcast::Sender<(Destination, Bytes)>,
    }

    /// The nodes 1 and 2 on one server.
    fn two_nodes(redis: &RedisServer) -> [FallbackBus; 2] {
        let sent = broadcast::Sender::new(1024);
        [1, 2].map(|node| {
            let sure = Sure {
                node,
                sent: sent.clone(),
            };
            FallbackBus::new(node, redis.bus(node), Arc::new(sure))
        })
    }

    #[async_trait]
    impl Bus for Sure {
        async fn send(&self, frames: Vec<(Destination, Bytes)>) -> Result<(), BusError> {
            for frame in frames {
                let _ = self.sent.send(frame);
            }
            Ok(())
        }

        async fn subscribe(&self) -> Result<mpsc::Receiver<Bytes>, BusError> {
            let mut sent = self.sent.subscribe();
            let (sender, frames) = mpsc::channel(1024);
            let node = self.node;
            tokio::spawn(async move {
                while let Ok((to, frame)) = sent.recv().await {
                    let is_for_us = matches!(to, Destination::All) || to == Destination::Node(node);
                    if is_for_us && sender.send(frame).await.is_err() {
                        return;
                    }
                }
            });
            Ok(frames)
        }
    }

    #[tokio::test]
    async fn it_is_a_bus_while_redis_works() {
        let redis = RedisServer::shared();
        let [one, two] = two_nodes(&redis);
        contract::frames_come_to_whom_they_were_sent_in_order(&one, &two).await;
        let [one, _] = two_nodes(&redis);
        contract::large_frames_come_whole(&one).await;
    }

    #[tokio::test]
    async fn it_is_a_bus_while_redis_is_away() {
        let mut redis = RedisServer::start();
        redis.kill();
        let mongod = Mongod::shared().await;
        let database = mongod.database().await;
        let sure = MongoBus::open(&database, 1, 16 * 1024 * 1024)
            .await
            .unwrap();
        let one = FallbackBus::new(1, redis.bus(1), Arc::new(sure));
        let sure = MongoBus::open(&database, 2, 16 * 1024 * 1024)
            .await
            .unwrap();
        let two = FallbackBus::new(2, redis.bus(2), Arc::new(sure));

        contract::frames_come_to_whom_they_were_sent_in_order(&one, &two).await;
        mongod.end().await;
    }

    #[tokio::test]
    async fn while_redis_works_nothing_takes_the_other_way() {
        let redis = RedisServer::shared();
        let [one, two] = two_nodes(&redis);
        let mut at_one = one.subscribe().await.unwrap();
        let mut at_two = two.subscribe().await.unwrap();
        let mut sure = one.sure.subscribe().await.unwrap();

        two.send(to(Destination::All, 0..10)).await.unwrap();
        two.send(to(Destination::Node(1), 10..20)).await.unwrap();
        take(&mut at_one, 20).await;
        take(&mut at_two, 10).await;
        assert!(sure.try_recv().is_err());
    }

    #[tokio::test]
    async fn frames_go_on_while_redis_is_frozen_and_come_back_to_it() {
        let redis = RedisServer::start();
        let [one, two] = two_nodes(&redis);
        let mut at_one = one.subscribe().await.unwrap();
        let mut at_two = two.subscribe().await.unwrap();

        redis.freeze();
        let begin = Instant::now();
        two.send(to(Destination::Node(1), 0..1)).await.unwrap();
        assert!(begin.elapsed() < Duration::from_secs(1));
        wait_for(&mut at_one, 0).await;
        one.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut at_two, 1).await;

        redis.thaw();
        one.fast.health().wait_until_up().await;
        two.fast.health().wait_until_up().await;
        two.send(to(Destination::Node(1), 2..3)).await.unwrap();
        wait_for(&mut at_one, 2).await;
    }

    #[tokio::test]
    async fn what_nobody_listens_for_takes_the_other_way() {
        let redis = RedisServer::shared();
        let [one, two] = two_nodes(&redis);
        let _at_one = one.subscribe().await.unwrap();
        let mut at_two = two.sure.subscribe().await.unwrap();

        one.send(to(Destination::Node(2), 0..1)).await.unwrap();
        assert_eq!(take(&mut at_two, 1).await, [frame(0)]);
    }

    #[tokio::test]
    async fn a_deaf_node_is_reached_the_other_way() {
        let redis = RedisServer::start();
        let [one, two] = two_nodes(&redis);
        let mut nowhere = RedisServer::start();
        nowhere.kill();
        let deaf = FallbackBus::new(2, nowhere.bus(2), two.sure);
        let mut at_one = one.subscribe().await.unwrap();
        let mut at_deaf = deaf.subscribe().await.unwrap();

        while one.deaf_nodes().is_empty() {
            tokio::task::yield_now().await;
        }
        one.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(take(&mut at_deaf, 1).await, [frame(0)]);
        deaf.send(to(Destination::All, 1..2)).await.unwrap();
        wait_for(&mut at_one, 1).await;

        nowhere.start_again();
        deaf.fast.health().wait_until_up().await;
        while !one.deaf_nodes().is_empty() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn an_interruption_comes_before_what_takes_the_other_way() {
        let mut redis = RedisServer::start();
        let [one, two] = two_nodes(&redis);
        let mut at_one = one.subscribe().await.unwrap();
        let _at_two = two.subscribe().await.unwrap();

        redis.kill();
        assert_eq!(at_one.recv().await.unwrap(), INTERRUPTION);
        two.send(to(Destination::All, 0..1)).await.unwrap();
        assert_eq!(at_one.recv().await.unwrap(), frame(0));
    }

    #[test]
    fn notes_are_no_frames() {
        for note in [(1, true), (u32::MAX, false)] {
            let (node, is_deaf) = note;
            let note = Note { node, is_deaf };
            assert_eq!(Note::read(&note.write()), Some(note));
        }
        assert_eq!(Note::read(&frame(7)), None);
        assert_eq!(Note::read(b"midge-note:\0\0\0\x01\x02"), None);
        assert_eq!(Note::read(b"midge-note:\0\0"), None);
    }
}
