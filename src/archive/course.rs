//! What one repository has of the segments that are shipped in pieces, and what is on its way there.

use std::collections::BTreeMap;

use crate::repository::{Piece, PieceChain};
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ahead {
    /// On its way.
    Sent,
    /// There, behind one that is not yet.
    Stored,
    /// There since before this writer; it counts once it was sent again and found equal.
    Listed,
}

/// The pieces of one segment in one repository.
#[derive(Debug, Default)]
struct Course {
    /// Stored from 0 to here, without a hole.
    end: u64,
    /// By start; where each ends. None overlaps another.
    ahead: BTreeMap<u64, (u64, Ahead)>,
}

/// By segment. Pieces never overlap: each begins where another ends, also around those that a crash left behind a hole.
#[derive(Debug, Default)]
pub struct Courses {
    segments: BTreeMap<SegmentName, Course>,
}

impl Courses {
    /// Takes in what a listing shows of a segment.
    pub fn listed(&mut self, segment: SegmentName, pieces: &[Piece]) {
        let chain = PieceChain::of(pieces);
        let course = self.segments.entry(segment).or_default();
        course.end = course.end.max(u64::from(chain.end));
        let mut reached = course.end;
        for piece in chain.unreachable {
            let (start, end) = (u64::from(piece.start), u64::from(piece.end));
            if start >= reached {
                course.ahead.insert(start, (end, Ahead::Listed));
                reached = end;
            }
        }
    }

    /// Where the next piece begins, and where it must end at most.
    pub fn next(&self, segment: SegmentName) -> (u64, Option<u64>) {
        let Some(course) = self.segments.get(&segment) else { return (0, None) };
        let mut from = course.end;
        loop {
            match course.ahead.get(&from) {
                Some((end, Ahead::Listed)) => return (from, Some(*end)),
                Some((end, _)) => from = *end,
                None => return (from, course.ahead.range(from..).next().map(|(start, _)| *start)),
            }
        }
    }

    pub fn sent(&mut self, segment: SegmentName, start: u64, end: u64) {
        self.segments.entry(segment).or_default().ahead.insert(start, (end, Ahead::Sent));
    }

    pub fn stored(&mut self, segment: SegmentName, start: u64, end: u64) {
        let Some(course) = self.segments.get_mut(&segment) else { return };
        course.ahead.insert(start, (end, Ahead::Stored));
        while let Some((end, Ahead::Stored)) = course.ahead.get(&course.end).copied() {
            course.ahead.remove(&course.end);
            course.end = end;
        }
    }

    /// It was not stored, and will not be as it is.
    pub fn given_up(&mut self, segment: SegmentName, start: u64) {
        if let Some(course) = self.segments.get_mut(&segment)
            && matches!(course.ahead.get(&start), Some((_, Ahead::Sent)))
        {
            course.ahead.remove(&start);
        }
    }

    /// Whether one of the segment is on its way.
    pub fn is_sent(&self, segment: SegmentName) -> bool {
        let course = self.segments.get(&segment);
        course.is_some_and(|course| course.ahead.values().any(|(_, state)| *state == Ahead::Sent))
    }

    /// How many are on their way.
    pub fn in_flight(&self) -> usize {
        let sent = |course: &Course| course.ahead.values().filter(|(_, state)| *state == Ahead::Sent).count();
        self.segments.values().map(sent).sum()
    }

    /// Stored of the segment from its beginning.
    #[cfg(test)]
    fn end(&self, segment: SegmentName) -> u64 {
        self.segments.get(&segment).map_or(0, |course| course.end)
    }

    /// How far the repository reaches without a hole, if it has everything before `sealed`.
    pub fn reach(&self, timeline: TimelineId, sealed: Lsn, size: SegmentSize) -> Lsn {
        let mut reach = sealed;
        let mut segment = SegmentName::holding(timeline, sealed, size);
        while let Some(course) = self.segments.get(&segment) {
            reach = reach.max(Lsn::new(segment.start().get() + course.end));
            if course.end < size.get() {
                break;
            }
            segment = segment.next();
        }
        reach
    }

    /// Forgets segments that are stored whole.
    pub fn forget_before(&mut self, timeline: TimelineId, sealed: Lsn) {
        self.segments.retain(|segment, course| {
            let is_over = segment.timeline() < timeline || segment.end() <= sealed;
            !is_over || course.ahead.values().any(|(_, state)| *state == Ahead::Sent)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::Compression;

    const SIZE: u64 = 1 << 20;

    fn segment(number: u64) -> SegmentName {
        let size = SegmentSize::new(1 << 20).expect("1 MiB");
        SegmentName::holding(TimelineId::FIRST, Lsn::new(number * SIZE), size)
    }

    fn listed(ranges: &[(u32, u32)]) -> Courses {
        let mut courses = Courses::default();
        let pieces: Vec<Piece> = ranges
            .iter()
            .map(|&(start, end)| Piece {
                segment: segment(1),
                start,
                end,
                compression: Compression::Lz4,
                stored_bytes: 5000,
            })
            .collect();
        courses.listed(segment(1), &pieces);
        courses
    }

    #[test]
    fn pieces_are_confirmed_in_order_whatever_comes_first() {
        let (mut courses, one) = (Courses::default(), segment(1));
        for (start, end) in [(0, 10), (10, 20), (20, 30)] {
            assert_eq!(courses.next(one), (start, None));
            courses.sent(one, start, end);
        }
        assert_eq!((courses.next(one), courses.in_flight()), ((30, None), 3));
        courses.stored(one, 20, 30);
        courses.stored(one, 10, 20);
        assert_eq!((courses.end(one), courses.in_flight()), (0, 1), "the first is still on its way");
        courses.stored(one, 0, 10);
        assert_eq!((courses.end(one), courses.in_flight()), (30, 0));
    }

    #[test]
    fn one_that_was_given_up_is_sent_again_up_to_the_next() {
        let (mut courses, one) = (Courses::default(), segment(1));
        courses.sent(one, 0, 10);
        courses.sent(one, 10, 20);
        courses.given_up(one, 0);
        assert_eq!(courses.next(one), (0, Some(10)), "it may not run into the one that is on its way");
        courses.stored(one, 10, 20);
        courses.sent(one, 0, 10);
        assert_eq!(courses.next(one), (20, None));
        courses.stored(one, 0, 10);
        assert_eq!(courses.end(one), 20);
    }

    #[test]
    fn what_a_crash_left_behind_a_hole_is_joined_on_exactly() {
        let mut courses = listed(&[(0, 8), (16, 20), (20, 28), (40, 44)]);
        let one = segment(1);
        assert_eq!((courses.end(one), courses.next(one)), (8, (8, Some(16))));
        courses.sent(one, 8, 12);
        assert_eq!(courses.next(one), (12, Some(16)));
        courses.sent(one, 12, 16);
        assert_eq!(courses.next(one), (16, Some(20)), "what is there is sent again, to be compared");
        courses.sent(one, 16, 20);
        for (start, end) in [(8, 12), (12, 16), (16, 20)] {
            courses.stored(one, start, end);
        }
        assert_eq!((courses.end(one), courses.next(one)), (20, (20, Some(28))));
        courses.sent(one, 20, 28);
        assert_eq!(courses.next(one), (28, Some(40)));
    }

    #[test]
    fn the_reach_goes_on_over_a_segment_that_is_there_in_pieces() {
        let size = SegmentSize::new(1 << 20).expect("1 MiB");
        let mut courses = Courses::default();
        let reach = |courses: &Courses, sealed: u64| courses.reach(TimelineId::FIRST, Lsn::new(sealed), size).get();
        courses.sent(segment(1), 0, SIZE);
        courses.sent(segment(2), 0, 100);
        courses.stored(segment(2), 0, 100);
        assert_eq!(reach(&courses, SIZE), SIZE, "nothing of the first is there");
        courses.stored(segment(1), 0, SIZE);
        assert_eq!(reach(&courses, SIZE), 2 * SIZE + 100);
        assert_eq!(reach(&courses, 2 * SIZE), 2 * SIZE + 100);
        assert_eq!(reach(&courses, 3 * SIZE), 3 * SIZE);
        courses.forget_before(TimelineId::FIRST, Lsn::new(2 * SIZE));
        assert_eq!((courses.end(segment(1)), courses.end(segment(2))), (0, 100));
    }
}
