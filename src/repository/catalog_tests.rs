use super::super::objects::tests::{backup, time};
use super::*;
use crate::repository::{BackupJson, FORMAT, WalObjectKind};
use crate::wal::{SegmentName, SystemIdentifier};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

pub(crate) fn timeline(id: u32) -> TimelineId {
    TimelineId::new(id).unwrap()
}

/// A catalog made by hand. Positions are in MiB, which is the segment size.
pub(crate) struct Sketch(CatalogBuilder, Keys);

impl Sketch {
    pub(crate) fn new() -> Self {
        let keys = Keys::new("main", SystemIdentifier::new(7_000_000_000_000_000_001)).unwrap();
        Self(CatalogBuilder::new(keys.clone(), Some(size())), keys)
    }

    pub(crate) fn segments(mut self, id: u32, numbers: std::ops::Range<u64>) -> Self {
        for number in numbers {
            let name = SegmentName::holding(timeline(id), Lsn::new(number * MIB), size());
            self.object(self.1.segment(name, Compression::Lz4));
        }
        self
    }

    pub(crate) fn piece(mut self, id: u32, number: u64, start: u32, end: u32) -> Self {
        let name = SegmentName::holding(timeline(id), Lsn::new(number * MIB), size());
        self.object(self.1.piece(name, start, end, Compression::Lz4));
        self
    }

    pub(crate) fn object(&mut self, key: String) {
        self.0.listed(&ObjectInfo { key, size: 5000, crc32: None, version: None });
    }

    pub(crate) fn history(mut self, id: u32, text: &str) -> Self {
        self.0.history(TimelineHistory::parse(timeline(id), text.as_bytes()).unwrap());
        self
    }

    pub(crate) fn backup(mut self, backup: BackupJson) -> Self {
        self.0.backup(backup);
        self
    }

    pub(crate) fn gap(mut self, id: u32, from: u64, to: u64) -> Self {
        self.0.gap(Gap {
            format: FORMAT,
            system_identifier: SystemIdentifier::new(7_000_000_000_000_000_001),
            timeline: timeline(id),
            from_lsn: Lsn::new(from),
            to_lsn: Lsn::new(to),
            since: time("2026-11-20T00:00:00Z"),
            reason: "lost".into(),
        });
        self
    }

    pub(crate) fn coverage(mut self, id: u32, until: &str, archived: u64) -> Self {
        self.0.coverage(Some(Coverage {
            format: FORMAT,
            system_identifier: SystemIdentifier::new(7_000_000_000_000_000_001),
            timeline: timeline(id),
            complete_until: time(until),
            archived_lsn: Lsn::new(archived),
            updated: time(until),
        }));
        self
    }

    pub(crate) fn done(self) -> Catalog {
        self.0.finish()
    }
}

fn spans(catalog: &Catalog, id: u32) -> Vec<(u64, u64)> {
    let branch = catalog.history(timeline(id)).unwrap();
    catalog.stretches(&branch).iter().map(|s| (s.start().get(), s.end().get())).collect()
}

fn names(stretch: &Stretch) -> Vec<String> {
    (0..stretch.object_count())
        .map(|index| stretch.object(index).unwrap())
        .map(|object| match object.kind {
            WalObjectKind::Segment => format!("{}", object.segment),
            WalObjectKind::Piece { start, end } => format!("{}:{start:X}-{end:X}", object.segment),
        })
        .collect()
}

#[test]
fn a_million_segments_are_one_run() {
    let catalog = Sketch::new().segments(1, 0..1_000_000).done();
    let runs = &catalog.timelines[&timeline(1)].runs;
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].start, runs[0].end), (Lsn::ZERO, Lsn::new(1_000_000 * MIB)));
    assert_eq!(catalog.stretches(&catalog.history(timeline(1)).unwrap())[0].object_count(), 1_000_000);
}

#[test]
fn a_missing_segment_splits_the_wal_and_the_windows() {
    let catalog = Sketch::new()
        .segments(1, 1..5)
        .segments(1, 6..9)
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .backup(backup("20261120T030000Z-full", 2 * MIB + 40, 2 * MIB + 400))
        .backup(backup("20261120T040000Z-full", 6 * MIB + 40, 6 * MIB + 400))
        .done();
    assert_eq!(spans(&catalog, 1), vec![(MIB, 5 * MIB), (6 * MIB, 9 * MIB)]);
    let windows = catalog.windows();
    assert_eq!(windows.len(), 2);
    assert_eq!((windows[0].from_lsn, windows[0].to_lsn), (Lsn::new(MIB + 400), Lsn::new(5 * MIB)));
    assert_eq!(windows[0].from_time, Some(time("2026-11-20T02:00:10Z")));
    assert_eq!((windows[1].from_lsn, windows[1].to_lsn), (Lsn::new(6 * MIB + 400), Lsn::new(9 * MIB)));
}

#[test]
fn wal_that_no_backup_reaches_is_no_window() {
    let before = backup("20261120T020000Z-full", MIB / 2, MIB + 400);
    let catalog = Sketch::new().segments(1, 1..5).backup(before).done();
    assert!(catalog.windows().is_empty());
}

#[test]
fn the_tail_continues_the_segments() {
    let catalog = Sketch::new().segments(1, 1..3).piece(1, 3, 0, 0x2000).piece(1, 3, 0x2000, 0x5000).done();
    assert_eq!(spans(&catalog, 1), vec![(MIB, 3 * MIB + 0x5000)]);
    let stretch = &catalog.stretches(&catalog.history(timeline(1)).unwrap())[0];
    assert_eq!(stretch.object_count(), 4);
    assert_eq!(stretch.index_of(Lsn::new(3 * MIB + 0x2000)), Some(3));
    assert_eq!(stretch.index_of(Lsn::new(3 * MIB + 0x1FFF)), Some(2));
    assert_eq!(stretch.index_of(Lsn::new(3 * MIB + 0x5000)), None);
    assert_eq!(stretch.objects(Lsn::new(2 * MIB + 5), Lsn::new(3 * MIB + 1)).count(), 2);
    // A piece behind a hole is nothing.
    let catalog = Sketch::new().segments(1, 1..3).piece(1, 3, 0x2000, 0x5000).done();
    assert_eq!(spans(&catalog, 1), vec![(MIB, 3 * MIB)]);
    // The complete segment replaces its pieces.
    let catalog = Sketch::new().segments(1, 1..4).piece(1, 3, 0, 0x5000).done();
    assert!(catalog.timelines[&timeline(1)].pieces.is_empty());
}

#[test]
fn a_branch_leaves_each_timeline_at_its_switch() {
    // Timeline 1 went on after timeline 2 left it in the middle of segment 3.
    let switch = 3 * MIB + 0x8000;
    let sketch =
        || Sketch::new().segments(1, 1..6).history(2, &format!("1\t0/{switch:X}\tno recovery target specified\n"));
    // Before anything of timeline 2 is held, its branch ends at the switch.
    let catalog = sketch().done();
    assert_eq!(spans(&catalog, 2), vec![(MIB, switch)]);
    assert_eq!(spans(&catalog, 1), vec![(MIB, 6 * MIB)]);
    // Its first segment begins with a copy of timeline 1's bytes, and counts as soon as it reaches past the switch.
    let catalog = sketch().piece(2, 3, 0, 0x9000).done();
    let stretches = catalog.stretches(&catalog.history(timeline(2)).unwrap());
    assert_eq!(stretches.len(), 1);
    let names_on_2 = names(&stretches[0]);
    assert_eq!(
        names_on_2,
        vec!["000000010000000000000001", "000000010000000000000002", "000000020000000000000003:0-9000"]
    );
    // A piece that does not reach the switch says nothing of its own.
    let catalog = sketch().piece(2, 3, 0, 0x7000).done();
    assert_eq!(spans(&catalog, 2), vec![(MIB, switch)]);
    let catalog = sketch().segments(2, 3..5).done();
    assert_eq!(spans(&catalog, 2), vec![(MIB, 5 * MIB)]);
}

#[test]
fn several_switches_in_one_segment_keep_the_newest() {
    let history = format!("1\t0/{:X}\tx\n2\t0/{:X}\tx\n", 3 * MIB + 0x1000, 3 * MIB + 0x2000);
    let catalog = Sketch::new()
        .segments(1, 1..3)
        .piece(1, 3, 0, 0x1000)
        .piece(2, 3, 0, 0x2000)
        .segments(3, 3..4)
        .history(3, &history)
        .history(2, &format!("1\t0/{:X}\tx\n", 3 * MIB + 0x1000))
        .done();
    let stretches = catalog.stretches(&catalog.history(timeline(3)).unwrap());
    assert_eq!(stretches.len(), 1);
    assert_eq!(names(&stretches[0]).last().unwrap(), "000000030000000000000003");
    assert_eq!(stretches[0].end(), Lsn::new(4 * MIB));
    let stretches = catalog.stretches(&catalog.history(timeline(2)).unwrap());
    assert_eq!(stretches[0].end(), Lsn::new(3 * MIB + 0x2000));
    assert_eq!(names(&stretches[0]).last().unwrap(), "000000020000000000000003:0-2000");
}

#[test]
fn a_backup_after_the_switch_is_not_on_the_new_branch() {
    let switch = 3 * MIB;
    let catalog = Sketch::new()
        .segments(1, 1..6)
        .segments(2, 3..6)
        .history(2, &format!("1\t0/{switch:X}\tx\n"))
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .backup(backup("20261120T030000Z-full", 4 * MIB + 40, 4 * MIB + 400))
        .done();
    let two = catalog.history(timeline(2)).unwrap();
    let on_two: Vec<_> = catalog.backups_on(&two).map(|b| b.id.to_string()).collect();
    assert_eq!(on_two, vec!["20261120T020000Z-full"]);
    let one = catalog.history(timeline(1)).unwrap();
    assert_eq!(catalog.backups_on(&one).count(), 2);
}

#[test]
fn a_timeline_without_its_history_has_no_branch() {
    let catalog = Sketch::new().segments(2, 3..6).done();
    assert!(catalog.history(timeline(2)).is_none());
    assert!(catalog.windows().is_empty());
}

#[test]
fn a_gap_whose_wal_was_found_is_closed() {
    let catalog = Sketch::new()
        .segments(1, 1..3)
        .segments(1, 4..6)
        .gap(1, 2 * MIB, 4 * MIB)
        .gap(1, 5 * MIB, 6 * MIB)
        .gap(2, MIB, 2 * MIB)
        .done();
    let open: Vec<_> =
        catalog.open_gaps().iter().map(|g| (g.timeline.get(), g.from_lsn.get(), g.to_lsn.get())).collect();
    assert_eq!(open, vec![(1, 3 * MIB, 4 * MIB), (2, MIB, 2 * MIB)]);
}

/// A backup on another branch, or one from before, does not end a gap's alarm.
#[test]
fn a_gap_is_past_once_the_branch_has_a_backup_behind_it() {
    let sketch = || Sketch::new().segments(1, 1..9).history(2, "1\t0/300000\tx\n").segments(2, 3..9);
    let gap = (Lsn::new(4 * MIB), Lsn::new(5 * MIB));
    let is_past = |catalog: &Catalog, branch: u32, on: u32| {
        catalog.is_past(&catalog.history(timeline(branch)).unwrap(), timeline(on), gap)
    };
    let before = sketch().backup(backup("20261120T020000Z-full", 4 * MIB + 40, 4 * MIB + 400)).done();
    assert!(!is_past(&before, 1, 1) && !is_past(&before, 2, 2));
    assert!(is_past(&before, 2, 1), "the second timeline left the first one before the gap");
    let behind = sketch().backup(backup("20261120T030000Z-full", 5 * MIB, 5 * MIB + 400)).done();
    assert!(is_past(&behind, 1, 1));
    assert!(!is_past(&behind, 2, 2), "the backup is on the first timeline");
}

#[test]
fn a_segment_under_both_suffixes_counts_once() {
    let mut sketch = Sketch::new().segments(1, 1..4);
    let name = SegmentName::holding(timeline(1), Lsn::new(2 * MIB), size());
    let key = sketch.1.segment(name, Compression::Zstd);
    sketch.object(key);
    let next = name.next().next();
    let key = sketch.1.segment(next, Compression::Zstd);
    sketch.object(key);
    let catalog = sketch.done();
    let runs = &catalog.timelines[&timeline(1)].runs;
    assert_eq!(runs.len(), 2);
    assert_eq!(
        (runs[0].end, runs[1].start, runs[1].compression),
        (Lsn::new(4 * MIB), Lsn::new(4 * MIB), Compression::Zstd)
    );
}

#[test]
fn foreign_and_truncated_objects_are_named_and_left_out() {
    let mut sketch = Sketch::new();
    sketch.object("main/7000000000000000001/wal/notes.txt".into());
    sketch.0.listed(&ObjectInfo {
        key: "main/7000000000000000001/wal/00000001/000000010000000000000001.lz4".into(),
        size: 17,
        crc32: None,
        version: None,
    });
    let catalog = sketch.done();
    assert_eq!(catalog.complaint_count, 2);
    assert!(catalog.timelines.is_empty());
}
