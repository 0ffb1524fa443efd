//! Is what is stored the same WAL as what lies here? Raw bytes against raw bytes, since a CRC never proves two histories equal.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::{Archive, RepositoryError, WalObject};
use crate::seal::{ObjectDecoder, ObjectHeader, SealError};
use crate::storage::{Body, StorageError};
use crate::wal::Lsn;

/// Stored bytes read from local disk at a time.
const LOCAL_BYTES: usize = 256 << 10;
/// Stored bytes decoded at a time: of zeros, Zstandard makes some 32,000 times as much of them, which bounds the memory at some 32 MiB a side.
const DECODE_BYTES: usize = 1 << 10;

/// Compares the raw WAL of a stored object with that of a local one. Gives the size and the CRC-32 of the stored object, which has
/// been read wholly.
///
/// Both are read to their ends, since only there they prove themselves, and only two that are proven can be a conflict: then
/// `Conflict` names the first LSN at which they differ. A damaged local one is `LocalDamaged`. A stored one that is no such object is
/// read again: the same bytes twice lie there (`Occupied`), other ones were changed on their way, which passes.
pub(super) async fn same_wal(
    archive: &Archive,
    stored: &WalObject,
    local: &Body,
) -> Result<(u64, u32), RepositoryError> {
    let key = stored.key(archive.keys());
    let Compared { here, there, differs, size, crc32 } = read_both(archive, &key, local).await?;
    here.map_err(|source| RepositoryError::LocalDamaged { key: key.clone(), source })?;
    let there = there.map_err(|source| archive.damaged(&key, source));
    if let Err(error) = there.and_then(|header| archive.check_identity(&key, stored, &header)) {
        return Err(occupied_or_disturbed(archive, key, (size, crc32), error).await);
    }
    match differs {
        None => Ok((size, crc32)),
        Some(offset) => {
            let at = Lsn::new(stored.start().get().saturating_add(offset));
            Err(RepositoryError::Conflict { url: archive.url(), key, at })
        }
    }
}

/// What to make of a stored object that was read as something else than what its key says.
async fn occupied_or_disturbed(
    archive: &Archive,
    key: String,
    first: (u64, u32),
    error: RepositoryError,
) -> RepositoryError {
    match archive.store().sum(&key).await {
        Ok(second) if second == first => RepositoryError::Occupied { url: archive.url(), key, why: why(&error) },
        Ok(_) => disturbed(archive, &key),
        Err(error) => error.into(),
    }
}

/// Two reads of one object differ, which is the fault of something between.
pub(super) fn disturbed(archive: &Archive, key: &str) -> RepositoryError {
    RepositoryError::Storage(StorageError::Unavailable {
        url: archive.url(),
        what: format!("reading {key}"),
        source: Some("two reads of it gave different bytes".into()),
    })
}

fn why(error: &RepositoryError) -> String {
    match error {
        RepositoryError::Damaged { source, .. } => source.to_string(),
        RepositoryError::Identity { found, expected, .. } => format!("it says that it is {found}, not {expected}"),
        error => error.to_string(),
    }
}

/// Two objects that were read to their ends.
struct Compared {
    here: Result<ObjectHeader, SealError>,
    there: Result<ObjectHeader, SealError>,
    /// The first raw byte at which they differ; proves something only if both are `Ok`.
    differs: Option<u64>,
    /// Of the stored one.
    size: u64,
    crc32: u32,
}

async fn read_both(archive: &Archive, key: &str, local: &Body) -> Result<Compared, RepositoryError> {
    let (mut there, mut here) = (Side::default(), Side::default());
    let mut stream = archive.get_stream(key).await?;
    let (mut local_offset, mut compared, mut differs) = (0, 0u64, None);
    let (mut size, mut crc32) = (0u64, crc32fast::Hasher::new());
    loop {
        while there.wants_more() {
            if there.waiting.is_empty() {
                match stream.try_next().await? {
                    Some(chunk) => {
                        size += chunk.len() as u64; // usize fits
                        crc32.update(&chunk);
                        there.waiting = chunk;
                    }
                    None => there.ended = true,
                }
            }
            there.decode();
        }
        while here.wants_more() {
            if here.waiting.is_empty() {
                match read_local(local, local_offset, LOCAL_BYTES).await {
                    Ok(chunk) => {
                        local_offset += chunk.len() as u64; // usize fits
                        here.ended = chunk.is_empty();
                        here.waiting = chunk;
                    }
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        here.failed = Some(SealError::Data { why: "it has become shorter".into() });
                        here.ended = true;
                    }
                    Err(source) => return Err(RepositoryError::Local { key: key.into(), source }),
                }
            }
            here.decode();
        }
        let length = there.raw.len().min(here.raw.len());
        if length == 0 {
            if there.raw.is_empty() && here.raw.is_empty() {
                break;
            }
            // One has ended; what the other one still has is read for its proof.
            differs.get_or_insert(compared);
            there.raw.clear();
            here.raw.clear();
            continue;
        }
        if differs.is_none() && there.raw[..length] != here.raw[..length] {
            let equal = there.raw.iter().zip(&here.raw).take_while(|(a, b)| a == b).count();
            differs = Some(compared + equal as u64); // usize fits
        }
        compared += length as u64; // usize fits
        there.raw.drain(..length);
        here.raw.drain(..length);
    }
    Ok(Compared { here: here.finish(), there: there.finish(), differs, size, crc32: crc32.finalize() })
}

/// One of the two objects while it is read.
#[derive(Default)]
struct Side {
    decoder: ObjectDecoder,
    /// It cannot be decoded further; what still comes is only counted.
    failed: Option<SealError>,
    /// Stored bytes not yet decoded.
    waiting: Bytes,
    /// Raw bytes not yet compared.
    raw: Vec<u8>,
    ended: bool,
}

impl Side {
    fn wants_more(&self) -> bool {
        self.raw.is_empty() && !self.ended
    }

    fn decode(&mut self) {
        let piece = self.waiting.split_to(self.waiting.len().min(DECODE_BYTES));
        if self.failed.is_some() {
            self.waiting.clear();
            return;
        }
        let raw = &mut self.raw;
        let pushed = self.decoder.push(&piece, |bytes| {
            raw.extend_from_slice(bytes);
            Ok::<(), SealError>(())
        });
        self.failed = pushed.err();
    }

    fn finish(self) -> Result<ObjectHeader, SealError> {
        match self.failed {
            Some(error) => Err(error),
            None => self.decoder.finish(),
        }
    }
}

/// At most `length` bytes of a body from `offset`; empty at its end. A file that is shorter than the body says is an error.
pub(super) async fn read_local(body: &Body, offset: u64, length: usize) -> io::Result<Bytes> {
    let (path, file_offset, file_length, prefix, suffix) = match body {
        Body::Bytes(bytes) => return Ok(slice(bytes, offset, length)),
        Body::SealedFile { path, length, .. } => (path, 0, *length, &Bytes::new(), &Bytes::new()),
        Body::FileRange { path, offset, length, prefix, suffix } => (path, *offset, *length, prefix, suffix),
    };
    let prefix_length = prefix.len() as u64; // usize fits
    if offset < prefix_length {
        let mut out = slice(prefix, offset, length).to_vec();
        if out.len() < length && file_length > 0 {
            let rest = (length - out.len()).min(usize::try_from(file_length).unwrap_or(usize::MAX));
            out.extend_from_slice(&read_file(path.clone(), file_offset, rest).await?);
        }
        return Ok(out.into());
    }
    let inside = offset - prefix_length;
    if inside < file_length {
        let take = usize::try_from(file_length - inside).unwrap_or(usize::MAX).min(length);
        return read_file(path.clone(), file_offset + inside, take).await;
    }
    Ok(slice(suffix, inside - file_length, length))
}

fn slice(bytes: &Bytes, offset: u64, length: usize) -> Bytes {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
    bytes.slice(from..bytes.len().min(from.saturating_add(length)))
}

async fn read_file(path: std::path::PathBuf, offset: u64, length: usize) -> io::Result<Bytes> {
    let read = move || {
        let file: File = crate::disk::Disk::default().open_read(&path)?;
        let mut buffer = vec![0; length];
        file.read_exact_at(&mut buffer, offset)?;
        Ok(Bytes::from(buffer))
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}
