//! Nobody configured: everybody is let in, or only those with a certificate.

use std::sync::Arc;

use super::rules::Rules;
use super::{
    Answer, AuthenticationError, Authenticator, Authorizer, Credentials, Identity, Request, Verdict,
};

/// The answers where there is no users file. User names are accepted as they come, since nothing
/// depends on them.
#[derive(Debug)]
pub(super) struct Anonymous {
    /// Otherwise a client needs a verified certificate.
    allowed: bool,
    rules: Rules,
}

impl Anonymous {
    pub(super) fn new(allowed: bool) -> Self {
        Self {
            allowed,
            rules: Rules::default(),
        }
    }
}

impl Authenticator for Anonymous {
    fn authenticate(
        &self,
        credentials: Credentials,
    ) -> Answer<Result<Option<Arc<str>>, AuthenticationError>> {
        Answer::Now(match credentials.certificate_name {
            Some(name) => Ok(Some(name)),
            None if self.allowed => Ok(credentials.user_name),
            None => Err(AuthenticationError::NotAuthorized),
        })
    }
}

impl Authorizer for Anonymous {
    fn authorize(&self, identity: &Identity, request: Request<'_>) -> Answer<Verdict> {
        Answer::Now(self.rules.judge(identity, request))
    }

    fn restricts_receive(&self) -> bool {
        false
    }
}
