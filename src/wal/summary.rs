use serde::{Deserialize, Serialize};

use super::{Lsn, PgTime};

/// A commit or abort record. `lsn` is where the record starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitMark {
    pub time: PgTime,
    pub xid: u32,
    pub lsn: Lsn,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePoint {
    pub name: String,
    pub lsn: Lsn,
    pub time: PgTime,
}

/// An `XLOG_PARAMETER_CHANGE` record: a standby or a recovery needs at least these values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterChange {
    pub lsn: Lsn,
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_xacts: i32,
    pub max_locks_per_xact: i32,
    pub wal_level: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropKind {
    Relation,
    Database,
    Truncate,
}

/// A transaction that removed data wholesale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    pub lsn: Lsn,
    pub xid: u32,
    pub time: Option<PgTime>,
    pub kind: DropKind,
    /// Relation files (or databases) removed.
    pub count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMark {
    pub lsn: Lsn,
    pub redo: Lsn,
    pub timeline: u32,
    pub time: PgTime,
}

/// What the records of a stretch of WAL say, kept so that one range read places a stored object in time.
///
/// A record belongs to the stretch that holds its last byte; `lsn` is always where it starts, so it may lie before.
/// A "commit" here is a commit or abort record, those of prepared transactions included. Meaning of each field: docs/format.md.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    pub continues_from: Option<Lsn>,
    pub last_record: Option<Lsn>,
    pub open_record: Option<Lsn>,
    pub valid_end: Option<Lsn>,
    pub first_commit: Option<CommitMark>,
    pub last_commit: Option<CommitMark>,
    /// Highest commit time from the beginning of the branch to the end of this stretch. It never falls along a branch.
    pub max_time: Option<PgTime>,
    pub max_time_here: Option<PgTime>,
    pub min_xid: Option<u32>,
    pub max_xid: Option<u32>,
    pub commits: u64,
    pub aborts: u64,
    pub records: u64,
    pub restore_points: Vec<RestorePoint>,
    pub parameter_changes: Vec<ParameterChange>,
    pub drops: Vec<Drop>,
    pub checkpoint: Option<CheckpointMark>,
    /// Lists were cut at `LIST_MAX`.
    pub truncated: bool,
}

impl Summary {
    /// Entries kept per list in one summary; what is beyond sets `truncated`.
    pub const LIST_MAX: usize = 4096;

    /// Adds the stretch that follows directly.
    pub fn append(&mut self, next: &Summary) {
        if self.records == 0 && self.continues_from.is_none() && self.open_record.is_none() {
            self.continues_from = next.continues_from;
        }
        self.last_record = next.last_record.or(self.last_record);
        self.open_record = next.open_record;
        self.valid_end = next.valid_end.or(self.valid_end);
        self.first_commit = self.first_commit.or(next.first_commit);
        self.last_commit = next.last_commit.or(self.last_commit);
        self.max_time = self.max_time.max(next.max_time);
        self.max_time_here = self.max_time_here.max(next.max_time_here);
        self.min_xid = match (self.min_xid, next.min_xid) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.max_xid = self.max_xid.max(next.max_xid);
        self.commits += next.commits;
        self.aborts += next.aborts;
        self.records += next.records;
        self.truncated |= next.truncated;
        self.truncated |= extend_bounded(&mut self.restore_points, &next.restore_points);
        self.truncated |= extend_bounded(&mut self.parameter_changes, &next.parameter_changes);
        self.truncated |= extend_bounded(&mut self.drops, &next.drops);
        self.checkpoint = next.checkpoint.or(self.checkpoint);
    }
}

fn extend_bounded<T: Clone>(list: &mut Vec<T>, more: &[T]) -> bool {
    let room = Summary::LIST_MAX.saturating_sub(list.len());
    list.extend(more.iter().take(room).cloned());
    more.len() > room
}
