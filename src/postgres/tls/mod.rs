//! TLS to the server: libpq's options, its rules for certificates, and the handshake by rustls.
//!
//! Every file is read at each connection. Nothing is remembered from one to the next, so a renewed certificate counts at once and each
//! handshake is a whole one.

mod certificate;
mod chain;
mod der;
mod error;
mod files;
mod names;
mod revocation;
mod settings;
#[cfg(test)]
mod tests;
mod verifier;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, CertificateError, ClientConfig, InconsistentKeys, ProtocolVersion, SignatureScheme};
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub use error::TlsError;
pub use settings::SslMode;
pub(super) use settings::{Binding, TlsSettings, choose};

use certificate::Certificate;
use chain::{Lists, Trust};
use settings::{CertMode, Named, Roots, Version};
use verifier::Verifier;

/// How PostgreSQL's protocol calls itself in TLS.
const PROTOCOL: &[u8] = b"postgresql";

/// rustls reads 4 KiB at a time, which is a system call each; this is read at once.
const READ_BUFFER: usize = 64 * 1024;

/// A connection inside TLS.
#[derive(Debug)]
pub(super) struct TlsSocket {
    pub(super) stream: TlsStream<BufReader<TcpStream>>,
    pub(super) facts: TlsFacts,
}

#[derive(Clone, Debug)]
pub(super) struct TlsFacts {
    pub(super) version: &'static str,
    /// The certificate led to one that is trusted.
    pub(super) is_verified: bool,
    /// And is for the host's name.
    pub(super) is_for_host: bool,
    /// What SCRAM binds to; `None`: this certificate has no such hash.
    pub(super) end_point: Option<Vec<u8>>,
}

/// The handshake, on a connection whose other side is ready for it.
pub(super) async fn handshake(
    settings: &TlsSettings,
    host: Option<&str>,
    stream: TcpStream,
) -> Result<TlsSocket, TlsError> {
    let (read, name) = (settings.clone(), host.map(str::to_owned));
    // Reads files.
    let prepared = tokio::task::spawn_blocking(move || Prepared::new(&read, name)).await;
    let prepared = prepared.map_err(|error| TlsError::Handshake { why: error.to_string() })??;
    let connector = TlsConnector::from(Arc::new(prepared.config));
    let stream = BufReader::with_capacity(READ_BUFFER, stream);
    let stream = connector.connect(prepared.name, stream).await.map_err(|error| {
        if settings.direct && matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) {
            // A server that expects the old request first just hangs up.
            return TlsError::NoProtocol;
        }
        of_io(&error).unwrap_or_else(|| TlsError::Handshake { why: error.to_string() })
    })?;
    let session = stream.get_ref().1;
    if settings.direct && session.alpn_protocol() != Some(PROTOCOL) {
        return Err(TlsError::NoProtocol);
    }
    if settings.cert_mode == CertMode::Require {
        if !prepared.client.asked.load(Ordering::Relaxed) {
            return Err(TlsError::NoCertificateAsked);
        }
        if prepared.client.key.is_none() {
            return Err(TlsError::NoCertificateSent);
        }
    }
    let leaf = session.peer_certificates().and_then(<[_]>::first).ok_or(TlsError::Unreadable)?;
    let facts = TlsFacts {
        version: match session.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLS 1.3",
            _ => "TLS 1.2",
        },
        is_verified: prepared.is_verified,
        is_for_host: settings.mode == SslMode::VerifyFull,
        end_point: Certificate::parse(leaf).ok().and_then(|leaf| leaf.end_point()),
    };
    Ok(TlsSocket { stream, facts })
}

struct Prepared {
    config: ClientConfig,
    name: ServerName<'static>,
    client: Arc<Client>,
    is_verified: bool,
}

impl Prepared {
    fn new(settings: &TlsSettings, host: Option<String>) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let trust = trust(settings)?;
        let is_verified = trust.is_some();
        let verified_host = match (settings.mode, &host) {
            (SslMode::VerifyFull, None) => return Err(TlsError::NoHost),
            (SslMode::VerifyFull, Some(host)) => Some(host.clone()),
            _ => None,
        };
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier { algorithms, trust, host: verified_host });
        let client = Arc::new(Client { key: client_key(settings, &provider)?, asked: AtomicBool::new(false) });
        let mut versions = Vec::new();
        if settings.newest >= Version::Tls13 {
            versions.push(&rustls::version::TLS13);
        }
        if settings.oldest <= Version::Tls12 {
            versions.push(&rustls::version::TLS12);
        }
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|error| TlsError::Handshake { why: error.to_string() })?;
        let mut config =
            builder.dangerous().with_custom_certificate_verifier(verifier).with_client_cert_resolver(client.clone());
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        config.resumption = Resumption::disabled();
        // The verifier knows the host by itself; this name is only what is sent, and an address is not.
        let name = host.and_then(|host| ServerName::try_from(host).ok());
        config.enable_sni = settings.send_name && matches!(name, Some(ServerName::DnsName(_)));
        let name = name.unwrap_or_else(|| ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into()));
        Ok(Self { config, name, client, is_verified })
    }
}

/// With a root certificate there, even `prefer` and `require` verify the chain; without, only the verifying modes insist.
fn trust(settings: &TlsSettings) -> Result<Option<Trust>, TlsError> {
    let missing = |where_: String| {
        if settings.mode >= SslMode::VerifyCa {
            Err(TlsError::NoRoot { mode: settings.mode, where_ })
        } else {
            Ok(None)
        }
    };
    let (roots, source) = match &settings.roots {
        Roots::System => (files::system_roots()?, "the system's authorities".to_owned()),
        Roots::File(None) => return missing("~/.postgresql/root.crt (HOME is not set)".to_owned()),
        Roots::File(Some(path)) if !files::exists("sslrootcert", path)? => return missing(path.display().to_string()),
        Roots::File(Some(path)) => (files::certificates("sslrootcert", path)?, path.display().to_string()),
    };
    let mut found = Vec::new();
    let mut sources = Vec::new();
    if let Some(Named { path, given }) = &settings.list
        && (*given || files::exists("sslcrl", path)?)
    {
        found.extend(files::revocation_lists("sslcrl", path)?);
        sources.push(path.display().to_string());
    }
    if let Some(path) = &settings.list_folder {
        found.extend(files::revocation_folder(path)?);
        sources.push(path.display().to_string());
    }
    let lists = (!sources.is_empty()).then(|| Lists { lists: found, source: sources.join(" and ") });
    Ok(Some(Trust { roots, lists, source }))
}

/// A certificate that is not there is not sent; the server decides whether it needs one.
fn client_key(settings: &TlsSettings, provider: &CryptoProvider) -> Result<Option<Arc<CertifiedKey>>, TlsError> {
    let Some(path) = &settings.certificate else { return Ok(None) };
    if settings.cert_mode == CertMode::Disable || !files::exists("sslcert", path)? {
        return Ok(None);
    }
    let chain = files::certificates("sslcert", path)?;
    let key_path = settings.key.as_ref().ok_or_else(|| TlsError::File {
        setting: "sslkey",
        path: "~/.postgresql/postgresql.key".into(),
        why: "HOME is not set".into(),
    })?;
    let unusable = |why: &str| TlsError::File { setting: "sslkey", path: key_path.clone(), why: why.to_owned() };
    let key = provider
        .key_provider
        .load_private_key(files::private_key(key_path)?)
        .map_err(|_| unusable("it is not a key for RSA (2048 bits or more), ECDSA or Ed25519"))?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(unusable(&format!("it does not belong to the certificate in {}", path.display())))
        }
        // An X.509 v1 certificate, which rustls cannot compare; the server will.
        _ => Ok(Some(Arc::new(certified))),
    }
}

/// What is sent when the server asks for a certificate.
#[derive(Debug)]
struct Client {
    key: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl ResolvesClientCert for Client {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Relaxed);
        self.key.clone()
    }

    /// True even without one: only then is `resolve` asked, and `sslcertmode=require` has to know.
    fn has_certs(&self) -> bool {
        true
    }
}

/// What rustls says through an error of the stream; `None`: the error is not about TLS. In TLS 1.3 a server refuses a client's
/// certificate only after the handshake, so it comes with the first read.
pub(super) fn of_io(error: &io::Error) -> Option<TlsError> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            other.0.downcast_ref::<TlsError>().cloned().unwrap_or(TlsError::Unreadable)
        }
        rustls::Error::AlertReceived(alert) => of_alert(*alert),
        rustls::Error::PeerIncompatible(why) => TlsError::NothingInCommon { why: format!("{why:?}") },
        rustls::Error::InvalidMessage(_) => TlsError::Handshake { why: "the answer was no TLS".to_owned() },
        other => TlsError::Handshake { why: other.to_string() },
    })
}

fn of_alert(alert: AlertDescription) -> TlsError {
    use AlertDescription as Alert;
    let said = |text: &str| text.to_owned();
    match alert {
        Alert::ProtocolVersion => TlsError::NothingInCommon { why: said("the server wants another version") },
        Alert::HandshakeFailure | Alert::InsufficientSecurity => {
            TlsError::NothingInCommon { why: said("the server found nothing that it accepts") }
        }
        Alert::NoApplicationProtocol => TlsError::NoProtocol,
        Alert::CertificateRequired => TlsError::ClientRefused { alert: said("it wants one, and none was sent") },
        Alert::UnknownCA => TlsError::ClientRefused { alert: said("its authority is not known there") },
        Alert::CertificateExpired => TlsError::ClientRefused { alert: said("it has expired") },
        Alert::CertificateRevoked => TlsError::ClientRefused { alert: said("it was revoked") },
        Alert::BadCertificate | Alert::UnsupportedCertificate | Alert::CertificateUnknown | Alert::AccessDenied => {
            TlsError::ClientRefused { alert: format!("{alert:?}") }
        }
        other => TlsError::Handshake { why: format!("the server answered with the alert {other:?}") },
    }
}
