//! The HTTP side of `midge serve`, over real sockets: health checks, the API and who may use it, and
//! clients that mean no good.

#![expect(
    clippy::unwrap_used,
    reason = "functions that several tests share are tests as well"
)]

mod broker;
#[path = "../support/lines.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod lines;
mod mqtt;

mod access;
mod clients;
mod ctl;
mod health;
mod hostile;
mod messages;
mod metrics;
mod openapi;
mod operate;
mod overload;
