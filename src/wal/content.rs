//! Reads what an interesting record says, from its bytes in whatever pieces they come, in constant memory.
//!
//! A commit record may be megabytes long (its subtransactions, dropped files and invalidation messages), and what is wanted
//! stands at its beginning and near its end. So lists are counted off instead of kept.

use super::page::{WalVersion, u16_at, u32_at, u64_at};
use super::record::{RECORD_HEADER_LEN, RecordHeader, RecordKind, TransactionEnd, info, rmgr};
use super::{CheckpointMark, Lsn, ParameterChange, PgTime};

// Block ids of `XLogRecordDataHeaderShort` and the other headers that are not of a block: xlogrecord.h.
const DATA_SHORT: u8 = 255;
const DATA_LONG: u8 = 254;
const ORIGIN: u8 = 253;
const TOPLEVEL_XID: u8 = 252;
const BLOCK_ID_MAX: u8 = 32;

const BLOCK_HAS_IMAGE: u8 = 0x10;
const BLOCK_SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;

// `xl_xact_xinfo` in xact.h. The parts follow each other in the order of `ParseCommitRecord` (xactdesc.c).
const HAS_DATABASE: u32 = 1 << 0;
const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_TWO_PHASE: u32 = 1 << 4;
/// Since 15.
const HAS_DROPPED_STATISTICS: u32 = 1 << 8;

/// `sizeof` of `RelFileLocator`, `SharedInvalidationMessage`.
const RELATION_LEN: u64 = 12;
const INVALIDATION_LEN: u64 = 16;

/// Enough for the longest fixed part that is read: `xl_restore_point` has 72 bytes, a checkpoint's time ends at 72.
const FIELD_MAX: usize = 80;

/// `MAXFNAMELEN`, the room for a restore point's name with its terminating zero.
const RESTORE_POINT_NAME_MAX: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    BlockId,
    Block,
    Image { same_relation: bool },
    DataLengthShort,
    DataLengthLong,
    Data,
    TransactionTime,
    Count { of: u32 },
    TwoPhaseXid,
    Done,
    Failed,
}

/// What a whole record says, given its bytes after the header.
#[inline]
pub(super) fn read_whole(version: WalVersion, lsn: Lsn, header: RecordHeader, body: &[u8]) -> RecordKind {
    // By far the commonest: the end of a transaction that says nothing but its time.
    if header.rmid == rmgr::TRANSACTION
        && header.info & info::XACT_HAS_INFO == 0
        && let [DATA_SHORT, 8, time @ ..] = body
        && let Some(&time) = time.first_chunk::<8>()
        && body.len() == 10
    {
        let time = PgTime::from_pg_micros(i64::from_le_bytes(time));
        return end_of_transaction(&header, TransactionEnd { time, ..TransactionEnd::of(header.xid) });
    }
    let mut reader = ContentReader::new(version, lsn, header);
    reader.feed(body);
    reader.finish()
}

#[inline]
fn end_of_transaction(header: &RecordHeader, end: TransactionEnd) -> RecordKind {
    let operation = header.info & info::XACT_OPERATION_MASK;
    let prepared = matches!(operation, info::COMMIT_PREPARED | info::ABORT_PREPARED);
    let end = TransactionEnd { prepared, ..end };
    match operation {
        info::COMMIT | info::COMMIT_PREPARED => RecordKind::Commit(end),
        _ => RecordKind::Abort(end),
    }
}

/// The reader of one record's bytes after its header.
#[derive(Clone, Debug)]
pub(super) struct ContentReader {
    version: WalVersion,
    lsn: Lsn,
    header: RecordHeader,
    stage: Stage,
    /// Bytes of the record that no stage has asked for yet.
    unclaimed: u64,
    /// Bytes to pass over before the field.
    skip: u64,
    /// Length of the field that the stage waits for, and how much of it is there.
    want: usize,
    have: usize,
    field: [u8; FIELD_MAX],
    /// Bytes of block images and block data, which stand between the headers and the record's own data.
    block_bytes: u64,
    data_len: u64,
    /// Parts of a transaction's end that are still to come.
    parts: u32,
    end: TransactionEnd,
    kind: RecordKind,
}

impl ContentReader {
    pub fn new(version: WalVersion, lsn: Lsn, header: RecordHeader) -> Self {
        let mut reader = Self {
            version,
            lsn,
            header,
            stage: Stage::BlockId,
            unclaimed: u64::from(header.total_len).saturating_sub(RECORD_HEADER_LEN as u64),
            skip: 0,
            want: 0,
            have: 0,
            field: [0; FIELD_MAX],
            block_bytes: 0,
            data_len: 0,
            parts: 0,
            end: TransactionEnd::of(header.xid),
            kind: RecordKind::Unreadable,
        };
        reader.next_fragment();
        reader.advance();
        reader
    }

    /// Takes the record's next bytes.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_done() {
            if self.skip > 0 {
                let passed = self.skip.min(bytes.len() as u64);
                self.skip -= passed;
                bytes = &bytes[passed as usize..]; // at most bytes.len()
            } else {
                let taken = (self.want - self.have).min(bytes.len());
                self.field[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
                self.have += taken;
                bytes = &bytes[taken..];
            }
            self.advance();
        }
    }

    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done | Stage::Failed)
    }

    /// What the record says; `Unreadable` if its bytes were not laid out as they must be.
    pub fn finish(self) -> RecordKind {
        if self.stage == Stage::Done { self.kind } else { RecordKind::Unreadable }
    }

    fn advance(&mut self) {
        while self.skip == 0 && self.have == self.want && !self.is_done() {
            self.step();
        }
    }

    /// Passes over `skip` bytes, then waits for `want` bytes as `stage`'s field. The record must have that many left.
    fn expect(&mut self, stage: Stage, skip: u64, want: usize) {
        match self.unclaimed.checked_sub(skip + want as u64) {
            Some(left) if want <= FIELD_MAX => {
                (self.unclaimed, self.stage, self.skip, self.want, self.have) = (left, stage, skip, want, 0);
            }
            _ => self.stage = Stage::Failed,
        }
    }

    /// After the headers of one fragment, passing over `skip` bytes that end it.
    fn next_fragment_after(&mut self, skip: u64) {
        // `DecodeXLogRecord`: headers go on for as long as more bytes are left than the fragments before have claimed.
        if self.unclaimed > self.block_bytes + skip {
            self.expect(Stage::BlockId, skip, 1);
        } else {
            self.block_bytes += skip;
            self.data_len = 0;
            self.begin_data();
        }
    }

    fn next_fragment(&mut self) {
        self.next_fragment_after(0);
    }

    fn step(&mut self) {
        match self.stage {
            Stage::BlockId => match self.field[0] {
                DATA_SHORT => self.expect(Stage::DataLengthShort, 0, 1),
                DATA_LONG => self.expect(Stage::DataLengthLong, 0, 4),
                ORIGIN => self.next_fragment_after(2),
                TOPLEVEL_XID if self.version >= WalVersion::V14 => self.next_fragment_after(4),
                0..=BLOCK_ID_MAX => self.expect(Stage::Block, 0, 3),
                _ => self.stage = Stage::Failed,
            },
            Stage::Block => {
                let (flags, data_len) = (self.field[0], u16_at(&self.field, 1));
                self.block_bytes += u64::from(data_len);
                let same_relation = flags & BLOCK_SAME_RELATION != 0;
                if flags & BLOCK_HAS_IMAGE != 0 {
                    self.expect(Stage::Image { same_relation }, 0, 5);
                } else {
                    self.next_fragment_after(block_reference_len(same_relation));
                }
            }
            Stage::Image { same_relation } => {
                let (image_len, flags) = (u16_at(&self.field, 0), self.field[4]);
                self.block_bytes += u64::from(image_len);
                // 15 renumbered the flags: one per compression method instead of one for "compressed".
                let compressed = if self.version >= WalVersion::V15 { 0x04 | 0x08 | 0x10 } else { 0x02 };
                let hole_len = if flags & compressed != 0 && flags & IMAGE_HAS_HOLE != 0 { 2 } else { 0 };
                self.next_fragment_after(hole_len + block_reference_len(same_relation));
            }
            Stage::DataLengthShort => {
                self.data_len = u64::from(self.field[0]);
                self.begin_data();
            }
            Stage::DataLengthLong => {
                self.data_len = u64::from(u32_at(&self.field, 0));
                self.begin_data();
            }
            Stage::Data => self.decode_data(),
            Stage::TransactionTime => {
                self.end.time = PgTime::from_pg_micros(u64_at(&self.field, 0) as i64); // the same 64 bits
                self.parts = if self.header.info & info::XACT_HAS_INFO != 0 { u32_at(&self.field, 8) } else { 0 };
                let has_database = self.take_part(HAS_DATABASE);
                self.next_part(if has_database { 8 } else { 0 });
            }
            Stage::Count { of } => self.count_part(of),
            Stage::TwoPhaseXid => {
                self.end.xid = u32_at(&self.field, 0);
                self.parts = 0;
                self.next_part(0);
            }
            Stage::Done | Stage::Failed => {}
        }
    }

    /// The headers are read: what follows is the blocks' bytes, then the record's own data.
    fn begin_data(&mut self) {
        if self.unclaimed != self.block_bytes + self.data_len {
            self.stage = Stage::Failed;
        } else if self.header.rmid == rmgr::TRANSACTION {
            let want = if self.header.info & info::XACT_HAS_INFO != 0 { 12 } else { 8 };
            self.expect(Stage::TransactionTime, self.block_bytes, want);
        } else {
            // At most FIELD_MAX.
            let want = self.data_len.min(FIELD_MAX as u64) as usize;
            self.expect(Stage::Data, self.block_bytes, want);
        }
    }

    fn take_part(&mut self, part: u32) -> bool {
        let has = self.parts & part != 0;
        self.parts &= !part;
        has
    }

    /// Asks for the next part of a transaction's end, passing over `skip` bytes that are left of the one before.
    fn next_part(&mut self, skip: u64) {
        let counted = [HAS_SUBTRANSACTIONS, HAS_RELATIONS, HAS_DROPPED_STATISTICS, HAS_INVALIDATIONS];
        if self.version < WalVersion::V15 {
            self.parts &= !HAS_DROPPED_STATISTICS;
        }
        if let Some(&of) = counted.iter().find(|&&part| self.parts & part != 0) {
            self.parts &= !of;
            self.expect(Stage::Count { of }, skip, 4);
        } else if self.take_part(HAS_TWO_PHASE) {
            self.expect(Stage::TwoPhaseXid, skip, 4);
        } else {
            self.finish_transaction();
        }
    }

    fn count_part(&mut self, of: u32) {
        let count = u32_at(&self.field, 0);
        if count > i32::MAX as u32 {
            self.stage = Stage::Failed; // PostgreSQL's counts are signed
            return;
        }
        let item_len = match of {
            HAS_SUBTRANSACTIONS => {
                self.end.subtransactions = count;
                4
            }
            HAS_RELATIONS => {
                self.end.dropped_relations = count;
                RELATION_LEN
            }
            // `xl_xact_stats_item`: 18 widened the object's id to 64 bits.
            HAS_DROPPED_STATISTICS if self.version >= WalVersion::V18 => 16,
            HAS_DROPPED_STATISTICS => 12,
            _ => INVALIDATION_LEN,
        };
        self.next_part(u64::from(count) * item_len);
    }

    fn finish_transaction(&mut self) {
        self.kind = end_of_transaction(&self.header, self.end);
        self.stage = Stage::Done;
    }

    fn decode_data(&mut self) {
        match self.decode(&self.field[..self.want]) {
            Some(kind) => (self.kind, self.stage) = (kind, Stage::Done),
            None => self.stage = Stage::Failed,
        }
    }

    /// `None` if the data is shorter than its struct.
    fn decode(&self, data: &[u8]) -> Option<RecordKind> {
        let need = |len: usize| (data.len() >= len).then_some(());
        let time_at = |at| PgTime::from_pg_micros(u64_at(data, at) as i64); // the same 64 bits
        let number_at = |at| u32_at(data, at) as i32; // the same 32 bits
        let operation = self.header.info & 0xF0;
        Some(match (self.header.rmid, operation) {
            (rmgr::XLOG, info::CHECKPOINT_SHUTDOWN | info::CHECKPOINT_ONLINE) => {
                // `CheckPoint` in pg_control.h: redo at 0, ThisTimeLineID at 8, time (seconds since 1970) at 64.
                need(72)?;
                RecordKind::Checkpoint(CheckpointMark {
                    lsn: self.lsn,
                    redo: Lsn::new(u64_at(data, 0)),
                    timeline: u32_at(data, 8),
                    time: PgTime::from_unix_seconds(u64_at(data, 64) as i64), // the same 64 bits
                })
            }
            (rmgr::XLOG, info::SWITCH) => RecordKind::Switch,
            (rmgr::XLOG, info::PARAMETER_CHANGE) => {
                // `xl_parameter_change` in xlog_internal.h.
                need(24)?;
                RecordKind::ParameterChange(ParameterChange {
                    lsn: self.lsn,
                    max_connections: number_at(0),
                    max_worker_processes: number_at(4),
                    max_wal_senders: number_at(8),
                    max_prepared_xacts: number_at(12),
                    max_locks_per_xact: number_at(16),
                    wal_level: number_at(20),
                })
            }
            (rmgr::XLOG, info::RESTORE_POINT) => {
                need(8 + RESTORE_POINT_NAME_MAX)?;
                let name = &data[8..8 + RESTORE_POINT_NAME_MAX];
                let name = name.split(|&byte| byte == 0).next().unwrap_or(name);
                RecordKind::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time: time_at(0) }
            }
            (rmgr::XLOG, info::END_OF_RECOVERY) => {
                need(16)?;
                let (timeline, previous_timeline) = (u32_at(data, 8), u32_at(data, 12));
                RecordKind::EndOfRecovery { time: time_at(0), timeline, previous_timeline }
            }
            (rmgr::XLOG, info::OVERWRITE_CONTRECORD) => {
                need(16)?;
                RecordKind::OverwriteContrecord { overwritten: Lsn::new(u64_at(data, 0)), time: time_at(8) }
            }
            (rmgr::STORAGE, info::SMGR_TRUNCATE) => {
                need(4)?;
                RecordKind::TruncateFile { blocks: u32_at(data, 0) }
            }
            (rmgr::DATABASE, _) => {
                need(8)?;
                RecordKind::DropDatabase { database: u32_at(data, 0), directories: u32_at(data, 4) }
            }
            (rmgr::HEAP, _) => {
                need(9)?;
                RecordKind::Truncate { relations: u32_at(data, 4) }
            }
            _ => return None,
        })
    }
}

/// Relation (unless it is the block before's) and block number.
const fn block_reference_len(same_relation: bool) -> u64 {
    if same_relation { 4 } else { RELATION_LEN + 4 }
}
