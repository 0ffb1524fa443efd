//! Where the set-up scripts put the real parts (`tests/setup/`), found by fixed paths below `.cache`.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

fn cache() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache")
}

/// A command line tool such as `lz4`, `pgbench`, `pg_waldump`, `moto_server`, `strace`.
#[track_caller]
pub fn tool(name: &str) -> PathBuf {
    let path = cache().join("bin").join(name);
    assert!(path.exists(), "{name} is not set up: run tests/setup/all.sh (make test does)");
    path
}

pub fn has_tool(name: &str) -> bool {
    cache().join("bin").join(name).exists()
}

/// The whole tree that has to be copied for another user to run this major, and the way to its `bin`.
#[track_caller]
pub fn postgres_home(major: u32) -> (PathBuf, PathBuf) {
    let link = cache().join("postgres").join(major.to_string());
    let home = link.canonicalize().unwrap_or_else(|_| {
        panic!("PostgreSQL {major} is not set up: run tests/setup/postgres.sh {major}");
    });
    // An unpacked package is a small root file system, and its libraries and share files lie beside each other in it.
    let root = match home.ancestors().find(|folder| folder.ends_with(".cache/unpacked")) {
        Some(unpacked) => unpacked.to_owned(),
        None => home.clone(),
    };
    let bin = home.strip_prefix(&root).expect("root is an ancestor").join("bin");
    (root, bin)
}

/// The major that is set up with every client tool of its own (`pg_waldump`, `pg_verifybackup`, …).
pub fn full_major() -> u32 {
    let full = |major: &u32| cache().join("postgres").join(major.to_string()).join("bin/pg_verifybackup").exists();
    postgres_majors().into_iter().find(full).expect("tests/setup/postgres.sh full was run")
}

/// The majors that are set up, lowest first.
pub fn postgres_majors() -> Vec<u32> {
    (13..=18).filter(|major| cache().join("postgres").join(major.to_string()).join("bin/postgres").exists()).collect()
}

/// A port that is free now, outside the range that outgoing connections take theirs from, so that a server which is
/// stopped and started again finds it still free.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..2000 {
        let turn = NEXT.fetch_add(1, Ordering::Relaxed);
        let candidate = 12_000 + (std::process::id().wrapping_mul(97).wrapping_add(turn.wrapping_mul(7))) % 18_000;
        let port = u16::try_from(candidate).expect("below 30000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between 12000 and 30000");
}
