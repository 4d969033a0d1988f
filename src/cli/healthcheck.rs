//! `midge healthcheck`

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use clap::Args;

use super::{CliError, ConfigArguments, print};
use crate::config::Config;

#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    config: ConfigArguments,
    /// Ask only whether the process is alive, and not whether it is ready for clients
    #[arg(long)]
    live: bool,
}

/// Why a midge is not what was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unhealthy {
    #[error("http.enabled is false: there is nothing to ask")]
    NoHttp,
    #[error("{address} does not answer: {error}")]
    NoAnswer {
        address: SocketAddr,
        error: io::Error,
    },
    #[error("{address} is not ready: {answer}")]
    NotReady { address: SocketAddr, answer: String },
}

/// Shorter than the time that Docker and Kubernetes usually give a check.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Longer answers are not midge's.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

pub(super) fn run(arguments: Arguments) -> Result<(), CliError> {
    let config = Config::load(&arguments.config.sources())?;
    if !config.http.enabled {
        return Err(Unhealthy::NoHttp.into());
    }
    let address = reachable(config.http.bind);
    let path = if arguments.live {
        "/livez"
    } else {
        "/readyz?verbose"
    };
    let answer = ask(address, path).map_err(|error| Unhealthy::NoAnswer { address, error })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.starts_with("HTTP/1.1 200 ") {
        return print(body);
    }
    let answer = body.trim_end().replace('\n', "; ");
    Err(Unhealthy::NotReady { address, answer }.into())
}

/// How this machine reaches what is bound to `bind`.
pub(super) fn reachable(bind: SocketAddr) -> SocketAddr {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bind.port())
}

fn ask(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}
