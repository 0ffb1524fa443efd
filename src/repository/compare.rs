//! Is what is stored the same WAL as what lies here? Raw bytes against raw bytes, since a CRC never proves two histories equal.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use futures_util::TryStreamExt;

use super::{Archive, RepositoryError, WalObject};
use crate::seal::{ObjectDecoder, SealError};
use crate::storage::Body;
use crate::wal::Lsn;

/// Stored bytes read from local disk at a time.
const LOCAL_BYTES: usize = 256 << 10;
/// Stored bytes decoded at a time: LZ4 can make 255 times as much of them, which bounds the memory at some 4 MiB a side.
const DECODE_BYTES: usize = 16 << 10;

/// Compares the raw WAL of a stored object with that of a local one. `Conflict` names the first LSN at which they differ. Gives
/// the size and the CRC-32 of the stored object, which has been read wholly.
pub(super) async fn same_wal(
    archive: &Archive,
    stored: &WalObject,
    local: &Body,
) -> Result<(u64, u32), RepositoryError> {
    let key = stored.key(archive.keys());
    let conflict = |offset: u64| RepositoryError::Conflict {
        url: archive.url(),
        key: key.clone(),
        at: Lsn::new(stored.start().get().saturating_add(offset)),
    };
    let mut there = Side::default();
    let mut here = Side::default();
    let mut stream = archive.get_stream(&key).await?;
    let (mut local_offset, mut compared) = (0, 0u64);
    let (mut size, mut crc32) = (0u64, crc32fast::Hasher::new());
    loop {
        while there.raw.is_empty() && !there.ended {
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
            there.decode().map_err(|source| archive.damaged(&key, source))?;
        }
        while here.raw.is_empty() && !here.ended {
            if here.waiting.is_empty() {
                let chunk = read_local(local, local_offset, LOCAL_BYTES).await;
                let chunk = chunk.map_err(|source| RepositoryError::Local { key: key.clone(), source })?;
                local_offset += chunk.len() as u64; // usize fits
                here.ended = chunk.is_empty();
                here.waiting = chunk;
            }
            here.decode().map_err(|source| RepositoryError::LocalDamaged { key: key.clone(), source })?;
        }
        let length = there.raw.len().min(here.raw.len());
        if length == 0 {
            break;
        }
        if there.raw[..length] != here.raw[..length] {
            let equal = there.raw.iter().zip(&here.raw).take_while(|(a, b)| a == b).count();
            return Err(conflict(compared + equal as u64)); // usize fits
        }
        compared += length as u64; // usize fits
        there.raw.drain(..length);
        here.raw.drain(..length);
    }
    // Each side proves itself before their equality counts; a damaged one is no conflict.
    let header = there.decoder.finish().map_err(|source| archive.damaged(&key, source))?;
    archive.check_identity(&key, stored, &header)?;
    let ours = here.decoder.finish().map_err(|source| RepositoryError::LocalDamaged { key: key.clone(), source })?;
    if header.raw_size != ours.raw_size {
        return Err(conflict(compared));
    }
    Ok((size, crc32.finalize()))
}

/// One of the two objects while it is read.
#[derive(Default)]
struct Side {
    decoder: ObjectDecoder,
    /// Stored bytes not yet decoded.
    waiting: Bytes,
    /// Raw bytes not yet compared.
    raw: Vec<u8>,
    ended: bool,
}

impl Side {
    fn decode(&mut self) -> Result<(), SealError> {
        let piece = self.waiting.split_to(self.waiting.len().min(DECODE_BYTES));
        let raw = &mut self.raw;
        self.decoder.push(&piece, |bytes| {
            raw.extend_from_slice(bytes);
            Ok::<(), SealError>(())
        })
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
