//! The scanner and the indexer against WAL written here (`testing`), where every byte is known.

use proptest::prelude::*;

use super::testing::{EndParts, SYSTEM, WalWriter, time};
use super::*;

const MIB: u64 = 1 << 20;

fn small() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn writer() -> WalWriter {
    WalWriter::new(4 * MIB, small())
}

fn scanner(wal: &WalWriter, position: u64) -> RecordScanner {
    RecordScanner::new(ScanStart {
        timeline: wal.timeline_id(),
        position: Lsn::new(position),
        segment_size: wal.segment_size,
        system_identifier: Some(SystemIdentifier::new(SYSTEM)),
    })
}

fn indexer(wal: &WalWriter, position: u64) -> Indexer {
    Indexer::new(IndexerStart {
        timeline: wal.timeline_id(),
        position: Lsn::new(position),
        segment_size: wal.segment_size,
        system_identifier: Some(SystemIdentifier::new(SYSTEM)),
        branch_max_time: None,
    })
}

fn scan_from(wal: &WalWriter, position: u64, piece: usize) -> Result<Vec<RecordInfo>, PageError> {
    let mut scanner = scanner(wal, position);
    let mut records = Vec::new();
    for bytes in wal.from(Lsn::new(position)).chunks(piece) {
        scanner.feed(bytes, |record| records.push(record))?;
    }
    Ok(records)
}

fn scan(wal: &WalWriter) -> Vec<RecordInfo> {
    scan_from(wal, wal.start.get(), 1 << 17).unwrap()
}

fn kinds(wal: &WalWriter) -> Vec<RecordKind> {
    scan(wal).into_iter().map(|record| record.kind).filter(|kind| *kind != RecordKind::Other).collect()
}

/// A bit of everything over several segments, with records that lie over page and segment borders.
fn everything() -> WalWriter {
    let mut wal = writer();
    wal.checkpoint(Lsn::new(4 * MIB), 1_800_000_000);
    wal.parameter_change([100, 8, 10, 5, 64, 1]);
    for number in 0..4000u32 {
        wal.filler(700 + number, (number * 37 % 900) as usize);
        match number % 7 {
            0 => wal.commit(700 + number, i64::from(number) * 1000),
            3 => wal.abort(700 + number, i64::from(number) * 1000 - 1500),
            _ => continue,
        };
    }
    wal.filler(0, 3 * MIB as usize);
    wal.restore_point("here", 77);
    wal.switch();
    wal.commit(9000, 1);
    wal.leave_in_page(8);
    wal.commit(9001, 2);
    wal.torn(20_000);
    wal.commit(9002, 3);
    wal
}

#[test]
fn every_record_is_visited_once_whatever_the_pieces() {
    let wal = everything();
    let whole = scan(&wal);
    assert_eq!(whole.iter().filter(|record| matches!(record.kind, RecordKind::Commit(_))).count(), 572 + 3);
    for piece in [1, 7, 8, 24, 4095, 8192, 8193] {
        assert_eq!(scan_from(&wal, wal.start.get(), piece).unwrap(), whole, "pieces of {piece}");
    }
    for pair in whole.windows(2) {
        assert!(pair[0].end <= pair[1].lsn);
    }
}

#[test]
fn a_scan_from_any_page_finds_the_records_that_start_behind_it() {
    let wal = everything();
    let whole = scan(&wal);
    for page in (0..wal.bytes.len() as u64 / 8192).step_by(5) {
        let position = wal.start.get() + page * 8192;
        let found = scan_from(&wal, position, 1000).unwrap();
        let expected: Vec<_> = whole.iter().filter(|record| record.lsn.get() >= position).cloned().collect();
        assert_eq!(found, expected, "from {}", Lsn::new(position));
    }
}

#[test]
fn a_record_that_ends_with_its_page_leaves_nothing_open() {
    let mut wal = writer();
    wal.leave_in_page(40);
    let lsn = wal.commit(5, 55); // 34 bytes, and 6 of padding
    let mut index = indexer(&wal, 4 * MIB);
    index.feed(&wal.bytes[..wal.bytes.len() - 1]).unwrap();
    assert_eq!(index.cut().open_record, Some(lsn));
    index.feed(&wal.bytes[wal.bytes.len() - 1..]).unwrap();
    let summary = index.cut();
    assert_eq!((summary.continues_from, summary.open_record, summary.last_record), (Some(lsn), None, Some(lsn)));
    assert_eq!(summary.valid_end, lsn.checked_add(34));
    index.feed(&[0; 6]).unwrap();
    assert_eq!(index.cut(), Summary { max_time: Some(time(55)), ..Summary::default() });
}

#[test]
fn both_ends_of_transactions_are_read_with_all_their_parts() {
    for major in 13..=18 {
        let statistics = if major >= 15 { 3 } else { 0 };
        let parts = EndParts {
            database: true,
            subtransactions: 70_000, // longer than any prefix that one would care to keep
            relations: 2,
            statistics,
            invalidations: 9,
            prepared_xid: Some(4242),
            gid: true,
            origin: true,
        };
        let mut wal = writer().major(major);
        wal.transaction(0x00, 11, 1, &EndParts { relations: 4, ..EndParts::default() });
        wal.transaction(0x30, 0, 2, &parts);
        wal.transaction(0x40, 0, 3, &EndParts { invalidations: 0, ..parts.clone() });
        wal.transaction(0x20, 12, 4, &EndParts { subtransactions: 1, ..EndParts::default() });
        let end = |time_at, xid, prepared, subtransactions, dropped_relations| TransactionEnd {
            time: time(time_at),
            xid,
            prepared,
            subtransactions,
            dropped_relations,
        };
        assert_eq!(
            kinds(&wal),
            [
                RecordKind::Commit(end(1, 11, false, 0, 4)),
                RecordKind::Commit(end(2, 4242, true, 70_000, 2)),
                RecordKind::Abort(end(3, 4242, true, 70_000, 2)),
                RecordKind::Abort(end(4, 12, false, 1, 0)),
            ],
            "PostgreSQL {major}"
        );
    }
}

#[test]
fn drops_of_databases_have_another_code_since_15() {
    for (major, code) in [(14, 0x10), (15, 0x20), (18, 0x20)] {
        let mut wal = writer().major(major);
        for info in [0x00, 0x10, 0x20] {
            wal.record(4, info, 9, &[7, 0, 0, 0, 2, 0, 0, 0]);
        }
        assert_eq!(kinds(&wal), [RecordKind::DropDatabase { database: 7, directories: 2 }], "PostgreSQL {major}");
        assert_eq!(scan(&wal)[code as usize >> 4].info, code);
    }
}

#[test]
fn headers_before_the_data_are_passed_over() {
    let time_bytes = 123i64.to_le_bytes();
    let commit = |before: &[u8], blocks: &[u8]| {
        let mut wal = writer();
        wal.raw(1, 0, 6, &[before, &[255, 8], blocks, &time_bytes].concat());
        kinds(&wal)
    };
    let expected = || {
        let (time, xid) = (time(123), 6);
        let end = TransactionEnd { time, xid, prepared: false, subtransactions: 0, dropped_relations: 0 };
        vec![RecordKind::Commit(end)]
    };
    let origin = [253, 1, 0];
    let toplevel = [252, 1, 0, 0, 0];
    assert_eq!(commit(&origin, &[]), expected());
    assert_eq!(commit(&[&origin[..], &toplevel].concat(), &[]), expected());
    // Block 0 with 3 bytes of data and an image of 4 bytes, compressed with a hole; block 1 of the same relation.
    let mut blocks = vec![0, 0x10 | 0x20, 3, 0, 4, 0, 50, 0, 0x01 | 0x08, 9, 9];
    blocks.extend([1; 16]);
    blocks.extend([1, 0x80 | 0x20, 2, 0, 5, 5, 5, 5]);
    assert_eq!(commit(&blocks, &[0; 9]), expected());
    assert_eq!(commit(&blocks, &[0; 8]), [RecordKind::Unreadable]);
    assert_eq!(commit(&[200], &[]), [RecordKind::Unreadable]);

    // Up to 14 one flag says "compressed", and there is no toplevel xid before 14.
    let mut wal = writer().major(13);
    blocks[8] = 0x01 | 0x02;
    wal.raw(1, 0, 6, &[&blocks[..], &[255, 8], &[0; 9], &time_bytes].concat());
    wal.raw(1, 0, 6, &[&toplevel[..], &[255, 8], &time_bytes].concat());
    assert_eq!(kinds(&wal), [expected(), vec![RecordKind::Unreadable]].concat());
}

#[test]
fn the_rest_of_a_switched_segment_is_passed_over() {
    let mut wal = writer();
    wal.switch();
    wal.commit(3, 3);
    // A switch record whose end is the segment's end.
    while wal.position() % MIB < MIB - 8192 {
        wal.filler(0, 4000);
    }
    wal.leave_in_page(24);
    wal.switch();
    assert_eq!(wal.position() % MIB, 0);
    wal.commit(4, 4);
    // One that lies over two pages.
    wal.leave_in_page(8);
    wal.switch();
    wal.commit(5, 5);
    let xids: Vec<_> = scan(&wal).iter().filter(|r| r.rmid == 1).map(|r| r.xid).collect();
    assert_eq!(xids, [3, 4, 5]);
    assert_eq!(kinds(&wal).iter().filter(|kind| **kind == RecordKind::Switch).count(), 3);
}

#[test]
fn zero_pages_are_accepted_only_after_a_switch() {
    let mut wal = writer();
    wal.filler(0, 100);
    wal.leave_in_page(16);
    wal.filler(0, 8);
    let mut bytes = wal.bytes.clone();
    bytes.truncate(8192);
    bytes.extend([0; 8192]);
    let mut scanner = scanner(&wal, 4 * MIB);
    let error = scanner.feed(&bytes, |_| ()).unwrap_err();
    assert_eq!(error.lsn, Lsn::new(4 * MIB + 8192));
    assert_eq!(scanner.feed(&[1], |_| ()), Err(error), "a failed scan stays failed");
}

#[test]
fn a_torn_record_is_given_up_where_the_server_says_so() {
    let mut wal = writer();
    wal.filler(0, 100);
    let torn = wal.torn(30_000);
    wal.commit(3, 3);
    let records = scan(&wal);
    assert_eq!(records[1].kind, RecordKind::OverwriteContrecord { overwritten: torn, time: time(5) });
    assert!(records.iter().all(|record| record.lsn != torn));

    // Without the mark, a page that does not continue an open record is an error.
    wal.bytes[8192 + 2] &= !8;
    let error = scan_from(&wal, wal.start.get(), 4096).unwrap_err();
    assert!(matches!(error.kind, PageErrorKind::Continuation { expected: Some(_), found: None }), "{error}");
}

#[test]
fn pages_that_do_not_fit_are_refused() {
    let mut wal = writer();
    wal.filler(0, 20_000);
    let spoil = |at: usize, value: u8| {
        let mut wal = wal.clone();
        wal.bytes[at] = value;
        scan_from(&wal, wal.start.get(), 777).unwrap_err()
    };
    let second = 8192;
    assert!(matches!(spoil(second + 16, 1).kind, PageErrorKind::Continuation { expected: Some(_), found: Some(_) }));
    assert!(matches!(spoil(second + 13, 9).kind, PageErrorKind::Address { .. }));
    assert!(matches!(spoil(second, 0x0D).kind, PageErrorKind::Magic { expected: Some(_), .. }));
    assert!(matches!(spoil(second + 4, 2).kind, PageErrorKind::Timeline { .. }));
    assert!(spoil(24, 0).is_other_cluster());
    assert!(matches!(spoil(43, 0x40).kind, PageErrorKind::RecordLength { found: 0x4000_4E3D }));
    for at in 40..44 {
        let mut short = wal.clone();
        short.bytes[40..44].copy_from_slice(&23u32.to_le_bytes());
        let error = scan_from(&short, wal.start.get(), at - 39).unwrap_err();
        assert_eq!((error.lsn, error.kind), (Lsn::new(4 * MIB + 40), PageErrorKind::RecordLength { found: 23 }));
    }
}

#[test]
fn a_new_timeline_begins_with_its_ancestors_pages() {
    let mut wal = writer();
    wal.filler(0, 10_000);
    wal.timeline = 4;
    wal.filler(0, 10_000);
    assert_eq!(scan(&wal).len(), 2);
    wal.timeline = 3;
    wal.filler(0, 10_000);
    let mut scanner = scanner(&wal, wal.start.get());
    scanner.continue_on(TimelineId::new(4).unwrap());
    let error = scanner.feed(&wal.bytes, |_| ()).unwrap_err();
    assert!(matches!(error.kind, PageErrorKind::Timeline { found: 3, expected: (4, _) }), "{error}");
}

#[test]
fn a_summary_says_what_its_stretch_holds() {
    let mut wal = writer();
    let checkpoint = wal.checkpoint(Lsn::new(4 * MIB), 1_800_000_000);
    let change = wal.parameter_change([100, 8, 10, 5, 64, 1]);
    let first = wal.commit(10, 5_000_000);
    wal.abort(9, 4_000_000);
    let dropping = wal.transaction(0, 12, 4_500_000, &EndParts { relations: 3, ..EndParts::default() });
    let database = wal.record(4, 0x20, 13, &[7, 0, 0, 0, 1, 0, 0, 0]);
    let truncate = wal.record(10, 0x30, 14, &[7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    wal.record(2, 0x21, 0, &[0; 20]); // VACUUM
    let own = wal.record(2, 0x21, 15, &[0; 20]);
    wal.record(2, 0x21, 16, &[1; 20]); // not to nothing
    let point = wal.restore_point("before release", 6_000_000);
    let mut index = indexer(&wal, 4 * MIB);
    index.feed(&wal.bytes).unwrap();
    let summary = index.cut();
    let drop = |lsn, xid, at: Option<i64>, kind, count| Drop { lsn, xid, time: at.map(time), kind, count };
    assert_eq!(
        summary,
        Summary {
            continues_from: None,
            last_record: Some(point),
            open_record: None,
            valid_end: point.checked_add(98),
            first_commit: Some(CommitMark { time: time(5_000_000), xid: 10, lsn: first }),
            last_commit: Some(CommitMark { time: time(4_500_000), xid: 12, lsn: dropping }),
            max_time: Some(time(5_000_000)),
            max_time_here: Some(time(5_000_000)),
            min_xid: Some(9),
            max_xid: Some(16),
            commits: 2,
            aborts: 1,
            records: 11,
            restore_points: vec![RestorePoint { name: "before release".into(), lsn: point, time: time(6_000_000) }],
            parameter_changes: vec![ParameterChange {
                lsn: change,
                max_connections: 100,
                max_worker_processes: 8,
                max_wal_senders: 10,
                max_prepared_xacts: 5,
                max_locks_per_xact: 64,
                wal_level: 1,
            }],
            drops: vec![
                drop(dropping, 12, Some(4_500_000), DropKind::Relation, 3),
                drop(database, 13, None, DropKind::Database, 1),
                drop(truncate, 14, None, DropKind::Truncate, 2),
                drop(own, 15, None, DropKind::Truncate, 1),
            ],
            checkpoint: Some(CheckpointMark {
                lsn: checkpoint,
                redo: Lsn::new(4 * MIB),
                timeline: 1,
                time: PgTime::from_unix_seconds(1_800_000_000),
            }),
            truncated: false,
        }
    );
    // An unreadable commit is said to be one; the highest time goes on.
    let from = wal.bytes.len();
    wal.raw(1, 0, 20, &[255, 9, 1]);
    wal.commit(21, 1_000_000);
    index.feed(&wal.bytes[from..]).unwrap();
    let summary = index.cut();
    assert!(summary.truncated);
    assert_eq!((summary.max_time, summary.max_time_here), (Some(time(5_000_000)), Some(time(1_000_000))));
}

#[test]
fn lists_are_bounded_and_say_so() {
    let mut wal = writer();
    for number in 0..Summary::LIST_MAX + 1 {
        wal.restore_point(&format!("p{number}"), 1);
    }
    let mut index = indexer(&wal, 4 * MIB);
    index.feed(&wal.bytes).unwrap();
    let summary = index.cut();
    assert_eq!((summary.restore_points.len(), summary.truncated), (Summary::LIST_MAX, true));
}

#[test]
fn a_commit_over_a_segment_border_counts_where_it_ends() {
    let mut wal = writer();
    while wal.position() % MIB < MIB - 8192 {
        wal.filler(0, 4000);
    }
    wal.leave_in_page(16);
    let lsn = wal.commit(8, 80);
    let border = (MIB) as usize;
    let mut index = indexer(&wal, 4 * MIB);
    index.feed(&wal.bytes[..border]).unwrap();
    let before = index.cut();
    assert_eq!((before.commits, before.open_record), (0, Some(lsn)));
    index.feed(&wal.bytes[border..]).unwrap();
    let after = index.cut();
    assert_eq!((after.commits, after.continues_from, after.last_record), (1, Some(lsn), Some(lsn)));
    assert_eq!(after.valid_end, Some(Lsn::new(wal.position())));

    // An indexer that takes up the stream at the border has to begin at the page that holds the open record.
    let mut fresh = indexer(&wal, 5 * MIB - 8192);
    fresh.feed(&wal.bytes[border - 8192..border]).unwrap();
    fresh.cut();
    fresh.feed(&wal.bytes[border..]).unwrap();
    assert_eq!(fresh.cut(), after);
}

#[test]
fn summaries_of_parts_add_up_to_the_summary_of_the_whole() {
    let wal = everything();
    let mut index = indexer(&wal, wal.start.get());
    index.feed(&wal.bytes).unwrap();
    let whole = index.cut();
    for parts in [[100, 200], [8192, 16384], [300_001, 300_002], [MIB as usize, 3 * MIB as usize + 5]] {
        let mut index = indexer(&wal, wal.start.get());
        let mut sum: Option<Summary> = None;
        for piece in [&wal.bytes[..parts[0]], &wal.bytes[parts[0]..parts[1]], &wal.bytes[parts[1]..]] {
            index.feed(piece).unwrap();
            let part = index.cut();
            match &mut sum {
                Some(sum) => sum.append(&part),
                None => sum = Some(part),
            }
        }
        assert_eq!(sum.unwrap(), whole, "cut at {parts:?}");
    }
}

/// A segment of each major, written by PostgreSQL, and the summary that its own tools confirm: name, bytes, summary.
fn real_segments() -> Vec<(SegmentName, Vec<u8>, Summary)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wal");
    let mut found = Vec::new();
    for major in 13..=18 {
        let is_of_major = |name: &str| name.starts_with(&format!("{major}-")) && name.ends_with(".lz4");
        let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let name = names.into_iter().find(|name| is_of_major(name)).unwrap();
        let stem = name.strip_suffix(".lz4").unwrap();
        let mut raw = Vec::new();
        let stored = std::fs::File::open(folder.join(&name)).unwrap();
        std::io::Read::read_to_end(&mut lz4_flex::frame::FrameDecoder::new(stored), &mut raw).unwrap();
        let summary = std::fs::read(folder.join(format!("{stem}.json"))).unwrap();
        let segment = SegmentName::parse(&stem[3..], small()).unwrap();
        found.push((segment, raw, serde_json::from_slice(&summary).unwrap()));
    }
    found
}

fn real_indexer(segment: SegmentName) -> Indexer {
    Indexer::new(IndexerStart {
        timeline: segment.timeline(),
        position: segment.start(),
        segment_size: segment.size(),
        system_identifier: None,
        branch_max_time: None,
    })
}

#[test]
fn segments_of_every_major_have_the_known_summary() {
    for (major, (segment, raw, expected)) in (13..).zip(real_segments()) {
        for piece in [1 << 20, 8192, 333] {
            let mut index = real_indexer(segment);
            raw.chunks(piece).for_each(|bytes| index.feed(bytes).unwrap());
            assert_eq!(index.major(), Some(major));
            assert_eq!(index.cut(), expected, "PostgreSQL {major}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..20_000), piece in 1usize..9000) {
        let wal = writer();
        let mut index = indexer(&wal, 4 * MIB);
        for bytes in bytes.chunks(piece) {
            if index.feed(bytes).is_err() {
                break;
            }
        }
        index.cut();
    }

    #[test]
    fn spoiled_wal_never_panics_and_reads_the_same_in_any_pieces(
        spoiled in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        piece in 1usize..9000,
        major in 13u32..=18,
    ) {
        let mut wal = writer().major(major);
        for number in 0..200u32 {
            wal.filler(number, (number * 31 % 500) as usize);
            wal.transaction(0x30, 0, 5, &EndParts {
                subtransactions: number % 5, relations: number % 3, prepared_xid: Some(number), ..EndParts::default()
            });
            wal.restore_point("x", 1);
        }
        for (at, value) in spoiled {
            let at = at.index(wal.bytes.len());
            wal.bytes[at] = value;
        }
        let read = |piece: usize| {
            let mut scanner = scanner(&wal, wal.start.get());
            let mut records = Vec::new();
            let mut result = Ok(());
            for bytes in wal.bytes.chunks(piece) {
                result = scanner.feed(bytes, |record| records.push(record));
                if result.is_err() {
                    break;
                }
            }
            (records, result)
        };
        prop_assert_eq!(read(piece), read(usize::MAX));
    }

    #[test]
    fn spoiled_real_wal_never_panics(
        major in 0usize..6,
        spoiled in proptest::collection::vec((0usize..110_000, any::<u8>()), 1..5),
        cut in 0usize..110_000,
    ) {
        static SEGMENTS: std::sync::LazyLock<Vec<(SegmentName, Vec<u8>, Summary)>> =
            std::sync::LazyLock::new(real_segments);
        let (segment, raw, _) = &SEGMENTS[major];
        let mut raw = raw[..120_000].to_vec();
        for (at, value) in spoiled {
            raw[at] = value;
        }
        let mut index = real_indexer(*segment);
        let sum = |index: &mut Indexer| {
            let mut sum = index.cut();
            let result = index.feed(&raw[cut..]);
            sum.append(&index.cut());
            (sum, result)
        };
        let pieces = match index.feed(&raw[..cut]) {
            Ok(()) => sum(&mut index),
            Err(error) => (index.cut(), Err(error)),
        };
        let mut whole = real_indexer(*segment);
        let result = whole.feed(&raw);
        prop_assert_eq!(pieces, (whole.cut(), result));
    }
}
