//! TLS: from the certificate files of the command line to a client configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

/// What is wrong with the files.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum TlsError {
    #[error("cannot read certificates from {}: {error}", file.display())]
    Certificates { file: PathBuf, error: pem::Error },
    #[error("{} contains no certificate", file.display())]
    NoCertificate { file: PathBuf },
    #[error("cannot read a private key from {}: {error}", file.display())]
    Key { file: PathBuf, error: pem::Error },
    #[error("cannot use the certificates: {0}")]
    Setup(#[from] rustls::Error),
    #[error("cannot use {}: {error}", file.display())]
    Authorities {
        file: PathBuf,
        error: rustls::server::VerifierBuilderError,
    },
}

/// A configuration that trusts the authorities in `ca_file` and no others, and shows the
/// certificate and key of `client` if the server asks.
///
/// `is_insecure` accepts a certificate that is for another host.
pub(super) fn client_config(
    ca_file: &Path,
    client: Option<(&Path, &Path)>,
    is_insecure: bool,
) -> Result<Arc<ClientConfig>, TlsError> {
    // Named here, so that it does not depend on what else is linked into the program.
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(ca_file)? {
        roots.add(certificate)?;
    }
    let roots = Arc::new(roots);
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = if is_insecure {
        let verifier = AnyHost::new(roots, provider).map_err(|error| TlsError::Authorities {
            file: ca_file.to_owned(),
            error,
        })?;
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
    } else {
        builder.with_root_certificates(roots)
    };
    let config = match client {
        None => builder.with_no_client_auth(),
        Some((certificate_file, key_file)) => {
            let key = PrivateKeyDer::from_pem_file(key_file).map_err(|error| TlsError::Key {
                file: key_file.to_owned(),
                error,
            })?;
            builder.with_client_auth_cert(read_certificates(certificate_file)?, key)?
        }
    };
    Ok(Arc::new(config))
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| TlsError::Certificates {
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

/// Verifies everything about a server but its name.
#[derive(Debug)]
struct AnyHost(Arc<WebPkiServerVerifier>);

impl AnyHost {
    fn new(
        roots: Arc<RootCertStore>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, rustls::server::VerifierBuilderError> {
        WebPkiServerVerifier::builder_with_provider(roots, provider)
            .build()
            .map(Self)
    }
}

impl ServerCertVerifier for AnyHost {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The name is the last thing that it verifies.
        match self
            .0
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
