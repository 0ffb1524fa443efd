use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A server's time: microseconds since 2000-01-01 00:00:00 UTC, as `TimestampTz` in WAL and protocol.
/// Printed and stored as RFC 3339 in UTC with microseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTime(i64);

/// 2000-01-01 in microseconds since 1970-01-01.
const PG_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

impl PgTime {
    pub const fn from_pg_micros(micros: i64) -> Self {
        Self(micros)
    }

    pub const fn pg_micros(self) -> i64 {
        self.0
    }

    /// From `pg_time_t`, as checkpoints carry it. Saturates.
    pub const fn from_unix_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_mul(1_000_000).saturating_sub(PG_EPOCH_UNIX_MICROS))
    }

    /// Saturates at the ends of what a `jiff::Timestamp` holds (years -9999 to 9999).
    pub fn to_timestamp(self) -> jiff::Timestamp {
        let unix = self.0.saturating_add(PG_EPOCH_UNIX_MICROS);
        jiff::Timestamp::from_microsecond(unix).unwrap_or(if unix < 0 {
            jiff::Timestamp::MIN
        } else {
            jiff::Timestamp::MAX
        })
    }

    /// Drops what is below a microsecond, as PostgreSQL has nothing finer.
    pub fn from_timestamp(time: jiff::Timestamp) -> Self {
        Self(time.as_microsecond().saturating_sub(PG_EPOCH_UNIX_MICROS))
    }

    pub fn unix_seconds(self) -> f64 {
        self.0.saturating_add(PG_EPOCH_UNIX_MICROS) as f64 / 1e6 // for display and metrics only
    }

    /// Seconds from `earlier` to `self`, 0 if it is not earlier.
    pub fn seconds_since(self, earlier: PgTime) -> f64 {
        (self.0.saturating_sub(earlier.0).max(0)) as f64 / 1e6
    }
}

impl fmt::Display for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.to_timestamp())
    }
}

impl fmt::Debug for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PgTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PgTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        let time: jiff::Timestamp = text.parse().map_err(serde::de::Error::custom)?;
        Ok(Self::from_timestamp(time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_2000_and_prints_utc_with_microseconds() {
        assert_eq!(PgTime::from_pg_micros(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!(PgTime::from_pg_micros(-1).to_string(), "1999-12-31T23:59:59.999999Z");
        assert_eq!(PgTime::from_unix_seconds(1_800_000_000).to_string(), "2027-01-15T08:00:00.000000Z");
        let time = PgTime::from_pg_micros(848_549_115_328_990);
        let json = serde_json::to_string(&time).unwrap();
        assert_eq!(serde_json::from_str::<PgTime>(&json).unwrap(), time);
        assert_eq!(PgTime::from_timestamp(time.to_timestamp()), time);
    }

    #[test]
    fn no_64_bits_from_outside_overflow_it() {
        for micros in [i64::MIN, i64::MIN + 1, i64::MAX - 1, i64::MAX] {
            let time = PgTime::from_pg_micros(micros);
            time.to_timestamp();
            assert!(!time.to_string().is_empty() && time.unix_seconds().is_finite());
            assert!(time.seconds_since(PgTime::from_pg_micros(0)) >= 0.0);
            assert!(PgTime::from_pg_micros(0).seconds_since(time) >= 0.0);
            PgTime::from_unix_seconds(micros);
        }
    }
}
