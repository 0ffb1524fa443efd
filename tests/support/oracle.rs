//! The comparison with what the server's own `archive_command` copied, through stock tools and through `wal-fetch`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use walden::wal::{Lsn, SegmentName, SegmentSize};

use super::parts;
use super::postgres::Postgres;
use super::walden::Walden;

/// What a comparison found. Differences panic at once.
#[derive(Debug, Default)]
pub struct Compared {
    /// Segments that are in the repository and in the oracle, byte for byte equal.
    pub equal: Vec<String>,
    /// Segments in the repository that the server has not archived itself (yet).
    pub without_oracle: Vec<String>,
    /// Segments of the oracle from the repository's first to its last on the timeline that the repository lacks.
    pub missing: Vec<String>,
}

impl Compared {
    /// Nothing between the first and the last is missing, and at least `count` were equal.
    #[track_caller]
    pub fn assert_whole(&self, count: usize) {
        assert!(self.missing.is_empty(), "segments are missing in the repository: {:?}", self.missing);
        assert!(self.equal.len() >= count, "only {} segments could be compared, {count} were wanted", self.equal.len());
    }
}

/// The folder of a cluster in a local repository: `<root>/<cluster>/<system identifier>`.
#[track_caller]
pub fn cluster_folder(repository: &Path, cluster: &str, postgres: &Postgres) -> PathBuf {
    repository.join(cluster).join(postgres.system_identifier().to_string())
}

/// The complete segments in a cluster's folder: name to path.
pub fn stored_segments(cluster_folder: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for path in files_below(&cluster_folder.join("wal")) {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        if let Some((stem, "lz4" | "zst")) = name.split_once('.') {
            found.insert(stem.to_owned(), path);
        }
    }
    found
}

/// Decompresses with the stock tool that the suffix names.
#[track_caller]
pub fn decompress(path: &Path) -> Vec<u8> {
    let tool = if path.extension().is_some_and(|suffix| suffix == "zst") { "zstd" } else { "lz4" };
    let done = Command::new(parts::tool(tool)).args(["-d", "-c", "-q"]).arg(path).stdin(Stdio::null()).output();
    let done = done.expect("the tool runs");
    assert!(done.status.success(), "{tool} -d {}: {}", path.display(), String::from_utf8_lossy(&done.stderr));
    done.stdout
}

/// Compares every complete segment below a cluster's folder with the oracle, decompressed by `lz4 -d` or `zstd -d`.
#[track_caller]
pub fn compare_stored(cluster_folder: &Path, oracle: &Path) -> Compared {
    let stored = stored_segments(cluster_folder);
    let mut result = Compared::default();
    for (name, path) in &stored {
        match fs::read(oracle.join(name)) {
            Ok(expected) => {
                assert_same(&expected, &decompress(path), &format!("{name} in the repository, by stock tools"));
                result.equal.push(name.clone());
            }
            Err(_) => result.without_oracle.push(name.clone()),
        }
    }
    result.missing = missing_between(&stored.into_keys().collect(), oracle);
    result
}

/// Compares every segment of the oracle from the repository's first to its last with what `walden wal-fetch` delivers.
#[track_caller]
pub fn compare_fetched(walden: &Walden, cluster_folder: &Path, oracle: &Path) -> Compared {
    let stored: BTreeSet<String> = stored_segments(cluster_folder).into_keys().collect();
    let mut result = Compared { missing: missing_between(&stored, oracle), ..Compared::default() };
    let target = walden.stage().make_dir("fetched");
    for name in &stored {
        let Ok(expected) = fs::read(oracle.join(name)) else {
            result.without_oracle.push(name.clone());
            continue;
        };
        let file = target.join(name);
        let done = walden.exec(&["wal-fetch", name, &file.to_string_lossy()]);
        assert_eq!(done.code, Some(0), "walden wal-fetch {name}: {}", done.stderr);
        assert_same(&expected, &fs::read(&file).expect("a delivered file"), &format!("{name} by wal-fetch"));
        fs::remove_file(&file).expect("remove it");
        result.equal.push(name.clone());
    }
    result
}

/// The oracle's segments between the first and the last stored one of each timeline that are not stored.
fn missing_between(stored: &BTreeSet<String>, oracle: &Path) -> Vec<String> {
    let mut missing = Vec::new();
    for path in files_below(oracle) {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        if name.len() != 24 || stored.contains(&name) {
            continue;
        }
        let mut same_timeline = stored.iter().filter(|other| other[..8] == name[..8]);
        if let Some(first) = same_timeline.next()
            && name > *first
            && same_timeline.next_back().is_some_and(|last| name < *last)
        {
            missing.push(name);
        }
    }
    missing.sort();
    missing
}

#[track_caller]
pub fn assert_same(expected: &[u8], found: &[u8], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: the length differs");
    if let Some(at) = expected.iter().zip(found).position(|(a, b)| a != b) {
        panic!(
            "{what}: differs from the server's own copy at byte {at} ({:#04x}, not {:#04x})",
            found[at], expected[at]
        );
    }
}

/// Every regular file below a folder, in no order; none if it is not there.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// After an orderly stop no half-written name is left in a repository or spool.
#[track_caller]
pub fn assert_no_temporary_names(folder: &Path) {
    let left: Vec<PathBuf> = files_below(folder)
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".tmp-")))
        .collect();
    assert!(left.is_empty(), "temporary files are left: {left:?}");
}

/// A commit or abort as the server's own pg_waldump prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub xid: u32,
    /// Start of the record.
    pub lsn: Lsn,
    /// RFC 3339, UTC.
    pub time: String,
    pub is_commit: bool,
}

/// Every commit and abort in the oracle's complete segments, in WAL order. pg_waldump reads its own major only, so
/// this is for the major whose client tools are set up (`has_waldump`).
#[track_caller]
pub fn commits_in_oracle(postgres: &Postgres, size: SegmentSize) -> Vec<Recorded> {
    let mut names: Vec<String> = files_below(&postgres.oracle)
        .iter()
        .map(|path| path.file_name().expect("a file has a name").to_string_lossy().into_owned())
        .filter(|name| SegmentName::parse(name, size).is_ok())
        .collect();
    names.sort();
    let (Some(first), Some(last)) = (names.first(), names.last()) else { return Vec::new() };
    let done = Command::new(parts::tool("pg_waldump"))
        .args(["--rmgr=Transaction", "-p"])
        .arg(&postgres.oracle)
        .args([first, last])
        .env("TZ", "UTC")
        .env("PGTZ", "UTC")
        .output()
        .expect("pg_waldump runs");
    // It ends with an error where the last segment ends inside a record; what it printed stands.
    String::from_utf8_lossy(&done.stdout).lines().filter_map(parse_waldump).collect()
}

/// `rmgr: Transaction len (rec/tot): 34/ 34, tx: 735, lsn: 0/0154F2E8, prev 0/0154F2B0, desc: COMMIT 2026-11-21 01:47:00.123456 UTC; …`
fn parse_waldump(line: &str) -> Option<Recorded> {
    let field = |name: &str| Some(line.split_once(name)?.1.trim_start().split([',', ' ']).next()?.to_owned());
    let description = line.split_once("desc: ")?.1;
    let (kind, rest) = description.split_once(' ')?;
    let is_commit = match kind {
        "COMMIT" | "COMMIT_PREPARED" => true,
        "ABORT" | "ABORT_PREPARED" => false,
        _ => return None,
    };
    let rest = if kind.ends_with("PREPARED") { rest.split_once(": ").map_or(rest, |(_, after)| after) } else { rest };
    let time = format!("{}T{}Z", rest.get(..10)?, rest.get(11..26)?);
    Some(Recorded { xid: field("tx:")?.parse().ok()?, lsn: field("lsn:")?.parse().ok()?, time, is_commit })
}

/// Whether pg_waldump of this server's major is set up.
pub fn has_waldump(postgres: &Postgres) -> bool {
    let version = Command::new(parts::tool("pg_waldump")).arg("--version").output().expect("pg_waldump runs");
    String::from_utf8_lossy(&version.stdout).contains(&format!("(PostgreSQL) {}.", postgres.major))
}
