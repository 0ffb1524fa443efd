//! Brings a planned backup to a directory: parts in parallel, every file checked, `global/pg_control` last.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc;

use super::RestoreError;
use super::configure::{self, Configuration};
use super::directory::InnerPath;
use super::manifest::{MANIFEST_BYTES_MAX, Manifest};
use super::places::{Places, TablespaceMap};
use super::resolve::Plan;
use super::tar::TarReader;
use super::volume::{Destination, VolumeError, VolumeWriter};
use crate::repository::StoredPart;
use crate::seal::{Compression, SealError, StreamDecoder};
use crate::storage::ObjectStream;

/// Chunks that may wait between the network and the disk, per part.
const CHUNKS: usize = 8;

/// Told how much of the backup's raw bytes has been written.
pub trait FetchProgress: Send + Sync {
    fn advance(&self, bytes: u64);
}

#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Absolute.
    pub pgdata: PathBuf,
    pub tablespaces: Vec<TablespaceMap>,
    /// Rename what stands in the way.
    pub force: bool,
    /// Parts at the same time; at least 1.
    pub jobs: usize,
}

/// What was done, for the last lines of the command.
#[derive(Clone, Debug)]
pub struct Restored {
    pub pgdata: PathBuf,
    /// What was renamed by `--force`: from, to.
    pub renamed: Vec<(PathBuf, PathBuf)>,
    pub notes: Vec<String>,
}

/// Whether the plan can be carried out where the options say: every place, the tablespaces' too. Changes nothing.
pub fn check_places(plan: &Plan, options: &RestoreOptions) -> Result<(), RestoreError> {
    Places::check(plan, options).map(|_| ())
}

/// Restores by the plan. On any error the directory cannot be started: `global/pg_control` is the last file written.
pub async fn restore(
    plan: &Plan,
    options: &RestoreOptions,
    configuration: &Configuration,
    progress: Arc<dyn FetchProgress>,
) -> Result<Restored, RestoreError> {
    // Everything that can be refused is refused before the first change.
    let places = Places::check(plan, options)?;
    let manifest = match &plan.backup.manifest {
        Some(part) => Some(fetch_manifest(plan, part).await?),
        None => None,
    };
    check_space(&places, manifest.as_ref())?;
    let renamed = places.clear(options.force)?;
    let destination = Arc::new(places.open(plan, manifest)?);
    let volumes = plan.backup.volumes.iter();
    stream::iter(volumes)
        .map(|part| fetch_volume(plan, part, destination.clone(), progress.clone()))
        .buffer_unordered(options.jobs.max(1))
        .try_collect::<()>()
        .await?;
    destination.check_complete()?;
    let (destination, configuration, plan) = (destination.clone(), configuration.clone(), plan.clone());
    let pgdata = options.pgdata.clone();
    let finished = tokio::task::spawn_blocking(move || finish(&destination, &places, &configuration, &plan));
    let notes = finished.await.map_err(|e| panicked(&e))??;
    Ok(Restored { pgdata, renamed, notes })
}

fn panicked(error: &tokio::task::JoinError) -> RestoreError {
    RestoreError::Server {
        what: format!("was not restored: a thread failed ({error})"),
        hint: "report it: this should not happen",
    }
}

/// The sum of the manifest's sizes must fit where it goes. Only a first look: other programs write too. What is renamed away to make room
/// stays on its file system, so nothing is won by that.
fn check_space(places: &Places, manifest: Option<&Manifest>) -> Result<(), RestoreError> {
    let Some(manifest) = manifest else { return Ok(()) };
    // By file system: what it takes, and a folder on it.
    let mut needed: BTreeMap<u64, (u64, &Path)> = BTreeMap::new();
    let mut elsewhere: BTreeMap<u32, u64> = BTreeMap::new();
    let mut main = 0;
    let tablespaces = places.tablespaces.iter().map(|(oid, place)| (Some(*oid), place));
    for (oid, place) in std::iter::once((None, &places.pgdata)).chain(tablespaces) {
        let folder = nearest_folder(place);
        let device = std::fs::metadata(folder).map_err(RestoreError::io("examined", folder))?.dev();
        needed.entry(device).or_insert((0, folder));
        match oid {
            Some(oid) => drop(elsewhere.insert(oid, device)),
            None => main = device,
        }
    }
    for (path, file) in &manifest.files {
        let device = path.in_tablespace().and_then(|(oid, _)| elsewhere.get(&oid).copied()).unwrap_or(main);
        if let Some((bytes, _)) = needed.get_mut(&device) {
            *bytes = bytes.saturating_add(file.size);
        }
    }
    for (bytes, folder) in needed.values() {
        let free = crate::disk::Disk::default().free_bytes(folder).map_err(RestoreError::io("examined", *folder))?;
        if *bytes > free {
            return Err(RestoreError::Io {
                what: "filled",
                path: folder.into(),
                source: std::io::Error::new(
                    std::io::ErrorKind::StorageFull,
                    format!("the backup needs {bytes} bytes and {free} are free"),
                ),
            });
        }
    }
    Ok(())
}

/// The folder itself, or the nearest one above it that is there.
fn nearest_folder(path: &Path) -> &Path {
    path.ancestors().find(|at| at.is_dir()).unwrap_or(Path::new("/"))
}

/// A part's key tells how it is compressed.
fn compression_of(key: &str) -> Option<Compression> {
    key.rsplit_once('.').and_then(|(_, suffix)| Compression::from_suffix(suffix))
}

async fn open_part(plan: &Plan, part: &StoredPart) -> Result<(ObjectStream, Compression), RestoreError> {
    let Some(compression) = compression_of(&part.key) else {
        let why = format!("{} is compressed in a way that is not known", part.key);
        return Err(RestoreError::DamagedBackup { backup: plan.backup.id.to_string(), why });
    };
    let key = plan.archive.keys().backup_object(&plan.backup.id, &part.key);
    Ok((plan.archive.get_stream(&key).await?, compression))
}

/// Decodes one stored part and checks its sizes and checksums against the list that names it.
struct PartDecoder<'a> {
    part: &'a StoredPart,
    decoder: StreamDecoder,
    stored: (crc32fast::Hasher, u64),
    raw: crc32fast::Hasher,
}

impl<'a> PartDecoder<'a> {
    fn new(part: &'a StoredPart, compression: Compression) -> Result<Self, SealError> {
        let decoder = StreamDecoder::new(compression, part.raw_bytes)?;
        Ok(Self { part, decoder, stored: (crc32fast::Hasher::new(), 0), raw: crc32fast::Hasher::new() })
    }

    fn push<E: From<SealError>>(
        &mut self,
        stored: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.stored.0.update(stored);
        self.stored.1 += stored.len() as u64; // usize fits
        if self.stored.1 > self.part.stored_bytes {
            return Err(SealError::Size { expected: self.part.stored_bytes, found: self.stored.1 }.into());
        }
        let hasher = &mut self.raw;
        self.decoder.push(stored, |raw| {
            hasher.update(raw);
            sink(raw)
        })
    }

    fn finish(self) -> Result<(), SealError> {
        self.decoder.finish()?;
        let (part, raw_bytes) = (self.part, self.decoder.raw_size());
        for (expected, found) in [(part.stored_bytes, self.stored.1), (part.raw_bytes, raw_bytes)] {
            if expected != found {
                return Err(SealError::Size { expected, found });
            }
        }
        let checks = [
            ("CRC-32 of the stored bytes", part.stored_crc32, self.stored.0.finalize()),
            ("CRC-32 of the contents", part.raw_crc32, self.raw.finalize()),
        ];
        for (what, expected, found) in checks {
            if expected != found {
                return Err(SealError::Checksum { what, expected, found });
            }
        }
        Ok(())
    }
}

async fn fetch_manifest(plan: &Plan, part: &StoredPart) -> Result<Manifest, RestoreError> {
    let damaged = |source| damaged_part(plan, part, source);
    let wrong = |why| RestoreError::DamagedBackup { backup: plan.backup.id.to_string(), why };
    if part.raw_bytes > MANIFEST_BYTES_MAX {
        return Err(wrong(format!("its manifest has {} bytes", part.raw_bytes)));
    }
    let (mut stored, compression) = open_part(plan, part).await?;
    let mut decoder = PartDecoder::new(part, compression).map_err(damaged)?;
    let mut raw = Vec::new();
    while let Some(chunk) = stored.try_next().await.map_err(crate::repository::RepositoryError::from)? {
        let pushed = decoder.push(&chunk, |bytes| {
            raw.extend_from_slice(bytes);
            Ok(())
        });
        pushed.map_err(damaged)?;
    }
    decoder.finish().map_err(damaged)?;
    let parsed = tokio::task::spawn_blocking(move || Manifest::parse(&raw)).await.map_err(|e| panicked(&e))?;
    let manifest = parsed.map_err(wrong)?;
    match manifest.system_identifier {
        Some(found) if found != plan.archive.system() => Err(wrong(format!("its manifest is one of system {found}"))),
        _ => Ok(manifest),
    }
}

fn damaged_part(plan: &Plan, part: &StoredPart, source: SealError) -> RestoreError {
    RestoreError::DamagedPart { backup: plan.backup.id.to_string(), key: part.key.clone(), source }
}

/// One volume: the network fills a short queue, and a thread of its own decodes, checks and writes.
async fn fetch_volume(
    plan: &Plan,
    part: &StoredPart,
    destination: Arc<Destination>,
    progress: Arc<dyn FetchProgress>,
) -> Result<(), RestoreError> {
    let (mut stored, compression) = open_part(plan, part).await?;
    let (sender, receiver) = mpsc::channel::<Bytes>(CHUNKS);
    let owned = part.clone();
    let writer =
        tokio::task::spawn_blocking(move || write_volume(&owned, compression, receiver, &destination, &*progress));
    let mut broken = None;
    loop {
        match stored.try_next().await {
            // A writer that has stopped says why below.
            Ok(Some(chunk)) => {
                if sender.send(chunk).await.is_err() {
                    break;
                }
            }
            Ok(None) => break,
            Err(error) => {
                broken = Some(crate::repository::RepositoryError::from(error));
                break;
            }
        }
    }
    drop(sender);
    let written = writer.await.map_err(|e| panicked(&e))?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    written.map_err(|error| match error {
        VolumeError::Stored(source) => damaged_part(plan, part, source),
        VolumeError::Tar(error) => {
            let why = format!("{}: {error}", part.key);
            RestoreError::DamagedBackup { backup: plan.backup.id.to_string(), why }
        }
        VolumeError::Restore(RestoreError::DamagedBackup { backup, why }) => {
            RestoreError::DamagedBackup { backup, why: format!("{}: {why}", part.key) }
        }
        VolumeError::Restore(error) => error,
    })
}

fn write_volume(
    part: &StoredPart,
    compression: Compression,
    mut receiver: mpsc::Receiver<Bytes>,
    destination: &Destination,
    progress: &dyn FetchProgress,
) -> Result<(), VolumeError> {
    let mut decoder = PartDecoder::new(part, compression)?;
    let (mut tar, mut writer) = (TarReader::default(), VolumeWriter::new(destination));
    while let Some(chunk) = receiver.blocking_recv() {
        decoder.push(&chunk, |raw| {
            progress.advance(raw.len() as u64); // usize fits
            tar.push(raw, &mut writer)
        })?;
    }
    decoder.finish()?;
    tar.finish()?;
    Ok(())
}

/// Links, configuration, and what makes the directory startable, in this order; durable before the last file and after it.
fn finish(
    destination: &Destination,
    places: &Places,
    configuration: &Configuration,
    plan: &Plan,
) -> Result<Vec<String>, RestoreError> {
    let held_back = std::mem::take(&mut destination.seen.lock().expect("the writers have ended").held_back);
    let main = &destination.main;
    let io = |what: &'static str, name: &str| RestoreError::io(what, main.path().join(name));
    let damaged = |why: String| RestoreError::DamagedBackup { backup: destination.backup.clone(), why };
    let label = held_back.get("backup_label").map(Vec::as_slice).unwrap_or_default();
    check_label(label, plan).map_err(damaged)?;
    let control = held_back.get("global/pg_control").map(Vec::as_slice).unwrap_or_default();
    check_control(control, plan).map_err(damaged)?;
    for (oid, place) in &places.tablespaces {
        let name = format!("pg_tblspc/{oid}");
        let path = InnerPath::parse(name.as_bytes()).expect("a number below a folder");
        main.create_link(&path, place).map_err(io("linked", &name))?;
    }
    if !places.tablespaces.is_empty() {
        // PostgreSQL makes its links from this file when it starts, so it must name the new places.
        let path = InnerPath::parse(b"tablespace_map").expect("a name");
        main.write(&path, tablespace_map(&places.tablespaces).as_bytes()).map_err(io("written", "tablespace_map"))?;
    }
    let path = InnerPath::parse(b"backup_label").expect("a name");
    main.write(&path, label).map_err(io("written", "backup_label"))?;
    let notes = configure::write(main, plan, configuration)?;
    for directory in std::iter::once(main).chain(destination.tablespaces.values()) {
        directory.sync().map_err(RestoreError::io("flushed", directory.path()))?;
    }
    let path = InnerPath::parse(b"global/pg_control").expect("a name below a folder");
    main.write(&path, control).map_err(io("written", "global/pg_control"))?;
    main.sync().map_err(RestoreError::io("flushed", main.path()))?;
    if let Some(parent) = main.path().parent() {
        crate::disk::Disk::default().sync_folder(parent).map_err(RestoreError::io("flushed", parent))?;
    }
    Ok(notes)
}

/// The label must be that of the planned backup (I6): recovery begins where it says.
fn check_label(label: &[u8], plan: &Plan) -> Result<(), String> {
    let text = String::from_utf8_lossy(label);
    let start = text.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: "));
    let start = start.and_then(|rest| rest.split_whitespace().next()).and_then(|lsn| lsn.parse().ok());
    if start == Some(plan.backup.start_lsn) {
        return Ok(());
    }
    Err(format!("its backup_label does not begin at {}", plan.backup.start_lsn))
}

/// `system_identifier` is the first field of `ControlFileData` (`src/include/catalog/pg_control.h`).
fn check_control(control: &[u8], plan: &Plan) -> Result<(), String> {
    let found = control.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    if found == Some(plan.archive.system().get()) {
        return Ok(());
    }
    Err("its pg_control is one of another system".into())
}

/// One line per tablespace: OID, space, path (`do_pg_backup_start` in `src/backend/access/transam/xlog.c`).
fn tablespace_map(places: &BTreeMap<u32, PathBuf>) -> String {
    places.iter().map(|(oid, place)| format!("{oid} {}\n", place.display())).collect()
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
