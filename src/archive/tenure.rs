//! The lease: who writes (I20). An uploader works while it holds it, stands by while another agent does, and gives it back at the end.

use std::time::Duration;

use super::ArchiveError;
use super::uploader::{Covered, Ended, SILENT_AFTER, Uploader, Work, describe};
use crate::repository::{
    LEASE_POLL, LEASE_TTL, LEASE_UNREADABLE, Lease, LeaseAttempt, LeaseSeeker, RepositoryError, RepositoryWriter,
};
use crate::storage::Backoff;
use crate::telemetry::CauseCode;

/// How long a stopping agent tries to tell what is covered and to give the lease back.
pub(super) const RELEASE_LIMIT: Duration = Duration::from_secs(3);

impl Uploader {
    /// Runs until the shutdown, or until something happened that only an operator can judge.
    pub async fn run(mut self) {
        let mut was_taken = false;
        loop {
            let Some(lease) = self.take_lease(was_taken).await else { return };
            tracing::info!(event = "lease_taken", repository = self.shown.name(), "this agent holds the lease");
            let shutdown = self.shutdown.clone();
            // A store that hangs must not hold up the end.
            let ended = tokio::select! {
                ended = self.work(lease.clone()) => ended,
                () = shutdown.cancelled() => Ended::Shutdown,
            };
            let name = self.shown.name();
            was_taken = matches!(ended, Ended::LeaseLost { by: Some(_) });
            if was_taken || matches!(ended, Ended::NotOurTurn) {
                self.tail.forget_judged(name);
            }
            match ended {
                Ended::LeaseLost { by: Some(by) } => {
                    let message = format!("repository {name}: {by} took the lease; stop one of the two agents");
                    self.board.raise(CauseCode::LeaseLost, message);
                }
                Ended::LeaseLost { by: None } => {
                    tracing::info!(event = "lease_expired", repository = name, "the lease ran out; taking it again")
                }
                Ended::NotOurTurn => {
                    tracing::info!(
                        event = "lease_given_back",
                        repository = name,
                        "another agent archives: the lease of this repository is given back to it"
                    );
                    self.turn.is_given_back(name);
                    self.release(&lease).await;
                }
                Ended::Shutdown | Ended::Halted => return self.release(&lease).await,
            }
        }
    }

    async fn release(&self, lease: &Lease) {
        let name = self.shown.name();
        let writer = RepositoryWriter::new(self.archive.clone(), lease.clone());
        let told = async {
            self.put_coverage(&writer, Covered::default()).await;
            lease.release().await
        };
        match tokio::time::timeout(RELEASE_LIMIT, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(repository = name, %error, "the lease was not released; it runs out"),
            Err(_) => tracing::debug!(repository = name, "the lease was not released in time; it runs out"),
        }
    }

    /// Waits until no other agent has a repository in front of this one. The lease is looked at meanwhile, so that it need not run out
    /// only then. False: it is over.
    async fn turn_comes(&self, seeker: &mut LeaseSeeker) -> bool {
        let comes = self.turn.comes_to(self.shown.name());
        tokio::pin!(comes);
        loop {
            let watch = async {
                tokio::time::sleep(LEASE_POLL).await;
                if let Err(error) = seeker.watch().await {
                    tracing::debug!(repository = self.shown.name(), %error, "who holds the lease is not known");
                }
            };
            tokio::select! {
                () = &mut comes => return true,
                () = watch => {}
                () = self.shutdown.cancelled() => return false,
                () = self.halt.halted() => return false,
            }
        }
    }

    /// `None`: it is over. `was_taken`: another one has it, which may be a copy of this agent.
    async fn take_lease(&mut self, was_taken: bool) -> Option<Lease> {
        let seeker = LeaseSeeker::new(self.archive.clone(), self.holder.clone(), LEASE_TTL);
        let mut seeker = if was_taken { seeker.patient() } else { seeker };
        let mut backoff = Backoff::new(self.retry_delay_max);
        let mut probed = false;
        loop {
            if !self.turn_comes(&mut seeker).await {
                return None;
            }
            let attempt = async {
                if !probed {
                    if let Some((cause, error)) = self.objection().await? {
                        let message = format!("{}; {}", error.describe(), error.hint());
                        self.refuse(cause, message, error);
                        return Ok(None);
                    }
                    probed = true;
                }
                seeker.try_take().await.map(Some)
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
                // Before anything is written under the name.
                Ok(None) => return None,
                Ok(Some(LeaseAttempt::Taken(lease))) => {
                    self.turn.is_ours(self.shown.name());
                    self.board.clear(CauseCode::LeaseHeld);
                    self.board.clear(CauseCode::LeaseLost);
                    for work in [Work::Objects, Work::Pieces, Work::Requests] {
                        self.tell_store(work, None);
                    }
                    return Some(lease);
                }
                Ok(Some(LeaseAttempt::HeldByOther { agent, host, renewed })) => {
                    let name = self.shown.name();
                    self.turn.is_anothers(name);
                    self.tail.forget_judged(name);
                    let unreadable = format!(
                        "repository {name}: lease.json cannot be read, so it may be another agent's, and this one stands by; \
                         nothing: unless somebody renews it, this one takes it over after {} s",
                        LEASE_TTL.as_secs()
                    );
                    let held = format!(
                        "repository {name}: agent {agent} on {host} holds the lease (renewed {renewed}), and this one stands by; \
                         nothing, if that is the agent that should archive; else stop it, and this one takes over {} s later",
                        LEASE_TTL.as_secs()
                    );
                    let why = if agent == LEASE_UNREADABLE { unreadable } else { held };
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

    /// Why this repository may not be written to at all. Looked at before the first write: at the start the store may not have
    /// answered (I6).
    async fn objection(&self) -> Result<Option<(CauseCode, ArchiveError)>, RepositoryError> {
        let abilities = self.store.probe(&self.probe_prefix).await?;
        if !(abilities.prove_one_writer() || self.single_writer) {
            let error = ArchiveError::NoConditions { url: self.archive.url() };
            return Ok(Some((CauseCode::StoreFailing, error)));
        }
        let kept_by = self.archive.repository().succession().await?.kept_by(self.system);
        Ok(kept_by
            .map(|expected| (CauseCode::OtherCluster, ArchiveError::OtherCluster { found: self.system, expected })))
    }

    /// Going on here would be wrong until an operator acts. A required repository stops archiving; another one only its own uploads.
    pub(super) fn refuse(&self, cause: CauseCode, message: String, error: ArchiveError) {
        if self.required {
            self.board.raise(cause, message);
            return self.halt.stop(error);
        }
        let message = format!(
            "{message}; archiving goes on without repository {}, which is not required: nothing is sent there until Walden is started again",
            self.shown.name()
        );
        self.tell_store(Work::Requests, Some(message.clone()));
        self.board.raise(cause, message);
    }
}
