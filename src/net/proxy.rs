//! What a proxy in front says of its client: with the PROXY protocol, versions 1 and 2, or, if it speaks
//! HTTP, in `X-Forwarded-For`.
//!
//! Only proxies that are known are believed: whoever can name an address can name any.

use std::io;
use std::net::{IpAddr, SocketAddr};

use proxy_header::{ParseConfig, ProxyHeader};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::config::Network;

/// What a listener wants to hear of proxies.
#[derive(Clone, Debug)]
pub(crate) struct ProxyRules {
    /// Whether a connection has to come through a proxy.
    pub(crate) is_required: bool,
    pub(crate) trusted: Vec<Network>,
}

/// Why it is not known who connects.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// As load balancers do to see whether a port is open.
    #[error("closed before the first byte")]
    Probe,
    #[error("{0} is no trusted proxy, and clients have to come through one")]
    Untrusted(IpAddr),
    #[error("there is no PROXY header")]
    Missing,
    #[error("malformed PROXY header")]
    Malformed,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The longest header of version 1, with its end.
const V1_BYTES_MAX: usize = 107;

/// The fixed part of version 2: a signature of 12 bytes, two of flags, and a length.
const V2_FIXED_BYTES: usize = 16;

/// The longest header of version 2: addresses of local sockets, which are the longest, and some
/// space for what else proxies tell.
const V2_BYTES_MAX: usize = 536;

const CONFIG: ParseConfig = ParseConfig {
    include_tlvs: false,
    allow_v1: true,
    allow_v2: true,
};

impl ProxyRules {
    /// Takes the header off the beginning of `stream`; returns the address of the client. The
    /// caller bounds the time.
    pub(super) async fn client(
        &self,
        stream: &mut TcpStream,
        peer: SocketAddr,
    ) -> Result<SocketAddr, ProxyError> {
        if !self
            .trusted
            .iter()
            .any(|network| network.contains(peer.ip()))
        {
            return if self.is_required {
                Err(ProxyError::Untrusted(peer.ip()))
            } else {
                // If it sends a header, that is no MQTT.
                Ok(peer)
            };
        }
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(ProxyError::Probe);
        }
        // Neither MQTT nor TLS nor HTTP begins like this.
        let header = match first[0] {
            b'P' => read_v1(stream).await?,
            b'\r' => read_v2(stream).await?,
            _ if self.is_required => return Err(ProxyError::Missing),
            _ => return Ok(peer),
        };
        let (header, _) = ProxyHeader::parse(&header, CONFIG).map_err(|_| ProxyError::Malformed)?;
        // Without an address, the proxy speaks for itself.
        Ok(header
            .proxied_address()
            .map_or(peer, |address| address.source))
    }
}

/// Who has sent an HTTP request that came from `peer`. Each proxy has added, at the end, the address
/// that it was connected to by: the last one that is no trusted proxy is as far as can be known, and
/// what is before it anybody may have written.
pub(crate) fn forwarded_client(
    trusted: &[Network],
    peer: SocketAddr,
    forwarded_for: &[&str],
) -> SocketAddr {
    let mut client = peer;
    for address in forwarded_for.iter().rev() {
        if !trusted.iter().any(|network| network.contains(client.ip())) {
            break;
        }
        let Some(address) = read_address(address) else {
            break;
        };
        client = address;
    }
    client
}

/// An address as proxies write it: some with a port, which is otherwise not known.
fn read_address(text: &str) -> Option<SocketAddr> {
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse().map(|ip: IpAddr| SocketAddr::new(ip, 0));
    let address = address.or_else(|_| text.parse()).ok()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

async fn read_v1(stream: &mut TcpStream) -> Result<Vec<u8>, ProxyError> {
    let mut header = Vec::with_capacity(V1_BYTES_MAX);
    // Byte by byte: what follows belongs to somebody else.
    while header.last() != Some(&b'\n') {
        if header.len() == V1_BYTES_MAX {
            return Err(ProxyError::Malformed);
        }
        header.push(stream.read_u8().await?);
    }
    Ok(header)
}

async fn read_v2(stream: &mut TcpStream) -> Result<Vec<u8>, ProxyError> {
    let mut header = vec![0; V2_FIXED_BYTES];
    stream.read_exact(&mut header).await?;
    let rest = u16::from_be_bytes([header[14], header[15]]);
    let length = V2_FIXED_BYTES + usize::from(rest);
    if length > V2_BYTES_MAX {
        return Err(ProxyError::Malformed);
    }
    header.resize(length, 0);
    stream.read_exact(&mut header[V2_FIXED_BYTES..]).await?;
    Ok(header)
}
