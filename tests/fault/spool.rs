//! A spool that is lost, damaged, full of strangers, or on a disk that fails.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use walden::seal::ObjectHeader;

use super::store::{open, shut};
use crate::live::stores::local_table;
use crate::live::streaming::{archive_all, pieces_of_open_segment};
use crate::live::timeline::promote_in_place;
use crate::support::oracle::{cluster_folder, compare_stored, files_below, stored_segments};
use crate::support::{Ledger, Postgres, Stage, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// The spool is gone with all it held, as on a new host: the agent takes up where the repository ends, compares it with what the
/// server sends, and goes on without a gap, a conflict or an overlapping piece (I3, I7, I21).
#[test]
fn a_lost_spool_is_taken_up_from_the_repository() {
    let stage = Stage::new("newhost");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    archive_all(&postgres, &mut agent);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    for clean in [true, false] {
        agent.wait_archived(ledger.commit_many(5).last().expect("five").lsn, MINUTE);
        agent.wait_archived(ledger.commit_many(5).last().expect("five").lsn, MINUTE);
        let before = pieces_of_open_segment(&folder, &postgres);
        assert!(before.len() >= 2, "{before:?}");
        if clean {
            assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        } else {
            agent.kill9();
        }
        fs::remove_dir_all(walden.spool()).expect("the spool is there");
        fs::remove_dir_all(walden.state()).expect("the state is there");
        agent = walden.run();
        // Without its id the agent is another one, and waits until the lease of a killed one has run out.
        let last = ledger.commit_many(5).last().expect("five").lsn;
        agent.wait_archived(last, Duration::from_secs(90));
        let after = pieces_of_open_segment(&folder, &postgres);
        assert!(after.len() > before.len() && after.starts_with(&before), "{before:?} became {after:?}");
        let mut end = 0;
        for (start, piece_end) in after {
            assert_eq!(start, end, "a piece does not begin where the one before ends");
            end = piece_end;
        }
    }
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
}

fn flip(path: &Path) {
    let file = fs::File::options().read(true).write(true).open(path).expect("a spooled file");
    let at = file.metadata().expect("its size").len() * 3 / 4;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 0x20], at).expect("another byte");
}

/// With the store down, sealed segments in the spool are damaged: flipped, cut short, removed. They are never uploaded. As long as the
/// server has them they come from it once more, also if the agent died after it had set them aside and before they had come, and with
/// the state lost; when it has not, they are a recorded gap (I3, I13; D4 of the failure table).
#[test]
fn damaged_spooled_segments_are_fetched_again_or_told_as_a_gap() {
    for (server_has_them, crashed, stateless) in [(true, false, false), (false, false, true), (true, true, true)] {
        let stage = Stage::new("damage");
        let builder = Postgres::builder(17).wal_segsize(1);
        let builder = if server_has_them {
            builder.setting("checkpoint_timeout", "1h")
        } else {
            builder.setting("wal_keep_size", "0").setting("min_wal_size", "2MB").setting("max_wal_size", "4MB")
        };
        let postgres = builder.start(&stage);
        let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
        let mut agent = walden.run_connected();
        archive_all(&postgres, &mut agent);
        shut(&walden);
        postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 150000) n");
        let end = archive_here(&postgres);
        agent.wait_durable(end, MINUTE);
        agent.wait_status(MINUTE, "a backlog", |status| status["queue"]["segments"].as_u64() > Some(8));
        agent.kill9();
        if stateless {
            fs::remove_dir_all(walden.state()).expect("the state is there");
        }
        let mut spooled: Vec<PathBuf> = files_below(&walden.spool())
            .into_iter()
            .filter(|path| path.parent().is_some_and(|folder| folder.ends_with("wal/00000001")))
            .collect();
        spooled.sort();
        let name = |path: &Path| path.file_name().expect("a name").to_string_lossy()[..24].to_owned();
        let damaged = [name(&spooled[2]), name(&spooled[4]), name(&spooled[6])];
        fs::remove_file(&spooled[6]).expect("removed");
        flip(&spooled[2]);
        let cut = fs::File::options().write(true).open(&spooled[4]).expect("a spooled file");
        cut.set_len(cut.metadata().expect("its size").len() / 2).expect("shorter");
        if crashed {
            let quarantine = cluster_folder(&walden.spool(), "main", &postgres).join("quarantine");
            for (n, path) in [&spooled[2], &spooled[4]].into_iter().enumerate() {
                let name = path.file_name().expect("a name").to_string_lossy();
                fs::rename(path, quarantine.join(format!("{name}.{n:032x}"))).expect("set aside");
            }
        }
        let on_server = |segment: &String| postgres.data.join("pg_wal").join(segment).exists();
        if !server_has_them {
            wait_until(MINUTE, "the server to recycle what the slot does not hold", || {
                archive_here(&postgres);
                postgres.psql("CHECKPOINT");
                !damaged.iter().any(on_server)
            });
        }
        assert!(damaged.iter().all(|segment| on_server(segment) == server_has_them));

        let mut agent = walden.run_connected();
        open(&walden);
        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        if server_has_them {
            agent.wait_archived(end, MINUTE);
            agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
            archive_all(&postgres, &mut agent);
            compare_stored(&folder, &postgres.oracle).assert_whole(6);
            // One that came once more, with no commit in it, knows of those before it: a time is searched by that.
            let header = |path: &PathBuf| ObjectHeader::parse(&fs::read(path).expect("it is there")).expect("a header");
            let highest: Vec<_> = stored_segments(&folder).values().map(|path| header(path).summary.max_time).collect();
            assert!(highest.last().is_some_and(Option::is_some) && highest.is_sorted(), "{highest:?}");
        } else {
            let status = agent.wait_status(MINUTE, "all gaps", |status| {
                has_cause(status, "gap") && status["gaps"].as_array().is_some_and(|gaps| gaps.len() == 3)
            });
            assert_eq!(status["healthy"], false);
            archive_all(&postgres, &mut agent);
            let compared = compare_stored(&folder, &postgres.oracle);
            assert_eq!(compared.missing, damaged, "no more and no less is missing than what was damaged");
            assert_eq!(files_below(&folder.join("gaps")).len(), 3);
            assert!(damaged.iter().all(|segment| !stored_segments(&folder).contains_key(segment)));
        }
        // What was settled is not begun again.
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let mut agent = walden.run_connected();
        archive_all(&postgres, &mut agent);
        assert!(!agent.log().contains("fetching a lost segment again"), "{}", agent.log());
        assert_eq!(files_below(&folder.join("gaps")).len(), if server_has_them { 0 } else { 3 });
        let quarantined =
            files_below(&walden.spool()).into_iter().filter(|path| path.to_string_lossy().contains("quarantine"));
        assert_eq!(quarantined.count(), 2);
    }
}

/// A segment is lost from the spool and from the server while one repository was shut; the other one has it. It was taken for archived
/// everywhere: the one that lacks it told no gap, and its position passed over the hole (I3).
#[test]
fn a_segment_that_one_repository_has_is_a_gap_in_the_other() {
    let stage = Stage::new("half");
    let postgres = Postgres::builder(17)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "4MB")
        .start(&stage);
    let second = stage.join("second");
    let more = format!("[upload]\nretry_delay_max = \"1s\"\n{}", local_table("second", &second));
    let walden = Walden::local(&stage, &postgres, &more);
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    shut(&walden);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 60000) n");
    let end = archive_here(&postgres);
    agent.wait_status(MINUTE, "the second repository to have it all", |status| {
        let position = status["repositories"][1]["archived_lsn"].as_str().and_then(|lsn| lsn.parse().ok());
        position.is_some_and(|position: walden::wal::Lsn| position >= end)
    });
    agent.kill9();
    let wal = cluster_folder(&walden.spool(), "main", &postgres).join("wal/00000001");
    let mut spooled = files_below(&wal);
    spooled.sort();
    let lost = spooled[2].file_name().expect("a name").to_string_lossy()[..24].to_owned();
    // A local repository shares the file with the spool: this one is to be the spool's alone.
    let alone = fs::read(&spooled[2]).expect("its content");
    fs::remove_file(&spooled[2]).expect("removed");
    fs::write(&spooled[2], alone).expect("written anew");
    stage.give(&spooled[2]);
    flip(&spooled[2]);
    wait_until(MINUTE, "the server to recycle it", || {
        archive_here(&postgres);
        postgres.psql("CHECKPOINT");
        !postgres.data.join("pg_wal").join(&lost).exists()
    });

    let mut agent = walden.run_connected();
    open(&walden);
    let status = agent.wait_status(MINUTE, "the gap", |status| status["gaps"].as_array().is_some_and(|g| g.len() == 1));
    assert!(status["gaps"][0]["reason"].as_str().is_some_and(|why| why.contains("only some repositories")), "{status}");
    archive_all(&postgres, &mut agent);
    let (here, there) =
        (cluster_folder(&walden.repository(), "main", &postgres), cluster_folder(&second, "main", &postgres));
    assert_eq!(compare_stored(&here, &postgres.oracle).missing, [lost]);
    compare_stored(&there, &postgres.oracle).assert_whole(4);
    assert_eq!((files_below(&here.join("gaps")).len(), files_below(&there.join("gaps")).len()), (1, 0));
}

/// Somebody cleans the disk under a running agent: what was not stored yet comes from the server again, also while the store is still
/// away. The position went on over it before (I3).
#[test]
fn spooled_segments_that_vanish_under_the_agent_are_fetched_again() {
    let stage = Stage::new("vanish");
    let postgres = Postgres::builder(15).wal_segsize(1).setting("checkpoint_timeout", "1h").start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    shut(&walden);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    let end = archive_here(&postgres);
    agent.wait_durable(end, MINUTE);
    agent.wait_status(MINUTE, "a backlog", |status| status["queue"]["segments"].as_u64() > Some(5));
    let wal = cluster_folder(&walden.spool(), "main", &postgres).join("wal/00000001");
    let mut spooled = files_below(&wal);
    spooled.sort();
    let vanished = [&spooled[1], &spooled[2], &spooled[5]];
    vanished.iter().for_each(|path| fs::remove_file(path).expect("removed"));
    wait_until(MINUTE, "the files to come again", || vanished.iter().all(|path| path.exists()));
    open(&walden);
    agent.wait_archived(end, MINUTE);
    agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(6);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// A segment is lost from the spool and the server is promoted: its timeline is taken up once more. One that is lost after that is
/// told as a gap; it was passed over (I3).
#[test]
fn what_is_lost_of_the_timeline_before_is_fetched_again_or_told() {
    let stage = Stage::new("lostold");
    // A shutdown ends with a checkpoint, which removes what the slot does not hold.
    let mut postgres = Postgres::builder(17).wal_segsize(1).setting("wal_keep_size", "256MB").start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    shut(&walden);
    postgres.psql("CREATE TABLE bulk AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    let end = archive_here(&postgres);
    agent.wait_durable(end, MINUTE);
    agent.wait_status(MINUTE, "a backlog", |status| status["queue"]["segments"].as_u64() > Some(5));
    agent.kill9();
    let mut spooled = files_below(&cluster_folder(&walden.spool(), "main", &postgres).join("wal/00000001"));
    spooled.sort();
    fs::remove_file(&spooled[2]).expect("removed");
    promote_in_place(&mut postgres);
    let mut agent = walden.run_connected();
    agent.wait_status(MINUTE, "the second timeline", |status| status["timeline"] == 2);
    assert!(spooled[2].exists(), "{}", agent.log_tail());
    // Only once something of the second timeline is held the first one is not taken up again.
    postgres.psql("CREATE TABLE second AS SELECT 1");
    agent.wait_durable(postgres.flush_lsn(), MINUTE);
    flip(&spooled[3]);
    open(&walden);
    agent.wait_status(MINUTE, "the gap", |status| {
        has_cause(status, "gap") && status["gaps"].as_array().is_some_and(|gaps| gaps.len() == 1)
    });
    archive_all(&postgres, &mut agent);
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    let lost = spooled[3].file_name().expect("a name").to_string_lossy()[..24].to_owned();
    assert_eq!(compare_stored(&folder, &postgres.oracle).missing, [lost]);
    assert_eq!(files_below(&folder.join("gaps")).len(), 1);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
}

/// The newest segment stays in the spool, for the comparison at the next connection. If it is damaged meanwhile, that is no other
/// history: it is set aside and archiving goes on (I7, I13). A local repository on the spool's file system shared the file with it, so
/// that the archive was damaged as well (I2).
#[test]
fn a_damaged_overlap_is_not_taken_for_another_history() {
    let stage = Stage::new("overlap");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    // Idle behind a boundary: the connection after next begins with the segment before it.
    agent.wait_status(MINUTE, "an empty queue", |status| status["queue"]["segments"] == 0);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let wal = cluster_folder(&walden.spool(), "main", &postgres).join("wal/00000001");
    let newest = files_below(&wal).into_iter().max().expect("one stays");
    flip(&newest);
    // The archive has bytes of its own, whatever becomes of the spool's.
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(1);
    let mut agent = walden.run();
    let quarantine = cluster_folder(&walden.spool(), "main", &postgres).join("quarantine");
    wait_until(MINUTE, "it to be set aside", || files_below(&quarantine).len() == 1);
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
    assert!(status["diverged"].is_null(), "{status}");
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
}

/// Ends the open segment and waits for the server's own copy only.
fn archive_here(postgres: &Postgres) -> walden::wal::Lsn {
    postgres.psql("SELECT pg_logical_emit_message(true, 'test', 'end')");
    let end = postgres.switch_wal();
    postgres.wait_oracle_complete();
    end
}

/// Every now and then a flush of some thread fails with EIO. What was not flushed is never confirmed, its file is void, the bytes
/// come from the server again, and it is told (I1, I9; D3 of the failure table). The disk loses nothing here: what the agent does with
/// such a file shows in its calls.
#[test]
fn a_failed_flush_is_never_confirmed() {
    let stage = Stage::new("eio");
    let postgres = Postgres::builder(17)
        .wal_segsize(1)
        .setting("wal_keep_size", "0")
        .setting("min_wal_size", "2MB")
        .setting("max_wal_size", "8MB")
        .setting("checkpoint_timeout", "30s")
        .start(&stage);
    let walden =
        Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n[upload]\nretry_delay_max = \"1s\"\n");
    postgres.pgbench_init(1);
    let strace = parts::tool("strace").canonicalize().expect("it is set up");
    let strace = stage.reachable("strace", &strace);
    let log = stage.join("strace.log");
    let traced = walden.clone().below(&[
        &strace.to_string_lossy(),
        "-f",
        "-y",
        "-qq",
        "--seccomp-bpf",
        "-o",
        &log.to_string_lossy(),
        "-e",
        "trace=fdatasync,fsync",
        "-e",
        "inject=fdatasync,fsync:error=EIO:when=7+11",
        "--",
    ]);
    let mut agent = traced.run_connected();
    let load = postgres.pgbench(&["-c", "2", "-T", "600", "--rate", "300"]);
    wait_until(MINUTE, "several failed flushes of the spool", || {
        assert!(agent.is_running(), "{}", agent.log_tail());
        agent.log().matches("spool_failing").count() > 2 && void(&log).len() > 1
    });
    load.stop();
    super::kill::kill_traced(&stage);
    agent.kill9();
    let slot = postgres.slot_restart_lsn("walden").expect("the slot is there");
    let held = super::kill::held_end(&walden, &postgres);
    assert!(slot <= held, "the server was told {slot}, but spool and repository end at {held}");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    let status = agent.wait_status(MINUTE, "healthy again", |status| status["healthy"] == true);
    assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(3);
    for (path, flushed_again) in void(&log) {
        assert!(!flushed_again, "{path} was flushed again after a flush of it had failed");
        assert!(!Path::new(&path).exists(), "{path} is void, and there");
    }
}

/// Files of open segments of which a flush was made to fail, and whether one was tried after that, from the calls in strace's log.
fn void(log: &Path) -> BTreeMap<String, bool> {
    let log = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let (mut void, mut unfinished) = (BTreeMap::new(), BTreeMap::new());
    for line in log.lines() {
        let Some((thread, call)) = line.split_once(' ') else { continue };
        let named = call.split_once('<').and_then(|(_, rest)| rest.split_once('>')).map(|(path, _)| path);
        let path = match named {
            _ if call.contains(" resumed>") => unfinished.remove(thread),
            Some(path) => Some(path.trim_end_matches(" (deleted)").to_owned()),
            None => None,
        };
        let Some(path) = path.filter(|path| path.contains("/open/")) else { continue };
        if let Some(flushed_again) = void.get_mut(&path)
            && !call.contains(" resumed>")
        {
            *flushed_again = true;
        }
        if call.contains("<unfinished") {
            unfinished.insert(thread.to_owned(), path);
        } else if call.contains("(INJECTED)") {
            void.entry(path).or_insert(false);
        }
    }
    void
}

/// What is not Walden's is reported, not followed, not uploaded, not deleted (I17; D5 of the failure table).
#[test]
fn strangers_in_the_spool_are_left_alone() {
    let stage = Stage::new("strangers");
    let postgres = Postgres::builder(15).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    let wal = cluster_folder(&walden.spool(), "main", &postgres).join("wal/00000001");
    let secret = stage.write("secret", "not WAL");
    let link = wal.join("0000000100000000000000F0.lz4");
    symlink(&secret, &link).expect("a link");
    let fifo = wal.join("0000000100000000000000F1.lz4");
    let made = stage.command("mkfifo").arg(&fifo).status().expect("mkfifo runs");
    assert!(made.success());
    let notes = wal.join("notes.txt");
    fs::write(&notes, "remember the milk").expect("a file");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    for stranger in [&link, &fifo, &notes] {
        assert!(stranger.symlink_metadata().is_ok(), "{} is gone", stranger.display());
        assert!(agent.log().contains(&*stranger.file_name().expect("a name").to_string_lossy()), "{}", agent.log());
    }
    let folder = cluster_folder(&walden.repository(), "main", &postgres);
    compare_stored(&folder, &postgres.oracle).assert_whole(2);
    assert!(!stored_segments(&folder).keys().any(|name| name.ends_with("F0") || name.ends_with("F1")));
}
