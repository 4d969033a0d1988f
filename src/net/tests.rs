//! Listeners with real sockets and real certificates.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, PKCS_ED25519,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::arrivals::Arrivals;
use super::listener::Accepted;
use super::proxy::ProxyRules;
use super::tls::{self, ClientCa, CurrentTls, TlsFiles};
use super::transport::Transport;
use super::websocket::frame::tests::frame;
use super::websocket::handshake::WebSocketRules;
use super::*;
use crate::metrics::ListenerTotals;

const UPGRADE: &str = "GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
                       Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       Sec-WebSocket-Protocol: mqtt\r\n\r\n";

/// A listener that runs until it is stopped, and what it accepted.
struct Running {
    address: SocketAddr,
    tls: Option<Arc<CurrentTls>>,
    accepted: mpsc::Receiver<Accepted>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn start(kind: ListenerKind) -> Self {
        Self::start_with(config(kind)).await
    }

    async fn start_with(config: ListenerConfig) -> Self {
        let listener = Listener::bind(config).await.unwrap();
        let (address, tls) = (listener.local_addr(), listener.tls());
        let (sender, accepted) = mpsc::channel(16);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(
            listener.run(shutdown.clone(), unlimited(), move |accepted| {
                sender.try_send(accepted).unwrap()
            }),
        );
        Self {
            address,
            tls,
            accepted,
            shutdown,
            task,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn connect_tls(&self, config: ClientConfig) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, self.connect().await)
            .await
    }

    async fn accept(&mut self) -> Accepted {
        self.accepted.recv().await.unwrap()
    }

    /// Stops the listener; it must have accepted nothing that a test has not taken.
    async fn stop(mut self) {
        self.shutdown.cancel();
        self.task.await.unwrap();
        assert!(self.accepted.recv().await.is_none());
    }
}

fn unlimited() -> Arc<Arrivals> {
    Arc::new(Arrivals::new(None, Arc::default(), Arc::default()))
}

fn config(kind: ListenerKind) -> ListenerConfig {
    ListenerConfig {
        totals: Arc::new(ListenerTotals::new("test")),
        bind: "127.0.0.1:0".parse().unwrap(),
        kind,
        handshake_timeout: Duration::from_secs(60),
        handshakes_max: 16,
        proxy: None,
    }
}

async fn bind_error(kind: ListenerKind) -> String {
    match Listener::bind(config(kind)).await {
        Ok(_) => panic!("the listener is bound"),
        Err(error) => error.to_string(),
    }
}

/// A certificate authority that keeps its files in a temporary folder.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "Test CA");
        let issuer = CertifiedIssuer::self_signed(params, key()).unwrap();
        Self {
            issuer,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A certificate and its key, as PEM.
    fn issue(&self, common_name: &str) -> (String, String) {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        let key = key();
        (
            params.signed_by(&key, &self.issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        file
    }

    fn server_files(&self) -> TlsFiles {
        let (certificate, key) = self.issue("server");
        TlsFiles {
            certificate: self.write("server.pem", &certificate),
            key: self.write("server.key", &key),
            client_ca: None,
        }
    }

    fn server_files_with_client_ca(&self, is_certificate_required: bool) -> TlsFiles {
        let file = self.write("ca.pem", &self.issuer.pem());
        let client_ca = Some(ClientCa {
            file,
            is_certificate_required,
        });
        TlsFiles {
            client_ca,
            ..self.server_files()
        }
    }

    /// A client that trusts this authority.
    fn client(&self) -> ClientConfig {
        self.client_builder().with_no_client_auth()
    }

    /// A client that also shows a certificate.
    fn client_with_certificate(&self, (certificate, key): (String, String)) -> ClientConfig {
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        self.client_builder()
            .with_client_auth_cert(vec![certificate], key)
            .unwrap()
    }

    fn client_builder(
        &self,
    ) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).unwrap()
}

/// Sends a byte each way.
async fn expect_echo<C>(client: &mut C, transport: &mut Transport)
where
    C: AsyncReadExt + AsyncWriteExt + Unpin,
{
    client.write_all(b"?").await.unwrap();
    client.flush().await.unwrap();
    assert_eq!(transport.read_u8().await.unwrap(), b'?');
    transport.write_all(b"!").await.unwrap();
    transport.flush().await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
}

/// The server ends the connection, or refuses the handshake in the first place.
async fn expect_refused(outcome: std::io::Result<TlsStream<TcpStream>>) {
    // In TLS 1.3 a client believes that it is connected before its certificate has been checked.
    if let Ok(mut client) = outcome {
        assert!(client.read_u8().await.is_err());
    }
}

#[tokio::test]
async fn tcp_connection_is_handed_over_without_delay() {
    let mut running = Running::start(ListenerKind::Tcp).await;
    let mut client = running.connect().await;

    let mut accepted = running.accept().await;

    assert_eq!(accepted.peer, client.local_addr().unwrap());
    assert_eq!(&*accepted.listener.name, "test");
    assert_eq!(accepted.certificate_name, None);
    let Transport::Tcp(stream) = &accepted.transport else {
        panic!("not TCP")
    };
    assert!(stream.nodelay().unwrap());
    expect_echo(&mut client, &mut accepted.transport).await;
    running.stop().await;
}

#[tokio::test]
async fn port_in_use_is_reported_with_listener_and_address() {
    let first = Listener::bind(config(ListenerKind::Tcp)).await.unwrap();
    let config = ListenerConfig {
        bind: first.local_addr(),
        ..config(ListenerKind::Tcp)
    };

    let error = Listener::bind(config).await.err().unwrap();

    assert!(matches!(error, ListenError::AddressInUse { .. }));
    let expected = format!(
        "listener test: something else already listens on {};",
        first.local_addr()
    );
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[tokio::test]
async fn address_of_another_machine_is_reported() {
    let bind = "192.0.2.1:0".parse().unwrap();
    let error = Listener::bind(ListenerConfig {
        bind,
        ..config(ListenerKind::Tcp)
    })
    .await;

    assert_eq!(
        error.err().unwrap().to_string(),
        "listener test: 192.0.2.1 is not an address of this machine"
    );
}

#[tokio::test]
async fn tls_client_is_accepted_with_and_without_alpn() {
    let authority = Authority::new();
    let mut running = Running::start(ListenerKind::Tls(authority.server_files())).await;
    let mut with_alpn = authority.client();
    with_alpn.alpn_protocols = vec![b"mqtt".to_vec()];

    for (config, alpn) in [(authority.client(), None), (with_alpn, Some(&b"mqtt"[..]))] {
        let mut client = running.connect_tls(config).await.unwrap();
        let mut accepted = running.accept().await;
        assert_eq!(client.get_ref().1.alpn_protocol(), alpn);
        assert_eq!(accepted.certificate_name, None);
        assert!(matches!(accepted.transport, Transport::Tls(_)));
        expect_echo(&mut client, &mut accepted.transport).await;
    }
    running.stop().await;
}

#[tokio::test]
async fn replaced_certificate_is_shown_to_new_clients_and_old_ones_stay() {
    let (old, new) = (Authority::new(), Authority::new());
    let mut running = Running::start(ListenerKind::Tls(old.server_files())).await;
    let mut client = running.connect_tls(old.client()).await.unwrap();
    let mut accepted = running.accept().await;

    let current = running.tls.clone().unwrap();
    let read = tls::server_config(&new.server_files(), current.alpn()).await;
    current.replace(read.unwrap());

    expect_echo(&mut client, &mut accepted.transport).await;
    let mut client = running.connect_tls(new.client()).await.unwrap();
    expect_echo(&mut client, &mut running.accept().await.transport).await;
    assert!(running.connect_tls(old.client()).await.is_err());
    running.stop().await;
}

#[tokio::test]
async fn client_certificate_gives_its_common_name() {
    let authority = Authority::new();
    for is_required in [false, true] {
        let files = authority.server_files_with_client_ca(is_required);
        let mut running = Running::start(ListenerKind::Tls(files)).await;
        let config = authority.client_with_certificate(authority.issue("sensor-7"));

        let mut client = running.connect_tls(config).await.unwrap();

        let mut accepted = running.accept().await;
        assert_eq!(accepted.certificate_name.as_deref(), Some("sensor-7"));
        expect_echo(&mut client, &mut accepted.transport).await;
        running.stop().await;
    }
}

#[tokio::test]
async fn optional_client_certificate_may_be_absent() {
    let authority = Authority::new();
    let files = authority.server_files_with_client_ca(false);
    let mut running = Running::start(ListenerKind::Tls(files)).await;

    let mut client = running.connect_tls(authority.client()).await.unwrap();

    let mut accepted = running.accept().await;
    assert_eq!(accepted.certificate_name, None);
    expect_echo(&mut client, &mut accepted.transport).await;
    running.stop().await;
}

#[tokio::test]
async fn required_client_certificate_may_not_be_absent() {
    let authority = Authority::new();
    let files = authority.server_files_with_client_ca(true);
    let running = Running::start(ListenerKind::Tls(files)).await;

    expect_refused(running.connect_tls(authority.client()).await).await;

    running.stop().await;
}

#[tokio::test]
async fn client_certificate_of_another_authority_is_refused_even_where_none_is_required() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    for is_required in [false, true] {
        let files = authority.server_files_with_client_ca(is_required);
        let running = Running::start(ListenerKind::Tls(files)).await;
        let config = authority.client_with_certificate(stranger.issue("sensor-7"));

        expect_refused(running.connect_tls(config).await).await;

        running.stop().await;
    }
}

#[tokio::test]
async fn plain_bytes_on_a_tls_port_end_only_their_own_connection() {
    let authority = Authority::new();
    let mut running = Running::start(ListenerKind::Tls(authority.server_files())).await;
    let mut plain = running.connect().await;
    plain
        .write_all(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00")
        .await
        .unwrap();
    let mut answer = Vec::new();
    // An alert, or a reset where unread bytes were left.
    let _ = plain.read_to_end(&mut answer).await;

    let mut client = running.connect_tls(authority.client()).await.unwrap();

    expect_echo(&mut client, &mut running.accept().await.transport).await;
    running.stop().await;
}

#[tokio::test]
async fn unusable_tls_files_are_reported_in_one_line_each() {
    let authority = Authority::new();
    let good = authority.server_files_with_client_ca(true);
    let (certificate, key) = (&good.certificate, &good.key);
    let missing = authority.folder.path().join("missing.pem");
    let empty = authority.write("empty.pem", "");
    let torn = authority.write("torn.pem", "-----BEGIN CERTIFICATE-----\nMII");
    let other_key = authority.write("other.key", &authority.issue("other").1);
    let not_a_certificate = authority.write(
        "bad-ca.pem",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    );
    let with_ca = |file: &PathBuf| {
        Some(ClientCa {
            file: file.clone(),
            is_certificate_required: true,
        })
    };
    let cases = [
        (
            TlsFiles {
                certificate: missing.clone(),
                ..good.clone()
            },
            format!("cannot read {}: ", missing.display()),
        ),
        (
            TlsFiles {
                certificate: empty.clone(),
                ..good.clone()
            },
            format!("{} contains no certificate", empty.display()),
        ),
        (
            TlsFiles {
                certificate: torn.clone(),
                ..good.clone()
            },
            format!("{} is not a PEM file: ", torn.display()),
        ),
        (
            TlsFiles {
                key: certificate.clone(),
                ..good.clone()
            },
            format!("{} contains no private key", certificate.display()),
        ),
        (
            TlsFiles {
                key: other_key.clone(),
                ..good.clone()
            },
            format!(
                "the key in {} does not belong to the certificate in {}",
                other_key.display(),
                certificate.display()
            ),
        ),
        (
            TlsFiles {
                client_ca: with_ca(key),
                ..good.clone()
            },
            format!("{} contains no certificate", key.display()),
        ),
        (
            TlsFiles {
                client_ca: with_ca(&not_a_certificate),
                ..good.clone()
            },
            format!(
                "cannot use {} to verify client certificates: ",
                not_a_certificate.display()
            ),
        ),
    ];

    for (files, expected) in cases {
        let error = bind_error(ListenerKind::Tls(files)).await;
        assert!(
            error.starts_with(&format!("listener test: {expected}")),
            "{error}"
        );
        assert!(!error.contains('\n'), "{error}");
    }
}

#[tokio::test]
async fn websocket_client_is_accepted() {
    let mut running = Running::start(ListenerKind::WebSocket(WebSocketRules::default())).await;
    let mut client = running.connect().await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();

    let mut accepted = running.accept().await;

    assert!(matches!(accepted.transport, Transport::WebSocket(_)));
    client.write_all(&frame(0x82, b"?")).await.unwrap();
    assert_eq!(accepted.transport.read_u8().await.unwrap(), b'?');
    running.stop().await;
}

#[tokio::test]
async fn websocket_client_is_accepted_over_tls() {
    let authority = Authority::new();
    let files = authority.server_files_with_client_ca(true);
    let kind = ListenerKind::WebSocketTls(files, WebSocketRules::default());
    let mut running = Running::start(kind).await;
    let mut config = authority.client_with_certificate(authority.issue("sensor-7"));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let mut client = running.connect_tls(config).await.unwrap();
    client.write_all(UPGRADE.as_bytes()).await.unwrap();

    let mut accepted = running.accept().await;

    assert!(matches!(accepted.transport, Transport::WebSocketTls(_)));
    assert_eq!(accepted.certificate_name.as_deref(), Some("sensor-7"));
    client.write_all(&frame(0x82, b"?")).await.unwrap();
    assert_eq!(accepted.transport.read_u8().await.unwrap(), b'?');
    accepted.transport.write_all(b"!").await.unwrap();
    accepted.transport.shutdown().await.unwrap();
    let mut received = Vec::new();
    client.read_to_end(&mut received).await.unwrap();
    assert!(received.ends_with(b"\r\n\r\n\x82\x01!\x88\x02\x03\xE8"));
    running.stop().await;
}

#[tokio::test]
async fn stalled_handshake_blocks_nobody() {
    let authority = Authority::new();
    let mut running = Running::start(ListenerKind::Tls(authority.server_files())).await;
    let _stalled = [running.connect().await, running.connect().await];

    let mut client = running.connect_tls(authority.client()).await.unwrap();

    expect_echo(&mut client, &mut running.accept().await.transport).await;
    // Also, stopping does not wait for them.
    running.stop().await;
}

#[tokio::test(start_paused = true)] // the deadline passes as soon as nothing else can happen
async fn stalled_handshake_ends_at_its_deadline_and_makes_room() {
    let kind = ListenerKind::WebSocket(WebSocketRules::default());
    let listener = Listener::bind(ListenerConfig {
        handshakes_max: 1,
        ..config(kind)
    })
    .await
    .unwrap();
    let address = listener.local_addr();
    let shutdown = CancellationToken::new();
    let task =
        tokio::spawn(listener.run(shutdown.clone(), unlimited(), |_| panic!("nobody gets in")));

    for _ in 0..3 {
        let mut stalled = TcpStream::connect(address).await.unwrap();
        assert_eq!(stalled.read(&mut [0]).await.unwrap(), 0);
    }

    shutdown.cancel();
    task.await.unwrap();
}

fn behind_proxies(kind: ListenerKind, trusted: &str, is_required: bool) -> ListenerConfig {
    ListenerConfig {
        proxy: Some(ProxyRules {
            is_required,
            trusted: vec![trusted.parse().unwrap()],
        }),
        ..config(kind)
    }
}

const PROXY_V1: &[u8] = b"PROXY TCP4 203.0.113.7 192.0.2.1 4711 1883\r\n";

/// Version 2, command PROXY, TCP over IPv4, and a TLV of no interest.
const PROXY_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x10\xcb\0\x71\x07\xc0\0\x02\x01\
                          \x12\x67\x07\x5b\x04\0\x01x";

#[tokio::test]
async fn trusted_proxy_names_its_client_and_takes_no_byte_of_it() {
    for header in [PROXY_V1, PROXY_V2] {
        let config = behind_proxies(ListenerKind::Tcp, "127.0.0.0/8", true);
        let mut running = Running::start_with(config).await;
        let mut client = running.connect().await;
        // In two parts, as a network may deliver it.
        client.write_all(&header[..9]).await.unwrap();
        client.write_all(&header[9..]).await.unwrap();

        let mut accepted = running.accept().await;

        assert_eq!(accepted.peer, "203.0.113.7:4711".parse().unwrap());
        expect_echo(&mut client, &mut accepted.transport).await;
        running.stop().await;
    }
}

#[tokio::test]
async fn proxy_header_comes_before_tls() {
    let authority = Authority::new();
    let kind = ListenerKind::Tls(authority.server_files());
    let mut running = Running::start_with(behind_proxies(kind, "127.0.0.1", true)).await;
    let mut stream = running.connect().await;
    stream.write_all(PROXY_V2).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connector = TlsConnector::from(Arc::new(authority.client()));
    let mut client = connector.connect(name, stream).await.unwrap();

    let mut accepted = running.accept().await;

    assert_eq!(accepted.peer, "203.0.113.7:4711".parse().unwrap());
    expect_echo(&mut client, &mut accepted.transport).await;
    running.stop().await;
}

#[tokio::test]
async fn local_header_leaves_the_address_of_the_proxy() {
    let config = behind_proxies(ListenerKind::Tcp, "127.0.0.1", true);
    let mut running = Running::start_with(config).await;
    let mut client = running.connect().await;
    client
        .write_all(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")
        .await
        .unwrap();

    let accepted = running.accept().await;

    assert_eq!(accepted.peer, client.local_addr().unwrap());
    running.stop().await;
}

#[tokio::test]
async fn optional_header_may_be_absent() {
    let config = behind_proxies(ListenerKind::Tcp, "127.0.0.1", false);
    let mut running = Running::start_with(config).await;
    let mut client = running.connect().await;
    client.write_all(b"\x10").await.unwrap();

    let mut accepted = running.accept().await;

    assert_eq!(accepted.peer, client.local_addr().unwrap());
    assert_eq!(accepted.transport.read_u8().await.unwrap(), 0x10);
    running.stop().await;
}

#[tokio::test]
async fn header_is_not_taken_from_others_nor_without_sense() {
    let endless = [b'P'; 200];
    let too_long = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff";
    let cases: [(&str, &[u8]); 5] = [
        ("192.0.2.0/24", PROXY_V1),
        ("127.0.0.1", b"\x10\x0c"),
        ("127.0.0.1", b"PROXY TCP4 nonsense\r\n"),
        ("127.0.0.1", &endless),
        ("127.0.0.1", too_long),
    ];
    for (trusted, sent) in cases {
        let config = behind_proxies(ListenerKind::Tcp, trusted, true);
        let running = Running::start_with(config).await;
        let mut client = running.connect().await;
        // The broker may be gone before all is sent.
        let _ = client.write_all(sent).await;

        // Closed or reset.
        assert!(client.read_u8().await.is_err());
        running.stop().await;
    }
}

#[tokio::test]
async fn probe_is_counted() {
    let config = behind_proxies(ListenerKind::Tcp, "127.0.0.1", true);
    let totals = config.totals.clone();
    let running = Running::start_with(config).await;
    let mut probe = running.connect().await;

    probe.shutdown().await.unwrap();

    assert!(probe.read_u8().await.is_err());
    running.stop().await;
    assert_eq!(totals.probes.get(), 1);
}
