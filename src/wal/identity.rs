use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::WalError;

/// The number that `initdb` gives a cluster; decimal. A string in JSON, since it needs all 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemIdentifier(u64);

impl SystemIdentifier {
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for SystemIdentifier {
    type Err = WalError;

    /// Decimal digits without sign or leading zeros, so that each cluster has one spelling in keys.
    fn from_str(text: &str) -> Result<Self, WalError> {
        let wrong = || WalError::SystemIdentifier { text: text.chars().take(64).collect() };
        let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
        if !plain {
            return Err(wrong());
        }
        text.parse().map(Self).map_err(|_| wrong())
    }
}

impl Serialize for SystemIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemIdentifier {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cluster_has_one_spelling() {
        let id: SystemIdentifier = "18446744073709551615".parse().unwrap();
        assert_eq!((id.get(), id.to_string().as_str()), (u64::MAX, "18446744073709551615"));
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"18446744073709551615\"");
        for text in ["", "0", "07", "+7", "-7", " 7", "7 ", "0x7", "18446744073709551616"] {
            assert!(text.parse::<SystemIdentifier>().is_err(), "{text}");
        }
    }
}
