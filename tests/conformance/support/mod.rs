//! A broker process, a raw client, and packets as bytes.

mod broker;
pub(crate) mod client;
pub(crate) mod wire;

pub(crate) use broker::Broker;
pub(crate) use client::Client;
pub(crate) use wire::Version::{self, V3_1, V3_1_1, V5};
pub(crate) use wire::{Connect, Kind, Packet, Property, Publish, Value, Will, property};

/// Makes a test per protocol version of each `fn name(version: Version)`.
macro_rules! both_versions {
    ($($name:ident),* $(,)?) => { $(
        mod $name {
            #[test]
            fn v3_1_1() {
                super::$name($crate::support::V3_1_1);
            }

            #[test]
            fn v5() {
                super::$name($crate::support::V5);
            }
        }
    )* };
}
pub(crate) use both_versions;
