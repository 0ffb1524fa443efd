//! Certificates of every kind that servers have, made anew for each test.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber, SignatureAlgorithm, SigningKey, date_time_ymd,
};

/// A certificate with its key: an authority, a server or a client.
pub struct Identity {
    pub params: CertificateParams,
    pub key: KeyPair,
    /// The certificate as PEM.
    pub pem: String,
}

/// Parameters with a common name and nothing else.
pub fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2090, 1, 1);
    params
}

pub fn authority(name: &str) -> CertificateParams {
    let mut params = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// A server of these names and addresses; the first is the common name as well.
pub fn server(names: &[&str]) -> CertificateParams {
    let mut params = named(names[0]);
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    params.subject_alt_names = CertificateParams::new(names).expect("names").subject_alt_names;
    params
}

impl Identity {
    pub fn self_signed(params: CertificateParams) -> Identity {
        Identity::self_signed_by(params, &rcgen::PKCS_ECDSA_P256_SHA256)
    }

    pub fn self_signed_by(params: CertificateParams, algorithm: &'static SignatureAlgorithm) -> Identity {
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Identity { params, key, pem }
    }

    /// A certificate of this authority, whether it may issue one or not.
    pub fn issue(&self, params: CertificateParams) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let by = Issuer::from_params(&self.params, &self.key);
        let pem = params.signed_by(&key, &by).expect("a certificate").pem();
        Identity { params, key, pem }
    }

    /// PKCS #8 v1, since OpenSSL does not read v2, which holds the public key as well.
    pub fn key_pem(&self) -> String {
        let der = self.key.serialize_der();
        let (_version, rest) = split(inner(&der));
        let (algorithm, rest) = split(rest);
        let (key, _public) = split(rest);
        pem_text("PRIVATE KEY", &wrap(0x30, &[&[2, 1, 0], algorithm, key].concat()))
    }

    /// The same certificate as X.509 v1, as `openssl x509 -req` writes it: no version, no extensions.
    pub fn into_v1(mut self, signed_by: Option<&Identity>) -> Identity {
        let der = pem_body(&self.pem);
        let content = inner(&der);
        let (signed, after) = split(content);
        let (algorithm, _) = split(after);
        let mut fields = Vec::new();
        let mut rest = inner(signed);
        while !rest.is_empty() {
            let (field, after) = split(rest);
            // [0] is the version, [3] the extensions.
            if field[0] != 0xa0 && field[0] != 0xa3 {
                fields.extend_from_slice(field);
            }
            rest = after;
        }
        let signed = wrap(0x30, &fields);
        let key = signed_by.map_or(&self.key, |issuer| &issuer.key);
        let signature = key.sign(&signed).expect("a signature");
        let bits = wrap(0x03, &[&[0], signature.as_slice()].concat());
        self.pem = pem_text("CERTIFICATE", &wrap(0x30, &[signed, algorithm.to_vec(), bits].concat()));
        self
    }

    /// A list of revoked serial numbers, current until `year`.
    pub fn revoke(&self, serials: &[u64], year: i32) -> String {
        let revoked_certs = serials.iter().map(|&serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2021, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let by = Issuer::from_params(&self.params, &self.key);
        list.signed_by(&by).expect("a list").pem().expect("PEM")
    }
}

// -- just enough DER to take a certificate apart ----------------------------------------------------------------------

/// The first element, and what follows it.
fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    bytes.split_at(header(bytes).0 + header(bytes).1)
}

fn inner(element: &[u8]) -> &[u8] {
    &element[header(element).0..]
}

/// Lengths of header and body.
fn header(bytes: &[u8]) -> (usize, usize) {
    match bytes[1] {
        short @ ..=0x7f => (2, usize::from(short)),
        0x81 => (3, usize::from(bytes[2])),
        _ => (4, usize::from(bytes[2]) << 8 | usize::from(bytes[3])),
    }
}

fn wrap(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("a certificate is short").to_be_bytes();
    let mut bytes = match body.len() {
        ..=0x7f => vec![tag, length[1]],
        0x80..=0xff => vec![tag, 0x81, length[1]],
        _ => vec![tag, 0x82, length[0], length[1]],
    };
    bytes.extend_from_slice(body);
    bytes
}

fn pem_body(pem: &str) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM").to_vec()
}

fn pem_text(label: &str, der: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for group in line.chunks(3) {
            let bits = group.iter().chain([&0, &0]).take(3).fold(0_usize, |sum, &byte| sum << 8 | usize::from(byte));
            for at in 0..4 {
                let digit = char::from(ALPHABET[bits >> (18 - 6 * at) & 63]);
                text.push(if at > group.len() { '=' } else { digit });
            }
        }
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}
