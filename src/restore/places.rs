//! Where a restore goes: what stands in the way is refused or renamed, before anything is fetched.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::RestoreError;
use super::directory::Directory;
use super::fetch::RestoreOptions;
use super::manifest::Manifest;
use super::resolve::Plan;
use super::volume::{Destination, Seen};
use crate::repository::BackupTablespace;

/// `--tablespace-map OLD=NEW`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceMap {
    pub old: PathBuf,
    pub new: PathBuf,
}

/// Refuses a directory that is in use or in the way. Needs no plan, so that it is said before anything is asked for.
pub fn refuse_occupied(path: &Path, force: bool) -> Result<(), RestoreError> {
    refuse_running(path)?;
    if !is_empty(path)? && !force {
        return Err(RestoreError::NotEmpty { path: path.into() });
    }
    may_be_written(path)
}

/// What would fail later, said before anything is fetched: the directory, or the nearest one above it, must let this user in.
fn may_be_written(path: &Path) -> Result<(), RestoreError> {
    use rustix::fs::Access;
    for at in path.ancestors().filter(|at| !at.as_os_str().is_empty()) {
        match rustix::fs::access(at, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                let what = if at == path { "written to" } else { "created" };
                return Err(RestoreError::io(what, path)(error.into()));
            }
        }
    }
    Ok(())
}

/// Where the backup's tablespaces go that lie outside the data directory: the place in the backup, and the one that is filled.
pub fn tablespaces(plan: &Plan, map: &[TablespaceMap]) -> Result<Vec<(String, PathBuf)>, RestoreError> {
    let mut places = tablespace_places(&plan.backup.tablespaces, map)?;
    let known = plan.backup.tablespaces.iter();
    Ok(known.filter_map(|known| Some((known.location.clone(), places.remove(&known.oid)?))).collect())
}

/// The directories that a restore fills.
#[derive(Clone, Debug)]
pub(super) struct Places {
    pub(super) pgdata: PathBuf,
    pub(super) tablespaces: BTreeMap<u32, PathBuf>,
}

impl Places {
    pub(super) fn check(plan: &Plan, options: &RestoreOptions) -> Result<Self, RestoreError> {
        let places = Self {
            pgdata: options.pgdata.clone(),
            tablespaces: tablespace_places(&plan.backup.tablespaces, &options.tablespaces)?,
        };
        let mut all: Vec<&Path> = places.all().collect();
        all.sort_unstable();
        if let Some(pair) = all.windows(2).find(|pair| pair[1].starts_with(pair[0])) {
            return Err(RestoreError::Target {
                why: format!("{} lies in {}", pair[1].display(), pair[0].display()),
                hint: "give the data directory and each tablespace a directory of its own (`--tablespace-map OLD=NEW`)",
            });
        }
        refuse_occupied(&places.pgdata, options.force)?;
        for place in places.tablespaces.values() {
            refuse_foreign_tablespace(place, &places.pgdata)?;
            refuse_occupied(place, options.force)?;
        }
        Ok(places)
    }

    fn all(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.pgdata.as_path()).chain(self.tablespaces.values().map(PathBuf::as_path))
    }

    /// Renames what is not empty to `<path>.before-<UTC>`; deletes nothing.
    pub(super) fn clear(&self, force: bool) -> Result<Vec<(PathBuf, PathBuf)>, RestoreError> {
        let mut renamed = Vec::new();
        for path in self.all() {
            if is_empty(path)? {
                continue;
            }
            if !force {
                return Err(RestoreError::NotEmpty { path: path.into() });
            }
            // A link given as the directory stays; what it leads to is renamed.
            let real = path.canonicalize().map_err(RestoreError::io("found", path))?;
            let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
            let mut name = real.clone().into_os_string();
            name.push(format!(".before-{stamp}"));
            let to = PathBuf::from(name);
            let rename = crate::disk::Disk::default().rename_new(&real, &to);
            rename.map_err(RestoreError::io("renamed", &real))?;
            if real != *path {
                // The link would dangle.
                Directory::open_or_create(&real).map_err(RestoreError::io("created", &real))?;
            }
            renamed.push((real, to));
        }
        Ok(renamed)
    }

    pub(super) fn open(&self, plan: &Plan, manifest: Option<Manifest>) -> Result<Destination, RestoreError> {
        let open = |path: &Path| Directory::open_or_create(path).map_err(RestoreError::io("created", path));
        let tablespaces: Result<_, RestoreError> =
            self.tablespaces.iter().map(|(oid, path)| Ok((*oid, open(path)?))).collect();
        Ok(Destination {
            backup: plan.backup.id.to_string(),
            main: open(&self.pgdata)?,
            tablespaces: tablespaces?,
            manifest,
            seen: Mutex::new(Seen::default()),
        })
    }
}

/// Where each tablespace goes. One inside the data directory (a relative location) needs no place of its own.
fn tablespace_places(
    tablespaces: &[BackupTablespace],
    map: &[TablespaceMap],
) -> Result<BTreeMap<u32, PathBuf>, RestoreError> {
    for entry in map {
        if !tablespaces.iter().any(|tablespace| Path::new(&tablespace.location) == entry.old) {
            let known: Vec<&str> = tablespaces.iter().map(|tablespace| tablespace.location.as_str()).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            return Err(RestoreError::Target {
                why: format!("the backup has no tablespace at {} (it has: {known})", entry.old.display()),
                hint: "correct `--tablespace-map OLD=NEW`",
            });
        }
    }
    let mut places = BTreeMap::new();
    for tablespace in tablespaces {
        let location = PathBuf::from(&tablespace.location);
        if !location.is_absolute() {
            continue;
        }
        let mapped = map.iter().rev().find(|entry| entry.old == location);
        let place = mapped.map_or(&location, |entry| &entry.new);
        // PostgreSQL's `tablespace_map` and its links: no relative paths, and no characters that its file would need to escape.
        let plain = place.to_str().is_some_and(|text| !text.contains(['\n', '\r', '\\']));
        if !place.is_absolute() || !plain {
            return Err(RestoreError::Target {
                why: format!("{} cannot be a tablespace's directory", place.display()),
                hint: "give an absolute path without backslashes and line ends in `--tablespace-map OLD=NEW`",
            });
        }
        places.insert(tablespace.oid, place.clone());
    }
    Ok(places)
}

/// A tablespace's directory has no `postmaster.pid`: whose it is can be told only by the links to it. One that is not empty is renamed
/// only with the data directory that leads to it; any other server may be running on it.
fn refuse_foreign_tablespace(place: &Path, pgdata: &Path) -> Result<(), RestoreError> {
    if is_empty(place)? {
        return Ok(());
    }
    let real = |path: &Path| path.canonicalize().ok();
    let links: Vec<PathBuf> = match std::fs::read_dir(pgdata.join("pg_tblspc")) {
        Ok(entries) => entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(RestoreError::Io { what: "read", path: pgdata.join("pg_tblspc"), source }),
    };
    if links.iter().any(|target| target == place || real(target).is_some_and(|target| Some(target) == real(place))) {
        return Ok(());
    }
    Err(RestoreError::Refused {
        what: format!(
            "the tablespace's directory {} is not empty, and it is not one of the server in {}",
            place.display(),
            pgdata.display()
        ),
        hint: "give the tablespace another directory (`--tablespace-map OLD=NEW`), or move that one away yourself once no server uses it",
    })
}

/// Refuses a directory in which a server lives. A `postmaster.pid` of a process that is gone is only part of a non-empty directory.
fn refuse_running(path: &Path) -> Result<(), RestoreError> {
    let file = path.join("postmaster.pid");
    let content = match std::fs::read(&file) {
        Ok(content) => content,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(());
        }
        Err(source) => return Err(RestoreError::Io { what: "read", path: file, source }),
    };
    let first = String::from_utf8_lossy(&content);
    // A negative number is a standalone backend's.
    let pid = first.lines().next().and_then(|line| line.trim().parse::<i32>().ok()).map(|pid| pid.saturating_abs());
    let Some(pid) = pid else { return Ok(()) };
    let alive = rustix::process::Pid::from_raw(pid)
        .is_some_and(|process| !matches!(rustix::process::test_kill_process(process), Err(rustix::io::Errno::SRCH)));
    if alive { Err(RestoreError::ServerRunning { path: path.into(), pid }) } else { Ok(()) }
}

fn is_empty(path: &Path) -> Result<bool, RestoreError> {
    match std::fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(source) => Err(RestoreError::Io { what: "read", path: path.into(), source }),
    }
}
