//! `walden run`: the agent, until SIGTERM or SIGINT.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::exit;
use crate::config::Settings;
use crate::daemon;

/// How long blocking work may still go on when everything has ended.
const LEFTOVERS: Duration = Duration::from_secs(1);

pub fn run(settings: &Settings) -> Result<u8, CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_name("walden-worker")
        .enable_all()
        .build()
        .map_err(|error| CliError::from_error(exit::FAILED, &error, "check the limits of this user (ulimit -a)"))?;
    let ended = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let (reload, reloads) = tokio::sync::mpsc::channel(1);
        watch_signals(shutdown.clone(), reload)?;
        match daemon::run(settings.clone(), shutdown, reloads).await {
            Ok(()) => Ok(exit::DONE),
            Err(error) => Err(CliError::from_error(error.exit_code(), &error, error.hint())),
        }
    });
    // Whatever still waits for a store or a disk that hangs has nothing more to say.
    runtime.shutdown_timeout(LEFTOVERS);
    ended
}

/// SIGTERM and SIGINT cancel the token, for commands that somebody waits for.
pub fn watch_stop(shutdown: CancellationToken) -> Result<(), CliError> {
    let (reload, _) = tokio::sync::mpsc::channel(1);
    watch_signals(shutdown, reload)
}

/// SIGTERM and SIGINT stop cleanly; SIGHUP reads the configuration again.
fn watch_signals(shutdown: CancellationToken, reload: tokio::sync::mpsc::Sender<()>) -> Result<(), CliError> {
    let listen =
        |kind| signal(kind).map_err(|e| CliError::from_error(exit::FAILED, &e, "signals cannot be received here"));
    let (mut terminate, mut interrupt, mut hangup) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?, listen(SignalKind::hangup())?);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                // A reload that is still being worked on covers this one too.
                _ = hangup.recv() => drop(reload.try_send(())),
            }
        }
        shutdown.cancel();
    });
    Ok(())
}
