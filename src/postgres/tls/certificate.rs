//! What a certificate says, X.509 v1 included. Only read here; whether it is believed is for `chain` and `names`.
//!
//! Source: RFC 5280, "Certificate and Certificate Extensions Profile".

use rustls::crypto::WebPkiSupportedAlgorithms;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use super::der::{self, Malformed, Reader, constructed, simple};

/// Certificates of servers have a few kilobytes.
const SIZE_MAX: usize = 128 * 1024;

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];
const ORGANIZATIONAL_UNIT: &[u8] = &[0x55, 0x04, 0x0b];
/// `id-ce`, whose members are the standard extensions.
pub(super) const EXTENSIONS: &[u8] = &[0x55, 0x1d];
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
const SIGN_CERTIFICATES: u16 = 1 << 5;
const SIGN_LISTS: u16 = 1 << 6;
/// digitalSignature, keyEncipherment or keyAgreement: what a server's key is used for.
const SERVE: u16 = 1 | 1 << 2 | 1 << 4;

#[derive(Clone, Debug)]
pub(super) struct Certificate<'a> {
    pub(super) der: &'a [u8],
    signed: Signed<'a>,
    pub(super) is_v1: bool,
    pub(super) serial: &'a [u8],
    pub(super) issuer: &'a [u8],
    pub(super) subject: &'a [u8],
    pub(super) not_before: i64,
    pub(super) not_after: i64,
    key_algorithm: &'a [u8],
    key: &'a [u8],
    /// Whether it is an authority, and how many authorities may stand below it.
    pub(super) authority: Option<(bool, Option<u32>)>,
    key_usage: Option<u16>,
    extended_usage: Option<Vec<&'a [u8]>>,
    /// Subject alternative names; `None` without the extension.
    pub(super) alternative_names: Option<Vec<Name<'a>>>,
    pub(super) constraints: Option<Constraints<'a>>,
    /// An extension that must be understood and is not.
    pub(super) unknown_critical: Option<String>,
}

/// The signed part, and its signature.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signed<'a> {
    pub(super) content: &'a [u8],
    pub(super) algorithm: &'a [u8],
    signature: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name<'a> {
    Dns(&'a [u8]),
    /// An address; in constraints with its mask.
    Ip(&'a [u8]),
    /// A mail address, URI or whatever is no name of a server.
    Other(u8),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Constraints<'a> {
    pub(super) permitted: Vec<Name<'a>>,
    pub(super) excluded: Vec<Name<'a>>,
}

/// Why a signature does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadSignature {
    Wrong,
    /// Such as SHA-1, or an RSA key of less than 2048 bits.
    Unsupported,
}

impl<'a> Signed<'a> {
    pub(super) fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        let mut outer = Reader::new(der);
        let mut parts = outer.inside(der::SEQUENCE)?;
        outer.end()?;
        let content = parts.element(der::SEQUENCE)?.whole;
        let algorithm = parts.body(der::SEQUENCE)?;
        let signature = parts.bytes_of_bits()?;
        parts.end()?;
        Ok(Self { content, algorithm, signature })
    }

    pub(super) fn check(
        &self,
        by: &Certificate<'_>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), BadSignature> {
        let mut found = Err(BadSignature::Unsupported);
        for algorithm in algorithms.all {
            if algorithm.signature_alg_id().as_ref() == self.algorithm
                && algorithm.public_key_alg_id().as_ref() == by.key_algorithm
            {
                found = match algorithm.verify_signature(by.key, self.content, self.signature) {
                    Ok(()) => return Ok(()),
                    Err(_) if by.has_weak_key() => Err(BadSignature::Unsupported),
                    Err(_) => Err(BadSignature::Wrong),
                };
            }
        }
        found
    }
}

impl<'a> Certificate<'a> {
    pub(super) fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        if der.len() > SIZE_MAX {
            return Err(Malformed);
        }
        let signed = Signed::parse(der)?;
        let mut fields = Reader::new(signed.content).inside(der::SEQUENCE)?;
        let version = match fields.optional(constructed(0))? {
            None => 0,
            Some(version) => Reader::new(version).small()?,
        };
        let serial = fields.body(der::INTEGER)?;
        // The signed part names the algorithm as well, or it could be exchanged.
        if fields.body(der::SEQUENCE)? != signed.algorithm || version > 2 {
            return Err(Malformed);
        }
        let issuer = fields.element(der::SEQUENCE)?.whole;
        let mut validity = fields.inside(der::SEQUENCE)?;
        let (not_before, not_after) = (validity.time()?, validity.time()?);
        let subject = fields.element(der::SEQUENCE)?.whole;
        let mut key_info = fields.inside(der::SEQUENCE)?;
        let (key_algorithm, key) = (key_info.body(der::SEQUENCE)?, key_info.bytes_of_bits()?);
        // The unique identifiers of v2, which nobody uses.
        fields.optional(simple(1))?;
        fields.optional(simple(2))?;
        let mut certificate = Self {
            der,
            signed,
            is_v1: version == 0,
            serial,
            issuer,
            subject,
            not_before,
            not_after,
            key_algorithm,
            key,
            authority: None,
            key_usage: None,
            extended_usage: None,
            alternative_names: None,
            constraints: None,
            unknown_critical: None,
        };
        if let Some(extensions) = fields.optional(constructed(3))? {
            for_extensions(extensions, |id, critical, value| certificate.extension(id, critical, value))?;
        }
        fields.end()?;
        Ok(certificate)
    }

    fn extension(&mut self, id: &[u8], critical: bool, value: &'a [u8]) -> Result<(), Malformed> {
        let mut value = Reader::new(value);
        match id.strip_prefix(EXTENSIONS) {
            // keyUsage
            Some([15]) => self.key_usage = Some(usage(value.body(der::BIT_STRING)?)?),
            // subjectAltName
            Some([17]) => self.alternative_names = Some(general_names(value.inside(der::SEQUENCE)?)?),
            // basicConstraints
            Some([19]) => {
                let mut parts = value.inside(der::SEQUENCE)?;
                let is_authority = parts.boolean(false)?;
                let below = parts.optional(der::INTEGER)?.map(der::small).transpose()?;
                self.authority = Some((is_authority, below));
            }
            // nameConstraints
            Some([30]) => {
                let mut parts = value.inside(der::SEQUENCE)?;
                let permitted = parts.optional(constructed(0))?.map_or(Ok(Vec::new()), subtrees)?;
                let excluded = parts.optional(constructed(1))?.map_or(Ok(Vec::new()), subtrees)?;
                self.constraints = Some(Constraints { permitted, excluded });
            }
            // extKeyUsage
            Some([37]) => {
                let mut parts = value.inside(der::SEQUENCE)?;
                let mut usages = Vec::new();
                while !parts.is_empty() {
                    usages.push(parts.oid()?);
                }
                self.extended_usage = Some(usages);
            }
            // Policies (32, 33, 36, 54) restrict nothing unless somebody asks for one; keys (14, 35) only help to find issuers.
            Some([14 | 32 | 33 | 35 | 36 | 54]) => {}
            _ if critical => self.unknown_critical = Some(der::shown_oid(id)),
            _ => {}
        }
        Ok(())
    }

    pub(super) fn is_self_issued(&self) -> bool {
        self.issuer == self.subject
    }

    pub(super) fn is_signed_by(
        &self,
        by: &Certificate<'_>,
        known: &WebPkiSupportedAlgorithms,
    ) -> Result<(), BadSignature> {
        self.signed.check(by, known)
    }

    /// Source: `check_ca` in OpenSSL `crypto/x509/v3_purp.c`: an authority says so, is an X.509 v1 root, or at least may sign.
    pub(super) fn may_issue(&self) -> bool {
        if self.key_usage.is_some_and(|usage| usage & SIGN_CERTIFICATES == 0) {
            return false;
        }
        match self.authority {
            Some((is_authority, _)) => is_authority,
            None => (self.is_v1 && self.is_self_issued()) || self.key_usage.is_some(),
        }
    }

    pub(super) fn may_sign_lists(&self) -> bool {
        self.key_usage.is_none_or(|usage| usage & SIGN_LISTS != 0)
    }

    /// No list of purposes, or one with "TLS server". Holds for authorities as well.
    pub(super) fn is_for_servers(&self) -> bool {
        self.extended_usage.as_ref().is_none_or(|usages| usages.contains(&SERVER_AUTH))
    }

    pub(super) fn may_serve(&self) -> bool {
        self.key_usage.is_none_or(|usage| usage & SERVE != 0)
    }

    /// An RSA key of less than 2048 bits, which no signature is believed of.
    pub(super) fn has_weak_key(&self) -> bool {
        let is_rsa = Reader::new(self.key_algorithm).oid() == Ok(RSA);
        let modulus = Reader::new(self.key).inside(der::SEQUENCE).and_then(|mut parts| parts.body(der::INTEGER));
        is_rsa && modulus.is_ok_and(|modulus| modulus.iter().skip_while(|&&byte| byte == 0).count() < 256)
    }

    /// The first common name, as bytes.
    pub(super) fn common_name(&self) -> Option<&'a [u8]> {
        attribute(self.subject, COMMON_NAME)
    }

    /// The public key for one of rustls' own algorithms: (algorithm, key).
    pub(super) fn public_key(&self) -> (&'a [u8], &'a [u8]) {
        (self.key_algorithm, self.key)
    }

    /// The hash of the whole certificate by the hash of its signature, MD5 and SHA-1 replaced by SHA-256; `None` where the signature has
    /// no hash of its own (Ed25519).
    ///
    /// Source: RFC 5929, "The 'tls-server-end-point' Channel Binding Type".
    pub(super) fn end_point(&self) -> Option<Vec<u8>> {
        let mut parts = Reader::new(self.signed.algorithm);
        let id = parts.oid().ok()?;
        let bits = match id {
            // RSA with MD5, SHA-1, SHA-2
            [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, kind] => match kind {
                4 | 5 | 11 => 256,
                12 => 384,
                13 => 512,
                14 => 224,
                10 => pss_hash(parts)?,
                _ => return None,
            },
            // ECDSA with SHA-1, SHA-2
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1] | [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2] => 256,
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 1] => 224,
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3] => 384,
            [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4] => 512,
            _ => return None,
        };
        Some(match bits {
            224 => Sha224::digest(self.der).to_vec(),
            384 => Sha384::digest(self.der).to_vec(),
            512 => Sha512::digest(self.der).to_vec(),
            _ => Sha256::digest(self.der).to_vec(),
        })
    }
}

/// The hash that the parameters of RSASSA-PSS name; SHA-1 by default, which becomes SHA-256.
fn pss_hash(mut parameters: Reader<'_>) -> Option<u32> {
    let mut parts = parameters.inside(der::SEQUENCE).ok()?;
    let Some(hash) = parts.optional(constructed(0)).ok()? else { return Some(256) };
    match Reader::new(hash).inside(der::SEQUENCE).ok()?.oid().ok()? {
        [0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, kind] => match kind {
            1 => Some(256),
            2 => Some(384),
            3 => Some(512),
            4 => Some(224),
            _ => None,
        },
        [0x2b, 0x0e, 3, 2, 0x1a] => Some(256),
        _ => None,
    }
}

pub(super) fn for_extensions<'a>(
    list: &'a [u8],
    mut each: impl FnMut(&'a [u8], bool, &'a [u8]) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    let mut extensions = Reader::new(list).inside(der::SEQUENCE)?;
    while !extensions.is_empty() {
        let mut extension = extensions.inside(der::SEQUENCE)?;
        let (id, critical) = (extension.oid()?, extension.boolean(false)?);
        each(id, critical, extension.body(der::OCTET_STRING)?)?;
    }
    Ok(())
}

/// Bit n of the BIT STRING as bit n of a number.
fn usage(bits: &[u8]) -> Result<u16, Malformed> {
    let [_unused, bytes @ ..] = bits else { return Err(Malformed) };
    let at = |index: usize| bytes.get(index).map_or(0, |byte: &u8| u16::from(byte.reverse_bits()));
    Ok(at(0) | at(1) << 8)
}

fn general_names(mut list: Reader<'_>) -> Result<Vec<Name<'_>>, Malformed> {
    let mut names = Vec::new();
    while !list.is_empty() {
        let element = list.any()?;
        names.push(general_name(element.tag, element.body));
    }
    Ok(names)
}

fn general_name(tag: u8, body: &[u8]) -> Name<'_> {
    if tag == simple(2) {
        Name::Dns(body)
    } else if tag == simple(7) {
        Name::Ip(body)
    } else {
        Name::Other(tag & 0x1f)
    }
}

fn subtrees(list: &[u8]) -> Result<Vec<Name<'_>>, Malformed> {
    let mut list = Reader::new(list);
    let mut names = Vec::new();
    while !list.is_empty() {
        let base = list.inside(der::SEQUENCE)?.any()?;
        names.push(general_name(base.tag, base.body));
    }
    Ok(names)
}

/// The first value of an attribute of a distinguished name.
fn attribute<'a>(name: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let mut sets = Reader::new(name).inside(der::SEQUENCE).ok()?;
    while !sets.is_empty() {
        let mut set = sets.inside(der::SET).ok()?;
        while !set.is_empty() {
            let mut pair = set.inside(der::SEQUENCE).ok()?;
            if pair.oid().ok()? == wanted {
                return pair.any().ok().map(|value| value.body);
            }
        }
    }
    None
}

/// A distinguished name for people: its common name, else its organisation.
pub(super) fn shown_name(name: &[u8]) -> String {
    [COMMON_NAME, ORGANIZATIONAL_UNIT, ORGANIZATION]
        .into_iter()
        .find_map(|wanted| attribute(name, wanted))
        .map_or_else(|| "without a name".to_owned(), shown_bytes)
}

/// Text of a certificate for people: short, printable.
pub(super) fn shown_bytes(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).take(100).collect()
}
