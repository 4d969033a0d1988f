//! The HTTP/1.1 request that begins a WebSocket connection, and the answers to it.

use std::io;
use std::net::SocketAddr;

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::WebSocket;
use crate::config::Network;
use crate::net::proxy::forwarded_client;

/// Longest request: browsers send cookies, but hardly more than this.
const REQUEST_BYTES_MAX: usize = 8 * 1024;

/// More header lines than any browser or proxy sends.
const HEADERS_MAX: usize = 64;

/// Paths that every listener answers; clients use one or the other unless told otherwise.
const DEFAULT_PATHS: [&str; 2] = ["/mqtt", "/"];

/// Subprotocols that mean MQTT, [MQTT-6.0.0-3]; the second is what MQTT 3.1 clients ask for.
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// What a request must look like, beyond RFC 6455.
#[derive(Clone, Debug, Default)]
pub(crate) struct WebSocketRules {
    /// A path to answer besides `/mqtt` and `/`.
    pub(crate) path: Option<String>,
    /// Origins (`https://example.org`) whose pages may connect; all of them if empty. A client
    /// that sends no Origin is not a browser and is not held to this.
    pub(crate) origins: Vec<String>,
    /// Proxies that say in `X-Forwarded-For` whose request it is.
    pub(crate) trusted_proxies: Vec<Network>,
}

/// Why there is no WebSocket connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the client closed the connection before its request was complete")]
    Incomplete,
    #[error("HTTP request refused with {}: {}", .0.status(), .0)]
    Refused(Refusal),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Why a request is answered with an HTTP error; shown to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("This is not an HTTP/1.1 request.")]
    NotHttp,
    #[error("The request header is too large.")]
    TooLarge,
    #[error("Only GET can open a WebSocket.")]
    Method,
    #[error("There is no MQTT here: try the path /mqtt.")]
    Path,
    #[error("This is an MQTT broker: connect with an MQTT client over WebSocket.")]
    NoUpgrade,
    #[error("Only version 13 of the WebSocket protocol is spoken here.")]
    Version,
    #[error("Sec-WebSocket-Key is missing or malformed.")]
    Key,
    #[error("Pages of this origin may not connect.")]
    Origin,
    #[error("Sec-WebSocket-Protocol must offer mqtt.")]
    Subprotocol,
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Self::NotHttp | Self::Key | Self::Subprotocol => "400 Bad Request",
            Self::Origin => "403 Forbidden",
            Self::Path => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::NoUpgrade | Self::Version => "426 Upgrade Required",
            Self::TooLarge => "431 Request Header Fields Too Large",
        }
    }

    fn response(self) -> String {
        let status = self.status();
        let header = match self {
            Self::Method => "Allow: GET\r\n",
            Self::NoUpgrade => "Upgrade: websocket\r\n",
            Self::Version => "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            Self::NotHttp
            | Self::TooLarge
            | Self::Path
            | Self::Key
            | Self::Origin
            | Self::Subprotocol => "",
        };
        let length = self.to_string().len() + 1;
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
             {header}Connection: close\r\n\r\n{self}\n"
        )
    }
}

/// What is needed of a good request.
#[derive(Debug, PartialEq, Eq)]
struct Upgrade {
    /// `Sec-WebSocket-Accept`, which proves that the request was understood.
    accept: String,
    subprotocol: &'static str,
    client: SocketAddr,
    /// Where the request ends in the bytes that were read.
    request_bytes: usize,
}

/// Answers the request of a client, and says who that is. The caller bounds the time.
///
/// # Errors
/// After the HTTP error, if that is what the client got.
pub(crate) async fn accept<S>(
    mut stream: S,
    peer: SocketAddr,
    rules: &WebSocketRules,
) -> Result<(WebSocket<S>, SocketAddr), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut received = Vec::with_capacity(1024);
    loop {
        let room = (REQUEST_BYTES_MAX - received.len()) as u64;
        if (&mut stream).take(room).read_buf(&mut received).await? == 0 {
            return Err(HandshakeError::Incomplete);
        }
        match check_request(&received, peer, rules) {
            Ok(Some(upgrade)) => {
                let early = received.split_off(upgrade.request_bytes);
                stream
                    .write_all(switching_protocols(&upgrade).as_bytes())
                    .await?;
                stream.flush().await?;
                return Ok((WebSocket::new(stream, early), upgrade.client));
            }
            Ok(None) if received.len() < REQUEST_BYTES_MAX => {}
            Ok(None) => return refuse(stream, Refusal::TooLarge).await,
            Err(refusal) => return refuse(stream, refusal).await,
        }
    }
}

async fn refuse<S, T>(mut stream: S, refusal: Refusal) -> Result<T, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(refusal.response().as_bytes()).await?;
    stream.shutdown().await?;
    // Closing a socket with unread bytes resets the connection, and the client may never see the
    // answer. So whatever it still sends is read until it hangs up, within reason.
    let mut rest = stream.take(8 * REQUEST_BYTES_MAX as u64);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Err(HandshakeError::Refused(refusal))
}

fn switching_protocols(upgrade: &Upgrade) -> String {
    let Upgrade {
        accept,
        subprotocol,
        ..
    } = upgrade;
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {subprotocol}\r\n\r\n"
    )
}

/// `None` while the request is incomplete.
fn check_request(
    received: &[u8],
    peer: SocketAddr,
    rules: &WebSocketRules,
) -> Result<Option<Upgrade>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let request_bytes = match request.parse(received) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::TooLarge),
        Err(_) => return Err(Refusal::NotHttp),
    };
    if request.version != Some(1) {
        return Err(Refusal::NotHttp);
    }
    if request.method != Some("GET") {
        return Err(Refusal::Method);
    }
    let path = request
        .path
        .and_then(|target| target.split('?').next())
        .unwrap_or_default();
    if !DEFAULT_PATHS.contains(&path) && rules.path.as_deref() != Some(path) {
        return Err(Refusal::Path);
    }
    let headers = Headers(request.headers);
    if !headers.has_token("Upgrade", "websocket") || !headers.has_token("Connection", "upgrade") {
        return Err(Refusal::NoUpgrade);
    }
    if headers.value("Sec-WebSocket-Version") != Some("13") {
        return Err(Refusal::Version);
    }
    let key = headers.value("Sec-WebSocket-Key").ok_or(Refusal::Key)?;
    if BASE64.decode(key).map_or(0, |key| key.len()) != 16 {
        return Err(Refusal::Key);
    }
    if let Some(origin) = headers.value("Origin")
        && !rules.origins.is_empty()
        && !rules
            .origins
            .iter()
            .any(|allowed| allowed.eq_ignore_ascii_case(origin))
    {
        return Err(Refusal::Origin);
    }
    // The client's first choice wins, [MQTT-6.0.0-4].
    let subprotocol = headers
        .tokens("Sec-WebSocket-Protocol")
        .find_map(|offered| SUBPROTOCOLS.into_iter().find(|known| *known == offered))
        .ok_or(Refusal::Subprotocol)?;
    let forwarded_for: Vec<_> = headers.tokens("X-Forwarded-For").collect();
    Ok(Some(Upgrade {
        accept: accept_key(key),
        subprotocol,
        client: forwarded_client(&rules.trusted_proxies, peer, &forwarded_for),
        request_bytes,
    }))
}

/// `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key` (RFC 6455, section 4.2.2).
fn accept_key(key: &str) -> String {
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.as_bytes());
    context.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    BASE64.encode(context.finish())
}

struct Headers<'h>(&'h [httparse::Header<'h>]);

impl<'h> Headers<'h> {
    /// The values of all header lines with this name; those that are not text are left out.
    fn values(&self, name: &str) -> impl Iterator<Item = &'h str> {
        self.0
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .filter_map(|header| str::from_utf8(header.value).ok())
            .map(str::trim)
    }

    fn value(&self, name: &str) -> Option<&'h str> {
        self.values(name).next()
    }

    /// The elements of a comma-separated list, which may be spread over several lines.
    fn tokens(&self, name: &str) -> impl Iterator<Item = &'h str> {
        self.values(name)
            .flat_map(|value| value.split(','))
            .map(str::trim)
    }

    fn has_token(&self, name: &str, expected: &str) -> bool {
        self.tokens(name)
            .any(|token| token.eq_ignore_ascii_case(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The request of the RFC's example, changed by one replacement.
    fn request(from: &str, to: &str) -> String {
        let good = "GET /mqtt HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n\
                    Connection: keep-alive, Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                    Sec-WebSocket-Version: 13\r\nOrigin: https://example.org\r\n\
                    Sec-WebSocket-Protocol: mqtt\r\n\r\n";
        assert!(good.contains(from));
        good.replace(from, to)
    }

    fn peer() -> SocketAddr {
        "10.0.0.1:4711".parse().unwrap()
    }

    fn check(request: &str) -> Result<Option<Upgrade>, Refusal> {
        check_request(request.as_bytes(), peer(), &WebSocketRules::default())
    }

    #[track_caller]
    fn expect_refusal(from: &str, to: &str, expected: Refusal) {
        assert_eq!(check(&request(from, to)), Err(expected));
    }

    #[test]
    fn good_request_is_accepted_as_in_rfc_6455() {
        let upgrade = check(&request("", "")).unwrap().unwrap();

        assert_eq!(upgrade.accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(upgrade.subprotocol, "mqtt");
    }

    #[test]
    fn incomplete_request_is_waited_for() {
        let request = request("", "");
        for length in 0..request.len() {
            assert_eq!(check(&request[..length]), Ok(None));
        }
    }

    #[test]
    fn mqtt_6_0_0_4_first_known_subprotocol_is_chosen() {
        let offers = "Protocol: chat, mqttv3.1\r\nSec-WebSocket-Protocol: mqtt";

        let upgrade = check(&request("Protocol: mqtt", offers)).unwrap().unwrap();

        assert_eq!(upgrade.subprotocol, "mqttv3.1");
    }

    #[test]
    fn mqtt_6_0_0_3_request_without_the_subprotocol_is_refused() {
        expect_refusal("Protocol: mqtt", "Protocol: chat", Refusal::Subprotocol);
        expect_refusal("Sec-WebSocket-Protocol: mqtt\r\n", "", Refusal::Subprotocol);
    }

    #[test]
    fn bad_requests_are_refused() {
        expect_refusal("GET", "POST", Refusal::Method);
        expect_refusal("/mqtt", "/chat", Refusal::Path);
        expect_refusal("HTTP/1.1", "HTTP/1.0", Refusal::NotHttp);
        expect_refusal("GET", "\x10\x0c\0\x04", Refusal::NotHttp);
        expect_refusal("Upgrade: websocket", "Upgrade: h2c", Refusal::NoUpgrade);
        expect_refusal("keep-alive, Upgrade", "keep-alive", Refusal::NoUpgrade);
        expect_refusal("Version: 13", "Version: 8", Refusal::Version);
        expect_refusal("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=", Refusal::Key);
        expect_refusal("dGhlIHNhbXBsZSBub25jZQ==", "%", Refusal::Key);
        expect_refusal(
            "Host: localhost",
            "Host: localhost\r\n".repeat(HEADERS_MAX + 1).trim_end(),
            Refusal::TooLarge,
        );
    }

    #[test]
    fn configured_path_is_answered_besides_the_usual_ones() {
        let rules = WebSocketRules {
            path: Some("/iot".to_owned()),
            ..WebSocketRules::default()
        };
        for path in ["/iot", "/", "/mqtt", "/mqtt?token=1"] {
            let request = request("/mqtt", path);
            assert!(
                check_request(request.as_bytes(), peer(), &rules).is_ok(),
                "{path}"
            );
        }
    }

    #[test]
    fn only_trusted_proxies_are_believed_about_who_their_client_is() {
        let rules = |trusted: &[&str]| WebSocketRules {
            trusted_proxies: trusted.iter().map(|text| text.parse().unwrap()).collect(),
            ..WebSocketRules::default()
        };
        let own = "10.0.0.1:4711";
        let cases: [(&[&str], &str, &str); 9] = [
            (&[], "X-Forwarded-For: 203.0.113.7", own),
            (&["192.0.2.0/24"], "X-Forwarded-For: 203.0.113.7", own),
            (
                &["10.0.0.0/8"],
                "X-Forwarded-For: 203.0.113.7",
                "203.0.113.7:0",
            ),
            (
                &["10.0.0.0/8"],
                "X-Forwarded-For: 203.0.113.7:80",
                "203.0.113.7:80",
            ),
            (
                &["10.0.0.0/8"],
                "X-Forwarded-For: [2001:db8::7]",
                "[2001:db8::7]:0",
            ),
            // What the client has claimed is before what the proxy knows.
            (
                &["10.0.0.0/8"],
                "X-Forwarded-For: 6.6.6.6, 203.0.113.7",
                "203.0.113.7:0",
            ),
            (
                &["10.0.0.0/8"],
                "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 203.0.113.7, 10.0.0.2",
                "203.0.113.7:0",
            ),
            (&["10.0.0.0/8"], "X-Forwarded-For: unknown", own),
            (&["10.0.0.0/8"], "X-Other: 203.0.113.7", own),
        ];

        for (trusted, header, expected) in cases {
            let request = request("Host: localhost", header);
            let upgrade = check_request(request.as_bytes(), peer(), &rules(trusted));
            let client = upgrade.unwrap().unwrap().client;
            assert_eq!(client, expected.parse().unwrap(), "{header}");
        }
    }

    #[test]
    fn only_pages_of_allowed_origins_may_connect() {
        let rules = WebSocketRules {
            origins: vec!["https://allowed.org".to_owned()],
            ..WebSocketRules::default()
        };
        let check = |from, to| check_request(request(from, to).as_bytes(), peer(), &rules).err();

        assert_eq!(check("", ""), Some(Refusal::Origin));
        assert_eq!(check("example.org", "allowed.org"), None);
        assert_eq!(check("Origin: https://example.org\r\n", ""), None);
    }
}
