//! What a session still waits for when something stops: this agent, or the server.

use std::pin::Pin;
use std::time::{Duration, Instant};

use crate::postgres::{ConnectSettings, PostgresError, ReplicationConnection};
use crate::telemetry::Board;
use crate::wal::Lsn;

/// How long a stopping agent still takes what the server had when it was told to stop; half of `stop_timeout`, if that is less.
const LAST_BYTES: Duration = Duration::from_secs(2);
/// How often a server that is not listened to is asked whether it shuts down.
const LOOK: Duration = Duration::from_secs(5);

/// What a stopping agent still waits for: the commits that the server had acknowledged when the agent was told to stop may be on
/// their way to it.
pub(super) struct LastBytes {
    pub deadline: Instant,
    asked: Pin<Box<dyn Future<Output = Option<Lsn>> + Send>>,
    /// The server's flush position after the signal; `None` inside if the server did not tell.
    end: Option<Option<Lsn>>,
}

impl LastBytes {
    /// What the server says is noted on the board: whoever stops must hear what is not archived of it.
    pub fn ask(connect: ConnectSettings, board: Board, stop_timeout: Duration) -> Self {
        let asked = Box::pin(async move {
            let mut connection = ReplicationConnection::connect(&connect).await.ok()?;
            let before = board.server_now();
            let end = connection.identify_system().await.ok()?.flush_lsn;
            if let Some(time) = before {
                board.note_flush_sample(time, end);
            }
            Some(end)
        });
        Self { deadline: Instant::now() + LAST_BYTES.min(stop_timeout / 2), asked, end: None }
    }

    /// Returns once the answer is there; never if nothing was asked or it was heard already.
    pub async fn found(last: &mut Option<Self>) {
        match last {
            Some(last) if last.end.is_none() => last.end = Some(last.asked.as_mut().await),
            _ => std::future::pending().await,
        }
    }

    pub fn are_there(&self, now: Instant, position: Lsn) -> bool {
        now >= self.deadline || self.end.is_some_and(|end| end.is_none_or(|end| position >= end))
    }
}

/// Returns once the server refuses connections because it shuts down. It waits then until all its WAL is confirmed, for ever if it has to
/// (`WalSndDone` in PostgreSQL `src/backend/replication/walsender.c`), and a session that does not read cannot hear it ask.
pub(super) async fn server_stops(connect: ConnectSettings) {
    loop {
        tokio::time::sleep(LOOK).await;
        if let Err(error) = ReplicationConnection::connect(&connect).await
            && is_not_ready(&error)
        {
            return;
        }
    }
}

fn is_not_ready(error: &PostgresError) -> bool {
    match error {
        PostgresError::NotReady { .. } => true,
        PostgresError::NoHost { source, .. } => is_not_ready(source),
        _ => false,
    }
}

/// Sleeps until then; for ever without a time.
pub(super) async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
