use crate::wal::{
    Indexer, IndexerStart, Lsn, PAGE_SIZE, PageError, PgTime, SegmentSize, Summary, SystemIdentifier, TimelineHistory,
    TimelineId,
};

const MAGICS: [u16; 6] = [0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118];
const INPUT_MAX: usize = 64 << 10;
const TIMELINE: u32 = 3;

/// Pages and records of one stretch of WAL, read whole and in pieces: both must tell the same.
///
/// First four bytes: bit 0 puts page headers right, bit 1 starts near the end of all positions, bits 4 to 7 are the segment
/// size; the page in the segment; the size of the pieces; the version.
pub fn wal_pages(bytes: &[u8]) {
    let Some((&[how, page, step, version], wal)) = bytes.split_first_chunk::<4>() else { return };
    let size = SegmentSize::new(1 << (20 + u32::from(how >> 4) % 11)).expect("a power of two");
    let base = if how & 2 == 2 { u64::MAX - (1 << 30) + 1 } else { 7 << 30 };
    let start = base + u64::from(page) * PAGE_SIZE as u64;
    let mut wal = wal[..wal.len().min(INPUT_MAX)].to_vec();
    if how & 1 == 1 {
        right_headers(&mut wal, start, size, MAGICS[usize::from(version) % MAGICS.len()]);
    }
    let (whole, summary) = index(&[&wal], start, size);
    let step = match step {
        0 => 1,
        step => usize::from(step) * 5,
    };
    let pieces: Vec<&[u8]> = wal.chunks(step).collect();
    let (pieced, same) = index(&pieces, start, size);
    assert_eq!(whole, pieced, "in pieces of {step}");
    if whole.is_ok() {
        assert_eq!(summary, same, "in pieces of {step}");
    } else {
        // Where the error was seen, what went before it counts.
        assert_eq!((summary.records, summary.last_commit), (same.records, same.last_commit), "in pieces of {step}");
    }
    // Every summary is written into an object's header.
    serde_json::to_vec(&summary).expect("plain data serialises");
}

fn index(pieces: &[&[u8]], start: u64, size: SegmentSize) -> (Result<(), PageError>, Summary) {
    let mut indexer = Indexer::new(IndexerStart {
        timeline: TimelineId::new(TIMELINE).expect("a timeline"),
        position: Lsn::new(start),
        segment_size: size,
        system_identifier: None,
        branch_max_time: Some(PgTime::from_pg_micros(0)),
    });
    let result = pieces.iter().try_for_each(|piece| indexer.feed(piece));
    let summary = indexer.cut();
    if result.is_ok() {
        let fed: usize = pieces.iter().map(|piece| piece.len()).sum();
        assert_eq!(indexer.position().get(), start + fed as u64, "every byte is taken");
    }
    (result, summary)
}

/// What a page must have to be read at all; whether a record goes on in it, and how far, stays as it is.
fn right_headers(wal: &mut [u8], start: u64, size: SegmentSize, magic: u16) {
    for (index, page) in wal.chunks_mut(PAGE_SIZE).enumerate() {
        let position = start + (index * PAGE_SIZE) as u64;
        let long = position.is_multiple_of(size.get());
        if page.len() < if long { 40 } else { 24 } {
            return;
        }
        page[0..2].copy_from_slice(&magic.to_le_bytes());
        page[2] = page[2] & !2 | if long { 2 } else { 0 };
        page[3] = 0;
        page[4..8].copy_from_slice(&TIMELINE.to_le_bytes());
        page[8..16].copy_from_slice(&position.to_le_bytes());
        if long {
            page[24..32].copy_from_slice(&SystemIdentifier::new(42).get().to_le_bytes());
            page[32..36].copy_from_slice(&u32::try_from(size.get()).expect("at most 1 GiB").to_le_bytes());
            page[36..40].copy_from_slice(&u32::try_from(PAGE_SIZE).expect("8192").to_le_bytes());
        }
    }
}

/// A timeline's history: its ranges follow each other, and say the same as asking for a position.
pub fn history(bytes: &[u8]) {
    for timeline in [5, u32::MAX] {
        let timeline = TimelineId::new(timeline).expect("a timeline");
        let Ok(history) = TimelineHistory::parse(timeline, bytes) else { continue };
        let mut begin = Lsn::ZERO;
        for ancestor in history.ancestors() {
            assert!(ancestor.timeline < timeline);
            assert_eq!(history.range_of(ancestor.timeline), Some((begin, Some(ancestor.switch))));
            if begin < ancestor.switch {
                assert_eq!(history.timeline_at(begin), ancestor.timeline);
            }
            begin = ancestor.switch;
        }
        assert_eq!(history.range_of(timeline), Some((begin, None)));
        assert_eq!(
            history.timeline_at(Lsn::new(u64::MAX)),
            if begin.get() == u64::MAX { timeline } else { history.timeline_at(begin) }
        );
    }
}
