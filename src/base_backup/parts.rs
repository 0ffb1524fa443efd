//! Raw bytes to the compressed parts of an object, each with its checksum, ready to be sent.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::repository::StoredPart;
use crate::seal::{Compression, Encoder, combine_crc32};

use super::BackupError;

/// Stores take at least 5 MiB for every part but the last, and 10,000 parts (S3).
pub(super) const PART_BYTES: usize = 8 << 20;
const PARTS_MAX: u32 = 10_000;

/// A part of an object of the backup. All but the last of an object have `PART_BYTES`.
pub(super) struct Part {
    /// The object's name in the backup.
    pub(super) object: String,
    /// From 1.
    pub(super) number: u32,
    pub(super) bytes: Bytes,
    pub(super) crc32: u32,
    /// With the last part: what the whole object is.
    pub(super) whole: Option<StoredPart>,
}

/// Compresses one object after another and cuts what comes out into parts.
pub(super) struct PartEncoder {
    encoder: Encoder,
    out: Vec<u8>,
    ready: VecDeque<Part>,
    open: Option<Open>,
}

struct Open {
    name: String,
    number: u32,
    raw_bytes: u64,
    raw_crc32: crc32fast::Hasher,
    stored_bytes: u64,
    stored_crc32: u32,
}

impl PartEncoder {
    pub(super) fn new(compression: Compression, level: i32) -> Result<Self, BackupError> {
        Ok(Self { encoder: Encoder::new(compression, level)?, out: Vec::new(), ready: VecDeque::new(), open: None })
    }

    /// Begins an object; `name` without the compression's suffix.
    pub(super) fn begin(&mut self, name: &str) {
        assert!(self.open.is_none(), "an object is ended before the next one");
        let compression = self.encoder.compression();
        self.out.extend_from_slice(Encoder::prefix(compression));
        self.open = Some(Open {
            name: format!("{name}.{}", compression.suffix()),
            number: 1,
            raw_bytes: 0,
            raw_crc32: crc32fast::Hasher::new(),
            stored_bytes: 0,
            stored_crc32: 0,
        });
    }

    /// Raw bytes of the open object so far.
    pub(super) fn raw_bytes(&self) -> Option<u64> {
        self.open.as_ref().map(|open| open.raw_bytes)
    }

    pub(super) fn write(&mut self, raw: &[u8]) -> Result<(), BackupError> {
        let open = self.open.as_mut().expect("begun before it is written");
        open.raw_crc32.update(raw);
        open.raw_bytes += raw.len() as u64;
        self.encoder.write(raw, &mut self.out)?;
        while self.out.len() >= PART_BYTES {
            let mut rest = Vec::with_capacity(PART_BYTES + PART_BYTES / 16);
            rest.extend_from_slice(&self.out[PART_BYTES..]);
            self.out.truncate(PART_BYTES);
            let full = std::mem::replace(&mut self.out, rest);
            self.cut(full, false)?;
        }
        Ok(())
    }

    /// Ends the object.
    pub(super) fn finish(&mut self) -> Result<(), BackupError> {
        self.encoder.cut(&mut self.out)?;
        self.out.extend_from_slice(Encoder::suffix(self.encoder.compression()));
        // What the end added may have filled one more part.
        while self.out.len() > PART_BYTES {
            let rest = self.out.split_off(PART_BYTES);
            let full = std::mem::replace(&mut self.out, rest);
            self.cut(full, false)?;
        }
        let last = std::mem::take(&mut self.out);
        self.cut(last, true)
    }

    fn cut(&mut self, bytes: Vec<u8>, last: bool) -> Result<(), BackupError> {
        let mut open = self.open.take().expect("begun before it is cut");
        if open.number > PARTS_MAX {
            return Err(BackupError::TooLarge { volume: open.name, parts_max: PARTS_MAX });
        }
        let (crc32, length) = (crc32fast::hash(&bytes), bytes.len() as u64);
        open.stored_crc32 = combine_crc32(open.stored_crc32, crc32, length);
        open.stored_bytes += length;
        let (object, number) = (open.name.clone(), open.number);
        open.number += 1;
        let whole = if last {
            Some(StoredPart {
                key: open.name,
                raw_bytes: open.raw_bytes,
                stored_bytes: open.stored_bytes,
                raw_crc32: open.raw_crc32.finalize(),
                stored_crc32: open.stored_crc32,
            })
        } else {
            self.open = Some(open);
            None
        };
        self.ready.push_back(Part { object, number, bytes: bytes.into(), crc32, whole });
        Ok(())
    }

    /// The next part to send. Parts pile up only as long as this is not called.
    pub(super) fn take_ready(&mut self) -> Option<Part> {
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Bytes that do not compress.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }

    fn encode(raw: &[u8], compression: Compression) -> (Vec<Part>, StoredPart) {
        let mut encoder = PartEncoder::new(compression, 0).unwrap();
        let mut parts = Vec::new();
        encoder.begin("x");
        for chunk in raw.chunks(100_000) {
            encoder.write(chunk).unwrap();
            parts.extend(encoder.take_ready());
        }
        encoder.finish().unwrap();
        parts.extend(std::iter::from_fn(|| encoder.take_ready()));
        let whole = parts.last().unwrap().whole.clone().unwrap();
        (parts, whole)
    }

    #[test]
    fn the_parts_together_are_what_stock_decoders_read() {
        for raw in [vec![1], vec![7; 3_000_000], noise(PART_BYTES * 2 + 12_345)] {
            for compression in [Compression::Lz4, Compression::Zstd] {
                let (parts, whole) = encode(&raw, compression);
                let stored: Vec<u8> = parts.iter().flat_map(|part| part.bytes.to_vec()).collect();
                assert!(parts[..parts.len() - 1].iter().all(|p| p.bytes.len() == PART_BYTES && p.whole.is_none()));
                assert!(parts.iter().all(|part| part.crc32 == crc32fast::hash(&part.bytes)));
                assert!((1..).zip(&parts).all(|(number, part)| part.number == number));
                assert_eq!((whole.stored_bytes, whole.stored_crc32), (stored.len() as u64, crc32fast::hash(&stored)));
                assert_eq!((whole.raw_bytes, whole.raw_crc32), (raw.len() as u64, crc32fast::hash(&raw)));
                let mut back = Vec::new();
                match compression {
                    Compression::Lz4 => {
                        lz4_flex::frame::FrameDecoder::new(&stored[..]).read_to_end(&mut back).unwrap();
                    }
                    Compression::Zstd => back = zstd::decode_all(&stored[..]).unwrap(),
                }
                assert!(back == raw, "{compression:?} {}", raw.len());
            }
        }
    }
}
