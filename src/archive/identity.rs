//! Who the server is, and whether it may archive under the cluster's name (I6). Looked at before anything is streamed or made.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{ArchiveError, ArchiverSettings, LiveSettings, Target};
use crate::disk::Disk;
use crate::failure::NextStep;
use crate::postgres::ReplicationConnection;
use crate::repository::RepositoryError;
use crate::spool::Spool;
use crate::storage::Backoff;
use crate::telemetry::{Board, CauseCode};
use crate::wal::{SegmentSize, SystemIdentifier};

/// How long a start waits for a server or a store that need not answer now.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

/// Who the server is, and which systems the spool knows under the name.
pub(super) struct Identity {
    pub system: SystemIdentifier,
    pub segment_size: SegmentSize,
    in_spool: Vec<SystemIdentifier>,
}

impl Identity {
    /// The spool has no folder for this system yet.
    pub fn is_new_here(&self) -> bool {
        !self.in_spool.contains(&self.system)
    }

    /// Another system that the spool was used for, as long as this one was not.
    fn other_in_spool(&self) -> Option<SystemIdentifier> {
        self.in_spool.first().copied().filter(|_| self.is_new_here())
    }
}

/// Asks the server. A spool tells which cluster it is of, so that what it holds is shipped also while the server is away: then the
/// server is not waited for, and the live path compares.
pub(super) async fn find(
    disk: &Disk,
    settings: &ArchiverSettings,
    board: &Board,
    shutdown: &CancellationToken,
) -> Result<Identity, ArchiveError> {
    let in_spool = Spool::known_systems(&settings.spool_path, &settings.cluster)?;
    let known = known(disk, settings, &in_spool)?;
    let mut backoff = Backoff::new(settings.live.retry_delay_max);
    loop {
        let asked = async {
            match known {
                // A server that hangs holds the shipping up for a moment only.
                Some(_) => tokio::time::timeout(LOOK_LIMIT, ask(&settings.live)).await.ok(),
                None => Some(ask(&settings.live).await),
            }
        };
        let asked = tokio::select! {
            asked = asked => asked,
            () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
        };
        match (asked, known) {
            (Some(Ok((system, segment_size))), _) => return Ok(Identity { system, segment_size, in_spool }),
            (_, Some((system, segment_size))) => return Ok(Identity { system, segment_size, in_spool }),
            (Some(Err(error)), None) => board.set_disconnected(format!("{}; {}", error.describe(), error.hint())),
            (None, None) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next_delay()) => {}
            () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
        }
    }
}

fn known(
    disk: &Disk,
    settings: &ArchiverSettings,
    in_spool: &[SystemIdentifier],
) -> Result<Option<(SystemIdentifier, SegmentSize)>, ArchiveError> {
    let [system] = *in_spool else { return Ok(None) };
    let spool = Spool::open(disk.clone(), &settings.spool_path, &settings.cluster, system)?;
    Ok(spool.segment_size()?.map(|segment_size| (system, segment_size)))
}

async fn ask(live: &LiveSettings) -> Result<(SystemIdentifier, SegmentSize), ArchiveError> {
    let mut connection = ReplicationConnection::connect(&live.connect).await?;
    Ok((connection.identify_system().await?.system_identifier, connection.segment_size().await?))
}

/// What one store said of the system.
struct Answer {
    kept_by: Option<SystemIdentifier>,
    adopted: bool,
    one_writer: bool,
}

async fn look(
    settings: &ArchiverSettings,
    target: &Target,
    system: SystemIdentifier,
) -> Result<Answer, RepositoryError> {
    let abilities = target.store.probe(&format!("{}/walden-check/", settings.cluster)).await?;
    let succession = target.repository.succession().await?;
    // Where it is alone under the name, nothing more was asked.
    let adopted = succession.generation_of(system) > 0 || target.repository.bind(system).adopted().await?.is_some();
    let one_writer = abilities.prove_one_writer() || target.single_writer;
    Ok(Answer { kept_by: succession.kept_by(system), adopted, one_writer })
}

/// Looks for another cluster under the name before anything is streamed. `must_answer`: what is held, or who may archive, is not
/// known without the required repositories, so they are waited for.
pub(super) async fn check_stores(
    settings: &ArchiverSettings,
    targets: &[Target],
    identity: &Identity,
    must_answer: bool,
    board: &Board,
    shutdown: &CancellationToken,
) -> Result<(), ArchiveError> {
    let system = identity.system;
    let mut adopted = false;
    for target in targets {
        let must_answer = must_answer && target.required;
        let mut backoff = Backoff::new(settings.live.retry_delay_max);
        loop {
            let looked = async {
                if must_answer {
                    return Some(look(settings, target, system).await);
                }
                // The uploader asks again before it writes; streaming does not wait for a store that hangs (I11).
                tokio::time::timeout(LOOK_LIMIT, look(settings, target, system)).await.ok()
            };
            let error = tokio::select! {
                looked = looked => match looked {
                    None => break,
                    // What is wrong with one that is not required is told by its uploader, which stops alone.
                    Some(Ok(answer)) if !target.required => {
                        adopted |= answer.adopted;
                        break;
                    }
                    Some(Ok(answer)) => {
                        if let Some(expected) = answer.kept_by {
                            return Err(ArchiveError::OtherCluster { found: system, expected });
                        }
                        if !answer.one_writer {
                            return Err(ArchiveError::NoConditions { url: target.repository.url() });
                        }
                        adopted |= answer.adopted;
                        break;
                    }
                    Some(Err(error)) => ArchiveError::Repository(error),
                },
                () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
            };
            let message = format!("repository {}: {}; {}", target.repository.name(), error.describe(), error.hint());
            board.raise(CauseCode::StoreFailing, message);
            if !must_answer || error.next_step() == NextStep::Stop {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next_delay()) => {}
                () = shutdown.cancelled() => return Err(ArchiveError::Stopping),
            }
        }
    }
    match identity.other_in_spool() {
        // The repositories may be new, or have lost the other one; the spool has not.
        Some(expected) if !adopted => Err(ArchiveError::OtherCluster { found: system, expected }),
        _ => Ok(()),
    }
}
