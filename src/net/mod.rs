//! Sockets: listeners, and the transports that they hand over.
//!
//! A [`Listener`] accepts connections and finishes whatever comes before the first MQTT byte (PROXY, TLS,
//! the WebSocket upgrade), so that everyone else sees one kind of byte stream, a [`transport::Transport`].
//! A [`connection`] is where such a stream meets a session and the node; nothing else here knows an
//! MQTT packet.
//!
//! Start reading at [`listener`], then [`connection`].

pub(crate) mod arrivals;
pub(crate) mod connection;
pub(crate) mod listener;
pub(crate) mod packet_io;
pub(crate) mod proxy;
pub(crate) mod tls;
pub(crate) mod transport;
pub(crate) mod websocket;

pub(crate) use listener::{ListenError, Listener, ListenerConfig, ListenerKind};

#[cfg(test)]
mod tests;
