//! Files that are read again while the broker runs: the configuration, users, tokens, certificates.
//!
//! Owns when that happens (SIGHUP, the API, or the content of a file is not what it was) and that it happens
//! as a whole or not at all: a file that is no good leaves everything as it is. What cannot change
//! without a restart is named in the log.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use crate::auth::{self, CurrentAccess};
use crate::broker::flush::unix_ms;
use crate::broker::mailbox::Order;
use crate::config::{ClientAuth, Config, ConfigError, Loaded, Sources};
use crate::http::tokens::{CurrentTokens, Tokens, TokensError};
use crate::net::connection::ConnectionContext;
use crate::net::tls::{self, CurrentTls, TlsError};
use crate::server::{connect_limits, rate, tls_files};
use crate::{systemd, telemetry};

/// The way to ask for it, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Reload {
    asked: Notify,
    /// Those who wait for what comes of it.
    waiting: Mutex<Vec<oneshot::Sender<Outcome>>>,
    last: Mutex<Option<Last>>,
    /// Of the settings in effect; absent in a program that made its configuration itself.
    fingerprint: Mutex<Option<String>>,
    /// Files are not read any more.
    over: CancellationToken,
}

/// The settings that need a restart, or what is wrong with the new files.
pub(crate) type Outcome = Result<Vec<String>, String>;

/// The last time that the files were read again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Last {
    pub(crate) is_successful: bool,
    /// When it last succeeded, in Unix milliseconds; absent if it never has.
    pub(crate) succeeded_at: Option<u64>,
}

impl Reload {
    /// Has the files read again soon, changed or not.
    pub(crate) fn ask(&self) {
        self.asked.notify_one();
    }

    /// The same, and waits until it is done; `None` if the broker is stopping.
    pub(crate) async fn ask_and_wait(&self) -> Option<Outcome> {
        let (done, outcome) = oneshot::channel();
        self.waiting.lock().push(done);
        self.ask();
        self.over.run_until_cancelled(outcome).await?.ok()
    }

    /// The last time, if there was one.
    pub(crate) fn last(&self) -> Option<Last> {
        *self.last.lock()
    }

    /// Tells the settings in effect from others.
    pub(crate) fn fingerprint(&self) -> Option<String> {
        self.fingerprint.lock().clone()
    }

    /// Tells `waiting`, who have asked before the files were read.
    fn note(&self, outcome: &Outcome, waiting: Vec<oneshot::Sender<Outcome>>) {
        let mut last = self.last.lock();
        let is_successful = outcome.is_ok();
        *last = Some(Last {
            is_successful,
            succeeded_at: if is_successful {
                Some(unix_ms())
            } else {
                last.and_then(|last| last.succeeded_at)
            },
        });
        for waiting in waiting {
            // Who has asked may have gone.
            let _ = waiting.send(outcome.clone());
        }
    }
}

/// What is wrong with the new files.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("http.tokens_file: {0}")]
    Tokens(#[from] TokensError),
    #[error("listener {name}: {error}")]
    Tls { name: String, error: TlsError },
    #[error("the broker is stopping")]
    Stopping,
}

/// A file that is being written changes again within this time.
const SETTLED_AFTER: Duration = Duration::from_millis(500);

/// Settings that a new value of takes effect without a restart, besides those of [`Config::auth`]
/// and the certificates. New connections get the limits.
const RELOADABLE: [&str; 12] = [
    "auth.anonymous",
    "auth.users_file",
    "limits.client_id_bytes_max",
    "limits.connect_rate",
    "limits.connections_max",
    "limits.keep_alive_max",
    "limits.packet_bytes_max",
    "limits.publish_rate",
    "limits.receive_maximum",
    "limits.topic_alias_maximum",
    "log.level",
    "session.in_flight_max",
];

fn is_reloadable(key: &str) -> bool {
    RELOADABLE.contains(&key) || (key.starts_with("listeners.") && key.contains(".tls."))
}

/// Where the settings came from, and what they are.
struct Settings {
    sources: Sources,
    /// In effect, by dotted key.
    values: BTreeMap<String, String>,
}

/// Reads the files again, and owns what is in effect of them.
pub(crate) struct Reloader {
    state: Arc<Reload>,
    /// In effect.
    config: Config,
    /// Absent in a program that made its configuration itself.
    settings: Option<Settings>,
    /// Absent without an HTTP server.
    tokens: Option<Arc<CurrentTokens>>,
    access: Arc<CurrentAccess>,
    /// By the name of the listener.
    tls: BTreeMap<String, Arc<CurrentTls>>,
    connections: Arc<ConnectionContext>,
}

impl Reloader {
    pub(crate) fn new(
        state: Arc<Reload>,
        config: Config,
        loaded: Option<&Loaded>,
        tokens: Option<Arc<CurrentTokens>>,
        access: Arc<CurrentAccess>,
        tls: BTreeMap<String, Arc<CurrentTls>>,
        connections: Arc<ConnectionContext>,
    ) -> Self {
        let settings = loaded.map(|loaded| Settings {
            sources: loaded.sources().clone(),
            values: loaded.values(),
        });
        let fingerprint = settings
            .as_ref()
            .map(|known| Loaded::fingerprint(&known.values));
        *state.fingerprint.lock() = fingerprint;
        Self {
            state,
            config,
            settings,
            tokens,
            access,
            tls,
            connections,
        }
    }

    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let work = async {
            let mut files = self.files();
            let mut seen = contents(&files).await;
            loop {
                let asked = tokio::select! {
                    () = self.state.asked.notified() => true,
                    () = elapsed(self.config.reload.interval.get()) => false,
                };
                let mut found = contents(&files).await;
                if !asked && found == seen {
                    continue;
                }
                while !asked && found != seen {
                    sleep(SETTLED_AFTER).await;
                    seen = std::mem::replace(&mut found, contents(&files).await);
                }
                seen = found;
                self.reload().await;
                let now = self.files();
                if now != files {
                    seen = contents(&now).await;
                    files = now;
                }
            }
        };
        stop.run_until_cancelled(work).await;
        self.state.over.cancel();
    }

    /// The files that settings name, and the one that holds the settings.
    fn files(&self) -> Vec<PathBuf> {
        let config = self.settings.as_ref().map(|settings| &settings.sources);
        let config = config.and_then(|sources| sources.file.clone());
        let users = self.config.auth.users_file.clone();
        let tokens = self.tokens_file();
        let mut files: Vec<_> = config.into_iter().chain(users).chain(tokens).collect();
        for tls in self
            .config
            .listeners
            .values()
            .filter_map(|l| l.tls.as_ref())
        {
            files.extend([tls.certificate.clone(), tls.key.clone()]);
            if let ClientAuth::Optional { ca } | ClientAuth::Required { ca } = &tls.client_auth {
                files.push(ca.clone());
            }
        }
        files
    }

    fn tokens_file(&self) -> Option<PathBuf> {
        let is_used = self.tokens.is_some();
        self.config.http.tokens_file.clone().filter(|_| is_used)
    }

    async fn reload(&mut self) {
        let waiting = std::mem::take(&mut *self.state.waiting.lock());
        systemd::notify(systemd::RELOADING);
        let result = self.try_reload().await.map_err(|error| error.to_string());
        systemd::notify(systemd::READY);
        self.state.note(&result, waiting);
        match result {
            Ok(need_restart) if need_restart.is_empty() => {
                tracing::info!(event = "reloaded", "the files were read again");
            }
            Ok(need_restart) => tracing::warn!(
                event = "reloaded",
                needs_restart = need_restart.join(", "),
                "the files were read again; some settings need a restart of midge",
            ),
            Err(error) => tracing::error!(
                event = "reload_failed",
                %error,
                "everything stays as it was",
            ),
        }
    }

    /// Returns the settings that have changed and need a restart.
    async fn try_reload(&mut self) -> Result<Vec<String>, ReloadError> {
        let loaded = match &self.settings {
            None => None,
            Some(settings) => {
                let sources = settings.sources.clone();
                Some(off_worker(move || Loaded::new(&sources)).await??)
            }
        };
        let mut config = self.config.clone();
        if let Some(loaded) = &loaded {
            config.take_over(&loaded.config);
        }
        let auth = config.auth.clone();
        let access = off_worker(move || auth::from_config(&auth)).await??;
        let tokens = match self.tokens_file() {
            None => None,
            Some(path) => Some(off_worker(move || Tokens::read(&path)).await??),
        };
        let mut certificates = Vec::new();
        for (name, current) in &self.tls {
            let tls = config.listeners.get(name).and_then(|l| l.tls.as_ref());
            let Some(files) = tls.map(tls_files) else {
                continue;
            };
            let read = tls::server_config(&files, current.alpn()).await;
            let read = read.map_err(|error| ReloadError::Tls {
                name: name.clone(),
                error,
            })?;
            certificates.push((current, read));
        }

        // All of it is good: nothing can fail from here on.
        for (current, read) in certificates {
            current.replace(read);
        }
        if let (Some(current), Some(read)) = (&self.tokens, tokens) {
            current.replace(read);
        }
        self.access.replace(access);
        self.connections
            .limits
            .store(Arc::new(connect_limits(&config)));
        let connections_max = config.limits.connections_max.unwrap_or(usize::MAX);
        self.connections
            .connections_max
            .store(connections_max, Ordering::Relaxed);
        self.connections
            .arrivals
            .set_limit(rate(config.limits.connect_rate));
        let publish_rate = rate(config.limits.publish_rate).unwrap_or(0);
        self.connections
            .publish_rate
            .store(publish_rate, Ordering::Relaxed);
        if config.log.level != self.config.log.level {
            telemetry::set_level(&config.log.level);
        }
        let clients = &self.connections.node.clients;
        clients.order_connected(Order::CheckAccess);
        let auth_kept = loaded
            .as_ref()
            .is_some_and(|loaded| loaded.config.auth != config.auth);
        self.config = config;
        let (Some(settings), Some(loaded)) = (&mut self.settings, loaded) else {
            return Ok(Vec::new());
        };
        let new = loaded.values();
        let mut need_restart = settings.adopt(&new);
        *self.state.fingerprint.lock() = Some(Loaded::fingerprint(&settings.values));
        need_restart.extend(auth_kept.then(|| "auth".to_owned()));
        Ok(need_restart)
    }
}

impl Settings {
    /// Takes over what can change now; returns what cannot.
    fn adopt(&mut self, new: &BTreeMap<String, String>) -> Vec<String> {
        let changed = |key: &&String| self.values.get(*key) != new.get(*key);
        let keys = self.values.keys().chain(new.keys());
        let mut need_restart: Vec<String> = keys
            .filter(changed)
            .filter(|key| !is_reloadable(key))
            .cloned()
            .collect();
        need_restart.sort();
        need_restart.dedup();
        self.values.retain(|key, _| !is_reloadable(key));
        let adopted = new.iter().filter(|(key, _)| is_reloadable(key));
        self.values
            .extend(adopted.map(|(key, value)| (key.clone(), value.clone())));
        need_restart
    }
}

async fn elapsed(interval: Option<Duration>) {
    match interval {
        Some(interval) => sleep(interval).await,
        None => std::future::pending().await,
    }
}

async fn off_worker<T: Send + 'static>(
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ReloadError> {
    let read = tokio::task::spawn_blocking(read).await;
    read.map_err(|_| ReloadError::Stopping)
}

/// What the files hold, as hashes. Their times say nothing where a link is switched over, as
/// Kubernetes does.
async fn contents(files: &[PathBuf]) -> Vec<Option<u64>> {
    let files = files.to_vec();
    let hash = |file: &PathBuf| hash(file);
    let hashes = off_worker(move || files.iter().map(hash).collect()).await;
    hashes.unwrap_or_default()
}

fn hash(file: &Path) -> Option<u64> {
    std::fs::read(file).ok().map(|bytes| xxh3_64(&bytes))
}
