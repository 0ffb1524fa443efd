//! The folder of one test: short enough for Unix sockets, open to the user who runs the servers, gone afterwards.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::wait::wait_until;

/// Cheap to clone; the last clone to go cleans up.
#[derive(Clone)]
pub struct Stage(Arc<Inner>);

struct Inner {
    folder: PathBuf,
    user: Option<User>,
}

/// Whom servers and agents run as when the tests are run by root, which PostgreSQL refuses.
#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl Stage {
    /// `name` is for the eye only: it becomes part of the folder's name.
    pub fn new(name: &str) -> Stage {
        let name: String = name.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        let made =
            tempfile::Builder::new().prefix(&format!("wt-{name}-")).tempdir_in(base()).expect("a temporary folder");
        let folder = made.keep();
        let user = rustix::process::getuid().is_root().then(server_user);
        let inner = Inner { folder, user };
        fs::set_permissions(&inner.folder, fs::Permissions::from_mode(0o755))
            .expect("permissions of the test's folder");
        inner.give(&inner.folder);
        Stage(Arc::new(inner))
    }

    pub fn path(&self) -> &Path {
        &self.0.folder
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.folder.join(name)
    }

    /// Makes a folder (0700) that the servers' user owns.
    pub fn make_dir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).expect("a folder in the test's folder");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("its permissions");
        self.0.give(&path);
        path
    }

    /// Writes a file (0600) that the servers' user owns.
    pub fn write(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).expect("a file in the test's folder");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its permissions");
        self.0.give(&path);
        path
    }

    /// Hands a file or folder (not what is in it) to the servers' user.
    pub fn give(&self, path: &Path) {
        self.0.give(path);
    }

    /// A command that runs as the servers' user, in the test's folder, with none of the caller's PostgreSQL, AWS and
    /// Walden variables.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.0.folder).env("HOME", &self.0.folder).env("TZ", "UTC").env("LC_ALL", "C");
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["PG", "AWS_", "WALDEN", "DATABASE_URL"].iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(&name);
            }
        }
        if let Some(user) = self.0.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// Puts a program, or a folder of them, where the servers' user can reach it: by hard links where the file system
    /// allows (nothing is copied then), else by a copy. Without a change of user it stays where it is.
    pub fn reachable(&self, name: &str, original: &Path) -> PathBuf {
        if self.0.user.is_none() {
            return original.to_owned();
        }
        let copy = self.join(name);
        if copy.exists() {
            return copy;
        }
        let copied = ["-al", "-a"].into_iter().any(|how| {
            let done =
                Command::new("cp").arg(how).arg(original).arg(&copy).stderr(std::process::Stdio::null()).status();
            let done = done.expect("cp runs").success();
            if !done && copy.exists() {
                let _ = fs::remove_dir_all(&copy).or_else(|_| fs::remove_file(&copy));
            }
            done
        });
        assert!(copied, "cannot copy {} into the test's folder", original.display());
        copy
    }

    /// The processes that work in the test's folder or were started from it: (pid, command line).
    pub fn processes(&self) -> Vec<(u32, String)> {
        processes_below(&self.0.folder)
    }

    /// SIGKILL for every process that works in a folder or was started from it, until there is none.
    #[track_caller]
    pub fn kill_below(&self, folder: &Path) {
        wait_until(Duration::from_secs(30), "killed processes to go", || {
            let left = processes_below(folder);
            left.iter().for_each(|(pid, _)| kill(*pid));
            left.is_empty()
        });
    }
}

impl Inner {
    fn give(&self, path: &Path) {
        if let Some(User { uid, gid }) = self.user {
            chown(path, Some(uid), Some(gid)).expect("root may give files away");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let left = processes_below(&self.folder);
        for (pid, _) in &left {
            kill(*pid);
        }
        let folder = self.folder.clone();
        if !left.is_empty() && !std::thread::panicking() {
            wait_until(Duration::from_secs(10), "killed processes to go", || processes_below(&folder).is_empty());
        }
        if std::env::var_os("WALDEN_TEST_KEEP").is_some() && std::thread::panicking() {
            eprintln!("kept for a look: {}", self.folder.display());
        } else if let Err(error) = fs::remove_dir_all(&self.folder) {
            // A process just killed may still be writing its last file.
            std::thread::sleep(Duration::from_millis(200));
            let again = fs::remove_dir_all(&self.folder);
            assert!(again.is_ok() || std::thread::panicking(), "cannot remove {}: {error}", self.folder.display());
        }
        assert!(left.is_empty() || std::thread::panicking(), "the test left processes running: {left:?}");
    }
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid from /proc");
    // It may be gone already.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// A socket's path may have 107 bytes, so a long TMPDIR is passed over.
fn base() -> PathBuf {
    let base = std::env::temp_dir();
    if base.as_os_str().len() <= 40 { base } else { PathBuf::from("/tmp") }
}

/// `postgres` if there is such a user, else `nobody`; none is ever created.
fn server_user() -> User {
    let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(User { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    };
    find("postgres")
        .or_else(|| find("nobody"))
        .expect("PostgreSQL refuses root, and there is no user postgres or nobody")
}

fn processes_below(folder: &Path) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let own = std::process::id();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let inside = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
        // A zombie has no command line and no folder, and is its parent's to collect.
        if pid != own && (inside || line.contains(&*folder.to_string_lossy())) {
            found.push((pid, line));
        }
    }
    found
}
