use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::failure::NextStep;

use super::socket::Transport;
use super::tls::TlsError;

/// What a server says in an ErrorResponse. Texts are cut to 1,000 bytes and stripped of control characters, since a server may be hostile.
///
/// Source: "Error and Notice Message Fields" in the protocol chapter of PostgreSQL's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerMessage {
    /// `FATAL`, `ERROR`, …, not localized.
    pub severity: String,
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The function in PostgreSQL's source that reports it; unlike the message never translated.
    pub routine: Option<String>,
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ServerMessage {}

/// A setting or a query, for which REPLICATION is not what is lacking.
pub(super) const ASKING: &str = "ask the server for this";

/// Everything that can go wrong with one server, one variant for each thing that an operator acts on.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    #[error("the connection settings are wrong: {why}")]
    Settings { why: String },
    #[error("the connection option {option} is not supported: {why}")]
    UnsupportedOption { option: String, why: String },
    #[error("cannot speak TLS with PostgreSQL at {target}")]
    Tls { target: String, source: Box<TlsError> },
    #[error("the password file {} cannot be used", path.display())]
    PasswordFile { path: PathBuf, source: io::Error },
    #[error("cannot connect to PostgreSQL at {target}")]
    Connect { target: String, source: io::Error },
    #[error("PostgreSQL at {target} did not let us in within {} s", limit.as_secs_f64())]
    ConnectTimeout { target: String, limit: Duration },
    /// The source is the reason to act on; `others` has those of the other hosts, `whose` the host that the source does not name.
    #[error("none of the hosts {tried} can be used ({others}){whose}")]
    NoHost { tried: String, others: String, whose: String, source: Box<PostgresError> },
    #[error("PostgreSQL at {target} is not what target_session_attrs={wanted} asks for")]
    SessionAttributes { target: String, wanted: &'static str },
    #[error("PostgreSQL at {target} is version {version}; 13 or later is needed")]
    Version { target: String, version: String },
    #[error("PostgreSQL at {target} wants a password for user \"{user}\", and none was given{note}")]
    PasswordMissing { target: String, user: String, note: String },
    #[error("PostgreSQL at {target} refused the password of user \"{user}\"")]
    PasswordRefused { target: String, user: String, source: Box<ServerMessage> },
    #[error("pg_hba.conf of PostgreSQL at {target} does not let user \"{user}\" in {over}")]
    NoHbaLine { target: String, user: String, over: Transport, source: Box<ServerMessage> },
    #[error("PostgreSQL at {target} has no role \"{user}\" that may log in")]
    NoRole { target: String, user: String, source: Box<ServerMessage> },
    #[error("PostgreSQL at {target} does not let user \"{user}\" into the database \"{database}\"")]
    NoDatabase { target: String, user: String, database: String, source: Box<ServerMessage> },
    #[error("PostgreSQL at {target} asks for an authentication that cannot be done: {why}")]
    AuthenticationMethod { target: String, why: String },
    #[error("PostgreSQL at {target} did not prove that it knows the password: {why}")]
    ServerNotProven { target: String, why: String },
    #[error("the role lacks the privilege to {what}")]
    Privilege { what: &'static str, source: Box<ServerMessage> },
    #[error("wal_level of the server is too low for replication")]
    WalLevel { source: Box<ServerMessage> },
    #[error("all replication slots of the server are taken")]
    TooManySlots { source: Box<ServerMessage> },
    #[error("no WAL sender or connection of the server is free")]
    TooManyConnections { source: Box<ServerMessage> },
    #[error("the replication slot \"{slot}\" does not exist")]
    SlotMissing { slot: String, source: Box<ServerMessage> },
    #[error("the replication slot \"{slot}\" is in use by another process")]
    SlotInUse { slot: String, source: Box<ServerMessage> },
    #[error("the replication slot \"{slot}\" is not a physical one")]
    SlotNotPhysical { slot: String },
    #[error("the replication slot \"{slot}\" was invalidated by the server")]
    SlotInvalidated { slot: String, source: Box<ServerMessage> },
    #[error("the server has already removed the WAL that was asked for")]
    WalRemoved { source: Box<ServerMessage> },
    #[error("the server's WAL does not have the position or timeline that was asked for")]
    NotInHistory { source: Box<ServerMessage> },
    #[error("the server gave the base backup up")]
    BackupVoid { source: Box<ServerMessage> },
    #[error("pages of the database fail PostgreSQL's own checksums")]
    PagesDamaged { source: Box<ServerMessage> },
    #[error("the server is starting up or shutting down")]
    NotReady { source: Box<ServerMessage> },
    #[error("the server ended the connection")]
    Disconnected { source: Option<io::Error> },
    #[error("the server did not answer {what} within {} s", limit.as_secs_f64())]
    Timeout { what: &'static str, limit: Duration },
    #[error("the server broke the replication protocol: {what}")]
    Protocol { what: String },
    #[error("the server refused {what}")]
    Refused { what: &'static str, source: Box<ServerMessage> },
    #[error("the SQL connection failed")]
    Sql { source: tokio_postgres::Error },
}

impl PostgresError {
    pub(super) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }

    pub(super) fn settings(why: impl Into<String>) -> Self {
        Self::Settings { why: why.into() }
    }

    /// `Stop` only where the same settings can never work; a wrong password or a missing slot heals on the server's side.
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Settings { .. } | Self::UnsupportedOption { .. } => NextStep::Stop,
            Self::NoHost { source, .. } => source.next_step(),
            // The server no longer has these bytes: asking again cannot help, somebody must decide.
            Self::WalRemoved { .. } | Self::SlotInvalidated { .. } => NextStep::Stop,
            // It may have been promoted since it was asked who it is: what it says then decides.
            Self::NotInHistory { .. }
            // Certificates are renewed, and read anew each time.
            | Self::Tls { .. }
            | Self::PasswordFile { .. }
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::SessionAttributes { .. }
            | Self::Version { .. }
            | Self::PasswordMissing { .. }
            | Self::PasswordRefused { .. }
            | Self::NoHbaLine { .. }
            | Self::NoRole { .. }
            | Self::NoDatabase { .. }
            | Self::AuthenticationMethod { .. }
            | Self::ServerNotProven { .. }
            | Self::Privilege { .. }
            | Self::WalLevel { .. }
            | Self::TooManySlots { .. }
            | Self::TooManyConnections { .. }
            | Self::SlotMissing { .. }
            | Self::SlotInUse { .. }
            | Self::SlotNotPhysical { .. }
            | Self::BackupVoid { .. }
            | Self::PagesDamaged { .. }
            | Self::NotReady { .. }
            | Self::Disconnected { .. }
            | Self::Timeout { .. }
            | Self::Protocol { .. }
            | Self::Refused { .. }
            | Self::Sql { .. } => NextStep::Retry,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Settings { .. } => "correct postgres.url, or the PG* variables and files that it builds on",
            Self::UnsupportedOption { .. } => "remove the option, or give the value that Walden supports",
            Self::Tls { source, .. } => source.hint(),
            Self::PasswordFile { .. } => {
                "let it belong to the user that runs Walden, with mode 0600, holding the password alone"
            }
            Self::Connect { .. } => "check host, port and that the server runs and listens there (listen_addresses)",
            Self::ConnectTimeout { .. } => "check host, port and firewalls, or raise postgres.connect_timeout",
            Self::NoHost { source, .. } => source.hint(),
            Self::SessionAttributes { .. } => {
                "wait until a server of that kind is there, or change target_session_attrs"
            }
            Self::Version { .. } => "upgrade the server",
            Self::PasswordMissing { .. } => {
                "give one by postgres.password_file, PGPASSWORD or ~/.pgpass (database \"replication\", mode 0600)"
            }
            Self::PasswordRefused { .. } => "check the user's password; on the server: ALTER ROLE … PASSWORD",
            Self::NoHbaLine { over: Transport::Plain, .. } => {
                "add a line such as `host replication USER ADDRESS scram-sha-256` (SQL: `host DATABASE …`) to pg_hba.conf and reload; where the line is `hostssl`, use sslmode=prefer or a higher one"
            }
            Self::NoHbaLine { .. } => {
                "add a line such as `host replication USER ADDRESS scram-sha-256` (SQL: `host DATABASE …`) to pg_hba.conf and reload"
            }
            Self::NoRole { .. } => "on the server: CREATE ROLE walden LOGIN REPLICATION PASSWORD '…'",
            Self::NoDatabase { .. } => {
                "name a database that is there (dbname in postgres.url); on the server: GRANT CONNECT ON DATABASE … TO …"
            }
            Self::AuthenticationMethod { .. } => {
                "let pg_hba.conf ask this user for scram-sha-256, md5, password or trust, as require_auth and channel_binding allow"
            }
            Self::ServerNotProven { .. } => {
                "make sure that host and port lead to your own server, and nobody in between"
            }
            Self::Privilege { what: ASKING, .. } => "grant the role what the message names, or pg_monitor",
            Self::Privilege { .. } => "on the server: ALTER ROLE … REPLICATION LOGIN",
            Self::WalLevel { .. } => "set wal_level = replica (and max_wal_senders > 0) and restart the server",
            Self::TooManySlots { .. } => "raise max_replication_slots, or drop slots that nobody uses",
            Self::TooManyConnections { .. } => {
                "raise max_wal_senders (0 switches replication off; wal_level must be replica) or max_connections, or end sessions that nobody uses"
            }
            Self::SlotMissing { .. } => "set postgres.create_slot = true, or create the physical slot on the server",
            Self::SlotInUse { .. } => {
                "another receiver uses this slot (pg_replication_slots.active_pid): stop it, or set postgres.slot"
            }
            Self::SlotNotPhysical { .. } => "set postgres.slot to another name; a logical slot cannot be used",
            Self::SlotInvalidated { .. } => {
                "drop the slot, let Walden create it again and take a new base backup; raise max_slot_wal_keep_size"
            }
            Self::WalRemoved { .. } => "WAL is missing from here on: take a new base backup",
            Self::NotInHistory { .. } => {
                "the server is another branch of the cluster's history, or was rolled back: find out before anything else"
            }
            Self::BackupVoid { .. } => {
                "take it again; one from a standby needs full_page_writes = on on its primary, and ends when the standby is promoted"
            }
            Self::PagesDamaged { .. } => {
                "the server's log names the files; keep older backups, and repair the database before the next backup"
            }
            Self::NotReady { .. } => "wait; Walden tries again by itself",
            Self::Disconnected { .. } => "look into the server's log; Walden connects again by itself",
            Self::Timeout { .. } => "check the server's load and the network; Walden tries again by itself",
            Self::Protocol { .. } => {
                "make sure that host and port lead to a PostgreSQL server, without a pooler between"
            }
            Self::Refused { .. } => "look into the server's log",
            Self::Sql { .. } => "check that the user may open ordinary connections (its own line in pg_hba.conf)",
        }
    }

    /// The server's own words, where there are any.
    pub fn server_message(&self) -> Option<&ServerMessage> {
        match self {
            Self::NoHost { source, .. } => source.server_message(),
            Self::PasswordRefused { source, .. }
            | Self::NoHbaLine { source, .. }
            | Self::NoRole { source, .. }
            | Self::NoDatabase { source, .. }
            | Self::Privilege { source, .. }
            | Self::WalLevel { source }
            | Self::TooManySlots { source }
            | Self::TooManyConnections { source }
            | Self::SlotMissing { source, .. }
            | Self::SlotInUse { source, .. }
            | Self::SlotInvalidated { source, .. }
            | Self::WalRemoved { source }
            | Self::NotInHistory { source }
            | Self::BackupVoid { source }
            | Self::PagesDamaged { source }
            | Self::NotReady { source }
            | Self::Refused { source, .. } => Some(source),
            _ => None,
        }
    }

    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Sql { source } => source.code().map(|code| code.code()),
            _ => self.server_message().map(|message| message.sqlstate.as_str()),
        }
    }

    pub fn is_slot_missing(&self) -> bool {
        matches!(self, Self::SlotMissing { .. })
    }

    pub fn is_slot_in_use(&self) -> bool {
        matches!(self, Self::SlotInUse { .. })
    }

    /// The slot can never again give WAL without a gap.
    pub fn is_slot_lost(&self) -> bool {
        matches!(self, Self::SlotInvalidated { .. })
    }

    /// "requested WAL segment … has already been removed".
    pub fn is_wal_removed(&self) -> bool {
        matches!(self, Self::WalRemoved { .. })
    }

    /// The server knows us not, or not well enough: password, role, pg_hba.conf, method.
    pub fn is_auth(&self) -> bool {
        match self {
            Self::NoHost { source, .. } => source.is_auth(),
            Self::PasswordMissing { .. }
            | Self::PasswordRefused { .. }
            | Self::NoHbaLine { .. }
            | Self::NoRole { .. }
            | Self::NoDatabase { .. }
            | Self::AuthenticationMethod { .. }
            | Self::ServerNotProven { .. }
            | Self::Privilege { .. } => true,
            _ => false,
        }
    }
}
