//! The agent beside a real server: what it stores, what it confirms, and whom it refuses.

use std::fs;
use std::path::Path;
use std::time::Duration;

use walden::wal::Lsn;

use super::restore::restore;
use crate::support::ledger::assert_rows;
use crate::support::oracle::{assert_no_temporary_names, cluster_folder, compare_fetched, compare_stored, files_below};
use crate::support::{
    Agent, Ledger, Postgres, Recorder, Stage, Walden, eventually, has_cause, is_full, parts, wait_until,
};

const MINUTE: Duration = Duration::from_secs(60);

/// The majors that a change is tested on; all that are set up in the full run.
pub fn majors() -> Vec<u32> {
    if is_full() { parts::postgres_majors() } else { vec![13, 15, 17, 18] }
}

/// Each major with a scenario, in turn, so that each of both is seen; every major with every scenario in the full run.
pub fn turns<S: Copy>(scenarios: &[S]) -> Vec<(u32, S)> {
    turns_on(&majors(), scenarios)
}

/// The same on some majors only, where it takes long and they hardly differ.
pub fn turns_on<S: Copy>(some: &[u32], scenarios: &[S]) -> Vec<(u32, S)> {
    if is_full() {
        return majors().iter().flat_map(|major| scenarios.iter().map(|scenario| (*major, *scenario))).collect();
    }
    let count = some.len().max(scenarios.len());
    some.iter().cycle().zip(scenarios.iter().cycle()).take(count).map(|(major, scenario)| (*major, *scenario)).collect()
}

/// These majors; all in the full run. For what hardly differs between them.
pub fn few(majors_of_each_change: &[u32]) -> Vec<u32> {
    if is_full() { majors() } else { majors_of_each_change.to_vec() }
}

/// Ends the segment that is open and waits until it is in the repository and in the oracle.
#[track_caller]
pub fn archive_all(postgres: &Postgres, agent: &mut Agent) -> Lsn {
    // A switch does nothing where nothing was written since the last one.
    postgres.psql("SELECT pg_logical_emit_message(true, 'test', 'end')");
    let end = postgres.switch_wal();
    postgres.wait_oracle_complete();
    agent.wait_archived(end, MINUTE);
    end
}

/// The tail pieces of the segment that is open now: offsets, by start.
pub fn pieces_of_open_segment(cluster_folder: &Path, postgres: &Postgres) -> Vec<(u64, u64)> {
    let open = postgres.value("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let folder = cluster_folder.join("tail").join(&open[..8]).join(&open);
    let mut pieces: Vec<(u64, u64)> = files_below(&folder)
        .iter()
        .map(|path| {
            let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
            let number = |hex| u64::from_str_radix(hex, 16).expect("an offset");
            (number(&name[..8]), number(&name[9..17]))
        })
        .collect();
    pieces.sort_unstable();
    pieces
}

/// Under pgbench, over `pg_switch_wal`, a restart of the server and one of the agent, each complete segment in the
/// repository equals the server's own copy: by stock `lz4 -d` and by `wal-fetch` (I1, I3, I9).
#[test]
fn every_streamed_segment_equals_the_servers_own_copy() {
    for (major, mib) in majors().into_iter().zip([16, 1, 16, 1, 4, 1]) {
        let stage = Stage::new("stream");
        let mut postgres = Postgres::builder(major).wal_segsize(mib).setting("wal_sender_timeout", "10s").start(&stage);
        let walden = Walden::local(&stage, &postgres, "");
        let mut agent = walden.run_connected();
        postgres.pgbench_init(20);
        let load = postgres.pgbench(&["-c", "4", "-T", "600"]);
        let recorder = Recorder::start(&postgres);
        postgres.switch_wal();
        wait_until(MINUTE, "some rows", || recorder.entries().len() > 20);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        drop(load);
        postgres.restart();
        let mut agent = walden.run_connected();
        let load = postgres.pgbench(&["-c", "4", "-T", "600"]);
        postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 1000000) n");
        let before = recorder.entries().len();
        wait_until(MINUTE, "rows after the restart", || recorder.entries().len() > before + 20);
        load.stop();
        let (rows, _) = recorder.stop();
        let end = archive_all(&postgres, &mut agent);
        assert!(rows.last().is_some_and(|row| row.lsn <= end));

        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        let compared = compare_stored(&folder, &postgres.oracle);
        compared.assert_whole(21);
        assert!(compared.without_oracle.is_empty(), "the server never completed {:?}", compared.without_oracle);
        compare_fetched(&walden, &folder, &postgres.oracle).assert_whole(21);

        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        assert_no_temporary_names(&walden.repository());
        assert_no_temporary_names(&walden.spool());
    }
}

/// The slot's position, polled under load, never lies beyond what the agent itself calls durable a moment later, and
/// with `durability = "repository"` not beyond what is archived (I1).
#[test]
fn the_slot_never_passes_what_is_durable() {
    for (durability, position) in [("spool", "durable_lsn"), ("repository", "archived_lsn")] {
        let stage = Stage::new("slot");
        let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
        let walden = Walden::local(&stage, &postgres, &format!("[archive]\ndurability = \"{durability}\"\n"));
        let mut agent = walden.run_connected();
        postgres.pgbench_init(1);
        let load = postgres.pgbench(&["-c", "2", "-T", "600"]);
        // Before anything came, the slot stands where the server made it.
        agent.wait_status(MINUTE, "the first position", |status| status[position].is_string());
        let (mut polls, mut moved) = (0, 0);
        let mut last = None;
        wait_until(MINUTE, "the slot to move while it is watched", || {
            let slot = postgres.slot_restart_lsn("walden").expect("the slot holds WAL from its creation on");
            let status = agent.status().expect("the agent answers");
            let known: Lsn = status[position].as_str().map_or(Lsn::new(0), |text| text.parse().expect("an LSN"));
            assert!(slot <= known, "the slot is at {slot}, {position} at {known}");
            polls += 1;
            moved += i32::from(last.is_some_and(|before| before < slot));
            last = Some(slot);
            polls > 100 && moved > 3
        });
        load.stop();
        assert!(agent.is_running());
    }
}

/// On an idle server nothing is late, and what is known is told: H2 of the failure table in small (I19).
#[test]
fn an_idle_server_is_healthy() {
    let stage = Stage::new("idle");
    let postgres = Postgres::builder(17).wal_segsize(1).setting("wal_sender_timeout", "3s").start(&stage);
    let walden = Walden::local(&stage, &postgres, "[alert]\nlag_seconds = 2\nlag_bytes = 1\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    // Three times the server's patience, and more than the alarm's.
    let begun = std::time::Instant::now();
    wait_until(MINUTE, "ten quiet seconds", || {
        let status = agent.status().expect("the agent answers");
        assert_eq!(status["healthy"], true, "{status}");
        begun.elapsed() > Duration::from_secs(10)
    });
    assert_eq!(agent.get("/readyz").expect("an answer").0, 200);
    assert_eq!(agent.get("/livez").expect("an answer").0, 200);
    assert_eq!(agent.metric("walden_connected"), Some(1.0));
    assert_eq!(agent.metric("walden_wal_archive_lag_bytes"), Some(0.0));
    let status = agent.status().expect("the agent answers");
    assert_eq!(status["schema"], 1);
    assert_eq!(status["system_identifier"], postgres.system_identifier().to_string());
    assert_eq!(status["timeline"], 1);
    assert_eq!(status["lag_bytes"], 0);
    assert_eq!(status["slot"]["name"], "walden");
    assert_eq!(walden.exec(&["status"]).code, Some(0));
    assert!(!postgres.log().contains("replication timeout"), "{}", postgres.log_tail());
    agent.kill9();
    let silent = walden.exec(&["--json", "status"]);
    assert_eq!(silent.code, Some(1));
    assert!(silent.stdout.contains("agent_unreachable"), "{}", silent.stdout);
}

/// Another cluster under the same name, as after initdb or pg_upgrade, is refused before streaming, and nothing in the
/// repository changes (I6, B3 of the failure table).
#[test]
fn another_cluster_is_refused_before_streaming() {
    let stage = Stage::new("other");
    let first = Postgres::builder(15).wal_segsize(1).named("first").start(&stage);
    let walden = Walden::local(&stage, &first, "");
    let mut agent = walden.run_connected();
    archive_all(&first, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    let listing = || {
        let mut files: Vec<_> =
            files_below(&walden.repository()).into_iter().filter(|path| !path.ends_with("lease.json")).collect();
        files.sort();
        files
    };
    let before = listing();

    let second = Postgres::builder(17).wal_segsize(1).named("second").start(&stage);
    let config = fs::read_to_string(walden.config_path()).expect("the configuration");
    let config = config
        .replace(&first.socket_url(), &second.socket_url())
        .replace("/spool\"", "/spool-2\"")
        .replace("/state\"", "/state-2\"");
    let other = Walden::with_config(&stage, &config);
    for command in ["run", "backup"] {
        let mut refused = other.spawn(&[command]);
        assert_eq!(refused.wait(MINUTE).code(), Some(4), "walden {command}: {}", refused.log_tail());
        assert!(refused.log().contains(&first.system_identifier().to_string()), "{}", refused.log());
    }
    assert_eq!(before, listing());
}

/// Segment sizes come from the server (I6, B4 of the failure table).
#[test]
fn segments_of_any_size_have_the_right_names() {
    // The largest takes minutes and gigabytes: with the long runs, and on two majors.
    let sizes: Vec<(u32, u32)> = match is_full() {
        true => majors().into_iter().zip([1, 64, 1024, 16, 64, 1024]).chain([(18, 1), (13, 16)]).collect(),
        false => vec![(13, 64), (18, 1)],
    };
    for (major, mib) in sizes {
        let stage = Stage::new("size");
        let postgres = Postgres::builder(major).wal_segsize(mib).start(&stage);
        let walden = Walden::local(&stage, &postgres, "[archive]\ncompression = \"zstd\"\n");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(3);
        walden.ok(&["backup"]);
        // The names' last part counts differently with each size.
        for _ in 0..6 {
            ledger.commit();
            archive_all(&postgres, &mut agent);
        }
        let last = ledger.commit().lsn;
        agent.wait_archived(last, MINUTE);
        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        compare_stored(&folder, &postgres.oracle).assert_whole(5);
        compare_fetched(&walden, &folder, &postgres.oracle).assert_whole(5);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let middle = ledger.entries()[5].lsn.to_string();
        assert_rows(&restore(&walden, major, "middle", &["--target-lsn", &middle]), &ledger.entries()[..6]);
        assert_rows(&restore(&walden, major, "latest", &[]), ledger.entries());
    }
}

/// Crashes of the server under load are ordinary events: the agent reconnects by itself and nothing differs (I7).
#[test]
fn a_crashed_server_is_followed_without_a_gap() {
    few(&[18]).into_iter().for_each(follow_crashes);
}

fn follow_crashes(major: u32) {
    let stage = Stage::new("crash");
    let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    postgres.pgbench_init(5);
    let recorder = Recorder::start(&postgres);
    for _ in 0..3 {
        let load = postgres.pgbench(&["-c", "4", "-T", "600"]);
        let before = recorder.entries().len();
        wait_until(MINUTE, "rows between crashes", || recorder.entries().len() > before + 30);
        postgres.crash_and_restart();
        load.stop();
    }
    recorder.stop();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(5);
    assert_eq!(agent.status().expect("an answer")["gaps"].as_array().map(Vec::len), Some(0));
}

/// Two agents for one cluster: the second one stands by, and takes over when the first one is gone (I20).
#[test]
fn a_second_agent_stands_by() {
    let stage = Stage::new("lease");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let first = Walden::local(&stage, &postgres, "");
    let mut writer = first.run_connected();
    archive_all(&postgres, &mut writer);
    let port = parts::free_port();
    let second = Walden::with_config(
        &stage,
        &format!(
            "[postgres]\nurl = \"{}\"\nslot = \"standby\"\n[spool]\npath = \"{2}/spool-2\"\nfree_bytes_min = 0\n[state]\npath = \"{2}/state-2\"\n\
             [metrics]\nlisten = \"127.0.0.1:{port}\"\n[backup]\ninitial = false\n[[repository]]\ntype = \"local\"\npath = \"{1}\"\n",
            postgres.socket_url(),
            first.repository().display(),
            stage.path().display(),
        ),
    );
    let mut waiting = second.run();
    waiting.wait_status(MINUTE, "the second agent to stand by", |status| has_cause(status, "lease_held"));
    archive_all(&postgres, &mut writer);
    assert!(postgres.slot_restart_lsn("standby").is_none(), "one that stands by holds no WAL back");
    writer.kill9();
    // 30 s without a renewal, and up to 5 s until the next look.
    waiting.wait_status(Duration::from_secs(45), "the second agent to take over", |status| {
        !has_cause(status, "lease_held") && !has_cause(status, "not_connected")
    });
    archive_all(&postgres, &mut waiting);
    let folder = cluster_folder(&first.repository(), "main", &postgres);
    let compared = eventually(MINUTE, "the archive without a hole", || {
        let compared = compare_stored(&folder, &postgres.oracle);
        if compared.missing.is_empty() { Ok(compared) } else { Err(format!("{:?}", compared.missing)) }
    });
    compared.assert_whole(3);
}

/// Another agent on the same spool is refused; the first one goes on (I20).
#[test]
fn one_spool_has_one_agent() {
    let stage = Stage::new("samespool");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let mut second = walden.clone().env("WALDEN_METRICS__LISTEN", "").run();
    assert_eq!(second.wait(Duration::from_secs(20)).code(), Some(4), "{}", second.log_tail());
    assert!(second.log().contains("spool"), "{}", second.log());
    archive_all(&postgres, &mut agent);
}

/// SIGTERM ships what PostgreSQL has flushed, although the next tail piece would be due only in an hour.
#[test]
fn a_stopping_agent_ships_the_tail() {
    let stage = Stage::new("stop");
    let postgres = Postgres::builder(15).wal_segsize(16).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"1h\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    let last = ledger.commit_many(20).last().expect("twenty").lsn;
    agent.wait_status(MINUTE, "the rows to be received", |status| {
        status["received_lsn"].as_str().and_then(|text| text.parse::<Lsn>().ok()).is_some_and(|lsn| lsn >= last)
    });
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let end = pieces_of_open_segment(&folder, &postgres).last().map(|(_, end)| *end);
    assert!(end.is_some_and(|end| end >= postgres.segment_size().offset_of(last)), "{end:?}, {last}");
}

/// The port of `metrics.listen` is taken: an ERROR, and archiving goes on.
#[test]
fn a_taken_port_stops_no_archiving() {
    let stage = Stage::new("port");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let walden = Walden::local(&stage, &postgres, "").env("WALDEN_METRICS__LISTEN", &address);
    let mut agent = walden.run();
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    wait_until(MINUTE, "a slot", || postgres.slot_restart_lsn("walden").is_some());
    postgres.psql("SELECT pg_logical_emit_message(true, 'test', 'end')");
    postgres.wait_oracle_complete();
    wait_until(MINUTE, "a stored segment", || !compare_stored(&folder, &postgres.oracle).equal.is_empty());
    assert!(agent.is_running());
    // Told a moment later, so that an agent started twice says only that.
    wait_until(MINUTE, "an ERROR that names the port", || {
        agent.log().contains("ERROR") && agent.log().contains(&address)
    });
}
