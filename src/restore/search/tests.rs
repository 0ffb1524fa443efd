//! Every kind of target against WAL written record by record, with the answer known from the list of records.

use std::future::Future;

use bytes::Bytes;

use super::*;
use crate::seal::{Compression, ObjectHeader, ObjectKind};
use crate::wal::testing::{EndParts, SYSTEM, WalWriter, time};
use crate::wal::{Indexer, IndexerStart, RecordScanner, ScanStart, SegmentName, Summary};

const MIB: u64 = 1 << 20;

#[derive(Debug, thiserror::Error)]
#[error("the store is out")]
struct StoreError;

struct Object {
    header: ObjectHeader,
    raw: Bytes,
}

#[derive(Default)]
struct Store(Vec<Object>);

struct Raw(Bytes);

impl RawWal for Raw {
    type Error = StoreError;
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let piece = self.0.split_to(self.0.len().min(70_001));
        Ok((!piece.is_empty()).then_some(piece))
    }
}

impl WalSource<usize> for Store {
    type Error = StoreError;
    type Raw = Raw;
    async fn header(&self, item: &HeldWal<usize>) -> Result<ObjectHeader, StoreError> {
        Ok(self.0[item.key].header.clone())
    }
    async fn raw(&self, item: &HeldWal<usize>, from: Lsn) -> Result<Raw, StoreError> {
        assert!(item.object.contains(&from));
        Ok(Raw(self.0[item.key].raw.slice(from.bytes_since(item.object.start) as usize..)))
    }
}

/// Stores `wal` as segments, and pieces cut at `cuts`; the indexer begins anew at `restarts` without looking back.
fn store(store: &mut Store, wal: &WalWriter, cuts: &[u64], restarts: &[u64]) -> Vec<HeldWal<usize>> {
    let start = |position, branch_max_time| IndexerStart {
        timeline: wal.timeline_id(),
        position: Lsn::new(position),
        segment_size: wal.segment_size,
        system_identifier: Some(SystemIdentifier::new(SYSTEM)),
        branch_max_time,
    };
    let mut index = Indexer::new(start(wal.start.get(), None));
    let mut items: Vec<HeldWal<usize>> = Vec::new();
    let mut at = wal.start.get();
    while at < wal.position() {
        let boundary = (at + 1).next_multiple_of(wal.segment_size.get());
        let end = cuts.iter().copied().filter(|&cut| cut > at).chain([boundary, wal.position()]).min().unwrap();
        if restarts.contains(&at) {
            let max_time = store.0.last().and_then(|object| object.header.summary.max_time);
            index = Indexer::new(start(at, max_time));
        }
        let raw = Bytes::copy_from_slice(&wal.from(Lsn::new(at))[..(end - at) as usize]);
        index.feed(&raw).unwrap();
        let name = SegmentName::holding(wal.timeline_id(), Lsn::new(at), wal.segment_size);
        let header = header_of(wal, name, at, end, index.cut());
        let range = Lsn::new(at)..Lsn::new(end);
        items.push(HeldWal { key: store.0.len(), timeline: wal.timeline_id(), object: range.clone(), counts: range });
        store.0.push(Object { header, raw });
        at = end;
    }
    items
}

fn header_of(wal: &WalWriter, name: SegmentName, at: u64, end: u64, summary: Summary) -> ObjectHeader {
    let whole = end - at == wal.segment_size.get();
    ObjectHeader {
        format: 1,
        kind: if whole { ObjectKind::Segment } else { ObjectKind::Piece },
        system_identifier: SystemIdentifier::new(SYSTEM),
        timeline: wal.timeline_id(),
        segment: name.to_string(),
        segment_size: wal.segment_size,
        start_offset: at - name.start().get(),
        end_offset: end - name.start().get(),
        raw_size: end - at,
        raw_crc32: 0,
        raw_crc32c: 0,
        prefix_crc32: 0,
        stored_size: 0,
        body_crc32: 0,
        compression: Compression::Lz4,
        server_version: None,
        summary,
        overflow: None,
    }
}

fn search<'a>(store: &'a Store, items: &[HeldWal<usize>]) -> Search<'a, Store, usize> {
    let size = SegmentSize::new(MIB).unwrap();
    Search::new(store, size, SystemIdentifier::new(SYSTEM), items.to_vec(), None).unwrap()
}

/// The doubles here are always ready.
fn now<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn find(store: &Store, items: &[HeldWal<usize>], target: &SearchTarget) -> Result<Cut, SearchError<StoreError>> {
    now(search(store, items).find(target))
}

fn records(wal: &WalWriter) -> Vec<RecordInfo> {
    let mut scanner = RecordScanner::new(ScanStart {
        timeline: wal.timeline_id(),
        position: wal.start,
        segment_size: wal.segment_size,
        system_identifier: None,
    });
    let mut records = Vec::new();
    scanner.feed(&wal.bytes, |record| records.push(record)).unwrap();
    records
}

/// What a time target must give, by PostgreSQL's rule over the list of records.
fn expected_for_time(records: &[RecordInfo], target: PgTime, exclusive: bool) -> Cut {
    let commits: Vec<CommitMark> = records.iter().filter_map(commit_of).collect();
    let first = commits.iter().position(|mark| if exclusive { mark.time >= target } else { mark.time > target });
    match first {
        Some(at) => Cut {
            stop: Stop::Before(commits[at].lsn),
            last_kept: at.checked_sub(1).map(|before| commits[before]),
            first_left_out: Some(commits[at]),
        },
        None => expected_at_end(records),
    }
}

fn expected_at_end(records: &[RecordInfo]) -> Cut {
    let last = records.last().unwrap();
    Cut {
        stop: Stop::Through { record: last.lsn, end: last.end },
        last_kept: records.iter().rev().find_map(commit_of),
        first_left_out: None,
    }
}

/// Repeatable numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % below
    }
}

/// Several segments; commit times that rise, with neighbours out of order and one step back of the clock.
fn history(seed: u64) -> WalWriter {
    let mut dice = Dice(seed);
    let mut wal = WalWriter::new(8 * MIB, SegmentSize::new(MIB).unwrap());
    let mut clock = 1_000_000;
    for number in 1..600u32 {
        clock += 1000;
        if number == 350 {
            clock -= 60_000;
        }
        let at = clock - dice.roll(3000) as i64;
        for _ in 0..dice.roll(4) {
            wal.filler(number, dice.roll(3000) as usize);
        }
        match dice.roll(12) {
            0 => wal.abort(number, at),
            1 => wal.transaction(
                0x30,
                0,
                at,
                &EndParts {
                    prepared_xid: Some(number),
                    subtransactions: dice.roll(5000) as u32,
                    relations: dice.roll(3) as u32,
                    ..EndParts::default()
                },
            ),
            2 => wal.filler(0, 20_000),
            3 if number % 5 == 0 => wal.filler(0, MIB as usize + dice.roll(MIB) as usize),
            4 => wal.restore_point(&format!("point {number}"), at),
            _ => wal.commit(number, at),
        };
        if dice.roll(100) == 0 {
            wal.switch();
        }
    }
    wal.filler(0, 300);
    wal
}

#[test]
fn a_time_gives_the_first_commit_or_abort_after_it_in_wal_order() {
    for seed in 0..4 {
        let wal = history(seed);
        let records = records(&wal);
        let mut objects = Store::default();
        let end = wal.position();
        let items = store(&mut objects, &wal, &[end - 5000, end - 3777, end - 100], &[10 * MIB]);
        let mut dice = Dice(seed + 100);
        let mut targets: Vec<i64> = (0..40).map(|_| 990_000 + dice.roll(620_000) as i64).collect();
        targets.extend(records.iter().filter_map(commit_of).step_by(29).map(|mark| mark.time.pg_micros()));
        for target in targets {
            for exclusive in [false, true] {
                let found = find(&objects, &items, &SearchTarget::Time { time: time(target), exclusive }).unwrap();
                let expected = expected_for_time(&records, time(target), exclusive);
                assert_eq!(found, expected, "seed {seed}, {target}, exclusive {exclusive}");
            }
        }
    }
}

/// A segment that was fetched again after it was lost from the spool knew of no commit before it, so the highest time so far fell there.
/// Where it had no commit at all, the search by halves was led past the first commit to leave out.
#[test]
fn headers_that_forgot_the_highest_time_lead_nowhere_else() {
    let wal = history(1);
    let records = records(&wal);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let count = objects.0.len();
    let commitless = objects.0.iter().filter(|object| object.header.summary.commits == 0).count();
    assert!(count > 8 && commitless > 0, "{count}, {commitless} without a commit");
    for forgets in 1..count {
        let kept = objects.0.iter().map(|object| object.header.summary.max_time).collect::<Vec<_>>();
        let mut highest = None;
        for object in &mut objects.0[forgets..] {
            highest = highest.max(object.header.summary.max_time_here);
            object.header.summary.max_time = highest;
        }
        for target in (990_000..1_600_000).step_by(13_000) {
            let time = time(target);
            let target = SearchTarget::Time { time, exclusive: false };
            let mut search = search(&objects, &items);
            let cut = now(search.find(&target)).unwrap();
            let cut = now(search.earlier_cut(&target, wal.start, &cut)).unwrap().unwrap_or(cut);
            assert_eq!(cut, expected_for_time(&records, time, false), "{forgets} of {count}, {time}");
        }
        for (object, kept) in objects.0.iter_mut().zip(kept) {
            object.header.summary.max_time = kept;
        }
    }
    // The clock never went back here: the search alone finds it.
    let mut wal = WalWriter::new(8 * MIB, SegmentSize::new(MIB).unwrap());
    let mut commits = Vec::new();
    for number in 0..4u32 {
        commits.push(wal.commit(number + 1, i64::from(number) * 100));
        wal.filler(0, 3 * MIB as usize / 2);
    }
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    for index in 0..objects.0.len() {
        if objects.0[index].header.summary.commits > 0 {
            continue;
        }
        let kept = objects.0[index].header.summary.max_time.take();
        for (at, expected) in [(50, commits[1]), (150, commits[2]), (250, commits[3])] {
            let found = find(&objects, &items, &SearchTarget::Time { time: time(at), exclusive: false }).unwrap();
            assert_eq!(found.stop, Stop::Before(expected), "{index}, {at}");
        }
        objects.0[index].header.summary.max_time = kept;
    }
}

#[test]
fn an_lsn_gives_the_first_record_that_starts_there_or_behind() {
    let wal = history(7);
    let records = records(&wal);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let mut dice = Dice(1);
    let span = records.last().unwrap().lsn.get() - wal.start.get();
    for _ in 0..60 {
        let lsn = Lsn::new(wal.start.get() + dice.roll(span));
        let record = records.iter().find(|record| record.lsn >= lsn).unwrap();
        let commits = |behind: bool, keep: bool| {
            let mut marks = records.iter().filter_map(commit_of);
            let kept = |mark: &CommitMark| mark.lsn < record.lsn || (keep && mark.lsn == record.lsn);
            if behind { marks.find(|mark| !kept(mark)) } else { marks.rfind(kept) }
        };
        for exclusive in [false, true] {
            let found = find(&objects, &items, &SearchTarget::Lsn { lsn, exclusive }).unwrap();
            let stop = match exclusive {
                true => Stop::Before(record.lsn),
                false => Stop::Through { record: record.lsn, end: record.end },
            };
            let expected =
                Cut { stop, last_kept: commits(false, !exclusive), first_left_out: commits(true, !exclusive) };
            assert_eq!(found, expected, "{lsn}, exclusive {exclusive}");
        }
    }
}

fn lsn_target(lsn: u64) -> SearchTarget {
    SearchTarget::Lsn { lsn: Lsn::new(lsn), exclusive: false }
}

#[test]
fn an_lsn_at_the_end_of_what_is_held_is_reached_and_one_beyond_is_not() {
    let mut wal = history(3);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let expected = expected_at_end(&records(&wal));
    let end = wal.position().next_multiple_of(8);
    assert_eq!(find(&objects, &items, &lsn_target(end)).unwrap(), expected);
    let error = find(&objects, &items, &lsn_target(end + 1)).unwrap_err();
    assert!(matches!(error, SearchError::BeyondEnd { .. }) && error.is_unreachable(), "{error}");
    let error = find(&objects, &items, &lsn_target(8 * MIB - 1)).unwrap_err();
    assert!(matches!(error, SearchError::BeforeRange { .. }) && error.is_unreachable(), "{error}");

    // A record that has begun does not count.
    wal.filler(0, 10_000);
    let open = wal.clone();
    wal.bytes.truncate(wal.bytes.len() - 5000);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    assert_eq!(find(&objects, &items, &lsn_target(end)).unwrap(), expected);
    assert!(find(&objects, &items, &lsn_target(end + 8)).is_err());

    // After a switch the server names the segment's end, or the first record's place in the next one.
    let mut wal = open;
    wal.switch();
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let expected = expected_at_end(&records(&wal));
    for beyond in [0, 40] {
        assert_eq!(find(&objects, &items, &lsn_target(wal.position() + beyond)).unwrap(), expected);
    }
    assert!(find(&objects, &items, &lsn_target(wal.position() + 41)).is_err());
}

#[test]
fn an_end_at_a_page_border_is_also_named_by_where_the_next_record_would_start() {
    let mut wal = history(3);
    wal.leave_in_page(48);
    wal.filler(0, 22);
    assert_eq!(wal.position() % 8192, 0);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    assert!(find(&objects, &items, &lsn_target(wal.position() + 24)).is_ok());
    assert!(find(&objects, &items, &lsn_target(wal.position() + 25)).is_err());
}

/// The search began at the first whole page of such a piece, and did not see what was committed before (E6, I5).
#[test]
fn a_range_does_not_begin_in_the_middle_of_a_page() {
    let mut wal = history(9);
    wal.filler(0, 9000);
    let cut = wal.position();
    assert_ne!(cut % 8192, 0);
    let commits: Vec<Lsn> = (0..20).map(|number| wal.commit(70_000 + number, 5_000_000 + i64::from(number))).collect();
    wal.filler(0, 60_000);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[cut, wal.position() - 5000], &[]);
    let at = items.iter().position(|item| item.object.start == Lsn::new(cut)).unwrap();
    let target = SearchTarget::Time { time: time(5_000_000), exclusive: false };
    assert_eq!(find(&objects, &items, &target).unwrap().stop, Stop::Before(commits[1]));
    let size = SegmentSize::new(MIB).unwrap();
    let refused = Search::new(&objects, size, SystemIdentifier::new(SYSTEM), items[at..].to_vec(), None).err().unwrap();
    assert!(matches!(refused, SearchError::NotContiguous { at } if at == Lsn::new(cut)), "{refused}");
}

#[test]
fn a_transaction_is_found_by_its_own_xid_and_refused_if_repeated() {
    let mut wal = history(5);
    let parts = EndParts { prepared_xid: Some(77_777), ..EndParts::default() };
    let prepared = wal.transaction(0x30, 0, 5, &parts);
    wal.commit(77_778, 6);
    let again = wal.abort(300, 7);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let xid = |xid, exclusive| find(&objects, &items, &SearchTarget::Xid { xid, exclusive });
    let cut = xid(77_777, false).unwrap();
    assert_eq!((cut.stop.lsn(), cut.stop.inclusive()), (prepared, true));
    assert_eq!((cut.last_kept.unwrap().xid, cut.first_left_out.unwrap().xid), (77_777, 77_778));
    let cut = xid(77_777, true).unwrap();
    assert_eq!((cut.stop, cut.first_left_out.unwrap().xid), (Stop::Before(prepared), 77_777));
    let Err(SearchError::Repeated { lsns, .. }) = xid(300, false) else { panic!("300 ends twice") };
    assert_eq!((lsns.len(), lsns[1]), (2, again));
    assert!(matches!(xid(90_000, false), Err(SearchError::XidNotFound { xid: 90_000 })));
}

#[test]
fn a_restore_point_is_found_by_name_and_refused_if_repeated() {
    let mut wal = history(6);
    let one = wal.restore_point("release", 5);
    wal.commit(9999, 6);
    let first = wal.restore_point("twice", 5);
    wal.filler(0, 2 * MIB as usize);
    let second = wal.restore_point("twice", 5);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    for truncated in [false, true] {
        for object in &mut objects.0 {
            object.header.summary.truncated = truncated;
        }
        let name = |name: &str| find(&objects, &items, &SearchTarget::Name(name.into()));
        let cut = name("release").unwrap();
        assert_eq!(cut.stop, Stop::Through { record: one, end: one.checked_add(98).unwrap() });
        assert_eq!(cut.first_left_out.unwrap().xid, 9999);
        let error = name("twice").unwrap_err();
        assert_eq!(error.to_string(), format!("restore point \"twice\" occurs more than once, at {first}, {second}"));
        assert!(matches!(name("never"), Err(SearchError::NameNotFound { .. })));
    }
}

/// Timeline 1 with WAL beyond the switch, timeline 3 that left it in the middle of a segment.
struct Forked {
    objects: Store,
    branch: WalWriter,
    switch: Lsn,
    old: Vec<HeldWal<usize>>,
    new: Vec<HeldWal<usize>>,
}

fn forked() -> Forked {
    let mut old = history(11);
    while old.position() % MIB < 300_000 || old.position() % MIB > 700_000 {
        old.filler(0, 90_000);
    }
    old.commit(50_000, 2_000_000);
    let switch = Lsn::new(old.position().next_multiple_of(8));
    old.bytes.resize((switch.get() - old.start.get()) as usize, 0);
    let mut branch = old.clone();
    branch.timeline = 3;
    // Lost with the old server, though stored: later than all on the new timeline.
    old.commit(50_001, 9_000_000);
    old.restore_point("lost", 9_000_000);
    old.filler(0, 1_500_000);
    for number in 0..800u32 {
        branch.commit(60_000 + number, 2_100_000 + i64::from(number) * 100);
        branch.filler(0, 4000);
    }
    let mut objects = Store::default();
    let old_items = store(&mut objects, &old, &[], &[]);
    let mut copied = branch.clone();
    let start = branch.segment_size.start_of(switch);
    copied.bytes.drain(..(start.get() - branch.start.get()) as usize);
    copied.start = start;
    // The highest time went on from what was seen of the old timeline, the lost part included.
    let new_items = store(&mut objects, &copied, &[], &[start.get()]);
    Forked { objects, branch, switch, old: old_items, new: new_items }
}

impl Forked {
    /// The branch's objects: the old timeline's up to `from`, then the new one's.
    fn items(&self, from: Lsn) -> Vec<HeldWal<usize>> {
        let mut items: Vec<_> = self.old.iter().filter(|item| item.counts.start < from).cloned().collect();
        items.last_mut().unwrap().counts.end = from;
        let mut new = self.new.clone();
        new[0].counts.start = from;
        items.extend(new);
        items
    }
}

#[test]
fn a_branch_is_read_over_the_switch_of_its_timelines() {
    let forked = forked();
    let records = records(&forked.branch);
    for from in [forked.switch, SegmentSize::new(MIB).unwrap().start_of(forked.switch)] {
        let items = forked.items(from);
        for target in [1_200_000, 1_999_999, 2_000_000, 2_100_000, 2_150_050, 3_000_000, 9_000_000] {
            for exclusive in [false, true] {
                let time = time(target);
                let found = find(&forked.objects, &items, &SearchTarget::Time { time, exclusive }).unwrap();
                assert_eq!(found, expected_for_time(&records, time, exclusive), "{target} from {from}");
            }
        }
        let found = find(&forked.objects, &items, &lsn_target(forked.switch.get())).unwrap();
        assert_eq!(found.stop.lsn(), forked.switch);
        assert_eq!(found.last_kept.unwrap().xid, 60_000);
        let lost = find(&forked.objects, &items, &SearchTarget::Name("lost".into()));
        assert!(matches!(lost, Err(SearchError::NameNotFound { .. })));
        let lost = find(&forked.objects, &items, &SearchTarget::Xid { xid: 50_001, exclusive: false });
        assert!(matches!(lost, Err(SearchError::XidNotFound { .. })));
    }
    // The old timeline by itself has what the branch has not, and one that ends at the switch ends there.
    let lost = find(&forked.objects, &forked.old, &SearchTarget::Name("lost".into())).unwrap();
    assert!(lost.stop.lsn() > forked.switch);
    let mut old = forked.items(forked.switch);
    old.truncate(old.len() - forked.new.len());
    let cut = find(&forked.objects, &old, &SearchTarget::Latest).unwrap();
    assert_eq!((cut.stop.reached_at(), cut.last_kept.unwrap().xid), (forked.switch, 50_000));
}

#[test]
fn a_commit_over_a_border_where_the_agent_began_anew_is_found() {
    let mut wal = WalWriter::new(8 * MIB, SegmentSize::new(MIB).unwrap());
    wal.commit(1, 100);
    while wal.position() % MIB < MIB - 8192 {
        wal.filler(0, 4000);
    }
    wal.leave_in_page(16);
    let over = wal.commit(2, 200);
    wal.filler(0, 100);
    wal.commit(3, 150);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[9 * MIB]);
    assert_eq!(objects.0[1].header.summary.continues_from, None);
    assert_eq!(objects.0[1].header.summary.commits, 1);
    // The summaries know nothing of 200. Where they lead to the right object at all, its bytes decide.
    let found = find(&objects, &items, &SearchTarget::Time { time: time(120), exclusive: false }).unwrap();
    assert_eq!(found.stop, Stop::Before(over));
    let found = find(&objects, &items, &SearchTarget::Xid { xid: 2, exclusive: true }).unwrap();
    assert_eq!(found.stop, Stop::Before(over));
}

#[test]
fn a_target_before_the_range_is_refused_even_if_later_times_are_lower() {
    let wal = history(2);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let size = SegmentSize::new(MIB).unwrap();
    let system = SystemIdentifier::new(SYSTEM);
    let mut search = Search::new(&objects, size, system, items, Some(time(1_100_000))).unwrap();
    let error = now(search.find(&SearchTarget::Time { time: time(1_099_999), exclusive: false })).unwrap_err();
    assert!(matches!(error, SearchError::BeforeTime { time: found, .. } if found == time(1_100_000)), "{error}");
    assert!(error.to_string().contains(&time(1_100_000).to_string()), "{error}");
    assert!(now(search.find(&SearchTarget::Time { time: time(1_100_000), exclusive: false })).is_ok());
}

#[test]
fn parameter_changes_of_a_stretch_are_listed() {
    let mut wal = history(1);
    let one = wal.parameter_change([100, 8, 10, 0, 64, 1]);
    wal.filler(0, 2 * MIB as usize);
    let two = wal.parameter_change([50, 8, 10, 0, 64, 1]);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    for truncated in [false, true] {
        for object in &mut objects.0 {
            object.header.summary.truncated = truncated;
        }
        let list = |from, until| {
            let changes = now(search(&objects, &items).parameter_changes(from, until)).unwrap();
            changes.iter().map(|change| change.lsn).collect::<Vec<_>>()
        };
        let end = Lsn::new(wal.position());
        assert_eq!(list(wal.start, end), [one, two]);
        assert_eq!(list(wal.start, two), [one]);
        assert_eq!(list(two, end), [two]);
    }
}

#[test]
fn stored_wal_that_is_not_what_it_should_be_is_damage_not_an_answer() {
    let wal = history(4);
    let mut objects = Store::default();
    let items = store(&mut objects, &wal, &[], &[]);
    let target = SearchTarget::Lsn { lsn: Lsn::new(9 * MIB + 100_000), exclusive: false };
    let whole = objects.0[1].raw.clone();

    let mut spoiled = whole.to_vec();
    spoiled[16 * 8192] ^= 1;
    objects.0[1].raw = spoiled.into();
    let error = find(&objects, &items, &target).unwrap_err();
    assert!(matches!(error, SearchError::Page(_)) && error.is_damaged() && !error.is_unreachable());

    objects.0[1].raw = whole.slice(..50_000);
    let error = find(&objects, &items, &target).unwrap_err();
    assert!(matches!(error, SearchError::Short { .. }) && error.is_damaged());

    objects.0[1].header.start_offset = 8;
    objects.0[1].raw = whole;
    let error = find(&objects, &items, &target).unwrap_err();
    assert!(matches!(error, SearchError::WrongObject { .. }) && error.is_damaged());
}

#[test]
fn objects_with_a_hole_between_them_are_refused() {
    let wal = history(1);
    let mut objects = Store::default();
    let mut items = store(&mut objects, &wal, &[], &[]);
    items.remove(1);
    let size = SegmentSize::new(MIB).unwrap();
    let error = Search::new(&objects, size, SystemIdentifier::new(SYSTEM), items, None).err().unwrap();
    assert!(matches!(error, SearchError::NotContiguous { at } if at == Lsn::new(9 * MIB)));
    let error = Search::new(&objects, size, SystemIdentifier::new(SYSTEM), Vec::new(), None).err().unwrap();
    assert!(matches!(error, SearchError::NothingHeld));
}
