use super::*;
use crate::archive::assembler::{AssemblerSettings, header_of};
use crate::disk::Disk;
use crate::seal::{Checksum, Compression, Encoder, ObjectKind};
use crate::spool::{Mark, OpenSegment};
use crate::wal::Summary;

pub(in crate::archive) const SYSTEM: SystemIdentifier = SystemIdentifier::new(7);

pub(in crate::archive) fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

pub(in crate::archive) fn segment(number: u64) -> SegmentName {
    SegmentName::holding(TimelineId::FIRST, Lsn::new(number << 20), size())
}

/// The body of the first `length` bytes of a segment that holds zeros, without its suffix, and their sums.
fn body(length: usize) -> (Vec<u8>, Checksum) {
    let raw = vec![0; length];
    let mut body = Encoder::prefix(Compression::Lz4).to_vec();
    let mut encoder = Encoder::new(Compression::Lz4, 0).unwrap();
    encoder.write(&raw, &mut body).unwrap();
    encoder.cut(&mut body).unwrap();
    let mut checksum = Checksum::default();
    checksum.update(&raw);
    (body, checksum)
}

pub(in crate::archive) fn settings() -> AssemblerSettings {
    AssemblerSettings {
        system: SYSTEM,
        segment_size: size(),
        server_version: None,
        compression: Compression::Lz4,
        compression_level: 0,
    }
}

/// A whole segment, flushed, killed before it had its name.
pub(in crate::archive) fn finish(spool: &Spool, segment: SegmentName) -> PathBuf {
    let (mut body, raw) = body(1 << 20);
    body.extend_from_slice(Encoder::suffix(Compression::Lz4));
    let path = spool.open_path(segment, Compression::Lz4);
    let mut file = OpenSegment::create(spool.disk(), &path).unwrap();
    file.append(&body).unwrap();
    let settings = settings();
    let crc = crc32fast::hash(&body);
    let header = header_of(&settings, segment, ObjectKind::Segment, 0, raw, Summary::default(), crc, 0);
    file.finish(&header.frame(body.len() as u64)).unwrap();
    path
}

/// An open segment, durable up to `length`.
fn mark(spool: &Spool, segment: SegmentName, length: usize) -> PathBuf {
    let (body, raw) = body(length);
    let path = spool.open_path(segment, Compression::Lz4);
    let mut file = OpenSegment::create(spool.disk(), &path).unwrap();
    file.append(&body).unwrap();
    file.mark(Mark {
        format: 1,
        generation: 0,
        system_identifier: SYSTEM,
        timeline: TimelineId::FIRST,
        segment: segment.to_string(),
        segment_size: size(),
        compression: Compression::Lz4,
        raw_len: raw.length,
        body_len: body.len() as u64,
        raw_crc32: raw.crc32,
        raw_crc32c: raw.crc32c,
        body_crc32: crc32fast::hash(&body),
    })
    .unwrap();
    path
}

/// A SIGKILL between a segment's last flush and its rename: the start looked at the spool before it named the segment, took it
/// for a torn one, and removed it with the open one behind it, although both had been confirmed to the server (I1, A1).
#[test]
fn a_finished_segment_without_a_name_counts_and_looking_removes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(Disk::default(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
    finish(&spool, segment(1));
    assert_eq!(name_finished(&spool, SYSTEM, size()).unwrap().len(), 1);
    let (nameless, open) = (finish(&spool, segment(2)), mark(&spool, segment(3), 300_000));

    let before = find_in_spool(&spool, SYSTEM, size()).unwrap();
    assert_eq!(before.held.unwrap().end, segment(1).end());
    assert!(nameless.exists() && open.exists(), "looking removes nothing");

    assert_eq!(name_finished(&spool, SYSTEM, size()).unwrap().len(), 1);
    let after = find_in_spool(&spool, SYSTEM, size()).unwrap();
    assert_eq!(after.held.unwrap().end, Lsn::new(segment(3).start().get() + 300_000));
    assert_eq!(after.useless, Vec::<PathBuf>::new());
}

/// Cut short below its header it was an I/O error, which is tried again for ever; it is damage, which is set aside (D4).
#[test]
fn a_sealed_file_that_is_shorter_than_its_header_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(Disk::default(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
    finish(&spool, segment(1));
    name_finished(&spool, SYSTEM, size()).unwrap();
    let name = Spool::segment(segment(1), Compression::Lz4);
    std::fs::File::options().write(true).open(spool.path_of(&name)).unwrap().set_len(100).unwrap();
    let found = find_in_spool(&spool, SYSTEM, size());
    assert!(matches!(found, Err(ArchiveError::Spool(SpoolError::Damaged { .. }))), "{found:?}");
}

#[test]
fn of_two_open_files_the_one_that_reaches_less_far_is_useless() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(Disk::default(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
    let (more, less) = (mark(&spool, segment(1), 9000), mark(&spool, segment(1), 8000));
    let found = find_in_spool(&spool, SYSTEM, size()).unwrap();
    assert_eq!(found.held.unwrap().end, Lsn::new(segment(1).start().get() + 9000));
    assert_eq!(found.useless, vec![less]);
    assert!(more.exists());
}

/// Several objects are on their way at a time, and a host may be lost in between: an agent with an empty spool began behind the hole,
/// and told the server that all before it was archived (I1, I3).
#[test]
fn what_is_held_ends_at_the_first_hole_that_is_not_told() {
    use crate::repository::test_support::Sketch;
    const MIB: u64 = 1 << 20;
    const ALL: u32 = 1 << 20;
    let whole = |sketch: Sketch| {
        let catalog = sketch.done();
        catalog.timelines.get(&TimelineId::FIRST).and_then(|wal| {
            let (begin, end) = without_a_hole(&catalog, TimelineId::FIRST, wal)?;
            Some((begin.get(), end.get()))
        })
    };
    let begun = || Sketch::new().segments(1, 1..4);
    assert_eq!(whole(Sketch::new()), None);
    assert_eq!(whole(begun()), Some((MIB, 4 * MIB)));
    assert_eq!(whole(begun().piece(1, 4, 0, 0x100)), Some((MIB, 4 * MIB + 0x100)));
    let not_whole_yet = begun().piece(1, 4, 0, ALL).piece(1, 5, 0, 0x100);
    assert_eq!(whole(not_whole_yet), Some((MIB, 5 * MIB + 0x100)));
    let hole = || begun().piece(1, 4, 0, 0x100).piece(1, 4, 0x200, ALL).piece(1, 5, 0, 0x100);
    assert_eq!(whole(hole()), Some((MIB, 4 * MIB + 0x100)), "the host was lost with some on their way");
    let told = hole().gap(1, 4 * MIB + 0x100, 4 * MIB + 0x8000).gap(1, 4 * MIB + 0x8000, 5 * MIB);
    assert_eq!(whole(told), Some((5 * MIB, 5 * MIB + 0x100)), "the hole is told");
    let behind = || begun().segments(1, 5..8).piece(1, 8, 0, 0x100);
    assert_eq!(whole(behind()), Some((MIB, 4 * MIB)), "a later segment arrived before an earlier one");
    assert_eq!(
        whole(begun().piece(1, 8, 0, 0x100)),
        Some((MIB, 4 * MIB)),
        "the tail was sent before the segments before it"
    );
    let covered = |archived| behind().coverage(1, "2026-11-20T03:00:00Z", archived);
    assert_eq!(whole(covered(4 * MIB)), Some((MIB, 4 * MIB)));
    assert_eq!(whole(covered(6 * MIB)), Some((5 * MIB, 8 * MIB + 0x100)), "it was whole once");
}
