//! The server's archives to volumes: complete tars of bounded size, in which no file is split and names are relative to the data directory.

use crate::postgres::ControlFile;

use super::BackupError;
use super::header::{BLOCK, EntryKind, Header, padding};
use super::manifest::Fingerprints;
use super::parts::PartEncoder;
use super::tar_reader::{Entries, TarReader};

const CONTROL_FILE: &[u8] = b"global/pg_control";
/// It has 8,192 bytes in every version.
const CONTROL_FILE_MAX: u64 = 64 * 1024;
/// The two empty blocks at a tar's end.
const TRAILER: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Takes the server's archives and gives volumes to the encoder.
///
/// A volume is ended before the file that would pass `volume_bytes`, so one that is larger than this by itself stands alone.
/// `global/pg_control` is held back until the end: it is the last file of the last volume, so that a restore that was cut short has none.
pub(super) struct Splitter {
    volume_bytes: u64,
    volumes_begun: u32,
    tablespace: Option<u32>,
    /// The tablespace's own directory has been written.
    tablespace_begun: bool,
    reader: Option<TarReader>,
    entry: Entry,
    files: Fingerprints,
    control: Option<(Header, Vec<u8>)>,
    parts: PartEncoder,
}

/// What happens with the entry being read.
enum Entry {
    None,
    Skip,
    Copy { header: Header, crc32c: u32 },
    Hold { header: Header, content: Vec<u8> },
}

impl Splitter {
    pub(super) fn new(volume_bytes: u64, parts: PartEncoder) -> Self {
        Self {
            volume_bytes,
            volumes_begun: 0,
            tablespace: None,
            tablespace_begun: false,
            reader: None,
            entry: Entry::None,
            files: Fingerprints::default(),
            control: None,
            parts,
        }
    }

    pub(super) fn parts(&mut self) -> &mut PartEncoder {
        &mut self.parts
    }

    /// The encoder, to be used for what comes after the volumes.
    pub(super) fn into_parts(self) -> PartEncoder {
        self.parts
    }

    /// An archive of the server begins; the one before it has ended.
    pub(super) fn begin_archive(&mut self, tablespace: Option<u32>) -> Result<(), BackupError> {
        self.end_archive()?;
        self.tablespace = tablespace;
        self.tablespace_begun = false;
        self.reader = Some(TarReader::new());
        Ok(())
    }

    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        let Some(mut reader) = self.reader.take() else {
            return Err(BackupError::Tar { why: "data came before the first archive".into() });
        };
        let pushed = reader.push(bytes, self);
        self.reader = Some(reader);
        pushed
    }

    fn end_archive(&mut self) -> Result<(), BackupError> {
        self.reader.take().map_or(Ok(()), TarReader::finish)
    }

    /// The last archive has ended: writes `global/pg_control` and ends the last volume.
    pub(super) fn finish(&mut self) -> Result<(ControlFile, Fingerprints), BackupError> {
        self.end_archive()?;
        let (header, content) = self.control.take().ok_or(BackupError::NoControlFile)?;
        let control = ControlFile::parse(&content).map_err(BackupError::ControlFile)?;
        self.write_header(&header)?;
        self.parts.write(&content)?;
        self.write_padding(header.size)?;
        self.end_volume()?;
        Ok((control, std::mem::take(&mut self.files)))
    }

    fn write_header(&mut self, header: &Header) -> Result<(), BackupError> {
        let needed = BLOCK as u64 + header.size + padding(header.size);
        if let Some(written) = self.parts.raw_bytes()
            && written.saturating_add(needed + TRAILER.len() as u64) > self.volume_bytes
        {
            self.end_volume()?;
        }
        if self.parts.raw_bytes().is_none() {
            self.volumes_begun += 1;
            self.parts.begin(&format!("volumes/{:06}.tar", self.volumes_begun));
        }
        self.parts.write(header.block())
    }

    fn write_padding(&mut self, size: u64) -> Result<(), BackupError> {
        let length = usize::try_from(padding(size)).expect("less than a block");
        if length == 0 { Ok(()) } else { self.parts.write(&TRAILER[..length]) }
    }

    fn end_volume(&mut self) -> Result<(), BackupError> {
        self.parts.write(&TRAILER)?;
        self.parts.finish()
    }

    /// Files of a tablespace go below `pg_tblspc/<oid>/`.
    fn place(&mut self, header: Header) -> Result<Header, BackupError> {
        let Some(oid) = self.tablespace else { return Ok(header) };
        let folder = format!("pg_tblspc/{oid}");
        if !self.tablespace_begun {
            self.tablespace_begun = true;
            self.write_header(&Header::directory(&folder, &header)?)?;
        }
        header.below(&folder)
    }
}

/// `pg_tblspc/16394`: the link that stands for a tablespace. Its place is in `backup.json`, its files come in an archive of their own.
fn is_tablespace_link(name: &[u8]) -> bool {
    name.strip_prefix(b"pg_tblspc/").is_some_and(|oid| !oid.is_empty() && oid.iter().all(u8::is_ascii_digit))
}

impl Entries for Splitter {
    fn begin(&mut self, header: Header) -> Result<(), BackupError> {
        let main = self.tablespace.is_none();
        if header.kind == EntryKind::Link {
            if !main || !is_tablespace_link(&header.name) {
                return Err(BackupError::Tar { why: format!("{} is a link that must not be there", header.shown()) });
            }
            self.entry = Entry::Skip;
            return Ok(());
        }
        if main && header.kind == EntryKind::File && header.name == CONTROL_FILE {
            if header.size > CONTROL_FILE_MAX || self.control.is_some() {
                return Err(BackupError::Tar { why: "global/pg_control is too large, or there twice".into() });
            }
            self.entry = Entry::Hold { header, content: Vec::new() };
            return Ok(());
        }
        let header = self.place(header)?;
        self.write_header(&header)?;
        self.entry = Entry::Copy { header, crc32c: 0 };
        Ok(())
    }

    fn content(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        match &mut self.entry {
            Entry::Copy { crc32c, .. } => {
                *crc32c = crc32c::crc32c_append(*crc32c, bytes);
                self.parts.write(bytes)
            }
            Entry::Hold { content, .. } => {
                content.extend_from_slice(bytes);
                Ok(())
            }
            Entry::Skip | Entry::None => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), BackupError> {
        match std::mem::replace(&mut self.entry, Entry::None) {
            Entry::Copy { header, crc32c } if header.kind == EntryKind::File => {
                self.write_padding(header.size)?;
                self.files.add(&header.name, header.size, crc32c);
            }
            Entry::Hold { header, content } => {
                self.files.add(&header.name, header.size, crc32c::crc32c(&content));
                self.control = Some((header, content));
            }
            Entry::Copy { .. } | Entry::Skip | Entry::None => {}
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "splitter_tests.rs"]
mod tests;
