//! Servers whose commits wait for Walden.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use walden::wal::{Lsn, SegmentSize};

use super::hosts::{archiving, pair};
use super::restore::restore;
use super::stores::{runtime, s3_table};
use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, files_below, stored_segments};
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;
use crate::support::{Agent, Ledger, Postgres, Stage, Walden, eventually, has_cause, ledger, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// On a segment boundary the position is held back by a page, so that the next connection has something to compare (I7).
/// A commit that ends there would wait for other WAL then: a server that waits for Walden is told the boundary itself.
#[test]
fn a_boundary_is_confirmed_to_a_server_that_waits() {
    let stage = Stage::new("waits");
    let postgres = Postgres::builder(17).wal_segsize(1).setting("checkpoint_timeout", "1h").start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let _agent = walden.run_connected();
    let confirmed = || postgres.lsn("SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication");
    let size = postgres.segment_size();
    // The server writes by itself now and then; the next boundary counts then.
    for _ in 0..5 {
        postgres.psql("DROP TABLE IF EXISTS t; CREATE TABLE t ()");
        let boundary = Lsn::new(size.start_of(postgres.switch_wal()).get() + size.get());
        wait_until(MINUTE, "the held back position", || confirmed() >= Lsn::new(boundary.get() - 8192));
        if postgres.insert_lsn() <= boundary {
            assert_eq!(confirmed(), Lsn::new(boundary.get() - 8192), "nobody waits yet");
        }
        postgres.psql("ALTER SYSTEM SET synchronous_standby_names = 'walden'");
        postgres.psql("SELECT pg_reload_conf()");
        wait_until(MINUTE, "the boundary", || confirmed() >= boundary);
        if confirmed() == boundary {
            return;
        }
        postgres.psql("ALTER SYSTEM RESET synchronous_standby_names");
        postgres.psql("SELECT pg_reload_conf()");
    }
    panic!("the server wrote WAL right behind each boundary");
}

/// The end of the contiguous WAL of timeline 1 that the repository's own files show, complete segments and pieces.
fn reach(cluster_folder: &Path, size: SegmentSize) -> Lsn {
    let mut spans: BTreeMap<u64, u64> = BTreeMap::new();
    for path in files_below(&cluster_folder.join("wal/00000001"))
        .iter()
        .chain(&files_below(&cluster_folder.join("tail/00000001")))
    {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
        let start_of = |segment: &str| hex(&segment[8..16]) * (1 << 32) + hex(&segment[16..24]) * size.get();
        if name.len() > 24 && !name.starts_with(".") {
            spans.insert(start_of(&name), start_of(&name) + size.get());
        } else if let Some((start, end)) = name.split_once('.').and_then(|(range, _)| range.split_once('-')) {
            let segment = path.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned();
            let base = start_of(&segment);
            let longest = spans.entry(base + hex(start)).or_default();
            *longest = (*longest).max(base + hex(end));
        }
    }
    let mut spans = spans.into_iter();
    let mut reach = spans.next().expect("something is stored").1;
    for (start, end) in spans {
        if start > reach {
            break;
        }
        reach = reach.max(end);
    }
    Lsn::new(reach)
}

fn wait_for_walden(postgres: &Postgres, agent: &mut Agent) {
    wait_for_standby(postgres, agent, "walden");
}

fn wait_for_standby(postgres: &Postgres, agent: &mut Agent, name: &str) {
    postgres.psql(&format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'"));
    postgres.psql("SELECT pg_reload_conf()");
    wait_until(MINUTE, "the synchronous standby", || {
        postgres.value(&format!("SELECT sync_state FROM pg_stat_replication WHERE application_name = '{name}'"))
            == "sync"
    });
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
}

/// When COMMIT returns, its WAL is in the repository: seen in the repository's own files right then, by several sessions at once, over
/// segment ends and while base backups are taken (I1).
#[test]
fn a_commit_returns_when_its_wal_is_in_the_repository() {
    let stage = Stage::new("sync");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ndurability = \"repository\"\n");
    let mut agent = walden.run_connected();
    postgres.psql("CREATE TABLE t (session int, n int, padding text)");
    wait_for_walden(&postgres, &mut agent);
    let (folder, size) = (cluster_folder(&walden.repository(), "main", &postgres), postgres.segment_size());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for session in 0..4 {
            let (folder, sql) = (&folder, postgres.connect().expect("a connection"));
            scope.spawn(move || {
                for n in 0..60 {
                    // The commit record begins here or later.
                    let row = format!("BEGIN; INSERT INTO t VALUES ({session}, {n}, repeat(md5('{n}'), 100))");
                    let before: Lsn =
                        sql.value(&format!("{row}; SELECT pg_current_wal_insert_lsn()")).parse().expect("an LSN");
                    sql.run("COMMIT");
                    let reach = reach(folder, size);
                    assert!(reach > before, "commit {n} of session {session} returned at {before}, stored is {reach}");
                }
            });
        }
        scope.spawn(|| walden.ok(&["backup"]));
    });
    // At the tail's own pace each commit would take up to a second.
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(postgres.flush_lsn() > Lsn::new(5 << 20), "segments have ended meanwhile");
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// With `durability = "spool"` a commit waits for one local flush, not for the next piece of the tail.
#[test]
fn a_commit_that_waits_for_the_spool_waits_for_one_flush() {
    let stage = Stage::new("syncspool");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"20s\"\n[backup]\ninitial = false\n");
    let mut agent = walden.run_connected();
    postgres.psql("CREATE TABLE t (n int)");
    wait_for_walden(&postgres, &mut agent);
    let sql = postgres.connect().expect("a session");
    let begun = Instant::now();
    (0..50).for_each(|n| sql.run(&format!("INSERT INTO t VALUES ({n})")));
    assert!(begun.elapsed() < Duration::from_secs(10), "50 commits took {:?}", begun.elapsed());
    // The tail keeps its own pace: each piece is a request.
    let pieces = files_below(&cluster_folder(&walden.repository(), "main", &postgres).join("tail"));
    assert!(pieces.len() < 5, "{} pieces", pieces.len());
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

struct Faulty {
    stage: Stage,
    _runtime: tokio::runtime::Runtime,
    server: S3Server,
    postgres: Postgres,
    walden: Walden,
}

fn on_faulty_store(name: &str, sync: &str) -> Faulty {
    let stage = Stage::new(name);
    let runtime = runtime();
    let server = runtime.block_on(S3Server::start_s3s(&stage.make_dir("s3")));
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let more = format!(
        "[backup]\ninitial = false\n[upload]\nretry_delay_max = \"1s\"\nrequest_timeout = \"2s\"\n\
         [archive]\ndurability = \"repository\"\nstop_timeout = \"4s\"\n[sync]\n{sync}\n{}",
        s3_table("there", &server)
    );
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    Faulty { stage, _runtime: runtime, server, postgres, walden }
}

/// A commit on a session of its own: how long it took, once it has returned.
fn commit_aside(postgres: &Postgres) -> mpsc::Receiver<Duration> {
    let (send, returned) = mpsc::channel();
    let sql = postgres.connect().expect("a connection");
    std::thread::spawn(move || {
        let begun = Instant::now();
        sql.run("INSERT INTO t VALUES (1)");
        let _ = send.send(begun.elapsed());
    });
    returned
}

/// The store fails: commits wait as the user chose, under an alarm, and return by themselves when it is back.
#[test]
fn with_wait_commits_wait_on_for_a_store_that_fails() {
    let mut faulty = on_faulty_store("syncwait", "max_delay = \"2s\"");
    let mut agent = faulty.walden.run_connected();
    faulty.postgres.psql("CREATE TABLE t (n int)");
    wait_for_walden(&faulty.postgres, &mut agent);
    for fault in [HttpFault::Status(503, "SlowDown"), HttpFault::Hang] {
        faulty.server.faults().always("PUT", "", fault);
        let returned = commit_aside(&faulty.postgres);
        let status = agent.wait_status(MINUTE, "the alarm", |status| has_cause(status, "sync_delayed"));
        assert!(!has_cause(&status, "sync_degraded") && status["healthy"] == false, "{status}");
        assert!(returned.try_recv().is_err(), "the commit waits");
        faulty.server.faults().clear();
        assert!(returned.recv_timeout(MINUTE).expect("it returns") > Duration::from_secs(2));
        agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    }
    assert_eq!(agent.metric("walden_sync_degraded_seconds_total"), Some(0.0));
    // A stop waits for them once, and for no longer than it may.
    faulty.server.faults().always("", "", HttpFault::Hang);
    let returned = commit_aside(&faulty.postgres);
    agent.wait_status(MINUTE, "the alarm", |status| has_cause(status, "sync_delayed"));
    let asked = Instant::now();
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let took = asked.elapsed();
    assert!(took > Duration::from_secs(3) && took < Duration::from_secs(10), "{took:?}: {}", agent.log_tail());
    faulty.server.faults().clear();
    let _agent = faulty.walden.run_connected();
    returned.recv_timeout(MINUTE).expect("it returns");
    faulty.postgres.stop_fast();
    drop(faulty.stage);
}

/// With `degrade` they return after `max_delay`, under an alarm, the time is counted, and the guarantee comes back by itself. An
/// agent that starts while the store is away behaves alike. The name that the server waits for is the one that the agent logs in as,
/// wherever it was given: with one in the environment nothing of this worked.
#[test]
fn with_degrade_commits_return_and_the_guarantee_comes_back() {
    let mut faulty = on_faulty_store("syncdegrade", "on_delay = \"degrade\"\nmax_delay = \"2s\"");
    faulty.walden = faulty.walden.env("PGAPPNAME", "the_archive");
    let mut agent = faulty.walden.run_connected();
    faulty.postgres.psql("CREATE TABLE t (n int)");
    wait_for_standby(&faulty.postgres, &mut agent, "the_archive");
    faulty.server.faults().always("", "", HttpFault::Status(503, "SlowDown"));
    let took = commit_aside(&faulty.postgres).recv_timeout(MINUTE).expect("it returns");
    assert!(took > Duration::from_secs(1), "{took:?}");
    let status = agent.wait_status(MINUTE, "the alarm", |status| has_cause(status, "sync_degraded"));
    assert!(!has_cause(&status, "sync_delayed"), "{status}");
    let took = commit_aside(&faulty.postgres).recv_timeout(MINUTE).expect("it returns");
    assert!(took < Duration::from_secs(2), "nothing is waited for now: {took:?}");
    let counted = |agent: &Agent| agent.metric("walden_sync_degraded_seconds_total").unwrap_or(0.0);
    wait_until(MINUTE, "the seconds", || counted(&agent) >= 2.0);

    // The store is still away, and the agent begins anew.
    agent.kill9();
    let mut agent = faulty.walden.run_connected();
    let took = commit_aside(&faulty.postgres).recv_timeout(MINUTE).expect("it returns");
    agent.wait_status(MINUTE, "the alarm", |status| has_cause(status, "sync_degraded"));
    assert!(took < Duration::from_secs(30), "{took:?}");

    faulty.server.faults().clear();
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    let folder = cluster_folder(
        &faulty.stage.join("s3").join(&faulty.server.bucket).join("deep/down"),
        "main",
        &faulty.postgres,
    );
    let (sql, size) = (faulty.postgres.connect().expect("a connection"), faulty.postgres.segment_size());
    for n in 0..10 {
        let before: Lsn = sql
            .value(&format!("BEGIN; INSERT INTO t VALUES ({n}); SELECT pg_current_wal_insert_lsn()"))
            .parse()
            .expect("an LSN");
        sql.run("COMMIT");
        assert!(reach(&folder, size) > before, "the guarantee holds again");
    }
    let at = counted(&agent);
    assert!(
        agent.metric("walden_cause{cluster=\"main\",code=\"sync_degraded\"}") == Some(0.0) && counted(&agent) == at
    );
}

/// `remote_apply` would hang: it is told, for the server, for a role, and for a session that nobody can look into.
#[test]
fn remote_apply_is_told() {
    let stage = Stage::new("apply");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ndurability = \"repository\"\n");
    let mut agent = walden.run_connected();
    postgres.psql("CREATE TABLE t (n int)");
    wait_for_walden(&postgres, &mut agent);
    let told = |agent: &mut Agent, expected: bool| {
        agent.wait_status(MINUTE, "the cause", |status| has_cause(status, "remote_apply") == expected)
    };
    postgres.psql("ALTER SYSTEM SET synchronous_commit = remote_apply");
    postgres.psql("SELECT pg_reload_conf()");
    told(&mut agent, true);
    postgres.psql("ALTER SYSTEM RESET synchronous_commit");
    postgres.psql("SELECT pg_reload_conf()");
    told(&mut agent, false);
    postgres.psql("CREATE ROLE hasty");
    postgres.psql("ALTER ROLE hasty SET synchronous_commit = remote_apply");
    let status = told(&mut agent, true);
    assert!(status.to_string().contains("role hasty"), "{status}");
    postgres.psql("ALTER ROLE hasty RESET synchronous_commit");
    told(&mut agent, false);

    let hanging = postgres.connect().expect("a connection");
    let pid = hanging.value("SELECT pg_backend_pid()");
    let hangs =
        std::thread::spawn(move || hanging.try_rows("SET synchronous_commit = remote_apply; INSERT INTO t VALUES (1)"));
    let status = told(&mut agent, true);
    assert!(status.to_string().contains("1 commits wait"), "{status}");
    eventually(MINUTE, "the session's end", || {
        postgres.psql(&format!("SELECT pg_terminate_backend({pid})"));
        if hangs.is_finished() { Ok(()) } else { Err("it waits".into()) }
    });
    told(&mut agent, false);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// Beside a replica in a quorum nothing hangs, and nothing is told: the replica applies. While it is away the alarm is right.
#[test]
fn remote_apply_is_fine_beside_a_replica_that_applies() {
    let stage = Stage::new("quorum");
    let (primary, mut replica) = pair(&stage, 17);
    let walden = archiving(&stage, &[&primary], "primary");
    let mut agent = walden.run_connected();
    primary.psql("CREATE TABLE t (n int)");
    primary.psql("ALTER SYSTEM SET synchronous_commit = remote_apply");
    primary.psql("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (walreceiver, walden)'");
    primary.psql("SELECT pg_reload_conf()");
    wait_until(MINUTE, "the quorum", || {
        primary.value("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'quorum'") == "2"
    });
    assert!(commit_aside(&primary).recv_timeout(MINUTE).is_ok(), "it returns");
    let seen = Instant::now();
    agent.wait_status(MINUTE, "several looks at the server, and no alarm", |status| {
        assert!(!has_cause(status, "remote_apply"), "{status}");
        seen.elapsed() > Duration::from_secs(5) && status["healthy"] == true
    });
    replica.stop_fast();
    agent.wait_status(MINUTE, "the alarm", |status| has_cause(status, "remote_apply"));
}

/// Whole segments cannot be stored for a while, pieces can: commits go on over segment ends, and a host that is lost then loses none
/// of them. Afterwards the whole segments replace their pieces.
#[test]
fn commits_go_on_while_no_whole_segment_can_be_stored() {
    let faulty = on_faulty_store("pieces", "max_delay = \"1h\"");
    let (postgres, walden) = (&faulty.postgres, &faulty.walden);
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(postgres);
    walden.ok(&["backup"]);
    wait_for_walden(postgres, &mut agent);
    faulty.server.faults().always("PUT", "/wal/", HttpFault::Status(503, "SlowDown"));
    let first = postgres.flush_lsn();
    for _ in 0..4 {
        postgres.psql("CREATE TABLE IF NOT EXISTS bulk (n int, padding text)");
        postgres.psql(
            "INSERT INTO bulk SELECT n, (SELECT string_agg(md5(n::text || i), '') FROM generate_series(1, 30) i) \
             FROM generate_series(1, 900) n",
        );
        ledger.commit();
    }
    assert!(postgres.flush_lsn() >= Lsn::new(first.get() + (3 << 20)), "three segments have ended");
    let expected: Vec<_> = ledger.entries().to_vec();
    agent.kill9();
    let spool_aside = faulty.stage.join("spool.aside");
    std::fs::rename(walden.spool(), &spool_aside).expect("renamed");
    // The store's own files, without the store.
    let there = faulty.stage.join("s3").join(&faulty.server.bucket).join("deep/down");
    let elsewhere = Walden::with_config(
        &faulty.stage,
        &format!("[[repository]]\nname = \"files\"\ntype = \"local\"\npath = \"{}\"\n", there.display()),
    );
    let mut restored = restore(&elsewhere, 17, "restored", &[]);
    ledger::assert_rows(&restored, &expected);
    restored.stop_fast();
    drop(restored);

    std::fs::rename(&spool_aside, walden.spool()).expect("renamed");
    faulty.server.faults().clear();
    let mut agent = walden.run_connected();
    archive_all(postgres, &mut agent);
    agent.wait_status(MINUTE, "an empty queue", |status| status["queue"]["segments"] == 0);
    let folder = cluster_folder(&there, "main", postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(5);
    let whole = stored_segments(&folder);
    wait_until(MINUTE, "the pieces of whole segments to be gone", || {
        let pieces = files_below(&folder.join("tail"));
        let segment =
            |path: &Path| path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        pieces.iter().all(|path| segment(path).is_none_or(|segment| !whole.contains_key(&segment)))
    });
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}
