//! Who may connect, publish and subscribe.
//!
//! Owns the two questions ([`Authenticator`], [`Authorizer`]) and the answers that midge has built
//! in: nobody configured (`anonymous`), and a users file (`users`). It never sees a socket or a
//! session.

mod anonymous;
mod current;
pub(crate) mod edit;
pub(crate) mod password;
mod pattern;
mod recent;
mod rules;
pub(crate) mod users;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::config::problem::Problem;
use crate::config::{Auth, ConfigError};
use crate::mqtt::{QoS, ReasonCode};

use anonymous::Anonymous;
pub(crate) use current::CurrentAccess;
use users::{Users, UsersFile};

/// An answer at once, or one that takes a while (a password hash, another service). Whoever asks
/// waits for it without blocking anybody else.
pub enum Answer<T> {
    Now(T),
    Later(BoxFuture<'static, T>),
}

/// Who asks to be let in.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Empty if the client asks for an assigned one.
    pub client_id: Arc<str>,
    pub user_name: Option<Arc<str>>,
    pub password: Option<Arc<[u8]>>,
    pub peer: SocketAddr,
    /// The Common Name of a verified client certificate.
    pub certificate_name: Option<Arc<str>>,
}

/// A client that has been let in.
#[derive(Clone, Debug)]
pub struct Identity {
    pub client_id: Arc<str>,
    /// Whose rules apply; `None` for an anonymous client.
    pub user_name: Option<Arc<str>>,
}

/// Why a client is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthenticationError {
    /// 0x86 Bad User Name or Password; 4 before version 5.
    #[error("unknown user or wrong password")]
    BadCredentials,
    /// 0x87 Not authorized; 5 before version 5.
    #[error("anonymous clients are not allowed")]
    NotAuthorized,
    /// 0x88 Server unavailable; 3 before version 5.
    #[error("cannot be decided now: {0}")]
    Unavailable(String),
}

/// What an authorizer is asked.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// May the client publish to this topic? Asked for Wills too.
    Publish {
        topic: &'a str,
        qos: QoS,
        retain: bool,
    },
    /// May the client subscribe to this Topic Filter (without its `$share` prefix)?
    Subscribe { filter: &'a str },
    /// May this message be forwarded to the client?
    Receive { topic: &'a str },
}

/// Allowed, or refused with the rule that said so, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny { rule: Arc<str> },
}

/// Decides who is let in, once per CONNECT.
pub trait Authenticator: fmt::Debug + Send + Sync {
    /// On success, the user name whose rules apply.
    fn authenticate(
        &self,
        credentials: Credentials,
    ) -> Answer<Result<Option<Arc<str>>, AuthenticationError>>;
}

/// Decides what a client may do, for each PUBLISH, each filter of a SUBSCRIBE, and each delivery.
pub trait Authorizer: fmt::Debug + Send + Sync {
    fn authorize(&self, identity: &Identity, request: Request<'_>) -> Answer<Verdict>;

    /// Whether [`Request::Receive`] can be refused at all; it is not asked otherwise.
    fn restricts_receive(&self) -> bool;

    /// Whether a client that has been let in may stay. Asked once more at the beginning, and when
    /// files have been read again.
    fn may_stay(&self, _identity: &Identity) -> bool {
        true
    }
}

/// Those who answer.
pub type Access = (Arc<dyn Authenticator>, Arc<dyn Authorizer>);

/// Those who answer, as `config` wants it.
///
/// # Errors
/// Everything that is wrong with the users file.
pub fn from_config(config: &Auth) -> Result<Access, ConfigError> {
    let anonymous = config.allows_anonymous();
    Ok(match &config.users_file {
        None => {
            let anonymous = Arc::new(Anonymous::new(anonymous));
            (Arc::clone(&anonymous) as _, anonymous)
        }
        Some(path) => {
            let users = Users::new(UsersFile::read(path)?, anonymous)
                .map_err(|_| Problem::without_place("the system has no random numbers"))?;
            let users = Arc::new(users);
            (Arc::clone(&users) as _, users)
        }
    })
}

impl AuthenticationError {
    pub fn reason_code(&self) -> ReasonCode {
        match self {
            Self::BadCredentials => ReasonCode::BadUserNameOrPassword,
            Self::NotAuthorized => ReasonCode::NotAuthorized,
            Self::Unavailable(_) => ReasonCode::ServerUnavailable,
        }
    }
}

impl<T> fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Now(_) => "Now",
            Self::Later(_) => "Later",
        })
    }
}
