//! The server: connection, privileges, settings, slot.

use std::time::Duration;

use super::agent::Agent;
use super::report::{Check, Report};
use super::slot;
use crate::cli::error::chain;
use crate::cli::output::size as size_text;
use crate::config::Settings;
use crate::daemon;
use crate::postgres::{
    ConnectSettings, PostgresError, ReplicationConnection, ReplicationPlaces, RoleInfo, Sql, names_explicitly,
    names_standby, shown_duration,
};
use crate::telemetry::{Clock, SystemClock};
use crate::wal::SystemIdentifier;

/// Below it ordinary pauses of a busy host or network end the stream again and again.
const SENDER_TIMEOUT_MIN: Duration = Duration::from_secs(3);
/// The stream and a base backup beside it.
const SENDERS_NEEDED: u64 = 2;
/// Without SQL the agent asks for the server's position over a replication connection, which it keeps.
const SENDERS_NEEDED_WITHOUT_SQL: u64 = 3;

/// What the other checks need to know of the server.
#[derive(Debug, Default)]
pub struct Server {
    pub system: Option<SystemIdentifier>,
    /// Its clock minus this host's.
    pub skew_seconds: Option<f64>,
}

pub async fn examine(settings: &Settings, agent: &Agent, report: &mut Report) -> Server {
    let connect = match daemon::postgres_settings(settings) {
        Ok(connect) => connect,
        Err(error) => {
            report.add(Check::error("connection", &error, error.hint()));
            return Server::default();
        }
    };
    match ReplicationConnection::connect(&connect).await {
        Ok(connection) => connected(settings, agent, &connect, connection, report).await,
        Err(error) => {
            refused(&connect, &error, report).await;
            Server::default()
        }
    }
}

/// No replication connection. What SQL can tell of the reason is told as well.
async fn refused(connect: &ConnectSettings, error: &PostgresError, report: &mut Report) {
    let (is_privilege, is_full) = match innermost(error) {
        PostgresError::Privilege { .. } => (true, false),
        PostgresError::TooManyConnections { .. } => (false, true),
        _ => (false, false),
    };
    if is_privilege {
        report.add(Check::good("connection", connect.to_string()));
        return report.add(Check::error("privileges", error, error.hint()));
    }
    if is_full && let Ok(sql) = Sql::connect(connect).await {
        let level = sql.setting("wal_level").await.ok().flatten();
        let places = sql.replication_places().await.ok();
        if level.as_deref() == Some("minimal") || places.is_some_and(|places| places.senders_max == 0) {
            report.add(Check::good("connection", format!("{connect}, by SQL only")));
            report.checks.extend(level.as_deref().map(wal_level));
            return report.checks.extend(places.map(|places| senders(places, SENDERS_NEEDED)));
        }
    }
    report.add(Check::error("connection", error, error.hint()));
}

fn innermost(error: &PostgresError) -> &PostgresError {
    match error {
        PostgresError::NoHost { source, .. } => innermost(source),
        other => other,
    }
}

async fn connected(
    settings: &Settings,
    agent: &Agent,
    connect: &ConnectSettings,
    mut connection: ReplicationConnection,
    report: &mut Report,
) -> Server {
    let version = connection.server_version();
    let (target, user) = (connection.target().to_owned(), connect.user());
    let name = format!("PostgreSQL {}.{} at {target}, user \"{user}\"", version / 10_000, version % 10_000);
    let mut seen = Server::default();
    if let Err(error) = ask(settings, agent, connect, &mut connection, &name, &mut seen, report).await {
        report.add(Check::error("connection", &error, error.hint()));
    }
    seen
}

async fn ask(
    settings: &Settings,
    agent: &Agent,
    connect: &ConnectSettings,
    connection: &mut ReplicationConnection,
    name: &str,
    seen: &mut Server,
    report: &mut Report,
) -> Result<(), PostgresError> {
    let info = connection.identify_system().await?;
    let size = connection.segment_size().await?;
    seen.system = Some(info.system_identifier);
    let size = size_text(size.get());
    report.add(Check::good(
        "connection",
        format!(
            "{name}; {}; system {}, timeline {}, WAL segments of {size}",
            connection.security(),
            info.system_identifier,
            info.timeline
        ),
    ));
    if connection.may_be_another() {
        let message = "nothing proves that this is the right server: its certificate and host are not verified";
        report.add(Check::remark("tls", message, "use sslmode=verify-full with sslrootcert (see docs/operations.md)"));
    }
    // The same server of several, whatever its place in the list.
    let sql = Sql::connect(&connect.only_host(connection.host_index())).await;
    let told = match &sql {
        Ok(sql) => by_sql(settings, sql, report).await,
        Err(error) => {
            report
                .add(Check::good("privileges", "LOGIN and REPLICATION, which is all that is needed; whether it has pg_monitor (optional) is not known without SQL"));
            let hint = format!("optional, for the slot's figures and the server's clock: {}", error.hint());
            report.add(Check::remark("sql", chain(error), hint));
            Told::default()
        }
    };
    seen.skew_seconds = told.skew_seconds;
    report.add(wal_level(&connection.show("wal_level").await?));
    let needed = if agent.is_running { SENDERS_NEEDED - 1 } else { SENDERS_NEEDED };
    // This connection is one of those counted, and is given back.
    let places = told.places.map(|places| ReplicationPlaces { senders: places.senders.saturating_sub(1), ..places });
    report.add(match places {
        Some(places) => senders(places, needed),
        None => senders_without_sql(&connection.show("max_wal_senders").await?),
    });
    let state = Some(connection.read_slot(&settings.postgres.slot).await?);
    let system = seen.system;
    report.add(slot::judge(settings, &slot::Seen { state, info: told.slot, places: told.places, agent, system }));
    report.checks.extend(super::hosts::examine(settings, connect, connection.host_index(), &info).await);
    report.add(sender_timeout(&connection.show("wal_sender_timeout").await?, settings.postgres.status_interval));
    report.checks.extend(synchronous(connect, &connection.show("synchronous_standby_names").await?));
    Ok(())
}

/// What only SQL tells. Each may be missing.
#[derive(Default)]
struct Told {
    skew_seconds: Option<f64>,
    places: Option<ReplicationPlaces>,
    slot: Option<Option<crate::postgres::SlotInfo>>,
}

async fn by_sql(settings: &Settings, sql: &Sql, report: &mut Report) -> Told {
    match try_sql(settings, sql, report).await {
        Ok(told) => told,
        Err(error) => {
            report.add(Check::remark("sql", chain(&error), error.hint()));
            Told::default()
        }
    }
}

async fn try_sql(settings: &Settings, sql: &Sql, report: &mut Report) -> Result<Told, PostgresError> {
    let role = sql.role().await?;
    report.add(Check::good("privileges", privileges(&role)));
    let clock = SystemClock::new();
    let before = clock.wall();
    let (server, _) = sql.flush_position().await?;
    let after = clock.wall();
    // The server read its clock somewhere between the two.
    let now = server.unix_seconds();
    let skew_seconds = Some(now - now.clamp(before.unix_seconds(), after.unix_seconds().max(before.unix_seconds())));
    let places = Some(sql.replication_places().await?);
    let slot = Some(sql.slot(&settings.postgres.slot).await?);
    let role = if sql.is_in_recovery().await? { "a standby" } else { "a primary" };
    report.add(Check::good("sql", format!("works; the server is {role}")));
    Ok(Told { skew_seconds, places, slot })
}

/// LOGIN and REPLICATION are proved by the connection.
fn privileges(role: &RoleInfo) -> String {
    let monitor = match (role.superuser, role.monitor) {
        (true, _) => return "a superuser; LOGIN and REPLICATION are enough, pg_monitor is optional".into(),
        (false, true) => "granted",
        (false, false) => "not granted",
    };
    format!(
        "LOGIN and REPLICATION, which is all that is needed; pg_monitor, which also shows whether commits wait for Walden, is optional: {monitor}"
    )
}

fn wal_level(level: &str) -> Check {
    const NAME: &str = "wal_level";
    match level {
        "replica" | "logical" => Check::good(NAME, level),
        _ => Check::failed(
            NAME,
            format!("wal_level is {level}, which is too low for replication"),
            "set wal_level = replica and max_wal_senders > 0 in postgresql.conf, and restart the server",
        ),
    }
}

/// `places.senders`: used by others.
fn senders(places: ReplicationPlaces, needed: u64) -> Check {
    const NAME: &str = "max_wal_senders";
    let (used, most) = (places.senders, places.senders_max);
    let message = format!("{used} of {most} in use");
    if most.saturating_sub(used) >= needed {
        return Check::good(NAME, message);
    }
    let hint = "raise max_wal_senders and restart the server, or end receivers that nobody needs";
    Check::failed(
        NAME,
        format!("{message}; {needed} must be free, for the stream and for a base backup beside it"),
        hint,
    )
}

/// How many are in use is not known then.
fn senders_without_sql(shown: &str) -> Check {
    const NAME: &str = "max_wal_senders";
    let needed = SENDERS_NEEDED_WITHOUT_SQL;
    match shown.parse::<u64>() {
        Ok(most) if most < needed => Check::failed(
            NAME,
            format!(
                "{most}; without SQL {needed} are needed: the stream, the question for the server's position, and a base backup"
            ),
            "raise max_wal_senders and restart the server, or let the role open ordinary connections",
        ),
        _ => Check::good(NAME, format!("{shown}; without SQL it is not known how many of them are in use")),
    }
}

fn sender_timeout(shown: &str, status_interval: Duration) -> Check {
    const NAME: &str = "wal_sender_timeout";
    let Some(timeout) = shown_duration(shown) else { return Check::good(NAME, shown) };
    if timeout.is_zero() {
        let hint = "set it to 60s, so that the server notices a vanished agent and frees its slot";
        return Check::remark(NAME, "0: the server never ends a dead connection", hint);
    }
    let answered = status_interval.min(timeout / 3).as_secs_f64();
    if timeout < SENDER_TIMEOUT_MIN {
        let message = format!("{shown} is short: a pause of that length ends the stream");
        return Check::remark(NAME, message, "raise it; PostgreSQL's default is 60s");
    }
    Check::good(NAME, format!("{shown}; Walden reports every {answered:.1} s at least"))
}

/// `*` makes every receiver a synchronous standby, so that commits wait for this one's disk.
fn synchronous(connect: &ConnectSettings, names: &str) -> Option<Check> {
    let name = connect.application_name();
    (names_standby(names, name) && !names_explicitly(names, name)).then(|| {
        let message = format!("synchronous_standby_names is '{names}', so commits would wait for Walden as well");
        Check::remark("synchronous_standby_names", message, "name your standbys there instead of *")
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;

    #[test]
    fn two_senders_must_be_free() {
        let places = |senders, senders_max| ReplicationPlaces { senders, senders_max, slots: 0, slots_max: 0 };
        assert_eq!(senders(places(0, 10), 2).verdict, Verdict::Good);
        assert_eq!(senders(places(8, 10), 2).verdict, Verdict::Good);
        assert_eq!(senders(places(9, 10), 2).verdict, Verdict::Failed);
        assert_eq!(senders(places(9, 10), 1).verdict, Verdict::Good);
        assert_eq!(senders(places(0, 0), 2).verdict, Verdict::Failed);
    }

    #[test]
    fn without_sql_a_third_sender_is_needed() {
        for (shown, verdict) in
            [("10", Verdict::Good), ("3", Verdict::Good), ("2", Verdict::Failed), ("", Verdict::Good)]
        {
            assert_eq!(senders_without_sql(shown).verdict, verdict, "{shown}");
        }
    }

    #[test]
    fn short_and_missing_timeouts_are_remarked() {
        let judged = |shown| sender_timeout(shown, Duration::from_secs(10));
        assert_eq!(judged("1min").message, "1min; Walden reports every 10.0 s at least");
        assert_eq!(judged("6s").message, "6s; Walden reports every 2.0 s at least");
        for (shown, verdict) in [("0", Verdict::Remark), ("500ms", Verdict::Remark), ("soon", Verdict::Good)] {
            assert_eq!(judged(shown).verdict, verdict, "{shown}");
        }
    }

    #[test]
    fn minimal_wal_is_too_little() {
        assert_eq!(wal_level("minimal").verdict, Verdict::Failed);
        assert_eq!(wal_level("logical").verdict, Verdict::Good);
    }
}
