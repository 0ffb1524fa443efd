//! Several repositories at once, over the network, that fail and hang.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, files_below, stored_segments};
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;
use crate::support::{Postgres, Recorder, Stage, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

pub fn s3_table(name: &str, server: &S3Server) -> String {
    format!(
        "[[repository]]\nname = \"{name}\"\ntype = \"s3\"\nbucket = \"{}\"\nprefix = \"deep/down\"\nregion = \"us-east-1\"\n\
         endpoint = \"{}\"\npath_style = true\n",
        server.bucket, server.endpoint
    )
}

pub fn local_table(name: &str, path: &Path) -> String {
    format!("[[repository]]\nname = \"{name}\"\ntype = \"local\"\npath = \"{}\"\n", path.display())
}

const UPLOAD: &str = "[backup]\ninitial = false\n[upload]\nretry_delay_max = \"1s\"\nrequest_timeout = \"10s\"\n";

/// A local directory and an S3 store that checks checksums. The S3 store fails for a while: it is named, WAL goes on into the other
/// one, the archived position waits for both, and in the end both hold the same (I3, I21; C4 of the failure table).
#[test]
fn of_two_repositories_one_may_fail_for_a_while() {
    let stage = Stage::new("two");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    let server = runtime.block_on(S3Server::start_s3s(&folder));
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let local = stage.join("archive");
    let more = format!("{UPLOAD}{}{}", local_table("here", &local), s3_table("there", &server));
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    postgres.pgbench_init(2);
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);

    server.faults().always("", "", HttpFault::Status(503, "SlowDown"));
    let before = postgres.flush_lsn();
    let recorder = Recorder::start(&postgres);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    let end = postgres.switch_wal();
    let status = agent.wait_status(MINUTE, "the cause store_failing", |status| has_cause(status, "store_failing"));
    assert!(status["repositories"][1]["last_error"].is_string() && status["repositories"][0]["last_error"].is_null());
    let position = |status: &serde_json::Value, n: usize| -> walden::wal::Lsn {
        status["repositories"][n]["archived_lsn"].as_str().expect("known").parse().expect("an LSN")
    };
    let status = agent.wait_status(MINUTE, "the local repository to go on", |status| position(status, 0) >= end);
    assert!(position(&status, 1) <= before && status["archived_lsn"] == status["repositories"][1]["archived_lsn"]);
    assert!(status["queue"]["segments"].as_u64() > Some(4), "{status}");
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    // A restart while it is down changes nothing.
    agent.kill9();
    let mut agent = walden.run_connected();
    server.faults().clear();
    recorder.stop();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy again", |status| {
        status["healthy"] == true
            && status["queue"]["segments"] == 0
            && status["repositories"][1]["last_error"].is_null()
    });
    let here = cluster_folder(&local, "main", &postgres);
    let there = cluster_folder(&folder.join(&server.bucket).join("deep/down"), "main", &postgres);
    for repository in [&here, &there] {
        compare_stored(repository, &postgres.oracle).assert_whole(6);
    }
    let content = |folder: &Path| -> BTreeMap<String, Vec<u8>> {
        stored_segments(folder).into_iter().map(|(name, path)| (name, fs::read(path).expect("an object"))).collect()
    };
    assert!(content(&here) == content(&there), "the two repositories hold different objects");
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// A load balancer sends every request elsewhere for some seconds, and one answer is changed on its way: archiving stopped until a
/// restart (I13, I21; C3 and C4 of the failure table). Nothing is ever sent to where it points.
#[test]
fn a_store_that_redirects_for_a_while_stops_nothing() {
    let stage = Stage::new("redirect");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    let server = runtime.block_on(S3Server::start_s3s(&folder));
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    elsewhere.set_nonblocking(true).expect("a socket");
    let address = elsewhere.local_addr().expect("a bound socket");
    let location: &'static str = format!("location: http://{address}/\r\n").leak();
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let mut walden = Walden::with_repository(&stage, &postgres, &format!("{UPLOAD}{}", s3_table("there", &server)));
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    postgres.pgbench_init(1);
    archive_all(&postgres, &mut agent);
    for fault in [HttpFault::Headers(307, location), HttpFault::Status(400, "KMS.DisabledException")] {
        server.faults().always("", "", fault);
        postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
        postgres.switch_wal();
        postgres.psql("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active");
        agent.wait_status(MINUTE, "the cause store_failing", |status| {
            has_cause(status, "store_failing") && status["queue"]["segments"].as_u64() > Some(1)
        });
        server.faults().clear();
        postgres.psql("DROP TABLE bulk");
        archive_all(&postgres, &mut agent);
        agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    }
    assert!(elsewhere.accept().is_err(), "a request went where the redirect points");
    // An object is stored and the answer lost; what is read of it for the comparison is changed once.
    let next = postgres.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    server.faults().add("PUT", &format!("/{next}.lz4"), 1, 1, HttpFault::AnswerLost);
    server.faults().add("GET", &format!("/{next}.lz4"), 1, 1, HttpFault::FlipFromEnd(100));
    archive_all(&postgres, &mut agent);
    server.faults().clear();
    agent.wait_status(MINUTE, "healthy once more", |status| status["healthy"] == true);
    // On a new host the overlap is read from the store, and is changed on its way a few times.
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    fs::remove_dir_all(walden.spool()).expect("the spool is there");
    fs::remove_dir_all(walden.state()).expect("the state is there");
    server.faults().add("GET", ".lz4", 1, 4, HttpFault::FlipFromEnd(100));
    let mut agent = walden.run();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy on the new host", |status| status["healthy"] == true);
    let there = cluster_folder(&folder.join(&server.bucket).join("deep/down"), "main", &postgres);
    compare_stored(&there, &postgres.oracle).assert_whole(3);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// A server that honours conditions and one that enforces checksums, both at once, Zstandard: every segment comes back by
/// `wal-fetch` from each as the server itself archived it.
#[test]
fn two_s3_servers_give_back_what_they_got() {
    let stage = Stage::new("s3");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    let (s3s, moto) = runtime.block_on(async { (S3Server::start_s3s(&folder).await, S3Server::start_moto().await) });
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let more = format!(
        "{UPLOAD}[archive]\ncompression = \"zstd\"\n{}{}",
        s3_table("checks", &s3s),
        s3_table("conditions", &moto)
    );
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in s3s.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true && status["queue"]["segments"] == 0);
    let there = cluster_folder(&folder.join(&s3s.bucket).join("deep/down"), "main", &postgres);
    compare_stored(&there, &postgres.oracle).assert_whole(6);
    for name in stored_segments(&there).into_keys() {
        let expected = fs::read(postgres.oracle.join(&name)).expect("the server's own copy");
        for repository in ["checks", "conditions"] {
            let to = stage.join("fetched");
            let done = walden.exec(&["wal-fetch", "--repository", repository, &name, &to.to_string_lossy()]);
            assert_eq!(done.code, Some(0), "{name} from {repository}: {}", done.stderr);
            assert!(fs::read(&to).expect("delivered") == expected, "{name} from {repository}");
            fs::remove_file(&to).expect("removed");
        }
    }
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// The store takes requests and never answers; keepalives are answered all the same, WAL goes on into the spool, the agent stops
/// when it is told to, and starts (I11; C4 and H1 of the failure table).
#[test]
fn a_store_that_hangs_holds_no_keepalive_up() {
    let stage = Stage::new("hang");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    let server = runtime.block_on(S3Server::start_s3s(&folder));
    let postgres = Postgres::builder(17).wal_segsize(1).setting("wal_sender_timeout", "3s").start(&stage);
    let more = format!("{UPLOAD}[archive]\nstop_timeout = \"1s\"\n{}", s3_table("there", &server));
    let mut walden = Walden::with_repository(&stage, &postgres, &more);
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    postgres.pgbench_init(1);
    archive_all(&postgres, &mut agent);
    server.faults().always("", "", HttpFault::Hang);
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "200"]);
    let begun = std::time::Instant::now();
    let status = agent.wait_status(MINUTE, "five times the server's patience, and the cause", |status| {
        begun.elapsed() > Duration::from_secs(15) && has_cause(status, "store_failing")
    });
    assert!(!has_cause(&status, "not_connected") && !has_cause(&status, "lease_lost"), "{status}");
    let here = postgres.flush_lsn();
    agent.wait_durable(here, MINUTE);
    assert!(!postgres.log().contains("replication timeout"), "{}", postgres.log_tail());
    let stopping = std::time::Instant::now();
    agent.sigterm(MINUTE);
    assert!(stopping.elapsed() < Duration::from_secs(15), "it took {:?} to stop", stopping.elapsed());
    // It streams without the store's word: the spool knows where to go on.
    let mut agent = walden.run_connected();
    let here = postgres.flush_lsn();
    agent.wait_durable(here, MINUTE);
    load.stop();
    server.faults().clear();
    archive_all(&postgres, &mut agent);
    let there = cluster_folder(&folder.join(&server.bucket).join("deep/down"), "main", &postgres);
    compare_stored(&there, &postgres.oracle).assert_whole(3);
}

/// A disk whose flushes take five seconds each: the position stands still and the stream lives (I11; H1 of the failure table).
#[test]
fn a_disk_that_hangs_holds_no_keepalive_up() {
    let stage = Stage::new("slowdisk");
    let postgres = Postgres::builder(17).wal_segsize(1).setting("wal_sender_timeout", "3s").start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let strace = parts::tool("strace").canonicalize().expect("it is set up");
    let strace = stage.reachable("strace", &strace);
    let log = stage.join("strace.log");
    let traced = walden.clone().below(&[
        &strace.to_string_lossy(),
        "-f",
        "-qq",
        "--seccomp-bpf",
        "-o",
        &log.to_string_lossy(),
        "-e",
        "trace=fdatasync",
        "-e",
        "inject=fdatasync:delay_enter=5000000:when=6+",
        "--",
    ]);
    let mut agent = traced.run_connected();
    postgres.pgbench_init(1);
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "100"]);
    let begun = std::time::Instant::now();
    let mut slowest = Duration::ZERO;
    let mut moved = (postgres.slot_restart_lsn("walden"), std::time::Instant::now());
    wait_until(MINUTE, "several slow flushes", || {
        let slot = postgres.slot_restart_lsn("walden");
        if slot != moved.0 {
            slowest = slowest.max(moved.1.elapsed());
            moved = (slot, std::time::Instant::now());
        }
        begun.elapsed() > Duration::from_secs(20)
    });
    assert!(slowest > Duration::from_secs(4), "the flushes were not slow: {slowest:?}");
    assert!(!postgres.log().contains("replication timeout"), "{}", postgres.log_tail());
    assert_eq!(agent.log().matches("streaming timeline").count(), 1, "it had to connect again: {}", agent.log());
    load.stop();
    agent.signal(Signal::KILL);
    crate::fault::kill_traced(&stage);
    agent.kill9();
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(1);
}

/// A repository that is not required is down: WAL is archived, figures move, base backups are taken, the spool makes room, the agent
/// stops and starts. Back again, it has all but what the spool let go of, and tells that as a gap (I3, I21). It stopped all of that.
#[test]
fn a_repository_that_is_not_required_holds_nothing_up() {
    let stage = Stage::new("optional");
    let runtime = runtime();
    let folder = stage.make_dir("s3");
    let server = runtime.block_on(S3Server::start_s3s(&folder));
    let postgres = Postgres::builder(17).wal_segsize(1).setting("autovacuum", "off").start(&stage);
    let local = stage.join("archive");
    // First in the file, so that nothing rests on its place.
    let more = format!("{UPLOAD}{}required = false\n{}", s3_table("there", &server), local_table("here", &local));
    let mut walden = Walden::with_repository(&stage, &postgres, &more).env("WALDEN_SPOOL__BYTES_MAX", "4MiB");
    for (name, value) in server.environment() {
        walden = walden.env(&name, &value);
    }
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true && status["queue"]["segments"] == 0);

    server.faults().always("", "", HttpFault::Status(503, "SlowDown"));
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 200000) n");
    let asked = postgres.value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS')");
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "its failure, and figures that move", |status| {
        has_cause(status, "store_failing") && status["complete_until"].as_str().is_some_and(|until| until > &*asked)
    });
    assert!(status["repositories"][0]["last_error"].is_string() && status["repositories"][1]["last_error"].is_null());
    assert_eq!((&status["lag_bytes"], has_cause(&status, "spool_full")), (&0.into(), false), "{status}");
    assert!(
        agent.log().contains("is removed before repository there has it"),
        "the spool did not have to make room: {}",
        agent.log_tail()
    );
    walden.ok(&["backup"]);
    let stopping = std::time::Instant::now();
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    assert!(stopping.elapsed() < Duration::from_secs(8), "it took {:?} to stop", stopping.elapsed());
    let done = walden.exec(&["backup"]);
    assert_eq!(done.code, Some(0), "alone: {}", done.stderr);
    assert!(done.stderr.contains("without repository there"), "{}", done.stderr);
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);

    server.faults().clear();
    let status = agent.wait_status(MINUTE, "all to be there, or a gap", |status| {
        status["queue"]["segments"] == 0 && status["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty())
    });
    assert!(has_cause(&status, "gap") || agent.log().contains("cause=gap"), "{status}");
    let end = archive_all(&postgres, &mut agent);
    agent.wait_status(MINUTE, "it to keep up again", |status| {
        let position = status["repositories"][0]["archived_lsn"].as_str().and_then(|lsn| lsn.parse().ok());
        position.is_some_and(|position: walden::wal::Lsn| position >= end)
    });
    let here = cluster_folder(&local, "main", &postgres);
    compare_stored(&here, &postgres.oracle).assert_whole(10);
    assert!(files_below(&here.join("gaps")).is_empty(), "the required one has no gap");
    let there = cluster_folder(&folder.join(&server.bucket).join("deep/down"), "main", &postgres);
    let compared = compare_stored(&there, &postgres.oracle);
    let spans: Vec<(u64, u64)> = files_below(&there.join("gaps"))
        .iter()
        .filter_map(|path| {
            let name = path.file_name()?.to_str()?.strip_suffix(".json")?.to_owned();
            let (from, to) = name.split_once('-')?;
            Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
        })
        .collect();
    let told = |name: &String| {
        let part = |at: usize| u64::from_str_radix(&name[at..at + 8], 16).expect("hexadecimal");
        let start = (part(8) << 32) + (part(16) << 20);
        spans.iter().any(|(from, to)| *from <= start && start + (1 << 20) <= *to)
    };
    assert!(!compared.missing.is_empty() && compared.missing.iter().all(told), "{:?} {spans:?}", compared.missing);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}
