//! The server that carries frames now, and how to connect to it.

use std::time::Duration;

use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError};

use super::location::Location;

/// How long the server may take for an answer. Publishers of messages wait for it.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

impl Location {
    /// The server to use now.
    pub(super) async fn find(&self) -> Result<ConnectionInfo, RedisError> {
        let (sentinels, service, server) = match self {
            Self::Server(server) => return Ok((**server).clone()),
            Self::Sentinels {
                sentinels,
                service,
                server,
            } => (sentinels, service, server),
        };
        let mut problem = failure("no sentinel knows the service");
        for sentinel in sentinels {
            match ask_sentinel(sentinel, service).await {
                Ok(Some((host, port))) => {
                    let address = match server.addr() {
                        ConnectionAddr::TcpTls { .. } => ConnectionAddr::TcpTls {
                            host,
                            port,
                            insecure: false,
                            tls_params: None,
                        },
                        ConnectionAddr::Tcp(..) | ConnectionAddr::Unix(_) | _ => {
                            ConnectionAddr::Tcp(host, port)
                        }
                    };
                    return Ok((**server).clone().set_addr(address));
                }
                Ok(None) => {}
                Err(error) => problem = error,
            }
        }
        Err(problem)
    }
}

async fn ask_sentinel(
    sentinel: &ConnectionInfo,
    service: &str,
) -> Result<Option<(String, u16)>, RedisError> {
    let client = Client::open(sentinel.clone())?;
    let config = connection_config();
    let mut connection = client
        .get_multiplexed_async_connection_with_config(&config)
        .await?;
    redis::cmd("SENTINEL")
        .arg("GET-MASTER-ADDR-BY-NAME")
        .arg(service)
        .query_async(&mut connection)
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
