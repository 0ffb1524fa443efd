use serde::{Deserialize, Serialize};

use crate::seal::{Checksum, Compression};
use crate::wal::{SegmentSize, SystemIdentifier, TimelineId};

/// Bytes of a mark in the open segment's first frame; the last four are the CRC-32C of the others.
pub const MARK_LEN: usize = 512;
/// Where the two marks lie in the file. They are written in turn, so that one is always whole.
pub const MARK_OFFSETS: [u64; 2] = [512, 1024];

/// How much of an open segment's file is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub format: u32,
    pub generation: u64,
    pub system_identifier: SystemIdentifier,
    pub timeline: TimelineId,
    pub segment: String,
    pub segment_size: SegmentSize,
    pub compression: Compression,
    /// Raw bytes of the segment from its start.
    pub raw_len: u64,
    /// Bytes of the body that decode to them, the frame's head included, its end mark not.
    pub body_len: u64,
    pub raw_crc32: u32,
    pub raw_crc32c: u32,
    pub body_crc32: u32,
}

impl Mark {
    pub fn raw(&self) -> Checksum {
        Checksum { crc32: self.raw_crc32, crc32c: self.raw_crc32c, length: self.raw_len }
    }

    /// Where this generation is written.
    pub fn offset(&self) -> u64 {
        MARK_OFFSETS[(self.generation % 2) as usize] // 0 or 1
    }

    pub fn encode(&self) -> [u8; MARK_LEN] {
        let json = serde_json::to_vec(self).expect("plain data serialises");
        assert!(json.len() <= MARK_LEN - 4, "a mark is of bounded size");
        let mut bytes = [b' '; MARK_LEN];
        bytes[..json.len()].copy_from_slice(&json);
        let crc = crc32c::crc32c(&bytes[..MARK_LEN - 4]);
        bytes[MARK_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// `None` for anything torn, empty or foreign.
    pub fn decode(bytes: &[u8; MARK_LEN]) -> Option<Self> {
        let (json, crc) = bytes.split_at(MARK_LEN - 4);
        if crc32c::crc32c(json).to_le_bytes() != crc {
            return None;
        }
        serde_json::from_slice(json)
            .ok()
            .filter(|mark: &Mark| mark.format == 1 && mark.raw_len <= mark.segment_size.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_mark_is_no_mark() {
        let mark = Mark {
            format: 1,
            generation: u64::MAX,
            system_identifier: SystemIdentifier::new(u64::MAX),
            timeline: TimelineId::new(u32::MAX).unwrap(),
            segment: "F".repeat(24),
            segment_size: SegmentSize::new(1 << 30).unwrap(),
            compression: Compression::Zstd,
            raw_len: 1 << 30,
            body_len: u64::MAX,
            raw_crc32: u32::MAX,
            raw_crc32c: u32::MAX,
            body_crc32: u32::MAX,
        };
        let bytes = mark.encode();
        assert_eq!(Mark::decode(&bytes), Some(mark));
        for at in [0, 100, 507, 511] {
            let mut torn = bytes;
            torn[at] ^= 1;
            assert_eq!(Mark::decode(&torn), None);
        }
        assert_eq!(Mark::decode(&[0; MARK_LEN]), None);
    }
}
