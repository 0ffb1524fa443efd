//! What a newcomer does first: a server just made, and Walden's defaults.

use std::time::Duration;

use crate::support::{Postgres, Stage, Walden};

const MINUTE: Duration = Duration::from_secs(60);

/// A server that has only its first segment, and keeps no WAL but for the slot. The base backup's checkpoint removes what nobody holds;
/// the slot had gone back to segment 0 by the agent's first report, and the WAL that was being streamed was removed (A4, I3).
#[test]
fn the_first_backup_of_a_server_just_made_is_whole() {
    for major in [15, 17] {
        let stage = Stage::new("first");
        let postgres =
            Postgres::builder(major).setting("archive_mode", "off").setting("wal_keep_size", "0").start(&stage);
        let walden = Walden::local(&stage, &postgres, "");
        walden.ok(&["check"]);
        walden.ok(&["backup"]);
        assert_eq!(
            postgres.value("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'walden'"),
            "reserved"
        );
        let mut agent = walden.run_connected();
        postgres.psql("CREATE TABLE t AS SELECT 7 AS n");
        postgres.psql("CHECKPOINT");
        agent.wait_archived(postgres.flush_lsn(), MINUTE);
        let status = agent.wait_status(MINUTE, "healthy", |status| status["healthy"] == true);
        assert_eq!(status["gaps"].as_array().map(Vec::len), Some(0), "{status}");
        assert!(agent.sigterm(MINUTE).success());
        assert!(!agent.log().contains(" ERROR "), "{}", agent.log());

        let restored = stage.join("restored");
        walden.ok(&["restore", "--pgdata", &restored.to_string_lossy()]);
        let mut copy = Postgres::over(&stage, major, &restored);
        copy.start();
        copy.wait_promoted(MINUTE);
        assert_eq!(copy.value("SELECT n FROM t"), "7");
    }
}
