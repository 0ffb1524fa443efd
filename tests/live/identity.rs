//! Servers that are not the one whose WAL is held: refused, told with the first differing LSN, and nothing held is changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use walden::wal::{Lsn, SegmentName, TimelineId};

use super::restore::restore;
use super::streaming::{archive_all, few, majors, turns, turns_on};
use crate::support::ledger::assert_rows;
use crate::support::oracle::{cluster_folder, compare_stored, files_below, stored_segments};
use crate::support::{Agent, Ledger, Postgres, Stage, Walden, has_cause, is_full, wait_until};

const MINUTE: Duration = Duration::from_secs(60);
/// An alarm is raised within this.
const ALARM: Duration = Duration::from_secs(30);

/// Every object below a folder with its content's checksum, but the two that may change.
pub fn content(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut files: Vec<_> = files_below(folder)
        .into_iter()
        .filter(|path| !path.ends_with("lease.json") && !path.ends_with("coverage.json"))
        .map(|path| (path.clone(), crc32fast::hash(&fs::read(&path).expect("an object"))))
        .collect();
    files.sort();
    files
}

/// The same configuration for another server, with some of its text replaced.
fn for_server(walden: &Walden, from: &Postgres, to: &Postgres, more: &[(&str, &str)]) -> Walden {
    let mut config = fs::read_to_string(walden.config_path()).expect("the configuration");
    config = config.replace(&from.socket_url(), &to.socket_url());
    for (old, new) in more {
        config = config.replace(old, new);
    }
    Walden::with_config(walden.stage(), &config)
}

/// A new cluster in the place of the old one, as after initdb or pg_upgrade, with the old spool or a new one: refused before
/// streaming (exit 4), nothing is made on the server or in the repository, until it is adopted. Then it archives beside what the old
/// one left, which can still be restored, and the old one is refused (I6, B3 of the failure table).
#[test]
fn a_new_cluster_archives_under_an_old_name_once_it_is_adopted() {
    // An upgrade as far as it goes; in the full run from each major to the next.
    let all = majors();
    let steps: Vec<(u32, u32)> = match is_full() {
        true => all.iter().copied().zip(all.iter().copied().skip(1)).collect(),
        false => vec![(all[0], all[all.len() - 1])],
    };
    steps.into_iter().for_each(|(first, second)| replace_and_adopt(first, second));
}

fn replace_and_adopt(first_major: u32, second_major: u32) {
    let stage = Stage::new("adopt");
    let mut first = Postgres::builder(first_major).wal_segsize(1).named("first").start(&stage);
    let walden = Walden::local(&stage, &first, "");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&first);
    ledger.commit_many(5);
    let old = first.system_identifier().to_string();
    walden.ok(&["backup"]);
    archive_all(&first, &mut agent);
    let rows = ledger.entries().to_vec();
    drop(ledger);
    let early = walden.exec(&["adopt", "--system-identifier", &old]);
    assert_eq!(early.code, Some(0), "there is nothing to adopt: {}", early.stderr);
    let second = Postgres::builder(second_major).wal_segsize(1).named("second").start(&stage);
    let new = second.system_identifier().to_string();
    let replaced = for_server(&walden, &first, &second, &[]);
    let busy = replaced.exec(&["adopt", "--system-identifier", &new]);
    assert_eq!(busy.code, Some(4), "its agent still archives the old one: {}", busy.stderr);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let before = content(&walden.repository());

    let elsewhere = [("/spool\"", "/spool-2\""), ("/state\"", "/state-2\"")];
    for other in [&replaced, &for_server(&walden, &first, &second, &elsewhere)] {
        for command in ["run", "backup"] {
            let mut refused = other.spawn(&[command]);
            assert_eq!(refused.wait(MINUTE).code(), Some(4), "walden {command}: {}", refused.log_tail());
            let log = refused.log();
            let errors: Vec<&str> = log.lines().filter(|line| line.starts_with("error: ")).collect();
            assert!(
                matches!(errors[..], [line] if line.contains(&old) && line.contains(&new) && line.contains("walden adopt")),
                "{log}"
            );
        }
        let checked = other.exec(&["check"]);
        assert_eq!(checked.code, Some(1));
        assert!(checked.stdout.contains(&format!("walden adopt --system-identifier {new}")), "{}", checked.stdout);
    }
    assert_eq!(second.value("SELECT count(*) FROM pg_replication_slots"), "0");
    let wrong = replaced.exec(&["adopt", "--system-identifier", "12345"]);
    assert_eq!(wrong.code, Some(4), "{}", wrong.stderr);
    assert_eq!(before, content(&walden.repository()));

    let adopted = replaced.json(&["adopt", "--system-identifier", &new]);
    assert_eq!(adopted["repositories"][0]["before"][0], old, "{adopted}");
    replaced.ok(&["adopt", "--system-identifier", &new]);
    assert_eq!(replaced.exec(&["check"]).code, Some(0), "{}", replaced.exec(&["check"]).stdout);
    let mut agent = replaced.run_connected();
    let mut ledger = Ledger::create(&second);
    let new_rows = ledger.commit_many(3);
    drop(ledger);
    replaced.ok(&["backup"]);
    archive_all(&second, &mut agent);
    let new_folder = cluster_folder(&walden.repository(), "main", &second);
    compare_stored(&new_folder, &second.oracle).assert_whole(1);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let mut again = replaced.run_connected();
    assert!(again.sigterm(MINUTE).success(), "{}", again.log_tail());

    let old_folder = cluster_folder(&walden.repository(), "main", &first);
    let untouched: Vec<_> = before.iter().filter(|(path, _)| path.starts_with(&old_folder)).cloned().collect();
    assert_eq!(untouched, content(&old_folder), "what the old cluster left was changed");
    let which = replaced.exec(&["list"]);
    assert_eq!(which.code, Some(2), "{}", which.stderr);
    assert!(which.stderr.contains(&old) && which.stderr.contains(&new), "{}", which.stderr);
    let segment = stored_segments(&old_folder).into_keys().next().expect("a segment");
    let to = stage.join("fetched");
    let to = to.to_string_lossy();
    assert_eq!(replaced.exec(&["wal-fetch", &segment, &to]).code, Some(255), "which of the two is not said");
    replaced.ok(&["wal-fetch", "--system-identifier", &old, &segment, &to]);
    for (major, system, expected) in [(first_major, &old, &rows), (second_major, &new, &new_rows)] {
        let listed = replaced.json(&["list", "--system-identifier", system]);
        assert_eq!(listed["system_identifier"], **system);
        let settings = replaced.ok(&["recovery-conf", "--system-identifier", system]);
        assert!(settings.contains(&format!("wal-fetch --system-identifier {system} %f")), "{settings}");
        let restored = restore(&replaced, major, &format!("restored-{major}"), &["--system-identifier", system]);
        assert_rows(&restored, expected);
    }
    // The old one has been succeeded.
    let mut refused = walden.spawn(&["run"]);
    assert_eq!(refused.wait(MINUTE).code(), Some(4), "{}", refused.log_tail());
    let too_late = walden.exec(&["adopt", "--system-identifier", &old]);
    assert_eq!(too_late.code, Some(0), "a cluster that was put back may be adopted as well: {}", too_late.stderr);
    let mut agent = walden.run_connected();
    archive_all(&first, &mut agent);
    first.stop_fast();
}

/// Another cluster takes the server's place while the agent runs: nothing of it is streamed, no slot is made on it, and the agent says
/// so and goes on answering (I6, B3 of the failure table).
#[test]
fn a_cluster_made_anew_under_a_running_agent_is_not_streamed() {
    // By initdb again, and by an upgrade.
    let all = majors();
    for (at, major) in all.iter().enumerate() {
        let after = if at % 2 == 0 { *major } else { *all.get(at + 1).unwrap_or(major) };
        make_the_cluster_anew(*major, after);
    }
}

fn make_the_cluster_anew(before: u32, after: u32) {
    let stage = Stage::new("anew");
    let mut first = Postgres::builder(before).wal_segsize(1).named("first").start(&stage);
    let mut second = Postgres::builder(after).wal_segsize(1).named("second").start(&stage);
    let walden = Walden::local(&stage, &first, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    archive_all(&first, &mut agent);
    let system = second.system_identifier().to_string();
    second.stop_fast();
    first.stop_fast();
    agent.wait_status(MINUTE, "everything to be shipped", |status| {
        status["queue"]["segments"] == 0 && status["archived_lsn"] == status["durable_lsn"]
    });
    (second.sockets, second.port) = (first.sockets.clone(), first.port);
    let (spool, before) = (content(&walden.spool()), content(&walden.repository()));
    second.start();
    let status = agent.wait_status(ALARM, "the cause other_cluster", |status| has_cause(status, "other_cluster"));
    assert!(status.to_string().contains(&system), "{status}");
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    assert_eq!(second.value("SELECT count(*) FROM pg_replication_slots"), "0");
    assert!(agent.is_running());
    let backup = walden.exec(&["backup"]);
    assert_eq!(backup.code, Some(4), "{}", backup.stderr);
    agent.sigterm(MINUTE);
    assert_eq!(before, content(&walden.repository()), "the repository was changed");
    assert_eq!(spool, content(&walden.spool()), "the spool was changed");
}

/// Where the server's WAL differs first from what the first server's own `archive_command` copied.
pub fn first_difference(server: &Postgres, oracle: &Path, timeline: TimelineId) -> Lsn {
    let size = server.segment_size();
    let mut names: Vec<String> = fs::read_dir(oracle)
        .expect("the oracle")
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter(|name| SegmentName::parse(name, size).is_ok_and(|segment| segment.timeline() == timeline))
        .collect();
    names.sort();
    for name in names {
        let Ok(theirs) = fs::read(server.data.join("pg_wal").join(&name)) else { continue };
        let ours = fs::read(oracle.join(&name)).expect("a copy");
        if let Some(at) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            let start = SegmentName::parse(&name, size).expect("just parsed").start();
            return Lsn::new(start.get() + at as u64);
        }
    }
    panic!("the server's WAL is the one in the oracle");
}

#[track_caller]
fn wait_diverged(agent: &mut Agent) -> Lsn {
    let status = agent.wait_status(ALARM, "the cause diverged", |status| has_cause(status, "diverged"));
    assert_eq!(status["healthy"], false);
    assert_eq!(agent.get("/readyz").expect("an answer").0, 503);
    status["diverged"].as_str().expect("where").parse().expect("an LSN")
}

/// A copy of the data directory from before is put back: the same system, the same timeline. Records of equal sizes stand where the
/// first history's stood, so that nothing in the chain of records shows a seam; the server is far behind what is held, or beyond it.
/// Found by bytes, several segments back; told with the very first LSN that differs; nothing stored changes (I6, I7, B1 of the
/// failure table).
#[test]
fn a_rolled_back_copy_is_found_at_its_first_differing_byte() {
    for (major, behind) in turns(&[true, false]) {
        let stage = Stage::new("clone");
        let mut postgres = Postgres::builder(major).wal_segsize(1).setting("wal_keep_size", "64MB").start(&stage);
        let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
        let mut agent = walden.run_connected();
        postgres.psql("CREATE TABLE rows (n int PRIMARY KEY, padding text)");
        archive_all(&postgres, &mut agent);
        postgres.stop_fast();
        let (copy, data) = (stage.join("copy"), postgres.data.clone());
        assert!(stage.command("cp").arg("-a").arg(&data).arg(&copy).status().expect("cp runs").success());
        postgres.start();
        // Some segments of rows; the other history's differ in their content alone.
        let write = |postgres: &Postgres, word: &str, rows: u32| {
            let sql = postgres.connect().expect("a session");
            for row in 0..rows {
                sql.run(&format!("INSERT INTO rows VALUES ({row}, repeat('{word}', 6000))"));
                sql.run(&format!("SELECT pg_logical_emit_message(true, 'same', repeat('{word}', 60000))"));
            }
        };
        write(&postgres, "one ", 24);
        archive_all(&postgres, &mut agent);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let held = postgres.flush_lsn();
        postgres.stop_fast();
        fs::remove_dir_all(&data).expect("removed");
        fs::rename(&copy, &data).expect("put in its place");
        // Its own archiving would stop at the first name that is taken.
        postgres.overrides.push("archive_mode=off".into());
        postgres.start();
        write(&postgres, "two ", if behind { 2 } else { 40 });
        assert_eq!(postgres.flush_lsn() < held, behind);
        let before = content(&walden.repository());

        let mut agent = walden.run();
        let at = wait_diverged(&mut agent);
        assert_eq!(at, first_difference(&postgres, &postgres.oracle, TimelineId::FIRST));
        assert!(agent.is_running(), "a refusal while running goes on answering");
        agent.sigterm(MINUTE);
        assert_eq!(before, content(&walden.repository()), "the repository was changed");
    }
}

/// The whole host is put back as it was: the server, and the agent's spool and state with it. Between the two nothing differs; what
/// differs is in the repository alone, in the pieces of the open segment, or behind them. Nobody is told that those acknowledged bytes
/// are still there unless it is seen before the segment is whole (I6, I7). A repository that is away when the agent starts is asked as
/// soon as it is back.
#[test]
fn a_host_that_is_put_back_with_its_spool_is_found() {
    for (major, (behind, away)) in turns_on(&[13, 18], &[(true, false), (false, true)]) {
        let stage = Stage::new("snapshot");
        let mut postgres = Postgres::builder(major).setting("wal_keep_size", "64MB").start(&stage);
        let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
        let mut agent = walden.run_connected();
        postgres.psql("CREATE TABLE rows (n int PRIMARY KEY, padding text)");
        archive_all(&postgres, &mut agent);
        let write = |postgres: &Postgres, word: &str, rows: u32| {
            let sql = postgres.connect().expect("a session");
            for row in 0..rows {
                sql.run(&format!("INSERT INTO rows VALUES ({row}, repeat('{word}', 6000))"));
                sql.run(&format!("SELECT pg_logical_emit_message(true, 'same', repeat('{word}', 60000))"));
            }
            sql.value("SELECT pg_current_wal_flush_lsn()").parse::<Lsn>().expect("an LSN")
        };
        // So that the snapshot has bytes of the open segment as well.
        let end = write(&postgres, "both", 3);
        agent.wait_archived(end, MINUTE);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        postgres.psql("DELETE FROM rows");
        postgres.stop_fast();
        let parts = [postgres.data.clone(), walden.spool(), walden.state()];
        let copy_of = |part: &Path| part.with_extension("snapshot");
        for part in &parts {
            assert!(stage.command("cp").arg("-a").arg(part).arg(copy_of(part)).status().expect("cp runs").success());
        }
        postgres.start();
        let mut agent = walden.run_connected();
        let held = write(&postgres, "one ", 10);
        agent.wait_archived(held, MINUTE);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let open = SegmentName::holding(TimelineId::FIRST, held, postgres.segment_size()).to_string();
        postgres.stop_fast();
        // What of it was archived, for the comparison.
        fs::copy(postgres.data.join("pg_wal").join(&open), postgres.oracle.join(&open)).expect("copied");
        for part in &parts {
            fs::remove_dir_all(part).expect("removed");
            fs::rename(copy_of(part), part).expect("put in its place");
        }
        postgres.overrides.push("archive_mode=off".into());
        postgres.start();
        let end = write(&postgres, "two ", if behind { 2 } else { 14 });
        assert_eq!(end < held, behind);
        let repository = walden.repository();
        let before = content(&repository);

        let allow = |mode| fs::set_permissions(&repository, fs::Permissions::from_mode(mode)).expect("changed");
        if away {
            allow(0);
        }
        let mut agent = walden.run();
        if away {
            agent.wait_durable(end, MINUTE);
            allow(0o700);
        }
        let at = wait_diverged(&mut agent);
        assert_eq!(at, first_difference(&postgres, &postgres.oracle, TimelineId::FIRST));
        agent.sigterm(MINUTE);
        assert_eq!(before, content(&repository), "the repository was changed");
    }
}

/// What is held ends so early in a segment that the copy has the same bytes there: a page header and a record without a time. The
/// segment before it, which the spool has let go, tells the two histories apart. Such a copy was followed (I7).
#[test]
fn a_rolled_back_copy_is_found_behind_a_switch() {
    // `pg_log_standby_snapshot` is there from 16 on.
    few(&[17]).into_iter().filter(|major| *major >= 16).for_each(follow_no_copy_behind_a_switch);
}

fn follow_no_copy_behind_a_switch(major: u32) {
    let stage = Stage::new("seam");
    let mut postgres = Postgres::builder(major)
        .wal_segsize(1)
        .setting("wal_keep_size", "64MB")
        .setting("autovacuum", "off")
        .start(&stage);
    let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    // So that no reader of the catalogs makes a record of its own.
    postgres.psql("VACUUM (FREEZE)");
    archive_all(&postgres, &mut agent);
    postgres.stop_fast();
    let (copy, data) = (stage.join("copy"), postgres.data.clone());
    assert!(stage.command("cp").arg("-a").arg(&data).arg(&copy).status().expect("cp runs").success());
    postgres.start();
    // Its end, and the segment of that. The bytes there are equal but for what the server leaves unset in that record.
    let write = |postgres: &Postgres, word: &str| {
        let sql = postgres.connect().expect("a session");
        sql.run(&format!("SELECT pg_logical_emit_message(true, 'same', repeat('{word}', 60000))"));
        sql.run("SELECT pg_switch_wal()");
        let end: Lsn = sql.value("SELECT pg_log_standby_snapshot()").parse().expect("an LSN");
        wait_until(MINUTE, "the record to be flushed", || postgres.flush_lsn() >= end);
        (SegmentName::holding(TimelineId::FIRST, end, postgres.segment_size()), end)
    };
    let ours = write(&postgres, "one ");
    agent.wait_archived(ours.1, MINUTE);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let sealed = ours.0.previous().expect("one before").to_string();
    wait_until(MINUTE, "the server to archive its segment", || postgres.oracle.join(&sealed).exists());
    postgres.stop_fast();
    fs::remove_dir_all(&data).expect("removed");
    fs::rename(&copy, &data).expect("put in its place");
    postgres.overrides.push("archive_mode=off".into());
    postgres.start();
    assert_eq!(write(&postgres, "two "), ours, "the two end at one position");
    postgres.psql("CREATE TABLE another AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
    let before = content(&walden.repository());

    let mut agent = walden.run();
    let at = wait_diverged(&mut agent);
    assert_eq!(at, first_difference(&postgres, &postgres.oracle, TimelineId::FIRST));
    agent.sigterm(MINUTE);
    assert_eq!(before, content(&walden.repository()), "the repository was changed");
}

/// Two servers promoted to the same timeline from one backup. The second one, with an agent of its own and nothing in its spool, is
/// refused: by the history file where they were promoted at different positions, by the bytes where at the same one. The first
/// archive is unchanged, and its server goes on (I2, I7, I10).
#[test]
fn two_servers_with_one_history_number_do_not_mix() {
    for (major, same_switch) in turns(&[false, true]) {
        let stage = Stage::new("twins");
        let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        let walden = Walden::local(&stage, &postgres, "[upload]\nretry_delay_max = \"1s\"\n");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(5);
        archive_all(&postgres, &mut agent);
        drop(ledger);
        postgres.stop_fast();
        let copy = stage.join("twin");
        assert!(stage.command("cp").arg("-a").arg(&postgres.data).arg(&copy).status().expect("cp runs").success());
        let promote = |server: &mut Postgres| {
            fs::write(server.data.join("standby.signal"), "").expect("standby.signal");
            stage.give(&server.data.join("standby.signal"));
            server.start();
            server.psql("SELECT pg_promote()");
            server.wait_promoted(MINUTE);
        };
        promote(&mut postgres);
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(20);
        drop(ledger);
        agent.wait_status(MINUTE, "the second timeline", |status| status["timeline"] == 2);
        archive_all(&postgres, &mut agent);
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        let before = content(&walden.repository());

        let mut twin = Postgres::over(&stage, major, &copy);
        if !same_switch {
            twin.start();
            Ledger::create(&twin).commit_many(5);
            twin.stop_fast();
        }
        promote(&mut twin);
        let mut ledger = Ledger::create(&twin);
        ledger.commit_many(40);
        drop(ledger);
        let history = |server: &Postgres| fs::read(server.data.join("pg_wal/00000002.history")).expect("a history");
        assert_eq!(history(&postgres) == history(&twin), same_switch);
        let elsewhere = [("/spool\"", "/spool-2\""), ("/state\"", "/state-2\"")];
        let other = for_server(&walden, &postgres, &twin, &elsewhere);
        let mut second = other.run();
        let at = wait_diverged(&mut second);
        let switch: Lsn = String::from_utf8(history(&postgres))
            .expect("text")
            .split_whitespace()
            .nth(1)
            .and_then(|text| text.parse().ok())
            .expect("a position");
        assert!(at >= switch && at.bytes_since(switch) < 256, "they part at {switch}, told was {at}");
        second.sigterm(MINUTE);
        assert_eq!(before, content(&walden.repository()), "the repository was changed");

        let mut agent = walden.run_connected();
        archive_all(&postgres, &mut agent);
        let folder = cluster_folder(&walden.repository(), "main", &postgres);
        compare_stored(&folder, &postgres.oracle).assert_whole(3);
        wait_until(MINUTE, "healthy", || agent.status().is_ok_and(|status| status["healthy"] == true));
    }
}

/// The store was away when the agent stopped, and then the server was replaced. What the old one had confirmed to it lies in the spool
/// alone, the open segment's part too. Its successor's agent ships it to the old one's own folder, and only then lets it go: the old
/// cluster is restored to its last commit (I1, I8).
#[test]
fn what_the_spool_holds_of_a_cluster_that_was_succeeded_is_shipped() {
    let stage = Stage::new("succeeded");
    let mut first = Postgres::builder(15).wal_segsize(1).named("first").start(&stage);
    let walden = Walden::local(&stage, &first, "[upload]\nretry_delay_max = \"1s\"\n");
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&first);
    ledger.commit_many(3);
    let old = first.system_identifier().to_string();
    walden.ok(&["backup"]);
    archive_all(&first, &mut agent);
    let away = stage.join("archive-away");
    fs::rename(walden.repository(), &away).expect("the store goes away");
    for _ in 0..3 {
        ledger.commit_many(2);
        first.switch_wal();
    }
    let last = ledger.commit().lsn;
    agent.wait_durable(last, MINUTE);
    agent.kill9();
    let rows = ledger.entries().to_vec();
    drop(ledger);
    first.wait_oracle_complete();
    first.stop_fast();
    fs::rename(&away, walden.repository()).expect("the store is back");
    let folder = walden.repository().join("main").join(&old);
    // As if it had run out.
    fs::remove_file(folder.join("lease.json")).expect("a lease");

    let second = Postgres::builder(17).wal_segsize(1).named("second").start(&stage);
    let new = second.system_identifier().to_string();
    let replaced = for_server(&walden, &first, &second, &[]);
    replaced.ok(&["adopt", "--system-identifier", &new]);
    let checked = replaced.exec(&["check"]);
    assert!(checked.stdout.contains(&format!("the spool holds WAL of system {old}")), "{}", checked.stdout);
    if is_full() {
        // Somebody else seems to archive the old one: it is told, and waited for.
        let lease = r#"{"format":1,"agent":"someone","host":"elsewhere","taken":"2026-11-21T00:00:00Z","renewed":"2026-11-21T00:00:00Z","ttl_seconds":30}"#;
        stage.write(folder.strip_prefix(stage.path()).expect("below").join("lease.json"), lease);
        let mut agent = replaced.run();
        let status = agent.wait_status(MINUTE, "the cause unshipped", |status| has_cause(status, "unshipped"));
        assert!(status.to_string().contains("someone on elsewhere"), "{status}");
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        fs::remove_file(folder.join("lease.json")).expect("a lease");
    }
    let mut agent = replaced.run_connected();
    archive_all(&second, &mut agent);
    let left = walden.spool().join("main").join(&old);
    wait_until(MINUTE, "the old cluster's WAL to leave the spool", || !left.exists());
    agent.wait_status(MINUTE, "healthy", |status| !has_cause(status, "unshipped"));
    compare_stored(&folder, &first.oracle).assert_whole(4);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    assert_rows(&restore(&replaced, 15, "old", &["--system-identifier", &old]), &rows);
    assert_eq!(replaced.exec(&["check"]).code, Some(0), "{}", replaced.exec(&["check"]).stdout);
}
