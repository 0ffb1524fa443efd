//! Ordinary SQL beside the replication connection: what it cannot tell (a standby's positions, slots before 15, settings, the clock).
//!
//! Optional: everything still works without it, less is known. Every session is read-only and each statement has a time limit.

use std::error::Error;
use std::io;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};
use tokio_postgres::types::{FromSql, PgLsn, ToSql, Type};
use tokio_postgres::{Client, Row};

use crate::wal::{Lsn, PgTime};

use super::answer::text;
use super::asked::Asked;
use super::hosts::Host;
use super::search::{self, Address};
use super::settings::{ConnectSettings, SessionAttributes};
use super::socket::{BoundedFrames, NotAllowed, Socket};
use super::tls::{self, Binding};
use super::{PostgresError, Secret, ServerMessage, SlotState, door};

/// For one statement; the server is told less, so that it gives up first.
const STATEMENT_LIMIT: Duration = Duration::from_secs(15);
/// The connection is set up so. Names are resolved in pg_catalog alone.
const PREPARE: &str = "SET default_transaction_read_only = on; SET search_path = pg_catalog; \
                       SET statement_timeout = '10s'; SET lock_timeout = '5s'; SET idle_session_timeout = 0";
const PREPARE_13: &str = "SET default_transaction_read_only = on; SET search_path = pg_catalog; \
                          SET statement_timeout = '10s'; SET lock_timeout = '5s'";
/// A standby sends what it has replayed, and what it has received beyond. Without a WAL receiver, or since one has begun anew, the first
/// of the two is more (`GetStandbyFlushRecPtr` in `src/backend/replication/walsender.c`). GREATEST passes over NULL.
const HELD_BY_STANDBY: &str = "GREATEST(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())";
/// No answer here comes near it.
const MESSAGE_MAX: u32 = 4 << 20;

/// One SQL connection. Its task ends with it.
pub struct Sql {
    client: Client,
    connection: JoinHandle<()>,
}

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// `None`: it reserves no WAL.
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`; `None` if it reserves no WAL.
    pub wal_status: Option<String>,
    pub active: bool,
    /// The server process that uses it now.
    pub active_pid: Option<i32>,
    /// The `application_name` of that process, where this role may see it.
    pub active_name: Option<String>,
    /// WAL that the server keeps for the slot.
    pub retained_bytes: Option<u64>,
    pub physical: bool,
}

/// What the session's role may do. Superusers may do all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoleInfo {
    pub superuser: bool,
    pub replication: bool,
    /// Member of `pg_monitor`, so that it sees every setting and other roles' sessions.
    pub monitor: bool,
}

/// How many of the server's places for replication are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicationPlaces {
    pub senders: u64,
    pub senders_max: u64,
    pub slots: u64,
    pub slots_max: u64,
}

/// `timestamptz` as it is sent: microseconds since 2000.
struct RawTime(PgTime);

impl<'a> FromSql<'a> for RawTime {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(PgTime::from_pg_micros(i64::from_be_bytes(raw.try_into()?))))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

impl Drop for Sql {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Sql {
    /// Connects to the first host that lets us in and is what `target_session_attrs` asks for.
    ///
    /// The database is the one given; without one the user's, as libpq does, then `postgres`.
    pub async fn connect(settings: &ConnectSettings) -> Result<Self, PostgresError> {
        let found = Self::connect_as(settings, settings.session).await;
        if settings.session == SessionAttributes::PreferStandby && found.is_err() {
            return Self::connect_as(settings, SessionAttributes::Any).await;
        }
        found
    }

    async fn connect_as(settings: &ConnectSettings, wanted: SessionAttributes) -> Result<Self, PostgresError> {
        let attempt = |_, host: Host, address: Address| async move {
            Self::connect_host(settings, &host, &address, wanted).await
        };
        search::first_host(settings, attempt).await
    }

    async fn connect_host(
        settings: &ConnectSettings,
        host: &Host,
        address: &Address,
        wanted: SessionAttributes,
    ) -> Result<Self, PostgresError> {
        if let Some(database) = &settings.dbname {
            return Self::connect_database(settings, host, address, database, wanted).await;
        }
        match Self::connect_database(settings, host, address, &settings.user, wanted).await {
            // invalid_catalog_name: no such database
            Err(error) if error.sqlstate() == Some("3D000") => {
                Self::connect_database(settings, host, address, "postgres", wanted).await
            }
            other => other,
        }
    }

    async fn connect_database(
        settings: &ConnectSettings,
        host: &Host,
        address: &Address,
        database: &str,
        wanted: SessionAttributes,
    ) -> Result<Self, PostgresError> {
        let (reader, place, name) = (settings.clone(), host.clone(), database.to_owned());
        let read = tokio::task::spawn_blocking(move || reader.password_for(&place, &name));
        let password = read.await.map_err(|error| PostgresError::settings(error.to_string()))??;
        let log_in = |socket| Self::log_in(socket, settings, host, database, &password);
        let sql = door::enter(settings, host, address, log_in).await?;
        sql.prepare(wanted, &host.to_string()).await?;
        Ok(sql)
    }

    async fn log_in(
        socket: Socket,
        settings: &ConnectSettings,
        host: &Host,
        database: &str,
        (password, note): &(Option<Secret>, String),
    ) -> Result<Self, PostgresError> {
        let target = host.to_string();
        let mut config = tokio_postgres::Config::new();
        config.user(&settings.user).dbname(database).channel_binding(match settings.tls.binding {
            Binding::Disable => tokio_postgres::config::ChannelBinding::Disable,
            Binding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
            Binding::Require => tokio_postgres::config::ChannelBinding::Require,
        });
        match socket.tls() {
            // It is there already; this way nothing is negotiated.
            Some(_) => config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct),
            None => config.ssl_mode(SslMode::Disable),
        };
        if !settings.application_name.is_empty() {
            // A name of its own: as a synchronous standby only the stream may count.
            config.application_name(format!("{}_sql", settings.application_name));
        }
        if let Some(options) = &settings.options {
            config.options(options);
        }
        if let Some(password) = password {
            config.password(password.expose());
        }
        let (user, over) = (settings.user.as_str(), socket.transport());
        let asked = Asked::Startup { target: &target, user, over, database: Some(database) };
        let socket = BoundedFrames::new(socket, MESSAGE_MAX, settings.allowed);
        let (client, connection) = config.connect_raw(socket, Encrypted).await.map_err(|source| {
            let why = source.source().map(ToString::to_string).unwrap_or_default();
            if password.is_none() && why.contains("password missing") {
                let (target, user, note) = (target.clone(), settings.user.clone(), note.clone());
                return PostgresError::PasswordMissing { target, user, note };
            }
            if why.contains("channel binding") {
                let why = "it does not bind the login to the connection, as channel_binding=require wants".into();
                return PostgresError::AuthenticationMethod { target: target.clone(), why };
            }
            refused_before(&source, &target).unwrap_or_else(|| from_sql_error(asked, source))
        })?;
        // Its error reaches the caller through the client, whose calls then fail.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { client, connection })
    }

    async fn prepare(&self, wanted: SessionAttributes, target: &str) -> Result<(), PostgresError> {
        // Before this session makes itself read-only.
        let fits = match wanted {
            SessionAttributes::Any => true,
            SessionAttributes::ReadWrite => !self.is_read_only().await?,
            SessionAttributes::ReadOnly => self.is_read_only().await?,
            SessionAttributes::Primary => !self.is_in_recovery().await?,
            SessionAttributes::Standby | SessionAttributes::PreferStandby => self.is_in_recovery().await?,
        };
        if !fits {
            return Err(PostgresError::SessionAttributes { target: target.into(), wanted: wanted.name() });
        }
        // idle_session_timeout exists from 14 on; before, the whole batch is refused and nothing of it done.
        match self.limited(self.client.batch_execute(PREPARE)).await {
            Err(error) if error.sqlstate() == Some("42704") => {
                self.limited(self.client.batch_execute(PREPARE_13)).await
            }
            other => other,
        }
    }

    async fn is_read_only(&self) -> Result<bool, PostgresError> {
        self.value("SELECT pg_catalog.current_setting('transaction_read_only')::bool").await
    }

    async fn limited<T>(
        &self,
        call: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, PostgresError> {
        match tokio::time::timeout(STATEMENT_LIMIT, call).await {
            Ok(result) => result.map_err(|source| from_sql_error(Asked::Other("a query"), source)),
            Err(_) => Err(PostgresError::Timeout { what: "a query", limit: STATEMENT_LIMIT }),
        }
    }

    async fn row(&self, query: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Option<Row>, PostgresError> {
        self.limited(self.client.query_opt(query, values)).await
    }

    async fn value<T: for<'a> FromSql<'a>>(&self, query: &str) -> Result<T, PostgresError> {
        let row = self.row(query, &[]).await?.ok_or_else(|| PostgresError::protocol("a query gave no row"))?;
        get(&row, 0)
    }

    /// The connection is closed; connect anew.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    pub async fn is_in_recovery(&self) -> Result<bool, PostgresError> {
        self.value("SELECT pg_catalog.pg_is_in_recovery()").await
    }

    /// The server's clock, read first, then its flush position: every commit acknowledged before that time lies before the position.
    /// On a standby the position is what it has replayed or received; `Lsn::ZERO` if that is nothing yet.
    pub async fn flush_position(&self) -> Result<(PgTime, Lsn), PostgresError> {
        // Two statements, since one does not promise the order in which it reads the two.
        let time: RawTime = self.value("SELECT pg_catalog.clock_timestamp()").await?;
        let query = format!(
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN {HELD_BY_STANDBY} \
             ELSE pg_catalog.pg_current_wal_flush_lsn() END"
        );
        let position: Option<PgLsn> = self.value(&query).await?;
        Ok((time.0, position.map_or(Lsn::ZERO, |position| Lsn::new(position.into()))))
    }

    /// `None`: there is no such slot.
    pub async fn slot(&self, name: &str) -> Result<Option<SlotInfo>, PostgresError> {
        let query = format!(
            "SELECT slot_type = 'physical', active, restart_lsn, wal_status, \
             pg_catalog.pg_wal_lsn_diff(CASE WHEN pg_catalog.pg_is_in_recovery() THEN {HELD_BY_STANDBY} \
             ELSE pg_catalog.pg_current_wal_lsn() END, restart_lsn)::int8, \
             active_pid, (SELECT application_name FROM pg_catalog.pg_stat_activity WHERE pid = active_pid) \
             FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text::name"
        );
        let Some(row) = self.row(&query, &[&name]).await? else { return Ok(None) };
        let restart: Option<PgLsn> = get(&row, 2)?;
        let retained: Option<i64> = get(&row, 4)?;
        Ok(Some(SlotInfo {
            restart_lsn: restart.map(|position| Lsn::new(position.into())),
            wal_status: get(&row, 3)?,
            active: get(&row, 1)?,
            active_pid: get(&row, 5)?,
            active_name: get::<Option<String>>(&row, 6)?.filter(|name| !name.is_empty()),
            retained_bytes: retained.map(|bytes| u64::try_from(bytes).unwrap_or(0)),
            physical: get(&row, 0)?,
        }))
    }

    /// The same in the words of `READ_REPLICATION_SLOT`, which exists from 15 on, by a connection for this alone. `Unknown`: SQL is not
    /// possible.
    pub async fn slot_state(settings: &ConnectSettings, name: &str) -> SlotState {
        let asked = async { Self::connect(settings).await?.slot(name).await };
        match asked.await {
            Ok(None) => SlotState::Missing,
            Ok(Some(info)) if info.physical => {
                SlotState::Exists { restart_lsn: info.restart_lsn, restart_timeline: None }
            }
            Ok(Some(_)) => SlotState::NotPhysical,
            Err(error) => {
                tracing::debug!(%error, "the slot's position is not known");
                SlotState::Unknown
            }
        }
    }

    /// `async`, `potential`, `sync` or `quorum` of the sender with this application name; `None`: there is none, or it may not be seen.
    pub async fn sync_state(&self, application_name: &str) -> Result<Option<String>, PostgresError> {
        let query = "SELECT sync_state FROM pg_catalog.pg_stat_replication WHERE application_name = $1 \
                     ORDER BY sync_state = 'async' LIMIT 1";
        match self.row(query, &[&application_name]).await? {
            Some(row) => get(&row, 0),
            None => Ok(None),
        }
    }

    /// Standbys of a quorum, other than the named one, that tell what they have applied.
    pub async fn applying_quorum(&self, besides: &str) -> Result<i64, PostgresError> {
        let query = "SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE sync_state = 'quorum' \
                     AND application_name <> $1 AND replay_lsn IS NOT NULL";
        let row = self.row(query, &[&besides]).await?.ok_or_else(|| PostgresError::protocol("a query gave no row"))?;
        get(&row, 0)
    }

    /// Where `synchronous_commit = remote_apply` is set: for the server, or for databases and roles. Sessions that set it themselves
    /// are not seen. `None`: nowhere.
    pub async fn remote_apply(&self) -> Result<Option<String>, PostgresError> {
        if self.setting("synchronous_commit").await?.as_deref() == Some("remote_apply") {
            return Ok(Some("the server's default".into()));
        }
        let query = "SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', 'database ' || d.datname, 'role ' || r.rolname), ', ') \
                     FROM pg_catalog.pg_db_role_setting s LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase \
                     LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole \
                     WHERE 'synchronous_commit=remote_apply' = ANY (s.setconfig)";
        match self.row(query, &[]).await? {
            Some(row) => get(&row, 0),
            None => Ok(None),
        }
    }

    /// Sessions that have waited for a synchronous standby for more than `seconds`. Without `pg_monitor` only this role's own are seen.
    pub async fn waiting_commits(&self, seconds: f64) -> Result<i64, PostgresError> {
        let query = "SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE wait_event = 'SyncRep' AND wait_event_type = 'IPC' \
                     AND query_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1)";
        let row = self.row(query, &[&seconds]).await?.ok_or_else(|| PostgresError::protocol("a query gave no row"))?;
        get(&row, 0)
    }

    pub async fn role(&self) -> Result<RoleInfo, PostgresError> {
        let query = "SELECT rolsuper, rolreplication, pg_catalog.pg_has_role(oid, 'pg_monitor'::name, 'MEMBER') \
                     FROM pg_catalog.pg_roles WHERE rolname = current_user";
        let row =
            self.row(query, &[]).await?.ok_or_else(|| PostgresError::protocol("the session's role has no row"))?;
        Ok(RoleInfo { superuser: get(&row, 0)?, replication: get(&row, 1)?, monitor: get(&row, 2)? })
    }

    /// WAL senders are counted with this role's own.
    pub async fn replication_places(&self) -> Result<ReplicationPlaces, PostgresError> {
        let query = "SELECT (SELECT count(*) FROM pg_catalog.pg_stat_replication), \
                     pg_catalog.current_setting('max_wal_senders')::int8, \
                     (SELECT count(*) FROM pg_catalog.pg_replication_slots), \
                     pg_catalog.current_setting('max_replication_slots')::int8";
        let row = self.row(query, &[]).await?.ok_or_else(|| PostgresError::protocol("a query gave no row"))?;
        let number = |index| -> Result<u64, PostgresError> {
            u64::try_from(get::<i64>(&row, index)?).map_err(|_| PostgresError::protocol("a count is negative"))
        };
        Ok(ReplicationPlaces { senders: number(0)?, senders_max: number(1)?, slots: number(2)?, slots_max: number(3)? })
    }

    /// A setting as `SHOW` prints it; `None`: it does not exist there or this role may not see it.
    pub async fn setting(&self, name: &str) -> Result<Option<String>, PostgresError> {
        match self.row("SELECT pg_catalog.current_setting($1, true)", &[&name]).await {
            Ok(Some(row)) => get(&row, 0),
            Ok(None) => Ok(None),
            Err(PostgresError::Privilege { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// A socket on which TLS is negotiated already, if it is to be.
struct Encrypted;

impl TlsConnect<BoundedFrames<Socket>> for Encrypted {
    type Stream = BoundedFrames<Socket>;
    type Error = io::Error;
    type Future = std::future::Ready<io::Result<Self::Stream>>;

    fn connect(self, stream: BoundedFrames<Socket>) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

impl TlsStream for BoundedFrames<Socket> {
    fn channel_binding(&self) -> ChannelBinding {
        match self.inner().tls().and_then(|tls| tls.end_point.clone()) {
            Some(end_point) => ChannelBinding::tls_server_end_point(end_point),
            None => ChannelBinding::none(),
        }
    }
}

/// What this side, or TLS, had against the login.
fn refused_before(error: &tokio_postgres::Error, target: &str) -> Option<PostgresError> {
    let error = error.source()?.downcast_ref::<io::Error>()?;
    if let Some(refused) = error.get_ref().and_then(|inner| inner.downcast_ref::<NotAllowed>()) {
        return Some(PostgresError::AuthenticationMethod { target: target.into(), why: refused.to_string() });
    }
    tls::of_io(error).map(|error| PostgresError::Tls { target: target.into(), source: Box::new(error) })
}

fn get<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> Result<T, PostgresError> {
    row.try_get(index).map_err(|source| PostgresError::Sql { source })
}

/// The server's own error becomes the variant that an operator knows; anything else stays what it is.
fn from_sql_error(asked: Asked<'_>, source: tokio_postgres::Error) -> PostgresError {
    let Some(said) = source.as_db_error() else {
        if source.is_closed() {
            return PostgresError::Disconnected { source: None };
        }
        return PostgresError::Sql { source };
    };
    asked.classify(ServerMessage {
        severity: text(said.severity().as_bytes()),
        sqlstate: text(said.code().code().as_bytes()),
        message: text(said.message().as_bytes()),
        detail: said.detail().map(|detail| text(detail.as_bytes())),
        hint: said.hint().map(|hint| text(hint.as_bytes())),
        routine: said.routine().map(|routine| text(routine.as_bytes())),
    })
}
