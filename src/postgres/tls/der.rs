//! DER, as far as certificates and revocation lists need it. Everything is borrowed from the input, nothing is reserved by its lengths.

/// The bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

pub(super) const BOOLEAN: u8 = 0x01;
pub(super) const INTEGER: u8 = 0x02;
pub(super) const BIT_STRING: u8 = 0x03;
pub(super) const OCTET_STRING: u8 = 0x04;
pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
pub(super) const UTC_TIME: u8 = 0x17;
pub(super) const GENERALIZED_TIME: u8 = 0x18;
pub(super) const SEQUENCE: u8 = 0x30;
pub(super) const SET: u8 = 0x31;

/// `[number]`, holding other elements.
pub(super) const fn constructed(number: u8) -> u8 {
    0xa0 | number
}

/// `[number]`, replacing the tag of a simple element.
pub(super) const fn simple(number: u8) -> u8 {
    0x80 | number
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Element<'a> {
    pub(super) tag: u8,
    pub(super) body: &'a [u8],
    /// Tag, length and body.
    pub(super) whole: &'a [u8],
}

/// Elements that follow each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    pub(super) fn any(&mut self) -> Result<Element<'a>, Malformed> {
        let [tag, first, ..] = *self.0 else { return Err(Malformed) };
        // Tags of more than one byte do not occur in what is read here.
        if tag & 0x1f == 0x1f {
            return Err(Malformed);
        }
        let (header, length) = match first {
            0..=0x7f => (2, usize::from(first)),
            0x81..=0x84 => {
                let count = usize::from(first & 0x7f);
                let digits = self.0.get(2..2 + count).ok_or(Malformed)?;
                let length = digits.iter().fold(0_u64, |sum, &digit| sum << 8 | u64::from(digit));
                (2 + count, usize::try_from(length).map_err(|_| Malformed)?)
            }
            // No length before the content, or one that no certificate has.
            _ => return Err(Malformed),
        };
        let end = header.checked_add(length).ok_or(Malformed)?;
        let whole = self.0.get(..end).ok_or(Malformed)?;
        self.0 = &self.0[end..];
        Ok(Element { tag, body: &whole[header..], whole })
    }

    pub(super) fn element(&mut self, tag: u8) -> Result<Element<'a>, Malformed> {
        self.any().and_then(|element| if element.tag == tag { Ok(element) } else { Err(Malformed) })
    }

    pub(super) fn body(&mut self, tag: u8) -> Result<&'a [u8], Malformed> {
        self.element(tag).map(|element| element.body)
    }

    pub(super) fn inside(&mut self, tag: u8) -> Result<Reader<'a>, Malformed> {
        self.body(tag).map(Reader)
    }

    pub(super) fn optional(&mut self, tag: u8) -> Result<Option<&'a [u8]>, Malformed> {
        if self.peek() == Some(tag) { self.body(tag).map(Some) } else { Ok(None) }
    }

    pub(super) fn end(&self) -> Result<(), Malformed> {
        if self.is_empty() { Ok(()) } else { Err(Malformed) }
    }

    /// A BIT STRING of whole bytes.
    pub(super) fn bytes_of_bits(&mut self) -> Result<&'a [u8], Malformed> {
        match self.body(BIT_STRING)? {
            [0, bytes @ ..] => Ok(bytes),
            _ => Err(Malformed),
        }
    }

    pub(super) fn boolean(&mut self, default: bool) -> Result<bool, Malformed> {
        match self.optional(BOOLEAN)? {
            None => Ok(default),
            Some([value]) => Ok(*value != 0),
            Some(_) => Err(Malformed),
        }
    }

    /// A small number that is not negative.
    pub(super) fn small(&mut self) -> Result<u32, Malformed> {
        small(self.body(INTEGER)?)
    }

    pub(super) fn oid(&mut self) -> Result<&'a [u8], Malformed> {
        self.body(OBJECT_IDENTIFIER)
    }

    /// UTCTime or GeneralizedTime in seconds since 1970. Years that reach beyond what a timestamp holds are "never".
    pub(super) fn time(&mut self) -> Result<i64, Malformed> {
        let element = self.any()?;
        let digits = element.body.strip_suffix(b"Z").ok_or(Malformed)?;
        if !digits.iter().all(u8::is_ascii_digit) {
            return Err(Malformed);
        }
        let pair = |at: usize| i16::from(digits[at] - b'0') * 10 + i16::from(digits[at + 1] - b'0');
        let (year, rest) = match (element.tag, digits.len()) {
            // RFC 5280, "UTCTime": 50 and later are of the last century.
            (UTC_TIME, 12) => (if pair(0) >= 50 { 1900 + pair(0) } else { 2000 + pair(0) }, 2),
            (GENERALIZED_TIME, 14) => (pair(0) * 100 + pair(2), 4),
            _ => return Err(Malformed),
        };
        let part = |at: usize| i8::try_from(pair(rest + 2 * at)).map_err(|_| Malformed);
        let moment = jiff::civil::DateTime::new(year, part(0)?, part(1)?, part(2)?, part(3)?, part(4)?, 0);
        let zoned = moment.map_err(|_| Malformed)?.to_zoned(jiff::tz::TimeZone::UTC);
        Ok(zoned.map_or(i64::MAX, |zoned| zoned.timestamp().as_second()))
    }
}

pub(super) fn small(body: &[u8]) -> Result<u32, Malformed> {
    match body {
        [] => Err(Malformed),
        [first, ..] if first & 0x80 != 0 || body.len() > 4 => Err(Malformed),
        _ => Ok(body.iter().fold(0, |sum, &byte| sum << 8 | u32::from(byte))),
    }
}

/// An object identifier as people write it, such as `2.5.29.17`.
pub(super) fn shown_oid(body: &[u8]) -> String {
    let mut numbers: Vec<u64> = Vec::new();
    let mut number = 0_u64;
    for &byte in body.iter().take(32) {
        number = number.wrapping_shl(7) | u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            if numbers.is_empty() {
                let first = (number / 40).min(2);
                numbers.extend([first, number - 40 * first]);
            } else {
                numbers.push(number);
            }
            number = 0;
        }
    }
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_beyond_the_input_and_odd_forms_are_refused() {
        assert_eq!(Reader::new(b"\x02\x01\x05").small(), Ok(5));
        assert_eq!(Reader::new(b"\x04\x81\x03abc").body(OCTET_STRING), Ok(b"abc".as_slice()));
        for bytes in [
            b"".as_slice(),
            b"\x02",
            b"\x02\x02\x05",
            b"\x02\x80\x05\x00\x00",
            b"\x02\x84\xff\xff\xff\xff",
            b"\x02\x85\x00\x00\x00\x00\x01\x05",
            b"\x1f\x01\x00",
            b"\x02\x01\xff",
            b"\x02\x00",
            b"\x02\x05\x01\x01\x01\x01\x01",
        ] {
            assert_eq!(Reader::new(bytes).small(), Err(Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn times_are_read_in_both_forms() {
        assert_eq!(Reader::new(b"\x17\x0d700101000001Z").time(), Ok(1));
        assert_eq!(Reader::new(b"\x18\x0f20380119031408Z").time(), Ok(1 << 31));
        assert_eq!(Reader::new(b"\x18\x0f99991231235959Z").time(), Ok(i64::MAX));
        for bad in [b"\x17\x0d701301000000Z".as_slice(), b"\x17\x0d70010100000 Z", b"\x17\x0b7001010000Z", b"\x17\x00"]
        {
            assert_eq!(Reader::new(bad).time(), Err(Malformed), "{bad:?}");
        }
    }

    #[test]
    fn identifiers_are_shown_as_people_write_them() {
        assert_eq!(shown_oid(&[0x55, 0x1d, 0x11]), "2.5.29.17");
        assert_eq!(shown_oid(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11]), "1.2.840.113549.1.1.11");
    }
}
