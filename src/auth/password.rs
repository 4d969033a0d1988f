//! Password hashes: Argon2id of our own, and PBKDF2 as `mosquitto_passwd` writes it.

use std::fmt;
use std::num::NonZeroU32;

use argon2::Argon2;
use argon2::password_hash::phc;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use aws_lc_rs::pbkdf2;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// Checks a password, slowly on purpose: never on a runtime worker.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PasswordHash(Scheme);

#[derive(Clone, PartialEq, Eq)]
enum Scheme {
    /// `$argon2id$v=19$m=19456,t=2,p=1$salt$hash`
    Argon2(Box<phc::PasswordHash>),
    /// `$7$iterations$salt$hash`: PBKDF2 with HMAC-SHA-512.
    Pbkdf2 {
        iterations: NonZeroU32,
        salt: Box<[u8]>,
        hash: Box<[u8]>,
    },
}

/// Why a text is no hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidHash {
    #[error("not a password hash; `midge user add` makes them")]
    Malformed,
    #[error(
        "a salted SHA-512 hash of Mosquitto before 2.0, which is too easy to guess; set the password anew with `midge user add`"
    )]
    Outdated,
}

/// The hash of a password could not be made: the system has no random numbers or no memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot hash the password: {0}")]
pub(crate) struct HashingFailed(argon2::password_hash::Error);

impl PasswordHash {
    /// The text to write down for a new password.
    ///
    /// # Errors
    /// If the system has no random numbers or no memory.
    pub(crate) fn create(password: &[u8]) -> Result<String, HashingFailed> {
        let hash: phc::PasswordHash = Argon2::default()
            .hash_password(password)
            .map_err(HashingFailed)?;
        Ok(hash.to_string())
    }

    /// # Errors
    /// If it is none of the known kinds.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidHash> {
        if text.starts_with("$6$") {
            return Err(InvalidHash::Outdated);
        }
        if let Some(fields) = text.strip_prefix("$7$") {
            return parse_pbkdf2(fields).map(Self).ok_or(InvalidHash::Malformed);
        }
        let hash = phc::PasswordHash::new(text).map_err(|_| InvalidHash::Malformed)?;
        let usable = hash.algorithm.as_str().starts_with("argon2")
            && hash.salt.is_some()
            && hash.hash.is_some()
            && argon2::Params::try_from(&hash).is_ok();
        if usable {
            Ok(Self(Scheme::Argon2(hash.into())))
        } else {
            Err(InvalidHash::Malformed)
        }
    }

    /// Whether it is the hash of `password`.
    pub(crate) fn verify(&self, password: &[u8]) -> bool {
        match &self.0 {
            Scheme::Argon2(hash) => Argon2::default().verify_password(password, &**hash).is_ok(),
            Scheme::Pbkdf2 {
                iterations,
                salt,
                hash,
            } => pbkdf2::verify(
                pbkdf2::PBKDF2_HMAC_SHA512,
                *iterations,
                salt,
                password,
                hash,
            )
            .is_ok(),
        }
    }

    /// What it is made with, for people.
    pub(crate) fn scheme(&self) -> &'static str {
        match self.0 {
            Scheme::Argon2(_) => "argon2",
            Scheme::Pbkdf2 { .. } => "pbkdf2-sha512",
        }
    }
}

fn parse_pbkdf2(fields: &str) -> Option<Scheme> {
    let mut fields = fields.split('$');
    let (iterations, salt, hash) = (fields.next()?, fields.next()?, fields.next()?);
    let decode = |text| {
        BASE64_STANDARD
            .decode(text)
            .ok()
            .filter(|bytes| !bytes.is_empty())
    };
    let scheme = Scheme::Pbkdf2 {
        iterations: iterations.parse().ok()?,
        salt: decode(salt)?.into(),
        // A short hash would be easy to meet by chance.
        hash: decode(hash).filter(|hash| hash.len() >= 32)?.into(),
    };
    fields.next().is_none().then_some(scheme)
}

/// Shows the kind alone: hashes can be guessed from.
impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PasswordHash").field(&self.scheme()).finish()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// In the format of `mosquitto_passwd`, with its 101 iterations: quick, for tests.
    pub(crate) fn quick_hash(password: &str) -> String {
        let (salt, mut hash) = ([7; 12], [0; 64]);
        let iterations = NonZeroU32::new(101).unwrap();
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA512,
            iterations,
            &salt,
            password.as_bytes(),
            &mut hash,
        );
        format!(
            "$7$101${}${}",
            BASE64_STANDARD.encode(salt),
            BASE64_STANDARD.encode(hash)
        )
    }

    #[test]
    fn a_new_hash_verifies_its_password_and_no_other() {
        let text = PasswordHash::create(b"secret").unwrap();
        let hash = PasswordHash::parse(&text).unwrap();

        assert!(text.starts_with("$argon2id$"), "{text}");
        assert!(hash.verify(b"secret"));
        assert!(!hash.verify(b"Secret"));
        assert_ne!(
            text,
            PasswordHash::create(b"secret").unwrap(),
            "the salt is random"
        );
    }

    #[test]
    fn hashes_of_mosquitto_passwd_verify() {
        let hash = PasswordHash::parse(&quick_hash("secret")).unwrap();

        assert!(hash.verify(b"secret"));
        assert!(!hash.verify(b""));
    }

    #[test]
    fn what_is_no_hash_is_refused() {
        for text in [
            "",
            "secret",
            "$argon2id$",
            "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ",
            "$scrypt$ln=16,r=8,p=1$aM15713r3Xsvxbi31lqr1Q$nFNh2CVHVjNldFVKDHDlm4CbdRSCdEBsjjJxD+iCs5E",
            "$7$0$AAAA$AAAA",
            "$7$101$AAAA$AAAA",
            "$7$101$AAAA",
            "$7$x$AAAA$AAAA$",
        ] {
            assert_eq!(
                PasswordHash::parse(text),
                Err(InvalidHash::Malformed),
                "{text}"
            );
        }
        assert_eq!(
            PasswordHash::parse("$6$abc$def"),
            Err(InvalidHash::Outdated)
        );
    }

    #[test]
    fn debug_output_keeps_the_hash_to_itself() {
        let hash = PasswordHash::parse(&quick_hash("secret")).unwrap();

        assert_eq!(format!("{hash:?}"), "PasswordHash(\"pbkdf2-sha512\")");
    }
}
