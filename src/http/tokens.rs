//! Who may use the API: a file of tokens, of which only hashes are kept.
//!
//! A token is 32 random bytes, so that nobody can guess it whatever hash is used: one that takes no
//! time is right, and a password's would only make requests slow.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use aws_lc_rs::{constant_time, digest, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::auth::edit::{self, EditError};

/// Every token begins so, which lets scanners for secrets find it.
const PREFIX: &str = "mdg_";
const SCHEME: &str = "sha256:";
const HASH_BYTES: usize = 32;

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Scope {
    /// To look at everything.
    Read,
    /// To publish, disconnect clients and change retained messages as well.
    Write,
}

#[derive(Clone, PartialEq, Eq)]
struct Token {
    scope: Scope,
    hash: [u8; HASH_BYTES],
}

/// The tokens that are let in, by name. In the file, each is a line `NAME SCOPE sha256:HASH`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tokens(BTreeMap<String, Token>);

/// Those that are let in now; the file is read again while the broker runs.
#[derive(Debug, Default)]
pub(crate) struct CurrentTokens(ArcSwap<Tokens>);

impl CurrentTokens {
    pub(crate) fn new(tokens: Tokens) -> Self {
        Self(ArcSwap::from_pointee(tokens))
    }

    pub(super) fn get(&self) -> Arc<Tokens> {
        self.0.load_full()
    }

    pub(crate) fn replace(&self, tokens: Tokens) {
        self.0.store(Arc::new(tokens));
    }
}

/// Why a tokens file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokensError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}:{line}: should be a name, `read` or `write`, and `sha256:` with 64 hexadecimal digits", path.display())]
    Line { path: PathBuf, line: usize },
    #[error("a name of a token has letters, digits, `-`, `_` and `.`")]
    Name,
    #[error("there is a token `{0}` already")]
    NameTaken(String),
    #[error("there is no token `{0}`")]
    NoSuchToken(String),
    #[error("the system has no random numbers")]
    Random,
    #[error(transparent)]
    Save(#[from] EditError),
}

impl Tokens {
    pub(crate) fn read(path: &Path) -> Result<Self, TokensError> {
        let text = fs::read_to_string(path).map_err(|source| TokensError::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, TokensError> {
        let mut tokens = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let Some(entry) = entry(line) else {
                continue;
            };
            let (name, token) = entry.map_err(|()| TokensError::Line {
                path: path.to_owned(),
                line: number,
            })?;
            if tokens.insert(name.to_owned(), token).is_some() {
                return Err(TokensError::NameTaken(name.to_owned()));
            }
        }
        Ok(Self(tokens))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names and scopes.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, Scope)> {
        self.0
            .iter()
            .map(|(name, token)| (name.as_str(), token.scope))
    }

    /// The name and the scope of a token that somebody shows.
    pub(super) fn find(&self, shown: &str) -> Option<(&str, Scope)> {
        let hash = hash(shown);
        let known = self
            .0
            .iter()
            .find(|(_, token)| constant_time::verify_slices_are_equal(&token.hash, &hash).is_ok());
        known.map(|(name, token)| (name.as_str(), token.scope))
    }
}

/// Adds a token to a file, which need not exist yet, and returns what to show instead of it.
pub(crate) fn add(path: &Path, name: &str, scope: Scope) -> Result<String, TokensError> {
    if !is_name(name) {
        return Err(TokensError::Name);
    }
    let mut text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => {
            let path = path.to_owned();
            return Err(TokensError::Io { path, source });
        }
    };
    if Tokens::parse(path, &text)?.0.contains_key(name) {
        return Err(TokensError::NameTaken(name.to_owned()));
    }
    let mut random = [0; HASH_BYTES];
    rand::fill(&mut random).map_err(|_| TokensError::Random)?;
    let token = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random));
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    let digits: String = hash(&token)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    text.push_str(&format!("{name} {scope} {SCHEME}{digits}\n"));
    edit::replace_file(path, &text)?;
    Ok(token)
}

/// Removes a token from a file; comments and other tokens stay as they are.
pub(crate) fn remove(path: &Path, name: &str) -> Result<(), TokensError> {
    let text = fs::read_to_string(path).map_err(|source| TokensError::Io {
        path: path.to_owned(),
        source,
    })?;
    if !Tokens::parse(path, &text)?.0.contains_key(name) {
        return Err(TokensError::NoSuchToken(name.to_owned()));
    }
    let is_other = |line: &&str| !matches!(entry(line), Some(Ok((other, _))) if other == name);
    let text: String = text.split_inclusive('\n').filter(is_other).collect();
    Ok(edit::replace_file(path, &text)?)
}

/// What a line says, if it says anything.
fn entry(line: &str) -> Option<Result<(&str, Token), ()>> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let mut words = line.split_ascii_whitespace();
    let parsed = (|| {
        let name = words.next().filter(|name| is_name(name))?;
        let scope = match words.next()? {
            "read" => Scope::Read,
            "write" => Scope::Write,
            _ => return None,
        };
        let hash = hexadecimal(words.next()?.strip_prefix(SCHEME)?)?;
        words
            .next()
            .is_none()
            .then_some((name, Token { scope, hash }))
    })();
    Some(parsed.ok_or(()))
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !name.is_empty() && name.bytes().all(allowed)
}

fn hexadecimal(digits: &str) -> Option<[u8; HASH_BYTES]> {
    let mut bytes = [0; HASH_BYTES];
    if digits.len() != 2 * HASH_BYTES || !digits.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

fn hash(token: &str) -> [u8; HASH_BYTES] {
    let mut hash = [0; HASH_BYTES];
    hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
    hash
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// Hashes are nobody's business.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_by_what_was_shown_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");

        let reader = add(&path, "grafana", Scope::Read).unwrap();
        let writer = add(&path, "ops", Scope::Write).unwrap();
        let tokens = Tokens::read(&path).unwrap();

        assert_eq!(tokens.find(&reader), Some(("grafana", Scope::Read)));
        assert_eq!(tokens.find(&writer), Some(("ops", Scope::Write)));
        assert_eq!(tokens.find("mdg_guessed"), None);
        let text = fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&reader) && !text.contains(&writer), "{text}");
        assert!(matches!(
            add(&path, "ops", Scope::Read),
            Err(TokensError::NameTaken(_))
        ));
    }

    #[test]
    fn removing_a_token_leaves_the_rest_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        fs::write(&path, "# mine\n").unwrap();
        add(&path, "a", Scope::Read).unwrap();
        let before = fs::read_to_string(&path).unwrap();

        add(&path, "b", Scope::Read).unwrap();
        remove(&path, "b").unwrap();

        assert_eq!(fs::read_to_string(&path).unwrap(), before);
        assert!(matches!(
            remove(&path, "b"),
            Err(TokensError::NoSuchToken(_))
        ));
    }

    #[test]
    fn a_line_that_is_no_token_is_named() {
        let hash = "0".repeat(64);
        for line in [
            "a".to_owned(),
            "a read".to_owned(),
            format!("a admin sha256:{hash}"),
            "a read sha256:00".to_owned(),
            format!("a read {hash}"),
            format!("a read sha256:{hash} more"),
            format!("a:b read sha256:{hash}"),
        ] {
            let error = Tokens::parse(Path::new("tokens"), &format!("# mine\n{line}\n"));
            assert!(
                error.unwrap_err().to_string().starts_with("tokens:2: "),
                "{line}"
            );
        }
    }
}
