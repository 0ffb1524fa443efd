//! One object on its way to one repository: put, retried without an end, read back.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::tail::Piece;
use super::uploader::{Uploader, describe, segment_of};
use crate::failure::NextStep;
use crate::queue::QueueEntry;
use crate::repository::{Gap, RepositoryError, RepositoryWriter, SealedObject, Stored};
use crate::seal::Compression;
use crate::spool::{Spool, parse_relative};
use crate::storage::{Backoff, Body, StorageError};
use crate::wal::{SegmentName, SegmentSize, TimelineId};

/// What came of one object.
pub(super) enum Shipped {
    Segment {
        entry: QueueEntry,
        took: Duration,
    },
    Piece {
        segment: SegmentName,
        end: u64,
    },
    /// The piece's bytes are gone: the segment was sealed meanwhile.
    PieceGone,
    Failed {
        error: ArchiveError,
        what: String,
    },
    Cancelled,
}

impl Uploader {
    pub(super) async fn ship_piece(self, writer: RepositoryWriter, piece: Piece, cancel: CancellationToken) -> Shipped {
        let (Ok(start), Ok(end)) = (u32::try_from(piece.start), u32::try_from(piece.end)) else {
            return Shipped::PieceGone; // a segment has at most 1 GiB
        };
        let compression = self.wal.borrow().as_ref().map_or(Compression::Lz4, |wal| wal.compression);
        let object = SealedObject { body: piece.body.clone(), size: piece.size, crc32: piece.crc32, compression };
        let mut backoff = Backoff::new(self.retry_delay_max);
        loop {
            let began = Instant::now();
            // The open file is renamed when its segment is whole; then the segment itself is shipped.
            if self.tail.segment() != Some(piece.segment) {
                return Shipped::PieceGone;
            }
            match writer.put_piece(piece.segment, start, end, &object).await {
                Ok(_) => {
                    self.shown.observe_upload(began.elapsed());
                    return Shipped::Piece { segment: piece.segment, end: piece.end };
                }
                // The file got its final name while it was read: the whole segment is shipped instead.
                Err(RepositoryError::Storage(StorageError::SourceDamaged { .. }) | RepositoryError::Local { .. }) => {
                    return Shipped::PieceGone;
                }
                Err(_) if self.tail.segment() != Some(piece.segment) => return Shipped::PieceGone,
                Err(error) if stops(&error) => {
                    let error = ArchiveError::Repository(error);
                    return Shipped::Failed {
                        error,
                        what: format!("tail piece {start:08X}-{end:08X} of {}", piece.segment),
                    };
                }
                Err(error) => {
                    self.shown.upload_failed();
                    self.failing.set(&self.board, &self.shown, Some(describe(&error)));
                    if !pause(&mut backoff, is_throttled(&error), &cancel).await {
                        return Shipped::Cancelled;
                    }
                    self.shown.upload_retried();
                }
            }
        }
    }

    pub(super) async fn ship_entry(
        self,
        writer: RepositoryWriter,
        entry: QueueEntry,
        cancel: CancellationToken,
    ) -> Shipped {
        let mut backoff = Backoff::new(self.retry_delay_max);
        loop {
            let began = Instant::now();
            let result = tokio::select! {
                result = self.put(&writer, &entry) => result,
                () = cancel.cancelled() => return Shipped::Cancelled,
            };
            match result {
                Ok(()) => return Shipped::Segment { entry, took: began.elapsed() },
                Err(error) if matches!(error.next_step(), NextStep::Stop | NextStep::FetchAgain) => {
                    return Shipped::Failed { error, what: entry.relative };
                }
                Err(error) => {
                    self.shown.upload_failed();
                    self.failing.set(&self.board, &self.shown, Some(format!("{}; {}", error.describe(), error.hint())));
                    let throttled = matches!(&error, ArchiveError::Repository(e) if is_throttled(e));
                    if !pause(&mut backoff, throttled, &cancel).await {
                        return Shipped::Cancelled;
                    }
                    self.shown.upload_retried();
                }
            }
        }
    }

    async fn put(&self, writer: &RepositoryWriter, entry: &QueueEntry) -> Result<(), ArchiveError> {
        put_spooled(&self.spool, self.segment_size, writer, entry).await
    }
}

/// Puts one spooled object and reads back that it is there.
pub(super) async fn put_spooled(
    spool: &Spool,
    segment_size: SegmentSize,
    writer: &RepositoryWriter,
    entry: &QueueEntry,
) -> Result<(), ArchiveError> {
    let path = spool.folder().join(&entry.relative);
    let unknown = || ArchiveError::Internal { why: format!("{} is no spooled object", entry.relative) };
    if let Some(timeline) = entry.relative.strip_prefix("wal/").and_then(|name| name.strip_suffix(".history")) {
        let timeline = TimelineId::from_hex(timeline)?;
        let stored = writer.put_history(timeline, &read_small(&path).await?).await?;
        return prove(writer, &stored).await;
    }
    if entry.relative.starts_with("gaps/") {
        let gap = Gap::parse(&read_small(&path).await?).map_err(|_| unknown())?;
        return Ok(writer.put_gap(&gap).await.map(|_| ())?);
    }
    let name = parse_relative(&entry.relative, segment_size);
    let segment = segment_of(entry, segment_size).filter(|_| name.is_some()).ok_or_else(unknown)?;
    let suffix = entry.relative.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    let compression = Compression::from_suffix(suffix).ok_or_else(unknown)?;
    let size = entry.stored_size;
    let body = Body::SealedFile { path, length: size };
    let object = SealedObject { body, size, crc32: entry.crc32, compression };
    let stored = match piece_end(&entry.relative).filter(|_| entry.relative.starts_with("tail/")) {
        Some(end) => writer.put_piece(segment, 0, end, &object).await?,
        None => writer.put_segment(segment, &object).await?,
    };
    prove(writer, &stored).await
}

async fn prove(writer: &RepositoryWriter, stored: &Stored) -> Result<(), ArchiveError> {
    if writer.read_back(stored).await? { Ok(()) } else { Err(ArchiveError::NotThere { key: stored.key.clone() }) }
}

async fn read_small(path: &std::path::Path) -> Result<Vec<u8>, ArchiveError> {
    tokio::fs::read(path).await.map_err(|source| ArchiveError::Read { path: path.into(), source })
}

/// Errors that no retry cures.
fn stops(error: &RepositoryError) -> bool {
    error.is_conflict() || error.is_lease_lost() || matches!(error.next_step(), NextStep::Stop | NextStep::FetchAgain)
}

fn is_throttled(error: &RepositoryError) -> bool {
    matches!(error, RepositoryError::Storage(StorageError::Throttled { .. }))
}

async fn pause(backoff: &mut Backoff, throttled: bool, cancel: &CancellationToken) -> bool {
    let delay = if throttled { backoff.next_delay_throttled() } else { backoff.next_delay() };
    tokio::select! {
        () = tokio::time::sleep(delay) => true,
        () = cancel.cancelled() => false,
    }
}

fn piece_end(relative: &str) -> Option<u32> {
    let range = relative.rsplit_once('/')?.1.split('.').next()?;
    u32::from_str_radix(range.strip_prefix("00000000-")?, 16).ok()
}
