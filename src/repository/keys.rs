use std::fmt;

use super::{BackupId, RepositoryError};
use crate::seal::Compression;
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Folder of a cluster for the objects with which `walden check` tries a store.
const CHECK_FOLDER: &str = "walden-check";

/// Makes every key of one cluster's folder (docs/format.md, section 1). The only place where keys are made or taken apart.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    cluster: String,
    system: SystemIdentifier,
    root: String,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.root)
    }
}

impl Keys {
    pub fn new(cluster: &str, system: SystemIdentifier) -> Result<Self, RepositoryError> {
        Self::check_cluster_name(cluster)?;
        Ok(Self { cluster: cluster.into(), system, root: format!("{cluster}/{system}/") })
    }

    /// A cluster's name is a folder in every store: 1 to 64 letters, digits, `.`, `_` or `-`, beginning with a letter,
    /// a digit or `_`.
    pub fn check_cluster_name(name: &str) -> Result<(), RepositoryError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let ok = (1..=64).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-']);
        if ok { Ok(()) } else { Err(RepositoryError::ClusterName { name: name.chars().take(80).collect() }) }
    }

    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    pub fn system(&self) -> SystemIdentifier {
        self.system
    }

    /// `<cluster>/<system-identifier>/`.
    pub fn root(&self) -> &str {
        &self.root
    }

    pub fn cluster_prefix(cluster: &str) -> String {
        format!("{cluster}/")
    }

    pub fn check_prefix(cluster: &str) -> String {
        format!("{cluster}/{CHECK_FOLDER}/")
    }

    pub fn check_object(cluster: &str, uuid: uuid::Uuid) -> String {
        format!("{cluster}/{CHECK_FOLDER}/{uuid}")
    }

    pub fn wal_prefix(&self) -> String {
        format!("{}wal/", self.root)
    }

    pub fn timeline_prefix(&self, timeline: TimelineId) -> String {
        format!("{}wal/{}/", self.root, timeline.to_hex())
    }

    pub fn segment(&self, name: SegmentName, compression: Compression) -> String {
        format!("{}{name}.{}", self.timeline_prefix(name.timeline()), compression.suffix())
    }

    pub fn history(&self, timeline: TimelineId) -> String {
        format!("{}wal/{}", self.root, timeline.history_file_name())
    }

    pub fn tail_prefix(&self) -> String {
        format!("{}tail/", self.root)
    }

    pub fn tail_timeline_prefix(&self, timeline: TimelineId) -> String {
        format!("{}tail/{}/", self.root, timeline.to_hex())
    }

    pub fn pieces_prefix(&self, name: SegmentName) -> String {
        format!("{}{name}/", self.tail_timeline_prefix(name.timeline()))
    }

    /// `start` and `end` are offsets in the segment, the end exclusive.
    pub fn piece(&self, name: SegmentName, start: u32, end: u32, compression: Compression) -> String {
        format!("{}{start:08X}-{end:08X}.{}", self.pieces_prefix(name), compression.suffix())
    }

    pub fn backups_prefix(&self) -> String {
        format!("{}backups/", self.root)
    }

    pub fn backup_prefix(&self, id: &BackupId) -> String {
        format!("{}backups/{id}/", self.root)
    }

    /// `name` is relative to the backup, such as `volumes/000001.tar.lz4` or `backup.json`.
    pub fn backup_object(&self, id: &BackupId, name: &str) -> String {
        format!("{}{name}", self.backup_prefix(id))
    }

    pub fn gaps_prefix(&self) -> String {
        format!("{}gaps/", self.root)
    }

    pub fn gap(&self, timeline: TimelineId, from: Lsn, to: Lsn) -> String {
        format!("{}gaps/{}/{}-{}.json", self.root, timeline.to_hex(), from.to_hex16(), to.to_hex16())
    }

    pub fn coverage(&self) -> String {
        format!("{}coverage.json", self.root)
    }

    pub fn lease(&self) -> String {
        format!("{}lease.json", self.root)
    }

    pub fn adopted(&self) -> String {
        format!("{}adopted.json", self.root)
    }
}

/// What a key names. Whatever does not follow the grammar to the letter is `Foreign`: reported, never touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParsedKey {
    Segment { name: SegmentName, compression: Compression },
    History { timeline: TimelineId },
    Piece { segment: SegmentName, start: u32, end: u32, compression: Compression },
    BackupObject { id: BackupId, name: String },
    Gap { timeline: TimelineId, from: Lsn, to: Lsn },
    Coverage,
    Lease,
    Adopted,
    Foreign,
}

impl ParsedKey {
    pub fn parse(keys: &Keys, key: &str, size: SegmentSize) -> Self {
        let Some(rest) = key.strip_prefix(keys.root()) else { return Self::Foreign };
        Self::parse_rest(rest, size).unwrap_or(Self::Foreign)
    }

    fn parse_rest(rest: &str, size: SegmentSize) -> Option<Self> {
        match rest {
            "coverage.json" => return Some(Self::Coverage),
            "lease.json" => return Some(Self::Lease),
            "adopted.json" => return Some(Self::Adopted),
            _ => {}
        }
        let (folder, rest) = rest.split_once('/')?;
        match folder {
            "wal" => match rest.split_once('/') {
                None => {
                    let timeline = TimelineId::from_hex(rest.strip_suffix(".history")?).ok()?;
                    Some(Self::History { timeline })
                }
                Some((timeline, file)) => {
                    let timeline = TimelineId::from_hex(timeline).ok()?;
                    let (name, suffix) = file.split_once('.')?;
                    let name = SegmentName::parse(name, size).ok()?;
                    let compression = Compression::from_suffix(suffix)?;
                    (name.timeline() == timeline).then_some(Self::Segment { name, compression })
                }
            },
            "tail" => {
                let (timeline, rest) = rest.split_once('/')?;
                let timeline = TimelineId::from_hex(timeline).ok()?;
                let (segment, file) = rest.split_once('/')?;
                let segment = SegmentName::parse(segment, size).ok()?;
                let (range, suffix) = file.split_once('.')?;
                let (start, end) = range.split_once('-')?;
                let (start, end) = (hex8(start)?, hex8(end)?);
                let compression = Compression::from_suffix(suffix)?;
                let fits = segment.timeline() == timeline && start < end && u64::from(end) <= size.get();
                fits.then_some(Self::Piece { segment, start, end, compression })
            }
            "backups" => {
                let (id, name) = rest.split_once('/')?;
                let id = BackupId::parse(id).ok()?;
                is_backup_object(name).then(|| Self::BackupObject { id, name: name.into() })
            }
            "gaps" => {
                let (timeline, file) = rest.split_once('/')?;
                let timeline = TimelineId::from_hex(timeline).ok()?;
                let (from, to) = file.strip_suffix(".json")?.split_once('-')?;
                let (from, to) = (hex16(from)?, hex16(to)?);
                (from < to).then_some(Self::Gap { timeline, from, to })
            }
            _ => None,
        }
    }
}

/// The names that a backup may have below its folder.
pub(super) fn is_backup_object(name: &str) -> bool {
    let compressed = |stem: &str| {
        name.strip_prefix(stem)
            .and_then(|rest| rest.strip_prefix('.'))
            .is_some_and(|suffix| Compression::from_suffix(suffix).is_some())
    };
    if name == "backup.json" || compressed("backup_manifest") {
        return true;
    }
    let Some((number, suffix)) = name.strip_prefix("volumes/").and_then(|file| file.split_once(".tar.")) else {
        return false;
    };
    number.len() == 6 && number.bytes().all(|b| b.is_ascii_digit()) && Compression::from_suffix(suffix).is_some()
}

fn upper_hex(digits: &str, length: usize) -> Option<u64> {
    let plain = digits.len() == length && digits.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    if plain { u64::from_str_radix(digits, 16).ok() } else { None }
}

fn hex8(digits: &str) -> Option<u32> {
    upper_hex(digits, 8).and_then(|n| u32::try_from(n).ok())
}

fn hex16(digits: &str) -> Option<Lsn> {
    upper_hex(digits, 16).map(Lsn::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn keys() -> Keys {
        Keys::new("main", SystemIdentifier::new(7_123_456_789)).unwrap()
    }

    #[test]
    fn every_key_parses_back_to_what_made_it() {
        let keys = keys();
        let timeline = TimelineId::new(26).unwrap();
        let name = SegmentName::holding(timeline, Lsn::new(0xA9_1F00_0000), SIZE);
        let id = BackupId::parse("20261120T020000Z-full").unwrap();
        let (from, to) = (Lsn::new(1), Lsn::new(0xA9_0000_0000));
        let table = [
            (keys.segment(name, Compression::Lz4), ParsedKey::Segment { name, compression: Compression::Lz4 }),
            (keys.segment(name, Compression::Zstd), ParsedKey::Segment { name, compression: Compression::Zstd }),
            (keys.history(timeline), ParsedKey::History { timeline }),
            (
                keys.piece(name, 0x2000, 0x100_0000, Compression::Lz4),
                ParsedKey::Piece { segment: name, start: 0x2000, end: 0x100_0000, compression: Compression::Lz4 },
            ),
            (
                keys.backup_object(&id, "volumes/000001.tar.lz4"),
                ParsedKey::BackupObject { id: id.clone(), name: "volumes/000001.tar.lz4".into() },
            ),
            (keys.backup_object(&id, "backup.json"), ParsedKey::BackupObject { id, name: "backup.json".into() }),
            (keys.gap(timeline, from, to), ParsedKey::Gap { timeline, from, to }),
            (keys.coverage(), ParsedKey::Coverage),
            (keys.lease(), ParsedKey::Lease),
            (keys.adopted(), ParsedKey::Adopted),
        ];
        for (key, expected) in table {
            assert_eq!(ParsedKey::parse(&keys, &key, SIZE), expected, "{key}");
        }
        assert_eq!(keys.segment(name, Compression::Lz4), "main/7123456789/wal/0000001A/0000001A000000A90000001F.lz4");
    }

    #[test]
    fn a_key_outside_the_grammar_is_foreign() {
        let keys = keys();
        for rest in [
            "wal/00000001/000000010000000000000001",
            "wal/00000001/000000010000000000000001.gz",
            "wal/00000001/000000010000000000000001.lz4.tmp",
            "wal/00000001/00000001000000000000000a.lz4",
            "wal/00000002/000000010000000000000001.lz4",
            "wal/00000001/000000010000000000000100.lz4",
            "wal/00000001/../000000010000000000000001.lz4",
            "wal/00000000.history",
            "wal/1.history",
            "tail/00000001/000000010000000000000001/00000000-01000001.lz4",
            "tail/00000001/000000010000000000000001/00002000-00002000.lz4",
            "tail/00000002/000000010000000000000001/00000000-00002000.lz4",
            "backups/2026/backup.json",
            "backups/20261120T020000Z-full/../x",
            "backups/20261120T020000Z-full/volumes/1.tar.lz4",
            "gaps/00000001/0000000000000002-0000000000000001.json",
            "lease.json.bak",
            "",
            "wal",
        ] {
            let key = format!("main/7123456789/{rest}");
            assert_eq!(ParsedKey::parse(&keys, &key, SIZE), ParsedKey::Foreign, "{key}");
        }
        assert_eq!(ParsedKey::parse(&keys, "other/7123456789/lease.json", SIZE), ParsedKey::Foreign);
    }

    #[test]
    fn a_cluster_name_cannot_leave_its_folder() {
        for name in ["", ".", "..", "a/b", "-x", "a b", "é", ".tmp-x", &"x".repeat(65)] {
            assert!(Keys::check_cluster_name(name).is_err(), "{name}");
        }
        for name in ["main", "db-1.prod_eu", "0"] {
            assert!(Keys::check_cluster_name(name).is_ok(), "{name}");
        }
    }
}
