//! The bytes to store, on the side that they come from: opened without following a link, read in pieces, summed up.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::PIECE;

/// Opens the file to store: a regular one of at least (`exactly`: just) `size` bytes. The error says why it is not one.
pub(super) fn open(path: &Path, size: u64, exactly: bool) -> Result<File, String> {
    // NONBLOCK, or a FIFO in its place would hold the thread for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(opened.map_err(|error| format!("opening {} failed: {error}", path.display()))?);
    let metadata = file.metadata().map_err(|error| format!("reading {} failed: {error}", path.display()))?;
    let fits = if exactly { metadata.len() == size } else { metadata.len() >= size };
    if !metadata.is_file() {
        Err(format!("{} is not a regular file", path.display()))
    } else if !fits {
        Err(format!("{} has {} bytes, {size} are to be stored", path.display(), metadata.len()))
    } else {
        Ok(file)
    }
}

/// What went wrong in `for_pieces`: the source, or what was done with a piece.
pub(super) enum PieceError<E> {
    Source(String),
    Work(E),
}

/// Reads `length` bytes from `offset` in pieces of at most 256 KiB, which stay in the processor's cache between the reads and the writes.
pub(super) fn for_pieces<E>(
    source: &File,
    offset: u64,
    length: u64,
    work: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), PieceError<E>> {
    let mut buffer = vec![0; PIECE.min(usize::try_from(length).unwrap_or(PIECE))];
    let mut done = 0;
    while done < length {
        let wanted = usize::try_from(length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
        let piece = &mut buffer[..wanted];
        let read = source.read_exact_at(piece, offset + done);
        read.map_err(|error| PieceError::Source(format!("reading it failed: {error}")))?;
        work(piece).map_err(PieceError::Work)?;
        done += wanted as u64;
    }
    Ok(())
}

/// The CRC-32 of the first `length` bytes.
pub(super) fn sum_of(source: &File, length: u64) -> Result<u32, String> {
    let mut sum = crc32fast::Hasher::new();
    let read = for_pieces(source, 0, length, &mut |piece| {
        sum.update(piece);
        Ok(())
    });
    read.map_err(|error| match error {
        PieceError::Source(why) | PieceError::Work(why) => why,
    })?;
    Ok(sum.finalize())
}

pub(super) fn check_crc32(found: u32, expected: u32) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("their CRC-32 is {found:08x} instead of {expected:08x}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_the_right_size_are_sources() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        open(&path, 5, true).unwrap();
        open(&path, 4, false).unwrap();
        assert!(open(&path, 4, true).is_err());
        assert!(open(&path, 6, false).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(open(&link, 5, true).is_err());
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).unwrap();
        assert!(open(&fifo, 0, true).is_err());
        assert!(open(folder.path(), 0, false).is_err());
    }
}
