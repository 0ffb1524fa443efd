use std::time::Duration;

use super::cause::{Cause, CauseCode};
use super::counters::{HistogramSnapshot, Stage};
use super::facts::{BackupFacts, GapFact, SlotFacts};
use super::progress::Distance;
use crate::wal::{Lsn, PgTime, SystemIdentifier, TimelineId};

/// All that is known at one moment. `None` is unknown. Positions are exclusive ends.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub cluster: String,
    pub connected: bool,
    /// `None` while not connected.
    pub connected_for: Option<Duration>,
    /// By code.
    pub causes: Vec<Cause>,
    pub system_identifier: Option<SystemIdentifier>,
    pub timeline: Option<TimelineId>,
    pub received: Option<Lsn>,
    /// How long `received` has not changed.
    pub received_still_for: Duration,
    pub durable: Option<Lsn>,
    /// Lowest of the required repositories.
    pub archived: Option<Lsn>,
    pub distance: Distance,
    pub diverged: Option<Lsn>,
    pub gaps: Vec<GapFact>,
    /// Before a repository was asked, there may be more.
    pub gaps_known: bool,
    pub slot_name: String,
    pub slot: SlotFacts,
    /// Segments and bytes that wait for an upload.
    pub queue: Option<(u64, u64)>,
    pub spool_free_bytes: Option<u64>,
    /// In the order of `Stage::ALL`.
    pub wal_bytes: [u64; Stage::ALL.len()],
    pub repositories: Vec<RepositorySnapshot>,
    /// How long waiting commits returned without the repositories' word, since the start.
    pub unguarded: Duration,
    pub backup_running: bool,
    pub last_backup: Option<BackupFacts>,
    pub backup_failures: u64,
    pub window_start: Option<PgTime>,
}

#[derive(Clone, Debug)]
pub struct RepositorySnapshot {
    pub name: String,
    pub url: String,
    pub required: bool,
    pub archived: Option<Lsn>,
    /// What the repository tells its readers; `complete_until` is never shown beyond it.
    pub covered: Option<PgTime>,
    pub last_error: Option<String>,
    pub segments_archived: u64,
    pub upload_seconds: HistogramSnapshot,
    pub upload_retries: u64,
    pub upload_failures: u64,
}

impl Snapshot {
    /// No cause stands that is more than a note. Unknown positions raise one, so this is never true without proof.
    pub fn healthy(&self) -> bool {
        !self.causes.iter().any(|cause| cause.code.is_unhealthy())
    }

    pub fn has_cause(&self, code: CauseCode) -> bool {
        self.causes.iter().any(|cause| cause.code == code)
    }
}
