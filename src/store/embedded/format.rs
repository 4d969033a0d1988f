//! Keys of the embedded store, and what its keyspaces hold: format 1.
//!
//! | keyspace | key | value |
//! |---|---|---|
//! | `meta` | `format` | [`FORMAT`] `u32` |
//! | `sessions` | session 12 | [`session_value`] |
//! | `subscriptions` | session 12, SHA-256 of the filter 32 | [`subscription_value`] |
//! | `inbox` | session 12, hlc `u64`, node `u32`, index `u16` | [`chunk_value`] |
//! | `exchanges` | session 12, packet identifier `u16` | [`exchange_value`] |
//! | `awaiting` | session 12, packet identifier `u16` | empty |
//! | `retained` | topic | [`retained_value`] |
//! | `garbage` | session 12 that has ended | empty |

use aws_lc_rs::digest;
use bytes::BufMut;

pub(super) use crate::store::format::*;

use crate::mqtt::SubscriptionFilter;
use crate::store::{SessionId, StoreError};

/// Raised when an older midge could no longer read what this one writes.
pub(super) const FORMAT: u32 = 1;
pub(super) const FORMAT_KEY: &str = "format";

/// Hashed because a key holds 65,535 bytes, as many as a filter alone may have.
pub(super) fn subscription_key(
    session: SessionId,
    filter: &SubscriptionFilter,
) -> [u8; SESSION_BYTES + 32] {
    let mut key = [0; SESSION_BYTES + 32];
    let mut rest = &mut key[..];
    rest.put_slice(&session.0);
    rest.put_slice(digest::digest(&digest::SHA256, filter.to_string().as_bytes()).as_ref());
    key
}

pub(super) fn read_format(value: &[u8]) -> Result<u32, StoreError> {
    let mut value = Reader::new("the format number", value);
    let format = value.u32()?;
    value.end()?;
    Ok(format)
}
