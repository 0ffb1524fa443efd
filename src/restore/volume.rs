//! Writes the files of a volume as they come out of its tar, each compared with the manifest.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::sync::Mutex;

use super::RestoreError;
use super::directory::{Directory, InnerPath, LastFolder};
use super::manifest::{ExpectedFile, Manifest, Running};
use super::tar::{TarEntry, TarError, TarKind, TarSink};
use crate::seal::SealError;

/// Files that are kept in memory and written by `restore` itself, when it is time. They are small.
pub const HELD_BACK: [&str; 3] = ["global/pg_control", "tablespace_map", "backup_label"];
/// Bytes that such a file may have.
const HELD_BYTES_MAX: u64 = 1 << 20;
/// Folders that a backup may have: one for each database in each tablespace, and some more.
const FOLDERS_MAX: u64 = 1 << 20;
/// Files that a new server must not find: `standby.signal` of a backup made on a standby would win over `recovery.signal`, and
/// `postmaster.pid` names a process of another machine.
const NEVER_TAKEN: [&str; 4] = ["standby.signal", "recovery.signal", "postmaster.pid", "postmaster.opts"];

/// Where all volumes of a backup go; shared by the threads that fill it.
#[derive(Debug)]
pub struct Destination {
    pub backup: String,
    pub main: Directory,
    /// By OID.
    pub tablespaces: BTreeMap<u32, Directory>,
    /// `None`: the server made no manifest.
    pub manifest: Option<Manifest>,
    /// What was seen so far, and the content of what is held back.
    pub seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
pub struct Seen {
    pub files: HashMap<InnerPath, ()>,
    /// Entries of folders, which no manifest names.
    pub folders: u64,
    pub held_back: BTreeMap<&'static str, Vec<u8>>,
}

impl Destination {
    fn damaged(&self, why: String) -> RestoreError {
        RestoreError::DamagedBackup { backup: self.backup.clone(), why }
    }

    /// Every file of the manifest was there.
    pub fn check_complete(&self) -> Result<(), RestoreError> {
        let seen = self.seen.lock().expect("no thread panics while it holds it");
        if let Some(manifest) = &self.manifest
            && let Some(missing) = manifest.files.keys().find(|path| !seen.files.contains_key(*path))
        {
            return Err(self.damaged(format!("{missing} is missing")));
        }
        for name in ["global/pg_control", "backup_label"] {
            if !seen.held_back.contains_key(name) {
                return Err(self.damaged(format!("{name} is missing")));
            }
        }
        Ok(())
    }

    /// The directory that a path lies in, and the path there.
    fn place(&self, path: &InnerPath) -> (&Directory, InnerPath) {
        let elsewhere = path.in_tablespace().and_then(|(oid, inner)| Some((self.tablespaces.get(&oid)?, inner)));
        elsewhere.unwrap_or_else(|| (&self.main, path.clone()))
    }

    fn is_tablespace_itself(&self, path: &InnerPath) -> bool {
        self.tablespaces.keys().any(|oid| path.as_bytes() == format!("pg_tblspc/{oid}").as_bytes())
    }
}

/// Takes the entries of one volume.
pub struct VolumeWriter<'a> {
    destination: &'a Destination,
    last: LastFolder,
    /// Tablespaces have folders of their own.
    last_elsewhere: LastFolder,
    open: Option<OpenFile>,
}

struct OpenFile {
    path: InnerPath,
    expected: Option<ExpectedFile>,
    running: Running,
    output: Output,
}

enum Output {
    File(File),
    Memory(&'static str, Vec<u8>),
    Nothing,
}

/// What a sink or the decoder before it can fail with.
#[derive(Debug)]
pub enum VolumeError {
    Stored(SealError),
    Tar(TarError),
    Restore(RestoreError),
}

impl From<SealError> for VolumeError {
    fn from(error: SealError) -> Self {
        Self::Stored(error)
    }
}

impl From<TarError> for VolumeError {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

impl From<RestoreError> for VolumeError {
    fn from(error: RestoreError) -> Self {
        Self::Restore(error)
    }
}

impl<'a> VolumeWriter<'a> {
    pub fn new(destination: &'a Destination) -> Self {
        Self { destination, last: LastFolder::default(), last_elsewhere: LastFolder::default(), open: None }
    }

    /// Looks the file up in the manifest and marks it as seen.
    fn expect(&self, path: &InnerPath, size: u64) -> Result<Option<ExpectedFile>, RestoreError> {
        let destination = self.destination;
        let expected = match &destination.manifest {
            Some(manifest) => match manifest.files.get(path) {
                Some(file) if file.size == size => Some(file.clone()),
                Some(file) => {
                    let why = format!("{path} has {size} bytes, and {} by the manifest", file.size);
                    return Err(destination.damaged(why));
                }
                None => return Err(destination.damaged(format!("{path} is not in the manifest"))),
            },
            // WAL comes from the archive alone, where it is verified.
            None if path.below("pg_wal").is_some() => {
                return Err(destination.damaged(format!("{path} should not be in a backup")));
            }
            None => None,
        };
        let mut seen = destination.seen.lock().expect("no thread panics while it holds it");
        if seen.files.insert(path.clone(), ()).is_some() {
            return Err(destination.damaged(format!("{path} is in it twice")));
        }
        Ok(expected)
    }

    fn count_folder(&self) -> Result<(), RestoreError> {
        let mut seen = self.destination.seen.lock().expect("no thread panics while it holds it");
        seen.folders += 1;
        if seen.folders <= FOLDERS_MAX {
            return Ok(());
        }
        Err(self.destination.damaged(format!("it has more than {FOLDERS_MAX} folders")))
    }

    fn open(&mut self, path: InnerPath, size: u64) -> Result<(), RestoreError> {
        let expected = self.expect(&path, size)?;
        let named = |names: &[&'static str]| names.iter().copied().find(|name| name.as_bytes() == path.as_bytes());
        let output = if named(&NEVER_TAKEN).is_some() {
            Output::Nothing
        } else if let Some(name) = named(&HELD_BACK) {
            if size > HELD_BYTES_MAX {
                return Err(self.destination.damaged(format!("{path} has {size} bytes")));
            }
            Output::Memory(name, Vec::new())
        } else {
            let (directory, inner) = self.destination.place(&path);
            let is_main = std::ptr::eq(directory, &self.destination.main);
            let last = if is_main { &mut self.last } else { &mut self.last_elsewhere };
            if !is_main {
                // The folder kept is one of this tablespace or another one's: walked to anew.
                *last = LastFolder::default();
            }
            let file = directory.create_file(&inner, last);
            Output::File(file.map_err(RestoreError::io("created", directory.path().join(inner.to_string())))?)
        };
        let running = expected.as_ref().map_or(Running::None, |file| file.checksum.start());
        self.open = Some(OpenFile { path, expected, running, output });
        Ok(())
    }
}

impl TarSink for VolumeWriter<'_> {
    type Error = VolumeError;

    fn entry(&mut self, entry: TarEntry) -> Result<(), VolumeError> {
        let destination = self.destination;
        // The root itself has entries in some archives: "." or "./".
        if entry.kind == TarKind::Directory && matches!(entry.path.as_slice(), b"." | b"") {
            return Ok(());
        }
        let Some(path) = InnerPath::parse(&entry.path) else {
            let why = format!("it has the path \"{}\"", String::from_utf8_lossy(&entry.path).escape_debug());
            return Err(destination.damaged(why).into());
        };
        // A tablespace lies where the backup says, outside of the directory: only PostgreSQL's own names are made there.
        if let Some((_, inner)) = path.in_tablespace() {
            let may_be = entry.kind == TarKind::Directory || inner.as_bytes().contains(&b'/');
            if !inner.is_of_tablespace() || !may_be {
                return Err(destination.damaged(format!("{path} is nothing that a tablespace has")).into());
            }
        }
        match entry.kind {
            TarKind::File { size } => self.open(path, size)?,
            // The link to a tablespace comes in its place.
            TarKind::Directory if destination.is_tablespace_itself(&path) => {}
            TarKind::Directory => {
                self.count_folder()?;
                let (directory, inner) = destination.place(&path);
                let made = directory.create_folder(&inner, &mut LastFolder::default());
                made.map_err(RestoreError::io("created", directory.path().join(inner.to_string())))?;
            }
        }
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), VolumeError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.running.update(bytes);
        match &mut open.output {
            Output::File(file) => file.write_all(bytes).map_err(|source| {
                let path = self.destination.place(&open.path).0.path().join(open.path.to_string());
                RestoreError::Io { what: "written", path, source }
            })?,
            Output::Memory(_, content) => content.extend_from_slice(bytes),
            Output::Nothing => {}
        }
        Ok(())
    }

    fn file_end(&mut self) -> Result<(), VolumeError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        if let Some(expected) = &open.expected
            && !expected.checksum.equals(open.running)
        {
            let why = format!("{} has another checksum than in the manifest", open.path);
            return Err(self.destination.damaged(why).into());
        }
        if let Output::Memory(name, content) = open.output {
            let mut seen = self.destination.seen.lock().expect("no thread panics while it holds it");
            seen.held_back.insert(name, content);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "volume_tests.rs"]
mod tests;
