//! Room in a spool that is full: a repository that is not required must not stop the others. WAL that every required repository holds
//! goes then, oldest first; where another one lacks it, that is a recorded gap there (I3).

use super::ArchiveError;
use super::backlog::Backlog;
use super::gap::gap_of;
use super::live::small_entry;
use crate::queue::QueueEntry;
use crate::spool::{Spool, parse_relative};
use crate::wal::{Lsn, SegmentSize, SystemIdentifier, TimelineId};

/// WAL that goes, without a hole, and the repositories that hold it.
#[derive(Debug, PartialEq, Eq)]
struct Released {
    timeline: TimelineId,
    from: Lsn,
    to: Lsn,
    held_in: Vec<String>,
    entries: Vec<QueueEntry>,
}

/// Removes at least `bytes` of what the required repositories hold, if there is as much. False if there is nothing. Blocking.
pub(super) fn make_room(
    spool: &Spool,
    backlog: &Backlog,
    system: SystemIdentifier,
    size: SegmentSize,
    bytes: u64,
) -> Result<bool, ArchiveError> {
    let mut found = false;
    for released in spans(&backlog.releasable(bytes), size) {
        let Released { timeline, from, to, held_in, entries } = released;
        let lacking = backlog.lacking(&held_in).join(", ");
        tracing::warn!(
            event = "released",
            "the spool is full: the WAL from {from} to {to} on timeline {timeline}, which every required repository holds, is removed before repository {lacking} has it: a gap there"
        );
        // Recorded before the first file goes.
        let name = Spool::gap(timeline, from, to);
        if backlog.entry(&name.relative).is_none() {
            let reason = format!("the spool was full before repository {lacking} had it; others hold it");
            let content = gap_of(system, timeline, from, to, &reason).to_json();
            let name = spool.write_small(name, &content)?;
            backlog.insert(&[QueueEntry { stored_in: held_in, ..small_entry(&name, &content) }]);
        }
        for entry in entries {
            let path = spool.folder().join(&entry.relative);
            spool.disk().remove(&path).map_err(|source| ArchiveError::Remove { path, source })?;
            backlog.forget(&entry);
        }
        found = true;
    }
    Ok(found)
}

/// The entries, in order, by what follows each other and is held by the same repositories.
fn spans(entries: &[QueueEntry], size: SegmentSize) -> Vec<Released> {
    let mut spans: Vec<Released> = Vec::new();
    for entry in entries {
        let Some(name) = parse_relative(&entry.relative, size) else { continue };
        let from = Lsn::new(name.order);
        let length = super::ship::piece_end(&entry.relative).map_or(size.get(), u64::from);
        let to = Lsn::new(from.get() + length);
        let mut held_in = entry.stored_in.clone();
        held_in.sort();
        match spans.last_mut() {
            Some(last) if last.timeline == name.timeline && last.to == from && last.held_in == held_in => {
                last.to = to;
                last.entries.push(entry.clone());
            }
            _ => {
                spans.push(Released { timeline: name.timeline, from, to, held_in, entries: vec![entry.clone()] });
            }
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::backlog::Index;
    use super::*;
    use crate::disk::Disk;
    use crate::seal::Compression;
    use crate::wal::SegmentName;

    const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    /// A spool with ten segments of 100 bytes; `a` and `b` are required and hold the first eight, `c` holds the fourth.
    fn full_spool(root: &std::path::Path) -> (Spool, Backlog) {
        let disk = Disk::default();
        let spool = Spool::open(disk.clone(), root, "main", SYSTEM).unwrap();
        let entries: Vec<QueueEntry> = (1..=10)
            .map(|number| {
                let segment = SegmentName::holding(TimelineId::FIRST, Lsn::new(number << 20), size());
                let name = spool.write_small(Spool::segment(segment, Compression::Lz4), &[0; 100]).unwrap();
                let held_in: &[&str] = match number {
                    4 => &["a", "b", "c"],
                    1..=8 => &["b", "a"],
                    _ => &["a"],
                };
                let stored_in = held_in.iter().map(|name| (*name).to_owned()).collect();
                QueueEntry { stored_in, ..small_entry(&name, &[0; 100]) }
            })
            .collect();
        let later = Instant::now() + Duration::from_secs(3600);
        let index = Index { disk, folder: root.join("state"), queue: None, retry_at: Some(later) };
        let names = ["a", "b", "c"].map(ToOwned::to_owned);
        let backlog = Backlog::new(index, names.to_vec(), names[..2].to_vec(), entries);
        backlog.set_sealed_end(1, Lsn::new(11 << 20));
        (spool, backlog)
    }

    #[test]
    fn what_the_required_repositories_hold_goes_and_is_a_gap_in_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, backlog) = full_spool(folder.path());
        assert!(make_room(&spool, &backlog, SYSTEM, size(), 450).unwrap());
        let left: Vec<String> = backlog.pending("c", &[], 100).into_iter().map(|entry| entry.relative).collect();
        let at = |number: u64| Lsn::new(number << 20);
        let gap = |from, to| Spool::gap(TimelineId::FIRST, at(from), at(to)).relative;
        let whole = |number| {
            Spool::segment(SegmentName::holding(TimelineId::FIRST, at(number), size()), Compression::Lz4).relative
        };
        let expected = [gap(1, 4), gap(5, 7), whole(7), whole(8), whole(9), whole(10)];
        assert_eq!(left, expected);
        assert_eq!(backlog.first_lacking("c"), Some((1, at(1))), "its position waits for the gap to be recorded there");
        for number in [1, 2, 3, 5, 6] {
            assert!(!spool.folder().join(whole(number)).exists());
        }
        assert!(expected.iter().all(|relative| spool.folder().join(relative).exists()));
        // Those that hold the WAL are told of no gap.
        assert_eq!(backlog.pending("a", &[], 100).len(), 0);
        assert_eq!(backlog.first_lacking("b"), Some((1, at(9))));
    }

    #[test]
    fn what_a_required_repository_lacks_stays_and_so_does_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let (spool, backlog) = full_spool(folder.path());
        assert!(make_room(&spool, &backlog, SYSTEM, size(), u64::MAX).unwrap());
        assert!(!make_room(&spool, &backlog, SYSTEM, size(), u64::MAX).unwrap(), "nothing more may go");
        assert_eq!(backlog.pending("b", &[], 100).len(), 2);
        for entry in backlog.pending("b", &[], 100) {
            backlog.confirm(&entry, "b");
        }
        assert!(make_room(&spool, &backlog, SYSTEM, size(), u64::MAX).unwrap());
        let newest = backlog.pending("c", &[], 100).pop().expect("it is there");
        assert!(newest.relative.starts_with("wal/") && newest.order == 10 << 20, "for the overlap (I7)");
    }
}
