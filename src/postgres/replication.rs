//! The replication connection between streams: small commands, and the ways into a WAL stream or a base backup.
//!
//! Source: "Streaming Replication Protocol" in the protocol chapter of PostgreSQL's documentation.

use std::time::Duration;

use crate::wal::{Lsn, SegmentSize, SystemIdentifier, TimelineId};

use super::answer::{Row, column, optional_column, parsed_column};
use super::asked::Asked;
use super::hosts::Host;
use super::search::{self, Address};
use super::settings::{ConnectSettings, SessionAttributes};
use super::wire::Wire;
use super::{BackupOptions, BaseBackup, PostgresError, WalStream, startup};

/// For one small command. Longer waits (a checkpoint before a base backup) have no such limit.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
const OLDEST_VERSION: u32 = 13_00_00;
/// `READ_REPLICATION_SLOT`, the option list of BASE_BACKUP and its single stream.
pub(super) const VERSION_15: u32 = 15_00_00;

/// A physical replication connection (`replication=true`) on which no command is running.
///
/// A future of one of its calls that is dropped before its end leaves the connection unusable: every later call fails with `Disconnected`.
pub struct ReplicationConnection {
    pub(super) wire: Wire,
    version: u32,
    target: String,
    host_index: usize,
}

/// The answer to IDENTIFY_SYSTEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SystemInfo {
    pub system_identifier: SystemIdentifier,
    pub timeline: TimelineId,
    /// What is flushed on a primary; on a standby what it has replayed.
    pub flush_lsn: Lsn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    Missing,
    NotPhysical,
    Exists {
        /// `None`: the slot reserves no WAL yet.
        restart_lsn: Option<Lsn>,
        restart_timeline: Option<TimelineId>,
    },
    /// Before PostgreSQL 15 only SQL can tell.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    Created,
    /// A slot of that name was there already, of whatever kind.
    Exists,
}

/// What START_REPLICATION led to.
pub enum StartOutcome {
    Streaming(WalStream),
    /// The start is just where the timeline ends: there is nothing to stream, history goes on elsewhere.
    AtEnd {
        connection: ReplicationConnection,
        next_timeline: TimelineId,
        switch: Lsn,
    },
}

impl ReplicationConnection {
    /// Connects to the first host that lets us in and is what `target_session_attrs` asks for. Each address of each host has
    /// `connect_timeout`.
    pub async fn connect(settings: &ConnectSettings) -> Result<Self, PostgresError> {
        let mut found = Self::connect_as(settings, settings.session).await;
        // "Prefer" means: look for a standby first, then take any.
        if settings.session == SessionAttributes::PreferStandby && found.is_err() {
            found = Self::connect_as(settings, SessionAttributes::Any).await;
        }
        found
    }

    /// Connects to the host numbered `index` alone, primary or standby, whatever `target_session_attrs` asks for.
    pub async fn connect_to_any(settings: &ConnectSettings, index: usize) -> Result<Self, PostgresError> {
        Self::connect(&settings.this_host(index)).await
    }

    async fn connect_as(settings: &ConnectSettings, wanted: SessionAttributes) -> Result<Self, PostgresError> {
        let attempt = |index, host: Host, address: Address| async move {
            let mut connection = Self::enter(settings, &host, &address, index).await?;
            if !connection.is(wanted).await? {
                return Err(PostgresError::SessionAttributes { target: connection.target, wanted: wanted.name() });
            }
            Ok(connection)
        };
        search::first_host(settings, attempt).await
    }

    /// Connects to one address of a host, whatever part it has. The caller bounds the time.
    pub(super) async fn enter(
        settings: &ConnectSettings,
        host: &Host,
        address: &Address,
        host_index: usize,
    ) -> Result<Self, PostgresError> {
        let wire = startup::establish(settings, host, address).await?;
        let target = host.to_string();
        let spoken = wire.parameter("server_version").unwrap_or_default().to_owned();
        match parse_version(&spoken) {
            Some(version) if version >= OLDEST_VERSION => Ok(Self { wire, version, target, host_index }),
            _ => Err(PostgresError::Version { target, version: spoken }),
        }
    }

    /// 14 and later report the server's state at the start; before, `SHOW` tells whether it writes. That is the same for "primary" but
    /// on a primary whose default_transaction_read_only is on.
    async fn is(&mut self, wanted: SessionAttributes) -> Result<bool, PostgresError> {
        if matches!(wanted, SessionAttributes::Any) {
            return Ok(true);
        }
        let standby = self.wire.parameter("in_hot_standby").map(|value| value == "on");
        let read_only = self.show("transaction_read_only").await? == "on";
        Ok(match wanted {
            SessionAttributes::Any => true,
            SessionAttributes::ReadWrite => !read_only,
            SessionAttributes::ReadOnly => read_only,
            SessionAttributes::Primary => !standby.unwrap_or(read_only),
            SessionAttributes::Standby | SessionAttributes::PreferStandby => standby.unwrap_or(read_only),
        })
    }

    #[cfg(test)]
    pub(super) fn scripted(script: Vec<u8>, step: usize, version: u32) -> Self {
        Self::over(super::wire::testing::scripted(script, step), version)
    }

    /// Over a connection that is let in already, for tests and fuzz targets.
    pub(super) fn over(wire: Wire, version: u32) -> Self {
        Self { wire, version, target: "script".into(), host_index: 0 }
    }

    /// `server_version_num`, such as 170010.
    pub fn server_version(&self) -> u32 {
        self.version
    }

    /// Host and port or socket, for people.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// How the connection runs and whom it vouches for, for people: "TLS 1.3, certificate verified".
    pub fn security(&self) -> String {
        self.wire.security()
    }

    /// TCP to another host on which nothing proves that it is the right one.
    pub fn may_be_another(&self) -> bool {
        self.wire.may_be_another()
    }

    /// Which of the settings' hosts this is; for `ConnectSettings::only_host`.
    pub fn host_index(&self) -> usize {
        self.host_index
    }

    pub async fn identify_system(&mut self) -> Result<SystemInfo, PostgresError> {
        let row = self.one_row("IDENTIFY_SYSTEM").await?;
        Ok(SystemInfo {
            system_identifier: parsed_column(&row, 0, "the system identifier")?,
            timeline: timeline(&row, 1)?,
            flush_lsn: parsed_column(&row, 2, "the flush position")?,
        })
    }

    /// `SHOW name`, for settings that every role may see.
    pub async fn show(&mut self, name: &str) -> Result<String, PostgresError> {
        let plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
        if !plain {
            return Err(PostgresError::settings("a setting's name has other characters than letters, digits, _ and ."));
        }
        let rows = self.wire.command(&format!("SHOW {name}"), Asked::Other("SHOW"), COMMAND_LIMIT).await?;
        let row = only(rows, "SHOW")?;
        column(&row, 0, "the setting").map(str::to_owned)
    }

    /// The cluster's WAL segment size, fixed by initdb.
    pub async fn segment_size(&mut self) -> Result<SegmentSize, PostgresError> {
        let text = self.show("wal_segment_size").await?;
        parse_size(&text)
            .and_then(|bytes| SegmentSize::new(bytes).ok())
            .ok_or_else(|| PostgresError::protocol("wal_segment_size is not a size that PostgreSQL has"))
    }

    /// What the server knows of a slot, without SQL.
    pub async fn read_slot(&mut self, name: &str) -> Result<SlotState, PostgresError> {
        if self.version < VERSION_15 {
            return Ok(SlotState::Unknown);
        }
        let command = format!("READ_REPLICATION_SLOT {}", quote_slot(name)?);
        let rows = match self.wire.command(&command, Asked::ReadSlot { slot: name }, COMMAND_LIMIT).await {
            Ok(rows) => rows,
            Err(PostgresError::SlotNotPhysical { .. }) => return Ok(SlotState::NotPhysical),
            Err(PostgresError::SlotMissing { .. }) => return Ok(SlotState::Missing),
            Err(error) => return Err(error),
        };
        let row = only(rows, "READ_REPLICATION_SLOT")?;
        // A slot that does not exist is a row of NULLs.
        match optional_column(&row, 0, "the slot's type")? {
            None => Ok(SlotState::Missing),
            Some("physical") => {
                let has = |index| row.get(index).is_some_and(Option::is_some);
                let restart_lsn = has(1).then(|| parsed_column(&row, 1, "the slot's position")).transpose()?;
                let restart_timeline = has(2).then(|| timeline(&row, 2)).transpose()?;
                Ok(SlotState::Exists { restart_lsn, restart_timeline })
            }
            Some(_) => Ok(SlotState::NotPhysical),
        }
    }

    /// Creates a permanent physical slot that reserves WAL from now on (I1: before anything else).
    pub async fn create_physical_slot(&mut self, name: &str) -> Result<CreateOutcome, PostgresError> {
        let command = format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quote_slot(name)?);
        match self.wire.command(&command, Asked::CreateSlot, COMMAND_LIMIT).await {
            Ok(_) => Ok(CreateOutcome::Created),
            // duplicate_object
            Err(error) if error.sqlstate() == Some("42710") => Ok(CreateOutcome::Exists),
            Err(error) => Err(error),
        }
    }

    /// Drops the slot. An absent one is fine.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), PostgresError> {
        let command = format!("DROP_REPLICATION_SLOT {}", quote_slot(name)?);
        match self.wire.command(&command, Asked::Other("DROP_REPLICATION_SLOT"), COMMAND_LIMIT).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_slot_missing() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// A timeline's history file, byte for byte. `None`: the server does not have it (timeline 1 never has one).
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<Option<Vec<u8>>, PostgresError> {
        let command = format!("TIMELINE_HISTORY {timeline}");
        let rows = match self.wire.command(&command, Asked::Other("TIMELINE_HISTORY"), COMMAND_LIMIT).await {
            Ok(rows) => rows,
            // undefined_file
            Err(error) if error.sqlstate() == Some("58P01") => return Ok(None),
            Err(error) => return Err(error),
        };
        let row = only(rows, "TIMELINE_HISTORY")?;
        if column(&row, 0, "the history file's name")? != timeline.history_file_name() {
            return Err(PostgresError::protocol("another history file came than was asked for"));
        }
        match row.get(1) {
            Some(Some(content)) => Ok(Some(content.to_vec())),
            _ => Err(PostgresError::protocol("the history file has no content")),
        }
    }

    /// Streams WAL of `timeline` from `start`. The first byte that comes is the one at `start`.
    pub async fn start_replication(
        mut self,
        slot: Option<&str>,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<StartOutcome, PostgresError> {
        let with_slot = slot.map(quote_slot).transpose()?.map(|name| format!("SLOT {name} ")).unwrap_or_default();
        let command = format!("START_REPLICATION {with_slot}PHYSICAL {start} TIMELINE {timeline}");
        let work = self.begin_stream(&command, slot);
        let what = "START_REPLICATION";
        let limit = COMMAND_LIMIT;
        let end = tokio::time::timeout(limit, work).await.unwrap_or(Err(PostgresError::Timeout { what, limit }))?;
        Ok(match end {
            None => StartOutcome::Streaming(WalStream::new(self, start)),
            Some((next_timeline, switch)) => StartOutcome::AtEnd { connection: self, next_timeline, switch },
        })
    }

    /// `None`: CopyBoth has begun.
    async fn begin_stream(
        &mut self,
        command: &str,
        slot: Option<&str>,
    ) -> Result<Option<(TimelineId, Lsn)>, PostgresError> {
        self.wire.begin_command(command).await?;
        let mut next = None;
        loop {
            match self.wire.message().await? {
                (b'W', _) => return Ok(None),
                (b'D', body) => next = Some(next_timeline(&super::answer::parse_row(body)?)?),
                (b'T' | b'C', _) => {}
                (b'Z', _) => {
                    self.wire.command_ended();
                    return next.map(Some).ok_or_else(|| PostgresError::protocol("streaming neither began nor ended"));
                }
                (b'E', body) => return Err(self.wire.fail(Asked::Stream { slot }, &body).await),
                (tag, _) => return Err(super::wire::unexpected(tag, "START_REPLICATION")),
            }
        }
    }

    /// Begins a base backup; returns when the server has made its checkpoint and tells where the backup starts.
    pub async fn base_backup(self, options: &BackupOptions) -> Result<BaseBackup, PostgresError> {
        BaseBackup::begin(self, options).await
    }

    async fn one_row(&mut self, command: &'static str) -> Result<Row, PostgresError> {
        only(self.wire.command(command, Asked::Other(command), COMMAND_LIMIT).await?, command)
    }
}

fn only(mut rows: Vec<Row>, what: &str) -> Result<Row, PostgresError> {
    match (rows.pop(), rows.pop()) {
        (Some(row), None) => Ok(row),
        _ => Err(PostgresError::protocol(format!("{what} must give one row"))),
    }
}

pub(super) fn timeline(row: &Row, index: usize) -> Result<TimelineId, PostgresError> {
    let number: u32 = parsed_column(row, index, "a timeline")?;
    TimelineId::new(number).map_err(|_| PostgresError::protocol("timeline 0 does not exist"))
}

/// The row that ends a timeline: the next one, and where it begins.
pub(super) fn next_timeline(row: &Row) -> Result<(TimelineId, Lsn), PostgresError> {
    Ok((timeline(row, 0)?, parsed_column(row, 1, "the switch position")?))
}

/// Slot names are lower-case letters, digits and underscores, up to 63.
///
/// Source: `ReplicationSlotValidateName` in PostgreSQL `src/backend/replication/slot.c`.
fn quote_slot(name: &str) -> Result<String, PostgresError> {
    let valid = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if valid {
        return Ok(format!("\"{name}\""));
    }
    Err(PostgresError::settings("a slot's name is 1 to 63 lower-case letters, digits and underscores"))
}

/// `server_version_num` from `server_version`: "15.18 (Debian …)" is 150018, "18beta1" 180000.
fn parse_version(text: &str) -> Option<u32> {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let major_length = digits(text);
    let major: u32 = text[..major_length].parse().ok().filter(|&major| major < 10_000)?;
    let minor = match text[major_length..].strip_prefix('.') {
        Some(rest) => rest[..digits(rest)].parse().ok().filter(|&minor| minor < 10_000)?,
        None => 0,
    };
    Some(major * 10_000 + minor)
}

/// A size as SHOW prints it: a number and B, kB, MB, GB or TB.
fn parse_size(text: &str) -> Option<u64> {
    let at = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text[..at].parse().ok()?;
    let unit = match &text[at..] {
        "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_sizes_are_read_as_the_server_prints_them() {
        assert_eq!(parse_version("15.18 (Debian 15.18-0+deb12u1)"), Some(15_00_18));
        assert_eq!(parse_version("17.10"), Some(17_00_10));
        assert_eq!(parse_version("18beta1"), Some(18_00_00));
        assert_eq!(parse_version("9.6.24"), Some(9_00_06));
        assert_eq!(parse_version("x"), None);
        assert_eq!(parse_size("16MB"), Some(16 << 20));
        assert_eq!(parse_size("1GB"), Some(1 << 30));
        assert_eq!(parse_size("16"), None);
    }

    #[test]
    fn a_slot_name_that_could_carry_a_command_is_refused() {
        assert_eq!(quote_slot("walden_1").ok().as_deref(), Some("\"walden_1\""));
        for name in ["", "A", "a\"b", "a b", "a;b", &"a".repeat(64)] {
            assert!(quote_slot(name).is_err());
        }
    }

    use crate::postgres::wire::testing::{data_row, frame};

    fn server(version: u32, messages: &[Vec<u8>]) -> ReplicationConnection {
        ReplicationConnection::scripted(messages.concat(), 7, version)
    }

    fn ready() -> Vec<u8> {
        frame(b'Z', b"I")
    }

    #[tokio::test]
    async fn answers_are_parsed_at_the_door() {
        let row = data_row(&[Some("7710441411859114572"), Some("3"), Some("0/15C5B20"), None]);
        let mut good = server(15_00_00, &[frame(b'T', b""), row, frame(b'C', b"x\0"), ready()]);
        let info = good.identify_system().await.unwrap();
        assert_eq!((info.timeline.get(), info.flush_lsn.to_string()), (3, "0/15C5B20".into()));
        for columns in [
            &[Some("x"), Some("3"), Some("0/1")][..],
            &[Some("1"), Some("0"), Some("0/1")],
            &[Some("1"), Some("3"), Some("1")],
            &[Some("1"), Some("3")],
            &[Some("1"), None, Some("0/1")],
        ] {
            let error = server(15_00_00, &[data_row(columns), ready()]).identify_system().await.unwrap_err();
            assert!(matches!(error, PostgresError::Protocol { .. }), "{error:?}");
        }
        assert!(server(15_00_00, &[ready()]).identify_system().await.is_err());
    }

    #[tokio::test]
    async fn a_slot_is_told_apart_and_an_error_leaves_the_connection_usable() {
        let logical = [frame(b'E', b"SERROR\0VERROR\0C55000\0Mno\0\0"), ready()];
        let missing = [data_row(&[None, None, None]), ready()];
        let there = [data_row(&[Some("physical"), Some("0/3000000"), Some("2")]), ready()];
        let mut server = server(15_00_00, &[logical.concat(), missing.concat(), there.concat()]);
        assert_eq!(server.read_slot("a").await.unwrap(), SlotState::NotPhysical);
        assert_eq!(server.read_slot("a").await.unwrap(), SlotState::Missing);
        let exists = SlotState::Exists {
            restart_lsn: Some("0/3000000".parse().unwrap()),
            restart_timeline: Some(TimelineId::new(2).unwrap()),
        };
        assert_eq!(server.read_slot("a").await.unwrap(), exists);
        assert!(matches!(server.identify_system().await, Err(PostgresError::Disconnected { .. })));
    }

    #[tokio::test]
    async fn the_end_of_a_timeline_is_what_the_server_says() {
        let script = [data_row(&[Some("3"), Some("0/5000000")]), frame(b'C', b"x\0"), ready()];
        let start = Lsn::new(0x500_0000);
        let outcome = server(15_00_00, &script).start_replication(None, start, TimelineId::FIRST).await.unwrap();
        assert!(matches!(outcome, StartOutcome::AtEnd { next_timeline, switch, .. }
            if next_timeline.get() == 3 && switch == start));
        let neither = server(15_00_00, &[ready()]).start_replication(None, start, TimelineId::FIRST).await;
        assert!(neither.is_err());
    }
}
