//! One object on its way to one repository: put, retried without an end, read back.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::ArchiveError;
use super::gap::gap_of;
use super::records::REASON_LOST;
use super::tail::Piece;
use super::uploader::{Uploader, Work, describe, history_of, segment_of};
use crate::disk::Disk;
use crate::failure::NextStep;
use crate::queue::QueueEntry;
use crate::repository::{Gap, RepositoryError, RepositoryWriter, SealedObject, Stored};
use crate::seal::{Compression, SealError};
use crate::spool::{Spool, SpoolError, parse_relative};
use crate::storage::{Backoff, Body, StorageError};
use crate::telemetry::CauseCode;
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory};

/// Stored bytes of a piece that are held in memory while it is sent.
const IN_MEMORY_MAX: u64 = 1 << 20;

/// What came of one object.
pub(super) enum Shipped {
    Segment {
        entry: QueueEntry,
    },
    Piece {
        segment: SegmentName,
        start: u64,
        end: u64,
    },
    /// The piece's bytes are gone: the segment was sealed meanwhile, or is received anew.
    PieceGone {
        segment: SegmentName,
        start: u64,
    },
    Failed {
        error: ArchiveError,
        what: String,
    },
    /// It needs not be there any more: the spool had to make room, or it is fetched again.
    Released {
        entry: QueueEntry,
    },
    Cancelled,
}

impl Uploader {
    pub(super) async fn ship_piece(
        self,
        writer: RepositoryWriter,
        piece: Box<Piece>,
        cancel: CancellationToken,
    ) -> Shipped {
        let gone = Shipped::PieceGone { segment: piece.segment, start: piece.start };
        let (Ok(start), Ok(end)) = (u32::try_from(piece.start), u32::try_from(piece.end)) else {
            return gone; // a segment has at most 1 GiB
        };
        let compression = self.wal.borrow().as_ref().map_or(Compression::Lz4, |wal| wal.compression);
        let unreadable = |why: &dyn std::fmt::Display| {
            if self.tail.is_unreadable(&piece) {
                let path = piece.path.display();
                let message = format!(
                    "the open segment's file {path} does not hold what was written ({why}): it is received again; check the spool's disk"
                );
                self.board.raise(CauseCode::SpoolFailing, message);
            }
        };
        let body = match body_of(&piece).await {
            Ok(body) => body,
            Err(error) => {
                unreadable(&error);
                return gone;
            }
        };
        let object = SealedObject { body, size: piece.size, crc32: piece.crc32, compression };
        let mut backoff = Backoff::new(self.retry_delay_max);
        loop {
            let began = Instant::now();
            if !self.tail.holds(&piece) {
                return gone;
            }
            match writer.put_piece(piece.segment, start, end, &object).await {
                Ok(_) => {
                    self.shown.observe_upload(began.elapsed());
                    return Shipped::Piece { segment: piece.segment, start: piece.start, end: piece.end };
                }
                // The file got its final name while it was read, or it is damaged.
                Err(error)
                    if error.next_step() == NextStep::FetchAgain
                        || matches!(
                            error,
                            RepositoryError::Local { .. }
                                | RepositoryError::Storage(StorageError::SourceDamaged { .. })
                        ) =>
                {
                    unreadable(&error);
                    return gone;
                }
                Err(error) if !self.tail.holds(&piece) && !stops(&error) => {
                    self.shown.upload_failed();
                    self.tell_store(Work::Pieces, Some(describe(&error)));
                    return gone;
                }
                Err(error) if stops(&error) => {
                    let error = ArchiveError::Repository(error);
                    return Shipped::Failed {
                        error,
                        what: format!("tail piece {start:08X}-{end:08X} of {}", piece.segment),
                    };
                }
                Err(error) => {
                    self.shown.upload_failed();
                    self.tell_store(Work::Pieces, Some(describe(&error)));
                    let throttled = is_throttled(&error);
                    if throttled {
                        self.pace.throttled();
                    }
                    if !pause(&mut backoff, throttled, &cancel).await {
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
        may_have_pieces: bool,
        cancel: CancellationToken,
    ) -> Shipped {
        let mut backoff = Backoff::new(self.retry_delay_max);
        loop {
            if !self.backlog.contains(&entry) {
                return Shipped::Released { entry };
            }
            let began = Instant::now();
            let result = tokio::select! {
                result = self.put(&writer, &entry, may_have_pieces) => result,
                () = cancel.cancelled() => return Shipped::Cancelled,
            };
            match result {
                Ok(()) => {
                    self.settle(&entry, began.elapsed()).await;
                    return Shipped::Segment { entry };
                }
                Err(error) if entry_stops(&error) => return Shipped::Failed { error, what: entry.relative },
                Err(error) => {
                    self.shown.upload_failed();
                    self.tell_store(Work::Objects, Some(format!("{}; {}", error.describe(), error.hint())));
                    let throttled = matches!(&error, ArchiveError::Repository(e) if is_throttled(e));
                    if !pause(&mut backoff, throttled, &cancel).await {
                        return Shipped::Cancelled;
                    }
                    self.shown.upload_retried();
                }
            }
        }
    }

    /// Notes a stored object; removes from the spool what every repository holds.
    pub(super) async fn settle(&self, entry: &QueueEntry, took: Duration) {
        self.tell_store(Work::Objects, None);
        self.shown.observe_upload(took);
        tracing::debug!(
            event = "uploaded",
            repository = self.shown.name(),
            object = entry.relative,
            bytes = entry.stored_size,
            seconds = took.as_secs_f64(),
            "stored"
        );
        if entry.relative.starts_with("wal/") && segment_of(entry, self.segment_size).is_some() {
            self.shown.segment_archived();
        }
        let (backlog, spool, entry, name) =
            (self.backlog.clone(), self.spool.clone(), entry.clone(), self.shown.name().to_owned());
        let job = tokio::task::spawn_blocking(move || -> Result<(), ArchiveError> {
            backlog.confirm(&entry, &name);
            for done in backlog.removable() {
                spool
                    .disk()
                    .remove(&spool.folder().join(&done.relative))
                    .map_err(|source| ArchiveError::Remove { path: spool.folder().join(&done.relative), source })?;
                backlog.forget(&done);
            }
            Ok(())
        });
        match job.await {
            Ok(Ok(())) => {}
            // The object is stored; only the spool's copy stays longer, and a restart sends it again.
            Ok(Err(error)) => tracing::warn!(%error, "a stored object stays in the spool"),
            Err(panic) => self.halt.stop(ArchiveError::Internal { why: panic.to_string() }),
        }
    }

    /// Puts one spooled object and reads back that it is there.
    async fn put(
        &self,
        writer: &RepositoryWriter,
        entry: &QueueEntry,
        may_have_pieces: bool,
    ) -> Result<(), ArchiveError> {
        let goes = self.backlog.goes_once_stored(entry);
        put_spooled(&self.spool, self.segment_size, writer, entry, goes, may_have_pieces).await
    }
}

/// Puts one spooled object and reads back that it is there. `goes`: its spool file is removed as soon as it is. `may_have_pieces`: those
/// that are there of its segment are compared with it first, since it takes their place (I7).
pub(super) async fn put_spooled(
    spool: &Spool,
    segment_size: SegmentSize,
    writer: &RepositoryWriter,
    entry: &QueueEntry,
    goes: bool,
    may_have_pieces: bool,
) -> Result<(), ArchiveError> {
    let path = spool.folder().join(&entry.relative);
    let unknown = || ArchiveError::Internal { why: format!("{} is no spooled object", entry.relative) };
    let name = parse_relative(&entry.relative, segment_size).ok_or_else(unknown)?;
    if let Some(to) = name.gap_end() {
        let written = read_small(&path, entry).await.ok().and_then(|content| Gap::parse(&content).ok());
        // A gap whose file was damaged is a gap all the same: its name says all but the reason.
        let again = || gap_of(writer.archive().system(), name.timeline, Lsn::new(name.order), to, REASON_LOST);
        return Ok(writer.put_gap(&written.unwrap_or_else(again)).await.map(|_| ())?);
    }
    if let Some(timeline) = history_of(&entry.relative) {
        let content = read_small(&path, entry).await?;
        TimelineHistory::parse(timeline, &content).map_err(|error| {
            let source = SealError::Data { why: error.to_string() };
            SpoolError::Damaged { path, source }
        })?;
        let stored = writer.put_history(timeline, &content).await?;
        return prove(writer, &stored).await;
    }
    if let Err(error) = tokio::fs::symlink_metadata(&path).await
        && error.kind() == std::io::ErrorKind::NotFound
    {
        return Err(SpoolError::Gone { path }.into());
    }
    let segment = segment_of(entry, segment_size).ok_or_else(unknown)?;
    let suffix = entry.relative.rsplit_once('.').map_or("", |(_, suffix)| suffix);
    let compression = Compression::from_suffix(suffix).ok_or_else(unknown)?;
    let size = entry.stored_size;
    let body = Body::SealedFile { path, length: size, goes };
    let object = SealedObject { body, size, crc32: entry.crc32, compression };
    if may_have_pieces {
        writer.check_pieces(segment, &object).await?;
    }
    let stored = match piece_end(&entry.relative).filter(|_| entry.relative.starts_with("tail/")) {
        Some(end) => writer.put_piece(segment, 0, end, &object).await?,
        None => writer.put_segment(segment, &object).await?,
    };
    prove(writer, &stored).await
}

async fn prove(writer: &RepositoryWriter, stored: &Stored) -> Result<(), ArchiveError> {
    if writer.read_back(stored).await? { Ok(()) } else { Err(ArchiveError::NotThere { key: stored.key.clone() }) }
}

/// The piece's bytes at hand, so that the file may be renamed meanwhile. A large one is read where it lies, as it is sent.
async fn body_of(piece: &Piece) -> std::io::Result<Body> {
    if piece.body_len > IN_MEMORY_MAX {
        return Ok(piece.body());
    }
    let (path, offset) = (piece.path.clone(), piece.file_offset);
    let (head, foot) = (piece.head.clone(), piece.foot.clone());
    let length = usize::try_from(piece.body_len).map_err(std::io::Error::other)?;
    let read = move || {
        let file = Disk::default().open_read(&path)?;
        let mut bytes = vec![0; head.len() + length + foot.len()];
        bytes[..head.len()].copy_from_slice(&head);
        file.read_exact_at(&mut bytes[head.len()..head.len() + length], offset)?;
        bytes[head.len() + length..].copy_from_slice(&foot);
        Ok(Body::Bytes(bytes.into()))
    };
    tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other)?
}

/// A small object, if it still is what was recorded.
async fn read_small(path: &Path, entry: &QueueEntry) -> Result<Vec<u8>, ArchiveError> {
    let damaged = |source| SpoolError::Damaged { path: path.into(), source };
    let sized = |found: u64| damaged(SealError::Size { expected: entry.stored_size, found });
    let length = match tokio::fs::symlink_metadata(path).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(SpoolError::Gone { path: path.into() }.into());
        }
        other => other.map_err(|source| ArchiveError::Read { path: path.into(), source })?.len(),
    };
    if length != entry.stored_size {
        return Err(sized(length).into());
    }
    let content = tokio::fs::read(path).await.map_err(|source| ArchiveError::Read { path: path.into(), source })?;
    let found = crc32fast::hash(&content);
    if found != entry.crc32 {
        let (what, expected) = ("CRC-32", entry.crc32);
        return Err(damaged(SealError::Checksum { what, expected, found }).into());
    }
    Ok(content)
}

/// Errors that no retry cures. Whatever else a store answers, be it a redirect or a refused setting, it may take back (I21).
fn stops(error: &RepositoryError) -> bool {
    error.is_conflict() || error.is_lease_lost() || error.next_step() == NextStep::FetchAgain
}

fn entry_stops(error: &ArchiveError) -> bool {
    match error {
        ArchiveError::Repository(error) => stops(error),
        error => matches!(error.next_step(), NextStep::Stop | NextStep::FetchAgain),
    }
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

pub(super) fn piece_end(relative: &str) -> Option<u32> {
    let range = relative.rsplit_once('/')?.1.split('.').next()?;
    u32::from_str_radix(range.strip_prefix("00000000-")?, 16).ok()
}

#[cfg(test)]
#[path = "ship_tests.rs"]
mod tests;
