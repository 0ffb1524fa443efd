//! The queue's records and the spool's files: made to agree at the start, with a record for each file, and what is gone asked for again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::backlog::{Backlog, Index};
use super::{ArchiveError, Missing};
use crate::disk::Disk;
use crate::queue::{OpenedAs, Queue, QueueEntry, QueueError};
use crate::spool::{Spool, SpoolError, SpooledName};
use crate::wal::{SegmentName, SegmentSize, SystemIdentifier};

/// Opens the queue and makes it agree with the spool's names and sizes. Contents are read only of files that it does not know.
pub(super) fn open_backlog(
    disk: &Disk,
    state: &std::path::Path,
    spool: &Spool,
    system: SystemIdentifier,
    size: SegmentSize,
    repositories: Vec<String>,
    missing: &Missing,
) -> Result<Arc<Backlog>, ArchiveError> {
    let contents = spool.contents(size)?;
    let files: HashMap<&str, (&SpooledName, u64)> =
        contents.sealed.iter().map(|(name, length)| (name.relative.as_str(), (name, *length))).collect();
    let mut entries = Vec::new();
    let opened = state.parent().map_or(Ok(()), |parent| disk.create_folders(parent));
    let opened = opened.map_err(|e| QueueError::Open { path: state.into(), why: e.to_string() });
    let queue = match opened.and_then(|()| Queue::open(disk, state)).and_then(|(queue, opened)| {
        if let OpenedAs::Fresh { why } = &opened {
            tracing::info!("the queue is built from the spool: {why}");
        }
        for entry in queue.entries_all()? {
            match files.get(entry.relative.as_str()) {
                Some((_, length)) if *length == entry.stored_size => entries.push(entry),
                // The file went first, or is not what was recorded: then it is looked at below.
                _ => queue.remove(&entry)?,
            }
        }
        Ok(queue)
    }) {
        Ok(queue) => Some(queue),
        // It is an index only: the spool's files are read instead, and it is tried again later (I4).
        Err(error) => {
            tracing::warn!(%error, hint = error.hint(), "going on without the queue's records");
            entries.clear();
            None
        }
    };
    // A crash may have come between a segment's being set aside and its being fetched again. The live path asks first whether it is
    // archived since.
    let spooled: HashSet<SegmentName> = contents.sealed.iter().filter_map(|(name, _)| segment_in(name, size)).collect();
    missing.extend(spool.quarantined(size)?.into_iter().filter(|segment| !spooled.contains(segment)));
    let known: HashSet<String> = entries.iter().map(|entry| entry.relative.clone()).collect();
    let mut found = Vec::new();
    for (name, length) in contents.sealed.iter().filter(|(name, _)| !known.contains(&name.relative)) {
        match examine(spool, name, *length, system) {
            Ok(entry) => found.push(entry),
            Err(SpoolError::Damaged { path, source }) => {
                tracing::error!(path = %path.display(), error = %source, "a spooled object is damaged: set aside and fetched again");
                spool.quarantine(&path)?;
                missing.extend(segment_in(name, size));
            }
            Err(error) => return Err(error.into()),
        }
    }
    if !found.is_empty() {
        tracing::info!(objects = found.len(), "the spool holds objects that the queue did not know");
        if let Some(queue) = &queue {
            queue.insert(&found).unwrap_or_else(|error| tracing::warn!(%error, "the queue's records are not kept"));
        }
        entries.extend(found);
    }
    let index = Index { disk: disk.clone(), folder: state.into(), queue, retry_at: None };
    Ok(Arc::new(Backlog::new(index, repositories, entries)))
}

fn segment_in(name: &SpooledName, size: SegmentSize) -> Option<SegmentName> {
    let file = name.relative.strip_prefix("wal/")?.split('/').nth(1)?;
    SegmentName::parse(file.split('.').next()?, size).ok()
}

/// Reads a spooled object whole and makes its record.
pub(super) fn examine(
    spool: &Spool,
    name: &SpooledName,
    length: u64,
    system: SystemIdentifier,
) -> Result<QueueEntry, SpoolError> {
    let small = name.relative.ends_with(".history") || name.relative.ends_with(".json");
    let crc32 = if small {
        let path = spool.path_of(name);
        let content = std::fs::read(&path).map_err(|source| SpoolError::Io { what: "read", path, source })?;
        crc32fast::hash(&content)
    } else {
        spool.decode(name, system, |_| Ok(()))?.1
    };
    Ok(QueueEntry {
        timeline: name.timeline.get(),
        order: name.order,
        relative: name.relative.clone(),
        stored_size: length,
        crc32,
        stored_in: Vec::new(),
    })
}
