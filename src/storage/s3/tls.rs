//! The HTTP client and whom it trusts: the system's roots, or the authorities in `ca_file`.

use std::time::Duration;

use aws_sdk_s3::config::SharedHttpClient;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::credentials::read_bounded;
use super::settings::S3Settings;
use crate::storage::StorageError;

/// Connections idle for longer are closed before the store closes them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// Bound of a file of certificates, in bytes.
const CA_FILE_MAX: u64 = 4 * 1024 * 1024;

/// What `ca_file` holds, if it can be used.
pub(super) async fn read_authorities(settings: &S3Settings) -> Result<Option<Vec<u8>>, StorageError> {
    let Some(path) = &settings.ca_file else { return Ok(None) };
    let wrong = |why: String| StorageError::Settings {
        url: settings.url(),
        why: format!("`ca_file` {}: {why}", path.display()),
    };
    let pem = read_bounded(path.clone(), CA_FILE_MAX).await.map_err(wrong)?;
    check_certificates(&pem).map_err(wrong)?;
    Ok(Some(pem))
}

pub(super) fn http_client(settings: &S3Settings, authorities: Option<&[u8]>) -> Result<SharedHttpClient, StorageError> {
    let trust = match authorities {
        Some(pem) => TrustStore::empty().with_pem_certificate(pem),
        None => TrustStore::default(),
    };
    let context = TlsContext::builder().with_trust_store(trust).build().map_err(|error| StorageError::Settings {
        url: settings.url(),
        why: format!("TLS cannot be set up: {error}"),
    })?;
    Ok(aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
        .tls_context(context)
        .pool_max_idle_per_host(settings.concurrency.max(1))
        .pool_idle_timeout(IDLE_TIMEOUT)
        .build_https())
}

/// The SDK panics on certificates that it cannot use, so they are looked at first.
fn check_certificates(pem: &[u8]) -> Result<(), String> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("is not PEM: {error}"))?;
        roots.add(certificate).map_err(|error| format!("has a certificate that cannot be trusted: {error}"))?;
    }
    if roots.is_empty() { Err("has no certificate".to_owned()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_ca_file_is_refused_not_a_panic() {
        assert!(check_certificates(b"").is_err());
        assert!(check_certificates(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").is_err());
        assert!(check_certificates(b"-----BEGIN CERTIFICATE-----\n!!!\n").is_err());
    }
}
