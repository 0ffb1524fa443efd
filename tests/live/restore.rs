//! Back up, go on, restore: each kind of target holds exactly the commits that it should.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use walden::wal::{Lsn, SegmentName, TimelineId};

use super::streaming::{archive_all, majors};
use crate::support::ledger::{self, Entry, assert_rows};
use crate::support::oracle::{cluster_folder, stored_segments};
use crate::support::{Agent, Ledger, Postgres, Stage, Walden, eventually};

const MINUTE: Duration = Duration::from_secs(60);

/// A cluster with a history: five rows, a backup, more rows with a restore point among them, an accident at the end.
pub struct History {
    pub before_backup: Vec<Entry>,
    pub after_backup: Vec<Entry>,
    /// How many of `after_backup` lie before the restore point `good`.
    pub at_good: usize,
    /// A moment after every row and before the accident; the server is quiet around it.
    pub quiet: Timestamp,
    pub backup: Value,
}

impl History {
    #[track_caller]
    pub fn make(postgres: &Postgres, walden: &Walden, agent: &mut Agent) -> History {
        let mut ledger = Ledger::create(postgres);
        let before_backup = ledger.commit_many(5);
        walden.ok(&["backup", "--label", "first"]);
        let list = walden.json(&["list"]);
        let backup = list["backups"][0].clone();
        assert_eq!(backup["label"], "first", "{list}");
        let mut after_backup = ledger.commit_many(4);
        let at_good = after_backup.len();
        postgres.psql("SELECT pg_create_restore_point('good')");
        after_backup.extend(ledger.commit_many(4));
        let quiet = server_time(postgres);
        postgres.psql("SELECT pg_sleep(0.05)");
        postgres.psql("DELETE FROM ledger WHERE n > 1");
        archive_all(postgres, agent);
        wait_complete_until(agent, quiet);
        History { before_backup, after_backup, at_good, quiet, backup }
    }

    /// The rows before the backup and the first `count` after it.
    fn kept(&self, count: usize) -> Vec<Entry> {
        self.before_backup.iter().chain(&self.after_backup[..count]).cloned().collect()
    }
}

pub fn server_time(postgres: &Postgres) -> Timestamp {
    let text =
        postgres.value("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    text.parse().expect("RFC 3339")
}

/// The agent says that every commit before `time` is in the repository.
#[track_caller]
pub fn wait_complete_until(agent: &mut Agent, time: Timestamp) {
    agent.wait_status(MINUTE, &format!("everything before {time} to be archived"), |status| {
        status["complete_until"]
            .as_str()
            .and_then(|text| text.parse::<Timestamp>().ok())
            .is_some_and(|reached| reached >= time)
    });
}

/// Restores into a folder of its own, starts the result and gives it, open for writing.
#[track_caller]
pub fn restore(walden: &Walden, major: u32, name: &str, target: &[&str]) -> Postgres {
    let folder = walden.stage().join(name);
    let path = folder.to_string_lossy().into_owned();
    let mut arguments = vec!["restore", "--pgdata", &path];
    arguments.extend(target);
    walden.ok(&arguments);
    let mut restored = Postgres::over(walden.stage(), major, &folder);
    restored.start();
    restored.wait_promoted(MINUTE);
    restored
}

/// The commits that each target keeps, on each major, from a repository in a folder.
#[test]
fn every_kind_of_target_holds_exactly_its_commits() {
    for major in majors() {
        let stage = Stage::new("targets");
        let postgres = Postgres::builder(major).start(&stage);
        let walden = Walden::local(&stage, &postgres, "");
        let mut agent = walden.run_connected();
        let history = History::make(&postgres, &walden, &mut agent);
        // From the repository alone: the agent is gone, and so is everything it kept beside it.
        assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
        std::fs::remove_dir_all(walden.spool()).expect("the spool is there");
        std::fs::remove_dir_all(walden.state()).expect("the state is there");
        check_every_target(&walden, major, &history);
    }
}

#[track_caller]
pub fn check_every_target(walden: &Walden, major: u32, history: &History) {
    let rows = &history.after_backup;
    let (third, fourth) = (&rows[2], &rows[3]);
    let middle = (third.timestamp().as_microsecond() + fourth.timestamp().as_microsecond()) / 2;
    let middle = Timestamp::from_microsecond(middle).expect("between two times");
    let (xid, lsn) = (third.xid.to_string(), third.lsn.to_string());
    let (at_third, quiet, middle) = (third.time.clone(), history.quiet.to_string(), middle.to_string());
    let all = rows.len();
    let cases: Vec<(&str, Vec<&str>, usize)> = vec![
        ("time-between", vec!["--target-time", &middle], 3),
        ("time-exact", vec!["--target-time", &at_third], 3),
        ("time-exclusive", vec!["--target-time", &at_third, "--exclusive"], 2),
        ("time-after-last", vec!["--target-time", &quiet], all),
        ("lsn", vec!["--target-lsn", &lsn], 3),
        ("xid", vec!["--target-xid", &xid], 3),
        ("xid-exclusive", vec!["--target-xid", &xid, "--exclusive"], 2),
        ("name", vec!["--target-name", "good"], history.at_good),
        ("immediate", vec!["--target", "immediate"], 0),
    ];
    for (name, target, count) in cases {
        let restored = restore(walden, major, name, &target);
        ledger::assert_rows(&restored, &history.kept(count));
        restored.psql("CREATE TABLE it_takes_writes ()");
        assert_eq!(
            restored.value("SELECT timeline_id FROM pg_control_checkpoint()"),
            "2",
            "{name} opens a timeline of its own"
        );
    }
    // `latest` is the default, and has the accident.
    let restored = restore(walden, major, "latest", &[]);
    ledger::assert_rows(&restored, &history.before_backup[..1]);
}

/// Right after a backup, nobody has committed since: latest and a time after it give the last state (E2).
#[test]
fn a_quiet_server_with_no_commit_since_the_backup_is_restored() {
    for major in majors() {
        let stage = Stage::new("quiet");
        let postgres = Postgres::builder(major).start(&stage);
        let walden = Walden::local(&stage, &postgres, "");
        let mut agent = walden.run_connected();
        let mut ledger = Ledger::create(&postgres);
        ledger.commit_many(3);
        walden.ok(&["backup"]);
        let restored = restore(&walden, major, "latest", &[]);
        ledger::assert_rows(&restored, ledger.entries());
        drop(restored);
        let moment = server_time(&postgres);
        // Not a commit: a checkpoint and the switch are all that is written after the moment.
        postgres.psql("CHECKPOINT");
        let end = postgres.switch_wal();
        agent.wait_archived(end, MINUTE);
        wait_complete_until(&mut agent, moment);
        let restored = restore(&walden, major, "time", &["--target-time", &moment.to_string()]);
        ledger::assert_rows(&restored, ledger.entries());
    }
}

/// `--start` ends only when the target is reached and writes are accepted; the result archives nothing here.
#[test]
fn restore_with_start_ends_with_an_open_server() {
    let stage = Stage::new("start");
    let mut postgres = Postgres::builder(17).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let history = History::make(&postgres, &walden, &mut agent);
    assert!(agent.sigterm(MINUTE).success());
    postgres.stop_fast();
    let folder = stage.join("restored");
    let path = format!("{}:{}", postgres.bin().display(), std::env::var("PATH").unwrap_or_default());
    let mut command = walden.command(&[
        "restore",
        "--pgdata",
        &folder.to_string_lossy(),
        "--target-time",
        &history.quiet.to_string(),
        "--archive-mode",
        "off",
        "--start",
    ]);
    command.env("PATH", path);
    let done = crate::support::walden::finish(command, 2 * MINUTE);
    assert_eq!(done.code, Some(0), "{}{}", done.stdout, done.stderr);
    // The restored server has the port and the socket folder of the one that was stopped.
    assert_eq!(postgres.value("SELECT pg_is_in_recovery()"), "f");
    ledger::assert_rows(&postgres, &history.kept(history.after_backup.len()));
    let stopped =
        postgres.program("pg_ctl").args(["-m", "fast", "-w", "stop", "-D"]).arg(&folder).output().expect("pg_ctl runs");
    assert!(stopped.status.success());
}

/// A target that cannot be reached is refused with code 3 and the windows, before the directory exists (I5, E3, E4).
#[test]
fn an_unreachable_target_is_refused_before_anything_is_written() {
    let stage = Stage::new("refused");
    let postgres = Postgres::builder(15).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    let history = History::make(&postgres, &walden, &mut agent);
    let folder = stage.join("never");
    let path = folder.to_string_lossy().into_owned();
    let early = history.before_backup[0].time.clone();
    let beyond = Lsn::new(postgres.insert_lsn().get() + (1 << 30)).to_string();
    let cases: Vec<Vec<&str>> = vec![
        vec!["--target-time", &early],
        vec!["--target-time", "2099-01-01T00:00:00Z"],
        vec!["--target-lsn", &beyond],
        vec!["--target-lsn", "0/1"],
        vec!["--target-xid", "4000000000"],
        vec!["--target-name", "no such point"],
        vec!["--timeline", "7"],
    ];
    for target in cases {
        let mut arguments = vec!["--json", "restore", "--pgdata", &path];
        arguments.extend(&target);
        let refused = walden.exec(&arguments);
        assert_eq!(refused.code, Some(3), "{target:?}: {}{}", refused.stdout, refused.stderr);
        assert!(!folder.exists(), "{target:?} made the directory");
        let said: Value = serde_json::from_str(&refused.stdout).expect("JSON on any failure");
        assert_eq!(said["error"]["code"], 3, "{said}");
        let windows = said["windows"].as_array().or_else(|| said["error"]["windows"].as_array());
        assert!(windows.is_some_and(|windows| !windows.is_empty()), "{target:?} names no window: {said}");
    }
    // A window that is named can be reached.
    let list = walden.json(&["list"]);
    let window = &list["windows"][0];
    assert_eq!(window["timeline"], 1, "{list}");
    assert!(window["from_time"].is_string() && window["to_time"].is_string(), "{list}");
    for end in ["from_lsn", "to_lsn"] {
        let lsn = window[end].as_str().expect("an LSN").to_owned();
        let planned = walden.json(&["restore", "--dry-run", "--pgdata", &path, "--target-lsn", &lsn]);
        assert_eq!(
            planned["backup"]["id"].as_str().or(planned["backup"].as_str()),
            history.backup["id"].as_str(),
            "{planned}"
        );
        assert!(!folder.exists(), "--dry-run made the directory");
    }
}

/// A directory that holds something is refused with code 4 and not touched; `--force` renames it.
#[test]
fn a_directory_in_use_is_refused_and_force_renames_it() {
    let stage = Stage::new("force");
    let postgres = Postgres::builder(17).start(&stage);
    let walden = Walden::local(&stage, &postgres, "");
    let mut agent = walden.run_connected();
    Ledger::create(&postgres).commit_many(2);
    walden.ok(&["backup"]);
    let folder = stage.make_dir("busy");
    stage.write("busy/precious", "mine");
    let path = folder.to_string_lossy().into_owned();
    assert_eq!(walden.exec(&["restore", "--pgdata", &path]).code, Some(4));
    assert_eq!(std::fs::read_to_string(folder.join("precious")).expect("untouched"), "mine");
    assert_eq!(std::fs::read_dir(&folder).expect("a folder").count(), 1);
    // A running server's directory is refused even with --force.
    let live = postgres.data.to_string_lossy().into_owned();
    assert_eq!(walden.exec(&["restore", "--pgdata", &live, "--force"]).code, Some(4));
    walden.ok(&["restore", "--pgdata", &path, "--force"]);
    let aside = eventually(MINUTE, "the old directory under its new name", || {
        let found = std::fs::read_dir(stage.path()).expect("the stage").flatten();
        found
            .map(|entry| entry.path())
            .find(|path| path.to_string_lossy().contains("/busy.before-"))
            .ok_or("none".to_owned())
    });
    assert_eq!(std::fs::read_to_string(aside.join("precious")).expect("kept"), "mine");
    let mut restored = Postgres::over(&stage, 17, &folder);
    restored.start();
    restored.wait_promoted(MINUTE);
    assert_eq!(ledger::rows_in(&restored), [1, 2]);
    agent.kill9();
}

/// Tablespaces are restored where `--tablespace-map` says, and the original's are left alone.
#[test]
fn tablespaces_go_where_the_map_says() {
    for major in majors() {
        let stage = Stage::new("spaces");
        let postgres = Postgres::builder(major).start(&stage);
        let (old, new) = (stage.make_dir("space-old"), stage.join("space-new"));
        postgres.psql(&format!("CREATE TABLESPACE fast LOCATION '{}'", old.display()));
        postgres.psql("CREATE TABLE placed (n int) TABLESPACE fast");
        postgres.psql("INSERT INTO placed SELECT generate_series(1, 1000)");
        let walden = Walden::local(&stage, &postgres, "");
        let mut agent = walden.run_connected();
        Ledger::create(&postgres).commit_many(2);
        walden.ok(&["backup"]);
        postgres.psql("INSERT INTO placed SELECT generate_series(1001, 1500)");
        archive_all(&postgres, &mut agent);
        let map = format!("{}={}", old.display(), new.display());
        // Where the old place is not empty, restoring over it is refused.
        let busy = stage.join("not-made").to_string_lossy().into_owned();
        assert_eq!(walden.exec(&["restore", "--pgdata", &busy]).code, Some(4));
        // It is the running original's, so that `--force` for a directory of its own does not take it away either.
        let in_the_way = stage.make_dir("in-the-way").to_string_lossy().into_owned();
        stage.write("in-the-way/file", "mine");
        let refused = walden.exec(&["restore", "--pgdata", &in_the_way, "--force"]);
        assert_eq!(refused.code, Some(4), "{}", refused.stderr);
        assert!(refused.stderr.contains("--tablespace-map"), "{}", refused.stderr);
        assert!(stage.join("in-the-way/file").exists(), "it was renamed");
        let told = walden.ok(&["restore", "--dry-run", "--pgdata", &busy, "--tablespace-map", &map]);
        assert!(told.contains(&format!("tablespace: {}, at {}", new.display(), old.display())), "{told}");
        let restored = restore(&walden, major, "restored", &["--tablespace-map", &map]);
        assert_eq!(restored.value("SELECT count(*) FROM placed"), "1500");
        assert_eq!(
            restored.value("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'fast'"),
            new.to_string_lossy()
        );
        assert_eq!(postgres.value("SELECT count(*) FROM placed"), "1500");
    }
}

/// The first repository lacks the newest WAL, as one does that was away for a while: the latest state comes from the second, and it is
/// told. What was planned is what `restore_command` asks, so `recovery-conf` names the repository.
#[test]
fn the_latest_state_comes_from_the_repository_that_has_it() {
    let stage = Stage::new("behind");
    let postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
    let table = |name: &str| {
        let path = stage.join(name);
        format!("[[repository]]\nname = \"{name}\"\ntype = \"local\"\npath = \"{}\"\n", path.display())
    };
    let more = format!("{}{}[backup]\ninitial = false\n", table("near"), table("far"));
    let walden = Walden::with_repository(&stage, &postgres, &more);
    let mut agent = walden.run_connected();
    let mut ledger = Ledger::create(&postgres);
    ledger.commit_many(3);
    walden.ok(&["backup"]);
    ledger.commit();
    archive_all(&postgres, &mut agent);
    let newest = ledger.commit();
    let end = archive_all(&postgres, &mut agent);
    assert!(agent.sigterm(MINUTE).success(), "{}", agent.log_tail());
    let last = SegmentName::holding(TimelineId::FIRST, Lsn::new(end.get() - 1), postgres.segment_size()).to_string();
    let near = cluster_folder(&stage.join("near"), "main", &postgres);
    std::fs::remove_dir_all(near.join("tail")).ok();
    let gone: Vec<_> = stored_segments(&near).range(last..).map(|(_, path)| path.clone()).collect();
    assert!(!gone.is_empty());
    gone.iter().for_each(|path| std::fs::remove_file(path).expect("it is there"));

    let planned = walden.exec(&["recovery-conf"]);
    assert_eq!(planned.code, Some(0), "{}", planned.stderr);
    assert!(planned.stderr.contains("repository near ends at"), "{}", planned.stderr);
    let system = postgres.system_identifier();
    assert!(planned.stdout.contains("--repository ''far'' wal-fetch"), "{}", planned.stdout);
    assert!(planned.stdout.contains(&format!("--system-identifier {system} %f")), "{}", planned.stdout);
    // Both have it.
    let earlier = &ledger.entries()[3].time;
    let both = walden.json(&["restore", "--dry-run", "--pgdata", "/never", "--target-time", earlier]);
    assert_eq!(both["repository"], "near");
    let restored = restore(&walden, 17, "restored", &[]);
    assert_rows(&restored, ledger.entries());
    assert_eq!(ledger.last(), &newest);
    drop(restored);
    // The one that has it cannot be read: that is told.
    std::fs::rename(stage.join("far"), stage.join("away")).expect("away");
    let planned = walden.exec(&["restore", "--dry-run", "--pgdata", "/never"]);
    assert_eq!(planned.code, Some(0), "{}", planned.stderr);
    assert!(planned.stderr.contains("repository far is passed over"), "{}", planned.stderr);
}
