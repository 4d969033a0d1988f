//! Where Redis is, as a URL says it.

use std::fmt;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion};

/// Where Redis is and how to log in there.
#[derive(Clone)]
pub(crate) enum Location {
    Server(Box<ConnectionInfo>),
    /// Whatever server the sentinels name at the time.
    Sentinels {
        sentinels: Vec<ConnectionInfo>,
        service: String,
        /// How to log in; its address is that of no server.
        server: Box<ConnectionInfo>,
    },
    /// The masters of a Redis Cluster, which any of its servers knows. The login is the same
    /// everywhere.
    Cluster {
        seeds: Vec<ConnectionInfo>,
    },
}

const SERVER_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

impl Location {
    /// `None` if this is no such URL.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        match scheme {
            "redis" | "rediss" => connection_info(url).map(Box::new).map(Self::Server),
            "redis+sentinel" => Self::parse_sentinels("redis", rest),
            "rediss+sentinel" => Self::parse_sentinels("rediss", rest),
            "redis+cluster" => Self::parse_cluster("redis", rest),
            "rediss+cluster" => Self::parse_cluster("rediss", rest),
            _ => None,
        }
    }

    /// What follows the scheme: `user:password@host:port,host:port/service/database`, and how to log
    /// in at the sentinels: `?sentinel_user=…&sentinel_password=…`.
    fn parse_sentinels(scheme: &str, rest: &str) -> Option<Self> {
        let (rest, options) = rest.rsplit_once('?').unwrap_or((rest, ""));
        let (mut sentinel_user, mut sentinel_password) = ("", "");
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=')? {
                ("sentinel_user", user) => sentinel_user = user,
                ("sentinel_password", password) => sentinel_password = password,
                _ => return None,
            }
        }
        let sentinel_login = match (sentinel_user, sentinel_password) {
            ("", "") => String::new(),
            (_, "") => return None,
            (user, password) => format!("{user}:{password}@"),
        };
        let (login, rest) = split_login(rest);
        let (hosts, path) = rest.split_once('/')?;
        let (service, database) = path.split_once('/').unwrap_or((path, "0"));
        if service.is_empty() {
            return None;
        }
        Some(Self::Sentinels {
            sentinels: parse_hosts(scheme, &sentinel_login, hosts, SENTINEL_PORT)?,
            service: service.to_owned(),
            server: Box::new(connection_info(&format!(
                "{scheme}://{login}any/{database}"
            ))?),
        })
    }

    /// What follows the scheme: `user:password@host:port,host:port`, and no database, of which a Redis
    /// Cluster has only one.
    fn parse_cluster(scheme: &str, rest: &str) -> Option<Self> {
        let (login, hosts) = split_login(rest);
        if hosts.contains(['/', '?', '#']) {
            return None;
        }
        let seeds = parse_hosts(scheme, login, hosts, SERVER_PORT)?;
        Some(Self::Cluster { seeds })
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Self::Cluster { .. })
    }

    pub(super) fn uses_tls(&self) -> bool {
        let is_tls =
            |server: &ConnectionInfo| matches!(server.addr(), ConnectionAddr::TcpTls { .. });
        match self {
            Self::Server(server) | Self::Sentinels { server, .. } => is_tls(server),
            Self::Cluster { seeds } => seeds.iter().any(is_tls),
        }
    }
}

/// Without what is secret.
impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(server) => write!(f, "{}", server.addr()),
            Self::Sentinels {
                sentinels, service, ..
            } => write!(f, "{service} of {}", addresses(sentinels)),
            Self::Cluster { seeds } => write!(f, "cluster of {}", addresses(seeds)),
        }
    }
}

fn addresses(servers: &[ConnectionInfo]) -> String {
    let addresses = servers.iter().map(|server| server.addr().to_string());
    addresses.collect::<Vec<_>>().join(",")
}

/// `user:password@`, or nothing, and what is behind it.
fn split_login(rest: &str) -> (&str, &str) {
    rest.split_at(rest.rfind('@').map_or(0, |at| at + 1))
}

/// `host:port,host:port`, each with `port` where there is none.
fn parse_hosts(scheme: &str, login: &str, hosts: &str, port: u16) -> Option<Vec<ConnectionInfo>> {
    let hosts = hosts.split(',').map(|host| {
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.ends_with(']'));
        let url = match has_port {
            true => format!("{scheme}://{login}{host}"),
            false => format!("{scheme}://{login}{host}:{port}"),
        };
        connection_info(&url)
    });
    hosts.collect()
}

fn connection_info(url: &str) -> Option<ConnectionInfo> {
    let info = url.into_connection_info().ok()?;
    let (ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) = info.addr() else {
        return None;
    };
    if host.is_empty() || host.contains(',') {
        return None;
    }
    // Without RESP3 a connection that listens could not be told from one that does not.
    let redis = info.redis_settings().clone();
    let redis = redis.set_protocol(ProtocolVersion::RESP3);
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    Some(info.set_redis_settings(redis).set_tcp_settings(tcp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_say_where_redis_is() {
        for (url, shown) in [
            ("redis://cache", "cache:6379"),
            ("redis://:secret@cache:7000/2", "cache:7000"),
            ("rediss://me:secret@cache", "cache:6379"),
            (
                "redis+sentinel://me:secret@one,two:7000,[::1]/main/3",
                "main of one:26379,two:7000,::1:26379",
            ),
            (
                "redis+sentinel://one/main?sentinel_user=me&sentinel_password=s%40cret",
                "main of one:26379",
            ),
            ("redis+cluster://cache", "cluster of cache:6379"),
            (
                "redis+cluster://me:secret@one,two:7000,[::1],[::1]:7000",
                "cluster of one:6379,two:7000,::1:6379,::1:7000",
            ),
            (
                "rediss+cluster://:s%40cret@one,two",
                "cluster of one:6379,two:6379",
            ),
        ] {
            let location = Location::parse(url).unwrap();
            assert_eq!(format!("{location:?}"), shown, "{url}");
        }
        for url in [
            "",
            "cache:6379",
            "redis://",
            "redis://one,two",
            "redis://cache/x",
            "redis+sentinel://one,two",
            "redis+sentinel://one,two/",
            "redis+sentinel://one/main?sentinel_user=me",
            "redis+sentinel://one/main?password=secret",
            "redis+cluster://",
            "redis+cluster://one,",
            "redis+cluster://one,,two",
            "redis+cluster://one:x",
            "redis+cluster://one,two/0",
            "redis+cluster://one,two/",
            "redis+cluster://one/,two",
            "redis+cluster://one,two?password=secret",
            "rediss+cluster://one,two#insecure",
            "redis+cluster://me:secret@",
            "http://cache",
        ] {
            assert!(Location::parse(url).is_none(), "{url}");
        }
    }
}
