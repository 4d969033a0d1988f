//! `[listeners.NAME]`: where clients connect.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::network::Network;
use super::value::{Setting, Unfit, Value, choices, section};

/// A listener, complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub bind: SocketAddr,
    /// Absent where bytes travel in the clear.
    pub tls: Option<Tls>,
    pub transport: Transport,
    /// Whether proxies say who their clients are.
    pub proxy_protocol: ProxyProtocol,
    /// Which ones are believed.
    pub trusted_proxies: Vec<Network>,
}

/// What carries the packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    WebSocket {
        /// Where clients may ask for it, besides `/`.
        path: String,
        /// Pages that may use it, such as `https://example.org`; one `*` for all. Programs that
        /// are not browsers send no Origin and are always let in.
        allowed_origins: Vec<String>,
    },
}

/// PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// The certificate of the broker, followed by those between it and its root.
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub client_auth: ClientAuth,
}

/// Whether clients show certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    None,
    /// They may; those that do not are let in like on other listeners.
    Optional {
        ca: PathBuf,
    },
    Required {
        ca: PathBuf,
    },
}

choices! {
    pub enum ListenerKind {
        Tcp = "tcp",
        Tls = "tls",
        Ws = "ws",
        Wss = "wss",
    }
}

choices! {
    /// Whether connections begin with a header of the PROXY protocol: those from trusted proxies
    /// may, or all of them do and come from trusted proxies.
    pub enum ProxyProtocol {
        Off = "off",
        Optional = "optional",
        Required = "required",
    }
}

impl ListenerKind {
    pub fn default_port(self) -> u16 {
        match self {
            Self::Tcp => 1883,
            Self::Tls => 8883,
            Self::Ws => 8083,
            Self::Wss => 8084,
        }
    }
}

impl Listener {
    pub fn kind(&self) -> ListenerKind {
        match (&self.transport, &self.tls) {
            (Transport::Tcp, None) => ListenerKind::Tcp,
            (Transport::Tcp, Some(_)) => ListenerKind::Tls,
            (Transport::WebSocket { .. }, None) => ListenerKind::Ws,
            (Transport::WebSocket { .. }, Some(_)) => ListenerKind::Wss,
        }
    }

    /// Whether others than this machine can connect, without a certificate.
    pub(super) fn is_exposed(&self) -> bool {
        !self.bind.ip().is_loopback() && !self.requires_certificate()
    }

    /// Whether whoever connects has proved with a certificate that they may.
    fn requires_certificate(&self) -> bool {
        let client_auth = self.tls.as_ref().map(|tls| &tls.client_auth);
        matches!(client_auth, Some(ClientAuth::Required { .. }))
    }
}

/// An address, a port or both, as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bind {
    address: IpAddr,
    /// Absent: that of the kind.
    port: Option<u16>,
}

impl Setting for Bind {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let parsed = match value {
            Value::Integer(port) => port.to_string().parse().ok(),
            _ => value.text().and_then(|text| text.trim().parse().ok()),
        };
        parsed.ok_or_else(|| Unfit {
            expected:
                "an address and port such as \"127.0.0.1:1883\" or \"[::]:1883\", or only a port"
                    .to_owned(),
        })
    }

    fn show(&self) -> Option<String> {
        Some(match self.port {
            Some(port) => format!("\"{}\"", SocketAddr::new(self.address, port)),
            None => format!("\"{}\"", self.address),
        })
    }
}

impl std::str::FromStr for Bind {
    type Err = ();

    /// A port alone means every IPv4 address, as in other servers: the check of
    /// `auth` keeps that from being an open door.
    fn from_str(text: &str) -> Result<Self, ()> {
        let all = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let text = &text.replace("localhost", "127.0.0.1");
        if let Ok(port) = text.strip_prefix(':').unwrap_or(text).parse() {
            return Ok(Self {
                address: all,
                port: Some(port),
            });
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self {
                address: address.ip(),
                port: Some(address.port()),
            });
        }
        let address = text
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .map_err(drop)?;
        Ok(Self {
            address,
            port: None,
        })
    }
}

section! {
    /// What the sources say of one listener.
    pub(super) struct ListenerDraft {
        kind: Option<ListenerKind> = None,
        bind: Option<Bind> = None,
        path: Option<String> = None,
        allowed_origins: Option<Vec<String>> = None,
        proxy_protocol: Option<ProxyProtocol> = None,
        trusted_proxies: Option<Vec<Network>> = None,
    }
}

section! {
    /// `tls = { … }` of a listener.
    pub(super) struct TlsDraft {
        certificate: Option<PathBuf> = None,
        key: Option<PathBuf> = None,
        client_ca: Option<PathBuf> = None,
        client_auth: Option<ClientAuthKind> = None,
    }
}

choices! {
    pub(super) enum ClientAuthKind {
        None = "none",
        Optional = "optional",
        Required = "required",
    }
}

/// Settings that the draft of a listener may lack.
macro_rules! optional_settings {
    ($($type:ty),*) => {$(
        impl Setting for Option<$type> {
            fn parse(value: &Value) -> Result<Self, Unfit> {
                <$type>::parse(value).map(Some)
            }

            fn show(&self) -> Option<String> {
                self.as_ref().and_then(Setting::show)
            }
        }
    )*};
}
optional_settings!(
    ListenerKind,
    Bind,
    String,
    Vec<String>,
    ClientAuthKind,
    ProxyProtocol,
    Vec<Network>
);

/// What is wrong with a listener: the key to blame and the reason.
pub(super) type Fault = (&'static str, &'static str);

impl ListenerDraft {
    /// Fills in what follows from the name and the kind.
    pub(super) fn complete(
        &mut self,
        name: &str,
        tls: &mut TlsDraft,
    ) -> Result<Listener, Vec<Fault>> {
        let named = ListenerKind::from_word(name).unwrap_or(ListenerKind::Tcp);
        let kind = *self.kind.get_or_insert(named);
        let mut faults = Vec::new();

        let tls = match kind {
            ListenerKind::Tls | ListenerKind::Wss => tls.complete(&mut faults),
            ListenerKind::Tcp | ListenerKind::Ws => {
                if *tls != TlsDraft::default() {
                    faults.push(("tls", "is only for the kinds \"tls\" and \"wss\""));
                }
                None
            }
        };
        let transport = match kind {
            ListenerKind::Ws | ListenerKind::Wss => self.web_socket(&mut faults),
            ListenerKind::Tcp | ListenerKind::Tls => {
                let only_web_sockets = "is only for the kinds \"ws\" and \"wss\"";
                if self.path.is_some() {
                    faults.push(("path", only_web_sockets));
                }
                if self.allowed_origins.is_some() {
                    faults.push(("allowed_origins", only_web_sockets));
                }
                Transport::Tcp
            }
        };

        let proxy_protocol = *self.proxy_protocol.get_or_insert(ProxyProtocol::Off);
        let trusted_proxies = self.trusted_proxies.clone().unwrap_or_default();
        if proxy_protocol != ProxyProtocol::Off && trusted_proxies.is_empty() {
            faults.push((
                "trusted_proxies",
                "is missing: the addresses of the proxies that may say who their clients are",
            ));
        }
        let is_web = matches!(transport, Transport::WebSocket { .. });
        if proxy_protocol == ProxyProtocol::Off && !is_web && !trusted_proxies.is_empty() {
            faults.push((
                "trusted_proxies",
                "has no effect without proxy_protocol = \"optional\" or \"required\"",
            ));
        }

        let address = self
            .bind
            .map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |bind| bind.address);
        let port = self
            .bind
            .and_then(|bind| bind.port)
            .unwrap_or_else(|| kind.default_port());
        self.bind = Some(Bind {
            address,
            port: Some(port),
        });
        if faults.is_empty() {
            Ok(Listener {
                bind: SocketAddr::new(address, port),
                tls,
                transport,
                proxy_protocol,
                trusted_proxies,
            })
        } else {
            Err(faults)
        }
    }

    fn web_socket(&mut self, faults: &mut Vec<Fault>) -> Transport {
        let path = self.path.get_or_insert_with(|| "/mqtt".to_owned()).clone();
        if !path.starts_with('/') {
            faults.push(("path", "must begin with `/`"));
        }
        let allowed_origins = self
            .allowed_origins
            .get_or_insert_with(|| vec!["*".to_owned()])
            .clone();
        Transport::WebSocket {
            path,
            allowed_origins,
        }
    }
}

impl TlsDraft {
    fn complete(&mut self, faults: &mut Vec<Fault>) -> Option<Tls> {
        if self.certificate.is_none() {
            faults.push((
                "tls.certificate",
                "is missing: the file with the certificate of the broker",
            ));
        }
        if self.key.is_none() {
            faults.push((
                "tls.key",
                "is missing: the file with the private key of the certificate",
            ));
        }
        self.client_auth.get_or_insert(ClientAuthKind::None);
        let client_auth = match (self.client_auth, self.client_ca.clone()) {
            (None | Some(ClientAuthKind::None), None) => ClientAuth::None,
            (Some(ClientAuthKind::Optional), Some(ca)) => ClientAuth::Optional { ca },
            (Some(ClientAuthKind::Required), Some(ca)) => ClientAuth::Required { ca },
            (None | Some(ClientAuthKind::None), Some(_)) => {
                faults.push((
                    "tls.client_ca",
                    "has no effect without tls.client_auth = \"optional\" or \"required\"",
                ));
                ClientAuth::None
            }
            (Some(ClientAuthKind::Optional | ClientAuthKind::Required), None) => {
                faults.push((
                    "tls.client_ca",
                    "is missing: the certificates that client certificates must lead to",
                ));
                ClientAuth::None
            }
        };
        Some(Tls {
            certificate: self.certificate.clone()?,
            key: self.key.clone()?,
            client_auth,
        })
    }
}

impl fmt::Display for ListenerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
