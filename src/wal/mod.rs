//! The words of the write-ahead log: positions, timelines, segments, history files, page and record headers, commit records.
//!
//! Parsed once, at the door, into types that cannot be wrong. No network, no files, nobody else's state.

mod content;
mod identity;
mod indexer;
mod lsn;
mod page;
mod record;
mod scanner;
mod segment;
mod summary;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod time;
mod timeline;

pub use identity::SystemIdentifier;
pub use indexer::{Indexer, IndexerStart};
pub use lsn::Lsn;
pub use page::{LONG_HEADER_LEN, PAGE_SIZE, PageError, PageErrorKind, SHORT_HEADER_LEN, WalVersion};
pub use record::{RECORD_HEADER_LEN, RecordInfo, RecordKind, TransactionEnd, rmgr};
pub use scanner::{RecordScanner, ScanStart};
pub use segment::{SegmentName, SegmentSize};
pub use summary::{CheckpointMark, CommitMark, Drop, DropKind, ParameterChange, RestorePoint, Summary};
pub use time::PgTime;
pub use timeline::{Ancestor, TimelineHistory, TimelineId};

/// A name, number or byte sequence that is not what PostgreSQL writes.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    #[error("\"{text}\" is not an LSN (two hexadecimal numbers with a slash, such as 0/16B3740)")]
    Lsn { text: String },
    #[error("\"{text}\" is not a timeline")]
    Timeline { text: String },
    #[error("a WAL segment size of {bytes} bytes does not exist (a power of two from 1 MiB to 1 GiB)")]
    SegmentSize { bytes: u64 },
    #[error("\"{text}\" is not the name of a WAL segment")]
    SegmentName { text: String },
    #[error("\"{text}\" is not a system identifier (a decimal number)")]
    SystemIdentifier { text: String },
    #[error("the history file of timeline {timeline} cannot be read: {why}")]
    History { timeline: TimelineId, why: String },
}
