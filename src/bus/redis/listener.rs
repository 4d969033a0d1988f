//! Listens at one server, and proves by an echo that this works.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use redis::{ConnectionInfo, PushInfo, PushKind, RedisError, Value};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use super::channels::Channels;
use super::publisher::Publisher;
use super::servers::{connect, connection_config, failure};
use crate::bus::Destination;

/// A connection that listens to what is for this node at one server.
pub(super) struct Listener {
    /// The place of the server.
    server: usize,
    echo_channel: String,
    echoes: Arc<watch::Sender<u64>>,
    /// Ends when nobody has it.
    _connection: MultiplexedConnection,
}

impl Listener {
    /// `destinations` are those whose channels this server has, one at least.
    pub(super) async fn connect(
        place: usize,
        server: &ConnectionInfo,
        channels: &Channels,
        destinations: &[Destination],
        frames: mpsc::Sender<Bytes>,
        failed: mpsc::Sender<RedisError>,
    ) -> Result<Self, RedisError> {
        let echo_channel = channels.echo(destinations[0]);
        let echoes = Arc::new(watch::Sender::new(0));
        let reader = Reader {
            frames,
            echo_channel: echo_channel.clone(),
            echoes: echoes.clone(),
            failed,
        };
        let config = connection_config().set_push_sender(move |push| reader.receive(push));
        let mut connection = connect(server, &config).await?;
        let mut subscribing = redis::pipe();
        for destination in destinations {
            let channel = channels.of(*destination);
            subscribing.cmd(channels.subscribe()).arg(channel);
        }
        subscribing.cmd(channels.subscribe()).arg(&echo_channel);
        subscribing.exec_async(&mut connection).await?;
        Ok(Self {
            server: place,
            echo_channel,
            echoes,
            _connection: connection,
        })
    }

    /// Calls by the connection that publishes at this server, and waits for the echo.
    pub(super) async fn call(&self, publisher: &Publisher, number: u64) -> Result<(), RedisError> {
        let message = number.to_string();
        let call = [(self.echo_channel.clone(), message.as_bytes())];
        publisher.publish_at(self.server, &call).await?;
        let mut echoes = self.echoes.subscribe();
        // The sender is there as long as this is.
        let _ = echoes.wait_for(|echo| *echo >= number).await;
        Ok(())
    }
}

/// Takes what the connection reads; runs in its task, and must not wait.
struct Reader {
    frames: mpsc::Sender<Bytes>,
    echo_channel: String,
    echoes: Arc<watch::Sender<u64>>,
    /// Tells the keeper what is wrong.
    failed: mpsc::Sender<RedisError>,
}

impl Reader {
    fn receive(&self, push: PushInfo) -> Result<(), Infallible> {
        match push.kind {
            PushKind::Disconnection => self.fail("a connection that listens has ended"),
            // Nobody asks for it: the hash slot is at another server now.
            PushKind::SUnsubscribe => self.fail("a channel is somewhere else now"),
            PushKind::Message | PushKind::SMessage => {
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

    fn fail(&self, problem: &'static str) {
        // Full: the keeper knows already.
        let _ = self.failed.try_send(failure(problem));
    }
}
