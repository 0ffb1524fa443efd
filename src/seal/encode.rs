use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd::stream::raw::{Encoder as ZstdEncoder, InBuffer, Operation, OutBuffer};

use super::{Compression, SealError};

/// Raw bytes in a full LZ4 block: code 5 of the frame format's block maximum size.
pub const BLOCK_BYTES: usize = 256 << 10;

/// LZ4 frame header: magic, FLG (version 01, independent blocks, no checksums, no content size), BD (256 KiB), and
/// the header checksum, the second byte of xxh32 of FLG and BD. Source: "LZ4 Frame Format Description"; a test
/// compares it with what the library writes.
const LZ4_FRAME_HEAD: [u8; 7] = [0x04, 0x22, 0x4D, 0x18, 0x60, 0x50, 0xFB];
const LZ4_END_MARK: [u8; 4] = [0; 4];
const LZ4_UNCOMPRESSED: u32 = 1 << 31;

/// Compresses one body. What it appends to `out` may be cut after `cut()`: the bytes between two cuts decode alone when
/// they stand between `prefix()` and `suffix()`.
pub struct Encoder {
    codec: Codec,
}

enum Codec {
    Lz4(Box<Lz4>),
    Zstd(Box<Zstd>),
}

struct Lz4 {
    block: Vec<u8>,
    scratch: Box<[u8]>,
    table: CompressTable,
}

struct Zstd {
    encoder: ZstdEncoder<'static>,
    scratch: Box<[u8]>,
    frame_open: bool,
}

impl Encoder {
    /// `level` 0 is the codec's fastest useful one. LZ4 has no other.
    pub fn new(compression: Compression, level: i32) -> Result<Self, SealError> {
        let codec = match compression {
            Compression::Lz4 => Codec::Lz4(Box::new(Lz4 {
                block: Vec::with_capacity(BLOCK_BYTES),
                scratch: vec![0; get_maximum_output_size(BLOCK_BYTES)].into(),
                table: CompressTable::large(),
            })),
            Compression::Zstd => {
                let level = if level == 0 { 1 } else { level };
                let encoder = ZstdEncoder::new(level).map_err(|e| SealError::Compress { why: e.to_string() })?;
                Codec::Zstd(Box::new(Zstd { encoder, scratch: vec![0; 128 << 10].into(), frame_open: false }))
            }
        };
        Ok(Self { codec })
    }

    pub fn compression(&self) -> Compression {
        match self.codec {
            Codec::Lz4(_) => Compression::Lz4,
            Codec::Zstd(_) => Compression::Zstd,
        }
    }

    /// What must stand before the first stretch of a body.
    pub fn prefix(compression: Compression) -> &'static [u8] {
        match compression {
            Compression::Lz4 => &LZ4_FRAME_HEAD,
            Compression::Zstd => &[],
        }
    }

    /// What must stand after the last stretch of a body.
    pub fn suffix(compression: Compression) -> &'static [u8] {
        match compression {
            Compression::Lz4 => &LZ4_END_MARK,
            Compression::Zstd => &[],
        }
    }

    /// Takes in raw bytes; appends whole compressed blocks to `out` as they fill. The prefix is the caller's.
    pub fn write(&mut self, mut raw: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        match &mut self.codec {
            Codec::Lz4(lz4) => {
                while !raw.is_empty() {
                    let take = raw.len().min(BLOCK_BYTES - lz4.block.len());
                    if lz4.block.is_empty() && take == BLOCK_BYTES {
                        lz4_block(&raw[..take], &mut lz4.scratch, &mut lz4.table, out)?;
                    } else {
                        lz4.block.extend_from_slice(&raw[..take]);
                        if lz4.block.len() == BLOCK_BYTES {
                            lz4.end_block(out)?;
                        }
                    }
                    raw = &raw[take..];
                }
                Ok(())
            }
            Codec::Zstd(zstd) => zstd.write(raw, out),
        }
    }

    /// Ends the stretch: all that was taken in is in `out` and the next bytes do not refer to it.
    pub fn cut(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        match &mut self.codec {
            Codec::Lz4(lz4) => lz4.end_block(out),
            Codec::Zstd(zstd) => zstd.end_frame(out),
        }
    }

    /// Forgets what was taken in since the last cut and begins another body.
    pub fn reset(&mut self) -> Result<(), SealError> {
        match &mut self.codec {
            Codec::Lz4(lz4) => lz4.block.clear(),
            Codec::Zstd(zstd) => {
                zstd.encoder.reinit().map_err(|e| SealError::Compress { why: e.to_string() })?;
                zstd.frame_open = false;
            }
        }
        Ok(())
    }
}

impl Lz4 {
    fn end_block(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        if !self.block.is_empty() {
            lz4_block(&self.block, &mut self.scratch, &mut self.table, out)?;
            self.block.clear();
        }
        Ok(())
    }
}

/// One block: its size (high bit: stored as it is), then its data.
fn lz4_block(raw: &[u8], scratch: &mut [u8], table: &mut CompressTable, out: &mut Vec<u8>) -> Result<(), SealError> {
    let size = compress_into_with_table(raw, scratch, table).map_err(|e| SealError::Compress { why: e.to_string() })?;
    let (mark, data) = if size < raw.len() {
        (size as u32, &scratch[..size]) // below BLOCK_BYTES
    } else {
        (raw.len() as u32 | LZ4_UNCOMPRESSED, raw) // at most BLOCK_BYTES
    };
    out.extend_from_slice(&mark.to_le_bytes());
    out.extend_from_slice(data);
    Ok(())
}

impl Zstd {
    fn write(&mut self, raw: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        let mut input = InBuffer::around(raw);
        while input.pos() < raw.len() {
            let mut output = OutBuffer::around(&mut self.scratch[..]);
            self.encoder.run(&mut input, &mut output).map_err(|e| SealError::Compress { why: e.to_string() })?;
            let written = output.pos();
            out.extend_from_slice(&self.scratch[..written]);
            self.frame_open = true;
        }
        Ok(())
    }

    fn end_frame(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        while self.frame_open {
            let mut output = OutBuffer::around(&mut self.scratch[..]);
            let left =
                self.encoder.finish(&mut output, true).map_err(|e| SealError::Compress { why: e.to_string() })?;
            let written = output.pos();
            out.extend_from_slice(&self.scratch[..written]);
            if left == 0 {
                self.encoder.reinit().map_err(|e| SealError::Compress { why: e.to_string() })?;
                self.frame_open = false;
            }
        }
        Ok(())
    }
}
