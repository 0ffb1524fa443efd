//! The state database is a cache, and the archive is immutable.

use std::fs;
use std::time::Duration;

use crate::live::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, files_below, stored_segments};
use crate::support::{Postgres, Stage, Walden, has_cause};

const MINUTE: Duration = Duration::from_secs(60);

/// Deleted, emptied, truncated, bit-flipped, or older than reality: set aside, rebuilt within 30 s, exact archive (I4, D1).
#[test]
fn a_lost_or_damaged_state_database_is_rebuilt() {
    let stage = Stage::new("state");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    agent.kill9();
    let old = stage.join("old-state");
    assert!(stage.command("cp").arg("-a").arg(walden.state()).arg(&old).status().expect("cp runs").success());
    for damage in ["deleted", "emptied", "truncated", "flipped", "older", "noise"] {
        let state = walden.state();
        let files = files_below(&state);
        match damage {
            "deleted" => fs::remove_dir_all(&state).expect("it is there"),
            "emptied" => files.iter().for_each(|file| fs::remove_file(file).expect("it is there")),
            "truncated" => files.iter().for_each(|file| {
                let length = fs::metadata(file).expect("it is there").len();
                fs::File::options().write(true).open(file).expect("writable").set_len(length / 2).expect("shorter");
            }),
            "flipped" => files.iter().for_each(|file| {
                let mut bytes = fs::read(file).expect("it is there");
                for at in (0..bytes.len()).step_by(97) {
                    bytes[at] ^= 0x10;
                }
                fs::write(file, bytes).expect("writable");
            }),
            "noise" => files.iter().for_each(|file| fs::write(file, b"not a database").expect("writable")),
            _ => {
                fs::remove_dir_all(&state).expect("it is there");
                assert!(stage.command("cp").arg("-a").arg(&old).arg(&state).status().expect("cp runs").success());
            }
        }
        let mut agent = walden.run();
        agent.wait_status(Duration::from_secs(30), &format!("healthy with its state {damage}"), |status| {
            status["healthy"] == true && status["received_lsn"].is_string()
        });
        archive_all(&postgres, &mut agent);
        agent.kill9();
        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        compare_stored(&folder, &postgres.oracle).assert_whole(1);
    }
}

/// After a clean stop with a backlog (the store was down), the queue is used: uploads resume and nothing is lost.
#[test]
fn uploads_resume_after_a_restart() {
    let stage = Stage::new("resume");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\nstop_timeout = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    super::store::shut(&walden);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    let end = postgres.switch_wal();
    agent.wait_durable(end, MINUTE);
    let queued = agent.wait_status(MINUTE, "a backlog", |status| status["queue"]["segments"].as_u64() > Some(4));
    agent.sigterm(MINUTE);
    super::store::open(&walden);
    let mut agent = walden.run_connected();
    agent.wait_archived(end, MINUTE);
    agent.wait_status(MINUTE, "an empty queue", |status| status["queue"]["segments"] == 0);
    postgres.wait_oracle_complete();
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let compared = compare_stored(&folder, &postgres.oracle);
    assert!(
        compared.missing.is_empty() && compared.equal.len() as u64 >= queued["queue"]["segments"].as_u64().unwrap_or(0)
    );
}

/// Other bytes under the name of a segment that is about to be stored, an object or not: they stay as they are, the cause `conflict` is
/// raised, and the spool keeps its copy, so that archiving goes on once they are gone (I2, I21; B1 of the failure table).
#[test]
fn other_bytes_under_a_name_are_never_overwritten() {
    let stage = Stage::new("conflict");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let stored = stored_segments(&folder);
    let (_, newest) = stored.last_key_value().expect("something is stored");
    let next = postgres.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    let planted = newest.parent().expect("a folder").join(format!("{next}.lz4"));
    postgres.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    postgres.switch_wal();
    let object = fs::read(newest).expect("an object");
    let garbage: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // A whole object, of another segment: readable, and wrong. Then what is no object at all.
    for before in [&object[..], &garbage, b"", &object[..object.len() / 2]] {
        fs::write(&planted, before).expect("planted");
        stage.give(&planted);
        let mut agent = walden.run();
        let status = agent.wait_status(MINUTE, "the cause conflict", |status| has_cause(status, "conflict"));
        assert_eq!(status["healthy"], false);
        assert!(!has_cause(&status, "spool_failing"), "{status}");
        // It said that it streamed, and went on to take backups whose WAL could not come.
        agent.wait_status(MINUTE, "that nothing streams any more", |status| has_cause(status, "not_connected"));
        assert_eq!(agent.metric("walden_connected"), Some(0.0));
        assert_eq!(fs::read(&planted).expect("it is there"), before, "the stored object was changed");
        let kept = files_below(&walden.spool()).into_iter().any(|path| path.to_string_lossy().contains(&next));
        assert!(kept, "the spool let go of {next}");
        agent.sigterm(MINUTE);
    }
    // What the hint says: move it away and restart.
    fs::remove_file(&planted).expect("moved away");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
}
