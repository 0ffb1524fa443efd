use std::fmt;

use crate::wal::PgTime;

/// Why the agent is not healthy. The codes are what scripts and alert rules depend on; messages are for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CauseCode {
    NotConnected,
    NoSql,
    SlotMissing,
    SlotLost,
    Gap,
    ContinuityUnproven,
    Diverged,
    OtherCluster,
    LeaseHeld,
    LeaseLost,
    UnexpectedSync,
    RemoteApply,
    SyncDelayed,
    SyncDegraded,
    StoreFailing,
    Conflict,
    SpoolFull,
    SpoolFailing,
    Lag,
    Rpo,
    SlotRetention,
    BackupFailed,
    PagesDamaged,
    ClockSkew,
    MetricsFailing,
    FailoverGap,
    Unshipped,
    AgentUnreachable,
}

impl CauseCode {
    pub const ALL: [CauseCode; 28] = [
        Self::NotConnected,
        Self::NoSql,
        Self::SlotMissing,
        Self::SlotLost,
        Self::Gap,
        Self::ContinuityUnproven,
        Self::Diverged,
        Self::OtherCluster,
        Self::LeaseHeld,
        Self::LeaseLost,
        Self::UnexpectedSync,
        Self::RemoteApply,
        Self::SyncDelayed,
        Self::SyncDegraded,
        Self::StoreFailing,
        Self::Conflict,
        Self::SpoolFull,
        Self::SpoolFailing,
        Self::Lag,
        Self::Rpo,
        Self::SlotRetention,
        Self::BackupFailed,
        Self::PagesDamaged,
        Self::ClockSkew,
        Self::MetricsFailing,
        Self::FailoverGap,
        Self::Unshipped,
        Self::AgentUnreachable,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotConnected => "not_connected",
            Self::NoSql => "no_sql",
            Self::SlotMissing => "slot_missing",
            Self::SlotLost => "slot_lost",
            Self::Gap => "gap",
            Self::ContinuityUnproven => "continuity_unproven",
            Self::Diverged => "diverged",
            Self::OtherCluster => "other_cluster",
            Self::LeaseHeld => "lease_held",
            Self::LeaseLost => "lease_lost",
            Self::UnexpectedSync => "unexpected_sync",
            Self::RemoteApply => "remote_apply",
            Self::SyncDelayed => "sync_delayed",
            Self::SyncDegraded => "sync_degraded",
            Self::StoreFailing => "store_failing",
            Self::Conflict => "conflict",
            Self::SpoolFull => "spool_full",
            Self::SpoolFailing => "spool_failing",
            Self::Lag => "lag",
            Self::Rpo => "rpo",
            Self::SlotRetention => "slot_retention",
            Self::BackupFailed => "backup_failed",
            Self::PagesDamaged => "pages_damaged",
            Self::ClockSkew => "clock_skew",
            Self::MetricsFailing => "metrics_failing",
            Self::FailoverGap => "failover_gap",
            Self::Unshipped => "unshipped",
            Self::AgentUnreachable => "agent_unreachable",
        }
    }

    /// Whether the agent is unhealthy while this cause stands: every one but `no_sql` and `failover_gap`.
    ///
    /// Without SQL the agent streams, ships and restores as well; a few facts are unknown and shown as such. Whatever SQL
    /// alone could have told and that matters (the server's flush position) is asked on a replication connection then. A standby
    /// without a slot loses nothing as long as it is none that one goes over to.
    pub const fn is_unhealthy(self) -> bool {
        !matches!(self, Self::NoSql | Self::FailoverGap)
    }
}

impl fmt::Display for CauseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A cause that stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    pub code: CauseCode,
    /// What, why and what to do, one line. The latest one told.
    pub message: String,
    /// When it was first raised, by the agent's clock.
    pub since: PgTime,
}
