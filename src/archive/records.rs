//! The queue's records and the spool's files: made to agree at the start, with a record for each file, and what is gone asked for again.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::backlog::{Backlog, Index};
use super::gap::gap_of;
use super::live::small_entry;
use super::{ArchiveError, Missing};
use crate::disk::Disk;
use crate::queue::{OpenedAs, Queue, QueueEntry, QueueError};
use crate::spool::{Spool, SpoolError, SpooledName, parse_relative};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Segments of holes in the spool that the repositories are asked for, one by one. Uploads run ahead of a stuck one by far less.
const HOLES_MAX: usize = 4096;
/// The reason of a gap of which only the name is left.
pub(super) const REASON_LOST: &str = "the spool's own record of this gap was lost, which gave the reason";

/// Opens the queue and makes it agree with the spool's names and sizes. Contents are read only of files that it does not know.
/// `repositories`: each with whether it is required.
pub(super) fn open_backlog(
    disk: &Disk,
    state: &std::path::Path,
    spool: &Spool,
    system: SystemIdentifier,
    size: SegmentSize,
    repositories: Vec<(String, bool)>,
    missing: &Missing,
) -> Result<Arc<Backlog>, ArchiveError> {
    let mut contents = spool.contents(size)?;
    let files: HashMap<&str, (&SpooledName, u64)> =
        contents.sealed.iter().map(|(name, length)| (name.relative.as_str(), (name, *length))).collect();
    let mut entries = Vec::new();
    let mut lost: Vec<SegmentName> = Vec::new();
    let mut lost_gaps: Vec<QueueEntry> = Vec::new();
    let mut is_whole = false;
    let opened = state.parent().map_or(Ok(()), |parent| disk.create_folders(parent));
    let opened = opened.map_err(|e| QueueError::Open { path: state.into(), why: e.to_string() });
    let queue = match opened.and_then(|()| Queue::open(disk, state)).and_then(|(queue, opened)| {
        match &opened {
            OpenedAs::Fresh { why } => tracing::info!("the queue is built from the spool: {why}"),
            OpenedAs::Kept => is_whole = true,
        }
        for entry in queue.entries_all()? {
            let is_stored = repositories.iter().all(|(name, _)| entry.stored_in.contains(name));
            match files.get(entry.relative.as_str()) {
                Some((_, length)) if *length == entry.stored_size => entries.push(entry),
                // Not what was recorded: looked at below.
                Some(_) => queue.remove(&entry)?,
                // The file went first, as it should. Or it was lost, and its record stays until the bytes have come again.
                None => match segment_in(&entry.relative, size).filter(|_| !is_stored) {
                    Some(segment) => lost.push(segment),
                    None if entry.relative.starts_with("gaps/") && !is_stored => lost_gaps.push(entry),
                    None => queue.remove(&entry)?,
                },
            }
        }
        Ok(queue)
    }) {
        Ok(queue) => Some(queue),
        // It is an index only: the spool's files are read instead, and it is tried again later (I4).
        Err(error) => {
            tracing::warn!(%error, hint = error.hint(), "going on without the queue's records");
            entries.clear();
            is_whole = false;
            None
        }
    };
    // A crash may have come between a segment's being set aside and its being fetched again. The live path asks first whether it is
    // archived since.
    let spooled: BTreeSet<SegmentName> =
        contents.sealed.iter().filter_map(|(name, _)| segment_in(&name.relative, size)).collect();
    lost.retain(|segment| !spooled.contains(segment));
    if !lost.is_empty() {
        let first = lost.iter().min().map(ToString::to_string).unwrap_or_default();
        tracing::warn!(
            segments = lost.len(),
            first,
            "files have vanished from the spool; what no repository has is fetched again"
        );
    }
    missing.extend(lost.iter().copied().chain(spool.quarantined(size)?).filter(|segment| !spooled.contains(segment)));
    let mut known: HashSet<String> = entries.iter().map(|entry| entry.relative.clone()).collect();
    let mut found = Vec::new();
    for entry in lost_gaps {
        // What is lost must be told: the name says all but the reason.
        let Some(name) = parse_relative(&entry.relative, size) else { continue };
        let Some(to) = name.gap_end() else { continue };
        let content = gap_of(system, name.timeline, Lsn::new(name.order), to, REASON_LOST).to_json();
        let name = spool.write_small(name, &content)?;
        known.insert(entry.relative);
        found.push(QueueEntry { stored_in: entry.stored_in, ..small_entry(&name, &content) });
        contents.sealed.push((name, content.len() as u64)); // usize fits
    }
    for (name, _) in contents.sealed.iter().filter(|(name, _)| !known.contains(&name.relative)) {
        match examine(spool, name, system) {
            Ok(entry) => found.push(entry),
            Err(SpoolError::Damaged { path, source }) => {
                tracing::error!(path = %path.display(), error = %source, "a spooled object is damaged: set aside and fetched again");
                spool.quarantine(&path)?;
                missing.extend(segment_in(&name.relative, size));
            }
            Err(error) => return Err(error.into()),
        }
    }
    // Records that are all there tell what is held. Without them a hole may be what every repository has, or what was lost.
    if !is_whole || !found.is_empty() || !lost.is_empty() {
        missing.extend(holes(&contents.sealed, &spooled, size));
    }
    if !found.is_empty() {
        tracing::info!(objects = found.len(), "the spool holds objects that the queue did not know");
        if let Some(queue) = &queue {
            queue.insert(&found).unwrap_or_else(|error| tracing::warn!(%error, "the queue's records are not kept"));
        }
        entries.extend(found);
    }
    let index = Index { disk: disk.clone(), folder: state.into(), queue, retry_at: None };
    let required = repositories.iter().filter(|(_, required)| *required).map(|(name, _)| name.clone()).collect();
    let names = repositories.into_iter().map(|(name, _)| name).collect();
    Ok(Arc::new(Backlog::new(index, names, required, entries)))
}

fn segment_in(relative: &str, size: SegmentSize) -> Option<SegmentName> {
    let file = relative.strip_prefix("wal/")?.split('/').nth(1)?;
    SegmentName::parse(file.split('.').next()?, size).ok()
}

/// Segments between sealed ones of their timeline that are neither there, not even in part, nor told as a gap.
fn holes(sealed: &[(SpooledName, u64)], whole: &BTreeSet<SegmentName>, size: SegmentSize) -> Vec<SegmentName> {
    let names = || sealed.iter().map(|(name, _)| name);
    let parts: BTreeSet<SegmentName> = names()
        .filter(|name| name.relative.starts_with("tail/"))
        .map(|name| SegmentName::holding(name.timeline, Lsn::new(name.order), size))
        .collect();
    let gaps: Vec<(TimelineId, Lsn, Lsn)> =
        names().filter_map(|name| Some((name.timeline, Lsn::new(name.order), name.gap_end()?))).collect();
    let mut holes = Vec::new();
    for (before, after) in whole.iter().zip(whole.iter().skip(1)) {
        if before.timeline() != after.timeline() {
            continue;
        }
        let mut segment = before.next();
        while segment < *after {
            let told = gaps.iter().find(|(timeline, from, to)| {
                *timeline == segment.timeline() && *from < segment.end() && segment.start() < *to
            });
            if let Some((timeline, _, to)) = told {
                segment = SegmentName::holding(*timeline, (*to).max(segment.end()), size);
                continue;
            }
            if holes.len() == HOLES_MAX {
                tracing::warn!(from = %segment, to = %after, "a hole in the spool is too large to be looked into: it is taken for archived");
                return holes;
            }
            if !parts.contains(&segment) {
                holes.push(segment);
            }
            segment = segment.next();
        }
    }
    holes
}

/// Spooled objects without an entry, such as those whose names could neither be flushed nor taken back. Whatever lies under a name counts
/// as held, so it must be shipped as well. Their names are durable on return.
pub(super) fn unrecorded(
    spool: &Spool,
    backlog: &Backlog,
    system: SystemIdentifier,
    size: SegmentSize,
) -> Result<Vec<QueueEntry>, SpoolError> {
    let mut entries = Vec::new();
    for (name, _) in spool.contents(size)?.sealed {
        if backlog.knows(&name) {
            continue;
        }
        match examine(spool, &name, system) {
            // Its record went with it just now: every repository has it.
            Err(SpoolError::Gone { .. }) => {}
            examined => {
                entries.push(examined?);
                spool.sync_names(&name)?;
                tracing::warn!(name = name.relative, "it lay in the spool without a record");
            }
        }
    }
    Ok(entries)
}

/// Reads a spooled object whole and makes its record.
pub(super) fn examine(spool: &Spool, name: &SpooledName, system: SystemIdentifier) -> Result<QueueEntry, SpoolError> {
    let path = spool.path_of(name);
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::NotFound => SpoolError::Gone { path: path.clone() },
        _ => SpoolError::Io { what: "read", path: path.clone(), source },
    };
    let small = name.relative.ends_with(".history") || name.relative.ends_with(".json");
    let crc32 = if small {
        crc32fast::hash(&std::fs::read(&path).map_err(failed)?)
    } else {
        let decoded = spool.decode(name, system, |_| Ok(()));
        decoded
            .map_err(|error| match error {
                SpoolError::Io { source, .. } => failed(source),
                other => other,
            })?
            .1
    };
    Ok(QueueEntry {
        timeline: name.timeline.get(),
        order: name.order,
        relative: name.relative.clone(),
        stored_size: std::fs::symlink_metadata(&path).map_err(failed)?.len(),
        crc32,
        stored_in: Vec::new(),
    })
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
