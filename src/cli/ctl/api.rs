//! Requests to the API of a running midge.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

/// Where a midge answers, and what opens its API.
pub(super) struct Api {
    /// Host and port.
    authority: String,
    token: Option<String>,
}

/// Why there is no answer to show. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum ApiError {
    #[error("http.enabled is false: there is no API to ask")]
    NoHttp,
    #[error("`{0}` is no address of an API; write it as http://HOST:PORT")]
    Url(String),
    #[error("{}: {error}", path.display())]
    TokenFile { path: PathBuf, error: io::Error },
    #[error(
        "cannot reach midge at http://{authority}: {error}; is it running? `--url` names another place"
    )]
    Unreachable { authority: String, error: io::Error },
    #[error("what answers at http://{authority} is not the API of midge")]
    Foreign { authority: String },
    #[error("http://{authority} needs a token: `--token-file` names the file that holds one")]
    TokenMissing { authority: String },
    #[error("http://{authority} refuses the token: {detail}")]
    TokenRefused { authority: String, detail: String },
    #[error("{detail}{}", hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default())]
    Problem {
        detail: String,
        hint: Option<String>,
    },
}

/// For a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// For an answer; midge gives up earlier.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longer answers are not midge's: a page has at most 1000 items.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The port of `http.bind`.
const DEFAULT_PORT: u16 = 9883;

impl Api {
    pub(super) fn new(authority: String, token: Option<String>) -> Self {
        Self { authority, token }
    }

    /// Reads `http://HOST:PORT`, of which all but the host may be left out.
    pub(super) fn authority_of(url: &str) -> Result<String, ApiError> {
        let wrong = || ApiError::Url(url.to_owned());
        let rest = match url.split_once("://") {
            Some(("http", rest)) => rest,
            Some(_) => return Err(wrong()),
            None => url,
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let is_odd = |c: char| c.is_whitespace() || c.is_control() || "/?#@".contains(c);
        if authority.is_empty() || authority.contains(is_odd) {
            return Err(wrong());
        }
        let port = match authority.rsplit_once(':') {
            // The colons of an IPv6 address are in brackets.
            Some((_, port)) if !port.contains(']') => {
                port.parse::<u16>().map_err(|_| wrong())?;
                String::new()
            }
            _ => format!(":{DEFAULT_PORT}"),
        };
        Ok(format!("{authority}{port}"))
    }

    /// The token in a file that holds nothing else.
    pub(super) fn read_token(path: &Path) -> Result<String, ApiError> {
        let text = std::fs::read_to_string(path);
        let token = text.map(|text| text.trim().to_owned());
        let token = token.and_then(|token| {
            let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
            is_token
                .then_some(token)
                .ok_or_else(|| io::Error::other("should hold one token, such as mdg_…"))
        });
        token.map_err(|error| ApiError::TokenFile {
            path: path.to_owned(),
            error,
        })
    }

    /// Sends a request without a body; `path` begins below `/api/v1`. Returns the body of the answer,
    /// null if there is none.
    pub(super) fn ask(&self, method: &str, path: &str) -> Result<Value, ApiError> {
        let authority = || self.authority.clone();
        let answer = self.exchange(method, path);
        let answer = answer.map_err(|error| ApiError::Unreachable {
            authority: authority(),
            error,
        })?;
        let foreign = || ApiError::Foreign {
            authority: authority(),
        };
        let answer = std::str::from_utf8(&answer).map_err(|_| foreign())?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(foreign)?;
        let status: u16 = head
            .strip_prefix("HTTP/1.")
            .and_then(|head| head.get(2..5)?.parse().ok())
            .ok_or_else(foreign)?;
        let body: Value = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(body).map_err(|_| foreign())?
        };
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let text = |key: &str| body[key].as_str().map(str::to_owned);
        let (Some(code), Some(detail)) = (text("code"), text("detail")) else {
            return Err(foreign());
        };
        Err(match code.as_str() {
            "token_missing" => ApiError::TokenMissing {
                authority: authority(),
            },
            "token_unknown" | "token_scope" => ApiError::TokenRefused {
                authority: authority(),
                detail,
            },
            _ => ApiError::Problem {
                detail,
                hint: text("hint"),
            },
        })
    }

    fn exchange(&self, method: &str, path: &str) -> io::Result<Vec<u8>> {
        let mut stream = self.connect()?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        // Version 1.0: the answer ends with the connection, whatever is in between.
        let mut request = format!(
            "{method} /api/v1{path} HTTP/1.0\r\nHost: {}\r\nAccept: application/json\r\n\
             Content-Length: 0\r\n",
            self.authority
        );
        if let Some(token) = &self.token {
            request.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        Ok(answer)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::other("the name has no address");
        for address in self.authority.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// A text as a part of a path or a query.
pub(super) fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(byte.into());
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_with_and_without_its_parts() {
        for (url, expected) in [
            ("http://10.0.0.1:80", Some("10.0.0.1:80")),
            ("http://node-1:9883/", Some("node-1:9883")),
            ("node-1", Some("node-1:9883")),
            ("http://[::1]", Some("[::1]:9883")),
            ("[::1]:80", Some("[::1]:80")),
            ("https://node-1", None),
            ("http://", None),
            ("http://node-1:port", None),
            ("http://node-1/api", None),
            ("http://user@node-1", None),
            ("http://node-1\r\nX: y", None),
        ] {
            let authority = Api::authority_of(url).ok();
            assert_eq!(authority.as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn what_has_a_meaning_in_addresses_is_encoded() {
        assert_eq!(encoded("a/b c+#ü~"), "a%2Fb%20c%2B%23%C3%BC~");
    }
}
