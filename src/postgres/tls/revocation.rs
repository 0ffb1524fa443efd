//! What a revocation list says. Whether it is believed is for `chain`.
//!
//! Source: RFC 5280, "CRL and CRL Extensions Profile".

use rustls::crypto::WebPkiSupportedAlgorithms;

use super::certificate::{Certificate, EXTENSIONS, Signed, for_extensions};
use super::der::{self, Malformed, Reader, constructed};

/// The serial numbers that an authority has taken back.
#[derive(Clone, Debug)]
pub(super) struct RevocationList<'a> {
    signed: Signed<'a>,
    pub(super) issuer: &'a [u8],
    pub(super) this_update: i64,
    pub(super) next_update: Option<i64>,
    revoked: &'a [u8],
    /// It covers only a part, or says something that is not understood: it proves nothing.
    pub(super) is_partial: bool,
}

impl<'a> RevocationList<'a> {
    /// Lists may be long; their size was bounded when the file was read.
    pub(super) fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        let signed = Signed::parse(der)?;
        let mut fields = Reader::new(signed.content).inside(der::SEQUENCE)?;
        fields.optional(der::INTEGER)?;
        if fields.body(der::SEQUENCE)? != signed.algorithm {
            return Err(Malformed);
        }
        let issuer = fields.element(der::SEQUENCE)?.whole;
        let this_update = fields.time()?;
        let before = fields;
        let next_update = match fields.any() {
            Ok(element) if matches!(element.tag, der::UTC_TIME | der::GENERALIZED_TIME) => {
                Some(Reader::new(element.whole).time()?)
            }
            _ => {
                fields = before;
                None
            }
        };
        let revoked = fields.optional(der::SEQUENCE)?.unwrap_or_default();
        let mut is_partial = false;
        if let Some(extensions) = fields.optional(constructed(0))? {
            for_extensions(extensions, |id, critical, _| {
                // The list's number (20) and the issuer's key (35) are only for finding it.
                is_partial |= critical && !matches!(id.strip_prefix(EXTENSIONS), Some([20 | 35]));
                Ok(())
            })?;
        }
        Ok(Self { signed, issuer, this_update, next_update, revoked, is_partial })
    }

    pub(super) fn is_signed_by(&self, by: &Certificate<'_>, known: &WebPkiSupportedAlgorithms) -> bool {
        by.may_sign_lists() && self.signed.check(by, known).is_ok()
    }

    pub(super) fn names(&self, serial: &[u8]) -> Result<bool, Malformed> {
        let mut entries = Reader::new(self.revoked);
        while !entries.is_empty() {
            if entries.inside(der::SEQUENCE)?.body(der::INTEGER)? == serial {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
