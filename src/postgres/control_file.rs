//! `global/pg_control`: what a cluster says of itself, without asking the server.

use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineId};

/// The parts of `pg_control` that backups and restores need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    pub system_identifier: SystemIdentifier,
    /// `PG_CONTROL_VERSION`: 1300 (PostgreSQL 13 to 16), 1700 or 1800.
    pub control_version: u32,
    pub catalog_version: u32,
    pub state: DatabaseState,
    /// When the file was last written, to the second.
    pub time: PgTime,
    /// The latest checkpoint record, and where its redo begins.
    pub checkpoint_lsn: Lsn,
    pub redo_lsn: Lsn,
    pub timeline: TimelineId,
    /// A standby's: it is consistent only after having replayed up to here.
    pub min_recovery_point: Lsn,
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_xacts: i32,
    pub max_locks_per_xact: i32,
    /// 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// 0: pages have no checksums.
    pub data_checksum_version: u32,
    pub segment_size: SegmentSize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatabaseState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    #[error("global/pg_control is only {length} bytes long")]
    Short { length: usize },
    #[error("global/pg_control is of version {version}, which Walden does not know (it knows PostgreSQL 13 to 18)")]
    Version { version: u32 },
    #[error("global/pg_control is damaged: its checksum is wrong")]
    Checksum,
    #[error("global/pg_control is damaged: {what}")]
    Content { what: &'static str },
}

/// Offsets in `ControlFileData` on 64-bit little-endian machines. They are the same from 13 to 18: what 17 and 18 added lies in
/// padding (`wal_level` of the checkpoint) or just before the checksum (`default_char_signedness`, 18).
///
/// Source: PostgreSQL `src/include/catalog/pg_control.h`; compared with files that 13 to 18 wrote.
mod at {
    pub const SYSTEM_IDENTIFIER: usize = 0;
    pub const CONTROL_VERSION: usize = 8;
    pub const CATALOG_VERSION: usize = 12;
    pub const STATE: usize = 16;
    pub const TIME: usize = 24;
    pub const CHECKPOINT: usize = 32;
    pub const REDO: usize = 40;
    pub const TIMELINE: usize = 48;
    pub const MIN_RECOVERY_POINT: usize = 136;
    pub const WAL_LEVEL: usize = 172;
    pub const MAX_CONNECTIONS: usize = 180;
    pub const MAX_WORKER_PROCESSES: usize = 184;
    pub const MAX_WAL_SENDERS: usize = 188;
    pub const MAX_PREPARED_XACTS: usize = 192;
    pub const MAX_LOCKS_PER_XACT: usize = 196;
    pub const FLOAT_FORMAT: usize = 208;
    pub const SEGMENT_SIZE: usize = 228;
    pub const DATA_CHECKSUM_VERSION: usize = 252;
    pub const CHECKSUM_13: usize = 288;
    pub const CHECKSUM_18: usize = 292;
}

/// 1970-01-01 in seconds before 2000-01-01, PostgreSQL's epoch.
const UNIX_TO_PG_SECONDS: i64 = 946_684_800;

impl ControlFile {
    /// Parses the file's content; its CRC-32C must be right. The file has 8,192 bytes, of which the first 296 count.
    pub fn parse(content: &[u8]) -> Result<Self, ControlFileError> {
        let Some(data) = content.first_chunk::<{ at::CHECKSUM_18 + 4 }>() else {
            return Err(ControlFileError::Short { length: content.len() });
        };
        let u32_at = |at: usize| u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]);
        let i32_at = |at: usize| u32_at(at).cast_signed();
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let control_version = u32_at(at::CONTROL_VERSION);
        let checksum_at = match control_version {
            1300 | 1700 => at::CHECKSUM_13,
            1800 => at::CHECKSUM_18,
            version => return Err(ControlFileError::Version { version }),
        };
        if crc32c::crc32c(&data[..checksum_at]) != u32_at(checksum_at) {
            return Err(ControlFileError::Checksum);
        }
        let wrong = |what| ControlFileError::Content { what };
        if f64::from_bits(u64_at(at::FLOAT_FORMAT)) != 1_234_567.0 {
            return Err(wrong("it comes from another kind of machine"));
        }
        let setting = |at: usize| match i32_at(at) {
            value if value >= 0 => Ok(value),
            _ => Err(wrong("a setting is negative")),
        };
        let seconds = u64_at(at::TIME).cast_signed();
        Ok(Self {
            system_identifier: SystemIdentifier::new(u64_at(at::SYSTEM_IDENTIFIER)),
            control_version,
            catalog_version: u32_at(at::CATALOG_VERSION),
            state: match u32_at(at::STATE) {
                0 => DatabaseState::StartingUp,
                1 => DatabaseState::ShutDown,
                2 => DatabaseState::ShutDownInRecovery,
                3 => DatabaseState::ShuttingDown,
                4 => DatabaseState::InCrashRecovery,
                5 => DatabaseState::InArchiveRecovery,
                6 => DatabaseState::InProduction,
                _ => return Err(wrong("its state does not exist")),
            },
            time: PgTime::from_pg_micros(seconds.saturating_sub(UNIX_TO_PG_SECONDS).saturating_mul(1_000_000)),
            checkpoint_lsn: Lsn::new(u64_at(at::CHECKPOINT)),
            redo_lsn: Lsn::new(u64_at(at::REDO)),
            timeline: TimelineId::new(u32_at(at::TIMELINE)).map_err(|_| wrong("its timeline is 0"))?,
            min_recovery_point: Lsn::new(u64_at(at::MIN_RECOVERY_POINT)),
            max_connections: setting(at::MAX_CONNECTIONS)?,
            max_worker_processes: setting(at::MAX_WORKER_PROCESSES)?,
            max_wal_senders: setting(at::MAX_WAL_SENDERS)?,
            max_prepared_xacts: setting(at::MAX_PREPARED_XACTS)?,
            max_locks_per_xact: setting(at::MAX_LOCKS_PER_XACT)?,
            wal_level: i32_at(at::WAL_LEVEL),
            data_checksum_version: u32_at(at::DATA_CHECKSUM_VERSION),
            segment_size: SegmentSize::new(u64::from(u32_at(at::SEGMENT_SIZE)))
                .map_err(|_| wrong("its WAL segment size does not exist"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that real servers wrote, up to and including the checksum.
    const OF_13: &str = "4cea52c79cfd006b14050000a1620a0c06000000000000003201016b00000000b81d040600000000801d040600000000 \
                       01000000010000000100000000000000f101000000000000006000000100000000000000de0100000100000001000000 \
                       01000000000000003201016b000000000000000000000000f101000000000000e8030000000000000000000000000000 \
                       00000000000000000000000000000000000000000000000000000000010000000000000064000000080000000a000000 \
                       000000004000000000000000080000000000000087d63241002000000000020000200000000000014000000020000000 \
                       cc070000000800000100000000000000f70b3f895de70dfbaad956dcda4f0556257ba7e07da90475342a5d3786566a50 \
                       beca16be";
    const OF_17: &str = "6c5a889e9dfd006ba40600008979100c06000000000000003201016b0000000068de03060000000010de030600000000 \
                       01000000010000000100000001000000f902000000000000006000000100000000000000da0200000100000001000000 \
                       01000000000000003201016b000000000000000000000000f902000000000000e8030000000000000000000000000000 \
                       00000000000000000000000000000000000000000000000000000000010000000000000064000000080000000a000000 \
                       000000004000000000000000080000000000000087d63241002000000000020000200000000000014000000020000000 \
                       cc07000000080000010000000000000034e2b201b31649a40b3f6501c2f36e344faede1cdbfe76e0d245f12af62b51d5 \
                       1b353d8c";
    const OF_18: &str = "919a86a72c01016b080700003300120c06000000000000003201016b0000000010b4740100000000b8b3740100000000 \
                       01000000010000000100000001000000f002000000000000c33400000100000000000000e80200000100000001000000 \
                       01000000000000003201016b000000000000000000000000f002000000000000e8030000000000000000000000000000 \
                       0000000000000000000000000000000000000000000000000000000001000000000000007b000000090000000a000000 \
                       070000004d00000000000000080000000000000087d63241002000000000020000200000000000014000000020000000 \
                       cc07000000080000010000000100000001b37c0a2c694294dd81fa1914b00daa10d9af733e11110fece7793c065ac6dd \
                       67000000d6d47004";

    fn file(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let mut content: Vec<u8> = digits.chunks(2).map(byte).collect();
        content.resize(8192, 0);
        content
    }

    #[test]
    fn what_real_servers_wrote_is_read() {
        let of_13 = ControlFile::parse(&file(OF_13)).unwrap();
        assert_eq!((of_13.control_version, of_13.catalog_version), (1300, 202_007_201));
        assert_eq!(of_13.system_identifier.to_string(), "7710441411859114572");
        assert_eq!(
            (of_13.checkpoint_lsn.to_string(), of_13.redo_lsn.to_string()),
            ("0/6041DB8".into(), "0/6041D80".into())
        );
        assert_eq!((of_13.max_connections, of_13.max_worker_processes, of_13.max_wal_senders), (100, 8, 10));
        assert_eq!((of_13.segment_size, of_13.state), (SegmentSize::DEFAULT, DatabaseState::InProduction));
        let of_17 = ControlFile::parse(&file(OF_17)).unwrap();
        assert_eq!((of_17.control_version, of_17.catalog_version, of_17.timeline.get()), (1700, 202_406_281, 1));
        let of_18 = ControlFile::parse(&file(OF_18)).unwrap();
        assert_eq!((of_18.control_version, of_18.max_connections, of_18.max_prepared_xacts), (1800, 123, 7));
        assert_eq!((of_18.max_locks_per_xact, of_18.data_checksum_version, of_18.wal_level), (77, 1, 1));
        assert!(of_18.time.to_string().starts_with("2026-11-21T02:2"), "{}", of_18.time);
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        for (hex, length) in [(OF_13, 292), (OF_18, 296)] {
            let good = file(hex);
            for bit in 0..length * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(ControlFile::parse(&bad).is_err(), "bit {bit}");
            }
            assert_eq!(ControlFile::parse(&good[..200]), Err(ControlFileError::Short { length: 200 }));
        }
    }
}
