//! A directory that is filled without ever leaving it: every path is walked component by component below a handle, and no link is
//! followed (I17).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

const FOLDER_FLAGS: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::RDONLY).union(OFlags::CLOEXEC);
/// Components of a path below the directory.
const DEPTH_MAX: usize = 16;
const PATH_MAX: usize = 1024;

/// A relative path that stays below where it starts: components without `.`, `..`, empty ones and NUL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InnerPath(Vec<u8>);

impl InnerPath {
    pub fn parse(path: &[u8]) -> Option<Self> {
        let good =
            |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && !part.contains(&0) && part.len() <= 255;
        let fits = path.len() <= PATH_MAX && path.split(|b| *b == b'/').count() <= DEPTH_MAX;
        (fits && path.split(|b| *b == b'/').all(good)).then(|| Self(path.to_vec()))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The folder (empty for the directory itself) and the name in it.
    fn split(&self) -> (&[u8], &[u8]) {
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(at) => (&self.0[..at], &self.0[at + 1..]),
            None => (b"", &self.0),
        }
    }

    /// The tablespace that it lies in, by OID, and the path there.
    pub fn in_tablespace(&self) -> Option<(u32, InnerPath)> {
        let rest = self.0.strip_prefix(b"pg_tblspc/")?;
        let at = rest.iter().position(|b| *b == b'/')?;
        let digits = std::str::from_utf8(&rest[..at]).ok()?;
        let oid: u32 = digits.parse().ok()?;
        (oid.to_string() == digits).then(|| (oid, Self(rest[at + 1..].to_vec())))
    }

    /// Whether a path in a tablespace is one that PostgreSQL has there: `PG_17_202406281`, or below it
    /// (`TABLESPACE_VERSION_DIRECTORY` in `src/include/common/relpath.h`).
    pub fn is_of_tablespace(&self) -> bool {
        let first = self.0.split(|b| *b == b'/').next().unwrap_or_default();
        let number = |part: Option<&[u8]>| part.is_some_and(|p| !p.is_empty() && p.iter().all(u8::is_ascii_digit));
        let mut parts = first.split(|b| *b == b'_');
        parts.next() == Some(b"PG") && number(parts.next()) && number(parts.next()) && parts.next().is_none()
    }

    /// `self` without a leading folder, if it lies below it.
    pub fn below(&self, folder: &str) -> Option<InnerPath> {
        let rest = self.0.strip_prefix(folder.as_bytes())?.strip_prefix(b"/")?;
        Some(Self(rest.to_vec()))
    }
}

impl std::fmt::Display for InnerPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// An open directory. Folders are made 0700 and files 0600 whatever the umask (I18).
#[derive(Debug)]
pub struct Directory {
    handle: OwnedFd,
    path: PathBuf,
}

/// The folder that was used last, since an archive holds one folder's files one after the other.
#[derive(Debug, Default)]
pub struct LastFolder(Option<(Vec<u8>, OwnedFd)>);

impl Directory {
    /// Opens `path`, which may be reached through links: it was named by the user. Makes it, and missing parents, if need be.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        let handle =
            rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::fchmod(&handle, Mode::RWXU)?;
        Ok(Self { handle, path: path.into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a folder; one that is there already is fine.
    pub fn create_folder(&self, path: &InnerPath, last: &mut LastFolder) -> io::Result<()> {
        self.folder(path.as_bytes(), last).map(|_| ())
    }

    /// Creates a file that must not exist.
    pub fn create_file(&self, path: &InnerPath, last: &mut LastFolder) -> io::Result<File> {
        let (folder, name) = path.split();
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = self.folder(folder, last)?;
        let handle = rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::fchmod(&handle, Mode::RUSR | Mode::WUSR)?;
        Ok(handle.into())
    }

    /// Makes a symbolic link that must not exist.
    pub fn create_link(&self, path: &InnerPath, target: &Path) -> io::Result<()> {
        let (folder, name) = path.split();
        let mut last = LastFolder::default();
        rustix::fs::symlinkat(target, self.folder(folder, &mut last)?, name)?;
        Ok(())
    }

    /// The content of a file, `None` if it does not exist. A link is not followed.
    pub fn read(&self, path: &InnerPath, size_max: u64) -> io::Result<Option<Vec<u8>>> {
        use std::io::Read;
        let (folder, name) = path.split();
        let mut last = LastFolder::default();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = match rustix::fs::openat(self.folder(folder, &mut last)?, name, flags, Mode::empty()) {
            Ok(handle) => handle.into(),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        file.take(size_max + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > size_max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large"));
        }
        Ok(Some(bytes))
    }

    /// Writes a small file, in place of one that is there, and flushes it.
    pub fn write(&self, path: &InnerPath, bytes: &[u8]) -> io::Result<()> {
        use std::io::Write;
        let (folder, name) = path.split();
        let mut last = LastFolder::default();
        let folder = self.folder(folder, &mut last)?;
        match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let mut file = self.create_file(path, &mut LastFolder::default())?;
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(rustix::fs::fsync(folder)?)
    }

    /// Everything written to the file system of this directory is durable afterwards.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.handle)?)
    }

    /// Walks to a folder, making what is missing.
    fn folder<'a>(&'a self, path: &[u8], last: &'a mut LastFolder) -> io::Result<std::os::fd::BorrowedFd<'a>> {
        if path.is_empty() {
            return Ok(self.handle.as_fd());
        }
        if last.0.as_ref().is_none_or(|(known, _)| known != path) {
            let mut at: Option<OwnedFd> = None;
            for part in path.split(|b| *b == b'/') {
                let parent = at.as_ref().map_or(self.handle.as_fd(), AsFd::as_fd);
                let made = match rustix::fs::mkdirat(parent, part, Mode::RWXU) {
                    Ok(()) => true,
                    Err(Errno::EXIST) => false,
                    Err(error) => return Err(error.into()),
                };
                let next = rustix::fs::openat(parent, part, FOLDER_FLAGS, Mode::empty())?;
                if made {
                    rustix::fs::fchmod(&next, Mode::RWXU)?;
                }
                at = Some(next);
            }
            last.0 = at.map(|handle| (path.to_vec(), handle));
        }
        let (_, handle) = last.0.as_ref().expect("just made, of at least one part");
        Ok(handle.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn inner(path: &str) -> InnerPath {
        InnerPath::parse(path.as_bytes()).unwrap()
    }

    #[test]
    fn a_path_that_could_leave_is_none() {
        for bad in ["", "/", "/etc/passwd", "..", "a/..", "a/../b", "./a", "a//b", "a/", "a/.", "a\0b"] {
            assert!(InnerPath::parse(bad.as_bytes()).is_none(), "{bad:?}");
        }
        assert!(InnerPath::parse("a/".repeat(20).as_bytes()).is_none());
        assert!(InnerPath::parse("a".repeat(300).as_bytes()).is_none());
        for good in ["a", "base/5/1259", "..a", "a..b/c", "pg_tblspc/16384/PG_17_202406281/5/1", "with space"] {
            assert!(InnerPath::parse(good.as_bytes()).is_some(), "{good:?}");
        }
        assert_eq!(inner("pg_tblspc/1/PG/x").below("pg_tblspc/1"), Some(inner("PG/x")));
        assert_eq!(inner("pg_tblspc/16/x").below("pg_tblspc/1"), None);
        assert_eq!(inner("pg_tblspc/16/PG/x").in_tablespace(), Some((16, inner("PG/x"))));
        for (path, good) in [
            ("PG_17_202406281", true),
            ("PG_17_202406281/5/1", true),
            ("PG_17", false),
            ("PG_17_", false),
            ("PG_17_2_3/x", false),
            ("authorized_keys", false),
            ("x/PG_17_202406281", false),
        ] {
            assert_eq!(inner(path).is_of_tablespace(), good, "{path}");
        }
        assert_eq!(inner("pg_tblspc/016/x").in_tablespace(), None);
        assert_eq!(inner("pg_tblspc/16").in_tablespace(), None);
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (outside, inside) = (folder.path().join("outside"), folder.path().join("inside"));
        std::fs::create_dir(&outside).unwrap();
        let directory = Directory::open_or_create(&inside).unwrap();
        let mut last = LastFolder::default();
        directory.create_link(&inner("link"), &outside).unwrap();
        assert!(directory.create_file(&inner("link/x"), &mut last).is_err());
        assert!(directory.create_folder(&inner("link/x"), &mut last).is_err());
        assert!(directory.create_file(&inner("link"), &mut last).is_err());
        assert!(directory.read(&inner("link"), 10).is_err());
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn modes_do_not_depend_on_the_umask_and_nothing_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open_or_create(&folder.path().join("a/data")).unwrap();
        let mut last = LastFolder::default();
        drop(directory.create_file(&inner("base/5/1259"), &mut last).unwrap());
        assert!(directory.create_file(&inner("base/5/1259"), &mut last).is_err());
        let mode = |path: &str| std::fs::metadata(folder.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("a/data"), mode("a/data/base/5"), mode("a/data/base/5/1259")), (0o700, 0o700, 0o600));
        directory.write(&inner("x"), b"one").unwrap();
        directory.write(&inner("x"), b"two").unwrap();
        assert_eq!(directory.read(&inner("x"), 10).unwrap().unwrap(), b"two");
        assert!(directory.read(&inner("x"), 2).is_err());
        assert_eq!(directory.read(&inner("none"), 2).unwrap(), None);
    }
}
