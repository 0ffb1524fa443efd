//! One file for PostgreSQL, visible only when it is whole and verified.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::patience::Progress;
use crate::disk::Disk;
use crate::repository::{Archive, PieceChain, RepositoryError, WalObject, WalObjectKind};
use crate::restore::RestoreError;
use crate::restore::plan_file::PlannedTail;
use crate::seal::Compression;
use crate::wal::{Lsn, SegmentName};

/// Between the file's name and what makes a temporary name its own.
const TEMPORARY: &str = ".walden-tmp";
/// Files made until one is not taken for a leftover before it is locked.
const TRIES: u32 = 5;

/// A file that becomes visible only when it is whole. Dropped before, it leaves nothing.
///
/// Several may be on their way to one path: each has a name of its own, and the last one to be whole stays. The file is locked as long as
/// somebody writes it, so that what a killed run left can be told from it.
struct Delivery {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    progress: Arc<Progress>,
    done: bool,
}

impl Delivery {
    fn begin(path: &Path, progress: &Arc<Progress>) -> Result<Self, RestoreError> {
        remove_leftovers(path);
        let mut tries = TRIES;
        loop {
            let mut name = path.as_os_str().to_owned();
            name.push(format!("{TEMPORARY}-{}", uuid::Uuid::new_v4().simple()));
            let temporary = PathBuf::from(name);
            let io = || RestoreError::io("created", &temporary);
            let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(io())?;
            let (path, progress) = (path.to_owned(), progress.clone());
            let delivery = Self { file, temporary: temporary.clone(), path, progress, done: false };
            // PostgreSQL's own mode for WAL files in a directory that only its owner may read.
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            delivery.file.set_permissions(mode).map_err(io())?;
            let locked = rustix::fs::flock(&delivery.file, FlockOperation::NonBlockingLockExclusive);
            // Somebody may just have taken it for a leftover. A file system without locks has nobody who could.
            let taken =
                matches!(locked, Err(Errno::WOULDBLOCK)) || delivery.file.metadata().map_err(io())?.nlink() == 0;
            tries -= 1;
            if !taken || tries == 0 {
                return Ok(delivery);
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), RepositoryError> {
        self.progress.note();
        self.file.write_all(bytes).map_err(|source| self.local(source))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RepositoryError> {
        self.progress.note();
        self.file.write_all_at(bytes, offset).map_err(|source| self.local(source))
    }

    fn local(&self, source: std::io::Error) -> RepositoryError {
        RepositoryError::Local { key: self.temporary.display().to_string(), source }
    }

    /// Cuts or pads with zeros to `size`, then gives the file its name. PostgreSQL flushes what it keeps.
    fn finish(mut self, size: u64) -> Result<(), RestoreError> {
        self.file.set_len(size).map_err(RestoreError::io("written", &self.temporary))?;
        std::fs::rename(&self.temporary, &self.path).map_err(RestoreError::io("renamed", &self.temporary))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.done {
            // What stays is only a leftover under a name of ours.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Removes what runs for the same path left that were killed: nobody has it locked. What cannot be removed stays.
fn remove_leftovers(path: &Path) {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let mut prefix = name.as_encoded_bytes().to_vec();
    prefix.extend_from_slice(TEMPORARY.as_bytes());
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(&prefix)) {
        let Ok(file) = Disk::default().open_read(&entry.path()) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

pub(super) fn deliver_bytes(bytes: &[u8], path: &Path, progress: &Arc<Progress>) -> Result<(), RestoreError> {
    let mut delivery = Delivery::begin(path, progress)?;
    delivery.write(bytes)?;
    delivery.finish(bytes.len() as u64) // usize fits
}

fn whole(segment: SegmentName, compression: Compression) -> WalObject {
    WalObject { segment, kind: WalObjectKind::Segment, compression, valid_until: segment.end() }
}

fn piece_object(segment: SegmentName, start: u32, end: u32, compression: Compression) -> WalObject {
    let valid_until = Lsn::new(segment.start().get() + u64::from(end));
    WalObject { segment, kind: WalObjectKind::Piece { start, end }, compression, valid_until }
}

pub(super) async fn deliver_whole(
    archive: &Archive,
    segment: SegmentName,
    compression: Compression,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<(), RestoreError> {
    let mut delivery = Delivery::begin(path, progress)?;
    // Size, checksums and identity are proved before the file gets its name.
    archive.read_wal(&whole(segment, compression), |raw| delivery.write(raw)).await?;
    delivery.finish(segment.size().get())
}

/// The planned bytes of an open segment, padded with zeros. If the whole segment has replaced the pieces, the same bytes are taken from it.
pub(super) async fn deliver_tail(
    archive: &Archive,
    segment: SegmentName,
    tail: &PlannedTail,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<(), RestoreError> {
    let delivery = Delivery::begin(path, progress)?;
    for piece in &tail.pieces {
        let mut offset = u64::from(piece.start);
        let object = piece_object(segment, piece.start, piece.end, piece.compression);
        let read = archive
            .read_wal(&object, |raw| {
                delivery.write_at(offset, raw)?;
                offset += raw.len() as u64; // usize fits
                Ok(())
            })
            .await;
        match read {
            Ok(header) if header.raw_crc32 == piece.raw_crc32 => {}
            Ok(_) => {
                let why = format!("{} is not what it was when the restore was planned", object.key(archive.keys()));
                return Err(RestoreError::DamagedWal { why });
            }
            Err(error) if error.is_not_found() => {
                drop(delivery);
                return deliver_from_whole(archive, segment, tail, path, progress).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    delivery.finish_padded(tail.end, segment.size().get())
}

impl Delivery {
    /// Cuts at `end`, then pads with zeros to `size`.
    fn finish_padded(self, end: u64, size: u64) -> Result<(), RestoreError> {
        self.file.set_len(end).map_err(RestoreError::io("written", &self.temporary))?;
        self.finish(size)
    }
}

async fn deliver_from_whole(
    archive: &Archive,
    segment: SegmentName,
    tail: &PlannedTail,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<(), RestoreError> {
    let mut failed = None;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut delivery = Delivery::begin(path, progress)?;
        let (mut left, mut crc32) = (tail.end, crc32fast::Hasher::new());
        let read = archive
            .read_wal(&whole(segment, compression), |raw| {
                let take = usize::try_from(left).unwrap_or(usize::MAX).min(raw.len());
                crc32.update(&raw[..take]);
                left -= take as u64; // usize fits
                delivery.write(&raw[..take])
            })
            .await;
        match read {
            Ok(_) if crc32.finalize() == tail.raw_crc32 => {
                return delivery.finish_padded(tail.end, segment.size().get());
            }
            Ok(_) => {
                let why =
                    format!("{segment} does not begin with the bytes that were held when the restore was planned");
                return Err(RestoreError::DamagedWal { why });
            }
            Err(error) if error.is_not_found() => failed = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    Err(failed.expect("both were not found").into())
}

pub(super) async fn deliver_chain(
    archive: &Archive,
    segment: SegmentName,
    chain: &PieceChain,
    path: &Path,
    progress: &Arc<Progress>,
) -> Result<(), RestoreError> {
    let delivery = Delivery::begin(path, progress)?;
    for piece in &chain.pieces {
        let mut offset = u64::from(piece.start);
        let object = piece_object(segment, piece.start, piece.end, piece.compression);
        archive
            .read_wal(&object, |raw| {
                delivery.write_at(offset, raw)?;
                offset += raw.len() as u64; // usize fits
                Ok(())
            })
            .await?;
    }
    delivery.finish_padded(u64::from(chain.end), segment.size().get())
}
