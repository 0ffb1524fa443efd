//! Writes that survive power loss: a temporary name, write, fsync, rename without replacing, fsync of the folder (I9).
//!
//! It never replaces a file unless told to, never follows a symbolic link in the last component, and creates everything for
//! its owner only (0700 and 0600 whatever the umask, I18). Blocking: call it from threads that may wait.
//!
//! [`Faults`] is the seam for tests: a double that refuses an operation shows what happens when the disk does.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, OFlags, RenameFlags};

/// What is about to be done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    Create,
    Write,
    Sync,
    Rename,
    SyncFolder,
    Remove,
}

/// Asked before each operation; an error is what the disk then answers.
pub trait Faults: Send + Sync + fmt::Debug {
    fn before(&self, op: DiskOp, path: &Path) -> io::Result<()>;
}

/// The disk. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    faults: Option<Arc<dyn Faults>>,
}

/// A file being written. Nothing about it is durable before `sync` returns.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    disk: Disk,
}

impl Disk {
    pub fn with_faults(faults: Arc<dyn Faults>) -> Self {
        Self { faults: Some(faults) }
    }

    fn before(&self, op: DiskOp, path: &Path) -> io::Result<()> {
        match &self.faults {
            Some(faults) => faults.before(op, path),
            None => Ok(()),
        }
    }

    /// Creates a folder and its missing parents, mode 0700, each durable in its parent.
    pub fn create_folders(&self, path: &Path) -> io::Result<()> {
        if path.as_os_str().is_empty() || path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.create_folders(parent)?;
        }
        self.before(DiskOp::Create, path)?;
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
            Err(e) => return Err(e),
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.sync_folder(parent),
            _ => self.sync_folder(Path::new(".")),
        }
    }

    /// Creates a file that must not exist, mode 0600.
    pub fn create_new(&self, path: &Path) -> io::Result<DiskFile> {
        self.before(DiskOp::Create, path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32) // O_NOFOLLOW is far below i32::MAX
            .open(path)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        Ok(DiskFile { file, path: path.into(), disk: self.clone() })
    }

    /// Opens a regular file for reading; a link, a FIFO or a device is an error, and never waited for (I17).
    pub fn open_read(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?; // far below i32::MAX
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
        }
    }

    /// Renames without replacing: `AlreadyExists` if `to` is there. Durable only after `sync_folder`.
    pub fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.before(DiskOp::Rename, to)?;
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // File systems without the flag (some network ones): a hard link never replaces either.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                std::fs::hard_link(from, to)?;
                std::fs::remove_file(from)
            }
            other => Ok(other?),
        }
    }

    /// A rename or removal survives power loss only once its folder is on disk.
    pub fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.before(DiskOp::SyncFolder, path)?;
        File::open(path)?.sync_all()
    }

    /// Removes a file; an absent one is fine.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        self.before(DiskOp::Remove, path)?;
        match std::fs::remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Writes a small file durably under a name that must not exist. After an error the name is not there.
    pub fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut named = false;
        let written = self.write_whole(path, bytes, |temporary| {
            self.rename_new(temporary, path)?;
            named = true;
            Ok(())
        });
        if written.is_err() && named {
            // The name could not be flushed: who finds it later would take it for durable. The first error is the one to tell.
            let _ = std::fs::remove_file(path);
        }
        written
    }

    /// Writes a small file durably, replacing what has the name.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.write_whole(path, bytes, |temporary| {
            self.before(DiskOp::Rename, path)?;
            std::fs::rename(temporary, path)
        })
    }

    fn write_whole(&self, path: &Path, bytes: &[u8], name: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = folder.join(format!(".tmp-{}", uuid::Uuid::new_v4()));
        let written = self.create_new(&temporary).and_then(|file| {
            file.write_at(bytes, 0)?;
            file.sync()?;
            name(&temporary)
        });
        if let Err(e) = written {
            // Nothing half-written is left; the first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
            return Err(e);
        }
        self.sync_folder(folder)
    }

    /// Bytes that this user may still write on the path's file system.
    pub fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Refuses a folder that somebody else owns or may write to (I18).
    pub fn check_private(&self, path: &Path) -> io::Result<()> {
        let metadata = std::fs::metadata(path)?;
        let own = metadata.uid() == rustix::process::geteuid().as_raw();
        let refuse = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !own {
            refuse(format!("it belongs to user {}, not to the one who runs Walden", metadata.uid()))
        } else if metadata.mode() & 0o022 != 0 {
            refuse(format!("others may write to it (mode {:04o}); chmod 700 it", metadata.mode() & 0o7777))
        } else {
            Ok(())
        }
    }
}

impl DiskFile {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of the bytes at an offset. After ENOSPC the same call may be made again.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.before(DiskOp::Write, &self.path)?;
        self.file.write_all_at(bytes, offset)
    }

    /// Fills `bytes` from an offset.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Flushes the content. After an error the file is void: the kernel may drop the dirty pages and report success
    /// next time, so a second flush proves nothing.
    pub fn sync(&self) -> io::Result<()> {
        self.disk.before(DiskOp::Sync, &self.path)?;
        self.file.sync_data()
    }
}

/// Is this the kind of error that room on the disk cures?
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}
