use std::collections::BTreeMap;

use super::{BackupJson, Keys, Piece, PieceChain, TimelineWal};
use crate::seal::Compression;
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineHistory, TimelineId};

/// WAL held along a branch without a hole.
///
/// Where a timeline ends inside a segment, the next timeline's first segment begins with a copy of the same bytes; as soon as
/// that one reaches past the switch it is the one that counts, as PostgreSQL too asks for it first
/// (`XLogFileReadAnyTLI` in `src/backend/access/transam/xlogrecovery.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    parts: Vec<StretchPart>,
    size: SegmentSize,
}

/// A run of objects of one timeline and kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StretchPart {
    pub timeline: TimelineId,
    /// Of the first object.
    pub start: Lsn,
    /// Exclusive; where the branch leaves the timeline, this lies inside the last object.
    pub end: Lsn,
    pub held: Held,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    Segments(Compression),
    /// Of one segment, from its beginning on.
    Pieces(Vec<Piece>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalObjectKind {
    Segment,
    /// Offsets in the segment.
    Piece {
        start: u32,
        end: u32,
    },
}

/// One stored object on a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalObject {
    pub segment: SegmentName,
    pub kind: WalObjectKind,
    pub compression: Compression,
    /// Where the branch leaves the object's timeline, if that lies inside the object: bytes from here on are another history.
    pub valid_until: Lsn,
}

impl WalObject {
    pub fn key(&self, keys: &Keys) -> String {
        match self.kind {
            WalObjectKind::Segment => keys.segment(self.segment, self.compression),
            WalObjectKind::Piece { start, end } => keys.piece(self.segment, start, end, self.compression),
        }
    }

    /// First byte held in it.
    pub fn start(&self) -> Lsn {
        match self.kind {
            WalObjectKind::Segment => self.segment.start(),
            WalObjectKind::Piece { start, .. } => Lsn::new(self.segment.start().get() + u64::from(start)),
        }
    }

    /// First byte after what is held in it, whatever the branch makes of it.
    pub fn end(&self) -> Lsn {
        match self.kind {
            WalObjectKind::Segment => self.segment.end(),
            WalObjectKind::Piece { end, .. } => Lsn::new(self.segment.start().get() + u64::from(end)),
        }
    }

    /// Raw bytes in it.
    pub fn raw_bytes(&self) -> u64 {
        self.end().bytes_since(self.start())
    }
}

impl Stretch {
    pub fn start(&self) -> Lsn {
        self.parts.first().map_or(Lsn::ZERO, |part| part.start)
    }

    /// Exclusive.
    pub fn end(&self) -> Lsn {
        self.parts.last().map_or(Lsn::ZERO, |part| part.end)
    }

    /// Whether all of `[from, to)` is held.
    pub fn covers(&self, from: Lsn, to: Lsn) -> bool {
        self.start() <= from && to <= self.end()
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.size
    }

    pub fn object_count(&self) -> u64 {
        self.parts.iter().map(|part| part.object_count(self.size)).sum()
    }

    /// Object `index` in WAL order, from 0.
    pub fn object(&self, mut index: u64) -> Option<WalObject> {
        for part in &self.parts {
            let count = part.object_count(self.size);
            if index < count {
                return part.object(index, self.size);
            }
            index -= count;
        }
        None
    }

    /// The index of the object that holds the byte at `position`.
    pub fn index_of(&self, position: Lsn) -> Option<u64> {
        let mut before = 0;
        for part in &self.parts {
            if part.start <= position && position < part.end {
                return part.index_of(position, self.size).map(|index| before + index);
            }
            before += part.object_count(self.size);
        }
        None
    }

    /// The objects that hold `[from, to)`, in order. A position inside an object takes the whole object.
    pub fn objects(&self, from: Lsn, to: Lsn) -> impl Iterator<Item = WalObject> {
        let first = self.index_of(from).unwrap_or(0);
        let last = if to > from { self.index_of(Lsn::new(to.get() - 1)).map_or(0, |last| last + 1) } else { first };
        (first..last).filter_map(|index| self.object(index))
    }

    /// The runs that it is made of, in WAL order.
    pub fn parts(&self) -> &[StretchPart] {
        &self.parts
    }
}

impl StretchPart {
    fn object_count(&self, size: SegmentSize) -> u64 {
        match &self.held {
            Held::Segments(_) => self.end.bytes_since(self.start).div_ceil(size.get()),
            Held::Pieces(pieces) => pieces.len() as u64, // usize fits
        }
    }

    fn object(&self, index: u64, size: SegmentSize) -> Option<WalObject> {
        match &self.held {
            Held::Segments(compression) => {
                let start = Lsn::new(self.start.get() + index * size.get());
                let segment = SegmentName::holding(self.timeline, start, size);
                Some(WalObject {
                    segment,
                    kind: WalObjectKind::Segment,
                    compression: *compression,
                    valid_until: self.end.min(segment.end()),
                })
            }
            Held::Pieces(pieces) => {
                let piece = pieces.get(usize::try_from(index).ok()?)?;
                Some(WalObject {
                    segment: piece.segment,
                    kind: WalObjectKind::Piece { start: piece.start, end: piece.end },
                    compression: piece.compression,
                    valid_until: self.end.min(piece.end_lsn()),
                })
            }
        }
    }

    fn index_of(&self, position: Lsn, size: SegmentSize) -> Option<u64> {
        match &self.held {
            Held::Segments(_) => Some(position.bytes_since(self.start) / size.get()),
            Held::Pieces(pieces) => {
                let at = pieces.iter().position(|piece| position < piece.end_lsn())?;
                Some(at as u64) // usize fits
            }
        }
    }
}

/// Whether a backup's WAL lies on the branch from its first to its last byte.
pub(super) fn backup_is_on(backup: &BackupJson, branch: &TimelineHistory) -> bool {
    let stop_ok = branch
        .range_of(backup.stop_timeline)
        .is_some_and(|(begin, end)| begin < backup.stop_lsn && end.is_none_or(|end| backup.stop_lsn <= end));
    branch.timeline_at(backup.start_lsn) == backup.start_timeline && stop_ok
}

/// Stretches of the WAL held along `branch`, ascending.
pub(super) fn stretches(
    timelines: &BTreeMap<TimelineId, TimelineWal>,
    branch: &TimelineHistory,
    size: SegmentSize,
) -> Vec<Stretch> {
    // From the newest timeline back, so that each one knows from where on a newer one has replaced it.
    let mut parts: Vec<StretchPart> = Vec::new();
    let mut until = None;
    let chain = branch.ancestors().iter().map(|ancestor| ancestor.timeline).chain([branch.timeline()]);
    for timeline in chain.collect::<Vec<_>>().into_iter().rev() {
        let (begin, switch) = branch.range_of(timeline).expect("a member of the branch");
        let end = until.or(switch);
        let own = timelines.get(&timeline).map(|wal| parts_of(timeline, wal)).unwrap_or_default();
        let first_start = size.start_of(begin);
        // Held from the start of the segment with the switch to beyond the switch?
        let replaces = own.iter().any(|part| part.start <= first_start && part.end > begin);
        let from = if replaces { first_start } else { begin };
        parts.extend(own.into_iter().filter_map(|part| part.cut(from, end, size)));
        // Several switches may lie in one segment: what a newer timeline replaced stays replaced.
        until = Some(until.map_or(from, |until: Lsn| until.min(from)));
    }
    parts.sort_by_key(|part| part.start);
    let mut stretches: Vec<Stretch> = Vec::new();
    for part in parts {
        match stretches.last_mut() {
            Some(stretch) if stretch.end() == part.start => stretch.parts.push(part),
            _ => stretches.push(Stretch { parts: vec![part], size }),
        }
    }
    stretches
}

/// Everything that is held of one timeline, ascending.
fn parts_of(timeline: TimelineId, wal: &TimelineWal) -> Vec<StretchPart> {
    let mut parts: Vec<StretchPart> = wal
        .runs
        .iter()
        .map(|run| StretchPart { timeline, start: run.start, end: run.end, held: Held::Segments(run.compression) })
        .collect();
    for (start, pieces) in &wal.pieces {
        let chain = PieceChain::of(pieces);
        if chain.end > 0 {
            let end = Lsn::new(start.get() + u64::from(chain.end));
            parts.push(StretchPart { timeline, start: *start, end, held: Held::Pieces(chain.pieces) });
        }
    }
    parts
}

impl StretchPart {
    /// The part within `[from, until)`. `from` inside a segment drops that segment, unless an older timeline has nothing to give
    /// there anyway: the bytes before `from` are the older timeline's own.
    fn cut(mut self, from: Lsn, until: Option<Lsn>, size: SegmentSize) -> Option<StretchPart> {
        if let Some(until) = until {
            self.end = self.end.min(until);
        }
        if self.start < from {
            // Only whole segments can be left out; the one with `from` inside does not reach beyond it (see `replaces`).
            let next = match size.offset_of(from) {
                0 => from,
                _ => size.start_of(from).checked_add(size.get())?,
            };
            match &self.held {
                Held::Segments(_) => self.start = next,
                Held::Pieces(_) => return None,
            }
        }
        if let Held::Pieces(pieces) = &mut self.held {
            let end = self.end;
            pieces.retain(|piece| piece.start_lsn() < end);
        }
        (self.start < self.end).then_some(self)
    }
}

/// `span` without what is in `held` (ascending).
pub(super) fn subtract(span: (Lsn, Lsn), held: &[(Lsn, Lsn)]) -> Vec<(Lsn, Lsn)> {
    let (mut from, to) = span;
    let mut left = Vec::new();
    for &(start, end) in held {
        if end <= from || start >= to {
            continue;
        }
        if start > from {
            left.push((from, start));
        }
        from = from.max(end);
    }
    if from < to {
        left.push((from, to));
    }
    left
}
