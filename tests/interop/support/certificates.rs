use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// A certificate authority and what it signed, as PEM files below one directory.
pub(crate) struct Certificates {
    pub(crate) authority: PathBuf,
    pub(crate) server: Identity,
    pub(crate) client: Identity,
}

/// A certificate and its private key.
pub(crate) struct Identity {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Certificates {
    pub(crate) fn create_in(directory: &Path) -> Self {
        let mut parameters = parameters("midge test authority", &[]);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key can be generated");
        let certificate = parameters
            .self_signed(&key)
            .expect("the parameters are valid");
        let authority = write(directory, "authority.crt", &certificate.pem());
        let issuer = Issuer::new(parameters, key);

        Self {
            authority,
            server: sign(directory, "server", &["localhost", "127.0.0.1"], &issuer),
            client: sign(directory, "client", &[], &issuer),
        }
    }
}

fn sign(
    directory: &Path,
    name: &str,
    subject_names: &[&str],
    issuer: &Issuer<'_, KeyPair>,
) -> Identity {
    let key = KeyPair::generate().expect("a key can be generated");
    let certificate = parameters(name, subject_names)
        .signed_by(&key, issuer)
        .expect("the parameters are valid");
    Identity {
        certificate: write(directory, &format!("{name}.crt"), &certificate.pem()),
        key: write(directory, &format!("{name}.key"), &key.serialize_pem()),
    }
}

fn parameters(common_name: &str, subject_names: &[&str]) -> CertificateParams {
    let subject_names = subject_names.iter().map(|&name| name.to_owned());
    let mut parameters =
        CertificateParams::new(subject_names.collect::<Vec<_>>()).expect("the names are valid");
    parameters
        .distinguished_name
        .push(DnType::CommonName, common_name);
    parameters
}

fn write(directory: &Path, name: &str, pem: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, pem).expect("the directory is writable");
    path
}
