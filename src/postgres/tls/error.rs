use std::path::PathBuf;

use super::SslMode;

/// Why there is no TLS, or not the right one. Dates are shown in UTC, names as the certificate has them. `who` is the server's
/// certificate or that of an authority above it, for people.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the server does not support TLS, and sslmode={mode} asks for it")]
    NotOffered { mode: SslMode },
    #[error("{setting} {} cannot be used: {why}", path.display())]
    File { setting: &'static str, path: PathBuf, why: String },
    #[error("sslmode={mode} needs the certificate of the server's authority, and {where_} does not exist")]
    NoRoot { mode: SslMode, where_: String },
    #[error("{who} expired on {on}")]
    Expired { who: String, on: String },
    #[error("{who} is not valid before {from}")]
    NotYetValid { who: String, from: String },
    #[error("{who} is signed by itself and is not among those in {roots}")]
    SelfSigned { who: String, roots: String },
    #[error("{who} leads to the authority \"{issuer}\", which is not in {roots}")]
    UnknownIssuer { who: String, issuer: String, roots: String },
    #[error("the server's certificate is for {names}, not for {host}")]
    OtherHost { host: String, names: String },
    #[error(
        "sslmode=verify-full compares the certificate with the host's name, and only an address is given (hostaddr)"
    )]
    NoHost,
    #[error("{who} was revoked by \"{issuer}\"")]
    Revoked { who: String, issuer: String },
    #[error("no revocation list of \"{issuer}\" is in {lists}")]
    NoRevocationList { issuer: String, lists: String },
    #[error("the revocation list of \"{issuer}\" ended on {on}")]
    OldRevocationList { issuer: String, on: String },
    #[error("{who} cannot be trusted: {why}")]
    Unfit { who: String, why: String },
    #[error("the server's certificate cannot be read")]
    Unreadable,
    #[error("the server's certificate has an RSA key of less than 2048 bits")]
    WeakKey,
    #[error("the server did not prove that it holds the key of its certificate")]
    KeyNotProven,
    #[error("the server did not ask for a client certificate, and sslcertmode=require asks for one")]
    NoCertificateAsked,
    #[error("sslcertmode=require asks for a client certificate, and there is none to send")]
    NoCertificateSent,
    #[error("the server refused our certificate: {alert}")]
    ClientRefused { alert: String },
    #[error("the server did not agree to the PostgreSQL protocol in TLS (ALPN), which sslnegotiation=direct needs")]
    NoProtocol,
    #[error("server and client have no TLS version or cipher in common: {why}")]
    NothingInCommon { why: String },
    #[error("the TLS handshake failed: {why}")]
    Handshake { why: String },
}

impl TlsError {
    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotOffered { .. } => {
                "on the server: ssl = on with a certificate, and reload; or a lower sslmode on a network that is trusted"
            }
            Self::File { setting: "sslkey", .. } => {
                "let it belong to the user that runs Walden, with mode 0600 (or to root with 0640), as PEM without a passphrase"
            }
            Self::File { .. } => "put a PEM file there that the user running Walden can read, or correct the path",
            Self::NoRoot { .. } => {
                "put the authority's certificate (or the server's own, if it is signed by itself) there, or name it by sslrootcert; `system` stands for the system's authorities"
            }
            Self::Expired { .. } => "renew that certificate and reload the server; Walden connects again by itself",
            Self::NotYetValid { .. } => "compare the clocks of this host and of the one where the certificate was made",
            Self::SelfSigned { .. } => {
                "put this certificate into the file that sslrootcert names, or let an authority sign one"
            }
            Self::UnknownIssuer { .. } => {
                "sslrootcert must hold the root certificate of the server's authority; those between belong into the server's ssl_cert_file"
            }
            Self::OtherHost { .. } => {
                "connect by a name that the certificate has (hostaddr may give the address), or make a certificate with this name as its subjectAltName"
            }
            Self::NoHost => "give the server's name by host as well",
            Self::Revoked { .. } => "give the server a new certificate and reload it",
            Self::NoRevocationList { .. } | Self::OldRevocationList { .. } => {
                "put a current list of that authority into the file or folder that sslcrl or sslcrldir name"
            }
            Self::Unfit { .. } | Self::Unreadable | Self::WeakKey => "make the server a new certificate",
            Self::NoCertificateAsked => {
                "on the server: set ssl_ca_file, so that it asks for certificates; or drop sslcertmode"
            }
            Self::NoCertificateSent => "name certificate and key by sslcert and sslkey",
            Self::ClientRefused { .. } => {
                "sslcert and sslkey must be a certificate by an authority in the server's ssl_ca_file, not expired, not revoked"
            }
            Self::NoProtocol => "sslnegotiation=direct needs PostgreSQL 17 or later; drop it for older servers",
            Self::NothingInCommon { .. } => {
                "Walden speaks TLS 1.2 and 1.3: compare ssl_min_protocol_version and ssl_max_protocol_version here and on the server"
            }
            Self::KeyNotProven => "make sure that host and port lead to your own server, and nobody in between",
            Self::Handshake { .. } => {
                "look into the server's log; make sure that host and port lead to a PostgreSQL server"
            }
        }
    }
}
