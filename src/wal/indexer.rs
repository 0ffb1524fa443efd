//! Makes the summary of a stretch of WAL while it passes by.

use super::record::{RecordInfo, RecordKind};
use super::{
    CommitMark, Drop, DropKind, Lsn, PageError, PgTime, RecordScanner, RestorePoint, ScanStart, SegmentSize, Summary,
    SystemIdentifier, TimelineId, TransactionEnd,
};

/// Where an indexer begins.
#[derive(Clone, Copy, Debug)]
pub struct IndexerStart {
    pub timeline: TimelineId,
    /// The start of a page. To take up a stream where the object before left a record open, begin at the page that holds
    /// its `open_record` and throw the first cut away: a record whose beginning was not seen is not indexed.
    pub position: Lsn,
    pub segment_size: SegmentSize,
    /// Checked at each segment start; `None` accepts any.
    pub system_identifier: Option<SystemIdentifier>,
    /// The highest commit time on the branch before `position`, as the summary before tells it.
    pub branch_max_time: Option<PgTime>,
}

/// Indexes the raw WAL of one timeline, fed contiguously in pieces of any size, and checks its page headers.
///
/// Constant work per record and page, no copies. What the fields of a summary mean: docs/format.md.
#[derive(Clone, Debug)]
pub struct Indexer {
    scanner: RecordScanner,
    tally: Tally,
    /// Open at the last cut.
    continues_from: Option<Lsn>,
    branch_max_time: Option<PgTime>,
}

/// The records since the last cut. What every record touches stands here as plain numbers.
#[derive(Clone, Debug)]
struct Tally {
    records: u64,
    last_record: Lsn,
    valid_end: Lsn,
    /// Lowest xid minus 1: so 0, which is no xid, becomes the highest number and needs no branch.
    min_xid_less_1: u32,
    max_xid: u32,
    /// The rare rest.
    summary: Summary,
}

impl Indexer {
    /// Panics if `position` is not the start of a page.
    pub fn new(start: IndexerStart) -> Self {
        let IndexerStart { timeline, position, segment_size, system_identifier, branch_max_time } = start;
        Self {
            scanner: RecordScanner::new(ScanStart { timeline, position, segment_size, system_identifier }),
            tally: Tally::new(),
            continues_from: None,
            branch_max_time,
        }
    }

    /// Takes the bytes at `position()`. After an error nothing more is taken: the same error again.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), PageError> {
        let tally = &mut self.tally;
        self.scanner.feed(
            bytes,
            #[inline(always)]
            |record| tally.add(record),
        )
    }

    /// The summary of what was fed since the last cut, or since the beginning. A cut may be at any byte.
    pub fn cut(&mut self) -> Summary {
        let tally = std::mem::replace(&mut self.tally, Tally::new());
        let mut summary = tally.summary;
        summary.records = tally.records;
        summary.last_record = (tally.records > 0).then_some(tally.last_record);
        summary.valid_end = (tally.records > 0).then_some(tally.valid_end);
        summary.min_xid = tally.min_xid_less_1.checked_add(1);
        summary.max_xid = (tally.max_xid > 0).then_some(tally.max_xid);
        summary.continues_from = self.continues_from;
        summary.open_record = self.scanner.open_record();
        summary.max_time = self.branch_max_time.max(summary.max_time_here);

        self.continues_from = summary.open_record;
        self.branch_max_time = summary.max_time;
        summary
    }

    /// The next byte that it wants.
    pub fn position(&self) -> Lsn {
        self.scanner.position()
    }

    /// PostgreSQL's major version as the pages tell it; `None` before the first page.
    pub fn major(&self) -> Option<u32> {
        self.scanner.major()
    }
}

impl Tally {
    fn new() -> Self {
        Self {
            records: 0,
            last_record: Lsn::ZERO,
            valid_end: Lsn::ZERO,
            min_xid_less_1: u32::MAX,
            max_xid: 0,
            summary: Summary::default(),
        }
    }

    #[inline(always)]
    fn add(&mut self, record: RecordInfo) {
        self.records += 1;
        self.last_record = record.lsn;
        self.valid_end = record.end;
        self.min_xid_less_1 = self.min_xid_less_1.min(record.xid.wrapping_sub(1));
        self.max_xid = self.max_xid.max(record.xid);
        if !matches!(record.kind, RecordKind::Other) {
            self.add_content(record);
        }
    }

    #[inline(never)]
    fn add_content(&mut self, record: RecordInfo) {
        let RecordInfo { lsn, xid, .. } = record;
        match record.kind {
            RecordKind::Commit(end) => {
                self.summary.commits += 1;
                self.add_end(lsn, end);
                if end.dropped_relations > 0 {
                    let (time, count) = (Some(end.time), end.dropped_relations);
                    self.add_drop(Drop { lsn, xid: end.xid, time, kind: DropKind::Relation, count });
                }
            }
            RecordKind::Abort(end) => {
                self.summary.aborts += 1;
                self.add_end(lsn, end);
            }
            RecordKind::RestorePoint { name, time } => {
                if has_room(&self.summary.restore_points, &mut self.summary.truncated) {
                    self.summary.restore_points.push(RestorePoint { name, lsn, time });
                }
            }
            RecordKind::ParameterChange(change) => {
                if has_room(&self.summary.parameter_changes, &mut self.summary.truncated) {
                    self.summary.parameter_changes.push(change);
                }
            }
            RecordKind::Checkpoint(checkpoint) => self.summary.checkpoint = Some(checkpoint),
            // Replaying it removes the files at once, before the transaction's commit record: so it is the mark itself.
            RecordKind::DropDatabase { .. } => {
                self.add_drop(Drop { lsn, xid, time: None, kind: DropKind::Database, count: 1 });
            }
            RecordKind::Truncate { relations } => {
                self.add_drop(Drop { lsn, xid, time: None, kind: DropKind::Truncate, count: relations });
            }
            // VACUUM, which gives back empty pages, has no transaction id.
            RecordKind::TruncateFile { blocks: 0 } if xid != 0 => {
                self.add_drop(Drop { lsn, xid, time: None, kind: DropKind::Truncate, count: 1 });
            }
            RecordKind::Unreadable => self.summary.truncated = true,
            RecordKind::TruncateFile { .. }
            | RecordKind::EndOfRecovery { .. }
            | RecordKind::OverwriteContrecord { .. }
            | RecordKind::Switch
            | RecordKind::Other => {}
        }
    }

    fn add_end(&mut self, lsn: Lsn, end: TransactionEnd) {
        // A prepared transaction's end is written without its xid in the record's header.
        self.min_xid_less_1 = self.min_xid_less_1.min(end.xid.wrapping_sub(1));
        self.max_xid = self.max_xid.max(end.xid);
        let mark = CommitMark { time: end.time, xid: end.xid, lsn };
        self.summary.first_commit.get_or_insert(mark);
        self.summary.last_commit = Some(mark);
        self.summary.max_time_here = self.summary.max_time_here.max(Some(end.time));
    }

    fn add_drop(&mut self, drop: Drop) {
        if has_room(&self.summary.drops, &mut self.summary.truncated) {
            self.summary.drops.push(drop);
        }
    }
}

fn has_room<T>(list: &[T], truncated: &mut bool) -> bool {
    let room = list.len() < Summary::LIST_MAX;
    *truncated |= !room;
    room
}
