use std::time::Duration;

use super::board::{Board, BoardRepository};
use super::counters::{Counter, Histogram, Position};
use super::snapshot::RepositorySnapshot;
use crate::wal::{Lsn, PgTime};

/// What the board keeps of one repository without a lock.
pub struct RepositoryState {
    pub fixed: BoardRepository,
    pub archived: Position,
    /// Until when the repository itself says that it is complete; microseconds as in `PgTime`.
    covered: Position,
    segments_archived: Counter,
    upload_seconds: Histogram,
    upload_retries: Counter,
    upload_failures: Counter,
}

impl RepositoryState {
    pub fn new(fixed: BoardRepository) -> Self {
        Self {
            fixed,
            archived: Position::default(),
            covered: Position::default(),
            segments_archived: Counter::default(),
            upload_seconds: Histogram::default(),
            upload_retries: Counter::default(),
            upload_failures: Counter::default(),
        }
    }

    pub fn snapshot(&self, last_error: Option<String>) -> RepositorySnapshot {
        RepositorySnapshot {
            name: self.fixed.name.clone(),
            url: self.fixed.url.clone(),
            required: self.fixed.required,
            archived: self.archived.get(),
            covered: self.covered.get().map(|micros| PgTime::from_pg_micros(micros.get().cast_signed())),
            last_error,
            segments_archived: self.segments_archived.get(),
            upload_seconds: self.upload_seconds.snapshot(),
            upload_retries: self.upload_retries.get(),
            upload_failures: self.upload_failures.get(),
        }
    }
}

/// What concerns one repository. A handle: clones share it.
#[derive(Clone)]
pub struct RepositoryBoard {
    board: Board,
    index: usize,
}

impl RepositoryBoard {
    pub(super) fn new(board: Board, index: usize) -> Self {
        Self { board, index }
    }

    fn state(&self) -> &RepositoryState {
        self.board.repository(self.index)
    }

    /// Notes what was written into the repository for its readers.
    pub fn set_covered(&self, until: PgTime) {
        self.state().covered.set(Lsn::new(until.pg_micros().cast_unsigned()));
    }

    pub fn name(&self) -> &str {
        &self.state().fixed.name
    }

    /// Everything before it, without a hole, is in this repository; pieces of the open segment count.
    pub fn set_archived(&self, position: Lsn) {
        self.state().archived.set(position);
        self.board.count_archived();
    }

    pub fn archived(&self) -> Option<Lsn> {
        self.state().archived.get()
    }

    /// What failed last; `None` once it works again.
    pub fn set_error(&self, error: Option<String>) {
        self.board.set_repository_error(self.index, error);
    }

    pub fn segment_archived(&self) {
        self.state().segments_archived.add(1);
    }

    /// How long a successful upload took.
    pub fn observe_upload(&self, took: Duration) {
        self.state().upload_seconds.observe(took);
    }

    pub fn upload_retried(&self) {
        self.state().upload_retries.add(1);
    }

    pub fn upload_failed(&self) {
        self.state().upload_failures.add(1);
    }
}
