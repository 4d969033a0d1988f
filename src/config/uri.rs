//! Where MongoDB and Redis are, and how their passwords stay secrets.

use std::path::Path;
use std::{fmt, fs};

use super::value::{Setting, Unfit, Value, quote};
use crate::bus::redis::Location;

/// Where MongoDB is and how to log in there. It is shown without the password.
#[derive(Clone, PartialEq, Eq)]
pub struct MongoUri(String);

impl MongoUri {
    /// `None` if it is no URI of MongoDB. What follows the scheme is looked at when it is used.
    pub fn new(uri: &str) -> Option<Self> {
        let has_scheme = ["mongodb://", "mongodb+srv://"]
            .iter()
            .any(|scheme| uri.len() > scheme.len() && uri.starts_with(scheme));
        has_scheme.then(|| Self(uri.to_owned()))
    }

    /// With the password.
    pub fn secret(&self) -> &str {
        &self.0
    }

    pub(super) const EXPECTED: &str =
        "a URI such as \"mongodb://db1,db2,db3/?replicaSet=rs0\" or \"mongodb+srv://…\"";
}

impl fmt::Display for MongoUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_passwords(&self.0))
    }
}

impl fmt::Debug for MongoUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MongoUri({self})")
    }
}

/// Unset by default, and no word for it.
impl Setting for Option<MongoUri> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let uri = value.text().and_then(MongoUri::new);
        uri.map(Some).ok_or_else(|| Unfit {
            expected: MongoUri::EXPECTED.to_owned(),
        })
    }

    fn show(&self) -> Option<String> {
        self.as_ref().map(|uri| quote(&uri.to_string()))
    }
}

/// Where Redis is and how to log in there. It is shown without the password.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    /// `None` if Redis cannot be found with it.
    pub fn new(url: &str) -> Option<Self> {
        Location::parse(url).map(|_| Self(url.to_owned()))
    }

    /// With the password.
    pub fn secret(&self) -> &str {
        &self.0
    }

    pub(super) const EXPECTED: &str = "a URL such as \"redis://cache:6379\", \
        \"rediss://user:password@cache\", \"redis+sentinel://one,two,three/mymaster\" or \
        \"redis+cluster://one,two,three\", which has no database";
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&without_passwords(&self.0))
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisUrl({self})")
    }
}

/// Unset by default, and no word for it.
impl Setting for Option<RedisUrl> {
    fn parse(value: &Value) -> Result<Self, Unfit> {
        let url = value.text().and_then(RedisUrl::new);
        url.map(Some).ok_or_else(|| Unfit {
            expected: RedisUrl::EXPECTED.to_owned(),
        })
    }

    fn show(&self) -> Option<String> {
        self.as_ref().map(|url| quote(&url.to_string()))
    }
}

/// Reads the URI that a file holds, such as one that an orchestrator mounts for a secret.
pub(super) fn read_mongodb(path: &Path) -> Result<MongoUri, String> {
    read(path, MongoUri::new, MongoUri::EXPECTED)
}

/// The same for Redis.
pub(super) fn read_redis(path: &Path) -> Result<RedisUrl, String> {
    read(path, RedisUrl::new, RedisUrl::EXPECTED)
}

fn read<T>(path: &Path, parse: fn(&str) -> Option<T>, expected: &str) -> Result<T, String> {
    let text = fs::read_to_string(path)
        .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    parse(text.trim()).ok_or_else(|| format!("{} should hold {expected}", path.display()))
}

/// The text with each character of a password in a URI replaced, so that places in it stay what
/// they are.
///
/// It would rather hide too much: who gets an error about a URI may have left an `@` unescaped.
pub(super) fn without_passwords(text: &str) -> String {
    let Some((before, uri)) = text.split_once("://") else {
        return text.to_owned();
    };
    let mut masked = format!("{before}://");
    let mut rest = uri;
    if let Some((user_info, after)) = uri.rsplit_once('@') {
        let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
        masked.push_str(user);
        if user.len() < user_info.len() {
            masked.push(':');
        }
        masked.push_str(&stars(password));
        masked.push('@');
        rest = after;
    }
    let Some((hosts, options)) = rest.split_once('?') else {
        return masked + rest;
    };
    let options: Vec<_> = options.split('&').map(mask_option).collect();
    masked + hosts + "?" + &options.join("&")
}

/// Passwords of key files and proxies, and the session tokens of AWS.
fn mask_option(option: &str) -> String {
    match option.split_once('=') {
        Some((name, value)) if is_secret(name) => format!("{name}={}", stars(value)),
        _ => option.to_owned(),
    }
}

fn is_secret(option: &str) -> bool {
    let option = option.to_ascii_lowercase();
    option.ends_with("password") || option == "authmechanismproperties"
}

fn stars(secret: &str) -> String {
    "*".repeat(secret.chars().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_masked_and_nothing_moves() {
        for (text, masked) in [
            ("no uri: at all", "no uri: at all"),
            ("mongodb://db1:1,db2/?w=1", "mongodb://db1:1,db2/?w=1"),
            ("mongodb://me@db1/", "mongodb://me@db1/"),
            ("mongodb://me:päss@db1/", "mongodb://me:****@db1/"),
            ("mongodb+srv://me:p:@/@db1", "mongodb+srv://me:****@db1"),
            (
                "uri = \"mongodb://me:pass@db1\"  # a comment",
                "uri = \"mongodb://me:****@db1\"  # a comment",
            ),
            (
                "mongodb://db1/?tlsCertificateKeyFilePassword=abc&w=1",
                "mongodb://db1/?tlsCertificateKeyFilePassword=***&w=1",
            ),
            (
                "mongodb://db1/?w=1&authMechanismProperties=a:b",
                "mongodb://db1/?w=1&authMechanismProperties=***",
            ),
        ] {
            assert_eq!(without_passwords(text), masked);
        }
    }

    #[test]
    fn a_uri_is_printed_without_its_password() {
        let uri = MongoUri::new("mongodb://me:pass@db1/").unwrap();

        assert_eq!(uri.to_string(), "mongodb://me:****@db1/");
        assert_eq!(format!("{uri:?}"), "MongoUri(mongodb://me:****@db1/)");
        assert_eq!(uri.secret(), "mongodb://me:pass@db1/");
    }

    #[test]
    fn a_url_of_redis_is_printed_without_its_password() {
        let url = RedisUrl::new("redis+sentinel://:pass@one,two/main").unwrap();

        assert_eq!(url.to_string(), "redis+sentinel://:****@one,two/main");
        assert_eq!(
            format!("{url:?}"),
            "RedisUrl(redis+sentinel://:****@one,two/main)"
        );
        assert_eq!(url.secret(), "redis+sentinel://:pass@one,two/main");
    }

    #[test]
    fn a_uri_has_the_scheme_of_mongodb_and_something_behind_it() {
        for text in ["", "db1:27017", "redis://db1", "mongodb://"] {
            assert_eq!(MongoUri::new(text), None, "{text}");
        }
    }
}
