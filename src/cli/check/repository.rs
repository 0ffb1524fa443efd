//! One repository: a round trip, its abilities, whose it is, who writes, what could be restored.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use super::agent::Agent;
use super::report::{Check, Verdict};
use crate::archive::{ArchiveError, Target};
use crate::cli::error::chain;
use crate::cli::output::count;
use crate::config::{RepositorySettings, Settings, StoreSettings};
use crate::daemon;
use crate::repository::{Archive, Keys, LEASE_TTL, LeaseJson, RepositoryError};
use crate::storage::{Abilities, Body, ObjectStore, PutOutcome, StorageError};
use crate::telemetry::{Clock, SystemClock};
use crate::wal::{PgTime, SystemIdentifier};

/// A store that takes longer for one small request is as good as down, for somebody who waits for the answer.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
const NO_BACKUP: &str = "there is no base backup yet, so nothing can be restored";
const NO_BACKUP_HINT: &str = "run takes one at its start (backup.initial), or take it with `walden backup`";
const CONTENT: &[u8] = b"walden check\n";

/// What was found of one repository.
pub struct Seen {
    pub name: String,
    pub checks: Vec<Check>,
    /// Its clock minus this host's, where it tells it.
    pub skew_seconds: Option<f64>,
    /// The server's system was adopted there.
    pub adopted: bool,
}

/// A repository that is being looked at, in two steps: the first needs nothing but the store.
pub struct Look<'a> {
    name: String,
    checks: Vec<Check>,
    /// `None`: nothing more can be learnt of it.
    target: Option<Target>,
    /// The folder of a local one that was not there before, and shall not be there afterwards.
    made: Option<&'a Path>,
    /// The server's system was adopted there.
    adopted: bool,
}

impl<'a> Look<'a> {
    /// Writes, reads and deletes, and tries out what the store honours.
    pub async fn begin(settings: &Settings, repository: &'a RepositorySettings) -> Self {
        let made = missing_root(repository);
        let mut look = Self { name: repository.name.clone(), checks: Vec::new(), target: None, made, adopted: false };
        match open(settings, repository).await {
            Ok(target) => {
                let key = Keys::check_object(&settings.archive.cluster, Uuid::new_v4());
                if look.round_trip(&target, &key).await {
                    look.abilities(&target, &key).await;
                    look.target = Some(target);
                }
            }
            Err(check) => look.checks.push(check),
        }
        if let Some(root) = made {
            // Only if it is empty: an agent that starts in this moment may have begun to fill it.
            let _ = std::fs::remove_dir(root);
        }
        look
    }

    /// Reads what is there already, once it is known who the server is.
    pub async fn finish(mut self, agent: &Agent, server: Option<SystemIdentifier>) -> Seen {
        let mut skew_seconds = None;
        if let Some(target) = self.target.take() {
            if let Err(error) = self.contents(&target, agent, server).await {
                self.checks.push(Check::error(self.named("contents"), &error, error.hint()));
            }
            skew_seconds = target.store.clock_skew_seconds();
        }
        Seen { name: self.name, checks: self.checks, skew_seconds, adopted: self.adopted }
    }

    fn named(&self, what: &str) -> String {
        format!("{what}.{}", self.name)
    }

    /// `false`: nothing more can be learnt of it.
    async fn round_trip(&mut self, target: &Target, key: &str) -> bool {
        let name = self.named("repository");
        let url = target.repository.url();
        self.checks.push(match round_trip(&*target.store, key).await {
            Ok(Removed::Yes) => {
                let note = if self.made.is_some() { " (run will create it)" } else { "" };
                Check::good(name, format!("{url}{note}: an object was written, read and deleted"))
            }
            Ok(Removed::No(error)) => {
                let message = format!("{url}: {key} was written and read, but not deleted: {}", chain(&error));
                let hint = "archiving needs no right to delete, tail pieces and prune do; remove the object by hand";
                Check::remark(name, message, hint)
            }
            Err(error) => {
                self.checks.push(Check::error(name, &error, error.hint()));
                return false;
            }
        });
        true
    }

    async fn abilities(&mut self, target: &Target, key: &str) {
        let name = self.named("abilities");
        self.checks.push(match target.store.probe(&format!("{key}/")).await {
            Ok(abilities) => judge_abilities(name, abilities, target.single_writer, &target.repository.url()),
            Err(error) => Check::error(name, &error, error.hint()),
        });
    }

    /// What is there already: whose it is, who writes, and what could be restored.
    async fn contents(
        &mut self,
        target: &Target,
        agent: &Agent,
        server: Option<SystemIdentifier>,
    ) -> Result<(), RepositoryError> {
        if self.made.is_some() {
            self.checks.push(judge_identity(self.named("identity"), &[], server, true));
            self.checks.push(Check::remark(self.named("restore"), NO_BACKUP, NO_BACKUP_HINT));
            return Ok(());
        }
        let systems = target.repository.systems().await?;
        let may = match server {
            Some(server) => {
                let succession = target.repository.succession().await?;
                self.adopted = target.repository.bind(server).adopted().await?.is_some();
                succession.kept_by(server).is_none()
            }
            None => false,
        };
        self.checks.push(judge_identity(self.named("identity"), &systems, server, may));
        let Some(system) = server.or_else(|| systems.first().copied()) else { return Ok(()) };
        let archive = target.repository.bind(system);
        let lease = archive.lease().await?;
        self.checks.push(judge_lease(self.named("lease"), lease.as_ref(), agent, SystemClock::new().wall()));
        let backups = backups(self.named("restore"), &archive).await?;
        self.checks.push(backups);
        Ok(())
    }
}

async fn open(settings: &Settings, repository: &RepositorySettings) -> Result<Target, Check> {
    let mut alone = settings.clone();
    alone.repositories = vec![repository.clone()];
    alone.upload.request_timeout = alone.upload.request_timeout.min(REQUEST_LIMIT);
    let name = format!("repository.{}", repository.name);
    let mut targets = daemon::open_targets(&alone).await.map_err(|error| Check::error(&name, &error, error.hint()))?;
    targets.pop().ok_or_else(|| Check::failed(name, "it could not be opened", "report it: this should not happen"))
}

/// The root of a local repository, if it is not there yet.
fn missing_root(repository: &RepositorySettings) -> Option<&Path> {
    match &repository.store {
        StoreSettings::Local { path } => (!path.exists()).then_some(path),
        StoreSettings::S3(_) => None,
    }
}

enum Removed {
    Yes,
    No(StorageError),
}

/// Writes, reads, compares and deletes one small object.
async fn round_trip(store: &dyn ObjectStore, key: &str) -> Result<Removed, StorageError> {
    let tried = write_and_read(store, key).await;
    if tried.is_err() {
        // The write may have come through all the same, and a local store may have made folders on the way. A store that hangs is
        // not waited for again.
        let _ = tokio::time::timeout(REQUEST_LIMIT, store.delete(key)).await;
    }
    tried?;
    Ok(match remove(store, key).await {
        Ok(()) => Removed::Yes,
        Err(error) => Removed::No(error),
    })
}

async fn write_and_read(store: &dyn ObjectStore, key: &str) -> Result<(), StorageError> {
    let damaged = |why: &str| StorageError::Damaged { url: store.url(), key: key.into(), why: why.into() };
    let body = Body::Bytes(Bytes::from_static(CONTENT));
    if store.put_new(key, &body, crc32fast::hash(CONTENT)).await? == PutOutcome::Exists {
        let why = "a name that was never used is taken already";
        return Err(match store.url().starts_with("s3://") {
            true => {
                StorageError::NotAStore { url: store.url(), what: format!("storing {key}"), source: Some(why.into()) }
            }
            false => damaged(why),
        });
    }
    let (read, _) = store.get(key, 1 << 10).await?;
    if read == CONTENT { Ok(()) } else { Err(damaged("it is read back with other content")) }
}

async fn remove(store: &dyn ObjectStore, key: &str) -> Result<(), StorageError> {
    store.delete(key).await?;
    match store.head(key).await? {
        None => Ok(()),
        Some(_) => Err(StorageError::Unavailable {
            url: store.url(),
            what: format!("deleting {key}, which is still there afterwards,"),
            source: None,
        }),
    }
}

fn judge_abilities(name: String, abilities: Abilities, single_writer: bool, url: &str) -> Check {
    let is_conditional = abilities.conditional_create && abilities.conditional_update;
    if !is_conditional && !single_writer {
        let error = ArchiveError::NoConditions { url: url.into() };
        return Check::error(name, &error, error.hint());
    }
    let mut lacks = Vec::new();
    if !abilities.conditional_create {
        lacks.push("conditional creates");
    }
    if !abilities.conditional_update {
        lacks.push("conditional updates");
    }
    if !abilities.checksums {
        lacks.push("checksums");
    }
    if lacks.is_empty() {
        return Check::good(name, "conditional creates and updates, checksums");
    }
    let message = format!("the store does not honour {}", lacks.join(" and "));
    let hint = if is_conditional {
        "nothing: every object is read back"
    } else {
        "single_writer = true vouches that this agent is the only writer: make sure that it is"
    };
    Check::remark(name, message, hint)
}

/// Another cluster's WAL under the name makes `run` refuse, unless the server's was adopted (`may`).
fn judge_identity(name: String, systems: &[SystemIdentifier], server: Option<SystemIdentifier>, may: bool) -> Check {
    let list = systems.iter().map(SystemIdentifier::to_string).collect::<Vec<_>>().join(", ");
    match server {
        _ if systems.is_empty() => Check::good(name, "nothing is archived under this name yet"),
        None => Check::good(name, format!("it holds system {list}; which one the server is, is not known")),
        Some(server) if systems == [server] => Check::good(name, format!("it holds this server's system {server}")),
        Some(server) if may => {
            Check::good(name, format!("it holds system {list}; the server's, {server}, was adopted"))
        }
        Some(server) => Check::failed(
            name,
            format!("it holds system {list} under this name, and the server is {server}"),
            format!(
                "correct postgres.url, or give this cluster its own archive.cluster; if it has replaced the other one: walden adopt --system-identifier {server}"
            ),
        ),
    }
}

/// Clocks of two hosts are compared here for a person's sake; nothing is decided by it but this line.
fn judge_lease(name: String, lease: Option<&LeaseJson>, agent: &Agent, now: PgTime) -> Check {
    let Some(lease) = lease.filter(|lease| lease.ttl_seconds > 0) else {
        return Check::good(name, "nobody holds it");
    };
    let who = format!("agent {} on {}", lease.agent, lease.host);
    if agent.id.as_deref() == Some(lease.agent.as_str()) {
        return Check::good(
            name,
            if agent.is_running { "the running agent holds it" } else { "this agent had it last" },
        );
    }
    let age = now.unix_seconds() - lease.renewed.unix_seconds();
    let patience = LEASE_TTL.as_secs();
    if age > LEASE_TTL.as_secs_f64() * 2.0 {
        let message = format!("{who} had it last and renewed it {age:.0} s ago");
        return Check::remark(name, message, format!("run waits {patience} s and takes it over"));
    }
    let message = format!("{who} holds it and renewed it {:.0} s ago", age.max(0.0));
    let hint = format!(
        "stop that agent; as long as it runs, this one only stands by, and takes over {patience} s after its end"
    );
    Check::failed(name, message, hint)
}

/// For information: a repository without a backup is where everybody begins.
async fn backups(name: String, archive: &Archive) -> Result<Check, RepositoryError> {
    let ids = archive.backup_ids().await?;
    for id in ids.iter().rev() {
        match archive.backup(id).await {
            Ok(Some(backup)) => {
                let message = format!(
                    "the newest of {} is {id}, ended {:.0}",
                    count(ids.len(), "backup"),
                    backup.stop_time.to_timestamp()
                );
                return Ok(Check::good(name, message));
            }
            Ok(None) => {}
            Err(error) if error.is_damaged() => {
                return Ok(Check { verdict: Verdict::Remark, ..Check::error(name, &error, error.hint()) });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Check::remark(name, NO_BACKUP, NO_BACKUP_HINT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(number: u64) -> SystemIdentifier {
        number.to_string().parse().unwrap_or_else(|_| panic!("{number} is one"))
    }

    #[test]
    fn abilities_decide_whether_run_would_start() {
        let all = Abilities { conditional_create: true, conditional_update: true, checksums: true };
        let judged = |abilities, single_writer| judge_abilities("a".into(), abilities, single_writer, "s3://b").verdict;
        assert_eq!(judged(all, false), Verdict::Good);
        assert_eq!(judged(Abilities { checksums: false, ..all }, false), Verdict::Remark);
        for lacking in [Abilities { conditional_create: false, ..all }, Abilities { conditional_update: false, ..all }]
        {
            assert_eq!(judged(lacking, false), Verdict::Failed);
            assert_eq!(judged(lacking, true), Verdict::Remark);
        }
    }

    #[test]
    fn another_system_under_the_name_fails() {
        let judged = |systems: &[u64], server: Option<u64>| {
            let systems: Vec<_> = systems.iter().map(|number| system(*number)).collect();
            judge_identity("i".into(), &systems, server.map(system), false).verdict
        };
        assert_eq!(judged(&[], Some(7)), Verdict::Good);
        assert_eq!(judged(&[7], Some(7)), Verdict::Good);
        assert_eq!(judged(&[7], None), Verdict::Good);
        assert_eq!(judged(&[8], Some(7)), Verdict::Failed);
        assert_eq!(judged(&[7, 8], Some(7)), Verdict::Failed);
    }

    #[test]
    fn a_lease_of_another_living_agent_fails() {
        let now = SystemClock::new().wall();
        let ago = |seconds: i64| PgTime::from_pg_micros(now.pg_micros() - seconds * 1_000_000);
        let lease = |agent: &str, seconds, ttl_seconds| LeaseJson {
            format: 1,
            agent: agent.into(),
            host: "db2".into(),
            taken: ago(1000),
            renewed: ago(seconds),
            ttl_seconds,
        };
        let ours = Agent { id: Some("me".into()), ..Agent::default() };
        let judged = |lease: Option<LeaseJson>| judge_lease("l".into(), lease.as_ref(), &ours, now).verdict;
        assert_eq!(judged(None), Verdict::Good);
        assert_eq!(judged(Some(lease("me", 1, 30))), Verdict::Good);
        assert_eq!(judged(Some(lease("other", 1, 0))), Verdict::Good, "it was given back");
        assert_eq!(judged(Some(lease("other", 3, 30))), Verdict::Failed);
        assert_eq!(judged(Some(lease("other", -3, 30))), Verdict::Failed, "its clock is ahead");
        assert_eq!(judged(Some(lease("other", 3600, 30))), Verdict::Remark);
    }
}
