//! How one file comes to be (I9): a temporary name beside the final one, the bytes, a flush of the file, the final name given only if it is
//! free, a flush of the directory. A failed flush voids the file: the kernel may drop the dirty pages and report success the next time.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::tree::{FILE_MODE, Tree, flush_directory, split};
use crate::storage::keys::TEMPORARY;
use crate::storage::{PutOutcome, StorageError};

/// Tries to find a directory alive that somebody empties and removes at the same time.
const DIRECTORY_TRIES: u32 = 8;
/// Tries to lock a temporary file before somebody clears it away.
const TEMPORARY_TRIES: u32 = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Publish {
    IfAbsent,
    Replace,
}

/// Writes the object by `write` and publishes it. On `Created` file and name are durable; on `Exists` what is there is durable as well,
/// since a writer that died may have named it without the flush, and the caller may rely on it.
pub(super) fn publish(
    tree: &Arc<Tree>,
    key: &str,
    mode: Publish,
    write: &mut dyn FnMut(&mut File) -> Result<(), StorageError>,
) -> Result<PutOutcome, StorageError> {
    let Some(mut unpublished) = Unpublished::begin(tree, key, mode)? else { return Ok(PutOutcome::Exists) };
    write(&mut unpublished.file)?;
    unpublished.finish(mode)
}

/// A file under its temporary name, which goes when it is dropped before `finish`.
#[derive(Debug)]
pub(super) struct Unpublished {
    tree: Arc<Tree>,
    key: String,
    directory: OwnedFd,
    pub(super) file: File,
    temporary: Option<String>,
}

impl Unpublished {
    /// `None`: the object exists, and durably so.
    pub(super) fn begin(tree: &Arc<Tree>, key: &str, mode: Publish) -> Result<Option<Self>, StorageError> {
        let folder = split(key).0;
        let mut tries = 0;
        loop {
            let directory = tree.make(folder)?;
            if mode == Publish::IfAbsent && flush_existing(tree, &directory, key)? {
                return Ok(None);
            }
            match create_temporary(&directory) {
                Ok((file, temporary)) => {
                    let (tree, key) = (tree.clone(), key.to_owned());
                    return Ok(Some(Self { tree, key, directory, file, temporary: Some(temporary) }));
                }
                // `delete` removed the directory because it was empty.
                Err(Errno::NOENT) if tries < DIRECTORY_TRIES => tries += 1,
                Err(errno) => return Err(tree.error(errno, "creating", key)),
            }
        }
    }

    /// Flushes the file, names it, flushes the name.
    pub(super) fn finish(mut self, mode: Publish) -> Result<PutOutcome, StorageError> {
        rustix::fs::fsync(&self.file).map_err(|errno| self.tree.error(errno, "flushing", &self.key))?;
        let named = self.give_name(mode).map_err(|errno| self.tree.error(errno, "naming", &self.key))?;
        if !named {
            flush_existing(&self.tree, &self.directory, &self.key)?;
            return Ok(PutOutcome::Exists);
        }
        flush_name(&self.tree, &self.directory, &self.key)?;
        Ok(PutOutcome::Created)
    }

    /// `false` if the name is taken and must stay so.
    fn give_name(&mut self, mode: Publish) -> Result<bool, Errno> {
        let Some(temporary) = self.temporary.as_deref() else { return Ok(false) };
        let (directory, name) = (&self.directory, split(&self.key).1);
        if mode == Publish::Replace {
            rustix::fs::renameat(directory, temporary, directory, name)?;
            self.temporary = None;
            return Ok(true);
        }
        match rustix::fs::renameat_with(directory, temporary, directory, name, RenameFlags::NOREPLACE) {
            Ok(()) => {
                self.temporary = None;
                Ok(true)
            }
            Err(Errno::EXIST) => Ok(false),
            // NFS and others know no such rename; a link never replaces, and the temporary name goes with `self`.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                match rustix::fs::linkat(directory, temporary, directory, name, AtFlags::empty()) {
                    Ok(()) => Ok(true),
                    Err(Errno::EXIST) => Ok(false),
                    Err(errno) => Err(errno),
                }
            }
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if let Some(name) = &self.temporary {
            // If it stays, the next writer in this directory clears it.
            let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
        }
    }
}

/// Gives an open, flushed file of the same file system the object's name as well, without copying. `None`: it cannot be done here.
///
/// Only for a file whose other name goes right after: what happens to the bytes under the one name happens to them under the other.
/// And only for a file that has one name: two repositories must not share their bytes, which one damaged block would then hit both.
pub(super) fn publish_link(tree: &Tree, key: &str, source: &File) -> Result<Option<PutOutcome>, StorageError> {
    let (folder, name) = split(key);
    let status = rustix::fs::fstat(source).map_err(|errno| tree.error(errno, "reading", key))?;
    if status.st_nlink != 1 || Mode::from_raw_mode(status.st_mode).intersects(Mode::RWXG | Mode::RWXO) {
        return Ok(None);
    }
    // The file is sealed, so this finds nothing to write; it is here so that durability rests on nobody's word.
    rustix::fs::fdatasync(source).map_err(|errno| tree.error(errno, "flushing", key))?;
    let directory = tree.make(folder)?;
    let path = format!("/proc/self/fd/{}", source.as_raw_fd());
    match rustix::fs::linkat(rustix::fs::CWD, &path, &directory, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            flush_existing(tree, &directory, key)?;
            return Ok(Some(PutOutcome::Exists));
        }
        // Another file system, no permission for links, no /proc, too many links: copying works everywhere.
        Err(_) => return Ok(None),
    }
    let linked = rustix::fs::fstat(source).map_err(|errno| tree.error(errno, "reading", key))?;
    if linked.st_nlink != 2 {
        // A second repository took it in the same moment.
        rustix::fs::unlinkat(&directory, name, AtFlags::empty()).map_err(|errno| tree.error(errno, "removing", key))?;
        return Ok(None);
    }
    flush_name(tree, &directory, key)?;
    Ok(Some(PutOutcome::Created))
}

/// Whether the object is there; if so, it and its name are durable on return.
fn flush_existing(tree: &Tree, directory: &OwnedFd, key: &str) -> Result<bool, StorageError> {
    let name = split(key).1;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => {
            rustix::fs::fsync(&file).map_err(|errno| tree.error(errno, "flushing", key))?;
            flush_directory(directory).map_err(|errno| tree.error(errno, "flushing the directory of", key))?;
            Ok(true)
        }
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(tree.error(errno, "opening", key)),
    }
}

/// The last step of creating. A name that may not be on disk is taken back.
fn flush_name(tree: &Tree, directory: &OwnedFd, key: &str) -> Result<(), StorageError> {
    flush_directory(directory).map_err(|errno| {
        // Nothing more can be done if this fails too; the error is reported and nobody counts on the object.
        let _ = rustix::fs::unlinkat(directory, split(key).1, AtFlags::empty());
        tree.error(errno, "flushing the directory of", key)
    })
}

/// A new file under a temporary name, locked: whoever clears leftovers leaves locked ones alone. `NOENT`: the directory is gone.
fn create_temporary(directory: &OwnedFd) -> Result<(File, String), Errno> {
    for _ in 0..TEMPORARY_TRIES {
        let name = format!("{TEMPORARY}{}", uuid::Uuid::new_v4());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, &name, flags, FILE_MODE)?;
        match claim(&file) {
            Ok(true) => return Ok((File::from(file), name)),
            // Somebody took it for a leftover in the moment before the lock.
            Ok(false) => {}
            Err(errno) => {
                rustix::fs::unlinkat(directory, &name, AtFlags::empty())?;
                return Err(errno);
            }
        }
    }
    Err(Errno::AGAIN)
}

/// Sets the mode and locks; `false` if the file has lost its name already.
fn claim(file: &OwnedFd) -> Result<bool, Errno> {
    rustix::fs::fchmod(file, FILE_MODE)?;
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(false),
        // Some network file systems have no locks; then nobody can take this for a leftover either.
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
        Err(errno) => return Err(errno),
    }
    Ok(rustix::fs::fstat(file)?.st_nlink > 0)
}
