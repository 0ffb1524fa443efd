use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::RestoreError;
use crate::repository::{BackupId, StoredPart};
use crate::seal::Compression;
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Name of the plan in a restored data directory.
pub const PLAN_FILE: &str = "walden-plan.json";
/// Bytes that a plan may have.
const PLAN_BYTES_MAX: u64 = 64 << 20;

/// A plan as `wal-fetch` follows it: every object that the recovery needs, and what the tail was when the plan was made.
/// Complete segments are named by ranges, so that a month of WAL is one line; each says in its own header what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanFile {
    pub format: u32,
    pub repository: String,
    pub cluster: String,
    pub system_identifier: SystemIdentifier,
    pub segment_size: SegmentSize,
    /// The timeline to recover along.
    pub timeline: TimelineId,
    /// Its ancestors and where each was left, oldest first.
    pub ancestors: Vec<(TimelineId, Lsn)>,
    /// For people.
    pub target: String,
    pub backup: BackupId,
    pub volumes: Vec<StoredPart>,
    pub manifest: Option<StoredPart>,
    pub wal: Vec<PlannedRun>,
    pub tails: Vec<PlannedTail>,
    pub histories: Vec<PlannedHistory>,
}

/// Complete segments, `[start, end)` on segment boundaries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedRun {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub end: Lsn,
    pub compression: Compression,
}

/// A segment that was held in pieces: its bytes `[0, end)`; the rest is delivered as zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedTail {
    pub segment: String,
    pub end: u64,
    /// Of the raw bytes `[0, end)`.
    pub raw_crc32: u32,
    pub pieces: Vec<PlannedPiece>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedPiece {
    pub start: u32,
    pub end: u32,
    pub compression: Compression,
    pub raw_crc32: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedHistory {
    pub timeline: TimelineId,
    pub size: u64,
    pub crc32: u32,
}

impl PlanFile {
    pub const FORMAT: u32 = 1;

    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("plain data serialises");
        json.push(b'\n');
        json
    }

    pub fn read(path: &Path) -> Result<Self, RestoreError> {
        let mut bytes = Vec::new();
        let unreadable = |error: std::io::Error| RestoreError::PlanFile { path: path.into(), why: error.to_string() };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        file.take(PLAN_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        Self::parse(&bytes).map_err(|why| RestoreError::PlanFile { path: path.into(), why })
    }

    /// Checks everything that a decision is made from.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > PLAN_BYTES_MAX {
            return Err(format!("it is larger than {PLAN_BYTES_MAX} bytes"));
        }
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if version.format != Self::FORMAT {
            return Err(format!("it has format {}, and this release knows {}", version.format, Self::FORMAT));
        }
        let plan: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), String> {
        let size = self.segment_size;
        for run in &self.wal {
            if run.start >= run.end || !size.is_boundary(run.start) || !size.is_boundary(run.end) {
                return Err(format!("its WAL from {} to {} is not one of whole segments", run.start, run.end));
            }
            self.check_member(run.timeline)?;
        }
        for tail in &self.tails {
            let segment = SegmentName::parse(&tail.segment, size).map_err(|e| e.to_string())?;
            self.check_member(segment.timeline())?;
            let mut end = 0;
            for piece in &tail.pieces {
                if piece.start > end || piece.end <= end || u64::from(piece.end) > size.get() {
                    return Err(format!("the pieces of {segment} do not follow each other"));
                }
                end = piece.end;
            }
            if u64::from(end) != tail.end || tail.pieces.is_empty() {
                return Err(format!("the pieces of {segment} do not end where they should"));
            }
        }
        if self.wal.is_empty() && self.tails.is_empty() {
            return Err("it needs no WAL at all".into());
        }
        Ok(())
    }

    fn check_member(&self, timeline: TimelineId) -> Result<(), String> {
        if self.is_on_branch(timeline) { Ok(()) } else { Err(format!("timeline {timeline} is not on its branch")) }
    }

    pub fn is_on_branch(&self, timeline: TimelineId) -> bool {
        timeline == self.timeline || self.ancestors.iter().any(|(ancestor, _)| *ancestor == timeline)
    }

    /// Start of the first segment and end of the last one that the plan needs.
    pub fn range(&self) -> (Lsn, Lsn) {
        let tails = || self.tails.iter().filter_map(|tail| SegmentName::parse(&tail.segment, self.segment_size).ok());
        let starts = self.wal.iter().map(|run| run.start).chain(tails().map(SegmentName::start));
        let ends = self.wal.iter().map(|run| run.end).chain(tails().map(SegmentName::end));
        (starts.min().unwrap_or(Lsn::ZERO), ends.max().unwrap_or(Lsn::ZERO))
    }

    /// How a segment is held, if the plan needs it.
    pub fn needs(&self, name: SegmentName) -> Option<Needed<'_>> {
        let run = self
            .wal
            .iter()
            .find(|run| run.timeline == name.timeline() && run.start <= name.start() && name.end() <= run.end);
        if let Some(run) = run {
            return Some(Needed::Whole(run.compression));
        }
        self.tails.iter().find(|tail| tail.segment == name.to_string()).map(Needed::Tail)
    }

    /// The timeline from which the plan takes the segment that starts at `start`.
    pub fn timeline_of(&self, start: Lsn) -> Option<TimelineId> {
        let run = self.wal.iter().find(|run| run.start <= start && start < run.end).map(|run| run.timeline);
        run.or_else(|| {
            let tails = self.tails.iter().filter_map(|tail| SegmentName::parse(&tail.segment, self.segment_size).ok());
            tails.into_iter().find(|segment| segment.start() == start).map(SegmentName::timeline)
        })
    }
}

/// How the plan gets a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed<'a> {
    Whole(Compression),
    Tail(&'a PlannedTail),
}
