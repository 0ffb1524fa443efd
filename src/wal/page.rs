//! Page headers: what PostgreSQL writes at the start of every 8 KiB of WAL, and what it may say at a given position.
//!
//! Source: `XLogPageHeaderData`, `XLogLongPageHeaderData` in PostgreSQL `src/include/access/xlog_internal.h`, and
//! `XLogReaderValidatePageHeader` in `src/backend/access/transam/xlogreader.c`.

use std::fmt;

use super::{Lsn, SegmentSize, SystemIdentifier, TimelineId};
use crate::failure::NextStep;

/// `XLOG_BLCKSZ`. PostgreSQL can be built with another one; such a server is refused by its first page.
pub const PAGE_SIZE: usize = 8192;

/// `SizeOfXLogShortPHD`: header of every page but a segment's first.
pub const SHORT_HEADER_LEN: usize = 24;
/// `SizeOfXLogLongPHD`: header of a segment's first page.
pub const LONG_HEADER_LEN: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
/// With `XLP_BKP_REMOVABLE` (0x0004), which says nothing that a reader needs.
const ALL_FLAGS: u16 = 0x000F;

/// The layout of records, known from a page's magic number (`XLOG_PAGE_MAGIC`, constant within a PostgreSQL major).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WalVersion(u8);

impl WalVersion {
    pub(super) const V14: WalVersion = WalVersion(14);
    pub(super) const V15: WalVersion = WalVersion(15);
    pub(super) const V18: WalVersion = WalVersion(18);

    /// `None` for a magic number of a major that Walden does not know.
    pub const fn from_magic(magic: u16) -> Option<Self> {
        match magic {
            0xD106 => Some(Self(13)),
            0xD10D => Some(Self(14)),
            0xD110 => Some(Self(15)),
            0xD113 => Some(Self(16)),
            0xD116 => Some(Self(17)),
            0xD118 => Some(Self(18)),
            _ => None,
        }
    }

    /// PostgreSQL's major version, 13 to 18.
    pub const fn major(self) -> u32 {
        self.0 as u32 // widening
    }
}

impl fmt::Debug for WalVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgreSQL {}", self.0)
    }
}

/// What the pages of one stream must agree with.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageRules {
    pub segment_size: SegmentSize,
    /// Checked where a page has it; `None` accepts any.
    pub system_identifier: Option<SystemIdentifier>,
    /// The highest timeline that a page may have.
    pub timeline: TimelineId,
    /// The timeline of the page before, 0 at the beginning.
    pub timeline_before: u32,
    /// `None` until a page has told.
    pub version: Option<WalVersion>,
}

/// What is left of a valid page header once it has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageHeader {
    pub version: WalVersion,
    pub timeline: u32,
    /// `xlp_rem_len` where the page begins inside a record: bytes of it that are still to come, this page included.
    pub continues: Option<u32>,
    /// The record that the page before left open will never be finished (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub overwrites: bool,
}

/// Length of the header of the page at `position`, which is the start of a page.
pub(super) const fn header_len(position: Lsn, segment_size: SegmentSize) -> usize {
    if segment_size.is_boundary(position) { LONG_HEADER_LEN } else { SHORT_HEADER_LEN }
}

impl PageRules {
    /// Checks the header of the page at `lsn`; `bytes` holds at least `header_len` bytes.
    pub fn check(&self, lsn: Lsn, bytes: &[u8]) -> Result<PageHeader, PageError> {
        let wrong = |kind| Err(PageError { lsn, kind });
        let (magic, flags) = (u16_at(bytes, 0), u16_at(bytes, 2));
        let (timeline, address, continues) = (u32_at(bytes, 4), u64_at(bytes, 8), u32_at(bytes, 16));

        let version = match WalVersion::from_magic(magic) {
            Some(version) if self.version.is_none_or(|before| before == version) => version,
            _ => return wrong(PageErrorKind::Magic { found: magic, expected: self.version }),
        };
        if flags & !ALL_FLAGS != 0 {
            return wrong(PageErrorKind::Flags { found: flags });
        }
        let first_of_segment = self.segment_size.is_boundary(lsn);
        if (flags & LONG_HEADER != 0) != first_of_segment {
            return wrong(PageErrorKind::HeaderForm { expected_long: first_of_segment });
        }
        if first_of_segment {
            let (system, segment_size, page_size) = (u64_at(bytes, 24), u32_at(bytes, 32), u32_at(bytes, 36));
            let found = SystemIdentifier::new(system);
            if let Some(expected) = self.system_identifier
                && expected != found
            {
                return wrong(PageErrorKind::SystemIdentifier { expected, found });
            }
            if u64::from(segment_size) != self.segment_size.get() {
                return wrong(PageErrorKind::SegmentSize { expected: self.segment_size, found: segment_size });
            }
            if page_size as usize != PAGE_SIZE {
                return wrong(PageErrorKind::PageSize { found: page_size });
            }
        }
        if address != lsn.get() {
            return wrong(PageErrorKind::Address { found: Lsn::new(address) });
        }
        // A new timeline begins with a copy of its ancestor's last segment, whose pages keep the ancestor's timeline: so
        // a lower one than the stream's is right, but it never falls from one page to the next.
        if timeline < self.timeline_before.max(1) || timeline > self.timeline.get() {
            let expected = (self.timeline_before.max(1), self.timeline);
            return wrong(PageErrorKind::Timeline { found: timeline, expected });
        }
        Ok(PageHeader {
            version,
            timeline,
            continues: (flags & FIRST_IS_CONTRECORD != 0).then_some(continues),
            overwrites: flags & FIRST_IS_OVERWRITE_CONTRECORD != 0,
        })
    }
}

/// WAL that is not what this cluster, on this timeline, has at this position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the WAL at {lsn} {kind}")]
pub struct PageError {
    /// The page's first byte; the record's for `RecordLength`.
    pub lsn: Lsn,
    pub kind: PageErrorKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageErrorKind {
    /// Not a WAL page, or one of an unknown major, or of another major than the pages before it.
    Magic {
        found: u16,
        expected: Option<WalVersion>,
    },
    /// Flags that no known major sets.
    Flags {
        found: u16,
    },
    /// A segment's first page has the long header and no other page has.
    HeaderForm {
        expected_long: bool,
    },
    SystemIdentifier {
        expected: SystemIdentifier,
        found: SystemIdentifier,
    },
    SegmentSize {
        expected: SegmentSize,
        found: u32,
    },
    PageSize {
        found: u32,
    },
    /// `xlp_pageaddr`: the page belongs elsewhere; typical of a recycled segment that was not written yet.
    Address {
        found: Lsn,
    },
    /// Lowest and highest timeline expected.
    Timeline {
        found: u32,
        expected: (u32, TimelineId),
    },
    /// `xlp_rem_len` against the bytes that the open record still needs; `None`: no record is open, or none continued.
    Continuation {
        expected: Option<u32>,
        found: Option<u32>,
    },
    /// `xl_tot_len` out of range: where a record must start, there is none.
    RecordLength {
        found: u32,
    },
}

impl fmt::Display for PageErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic { found: 0, .. } => write!(f, "is zero where a page must start"),
            Self::Magic { found, expected: None } => {
                write!(f, "is not a WAL page of PostgreSQL 13 to 18: magic number {found:04X}")
            }
            Self::Magic { found, expected: Some(version) } => {
                write!(f, "has the magic number {found:04X}, which {version:?} does not write")
            }
            Self::Flags { found } => write!(f, "has unknown page flags {found:04X}"),
            Self::HeaderForm { expected_long: true } => write!(f, "lacks the header of a segment's first page"),
            Self::HeaderForm { expected_long: false } => {
                write!(f, "has the header of a segment's first page in the middle of a segment")
            }
            Self::SystemIdentifier { expected, found } => {
                write!(f, "is from another cluster: system identifier {found}, expected {expected}")
            }
            Self::SegmentSize { expected, found } => {
                write!(f, "has segments of {found} bytes, expected {}", expected.get())
            }
            Self::PageSize { found } => write!(f, "has pages of {found} bytes, expected {PAGE_SIZE}"),
            Self::Address { found } => write!(f, "is a page of {found}"),
            Self::Timeline { found, expected: (lowest, highest) } if *lowest == highest.get() => {
                write!(f, "is of timeline {found}, expected {highest}")
            }
            Self::Timeline { found, expected: (lowest, highest) } => {
                write!(f, "is of timeline {found}, expected {lowest} to {highest}")
            }
            Self::Continuation { expected: Some(expected), found: Some(found) } => {
                write!(f, "continues a record by {found} bytes, expected {expected}")
            }
            Self::Continuation { expected: Some(expected), found: None } => {
                write!(f, "does not continue the record before it, of which {expected} bytes are missing")
            }
            Self::Continuation { expected: None, found } => {
                write!(f, "continues a record by {} bytes, but none is open", found.unwrap_or(0))
            }
            Self::RecordLength { found } => write!(f, "has a record length of {found} bytes, which no record has"),
        }
    }
}

impl PageError {
    pub fn next_step(&self) -> NextStep {
        match self.kind {
            // Each of these is another history, another cluster, or damage on the server. More of it must not be kept.
            PageErrorKind::Magic { .. }
            | PageErrorKind::Flags { .. }
            | PageErrorKind::HeaderForm { .. }
            | PageErrorKind::SystemIdentifier { .. }
            | PageErrorKind::SegmentSize { .. }
            | PageErrorKind::PageSize { .. }
            | PageErrorKind::Address { .. }
            | PageErrorKind::Timeline { .. }
            | PageErrorKind::Continuation { .. }
            | PageErrorKind::RecordLength { .. } => NextStep::Stop,
        }
    }

    /// What to do, in one sentence.
    pub fn hint(&self) -> &'static str {
        match self.kind {
            PageErrorKind::Magic { found: 0, .. }
            | PageErrorKind::Flags { .. }
            | PageErrorKind::HeaderForm { .. }
            | PageErrorKind::Address { .. }
            | PageErrorKind::Timeline { .. }
            | PageErrorKind::Continuation { .. }
            | PageErrorKind::RecordLength { .. } => {
                "check the server's WAL with pg_waldump from there; if it is damaged, take a new base backup after repair"
            }
            PageErrorKind::Magic { .. } => "use a release of Walden that knows this PostgreSQL major",
            PageErrorKind::SystemIdentifier { .. } => {
                "point the connection at the cluster that this archive belongs to, or give the other one its own cluster name"
            }
            PageErrorKind::SegmentSize { .. } => "give a cluster with another WAL segment size its own cluster name",
            PageErrorKind::PageSize { .. } => "use a PostgreSQL built with the default WAL block size of 8 kB",
        }
    }

    /// The bytes are another cluster's (I6), not damage.
    pub fn is_other_cluster(&self) -> bool {
        matches!(self.kind, PageErrorKind::SystemIdentifier { .. })
    }
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(fixed(bytes, at))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(fixed(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(fixed(bytes, at))
}

/// Panics if the slice is shorter: callers collect a header whole before they read its fields.
#[inline(always)]
fn fixed<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> PageRules {
        PageRules {
            segment_size: SegmentSize::DEFAULT,
            system_identifier: Some(SystemIdentifier::new(42)),
            timeline: TimelineId::new(3).unwrap(),
            timeline_before: 2,
            version: None,
        }
    }

    fn header(lsn: u64) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[0..2].copy_from_slice(&0xD110u16.to_le_bytes());
        bytes[2..4].copy_from_slice(&(if lsn.is_multiple_of(16 << 20) { LONG_HEADER } else { 0 }).to_le_bytes());
        bytes[4..8].copy_from_slice(&3u32.to_le_bytes());
        bytes[8..16].copy_from_slice(&lsn.to_le_bytes());
        bytes[24..32].copy_from_slice(&42u64.to_le_bytes());
        bytes[32..36].copy_from_slice(&(16u32 << 20).to_le_bytes());
        bytes[36..40].copy_from_slice(&8192u32.to_le_bytes());
        bytes
    }

    fn kind_of(lsn: u64, bytes: &[u8]) -> PageErrorKind {
        rules().check(Lsn::new(lsn), bytes).unwrap_err().kind
    }

    #[test]
    fn a_page_header_of_the_right_place_is_accepted() {
        let found = rules().check(Lsn::new(16 << 20), &header(16 << 20)).unwrap();
        assert_eq!((found.version.major(), found.timeline, found.continues), (15, 3, None));
        let mut bytes = header(8192);
        bytes[2] |= FIRST_IS_CONTRECORD as u8;
        bytes[16] = 77;
        assert_eq!(rules().check(Lsn::new(8192), &bytes[..24]).unwrap().continues, Some(77));
    }

    #[test]
    fn every_field_is_checked() {
        let at = |byte: usize, value: u8| {
            let mut bytes = header(16 << 20);
            bytes[byte] = value;
            kind_of(16 << 20, &bytes)
        };
        assert!(matches!(at(0, 0x11), PageErrorKind::Magic { found: 0xD111, expected: None }));
        assert!(matches!(at(2, 0x12), PageErrorKind::Flags { found: 0x12 }));
        assert!(matches!(at(2, 0x00), PageErrorKind::HeaderForm { expected_long: true }));
        assert!(matches!(at(4, 1), PageErrorKind::Timeline { found: 1, .. }));
        assert!(matches!(at(4, 4), PageErrorKind::Timeline { found: 4, .. }));
        assert!(matches!(at(9, 0x20), PageErrorKind::Address { .. }));
        assert!(matches!(at(24, 43), PageErrorKind::SystemIdentifier { .. }));
        assert!(matches!(at(35, 2), PageErrorKind::SegmentSize { found: 0x0200_0000, .. }));
        assert!(matches!(at(37, 0x40), PageErrorKind::PageSize { found: 16384 }));
        let mut middle = header(8192);
        middle[2] = LONG_HEADER as u8;
        assert!(matches!(kind_of(8192, &middle), PageErrorKind::HeaderForm { expected_long: false }));
    }

    #[test]
    fn a_page_of_the_timeline_before_is_accepted_and_a_fall_is_not() {
        let mut bytes = header(8192);
        bytes[4] = 2;
        assert_eq!(rules().check(Lsn::new(8192), &bytes).unwrap().timeline, 2);
        let rules = PageRules { timeline_before: 3, ..rules() };
        assert!(matches!(
            rules.check(Lsn::new(8192), &bytes).unwrap_err().kind,
            PageErrorKind::Timeline { found: 2, expected: (3, _) }
        ));
    }

    #[test]
    fn the_message_names_the_place_the_expected_and_the_found() {
        let mut bytes = header(16 << 20);
        bytes[24] = 7;
        let error = rules().check(Lsn::new(16 << 20), &bytes).unwrap_err();
        assert_eq!(error.to_string(), "the WAL at 0/1000000 is from another cluster: system identifier 7, expected 42");
        assert!(error.is_other_cluster());
        assert_eq!(error.next_step(), NextStep::Stop);
    }
}
