//! TLS: from certificate files to a server configuration, and what a client certificate says.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

/// The files that make a listener a TLS listener, all of them PEM.
#[derive(Clone, Debug)]
pub(crate) struct TlsFiles {
    /// The server's certificate, followed by the intermediate ones.
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Whose client certificates are trusted; clients are not asked for one without it.
    pub(crate) client_ca: Option<ClientCa>,
}

#[derive(Clone, Debug)]
pub(crate) struct ClientCa {
    pub(crate) file: PathBuf,
    /// Whether a client without a certificate is turned away.
    pub(crate) is_certificate_required: bool,
}

/// What is wrong with the files; for the operator, who can mend it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot read {}: {error}", file.display())]
    Read { file: PathBuf, error: io::Error },
    #[error("{} is not a PEM file: {error}", file.display())]
    NotPem { file: PathBuf, error: pem::Error },
    #[error("{} contains no certificate", file.display())]
    NoCertificate { file: PathBuf },
    #[error("{} contains no private key (one with a passphrase cannot be used)", file.display())]
    NoKey { file: PathBuf },
    #[error("the key in {} does not belong to the certificate in {}", key.display(), certificate.display())]
    KeyMismatch { key: PathBuf, certificate: PathBuf },
    #[error("cannot use the certificate in {} with the key in {}: {error}", certificate.display(), key.display())]
    Unusable {
        certificate: PathBuf,
        key: PathBuf,
        error: rustls::Error,
    },
    #[error("cannot use {} to verify client certificates: {error}", file.display())]
    BadClientCa { file: PathBuf, error: rustls::Error },
    #[error("cannot set up TLS: {0}")]
    Setup(rustls::Error),
}

/// What a listener shows its clients; connections that are there keep what they were shown.
#[derive(Debug)]
pub(crate) struct CurrentTls {
    alpn: &'static [u8],
    read: ArcSwap<ReadFiles>,
}

/// What the files of a listener came to.
#[derive(Debug)]
pub(crate) struct ReadFiles {
    config: Arc<ServerConfig>,
    /// When the server's certificate expires, in Unix seconds.
    expires_at: Option<i64>,
}

impl CurrentTls {
    pub(super) async fn read(files: &TlsFiles, alpn: &'static [u8]) -> Result<Self, TlsError> {
        let read = ArcSwap::from_pointee(server_config(files, alpn).await?);
        Ok(Self { alpn, read })
    }

    pub(crate) fn alpn(&self) -> &'static [u8] {
        self.alpn
    }

    pub(crate) fn replace(&self, read: ReadFiles) {
        self.read.store(Arc::new(read));
    }

    /// When the server's certificate expires, in Unix seconds.
    pub(crate) fn expires_at(&self) -> Option<i64> {
        self.read.load().expires_at
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.read.load().config.clone().into()
    }
}

/// Reads `files` for a listener whose protocol has the ALPN name `alpn`. A client that offers no
/// name is welcome too: few MQTT clients do.
///
/// # Errors
/// The first thing that is wrong with the files.
pub(crate) async fn server_config(files: &TlsFiles, alpn: &[u8]) -> Result<ReadFiles, TlsError> {
    // Named here, so that it does not depend on what else is linked into the program.
    let provider = Arc::new(aws_lc_rs::default_provider());
    let certificates = read_certificates(&files.certificate).await?;
    let key = read_key(&files.key).await?;
    let leaf = certificates.first();
    let expires_at = leaf.and_then(|leaf| {
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
        Some(leaf.validity().not_after.timestamp())
    });
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(client_ca) => {
            let (roots, file) = (read_roots(&client_ca.file).await?, &client_ca.file);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = if client_ca.is_certificate_required {
                verifier
            } else {
                verifier.allow_unauthenticated()
            };
            let verifier: Arc<dyn ClientCertVerifier> =
                verifier.build().map_err(|error| TlsError::BadClientCa {
                    file: file.clone(),
                    error: rustls::Error::General(error.to_string()),
                })?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certificates, key)
        .map_err(|error| {
            let (certificate, key) = (files.certificate.clone(), files.key.clone());
            match error {
                rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    TlsError::KeyMismatch { key, certificate }
                }
                error => TlsError::Unusable {
                    certificate,
                    key,
                    error,
                },
            }
        })?;
    config.alpn_protocols = vec![alpn.to_vec()];
    // A client resumes with the last ticket it got; a second one is only bytes on the wire.
    config.send_tls13_tickets = 1;
    // Tickets that the client keeps, instead of sessions that we would have to keep.
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::Setup)?;
    Ok(ReadFiles {
        config: Arc::new(config),
        expires_at,
    })
}

async fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = read(file).await?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| TlsError::NotPem {
            file: file.to_owned(),
            error,
        })?;
    if certificates.is_empty() {
        return Err(TlsError::NoCertificate {
            file: file.to_owned(),
        });
    }
    Ok(certificates)
}

async fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(file).await?).map_err(|error| {
        let file = file.to_owned();
        match error {
            pem::Error::NoItemsFound => TlsError::NoKey { file },
            error => TlsError::NotPem { file, error },
        }
    })
}

async fn read_roots(file: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(file).await? {
        roots
            .add(certificate)
            .map_err(|error| TlsError::BadClientCa {
                file: file.to_owned(),
                error,
            })?;
    }
    Ok(Arc::new(roots))
}

async fn read(file: &Path) -> Result<Vec<u8>, TlsError> {
    tokio::fs::read(file).await.map_err(|error| TlsError::Read {
        file: file.to_owned(),
        error,
    })
}

/// The Common Name in a client certificate. Without a configured CA there is no certificate;
/// with one it has been verified.
pub(crate) fn common_name(connection: &rustls::ServerConnection) -> Option<Arc<str>> {
    let certificate = connection.peer_certificates()?.first()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let name = certificate
        .subject()
        .iter_common_name()
        .next()?
        .as_str()
        .ok()?;
    (!name.is_empty()).then(|| Arc::from(name))
}
