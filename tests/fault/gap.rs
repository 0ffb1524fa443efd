//! WAL that is lost is told, never passed over.

use std::fs;
use std::time::Duration;

use walden::wal::{Lsn, SegmentName};

use super::store::{open, shut};
use crate::live::streaming::{archive_all, few, majors, turns};
use crate::support::oracle::{cluster_folder, compare_stored, decompress, files_below};
use crate::support::{Ledger, Postgres, Stage, Walden, has_cause, is_full, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// While the agent is away its slot is dropped, or invalidated by `max_slot_wal_keep_size`, and the WAL is removed. The gap is told
/// within 30 s and becomes an object, what is held before it stays (its last part as a piece), archiving goes on behind it with a
/// slot that holds WAL again, and a restart tells the same gap once more, not another one (I3, I19; A3 of the failure table).
/// A time in the gap is refused, also with a backup behind it (I5, E4).
#[test]
fn wal_that_is_gone_is_a_recorded_gap() {
    for (major, dropped) in turns(&[true, false]) {
        let stage = Stage::new("gap");
        let mut builder = Postgres::builder(major)
            .wal_segsize(1)
            .setting("wal_keep_size", "0")
            .setting("min_wal_size", "2MB")
            .setting("max_wal_size", "4MB");
        if !dropped {
            // Room for the new slot, which begins at the last checkpoint, to be streamed before it is invalidated as well.
            builder = builder.setting("max_slot_wal_keep_size", "8MB");
        }
        let postgres = builder.start(&stage);
        let size = postgres.segment_size();
        let walden = Walden::local(&stage, &postgres, "");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        archive_all(&postgres, &mut agent);
        let held = ledger.commit().lsn;
        agent.wait_archived(held, MINUTE);
        agent.kill9();
        let next = SegmentName::holding(walden::wal::TimelineId::FIRST, held, size).to_string();
        if dropped {
            postgres.drop_slot("walden");
        }
        let lost = ledger.commit();
        wait_until(MINUTE, "the server to remove what the agent lacks", || {
            ledger.commit();
            postgres.switch_wal();
            postgres.psql("CHECKPOINT");
            postgres.wait_oracle_complete();
            !postgres.data.join("pg_wal").join(&next).exists()
        });

        let mut agent = walden.run();
        let status = agent.wait_status(Duration::from_secs(30), "the gap", |status| {
            has_cause(status, "gap") && !has_cause(status, "not_connected")
        });
        assert_eq!(status["healthy"], false);
        assert_eq!(has_cause(&status, "slot_lost"), !dropped, "{status}");
        let gaps = status["gaps"].as_array().expect("a list").clone();
        assert_eq!(gaps.len(), 1, "{status}");
        let lsn = |field: &str| gaps[0][field].as_str().expect("an LSN").parse::<Lsn>().expect("an LSN");
        let (from, to) = (lsn("from_lsn"), lsn("to_lsn"));
        assert!(held <= from && from < to && size.is_boundary(to), "{status}");
        wait_until(MINUTE, "the repository to have told of older gaps", || {
            agent.metric("walden_wal_gaps") == Some(1.0)
        });
        if dropped {
            // Nothing was committed between the gap and the backup, so only the backup shows what was lost.
            walden.ok(&["backup"]);
            ledger.commit();
        }
        archive_all(&postgres, &mut agent);
        if dropped {
            let plan = |time: &str| walden.exec(&["restore", "--dry-run", "--pgdata", "/never", "--target-time", time]);
            let refused = plan(&lost.time);
            assert_eq!(refused.code, Some(3), "{}{}", refused.stdout, refused.stderr);
            assert!(refused.stderr.contains("what can be reached"), "{}", refused.stderr);
            let reached = plan(&ledger.last().time);
            assert_eq!(reached.code, Some(0), "{}", reached.stderr);
        }
        wait_until(MINUTE, "the slot to stand behind the gap", || {
            postgres.slot_restart_lsn("walden").is_some_and(|slot| slot > to)
        });
        // "unreserved" for a moment is possible with so little room for slots; "lost" would be another invalidation.
        assert_ne!(postgres.value("SELECT wal_status FROM pg_replication_slots"), "lost");

        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        let expected_name = format!("{}-{}.json", from.to_hex16(), to.to_hex16());
        wait_until(MINUTE, "the one gap to be stored", || {
            let objects = files_below(&folder.join("gaps"));
            let names: Vec<_> =
                objects.iter().map(|path| path.file_name().expect("a name").to_string_lossy()).collect();
            names == [expected_name.as_str()]
        });
        // Just what lies in the gap is missing, and what was held of its first segment is there.
        for segment in compare_stored(&folder, &postgres.oracle).missing {
            let start = SegmentName::parse(&segment, size).expect("a segment's name").start();
            assert!(size.start_of(from) <= start && start < to, "{segment} is missing, the gap is {from} to {to}");
        }
        let first = SegmentName::holding(walden::wal::TimelineId::FIRST, from, size);
        let piece = format!("tail/00000001/{first}/00000000-{:08X}.lz4", size.offset_of(from));
        let expected = fs::read(postgres.oracle.join(first.to_string())).expect("the server's own copy");
        let kept = decompress(&folder.join(piece));
        assert!(kept == expected[..kept.len()] && kept.len() as u64 == size.offset_of(from));

        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let mut agent = walden.run_connected();
        // With a backup behind it, it is history.
        agent.wait_status(MINUTE, "the same gap", |status| {
            has_cause(status, "gap") != dropped && status["gaps"].as_array().map(Vec::len) == Some(1)
        });
        archive_all(&postgres, &mut agent);
        assert_eq!(files_below(&folder.join("gaps")).len(), 1);
        if major == 18 {
            // A backup that somebody else takes ends the alarm too; the gap stays in the lists.
            walden.ok(&["backup"]);
            let status = agent.wait_status(Duration::from_secs(30), "healthy", |status| status["healthy"] == true);
            assert_eq!(status["gaps"].as_array().map(Vec::len), Some(1), "{status}");
        }
    }
}

/// The slot is invalidated, and the server still has what follows the WAL that is held: by `idle_replication_slot_timeout` while the
/// agent is away; or while it holds more in its spool than it may confirm. The slot was dropped and made again and again, and nothing
/// streamed, until the WAL was lost by that; or the agent streamed from a slot that kept nothing any more, without a word (I3, I21; A3
/// of the failure table).
#[test]
fn an_invalidated_slot_whose_wal_is_still_there_is_made_anew() {
    let scenarios: Vec<(u32, bool)> = match is_full() {
        true => majors().into_iter().map(|major| (major, false)).chain([(18, true)]).collect(),
        false => vec![(17, false), (18, false), (18, true)],
    };
    scenarios.into_iter().for_each(|(major, idle)| invalidate(major, idle));
}

fn invalidate(major: u32, idle: bool) {
    let stage = Stage::new("invalid");
    let limit = if idle { ("idle_replication_slot_timeout", "1s") } else { ("max_slot_wal_keep_size", "2MB") };
    let postgres = Postgres::builder(major)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "64MB")
        .setting(limit.0, limit.1)
        .start(&stage);
    let durability = if idle { "" } else { "durability = \"repository\"\n" };
    let more = format!("[archive]\ntail_interval = \"200ms\"\n{durability}[upload]\nretry_delay_max = \"1s\"\n");
    let walden = Walden::local(&stage, &postgres, &more);
    let mut agent = walden.run_connected();
    // Enough to compare lies in the segment that is open.
    let emit = |kilobytes: u32| {
        let end = postgres.lsn(&format!("SELECT pg_logical_emit_message(true, 'test', repeat('x', {kilobytes}000))"));
        wait_until(MINUTE, "the server to have flushed it", || postgres.flush_lsn() >= end);
        end
    };
    archive_all(&postgres, &mut agent);
    agent.wait_archived(emit(50), MINUTE);
    let state = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'walden'";
    // "invalidating slot" before 16.
    let is_told = |line: &&str| line.contains("invalidating") && line.contains("slot \"walden\"");
    let invalidations = || postgres.log().lines().filter(is_told).count();
    if idle {
        agent.kill9();
        emit(50);
        wait_until(MINUTE, "the server to invalidate the idle slot", || {
            postgres.psql("CHECKPOINT");
            invalidations() > 0
        });
        let hands_off = walden.clone().env("WALDEN_POSTGRES__CREATE_SLOT", "false");
        let mut refused = hands_off.run();
        let status = refused.wait_status(Duration::from_secs(30), "what to do with the slot", |status| {
            has_cause(status, "slot_lost") && status.to_string().contains("create it anew")
        });
        assert!(has_cause(&status, "not_connected") && !has_cause(&status, "slot_missing"), "{status}");
        assert!(refused.sigterm(MINUTE).success(), "{}", refused.log_tail());
        agent = walden.run();
    } else {
        shut(&walden);
        wait_until(MINUTE, "the server to invalidate the slot", || {
            let end = emit(700);
            agent.wait_durable(end, MINUTE);
            postgres.psql("CHECKPOINT");
            invalidations() > 0
        });
    }
    // Streams again, from a slot that keeps WAL, before the store is back.
    agent.wait_durable(emit(50), Duration::from_secs(30));
    wait_until(Duration::from_secs(30), "a slot that keeps WAL", || {
        let state = postgres.value(state);
        state == "reserved" || state == "extended"
    });
    if !idle {
        open(&walden);
    }
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    assert_eq!(
        agent.log().matches("created the replication slot").count(),
        if idle { 1 } else { 2 },
        "{}",
        agent.log()
    );
    compare_stored(&cluster_folder(&walden.repository(), "main", &postgres), &postgres.oracle).assert_whole(2);
}

/// Killed again and again while it is on its way past a gap: one gap, and everything behind it.
#[test]
fn a_gap_is_recorded_once_however_often_the_agent_dies() {
    few(&[17]).into_iter().for_each(kill_at_a_gap);
}

fn kill_at_a_gap(major: u32) {
    let stage = Stage::new("gapkill");
    let postgres = Postgres::builder(major)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "4MB")
        .start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    let held = archive_all(&postgres, &mut agent);
    agent.kill9();
    postgres.drop_slot("walden");
    let next = SegmentName::holding(walden::wal::TimelineId::FIRST, held, postgres.segment_size()).next().to_string();
    wait_until(MINUTE, "the server to remove what the agent lacks", || {
        ledger.commit();
        postgres.switch_wal();
        postgres.psql("CHECKPOINT");
        postgres.oracle.join(&next).exists() && !postgres.data.join("pg_wal").join(&next).exists()
    });
    for millis in [60, 120, 180, 250, 350, 500, 700, 1000] {
        let mut agent = walden.run();
        let begun = std::time::Instant::now();
        wait_until(MINUTE, "the moment to kill", || begun.elapsed() > Duration::from_millis(millis));
        ledger.commit();
        agent.kill9();
    }
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "the gap", |status| has_cause(status, "gap"));
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(1), "{status}");
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    assert_eq!(files_below(&folder.join("gaps")).len(), 1);
    assert!(!has_cause(&status, "diverged") && !has_cause(&status, "conflict"), "{status}");
}

/// A server that is promoted just then may say "already removed" of a segment that it makes in that moment. Once that was taken for a
/// gap at once: the slot, which held the WAL, was dropped, and the WAL was lost by that (I3, I21). Here the file is out of the server's
/// sight for a moment.
#[test]
fn wal_that_is_out_of_sight_for_a_moment_is_no_gap() {
    let stage = Stage::new("moment");
    let postgres = Postgres::builder(18).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    let end = archive_all(&postgres, &mut agent);
    agent.kill9();
    ledger.commit_many(3);
    postgres.switch_wal();
    ledger.commit_many(3);
    // The one that follows what is held: `end` lies in the last one that is.
    let next = SegmentName::holding(walden::wal::TimelineId::FIRST, end, postgres.segment_size()).next().to_string();
    let (there, away) = (postgres.data.join("pg_wal").join(&next), stage.join("away"));
    fs::rename(&there, &away).expect("out of sight");
    let before = postgres.log().matches("has already been removed").count();
    let mut agent = walden.run();
    wait_until(MINUTE, "the server to say that it is gone", || {
        postgres.log().matches("has already been removed").count() > before
    });
    fs::rename(&away, &there).expect("back again");
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
}
