//! The tests' own parts do what the other tests believe of them.

use std::time::Duration;

use crate::support::oracle::{assert_same, commits_in_oracle, files_below, has_waldump};
use crate::support::{Ledger, Postgres, Recorder, Stage, ledger, parts, wait_until};

/// The oracle holds every segment that the server completed, over a crash and a restart, and the ledger knows which
/// rows were acknowledged.
#[test]
fn a_throw_away_server_archives_and_survives_a_crash() {
    for major in [15, 17] {
        let stage = Stage::new("house");
        let mut postgres = Postgres::builder(major).wal_segsize(1).setting("checkpoint_timeout", "30s").start(&stage);
        assert_eq!(postgres.segment_size().get(), 1 << 20);
        postgres.pgbench_init(1);
        let mut load = postgres.pgbench(&["-c", "2", "-T", "60"]);
        let recorder = Recorder::start(&postgres);
        wait_until(Duration::from_secs(30), "some rows", || recorder.entries().len() >= 20);
        assert!(load.is_running());
        postgres.crash_and_restart();
        let before = recorder.entries().len();
        wait_until(Duration::from_secs(30), "rows after the crash", || recorder.entries().len() >= before + 20);
        load.stop();
        let (entries, doubtful) = recorder.stop();
        let rows = ledger::rows_in(&postgres);
        assert!(entries.iter().all(|entry| rows.contains(&entry.n)), "an acknowledged row is gone");
        assert!(rows.iter().all(|n| doubtful.contains(n) || entries.iter().any(|entry| entry.n == *n)));
        postgres.wait_oracle_complete();
        let segments =
            files_below(&postgres.oracle).into_iter().filter(|path| path.metadata().is_ok_and(|m| m.len() == 1 << 20));
        assert!(segments.count() >= 3);
        if has_waldump(&postgres) {
            let recorded = commits_in_oracle(&postgres, postgres.segment_size());
            for entry in &entries {
                let found = recorded.iter().find(|record| record.xid == entry.xid).expect("the commit's record");
                assert!(found.is_commit && found.time == entry.time && found.lsn < entry.lsn, "{found:?} {entry:?}");
            }
        }
        postgres.stop_fast();
        assert!(postgres.is_port_silent());
    }
}

/// `Postgres::over` starts a data directory that something else made, here a cold copy.
#[test]
fn a_copied_data_directory_starts_beside_the_original() {
    let stage = Stage::new("over");
    let mut original = Postgres::builder(17).start(&stage);
    let mut ledger = Ledger::create(&original);
    ledger.commit_many(3);
    original.stop_fast();
    let copied = stage.command("cp").arg("-a").arg(&original.data).arg(stage.join("copy")).status().expect("cp runs");
    assert!(copied.success());
    original.start();
    let mut copy = Postgres::over(&stage, 17, &stage.join("copy"));
    copy.start();
    copy.wait_promoted(Duration::from_secs(10));
    ledger::assert_rows(&copy, ledger.entries());
    assert_ne!(copy.port, original.port);
    let (one, other) = (original.data.join("PG_VERSION"), copy.data.join("PG_VERSION"));
    assert_same(&std::fs::read(one).expect("a file"), &std::fs::read(other).expect("a file"), "PG_VERSION");
}

#[test]
fn at_least_two_majors_are_set_up() {
    let majors = parts::postgres_majors();
    assert!(majors.contains(&15) && majors.contains(&17), "only {majors:?} are set up");
}

/// Every test that docs/guarantees.md names exists, under that name, in that module.
#[test]
fn guarantees_name_tests_that_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("docs/guarantees.md")).expect("the page");
    let names = page.split('`').filter(|code| code.contains("::") && !code.contains(' '));
    let mut checked = 0;
    for name in names {
        let (module, function) = name.rsplit_once("::").expect("it has two colons");
        let file = root.join("tests").join(module.replace("::", "/")).with_extension("rs");
        let source =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {}: {error}", file.display()));
        assert!(source.contains(&format!("#[test]\nfn {function}(")), "{name} does not exist");
        checked += 1;
    }
    assert!(checked >= 15, "only {checked} tests are named");
}
