//! Whether a certificate is for a host, by libpq's rules; and name constraints of authorities.
//!
//! Source: `pgtls_verify_peer_name_matches_certificate_guts` in PostgreSQL `src/interfaces/libpq/fe-secure-openssl.c`, and
//! `wildcard_certificate_match`, `pq_verify_peer_name_matches_certificate_name` in `fe-secure-common.c`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::certificate::{Certificate, Constraints, Name, shown_bytes};
use super::error::TlsError;

/// Refuses a certificate that is not for `host`.
///
/// Alternative names of the host's kind (name or address) rule out the common name. A DNS name may be spelled like an address and then
/// matches it.
pub(super) fn check(certificate: &Certificate<'_>, host: &str) -> Result<(), TlsError> {
    let address: Option<IpAddr> = host.parse().ok();
    let names = certificate.alternative_names.as_deref().unwrap_or_default();
    let mut use_common_name = true;
    for name in names {
        let (same_kind, fits) = match name {
            Name::Dns(pattern) => (address.is_none(), matches_name(pattern, host)),
            Name::Ip(bytes) => (address.is_some(), address.is_some_and(|address| octets(address) == *bytes)),
            Name::Other(_) => (false, false),
        };
        if fits {
            return Ok(());
        }
        use_common_name &= !same_kind;
    }
    let common = certificate.common_name().filter(|_| use_common_name);
    if common.is_some_and(|common| matches_name(common, host)) {
        return Ok(());
    }
    Err(TlsError::OtherHost { host: host.to_owned(), names: shown(names, common) })
}

fn shown(names: &[Name<'_>], common: Option<&[u8]>) -> String {
    let alternative = names.iter().filter_map(|name| match name {
        Name::Dns(bytes) => Some(shown_bytes(bytes)),
        Name::Ip(bytes) => Some(shown_address(bytes)),
        Name::Other(_) => None,
    });
    let mut all: Vec<String> = alternative.chain(common.map(shown_bytes)).collect();
    let more = all.len().saturating_sub(5);
    all.truncate(5);
    match (all.is_empty(), more) {
        (true, _) => "no host at all".to_owned(),
        (false, 0) => all.join(", "),
        (false, more) => format!("{} and {more} more", all.join(", ")),
    }
}

fn shown_address(bytes: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ipv4Addr::from(bytes).to_string();
    }
    <[u8; 16]>::try_from(bytes).map_or_else(|_| "?".to_owned(), |bytes| Ipv6Addr::from(bytes).to_string())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Equal but for case, or `*.` and exactly one label in its place. A zero byte inside makes a name unusable.
fn matches_name(pattern: &[u8], host: &str) -> bool {
    let host = host.as_bytes();
    if pattern.is_empty() || pattern.contains(&0) {
        return false;
    }
    if pattern.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = pattern.strip_prefix(b"*").filter(|suffix| suffix.starts_with(b".") && suffix.len() > 1) else {
        return false;
    };
    let Some(at) = host.len().checked_sub(suffix.len()).filter(|&at| at > 0) else { return false };
    host[at..].eq_ignore_ascii_case(suffix) && !host[..at].contains(&b'.')
}

/// Whether an authority's name constraints allow the names of a server's certificate. Constraints of other kinds than DNS names and
/// addresses are not understood and so allow nothing.
///
/// Source: RFC 5280, "Name Constraints".
pub(super) fn within(certificate: &Certificate<'_>, constraints: &Constraints<'_>) -> bool {
    let mut names: Vec<Name<'_>> = certificate.alternative_names.clone().unwrap_or_default();
    if !names.iter().any(|name| matches!(name, Name::Dns(_))) {
        // The common name is taken for a host's name then.
        names.extend(certificate.common_name().map(|common| match ip_of(common) {
            Some(_) => Name::Other(0),
            None => Name::Dns(common),
        }));
    }
    let all = constraints.permitted.iter().chain(&constraints.excluded);
    // Mail addresses (1) and URIs (6) are no names of servers: a certificate without them is not restricted by them.
    if all.clone().any(|base| matches!(base, Name::Other(kind) if !matches!(kind, 1 | 6))) {
        return false;
    }
    names.iter().all(|name| {
        let covers = |base: &Name<'_>| match (name, base) {
            (Name::Dns(name), Name::Dns(base)) => below(name, base),
            (Name::Ip(address), Name::Ip(network)) => inside(address, network),
            (Name::Other(a), Name::Other(b)) => a == b,
            _ => false,
        };
        let same_kind = |base: &&Name<'_>| {
            matches!(
                (name, base),
                (Name::Dns(_), Name::Dns(_)) | (Name::Ip(_), Name::Ip(_)) | (Name::Other(_), Name::Other(_))
            )
        };
        let mut permitted = constraints.permitted.iter().filter(same_kind).peekable();
        (permitted.peek().is_none() || permitted.any(covers)) && !constraints.excluded.iter().any(covers)
    })
}

fn ip_of(text: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn below(name: &[u8], base: &[u8]) -> bool {
    let base = base.strip_prefix(b".").unwrap_or(base);
    let Some(at) = name.len().checked_sub(base.len()) else { return false };
    base.is_empty() || (name[at..].eq_ignore_ascii_case(base) && (at == 0 || name[at - 1] == b'.'))
}

fn inside(address: &[u8], network: &[u8]) -> bool {
    if network.len() != 2 * address.len() {
        return false;
    }
    let (base, mask) = network.split_at(address.len());
    address.iter().zip(base).zip(mask).all(|((a, b), m)| a & m == b & m)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// libpq's wildcard rule, case by case.
    #[test]
    fn a_star_stands_for_exactly_one_label() {
        let table = [
            ("db.example.com", "db.example.com", true),
            ("DB.Example.com", "db.example.COM", true),
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "a.b.example.com", false),
            ("d*.example.com", "db.example.com", false),
            ("db.*.com", "db.example.com", false),
            ("*", "db", false),
            ("*.", "db.", false),
            ("*.com", "db.com", true),
            ("", "", false),
            ("127.0.0.1", "127.0.0.1", true),
            ("db.example.com\0.evil.org", "db.example.com", false),
        ];
        for (pattern, host, fits) in table {
            assert_eq!(matches_name(pattern.as_bytes(), host), fits, "{pattern} for {host}");
        }
    }

    #[test]
    fn constraints_cover_what_lies_below_them() {
        assert!(below(b"a.example.com", b"example.com") && below(b"example.com", b".example.com"));
        assert!(!below(b"badexample.com", b"example.com") && !below(b"com", b"example.com"));
        assert!(inside(&[10, 1, 2, 3], &[10, 0, 0, 0, 255, 0, 0, 0]));
        assert!(
            !inside(&[11, 1, 2, 3], &[10, 0, 0, 0, 255, 0, 0, 0]) && !inside(&[10; 16], &[10, 0, 0, 0, 255, 0, 0, 0])
        );
    }
}
