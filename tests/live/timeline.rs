//! Histories of one cluster: those that follow each other, and those that must never meet.

use std::fs;
use std::time::Duration;

use walden::wal::{Lsn, SegmentName, TimelineId};

use super::streaming::archive_all;
use crate::support::oracle::{cluster_folder, compare_stored, decompress, files_below};
use crate::support::{Ledger, Postgres, Recorder, Stage, Walden, has_cause, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

/// A server that was a standby is promoted, under load, with the agent beside it or away: both timelines are archived, the history
/// file before anything of the new timeline, the old one's last part up to the switch as a piece (I7, I10; A5 of the failure table).
#[test]
fn a_promotion_is_followed() {
    for (major, away) in [(17, false), (15, true)] {
        let stage = Stage::new("promote");
        let mut postgres = Postgres::builder(major).wal_segsize(1).start(&stage);
        let walden = Walden::local(&stage, &postgres, "[archive]\ntail_interval = \"200ms\"\n");
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

        let folder = cluster_folder(&walden.repository(), "main", &postgres);
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
    let stage = Stage::new("rollback");
    let mut postgres = Postgres::builder(17).wal_segsize(1).start(&stage);
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
    let content = || {
        let mut files: Vec<_> = files_below(&walden.repository())
            .into_iter()
            .filter(|path| !path.ends_with("lease.json") && !path.ends_with("coverage.json"))
            .map(|path| (path.clone(), crc32fast::hash(&fs::read(&path).expect("an object"))))
            .collect();
        files.sort();
        files
    };
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
