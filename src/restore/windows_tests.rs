use super::*;
use crate::repository::test_support::{MIB, Sketch, time, timeline};
use crate::wal::Lsn;

fn covered(catalog: &Catalog, id: u32) -> Vec<Option<PgTime>> {
    let branch = catalog.history(timeline(id)).unwrap();
    catalog.stretches(&branch).iter().map(|stretch| covered_until(catalog, &branch, stretch)).collect()
}

#[test]
fn the_coverage_counts_only_with_its_wal() {
    const UNTIL: &str = "2026-11-20T06:00:00Z";
    let known = Some(time(UNTIL));
    let sketch = || Sketch::new().segments(1, 1..4);
    assert_eq!(covered(&sketch().done(), 1), vec![None]);
    assert_eq!(covered(&sketch().coverage(1, UNTIL, 4 * MIB).done(), 1), vec![known]);
    // The WAL through the position that it names is not there (any more).
    assert_eq!(covered(&sketch().coverage(1, UNTIL, 4 * MIB + 1).done(), 1), vec![None]);
    let tail = sketch().piece(1, 4, 0, 0x100);
    assert_eq!(covered(&tail.coverage(1, UNTIL, 4 * MIB + 0x100).done(), 1), vec![known]);
    // Behind a gap it says nothing about what lies before.
    let gap = sketch().segments(1, 5..7).coverage(1, UNTIL, 6 * MIB);
    assert_eq!(covered(&gap.done(), 1), vec![None, known]);
}

#[test]
fn wal_that_is_told_of_and_not_there_is_noticed() {
    const UNTIL: &str = "2026-11-20T06:00:00Z";
    let told = |archived: u64, id: u32| {
        let catalog = Sketch::new().segments(1, 1..4).coverage(id, UNTIL, archived).done();
        let branch = catalog.history(timeline(1)).unwrap();
        catalog.told_beyond(&branch, catalog.stretches(&branch).last().unwrap().end())
    };
    assert_eq!(told(4 * MIB, 1), None);
    assert_eq!(told(3 * MIB, 1), None, "the coverage is older than the WAL");
    assert_eq!(told(4 * MIB + 8, 1), Some(Lsn::new(4 * MIB + 8)));
    assert_eq!(told(9 * MIB, 2), None, "it is another branch's");
}

#[test]
fn the_coverage_of_another_branch_does_not_count() {
    const UNTIL: &str = "2026-11-20T06:00:00Z";
    let history = format!("1\t0/{:X}\tx\n", 3 * MIB);
    let sketch = || Sketch::new().segments(1, 1..6).segments(2, 3..5).history(2, &history);
    // Timeline 1 beyond the switch is not on timeline 2's branch; up to it, it is.
    assert_eq!(covered(&sketch().coverage(1, UNTIL, 4 * MIB).done(), 2), vec![None]);
    assert_eq!(covered(&sketch().coverage(1, UNTIL, 3 * MIB).done(), 2), vec![Some(time(UNTIL))]);
    assert_eq!(covered(&sketch().coverage(2, UNTIL, 4 * MIB).done(), 1), vec![None]);
    assert_eq!(covered(&sketch().coverage(2, UNTIL, 4 * MIB).done(), 2), vec![Some(time(UNTIL))]);
}
