//! The lease: who writes (I20). An uploader works while it holds it, stands by while another agent does, and gives it back at the end.

use std::time::Duration;

use super::ArchiveError;
use super::uploader::{Covered, Ended, SILENT_AFTER, Uploader, Work, describe};
use crate::repository::{LEASE_POLL, LEASE_TTL, Lease, LeaseAttempt, LeaseSeeker, RepositoryError, RepositoryWriter};
use crate::storage::Backoff;
use crate::telemetry::CauseCode;

/// How long a stopping agent tries to tell what is covered and to give the lease back.
const RELEASE_LIMIT: Duration = Duration::from_secs(3);

impl Uploader {
    /// Runs until the shutdown, or until something happened that only an operator can judge.
    pub async fn run(mut self) {
        loop {
            let Some(lease) = self.take_lease().await else { return };
            tracing::info!(event = "lease_taken", repository = self.shown.name(), "this agent holds the lease");
            let shutdown = self.shutdown.clone();
            // A store that hangs must not hold up the end.
            let ended = tokio::select! {
                ended = self.work(lease.clone()) => ended,
                () = shutdown.cancelled() => Ended::Shutdown,
            };
            let name = self.shown.name();
            match ended {
                Ended::LeaseLost { by: Some(by) } => {
                    let message = format!("repository {name}: {by} took the lease; stop one of the two agents");
                    self.board.raise(CauseCode::LeaseLost, message);
                }
                Ended::LeaseLost { by: None } => {
                    tracing::info!(event = "lease_expired", repository = name, "the lease ran out; taking it again")
                }
                Ended::Shutdown | Ended::Halted => {
                    let writer = RepositoryWriter::new(self.archive.clone(), lease.clone());
                    let told = async {
                        self.put_coverage(&writer, Covered::default()).await;
                        lease.release().await
                    };
                    match tokio::time::timeout(RELEASE_LIMIT, told).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::debug!(repository = name, %error, "the lease was not released; it runs out");
                        }
                        Err(_) => tracing::debug!(repository = name, "the lease was not released in time; it runs out"),
                    }
                    return;
                }
            }
        }
    }

    async fn take_lease(&mut self) -> Option<Lease> {
        let mut seeker = LeaseSeeker::new(self.archive.clone(), self.holder.clone(), LEASE_TTL);
        let mut backoff = Backoff::new(self.retry_delay_max);
        let mut probed = false;
        loop {
            let attempt = async {
                if !probed {
                    let abilities = self.store.probe(&self.probe_prefix).await?;
                    if !(abilities.prove_one_writer() || self.single_writer) {
                        self.halt.stop(ArchiveError::NoConditions { url: self.archive.url() });
                    }
                    self.refuse_other_cluster().await?;
                    probed = true;
                }
                seeker.try_take().await
            };
            tokio::pin!(attempt);
            let attempt = loop {
                tokio::select! {
                    attempt = &mut attempt => break attempt,
                    () = tokio::time::sleep(SILENT_AFTER) => {
                        self.turn.is_unanswered(self.shown.name());
                        self.tell_store(Work::Requests, Some(self.silence()));
                    }
                    () = self.shutdown.cancelled() => return None,
                    () = self.halt.halted() => return None,
                }
            };
            let delay = match attempt {
                Ok(LeaseAttempt::Taken(lease)) => {
                    self.turn.is_ours(self.shown.name());
                    self.board.clear(CauseCode::LeaseHeld);
                    self.board.clear(CauseCode::LeaseLost);
                    for work in [Work::Objects, Work::Pieces, Work::Requests] {
                        self.tell_store(work, None);
                    }
                    return Some(lease);
                }
                Ok(LeaseAttempt::HeldByOther { agent, host, renewed }) => {
                    let name = self.shown.name();
                    self.turn.is_anothers(name);
                    let why = format!(
                        "repository {name}: agent {agent} on {host} holds the lease (renewed {renewed}), and this one stands by; \
                         nothing, if that is the agent that should archive; else stop it, and this one takes over {} s later",
                        LEASE_TTL.as_secs()
                    );
                    self.board.raise(CauseCode::LeaseHeld, why);
                    LEASE_POLL
                }
                Err(error) => {
                    self.turn.is_unanswered(self.shown.name());
                    self.tell_store(Work::Requests, Some(describe(&error)));
                    backoff.next_delay()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.shutdown.cancelled() => return None,
            }
        }
    }

    /// Another cluster under the name is looked for before the first write: at the start the store may not have answered (I6).
    async fn refuse_other_cluster(&self) -> Result<(), RepositoryError> {
        let succession = self.archive.repository().succession().await?;
        if let Some(expected) = succession.kept_by(self.system) {
            let error = ArchiveError::OtherCluster { found: self.system, expected };
            self.board.raise(CauseCode::OtherCluster, format!("{}; {}", error.describe(), error.hint()));
            self.halt.stop(error);
        }
        Ok(())
    }
}
