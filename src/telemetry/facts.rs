use crate::wal::{Lsn, PgTime, TimelineId};

/// What is known of the slot on the server. The name is the one of the settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotFacts {
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost` (`wal_status` in the view `pg_replication_slots`).
    pub wal_status: Option<String>,
    /// WAL that the server keeps because of the slot.
    pub retained_bytes: Option<u64>,
}

/// WAL known to be lost, `[from_lsn, to_lsn)`.
#[derive(Clone, Debug, PartialEq)]
pub struct GapFact {
    pub timeline: TimelineId,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub since: PgTime,
    pub reason: String,
}

/// A finished base backup.
#[derive(Clone, Debug, PartialEq)]
pub struct BackupFacts {
    pub id: String,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub start_time: PgTime,
    pub stop_time: PgTime,
    pub duration_seconds: f64,
    /// Sum over the volumes, raw.
    pub size_bytes: u64,
    pub stored_bytes: u64,
}
