use super::*;
use crate::seal::{Checksum, Compression};
use crate::wal::{Lsn, SegmentSize, Summary, SystemIdentifier, TimelineId};

const MIB: u64 = 1 << 20;

fn settings() -> AssemblerSettings {
    AssemblerSettings {
        system: SystemIdentifier::new(7_000_000_000_000_000_001),
        segment_size: SegmentSize::new(1 << 20).expect("1 MiB"),
        server_version: None,
        compression: Compression::Lz4,
        compression_level: 0,
    }
}

fn segment(number: u64) -> SegmentName {
    SegmentName::holding(TimelineId::FIRST, Lsn::new(number * MIB), settings().segment_size)
}

fn stretch(start: u64, end: u64) -> Stretch {
    let raw = Checksum { crc32: 1, crc32c: 2, length: end - start };
    let (file_offset, body_len) = (4096 + start, end - start);
    Stretch { start, end, file_offset, body_len, body_crc32: 3, raw, summary: Summary::default() }
}

fn tail(cuts: &[u64]) -> Arc<Tail> {
    let tail = Tail::new();
    tail.begin(segment(1), "one".into());
    for pair in cuts.windows(2) {
        tail.push(segment(1), stretch(pair[0], pair[1]));
    }
    tail
}

fn offer(tail: &Tail, from: u64, until: Option<u64>) -> String {
    match tail.piece(&settings(), segment(1), from, until) {
        Offer::Nothing => "nothing".into(),
        Offer::NotACut { at } => format!("not at {at}"),
        Offer::Piece(piece) => format!("{}-{}", piece.start, piece.end),
    }
}

#[test]
fn a_piece_takes_all_that_is_new_up_to_the_next_one() {
    let tail = tail(&[0, 10, 20, 35]);
    assert_eq!(offer(&tail, 0, None), "0-35");
    assert_eq!(offer(&tail, 10, Some(20)), "10-20");
    assert_eq!(offer(&tail, 10, Some(40)), "10-35", "the one at 40 is not reached yet");
    assert_eq!(offer(&tail, 35, None), "nothing");
    assert_eq!(offer(&tail, 40, None), "nothing");
}

#[test]
fn what_does_not_begin_or_end_at_a_cut_is_cut_anew() {
    let tail = tail(&[0, 10, 20, 35]);
    assert_eq!(offer(&tail, 5, None), "not at 5");
    assert_eq!(offer(&tail, 0, Some(5)), "not at 5");
    assert_eq!(offer(&tail, 10, Some(30)), "not at 30");
    let recut = tail.subscribe_recut();
    tail.want_cut(segment(1), 5);
    tail.want_cut(segment(1), 5);
    assert_eq!(*recut.borrow(), 1, "it is told once");
    assert_eq!(tail.cuts(segment(1)), BTreeSet::from([5, 10, 20, 35]));
    tail.clear();
    assert_eq!(tail.cuts(segment(1)), BTreeSet::from([5]), "the next session still knows");
}

#[test]
fn joining_bounds_memory_and_leaves_every_stand() {
    let tail = tail(&[0, 1]);
    tail.stand("near", segment(1), 1000);
    tail.stand("far", segment(1), 7);
    for start in 1..4000 {
        tail.push(segment(1), stretch(start, start + 1));
    }
    let cuts = tail.cuts(segment(1));
    assert!(cuts.len() <= STRETCHES_MAX, "{}", cuts.len());
    assert!(cuts.contains(&1000) && cuts.contains(&7));
    assert_eq!(cuts.range(..7).count(), 0, "what all have is one stretch");
    assert_eq!(offer(&tail, 7, None), "7-4000");
    assert_eq!(offer(&tail, 1000, None), "1000-4000");
}

#[test]
fn a_whole_segment_stays_until_some_have_followed() {
    let tail = tail(&[0, 10]);
    tail.close(segment(1), Some(stretch(10, MIB)));
    tail.renamed(segment(1), "whole".into());
    assert_eq!(tail.segment(), None);
    tail.begin(segment(2), "two".into());
    assert_eq!(tail.segment(), Some(segment(2)));
    let Offer::Piece(rest) = tail.piece(&settings(), segment(1), 10, None) else { panic!("the rest is offered") };
    assert_eq!((rest.end, rest.path.to_str()), (MIB, Some("whole")));
    tail.push(segment(1), stretch(MIB, MIB + 1));
    assert_eq!(offer(&tail, MIB, None), "nothing", "nothing follows in a whole one");
    assert!(tail.holds(&rest));
    for next in [3, 4, 5] {
        assert!(tail.holds(&rest));
        tail.close(segment(next - 1), None);
        tail.begin(segment(next), "next".into());
    }
    let kept: Vec<_> = tail.segments().iter().map(|tailed| tailed.segment).collect();
    assert_eq!(kept, [2, 3, 4, 5].map(segment));
    assert!(!tail.holds(&rest));
}

/// A damaged open file was tried again every half second, for ever and without a word.
#[test]
fn a_piece_that_cannot_be_read_back_again_and_again_begins_the_stream_anew() {
    let tail = tail(&[0, 10]);
    let recut = tail.subscribe_recut();
    let Offer::Piece(piece) = tail.piece(&settings(), segment(1), 0, None) else { panic!("it is offered") };
    for _ in 1..UNREADABLE_MAX {
        assert!(!tail.is_unreadable(&piece) && !recut.has_changed().unwrap(), "a file that just got its name");
    }
    assert!(tail.is_unreadable(&piece) && recut.has_changed().unwrap());
    tail.clear();
    assert!(!tail.is_unreadable(&piece), "of a session that is over");
}
