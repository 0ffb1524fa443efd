//! BASE_BACKUP: tar archives and the manifest, handed out in pieces where they lie in the read buffer.
//!
//! 13 and 14 send one copy per tablespace and one for the manifest; from 15 on one copy carries all, each message with a type.
//! Source: "Streaming Replication Protocol", BASE_BACKUP, in the protocol chapter of PostgreSQL's documentation of 14 and of 15;
//! `src/backend/backup/basebackup_copy.c`.

use std::fmt::Write;
use std::time::Duration;

use crate::wal::{Lsn, TimelineId};

use super::answer::{Row, optional_column, parse_error, parse_row, parsed_column, text};
use super::asked::Asked;
use super::replication::{VERSION_15, timeline};
use super::wire::{HEADER, LIMIT_READY, unexpected};
use super::{PostgresError, ReplicationConnection, shown_duration};

/// The server's bounds for MAX_RATE, in KiB/s.
const RATE_MIN: u32 = 32;
const RATE_MAX: u32 = 1_048_576;

/// A server that has begun to send and then says nothing for so long has hung; it makes no pauses of its own.
const SILENCE_LIMIT: Duration = Duration::from_secs(600);
/// From the command to the first file: a checkpoint at once, and a look at every file for the sizes. The server says nothing meanwhile, and
/// with many files on slow disks this takes minutes.
const BEGIN_LIMIT: Duration = Duration::from_secs(1800);
/// The longest `checkpoint_timeout` that PostgreSQL takes.
const CHECKPOINT_TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

/// `MAXPGPATH` in `src/include/pg_config_manual.h`.
const LOCATION_MAX: usize = 1024;

/// How to take a backup. Always without waiting for the archiver (NOWAIT), with the tablespace map, with progress.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// Goes into `backup_label`; at most 1,024 bytes.
    pub label: String,
    /// A checkpoint at once; otherwise it is spread and may take minutes.
    pub fast_checkpoint: bool,
    /// KiB per second; brought into the 32 to 1,048,576 that PostgreSQL takes.
    pub max_rate_kib: Option<u32>,
    /// With CRC-32C of every file.
    pub manifest: bool,
}

/// A row of the backup's list: a tablespace, or the main data directory (no OID).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: Option<u32>,
    pub location: Option<String>,
    /// The server's estimate.
    pub size_bytes: u64,
}

/// A running base backup. Dropping it closes the connection, at which the server ends the backup.
pub struct BaseBackup {
    connection: ReplicationConnection,
    /// Redo position of the backup's checkpoint.
    pub start_lsn: Lsn,
    pub start_timeline: TimelineId,
    pub tablespaces: Vec<Tablespace>,
    multiplexed: bool,
    manifest_wanted: bool,
    /// Bytes of the current CopyData that are still to come.
    data_left: usize,
    content: Content,
    /// Between CopyOutResponse and CopyDone.
    copying: bool,
    archives_begun: usize,
    stop: Option<(Lsn, TimelineId)>,
    /// The server has found pages whose checksum is wrong: it ends a backup that is whole otherwise with an error.
    pages_damaged: bool,
    ended: bool,
    silence_limit: Duration,
}

/// `ERRCODE_DATA_CORRUPTED`, in `src/backend/utils/errcodes.txt`.
const DATA_CORRUPTED: &str = "XX001";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Nothing,
    Archive,
    Manifest,
}

#[derive(Debug, PartialEq, Eq)]
pub enum BackupEvent<'a> {
    /// A tar archive begins; `None` is the main data directory.
    Archive {
        tablespace: Option<u32>,
    },
    /// The archive's next bytes. 13 and 14 leave out the two empty blocks at its end.
    Data(&'a [u8]),
    ManifestBegins,
    Manifest(&'a [u8]),
    /// The server has ended the backup: all WAL up to here is needed to restore it.
    End {
        stop_lsn: Lsn,
        stop_timeline: TimelineId,
    },
}

/// What is next; found before anything is borrowed.
enum Front {
    Piece { length: usize },
    Archive { tablespace: Option<u32> },
    ManifestBegins,
    End { stop_lsn: Lsn, stop_timeline: TimelineId },
}

impl BaseBackup {
    pub(super) async fn begin(
        connection: ReplicationConnection,
        options: &BackupOptions,
    ) -> Result<Self, PostgresError> {
        Self::begin_within(connection, options, BEGIN_LIMIT).await
    }

    /// `limit`: with a checkpoint at once. A spread one adds its own time.
    async fn begin_within(
        mut connection: ReplicationConnection,
        options: &BackupOptions,
        limit: Duration,
    ) -> Result<Self, PostgresError> {
        let limit = match options.fast_checkpoint {
            true => limit,
            false => spread(limit, &connection.show("checkpoint_timeout").await?),
        };
        let begun = tokio::time::timeout(limit, Self::ask(connection, options)).await;
        begun.unwrap_or(Err(PostgresError::Timeout { what: "BASE_BACKUP", limit }))
    }

    async fn ask(mut connection: ReplicationConnection, options: &BackupOptions) -> Result<Self, PostgresError> {
        let multiplexed = connection.server_version() >= VERSION_15;
        connection.wire.begin_command(&command(options, multiplexed)?).await?;
        let mut start = None;
        let mut tablespaces = Vec::new();
        let mut listed = 0;
        // Two result sets: where the backup starts, then the tablespaces. Then the first copy begins.
        let mut result_sets = 0;
        loop {
            match connection.wire.message().await? {
                (b'T', _) => result_sets += 1,
                (b'D', body) if result_sets == 1 => {
                    let row = parse_row(body)?;
                    start = Some((parsed_column(&row, 0, "the backup's start")?, timeline(&row, 1)?));
                }
                (b'D', body) if result_sets == 2 && listed + body.len() <= LIMIT_READY => {
                    listed += body.len();
                    tablespaces.push(parse_tablespace(&parse_row(body)?)?);
                }
                (b'C', _) => {}
                (b'H', _) => break,
                (b'E', body) => return Err(connection.wire.fail(Asked::BaseBackup, &body).await),
                (tag, _) => return Err(unexpected(tag, "BASE_BACKUP")),
            }
        }
        let Some((start_lsn, start_timeline)) = start else {
            return Err(PostgresError::protocol("the backup's start is missing"));
        };
        if tablespaces.iter().filter(|tablespace| tablespace.oid.is_none()).count() != 1 {
            return Err(PostgresError::protocol("the backup's list must name the data directory once"));
        }
        Ok(Self {
            connection,
            start_lsn,
            start_timeline,
            tablespaces,
            multiplexed,
            manifest_wanted: options.manifest,
            data_left: 0,
            content: Content::Nothing,
            copying: true,
            archives_begun: 0,
            stop: None,
            pages_damaged: false,
            ended: false,
            silence_limit: SILENCE_LIMIT,
        })
    }

    pub fn server_version(&self) -> u32 {
        self.connection.server_version()
    }

    /// The next event. After `End` there is none: call `into_connection`. Cancel-safe. Fails when the server is silent for ten minutes.
    pub async fn next(&mut self) -> Result<BackupEvent<'_>, PostgresError> {
        let front = loop {
            if let Some(front) = self.take_front().await? {
                break front;
            }
            let filled = tokio::time::timeout(self.silence_limit, self.connection.wire.fill()).await;
            filled.unwrap_or(Err(PostgresError::Timeout { what: "the base backup", limit: self.silence_limit }))?;
        };
        Ok(match front {
            Front::Piece { length } => {
                self.data_left -= length;
                self.connection.wire.consume(length);
                let bytes = self.connection.wire.consumed(length);
                match self.content {
                    Content::Manifest => BackupEvent::Manifest(bytes),
                    Content::Archive | Content::Nothing => BackupEvent::Data(bytes),
                }
            }
            Front::Archive { tablespace } => BackupEvent::Archive { tablespace },
            Front::ManifestBegins => BackupEvent::ManifestBegins,
            Front::End { stop_lsn, stop_timeline } => BackupEvent::End { stop_lsn, stop_timeline },
        })
    }

    /// What the server has warned of until now, in its words.
    pub fn take_warnings(&mut self) -> Vec<String> {
        self.connection.wire.take_warnings()
    }

    /// After `End`: the server has found pages whose checksum is wrong. Its warnings name them; the backup is whole otherwise.
    pub fn pages_damaged(&self) -> bool {
        self.pages_damaged
    }

    /// The connection, to be used again after `End`.
    pub fn into_connection(self) -> ReplicationConnection {
        self.connection
    }

    async fn take_front(&mut self) -> Result<Option<Front>, PostgresError> {
        if self.ended {
            return Err(PostgresError::protocol("the backup has ended"));
        }
        // 13 and 14 tell by the order alone what a copy holds.
        if self.copying && !self.multiplexed && self.content == Content::Nothing {
            return self.begin_next().map(Some);
        }
        loop {
            if self.data_left > 0 {
                let length = self.data_left.min(self.connection.wire.buffered());
                return Ok((length > 0).then_some(Front::Piece { length }));
            }
            let Some(header) = self.connection.wire.header()? else { return Ok(None) };
            match header.tag {
                b'd' if !self.copying => return Err(PostgresError::protocol("copied data came outside a copy")),
                b'd' if self.multiplexed => match self.take_typed(header.body)? {
                    Typed::NotThere => return Ok(None),
                    Typed::Nothing => {}
                    Typed::Front(front) => return Ok(Some(front)),
                },
                b'd' => {
                    self.connection.wire.consume(HEADER);
                    self.data_left = header.body;
                }
                b'N' | b'S' | b'A' => {
                    if !self.connection.wire.absorb(header) {
                        return Ok(None);
                    }
                }
                _ => {
                    let Some(body) = self.connection.wire.take_whole(header) else { return Ok(None) };
                    let body = bytes::Bytes::copy_from_slice(body);
                    if let Some(front) = self.take_control(header.tag, body).await? {
                        return Ok(Some(front));
                    }
                }
            }
        }
    }

    async fn take_control(&mut self, tag: u8, body: bytes::Bytes) -> Result<Option<Front>, PostgresError> {
        match tag {
            b'c' if self.copying => {
                self.copying = false;
                self.content = Content::Nothing;
            }
            b'H' if !self.copying && !self.multiplexed && self.stop.is_none() => {
                self.copying = true;
                return self.begin_next().map(Some);
            }
            b'D' if !self.copying => {
                let row = parse_row(body)?;
                self.stop = Some((parsed_column(&row, 0, "the backup's end")?, timeline(&row, 1)?));
            }
            b'T' | b'C' if !self.copying => {}
            b'Z' if !self.copying => return self.end().map(Some),
            // The last thing of all, after the end's position (`perform_base_backup` in `src/backend/backup/basebackup.c`).
            b'E' if self.stop.is_some() && parse_error(&body).sqlstate == DATA_CORRUPTED => self.pages_damaged = true,
            b'E' => return Err(self.connection.wire.fail(Asked::BaseBackup, &body).await),
            tag => return Err(unexpected(tag, "BASE_BACKUP")),
        }
        Ok(None)
    }

    /// Archives come in the order of the list, then the manifest.
    fn begin_next(&mut self) -> Result<Front, PostgresError> {
        if let Some(tablespace) = self.tablespaces.get(self.archives_begun) {
            self.archives_begun += 1;
            self.content = Content::Archive;
            return Ok(Front::Archive { tablespace: tablespace.oid });
        }
        if self.archives_begun == self.tablespaces.len() && self.manifest_wanted {
            self.archives_begun += 1;
            self.content = Content::Manifest;
            return Ok(Front::ManifestBegins);
        }
        Err(PostgresError::protocol("the backup has more archives than its list"))
    }

    fn end(&mut self) -> Result<Front, PostgresError> {
        self.connection.wire.command_ended();
        self.ended = true;
        if self.archives_begun != self.tablespaces.len() + usize::from(self.manifest_wanted) {
            return Err(PostgresError::protocol("the backup ended before its last archive or its manifest"));
        }
        let (stop_lsn, stop_timeline) =
            self.stop.ok_or_else(|| PostgresError::protocol("the backup's end position is missing"))?;
        if stop_lsn < self.start_lsn {
            return Err(PostgresError::protocol("the backup ends before its start"));
        }
        Ok(Front::End { stop_lsn, stop_timeline })
    }

    /// A message of the single copy of 15 and later; its first byte is its type.
    fn take_typed(&mut self, length: usize) -> Result<Typed, PostgresError> {
        let unread = &self.connection.wire.unread()[HEADER..];
        let Some(&kind) = unread.first() else {
            return if length == 0 { Err(PostgresError::protocol("an empty message")) } else { Ok(Typed::NotThere) };
        };
        match kind {
            b'd' => {
                if self.content == Content::Nothing {
                    return Err(PostgresError::protocol("data of no archive came"));
                }
                self.connection.wire.consume(HEADER + 1);
                self.data_left = length - 1;
                Ok(Typed::Nothing)
            }
            // A new archive's name and place, the manifest's beginning, progress: all short.
            b'n' | b'm' | b'p' if length > 8192 => Err(PostgresError::protocol("an archive's name is too long")),
            b'n' | b'm' | b'p' if unread.len() < length => Ok(Typed::NotThere),
            b'n' => {
                let name = text(unread[1..length].split(|&b| b == 0).next().unwrap_or_default());
                self.connection.wire.consume(HEADER + length);
                let front = self.begin_next()?;
                let expected = match front {
                    Front::Archive { tablespace: Some(oid) } => format!("{oid}.tar"),
                    Front::Archive { tablespace: None } => "base.tar".into(),
                    _ => return Err(PostgresError::protocol("the backup has more archives than its list")),
                };
                if name != expected {
                    return Err(PostgresError::protocol(format!("archive {name} came, expected {expected}")));
                }
                Ok(Typed::Front(front))
            }
            b'm' => {
                self.connection.wire.consume(HEADER + length);
                match self.begin_next()? {
                    Front::ManifestBegins => Ok(Typed::Front(Front::ManifestBegins)),
                    _ => Err(PostgresError::protocol("the manifest came before the last archive")),
                }
            }
            b'p' => {
                self.connection.wire.consume(HEADER + length);
                Ok(Typed::Nothing)
            }
            _ => Err(PostgresError::protocol("a message of the backup has an unknown type")),
        }
    }
}

/// One checkpoint that is running is waited for, and then ours is spread as far.
fn spread(limit: Duration, checkpoint_timeout: &str) -> Duration {
    limit + 2 * shown_duration(checkpoint_timeout).unwrap_or(CHECKPOINT_TIMEOUT_MAX).min(CHECKPOINT_TIMEOUT_MAX)
}

enum Typed {
    NotThere,
    Nothing,
    Front(Front),
}

fn parse_tablespace(row: &Row) -> Result<Tablespace, PostgresError> {
    let has = |index: usize| row.get(index).is_some_and(Option::is_some);
    let kib: u64 = if has(2) { parsed_column(row, 2, "a tablespace's size")? } else { 0 };
    let location = optional_column(row, 1, "a tablespace's location")?.map(str::to_owned);
    if location.as_ref().is_some_and(|location| location.len() > LOCATION_MAX) {
        return Err(PostgresError::protocol("a tablespace's location is too long"));
    }
    Ok(Tablespace {
        oid: has(0).then(|| parsed_column(row, 0, "a tablespace's OID")).transpose()?,
        location,
        size_bytes: kib.saturating_mul(1024),
    })
}

fn command(options: &BackupOptions, multiplexed: bool) -> Result<String, PostgresError> {
    if options.label.len() > 1024 || options.label.contains('\0') || options.label.contains('\n') {
        return Err(PostgresError::settings("a backup's label has at most 1,024 bytes on one line"));
    }
    let label = options.label.replace('\'', "''");
    let rate = options.max_rate_kib.map(|rate| rate.clamp(RATE_MIN, RATE_MAX));
    let mut command = String::from("BASE_BACKUP ");
    if multiplexed {
        let checkpoint = if options.fast_checkpoint { "fast" } else { "spread" };
        write!(command, "(LABEL '{label}', PROGRESS true, CHECKPOINT '{checkpoint}', WAIT false, TABLESPACE_MAP true")
            .and_then(|()| rate.map_or(Ok(()), |rate| write!(command, ", MAX_RATE {rate}")))
            .expect("writing to a String cannot fail");
        command.push_str(if options.manifest { ", MANIFEST 'yes', MANIFEST_CHECKSUMS 'CRC32C')" } else { ")" });
        return Ok(command);
    }
    write!(command, "LABEL '{label}' PROGRESS{} NOWAIT", if options.fast_checkpoint { " FAST" } else { "" })
        .and_then(|()| rate.map_or(Ok(()), |rate| write!(command, " MAX_RATE {rate}")))
        .expect("writing to a String cannot fail");
    command.push_str(" TABLESPACE_MAP");
    command.push_str(if options.manifest { " MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'" } else { "" });
    Ok(command)
}

#[cfg(test)]
#[path = "base_backup_tests.rs"]
mod tests;
