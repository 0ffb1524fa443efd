//! Creating and changing objects.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::Errno;

use super::lock::DirectoryLock;
use super::publish::{Publish, publish, publish_link};
use super::tree::{Tree, split};
use super::{io_error, read_whole};
use crate::storage::source::{self, PieceError, check_crc32, for_pieces, sum_of};
use crate::storage::{Body, PutOutcome, StorageError};

pub(super) fn put_new(tree: &Arc<Tree>, key: &str, body: &Body, crc32: u32) -> Result<PutOutcome, StorageError> {
    let damaged = |why: String| StorageError::SourceDamaged { url: tree.url.clone(), key: key.to_owned(), why };
    match body {
        Body::Bytes(bytes) => {
            check_crc32(crc32fast::hash(bytes), crc32).map_err(damaged)?;
            publish(tree, key, Publish::IfAbsent, &mut |file| {
                file.write_all(bytes).map_err(|error| io_error(tree, error, "writing", key))
            })
        }
        Body::SealedFile { path, length, goes } => {
            let source = source::open(path, *length, true).map_err(damaged)?;
            if *goes {
                check_crc32(sum_of(&source, *length).map_err(damaged)?, crc32).map_err(damaged)?;
                if let Some(outcome) = publish_link(tree, key, &source)? {
                    return Ok(outcome);
                }
            }
            let span = Span { source: &source, offset: 0, length: *length, prefix: &[], suffix: &[] };
            publish(tree, key, Publish::IfAbsent, &mut |file| {
                if !copy_in_kernel(&source, file, *length) {
                    return span.copy(tree, key, file, crc32);
                }
                // What has arrived is what counts.
                check_crc32(sum_of(file, *length).map_err(damaged)?, crc32).map_err(damaged)
            })
        }
        Body::FileRange { path, offset, length, prefix, suffix } => {
            let end = offset.checked_add(*length).ok_or_else(|| damaged("the range is too large".to_owned()))?;
            let source = source::open(path, end, false).map_err(damaged)?;
            let span = Span { source: &source, offset: *offset, length: *length, prefix, suffix };
            publish(tree, key, Publish::IfAbsent, &mut |file| span.copy(tree, key, file, crc32))
        }
    }
}

/// Copies without a way through this process; some file systems then write nothing until one of the two files is changed. `false`: it
/// cannot be done here, and the file is empty as before.
fn copy_in_kernel(source: &File, file: &File, length: u64) -> bool {
    let (mut from, mut to) = (0, 0);
    while to < length {
        let wanted = usize::try_from(length - to).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), file, Some(&mut to), wanted) {
            Ok(copied) if copied > 0 => {}
            Err(Errno::INTR) => {}
            // Two file systems, one that does not know how, a full disk: copying by hand works or tells why not.
            Ok(_) | Err(_) => {
                // If it cannot be cut back, that shows in the sum.
                let _ = file.set_len(0);
                return false;
            }
        }
    }
    true
}

/// Bytes to copy into an object.
struct Span<'a> {
    source: &'a File,
    offset: u64,
    length: u64,
    prefix: &'a [u8],
    suffix: &'a [u8],
}

impl Span<'_> {
    /// Copies and sums up in one pass; a wrong sum is an error, and the file goes with its temporary name.
    fn copy(&self, tree: &Tree, key: &str, file: &mut File, crc32: u32) -> Result<(), StorageError> {
        let damaged = |why: String| StorageError::SourceDamaged { url: tree.url.clone(), key: key.to_owned(), why };
        let failed = |error| io_error(tree, error, "writing", key);
        let mut sum = crc32fast::Hasher::new();
        sum.update(self.prefix);
        file.write_all(self.prefix).map_err(failed)?;
        let copied = for_pieces(self.source, self.offset, self.length, &mut |piece| {
            sum.update(piece);
            file.write_all(piece).map_err(failed)
        });
        copied.map_err(|error| match error {
            PieceError::Source(why) => damaged(why),
            PieceError::Work(error) => error,
        })?;
        sum.update(self.suffix);
        file.write_all(self.suffix).map_err(failed)?;
        check_crc32(sum.finalize(), crc32).map_err(damaged)
    }
}

pub(super) fn compare_and_swap(
    tree: &Arc<Tree>,
    key: &str,
    body: &Bytes,
    expected: Option<&str>,
) -> Result<PutOutcome, StorageError> {
    let mut write = |file: &mut File| file.write_all(body).map_err(|error| io_error(tree, error, "writing", key));
    let _lock = DirectoryLock::take(tree, split(key).0)?;
    let Some(expected) = expected else {
        return publish(tree, key, Publish::IfAbsent, &mut write);
    };
    match read_whole(tree, key, u64::MAX) {
        Ok((_, version)) if version == expected => publish(tree, key, Publish::Replace, &mut write),
        Ok(_) | Err(StorageError::NotFound { .. }) => Ok(PutOutcome::Exists),
        Err(error) => Err(error),
    }
}
