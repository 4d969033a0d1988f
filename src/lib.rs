//! midge: an MQTT 3.1, 3.1.1 and 5.0 broker that loses nothing it acknowledged.
//!
//! The binary is a thin layer over this library; a program that wants a broker inside itself uses
//! the library directly: [`Broker::builder`].

pub mod auth;
mod broker;
mod bus;
pub mod cli;
mod cluster;
pub mod config;
mod copy;
mod drain;
pub mod embed;
mod failpoint;
mod http;
mod lifecycle;
mod metrics;
pub mod mqtt;
mod net;
mod overload;
mod reload;
pub mod server;
mod session;
mod store;
mod systemd;
pub mod telemetry;

pub use server::Broker;

/// The Rust in the documentation has to compile.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../README.md")]
    struct Readme;

    #[doc = include_str!("../docs/embedding.md")]
    struct Embedding;
}
