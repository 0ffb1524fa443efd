//! The files that TLS needs: roots, revocation lists, the client's certificate and key. Read at each connection, so that renewed ones
//! count without a restart.
//!
//! Source: `initialize_SSL` in PostgreSQL `src/interfaces/libpq/fe-secure-openssl.c`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use super::error::TlsError;

/// Bundles of every authority of a cloud have less than 1 MiB; revocation lists may be longer.
const SIZE_MAX: u64 = 16 << 20;
const LISTS_MAX: usize = 256;

fn read(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut content = Vec::new();
    File::open(path)?.take(SIZE_MAX + 1).read_to_end(&mut content)?;
    if content.len() as u64 > SIZE_MAX {
        return Err(io::Error::other("it is larger than 16 MiB"));
    }
    Ok(content)
}

fn wrong(setting: &'static str, path: &Path) -> impl Fn(String) -> TlsError {
    move |why| TlsError::File { setting, path: path.to_owned(), why }
}

/// Whether there is a file, as libpq asks: what cannot be looked at for another reason is an error.
pub(super) fn exists(setting: &'static str, path: &Path) -> Result<bool, TlsError> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(wrong(setting, path)(error.to_string())),
    }
}

pub(super) fn certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = wrong(setting, path);
    let content = read(path).map_err(|error| wrong(error.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
    match found {
        Ok(found) if found.is_empty() => Err(wrong("it has no certificate in PEM form".to_owned())),
        Ok(found) => Ok(found),
        Err(_) => Err(wrong("its PEM form is damaged".to_owned())),
    }
}

pub(super) fn revocation_lists(
    setting: &'static str,
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let wrong = wrong(setting, path);
    let content = read(path).map_err(|error| wrong(error.to_string()))?;
    let found: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&content).collect();
    match found {
        Ok(found) if found.is_empty() => Err(wrong("it has no revocation list in PEM form".to_owned())),
        Ok(found) => Ok(found),
        Err(_) => Err(wrong("its PEM form is damaged".to_owned())),
    }
}

/// The lists of a folder as `openssl rehash` names them: `HASH.rN`.
pub(super) fn revocation_folder(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let wrong = wrong("sslcrldir", path);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|error| wrong(error.to_string()))? {
        let entry = entry.map_err(|error| wrong(error.to_string()))?;
        let name = entry.file_name();
        let is_list = name.to_str().and_then(|name| name.split_once(".r")).is_some_and(|(hash, number)| {
            hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit()) && number.bytes().all(|b| b.is_ascii_digit())
        });
        if is_list {
            found.extend(revocation_lists("sslcrldir", &entry.path())?);
        }
        if found.len() > LISTS_MAX {
            return Err(wrong(format!("it has more than {LISTS_MAX} lists")));
        }
    }
    Ok(found)
}

/// A private key, which nobody else may read: 0600, or 0640 if it belongs to root.
pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let wrong = wrong("sslkey", path);
    let data = std::fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => wrong("it does not exist, but its certificate does".to_owned()),
        _ => wrong(error.to_string()),
    })?;
    if !data.is_file() {
        return Err(wrong("it is not a regular file".to_owned()));
    }
    let too_open = if data.uid() == 0 { 0o037 } else { 0o077 };
    if data.mode() & too_open != 0 {
        return Err(wrong(format!("others may open it (mode {:04o})", data.mode() & 0o7777)));
    }
    let content = read(path).map_err(|error| wrong(error.to_string()))?;
    let text = String::from_utf8_lossy(&content);
    if text.contains("BEGIN ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
        return Err(wrong("it is encrypted, and Walden does not open keys with a passphrase (sslpassword)".to_owned()));
    }
    if let Ok(key) = PrivateKeyDer::from_pem_slice(&content) {
        return Ok(key);
    }
    PrivateKeyDer::try_from(content).map_err(|_| wrong("it has no private key in PEM or DER form".to_owned()))
}

/// The system's authorities, or those that SSL_CERT_FILE and SSL_CERT_DIR name.
pub(super) fn system_roots() -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why = found.errors.first().map_or_else(|| "none are installed".to_owned(), ToString::to_string);
        return Err(TlsError::File { setting: "sslrootcert", path: "system".into(), why });
    }
    Ok(found.certs)
}
