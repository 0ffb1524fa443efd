//! `walden backup`: one base backup now. Beside a running agent it relies on it for the WAL; alone it archives what it needs itself.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::args::BackupArgs;
use super::error::CliError;
use super::output::{Output, size};
use super::{exit, http, run::watch_stop};
use crate::archive::{ArchiveError, Archiver};
use crate::base_backup::{self, Progress, Stage};
use crate::config::Settings;
use crate::daemon::{self, backups};
use crate::postgres::{ConnectSettings, PostgresError, ReplicationConnection};
use crate::repository::BackupJson;
use crate::spool::SpoolError;
use crate::telemetry::{Board, CauseCode, StatusJson};
use crate::wal::TimelineId;

/// How often it is looked whether the WAL can come at all.
const CAUSE_POLL: std::time::Duration = std::time::Duration::from_millis(200);
/// An agent that has an answer gives it at once.
const AGENT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(3);

pub fn run(settings: &Settings, output: &Output, args: &BackupArgs) -> Result<u8, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime =
        runtime.map_err(|e| CliError::from_error(exit::FAILED, &e, "check the limits of this user (ulimit -a)"))?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        watch_stop(shutdown.clone())?;
        let json = take(settings, output, args, shutdown).await?;
        if output.is_json() {
            output.document(&backup_document(&json)?)?;
        } else {
            output.line(&format!(
                "{}  timeline {}  {} to {}  {}, {} stored, {:.1} s",
                json.id,
                json.timeline,
                json.start_lsn,
                json.stop_lsn,
                size(json.size_bytes),
                size(json.stored_bytes),
                json.duration_seconds
            ))?;
        }
        match json.pages_damaged() {
            None => Ok(exit::DONE),
            Some(what) => Err(CliError::new(exit::FAILED, what, backups::PAGES_HINT)),
        }
    })
}

fn backup_document(json: &BackupJson) -> Result<serde_json::Value, CliError> {
    let mut document = serde_json::to_value(json).map_err(|e| CliError::from_error(exit::FAILED, &e, ""))?;
    if let Some(fields) = document.as_object_mut() {
        fields.insert("schema".into(), 1.into());
    }
    Ok(document)
}

async fn take(
    settings: &Settings,
    output: &Output,
    args: &BackupArgs,
    shutdown: CancellationToken,
) -> Result<BackupJson, CliError> {
    let refused = |error: daemon::DaemonError| CliError::from_error(error.exit_code(), &error, error.hint());
    let targets = daemon::open_targets(settings).await.map_err(refused)?;
    let connect = daemon::postgres_settings(settings).map_err(|e| refused(e.into()))?;
    let board = daemon::board(settings, &targets);
    // Asked first, so that a wrong host or password ends here and is not retried.
    let failed = |e: crate::postgres::PostgresError| CliError::from_error(exit::FAILED, &e, e.hint());
    let mut connection = ReplicationConnection::connect(&connect).await.map_err(failed)?;
    let info = connection.identify_system().await.map_err(failed)?;
    let segment_size = connection.segment_size().await.map_err(failed)?;
    drop(connection);
    let mut plan = daemon::archiver_settings(settings, connect.clone());
    // A running agent is found by its lock at once.
    plan.lock_patience = std::time::Duration::ZERO;
    for target in &targets {
        // A repository that does not answer is an error now, not something to wait for.
        let failed = |e: crate::storage::StorageError| CliError::from_error(exit::FAILED, &e, e.hint());
        target.store.probe(&format!("{}/walden-check/", settings.archive.cluster)).await.map_err(failed)?;
        // Also beside a running agent, whose server may have been replaced meanwhile.
        let found = info.system_identifier;
        if let Some(expected) = target.repository.succession().await?.kept_by(found) {
            let error = ArchiveError::OtherCluster { found, expected };
            return Err(CliError::new(exit::REFUSED, error.describe(), error.hint()));
        }
    }
    let archiver = match Archiver::start(plan, targets.clone(), board.clone(), shutdown.child_token()).await {
        Ok(archiver) => Some(archiver),
        Err(ArchiveError::Spool(SpoolError::InUse { .. })) => {
            output.note("an agent is running here: it archives the WAL");
            None
        }
        Err(error) => {
            let code = if error.is_refusal() { exit::REFUSED } else { exit::FAILED };
            return Err(CliError::new(code, error.describe(), error.hint()));
        }
    };
    let archives: Vec<_> = targets.iter().map(|target| target.repository.bind(info.system_identifier)).collect();
    let wal = backups::StoredWal { archives: archives.clone(), segment_size };
    let bar = output.progress(None, "base backup");
    let shown = bar.clone();
    let progress = move |progress: Progress| {
        shown.set_length(progress.bytes_total.max(progress.bytes_done));
        shown.set_position(progress.bytes_done);
        shown.set_message(match progress.stage {
            Stage::Checkpoint => "waiting for the checkpoint",
            Stage::Copy => "copying",
            Stage::Upload => "storing",
            Stage::Wal => "waiting for the WAL",
        });
    };
    let backup = async {
        let connect = whose_wal_comes(settings, connect, archiver.as_ref()).await;
        let request = backups::request(settings, &settings.backup, connect, archives, args.label.clone(), &board);
        base_backup::take(request, &wal, Arc::new(progress), shutdown.child_token()).await
    };
    let taken = match &archiver {
        None => backup.await,
        Some(archiver) => tokio::select! {
            taken = backup => taken,
            () = archiver.halt.halted() => {
                let why = archiver.halt.reason();
                let hint = why.as_ref().map_or("", |why| why.hint());
                return Err(CliError::new(exit::REFUSED, why.as_ref().map_or_else(String::new, |why| why.describe()), hint));
            }
            why = no_slot(&board) => {
                bar.finish_and_clear();
                return Err(by_cause(&why));
            }
        },
    };
    // Alone it is this process that archives, and it knows best why the WAL did not come.
    let stream = archiver.as_ref().and_then(|_| standing(&board, CauseCode::NotConnected));
    bar.finish_and_clear();
    shutdown.cancel();
    if let Some(archiver) = archiver {
        archiver.stopped().await;
    }
    taken.map_err(|error| match stream {
        Some(why) => by_cause(&format!("{}: {why}", backups::describe(&error))),
        None => CliError::new(exit::FAILED, backups::describe(&error), error.hint()),
    })
}

/// Of several hosts one whose WAL is archived: that of another timeline would never come. Where it cannot be told, the first that is
/// what `target_session_attrs` asks for.
async fn whose_wal_comes(
    settings: &Settings,
    connect: ConnectSettings,
    archiver: Option<&Archiver>,
) -> ConnectSettings {
    let count = connect.targets().len();
    if count < 2 {
        return connect;
    }
    if let Some(archiver) = archiver {
        let mut streaming = archiver.streaming.clone();
        let known = tokio::time::timeout(settings.backup.wal_timeout, streaming.wait_for(Option::is_some)).await;
        let host = known.ok().and_then(|known| known.ok().and_then(|streaming| *streaming)).map(|known| known.host);
        return host.map_or(connect.clone(), |host| connect.this_host(host));
    }
    let Some(archived) = timeline_of_the_agent(settings).await else { return connect };
    let ask = async |host: usize| -> Result<TimelineId, PostgresError> {
        let mut connection = ReplicationConnection::connect_to_any(&connect, host).await?;
        Ok(connection.identify_system().await?.timeline)
    };
    for host in 0..count {
        if ask(host).await.is_ok_and(|timeline| timeline == archived) {
            return connect.this_host(host);
        }
    }
    connect
}

async fn timeline_of_the_agent(settings: &Settings) -> Option<TimelineId> {
    let body = http::get(settings.metrics.listen.as_deref()?, "/status", AGENT_PATIENCE).await.ok()?;
    serde_json::from_str::<StatusJson>(&body).ok()?.timeline
}

/// A cause's message has what to do behind its first semicolon.
fn by_cause(why: &str) -> CliError {
    let (message, hint) = why.split_once("; ").unwrap_or((why, ""));
    CliError::new(exit::FAILED, message, hint)
}

/// The message of a cause that stands: what, why, and what to do.
fn standing(board: &Board, code: CauseCode) -> Option<String> {
    board.snapshot().causes.into_iter().find(|cause| cause.code == code).map(|cause| cause.message)
}

/// Without a slot of the right kind the WAL never comes, so nobody is kept waiting for it.
async fn no_slot(board: &Board) -> String {
    loop {
        if let Some(why) = standing(board, CauseCode::SlotMissing) {
            return why;
        }
        tokio::time::sleep(CAUSE_POLL).await;
    }
}
