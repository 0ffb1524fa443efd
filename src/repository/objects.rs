use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::RepositoryError;
use super::keys::is_backup_object;
use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineId};

/// The format of the small objects that this release writes, and the highest one that it reads.
pub const FORMAT: u32 = 1;
/// Bytes that a gap, the coverage or the lease may have.
pub const SMALL_OBJECT_BYTES_MAX: u64 = 64 << 10;
/// Bytes that a `backup.json` may have: some 60,000 volumes.
pub const BACKUP_JSON_BYTES_MAX: u64 = 16 << 20;

/// A backup's name: when it started (UTC, to the second) and its kind, such as `20261120T020000Z-full`. Ordered by time.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(String);

impl BackupId {
    /// Parses `YYYYMMDDTHHMMSSZ-kind`; the kind is 1 to 16 lower-case letters.
    pub fn parse(text: &str) -> Result<Self, RepositoryError> {
        let wrong = || RepositoryError::BackupId { text: text.chars().take(64).collect() };
        let (time, kind) = text.split_once('-').ok_or_else(wrong)?;
        let shape = time.len() == 16
            && time.bytes().enumerate().all(|(at, b)| match at {
                8 => b == b'T',
                15 => b == b'Z',
                _ => b.is_ascii_digit(),
            });
        let known = (1..=16).contains(&kind.len()) && kind.bytes().all(|b| b.is_ascii_lowercase());
        if !shape || !known || parse_time(time).is_none() {
            return Err(wrong());
        }
        Ok(Self(text.into()))
    }

    /// The id of a full backup that started at `time`.
    pub fn full_at(time: PgTime) -> Self {
        Self(format!("{}-full", time.to_timestamp().strftime("%Y%m%dT%H%M%SZ")))
    }

    /// The id one second later, for the second of two backups that started in the same one.
    pub fn next_second(&self) -> Self {
        let (time, kind) = self.0.split_once('-').expect("checked by every constructor");
        let time = parse_time(time).expect("checked by every constructor");
        let later = time.checked_add(jiff::SignedDuration::from_secs(1)).unwrap_or(jiff::Timestamp::MAX);
        Self(format!("{}-{kind}", later.strftime("%Y%m%dT%H%M%SZ")))
    }

    pub fn kind(&self) -> &str {
        self.0.split_once('-').map_or("", |(_, kind)| kind)
    }
}

fn parse_time(text: &str) -> Option<jiff::Timestamp> {
    let civil = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%SZ", text).ok()?;
    civil.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BackupId {
    type Err = RepositoryError;
    fn from_str(text: &str) -> Result<Self, RepositoryError> {
        Self::parse(text)
    }
}

impl Serialize for BackupId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for BackupId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// What went wrong with the bytes of a small object; the caller knows its key.
#[derive(Debug, PartialEq, Eq)]
pub enum ObjectProblem {
    NewerFormat(u32),
    Unreadable(String),
}

impl ObjectProblem {
    pub fn at(self, url: &str, key: &str) -> RepositoryError {
        let (url, key) = (url.to_string(), key.to_string());
        match self {
            Self::NewerFormat(format) => RepositoryError::NewerFormat { url, key, format, known: FORMAT },
            Self::Unreadable(why) => RepositoryError::Unreadable { url, key, why },
        }
    }
}

/// Reads a JSON object whose `format` is one that this release knows. The format is looked at first, so that a later
/// release's object is never half understood.
pub(super) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ObjectProblem> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    let wrong = |e: serde_json::Error| ObjectProblem::Unreadable(e.to_string());
    let version: Version = serde_json::from_slice(bytes).map_err(wrong)?;
    match version.format {
        FORMAT => serde_json::from_slice(bytes).map_err(wrong),
        0 => Err(ObjectProblem::Unreadable("format 0 does not exist".into())),
        newer => Err(ObjectProblem::NewerFormat(newer)),
    }
}

pub(super) fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(value).expect("plain data serialises");
    json.push(b'\n');
    json
}

/// `backup.json`: field by field in docs/format.md, section 3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupJson {
    pub format: u32,
    pub id: BackupId,
    pub kind: String,
    pub system_identifier: SystemIdentifier,
    pub wal_segment_size: SegmentSize,
    pub start_timeline: TimelineId,
    pub stop_timeline: TimelineId,
    /// The stop timeline.
    pub timeline: TimelineId,
    /// Redo position of the backup's checkpoint: WAL is needed from here on.
    pub start_lsn: Lsn,
    /// End of the backup's WAL: consistent from here on.
    pub stop_lsn: Lsn,
    pub start_time: PgTime,
    pub stop_time: PgTime,
    pub postgres_version: u32,
    pub size_bytes: u64,
    pub stored_bytes: u64,
    pub parent: Option<BackupId>,
    pub label: Option<String>,
    pub duration_seconds: f64,
    pub required_settings: RequiredSettings,
    pub tablespaces: Vec<BackupTablespace>,
    pub volumes: Vec<StoredPart>,
    pub manifest: Option<StoredPart>,
    /// What the server said of pages whose checksum it found wrong, each with file and block; usually nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checksum_failures: Vec<String>,
}

/// Settings below which PostgreSQL refuses to recover; as `global/pg_control` of the backup has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequiredSettings {
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_transactions: i32,
    pub max_locks_per_transaction: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupTablespace {
    pub oid: u32,
    /// Absolute path on the server that was backed up.
    pub location: String,
}

/// One stored part of a backup. `key` is relative to the backup's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredPart {
    pub key: String,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
    pub raw_crc32: u32,
    pub stored_crc32: u32,
}

impl BackupJson {
    /// One line about pages whose checksum the server found wrong; `None` if it found none.
    pub fn pages_damaged(&self) -> Option<String> {
        let (first, more) = self.checksum_failures.split_first()?;
        let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
        Some(format!("the server found pages with wrong checksums while it made {}: {first}{more}", self.id))
    }

    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, ObjectProblem> {
        let backup: Self = parse_json(bytes)?;
        backup.check().map_err(|why| ObjectProblem::Unreadable(why.into()))?;
        Ok(backup)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.id.kind() != self.kind {
            return Err("its id and its kind disagree");
        }
        if self.timeline != self.stop_timeline || self.start_timeline > self.stop_timeline {
            return Err("its timelines disagree");
        }
        if self.start_lsn.is_zero() || self.start_lsn > self.stop_lsn {
            return Err("its LSNs are not in order");
        }
        if self.volumes.is_empty() {
            return Err("it has no volumes");
        }
        let mut keys: Vec<&str> = self.volumes.iter().chain(&self.manifest).map(|part| part.key.as_str()).collect();
        if !keys.iter().all(|key| is_backup_object(key) && *key != "backup.json") {
            return Err("a part has a name that parts do not have");
        }
        keys.sort_unstable();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("two parts have the same name");
        }
        if !self.duration_seconds.is_finite() {
            return Err("its duration is not a number");
        }
        Ok(())
    }
}

/// WAL known to be lost, `[from_lsn, to_lsn)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub format: u32,
    pub system_identifier: SystemIdentifier,
    pub timeline: TimelineId,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub since: PgTime,
    pub reason: String,
}

impl Gap {
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, ObjectProblem> {
        let gap: Self = parse_json(bytes)?;
        if gap.from_lsn >= gap.to_lsn {
            return Err(ObjectProblem::Unreadable("its LSNs are not in order".into()));
        }
        Ok(gap)
    }
}

/// Every commit acknowledged by the server before `complete_until` lies before `archived_lsn`, and that was held when it was
/// written. A hint: whoever uses it makes sure that the WAL is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    pub format: u32,
    pub system_identifier: SystemIdentifier,
    pub timeline: TimelineId,
    pub complete_until: PgTime,
    pub archived_lsn: Lsn,
    pub updated: PgTime,
}

impl Coverage {
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, ObjectProblem> {
        parse_json(bytes)
    }
}

/// Who writes. `ttl_seconds` 0 says that the holder has given the lease back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseJson {
    pub format: u32,
    /// The id in the agent's spool.
    pub agent: String,
    pub host: String,
    pub taken: PgTime,
    pub renewed: PgTime,
    pub ttl_seconds: u32,
}

impl LeaseJson {
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, ObjectProblem> {
        let lease: Self = parse_json(bytes)?;
        if lease.agent.is_empty() || lease.agent.len() > 256 || lease.host.len() > 1024 {
            return Err(ObjectProblem::Unreadable("its holder is not named as agents are".into()));
        }
        Ok(lease)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn time(text: &str) -> PgTime {
        PgTime::from_timestamp(text.parse().unwrap())
    }

    pub(crate) fn backup(id: &str, start: u64, stop: u64) -> BackupJson {
        let id = BackupId::parse(id).unwrap();
        let start_time = PgTime::from_timestamp(parse_time(&id.0[..16]).unwrap());
        let part = |key: &str| StoredPart {
            key: key.into(),
            raw_bytes: 10_240,
            stored_bytes: 512,
            raw_crc32: 1,
            stored_crc32: 2,
        };
        BackupJson {
            format: FORMAT,
            kind: id.kind().into(),
            id,
            system_identifier: SystemIdentifier::new(7_000_000_000_000_000_001),
            wal_segment_size: SegmentSize::new(1 << 20).unwrap(),
            start_timeline: TimelineId::FIRST,
            stop_timeline: TimelineId::FIRST,
            timeline: TimelineId::FIRST,
            start_lsn: Lsn::new(start),
            stop_lsn: Lsn::new(stop),
            start_time,
            stop_time: PgTime::from_pg_micros(start_time.pg_micros() + 10_000_000),
            postgres_version: 170_010,
            size_bytes: 10_240,
            stored_bytes: 512,
            parent: None,
            label: Some("a \"label\"".into()),
            duration_seconds: 10.0,
            required_settings: RequiredSettings { max_connections: 100, ..RequiredSettings::default() },
            tablespaces: vec![BackupTablespace { oid: 16_390, location: "/srv/fast disk".into() }],
            volumes: vec![part("volumes/000001.tar.lz4")],
            manifest: Some(part("backup_manifest.lz4")),
            checksum_failures: Vec::new(),
        }
    }

    #[test]
    fn a_backup_id_is_a_real_time_and_a_kind() {
        for good in ["20261120T020000Z-full", "20240229T235959Z-incremental"] {
            assert_eq!(BackupId::parse(good).unwrap().to_string(), good);
        }
        for bad in [
            "",
            "20261120T020000Z",
            "20261120T020000Z-",
            "20261120T020000Z-Full",
            "20261120T020000Z-full/..",
            "20261320T020000Z-full",
            "20260229T020000Z-full",
            "2026-11-20T02:00:00Z-full",
            "../20261120T0200-full",
        ] {
            assert!(BackupId::parse(bad).is_err(), "{bad}");
        }
        let id = BackupId::full_at(time("2026-12-31T23:59:59.999999Z"));
        assert_eq!(id.to_string(), "20261231T235959Z-full");
        assert_eq!(id.next_second().to_string(), "20270101T000000Z-full");
        assert!(id < id.next_second());
    }

    #[test]
    fn the_small_objects_read_back_as_written() {
        let backup = backup("20261120T020000Z-full", 0x10_0028, 0x20_0100);
        assert_eq!(BackupJson::parse(&backup.to_json()).unwrap(), backup);
        let gap = Gap {
            format: FORMAT,
            system_identifier: backup.system_identifier,
            timeline: TimelineId::FIRST,
            from_lsn: Lsn::new(1),
            to_lsn: Lsn::new(2),
            since: time("2026-11-20T02:00:00Z"),
            reason: "the slot was dropped".into(),
        };
        assert_eq!(Gap::parse(&gap.to_json()).unwrap(), gap);
        let lease = LeaseJson {
            format: FORMAT,
            agent: "a".into(),
            host: "h".into(),
            taken: gap.since,
            renewed: gap.since,
            ttl_seconds: 30,
        };
        assert_eq!(LeaseJson::parse(&lease.to_json()).unwrap(), lease);
    }

    #[test]
    fn a_later_format_is_refused_before_it_is_understood() {
        let json = br#"{"format": 2, "something": "else"}"#;
        assert_eq!(BackupJson::parse(json), Err(ObjectProblem::NewerFormat(2)));
        assert_eq!(Gap::parse(json), Err(ObjectProblem::NewerFormat(2)));
        let message = ObjectProblem::NewerFormat(2).at("/srv/repo", "k").to_string();
        assert_eq!(message, "/srv/repo: k has format 2, and this release of Walden knows format 1");
        assert!(matches!(BackupJson::parse(b"{}"), Err(ObjectProblem::Unreadable(_))));
        assert!(matches!(BackupJson::parse(br#"{"format":0}"#), Err(ObjectProblem::Unreadable(_))));
    }

    #[test]
    fn a_backup_that_contradicts_itself_is_refused() {
        let good = backup("20261120T020000Z-full", 0x10_0028, 0x20_0100);
        type Spoil = fn(&mut BackupJson);
        let spoil: [(&str, Spoil); 7] = [
            ("no volumes", |b| b.volumes.clear()),
            ("a path that leaves", |b| b.volumes[0].key = "volumes/../../x.tar.lz4".into()),
            ("itself as a part", |b| b.volumes[0].key = "backup.json".into()),
            ("one part twice", |b| b.volumes.push(b.volumes[0].clone())),
            ("stop before start", |b| b.stop_lsn = Lsn::new(1)),
            ("another kind", |b| b.kind = "incremental".into()),
            ("timelines", |b| b.timeline = TimelineId::new(7).unwrap()),
        ];
        for (what, spoil) in spoil {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(matches!(BackupJson::parse(&bad.to_json()), Err(ObjectProblem::Unreadable(_))), "{what}");
        }
    }
}
