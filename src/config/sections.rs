//! Reads each section: forms, ranges, and where a range is PostgreSQL's.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tracing::Level;

use super::error::ConfigError;
use super::raw::{Origin, Raw};
use super::reader::Reader;
use super::schedule::Schedule;
use super::settings::{
    ArchiveSettings, BackupSettings, Checkpoint, ConnectionUrl, Durability, OnDelay, PostgresSettings, RestoreSettings,
    SpoolSettings, SyncSettings, UploadSettings,
};
use super::value::Scalar;
use crate::seal::Compression;
use crate::telemetry::{AlertSettings, LogFormat, LogSettings};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
const TENTH: Duration = Duration::from_millis(100);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

pub fn postgres(read: &Reader) -> Result<PostgresSettings, ConfigError> {
    let url = read.text("url")?;
    if matches!(read.origin("url"), Origin::Flag(_)) && holds_password(&url) {
        return Err(read.wrong(
            "url",
            "holds a password, which every user of this machine can see in the process list; put it into PGPASSWORD, .pgpass or postgres.password_file",
        ));
    }
    let slot = read.text("slot")?;
    // PostgreSQL: ReplicationSlotValidateName in src/backend/replication/slot.c; NAMEDATALEN - 1 = 63.
    let is_slot = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
    if slot.is_empty() || slot.len() > 63 || !slot.bytes().all(is_slot) {
        return Err(read.wrong("slot", "must have 1 to 63 lower-case letters, digits and underscores"));
    }
    let application_name = read.text("application_name")?;
    // PostgreSQL replaces other characters and cuts at 63 bytes ("Error Reporting and Logging", application_name), so that
    // synchronous_standby_names would not find the name.
    let is_printable = |c: u8| (0x20..0x7f).contains(&c);
    if application_name.is_empty() || application_name.len() > 63 || !application_name.bytes().all(is_printable) {
        return Err(read.wrong("application_name", "must have 1 to 63 printable ASCII characters"));
    }
    Ok(PostgresSettings {
        url: ConnectionUrl(url),
        password_file: read.optional_path("password_file")?,
        slot,
        create_slot: read.flag("create_slot")?,
        application_name,
        connect_timeout: read.duration("connect_timeout", TENTH..=HOUR)?,
        status_interval: read.duration("status_interval", TENTH..=HOUR)?,
    })
}

/// Whether a connection string, URL or key=value, holds a password.
pub fn holds_password(url: &str) -> bool {
    if let Some((_, rest)) = url.split_once("://") {
        let (before_query, query) = rest.split_once('?').unwrap_or((rest, ""));
        let authority = before_query.split('/').next().unwrap_or_default();
        let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
        let in_query = query
            .split('&')
            .any(|pair| pair.split_once('=').is_some_and(|(name, value)| is_password(name) && !value.is_empty()));
        return user.split_once(':').is_some_and(|(_, password)| !password.is_empty()) || in_query;
    }
    // key = value, spaces around the sign allowed; a word of that name inside a quoted value errs on the safe side.
    let mut names = url.split('=').map(|part| part.split_whitespace().next_back().unwrap_or_default());
    names.next_back();
    names.any(is_password)
}

fn is_password(name: &str) -> bool {
    name == "password" || name == "sslpassword"
}

pub fn archive(read: &Reader) -> Result<ArchiveSettings, ConfigError> {
    let cluster = read.text("cluster")?;
    // One folder's name in every store, and never one that a shell takes for a flag.
    let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let is_name = !cluster.starts_with(['.', '-']) && cluster != "walden-check" && cluster.bytes().all(is_word);
    if cluster.is_empty() || cluster.len() > 64 || !is_name {
        return Err(read.wrong(
            "cluster",
            "must have 1 to 64 letters, digits, dots, dashes and underscores, with a letter, digit or underscore first",
        ));
    }
    let compression = read.word("compression", &[("lz4", Compression::Lz4), ("zstd", Compression::Zstd)])?;
    let level_max = match compression {
        Compression::Lz4 => 0, // the LZ4 encoder has no levels
        Compression::Zstd => 19,
    };
    let level = read.number("compression_level", 0..=i64::MAX)?;
    if level > level_max && level_max == 0 {
        let why = format!("must be 0 with compression \"lz4\", which has no levels, not {level}");
        return Err(read.wrong("compression_level", why));
    }
    let level = read.number("compression_level", 0..=level_max)?;
    Ok(ArchiveSettings {
        cluster,
        compression,
        compression_level: i32::try_from(level).expect("at most 19"),
        durability: read.word("durability", &[("spool", Durability::Spool), ("repository", Durability::Repository)])?,
        tail_interval: read.duration_or_off("tail_interval", Duration::from_millis(10)..=HOUR)?,
        tail_bytes: read.bytes("tail_bytes", 8 * KIB..=GIB)?,
        stop_timeout: read.duration("stop_timeout", Duration::ZERO..=HOUR)?,
    })
}

pub fn sync(read: &Reader) -> Result<SyncSettings, ConfigError> {
    Ok(SyncSettings {
        on_delay: read.word("on_delay", &[("wait", OnDelay::Wait), ("degrade", OnDelay::Degrade)])?,
        max_delay: read.duration("max_delay", TENTH..=DAY)?,
    })
}

pub fn spool(read: &Reader) -> Result<SpoolSettings, ConfigError> {
    Ok(SpoolSettings {
        path: read.path("path")?,
        bytes_max: read.bytes("bytes_max", 4 * MIB..=1024 * TIB)?,
        free_bytes_min: read.bytes("free_bytes_min", 0..=1024 * TIB)?,
    })
}

pub fn upload(read: &Reader) -> Result<UploadSettings, ConfigError> {
    Ok(UploadSettings {
        concurrency: usize::try_from(read.number("concurrency", 1..=64)?).expect("at most 64"),
        request_timeout: read.duration("request_timeout", TENTH..=HOUR)?,
        retry_delay_max: read.duration("retry_delay_max", TENTH..=HOUR)?,
        // S3's limits for a part.
        multipart_bytes: read.bytes("multipart_bytes", 5 * MIB..=5 * GIB)?,
    })
}

pub fn backup(read: &Reader) -> Result<BackupSettings, ConfigError> {
    let schedule = match read.optional_text("schedule")? {
        Some(text) => Some(Schedule::parse(&text).map_err(|why| {
            read.wrong("schedule", format!("is not a cron pattern of five fields such as \"0 2 * * *\": {why}"))
        })?),
        None => None,
    };
    Ok(BackupSettings {
        schedule,
        initial: read.flag("initial")?,
        checkpoint: read.word("checkpoint", &[("fast", Checkpoint::Fast), ("spread", Checkpoint::Spread)])?,
        // PostgreSQL: MAX_RATE_LOWER and MAX_RATE_UPPER in src/include/backup/basebackup.h.
        max_rate: read.bytes_or_off("max_rate", 32 * KIB..=GIB)?,
        volume_bytes: read.bytes("volume_bytes", MIB..=TIB)?,
        wal_timeout: read.duration("wal_timeout", SECOND..=7 * DAY)?,
    })
}

pub fn restore(read: &Reader) -> Result<RestoreSettings, ConfigError> {
    Ok(RestoreSettings {
        jobs: usize::try_from(read.number("jobs", 0..=256)?).expect("at most 256"),
        fetch_timeout: read.duration("fetch_timeout", SECOND..=DAY)?,
    })
}

pub fn alert(read: &Reader) -> Result<AlertSettings, ConfigError> {
    Ok(AlertSettings {
        lag: read.duration_or_off("lag_seconds", TENTH..=365 * DAY)?,
        lag_bytes: read.bytes_or_off("lag_bytes", 1..=1024 * TIB)?,
        rpo: read.duration_or_off("rpo_seconds", TENTH..=365 * DAY)?,
        slot_retained_bytes: read.bytes_or_off("slot_retained_bytes", 1..=1024 * TIB)?,
    })
}

/// `host:port`; the host is resolved when the listener starts.
pub fn listen(read: &Reader) -> Result<Option<String>, ConfigError> {
    let Some(text) = read.optional_text("listen")? else { return Ok(None) };
    let is_host = |host: &str| !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/');
    match text.rsplit_once(':') {
        Some((host, port)) if is_host(host) && port.parse::<u16>().is_ok() => Ok(Some(text)),
        _ => Err(read.wrong("listen", "must be host:port, such as \"127.0.0.1:9847\", or \"\" for none")),
    }
}

pub fn log(read: &Reader) -> Result<LogSettings, ConfigError> {
    let levels = [
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("info", Level::INFO),
        ("debug", Level::DEBUG),
        ("trace", Level::TRACE),
    ];
    Ok(LogSettings {
        level: read.word("level", &levels)?,
        format: read.word("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)])?,
    })
}

pub fn warnings(raw: &Raw, file: Option<&Path>) -> Vec<String> {
    let mut warnings = Vec::new();
    let url = raw.sections.get("postgres").and_then(|section| section.get("url"));
    let in_file = url.is_some_and(|entry| {
        matches!(entry.origin, Origin::File { .. }) && matches!(&entry.value, Scalar::Text(url) if holds_password(url))
    });
    if let Some(file) = file
        && in_file
        && std::fs::metadata(file).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
    {
        warnings.push(format!(
            "{} holds a password and other users can read it; chmod 600 it, or use postgres.password_file",
            file.display()
        ));
    }
    warnings
}
