//! What is held already: found once at each connection, so that streaming goes on exactly behind it and the overlap is compared.

use std::collections::BTreeSet;
use std::path::PathBuf;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::ArchiveError;
use crate::queue::QueueEntry;
use crate::repository::{Archive, Catalog, Gap, PieceChain, TimelineWal, WalObject, WalObjectKind};
use crate::spool::{FoundOpen, Spool, SpoolError, SpooledName, decode_open, read_open};
use crate::wal::{Lsn, PgTime, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Chunks decoded ahead of the comparison.
const CHUNKS_MAX: usize = 4;

/// The contiguous WAL that is held, up to its end.
#[derive(Clone, Debug)]
pub struct Held {
    pub timeline: TimelineId,
    /// End of the last whole segment, or the start of the open one.
    pub sealed_end: Lsn,
    /// End of everything.
    pub end: Lsn,
    /// Where the bytes lie, in order; the last parts only, as far back as is at hand.
    pub parts: Vec<HeldPart>,
    /// The timeline was ended by a switch at `end`.
    pub closed: bool,
    /// Highest commit time at the end of the last whole segment.
    pub max_time: Option<PgTime>,
    /// Where the record starts that reaches over the end of the last whole segment.
    pub open_record: Option<Lsn>,
}

#[derive(Clone, Debug)]
pub enum HeldPart {
    Spooled { start: Lsn, end: Lsn, name: SpooledName },
    Open { start: Lsn, end: Lsn, found: FoundOpen },
    Stored { start: Lsn, end: Lsn, object: WalObject, archive: Archive },
}

impl HeldPart {
    pub fn start(&self) -> Lsn {
        match self {
            Self::Spooled { start, .. } | Self::Open { start, .. } | Self::Stored { start, .. } => *start,
        }
    }

    pub fn end(&self) -> Lsn {
        match self {
            Self::Spooled { end, .. } | Self::Open { end, .. } | Self::Stored { end, .. } => *end,
        }
    }
}

/// Names finished segments that a crash, or a failed session, has left without their names. Gives them for the queue.
pub fn name_finished(
    spool: &Spool,
    system: SystemIdentifier,
    size: SegmentSize,
) -> Result<Vec<QueueEntry>, ArchiveError> {
    let mut entries = Vec::new();
    for path in spool.contents(size)?.open {
        if read_open(spool.disk(), &path)?.is_none()
            && let Some((name, stored_size, crc32)) = spool.name_finished(&path, system)?
        {
            let SpooledName { timeline, order, relative } = name;
            let timeline = timeline.get();
            entries.push(QueueEntry { timeline, order, relative, stored_size, crc32, stored_in: Vec::new() });
        }
    }
    Ok(entries)
}

/// What the spool was seen to hold.
#[derive(Debug, Default)]
pub struct InSpool {
    /// Without a hole up to its end; recorded gaps are no holes. `None`: nothing.
    pub held: Option<Held>,
    /// Open files of which nothing was ever confirmed, or that another one holds as well: for the live path to remove.
    pub useless: Vec<PathBuf>,
}

/// Looks at the spool's names, headers and marks, for its newest timeline. Finished segments without a name count as useless here:
/// `name_finished` comes first.
pub fn find_in_spool(spool: &Spool, system: SystemIdentifier, size: SegmentSize) -> Result<InSpool, ArchiveError> {
    find_in_spool_on(spool, system, size, None)
}

/// The same for one timeline.
pub fn find_in_spool_on(
    spool: &Spool,
    system: SystemIdentifier,
    size: SegmentSize,
    only: Option<TimelineId>,
) -> Result<InSpool, ArchiveError> {
    let contents = spool.contents(size)?;
    for path in &contents.foreign {
        tracing::warn!(path = %path.display(), "foreign file in the spool: left alone");
    }
    let OpenFiles { usable, unusable, mut useless } = find_open(spool, &contents.open, system, size)?;
    useless.extend(unusable.iter().map(|(path, _)| path.clone()));
    let in_folder = |name: &&SpooledName, folder: &str| name.relative.starts_with(folder);
    let names = || contents.sealed.iter().map(|(name, _)| name);
    let sealed: Vec<&SpooledName> =
        names().filter(|name| !name.relative.ends_with(".history") && !in_folder(name, "gaps/")).collect();
    let gap_ends: BTreeSet<(TimelineId, Lsn)> = names()
        .filter(|name| in_folder(name, "gaps/"))
        .filter_map(|name| Some((name.timeline, name.gap_end()?)))
        .collect();
    let newest_sealed = sealed.iter().map(|name| name.timeline).max();
    let newest_open = usable.iter().map(|(segment, _)| segment.timeline()).max();
    let Some(timeline) = only.or(newest_sealed.max(newest_open)) else {
        return Ok(InSpool { held: None, useless });
    };
    let mut held: Option<Held> = None;
    for name in sealed.into_iter().filter(|name| name.timeline == timeline) {
        let start = Lsn::new(name.order);
        let closed = in_folder(&name, "tail/");
        let header = spool.read_header(name, system)?;
        let end = Lsn::new(start.get() + header.end_offset);
        let part = HeldPart::Spooled { start, end, name: name.clone() };
        let sealed_end = if closed { start } else { end };
        match held.as_mut().filter(|held| held.end == start) {
            // Segments get their names in order. After a hole, which is a gap or a segment that was set aside as damaged, what
            // follows it counts.
            None => {
                let parts = vec![part];
                held = Some(Held { timeline, sealed_end, end, parts, closed, max_time: None, open_record: None });
            }
            Some(held) => {
                held.parts.push(part);
                (held.sealed_end, held.end, held.closed) = (sealed_end, end, closed);
            }
        }
        let held = held.as_mut().expect("just set");
        if !closed {
            held.max_time = header.summary.max_time;
            held.open_record = header.summary.open_record;
        }
    }
    for (segment, found) in usable.into_iter().filter(|(segment, _)| segment.timeline() == timeline) {
        let (start, end) = (segment.start(), Lsn::new(segment.start().get() + found.mark.raw_len));
        let path = found.path.clone();
        let part = HeldPart::Open { start, end, found };
        match held.as_mut() {
            // One that was begun before and is neither sealed nor usable leaves a hole.
            None if !unusable.iter().any(|(_, other)| other.is_some_and(|other| other < segment)) => {
                let (parts, closed) = (vec![part], false);
                held =
                    Some(Held { timeline, sealed_end: start, end, parts, closed, max_time: None, open_record: None });
            }
            Some(held) if held.end == start && !held.closed => {
                held.end = end;
                held.parts.push(part);
            }
            // The segment of a part that was closed, because WAL behind it was lost, and that is built again after all.
            Some(held) if held.closed && held.sealed_end == start && held.end < end => {
                held.parts.pop();
                held.parts.push(part);
                (held.end, held.closed) = (end, false);
            }
            Some(held) if held.end < start && gap_ends.contains(&(timeline, start)) => {
                (held.parts, held.sealed_end, held.end) = (vec![part], start, end);
                (held.closed, held.open_record) = (false, None);
            }
            // Behind a hole nothing was confirmed: the segment before it was not sealed yet.
            held if held.as_ref().is_none_or(|held| held.end < start) => useless.push(path),
            _ => {}
        }
    }
    Ok(InSpool { held, useless })
}

struct OpenFiles {
    /// The best one of each segment, in order.
    usable: Vec<(SegmentName, FoundOpen)>,
    /// Those that prove nothing, with the segment that their name tells.
    unusable: Vec<(PathBuf, Option<SegmentName>)>,
    /// Those that hold less of a segment than another one.
    useless: Vec<PathBuf>,
}

/// Looks at the open files; of several for one segment the best stays.
fn find_open(
    spool: &Spool,
    paths: &[PathBuf],
    system: SystemIdentifier,
    size: SegmentSize,
) -> Result<OpenFiles, ArchiveError> {
    let mut usable: Vec<(SegmentName, FoundOpen)> = Vec::new();
    let (mut unusable, mut useless) = (Vec::new(), Vec::new());
    for path in paths {
        let Some(found) = read_open(spool.disk(), path)? else {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.get(..24));
            unusable.push((path.clone(), name.and_then(|name| SegmentName::parse(name, size).ok())));
            continue;
        };
        if found.mark.system_identifier != system || found.mark.segment_size != size {
            tracing::warn!(path = %path.display(), "an open segment of another cluster in the spool: left alone");
            continue;
        }
        let Ok(segment) = SegmentName::parse(&found.mark.segment, size) else { continue };
        match usable.iter_mut().find(|(other, _)| *other == segment) {
            None => usable.push((segment, found)),
            Some((_, other)) => {
                let (keep, drop) = if found.mark.raw_len > other.mark.raw_len {
                    (found, other.clone())
                } else {
                    (other.clone(), found)
                };
                useless.push(drop.path);
                *other = keep;
            }
        }
    }
    usable.sort_by_key(|(segment, _)| *segment);
    Ok(OpenFiles { usable, unusable, useless })
}

/// Which end counts where repositories hold differently much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// What all of them hold: from there on nothing is lacking anywhere.
    Least,
    Furthest,
}

/// What repositories hold, for an agent whose spool does not reach as far.
#[derive(Clone, Debug)]
pub struct HeldRemotely {
    pub held: Held,
    /// Names of those that hold as much.
    pub in_repositories: Vec<String>,
}

/// Asks every repository, for the newest timeline that it holds WAL of, or the newest of those in `only`. `None`: none holds WAL. A
/// required one must answer, others are passed over if they do not.
pub async fn find_remotely(
    archives: &[(Archive, bool)],
    size: SegmentSize,
    reach: Reach,
    only: Option<&[TimelineId]>,
) -> Result<Option<HeldRemotely>, ArchiveError> {
    let mut found: Vec<(String, Held)> = Vec::new();
    for (archive, required) in archives {
        let name = archive.repository().name();
        match find_in_repository(archive, size, only).await {
            Ok(Some(held)) => found.push((name.into(), held)),
            Ok(None) => {}
            Err(error) if *required => return Err(error),
            Err(error) => tracing::warn!(repository = name, "what it holds is not known: {}", error.describe()),
        }
    }
    let end = |(_, held): &&(String, Held)| (held.timeline, held.end);
    let chosen = match reach {
        Reach::Least => found.iter().min_by_key(end),
        Reach::Furthest => found.iter().max_by_key(end),
    };
    let Some((_, held)) = chosen.cloned() else { return Ok(None) };
    let as_much = found.iter().filter(|other| end(other) >= (held.timeline, held.end));
    let in_repositories = as_much.map(|(name, _)| name.clone()).collect();
    Ok(Some(HeldRemotely { held, in_repositories }))
}

/// Finds what one repository holds. `None`: nothing.
async fn find_in_repository(
    archive: &Archive,
    size: SegmentSize,
    only: Option<&[TimelineId]>,
) -> Result<Option<Held>, ArchiveError> {
    let is_wanted = |timeline: &TimelineId| only.is_none_or(|only| only.contains(timeline));
    let mut is_there = false;
    for prefix in [archive.keys().wal_prefix(), archive.keys().tail_prefix()] {
        for folder in archive.list_folders(&prefix).await? {
            is_there |= TimelineId::from_hex(folder.trim_end_matches('/')).is_ok_and(|timeline| is_wanted(&timeline));
        }
    }
    if !is_there {
        return Ok(None);
    }
    let catalog = archive.catalog().await?;
    let newest = catalog.timelines.iter().rfind(|(timeline, wal)| is_wanted(timeline) && wal.holds_wal());
    let Some((&timeline, wal)) = newest else { return Ok(None) };
    let Some((begin, contiguous)) = without_a_hole(&catalog, timeline, wal) else { return Ok(None) };
    let run = wal.runs.iter().rfind(|run| begin <= run.start && run.end <= contiguous);
    let sealed_end = run.map_or(begin, |run| run.end);
    let mut held = Held {
        timeline,
        sealed_end,
        end: sealed_end,
        parts: Vec::new(),
        closed: false,
        max_time: None,
        open_record: None,
    };
    if let Some(run) = run {
        let segment = SegmentName::holding(timeline, Lsn::new(sealed_end.get() - 1), size);
        let (kind, valid_until) = (WalObjectKind::Segment, segment.end());
        let object = WalObject { segment, kind, compression: run.compression, valid_until };
        let header = archive.header(&object).await?;
        held.max_time = header.summary.max_time;
        held.open_record = header.summary.open_record;
        let archive = archive.clone();
        held.parts.push(HeldPart::Stored { start: segment.start(), end: segment.end(), object, archive });
    }
    // A segment that is there in pieces to its end is gone on from.
    while let Some(pieces) = wal.pieces.get(&held.end) {
        let before = held.end;
        for piece in PieceChain::of(pieces).pieces {
            let (start, end) = (piece.start_lsn(), piece.end_lsn());
            if start == held.end {
                let (kind, compression) =
                    (WalObjectKind::Piece { start: piece.start, end: piece.end }, piece.compression);
                let object = WalObject { segment: piece.segment, kind, compression, valid_until: end };
                held.end = end;
                held.parts.push(HeldPart::Stored { start, end, object, archive: archive.clone() });
            }
        }
        if held.end == before || !size.is_boundary(held.end) {
            break;
        }
    }
    Ok(Some(held))
}

/// The last span that a repository holds without a hole. Several objects are on their way at a time: where a host was lost, what had
/// arrived behind one that had not does not count. A hole that is told as a gap is none, and what lies before the position that
/// `coverage.json` tells was whole once: what was lost of it since is not to be had again.
fn without_a_hole(catalog: &Catalog, timeline: TimelineId, wal: &TimelineWal) -> Option<(Lsn, Lsn)> {
    let mut spans = wal.runs.iter().map(|run| (run.start, run.end)).collect::<Vec<_>>();
    for (start, pieces) in &wal.pieces {
        spans.push((*start, Lsn::new(start.get() + u64::from(PieceChain::of(pieces).end))));
    }
    spans.retain(|(start, end)| start < end);
    spans.sort_unstable();
    let told = catalog.coverage.as_ref().filter(|coverage| coverage.timeline == timeline).map(|c| c.archived_lsn);
    let is_gap = |from: Lsn, to: Lsn| {
        let mut reached = from;
        let goes_on = |gap: &&Gap, reached| gap.timeline == timeline && gap.from_lsn <= reached && reached < gap.to_lsn;
        while reached < to {
            let Some(gap) = catalog.gaps.iter().find(|gap| goes_on(gap, reached)) else { return false };
            reached = gap.to_lsn;
        }
        true
    };
    let mut whole: Option<(Lsn, Lsn)> = None;
    for (start, end) in spans {
        whole = match whole {
            Some((begin, reached)) if start <= reached => Some((begin, reached.max(end))),
            Some((_, reached)) if told.is_none_or(|told| told < start) && !is_gap(reached, start) => break,
            Some(_) | None => Some((start, end)),
        };
    }
    whole
}

enum Chunk {
    Raw(Bytes),
    /// A part is not at hand any more: every repository has it now, so the spool let it go. Bytes go on at `until`.
    Gone {
        until: Lsn,
    },
}

/// The raw bytes held from a position on, decoded ahead on a thread (spool) or task (repository) of their own.
pub struct HeldBytes {
    chunks: mpsc::Receiver<Result<Chunk, ArchiveError>>,
    current: Bytes,
    position: Lsn,
    end: Lsn,
}

impl HeldBytes {
    /// Reads `[from, end)` of what `parts` hold. `from` is where a part starts.
    /// `stores` is the runtime of the repositories' clients.
    pub fn read(
        spool: Spool,
        system: SystemIdentifier,
        parts: Vec<HeldPart>,
        from: Lsn,
        end: Lsn,
        stores: &tokio::runtime::Handle,
    ) -> Self {
        let (send, chunks) = mpsc::channel(CHUNKS_MAX);
        let runtime = stores.clone();
        std::thread::Builder::new()
            .name("walden-held".into())
            .spawn(move || {
                for part in parts.into_iter().filter(|part| part.end() > from) {
                    if let Err(error) = read_part(&spool, system, &part, &runtime, &send) {
                        // A receiver that is gone needs no answer.
                        let _ = send.blocking_send(Err(error));
                        return;
                    }
                }
            })
            .expect("a thread can be started");
        Self { chunks, current: Bytes::new(), position: from, end }
    }

    /// Compares the beginning of `bytes`, which lie at `at`. Gives how many were equal, `None` once nothing more is held.
    /// Cancel-safe.
    pub async fn compare(&mut self, at: Lsn, bytes: &[u8]) -> Result<Option<usize>, ArchiveError> {
        let wanted = self.position < self.end && at >= self.position;
        let more = !wanted || self.fill().await?;
        // A part that is gone may have moved the position to the end.
        if !more && self.position < self.end {
            let why = format!("what is held ends at {} instead of {}", self.position, self.end);
            return Err(ArchiveError::Internal { why });
        }
        if self.position >= self.end {
            return Ok(None);
        }
        if at < self.position {
            // Further back than what is at hand: only indexed.
            return Ok(Some(bytes.len().min(usize::try_from(self.position.bytes_since(at)).unwrap_or(usize::MAX))));
        }
        assert_eq!(at, self.position, "the comparison follows the stream");
        let left = usize::try_from(self.end.bytes_since(at)).unwrap_or(usize::MAX);
        let take = self.current.len().min(bytes.len()).min(left);
        if let Some(differing) = (0..take).find(|&n| self.current[n] != bytes[n]) {
            return Err(self.judge(Lsn::new(at.get() + differing as u64)).await); // usize fits
        }
        let _ = self.current.split_to(take);
        self.position = Lsn::new(self.position.get() + take as u64); // usize fits
        Ok(Some(take))
    }

    /// All of it was compared.
    pub fn is_done(&self) -> bool {
        self.position >= self.end
    }

    /// Bytes differ. What is held is proven only at its end: a damaged copy of ours is no other history.
    async fn judge(&mut self, at: Lsn) -> ArchiveError {
        while let Some(chunk) = self.chunks.recv().await {
            if let Err(error) = chunk {
                return error;
            }
        }
        ArchiveError::Diverged { at }
    }

    /// The next bytes, for those who read rather than compare; `None` at the end or where a part is gone.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ArchiveError> {
        let before = self.position;
        if !self.fill().await? || self.position != before {
            return Ok(None);
        }
        let chunk = std::mem::take(&mut self.current);
        self.position = Lsn::new(self.position.get() + chunk.len() as u64); // usize fits
        Ok(Some(chunk))
    }

    /// Makes `current` non-empty; false at the end. Moves on over a part that is gone.
    async fn fill(&mut self) -> Result<bool, ArchiveError> {
        while self.current.is_empty() {
            match self.chunks.recv().await {
                Some(chunk) => match chunk? {
                    Chunk::Raw(bytes) => self.current = bytes,
                    Chunk::Gone { until } => self.position = until,
                },
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

fn read_part(
    spool: &Spool,
    system: SystemIdentifier,
    part: &HeldPart,
    runtime: &tokio::runtime::Handle,
    send: &mpsc::Sender<Result<Chunk, ArchiveError>>,
) -> Result<(), ArchiveError> {
    let sink = |bytes: &[u8]| {
        let gone = || SpoolError::from(std::io::Error::other("nobody reads on"));
        send.blocking_send(Ok(Chunk::Raw(Bytes::copy_from_slice(bytes)))).map_err(|_| gone())
    };
    match part {
        HeldPart::Spooled { name, end, .. } => match spool.decode(name, system, sink) {
            Err(SpoolError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                // A receiver that is gone needs no answer.
                let _ = send.blocking_send(Ok(Chunk::Gone { until: *end }));
            }
            other => other.map(|_| ())?,
        },
        HeldPart::Open { found, .. } => decode_open(spool.disk(), found, sink)?,
        HeldPart::Stored { object, archive, .. } => {
            // Raw bytes come out of the async reader in order; this thread hands them on and may wait for the comparison.
            let (to_here, mut from_store) = mpsc::channel::<Bytes>(CHUNKS_MAX);
            let (archive, object) = (archive.clone(), *object);
            let read = runtime.spawn(async move { archive.read_wal_to(&object, to_here).await });
            while let Some(chunk) = from_store.blocking_recv() {
                if send.blocking_send(Ok(Chunk::Raw(chunk))).is_err() {
                    read.abort();
                    return Ok(());
                }
            }
            runtime.block_on(read).map_err(|e| ArchiveError::Internal { why: e.to_string() })??;
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "held_tests.rs"]
pub(super) mod tests;
