//! What is still to upload: an index over the spool, rebuilt from it when lost (I4).
//!
//! Records lie in an embedded `sled` store; the WAL itself never does. Losing the store costs nothing: a record is made again from
//! the spool's self-describing files. It can never cause a deletion, a second acknowledgement or a second, different upload.
//!
//! Two facts about sled 0.34 shape this room. Its `flush` is not durable on Linux (it calls `sync_file_range`), so every commit is
//! followed by an fdatasync of its `db` file. After a power cut it may open *empty without an error*, so an id of ours stands both in
//! it and beside it (`<folder>.id`), and a difference means that the store was lost.

mod store;

pub use store::{OpenedAs, Queue};

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::failure::NextStep;

/// A spooled object that at least one repository does not have yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueEntry {
    pub timeline: u32,
    /// Orders the queue within a timeline: the segment's start; 0 for a history file, which goes first.
    pub order: u64,
    /// Path below the spool's folder, which is the key below the cluster's in a repository.
    pub relative: String,
    pub stored_size: u64,
    /// CRC-32 of the whole object.
    pub crc32: u32,
    /// Names of the repositories that hold it, proven by a read-back.
    pub stored_in: Vec<String>,
}

impl QueueEntry {
    /// Big-endian, so that the store's order is the WAL's.
    fn key(&self) -> Vec<u8> {
        let mut key = Vec::with_capacity(12 + self.relative.len());
        key.extend_from_slice(&self.timeline.to_be_bytes());
        key.extend_from_slice(&self.order.to_be_bytes());
        key.extend_from_slice(self.relative.as_bytes());
        key
    }
}

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("cannot open the queue {}: {why}", path.display())]
    Open { path: PathBuf, why: String },
    #[error("cannot write the queue {}: {why}", path.display())]
    Write { path: PathBuf, why: String },
    #[error("no space is left for the queue {}", path.display())]
    Full { path: PathBuf, source: std::io::Error },
    #[error("the queue {} is damaged: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
}

impl QueueError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Open { .. } | Self::Write { .. } => NextStep::Retry,
            Self::Full { .. } => NextStep::Wait,
            // Set aside and rebuilt at the next opening.
            Self::Damaged { .. } => NextStep::Retry,
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            Self::Open { .. } | Self::Write { .. } => {
                "check the owner, the mode and the disk of `state.path`; it may be deleted at any time"
            }
            Self::Full { .. } => "make room on the disk of `state.path`",
            Self::Damaged { .. } => "nothing: it is rebuilt from the spool",
        }
    }
}
