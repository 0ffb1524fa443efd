//! Serves PostgreSQL's `restore_command`: one file, delivered whole and verified, or proven absent, or an error.
//!
//! "Absent" ends a recovery and opens the database, so it must be proven (I12): by the plan, by a definite answer for a history file, or by
//! a complete listing. One function alone may say it: [`absent`].

mod delivery;
mod listing;
mod patience;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use self::delivery::{deliver_bytes, deliver_tail, deliver_whole};
use self::listing::by_listing;
use self::patience::{Progress, patiently};
use super::RestoreError;
use super::plan_file::{Needed, PlanFile, PlannedHistory, PlannedTail};
use crate::repository::{Archive, Repository};
use crate::seal::Compression;
use crate::wal::{SegmentName, SegmentSize, SystemIdentifier, TimelineId};

#[derive(Clone, Debug)]
pub struct FetchRequest {
    pub plan: Option<PlanFile>,
    /// Chooses the system where there is no plan and several archived under the name.
    pub system: Option<SystemIdentifier>,
    /// `%f`, not checked yet.
    pub name: String,
    /// `%p`.
    pub path: PathBuf,
    /// How long an outage is waited out.
    pub patience: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchOutcome {
    Delivered,
    ProvenAbsent,
}

/// The only place where "absent" is said. Every caller has a proof, and names it for the log.
fn absent(proof: &str) -> FetchOutcome {
    tracing::debug!(proof, "the file does not exist");
    FetchOutcome::ProvenAbsent
}

/// Delivers one file. Errors are never taken for absence.
pub async fn wal_fetch(repositories: &[Repository], request: &FetchRequest) -> Result<FetchOutcome, RestoreError> {
    match &request.plan {
        Some(plan) => by_plan(repositories, plan, request).await,
        None => by_listing(repositories, request).await,
    }
}

/// What a name asks for. Anything else PostgreSQL does not ask for in a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WalFile<'a> {
    History(TimelineId),
    Segment(&'a str),
}

fn parse_name(name: &str) -> Result<WalFile<'_>, RestoreError> {
    let unknown = || RestoreError::Target {
        why: format!(
            "\"{}\" is not the name of a WAL segment or a history file",
            name.chars().take(64).collect::<String>()
        ),
        hint: "PostgreSQL gives the name as %f",
    };
    if let Some(timeline) = name.strip_suffix(".history") {
        return TimelineId::from_hex(timeline).map(WalFile::History).map_err(|_| unknown());
    }
    // The largest number of segments in 4 GiB, so every real name parses.
    let smallest = SegmentSize::new(1 << 20).expect("1 MiB is a segment size");
    SegmentName::parse(name, smallest).map(|_| WalFile::Segment(name)).map_err(|_| unknown())
}

/// What a plan says about a name, without asking any store.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision<'a> {
    Whole(SegmentName, Compression),
    Tail(SegmentName, &'a PlannedTail),
    History(&'a PlannedHistory),
    /// PostgreSQL chooses its new timeline from the answer, so it must be today's.
    AskHistory(TimelineId),
    Absent(&'static str),
    Refused(&'static str),
}

fn decide<'a>(plan: &'a PlanFile, name: &str) -> Result<Decision<'a>, RestoreError> {
    Ok(match parse_name(name)? {
        WalFile::History(TimelineId::FIRST) => Decision::Absent("timeline 1 has no history"),
        WalFile::History(timeline) => match plan.histories.iter().find(|history| history.timeline == timeline) {
            Some(history) => Decision::History(history),
            None if timeline == plan.timeline => Decision::Refused("the plan has no history of its own timeline"),
            None => Decision::AskHistory(timeline),
        },
        WalFile::Segment(name) => {
            let segment = match SegmentName::parse(name, plan.segment_size) {
                Ok(segment) => segment,
                Err(_) => return Ok(Decision::Refused("the plan is one of a cluster with larger segments")),
            };
            match plan.needs(segment) {
                Some(Needed::Whole(compression)) => Decision::Whole(segment, compression),
                Some(Needed::Tail(tail)) => Decision::Tail(segment, tail),
                None => decide_other(plan, segment),
            }
        }
    })
}

/// A segment that the plan does not need.
fn decide_other(plan: &PlanFile, segment: SegmentName) -> Decision<'static> {
    let (first, end) = plan.range();
    if segment.start() >= end {
        // PostgreSQL 15 and later read ahead beyond the target; an error here would kill a recovery that is done.
        return Decision::Absent("it lies behind the last segment of the plan");
    }
    if !plan.is_on_branch(segment.timeline()) {
        return Decision::Refused("its timeline is not on the branch of the plan");
    }
    if segment.start() < first {
        return Decision::Refused("it lies before the first segment of the plan");
    }
    match plan.timeline_of(segment.start()) {
        // PostgreSQL asks for the newest timeline first; the plan takes this part of the WAL from an older one.
        Some(planned) if planned < segment.timeline() => Decision::Absent("the plan takes it from an older timeline"),
        _ => Decision::Refused("the plan takes this part of the WAL from another timeline"),
    }
}

async fn by_plan(
    repositories: &[Repository],
    plan: &PlanFile,
    request: &FetchRequest,
) -> Result<FetchOutcome, RestoreError> {
    let decision = decide(plan, &request.name)?;
    if let Decision::Absent(proof) = decision {
        return Ok(absent(proof));
    }
    if let Decision::Refused(why) = decision {
        return Err(RestoreError::Target {
            why: format!("{} is refused: {why}", request.name),
            hint: "plan again with `walden restore`",
        });
    }
    let found = repositories
        .iter()
        .find(|repository| repository.name() == plan.repository && repository.cluster() == plan.cluster);
    // Renamed since: if there is only one, it is meant; everything read is checked to be of the planned system.
    let repository = found.or(match repositories {
        [only] => Some(only),
        _ => None,
    });
    let Some(repository) = repository else {
        return Err(RestoreError::Target {
            why: format!("repository \"{}\" of the plan is not configured", plan.repository),
            hint: "configure it under this name, or plan again with `walden restore`",
        });
    };
    let archive = repository.bind(plan.system_identifier);
    patiently(request.patience, |progress| carry_out(&archive, &decision, &request.path, progress)).await
}

async fn carry_out(
    archive: &Archive,
    decision: &Decision<'_>,
    path: &Path,
    progress: Arc<Progress>,
) -> Result<FetchOutcome, RestoreError> {
    match decision {
        Decision::Whole(segment, compression) => {
            deliver_whole(archive, *segment, *compression, path, &progress).await?
        }
        Decision::Tail(segment, tail) => deliver_tail(archive, *segment, tail, path, &progress).await?,
        Decision::History(planned) => {
            let Some(bytes) = archive.history(planned.timeline).await? else {
                return Err(missing(archive, &planned.timeline.history_file_name()));
            };
            if bytes.len() as u64 != planned.size || crc32fast::hash(&bytes) != planned.crc32 {
                let what = format!("{} is not what it was", planned.timeline.history_file_name());
                return Err(RestoreError::DamagedWal { why: what });
            }
            deliver_bytes(&bytes, path, &progress)?;
        }
        Decision::AskHistory(timeline) => match archive.history(*timeline).await? {
            Some(bytes) => deliver_bytes(&bytes, path, &progress)?,
            None => return Ok(absent("the store has no such history file")),
        },
        Decision::Absent(proof) => return Ok(absent(proof)),
        Decision::Refused(why) => return Err(RestoreError::DamagedWal { why: (*why).into() }),
    }
    Ok(FetchOutcome::Delivered)
}

fn missing(archive: &Archive, name: &str) -> RestoreError {
    let source = crate::storage::StorageError::NotFound { url: archive.url(), key: name.into() };
    RestoreError::Repository(source.into())
}

#[cfg(test)]
mod tests;
