//! The directories below a store's root, reached by handles: each step opens one name without following a symbolic link, so no name
//! found in the tree can lead out of it (I17). Only the root itself may be a link.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::storage::StorageError;
use crate::storage::keys::TEMPORARY;

const DIRECTORY_MODE: Mode = Mode::RWXU;
pub(super) const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Tries to make a directory that somebody else removes because it is empty.
const MAKE_TRIES: u32 = 16;
const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A root and what this process knows to be durable below it.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    pub(super) url: String,
    /// Directories (keys without a trailing slash, "" is the root) whose chain of names this process has flushed.
    flushed: Mutex<HashSet<String>>,
    /// The root that this process has written to: its device and inode.
    written: Mutex<Option<(u64, u64)>>,
}

impl Tree {
    pub(super) fn new(root: PathBuf) -> Self {
        let url = root.display().to_string();
        Self { root, url, flushed: Mutex::new(HashSet::new()), written: Mutex::new(None) }
    }

    /// The directory `key` for reading; `None` if it is not there. A missing root is an error: an unmounted repository is not an empty one.
    pub(super) fn open(&self, key: &str) -> Result<Option<OwnedFd>, StorageError> {
        let mut directory = self.open_root()?;
        if let Some(found) = open_below(&directory, key) {
            return Ok(Some(found));
        }
        for part in parts(key) {
            directory = match open_child(&directory, part) {
                Ok(child) => child,
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(self.error(errno, "opening the directory", key)),
            };
        }
        Ok(Some(directory))
    }

    /// The directory `key` for writing, created with its parents where missing. On return every name on the way to it is on disk.
    pub(super) fn make(&self, key: &str) -> Result<OwnedFd, StorageError> {
        let root = self.make_root()?;
        for _ in 1..MAKE_TRIES {
            match self.make_below(&root, key) {
                // Somebody removed an empty directory just here.
                Err((_, Errno::NOENT)) => {}
                result => return result.map_err(|(doing, errno)| self.error(errno, doing, key)),
            }
        }
        self.make_below(&root, key).map_err(|(doing, errno)| self.error(errno, doing, key))
    }

    fn make_below(&self, root: &OwnedFd, key: &str) -> Result<OwnedFd, (&'static str, Errno)> {
        let failed = |errno| ("creating the directory", errno);
        let known = self.is_flushed(key);
        if known && let Some(found) = open_below(root, key) {
            return Ok(found);
        }
        let mut directory = rustix::io::dup(root).map_err(failed)?;
        for part in parts(key) {
            let created = match rustix::fs::mkdirat(&directory, part, DIRECTORY_MODE) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(errno) => return Err(failed(errno)),
            };
            let child = open_child(&directory, part).map_err(failed)?;
            if created {
                // The umask may have taken bits away.
                rustix::fs::fchmod(&child, DIRECTORY_MODE).map_err(failed)?;
            }
            // A directory found here may have been made by a process that died before its own flush.
            if created || !known {
                flush_directory(&directory).map_err(|errno| {
                    if created {
                        // A second flush could report a success that is none (I9); a directory made anew is flushed anew.
                        let _ = rustix::fs::unlinkat(&directory, part, AtFlags::REMOVEDIR);
                    }
                    ("flushing the directory", errno)
                })?;
            }
            directory = child;
        }
        if !known {
            remove_stale(&directory).map_err(|errno| ("clearing the directory", errno))?;
            self.lock_flushed().insert(key.to_owned());
        }
        Ok(directory)
    }

    /// Removes `key` and its parents below the root as far as they are empty. What cannot be removed stays: an empty directory means nothing.
    pub(super) fn remove_empty(&self, key: &str) {
        let mut key = key;
        while !key.is_empty() {
            let (parent, name) = split(key);
            let Ok(Some(directory)) = self.open(parent) else { return };
            if rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR).is_err() {
                return;
            }
            self.lock_flushed().remove(key);
            key = parent;
        }
    }

    /// Removes the temporary files of dead writers from a directory, and the directory if nothing else is in it.
    pub(super) fn tidy(&self, folder: &str) -> Result<(), StorageError> {
        let Some(directory) = self.open(folder)? else { return Ok(()) };
        remove_stale(&directory).map_err(|errno| self.error(errno, "clearing the directory of", folder))?;
        self.remove_empty(folder);
        Ok(())
    }

    fn open_root(&self) -> Result<OwnedFd, StorageError> {
        rustix::fs::open(&self.root, OPEN_DIRECTORY, Mode::empty()).map_err(|errno| self.root_error(errno))
    }

    fn make_root(&self) -> Result<OwnedFd, StorageError> {
        match rustix::fs::open(&self.root, OPEN_DIRECTORY, Mode::empty()) {
            Ok(root) if self.is_flushed("") => return self.same_root(root),
            Ok(_) => {}
            // It was there: a file system that was unmounted is not begun anew on the disk below it.
            Err(Errno::NOENT) if self.is_flushed("") => return Err(self.root_error(Errno::NOENT)),
            Err(Errno::NOENT) => match rustix::fs::mkdir(&self.root, DIRECTORY_MODE) {
                Ok(()) => {
                    rustix::fs::chmod(&self.root, DIRECTORY_MODE).map_err(|errno| self.root_error(errno))?;
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(self.root_error(errno)),
            },
            Err(errno) => return Err(self.root_error(errno)),
        }
        let root =
            rustix::fs::open(&self.root, OPEN_DIRECTORY, Mode::empty()).map_err(|errno| self.root_error(errno))?;
        let parent = match self.root.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        // The root's own name. A parent that may be entered but not read cannot be flushed, and then the root is older than this process.
        match rustix::fs::open(parent, OPEN_DIRECTORY, Mode::empty()) {
            Ok(parent) => flush_directory(&parent).map_err(|errno| self.root_error(errno))?,
            Err(Errno::ACCESS) => {}
            Err(errno) => return Err(self.root_error(errno)),
        }
        self.lock_flushed().insert(String::new());
        self.same_root(root)
    }

    /// Refuses an empty directory that stands where another one was written to: the mount point of a file system that is gone.
    fn same_root(&self, root: OwnedFd) -> Result<OwnedFd, StorageError> {
        let status = rustix::fs::fstat(&root).map_err(|errno| self.root_error(errno))?;
        let found = (status.st_dev, status.st_ino);
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written.is_some_and(|written| written != found) && is_empty(&root).map_err(|errno| self.root_error(errno))? {
            return Err(self.root_error(Errno::NOENT));
        }
        *written = Some(found);
        Ok(root)
    }

    fn root_error(&self, errno: Errno) -> StorageError {
        match errno {
            Errno::NOENT => StorageError::NoBucket { url: self.url.clone(), source: Some(Box::new(errno)) },
            errno => self.error(errno, "opening the directory", ""),
        }
    }

    fn is_flushed(&self, key: &str) -> bool {
        self.lock_flushed().contains(key)
    }

    fn lock_flushed(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        // A set is whole after any panic: inserting and removing are its only uses.
        self.flushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a failed system call means to the caller. `key` names the object or directory.
    pub(super) fn error(&self, errno: Errno, doing: &str, key: &str) -> StorageError {
        let url = self.url.clone();
        let what = if key.is_empty() { doing.to_owned() } else { format!("{doing} {key}") };
        let source = Some(Box::new(errno) as _);
        match errno {
            Errno::NOSPC | Errno::DQUOT => StorageError::Full { url, key: key.to_owned(), source },
            Errno::ACCESS => StorageError::Denied { url, what, code: "EACCES".to_owned(), source },
            Errno::PERM => StorageError::Denied { url, what, code: "EPERM".to_owned(), source },
            Errno::ROFS => StorageError::Denied { url, what, code: "read-only file system".to_owned(), source },
            Errno::LOOP | Errno::NOTDIR => {
                let code = "a symbolic link or file stands where a directory or file should".to_owned();
                StorageError::Denied { url, what, code, source }
            }
            Errno::NAMETOOLONG => {
                StorageError::Settings { url, why: format!("{key} is too long a name for this file system") }
            }
            _ => StorageError::Unavailable { url, what, source },
        }
    }
}

/// Some network and FUSE file systems cannot flush a directory and say so; PostgreSQL passes over that as well.
///
/// Source: `fsync_fname_ext` in PostgreSQL `src/backend/storage/file/fd.c`.
pub(super) fn flush_directory(directory: &OwnedFd) -> Result<(), Errno> {
    match rustix::fs::fsync(directory) {
        Err(Errno::BADF | Errno::INVAL) => Ok(()),
        result => result,
    }
}

fn is_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    for entry in rustix::fs::Dir::read_from(directory)? {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes what a writer left behind that died before it could publish. Living writers hold a lock on theirs.
fn remove_stale(directory: &OwnedFd) -> Result<(), Errno> {
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if !name.to_bytes().starts_with(TEMPORARY.as_bytes()) {
            continue;
        }
        // For writing as well, since NFS gives no exclusive lock on a file that is open for reading only.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(directory, name, flags, Mode::empty()) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}

fn open_child(directory: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, OPEN_DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
}

/// The directory in one step, again without following a symbolic link. `None`: it is not there, or the kernel does not know how (before
/// Linux 5.6), or forbids it; then each step tells.
fn open_below(root: &OwnedFd, key: &str) -> Option<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let key = if key.is_empty() { "." } else { key };
    rustix::fs::openat2(root, key, OPEN_DIRECTORY, Mode::empty(), resolve).ok()
}

fn parts(key: &str) -> impl Iterator<Item = &str> {
    key.split('/').filter(|part| !part.is_empty())
}

/// A key's directory ("" for the root) and last part.
pub(super) fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('/').unwrap_or(("", key))
}
