//! The JSON document of `walden status` and `/status`.

use serde::{Deserialize, Serialize};

use super::cause::CauseCode;
use super::facts::BackupFacts;
use super::snapshot::Snapshot;
use crate::wal::{Lsn, PgTime, SystemIdentifier, TimelineId};

/// Unknown is `null`, never absent. LSNs as PostgreSQL prints them, times in RFC 3339 UTC, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusJson {
    pub schema: u32,
    pub healthy: bool,
    pub causes: Vec<CauseJson>,
    pub system_identifier: Option<SystemIdentifier>,
    pub timeline: Option<TimelineId>,
    pub server_lsn: Option<Lsn>,
    pub received_lsn: Option<Lsn>,
    pub durable_lsn: Option<Lsn>,
    /// The lowest of the required repositories, contiguous, pieces of the open segment included.
    pub archived_lsn: Option<Lsn>,
    pub lag_bytes: Option<u64>,
    pub lag_seconds: Option<f64>,
    pub rpo_bytes: Option<u64>,
    pub rpo_seconds: Option<f64>,
    /// Every commit that the server acknowledged before this time is archived.
    pub complete_until: Option<PgTime>,
    /// The first position where the server's WAL differs from what is held; `null` if no difference was found.
    pub diverged: Option<Lsn>,
    pub gaps: Vec<GapJson>,
    pub slot: SlotJson,
    pub queue: QueueJson,
    pub repositories: Vec<RepositoryJson>,
    pub last_backup: Option<LastBackupJson>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CauseJson {
    /// Text rather than `CauseCode`, so that a newer agent's codes can be read too.
    pub code: String,
    pub message: String,
    pub since: PgTime,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GapJson {
    pub timeline: TimelineId,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub since: PgTime,
    pub reason: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SlotJson {
    pub name: Option<String>,
    pub restart_lsn: Option<Lsn>,
    pub wal_status: Option<String>,
    pub retained_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueueJson {
    pub segments: Option<u64>,
    pub bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RepositoryJson {
    pub name: String,
    pub url: String,
    pub archived_lsn: Option<Lsn>,
    pub last_error: Option<String>,
}

/// The fields have the names that they have in `walden list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastBackupJson {
    pub id: String,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub start_time: PgTime,
    pub stop_time: PgTime,
    pub duration_seconds: f64,
    pub size_bytes: u64,
    pub stored_bytes: u64,
}

/// The version of the document.
const SCHEMA: u32 = 1;

impl StatusJson {
    /// What can be said when no agent answers: nothing but that.
    pub fn unreachable(message: impl Into<String>, now: PgTime) -> Self {
        let cause =
            CauseJson { code: CauseCode::AgentUnreachable.as_str().into(), message: message.into(), since: now };
        Self { schema: SCHEMA, causes: vec![cause], ..Self::default() }
    }
}

impl Snapshot {
    /// Never later than what the required repositories tell their readers.
    pub(super) fn shown_complete_until(&self) -> Option<PgTime> {
        let required = self.repositories.iter().filter(|repository| repository.required);
        let told = required.filter_map(|repository| repository.covered).min();
        self.distance.complete_until.map(|until| told.map_or(until, |told| told.min(until)))
    }

    pub fn status(&self) -> StatusJson {
        let distance = &self.distance;
        let causes = self.causes.iter().map(|cause| CauseJson {
            code: cause.code.as_str().into(),
            message: cause.message.clone(),
            since: cause.since,
        });
        let gaps = self.gaps.iter().map(|gap| GapJson {
            timeline: gap.timeline,
            from_lsn: gap.from_lsn,
            to_lsn: gap.to_lsn,
            since: gap.since,
            reason: gap.reason.clone(),
        });
        let repositories = self.repositories.iter().map(|repository| RepositoryJson {
            name: repository.name.clone(),
            url: repository.url.clone(),
            archived_lsn: repository.archived,
            last_error: repository.last_error.clone(),
        });
        StatusJson {
            schema: SCHEMA,
            healthy: self.healthy(),
            causes: causes.collect(),
            system_identifier: self.system_identifier,
            timeline: self.timeline,
            server_lsn: distance.server,
            received_lsn: self.received,
            durable_lsn: self.durable,
            archived_lsn: self.archived,
            lag_bytes: distance.lag_bytes,
            lag_seconds: distance.lag_seconds,
            rpo_bytes: distance.rpo_bytes,
            rpo_seconds: distance.rpo_seconds,
            complete_until: self.shown_complete_until(),
            diverged: self.diverged,
            gaps: gaps.collect(),
            slot: SlotJson {
                name: Some(self.slot_name.clone()),
                restart_lsn: self.slot.restart_lsn,
                wal_status: self.slot.wal_status.clone(),
                retained_bytes: self.slot.retained_bytes,
            },
            queue: QueueJson {
                segments: self.queue.map(|(segments, _)| segments),
                bytes: self.queue.map(|(_, bytes)| bytes),
            },
            repositories: repositories.collect(),
            last_backup: self.last_backup.as_ref().map(LastBackupJson::from),
        }
    }
}

impl From<&BackupFacts> for LastBackupJson {
    fn from(backup: &BackupFacts) -> Self {
        Self {
            id: backup.id.clone(),
            timeline: backup.timeline,
            start_lsn: backup.start_lsn,
            stop_lsn: backup.stop_lsn,
            start_time: backup.start_time,
            stop_time: backup.stop_time,
            duration_seconds: backup.duration_seconds,
            size_bytes: backup.size_bytes,
            stored_bytes: backup.stored_bytes,
        }
    }
}
