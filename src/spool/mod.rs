//! Sealed segments on local disk: durable, bounded, self-describing. Layout: docs/format.md, section 5.
//!
//! A file below `wal/` or `tail/` is whole, flushed and named by the order of I9, or it is not there. The open segment lies below
//! `open/` with marks that say how much of it is durable. Nothing found damaged or foreign is deleted, followed or uploaded.

mod folders;
mod mark;
mod open_segment;

pub use mark::Mark;
pub use open_segment::{FoundOpen, OpenSegment, decode_open, read_open};

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::disk::{Disk, is_full};
use crate::failure::NextStep;
use crate::seal::{Compression, HEADER_LEN, ObjectDecoder, ObjectHeader, ObjectKind, SealError};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("no space is left to {what} {}", path.display())]
    Full { what: &'static str, path: PathBuf, source: io::Error },
    #[error("flushing {} failed", path.display())]
    Sync { path: PathBuf, source: io::Error },
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf, source: SealError },
    #[error("{} has vanished", path.display())]
    Gone { path: PathBuf },
    #[error("{} belongs to another cluster or segment: {why}", path.display())]
    Foreign { path: PathBuf, why: String },
    #[error("another Walden uses the spool {}", path.display())]
    InUse { path: PathBuf },
    #[error("{} has other content than what is to be spooled under its name", path.display())]
    Conflict { path: PathBuf },
}

impl From<io::Error> for SpoolError {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "read", path: PathBuf::new(), source }
    }
}

impl From<SealError> for SpoolError {
    fn from(source: SealError) -> Self {
        Self::Damaged { path: PathBuf::new(), source }
    }
}

impl SpoolError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Io { .. } => NextStep::Retry,
            Self::Full { .. } => NextStep::Wait,
            // After a failed flush the kernel may drop the dirty pages and report success next time, so a second
            // flush proves nothing. The file is void; the server still has the bytes (I9).
            Self::Sync { .. } | Self::Damaged { .. } | Self::Gone { .. } => NextStep::FetchAgain,
            Self::Foreign { .. } | Self::InUse { .. } | Self::Conflict { .. } => NextStep::Stop,
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => "check the owner, the mode and the disk of `spool.path`",
            Self::Full { .. } => "make room on the disk of `spool.path`; PostgreSQL keeps the WAL meanwhile",
            Self::Sync { .. } => "the disk reports write errors: replace it; the bytes are taken again from the server",
            Self::Damaged { .. } => "check the disk; the bytes are taken again from the server",
            Self::Gone { .. } => {
                "find out who removes files from `spool.path`; the bytes are taken again from the server"
            }
            Self::Foreign { .. } => "move it out of the spool, or correct `spool.path`",
            Self::InUse { .. } => "stop the other one, or give each its own `spool.path`",
            Self::Conflict { .. } => "two histories met: find out which server is the right one before going on",
        }
    }
}

/// Makes the room's error of an I/O error.
fn at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SpoolError + 'a {
    move |source| {
        if is_full(&source) {
            SpoolError::Full { what, path: path.into(), source }
        } else {
            SpoolError::Io { what, path: path.into(), source }
        }
    }
}

/// A sealed object in the spool. Its path below the spool's folder is its key below the cluster's in a repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpooledName {
    pub timeline: TimelineId,
    /// The segment's start, or the timeline's begin for a history file; orders the queue.
    pub order: u64,
    /// Relative, such as `wal/00000001/000000010000000000000001.lz4`.
    pub relative: String,
}

impl SpooledName {
    /// Where a gap ends; `None` for other objects.
    pub fn gap_end(&self) -> Option<Lsn> {
        let (_, to) = self.relative.strip_prefix("gaps/")?.strip_suffix(".json")?.split_once('-')?;
        u64::from_str_radix(to, 16).ok().map(Lsn::new)
    }
}

/// What a listing of the spool shows: names and sizes only.
#[derive(Debug, Default)]
pub struct SpoolContents {
    pub sealed: Vec<(SpooledName, u64)>,
    pub open: Vec<PathBuf>,
    /// Neither ours nor followed nor deleted.
    pub foreign: Vec<PathBuf>,
}

/// What the spool of one cluster consists of.
const FOLDERS: [&str; 5] = ["wal", "tail", "gaps", "open", "quarantine"];

/// The spool of one cluster.
#[derive(Clone, Debug)]
pub struct Spool {
    disk: Disk,
    folder: PathBuf,
}

/// Holds the spool's lock for as long as it lives.
#[derive(Debug)]
pub struct SpoolLock(#[allow(dead_code, reason = "the lock lives as long as the open file")] File);

impl Spool {
    /// `<root>/<cluster>/<system identifier>`, created if missing.
    pub fn open(disk: Disk, root: &Path, cluster: &str, system: SystemIdentifier) -> Result<Self, SpoolError> {
        let folder = root.join(cluster).join(system.to_string());
        for sub in FOLDERS {
            let path = folder.join(sub);
            disk.create_folders(&path).map_err(at("create", &path))?;
        }
        Ok(Self { disk, folder })
    }

    /// The clusters' numbers for which the root has a spool under this cluster name.
    pub fn known_systems(root: &Path, cluster: &str) -> Result<Vec<SystemIdentifier>, SpoolError> {
        let folder = root.join(cluster);
        let entries = match std::fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(at("list", &folder))?,
        };
        let mut systems = Vec::new();
        for entry in entries {
            let name = entry.map_err(at("list", &folder))?.file_name();
            systems.extend(name.to_str().and_then(|n| n.parse::<SystemIdentifier>().ok()));
        }
        systems.sort();
        Ok(systems)
    }

    /// Takes the root for this process alone. Two agents in one spool would each take the other's files for their own.
    pub fn lock(disk: &Disk, root: &Path) -> Result<SpoolLock, SpoolError> {
        disk.create_folders(root).map_err(at("create", root))?;
        disk.check_private(root).map_err(at("use", root))?;
        let path = root.join("lock");
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(at("open", &path))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(SpoolLock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(SpoolError::InUse { path: root.into() }),
            Err(e) => Err(at("lock", &path)(e.into())),
        }
    }

    /// The agent's id, made once. It tells the holder of a lease from another agent, so a restart takes the lease at once.
    pub fn agent_id(disk: &Disk, root: &Path) -> Result<String, SpoolError> {
        let path = root.join("agent-id");
        match std::fs::read_to_string(&path) {
            Ok(id) if uuid::Uuid::parse_str(id.trim()).is_ok() => return Ok(id.trim().into()),
            Ok(_) => {} // empty or damaged by a power cut: a new one; the lease is then waited for
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(at("read", &path)(e)),
        }
        let id = uuid::Uuid::new_v4().to_string();
        disk.replace(&path, id.as_bytes()).map_err(at("write", &path))?;
        Ok(id)
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn path_of(&self, name: &SpooledName) -> PathBuf {
        self.folder.join(&name.relative)
    }

    pub fn segment(segment: SegmentName, compression: Compression) -> SpooledName {
        let timeline = segment.timeline();
        let relative = format!("wal/{}/{segment}.{}", timeline.to_hex(), compression.suffix());
        SpooledName { timeline, order: segment.start().get(), relative }
    }

    /// The last part of a timeline, up to where the next one begins: a piece from 0.
    pub fn timeline_end(segment: SegmentName, end: u64, compression: Compression) -> SpooledName {
        let timeline = segment.timeline();
        let relative = format!("tail/{}/{segment}/00000000-{end:08X}.{}", timeline.to_hex(), compression.suffix());
        SpooledName { timeline, order: segment.start().get(), relative }
    }

    pub fn history(timeline: TimelineId) -> SpooledName {
        SpooledName { timeline, order: 0, relative: format!("wal/{}", timeline.history_file_name()) }
    }

    pub fn gap(timeline: TimelineId, from: Lsn, to: Lsn) -> SpooledName {
        let relative = format!("gaps/{}/{}-{}.json", timeline.to_hex(), from.to_hex16(), to.to_hex16());
        SpooledName { timeline, order: from.get(), relative }
    }

    /// A fresh name for the open segment; several may lie there after crashes.
    pub fn open_path(&self, segment: SegmentName, compression: Compression) -> PathBuf {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        self.folder.join("open").join(format!("{segment}-{}.{}", &unique[..8], compression.suffix()))
    }

    /// Gives a finished open segment its name. Durable after `sync_names`. If the name is taken by the same WAL (fetched again
    /// because something before it was damaged), the older file stays, and the answer is false; by other WAL, it is a conflict and
    /// both stay.
    pub fn name_sealed(&self, from: &Path, name: &SpooledName) -> Result<bool, SpoolError> {
        let path = self.path_of(name);
        let folder = path.parent().expect("a spooled name lies in a folder");
        self.disk.create_folders(folder).map_err(at("create", folder))?;
        match self.disk.rename_new(from, &path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let (old, new) = (self.object_reader(&path)?, self.object_reader(from)?);
                if !same_wal(old, new)? {
                    return Err(SpoolError::Conflict { path });
                }
                self.remove_open(from).map(|()| false)
            }
            other => other.map_err(at("rename", &path)).map(|()| true),
        }
    }

    fn object_reader(&self, path: &Path) -> Result<ObjectReader, SpoolError> {
        let file = self.disk.open_read(path).map_err(at("open", path))?;
        Ok(ObjectReader { path: path.into(), file, decoder: Some(ObjectDecoder::new()), raw: Vec::new() })
    }

    /// The segment size that the spooled objects name, so that a restart can list them before the server answers.
    pub fn segment_size(&self) -> Result<Option<SegmentSize>, SpoolError> {
        for top in ["wal", "tail", "open"] {
            for path in files_below(&self.folder.join(top), 2)? {
                let file = self.disk.open_read(&path).map_err(at("open", &path))?;
                let mut head = vec![0; HEADER_LEN];
                if std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 0).is_err() {
                    continue;
                }
                if let Ok(header) = ObjectHeader::parse(&head) {
                    return Ok(Some(header.segment_size));
                }
                for offset in mark::MARK_OFFSETS {
                    let at = usize::try_from(offset).expect("a small offset");
                    let bytes = head[at..at + mark::MARK_LEN].try_into().expect("a mark's length");
                    if let Some(mark) = Mark::decode(bytes) {
                        return Ok(Some(mark.segment_size));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Makes the names in the folder of `name` durable.
    pub fn sync_names(&self, name: &SpooledName) -> Result<(), SpoolError> {
        let path = self.path_of(name);
        let folder = path.parent().expect("a spooled name lies in a folder");
        self.disk.sync_folder(folder).map_err(|source| SpoolError::Sync { path: folder.into(), source })
    }

    /// Stores a small object (a history file, a gap) durably. The same content again is fine.
    pub fn write_small(&self, name: SpooledName, content: &[u8]) -> Result<SpooledName, SpoolError> {
        let path = self.path_of(&name);
        let folder = path.parent().expect("a spooled name lies in a folder");
        self.disk.create_folders(folder).map_err(at("create", folder))?;
        match self.disk.write_new(&path, content) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let held = std::fs::read(&path).map_err(at("read", &path))?;
                if held == content { Ok(name) } else { Err(SpoolError::Conflict { path }) }
            }
            other => other.map_err(at("write", &path)).map(|()| name),
        }
    }

    /// Takes a name back that could not be made durable: the file is a finished one without a name again. If that fails too, the next
    /// session finds a name without a record.
    pub fn take_back(&self, name: &SpooledName, to: &Path) {
        if let Err(error) = self.disk.rename_new(&self.path_of(name), to) {
            tracing::error!(name = name.relative, "a name that could not be flushed stays: {error}");
        }
    }

    /// Names a finished segment that a crash has left without its name. `None`: it is not finished, or not of this cluster. Durable
    /// on return. Gives its size and its CRC-32 as well.
    pub fn name_finished(
        &self,
        path: &Path,
        system: SystemIdentifier,
    ) -> Result<Option<(SpooledName, u64, u32)>, SpoolError> {
        let mut file = self.disk.open_read(path).map_err(at("open", path))?;
        let mut decoder = ObjectDecoder::new();
        let (mut crc32, mut size) = (crc32fast::Hasher::new(), 0);
        let mut buffer = vec![0; 128 << 10];
        loop {
            let length = file.read(&mut buffer).map_err(at("read", path))?;
            if length == 0 {
                break;
            }
            crc32.update(&buffer[..length]);
            size += length as u64; // usize fits
            if decoder.push(&buffer[..length], |_| Ok::<(), SealError>(())).is_err() {
                return Ok(None);
            }
        }
        let Ok(header) = decoder.finish() else { return Ok(None) };
        let Ok(segment) = SegmentName::parse(&header.segment, header.segment_size) else { return Ok(None) };
        if header.system_identifier != system {
            return Ok(None);
        }
        let name = match header.kind {
            ObjectKind::Segment => Self::segment(segment, header.compression),
            ObjectKind::Piece => Self::timeline_end(segment, header.end_offset, header.compression),
        };
        file.sync_all().map_err(|source| SpoolError::Sync { path: path.into(), source })?;
        if !self.name_sealed(path, &name)? {
            return Ok(None);
        }
        if let Err(error) = self.sync_names(&name) {
            self.take_back(&name, path);
            return Err(error);
        }
        Ok(Some((name, size, crc32.finalize())))
    }

    pub fn remove(&self, name: &SpooledName) -> Result<(), SpoolError> {
        let path = self.path_of(name);
        self.disk.remove(&path).map_err(at("remove", &path))
    }

    pub fn remove_open(&self, path: &Path) -> Result<(), SpoolError> {
        self.disk.remove(path).map_err(at("remove", path))
    }

    /// Sets a damaged file aside, for a person to look at. Never uploaded, never deleted. False if there is no such file any more.
    pub fn quarantine(&self, path: &Path) -> Result<bool, SpoolError> {
        let name = path.file_name().map_or_else(|| "unnamed".into(), |n| n.to_string_lossy().into_owned());
        let folder = self.folder.join("quarantine");
        self.disk.create_folders(&folder).map_err(at("create", &folder))?;
        let aside = folder.join(format!("{name}.{}", uuid::Uuid::new_v4().simple()));
        match self.disk.rename_new(path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            renamed => renamed.map_err(at("rename", path)).map(|()| true),
        }
    }

    /// Whole segments that were ever set aside, by their names.
    pub fn quarantined(&self, size: SegmentSize) -> Result<Vec<SegmentName>, SpoolError> {
        let names = files_below(&self.folder.join("quarantine"), 0)?;
        let segment = |path: &PathBuf| {
            let name = path.file_name()?.to_str()?;
            let is_whole = name.as_bytes().get(24) == Some(&b'.');
            SegmentName::parse(name.get(..24).filter(|_| is_whole)?, size).ok()
        };
        let mut segments: Vec<SegmentName> = names.iter().filter_map(segment).collect();
        segments.sort_unstable();
        segments.dedup();
        Ok(segments)
    }

    /// Lists the spool by names and sizes. Links, devices and unknown names are foreign.
    pub fn contents(&self, size: SegmentSize) -> Result<SpoolContents, SpoolError> {
        let mut contents = SpoolContents::default();
        for top in ["wal", "tail", "gaps", "open"] {
            self.list_folder(top, size, &mut contents)?;
        }
        contents.sealed.sort();
        contents.open.sort();
        Ok(contents)
    }

    fn list_folder(&self, relative: &str, size: SegmentSize, contents: &mut SpoolContents) -> Result<(), SpoolError> {
        let folder = self.folder.join(relative);
        for entry in std::fs::read_dir(&folder).map_err(at("list", &folder))? {
            let entry = entry.map_err(at("list", &folder))?;
            let kind = entry.file_type().map_err(at("list", &folder))?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                contents.foreign.push(path);
                continue;
            };
            let relative = format!("{relative}/{name}");
            if kind.is_dir() && relative.matches('/').count() <= 2 && !relative.starts_with("open") {
                self.list_folder(&relative, size, contents)?;
            } else if !kind.is_file() {
                contents.foreign.push(path);
            } else if name.starts_with(".tmp-") {
                // Left by a crash before its rename: nobody was told of it.
                self.remove_open(&path)?;
            } else if relative.starts_with("open/") && name.len() > 24 && SegmentName::parse(&name[..24], size).is_ok()
            {
                contents.open.push(path);
            } else if let Some(spooled) = parse_relative(&relative, size) {
                let length = entry.metadata().map_err(at("read", &path))?.len();
                contents.sealed.push((spooled, length));
            } else {
                contents.foreign.push(path);
            }
        }
        Ok(())
    }

    /// The header of a sealed WAL object, checked against its name.
    pub fn read_header(&self, name: &SpooledName, system: SystemIdentifier) -> Result<ObjectHeader, SpoolError> {
        let path = self.path_of(name);
        let mut head = vec![0; HEADER_LEN];
        let mut file = self.disk.open_read(&path).map_err(at("open", &path))?;
        match file.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let found = file.metadata().map_or(0, |metadata| metadata.len());
                let source = SealError::Size { expected: HEADER_LEN as u64, found }; // usize fits
                return Err(SpoolError::Damaged { path, source });
            }
            read => read.map_err(at("read", &path))?,
        }
        let header = ObjectHeader::parse(&head).map_err(|source| SpoolError::Damaged { path: path.clone(), source })?;
        self.check_identity(&header, name, system)?;
        Ok(header)
    }

    fn check_identity(
        &self,
        header: &ObjectHeader,
        name: &SpooledName,
        system: SystemIdentifier,
    ) -> Result<(), SpoolError> {
        let path = || self.path_of(name);
        if header.system_identifier != system {
            let why = format!("its header names the cluster {}", header.system_identifier);
            return Err(SpoolError::Foreign { path: path(), why });
        }
        if !name.relative.contains(&header.segment) {
            return Err(SpoolError::Foreign { path: path(), why: format!("its header names {}", header.segment) });
        }
        Ok(())
    }

    /// Reads a sealed WAL object whole, checks everything, hands its raw bytes on. Gives its header and the object's CRC-32.
    pub fn decode(
        &self,
        name: &SpooledName,
        system: SystemIdentifier,
        mut sink: impl FnMut(&[u8]) -> Result<(), SpoolError>,
    ) -> Result<(ObjectHeader, u32), SpoolError> {
        let path = self.path_of(name);
        let mut file = self.disk.open_read(&path).map_err(at("open", &path))?;
        let mut decoder = ObjectDecoder::new();
        let mut crc32 = crc32fast::Hasher::new();
        let mut buffer = vec![0; 128 << 10];
        let name_it = |e: SpoolError| match e {
            SpoolError::Damaged { source, .. } => SpoolError::Damaged { path: path.clone(), source },
            other => other,
        };
        loop {
            let length = file.read(&mut buffer).map_err(at("read", &path))?;
            if length == 0 {
                break;
            }
            crc32.update(&buffer[..length]);
            decoder.push(&buffer[..length], &mut sink).map_err(name_it)?;
        }
        let header = decoder.finish().map_err(|source| SpoolError::Damaged { path: path.clone(), source })?;
        self.check_identity(&header, name, system)?;
        Ok((header, crc32.finalize()))
    }
}

/// Raw WAL of a sealed object, pulled in bounded pieces.
struct ObjectReader {
    path: PathBuf,
    file: File,
    decoder: Option<ObjectDecoder>,
    raw: Vec<u8>,
}

impl ObjectReader {
    /// Makes `raw` non-empty; false at the proven end.
    fn fill(&mut self) -> Result<bool, SpoolError> {
        let damaged = |source| SpoolError::Damaged { path: self.path.clone(), source };
        let mut buffer = vec![0; 64 << 10];
        while self.raw.is_empty() {
            let Some(decoder) = self.decoder.as_mut() else { return Ok(false) };
            let length = self.file.read(&mut buffer).map_err(at("read", &self.path))?;
            if length == 0 {
                let whole = self.decoder.take().map(ObjectDecoder::finish);
                whole.transpose().map_err(damaged)?;
                return Ok(false);
            }
            let raw = &mut self.raw;
            let pushed = decoder.push(&buffer[..length], |bytes| {
                raw.extend_from_slice(bytes);
                Ok::<(), SealError>(())
            });
            pushed.map_err(damaged)?;
        }
        Ok(true)
    }
}

/// Compares the raw bytes of two objects, however they are compressed. A checksum would not prove it.
fn same_wal(mut one: ObjectReader, mut other: ObjectReader) -> Result<bool, SpoolError> {
    loop {
        match (one.fill()?, other.fill()?) {
            (true, true) => {}
            (false, false) => return Ok(true),
            _ => return Ok(false),
        }
        let length = one.raw.len().min(other.raw.len());
        if one.raw[..length] != other.raw[..length] {
            return Ok(false);
        }
        one.raw.drain(..length);
        other.raw.drain(..length);
    }
}

/// Regular files below a folder, at most `depth` folders deep; links are not followed.
fn files_below(folder: &Path, depth: u32) -> Result<Vec<PathBuf>, SpoolError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(at("list", folder))? {
        let entry = entry.map_err(at("list", folder))?;
        let kind = entry.file_type().map_err(at("list", folder))?;
        if kind.is_dir() && depth > 0 {
            files.extend(files_below(&entry.path(), depth - 1)?);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Parses a path below the spool's folder; `None` if it is not a name of ours to the letter: what is parsed more freely, such
/// as hexadecimal digits in lower case, would name another file.
pub fn parse_relative(relative: &str, size: SegmentSize) -> Option<SpooledName> {
    parse_loosely(relative, size).filter(|name| name.relative == relative)
}

fn parse_loosely(relative: &str, size: SegmentSize) -> Option<SpooledName> {
    let parts: Vec<&str> = relative.split('/').collect();
    match parts[..] {
        ["wal", file] => {
            let timeline = TimelineId::from_hex(file.strip_suffix(".history")?).ok()?;
            Some(Spool::history(timeline))
        }
        ["wal", timeline, file] => {
            let (stem, suffix) = file.split_once('.')?;
            let segment = SegmentName::parse(stem, size).ok()?;
            let compression = Compression::from_suffix(suffix)?;
            (segment.timeline().to_hex() == timeline).then(|| Spool::segment(segment, compression))
        }
        ["tail", timeline, segment, file] => {
            let (range, suffix) = file.split_once('.')?;
            let segment = SegmentName::parse(segment, size).ok()?;
            let end = range.strip_prefix("00000000-").filter(|e| e.len() == 8)?;
            let end = u64::from_str_radix(end, 16).ok().filter(|end| (1..=size.get()).contains(end))?;
            let compression = Compression::from_suffix(suffix)?;
            (segment.timeline().to_hex() == timeline).then(|| Spool::timeline_end(segment, end, compression))
        }
        ["gaps", timeline, file] => {
            let timeline = TimelineId::from_hex(timeline).ok()?;
            let (from, to) = file.strip_suffix(".json")?.split_once('-')?;
            let lsn = |hex: &str| (hex.len() == 16).then(|| u64::from_str_radix(hex, 16).ok().map(Lsn::new)).flatten();
            Some(Spool::gap(timeline, lsn(from)?, lsn(to)?))
        }
        _ => None,
    }
}
