//! Pages whose checksum is wrong: the server finds them while it sends a base backup, and Walden passes on what it says.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::streaming::majors;
use crate::support::{Postgres, Stage, Walden, has_cause};

const MINUTE: Duration = Duration::from_secs(60);
const PAGE: u64 = 8192;

/// The backup is kept, since it is the best that the server has to give; file and block are told by the command, in
/// `list`, by the running agent and before a restore.
#[test]
fn damaged_pages_are_named_and_mark_the_backup() {
    for major in majors() {
        let stage = Stage::new("pages");
        let mut postgres = Postgres::builder(major).setting("full_page_writes", "on").start(&stage);
        postgres.psql("CREATE TABLE broken AS SELECT n, repeat('x', 500) AS filler FROM generate_series(1, 500) n");
        postgres.psql("CREATE TABLE sound AS SELECT n FROM generate_series(1, 10) n");
        postgres.psql("CHECKPOINT");
        let file = postgres.value("SELECT pg_relation_filepath('broken')");
        postgres.stop_fast();
        let path = postgres.data.join(&file);
        let relation = std::fs::File::options().write(true).open(&path).expect("the relation's file is there");
        // In the middle of the third page's rows.
        relation.write_all_at(&[0x5A; 64], 3 * PAGE + 5000).expect("it can be damaged");
        postgres.start();

        let walden = Walden::local(&stage, &postgres, "");
        let finished = walden.exec(&["backup"]);
        assert_eq!(finished.code, Some(1), "{major}: {}", finished.stderr);
        assert!(finished.stderr.contains(&file) && finished.stderr.contains("block 3"), "{major}: {}", finished.stderr);

        if major == 17 {
            // One document tells of the backup and of what is to be done.
            let finished = walden.exec(&["--json", "backup"]);
            let document: serde_json::Value = serde_json::from_str(&finished.stdout).expect("one JSON document");
            assert!(finished.code == Some(1) && document["id"].is_string(), "{finished:?}");
            let error = &document["error"];
            assert!(error["code"] == 1 && error["message"].to_string().contains(&file), "{document}");
        }

        let listed = walden.json(&["list"]);
        let backup = &listed["backups"][0];
        let told = backup["checksum_failures"].to_string();
        assert!(told.contains(&file) && told.contains("block 3"), "{major}: {listed}");
        let text = walden.ok(&["list"]);
        assert!(text.contains("DAMAGED PAGES") && text.contains(&file), "{text}");

        let mut agent = walden.run_connected();
        agent.wait_status(MINUTE, "the mark shows", |status| has_cause(status, "pages_damaged"));
        assert!(agent.sigterm(MINUTE).success());

        let target = stage.join("restored");
        let finished = walden.exec(&["restore", "--pgdata", &target.to_string_lossy(), "--target", "immediate"]);
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        assert!(finished.stderr.contains("DAMAGED PAGES") && finished.stderr.contains(&file), "{}", finished.stderr);
        let mut restored = Postgres::over(&stage, major, &target);
        restored.start();
        restored.wait_promoted(MINUTE);
        assert_eq!(restored.value("SELECT count(*) FROM sound"), "10");
    }
}
