use std::path::PathBuf;

use super::*;
use crate::archive::held::name_finished;
use crate::archive::held::tests::{SYSTEM, finish, segment, size};
use crate::seal::Compression;

struct Bench {
    folder: tempfile::TempDir,
    spool: Spool,
}

impl Bench {
    /// With segments of these numbers sealed, and no records yet.
    fn new(numbers: impl IntoIterator<Item = u64>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(Disk::default(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
        numbers.into_iter().for_each(|number| drop(finish(&spool, segment(number))));
        name_finished(&spool, SYSTEM, size()).unwrap();
        Self { folder, spool }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn open(&self) -> (Arc<Backlog>, Missing) {
        let missing = Missing::default();
        let names = vec![("a".to_owned(), true), ("b".to_owned(), true)];
        let opened = open_backlog(&Disk::default(), &self.state(), &self.spool, SYSTEM, size(), names, &missing);
        (opened.unwrap(), missing)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.spool.path_of(&Spool::segment(segment(number), Compression::Lz4))
    }
}

fn missing(missing: &Missing) -> Vec<u64> {
    missing.subscribe().borrow().iter().map(|segment| segment.start().get() >> 20).collect()
}

/// The files of two segments that no repository had were removed while the agent was down. Their records were dropped as those of stored
/// segments, and the archived position went on over them: a hidden gap (I3).
#[test]
fn what_vanished_from_the_spool_before_it_was_stored_is_missing() {
    let bench = Bench::new(1..=6);
    let (backlog, none) = bench.open();
    assert_eq!((backlog.depth().0, missing(&none)), (6, Vec::new()));
    let stored = |number| backlog.entry(&Spool::segment(segment(number), Compression::Lz4).relative).unwrap();
    // One of the two repositories has 3, both have 4.
    for (number, repository) in [(3, "a"), (4, "a"), (4, "b")] {
        backlog.confirm(&stored(number), repository);
    }
    drop(backlog);
    for number in [1, 3, 4, 6] {
        std::fs::remove_file(bench.path(number)).unwrap();
    }
    for _ in 0..2 {
        let (backlog, found) = bench.open();
        // 4 is only asked for, as it lies in a hole.
        assert_eq!((backlog.depth().0, missing(&found)), (2, vec![1, 3, 4, 6]), "also at a second start");
    }
}

/// Without records a hole may be what was stored and removed, or what was lost: the repositories are asked.
#[test]
fn a_hole_without_records_is_missing_unless_it_is_told() {
    let bench = Bench::new([1, 2, 5, 6, 9]);
    let (from, to) = (segment(7).start(), segment(8).end());
    let gap = gap_of(SYSTEM, segment(7).timeline(), from, to, "a test");
    bench.spool.write_small(Spool::gap(gap.timeline, from, to), &gap.to_json()).unwrap();
    let (_, found) = bench.open();
    assert_eq!(missing(&found), [3, 4]);
    // With records that are all there the hole is of segments that every repository has.
    let (_, found) = bench.open();
    assert_eq!(missing(&found), Vec::<u64>::new());
}

/// A gap is told although its file was removed before any repository had it (I3).
#[test]
fn a_gap_whose_file_vanished_stays_a_gap() {
    let bench = Bench::new([1, 4]);
    let (from, to) = (segment(2).start(), segment(3).end());
    let gap = gap_of(SYSTEM, segment(2).timeline(), from, to, "a test");
    let name = bench.spool.write_small(Spool::gap(gap.timeline, from, to), &gap.to_json()).unwrap();
    drop(bench.open());
    std::fs::remove_file(bench.spool.path_of(&name)).unwrap();
    let (backlog, found) = bench.open();
    assert!(backlog.knows(&name) && bench.spool.path_of(&name).exists());
    assert_eq!(missing(&found), Vec::<u64>::new());
}

#[test]
fn a_hole_that_is_told_in_part_or_kept_in_part_is_not_missing() {
    let bench = Bench::new([1, 4, 1 << 30]);
    let timeline = segment(2).timeline();
    let names = |more: &[SpooledName]| {
        let mut sealed = bench.spool.contents(size()).unwrap().sealed;
        sealed.extend(more.iter().map(|name| (name.clone(), 1)));
        sealed
    };
    let whole: BTreeSet<SegmentName> = [1, 4].map(segment).into();
    let part = Spool::timeline_end(segment(2), 1000, Compression::Lz4);
    let rest = Spool::gap(timeline, Lsn::new(segment(2).start().get() + 1000), segment(3).end());
    assert_eq!(holes(&names(&[part.clone(), rest]), &whole, size()), Vec::new());
    assert_eq!(holes(&names(&[part]), &whole, size()), [segment(3)]);
    let far: BTreeSet<SegmentName> = [1, 1 << 30].map(segment).into();
    assert_eq!(holes(&names(&[]), &far, size()).len(), HOLES_MAX, "bounded");
}
