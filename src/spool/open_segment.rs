use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::mark::{MARK_LEN, MARK_OFFSETS, Mark};
use super::{SpoolError, at};
use crate::disk::{Disk, DiskFile};
use crate::seal::{Compression, Encoder, HEADER_LEN, SealError, SealedFrames, StreamDecoder};

/// The segment that is still being written: a reserved header, then the body as it grows.
#[derive(Debug)]
pub struct OpenSegment {
    disk: Disk,
    file: DiskFile,
    body_len: u64,
    /// The last one that is durable.
    marked: Option<Mark>,
}

impl OpenSegment {
    /// Creates the file with an empty header. Not durable yet.
    pub fn create(disk: &Disk, path: &Path) -> Result<Self, SpoolError> {
        let file = disk.create_new(path).map_err(at("create", path))?;
        if let Err(error) = file.write_at(&empty_head(), 0) {
            // So that the same call may be made again once there is room.
            disk.remove(path).map_err(at("remove", path))?;
            return Err(at("write", path)(error));
        }
        Ok(Self { disk: disk.clone(), file, body_len: 0, marked: None })
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Adds to the body. After `Full` the same call may be made again.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        self.file.write_at(bytes, HEADER_LEN as u64 + self.body_len).map_err(at("write", self.file.path()))?;
        self.body_len += bytes.len() as u64; // usize fits
        Ok(())
    }

    /// Makes all that was appended durable, with a mark that says how much it is.
    pub fn mark(&mut self, mut mark: Mark) -> Result<(), SpoolError> {
        assert_eq!(mark.body_len, self.body_len, "a mark is made where the body ends");
        let path = self.file.path();
        // A write that failed is made again in the same place, never over the mark that counts.
        mark.generation = self.marked.as_ref().map_or(0, |marked| marked.generation) + 1;
        self.file.write_at(&mark.encode(), mark.offset()).map_err(at("write", path))?;
        let flushed = self.sync().and_then(|()| match path.parent() {
            // The first mark makes the name durable as well.
            Some(folder) if self.marked.is_none() => {
                self.disk.sync_folder(folder).map_err(|source| SpoolError::Sync { path: folder.into(), source })
            }
            _ => Ok(()),
        });
        if let Err(error) = flushed {
            self.write_back_head();
            return Err(error);
        }
        self.marked = Some(mark);
        Ok(())
    }

    /// Completes the object and flushes it. It still has its temporary name.
    pub fn finish(&mut self, frames: &SealedFrames) -> Result<(), SpoolError> {
        let path = self.file.path();
        let end = HEADER_LEN as u64 + self.body_len;
        assert_eq!(frames.stored_size, end + frames.tail.len() as u64, "the header was made for this body");
        self.file.write_at(&frames.tail, end).map_err(at("write", path))?;
        if self.marked.is_some() {
            // The header takes the place of the marks. They prove what was confirmed until the whole body is durable.
            self.sync()?;
        }
        let finished = self.file.write_at(&frames.head, 0).map_err(at("write", path)).and_then(|()| self.sync());
        if finished.is_err() {
            self.write_back_head();
        }
        finished
    }

    /// After a failed flush the kernel may still show what it did not store: whoever reads the file then must find the last proven
    /// mark and no other, and no header. Not flushed, since that would prove nothing: what the disk itself has is either this, or
    /// whole.
    fn write_back_head(&self) {
        let mut head = empty_head();
        if let Some(marked) = &self.marked {
            let offset = usize::try_from(marked.offset()).expect("a mark lies in the head");
            head[offset..offset + MARK_LEN].copy_from_slice(&marked.encode());
        }
        if let Err(error) = self.file.write_at(&head, 0) {
            // The server still has the segment: better no file than one that says more than was proven.
            tracing::error!(path = %self.file.path().display(), "an unproven mark could not be taken back: {error}");
            if let Err(error) = self.disk.remove(self.file.path()) {
                tracing::error!(path = %self.file.path().display(), "and the file could not be removed: {error}");
            }
        }
    }

    fn sync(&self) -> Result<(), SpoolError> {
        self.file.sync().map_err(|source| SpoolError::Sync { path: self.file.path().into(), source })
    }

    /// Writes what is durable by the last mark into a file of its own, after a flush of this one failed: what came after the mark is
    /// void, what was confirmed is not (I1, I9). False if there is nothing of it.
    pub fn salvage(&self, path: &Path) -> Result<bool, SpoolError> {
        let Some(marked) = &self.marked else { return Ok(false) };
        let mut copy = Self::create(&self.disk, path)?;
        let mut buffer = vec![0; 128 << 10];
        while copy.body_len < marked.body_len {
            let left = usize::try_from(marked.body_len - copy.body_len).unwrap_or(usize::MAX);
            let take = left.min(buffer.len());
            let offset = HEADER_LEN as u64 + copy.body_len;
            self.file.read_at(&mut buffer[..take], offset).map_err(at("read", self.file.path()))?;
            copy.append(&buffer[..take])?;
        }
        copy.mark(marked.clone())?;
        Ok(true)
    }

    /// How it is compressed, if anything of it is marked.
    pub fn compression(&self) -> Option<Compression> {
        self.marked.as_ref().map(|mark| mark.compression)
    }
}

/// A skippable frame that says nothing yet.
fn empty_head() -> Vec<u8> {
    let mut head = vec![b' '; HEADER_LEN];
    head[..8].copy_from_slice(&[0x57, 0x2A, 0x4D, 0x18, 0, 0x10, 0, 0]);
    head
}

/// An open segment found after a restart: what of it is proven durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundOpen {
    pub path: PathBuf,
    pub mark: Mark,
}

/// Finds the newest mark whose body is really there. `None`: nothing of the file is usable (a torn start).
pub fn read_open(disk: &Disk, path: &Path) -> Result<Option<FoundOpen>, SpoolError> {
    let file = disk.open_read(path).map_err(at("open", path))?;
    let mut marks: Vec<Mark> = Vec::new();
    for offset in MARK_OFFSETS {
        let mut bytes = [0; MARK_LEN];
        match file.read_exact_at(&mut bytes, offset) {
            Ok(()) => marks.extend(Mark::decode(&bytes)),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(at("read", path)(e)),
        }
    }
    marks.sort_by_key(|mark| std::cmp::Reverse(mark.generation));
    for mark in marks {
        let intact = body_crc32(&file, mark.body_len).map_err(at("read", path))?;
        if intact == Some(mark.body_crc32) {
            return Ok(Some(FoundOpen { path: path.into(), mark }));
        }
    }
    Ok(None)
}

/// CRC-32 of the first `length` bytes of the body, `None` if there are fewer.
fn body_crc32(file: &File, length: u64) -> io::Result<Option<u32>> {
    let mut hasher = crc32fast::Hasher::new();
    let whole = read_body(file, length, |bytes| {
        hasher.update(bytes);
        Ok::<(), io::Error>(())
    })?;
    Ok(whole.then(|| hasher.finalize()))
}

/// Reads `length` bytes of the body in bounded pieces; false if the file ends before.
fn read_body<E: From<io::Error>>(
    file: &File,
    length: u64,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<bool, E> {
    let mut buffer = vec![0; 128 << 10];
    let mut done = 0;
    while done < length {
        let take = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        match file.read_exact_at(&mut buffer[..take], HEADER_LEN as u64 + done) {
            Ok(()) => sink(&buffer[..take])?,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        done += take as u64; // usize fits
    }
    Ok(true)
}

/// Decodes the raw bytes that a found open segment holds, for comparing them with the server's.
pub fn decode_open(
    disk: &Disk,
    found: &FoundOpen,
    mut sink: impl FnMut(&[u8]) -> Result<(), SpoolError>,
) -> Result<(), SpoolError> {
    let damaged = |source: SealError| SpoolError::Damaged { path: found.path.clone(), source };
    let file = disk.open_read(&found.path).map_err(at("open", &found.path))?;
    let mut decoder = StreamDecoder::new(found.mark.compression, found.mark.raw_len).map_err(damaged)?;
    let mut feed = |bytes: &[u8]| decoder.push(bytes, &mut sink);
    read_body(&file, found.mark.body_len, &mut feed)?;
    feed(Encoder::suffix(found.mark.compression))?;
    decoder.finish().map_err(damaged)?;
    if decoder.raw_size() != found.mark.raw_len {
        return Err(damaged(SealError::Size { expected: found.mark.raw_len, found: decoder.raw_size() }));
    }
    Ok(())
}
