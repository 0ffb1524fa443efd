//! A replication slot that two agents want.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored};
use crate::support::{Postgres, Stage, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// An agent that shares nothing with the first one but server and slot.
fn stranger(first: &Walden, archive: &Path) -> Walden {
    let config = fs::read_to_string(first.config_path()).expect("the configuration");
    let listen = config.lines().find(|line| line.starts_with("listen")).expect("a port");
    let config = config
        .replace(listen, &format!("listen = \"127.0.0.1:{}\"", parts::free_port()))
        .replace("/spool\"", "/spool-stranger\"")
        .replace("/state\"", "/state-stranger\"")
        .replace(&first.repository().display().to_string(), &archive.display().to_string());
    Walden::with_config(first.stage(), &format!("{config}[archive]\ncluster = \"stranger\"\n"))
}

/// Two agents with other names, spools and repositories were given one slot. `check` says so beforehand and changes nothing; the second
/// agent says which process of the server has the slot and what to do, is not connected, and tries again; a backup of its own ends with
/// the same line. The first one streams on over the connection that it had, and its archive is whole. Once it stops, the second one
/// goes on by itself (I21).
#[test]
fn the_second_of_two_agents_on_one_slot_says_who_has_it_and_leaves_the_first_alone() {
    let stage = Stage::new("oneslot");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "[upload]\nrequest_timeout = \"5s\"\nretry_delay_max = \"500ms\"\n");
    let mut agent = first.run_connected();
    archive_all(&postgres, &mut agent);
    let holder = || postgres.value("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'walden'");
    let pid = holder();
    let archive = stage.join("archive-stranger");
    let second = stranger(&first, &archive);

    let checked = second.exec(&["check"]);
    assert_eq!(checked.code, Some(1), "{}", checked.stdout);
    let failed: Vec<&str> = checked.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(
        matches!(failed[..], [line] if line.contains("slot") && line.contains(&format!("process {pid} ")) && line.contains("postgres.slot")),
        "{}",
        checked.stdout
    );
    for nothing in [&archive, &stage.join("spool-stranger"), &stage.join("state-stranger")] {
        assert!(!nothing.exists(), "check made {}", nothing.display());
    }

    let begun = Instant::now();
    let backup = second.exec(&["backup"]);
    let told = format!("is active for PID {pid}");
    assert_eq!(backup.code, Some(1), "{}", backup.stderr);
    let line = backup.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(line.contains(&told) && line.contains("postgres.slot"), "{}", backup.stderr);
    assert!(begun.elapsed() < MINUTE, "somebody waited for {:?}", begun.elapsed());
    let left = second.json(&["list"]);
    assert_eq!(left["backups"].as_array().map(Vec::len), Some(0), "{left}");

    let mut waiting = second.run();
    let status = waiting.wait_status(MINUTE, "the second agent to say it", |status| has_cause(status, "not_connected"));
    let causes = status["causes"].to_string();
    wait_until(MINUTE, "who has the slot", || {
        let status = waiting.status().expect("it answers");
        let causes = status["causes"].to_string();
        causes.contains(&told) && causes.contains("postgres.slot")
    });
    let refusals = || postgres.log().matches(&told).count();
    let before = refusals();
    wait_until(MINUTE, "another try", || refusals() > before);
    assert!(waiting.is_running(), "{causes}");

    archive_all(&postgres, &mut agent);
    assert_eq!(holder(), pid, "the first agent's connection is the one that it had");
    let status = agent.status().expect("it answers");
    assert_eq!(status["causes"].as_array().map(Vec::len), Some(0), "{status}");
    compare_stored(&cluster_folder(&first.repository(), "main", &postgres), &postgres.oracle).assert_whole(2);

    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    waiting.wait_status(MINUTE, "the second agent to stream", |status| !has_cause(status, "not_connected"));
    archive_all(&postgres, &mut waiting);
    assert!(waiting.sigterm(MINUTE).success(), "{}", waiting.log_tail());
}

/// Before PostgreSQL 15 only the start of the stream tells that the slot is missing or logical. The agent says so under the cause for it, and
/// a backup does not wait for a stream that cannot begin; it waited for half a minute.
#[test]
fn an_older_server_without_a_slot_that_can_be_used_is_told() {
    let stage = Stage::new("older");
    let postgres = Postgres::builder(13).wal_segsize(1).setting("wal_level", "logical").start(&stage);
    let walden = Walden::local(&stage, &postgres, "").env("WALDEN_POSTGRES__CREATE_SLOT", "false");
    for (made, told) in [
        ("SELECT 1", "the replication slot \"walden\" does not exist"),
        ("SELECT pg_create_logical_replication_slot('walden', 'pgoutput')", "is not a physical one"),
    ] {
        postgres.psql(made);
        let mut agent = walden.run();
        let status = agent.wait_status(Duration::from_secs(30), told, |status| has_cause(status, "slot_missing"));
        assert!(status["causes"].to_string().contains(&told.replace('"', "\\\"")), "{status}");
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let begun = Instant::now();
        let backup = walden.exec(&["backup"]);
        let took = begun.elapsed();
        assert!(backup.code == Some(1) && backup.stderr.contains(told), "{}", backup.stderr);
        assert!(took < Duration::from_secs(20), "somebody waited for {took:?}");
    }
}
