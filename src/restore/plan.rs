//! What a restore to a target needs, decided before anything is written (I5). Pure: it sees a catalog and what a search has found.

use super::search::{Cut, Stop};
use super::target::{Request, Target, TargetAction};
use crate::repository::{BackupId, BackupJson, Catalog, Held, Piece, Stretch};
use crate::seal::Compression;
use crate::wal::{Lsn, ParameterChange, PgTime, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// Why a target cannot be reached, in words for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreachable(pub String);

fn unreachable<T>(why: impl Into<String>) -> Result<T, Unreachable> {
    Err(Unreachable(why.into()))
}

/// The branch to restore along: that of the timeline asked for, else of the one that is archived now.
pub fn choose_branch(catalog: &Catalog, request: &Request) -> Result<TimelineHistory, Unreachable> {
    let wanted = match (request.timeline, &request.target) {
        (Some(timeline), _) => timeline,
        // A backup asked for by name brings its own timeline when nothing beyond it is wanted.
        (None, Target::Immediate) if request.backup.is_some() => {
            let id = request.backup.as_ref().expect("just looked at");
            known_backup(catalog, id)?.stop_timeline
        }
        (None, _) => match catalog.current_timeline() {
            Some(timeline) => timeline,
            None => return unreachable("no WAL is archived"),
        },
    };
    if !catalog.timelines.contains_key(&wanted) {
        return unreachable(format!("nothing is archived of timeline {wanted}"));
    }
    match catalog.history(wanted) {
        Some(branch) => Ok(branch),
        None => unreachable(format!("{} is not archived", wanted.history_file_name())),
    }
}

fn known_backup<'a>(catalog: &'a Catalog, id: &BackupId) -> Result<&'a BackupJson, Unreachable> {
    match catalog.backup(id) {
        Some(backup) => Ok(backup),
        None => unreachable(format!("there is no backup {id}")),
    }
}

/// The backups from which the stretch can be replayed, by stop LSN.
pub fn backups_in<'a>(
    catalog: &'a Catalog,
    branch: &'a TimelineHistory,
    stretch: &Stretch,
    wanted: Option<&BackupId>,
) -> Vec<&'a BackupJson> {
    let mut backups: Vec<&BackupJson> = catalog
        .backups_on(branch)
        .filter(|backup| backup.kind == "full" && wanted.is_none_or(|id| *id == backup.id))
        .filter(|backup| stretch.covers(backup.start_lsn, backup.stop_lsn))
        .collect();
    backups.sort_by_key(|backup| (backup.stop_lsn, backup.start_lsn));
    backups
}

/// How the recovery is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryStop {
    Lsn {
        lsn: Lsn,
        inclusive: bool,
    },
    /// `recovery_target = 'immediate'`: before the first record after the backup's stop LSN, which must be there.
    Immediate,
    /// No target: the record that the backup begins with, a shutdown checkpoint, is the last one, so that nothing is replayed. Where
    /// nothing is, PostgreSQL reaches no target and ends with a FATAL ("redo is not required" in `PerformWalRecovery`, the same file).
    /// It cannot open too early either: without that record it does not start.
    NothingToReplay,
}

/// The backup to start from, and how the recovery stops.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice<'a> {
    pub backup: &'a BackupJson,
    pub stop: RecoveryStop,
}

/// What is known about a time target beyond the search's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeKnowledge {
    pub time: PgTime,
    pub exclusive: bool,
    /// Every commit acknowledged before this is held. `None`: nothing is known.
    pub complete_until: Option<PgTime>,
    /// Highest commit time on the branch before the searched WAL; `None`: no commit was seen there. It goes on over holes.
    pub max_time_before: Option<PgTime>,
    /// A commit is held before the searched WAL, without a hole between the two.
    pub witness: bool,
}

/// Chooses the newest backup that serves a cut. `backups` are those of the cut's stretch, by stop LSN.
///
/// A backup serves if the cut lies at or after its stop LSN: before that, it is not consistent.
pub fn choose<'a>(
    backups: &[&'a BackupJson],
    cut: &Cut,
    time: Option<TimeKnowledge>,
) -> Result<Choice<'a>, Unreachable> {
    let Some(first) = backups.first() else {
        return unreachable("no backup reaches the WAL that it lies in");
    };
    if let Some(time) = time {
        check_held(cut, time)?;
    }
    let serving = backups.iter().rev().find(|backup| serves(backup, cut));
    let Some(backup) = serving else {
        let at = cut.stop.reached_at();
        return unreachable(format!(
            "it lies at {at}, before {}, where the first backup that could be used ({}) becomes consistent",
            first.stop_lsn, first.id
        ));
    };
    if let Some(time) = time {
        check_not_before(backups, cut, time)?;
    }
    // Also where no record lies after the backup's stop LSN, as in one from an idle standby: PostgreSQL looks whether it is
    // consistent before it stops behind a record. `immediate` would wait there for a record to stop before, and end with a
    // FATAL (`recoveryStopsBefore`, `recoveryStopsAfter` in `src/backend/access/transam/xlogrecovery.c`).
    let stop = match cut.stop {
        Stop::Through { record, .. } if record == backup.start_lsn => RecoveryStop::NothingToReplay,
        stop => RecoveryStop::Lsn { lsn: stop.lsn(), inclusive: stop.inclusive() },
    };
    Ok(Choice { backup, stop })
}

/// Without a target PostgreSQL promotes.
pub fn check_action(stop: RecoveryStop, action: TargetAction) -> Result<(), Unreachable> {
    if stop != RecoveryStop::NothingToReplay || action == TargetAction::Promote {
        return Ok(());
    }
    unreachable(format!(
        "no WAL lies behind the backup's beginning, and where nothing is replayed PostgreSQL cannot {}",
        match action {
            TargetAction::Pause => "pause",
            _ => "shut down at the target",
        }
    ))
}

fn serves(backup: &BackupJson, cut: &Cut) -> bool {
    match cut.stop {
        Stop::Before(lsn) => backup.stop_lsn <= lsn,
        // The record that ends the backup's WAL is enough.
        Stop::Through { end, .. } => backup.stop_lsn <= end || backup.stop_lsn <= cut.stop.reached_at(),
    }
}

/// A time with no later commit held is reached only if it is known that none is missing: an acknowledged commit that was not
/// archived in time would be left out silently.
fn check_held(cut: &Cut, known: TimeKnowledge) -> Result<(), Unreachable> {
    if matches!(cut.stop, Stop::Before(_)) {
        return Ok(());
    }
    let last = cut.last_kept.map(|mark| mark.time).max(known.max_time_before);
    let until = last.max(known.complete_until);
    if until.is_some_and(|until| known.time <= until) {
        return Ok(());
    }
    match until {
        Some(until) => unreachable(format!("every commit is known to be held only until {until}")),
        None => unreachable("nothing tells until when the archived WAL is complete"),
    }
}

/// A time before the oldest backup that serves began is reached only if some commit at or before it is held from which the WAL goes on
/// to the cut: without one, what the backup has could have been committed after the target, in WAL that is lost. A highest time that
/// was carried over a hole is no such commit.
fn check_not_before(backups: &[&BackupJson], cut: &Cut, known: TimeKnowledge) -> Result<(), Unreachable> {
    let oldest = backups.iter().filter(|backup| serves(backup, cut)).min_by_key(|backup| backup.start_time);
    let witness = cut.last_kept.is_some() || known.witness;
    match oldest {
        Some(backup) if known.time < backup.start_time && !witness => unreachable(format!(
            "it lies before backup {} began ({}), the first that could be used",
            backup.id, backup.start_time
        )),
        _ => Ok(()),
    }
}

/// For `immediate`: the newest backup of all, or the one asked for.
pub fn choose_immediate<'a>(
    catalog: &'a Catalog,
    branch: &'a TimelineHistory,
    stretches: &[Stretch],
    wanted: Option<&BackupId>,
) -> Result<(Choice<'a>, usize), Unreachable> {
    for (index, stretch) in stretches.iter().enumerate().rev() {
        if let Some(backup) = backups_in(catalog, branch, stretch, wanted).last() {
            return Ok((Choice { backup, stop: RecoveryStop::Immediate }, index));
        }
    }
    match wanted {
        Some(id) => {
            known_backup(catalog, id)?;
            unreachable(format!(
                "the WAL of backup {id} is not archived without a gap on timeline {}",
                branch.timeline()
            ))
        }
        None => unreachable("there is no backup whose WAL is archived without a gap"),
    }
}

/// WAL that a restore needs, by whole segments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NeededWal {
    pub runs: Vec<NeededRun>,
    pub tails: Vec<NeededTail>,
}

/// Complete segments of one timeline, `[start, end)` on segment boundaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeededRun {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub end: Lsn,
    pub compression: Compression,
}

/// A segment held in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeededTail {
    pub segment: SegmentName,
    pub pieces: Vec<Piece>,
}

impl NeededWal {
    /// The segments of `stretch` that hold `[from, through]`; `through` is the last byte needed. Of a segment in pieces all that are
    /// held are taken: the tail is frozen as it is now.
    pub fn of(stretch: &Stretch, from: Lsn, through: Lsn) -> Self {
        let size = stretch.segment_size();
        let from = size.start_of(from);
        let until = SegmentName::holding(TimelineId::FIRST, through, size).end();
        let mut needed = Self::default();
        for part in stretch.parts() {
            match &part.held {
                Held::Segments(compression) => {
                    let start = part.start.max(from);
                    // Where the branch leaves the timeline inside a segment, that segment is delivered whole all the same.
                    let end = Lsn::new(part.end.get().next_multiple_of(size.get())).min(until);
                    if start < end {
                        needed.runs.push(NeededRun { timeline: part.timeline, start, end, compression: *compression });
                    }
                }
                Held::Pieces(pieces) => {
                    let segment = SegmentName::holding(part.timeline, part.start, size);
                    if segment.start() >= from && segment.start() < until {
                        needed.tails.push(NeededTail { segment, pieces: pieces.clone() });
                    }
                }
            }
        }
        needed
    }

    pub fn segment_count(&self, size: SegmentSize) -> u64 {
        let whole: u64 = self.runs.iter().map(|run| run.end.bytes_since(run.start) / size.get()).sum();
        whole + self.tails.len() as u64 // usize fits
    }

    /// Raw bytes.
    pub fn bytes(&self) -> u64 {
        let whole: u64 = self.runs.iter().map(|run| run.end.bytes_since(run.start)).sum();
        let tails = self.tails.iter().filter_map(|tail| tail.pieces.last()).map(|piece| u64::from(piece.end));
        whole + tails.sum::<u64>()
    }
}

/// Raises what the backup's `pg_control` asks for by the changes up to the cut.
pub fn required_settings(backup: &BackupJson, changes: &[ParameterChange]) -> Vec<(&'static str, i32)> {
    let mut needed = backup.required_settings;
    for change in changes {
        needed.max_connections = needed.max_connections.max(change.max_connections);
        needed.max_worker_processes = needed.max_worker_processes.max(change.max_worker_processes);
        needed.max_wal_senders = needed.max_wal_senders.max(change.max_wal_senders);
        needed.max_prepared_transactions = needed.max_prepared_transactions.max(change.max_prepared_xacts);
        needed.max_locks_per_transaction = needed.max_locks_per_transaction.max(change.max_locks_per_xact);
    }
    vec![
        ("max_connections", needed.max_connections),
        ("max_worker_processes", needed.max_worker_processes),
        ("max_wal_senders", needed.max_wal_senders),
        ("max_prepared_transactions", needed.max_prepared_transactions),
        ("max_locks_per_transaction", needed.max_locks_per_transaction),
    ]
}

/// The five settings of which PostgreSQL lets only one be set.
const TARGETS: [&str; 5] =
    ["recovery_target", "recovery_target_time", "recovery_target_xid", "recovery_target_name", "recovery_target_lsn"];

/// The recovery settings in the order in which they must be written: the chosen target comes last, after the other four were
/// emptied, since a file outside the data directory may set one of them and two targets stop PostgreSQL.
pub fn target_settings(stop: RecoveryStop, timeline: TimelineId, action: TargetAction) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("recovery_target_timeline", timeline.to_string()),
        ("recovery_target_action", action.as_str().to_string()),
    ];
    let (chosen, value) = match stop {
        RecoveryStop::Immediate => ("recovery_target", "immediate".to_string()),
        RecoveryStop::Lsn { lsn, .. } => ("recovery_target_lsn", lsn.to_string()),
        RecoveryStop::NothingToReplay => {
            settings.extend(TARGETS.iter().map(|name| (*name, String::new())));
            return settings;
        }
    };
    settings.extend(TARGETS.iter().filter(|name| **name != chosen).map(|name| (*name, String::new())));
    let inclusive = matches!(stop, RecoveryStop::Immediate | RecoveryStop::Lsn { inclusive: true, .. });
    settings.push(("recovery_target_inclusive", if inclusive { "on" } else { "off" }.to_string()));
    settings.push((chosen, value));
    settings
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
