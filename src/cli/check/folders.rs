//! The spool and the state: may they be written to, is there room, does somebody else use them?

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::agent::Agent;
use super::report::{Check, Report};
use crate::cli::output::size;
use crate::config::Settings;
use crate::disk::Disk;
use crate::spool::Spool;
use crate::wal::SystemIdentifier;

pub fn examine(
    settings: &Settings,
    agent: &Agent,
    system: Option<SystemIdentifier>,
    adopted: bool,
    report: &mut Report,
) {
    spool(settings, agent, report);
    if !adopted {
        other_cluster(settings, system, report);
    } else if let Some(system) = system {
        succeeded(settings, agent, system, report);
    }
    let path = &settings.state.path;
    let usable = writable(path).and_then(|found| {
        if let Found::Folder = found {
            Disk::default().check_private(path)?;
        }
        Ok(found)
    });
    report.add(match usable {
        Ok(found) => Check::good("state", found.message(path)),
        // It is an index only (I4), so nothing is lost without it.
        Err(error) => Check::remark(
            "state",
            format!("{} cannot be used: {error}", path.display()),
            "run goes on without, and reads the whole spool at each start: let the user that runs Walden own it, with mode 0700, or correct state.path",
        ),
    });
}

fn spool(settings: &Settings, agent: &Agent, report: &mut Report) {
    const NAME: &str = "spool";
    const OWNER: &str = "let the user that runs Walden own it, with mode 0700, or correct spool.path";
    let (path, bounds) = (&settings.spool.path, &settings.spool);
    let disk = Disk::default();
    let found = match writable(path) {
        Ok(found) => found,
        Err(error) => return report.add(cannot(NAME, path, &error, OWNER)),
    };
    if let Found::Folder = found
        && let Err(error) = Spool::check_private(&disk, path, &settings.archive.cluster)
    {
        return report.add(Check::error(NAME, &error, OWNER));
    }
    let holder = if agent.is_running { "; the running agent holds it" } else { "" };
    let message = format!("{}{holder}", found.message(path));
    let free = match disk.free_bytes(found.existing(path)) {
        Ok(free) => free,
        Err(error) => return report.add(cannot(NAME, path, &error, "check its file system")),
    };
    let spare = free.saturating_sub(bounds.free_bytes_min);
    report.add(if spare == 0 {
        let why = format!(
            "{message}, but only {} are free, spool.free_bytes_min is {}",
            size(free),
            size(bounds.free_bytes_min)
        );
        Check::failed(NAME, why, "make room, or put spool.path on another disk")
    } else if spare < bounds.bytes_max && !agent.is_running {
        let why =
            format!("{message}; {} can be used, less than spool.bytes_max = {}", size(spare), size(bounds.bytes_max));
        Check::remark(NAME, why, "in an outage of the store the server keeps the rest; make room if its disk is small")
    } else {
        Check::good(NAME, format!("{message}; {} free", size(free)))
    });
}

/// A spool of another cluster alone under this name makes `run` refuse.
fn other_cluster(settings: &Settings, system: Option<SystemIdentifier>, report: &mut Report) {
    let Some(system) = system else { return };
    let Ok(known) = Spool::known_systems(&settings.spool.path, &settings.archive.cluster) else { return };
    if let Some(other) = known.first().filter(|_| !known.contains(&system)) {
        let message = format!("the spool holds WAL of system {other}, and the server is {system}");
        report.add(Check::failed(
            "spool.identity",
            message,
            format!(
                "correct postgres.url, or give this cluster its own archive.cluster; if it has replaced the other one: walden adopt --system-identifier {system}"
            ),
        ));
    }
}

/// WAL of a cluster that this one has succeeded may be nowhere else.
fn succeeded(settings: &Settings, agent: &Agent, system: SystemIdentifier, report: &mut Report) {
    let (root, cluster) = (&settings.spool.path, &settings.archive.cluster);
    let known = Spool::known_systems(root, cluster).unwrap_or_default();
    for other in known.into_iter().filter(|other| *other != system) {
        if !agent.is_running && Spool::holds_anything(root, cluster, other) {
            let message = format!("the spool holds WAL of system {other}, which {system} has succeeded");
            let hint = "run ships what the repositories lack of it to its own folder; do not remove it before";
            report.add(Check::remark("spool.identity", message, hint));
        }
    }
}

fn cannot(name: &str, path: &Path, error: &io::Error, hint: &str) -> Check {
    Check::failed(name, format!("{} cannot be used: {error}", path.display()), hint)
}

/// Where a folder stands or would be made.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Folder,
    /// It is not there; this is the nearest folder above it that is.
    MissingBelow(PathBuf),
}

impl Found {
    fn existing<'a>(&'a self, path: &'a Path) -> &'a Path {
        match self {
            Self::Folder => path,
            Self::MissingBelow(ancestor) => ancestor,
        }
    }

    fn message(&self, path: &Path) -> String {
        match self {
            Self::Folder => path.display().to_string(),
            Self::MissingBelow(_) => format!("{} (run will create it)", path.display()),
        }
    }
}

/// Whether the folder can be written to, or made. Proved by a file without a name, so that nothing is left behind and nobody sees it.
fn writable(path: &Path) -> io::Result<Found> {
    let found = find(path)?;
    try_write(found.existing(path)).map_err(|error| match &found {
        Found::Folder => error,
        Found::MissingBelow(above) => io::Error::new(
            error.kind(),
            format!("it is not there, and {} cannot be written to: {error}", above.display()),
        ),
    })?;
    Ok(found)
}

fn find(path: &Path) -> io::Result<Found> {
    let is_folder = |at: &Path, metadata: Metadata| match metadata.is_dir() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::NotADirectory, format!("{} is not a folder", at.display()))),
    };
    for at in path.ancestors() {
        match std::fs::metadata(at) {
            Ok(metadata) => {
                is_folder(at, metadata)?;
                return Ok(if at == path { Found::Folder } else { Found::MissingBelow(at.to_owned()) });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // A component that is a file is told by its own name.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "no folder above it exists"))
}

fn try_write(folder: &Path) -> io::Result<()> {
    let write = |mut file: File| file.write_all(b"walden check\n").and_then(|()| file.sync_all());
    let nameless = i32::try_from(OFlags::TMPFILE.bits()).expect("the flag is a small number");
    match OpenOptions::new().write(true).mode(0o600).custom_flags(nameless).open(folder) {
        Ok(file) => return write(file),
        // NFS and some others have no files without a name.
        Err(error) if matches!(error.raw_os_error(), Some(code) if is_unsupported(code)) => {}
        Err(error) => return Err(error),
    }
    let path = folder.join(format!(".tmp-check-{}", uuid::Uuid::new_v4()));
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(write);
    let removed = std::fs::remove_file(&path);
    written.and(removed)
}

/// What `open` says where it does not know `O_TMPFILE` ("open(2)").
fn is_unsupported(code: i32) -> bool {
    use rustix::io::Errno;
    [Errno::OPNOTSUPP, Errno::ISDIR, Errno::INVAL].iter().any(|errno| errno.raw_os_error() == code)
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn looking_at_a_folder_changes_nothing() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = dir.path();
        assert_eq!(writable(root).expect("writable"), Found::Folder);
        let missing = root.join("a/b/c");
        assert_eq!(writable(&missing).expect("can be made"), Found::MissingBelow(root.to_owned()));
        assert_eq!(std::fs::read_dir(root).expect("a folder").count(), 0);
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("a file");
        for path in [file.clone(), file.join("below")] {
            let error = writable(&path).expect_err("a file is no folder").to_string();
            assert!(error.contains(&format!("{} is not a folder", file.display())), "{error}");
        }
    }

    /// The state is an index only: without it nothing is lost and `run` goes on, so it must not fail the check (I4).
    #[test]
    fn a_state_that_cannot_be_used_is_worth_a_remark() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("state");
        let judged = |report: &Report| {
            let check = report.checks.iter().find(|check| check.name == "state").expect("it was looked at");
            (check.verdict, check.message.clone())
        };
        let look = |mode: Option<u32>| {
            let sources = crate::config::Sources {
                config: None,
                quick: crate::config::QuickSettings::default(),
                environment: vec![
                    ("WALDEN_STATE__PATH".into(), file.clone().into()),
                    ("WALDEN_SPOOL__PATH".into(), dir.path().join("spool").into()),
                ],
                working_directory: dir.path().into(),
            };
            if let Some(mode) = mode {
                std::fs::create_dir(&file).expect("a folder");
                let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
                std::fs::set_permissions(&file, permissions).expect("its permissions");
            }
            let settings = Settings::load(&sources).unwrap_or_else(|error| panic!("{error}"));
            let mut report = Report::default();
            examine(&settings, &Agent::default(), None, false, &mut report);
            judged(&report)
        };
        assert_eq!(look(None).0, Verdict::Good);
        std::fs::write(&file, "").expect("a file");
        let (verdict, message) = look(None);
        assert!(verdict == Verdict::Remark && message.contains("is not a folder"), "{message}");
        std::fs::remove_file(&file).expect("it goes");
        let (verdict, message) = look(Some(0o777));
        assert!(verdict == Verdict::Remark && message.contains("others may write to it"), "{message}");
    }
}
