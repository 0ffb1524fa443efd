//! A store that is down: the stream lives on, the alarm tells, and it drains by itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use walden::wal::Lsn;

use crate::live::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, files_below};
use crate::support::{Postgres, Stage, Walden, has_cause, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// Takes the write permission of every folder of a local repository away. Agents of the tests are never root.
pub fn shut(walden: &Walden) {
    set_modes(walden, 0o500);
}

pub fn open(walden: &Walden) {
    set_modes(walden, 0o700);
}

fn set_modes(walden: &Walden, mode: u32) {
    let mut folders: Vec<_> = files_below(&walden.repository())
        .iter()
        .flat_map(|file| file.ancestors().map(ToOwned::to_owned).collect::<Vec<_>>())
        .collect();
    folders.retain(|folder| folder.starts_with(walden.repository()) && folder.is_dir());
    folders.sort();
    folders.dedup();
    for folder in folders {
        fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).expect("permissions of a folder");
    }
}

/// With the store down: WAL goes on into the spool and is confirmed, keepalives are answered (a `wal_sender_timeout` of
/// 3 s is met), the causes `store_failing` and `lag` and `/readyz` tell, memory stays. Up again: it drains alone
/// (I11, I19, I21; C4, C5 and H1 of the failure table).
#[test]
fn a_store_that_is_down_holds_nothing_up_and_drains_by_itself() {
    let stage = Stage::new("store");
    let postgres = Postgres::builder(17).wal_segsize(1).setting("wal_sender_timeout", "3s").start(&stage);
    let more = "[alert]\nlag_seconds = 3\nrpo_seconds = 3\n[upload]\nretry_delay_max = \"2s\"\n";
    let walden = Walden::local(&stage, &postgres, more);
    let mut agent = walden.run_connected();
    postgres.pgbench_init(2);
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);

    shut(&walden);
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "200"]);
    for cause in ["store_failing", "lag", "rpo"] {
        agent.wait_status(Duration::from_secs(30), &format!("the cause {cause}"), |status| has_cause(status, cause));
    }
    assert_eq!(agent.metric("walden_cause{cluster=\"main\",code=\"lag\"}"), Some(1.0));
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    assert_eq!(agent.get("/livez").expect("an answer").0, 200);
    assert!(agent.metric("walden_wal_archive_lag_seconds").is_some_and(|lag| lag >= 3.0));
    postgres.switch_wal();
    let here = postgres.flush_lsn();
    agent.wait_durable(here, MINUTE);
    assert!(!postgres.log().contains("replication timeout"), "{}", postgres.log_tail());
    assert!(agent.peak_memory_kib() < 256 << 10, "{} KiB", agent.peak_memory_kib());

    load.stop();
    open(&walden);
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true && status["lag_bytes"] == 0);
    archive_all(&postgres, &mut agent);
    assert_eq!(agent.get("/readyz").expect("an answer").0, 200);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(5);
}

/// A spool at its bound: the agent stops reading, the server keeps the WAL, nothing is dropped, and it recovers alone.
#[test]
fn a_full_spool_leaves_the_wal_on_the_server() {
    let stage = Stage::new("full");
    let mut postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let config = fs::read_to_string(Walden::local(&stage, &postgres, "").config_path()).expect("a configuration");
    let config = config.replace("free_bytes_min = 0", "free_bytes_min = 0\nbytes_max = \"4MiB\"");
    let walden = Walden::with_config(&stage, &config);
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    shut(&walden);
    postgres.psql("CREATE TABLE noise AS SELECT n, md5(random()::text) || md5(random()::text) AS a FROM generate_series(1, 300000) n");
    agent.wait_status(MINUTE, "the cause spool_full", |status| has_cause(status, "spool_full"));
    let spooled: u64 =
        files_below(&walden.spool()).iter().filter_map(|path| fs::metadata(path).ok()).map(|meta| meta.len()).sum();
    assert!(spooled <= 6 << 20, "{spooled} bytes in a spool of 4 MiB");
    let slot = postgres.slot_restart_lsn("walden").expect("the slot holds the WAL");
    assert!(slot < postgres.flush_lsn());
    // The server can be stopped, although nobody listens to it.
    let begun = Instant::now();
    postgres.stop_fast();
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    postgres.start();
    agent.wait_status(MINUTE, "a connection again", |status| !has_cause(status, "not_connected"));
    assert!(postgres.slot_restart_lsn("walden").expect("the slot holds the WAL") < postgres.flush_lsn());
    // The agent can be stopped, says that WAL stays behind and where, and starts, full as it is.
    assert!(agent.sigterm(Duration::from_secs(30)).success(), "{}", agent.log_tail());
    assert!(agent.log().contains("lies on the server only"), "{}", agent.log_tail());
    assert!(agent.log().contains("lies in the spool"), "{}", agent.log_tail());
    let mut agent = walden.run();
    agent.wait_status(MINUTE, "the cause spool_full again", |status| has_cause(status, "spool_full"));
    open(&walden);
    wait_until(MINUTE, "the slot to move on", || postgres.slot_restart_lsn("walden").is_some_and(|now| now > slot));
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(20);
}

/// With `durability = "repository"` nothing is confirmed while the store is down, and the keepalives go on (I1, I11). The server can
/// be shut down all the same: it hung until the store was back.
#[test]
fn a_store_that_is_down_holds_the_slot_where_that_is_asked_for() {
    let stage = Stage::new("durability");
    let mut postgres = Postgres::builder(17).wal_segsize(1).setting("wal_sender_timeout", "3s").start(&stage);
    let more =
        "[archive]\ndurability = \"repository\"\ntail_interval = \"200ms\"\n[upload]\nretry_delay_max = \"1s\"\n";
    let walden = Walden::local(&stage, &postgres, more);
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    shut(&walden);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
    let end = postgres.switch_wal();
    agent.wait_durable(end, MINUTE);
    let status = agent.wait_status(MINUTE, "the cause store_failing", |status| has_cause(status, "store_failing"));
    let archived: Lsn = status["archived_lsn"].as_str().expect("known").parse().expect("an LSN");
    assert!(archived < end, "{status}");
    let begun = Instant::now();
    wait_until(MINUTE, "twice the server's patience", || {
        let slot = postgres.slot_restart_lsn("walden").expect("it holds WAL");
        assert!(slot <= archived, "the slot is at {slot}, the repository ends at {archived}");
        begun.elapsed() > Duration::from_secs(6)
    });
    assert!(!postgres.log().contains("replication timeout"), "{}", postgres.log_tail());
    // The server can be stopped: it would wait until all its WAL is confirmed, and that is not told. Its slot keeps it.
    let begun = Instant::now();
    postgres.stop_fast();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    postgres.start();
    agent.wait_status(MINUTE, "a connection again", |status| !has_cause(status, "not_connected"));
    let slot = postgres.slot_restart_lsn("walden").expect("it holds WAL");
    assert!(slot <= archived, "the slot is at {slot}, the repository ends at {archived}");
    open(&walden);
    wait_until(MINUTE, "the slot to follow", || {
        postgres.slot_restart_lsn("walden").is_some_and(|slot| slot > archived)
    });
    archive_all(&postgres, &mut agent);
}
