//! WAL records: their header, and what the interesting ones say.
//!
//! Source: `XLogRecord` in PostgreSQL `src/include/access/xlogrecord.h`, the resource managers in
//! `src/include/access/rmgrlist.h` and each one's `…_xlog.h`; the same in 13 to 18 where not said otherwise.

use super::page::{WalVersion, u32_at};
use super::{CheckpointMark, Lsn, ParameterChange, PgTime};

/// `SizeOfXLogRecord`: the fixed header that every record begins with.
pub const RECORD_HEADER_LEN: usize = 24;

/// PostgreSQL cannot read back a longer record (`MaxAllocSize` in `xlogreader.c`; since 16 it does not write one either).
pub const RECORD_LEN_MAX: u32 = (1 << 30) - 1;

/// Resource managers, as numbered in `rmgrlist.h`.
pub mod rmgr {
    pub const XLOG: u8 = 0;
    pub const TRANSACTION: u8 = 1;
    pub const STORAGE: u8 = 2;
    pub const DATABASE: u8 = 4;
    pub const HEAP: u8 = 10;
}

/// A complete record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Where it starts.
    pub lsn: Lsn,
    /// Just after its last byte, without alignment padding.
    pub end: Lsn,
    /// `xl_tot_len`: bytes of the record itself, page headers between them not counted.
    pub total_len: u32,
    /// `xl_rmid`.
    pub rmid: u8,
    /// `xl_info`.
    pub info: u8,
    /// `xl_xid`, 0 for none. That of a prepared transaction's end is in `kind`.
    pub xid: u32,
    pub kind: RecordKind,
}

/// What a record says, for the kinds that a reader of an archive asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordKind {
    Commit(TransactionEnd),
    Abort(TransactionEnd),
    RestorePoint {
        name: String,
        time: PgTime,
    },
    ParameterChange(ParameterChange),
    Checkpoint(CheckpointMark),
    /// A promotion without a checkpoint: the first record of its timeline.
    EndOfRecovery {
        time: PgTime,
        timeline: u32,
        previous_timeline: u32,
    },
    /// The record at `overwritten` was cut off by a crash and never finished.
    OverwriteContrecord {
        overwritten: Lsn,
        time: PgTime,
    },
    /// The rest of the segment holds nothing.
    Switch,
    /// `DROP DATABASE`: its directories, one per tablespace.
    DropDatabase {
        database: u32,
        directories: u32,
    },
    /// `TRUNCATE`, only written with `wal_level = logical`; else a truncated table shows as a dropped relation.
    Truncate {
        relations: u32,
    },
    /// A relation's file was cut to `blocks` blocks: by VACUUM, or by truncating what the transaction itself made.
    TruncateFile {
        blocks: u32,
    },
    /// One of the above by its header, but not laid out as its PostgreSQL major writes it.
    Unreadable,
    Other,
}

/// The end of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransactionEnd {
    /// Stamped before the record is inserted, so times are not ascending in WAL order.
    pub time: PgTime,
    /// Of the transaction that ended: for a prepared one not the record's own `xid`.
    pub xid: u32,
    /// `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    pub prepared: bool,
    pub subtransactions: u32,
    /// Relation files removed: dropped, truncated or rewritten by a commit, created in vain by an abort.
    pub dropped_relations: u32,
}

impl TransactionEnd {
    /// With nothing known but the transaction.
    pub(super) const fn of(xid: u32) -> Self {
        let time = PgTime::from_pg_micros(0);
        Self { time, xid, prepared: false, subtransactions: 0, dropped_relations: 0 }
    }
}

/// The fields of a record's header that are used.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordHeader {
    pub total_len: u32,
    pub xid: u32,
    pub info: u8,
    pub rmid: u8,
}

impl RecordHeader {
    #[inline(always)]
    pub fn parse(bytes: &[u8; RECORD_HEADER_LEN]) -> Self {
        Self { total_len: u32_at(bytes, 0), xid: u32_at(bytes, 4), info: bytes[16], rmid: bytes[17] }
    }
}

/// Which records have their content read: one bit per upper half of `xl_info`, for the first 16 resource managers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interest([u16; 16]);

impl Interest {
    pub fn new(version: WalVersion) -> Self {
        const fn bits(infos: &[u8]) -> u16 {
            let (mut bits, mut at) = (0u16, 0);
            while at < infos.len() {
                bits |= 1 << (infos[at] >> 4);
                at += 1;
            }
            bits
        }
        let mut table = [0; 16];
        table[rmgr::XLOG as usize] = bits(&[
            info::CHECKPOINT_SHUTDOWN,
            info::CHECKPOINT_ONLINE,
            info::SWITCH,
            info::PARAMETER_CHANGE,
            info::RESTORE_POINT,
            info::END_OF_RECOVERY,
            info::OVERWRITE_CONTRECORD,
        ]);
        table[rmgr::TRANSACTION as usize] = bits(&[
            info::COMMIT,
            info::ABORT,
            info::COMMIT_PREPARED,
            info::ABORT_PREPARED,
            info::COMMIT | info::XACT_HAS_INFO,
            info::ABORT | info::XACT_HAS_INFO,
            info::COMMIT_PREPARED | info::XACT_HAS_INFO,
            info::ABORT_PREPARED | info::XACT_HAS_INFO,
        ]);
        table[rmgr::STORAGE as usize] = bits(&[info::SMGR_TRUNCATE]);
        table[rmgr::DATABASE as usize] = bits(&[info::dbase_drop(version)]);
        table[rmgr::HEAP as usize] = bits(&[info::HEAP_TRUNCATE, info::HEAP_TRUNCATE | info::HEAP_INIT_PAGE]);
        Self(table)
    }

    #[inline(always)]
    pub fn has(&self, header: &RecordHeader) -> bool {
        let bits = self.0[usize::from(header.rmid & 15)];
        header.rmid < 16 && (bits >> (header.info >> 4)) & 1 != 0
    }
}

/// Values of `xl_info` (its upper four bits), each meant within its resource manager.
pub(super) mod info {
    use super::WalVersion;

    // pg_control.h
    pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    pub const CHECKPOINT_ONLINE: u8 = 0x10;
    pub const SWITCH: u8 = 0x40;
    pub const PARAMETER_CHANGE: u8 = 0x60;
    pub const RESTORE_POINT: u8 = 0x70;
    pub const END_OF_RECOVERY: u8 = 0x90;
    pub const OVERWRITE_CONTRECORD: u8 = 0xD0;

    // xact.h
    pub const COMMIT: u8 = 0x00;
    pub const ABORT: u8 = 0x20;
    pub const COMMIT_PREPARED: u8 = 0x30;
    pub const ABORT_PREPARED: u8 = 0x40;
    pub const XACT_OPERATION_MASK: u8 = 0x70;
    pub const XACT_HAS_INFO: u8 = 0x80;

    // storage_xlog.h, heapam_xlog.h
    pub const SMGR_TRUNCATE: u8 = 0x20;
    pub const HEAP_TRUNCATE: u8 = 0x30;
    pub const HEAP_INIT_PAGE: u8 = 0x80;

    /// dbcommands_xlog.h: 15 put `XLOG_DBASE_CREATE_WAL_LOG` before it.
    pub const fn dbase_drop(version: WalVersion) -> u8 {
        if version.major() >= 15 { 0x20 } else { 0x10 }
    }
}
