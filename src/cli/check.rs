//! `midge check`

use std::path::Path;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::{CliError, ConfigArguments, print};
use crate::auth::users::UsersFile;
use crate::config::problem::Problem;
use crate::config::{ClientAuth, ConfigError, Loaded, Tls};
use crate::http::tokens::Tokens;

pub(super) fn run(arguments: ConfigArguments) -> Result<(), CliError> {
    let loaded = Loaded::new(&arguments.sources())?;
    check_files(&loaded)?;
    print(&format!(
        "# The configuration is valid. In effect:\n\n{}",
        loaded.to_toml()
    ))
}

/// Whether the files that settings name are there and hold what they should.
pub(super) fn check_files(loaded: &Loaded) -> Result<(), ConfigError> {
    let mut problems = Vec::new();
    if let Some(path) = &loaded.config.auth.users_file
        && let Err(ConfigError(in_file)) = UsersFile::read(path)
    {
        problems.extend(in_file);
    }
    if let Some(path) = &loaded.config.http.tokens_file
        && let Err(error) = Tokens::read(path)
    {
        problems.push(loaded.blame("http.tokens_file", error.to_string()));
    }
    if loaded.config.store.uri_file.is_some()
        && let Err(ConfigError(in_file)) = loaded.config.store.mongodb_uri()
    {
        problems.extend(in_file);
    }
    if loaded.config.bus.url_file.is_some()
        && let Err(ConfigError(in_file)) = loaded.config.bus.redis_url()
    {
        problems.extend(in_file);
    }
    for (name, listener) in &loaded.config.listeners {
        if let Some(tls) = &listener.tls {
            check_tls(loaded, &format!("listeners.{name}.tls"), tls, &mut problems);
        }
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(ConfigError(problems))
    }
}

fn check_tls(loaded: &Loaded, parent: &str, tls: &Tls, problems: &mut Vec<Problem>) {
    let mut blame = |key: &str, path: &Path, what: &str| {
        problems.push(loaded.blame(
            &format!("{parent}.{key}"),
            format!("{}: {what}", path.display()),
        ));
    };
    let certificates = certificates(&tls.certificate)
        .map_err(|what| blame("certificate", &tls.certificate, &what));
    let key = PrivateKeyDer::from_pem_file(&tls.key).map_err(|error| {
        blame("key", &tls.key, &describe(&error, "a private key"));
    });
    if let ClientAuth::Optional { ca } | ClientAuth::Required { ca } = &tls.client_auth
        && let Err(what) = self::certificates(ca)
    {
        blame("client_ca", ca, &what);
    }
    let (Ok(certificates), Ok(key)) = (certificates, key) else {
        return;
    };
    match CertifiedKey::from_der(certificates, key, &aws_lc_rs::default_provider()) {
        Ok(_) => {}
        Err(rustls::Error::InconsistentKeys(_)) => {
            let what = format!(
                "is not the key of the certificate {}",
                tls.certificate.display()
            );
            blame("key", &tls.key, &what);
        }
        Err(error) => blame("certificate", &tls.certificate, &error.to_string()),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates: Vec<_> = read.map_err(|error| describe(&error, "certificates"))?;
    if certificates.is_empty() {
        Err(describe(&pem::Error::NoItemsFound, "certificates"))
    } else {
        Ok(certificates)
    }
}

fn describe(error: &pem::Error, wanted: &str) -> String {
    match error {
        pem::Error::Io(error) => format!("cannot be read: {error}"),
        pem::Error::NoItemsFound => {
            format!("holds no {} in PEM format", wanted.trim_start_matches("a "))
        }
        other => format!("is not {wanted} in PEM format: {other}"),
    }
}
