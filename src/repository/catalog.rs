use std::collections::BTreeMap;

use super::branch::{backup_is_on, subtract};
use super::{BackupJson, Coverage, Gap, Keys, ParsedKey, Piece, PieceChain, Stretch};
use crate::seal::{Compression, HEADER_LEN};
use crate::storage::ObjectInfo;
use crate::wal::{Lsn, PgTime, SegmentSize, SystemIdentifier, TimelineHistory, TimelineId};

/// Complaints kept by name; beyond it they are only counted.
const COMPLAINTS_MAX: usize = 100;

/// What an archive holds, as its listings tell it. Nothing of it comes from an index, and nothing of it changes anything.
#[derive(Clone, Debug)]
pub struct Catalog {
    pub keys: Keys,
    /// `None` only when the archive holds neither WAL nor a backup.
    pub segment_size: Option<SegmentSize>,
    pub timelines: BTreeMap<TimelineId, TimelineWal>,
    /// By id, so by time. Only those with a `backup.json`.
    pub backups: Vec<BackupJson>,
    /// As recorded; see `open_gaps`.
    pub gaps: Vec<Gap>,
    /// A hint, never proof.
    pub coverage: Option<Coverage>,
    /// Why a `backup.json` that is there cannot be read, with its key, one line each.
    pub damaged_backups: Vec<String>,
    /// Objects that are not what their place asks for, the first hundred.
    pub complaints: Vec<ObjectComplaint>,
    pub complaint_count: u64,
}

/// An object that is in the way or cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectComplaint {
    pub key: String,
    pub why: String,
}

/// What is held of one timeline.
#[derive(Clone, Debug, Default)]
pub struct TimelineWal {
    /// `None`: no `.history` is stored. Timeline 1 has none.
    pub history: Option<TimelineHistory>,
    /// Complete segments, ascending, without overlap, as long as possible: a million segments are one entry.
    pub runs: Vec<SegmentRun>,
    /// Pieces by the start of their segment.
    pub pieces: BTreeMap<Lsn, Vec<Piece>>,
}

/// Complete segments without a hole, `[start, end)`, both on segment boundaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRun {
    pub start: Lsn,
    pub end: Lsn,
    pub compression: Compression,
}

/// A span of one timeline's branch to any moment of which can be restored: from the consistent point of a backup to the last byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    pub timeline: TimelineId,
    pub from_lsn: Lsn,
    pub to_lsn: Lsn,
    pub from_time: Option<PgTime>,
    pub to_time: Option<PgTime>,
}

impl TimelineWal {
    pub fn holds_wal(&self) -> bool {
        !self.runs.is_empty() || !self.pieces.is_empty()
    }

    /// Whether the complete segment that starts at `start` is held.
    pub fn segment_at(&self, start: Lsn) -> Option<SegmentRun> {
        let at = self.runs.partition_point(|run| run.end <= start);
        self.runs.get(at).copied().filter(|run| run.start <= start)
    }

    /// The end of the last byte held before `from`, where a segment starts, wherever holes are.
    pub fn last_byte_before(&self, from: Lsn) -> Option<Lsn> {
        let whole = self.runs.iter().rfind(|run| run.start < from).map(|run| run.end.min(from));
        let open = self.pieces.range(..from).next_back();
        let open = open.map(|(start, pieces)| Lsn::new(start.get() + u64::from(PieceChain::of(pieces).end)));
        whole.max(open)
    }

    /// The end of the last byte held, wherever holes are.
    pub fn last_byte(&self) -> Option<Lsn> {
        let whole = self.runs.last().map(|run| run.end);
        let open = self.pieces.values().next_back().and_then(|pieces| pieces.iter().map(Piece::end_lsn).max());
        whole.max(open)
    }
}

impl Catalog {
    pub fn system(&self) -> SystemIdentifier {
        self.keys.system()
    }

    /// The highest timeline of which WAL or a history is held.
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.timelines.keys().next_back().copied()
    }

    /// The timeline that stands for the cluster where none is asked for: the newest that descends from the one archived last, as
    /// `coverage.json` tells it, and that was not archived any more behind the switch. A copy that was restored beside it and archived for
    /// a while may have taken a higher number. Without that hint it is the newest of all.
    pub fn current_timeline(&self) -> Option<TimelineId> {
        let newest = self.newest_timeline()?;
        let Some(last) = &self.coverage else { return Some(newest) };
        let descends = |timeline: TimelineId| {
            let range = self.history(timeline).and_then(|history| history.range_of(last.timeline));
            range.is_some_and(|(_, switch)| switch.is_none_or(|switch| last.archived_lsn <= switch))
        };
        Some(self.timelines.keys().rev().copied().find(|timeline| descends(*timeline)).unwrap_or(newest))
    }

    /// Timelines with WAL that `branch` does not go through.
    pub fn beside(&self, branch: &TimelineHistory) -> Vec<TimelineId> {
        let is_beside = |timeline: TimelineId| branch.range_of(timeline).is_none() && self.history(timeline).is_some();
        let holding = self.timelines.iter().filter(|(_, wal)| wal.holds_wal()).map(|(timeline, _)| *timeline);
        holding.filter(|timeline| is_beside(*timeline)).collect()
    }

    /// How `timeline` came to be. `None`: its `.history` is not stored, so PostgreSQL could not recover along it.
    pub fn history(&self, timeline: TimelineId) -> Option<TimelineHistory> {
        let stored = self.timelines.get(&timeline).and_then(|wal| wal.history.clone());
        stored.or_else(|| (timeline == TimelineId::FIRST).then(|| TimelineHistory::without_ancestors(timeline)))
    }

    pub fn backup(&self, id: &super::BackupId) -> Option<&BackupJson> {
        self.backups.iter().find(|backup| backup.id == *id)
    }

    /// The WAL held along a branch, as stretches without a hole, ascending. Each timeline counts up to where the branch leaves it.
    pub fn stretches(&self, branch: &TimelineHistory) -> Vec<Stretch> {
        match self.segment_size {
            Some(size) => super::branch::stretches(&self.timelines, branch, size),
            None => Vec::new(),
        }
    }

    /// Backups whose WAL lies on the branch, by time.
    pub fn backups_on<'a>(&'a self, branch: &'a TimelineHistory) -> impl DoubleEndedIterator<Item = &'a BackupJson> {
        self.backups.iter().filter(move |backup| backup_is_on(backup, branch))
    }

    /// What can be restored, by timeline: from the first consistent point that a backup gives to the last byte without a hole.
    /// `to_time` is left open, since only the WAL's headers know it.
    pub fn windows(&self) -> Vec<Window> {
        let mut windows = Vec::new();
        for (timeline, wal) in &self.timelines {
            let Some(branch) = self.history(*timeline) else { continue };
            if !wal.holds_wal() {
                continue;
            }
            for stretch in self.stretches(&branch) {
                let usable =
                    self.backups_on(&branch).filter(|backup| stretch.covers(backup.start_lsn, backup.stop_lsn));
                if let Some(first) = usable.min_by_key(|backup| backup.stop_lsn) {
                    windows.push(Window {
                        timeline: *timeline,
                        from_lsn: first.stop_lsn,
                        to_lsn: stretch.end(),
                        from_time: Some(first.stop_time),
                        to_time: None,
                    });
                }
            }
        }
        windows
    }

    /// The recorded gaps without what is held after all.
    pub fn open_gaps(&self) -> Vec<Gap> {
        let mut open = Vec::new();
        for gap in &self.gaps {
            let held = self.timelines.get(&gap.timeline).map(|wal| self.held(wal)).unwrap_or_default();
            for (from_lsn, to_lsn) in subtract((gap.from_lsn, gap.to_lsn), &held) {
                open.push(Gap { from_lsn, to_lsn, ..gap.clone() });
            }
        }
        open
    }

    /// Whether lost WAL, `[from, to)` of `timeline`, no longer stands between this branch's backups and its end: one of them begins
    /// behind it, or the branch does not go through it.
    pub fn is_past(&self, branch: &TimelineHistory, timeline: TimelineId, (from, to): (Lsn, Lsn)) -> bool {
        let goes_through =
            branch.range_of(timeline).is_some_and(|(_, switch)| switch.is_none_or(|switch| from < switch));
        !goes_through || self.begins_behind(branch, to)
    }

    /// Whether the branch can be restored without anything that lies before `position`.
    pub fn begins_behind(&self, branch: &TimelineHistory, position: Lsn) -> bool {
        self.backups_on(branch).any(|backup| backup.start_lsn >= position)
    }

    /// Through where `coverage.json` tells of WAL on this branch, if only `end` is there: what lies between was lost, or never came to
    /// this repository.
    pub fn told_beyond(&self, branch: &TimelineHistory, end: Lsn) -> Option<Lsn> {
        let coverage = self.coverage.as_ref()?;
        let (begin, switch) = branch.range_of(coverage.timeline)?;
        let on_branch = begin <= coverage.archived_lsn && switch.is_none_or(|switch| coverage.archived_lsn <= switch);
        (on_branch && coverage.archived_lsn > end).then_some(coverage.archived_lsn)
    }

    /// Spans held of one timeline, ascending.
    fn held(&self, wal: &TimelineWal) -> Vec<(Lsn, Lsn)> {
        let mut held: Vec<(Lsn, Lsn)> = wal.runs.iter().map(|run| (run.start, run.end)).collect();
        for (start, pieces) in &wal.pieces {
            let chain = PieceChain::of(pieces);
            if chain.end > 0 {
                held.push((*start, Lsn::new(start.get() + u64::from(chain.end))));
            }
        }
        held.sort_unstable();
        held
    }
}

/// Makes a catalog from what was listed and read. Pure, so that plans are tested without a store.
#[derive(Debug)]
pub struct CatalogBuilder {
    catalog: Catalog,
}

impl CatalogBuilder {
    pub fn new(keys: Keys, segment_size: Option<SegmentSize>) -> Self {
        Self {
            catalog: Catalog {
                keys,
                segment_size,
                timelines: BTreeMap::new(),
                backups: Vec::new(),
                gaps: Vec::new(),
                coverage: None,
                damaged_backups: Vec::new(),
                complaints: Vec::new(),
                complaint_count: 0,
            },
        }
    }

    pub fn complain(&mut self, key: &str, why: &str) {
        self.catalog.complaint_count += 1;
        if self.catalog.complaints.len() < COMPLAINTS_MAX {
            self.catalog.complaints.push(ObjectComplaint { key: key.into(), why: why.into() });
        }
    }

    pub fn damaged_backup(&mut self, why: String) {
        self.complain("", &why);
        self.catalog.damaged_backups.push(why);
    }

    /// Takes in one listed object below `wal/` or `tail/`. Histories are given by `history`, once read.
    pub fn listed(&mut self, object: &ObjectInfo) {
        let Some(size) = self.catalog.segment_size else { return };
        let parsed = ParsedKey::parse(&self.catalog.keys, &object.key, size);
        if matches!(parsed, ParsedKey::Segment { .. } | ParsedKey::Piece { .. }) && object.size < HEADER_LEN as u64 {
            self.complain(&object.key, "it is too short to be WAL that Walden stored");
            return;
        }
        match parsed {
            ParsedKey::Segment { name, compression } => {
                let run = SegmentRun { start: name.start(), end: name.end(), compression };
                let runs = &mut self.catalog.timelines.entry(name.timeline()).or_default().runs;
                match runs.last_mut() {
                    Some(last) if last.end == run.start && last.compression == compression => last.end = run.end,
                    _ => runs.push(run),
                }
            }
            ParsedKey::Piece { segment, start, end, compression } => {
                let piece = Piece { segment, start, end, compression, stored_bytes: object.size };
                let wal = self.catalog.timelines.entry(segment.timeline()).or_default();
                wal.pieces.entry(segment.start()).or_default().push(piece);
            }
            ParsedKey::History { timeline } => {
                self.catalog.timelines.entry(timeline).or_default();
            }
            ParsedKey::BackupObject { .. }
            | ParsedKey::Gap { .. }
            | ParsedKey::Coverage
            | ParsedKey::Lease
            | ParsedKey::Adopted => {}
            ParsedKey::Foreign => self.complain(&object.key, "it is not an object of Walden"),
        }
    }

    pub fn history(&mut self, history: TimelineHistory) {
        let timeline = history.timeline();
        self.catalog.timelines.entry(timeline).or_default().history = Some(history);
    }

    pub fn backup(&mut self, backup: BackupJson) {
        self.catalog.backups.push(backup);
    }

    pub fn gap(&mut self, gap: Gap) {
        self.catalog.gaps.push(gap);
    }

    pub fn coverage(&mut self, coverage: Option<Coverage>) {
        self.catalog.coverage = coverage;
    }

    pub fn finish(mut self) -> Catalog {
        for wal in self.catalog.timelines.values_mut() {
            wal.runs = normalised(std::mem::take(&mut wal.runs));
            // A complete segment replaces its pieces.
            let runs = &wal.runs;
            wal.pieces.retain(|start, _| {
                let at = runs.partition_point(|run| run.end <= *start);
                runs.get(at).is_none_or(|run| run.start > *start)
            });
        }
        self.catalog.backups.sort_by(|a, b| a.id.cmp(&b.id));
        self.catalog.gaps.sort_by_key(|gap| (gap.timeline, gap.from_lsn));
        self.catalog
    }
}

/// Runs in order, joined where they meet, and without overlap where a segment is there under both suffixes (the LZ4 one counts then).
fn normalised(mut runs: Vec<SegmentRun>) -> Vec<SegmentRun> {
    runs.sort_by_key(|run| (run.start, run.compression.suffix()));
    let mut out: Vec<SegmentRun> = Vec::with_capacity(runs.len());
    for mut run in runs {
        if let Some(last) = out.last_mut() {
            run.start = run.start.max(last.end);
            if run.start >= run.end {
                continue;
            }
            if last.end == run.start && last.compression == run.compression {
                last.end = run.end;
                continue;
            }
        }
        out.push(run);
    }
    out
}

#[cfg(test)]
#[path = "catalog_tests.rs"]
pub(crate) mod tests;
