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

#[test]
fn what_is_held_in_pieces_begins_where_a_hole_does() {
    use crate::repository::test_support::Sketch;
    const MIB: u32 = 1 << 20;
    let first = |sketch: Sketch| {
        let catalog = sketch.done();
        let wal = &catalog.timelines[&TimelineId::FIRST];
        first_open(&catalog, TimelineId::FIRST, wal, size()).map(|first| first.get() >> 20)
    };
    let begun = || Sketch::new().segments(1, 1..4);
    assert_eq!(first(begun()), None, "no pieces");
    assert_eq!(first(begun().piece(1, 4, 0, 0x100)), Some(4));
    assert_eq!(first(begun().piece(1, 4, 0, MIB).piece(1, 5, 0, 0x100)), Some(4), "it is not stored whole yet");
    let hole = || begun().piece(1, 4, 0, 0x100).piece(1, 4, 0x200, MIB).piece(1, 5, 0, 0x100);
    assert_eq!(first(hole()), Some(4), "the host was lost with some on their way");
    assert_eq!(first(hole().gap(1, 4 * u64::from(MIB) + 0x100, 5 * u64::from(MIB))), Some(5), "the hole is told");
    assert_eq!(first(Sketch::new().piece(1, 4, 0, 0x100).piece(1, 6, 0, 0x100)), Some(6), "nothing of the one before");
}
