//! A backup exists when its `backup.json` does.

use std::time::Duration;

use crate::live::restore::restore;
use crate::live::streaming::archive_all;
use crate::support::oracle::{cluster_folder, files_below};
use crate::support::{Ledger, Postgres, Stage, Walden, ledger, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// Killed while it uploads: not listed, not restored from, and the next one works (I16, F2 of the failure table).
#[test]
fn a_killed_backup_does_not_exist() {
    let stage = Stage::new("half");
    let postgres = Postgres::builder(17).start(&stage);
    // Slow enough to be caught half-way, in volumes of which some are stored by then.
    let walden =
        Walden::local(&stage, &postgres, "[backup]\ninitial = false\nmax_rate = \"8MiB\"\nvolume_bytes = \"4MiB\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    ledger.commit_many(3);
    let folder = cluster_folder(&walden.repository(), "main", &postgres).join("backups");
    let mut backup = walden.spawn(&["backup"]);
    wait_until(MINUTE, "a first volume", || {
        assert!(backup.is_running(), "{}", backup.log_tail());
        files_below(&folder).iter().any(|path| path.extension().is_some_and(|suffix| suffix == "lz4"))
    });
    backup.kill9();
    let list = walden.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(0), "{list}");
    assert_eq!(list["windows"].as_array().map(Vec::len), Some(0), "{list}");
    let target = stage.join("none");
    assert_eq!(walden.exec(&["restore", "--pgdata", &target.to_string_lossy()]).code, Some(3));
    assert!(!target.exists());

    let quick = walden.clone().env("WALDEN_BACKUP__MAX_RATE", "0");
    quick.ok(&["backup"]);
    ledger.commit_many(2);
    archive_all(&postgres, &mut agent);
    let list = walden.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(1), "{list}");
    let restored = restore(&walden, 17, "restored", &[]);
    ledger::assert_rows(&restored, ledger.entries());
}

/// Without a running agent, `backup` streams the WAL that it needs itself, and the result is restorable.
#[test]
fn a_backup_without_an_agent_brings_its_own_wal() {
    for major in crate::live::streaming::majors() {
        let stage = Stage::new("alone");
        let postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        let walden = Walden::local(&stage, &postgres, "");
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(5);
        let load = postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
        assert!(load.is_empty());
        walden.ok(&["backup", "--label", "alone"]);
        let restored = restore(&walden, major, "restored", &[]);
        ledger::assert_rows(&restored, ledger.entries());
        assert_eq!(restored.value("SELECT count(*) FROM bulk"), "50000");
    }
}

/// `backup.initial`: the agent takes one by itself when there is none, and not a second one after a restart.
#[test]
fn the_agent_takes_a_first_backup_by_itself() {
    let stage = Stage::new("initial");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[backup]\ninitial = true\n");
    let mut agent = walden.run_connected();
    let status = agent.wait_status(MINUTE, "the first backup", |status| {
        status["last_backup"].is_object() || status["last_backup"].is_string()
    });
    assert_eq!(walden.json(&["list"])["backups"].as_array().map(Vec::len), Some(1), "{status}");
    assert!(agent.sigterm(MINUTE).success());
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    assert_eq!(walden.json(&["list"])["backups"].as_array().map(Vec::len), Some(1));
}
