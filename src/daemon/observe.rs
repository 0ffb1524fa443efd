//! Asks the server every few seconds what only it knows: its clock, its flush position, the slot. Nothing waits for the answers.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::archive::Streaming;
use crate::config::{Durability, Settings};
use crate::postgres::{
    ConnectSettings, PostgresError, ReplicationConnection, Sql, names_explicitly, names_standby, quorum,
};
use crate::telemetry::{Board, CauseCode, SlotFacts};
use crate::wal::Lsn;

/// A commit that still waits so long after its WAL was confirmed waits for something else.
const COMMIT_SECONDS: f64 = 5.0;
const INTERVAL: Duration = Duration::from_secs(2);
/// The longest that the way without SQL is kept before SQL is tried again.
const SQL_RETRY: Duration = Duration::from_secs(60);

/// `streaming`: the host that WAL comes from. Of several it is the one to ask: what another one has flushed says nothing about what is
/// still to come from this one.
pub async fn observe(
    connect: ConnectSettings,
    streaming: watch::Receiver<Option<Streaming>>,
    settings: Settings,
    board: Board,
    shutdown: CancellationToken,
) {
    let (sql, replication) = (None, None);
    let without = WithoutSql::default();
    let mut observer = Observer { connect, streaming, host: None, settings, board, sql, replication, without };
    let mut tick = tokio::time::interval(INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Where archiving was stopped nothing streams any more, and the slot grows all the same.
    let mut may_change = true;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            changed = observer.streaming.changed(), if may_change => {
                may_change = changed.is_ok();
                // The server has just let the stream in: what it said before does not count any more.
                observer.without = WithoutSql::default();
            }
            () = shutdown.cancelled() => return,
        }
        tokio::select! {
            () = observer.look() => {}
            () = shutdown.cancelled() => return,
        }
    }
}

struct Observer {
    connect: ConnectSettings,
    streaming: watch::Receiver<Option<Streaming>>,
    /// Who is asked.
    host: Option<usize>,
    settings: Settings,
    board: Board,
    sql: Option<Sql>,
    replication: Option<ReplicationConnection>,
    without: WithoutSql,
}

/// SQL did not work, and waits: a server that refuses it writes a line into its log for each try.
#[derive(Default)]
struct WithoutSql {
    failures: u32,
    /// Those in a row beside a replication connection that worked.
    beside_replication: u32,
    /// Not tried again before this.
    after: Option<tokio::time::Instant>,
}

impl WithoutSql {
    fn may_try(&self) -> bool {
        self.after.is_none_or(|after| tokio::time::Instant::now() >= after)
    }

    fn failed(&mut self, is_there: bool) {
        self.after = Some(tokio::time::Instant::now() + self.pause());
        self.failures = self.failures.saturating_add(1);
        self.beside_replication = if is_there { self.beside_replication.saturating_add(1) } else { 0 };
    }

    /// A little less than a multiple of `INTERVAL`, at which it is looked whether it is over.
    fn pause(&self) -> Duration {
        (INTERVAL / 2 * (1 << self.failures.min(8))).min(SQL_RETRY)
    }
}

/// The server was not there to answer, which is `not_connected` and no matter of SQL, unless the replication connection gets through.
fn is_away(error: &PostgresError) -> bool {
    matches!(
        error,
        PostgresError::Connect { .. }
            | PostgresError::ConnectTimeout { .. }
            | PostgresError::Disconnected { .. }
            | PostgresError::NotReady { .. }
            | PostgresError::Timeout { .. }
    )
}

impl Observer {
    async fn look(&mut self) {
        self.board.set_spool_free(crate::disk::Disk::default().free_bytes(&self.settings.spool.path).ok());
        let streamed = self.streaming.borrow_and_update().map(|streaming| streaming.host);
        let host = if self.connect.targets().len() == 1 { Some(0) } else { streamed };
        if host != self.host {
            (self.sql, self.replication, self.without) = (None, None, WithoutSql::default());
            if self.host.is_some() {
                self.board.forget_server();
            }
            self.host = host;
        }
        let Some(host) = host else { return };
        let connect = self.connect.this_host(host);
        let by_sql = self.ask_by_sql(&connect).await;
        if let Ok(true) = by_sql {
            (self.replication, self.without) = (None, WithoutSql::default());
            self.board.clear(CauseCode::NoSql);
            return;
        }
        self.sql = None;
        let looked = self.ask_replication(&connect).await;
        if let Err(error) = by_sql {
            self.without_sql(&error, looked.is_ok());
        }
        if let Err(error) = looked {
            tracing::debug!(%error, "the server's position is not known");
            // What the slot looked like a while ago is not known to hold still.
            self.board.set_slot(None);
            self.replication = None;
        }
    }

    /// `Ok(false)`: SQL is not to be tried yet.
    async fn ask_by_sql(&mut self, connect: &ConnectSettings) -> Result<bool, PostgresError> {
        let sql = match &mut self.sql {
            Some(sql) => sql,
            None if !self.without.may_try() => return Ok(false),
            none => none.insert(Sql::connect(connect).await?),
        };
        ask_sql(sql, &self.board, &self.settings, connect.application_name()).await?;
        Ok(true)
    }

    /// SQL is optional: without it the slot is not known, and the replication connection tells the position. `is_there`: that one works.
    fn without_sql(&mut self, error: &PostgresError, is_there: bool) {
        self.without.failed(is_there);
        self.board.set_slot(None);
        tracing::debug!(%error, "SQL does not work");
        if !is_away(error) || self.without.beside_replication > 1 {
            let message = format!("{}; slot figures are unknown; {}", super::backups::describe(error), error.hint());
            self.board.raise(CauseCode::NoSql, message);
        }
    }

    async fn ask_replication(&mut self, connect: &ConnectSettings) -> Result<(), PostgresError> {
        let mut connection = match self.replication.take() {
            Some(connection) => connection,
            None => ReplicationConnection::connect(connect).await?,
        };
        // Before asking, so that every commit acknowledged before it lies before the position (I19).
        let Some(now) = self.board.server_now() else {
            // No keepalive has told the server's clock yet.
            self.replication = Some(connection);
            return Ok(());
        };
        let info = connection.identify_system().await?;
        let names = connection.show("synchronous_standby_names").await?;
        self.board.set_waited_for(names_standby(&names, connect.application_name()));
        self.board.note_flush_sample(now, info.flush_lsn);
        self.replication = Some(connection);
        Ok(())
    }
}

/// `name`: what the stream logs in as, which the server compares with `synchronous_standby_names`.
async fn ask_sql(sql: &Sql, board: &Board, settings: &Settings, name: &str) -> Result<(), PostgresError> {
    let (time, flush) = sql.flush_position().await?;
    if !flush.is_zero() {
        board.note_flush_sample(time, flush);
    }
    board.note_server_clock(time);
    let slot = sql.slot(&settings.postgres.slot).await?;
    board.set_slot(slot.map(|slot| SlotFacts {
        restart_lsn: slot.restart_lsn,
        wal_status: slot.wal_status,
        retained_bytes: slot.retained_bytes,
    }));
    let state = sql.sync_state(name).await?;
    let names = sql.setting("synchronous_standby_names").await?.unwrap_or_default();
    let is_waited_for = is_waited_for(state.as_deref(), &names, name);
    board.set_waited_for(is_waited_for);
    // A quorum that is full without this agent needs no apply of its own.
    let is_needed = match quorum(&names) {
        Some(needed) if is_waited_for => u64::try_from(sql.applying_quorum(name).await?).unwrap_or(0) < needed,
        _ => is_waited_for,
    };
    watch_remote_apply(sql, board, is_waited_for, is_needed, flush).await?;
    match state.as_deref().filter(|state| is_unasked(state, &names, name)) {
        Some(state) => {
            let what = match settings.archive.durability {
                Durability::Spool => "this host's disk",
                Durability::Repository => "an upload to every required repository",
            };
            let message = format!(
                "the server waits for Walden at every commit (sync_state {state}), that is for {what}, because synchronous_standby_names is '{names}'; name your standbys there, and Walden too if that is wanted"
            );
            board.raise(CauseCode::UnexpectedSync, message);
        }
        None => board.clear(CauseCode::UnexpectedSync),
    }
    Ok(())
}

/// Commits wait for this agent though the list does not name it: `*` stands there.
fn is_unasked(sync_state: &str, names: &str, name: &str) -> bool {
    matches!(sync_state, "sync" | "quorum") && !names_explicitly(names, name)
}

/// Whether commits wait for this agent. `pg_stat_replication` shows a standby that has not told a position yet as `async`, and nothing
/// without `pg_monitor`: then the list of names decides (`pg_stat_get_wal_senders` in `src/backend/replication/walsender.c`).
fn is_waited_for(sync_state: Option<&str>, names: &str, name: &str) -> bool {
    match sync_state {
        Some("sync" | "quorum") => true,
        Some("potential") => false,
        _ => names_standby(names, name),
    }
}

/// An archiver applies nothing, so commits that ask for it would wait for ever, unless others can answer for it.
async fn watch_remote_apply(
    sql: &Sql,
    board: &Board,
    is_waited_for: bool,
    is_needed: bool,
    flush: Lsn,
) -> Result<(), PostgresError> {
    if !is_waited_for {
        board.clear(CauseCode::RemoteApply);
        return Ok(());
    }
    let place = if is_needed { sql.remote_apply().await? } else { None };
    if let Some(place) = place {
        let message = format!(
            "synchronous_commit = remote_apply ({place}) waits for a standby to apply the WAL, which an archiver never does: commits hang; set it to on, or name a replica beside Walden: ANY 1 (replica, walden)"
        );
        board.raise(CauseCode::RemoteApply, message);
        return Ok(());
    }
    // Everything is confirmed, and still somebody waits.
    let is_confirmed = board.durable().is_some_and(|durable| durable >= flush)
        && board.archived().is_some_and(|archived| archived >= flush);
    let waiting = if is_confirmed { sql.waiting_commits(COMMIT_SECONDS).await? } else { 0 };
    if waiting > 0 {
        let message = format!(
            "{waiting} commits wait for a synchronous standby although Walden has confirmed all WAL: sessions with synchronous_commit = remote_apply wait for an apply that an archiver never does (set it to on), or another standby in synchronous_standby_names is missing"
        );
        board.raise(CauseCode::RemoteApply, message);
    } else if is_confirmed {
        board.clear(CauseCode::RemoteApply);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_without_a_position_is_waited_for_if_it_is_named() {
        assert!(is_waited_for(Some("sync"), "walden", "walden") && is_waited_for(Some("quorum"), "*", "walden"));
        assert!(is_waited_for(Some("async"), "ANY 1 (a, walden)", "walden") && is_waited_for(None, "walden", "walden"));
        assert!(!is_waited_for(Some("potential"), "a, walden", "walden") && !is_waited_for(None, "a", "walden"));
    }

    #[test]
    fn a_role_that_nobody_asked_for_is_one_by_a_star() {
        assert!(is_unasked("sync", "*", "walden") && is_unasked("quorum", "ANY 1 (*)", "walden"));
        assert!(!is_unasked("quorum", "ANY 1 (replica, walden)", "walden") && !is_unasked("async", "*", "walden"));
    }

    #[test]
    fn sql_that_is_refused_is_tried_less_and_less() {
        let mut without = WithoutSql::default();
        assert!(without.may_try());
        let pauses: Vec<u64> = (0..9)
            .map(|_| {
                let pause = without.pause();
                without.failed(true);
                assert!(!without.may_try());
                pause.as_secs()
            })
            .collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!((without.failures, without.beside_replication), (9, 9));
        without.failed(false);
        assert_eq!(without.beside_replication, 0);
    }
}
