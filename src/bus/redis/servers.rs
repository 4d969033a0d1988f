//! The servers that carry frames now, which of them has a channel, and how to connect to them.

use std::ops::RangeInclusive;
use std::time::Duration;

use hashbrown::HashMap;
use redis::aio::MultiplexedConnection;
use redis::cluster_routing::Slot;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, Value,
};

use super::location::Location;

/// How long a server may take for an answer. Publishers of messages wait for it.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Hash slots of a Redis Cluster.
const SLOTS: usize = 16384;

/// One server, or the masters of a Redis Cluster.
pub(super) struct Servers {
    servers: Vec<ConnectionInfo>,
    /// Which of them has each hash slot; empty if one server has everything.
    slots: HashMap<Slot, usize>,
}

impl Servers {
    fn one(server: ConnectionInfo) -> Self {
        Self {
            servers: vec![server],
            slots: HashMap::new(),
        }
    }

    /// What `seed` has answered to CLUSTER SLOTS; `None` if that leaves out any slot.
    fn read(seed: &ConnectionInfo, ranges: &[Value]) -> Option<Self> {
        let mut servers: Vec<ConnectionInfo> = Vec::new();
        let mut slots = HashMap::with_capacity(SLOTS);
        for range in ranges {
            let (range, master) = read_range(seed, range)?;
            let known = servers
                .iter()
                .position(|known| known.addr() == master.addr());
            let place = known.unwrap_or(servers.len());
            if known.is_none() {
                servers.push(master);
            }
            slots.extend(range.filter_map(Slot::new).map(|slot| (slot, place)));
        }
        (slots.len() == SLOTS).then_some(Self { servers, slots })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ConnectionInfo> {
        self.servers.iter()
    }

    /// The place of the one that has `channel`.
    pub(super) fn place_of(&self, channel: &str) -> usize {
        let place = self.slots.get(&Slot::for_key(channel));
        place.copied().unwrap_or_default()
    }

    pub(super) fn are_a_cluster(&self) -> bool {
        !self.slots.is_empty()
    }
}

/// The first and the last slot, then address and name of the master, then those of its replicas.
fn read_range(
    seed: &ConnectionInfo,
    range: &Value,
) -> Option<(RangeInclusive<u16>, ConnectionInfo)> {
    let Value::Array(range) = range else {
        return None;
    };
    let [
        Value::Int(first),
        Value::Int(last),
        Value::Array(master),
        ..,
    ] = &range[..]
    else {
        return None;
    };
    let [host, Value::Int(port), ..] = &master[..] else {
        return None;
    };
    let host = match redis::from_redis_value_ref::<Option<String>>(host).ok()? {
        Some(unknown) if unknown == "?" => return None,
        Some(host) if !host.is_empty() => host,
        // It does not know by what name it is reached: by that of the seed, then.
        _ => match seed.addr() {
            ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => host.clone(),
            ConnectionAddr::Unix(_) | _ => return None,
        },
    };
    let slots = u16::try_from(*first).ok()?..=u16::try_from(*last).ok()?;
    Some((slots, at(seed, host, u16::try_from(*port).ok()?)))
}

impl Location {
    /// The servers to use now.
    pub(super) async fn find(&self) -> Result<Servers, RedisError> {
        match self {
            Self::Server(server) => Ok(Servers::one((**server).clone())),
            Self::Sentinels {
                sentinels,
                service,
                server,
            } => {
                let mut problem = failure("no sentinel knows the service");
                for sentinel in sentinels {
                    match ask_sentinel(sentinel, service).await {
                        Ok(Some((host, port))) => return Ok(Servers::one(at(server, host, port))),
                        Ok(None) => {}
                        Err(error) => problem = error,
                    }
                }
                Err(problem)
            }
            Self::Cluster { seeds } => {
                let mut problem = failure("there are no seeds");
                for seed in seeds {
                    match ask_seed(seed).await {
                        Ok(servers) => return Ok(servers),
                        Err(error) => problem = error,
                    }
                }
                Err(problem)
            }
        }
    }
}

async fn ask_sentinel(
    sentinel: &ConnectionInfo,
    service: &str,
) -> Result<Option<(String, u16)>, RedisError> {
    let mut connection = connect(sentinel, &connection_config()).await?;
    redis::cmd("SENTINEL")
        .arg("GET-MASTER-ADDR-BY-NAME")
        .arg(service)
        .query_async(&mut connection)
        .await
}

async fn ask_seed(seed: &ConnectionInfo) -> Result<Servers, RedisError> {
    let mut connection = connect(seed, &connection_config()).await?;
    ask_whether_cluster_is_up(&mut connection).await?;
    let ranges: Vec<Value> = redis::cmd("CLUSTER")
        .arg("SLOTS")
        .query_async(&mut connection)
        .await?;
    Servers::read(seed, &ranges).ok_or_else(|| failure("not all hash slots have a known master"))
}

/// A server that is cut off from the rest of its Redis Cluster serves its channels all the same,
/// unless it is told not to (`cluster-allow-pubsubshard-when-down no`), although the rest may have
/// given them to another one.
pub(super) async fn ask_whether_cluster_is_up(
    connection: &mut MultiplexedConnection,
) -> Result<(), RedisError> {
    let info: String = redis::cmd("CLUSTER")
        .arg("INFO")
        .query_async(connection)
        .await?;
    match info.lines().any(|line| line == "cluster_state:ok") {
        true => Ok(()),
        false => Err(failure("a server says that the Redis Cluster is down")),
    }
}

/// With the login of `known` at another address.
fn at(known: &ConnectionInfo, host: String, port: u16) -> ConnectionInfo {
    let address = match known.addr() {
        ConnectionAddr::TcpTls { .. } => ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            tls_params: None,
        },
        ConnectionAddr::Tcp(..) | ConnectionAddr::Unix(_) | _ => ConnectionAddr::Tcp(host, port),
    };
    known.clone().set_addr(address)
}

pub(super) async fn connect(
    server: &ConnectionInfo,
    config: &AsyncConnectionConfig,
) -> Result<MultiplexedConnection, RedisError> {
    let client = Client::open(server.clone())?;
    client
        .get_multiplexed_async_connection_with_config(config)
        .await
}

pub(super) fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(ANSWER_TIMEOUT))
}

pub(super) fn failure(reason: &'static str) -> RedisError {
    (ErrorKind::Io, reason).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn master(first: i64, last: i64, host: Value, port: i64) -> Value {
        let name = Value::BulkString(b"07c37dfeb235213a872192d90877d0cd55635b91".to_vec());
        let replica = Value::Array(vec![text("replica"), Value::Int(6379), name.clone()]);
        let master = Value::Array(vec![host, Value::Int(port), name, Value::Map(Vec::new())]);
        Value::Array(vec![Value::Int(first), Value::Int(last), master, replica])
    }

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn read(seed: &str, ranges: &[Value]) -> Option<Servers> {
        let Location::Cluster { seeds } = Location::parse(seed).unwrap() else {
            panic!("{seed} is no cluster");
        };
        Servers::read(&seeds[0], ranges)
    }

    #[test]
    fn a_master_has_the_slots_that_the_seed_says() {
        let ranges = [
            master(0, 3893, text("one"), 7000),
            master(3894, 3894, text(""), 7001),
            master(3895, 15999, text("one"), 7000),
            master(16000, 16383, Value::Nil, 7002),
        ];
        let servers = read("rediss+cluster://me:secret@seed", &ranges).unwrap();

        let addresses = servers.iter().map(|server| server.addr().to_string());
        let expected = ["one:7000", "seed:7001", "seed:7002"];
        assert_eq!(addresses.collect::<Vec<_>>(), expected);
        for server in servers.iter() {
            assert!(matches!(server.addr(), ConnectionAddr::TcpTls { .. }));
            assert_eq!(server.redis_settings().password(), Some("secret"));
        }
        let place = |slot| servers.slots[&Slot::new(slot).unwrap()];
        assert_eq!(
            [0, 3893, 3894, 3895, 15999, 16000, 16383].map(place),
            [0, 0, 1, 0, 0, 2, 2]
        );
        // CLUSTER KEYSLOT says this of `{all}`.
        assert_eq!(servers.place_of("midge:{all}:echo:1"), 1);
    }

    #[test]
    fn all_slots_have_to_be_known() {
        for ranges in [
            vec![],
            vec![master(0, 16382, text("one"), 7000)],
            vec![master(1, 16383, text("one"), 7000)],
            vec![master(0, 16383, text("?"), 7000)],
            vec![master(0, 16383, text("one"), 70000)],
            vec![master(0, 16383, text("one"), 7000), Value::Nil],
        ] {
            assert!(
                read("redis+cluster://seed", &ranges).is_none(),
                "{ranges:?}"
            );
        }
    }
}
