use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Compression, SealError, combine_crc32};
use crate::wal::{
    Drop, ParameterChange, RestorePoint, SegmentName, SegmentSize, Summary, SystemIdentifier, TimelineId,
};

/// Bytes before the body: the skippable frame's own 8 and its content.
pub const HEADER_LEN: usize = 8 + CONTENT_LEN;
const CONTENT_LEN: usize = 4096;
/// The last key of the JSON: CRC-32C of all of the JSON before this text. Range reads have no other proof of the header.
const CRC_KEY: &[u8] = b",\"header_crc32c\":";
const MAGIC: [u8; 4] = 0x184D_2A57u32.to_le_bytes();
/// The overflow frame's content at most; what would pass it is cut and `truncated` set.
const OVERFLOW_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    Segment,
    Piece,
}

/// What a WAL object says about itself; field by field in docs/format.md, section 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObjectHeader {
    pub format: u32,
    pub kind: ObjectKind,
    pub system_identifier: SystemIdentifier,
    pub timeline: TimelineId,
    pub segment: String,
    pub segment_size: SegmentSize,
    pub start_offset: u64,
    pub end_offset: u64,
    pub raw_size: u64,
    pub raw_crc32: u32,
    pub raw_crc32c: u32,
    pub prefix_crc32: u32,
    pub stored_size: u64,
    pub body_crc32: u32,
    pub compression: Compression,
    pub server_version: Option<u32>,
    #[serde(flatten)]
    pub summary: Summary,
    pub overflow: Option<u64>,
}

/// The two frames around a body, ready to be written.
#[derive(Clone, Debug)]
pub struct SealedFrames {
    /// `HEADER_LEN` bytes, the first of the object.
    pub head: Bytes,
    /// The overflow frame, often empty.
    pub tail: Bytes,
    /// CRC-32 of the whole object: head, body, tail.
    pub object_crc32: u32,
    pub stored_size: u64,
}

/// The lists that may not fit into the header.
#[derive(Default, Serialize, Deserialize)]
struct Overflow {
    restore_points: Vec<RestorePoint>,
    parameter_changes: Vec<ParameterChange>,
    drops: Vec<Drop>,
}

impl ObjectHeader {
    pub const FORMAT: u32 = 1;

    /// Frames a body of `body_size` bytes whose CRC-32 is `self.body_crc32`; fills in `stored_size` and `overflow`.
    pub fn frame(mut self, body_size: u64) -> SealedFrames {
        self.overflow = None;
        self.stored_size = HEADER_LEN as u64 + body_size;
        let mut json = self.to_json();
        let mut tail = Vec::new();
        if json.len() > CONTENT_LEN {
            let mut lists = Overflow {
                restore_points: std::mem::take(&mut self.summary.restore_points),
                parameter_changes: std::mem::take(&mut self.summary.parameter_changes),
                drops: std::mem::take(&mut self.summary.drops),
            };
            let mut content = serde_json::to_vec(&lists).expect("plain data serialises");
            while content.len() > OVERFLOW_MAX {
                self.summary.truncated = true;
                lists.restore_points.truncate(lists.restore_points.len() / 2);
                lists.parameter_changes.truncate(lists.parameter_changes.len() / 2);
                lists.drops.truncate(lists.drops.len() / 2);
                content = serde_json::to_vec(&lists).expect("plain data serialises");
            }
            tail.extend_from_slice(&MAGIC);
            tail.extend_from_slice(&(content.len() as u32).to_le_bytes()); // at most OVERFLOW_MAX
            tail.extend_from_slice(&content);
            self.overflow = Some(content.len() as u64);
            self.stored_size += tail.len() as u64;
            json = self.to_json();
        }
        // Without the lists the header is of bounded size: every field is a number, a time or a short name.
        assert!(json.len() <= CONTENT_LEN, "a header without lists fits");
        let mut head = Vec::with_capacity(HEADER_LEN);
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&(CONTENT_LEN as u32).to_le_bytes());
        head.extend_from_slice(&json);
        head.resize(HEADER_LEN, b' ');
        let body = combine_crc32(crc32fast::hash(&head), self.body_crc32, body_size);
        let object_crc32 = combine_crc32(body, crc32fast::hash(&tail), tail.len() as u64);
        SealedFrames { head: head.into(), tail: tail.into(), object_crc32, stored_size: self.stored_size }
    }

    fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec(self).expect("plain data serialises");
        json.pop(); // the closing brace
        let crc = crc32c::crc32c(&json);
        json.extend_from_slice(CRC_KEY);
        json.extend_from_slice(format!("{crc}}}").as_bytes());
        json
    }

    /// Compares the JSON with the CRC-32C at its end.
    fn check_crc(content: &[u8]) -> Result<(), SealError> {
        let wrong = |why: &str| SealError::Header { why: why.into() };
        let at =
            content.windows(CRC_KEY.len()).rposition(|w| w == CRC_KEY).ok_or_else(|| wrong("it has no checksum"))?;
        let digits = content[at + CRC_KEY.len()..].trim_ascii_end().strip_suffix(b"}");
        let expected = digits.and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| d.parse::<u32>().ok());
        let expected = expected.ok_or_else(|| wrong("its checksum cannot be read"))?;
        let found = crc32c::crc32c(&content[..at]);
        if found == expected { Ok(()) } else { Err(SealError::Checksum { what: "header's CRC-32C", expected, found }) }
    }

    /// Reads the first `HEADER_LEN` bytes of an object and checks that they agree with themselves.
    /// With `overflow` set, the lists are still empty: see `read_overflow`.
    pub fn parse(stored: &[u8]) -> Result<Self, SealError> {
        let head = stored.get(..HEADER_LEN).ok_or(SealError::NotSealed)?;
        if head[..4] != MAGIC || head[4..8] != (CONTENT_LEN as u32).to_le_bytes() {
            return Err(SealError::NotSealed);
        }
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let wrong = |e: serde_json::Error| SealError::Header { why: e.to_string() };
        let version: Version = serde_json::from_slice(&head[8..]).map_err(wrong)?;
        if version.format != Self::FORMAT {
            return Err(SealError::Format { format: version.format });
        }
        Self::check_crc(&head[8..])?;
        let header: Self = serde_json::from_slice(&head[8..]).map_err(wrong)?;
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), SealError> {
        let wrong = |why: &str| Err(SealError::Header { why: why.into() });
        let size = self.segment_size.get();
        let name = SegmentName::parse(&self.segment, self.segment_size)
            .map_err(|e| SealError::Header { why: e.to_string() })?;
        if name.timeline() != self.timeline {
            return wrong("the segment's name has another timeline");
        }
        if self.start_offset > self.end_offset || self.end_offset > size {
            return wrong("its range does not lie in the segment");
        }
        if self.raw_size != self.end_offset - self.start_offset {
            return wrong("its size and its range disagree");
        }
        if self.kind == ObjectKind::Segment && self.raw_size != size {
            return wrong("a segment that is not complete");
        }
        if self.overflow.is_some_and(|n| n > OVERFLOW_MAX as u64) {
            return wrong("its lists are too long");
        }
        if self.stored_size < HEADER_LEN as u64 + self.overflow.map_or(0, |n| n + 8) {
            return wrong("its sizes disagree");
        }
        Ok(())
    }

    /// The segment's name. `parse` has checked it.
    pub fn segment_name(&self) -> SegmentName {
        SegmentName::parse(&self.segment, self.segment_size).expect("checked when the header was made")
    }

    /// Bytes of the compressed body, between the two frames.
    pub fn body_size(&self) -> u64 {
        self.stored_size - HEADER_LEN as u64 - self.overflow.map_or(0, |n| n + 8)
    }

    /// Fills in the lists from the overflow frame, the last `overflow + 8` bytes of the object.
    pub fn read_overflow(&mut self, frame: &[u8]) -> Result<(), SealError> {
        let wrong = |why: String| SealError::Header { why };
        let length = self.overflow.unwrap_or(0);
        if frame.len() as u64 != length + 8 || frame[..4] != MAGIC || frame[4..8] != (length as u32).to_le_bytes() {
            return Err(wrong("its second frame is not there".into()));
        }
        let lists: Overflow = serde_json::from_slice(&frame[8..]).map_err(|e| wrong(e.to_string()))?;
        self.summary.restore_points = lists.restore_points;
        self.summary.parameter_changes = lists.parameter_changes;
        self.summary.drops = lists.drops;
        Ok(())
    }
}
