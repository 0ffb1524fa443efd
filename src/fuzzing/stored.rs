use crate::repository::{Adopted, BackupId, BackupJson, Coverage, Gap, Keys, LeaseJson, ParsedKey};
use crate::seal::{Compression, HEADER_LEN, ObjectDecoder, ObjectHeader, SealError, StreamDecoder};
use crate::spool::{Mark, parse_relative};
use crate::wal::{Lsn, SegmentName, SegmentSize, SystemIdentifier, TimelineId};

/// Enough to see that a bomb is one; whoever reads an object stops it in the same way.
const RAW_MAX: u64 = 4 << 20;

/// Either the decoder's own error, or enough.
enum Stop {
    Wrong,
    Enough,
}

impl From<SealError> for Stop {
    fn from(error: SealError) -> Self {
        assert!(!error.to_string().is_empty());
        Self::Wrong
    }
}

/// A WAL object as it comes from a store, in pieces. First byte: bit 0 puts the header's checksum right, the rest is the size
/// of the pieces.
pub fn sealed_object(bytes: &[u8]) {
    let Some((&how, object)) = bytes.split_first() else { return };
    let mut object = object.to_vec();
    if how & 1 == 1 {
        right_header(&mut object);
    }
    if let Ok(header) = ObjectHeader::parse(&object) {
        assert_eq!(header.segment_name().to_string(), header.segment);
        header.body_size();
        // What is read can be written.
        header.clone().frame(header.body_size());
    }
    let step = match how >> 1 {
        0 => object.len().max(1),
        step => usize::from(step) * 61,
    };
    let mut decoder = ObjectDecoder::new();
    let mut raw = 0;
    let mut take = |piece: &[u8]| {
        raw += piece.len() as u64;
        if raw > RAW_MAX { Err(Stop::Enough) } else { Ok(()) }
    };
    for chunk in object.chunks(step) {
        match decoder.push(chunk, &mut take) {
            Ok(()) => {}
            Err(Stop::Wrong | Stop::Enough) => return,
        }
    }
    if let Ok(header) = decoder.finish() {
        assert_eq!(header.raw_size, raw, "an object that is whole has the size that it says");
    }
}

/// The magic number, and the CRC-32C over the JSON before it; the room is padded with spaces.
fn right_header(object: &mut [u8]) {
    const KEY: &[u8] = b",\"header_crc32c\":";
    let Some(head) = object.get_mut(..HEADER_LEN) else { return };
    head[..8].copy_from_slice(&[0x57, 0x2A, 0x4D, 0x18, 0, 0x10, 0, 0]);
    let Some(at) = head.windows(KEY.len()).rposition(|window| window == KEY) else { return };
    let crc = format!("{}}}", crc32c::crc32c(&head[8..at]));
    let from = at + KEY.len();
    if from + crc.len() <= HEADER_LEN {
        head[from..].fill(b' ');
        head[from..from + crc.len()].copy_from_slice(crc.as_bytes());
    }
}

pub fn lz4_body(bytes: &[u8]) {
    body(Compression::Lz4, bytes);
}

pub fn zstd_body(bytes: &[u8]) {
    body(Compression::Zstd, bytes);
}

/// A compressed stream, whole and in pieces: both give the same. First byte: the size of the pieces.
fn body(compression: Compression, bytes: &[u8]) {
    let Some((&how, stream)) = bytes.split_first() else { return };
    let step = usize::from(how) * 3 + 1;
    let whole = decode(compression, [stream].into_iter());
    let pieced = decode(compression, stream.chunks(step));
    assert_eq!(whole, pieced, "in pieces of {step}");
}

/// The CRC-32 and length of what came out of a stream that is good.
fn decode<'a>(compression: Compression, pieces: impl Iterator<Item = &'a [u8]>) -> Option<(u32, u64)> {
    let mut decoder = StreamDecoder::new(compression, RAW_MAX).expect("a decoder");
    let mut crc = crc32fast::Hasher::new();
    for piece in pieces {
        let pushed = decoder.push::<SealError>(piece, |raw| {
            crc.update(raw);
            Ok(())
        });
        assert!(decoder.raw_size() <= RAW_MAX || pushed.is_err(), "more than was allowed");
        pushed.ok()?;
    }
    decoder.finish().ok()?;
    Some((crc.finalize(), decoder.raw_size()))
}

/// How much of an open segment is durable. The input is the JSON; room and checksum are added, and then not.
pub fn open_segment_mark(bytes: &[u8]) {
    let mut mark = [b' '; 512];
    let length = bytes.len().min(mark.len() - 4);
    mark[..length].copy_from_slice(&bytes[..length]);
    let bare = mark;
    let (content, sum) = mark.split_at_mut(508);
    sum.copy_from_slice(&crc32c::crc32c(content).to_le_bytes());
    if let Some(read) = Mark::decode(&mark) {
        assert!(read.raw_len <= read.segment_size.get());
        assert!(read.offset() < 4096);
        read.raw();
    }
    assert!(Mark::decode(&bare).is_none_or(|_| bare == mark), "a mark without its checksum");
}

pub fn backup_json(bytes: &[u8]) {
    let Ok(backup) = BackupJson::parse(bytes) else { return };
    assert!(backup.start_lsn <= backup.stop_lsn && !backup.volumes.is_empty());
    let parts = backup.volumes.iter().chain(&backup.manifest);
    assert!(parts.into_iter().all(|part| !part.key.contains("..") && !part.key.starts_with('/')));
    assert_eq!(BackupJson::parse(&backup.to_json()).ok(), Some(backup), "it is read back as it was written");
}

/// Gap, coverage, lease, adoption.
pub fn small_objects(bytes: &[u8]) {
    if let Ok(gap) = Gap::parse(bytes) {
        assert!(gap.from_lsn < gap.to_lsn);
        assert_eq!(Gap::parse(&gap.to_json()), Ok(gap));
    }
    if let Ok(coverage) = Coverage::parse(bytes) {
        assert_eq!(Coverage::parse(&coverage.to_json()), Ok(coverage));
    }
    if let Ok(lease) = LeaseJson::parse(bytes) {
        assert_eq!(LeaseJson::parse(&lease.to_json()), Ok(lease));
    }
    if let Ok(adopted) = Adopted::parse(bytes) {
        assert!(adopted.generation > 0);
        assert_eq!(Adopted::parse(&adopted.to_json()), Ok(adopted));
    }
}

/// Names of segments, timelines, backups, keys in a bucket and files in the spool: what is taken is what would be written.
pub fn names(bytes: &[u8]) {
    let Some((&how, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let size = SegmentSize::new(1 << (20 + u32::from(how) % 11)).expect("a power of two");
    if let Ok(name) = SegmentName::parse(text, size) {
        assert_eq!(name.to_string(), text);
        assert_eq!(SegmentName::holding(name.timeline(), name.start(), size), name);
        assert!(name.start() < name.end());
    }
    if let Ok(timeline) = TimelineId::from_hex(text) {
        assert_eq!(timeline.to_hex(), text);
    }
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse::<Lsn>().ok(), Some(lsn));
    }
    let _ = text.parse::<SystemIdentifier>().map(|system| assert!(system.get() > 0 || text.bytes().all(|b| b == b'0')));
    if let Ok(id) = BackupId::parse(text) {
        assert_eq!(id.to_string(), text);
        assert!(id.next_second() >= id || id.to_string().starts_with("9999"));
    }
    if let Some(name) = parse_relative(text, size) {
        assert_eq!(name.relative, text);
    }
    let keys = Keys::new("main", SystemIdentifier::new(7_000_000_000_000_000_001)).expect("good names");
    let key = format!("{}{text}", keys.root());
    let written = match ParsedKey::parse(&keys, &key, size) {
        ParsedKey::Segment { name, compression } => keys.segment(name, compression),
        ParsedKey::History { timeline } => keys.history(timeline),
        ParsedKey::Piece { segment, start, end, compression } => keys.piece(segment, start, end, compression),
        ParsedKey::BackupObject { id, name } => keys.backup_object(&id, &name),
        ParsedKey::Gap { timeline, from, to } => keys.gap(timeline, from, to),
        ParsedKey::Coverage => keys.coverage(),
        ParsedKey::Lease => keys.lease(),
        ParsedKey::Adopted => keys.adopted(),
        _ => return,
    };
    assert_eq!(written, key, "a key that is taken is one that would be written");
}
