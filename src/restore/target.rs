use std::fmt;

use crate::repository::BackupId;
use crate::wal::{Lsn, PgTime, TimelineId};

/// What a restore shall reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Time(PgTime),
    Lsn(Lsn),
    Xid(u32),
    Name(String),
    /// All that is held.
    Latest,
    /// The consistent point of a backup.
    Immediate,
}

/// What PostgreSQL does when the target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetAction {
    Promote,
    Pause,
    Shutdown,
}

impl TargetAction {
    /// The value of `recovery_target_action`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A target with everything that may be said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub target: Target,
    /// Leave the target itself out. Only for time, LSN and xid.
    pub exclusive: bool,
    /// `None`: the branch of the newest timeline.
    pub timeline: Option<TimelineId>,
    /// `None`: the newest one that serves.
    pub backup: Option<BackupId>,
    pub action: TargetAction,
}

impl Request {
    pub fn latest() -> Self {
        Self { target: Target::Latest, exclusive: false, timeline: None, backup: None, action: TargetAction::Promote }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Time(time) => write!(f, "time {time}"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point \"{name}\""),
            Self::Latest => f.write_str("the latest state held"),
            Self::Immediate => f.write_str("the consistent point of a backup"),
        }
    }
}
