use rustls::pki_types::CertificateDer;

use super::certificate::Certificate;
use super::chain::{self, Trust};
use super::revocation::RevocationList;
use super::{TlsError, names};

const NOW: i64 = 1_800_000_000;

struct Made {
    params: rcgen::CertificateParams,
    key: rcgen::KeyPair,
    der: CertificateDer<'static>,
}

fn params(name: &str, is_authority: bool) -> rcgen::CertificateParams {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    if is_authority {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    }
    params
}

fn root(name: &str) -> Made {
    let (params, key) = (params(name, true), rcgen::KeyPair::generate().unwrap());
    let der = params.self_signed(&key).unwrap().der().clone();
    Made { params, key, der }
}

fn below(issuer: &Made, params: rcgen::CertificateParams) -> Made {
    let key = rcgen::KeyPair::generate().unwrap();
    let by = rcgen::Issuer::from_params(&issuer.params, &issuer.key);
    let der = params.signed_by(&key, &by).unwrap().der().clone();
    Made { params, key, der }
}

fn verify(leaf: &Made, sent: &[&Made], roots: &[&Made], now: i64) -> Result<(), TlsError> {
    let take = |made: &[&Made]| made.iter().map(|made| made.der.clone()).collect::<Vec<_>>();
    let trust = Trust { roots: take(roots), lists: None, source: "root.crt".into() };
    let algorithms = rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms;
    chain::verify(&Certificate::parse(&leaf.der).unwrap(), &take(sent), &trust, &algorithms, now)
}

#[test]
fn a_chain_leads_to_a_root_and_to_nothing_less() {
    let (top, other) = (root("top"), root("other"));
    let middle = below(&top, params("middle", true));
    let leaf = below(&middle, params("leaf", false));
    assert!(verify(&leaf, &[&middle], &[&top], NOW).is_ok());
    // A root among what was sent is as good as not sent, and the middle one may lie among the roots.
    assert!(verify(&leaf, &[&other, &top, &middle], &[&other, &top], NOW).is_ok());
    assert!(verify(&leaf, &[], &[&middle, &top], NOW).is_ok());
    for (sent, roots) in [(vec![], vec![&top]), (vec![&middle], vec![&other]), (vec![&middle], vec![&middle])] {
        assert!(matches!(verify(&leaf, &sent, &roots, NOW), Err(TlsError::UnknownIssuer { .. })));
    }
    assert!(matches!(verify(&top, &[], &[&other], NOW), Err(TlsError::SelfSigned { .. })));
    assert!(verify(&top, &[], &[&top], NOW).is_ok());
    assert!(matches!(verify(&leaf, &[&middle], &[&top], 1 << 40), Err(TlsError::Expired { .. })));
    // Of the same name, with another key.
    let forged = below(&root("top"), params("leaf", false));
    assert!(matches!(verify(&forged, &[], &[&top], NOW), Err(TlsError::Unfit { .. })));
}

#[test]
fn many_certificates_of_one_name_cost_a_bounded_time() {
    let top = root("top");
    let crowd: Vec<Made> = (0..32).map(|_| below(&root("x"), params("x", true))).collect();
    let leaf = below(&crowd[0], params("leaf", false));
    let sent: Vec<&Made> = crowd.iter().collect();
    assert!(verify(&leaf, &sent, &[&top], NOW).is_err());
}

#[test]
fn every_signature_has_its_hash_for_channel_binding() {
    let length = |algorithm: &'static rcgen::SignatureAlgorithm| {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let der = params("x", false).self_signed(&key).unwrap().der().clone();
        Certificate::parse(&der).unwrap().end_point().map(|hash| hash.len())
    };
    assert_eq!(length(&rcgen::PKCS_ECDSA_P256_SHA256), Some(32));
    assert_eq!(length(&rcgen::PKCS_ECDSA_P384_SHA384), Some(48));
    assert_eq!(length(&rcgen::PKCS_ECDSA_P521_SHA512), Some(64));
    assert_eq!(length(&rcgen::PKCS_ED25519), None);
}

/// Whatever a hostile server sends instead of a certificate is an error, and nothing else.
#[test]
fn damaged_certificates_are_refused_without_a_panic() {
    let mut full = params("x", true);
    full.subject_alt_names = vec![
        rcgen::SanType::DnsName("a.example".try_into().unwrap()),
        rcgen::SanType::IpAddress([127, 0, 0, 1].into()),
    ];
    full.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::DigitalSignature];
    full.insert_extended_key_usage(rcgen::ExtendedKeyUsagePurpose::ServerAuth);
    full.name_constraints = Some(rcgen::NameConstraints {
        permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("example".into())],
        excluded_subtrees: vec![],
    });
    let key = rcgen::KeyPair::generate().unwrap();
    let der = full.self_signed(&key).unwrap().der().to_vec();
    let whole = Certificate::parse(&der).unwrap();
    assert!(whole.unknown_critical.is_none() && whole.may_issue() && whole.is_for_servers() && whole.may_serve());
    assert!(names::check(&whole, "A.example").is_ok() && names::check(&whole, "127.0.0.1").is_ok());
    let refused = names::check(&whole, "b.example").unwrap_err().to_string();
    assert!(refused.contains("a.example, 127.0.0.1") && refused.contains("b.example"), "{refused}");
    for at in 0..der.len() {
        for value in [0, 0x30, 0x7f, 0x80, 0x84, 0xff, der[at] ^ 1] {
            let mut damaged = der.clone();
            damaged[at] = value;
            if let Ok(read) = Certificate::parse(&damaged) {
                let _ = (names::check(&read, "a.example"), read.end_point(), read.may_issue());
                let _ = read.constraints.as_ref().map(|constraints| names::within(&read, constraints));
            }
            let _ = RevocationList::parse(&damaged);
        }
        assert!(Certificate::parse(&der[..at]).is_err());
    }
}
