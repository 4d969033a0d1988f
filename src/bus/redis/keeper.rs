//! Makes the connections, and proves all the time that they work.

use std::convert::Infallible;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{Client, PushInfo, PushKind, RedisError, Value};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::servers::{connection_config, failure};
use super::{Publisher, RedisBus};
use crate::bus::{Destination, INTERRUPTION};

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
        let Self { bus, frames } = self;
        let failed = Arc::new(Notify::new());
        let echoes = Arc::new(watch::Sender::new(0_u64));
        let client = Client::open(bus.location.find().await?)?;
        let listener = Listener {
            frames: frames.clone(),
            echo_channel: bus.channels.echo(),
            echoes: echoes.clone(),
            failed: failed.clone(),
        };
        let config = connection_config().set_push_sender(move |push| listener.receive(push));
        let mut listening = client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        let own = Destination::Node(bus.channels.node);
        let channels = [
            bus.channels.of(own),
            bus.channels.of(Destination::All),
            bus.channels.echo(),
        ];
        listening.subscribe(&channels[..]).await?;
        let connection = client
            .get_multiplexed_async_connection_with_config(&connection_config())
            .await?;
        for number in 1_u64.. {
            tokio::select! {
                echoed = timeout(ECHO_TIMEOUT, bus.call(connection.clone(), number, &echoes)) => {
                    echoed.map_err(|_| failure("the echo is missing"))??;
                }
                () = failed.notified() => return Err(failure("a connection has failed")),
            }
            if number == 1 {
                let publisher = Publisher {
                    connection: connection.clone(),
                    failed: failed.clone(),
                };
                bus.connects.inc();
                bus.publisher.send_replace(Some(publisher));
                tracing::info!(event = "bus_up", redis = ?bus.location);
            }
            tokio::select! {
                () = sleep(ECHO_INTERVAL) => {}
                () = failed.notified() => return Err(failure("a connection has failed")),
            }
        }
        Err(failure("numbers have run out"))
    }
}

impl RedisBus {
    /// Calls, and waits for the echo.
    async fn call(
        &self,
        mut connection: MultiplexedConnection,
        number: u64,
        echoes: &watch::Sender<u64>,
    ) -> Result<(), RedisError> {
        let () = redis::cmd("PUBLISH")
            .arg(self.channels.echo())
            .arg(number)
            .query_async(&mut connection)
            .await?;
        // The sender is there as long as this is.
        let _ = echoes.subscribe().wait_for(|echo| *echo >= number).await;
        Ok(())
    }
}

/// Takes what the listening connection reads; runs in its task, and must not wait.
struct Listener {
    frames: mpsc::Sender<Bytes>,
    echo_channel: String,
    echoes: Arc<watch::Sender<u64>>,
    failed: Arc<Notify>,
}

impl Listener {
    fn receive(&self, push: PushInfo) -> Result<(), Infallible> {
        match push.kind {
            PushKind::Disconnection => self.failed.notify_one(),
            PushKind::Message => {
                let mut data = push.data.into_iter();
                if let (Some(Value::BulkString(channel)), Some(Value::BulkString(payload))) =
                    (data.next(), data.next())
                {
                    self.receive_message(&channel, payload);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn receive_message(&self, channel: &[u8], payload: Vec<u8>) {
        if channel == self.echo_channel.as_bytes() {
            let number = str::from_utf8(&payload)
                .ok()
                .and_then(|text| text.parse().ok());
            if let Some(number) = number {
                self.echoes.send_replace(number);
            }
        } else if let Err(TrySendError::Full(_)) = self.frames.try_send(payload.into()) {
            // Its number is missing then, and it is asked for again.
            tracing::debug!(event = "frame_dropped");
        }
    }
}

/// Half of `delay` to all of it: nodes should not come back in step.
fn jittered(delay: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8) % 1024;
    delay.mul_f64(0.5 + random as f64 / 2048.0)
}
