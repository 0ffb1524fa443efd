//! What rustls asks about the server's certificate. Its own verifier refuses much that libpq takes: self-signed certificates as
//! PostgreSQL's manual makes them, X.509 v1, a host's name as common name only.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, OtherError, PeerMisbehaved, SignatureScheme};
use std::sync::Arc;

use super::certificate::Certificate;
use super::chain::{self, Trust};
use super::error::TlsError;
use super::names;

#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    /// `None`: any certificate will do, as for libpq without a root certificate.
    pub(super) trust: Option<Trust>,
    /// The name that the certificate must have.
    pub(super) host: Option<String>,
}

impl Verifier {
    fn verify(&self, leaf: &[u8], others: &[CertificateDer<'_>], now: UnixTime) -> Result<(), TlsError> {
        let leaf = Certificate::parse(leaf).map_err(|_| TlsError::Unreadable)?;
        if let Some(trust) = &self.trust {
            let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
            chain::verify(&leaf, others, trust, &self.algorithms, now)?;
        }
        match &self.host {
            Some(host) => names::check(&leaf, host),
            None => Ok(()),
        }
    }

    /// That the server holds the certificate's key. This is what ties the connection to the certificate, also where nobody is trusted.
    fn holds_key(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
        candidates_max: usize,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let certificate = Certificate::parse(certificate).map_err(|_| refused(TlsError::Unreadable))?;
        let (algorithm, key) = certificate.public_key();
        let candidates = self.algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
        let (_, candidates) = candidates.ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
        let fitting = candidates.iter().take(candidates_max).find(|one| one.public_key_alg_id().as_ref() == algorithm);
        match fitting.map(|one| one.verify_signature(key, message, signed.signature())) {
            Some(Ok(())) => Ok(HandshakeSignatureValid::assertion()),
            _ if certificate.has_weak_key() => Err(refused(TlsError::WeakKey)),
            _ => Err(refused(TlsError::KeyNotProven)),
        }
    }
}

fn refused(error: TlsError) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.verify(end_entity, intermediates, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(error) => Err(refused(error)),
        }
    }

    /// In TLS 1.2 a scheme such as ECDSA_NISTP256_SHA256 fixes the hash, not the curve.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.holds_key(message, cert, dss, usize::MAX)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let old =
            [SignatureScheme::RSA_PKCS1_SHA256, SignatureScheme::RSA_PKCS1_SHA384, SignatureScheme::RSA_PKCS1_SHA512];
        if old.contains(&dss.scheme) {
            return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
        }
        self.holds_key(message, cert, dss, 1)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
