use super::super::objects::tests::{backup, time};
use super::*;
use crate::failure::NextStep;
use crate::repository::{BackupId, FORMAT, LEASE_TTL, LeaseAttempt, LeaseHolder, LeaseSeeker, Repository, StoredPart};
use crate::seal::{Checksum, Encoder, ObjectKind};
use crate::storage::faulty::{Effect, FaultPlan, FaultyStore, Operation, Rule};
use crate::storage::{ObjectStore, open_local};
use crate::wal::{Summary, SystemIdentifier};

pub(crate) const SYSTEM: SystemIdentifier = SystemIdentifier::new(7_000_000_000_000_000_001);

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn segment(number: u64) -> SegmentName {
    SegmentName::holding(TimelineId::FIRST, Lsn::new(number << 20), size())
}

/// Seals `raw` as the bytes of `segment` from `start` on.
pub(crate) fn seal(segment: SegmentName, start: u64, raw: &[u8], compression: Compression) -> SealedObject {
    seal_with(segment, start, raw, compression, 0, Summary::default())
}

/// The same, with what the object says about the bytes before it and about its records.
pub(crate) fn seal_with(
    segment: SegmentName,
    start: u64,
    raw: &[u8],
    compression: Compression,
    prefix_crc32: u32,
    summary: Summary,
) -> SealedObject {
    let mut encoder = Encoder::new(compression, 0).unwrap();
    let mut body = Encoder::prefix(compression).to_vec();
    encoder.write(raw, &mut body).unwrap();
    encoder.cut(&mut body).unwrap();
    body.extend_from_slice(Encoder::suffix(compression));
    let mut sums = Checksum::default();
    sums.update(raw);
    let whole = raw.len() as u64 == segment.size().get();
    let header = ObjectHeader {
        format: 1,
        kind: if whole { ObjectKind::Segment } else { ObjectKind::Piece },
        system_identifier: SYSTEM,
        timeline: segment.timeline(),
        segment: segment.to_string(),
        segment_size: segment.size(),
        start_offset: start,
        end_offset: start + raw.len() as u64,
        raw_size: raw.len() as u64,
        raw_crc32: sums.crc32,
        raw_crc32c: sums.crc32c,
        prefix_crc32,
        stored_size: 0,
        body_crc32: crc32fast::hash(&body),
        compression,
        server_version: None,
        summary,
        overflow: None,
    };
    let frames = header.frame(body.len() as u64);
    let object = [&frames.head[..], &body, &frames.tail].concat();
    SealedObject {
        size: object.len() as u64,
        crc32: crc32fast::hash(&object),
        body: Body::Bytes(object.into()),
        compression,
    }
}

fn raw(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| ((n * 31 + seed) / 7 % 251) as u8).collect()
}

pub(crate) async fn writer(root: &std::path::Path) -> RepositoryWriter {
    writer_to(open_local(root.join("repository"))).await
}

async fn faulty_writer(root: &std::path::Path) -> (RepositoryWriter, FaultPlan) {
    let plan = FaultPlan::new();
    (writer_to(FaultyStore::new(open_local(root.join("repository")), plan.clone())).await, plan)
}

async fn writer_to(store: Arc<dyn ObjectStore>) -> RepositoryWriter {
    let repository = Repository::new("main", "main", store).unwrap();
    let archive = repository.bind(SYSTEM);
    archive.store().probe("main/walden-check/").await.unwrap();
    let holder = LeaseHolder { agent: "agent".into(), host: "host".into() };
    match LeaseSeeker::new(archive.clone(), holder, LEASE_TTL).try_take().await.unwrap() {
        LeaseAttempt::Taken(lease) => RepositoryWriter::new(archive, lease),
        LeaseAttempt::HeldByOther { .. } => panic!("the lease is free"),
    }
}

fn whole(segment: SegmentName, compression: Compression) -> WalObject {
    WalObject { segment, kind: WalObjectKind::Segment, compression, valid_until: segment.end() }
}

#[tokio::test]
async fn a_segment_is_stored_once_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(1, 1 << 20);
    let sealed = seal(segment(3), 0, &bytes, Compression::Lz4);
    let first = writer.put_segment(segment(3), &sealed).await.unwrap();
    assert_eq!(first.written, Written::Created);
    assert!(writer.read_back(&first).await.unwrap());
    let again = writer.put_segment(segment(3), &sealed).await.unwrap();
    assert_eq!(again, Stored { written: Written::AlreadyThere, ..first.clone() });
    assert!(!writer.read_back(&Stored { crc32: first.crc32 ^ 1, ..first }).await.unwrap());
    let mut read = Vec::new();
    let object = whole(segment(3), Compression::Lz4);
    let header = writer
        .archive()
        .read_wal(&object, |b| {
            read.extend_from_slice(b);
            Ok(())
        })
        .await
        .unwrap();
    assert_eq!(read, bytes);
    assert_eq!(writer.archive().header(&object).await.unwrap(), header);
}

#[tokio::test]
async fn the_same_wal_compressed_otherwise_is_no_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(1, 1 << 20);
    let lz4 = writer.put_segment(segment(3), &seal(segment(3), 0, &bytes, Compression::Lz4)).await.unwrap();
    let zstd = writer.put_segment(segment(3), &seal(segment(3), 0, &bytes, Compression::Zstd)).await.unwrap();
    assert_eq!(zstd, Stored { written: Written::AlreadyThere, ..lz4 });
    let keys = writer.archive().list(&writer.archive().keys().wal_prefix(), None).await.unwrap();
    assert_eq!(keys.len(), 1);
}

#[tokio::test]
async fn other_wal_under_the_same_name_is_a_conflict_at_the_first_differing_byte() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(1, 1 << 20);
    writer.put_segment(segment(3), &seal(segment(3), 0, &bytes, Compression::Lz4)).await.unwrap();
    let mut other = bytes.clone();
    other[700_001] ^= 1;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let error = writer.put_segment(segment(3), &seal(segment(3), 0, &other, compression)).await.unwrap_err();
        assert!(error.is_conflict(), "{error}");
        let RepositoryError::Conflict { at, .. } = error else { panic!("{error}") };
        assert_eq!(at, Lsn::new((3 << 20) + 700_001));
    }
    let object = whole(segment(3), Compression::Lz4);
    let mut read = Vec::new();
    writer
        .archive()
        .read_wal(&object, |b| {
            read.extend_from_slice(b);
            Ok(())
        })
        .await
        .unwrap();
    assert_eq!(read, bytes, "the first one stays");
}

/// The answer to a PUT was lost, the second try meets the object, and one bit of it is changed on its way back: archiving stopped for
/// good, as at a conflict (I13, I21).
#[tokio::test]
async fn bytes_that_change_on_their_way_are_no_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let (writer, plan) = faulty_writer(folder.path()).await;
    let sealed = seal(segment(3), 0, &raw(1, 1 << 20), Compression::Lz4);
    writer.put_segment(segment(3), &sealed).await.unwrap();
    for effect in [Effect::FlipByte, Effect::Short] {
        plan.add(Rule::new(Operation::GetStream, effect).times(1));
        let error = writer.put_segment(segment(3), &sealed).await.unwrap_err();
        assert!(!error.is_conflict() && error.next_step() == NextStep::Retry, "{effect:?}: {error}");
        plan.clear();
        assert_eq!(writer.put_segment(segment(3), &sealed).await.unwrap().written, Written::AlreadyThere);
    }
    let (two, text) = (TimelineId::new(2).unwrap(), b"1\t0/300000\tno recovery target specified\n");
    writer.put_history(two, text).await.unwrap();
    plan.add(Rule::new(Operation::Get, Effect::FlipByte).times(1).keys(".history"));
    assert_eq!(writer.put_history(two, text).await.unwrap().written, Written::AlreadyThere);
    assert_eq!(plan.hits(), 3);
}

/// Our own copy is flipped while its object is stored already: it is fetched again, and no conflict (D4 of the failure table).
#[tokio::test]
async fn a_damaged_copy_of_ours_is_no_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(1, 1 << 20);
    writer.put_segment(segment(3), &seal(segment(3), 0, &bytes, Compression::Lz4)).await.unwrap();
    // Under the other suffix it is compared before it is sent.
    let good = seal(segment(3), 0, &bytes, Compression::Zstd);
    let Body::Bytes(object) = &good.body else { panic!("it is in memory") };
    let mut flipped = object.to_vec();
    let at = HEADER_LEN + (flipped.len() - HEADER_LEN) / 2;
    flipped[at] ^= 1;
    let file = folder.path().join("spooled");
    std::fs::write(&file, &object[..object.len() - 100]).unwrap();
    let short = Body::SealedFile { path: file, length: good.size, goes: false };
    for body in [Body::Bytes(flipped.into()), short] {
        let error = writer.put_segment(segment(3), &SealedObject { body, ..good.clone() }).await.unwrap_err();
        assert!(matches!(error, RepositoryError::LocalDamaged { .. }), "{error}");
        assert_eq!(error.next_step(), NextStep::FetchAgain);
    }
}

/// Bytes that are no object of ours under a name of ours were called damage, which stopped archiving under the wrong cause (I2).
#[tokio::test]
async fn whatever_lies_under_the_name_is_a_conflict_and_stays() {
    let whole = seal(segment(3), 0, &raw(1, 1 << 20), Compression::Lz4);
    let other = seal(segment(4), 0, &raw(1, 1 << 20), Compression::Lz4);
    let (Body::Bytes(whole_bytes), Body::Bytes(other)) = (&whole.body, &other.body) else { panic!("in memory") };
    let garbage = Bytes::from(raw(9, 100_000));
    for there in [garbage, Bytes::new(), whole_bytes.slice(..whole_bytes.len() / 2), other.clone()] {
        let folder = tempfile::tempdir().unwrap();
        let writer = writer(folder.path()).await;
        let key = writer.archive().keys().segment(segment(3), Compression::Lz4);
        let crc32 = crc32fast::hash(&there);
        writer.archive().store().put_new(&key, &Body::Bytes(there.clone()), crc32).await.unwrap();
        let error = writer.put_segment(segment(3), &whole).await.unwrap_err();
        assert!(matches!(error, RepositoryError::Occupied { .. }) && error.is_conflict(), "{error}");
        assert!(writer.archive().get(&key, u64::MAX).await.unwrap() == there);
    }
}

/// One gap's record that cannot be read disabled list, restore and the upload, though its name says what is lost (I3).
#[tokio::test]
async fn a_gap_whose_record_is_damaged_is_told_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    writer.put_segment(segment(3), &seal(segment(3), 0, &raw(1, 1 << 20), Compression::Lz4)).await.unwrap();
    let two = TimelineId::new(2).unwrap();
    let json = |from: u64| {
        let (since, reason) = (time("2026-11-20T00:00:00Z"), "lost".into());
        let (from_lsn, to_lsn) = (Lsn::new(from), Lsn::new(99));
        Gap { format: FORMAT, system_identifier: SYSTEM, timeline: two, from_lsn, to_lsn, since, reason }.to_json()
    };
    let good = Bytes::from(json(1));
    let newer = Bytes::from(String::from_utf8(json(1)).unwrap().replace("\"format\": 1", "\"format\": 7"));
    let records = [(1, good.clone()), (2, good.slice(..20)), (3, Bytes::new()), (4, good), (5, newer)];
    for (from, record) in &records {
        let key = writer.archive().keys().gap(two, Lsn::new(*from), Lsn::new(99));
        let body = Body::Bytes(record.clone());
        writer.archive().store().put_new(&key, &body, crc32fast::hash(record)).await.unwrap();
    }
    let catalog = writer.archive().catalog().await.unwrap();
    let told: Vec<u64> = catalog.gaps.iter().map(|gap| gap.from_lsn.get()).collect();
    assert_eq!(told, [1, 2, 3, 4, 5]);
    assert!(catalog.gaps.iter().all(|gap| gap.timeline == two && gap.to_lsn == Lsn::new(99)));
    assert_eq!(catalog.complaint_count, 4, "{:?}", catalog.complaints);
}

#[tokio::test]
async fn what_is_not_its_name_is_never_sent() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let sealed = seal(segment(3), 0, &raw(1, 1 << 20), Compression::Lz4);
    let error = writer.put_segment(segment(4), &sealed).await.unwrap_err();
    assert!(matches!(error, RepositoryError::LocalIdentity { .. }), "{error}");
    assert_eq!(error.next_step(), NextStep::FetchAgain);
    assert!(writer.archive().list(&writer.archive().keys().wal_prefix(), None).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_archived_position_stops_at_the_first_hole() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    for number in [3, 4, 6] {
        let sealed = seal(segment(number), 0, &raw(number, 1 << 20), Compression::Lz4);
        writer.put_segment(segment(number), &sealed).await.unwrap();
    }
    let tail = raw(5, 0x3000);
    let sealed = seal(segment(5), 0, &tail[..0x1000], Compression::Lz4);
    writer.put_piece(segment(5), 0, 0x1000, &sealed).await.unwrap();
    let sealed = seal(segment(5), 0x1000, &tail[0x1000..], Compression::Lz4);
    writer.put_piece(segment(5), 0x1000, 0x3000, &sealed).await.unwrap();

    let archived = writer.archived_from(TimelineId::FIRST, Lsn::new((3 << 20) + 77), size()).await.unwrap();
    assert_eq!(archived.end, Lsn::new((5 << 20) + 0x3000));
    assert_eq!(archived.beyond.len(), 1);
    let archived = writer.archived_from(TimelineId::FIRST, Lsn::new(2 << 20), size()).await.unwrap();
    assert_eq!(archived.end, Lsn::new(2 << 20));

    // Pieces go only once the whole segment is there.
    assert!(writer.delete_pieces(segment(5)).await.is_err());
    let sealed = seal(segment(5), 0, &raw(5, 1 << 20), Compression::Lz4);
    writer.put_segment(segment(5), &sealed).await.unwrap();
    assert_eq!(writer.delete_pieces(segment(5)).await.unwrap(), 2);
    let archived = writer.archived_from(TimelineId::FIRST, Lsn::new(3 << 20), size()).await.unwrap();
    assert_eq!(archived, ArchivedWal { end: Lsn::new(7 << 20), beyond: vec![] });
}

#[tokio::test]
async fn histories_gaps_and_coverage_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let two = TimelineId::new(2).unwrap();
    let text = b"1\t0/300000\tno recovery target specified\n";
    assert_eq!(writer.put_history(two, text).await.unwrap().written, Written::Created);
    assert_eq!(writer.put_history(two, text).await.unwrap().written, Written::AlreadyThere);
    assert!(writer.put_history(two, b"1\t0/400000\tx\n").await.unwrap_err().is_conflict());
    assert_eq!(writer.archive().history(two).await.unwrap().unwrap(), text.as_slice());
    assert!(writer.archive().history(TimelineId::new(3).unwrap()).await.unwrap().is_none());

    let now = time("2026-11-20T00:00:00Z");
    let gap = Gap {
        format: FORMAT,
        system_identifier: SYSTEM,
        timeline: two,
        from_lsn: Lsn::new(1),
        to_lsn: Lsn::new(9),
        since: now,
        reason: "lost".into(),
    };
    assert_eq!(writer.put_gap(&gap).await.unwrap(), Written::Created);
    assert_eq!(writer.put_gap(&gap).await.unwrap(), Written::AlreadyThere);
    let mut coverage = Coverage {
        format: FORMAT,
        system_identifier: SYSTEM,
        timeline: two,
        complete_until: now,
        archived_lsn: Lsn::new(9),
        updated: now,
    };
    writer.put_coverage(&coverage).await.unwrap();
    coverage.archived_lsn = Lsn::new(10);
    writer.put_coverage(&coverage).await.unwrap();
    writer.put_segment(segment(3), &seal(segment(3), 0, &raw(1, 1 << 20), Compression::Zstd)).await.unwrap();

    let catalog = writer.archive().catalog().await.unwrap();
    assert_eq!(catalog.segment_size, Some(size()), "learnt from a header");
    assert_eq!(catalog.coverage, Some(coverage));
    assert_eq!(catalog.gaps, vec![gap]);
    assert!(catalog.history(two).is_some());
    assert_eq!(catalog.complaint_count, 0, "{:?}", catalog.complaints);
}

#[tokio::test]
async fn a_backup_exists_once_its_last_object_does() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let id = BackupId::parse("20261120T020000Z-full").unwrap();
    let backups = writer.archive().backup_writer(id.clone()).await.unwrap();
    let (bytes, manifest) = (Bytes::from_static(b"a volume"), Bytes::from_static(b"a manifest"));
    let part = |key: &str, bytes: &Bytes| StoredPart {
        key: key.into(),
        raw_bytes: 10,
        stored_bytes: bytes.len() as u64,
        raw_crc32: 0,
        stored_crc32: crc32fast::hash(bytes),
    };
    let mut json = backup("20261120T020000Z-full", 0x10_0028, 0x20_0100);
    json.volumes = vec![part("volumes/000001.tar.lz4", &bytes)];
    json.manifest = Some(part("backup_manifest.lz4", &manifest));
    let put = |name: &'static str, bytes: &Bytes| {
        let (body, size, crc32) = (Body::Bytes(bytes.clone()), bytes.len() as u64, crc32fast::hash(bytes));
        let backups = backups.clone();
        async move { backups.put(name, &body, size, crc32).await }
    };
    assert_eq!(put("volumes/000001.tar.lz4", &bytes).await.unwrap(), Written::Created);
    assert_eq!(put("volumes/000001.tar.lz4", &bytes).await.unwrap(), Written::AlreadyThere);
    assert!(put("volumes/000001.tar.lz4", &manifest).await.is_err());
    assert!(backups.finish(&json).await.is_err(), "the manifest is missing");
    assert!(writer.archive().catalog().await.unwrap().backups.is_empty());
    // A second backup in the same second takes the next one.
    let second = writer.archive().backup_writer(id.clone()).await.unwrap();
    assert_eq!(second.id(), &id.next_second());

    put("backup_manifest.lz4", &manifest).await.unwrap();
    backups.finish(&json).await.unwrap();
    backups.finish(&json).await.unwrap();
    assert_eq!(writer.archive().catalog().await.unwrap().backups, vec![json]);
    assert!(backups.discard().await.is_err(), "a finished backup is not discarded");
}

#[tokio::test]
async fn one_system_is_chosen_and_several_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let repository = writer.archive().repository().clone();
    assert_eq!(repository.choose(None).await.unwrap().system(), SYSTEM);
    let other = SystemIdentifier::new(42);
    let error = repository.choose(Some(other)).await.unwrap_err();
    assert!(matches!(error, RepositoryError::NoSystem { .. }), "{error}");
    let body = Body::Bytes(Bytes::from_static(b"x"));
    let key = repository.bind(other).keys().lease();
    repository.store.put_new(&key, &body, crc32fast::hash(b"x")).await.unwrap();
    let error = repository.choose(None).await.unwrap_err();
    assert_eq!(error.hint(), "choose one with `--system-identifier`");
    assert_eq!(repository.choose(Some(other)).await.unwrap().system(), other);
}

/// A host that was put back went on in a segment of which pieces were stored: the whole one took their place, and they were removed (I7).
#[tokio::test]
async fn pieces_of_another_history_are_a_conflict_for_what_takes_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(1, 1 << 20);
    let put = |start: u32, end: u32| {
        let piece = seal(segment(3), start.into(), &bytes[start as usize..end as usize], Compression::Lz4);
        let writer = writer.clone();
        async move { writer.put_piece(segment(3), start, end, &piece).await.unwrap() }
    };
    let check = |raw: &[u8], compression| {
        let sealed = seal(segment(3), 0, raw, compression);
        let writer = writer.clone();
        async move { writer.check_pieces(segment(3), &sealed).await }
    };
    check(&bytes, Compression::Lz4).await.unwrap();
    for (start, end) in [(0, 1000), (1000, 200_000), (300_000, 300_001), (400_000, 500_000)] {
        put(start, end).await;
    }
    for compression in [Compression::Lz4, Compression::Zstd] {
        check(&bytes, compression).await.unwrap();
        let mut in_a_hole = bytes.clone();
        in_a_hole[250_000] ^= 1;
        check(&in_a_hole, compression).await.unwrap();
        for at in [0, 999, 1000, 199_999, 300_000, 499_999] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            let error = check(&other, compression).await.unwrap_err();
            let RepositoryError::Conflict { at: found, .. } = error else { panic!("{error}") };
            assert_eq!(found, Lsn::new((3 << 20) + at as u64));
        }
        // A timeline's last part ends before what the server that was left behind has sent.
        check(&bytes[..450_000], compression).await.unwrap();
    }
}
