//! A backup without an agent beside it archives the WAL that it needs itself, and must see when that cannot come.

use std::time::{Duration, Instant};

use crate::archive::Archiver;
use crate::base_backup::BackupError;
use crate::cli::error::CliError;
use crate::cli::exit;
use crate::daemon::{DaemonError, backups};
use crate::telemetry::{Board, CauseCode};

/// How often it is looked whether the WAL can come at all.
const POLL: Duration = Duration::from_millis(200);

/// Returns once nobody needs to wait any longer, with why: archiving was refused, there is no slot that could be used, or there is no
/// stream for `patience` and no other agent that archives.
pub async fn hopeless(archiver: &Archiver, board: &Board, patience: Duration) -> CliError {
    let stream = lasting(board, patience, |board| {
        standing(board, CauseCode::NotConnected).filter(|_| standing(board, CauseCode::LeaseHeld).is_none())
    });
    tokio::select! {
        () = archiver.halt.halted() => match archiver.halt.reason() {
            Some(why) => {
                // 2 for what another configuration cures, as `run` has it.
                let code = if matches!(*why, crate::archive::ArchiveError::NoConditions { .. }) { exit::USAGE } else { exit::REFUSED };
                CliError::new(code, why.describe(), why.hint())
            }
            None => CliError::new(exit::REFUSED, "archiving was stopped", "see the lines before this one"),
        },
        why = lasting(board, Duration::ZERO, |board| standing(board, CauseCode::SlotMissing)) => by_cause(exit::FAILED, &why),
        why = stream => by_cause(exit::FAILED, &why),
    }
}

/// Returns when a store has not answered for `patience`, with what it says.
pub async fn store_fails(board: &Board, patience: Duration) -> CliError {
    by_cause(exit::FAILED, &lasting(board, patience, |board| standing(board, CauseCode::StoreFailing)).await)
}

/// Why a backup failed: this process knows best why its WAL did not come.
pub fn explain(error: &BackupError, board: &Board) -> CliError {
    let told = backups::describe(error);
    let is_about_wal = matches!(error, BackupError::Wal { .. } | BackupError::WalTimeout { .. });
    let because = |code, why: Option<String>| {
        let why = why.filter(|why| is_about_wal && why.contains(HINT))?;
        Some(by_cause(code, &format!("{told}: {why}")))
    };
    because(exit::REFUSED, standing(board, CauseCode::LeaseHeld))
        .or_else(|| because(exit::FAILED, standing(board, CauseCode::NotConnected)))
        .or_else(|| because(exit::FAILED, standing(board, CauseCode::StoreFailing)))
        .unwrap_or_else(|| CliError::new(exit::FAILED, told, error.hint()))
}

pub fn refused(error: &DaemonError) -> CliError {
    CliError::from_error(error.exit_code(), error, error.hint())
}

/// A cause's message has what to do behind its first semicolon.
const HINT: &str = "; ";

fn by_cause(code: u8, why: &str) -> CliError {
    let (message, hint) = why.split_once(HINT).unwrap_or((why, ""));
    CliError::new(code, message, hint)
}

/// The message of a cause that stands: what, why, and what to do.
fn standing(board: &Board, code: CauseCode) -> Option<String> {
    board.snapshot().causes.into_iter().find(|cause| cause.code == code).map(|cause| cause.message)
}

/// Waits until something stands that has stood for `patience`; gives what it says then.
async fn lasting(board: &Board, patience: Duration, look: impl Fn(&Board) -> Option<String>) -> String {
    let mut since: Option<Instant> = None;
    loop {
        match look(board) {
            None => since = None,
            Some(why) if since.get_or_insert_with(Instant::now).elapsed() >= patience => return why,
            Some(_) => {}
        }
        tokio::time::sleep(POLL).await;
    }
}
