use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::WalError;

/// A byte position in the WAL. As the end of a range it is exclusive: the first byte that is not in it.
///
/// Printed as PostgreSQL does, two hexadecimal halves: `A9/1F000028` (`LSN_FORMAT_ARGS` in
/// `src/include/access/xlogdefs.h`). PostgreSQL 19 and later may print leading zeros in the low half; both parse.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// `InvalidXLogRecPtr`: no position.
    pub const ZERO: Lsn = Lsn(0);

    pub const fn new(position: u64) -> Self {
        Self(position)
    }

    pub const fn get(self) -> u64 {
        self.0
    }

    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The position `bytes` further on, or `None` past the end of the 64-bit space.
    pub const fn checked_add(self, bytes: u64) -> Option<Lsn> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Lsn(sum)),
            None => None,
        }
    }

    /// The bytes from `earlier` to `self`, 0 if `earlier` is not earlier.
    pub const fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// 16 hexadecimal digits, as in the keys of gaps.
    pub fn to_hex16(self) -> String {
        format!("{:016X}", self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = WalError;

    fn from_str(text: &str) -> Result<Self, WalError> {
        let wrong = || WalError::Lsn { text: text.chars().take(64).collect() };
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        let half = |digits: &str| {
            let plain = !digits.is_empty() && digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if plain { u32::from_str_radix(digits, 16).map_err(|_| wrong()) } else { Err(wrong()) }
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_printed_as_postgresql_does_and_parsed_back() {
        for (position, text) in
            [(0, "0/0"), (0x16B3740, "0/16B3740"), (0xA9_1F00_0028, "A9/1F000028"), (u64::MAX, "FFFFFFFF/FFFFFFFF")]
        {
            assert_eq!(Lsn::new(position).to_string(), text);
            assert_eq!(text.parse::<Lsn>().unwrap(), Lsn::new(position));
        }
        assert_eq!("0/016B3740".parse::<Lsn>().unwrap(), Lsn::new(0x16B3740));
        assert_eq!(Lsn::new(0x1A).to_hex16(), "000000000000001A");
        assert_eq!(serde_json::from_str::<Lsn>("\"A/B\"").unwrap(), Lsn::new(0xA_0000_000B));
    }

    #[test]
    fn what_is_no_lsn_is_refused() {
        for text in
            ["", "/", "0/", "/0", "16B3740", "0/123456789", "0/+1", "0/-1", " 0/1", "0/1 ", "0/G", "0/1/2", "0x0/1"]
        {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }

    #[test]
    fn distances_and_sums_stop_at_the_ends() {
        assert_eq!(Lsn::new(5).bytes_since(Lsn::new(3)), 2);
        assert_eq!(Lsn::new(3).bytes_since(Lsn::new(5)), 0);
        assert_eq!(Lsn::new(u64::MAX).checked_add(1), None);
    }
}
