use super::*;
use crate::repository::test_support::{MIB, Sketch, backup, time, timeline};
use crate::restore::target::TargetAction;
use crate::wal::CommitMark;

fn request(target: Target) -> Request {
    Request { target, exclusive: false, timeline: None, backup: None, action: TargetAction::Promote }
}

fn mark(text: &str, lsn: u64) -> CommitMark {
    CommitMark { time: time(text), xid: 700, lsn: Lsn::new(lsn) }
}

fn before(lsn: u64) -> Cut {
    Cut { stop: Stop::Before(Lsn::new(lsn)), last_kept: None, first_left_out: None }
}

fn through(record: u64, end: u64) -> Cut {
    Cut { stop: Stop::Through { record: Lsn::new(record), end: Lsn::new(end) }, last_kept: None, first_left_out: None }
}

/// Backups that stop at 1 MiB + 400 and 2 MiB + 400; WAL from 1 to 5 MiB.
fn two_backups() -> Catalog {
    Sketch::new()
        .segments(1, 1..5)
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .backup(backup("20261120T030000Z-full", 2 * MIB + 40, 2 * MIB + 400))
        .done()
}

fn chosen(catalog: &Catalog, cut: &Cut, time: Option<TimeKnowledge>) -> Result<(String, RecoveryStop), String> {
    let branch = catalog.history(timeline(1)).unwrap();
    let stretches = catalog.stretches(&branch);
    let backups = backups_in(catalog, &branch, &stretches[0], None);
    choose(&backups, cut, time).map(|choice| (choice.backup.id.to_string(), choice.stop)).map_err(|why| why.0)
}

#[test]
fn the_newest_backup_that_stopped_at_or_before_the_cut_serves() {
    let catalog = two_backups();
    let first = "20261120T020000Z-full".to_string();
    let second = "20261120T030000Z-full".to_string();
    for (cut, expected) in [
        (2 * MIB + 400, Ok(&second)),
        (2 * MIB + 399, Ok(&first)),
        (4 * MIB, Ok(&second)),
        (MIB + 400, Ok(&first)),
        (MIB + 399, Err(())),
    ] {
        let found = chosen(&catalog, &before(cut), None);
        match expected {
            Ok(id) => {
                let stop = RecoveryStop::Lsn { lsn: Lsn::new(cut), inclusive: false };
                assert_eq!(found, Ok((id.clone(), stop)), "{cut}");
            }
            Err(()) => assert!(found.unwrap_err().contains("becomes consistent"), "{cut}"),
        }
    }
}

#[test]
fn a_record_to_keep_is_the_target_also_when_it_ends_the_backup() {
    let catalog = two_backups();
    let (id, stop) = chosen(&catalog, &through(3 * MIB, 3 * MIB + 50), None).unwrap();
    assert_eq!(id, "20261120T030000Z-full");
    assert_eq!(stop, RecoveryStop::Lsn { lsn: Lsn::new(3 * MIB), inclusive: true });
    // The last record held is the one that ends the backup: no record lies after the stop LSN.
    let (id, stop) = chosen(&catalog, &through(2 * MIB + 360, 2 * MIB + 400), None).unwrap();
    assert_eq!(id, "20261120T030000Z-full");
    assert_eq!(stop, RecoveryStop::Lsn { lsn: Lsn::new(2 * MIB + 360), inclusive: true });
    // The last record held is the one that the backup begins with.
    let (id, stop) = chosen(&catalog, &through(2 * MIB + 40, 2 * MIB + 400), None).unwrap();
    assert_eq!((id.as_str(), stop), ("20261120T030000Z-full", RecoveryStop::NothingToReplay));
    assert!(check_action(stop, TargetAction::Promote).is_ok());
    assert!(check_action(stop, TargetAction::Pause).is_err_and(|why| why.0.contains("cannot pause")));
    // A record before it: the older backup.
    let (id, stop) = chosen(&catalog, &through(2 * MIB + 300, 2 * MIB + 340), None).unwrap();
    assert_eq!(id, "20261120T020000Z-full");
    assert_eq!(stop, RecoveryStop::Lsn { lsn: Lsn::new(2 * MIB + 300), inclusive: true });
}

fn knowledge(at: &str, complete_until: Option<&str>) -> Option<TimeKnowledge> {
    Some(TimeKnowledge {
        time: time(at),
        exclusive: false,
        complete_until: complete_until.map(time),
        max_time_before: None,
        witness: false,
    })
}

#[test]
fn a_time_after_the_last_commit_needs_to_be_known_complete() {
    let catalog = two_backups();
    let mut end = through(4 * MIB, 4 * MIB + 50);
    end.last_kept = Some(mark("2026-11-20T05:00:00Z", 3 * MIB));
    for (at, complete_until, reachable) in [
        ("2026-11-20T05:00:00Z", None, true),
        ("2026-11-20T05:00:01Z", None, false),
        ("2026-11-20T06:00:00Z", Some("2026-11-20T06:00:00Z"), true),
        ("2026-11-20T06:00:00.000001Z", Some("2026-11-20T06:00:00Z"), false),
        // What the WAL shows counts, also when the coverage is older.
        ("2026-11-20T05:00:00Z", Some("2026-11-20T04:00:00Z"), true),
    ] {
        let found = chosen(&catalog, &end, knowledge(at, complete_until));
        assert_eq!(found.is_ok(), reachable, "{at} {complete_until:?}: {found:?}");
    }
    // With a later commit held, it is known where to stop.
    assert!(chosen(&catalog, &before(4 * MIB), knowledge("2026-11-20T09:00:00Z", None)).is_ok());
}

#[test]
fn a_quiet_time_before_the_backup_began_needs_a_witness() {
    let catalog = two_backups();
    // The first commit after the target lies behind the second backup; none is held before the target.
    let cut = before(4 * MIB);
    let refused = chosen(&catalog, &cut, knowledge("2026-11-20T01:30:00Z", None)).unwrap_err();
    assert!(refused.contains("before backup 20261120T020000Z-full began"), "{refused}");
    // From the first backup to the cut all is held, and nothing was committed.
    let second = "20261120T030000Z-full";
    assert_eq!(chosen(&catalog, &cut, knowledge("2026-11-20T02:30:00Z", None)).unwrap().0, second);
    assert!(chosen(&catalog, &cut, knowledge("2026-11-20T03:00:00Z", None)).is_ok());
    // A commit held from before the target shows that none was missed.
    let mut witnessed = cut;
    witnessed.last_kept = Some(mark("2026-11-20T01:00:00Z", MIB + 50));
    assert!(chosen(&catalog, &witnessed, knowledge("2026-11-20T01:30:00Z", None)).is_ok());
    let held_before = TimeKnowledge { witness: true, ..knowledge("2026-11-20T01:30:00Z", None).unwrap() };
    assert!(chosen(&catalog, &cut, Some(held_before)).is_ok());
}

/// WAL was lost, and the highest commit time of what lies before the gap goes on in the headers behind it. It was taken for a commit that
/// is held, so a time in the gap was restored from the backup behind it, with all that was committed in the gap since (I3, I5, E4).
#[test]
fn a_time_in_a_gap_is_not_reached_by_the_backup_behind_it() {
    let catalog = Sketch::new()
        .segments(1, 1..3)
        .segments(1, 4..8)
        .backup(backup("20261120T090000Z-full", MIB + 40, MIB + 400))
        .backup(backup("20261120T110000Z-full", 5 * MIB + 40, 5 * MIB + 400))
        .done();
    let branch = catalog.history(timeline(1)).unwrap();
    let stretches = catalog.stretches(&branch);
    let at = |text: &str| TimeKnowledge {
        max_time_before: Some(time("2026-11-20T10:00:00Z")),
        ..knowledge(text, Some("2026-11-20T11:30:00Z")).unwrap()
    };
    let behind = backups_in(&catalog, &branch, &stretches[1], None);
    // The next commit behind the backup is one of 11:30.
    let refused = choose(&behind, &before(7 * MIB), Some(at("2026-11-20T10:15:00Z"))).unwrap_err();
    assert!(refused.0.contains("before backup 20261120T110000Z-full began"), "{}", refused.0);
    assert!(choose(&behind, &before(7 * MIB), Some(at("2026-11-20T11:00:00Z"))).is_ok());
    // Nothing was committed behind the gap at all, and the target is the very time that was carried over it.
    let end = through(7 * MIB, 7 * MIB + 50);
    assert!(choose(&behind, &end, Some(at("2026-11-20T10:00:00Z"))).is_err());
    assert!(choose(&behind, &end, Some(at("2026-11-20T11:10:00Z"))).is_ok());
}

#[test]
fn a_gap_hides_the_backups_before_it() {
    let catalog = Sketch::new()
        .segments(1, 1..3)
        .segments(1, 4..6)
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .done();
    let branch = catalog.history(timeline(1)).unwrap();
    let stretches = catalog.stretches(&branch);
    assert_eq!(backups_in(&catalog, &branch, &stretches[0], None).len(), 1);
    assert!(backups_in(&catalog, &branch, &stretches[1], None).is_empty());
    assert!(choose(&[], &before(5 * MIB), None).is_err());
}

#[test]
fn the_branch_is_the_one_asked_for_or_the_newest() {
    let history = format!("1\t0/{:X}\tx\n", 3 * MIB);
    let catalog = Sketch::new()
        .segments(1, 1..6)
        .segments(2, 3..5)
        .history(2, &history)
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .done();
    let chosen = |request: &Request| choose_branch(&catalog, request).map(|branch| branch.timeline().get());
    assert_eq!(chosen(&request(Target::Latest)), Ok(2));
    assert_eq!(chosen(&Request { timeline: Some(timeline(1)), ..request(Target::Latest) }), Ok(1));
    let id = BackupId::parse("20261120T020000Z-full").unwrap();
    assert_eq!(chosen(&Request { backup: Some(id), ..request(Target::Immediate) }), Ok(1));
    assert!(chosen(&Request { timeline: Some(timeline(7)), ..request(Target::Latest) }).is_err());
    let without = Sketch::new().segments(2, 3..5).done();
    let refused = choose_branch(&without, &request(Target::Latest)).unwrap_err();
    assert_eq!(refused.0, "00000002.history is not archived");
}

/// A copy was restored beside the cluster and archived under a higher number: what is archived now is another branch, and a restore
/// without `--timeline` would have given the copy. So would it where the primary that a promotion left behind was archived further.
#[test]
fn the_branch_that_is_archived_now_counts_where_a_copy_has_a_higher_number() {
    let left_at = |mib: u64| format!("1\t0/{:X}\tx\n", mib * MIB);
    let of_a_copy = |covered: Option<u32>| {
        let sketch = Sketch::new()
            .segments(1, 1..6)
            .segments(2, 5..9)
            .history(2, &left_at(5))
            .segments(3, 3..7)
            .history(3, &left_at(3));
        match covered {
            Some(id) => sketch.coverage(id, "2026-11-20T03:00:00Z", 6 * MIB).done(),
            None => sketch.done(),
        }
    };
    for (covered, chosen, beside) in
        [(Some(2), 2, vec![3]), (Some(3), 3, vec![2]), (Some(1), 1, vec![2, 3]), (None, 3, vec![2])]
    {
        let catalog = of_a_copy(covered);
        let branch = choose_branch(&catalog, &request(Target::Latest)).unwrap();
        assert_eq!(branch.timeline(), timeline(chosen), "{covered:?}");
        assert_eq!(catalog.beside(&branch), beside.into_iter().map(timeline).collect::<Vec<_>>(), "{covered:?}");
    }
}

#[test]
fn immediate_takes_the_newest_backup_whose_wal_is_whole() {
    let catalog = Sketch::new()
        .segments(1, 1..3)
        .segments(1, 4..5)
        .backup(backup("20261120T020000Z-full", MIB + 40, MIB + 400))
        .backup(backup("20261120T030000Z-full", 2 * MIB + 40, 3 * MIB + 400))
        .done();
    let branch = catalog.history(timeline(1)).unwrap();
    let stretches = catalog.stretches(&branch);
    let (choice, index) = choose_immediate(&catalog, &branch, &stretches, None).unwrap();
    assert_eq!((choice.backup.id.to_string().as_str(), index), ("20261120T020000Z-full", 0));
    assert_eq!(choice.stop, RecoveryStop::Immediate);
    let broken = BackupId::parse("20261120T030000Z-full").unwrap();
    assert!(choose_immediate(&catalog, &branch, &stretches, Some(&broken)).unwrap_err().0.contains("without a gap"));
    let unknown = BackupId::parse("20261120T040000Z-full").unwrap();
    assert!(choose_immediate(&catalog, &branch, &stretches, Some(&unknown)).unwrap_err().0.contains("no backup"));
}

#[test]
fn the_needed_wal_is_whole_segments_and_the_tail_as_it_is() {
    let catalog = Sketch::new().segments(1, 1..4).piece(1, 4, 0, 0x2000).piece(1, 4, 0x2000, 0x5000).done();
    let stretches = catalog.stretches(&catalog.history(timeline(1)).unwrap());
    let needed = |from: u64, through: u64| NeededWal::of(&stretches[0], Lsn::new(from), Lsn::new(through));
    let wal = needed(MIB + 40, 2 * MIB + 7);
    assert_eq!(
        wal.runs,
        vec![NeededRun {
            timeline: timeline(1),
            start: Lsn::new(MIB),
            end: Lsn::new(3 * MIB),
            compression: Compression::Lz4
        }]
    );
    assert!(wal.tails.is_empty());
    let size = catalog.segment_size.unwrap();
    assert_eq!((wal.segment_count(size), wal.bytes()), (2, 2 * MIB));
    // The last byte of a segment does not need the next one.
    assert_eq!(needed(MIB, 2 * MIB - 1).segment_count(size), 1);
    let wal = needed(2 * MIB, 4 * MIB + 1);
    assert_eq!((wal.segment_count(size), wal.bytes()), (3, 2 * MIB + 0x5000));
    assert_eq!(wal.tails[0].pieces.len(), 2);
}

#[test]
fn the_needed_wal_follows_the_branch() {
    let switch = 3 * MIB + 0x8000;
    let history = format!("1\t0/{switch:X}\tx\n");
    let catalog = Sketch::new().segments(1, 1..6).segments(2, 3..5).history(2, &history).done();
    let stretches = catalog.stretches(&catalog.history(timeline(2)).unwrap());
    let wal = NeededWal::of(&stretches[0], Lsn::new(MIB + 40), Lsn::new(4 * MIB + 7));
    let runs: Vec<_> = wal.runs.iter().map(|run| (run.timeline.get(), run.start.get(), run.end.get())).collect();
    assert_eq!(runs, vec![(1, MIB, 3 * MIB), (2, 3 * MIB, 5 * MIB)]);
    // Before timeline 2 has stored anything, its branch ends inside a segment of timeline 1, which is delivered whole.
    let catalog = Sketch::new().segments(1, 1..6).history(2, &history).done();
    let stretches = catalog.stretches(&catalog.history(timeline(2)).unwrap());
    let wal = NeededWal::of(&stretches[0], Lsn::new(MIB + 40), Lsn::new(switch - 1));
    let runs: Vec<_> = wal.runs.iter().map(|run| (run.timeline.get(), run.start.get(), run.end.get())).collect();
    assert_eq!(runs, vec![(1, MIB, 4 * MIB)]);
}

#[test]
fn the_chosen_target_stands_last_and_alone() {
    let stop = RecoveryStop::Lsn { lsn: Lsn::new(0xA9_1F00_0028), inclusive: false };
    let settings = target_settings(stop, timeline(26), TargetAction::Pause);
    let text: Vec<String> = settings.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(
        text,
        vec![
            "recovery_target_timeline=26",
            "recovery_target_action=pause",
            "recovery_target=",
            "recovery_target_time=",
            "recovery_target_xid=",
            "recovery_target_name=",
            "recovery_target_inclusive=off",
            "recovery_target_lsn=A9/1F000028",
        ]
    );
    let settings = target_settings(RecoveryStop::Immediate, timeline(1), TargetAction::Promote);
    assert_eq!(settings.last().unwrap(), &("recovery_target", "immediate".to_string()));
    assert_eq!(settings.iter().filter(|(name, _)| *name == "recovery_target").count(), 1);
    assert!(settings.iter().any(|(name, value)| *name == "recovery_target_lsn" && value.is_empty()));
    let settings = target_settings(RecoveryStop::NothingToReplay, timeline(1), TargetAction::Promote);
    assert_eq!(settings.iter().filter(|(name, value)| TARGETS.contains(name) && value.is_empty()).count(), 5);
}

#[test]
fn required_settings_rise_with_the_changes_up_to_the_cut() {
    let mut backup = backup("20261120T020000Z-full", MIB, 2 * MIB);
    backup.required_settings.max_connections = 100;
    backup.required_settings.max_wal_senders = 20;
    let change = |max_connections, max_wal_senders| ParameterChange {
        lsn: Lsn::new(MIB),
        max_connections,
        max_worker_processes: 8,
        max_wal_senders,
        max_prepared_xacts: 3,
        max_locks_per_xact: 64,
        wal_level: 1,
    };
    // Raised and lowered again: the highest on the way is needed.
    let needed = required_settings(&backup, &[change(500, 10), change(50, 10)]);
    assert_eq!(needed[0], ("max_connections", 500));
    assert_eq!(needed[2], ("max_wal_senders", 20));
    assert_eq!(needed[3], ("max_prepared_transactions", 3));
}
