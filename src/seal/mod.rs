//! Bytes to sealed object and back: checksum, compress, frame, and the way back with every check.
//!
//! A sealed object is self-describing (docs/format.md, section 2):
//!
//! ```text
//! 0     57 2A 4D 18   magic 0x184D2A57, a skippable frame for LZ4 and Zstandard alike
//! 4     00 10 00 00   its length, 4096
//! 8     4096 bytes    JSON header, padded with spaces
//! 4104  body          LZ4 blocks in one frame, or Zstandard frames
//! end   overflow      only if the header says so: a second skippable frame with the lists that did not fit
//! ```
//!
//! The body is made of *stretches*: runs of compressed bytes that decode alone between a fixed prefix and suffix. A tail piece is a
//! stretch of the open segment's body between these, so nothing is compressed twice.
//!
//! No files and no network. Never trusts a length: sizes are bounded before anything is decompressed (I13, I17).

mod checksum;
mod decode;
mod encode;
mod header;

pub use checksum::{Checksum, combine_crc32};
pub use decode::{ObjectDecoder, StreamDecoder, WINDOW_LOG_MAX};
pub use encode::{BLOCK_BYTES, Encoder};
#[cfg(test)]
mod tests;

pub use header::{HEADER_LEN, ObjectHeader, ObjectKind, SealedFrames};

use serde::{Deserialize, Serialize};

/// How the body is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Lz4,
    Zstd,
}

impl Compression {
    /// The suffix of a key, without the dot.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zst",
        }
    }

    pub fn from_suffix(suffix: &str) -> Option<Self> {
        match suffix {
            "lz4" => Some(Self::Lz4),
            "zst" => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// A sealed object, or bytes that claim to be one, that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("it does not begin with Walden's header")]
    NotSealed,
    #[error("its header cannot be read: {why}")]
    Header { why: String },
    #[error("it has format {format}, which this release does not know")]
    Format { format: u32 },
    #[error("its compressed data is damaged: {why}")]
    Data { why: String },
    #[error("it holds {found} bytes instead of {expected}")]
    Size { expected: u64, found: u64 },
    #[error("its {what} is {found:08X} instead of {expected:08X}")]
    Checksum { what: &'static str, expected: u32, found: u32 },
    #[error("it could not be compressed: {why}")]
    Compress { why: String },
}

impl SealError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Format { .. } => "use the newest release of Walden",
            Self::NotSealed | Self::Header { .. } | Self::Data { .. } | Self::Size { .. } | Self::Checksum { .. } => {
                "take the object from another repository or an older version of it"
            }
            Self::Compress { .. } => "report it: this should not happen",
        }
    }
}
