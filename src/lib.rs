//! midge: an MQTT 3.1, 3.1.1 and 5.0 broker that loses nothing it acknowledged.
//!
//! The binary is a thin layer over this library; a program that wants a broker inside itself uses
//! the library directly.

pub mod auth;
pub mod mqtt;
#[expect(dead_code, reason = "the broker comes next")]
mod store;
