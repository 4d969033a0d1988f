//! Makes the connections, and proves all the time that they work.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{try_join, try_join_all};
use redis::RedisError;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::RedisBus;
use super::listener::Listener;
use super::publisher::Publisher;
use super::servers::{Servers, failure};
use crate::bus::INTERRUPTION;

/// How often the echo is called for.
const ECHO_INTERVAL: Duration = Duration::from_millis(250);

/// After which a missing echo means that the server, or the way to it, does not work.
const ECHO_TIMEOUT: Duration = Duration::from_secs(1);

const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(2);

/// Makes the connections, watches them, and makes them anew.
pub(super) struct Keeper {
    bus: RedisBus,
    frames: mpsc::Sender<Bytes>,
}

impl Keeper {
    pub(super) fn new(bus: RedisBus, frames: mpsc::Sender<Bytes>) -> Self {
        Self { bus, frames }
    }

    /// Until nobody takes frames.
    pub(super) async fn run(self) {
        tokio::select! {
            () = self.frames.closed() => {}
            () = self.keep() => {}
        }
        self.bus.publisher.send_replace(None);
    }

    async fn keep(&self) {
        let mut delay = RECONNECT_DELAY_MIN;
        let mut is_said = false;
        loop {
            let Err(reason) = self.serve().await;
            let was_up = self.bus.publisher.send_replace(None).is_some();
            if was_up {
                delay = RECONNECT_DELAY_MIN;
                // Closed: whoever took frames is gone, and so is this task in a moment.
                let _ = self.frames.send(INTERRUPTION).await;
            }
            if was_up || !is_said {
                is_said = true;
                let location = &self.bus.location;
                tracing::warn!(event = "bus_down", redis = ?location, %reason, "Redis does not work");
            }
            sleep(jittered(delay)).await;
            delay = (delay * 2).min(RECONNECT_DELAY_MAX);
        }
    }

    /// Returns why it does not go on.
    async fn serve(&self) -> Result<Infallible, RedisError> {
        let bus = &self.bus;
        // The first problem ends it.
        let (failed, mut failures) = mpsc::channel(1);
        let servers = bus.location.find().await?;
        let listeners = self.listen(&servers, &failed).await?;
        let publisher = Publisher::connect(bus.channels.clone(), servers, failed).await?;
        let publisher = Arc::new(publisher);
        for number in 1_u64.. {
            tokio::select! {
                called = timeout(ECHO_TIMEOUT, call(&publisher, &listeners, number)) => {
                    called.map_err(|_| failure("an echo is missing"))??;
                }
                Some(problem) = failures.recv() => return Err(problem),
            }
            if number == 1 {
                bus.connects.inc();
                bus.publisher.send_replace(Some(publisher.clone()));
                tracing::info!(event = "bus_up", redis = ?bus.location);
            }
            tokio::select! {
                () = sleep(ECHO_INTERVAL) => {}
                Some(problem) = failures.recv() => return Err(problem),
            }
        }
        Err(failure("numbers have run out"))
    }

    /// At each server that has a channel with frames for this node.
    async fn listen(
        &self,
        servers: &Servers,
        failed: &mpsc::Sender<RedisError>,
    ) -> Result<Vec<Listener>, RedisError> {
        let channels = &self.bus.channels;
        let mut listening = Vec::new();
        for (place, server) in servers.iter().enumerate() {
            let mut here = channels.own().to_vec();
            here.retain(|destination| servers.place_of(&channels.of(*destination)) == place);
            if !here.is_empty() {
                let (frames, failed) = (self.frames.clone(), failed.clone());
                listening.push(async move {
                    Listener::connect(place, server, channels, &here, frames, failed).await
                });
            }
        }
        try_join_all(listening).await
    }
}

/// Calls wherever this node listens, and waits for the echoes; asks the others how they are.
async fn call(
    publisher: &Publisher,
    listeners: &[Listener],
    number: u64,
) -> Result<(), RedisError> {
    let calls = listeners
        .iter()
        .map(|listener| listener.call(publisher, number));
    try_join(publisher.ask_servers(), try_join_all(calls)).await?;
    Ok(())
}

/// Half of `delay` to all of it: nodes should not come back in step.
fn jittered(delay: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) % 1024;
    delay.mul_f64(0.5 + random as f64 / 2048.0)
}
