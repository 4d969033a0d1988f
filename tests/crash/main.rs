//! What midge promises, put to the test on one node: nothing acknowledged is lost, repeated or
//! reordered, whatever is killed, blocked, full or in a hurry.
//!
//! Every test starts the real program on its own directory, lets clients work on it, kills it
//! with SIGKILL or disturbs the clients, and then looks at the [`history`] of all that was sent,
//! acknowledged and received. Moments are chosen by a seed that each test prints:
//! `MIDGE_TEST_SEED` repeats one, `MIDGE_TEST_ROUNDS` multiplies the rounds, and
//! `MIDGE_TEST_SOAK_SECONDS` lengthens the soak.
//!
//! Start reading at [`history`] (what counts as broken), then [`traffic`] (who sends and receives).

#![expect(
    clippy::unwrap_used,
    reason = "functions that several tests share are tests as well"
)]

mod broker;
#[path = "../support/client.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod client;
#[path = "../support/history.rs"]
mod history;
#[path = "../support/lines.rs"]
mod lines;
#[path = "../support/seed.rs"]
mod seed;
#[path = "../support/traffic.rs"]
#[allow(dead_code, reason = "the cluster tests use the rest")]
mod traffic;
#[path = "../support/wire.rs"]
mod wire;

mod blocked;
mod disk_full;
mod expiry;
mod limits;
mod offline;
mod online;
mod reconnecting;
mod reload;
mod retained;
mod shared;
mod shutdown;
mod slow;
mod soak;
mod start;
mod subscriptions;
mod takeover;
mod wills;
