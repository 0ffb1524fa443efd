//! `walden backup`: one base backup now. Beside a running agent it relies on it for the WAL; alone it archives what it needs itself.

mod alone;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::args::BackupArgs;
use super::error::CliError;
use super::output::{Output, size, tell};
use super::{contact, exit, http, run::watch_stop};
use crate::archive::{ArchiveError, Archiver, Streaming, Target};
use crate::base_backup::{self, BackupError, Progress, Stage};
use crate::config::Settings;
use crate::daemon::{self, backups};
use crate::postgres::{ConnectSettings, PostgresError, ReplicationConnection};
use crate::repository::{BackupJson, RepositoryError};
use crate::spool::SpoolError;
use crate::telemetry::StatusJson;
use crate::wal::{SystemIdentifier, TimelineId};

/// A repository that is not required and does not answer for so long is left out.
const OPTIONAL_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
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
        // The backup is there, and yet something is to be done: both are said.
        let damaged = json.pages_damaged().map(|what| CliError::new(exit::FAILED, what, backups::PAGES_HINT));
        if output.is_json() {
            output.document(&backup_document(&json, damaged.as_ref())?)?;
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
        match damaged {
            None => Ok(exit::DONE),
            Some(error) => {
                tell(&error.to_string());
                Ok(error.code)
            }
        }
    })
}

/// One document, with `error` where the command fails although the backup exists.
fn backup_document(json: &BackupJson, error: Option<&CliError>) -> Result<serde_json::Value, CliError> {
    let mut document = serde_json::to_value(json).map_err(|e| CliError::from_error(exit::FAILED, &e, ""))?;
    if let Some(fields) = document.as_object_mut() {
        fields.insert("schema".into(), 1.into());
        fields.extend(error.map(|error| ("error".to_owned(), error.to_json()["error"].clone())));
    }
    Ok(document)
}

async fn take(
    settings: &Settings,
    output: &Output,
    args: &BackupArgs,
    shutdown: CancellationToken,
) -> Result<BackupJson, CliError> {
    let targets = daemon::open_targets(settings).await.map_err(|error| alone::refused(&error))?;
    let connect = daemon::postgres_settings(settings).map_err(|error| alone::refused(&error.into()))?;
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
    let patience = contact::patience(settings);
    let (mut required, mut optional) = (Vec::new(), Vec::new());
    for target in &targets {
        let patience = if target.required { patience } else { patience.min(OPTIONAL_PATIENCE) };
        let look = || look(target, &settings.archive.cluster, info.system_identifier);
        let looked = tokio::select! {
            looked = contact::first(target, patience, look) => looked,
            () = shutdown.cancelled() => return Err(cancelled()),
        };
        let archive = target.repository.bind(info.system_identifier);
        if !target.required {
            let why = match &looked {
                Ok(None) => {
                    optional.push(archive);
                    continue;
                }
                Ok(Some(other)) => format!("it holds system {other}"),
                Err(error) => super::error::chain(error),
            };
            output.note(&format!("without repository {}, which is not required: {why}", target.repository.name()));
            continue;
        }
        let kept_by = looked?;
        required.push(archive);
        // Also beside a running agent, whose server may have been replaced meanwhile.
        if let Some(expected) = kept_by {
            let error = ArchiveError::OtherCluster { found: info.system_identifier, expected };
            return Err(CliError::new(exit::REFUSED, error.describe(), error.hint()));
        }
    }
    let started = tokio::select! {
        started = Archiver::start(plan, targets.clone(), board.clone(), shutdown.child_token()) => started,
        error = alone::store_fails(&board, patience) => return Err(error),
    };
    let archiver = match started {
        Ok(archiver) => Some(archiver),
        Err(ArchiveError::Spool(SpoolError::InUse { .. })) => {
            output.note("an agent is running here: it archives the WAL");
            None
        }
        Err(error) => return Err(alone::refused(&error.into())),
    };
    let demand = archiver.as_ref().map(Archiver::tail_demand);
    let wal = backups::StoredWal { archives: required.clone(), segment_size, demand };
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
    let cancel = shutdown.child_token();
    let streaming = archiver.as_ref().map(|archiver| archiver.streaming.clone());
    let backup = async {
        let connect = whose_wal_comes(settings, connect, streaming).await;
        let archives = (required, optional);
        let mut request = backups::request(settings, &settings.backup, connect, archives, args.label.clone(), &board);
        request.first_contact = Some(patience);
        base_backup::take(request, &wal, Arc::new(progress), cancel.clone()).await
    };
    let mut backup = std::pin::pin!(backup);
    let taken = match &archiver {
        None => backup.await.map_err(|error| CliError::new(exit::FAILED, backups::describe(&error), error.hint())),
        Some(archiver) => tokio::select! {
            taken = &mut backup => taken.map_err(|error| alone::explain(&error, &board)),
            error = alone::hopeless(archiver, &board, patience) => {
                // What was stored of it is removed.
                cancel.cancel();
                let _ = backup.await;
                Err(error)
            }
        },
    };
    bar.finish_and_clear();
    shutdown.cancel();
    if let Some(archiver) = archiver {
        archiver.stopped().await;
    }
    taken
}

/// Of several hosts one whose WAL is archived: that of another timeline would never come. Where it cannot be told, the first that is
/// what `target_session_attrs` asks for.
async fn whose_wal_comes(
    settings: &Settings,
    connect: ConnectSettings,
    streaming: Option<watch::Receiver<Option<Streaming>>>,
) -> ConnectSettings {
    let count = connect.targets().len();
    if count < 2 {
        return connect;
    }
    if let Some(mut streaming) = streaming {
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

/// Everything that is asked of a repository before the first byte is copied. Gives the system that keeps the server's out, if one does.
async fn look(
    target: &Target,
    cluster: &str,
    system: SystemIdentifier,
) -> Result<Option<SystemIdentifier>, RepositoryError> {
    target.store.probe(&format!("{cluster}/walden-check/")).await?;
    let archive = target.repository.bind(system);
    archive.lease().await?;
    archive.backup_ids().await?;
    Ok(target.repository.succession().await?.kept_by(system))
}

fn cancelled() -> CliError {
    let error = BackupError::Cancelled;
    CliError::from_error(exit::FAILED, &error, error.hint())
}
