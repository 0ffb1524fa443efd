use std::fmt;
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::{Lsn, TimelineId, WalError};

/// Bytes in a WAL segment: a power of two from 1 MiB to 1 GiB, fixed by `initdb --wal-segsize`.
///
/// Source: `IsValidWalSegSize` in PostgreSQL `src/include/access/xlog_internal.h`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

impl SegmentSize {
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    pub fn new(bytes: u64) -> Result<Self, WalError> {
        match u32::try_from(bytes) {
            Ok(size) if size.is_power_of_two() && (1 << 20..=1 << 30).contains(&size) => Ok(Self(size)),
            _ => Err(WalError::SegmentSize { bytes }),
        }
    }

    pub const fn get(self) -> u64 {
        self.0 as u64 // widening
    }

    /// Segments in 4 GiB, the unit that the last eight digits of a segment's name count in.
    const fn per_id(self) -> u64 {
        0x1_0000_0000 / self.get()
    }

    /// The offset of `position` in its segment.
    pub const fn offset_of(self, position: Lsn) -> u64 {
        position.get() & (self.get() - 1)
    }

    /// The start of the segment that holds `position`; a boundary is the start of its own segment.
    pub const fn start_of(self, position: Lsn) -> Lsn {
        Lsn::new(position.get() & !(self.get() - 1))
    }

    pub const fn is_boundary(self, position: Lsn) -> bool {
        self.offset_of(position) == 0
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = WalError;
    fn try_from(bytes: u64) -> Result<Self, WalError> {
        Self::new(bytes)
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> u64 {
        size.get()
    }
}

impl fmt::Debug for SegmentSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

/// A WAL segment's name: timeline, then the segment's number split at 4 GiB; 24 upper-case hexadecimal digits.
///
/// Source: `XLByteToSeg`, `XLogFileName` in PostgreSQL `src/include/access/xlog_internal.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    number: u64,
    // Kept so that a name can print itself and give its range; equal within one cluster.
    size_bytes: NonZeroU64,
}

impl SegmentName {
    /// Names the segment holding `position`, the first byte wanted: on a boundary, the one that *starts* there.
    pub fn holding(timeline: TimelineId, position: Lsn, size: SegmentSize) -> Self {
        let size_bytes = NonZeroU64::new(size.get()).expect("a segment size is never 0");
        Self { timeline, number: position.get() / size_bytes, size_bytes }
    }

    /// Parses 24 upper-case hexadecimal digits; the size bounds the last eight.
    pub fn parse(name: &str, size: SegmentSize) -> Result<Self, WalError> {
        let wrong = || WalError::SegmentName { text: name.chars().take(64).collect() };
        if name.len() != 24 || !name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b)) {
            return Err(wrong());
        }
        let field = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).map_err(|_| wrong());
        let timeline = TimelineId::from_hex(&name[..8]).map_err(|_| wrong())?;
        let (high, low) = (field(8)?, field(16)?);
        if low >= size.per_id() {
            return Err(wrong());
        }
        let size_bytes = NonZeroU64::new(size.get()).expect("a segment size is never 0");
        Ok(Self { timeline, number: high * size.per_id() + low, size_bytes })
    }

    pub fn timeline(self) -> TimelineId {
        self.timeline
    }

    pub fn size(self) -> SegmentSize {
        SegmentSize::new(self.size_bytes.get()).expect("made from a SegmentSize")
    }

    /// First byte.
    pub fn start(self) -> Lsn {
        Lsn::new(self.number * self.size_bytes.get())
    }

    /// First byte after it. The last segment of the 64-bit space ends at its last byte.
    pub fn end(self) -> Lsn {
        Lsn::new(self.start().get().saturating_add(self.size_bytes.get()))
    }

    pub fn next(self) -> SegmentName {
        Self { number: self.number + 1, ..self }
    }

    /// The one before, `None` for the first.
    pub fn previous(self) -> Option<SegmentName> {
        self.number.checked_sub(1).map(|number| Self { number, ..self })
    }

    pub fn on_timeline(self, timeline: TimelineId) -> SegmentName {
        Self { timeline, ..self }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_id = 0x1_0000_0000 / self.size_bytes.get();
        write!(f, "{}{:08X}{:08X}", self.timeline.to_hex(), self.number / per_id, self.number % per_id)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(mib: u64) -> SegmentSize {
        SegmentSize::new(mib << 20).unwrap()
    }

    #[test]
    fn only_powers_of_two_from_1_mib_to_1_gib_are_segment_sizes() {
        for mib in [1, 2, 16, 64, 1024] {
            assert_eq!(size(mib).get(), mib << 20);
        }
        for bytes in [0, 1, 1 << 19, 3 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, u64::MAX] {
            assert!(SegmentSize::new(bytes).is_err(), "{bytes}");
        }
    }

    #[test]
    fn a_name_has_its_timeline_and_its_number_split_at_4_gib() {
        let timeline = TimelineId::new(0x1F).unwrap();
        for (mib, position, name) in [
            (16, 0, "0000001F0000000000000000"),
            (16, 0xA9_1F00_0028, "0000001F000000A90000001F"),
            (16, 0xA9_FFFF_FFFF, "0000001F000000A9000000FF"),
            (1, 0xA9_FFFF_FFFF, "0000001F000000A900000FFF"),
            (1024, 0xA9_FFFF_FFFF, "0000001F000000A900000003"),
            (1024, u64::MAX, "0000001FFFFFFFFF00000003"),
        ] {
            let segment = SegmentName::holding(timeline, Lsn::new(position), size(mib));
            assert_eq!(segment.to_string(), name);
            let parsed = SegmentName::parse(name, size(mib)).unwrap();
            assert_eq!(parsed, segment);
            assert_eq!((parsed.timeline(), parsed.size()), (timeline, size(mib)));
            assert!(parsed.start() <= Lsn::new(position) && parsed.end() >= Lsn::new(position));
        }
    }

    #[test]
    fn a_boundary_belongs_to_the_segment_that_starts_there() {
        let second = SegmentName::holding(TimelineId::FIRST, Lsn::new(16 << 20), size(16));
        assert_eq!(second.to_string(), "000000010000000000000001");
        assert_eq!(second.start(), Lsn::new(16 << 20));
        assert_eq!(second.previous().unwrap().end(), second.start());
        assert_eq!(second.previous().unwrap().previous(), None);
        assert_eq!(second.next().start(), second.end());
        assert!(size(16).is_boundary(second.start()) && !size(16).is_boundary(Lsn::new(8192)));
    }

    #[test]
    fn what_is_no_segment_name_is_refused() {
        for name in [
            "",
            "00000001000000000000000",
            "0000000100000000000000010",
            "000000000000000000000001",
            "00000001000000000000010a",
            "0000000100000000000001G0",
            "000000010000000000000100",
            "00000001000000000000+001",
            "0000000100000000000000é",
        ] {
            assert!(SegmentName::parse(name, size(16)).is_err(), "{name}");
        }
        assert!(SegmentName::parse("000000010000000000000100", size(1)).is_ok());
    }
}
