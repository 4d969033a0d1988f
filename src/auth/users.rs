//! The users file: who there is, their passwords, and what they may do.
//!
//! ```toml
//! [users.thermometer]
//! password = "$argon2id$v=19$…"                  # written by `midge user add`
//! publish = { allow = ["home/%c/temperature"] }  # %c: Client Identifier, %u: user name
//! subscribe = { allow = ["home/#"], deny = ["home/alarm/#"] }
//!
//! [users.gateway]        # no password: only with a client certificate whose Common Name this is
//!
//! [anonymous]            # the rules of clients without a user name, if auth.anonymous = true
//! publish = { allow = [] }
//! ```
//!
//! Each list is optional: without `allow`, everything is allowed that `deny` does not name. A
//! password file of Mosquitto, with a line `name:$7$…` per user, is read too.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::thread::available_parallelism;

use serde::Deserialize;
use tokio::sync::Semaphore;
use toml::Spanned;

use super::password::PasswordHash;
use super::pattern::Pattern;
use super::recent::RecentPasswords;
use super::rules::{AllowList, Permissions, Rule, Rules};
use super::{
    Answer, AuthenticationError, Authenticator, Authorizer, Credentials, Identity, Request, Verdict,
};
use crate::config::problem::{ConfigError, Problem, SourceFile};

/// What a users file says.
#[derive(Debug, Default)]
pub(crate) struct UsersFile {
    pub(crate) users: BTreeMap<String, User>,
    pub(super) anonymous: Rules,
}

#[derive(Debug)]
pub(crate) struct User {
    /// Absent for those that come with a certificate.
    pub(crate) password: Option<Password>,
    pub(super) rules: Rules,
}

#[derive(Clone, Debug)]
pub(crate) struct Password {
    pub(crate) hash: PasswordHash,
    /// As it stands in the file.
    text: Arc<str>,
}

impl UsersFile {
    /// # Errors
    /// If it cannot be read, or says something that is not known.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let what = format!("cannot read the users file {}: {error}", path.display());
            let hint = format!(
                "make it with `midge user add --file {} NAME`",
                path.display()
            );
            Problem::without_place(what).with_hint(hint)
        })?;
        Self::parse(path, text)
    }

    pub(super) fn parse(path: &Path, text: String) -> Result<Self, ConfigError> {
        let file = Arc::new(SourceFile {
            path: path.to_owned(),
            text,
        });
        let parsed = if is_mosquitto(&file.text) {
            parse_lines(&file.text)
        } else {
            parse_toml(&file.text)
        };
        parsed.map_err(|faults| {
            let problem = |(span, what)| Problem::in_file(&file, span, what);
            ConfigError(faults.into_iter().map(problem).collect())
        })
    }
}

/// What is wrong, and where.
type Fault = (Range<usize>, String);

/// Whether it is the format of `mosquitto_passwd`.
pub(super) fn is_mosquitto(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    first
        .and_then(|line| line.split_once(':'))
        .is_some_and(|(name, hash)| hash.starts_with('$') && !name.contains(['=', '[', '"']))
}

fn parse_lines(text: &str) -> Result<UsersFile, Vec<Fault>> {
    let mut file = UsersFile::default();
    let mut faults = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let content = line.trim_end();
        let span = start..start + content.len();
        start += line.len();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let Some((name, hash)) = content.split_once(':') else {
            faults.push((span, "expected `name:hash`".to_owned()));
            continue;
        };
        match Password::parse(hash) {
            Ok(password) => {
                let user = User {
                    password: Some(password),
                    rules: Rules::default(),
                };
                if file.users.insert(name.to_owned(), user).is_some() {
                    faults.push((span, format!("user `{name}` is there twice")));
                }
            }
            Err(error) => faults.push((span, format!("user `{name}`: {error}"))),
        }
    }
    if faults.is_empty() {
        Ok(file)
    } else {
        Err(faults)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenFile {
    #[serde(default)]
    users: BTreeMap<String, WrittenUser>,
    #[serde(default)]
    anonymous: WrittenRules,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenUser {
    password: Option<Spanned<String>>,
    #[serde(default)]
    publish: WrittenPermissions,
    #[serde(default)]
    subscribe: WrittenPermissions,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct WrittenRules {
    #[serde(default)]
    publish: WrittenPermissions,
    #[serde(default)]
    subscribe: WrittenPermissions,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct WrittenPermissions {
    allow: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    deny: Vec<Spanned<String>>,
}

fn parse_toml(text: &str) -> Result<UsersFile, Vec<Fault>> {
    let written: WrittenFile = toml::from_str(text).map_err(|error| {
        let what = error.message().trim_end().replace('\n', ", ");
        vec![(error.span().unwrap_or_default(), what)]
    })?;
    let mut faults = Vec::new();
    let mut users = BTreeMap::new();
    for (name, user) in written.users {
        let password = user.password.and_then(|written| {
            let parsed = Password::parse(written.get_ref());
            parsed
                .map_err(|error| faults.push((written.span(), format!("user `{name}`: {error}"))))
                .ok()
        });
        let rules = WrittenRules {
            publish: user.publish,
            subscribe: user.subscribe,
        };
        let rules = rules.check(&format!("users.{name}"), &mut faults);
        users.insert(name, User { password, rules });
    }
    let anonymous = written.anonymous.check("anonymous", &mut faults);
    if faults.is_empty() {
        Ok(UsersFile { users, anonymous })
    } else {
        Err(faults)
    }
}

impl Password {
    fn parse(text: &str) -> Result<Self, super::password::InvalidHash> {
        Ok(Self {
            hash: PasswordHash::parse(text)?,
            text: text.into(),
        })
    }
}

impl WrittenRules {
    fn check(&self, whose: &str, faults: &mut Vec<Fault>) -> Rules {
        Rules {
            publish: self.publish.check(&format!("{whose}.publish"), faults),
            subscribe: self.subscribe.check(&format!("{whose}.subscribe"), faults),
        }
    }
}

impl WrittenPermissions {
    fn check(&self, name: &str, faults: &mut Vec<Fault>) -> Permissions {
        let mut pattern = |written: &Spanned<String>| {
            let parsed = Pattern::new(written.get_ref());
            parsed
                .map_err(|error| faults.push((written.span(), error.to_string())))
                .ok()
        };
        Permissions {
            allow: self.allow.as_ref().map(|allow| AllowList {
                patterns: allow.iter().filter_map(&mut pattern).collect(),
                name: format!("{name}.allow").into(),
            }),
            deny: self
                .deny
                .iter()
                .filter_map(pattern)
                .map(|pattern| Rule {
                    name: format!("{name}.deny {:?}", pattern.as_str()).into(),
                    pattern,
                })
                .collect(),
        }
    }
}

/// The answers of a users file.
#[derive(Debug)]
pub(super) struct Users {
    file: UsersFile,
    /// Whether clients without a user name are let in.
    anonymous: bool,
    restricts_receive: bool,
    checks: PasswordChecks,
}

impl Users {
    pub(super) fn new(
        file: UsersFile,
        anonymous: bool,
    ) -> Result<Self, aws_lc_rs::error::Unspecified> {
        let restricts_receive = file
            .users
            .values()
            .map(|user| &user.rules)
            .chain([&file.anonymous])
            .any(|rules| !rules.subscribe.deny.is_empty());
        let checks = PasswordChecks::new(&file)?;
        Ok(Self {
            file,
            anonymous,
            restricts_receive,
            checks,
        })
    }

    fn is_certified(&self, name: &str) -> bool {
        self.file
            .users
            .get(name)
            .is_some_and(|user| user.password.is_none())
    }
}

impl Authenticator for Users {
    fn authenticate(
        &self,
        credentials: Credentials,
    ) -> Answer<Result<Option<Arc<str>>, AuthenticationError>> {
        let user_name = credentials.user_name.filter(|name| !name.is_empty());
        let certified = credentials
            .certificate_name
            .filter(|name| self.is_certified(name));
        match (user_name, credentials.password) {
            (None, _) if certified.is_some() => Answer::Now(Ok(certified)),
            (None, _) if self.anonymous => Answer::Now(Ok(None)),
            (None, _) => Answer::Now(Err(AuthenticationError::NotAuthorized)),
            (Some(name), None) if certified.as_ref() == Some(&name) => Answer::Now(Ok(certified)),
            (Some(_), None) => Answer::Now(Err(AuthenticationError::BadCredentials)),
            (Some(name), Some(password)) => {
                let user = self.file.users.get(&*name);
                self.checks
                    .check(name, user.and_then(|user| user.password.as_ref()), password)
            }
        }
    }
}

impl Authorizer for Users {
    fn authorize(&self, identity: &Identity, request: Request<'_>) -> Answer<Verdict> {
        let rules = match &identity.user_name {
            None => &self.file.anonymous,
            Some(name) => match self.file.users.get(&**name) {
                Some(user) => &user.rules,
                // A Will or a session may outlive its user.
                None => {
                    return Answer::Now(Verdict::Deny {
                        rule: format!("there is no user `{name}`").into(),
                    });
                }
            },
        };
        Answer::Now(rules.judge(identity, request))
    }

    fn restricts_receive(&self) -> bool {
        self.restricts_receive
    }

    fn may_stay(&self, identity: &Identity) -> bool {
        match &identity.user_name {
            None => self.anonymous,
            Some(name) => self.file.users.contains_key(&**name),
        }
    }
}

/// Checks passwords off the runtime's workers, as many at a time as there are cores: one check
/// takes some 20 ms and 19 MiB, and a CONNECT can demand one.
///
/// Those that wait their turn wait in the task of their connection, and go when it goes.
#[derive(Debug)]
struct PasswordChecks {
    recent: Arc<RecentPasswords>,
    turns: Arc<Semaphore>,
    /// What the passwords of unknown users are checked against, so that the time it takes does
    /// not tell which users there are.
    decoy: Option<Password>,
}

impl PasswordChecks {
    fn new(file: &UsersFile) -> Result<Self, aws_lc_rs::error::Unspecified> {
        Ok(Self {
            recent: Arc::new(RecentPasswords::new()?),
            turns: Arc::new(Semaphore::new(
                available_parallelism().map_or(1, usize::from),
            )),
            decoy: file.users.values().find_map(|user| user.password.clone()),
        })
    }

    fn check(
        &self,
        user_name: Arc<str>,
        expected: Option<&Password>,
        password: Arc<[u8]>,
    ) -> Answer<Result<Option<Arc<str>>, AuthenticationError>> {
        let is_known = expected.is_some();
        // Without a single password in the file there is nothing to be told.
        let Some(expected) = expected.or(self.decoy.as_ref()).cloned() else {
            return Answer::Now(Err(AuthenticationError::BadCredentials));
        };
        let tag = self.recent.tag(&user_name, &expected.text, &password);
        if is_known && self.recent.contains(&tag) {
            return Answer::Now(Ok(Some(user_name)));
        }
        let (recent, turns) = (Arc::clone(&self.recent), Arc::clone(&self.turns));
        Answer::Later(Box::pin(async move {
            let unavailable = |_| AuthenticationError::Unavailable("midge is stopping".to_owned());
            let turn = turns.acquire_owned().await.map_err(|_| unavailable(()))?;
            let check = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                expected.hash.verify(&password)
            });
            let is_right = check.await.map_err(|_| unavailable(()))?;
            if !(is_right && is_known) {
                return Err(AuthenticationError::BadCredentials);
            }
            recent.insert(tag);
            Ok(Some(user_name))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::password::tests::quick_hash;
    use crate::mqtt::QoS;

    fn parse(text: &str) -> Result<UsersFile, ConfigError> {
        UsersFile::parse(Path::new("users.toml"), text.to_owned())
    }

    fn users(anonymous: bool) -> Users {
        let file = format!(
            "[users.ann]\npassword = \"{}\"\npublish = {{ allow = [\"%u/#\"] }}\nsubscribe = {{ deny = [\"secret/#\"] }}\n\
             [users.machine]\n[anonymous]\npublish = {{ allow = [] }}\n",
            quick_hash("secret")
        );
        Users::new(parse(&file).unwrap(), anonymous).unwrap()
    }

    fn credentials(
        user_name: Option<&str>,
        password: Option<&str>,
        certificate_name: Option<&str>,
    ) -> Credentials {
        Credentials {
            client_id: "c".into(),
            user_name: user_name.map(Into::into),
            password: password.map(|password| password.as_bytes().into()),
            peer: ([127, 0, 0, 1], 1).into(),
            certificate_name: certificate_name.map(Into::into),
        }
    }

    async fn authenticate(
        users: &Users,
        credentials: Credentials,
    ) -> Result<Option<Arc<str>>, AuthenticationError> {
        match users.authenticate(credentials) {
            Answer::Now(result) => result,
            Answer::Later(result) => result.await,
        }
    }

    #[tokio::test]
    async fn a_right_password_is_accepted_and_remembered() {
        let users = users(false);
        let right = || credentials(Some("ann"), Some("secret"), None);
        assert!(matches!(users.authenticate(right()), Answer::Later(_)));

        assert_eq!(authenticate(&users, right()).await, Ok(Some("ann".into())));
        assert!(matches!(
            users.authenticate(right()),
            Answer::Now(Ok(Some(_)))
        ));
    }

    #[tokio::test]
    async fn a_wrong_password_is_refused_however_often_the_right_one_came() {
        let users = users(false);
        authenticate(&users, credentials(Some("ann"), Some("secret"), None))
            .await
            .unwrap();

        for password in [Some("Secret"), Some(""), None] {
            let result = authenticate(&users, credentials(Some("ann"), password, None)).await;
            assert_eq!(
                result,
                Err(AuthenticationError::BadCredentials),
                "{password:?}"
            );
        }
    }

    #[tokio::test]
    async fn an_unknown_user_is_checked_like_a_known_one_and_refused() {
        let users = users(false);
        // The right password of somebody else, twice: it must not be remembered either.
        for _ in 0..2 {
            let Answer::Later(result) =
                users.authenticate(credentials(Some("bob"), Some("secret"), None))
            else {
                panic!("answered without a check");
            };
            assert_eq!(result.await, Err(AuthenticationError::BadCredentials));
        }
    }

    #[tokio::test]
    async fn without_a_user_name_it_depends_on_the_setting() {
        let nobody = || credentials(None, None, None);

        assert_eq!(authenticate(&users(true), nobody()).await, Ok(None));
        assert_eq!(
            authenticate(&users(false), nobody()).await,
            Err(AuthenticationError::NotAuthorized)
        );
        let empty = credentials(Some(""), Some(""), None);
        assert_eq!(
            authenticate(&users(false), empty).await,
            Err(AuthenticationError::NotAuthorized)
        );
    }

    #[tokio::test]
    async fn a_certificate_stands_for_a_user_without_a_password_only() {
        let users = users(false);

        let machine = authenticate(&users, credentials(None, None, Some("machine"))).await;
        assert_eq!(machine, Ok(Some("machine".into())));
        for name in ["ann", "stranger"] {
            let result = authenticate(&users, credentials(None, None, Some(name))).await;
            assert_eq!(result, Err(AuthenticationError::NotAuthorized), "{name}");
        }
        let pretender =
            authenticate(&users, credentials(Some("machine"), Some("secret"), None)).await;
        assert_eq!(pretender, Err(AuthenticationError::BadCredentials));
    }

    #[test]
    fn every_client_has_the_rules_of_its_user() {
        let users = users(true);
        let may_publish = |user_name: Option<&str>, topic| {
            let identity = Identity {
                client_id: "c".into(),
                user_name: user_name.map(Into::into),
            };
            let request = Request::Publish {
                topic,
                qos: QoS::AtMostOnce,
                retain: false,
            };
            matches!(
                users.authorize(&identity, request),
                Answer::Now(Verdict::Allow)
            )
        };

        assert!(may_publish(Some("ann"), "ann/x"));
        assert!(!may_publish(Some("ann"), "bob/x"));
        assert!(may_publish(Some("machine"), "bob/x"));
        assert!(!may_publish(None, "ann/x"));
        assert!(!may_publish(Some("removed"), "removed/x"));
        assert!(users.restricts_receive());
    }

    #[test]
    fn denials_name_the_rule_as_it_is_written() {
        let identity = Identity {
            client_id: "c".into(),
            user_name: Some("ann".into()),
        };
        let Answer::Now(verdict) =
            users(false).authorize(&identity, Request::Receive { topic: "secret/x" })
        else {
            panic!("rules need no time");
        };

        assert_eq!(
            verdict,
            Verdict::Deny {
                rule: "users.ann.subscribe.deny \"secret/#\"".into()
            }
        );
    }

    #[test]
    fn a_password_file_of_mosquitto_is_a_users_file() {
        let file = format!(
            "# made by hand\n\nann:{}\nbob:{}\r\n",
            quick_hash("a"),
            quick_hash("b")
        );
        let file = parse(&file).unwrap();

        assert_eq!(file.users.keys().collect::<Vec<_>>(), ["ann", "bob"]);
        assert!(
            file.users["bob"]
                .password
                .as_ref()
                .unwrap()
                .hash
                .verify(b"b")
        );
    }

    #[test]
    fn mistakes_are_shown_where_they_are() {
        for (text, place, what) in [
            (
                "[users.ann]\npasword = \"x\"\n",
                "2:1",
                "unknown field `pasword`",
            ),
            (
                "[users.ann]\npassword = \"x\"\n",
                "2:12",
                "user `ann`: not a password hash",
            ),
            (
                "[users.ann]\npublish = { deny = [\"a/#/b\"] }\n",
                "2:21",
                "`#` must stand alone",
            ),
            ("ann:$7$\n", "1:1", "user `ann`: not a password hash"),
            ("ann:$6$x$y\n", "1:1", "Mosquitto before 2.0"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(
                error.contains(&format!("users.toml:{place}")) && error.contains(what),
                "{error}"
            );
        }
    }
}
