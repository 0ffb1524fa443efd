//! One changer of a directory's mutable objects at a time, over all processes: an exclusive lock on a file that exists only meanwhile.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::tree::{FILE_MODE, Tree};
use crate::storage::StorageError;

const NAME: &str = ".tmp-lock";
/// How long another process may take; it writes one small file.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

pub(super) struct DirectoryLock {
    directory: OwnedFd,
    /// Closing it gives the lock back.
    _file: OwnedFd,
}

impl DirectoryLock {
    /// Blocks the thread for 10 seconds at most.
    pub(super) fn take(tree: &Tree, folder: &str) -> Result<Self, StorageError> {
        let failed = |errno| tree.error(errno, "locking the directory", folder);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::attempt(tree.make(folder)?) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) | Err(Errno::WOULDBLOCK | Errno::NOENT) if Instant::now() < deadline => {
                    std::thread::sleep(PAUSE)
                }
                Ok(None) => return Err(failed(Errno::WOULDBLOCK)),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// `None`: the name has changed hands in between.
    fn attempt(directory: OwnedFd) -> Result<Option<Self>, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, NAME, flags, FILE_MODE)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        // The holder before removed the name when it was done, so this may be a lock on a file that nobody else can find.
        let mine = rustix::fs::fstat(&file)?;
        match rustix::fs::statat(&directory, NAME, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) if named.st_ino == mine.st_ino && named.st_dev == mine.st_dev => {
                rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
                Ok(Some(Self { directory, _file: file }))
            }
            Ok(_) | Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // If the name stays, the next holder locks it and removes it.
        let _ = rustix::fs::unlinkat(&self.directory, NAME, AtFlags::empty());
    }
}
