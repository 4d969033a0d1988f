//! What midge promises, put to the test on several nodes that share one MongoDB.
//!
//! Nodes are real programs, and so are the servers of MongoDB. A test kills them, freezes them, or
//! cuts the network between them, while a [`workload`] of clients goes from node to node; then it
//! looks at the [`history`] of all that was sent, acknowledged and received. Moments are chosen by
//! a seed that each test prints, and `MIDGE_TEST_SEED` repeats one.
//!
//! Start reading at [`node`] and [`mongod`] (what can be disturbed), then [`workload`].

#![expect(
    clippy::unwrap_used,
    reason = "functions that several tests share are tests as well"
)]

#[path = "../interop/support/certificates.rs"]
#[allow(dead_code, reason = "the interoperability tests use the rest")]
mod certificates;
#[path = "../support/client.rs"]
#[allow(dead_code, reason = "the crash tests use the rest")]
mod client;
#[path = "../support/history.rs"]
#[allow(dead_code, reason = "the crash tests use the rest")]
mod history;
#[path = "../support/lines.rs"]
mod lines;
mod mongod;
mod node;
mod process;
#[path = "../interop/support/program.rs"]
#[allow(dead_code, reason = "the interoperability tests use the rest")]
mod program;
mod proxy;
#[path = "../support/seed.rs"]
#[allow(dead_code, reason = "the crash tests use the rest")]
mod seed;
#[path = "../support/traffic.rs"]
#[allow(dead_code, reason = "the crash tests use the rest")]
mod traffic;
#[path = "../support/wire.rs"]
#[allow(dead_code, reason = "the crash tests use the rest")]
mod wire;
mod workload;

mod balancer;
mod copy;
mod credit;
mod elision;
mod errors;
mod failpoints;
mod faults;
mod http;
mod moves;
mod nodes;
mod one_node;
mod outage;
mod redis;
mod redis_cluster;
mod replica_set;
mod secured;
mod shared;
mod sys;
