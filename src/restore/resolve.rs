//! Makes a plan: reads the archive's headers, searches the cut, and checks everything that the restore will need.

use std::time::Duration;

use super::error::{RestoreError, with_sources};
use super::frozen::{check_parts, check_sizes, freeze, histories};
use super::plan::{self, NeededWal, RecoveryStop, TimeKnowledge, Unreachable};
use super::plan_file::{PlanFile, PlannedRun};
use super::search::{Cut, Search, SearchError, SearchTarget, Stop};
use super::source::{ArchiveSource, held_wal, searched_from};
use super::target::{Request, Target};
use super::windows::{complete_until, windows};
use crate::repository::{Archive, BackupJson, Catalog, Repository, RepositoryError, Stretch, WalObject};
use crate::wal::{CommitMark, Lsn, SegmentSize, SystemIdentifier, TimelineHistory, TimelineId};

/// How long another repository may take to say what it holds of the latest state.
const ANOTHER_LIMIT: Duration = Duration::from_secs(30);

/// Everything that a restore will do, resolved and checked.
#[derive(Clone, Debug)]
pub struct Plan {
    pub archive: Archive,
    pub backup: BackupJson,
    /// The timeline to restore along.
    pub timeline: TimelineId,
    /// Where no timeline was asked for: others that hold WAL and are not on the branch.
    pub beside: Vec<TimelineId>,
    pub stop: RecoveryStop,
    pub last_kept: Option<CommitMark>,
    pub first_left_out: Option<CommitMark>,
    /// How far the WAL is replayed, exclusive.
    pub reached: Lsn,
    /// For `latest`: through where the archive tells of WAL that is not there.
    pub told_beyond: Option<Lsn>,
    pub wal: NeededWal,
    pub segment_size: SegmentSize,
    pub required_settings: Vec<(&'static str, i32)>,
    pub request: Request,
    /// What `wal-fetch` will follow.
    pub file: PlanFile,
}

/// Plans on the first of `repositories`, in file order, that can be read and reaches the target; else tells what the first one said.
///
/// Of the latest state one may hold more than another: all are looked at then, and the one that reaches furthest along the branch of the
/// first is taken. What was passed over is told.
pub async fn plan(
    repositories: &[Repository],
    system: Option<SystemIdentifier>,
    request: &Request,
) -> Result<Plan, RestoreError> {
    let (mut best, mut passed_over): (Option<Plan>, Vec<(&str, RestoreError)>) = (None, Vec::new());
    for repository in repositories {
        let attempt = plan_in(repository, system, request);
        let planned = match &best {
            None => attempt.await,
            // Nothing waits long for another one, once there is a plan.
            Some(_) => match tokio::time::timeout(ANOTHER_LIMIT, attempt).await {
                Ok(planned) => planned,
                Err(_) => Err(RestoreError::Timeout { seconds: ANOTHER_LIMIT.as_secs() }),
            },
        };
        match (planned, best.take()) {
            (Ok(plan), None) => best = Some(plan),
            (Ok(plan), Some(known)) => best = Some(further(known, plan)),
            (Err(error), known) => {
                passed_over.push((repository.name(), error));
                best = known;
            }
        }
        if best.is_some() && request.target != Target::Latest {
            break;
        }
    }
    let Some(plan) = best else {
        // A refusal of the target says more than a store that is not there.
        let refusal = passed_over.iter().position(|(_, error)| matches!(error, RestoreError::Unreachable { .. }));
        return Err(match passed_over.is_empty() {
            false => passed_over.swap_remove(refusal.unwrap_or(0)).1,
            true => RestoreError::Target {
                why: "no repository is configured".into(),
                hint: "name one in the configuration or by `--repository`",
            },
        });
    };
    for (name, error) in passed_over {
        tracing::warn!("repository {name} is passed over: {}", with_sources(&error));
    }
    Ok(plan)
}

/// Of two plans for the latest state the one that holds more of the same branch; else the first.
fn further(first: Plan, second: Plan) -> Plan {
    let switch =
        second.file.ancestors.iter().find(|(timeline, _)| *timeline == first.timeline).map(|(_, switch)| *switch);
    let on_its_branch = first.timeline == second.timeline || switch.is_some_and(|switch| first.reached <= switch);
    let is_same = first.archive.system() == second.archive.system();
    if !is_same || !on_its_branch || second.reached <= first.reached {
        return first;
    }
    tracing::warn!(
        "repository {} ends at {}, and {} goes on to {}, which is taken",
        first.archive.repository().name(),
        first.reached,
        second.archive.repository().name(),
        second.reached
    );
    second
}

async fn plan_in(
    repository: &Repository,
    system: Option<SystemIdentifier>,
    request: &Request,
) -> Result<Plan, RestoreError> {
    let archive = repository.choose(system).await?;
    // A segment may replace its pieces while we look: then all is looked at anew, once or twice.
    for _ in 0..2 {
        match plan_once(&archive, request).await {
            Ok(plan) if plan.told_beyond.is_some() => tracing::debug!("WAL is told of and not there; planning again"),
            Err(RestoreError::Changed { what }) => tracing::debug!(what, "the archive changed; planning again"),
            Err(RestoreError::Repository(error)) if error.is_not_found() => {
                tracing::debug!(%error, "the archive changed; planning again");
            }
            other => return other,
        }
    }
    plan_once(&archive, request).await
}

async fn plan_once(archive: &Archive, request: &Request) -> Result<Plan, RestoreError> {
    let catalog = archive.catalog().await?;
    let (why, hint) = match resolve(archive, &catalog, request).await {
        Err(Failure::Unreachable(Unreachable(why), hint)) => (why, hint),
        Err(Failure::Other(error)) => return Err(error),
        Ok(plan) => return Ok(plan),
    };
    let windows = windows(archive, &catalog).await?;
    let hint = if windows.is_empty() { NO_WINDOW } else { hint };
    Err(RestoreError::Unreachable { why, hint, windows })
}

/// What to do where there is nothing to choose from.
const NO_WINDOW: &str = "take a base backup with `walden backup`, or look into another repository (`--repository`)";
/// What to do where nothing better is known.
const CHOOSE: &str = "choose a target inside one of the windows that `walden list` shows";

enum Failure {
    /// With what to do.
    Unreachable(Unreachable, &'static str),
    Other(RestoreError),
}

impl From<Unreachable> for Failure {
    fn from(why: Unreachable) -> Self {
        Self::Unreachable(why, CHOOSE)
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        Self::Other(error)
    }
}

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Self {
        Self::Other(error.into())
    }
}

impl From<SearchError<RepositoryError>> for Failure {
    fn from(error: SearchError<RepositoryError>) -> Self {
        if error.is_unreachable() {
            return Self::Unreachable(Unreachable(error.to_string()), error.hint().unwrap_or(CHOOSE));
        }
        if error.is_damaged() {
            let why = match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            };
            return Self::Other(RestoreError::DamagedWal { why });
        }
        match error {
            SearchError::Source(error) => Self::Other(error.into()),
            other => Self::Other(RestoreError::Changed { what: other.to_string() }),
        }
    }
}

/// What was decided so far.
struct Resolved<'a> {
    search: Search<'a, ArchiveSource<'a>, WalObject>,
    stretch: &'a Stretch,
    backup: &'a BackupJson,
    stop: RecoveryStop,
    last_kept: Option<CommitMark>,
    first_left_out: Option<CommitMark>,
    /// The last byte that recovery must be able to read.
    through: Lsn,
    /// Records that start before this are replayed.
    until: Lsn,
}

async fn resolve(archive: &Archive, catalog: &Catalog, request: &Request) -> Result<Plan, Failure> {
    // One that is there and damaged is not one that never was.
    let wanted = request.backup.as_ref().filter(|id| catalog.backup(id).is_none()).map(ToString::to_string);
    let unreadable = match &wanted {
        Some(id) => catalog.damaged_backups.iter().find(|why| why.contains(id)),
        None => catalog.damaged_backups.first().filter(|_| catalog.backups.is_empty()),
    };
    if let Some(why) = unreadable {
        return Err(Failure::Other(RestoreError::UnreadableBackup { why: why.clone() }));
    }
    if catalog.backups.is_empty() {
        return Err(Unreachable("there is no backup".into()).into());
    }
    let branch = plan::choose_branch(catalog, request)?;
    let stretches = catalog.stretches(&branch);
    let source = ArchiveSource::new(archive);
    let resolved = match &request.target {
        Target::Immediate => immediate(&source, catalog, &branch, &stretches, request).await?,
        _ => searched(&source, catalog, &branch, &stretches, request).await?,
    };
    let action = plan::check_action(resolved.stop, request.action);
    action.map_err(|why| Failure::Unreachable(why, "give `--action promote`"))?;
    let told_beyond = match request.target {
        Target::Latest => catalog.told_beyond(&branch, resolved.stretch.end()),
        _ => None,
    };
    let beside = if request.timeline.is_none() { catalog.beside(&branch) } else { Vec::new() };
    let plan = finish(archive, &branch, request, resolved).await?;
    Ok(Plan { beside, told_beyond, ..plan })
}

/// The first moment at which a backup is consistent: before the first record from its stop LSN on, or behind the last one.
async fn immediate<'a>(
    source: &'a ArchiveSource<'a>,
    catalog: &'a Catalog,
    branch: &'a TimelineHistory,
    stretches: &'a [Stretch],
    request: &Request,
) -> Result<Resolved<'a>, Failure> {
    let (choice, index) = plan::choose_immediate(catalog, branch, stretches, request.backup.as_ref())?;
    let target = SearchTarget::Lsn { lsn: choice.backup.stop_lsn, exclusive: true };
    let (at, backups) = ((stretches, index), [choice.backup]);
    let (found, _) = search_stretch(source, catalog, branch, at, &backups, choice.backup.start_lsn, &target).await?;
    let stop = match found.stop {
        RecoveryStop::Lsn { inclusive: false, .. } => choice.stop,
        behind_the_last => behind_the_last,
    };
    Ok(Resolved { stop, ..found })
}

/// Searches the stretches that a backup reaches, the newest first.
async fn searched<'a>(
    source: &'a ArchiveSource<'a>,
    catalog: &'a Catalog,
    branch: &'a TimelineHistory,
    stretches: &'a [Stretch],
    request: &Request,
) -> Result<Resolved<'a>, Failure> {
    let target = search_target(request);
    let mut refused: Option<Failure> = None;
    let mut found: Vec<(Resolved<'a>, Lsn)> = Vec::new();
    for (index, stretch) in stretches.iter().enumerate().rev() {
        let backups = plan::backups_in(catalog, branch, stretch, request.backup.as_ref());
        let last = index + 1 == stretches.len();
        let Some(from) = backups.iter().map(|backup| backup.start_lsn).min() else {
            if last && request.target == Target::Latest && request.backup.is_none() {
                let why = "no backup reaches the newest WAL, which lies behind a gap";
                return Err(Unreachable(why.into()).into());
            }
            continue;
        };
        let outcome = search_stretch(source, catalog, branch, (stretches, index), &backups, from, &target).await;
        match outcome {
            Ok((resolved, at)) => {
                found.push((resolved, at));
                // Only a name or an xid can be there twice.
                if !matches!(request.target, Target::Name(_) | Target::Xid(_)) {
                    break;
                }
            }
            Err(why @ Failure::Unreachable(..)) => {
                // What the newest stretch says is kept, unless an older one has the target.
                refused.get_or_insert(why);
                if request.target == Target::Latest {
                    break;
                }
            }
            Err(other) => return Err(other),
        }
    }
    if found.len() > 1 {
        let at: Vec<String> = found.iter().map(|(_, at)| at.to_string()).collect();
        let why = format!("{} occurs more than once, at {}", request.target, at.join(", "));
        return Err(Failure::Unreachable(Unreachable(why), "give the one that is meant as `--target-lsn`"));
    }
    match (found.pop(), refused) {
        (Some((resolved, _)), _) => Ok(resolved),
        (None, Some(why)) => Err(why),
        (None, None) => {
            let why = match &request.backup {
                Some(id) if catalog.backup(id).is_none() => format!("there is no backup {id}"),
                Some(id) => {
                    format!("the WAL of backup {id} is not archived without a gap on timeline {}", branch.timeline())
                }
                None => format!("no backup reaches the archived WAL of timeline {}", branch.timeline()),
            };
            Err(Unreachable(why).into())
        }
    }
}

fn search_target(request: &Request) -> SearchTarget {
    let exclusive = request.exclusive;
    match &request.target {
        Target::Time(time) => SearchTarget::Time { time: *time, exclusive },
        Target::Lsn(lsn) => SearchTarget::Lsn { lsn: *lsn, exclusive },
        Target::Xid(xid) => SearchTarget::Xid { xid: *xid, exclusive },
        Target::Name(name) => SearchTarget::Name(name.clone()),
        Target::Latest | Target::Immediate => SearchTarget::Latest,
    }
}

async fn search_stretch<'a>(
    source: &'a ArchiveSource<'a>,
    catalog: &Catalog,
    branch: &TimelineHistory,
    (stretches, index): (&'a [Stretch], usize),
    backups: &[&'a BackupJson],
    from: Lsn,
    target: &SearchTarget,
) -> Result<(Resolved<'a>, Lsn), Failure> {
    let (archive, stretch) = (source.archive(), &stretches[index]);
    let first = stretch.index_of(searched_from(stretch, from)).unwrap_or(0);
    let before = object_before(stretches, index, first);
    let max_time_before = match before {
        Some(object) => archive.header(&object).await?.summary.max_time,
        None => None,
    };
    let items = held_wal(stretch, from);
    let mut search = Search::new(source, stretch.segment_size(), archive.system(), items, max_time_before)?;
    let mut cut = search.find(target).await?;
    let time = match target {
        SearchTarget::Time { time, exclusive } => Some(TimeKnowledge {
            time: *time,
            exclusive: *exclusive,
            complete_until: complete_until(archive, catalog, branch, stretch).await?,
            max_time_before,
            witness: holds_commit_before(archive, stretch, first).await?,
        }),
        _ => None,
    };
    let choice = loop {
        let choice = plan::choose(backups, &cut, time)?;
        match search.earlier_cut(target, choice.backup.start_lsn, &cut).await? {
            Some(earlier) => cut = earlier,
            None => break choice,
        }
    };
    let through = through(archive, stretch, &cut).await?;
    let resolved = Resolved {
        search,
        stretch,
        backup: choice.backup,
        stop: choice.stop,
        last_kept: cut.last_kept,
        first_left_out: cut.first_left_out,
        through: through.max(Lsn::new(choice.backup.stop_lsn.get().saturating_sub(1))),
        until: cut.stop.reached_at().max(choice.backup.stop_lsn),
    };
    Ok((resolved, cut.stop.lsn()))
}

/// The object before object `first` of stretch `index` on the branch, also across a hole.
fn object_before(stretches: &[Stretch], index: usize, first: u64) -> Option<WalObject> {
    if first > 0 {
        return stretches[index].object(first - 1);
    }
    let before = stretches[..index].last()?;
    before.object(before.object_count().checked_sub(1)?)
}

/// Whether a commit is held in the stretch before its object `first`. The highest time of the object before does not tell it alone,
/// since it goes on over a hole, and nobody knows what was committed in there.
async fn holds_commit_before(archive: &Archive, stretch: &Stretch, first: u64) -> Result<bool, RestoreError> {
    let last = first.checked_sub(1).and_then(|before| stretch.object(before));
    let (Some(begin), Some(last)) = (stretch.object(0), last) else { return Ok(false) };
    // What lies behind a switch is another history's.
    if begin.valid_until < begin.end() || last.valid_until < last.end() {
        return Ok(false);
    }
    let begin = archive.header(&begin).await?.summary;
    Ok(begin.max_time_here.is_some() || archive.header(&last).await?.summary.max_time > begin.max_time)
}

/// The last byte that PostgreSQL must read to stop where it should: the end of the record of the cut, also of one left out, since it is
/// read to be recognised.
async fn through(archive: &Archive, stretch: &Stretch, cut: &Cut) -> Result<Lsn, Failure> {
    let record = match cut.stop {
        Stop::Through { end, .. } => return Ok(Lsn::new(end.get().saturating_sub(1))),
        Stop::Before(record) => record,
    };
    let Some(mut index) = stretch.index_of(record) else { return Ok(record) };
    while let Some(object) = stretch.object(index) {
        let header = archive.header(&object).await?;
        if header.summary.open_record != Some(record) {
            return Ok(Lsn::new(object.valid_until.get().saturating_sub(1)).max(record));
        }
        index += 1;
    }
    Ok(record)
}

async fn finish(
    archive: &Archive,
    branch: &TimelineHistory,
    request: &Request,
    mut resolved: Resolved<'_>,
) -> Result<Plan, Failure> {
    let Resolved { stretch, backup, stop, .. } = resolved;
    let size = stretch.segment_size();
    let wal = NeededWal::of(stretch, backup.start_lsn, resolved.through);
    let changes = resolved.search.parameter_changes(backup.start_lsn, resolved.until).await?;
    check_sizes(archive, &resolved.search.stored_sizes(backup.start_lsn, resolved.through).await?).await?;
    check_parts(archive, backup).await?;
    let mut tails = Vec::new();
    for tail in &wal.tails {
        tails.push(freeze(archive, tail).await?);
    }
    let file = PlanFile {
        format: PlanFile::FORMAT,
        repository: archive.repository().name().into(),
        cluster: archive.repository().cluster().into(),
        system_identifier: archive.system(),
        segment_size: size,
        timeline: branch.timeline(),
        ancestors: branch.ancestors().iter().map(|ancestor| (ancestor.timeline, ancestor.switch)).collect(),
        target: request.target.to_string(),
        backup: backup.id.clone(),
        volumes: backup.volumes.clone(),
        manifest: backup.manifest.clone(),
        wal: wal
            .runs
            .iter()
            .map(|run| PlannedRun {
                timeline: run.timeline,
                start: run.start,
                end: run.end,
                compression: run.compression,
            })
            .collect(),
        tails,
        histories: histories(archive, branch).await?,
    };
    Ok(Plan {
        archive: archive.clone(),
        backup: backup.clone(),
        timeline: branch.timeline(),
        beside: Vec::new(),
        stop,
        last_kept: resolved.last_kept,
        first_left_out: resolved.first_left_out,
        reached: resolved.until,
        told_beyond: None,
        segment_size: size,
        required_settings: plan::required_settings(backup, &changes),
        request: request.clone(),
        wal,
        file,
    })
}
