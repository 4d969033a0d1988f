//! Group commit: QoS 1 messages to the inboxes of sessions whose clients are away, until each is
//! durable.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::future::join_all;
use midge::Broker;
use midge::config::{Config, Sources};
use midge::embed::Publish;
use midge::mqtt::QoS;
use tempfile::TempDir;
use tokio::time::Instant;

const SESSIONS: usize = 1000;
/// Messages that wait for their flush at a time, as those of 20 publishers with 200 in flight.
const CONCURRENT: usize = 4000;

/// A session that stays behind, subscribed to its own topic with QoS 1.
fn leave_session(address: SocketAddr, number: usize) {
    let client_id = format!("s{number:04}");
    let topic = format!("t/{number:04}");
    let mut connect = vec![0x10, 17, 0, 4];
    connect.extend(b"MQTT\x04\x00\x00\x00\x00\x05");
    connect.extend(client_id.as_bytes());
    let mut subscribe = vec![0x82, 11, 0, 1, 0, 6];
    subscribe.extend(topic.as_bytes());
    subscribe.push(1);
    let mut stream = TcpStream::connect(address).expect("the broker listens");
    stream.write_all(&connect).expect("the broker reads");
    stream.write_all(&subscribe).expect("the broker reads");
    let mut answers = [0; 9]; // CONNACK and SUBACK
    stream.read_exact(&mut answers).expect("the broker answers");
    stream.write_all(&[0xE0, 0]).expect("the broker reads");
}

fn flush(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
    let directory = TempDir::new().expect("there is a temporary directory");
    let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let path = directory.path().join("data");
    let sources = Sources {
        set: vec![
            set("listeners.tcp.bind", "127.0.0.1:0"),
            set("store.path", &path.to_string_lossy()),
            set("session.queue_messages_max", "1000000000"),
            set("session.queue_bytes_max", "1000000000"),
        ],
        ..Sources::default()
    };
    let config = Config::load(&sources).expect("the configuration is valid");
    let broker = runtime
        .block_on(Broker::with_config(config).start())
        .expect("the broker starts");
    let address = broker.local_addr("tcp").expect("it listens");
    for number in 0..SESSIONS {
        leave_session(address, number);
    }
    let topics: Vec<_> = (0..SESSIONS)
        .map(|number| format!("t/{number:04}"))
        .collect();
    let payload = [0; 128];
    let mut group = criterion.benchmark_group("flush");
    group.throughput(Throughput::Elements(CONCURRENT as u64));
    group.sample_size(20);
    group.measurement_time(Duration::from_secs(10));
    group.bench_function("4000 messages to 1000 inboxes, synced", |bencher| {
        bencher.iter_custom(|rounds| {
            let started = Instant::now();
            for _ in 0..rounds {
                let publishes = (0..CONCURRENT).map(|number| {
                    broker.publish(
                        Publish::new(&topics[number % SESSIONS], &payload).qos(QoS::AtLeastOnce),
                    )
                });
                for published in runtime.block_on(join_all(publishes)) {
                    published.expect("the store works");
                }
            }
            started.elapsed()
        });
    });
    group.finish();
    runtime.block_on(broker.shutdown());
}

criterion_group!(benches, flush);
criterion_main!(benches);
