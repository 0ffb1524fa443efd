//! Histories of one cluster: those that follow each other, and those that must never meet.

use std::fs;
use std::time::Duration;

use walden::wal::{Lsn, SegmentName, TimelineId};

use super::identity::{content, first_difference};
use super::restore::restore;
use super::streaming::{archive_all, few, majors, turns, turns_on};
use crate::support::ledger::{Entry, assert_rows};
use crate::support::oracle::{cluster_folder, compare_stored, decompress, files_below};
use crate::support::{Kind, Ledger, Postgres, Recorder, Stage, Store, Walden, has_cause, parts, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// A server that was a standby is promoted, under load, with the agent beside it or away: both timelines are archived, the history
/// file before anything of the new timeline, the old one's last part up to the switch as a piece (I7, I10; A5 of the failure table).
#[test]
fn a_promotion_is_followed() {
    let scenarios = [(false, Kind::Local), (true, Kind::S3), (false, Kind::S3), (true, Kind::Local)];
    for (major, (away, kind)) in turns(&scenarios) {
        let stage = Stage::new("promote");
        let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        let store = Store::start(&stage, kind);
        let walden = store.walden(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
        let mut agent = walden.run_connected();
        let recorder = Recorder::start(&postgres);
        postgres.pgbench_init(2);
        archive_all(&postgres, &mut agent);
        wait_until(MINUTE, "rows on the first timeline", || recorder.entries().len() > 50);
        postgres.stop_fast();
        fs::write(postgres.data.join("standby.signal"), "").expect("standby.signal");
        stage.give(&postgres.data.join("standby.signal"));
        postgres.start();
        agent.wait_status(MINUTE, "the stream from the standby", |status| !has_cause(status, "not_connected"));
        if away {
            agent.kill9();
        }
        postgres.psql("SELECT pg_promote()");
        postgres.wait_promoted(MINUTE);
        let before = recorder.entries().len();
        wait_until(MINUTE, "rows on the second timeline", || recorder.entries().len() > before + 50);
        if away {
            agent = walden.run();
        }
        recorder.stop();
        agent.wait_status(MINUTE, "the second timeline", |status| status["timeline"] == 2);
        archive_all(&postgres, &mut agent);
        let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
        assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");

        let folder = cluster_folder(&store.folder, "main", &postgres);
        let compared = compare_stored(&folder, &postgres.oracle);
        compared.assert_whole(3);
        assert!(compared.equal.iter().any(|name| name.starts_with("00000002")), "{compared:?}");
        let history = folder.join("wal/00000002.history");
        let content = fs::read_to_string(&history).expect("the history is stored");
        assert_eq!(
            content,
            fs::read_to_string(postgres.oracle.join("00000002.history")).expect("the server's own copy")
        );
        let switch: Lsn = content.split_whitespace().nth(1).and_then(|lsn| lsn.parse().ok()).expect("the switch");
        let made = |path: &std::path::Path| fs::metadata(path).and_then(|meta| meta.modified()).expect("a time");
        for object in files_below(&folder).iter().filter(|path| path.to_string_lossy().contains("/00000002/")) {
            assert!(made(&history) <= made(object), "{} was there before the history", object.display());
        }
        let size = postgres.segment_size();
        let last = SegmentName::holding(TimelineId::FIRST, switch, size);
        let end = size.offset_of(switch);
        let partial = fs::read(postgres.oracle.join(format!("{last}.partial"))).expect("the server's own copy");
        let kept = decompress(&folder.join(format!("tail/00000001/{last}/00000000-{end:08X}.lz4")));
        assert_eq!(kept.len() as u64, end);
        assert!(kept == partial[..kept.len()], "the old timeline's last part differs from the server's own copy");
    }
}

/// A copy of the data directory from before is put in its place, as by a restored virtual machine: the same system, the same
/// timeline, another history. PostgreSQL's own tools stream it without an error. While it is behind it is waited for, and when it
/// has passed what is held it is refused; nothing that is stored changes (I2, I7, B1 of the failure table).
#[test]
fn a_rolled_back_copy_is_refused() {
    majors().into_iter().for_each(refuse_a_rolled_back_copy);
}

fn refuse_a_rolled_back_copy(major: u32) {
    let stage = Stage::new("rollback");
    let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    archive_all(&postgres, &mut agent);
    drop(ledger);
    postgres.stop_fast();
    let (copy, data) = (stage.join("copy"), postgres.data.clone());
    assert!(stage.command("cp").arg("-a").arg(&data).arg(&copy).status().expect("cp runs").success());
    postgres.start();
    ledger = Ledger::create(&postgres);
    for _ in 0..3 {
        ledger.commit_many(5);
        archive_all(&postgres, &mut agent);
    }
    let held = ledger.commit().lsn;
    agent.wait_archived(held, MINUTE);
    drop(ledger);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    postgres.stop_fast();
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&copy, &data).expect("put in its place");
    postgres.start();
    let content = || content(&walden.repository());
    let before = content();

    let mut agent = walden.run();
    let status = agent.wait_status(MINUTE, "the server to be found behind", |status| {
        has_cause(status, "not_connected") && status.to_string().contains("behind")
    });
    assert_eq!(status["healthy"], false);
    postgres.psql("CREATE TABLE another AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
    assert!(postgres.flush_lsn() > held);
    let status =
        agent.wait_status(Duration::from_secs(30), "the cause diverged", |status| has_cause(status, "diverged"));
    assert_eq!(status["healthy"], false);
    let at: Lsn = status["diverged"].as_str().expect("where").parse().expect("an LSN");
    assert!(at < held, "{status}");
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    postgres.switch_wal();
    assert!(agent.is_running());
    agent.sigterm(MINUTE);
    assert_eq!(before, content(), "the repository was changed");
}

/// Restarts a server as a standby without a primary, and promotes it: it goes on on a timeline of its own.
#[track_caller]
pub fn promote_in_place(postgres: &mut Postgres) {
    postgres.stop_fast();
    fs::write(postgres.data.join("standby.signal"), "").expect("standby.signal");
    postgres.stage().give(&postgres.data.join("standby.signal"));
    // Else it would look for the way to the newest timeline of which it has a history file.
    postgres.overrides = vec!["recovery_target_timeline=current".into()];
    postgres.start();
    postgres.psql("SELECT pg_promote()");
    postgres.wait_promoted(MINUTE);
}

/// A copy from before, which went on by itself on the old timeline, is promoted just where a segment ends: the new timeline's first
/// segment has nothing of the old one, and was followed without any comparison. The segment before it tells (I7, I10).
#[test]
fn a_copy_that_is_promoted_where_a_segment_ends_is_refused() {
    few(&[18]).into_iter().for_each(promote_at_a_boundary);
}

fn promote_at_a_boundary(major: u32) {
    let stage = Stage::new("boundary");
    let mut postgres = Postgres::builder(major).wal_segsize(1).setting("wal_keep_size", "64MB").start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&postgres, &mut agent);
    postgres.stop_fast();
    let (copy, data) = (stage.join("copy"), postgres.data.clone());
    assert!(stage.command("cp").arg("-a").arg(&data).arg(&copy).status().expect("cp runs").success());
    postgres.start();
    let write = |postgres: &Postgres, word: &str| {
        postgres.psql(&format!("SELECT pg_logical_emit_message(true, 'same', repeat('{word}', 60000))"));
    };
    write(&postgres, "one ");
    archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    postgres.stop_fast();
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&copy, &data).expect("put in its place");
    postgres.overrides.push("archive_mode=off".into());
    postgres.start();
    write(&postgres, "two ");
    postgres.switch_wal();
    // Without a checkpoint, so that the WAL ends there.
    postgres.stop_immediate();
    fs::write(data.join("standby.signal"), "").expect("standby.signal");
    stage.give(&data.join("standby.signal"));
    postgres.overrides.push("recovery_target_timeline=current".into());
    postgres.start();
    postgres.psql("SELECT pg_promote()");
    postgres.wait_promoted(MINUTE);
    let history = fs::read_to_string(data.join("pg_wal/00000002.history")).expect("a history");
    let switch: Lsn = history.split_whitespace().nth(1).and_then(|lsn| lsn.parse().ok()).expect("the switch");
    assert!(postgres.segment_size().is_boundary(switch), "promoted at {switch}");
    let before = content(&walden.repository());

    let mut agent = walden.run();
    let status =
        agent.wait_status(Duration::from_secs(30), "the cause diverged", |status| has_cause(status, "diverged"));
    let at = first_difference(&postgres, &postgres.oracle, TimelineId::FIRST).to_string();
    assert_eq!(status["diverged"], at, "{status}");
    agent.sigterm(MINUTE);
    assert_eq!(before, content(&walden.repository()), "the repository was changed");
}

/// The repository was told which timeline is archived now: without `--timeline` a restore goes along that.
#[track_caller]
fn wait_covered(folder: &std::path::Path, timeline: u32) {
    wait_until(MINUTE, "the repository to be told of the timeline", || {
        let told = fs::read(folder.join("coverage.json")).unwrap_or_default();
        serde_json::from_slice(&told).is_ok_and(|told: serde_json::Value| told["timeline"] == timeline)
    });
}

fn timeline_of(postgres: &Postgres) -> u32 {
    let name = postgres.value("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    u32::from_str_radix(&name[..8], 16).expect("a timeline")
}

/// Three promotions in a row, one number skipped between them, with the agent beside the server or away, under load. Archiving began
/// on timeline 2: the history from before is stored as well. Every timeline's segments are the server's own, each commit of each
/// branch's part can be reached, and the newest state too (I10; A5 and A6 of the failure table).
#[test]
fn several_promotions_in_a_row_with_skipped_numbers_are_followed() {
    for (major, away) in turns_on(&[15, 17], &[false, true]) {
        let stage = Stage::new("promotions");
        let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        promote_in_place(&mut postgres);
        let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(3);
        walden.ok(&["backup"]);
        let mut rows: Vec<Entry> = ledger.entries().to_vec();
        drop(ledger);
        archive_all(&postgres, &mut agent);
        if away {
            agent.kill9();
        }
        let mut ends = Vec::new();
        for skipped in [false, true, false] {
            let recorder = Recorder::start(&postgres);
            wait_until(MINUTE, "rows on this timeline", || recorder.entries().len() > 20);
            let (entries, doubtful) = recorder.stop();
            assert!(doubtful.is_empty());
            rows.extend(entries);
            ends.push((timeline_of(&postgres), rows.len()));
            if skipped {
                // A server in recovery takes the number after the highest history file that it finds.
                let last = timeline_of(&postgres);
                let name = format!("{:08X}.history", last + 1);
                let made_up = format!("{last}\t0/1000000\tof another server\n");
                let path = postgres.data.join("pg_wal").join(&name);
                fs::write(&path, made_up).expect("a history file");
                stage.give(&path);
                promote_in_place(&mut postgres);
                assert_eq!(timeline_of(&postgres), last + 2);
            } else {
                promote_in_place(&mut postgres);
            }
        }
        if away {
            agent = walden.run();
        }
        let mut ledger = Ledger::create(&postgres);
        rows.extend(ledger.commit_many(5));
        drop(ledger);
        let newest = timeline_of(&postgres);
        assert_eq!(newest, 6);
        agent.wait_status(MINUTE, "the newest timeline", |status| status["timeline"] == newest);
        archive_all(&postgres, &mut agent);
        let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
        assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");

        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        compare_stored(&folder, &postgres.oracle).assert_whole(4);
        for timeline in [2, 3, 5, 6] {
            let name = format!("{timeline:08X}.history");
            let stored = fs::read(folder.join("wal").join(&name)).expect("the history is stored");
            assert_eq!(stored, fs::read(postgres.data.join("pg_wal").join(&name)).expect("the server's"), "{name}");
        }
        assert!(!folder.join("wal/00000004.history").exists(), "nobody was ever on timeline 4");
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());

        // The end of each timeline's part, and the newest state.
        for (timeline, count) in &ends {
            let lsn = rows[count - 1].lsn.to_string();
            let name = format!("on-{timeline}");
            let restored = restore(&walden, major, &name, &["--timeline", &timeline.to_string(), "--target-lsn", &lsn]);
            assert_rows(&restored, &rows[..*count]);
        }
        let restored = restore(&walden, major, "newest", &[]);
        assert_rows(&restored, &rows);
    }
}

/// A copy is restored to a moment in the past and takes the first server's place: its timeline leaves the old one long before the end
/// of what is held. The agent, with the old spool or with none, follows it from there; both branches stay, and each is restored
/// (I7, I10; A5 of the failure table).
#[test]
fn a_restored_copy_is_followed_and_both_branches_can_be_restored() {
    for (major, (fresh, kind)) in turns_on(&[13, 18], &[(false, Kind::Local), (true, Kind::S3)]) {
        let stage = Stage::new("branches");
        let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        let store = Store::start(&stage, kind);
        let walden = store.walden(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(5);
        walden.ok(&["backup"]);
        ledger.commit_many(5);
        let kept = ledger.entries().to_vec();
        for _ in 0..3 {
            ledger.commit_many(5);
            archive_all(&postgres, &mut agent);
        }
        let last = ledger.commit().lsn;
        let old: Vec<Entry> = ledger.entries().to_vec();
        drop(ledger);
        agent.wait_archived(last, MINUTE);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        postgres.stop_fast();

        let target = kept.last().expect("ten").lsn.to_string();
        let copy = restore(&walden, major, "copy", &["--target-lsn", &target]);
        assert_rows(&copy, &kept);
        assert_eq!(timeline_of(&copy), 2);
        let config = fs::read_to_string(walden.config_path()).expect("the configuration");
        let config = config.replace(&postgres.socket_url(), &copy.socket_url());
        if fresh {
            fs::remove_dir_all(walden.spool()).expect("the spool is there");
            fs::remove_dir_all(walden.state()).expect("the state is there");
        }
        let walden = Walden::with_config(&stage, &config);
        let mut agent = walden.run();
        agent.wait_status(MINUTE, "the copy's timeline", |status| status["timeline"] == 2);
        let mut ledger = Ledger::create(&copy);
        let mut new = kept.clone();
        new.extend(ledger.commit_many(10));
        drop(ledger);
        let end = copy.switch_wal();
        agent.wait_archived(end, MINUTE);
        let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
        assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
        let old_folder = cluster_folder(&store.folder, "main", &copy);
        compare_stored(&old_folder, &postgres.oracle).assert_whole(3);

        wait_covered(&old_folder, 2);
        assert_rows(&restore(&walden, major, "old", &["--timeline", "1"]), &old);
        assert_rows(&restore(&walden, major, "new", &[]), &new);
        let middle = new[kept.len() + 4].lsn.to_string();
        let restored = restore(&walden, major, "middle", &["--timeline", "2", "--target-lsn", &middle]);
        assert_rows(&restored, &new[..=kept.len() + 4]);

        // A second copy of the same backup, which leaves the first timeline elsewhere: another branch beside the other two.
        let early = kept[6].lsn.to_string();
        let third = restore(&walden, major, "third", &["--timeline", "1", "--target-lsn", &early]);
        let number = timeline_of(&third);
        assert!(number > 2, "timeline 2 is taken");
        let mut ledger = Ledger::create(&third);
        let mut rows = kept[..=6].to_vec();
        rows.extend(ledger.commit_many(3));
        drop(ledger);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let walden = Walden::with_config(&stage, &config.replace(&copy.socket_url(), &third.socket_url()));
        let mut agent = walden.run();
        agent.wait_status(MINUTE, "the third branch", |status| status["timeline"] == number);
        let end = third.switch_wal();
        agent.wait_archived(end, MINUTE);
        wait_covered(&old_folder, number);
        assert_rows(&restore(&walden, major, "third-again", &[]), &rows);
        assert_rows(&restore(&walden, major, "new-again", &["--timeline", "2"]), &new);
    }
}

/// Somebody restored a copy under the same cluster, and it archived for a while on a timeline of its own with a higher number. The
/// server goes on on its own timeline, whatever the spool tells: its own, none, or the copy's. A restore gives the server, not the
/// copy, unless it is asked for by its number. A twin that was given the server's number, and the server's own past, are refused and
/// waited for (I7, I10, I20).
#[test]
fn a_server_goes_on_beside_the_newer_timeline_of_a_copy() {
    for major in few(&[15, 18]) {
        let stage = Stage::new("beside");
        let mut postgres = Postgres::builder(major).wal_segsize(1).setting("wal_keep_size", "64MB").start(&stage);
        let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(3);
        walden.ok(&["backup"]);
        let fork = ledger.commit_many(2)[1].lsn;
        let mut rows: Vec<Entry> = ledger.entries().to_vec();
        drop(ledger);
        archive_all(&postgres, &mut agent);
        postgres.stop_fast();
        let (past, twin) = (stage.join("past"), stage.join("twin"));
        for copy in [&past, &twin] {
            assert!(stage.command("cp").arg("-a").arg(&postgres.data).arg(copy).status().expect("cp runs").success());
        }
        postgres.start();
        promote_in_place(&mut postgres);
        let mut ledger = Ledger::create(&postgres);
        rows.extend(ledger.commit_many(3));
        drop(ledger);
        agent.wait_status(MINUTE, "the second timeline", |status| status["timeline"] == 2);
        archive_all(&postgres, &mut agent);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());

        let copy = restore(&walden, major, "copy", &["--timeline", "1", "--target-lsn", &fork.to_string()]);
        assert_eq!(timeline_of(&copy), 3);
        let config = fs::read_to_string(walden.config_path()).expect("the configuration");
        let listen = config.lines().find(|line| line.starts_with("listen")).expect("a port").to_owned();
        let for_server = |server: &Postgres, spool: &str| {
            let config = config
                .replace(&postgres.socket_url(), &server.socket_url())
                .replace(&listen, &format!("listen = \"127.0.0.1:{}\"", parts::free_port()))
                .replace("/spool\"", &format!("/{spool}\""))
                .replace("/state\"", &format!("/state-{spool}\""));
            Walden::with_config(&stage, &config)
        };
        let mut copied = for_server(&copy, "of-the-copy").run_connected();
        let mut ledger = Ledger::create(&copy);
        let mut of_the_copy = rows[..5].to_vec();
        of_the_copy.extend(ledger.commit_many(7));
        drop(ledger);
        let end = copy.switch_wal();
        copied.wait_archived(end, MINUTE);
        copied.wait_status(MINUTE, "healthy", |status| status["healthy"] == true && status["timeline"] == 3);
        assert!(copied.sigterm(MINUTE).success(), "{}", copied.log_tail());
        drop(copy);

        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        for spool in ["fresh", "of-the-copy", "spool"] {
            let mut agent = for_server(&postgres, spool).run();
            let mut ledger = Ledger::create(&postgres);
            rows.extend(ledger.commit_many(2));
            drop(ledger);
            let status = agent.wait_status(MINUTE, "the server's own timeline", |status| {
                status["timeline"] == 2 && !has_cause(status, "not_connected")
            });
            assert!(!has_cause(&status, "diverged"), "{status}");
            archive_all(&postgres, &mut agent);
            // Also after a restart, with what the spool holds by now.
            agent.kill9();
            let mut agent = for_server(&postgres, spool).run();
            archive_all(&postgres, &mut agent);
            let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
            assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{spool}: {status}");
            wait_covered(&folder, 2);
            assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        }
        compare_stored(&folder, &postgres.oracle).assert_whole(4);
        let target = stage.join("unused").display().to_string();
        let planned = walden.exec(&["restore", "--dry-run", "--pgdata", &target]);
        assert!(planned.stdout.contains("on timeline 2") && planned.stdout.contains("--timeline 3"), "{planned:?}");
        assert_rows(&restore(&walden, major, "server", &[]), &rows);
        assert_rows(&restore(&walden, major, "copy-again", &["--timeline", "3"]), &of_the_copy);

        let before = content(&walden.repository());
        // As if nobody had told it of the other promotion: the number is given a second time.
        let mut twin = Postgres::over(&stage, major, &twin);
        twin.start();
        Ledger::create(&twin).commit_many(9);
        promote_in_place(&mut twin);
        let mut refused = for_server(&twin, "of-the-twin").run();
        let status = refused.wait_status(MINUTE, "the twin to be refused", |status| has_cause(status, "diverged"));
        assert!(status.to_string().contains("timeline 2 of the server is not the one that is held"), "{status}");
        refused.sigterm(MINUTE);
        let mut past = Postgres::over(&stage, major, &past);
        past.start();
        Ledger::create(&past).commit_many(9);
        let mut waiting = for_server(&past, "of-the-past").run();
        let status = waiting.wait_status(MINUTE, "the past to be named", |status| {
            status
                .to_string()
                .contains("the server is on timeline 1, and timeline 3 is held, which came after it and left it at")
        });
        assert!(has_cause(&status, "not_connected") && status["healthy"] == false, "{status}");
        waiting.sigterm(MINUTE);
        assert_eq!(before, content(&walden.repository()), "the repository was changed");
    }
}
