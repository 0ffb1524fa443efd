//! Base backups from a standby: idle, and promoted in the middle.

use std::fs;
use std::time::Duration;

use super::hosts::{archiving, pair};
use super::restore::restore;
use super::streaming::majors;
use crate::support::ledger::assert_rows;
use crate::support::{Ledger, Stage, Walden, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// A backup on a standby switches no segment, and an idle primary completes none: the stop LSN lies in the open segment,
/// which is shipped as it is. The backup is a primary's when it is restored, although it holds `standby.signal` (F3).
#[test]
fn a_backup_from_an_idle_standby_ends_and_restores() {
    for major in majors() {
        let stage = Stage::new("from-standby");
        let (primary, standby) = pair(&stage, major);
        let mut ledger = Ledger::create(&primary);
        ledger.commit_many(5);
        primary.psql("CHECKPOINT");
        let end = primary.flush_lsn();
        wait_until(MINUTE, "the standby to replay these", || standby.lsn("SELECT pg_last_wal_replay_lsn()") >= end);
        // Without the tail a piece through the stop LSN goes out all the same.
        let tail = if major % 2 == 1 { "0" } else { "1s" };
        let walden = archiving(&stage, &[&standby], "standby").env("WALDEN_ARCHIVE__TAIL_INTERVAL", tail);
        let finished = walden.exec(&["backup"]);
        assert_eq!(finished.code, Some(0), "{major}: {}", finished.stderr);
        let rows = ledger.entries().to_vec();
        let restored = restore(&walden, major, "restored", &[]);
        assert_rows(&restored, &rows);
        restored.psql("CREATE TABLE it_takes_writes ()");
    }
}

/// The primary was shut down, and the standby's last restartpoint is its shutdown checkpoint: no record lies behind the one that the
/// backup begins with. PostgreSQL has nothing to replay then, and ends with a FATAL where a target is set: none is, and the restored
/// server opens exactly there. It could not pause or shut down there, which is refused (I5).
#[test]
fn a_backup_behind_which_nothing_was_written_is_restored() {
    for major in majors() {
        let stage = Stage::new("last-record");
        let (mut primary, standby) = pair(&stage, major);
        let mut ledger = Ledger::create(&primary);
        ledger.commit_many(5);
        let rows = ledger.entries().to_vec();
        drop(ledger);
        primary.stop_fast();
        wait_until(MINUTE, "the standby to rest on the shutdown checkpoint", || {
            standby.psql("CHECKPOINT");
            standby.value("SELECT redo_lsn = checkpoint_lsn AND checkpoint_lsn > '0/0' AND pg_last_wal_replay_lsn() = pg_last_wal_receive_lsn() FROM pg_control_checkpoint()") == "t"
        });
        let walden = archiving(&stage, &[&standby], "standby");
        walden.ok(&["backup"]);
        let target = stage.join("paused");
        let paused = walden.exec(&["restore", "--pgdata", &target.to_string_lossy(), "--action", "pause"]);
        assert_eq!(paused.code, Some(3), "{major}: {}", paused.stderr);
        assert!(paused.stderr.contains("--action promote") && !target.exists(), "{major}: {}", paused.stderr);
        for (name, target) in [("latest", "latest"), ("immediate", "immediate")] {
            let restored = restore(&walden, major, name, &["--target", target]);
            assert_rows(&restored, &rows);
            restored.psql("CREATE TABLE it_takes_writes ()");
        }
    }
}

/// PostgreSQL gives such a backup up. It ends with the reason, and does not exist.
#[test]
fn a_backup_whose_standby_is_promoted_fails_with_the_reason() {
    majors().into_iter().for_each(promote_in_a_backup);
}

fn promote_in_a_backup(major: u32) {
    let stage = Stage::new("promoted");
    let (_primary, mut standby) = pair(&stage, major);
    let walden = archiving(&stage, &[&standby], "any");
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    let walden = Walden::with_config(&stage, &config.replace("[backup]\n", "[backup]\nmax_rate = \"1MiB\"\n"));
    let mut backup = walden.spawn(&["backup"]);
    wait_until(MINUTE, "files to be streamed", || {
        assert!(backup.is_running(), "{}", backup.log_tail());
        standby.value("SELECT count(*) FROM pg_stat_progress_basebackup WHERE backup_streamed > 1000000") != "0"
    });
    standby.psql("SELECT pg_promote(false)");
    standby.wait_promoted(MINUTE);
    let ended = backup.wait(2 * MINUTE);
    assert_eq!(ended.code(), Some(1), "{}", backup.log_tail());
    assert!(backup.log().contains("promoted during online backup"), "{}", backup.log_tail());
    assert!(!backup.log().contains("wal_level"), "{}", backup.log_tail());
    assert_eq!(walden.json(&["list"])["backups"].as_array().map(Vec::len), Some(0));
}
