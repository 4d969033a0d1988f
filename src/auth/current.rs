//! Answers that can be replaced while clients are connected.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{
    Access, Answer, AuthenticationError, Authenticator, Authorizer, Credentials, Identity, Request,
    Verdict,
};

/// Hands every question on to those who answer at the moment.
#[derive(Debug)]
pub(crate) struct CurrentAccess(ArcSwap<Access>);

impl CurrentAccess {
    pub(crate) fn new(access: Access) -> Self {
        Self(ArcSwap::from_pointee(access))
    }

    pub(crate) fn replace(&self, access: Access) {
        self.0.store(Arc::new(access));
    }
}

impl Authenticator for CurrentAccess {
    fn authenticate(
        &self,
        credentials: Credentials,
    ) -> Answer<Result<Option<Arc<str>>, AuthenticationError>> {
        self.0.load().0.authenticate(credentials)
    }
}

impl Authorizer for CurrentAccess {
    fn authorize(&self, identity: &Identity, request: Request<'_>) -> Answer<Verdict> {
        self.0.load().1.authorize(identity, request)
    }

    fn restricts_receive(&self) -> bool {
        self.0.load().1.restricts_receive()
    }

    fn may_stay(&self, identity: &Identity) -> bool {
        self.0.load().1.may_stay(identity)
    }
}
