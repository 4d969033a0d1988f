//! Publishes frames: at each server those for its channels, at all of them at the same time.

use std::fmt;

use bytes::Bytes;
use futures_util::future::try_join_all;
use redis::RedisError;
use redis::aio::MultiplexedConnection;
use tokio::sync::mpsc;

use super::channels::Channels;
use super::servers::{Servers, ask_whether_cluster_is_up, connect, connection_config};
use crate::bus::Destination;

/// Bytes of frames that a server has to answer for within the time that it has for an answer.
const PIPELINE_BYTES: usize = 4 * 1024 * 1024;

/// The connections that publish, one to each server.
pub(super) struct Publisher {
    channels: Channels,
    servers: Servers,
    connections: Vec<MultiplexedConnection>,
    /// Tells the keeper what is wrong.
    failed: mpsc::Sender<RedisError>,
}

/// What one server gets of some frames.
#[derive(Default)]
struct Share<'a> {
    /// Where each of them was among all.
    places: Vec<usize>,
    messages: Vec<(String, &'a [u8])>,
}

impl Publisher {
    /// Connects to all servers, also to those that no frame may ever go to: which these are changes
    /// with each node that comes.
    pub(super) async fn connect(
        channels: Channels,
        servers: Servers,
        failed: mpsc::Sender<RedisError>,
    ) -> Result<Self, RedisError> {
        let config = connection_config();
        let connecting = servers.iter().map(|server| connect(server, &config));
        let connections = try_join_all(connecting).await?;
        Ok(Self {
            channels,
            servers,
            connections,
            failed,
        })
    }

    /// Returns how many listened to the channel of each frame.
    pub(super) async fn publish(
        &self,
        frames: &[(Destination, Bytes)],
    ) -> Result<Vec<u64>, RedisError> {
        let mut shares: Vec<Share<'_>> = Vec::new();
        shares.resize_with(self.connections.len(), Share::default);
        for (place, (to, frame)) in frames.iter().enumerate() {
            let channel = self.channels.of(*to);
            let share = &mut shares[self.servers.place_of(&channel)];
            share.places.push(place);
            share.messages.push((channel, frame));
        }
        let publishing = shares
            .iter()
            .enumerate()
            .map(|(server, share)| self.publish_at(server, &share.messages));
        let published = try_join_all(publishing).await;
        let heard = published.inspect_err(|error| {
            // Full: it knows already.
            let _ = self.failed.try_send(error.clone());
        })?;
        let mut listeners = vec![0; frames.len()];
        for (share, heard) in shares.iter().zip(heard) {
            for (place, heard) in share.places.iter().zip(heard) {
                listeners[*place] = heard;
            }
        }
        Ok(listeners)
    }

    /// Publishes messages, each to its channel, at the server of this place.
    pub(super) async fn publish_at(
        &self,
        server: usize,
        messages: &[(String, &[u8])],
    ) -> Result<Vec<u64>, RedisError> {
        let mut connection = self.connections[server].clone();
        let mut listeners = Vec::with_capacity(messages.len());
        let mut rest = messages;
        while !rest.is_empty() {
            let mut pipeline = redis::pipe();
            let (mut count, mut bytes) = (0, 0);
            for (channel, message) in rest {
                if count > 0 && bytes + message.len() > PIPELINE_BYTES {
                    break;
                }
                count += 1;
                bytes += message.len();
                let command = self.channels.publish();
                pipeline.cmd(command).arg(channel).arg(*message);
            }
            rest = &rest[count..];
            let heard: Vec<u64> = pipeline.query_async(&mut connection).await?;
            listeners.extend(heard);
        }
        Ok(listeners)
    }

    /// Asks the masters of a Redis Cluster, also those where nothing echoes, whether all is well.
    pub(super) async fn ask_servers(&self) -> Result<(), RedisError> {
        if !self.servers.are_a_cluster() {
            return Ok(());
        }
        let asking = self.connections.iter().cloned();
        let asking = asking
            .map(|mut connection| async move { ask_whether_cluster_is_up(&mut connection).await });
        try_join_all(asking).await.map(drop)
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").finish_non_exhaustive()
    }
}
