//! `walden adopt`: lets a new cluster archive under a name that another one used. Nothing of the other one is touched.

use std::time::{Duration, Instant};

use serde_json::json;

use super::args::AdoptArgs;
use super::error::CliError;
use super::output::Output;
use super::{exit, reading};
use crate::config::Settings;
use crate::daemon;
use crate::postgres::{ConnectSettings, PostgresError, ReplicationConnection};
use crate::repository::{
    Archive, LEASE_MARGIN, LEASE_TTL, Lease, LeaseAttempt, LeaseHolder, LeaseSeeker, Repository, Succession,
};
use crate::spool::Spool;
use crate::wal::SystemIdentifier;

/// How often a lease is looked at that may have been left behind.
const POLL: Duration = Duration::from_secs(1);

pub fn run(settings: &Settings, output: &Output, args: &AdoptArgs) -> Result<u8, CliError> {
    reading::runtime()?.block_on(adopt(settings, output, args.system_identifier))
}

async fn adopt(settings: &Settings, output: &Output, system: SystemIdentifier) -> Result<u8, CliError> {
    let refused = |error: daemon::DaemonError| CliError::from_error(error.exit_code(), &error, error.hint());
    let repositories = reading::open(settings).await?;
    let connect = daemon::postgres_settings(settings).map_err(|error| refused(error.into()))?;
    is_the_servers(&connect, system, output).await?;
    let in_spool = Spool::known_systems(&settings.spool.path, &settings.archive.cluster)
        .map_err(|error| CliError::from_error(exit::FAILED, &error, error.hint()))?;
    let mut plan = Vec::new();
    for repository in &repositories {
        let succession = repository.succession().await?;
        if let Some(by) = succession.kept_by(system)
            && repository.bind(system).adopted().await?.is_some()
        {
            let message = format!("system {system} was adopted before, and system {by} after it");
            return Err(CliError::new(exit::REFUSED, message, "give this cluster its own archive.cluster"));
        }
        plan.push((repository, succession));
    }
    let others = |succession: &Succession| succession.others(system);
    let in_spool = in_spool.iter().any(|other| *other != system);
    if !in_spool && plan.iter().all(|(_, succession)| others(succession).is_empty()) {
        let name = &settings.archive.cluster;
        output.note(&format!("nothing to adopt: no other cluster than {system} is archived under \"{name}\""));
        return told(output, system, Vec::new());
    }
    // Every refusal comes before the first change.
    for (repository, succession) in &plan {
        for other in others(succession) {
            falls_silent(&repository.bind(other), output).await?;
        }
    }
    let mut done = Vec::new();
    for (repository, succession) in &plan {
        let archive = repository.bind(system);
        let lease = take_lease(&archive, output).await?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let adopted = archive.adopt(&lease, succession, &host).await;
        let released = lease.release().await;
        adopted?;
        released?;
        done.push((*repository, others(succession)));
    }
    told(output, system, done)
}

fn told(
    output: &Output,
    system: SystemIdentifier,
    done: Vec<(&Repository, Vec<SystemIdentifier>)>,
) -> Result<u8, CliError> {
    if output.is_json() {
        let repositories =
            done.iter().map(|(repository, before)| json!({ "name": repository.name(), "before": before }));
        let repositories: Vec<_> = repositories.collect();
        output.document(&json!({ "schema": 1, "system_identifier": system, "repositories": repositories }))?;
        return Ok(exit::DONE);
    }
    for (repository, before) in done {
        let before: Vec<String> = before.iter().map(SystemIdentifier::to_string).collect();
        let after = if before.is_empty() { String::new() } else { format!(" after {}", before.join(", ")) };
        output.line(&format!(
            "{}: system {system} archives under \"{}\"{after}; start its agent",
            repository.name(),
            repository.cluster()
        ))?;
    }
    Ok(exit::DONE)
}

/// The number is typed by hand; a server that answers knows better. One that does not is no obstacle.
async fn is_the_servers(connect: &ConnectSettings, system: SystemIdentifier, output: &Output) -> Result<(), CliError> {
    let asked = async {
        let mut connection = ReplicationConnection::connect(connect).await?;
        Ok::<_, PostgresError>(connection.identify_system().await?.system_identifier)
    };
    match asked.await {
        Ok(found) if found == system => Ok(()),
        Ok(found) => Err(CliError::new(
            exit::REFUSED,
            format!("the server at {connect} is system {found}, not {system}"),
            "correct --system-identifier or postgres.url",
        )),
        Err(error) => {
            output.note(&format!("the server was not asked for its system identifier: {error}"));
            Ok(())
        }
    }
}

/// An agent that still archives the other cluster is not to be cut off: its lease must be given back, or stand still for its time
/// to live.
async fn falls_silent(archive: &Archive, output: &Output) -> Result<(), CliError> {
    let begun = Instant::now();
    let Some(first) = archive.lease().await?.filter(|lease| lease.ttl_seconds > 0) else { return Ok(()) };
    let patience = LEASE_TTL.max(Duration::from_secs(u64::from(first.ttl_seconds.min(3600)))) + LEASE_MARGIN;
    let who = format!("agent {} on {}", first.agent, first.host);
    output.note(&format!("{who} had the lease of system {}: waiting to see that it is gone", archive.system()));
    while begun.elapsed() < patience {
        tokio::time::sleep(POLL).await;
        match archive.lease().await? {
            Some(lease) if lease.ttl_seconds > 0 && lease != first => {
                let message = format!("{who} still archives system {} under this name", archive.system());
                return Err(CliError::new(
                    exit::REFUSED,
                    message,
                    "stop that agent first, or give it another archive.cluster",
                ));
            }
            Some(lease) if lease.ttl_seconds > 0 => {}
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// The lease of the system to adopt, so that two do not adopt at once, and none while an agent archives there.
async fn take_lease(archive: &Archive, output: &Output) -> Result<Lease, CliError> {
    let holder = LeaseHolder {
        agent: uuid::Uuid::new_v4().to_string(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    falls_silent(archive, output).await?;
    let mut seeker = LeaseSeeker::new(archive.clone(), holder, LEASE_TTL);
    let deadline = Instant::now() + LEASE_TTL + LEASE_MARGIN;
    loop {
        match seeker.try_take().await? {
            LeaseAttempt::Taken(lease) => return Ok(lease),
            LeaseAttempt::HeldByOther { agent, host, .. } if Instant::now() > deadline => {
                let message = format!("agent {agent} on {host} holds the lease of system {}", archive.system());
                return Err(CliError::new(exit::REFUSED, message, "stop that agent first"));
            }
            LeaseAttempt::HeldByOther { .. } => tokio::time::sleep(POLL).await,
        }
    }
}
