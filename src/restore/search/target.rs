use crate::wal::{CommitMark, Lsn, PgTime};

/// What a recovery shall reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SearchTarget {
    /// Every commit up to `time`; with `exclusive` every commit before it.
    Time { time: PgTime, exclusive: bool },
    /// Through the first record that starts at or after `lsn`; with `exclusive` up to that record.
    Lsn { lsn: Lsn, exclusive: bool },
    /// Through the end of transaction `xid`, or up to it.
    Xid { xid: u32, exclusive: bool },
    /// Through the restore point of this name.
    Name(String),
    /// All that is held.
    Latest,
}

/// Where the recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Just before the record that starts here: `recovery_target_lsn` with `recovery_target_inclusive = off`.
    Before(Lsn),
    /// Just after the record that starts at `record` and ends at `end`: the same with `on`.
    Through { record: Lsn, end: Lsn },
}

impl Stop {
    /// `recovery_target_lsn`, which PostgreSQL compares with where records start.
    pub fn lsn(&self) -> Lsn {
        match *self {
            Self::Before(record) | Self::Through { record, .. } => record,
        }
    }

    /// `recovery_target_inclusive`.
    pub fn inclusive(&self) -> bool {
        matches!(self, Self::Through { .. })
    }

    /// How far the WAL is replayed, exclusive: a backup serves if it stopped at or before this.
    pub fn reached_at(&self) -> Lsn {
        match *self {
            Self::Before(record) => record,
            Self::Through { end, .. } => Lsn::new(end.get().next_multiple_of(8)),
        }
    }
}

/// An exact cut of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub stop: Stop,
    /// The last commit or abort record before the cut, and the first behind it; `None` if none is held there.
    pub last_kept: Option<CommitMark>,
    pub first_left_out: Option<CommitMark>,
}

/// The last complete record held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRecord {
    pub record: Lsn,
    pub end: Lsn,
}
