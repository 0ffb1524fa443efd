//! From the server's certificate to one that is trusted, as OpenSSL goes there with libpq's settings.
//!
//! A chain ends at a certificate that issued itself and is trusted, byte for byte; an intermediate one alone is no end, since libpq does
//! not set `X509_V_FLAG_PARTIAL_CHAIN`. So a self-signed certificate of a server is trusted if it is itself among the roots, whatever it
//! says of being an authority, and X.509 v1 roots count.
//!
//! Source: `check_extensions`, `check_revocation`, `internal_verify` in OpenSSL `crypto/x509/x509_vfy.c`, `check_purpose_ssl_server` in
//! `crypto/x509/v3_purp.c`.

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};

use super::certificate::{BadSignature, Certificate, shown_name};
use super::error::TlsError;
use super::names;
use super::revocation::RevocationList;

/// OpenSSL's limit is 100; nobody has such chains, and each step costs a signature.
const DEPTH_MAX: usize = 10;
const SENT_MAX: usize = 32;
/// A server may send many certificates of one name; they are not all tried.
const SIGNATURES_MAX: u32 = 100;

/// Whom to believe.
#[derive(Debug)]
pub(super) struct Trust {
    pub(super) roots: Vec<CertificateDer<'static>>,
    /// `None`: revocation is not looked at.
    pub(super) lists: Option<Lists>,
    /// Where the roots came from, for messages.
    pub(super) source: String,
}

#[derive(Debug)]
pub(super) struct Lists {
    pub(super) lists: Vec<CertificateRevocationListDer<'static>>,
    pub(super) source: String,
}

struct Search<'a> {
    trust: &'a Trust,
    roots: Vec<Certificate<'a>>,
    sent: Vec<Certificate<'a>>,
    algorithms: &'a WebPkiSupportedAlgorithms,
    now: i64,
    signatures_left: u32,
    /// The first reason why a chain that was whole did not do.
    whole_but: Option<TlsError>,
    bad_signature: Option<TlsError>,
    /// The longest way that led to nobody known: its length, and who is missing.
    dead_end: (usize, &'a [u8]),
}

/// `now` in seconds since 1970. `others` are what the server sent along.
pub(super) fn verify<'a>(
    leaf: &Certificate<'a>,
    others: &'a [CertificateDer<'_>],
    trust: &'a Trust,
    algorithms: &'a WebPkiSupportedAlgorithms,
    now: i64,
) -> Result<(), TlsError> {
    // What cannot be read among them is not needed for a chain that works.
    let roots = trust.roots.iter().filter_map(|der| Certificate::parse(der).ok()).collect();
    let sent = others.iter().take(SENT_MAX).filter_map(|der| Certificate::parse(der).ok()).collect();
    let mut search = Search {
        trust,
        roots,
        sent,
        algorithms,
        now,
        signatures_left: SIGNATURES_MAX,
        whole_but: None,
        bad_signature: None,
        dead_end: (0, leaf.issuer),
    };
    if search.climb(&mut vec![leaf.clone()]) {
        return Ok(());
    }
    Err(search.whole_but.or(search.bad_signature).unwrap_or_else(|| {
        let (who, roots) = (who(leaf, 0), trust.source.clone());
        if leaf.is_self_issued() {
            return TlsError::SelfSigned { who, roots };
        }
        TlsError::UnknownIssuer { who, issuer: shown_name(search.dead_end.1), roots }
    }))
}

impl<'a> Search<'a> {
    fn climb(&mut self, path: &mut Vec<Certificate<'a>>) -> bool {
        let last = path[path.len() - 1].clone();
        if last.is_self_issued() && self.roots.iter().any(|root| root.der == last.der) {
            return match self.judge(path) {
                Ok(()) => true,
                Err(error) => {
                    self.whole_but.get_or_insert(error);
                    false
                }
            };
        }
        if path.len() == DEPTH_MAX {
            return false;
        }
        let issuers: Vec<Certificate<'a>> =
            self.roots.iter().chain(&self.sent).filter(|issuer| issuer.subject == last.issuer).cloned().collect();
        let is_new = |issuer: &Certificate<'_>| !path.iter().any(|member| member.der == issuer.der);
        if !issuers.iter().any(is_new) && path.len() > self.dead_end.0 {
            self.dead_end = (path.len(), last.issuer);
        }
        for issuer in issuers {
            if path.iter().any(|member| member.der == issuer.der) {
                continue;
            }
            let Some(left) = self.signatures_left.checked_sub(1) else { return false };
            self.signatures_left = left;
            if let Err(bad) = last.is_signed_by(&issuer, self.algorithms) {
                let why = match bad {
                    BadSignature::Wrong => format!("\"{}\" did not sign it", shown_name(last.issuer)),
                    BadSignature::Unsupported => {
                        "its signature is of a kind that is not accepted (SHA-1, or RSA of less than 2048 bits)"
                            .to_owned()
                    }
                };
                self.bad_signature.get_or_insert(unfit(&last, path.len() - 1, why));
                continue;
            }
            path.push(issuer);
            let found = self.climb(path);
            path.pop();
            if found {
                return true;
            }
        }
        false
    }

    /// A whole chain, the server's certificate first.
    fn judge(&self, path: &[Certificate<'_>]) -> Result<(), TlsError> {
        let mut authorities_below = 0;
        for (at, certificate) in path.iter().enumerate() {
            self.within_its_time(certificate, at)?;
            if let Some(id) = &certificate.unknown_critical {
                return Err(unfit(certificate, at, format!("its critical extension {id} is not understood")));
            }
            if !certificate.is_for_servers() {
                return Err(unfit(certificate, at, "its extended key usage does not allow TLS servers".to_owned()));
            }
            if at == 0 {
                if !certificate.may_serve() {
                    return Err(unfit(certificate, at, "its key usage does not allow TLS servers".to_owned()));
                }
                continue;
            }
            if !certificate.may_issue() {
                return Err(unfit(certificate, at, "it issued others and is no authority".to_owned()));
            }
            if let Some((_, Some(below))) = certificate.authority
                && authorities_below > below
            {
                return Err(unfit(certificate, at, "it issued more authorities in a row than it may".to_owned()));
            }
            if !certificate.is_self_issued() {
                authorities_below += 1;
            }
            if let Some(constraints) = &certificate.constraints
                && !names::within(&path[0], constraints)
            {
                let why = format!("\"{}\" may not issue for its names", shown_name(certificate.subject));
                return Err(unfit(&path[0], 0, why));
            }
        }
        let Some(lists) = &self.trust.lists else { return Ok(()) };
        let known: Vec<RevocationList<'_>> =
            lists.lists.iter().filter_map(|der| RevocationList::parse(der).ok()).collect();
        for (at, certificate) in path.iter().enumerate() {
            let issuer = path.get(at + 1).unwrap_or(certificate);
            self.not_revoked(&who(certificate, at), certificate, issuer, &known, &lists.source)?;
        }
        Ok(())
    }

    fn within_its_time(&self, certificate: &Certificate<'_>, at: usize) -> Result<(), TlsError> {
        let who = || who(certificate, at);
        if self.now < certificate.not_before {
            return Err(TlsError::NotYetValid { who: who(), from: shown_time(certificate.not_before) });
        }
        if self.now > certificate.not_after {
            return Err(TlsError::Expired { who: who(), on: shown_time(certificate.not_after) });
        }
        Ok(())
    }

    /// Every certificate of the chain needs a current list of its issuer, the root's own included (`X509_V_FLAG_CRL_CHECK_ALL`).
    fn not_revoked(
        &self,
        who: &str,
        certificate: &Certificate<'_>,
        issuer: &Certificate<'_>,
        known: &[RevocationList<'_>],
        source: &str,
    ) -> Result<(), TlsError> {
        let name = || shown_name(certificate.issuer);
        let mut current = false;
        let mut ended = None;
        for list in known.iter().filter(|list| list.issuer == certificate.issuer && !list.is_partial) {
            if list.this_update > self.now || !list.is_signed_by(issuer, self.algorithms) {
                continue;
            }
            // An old list still tells what was revoked by then.
            if list.names(certificate.serial).unwrap_or(true) {
                return Err(TlsError::Revoked { who: who.to_owned(), issuer: name() });
            }
            match list.next_update {
                Some(next) if next < self.now => ended = ended.max(Some(next)),
                _ => current = true,
            }
        }
        match (current, ended) {
            (true, _) => Ok(()),
            (false, Some(on)) => Err(TlsError::OldRevocationList { issuer: name(), on: shown_time(on) }),
            (false, None) => Err(TlsError::NoRevocationList { issuer: name(), lists: source.to_owned() }),
        }
    }
}

fn unfit(certificate: &Certificate<'_>, at: usize, why: String) -> TlsError {
    TlsError::Unfit { who: who(certificate, at), why }
}

/// The member of a chain, for people.
fn who(certificate: &Certificate<'_>, at: usize) -> String {
    let name = shown_name(certificate.subject);
    if at == 0 {
        format!("the server's certificate (\"{name}\")")
    } else {
        format!("the certificate of the authority \"{name}\"")
    }
}

fn shown_time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| "a day far away".to_owned(), |time| time.to_string())
}
