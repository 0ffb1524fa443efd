use crate::seal::Compression;
use crate::wal::{Lsn, SegmentName};

/// A stored stretch of a segment that is (or was) not complete: the segment's bytes `[start, end)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub segment: SegmentName,
    pub start: u32,
    pub end: u32,
    pub compression: Compression,
    pub stored_bytes: u64,
}

impl Piece {
    pub fn start_lsn(&self) -> Lsn {
        Lsn::new(self.segment.start().get() + u64::from(self.start))
    }

    pub fn end_lsn(&self) -> Lsn {
        Lsn::new(self.segment.start().get() + u64::from(self.end))
    }
}

/// The pieces of one segment that follow each other from its beginning on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PieceChain {
    /// By start; each begins where the one before ends, or before that.
    pub pieces: Vec<Piece>,
    /// Bytes of the segment held, from offset 0.
    pub end: u32,
    /// Pieces that give bytes which the chain has from another piece too. Their bytes must be equal to it, and that must be
    /// looked at before the chain is trusted.
    pub overlapping: Vec<Piece>,
    /// Pieces behind a hole.
    pub unreachable: Vec<Piece>,
}

impl PieceChain {
    /// Chooses the fewest pieces that reach furthest. Order and duplicates of the input do not matter.
    pub fn of(pieces: &[Piece]) -> Self {
        let mut sorted = pieces.to_vec();
        // Of two with the same range the suffix decides, so that every reader chooses alike.
        sorted.sort_by_key(|p| (p.start, std::cmp::Reverse(p.end), p.compression.suffix()));
        sorted.dedup();
        let mut chain = Self::default();
        let mut best: Option<Piece> = None;
        for piece in sorted {
            if piece.start > chain.end {
                // Only now is it known that nothing that starts earlier reaches further than `best`.
                if let Some(piece) = best.take() {
                    chain.take(piece);
                }
            }
            if piece.start > chain.end {
                chain.unreachable.push(piece);
            } else if piece.end > best.map_or(chain.end, |b| b.end) {
                chain.overlapping.extend(best.replace(piece));
            } else {
                chain.overlapping.push(piece);
            }
        }
        if let Some(piece) = best {
            chain.take(piece);
        }
        chain
    }

    fn take(&mut self, piece: Piece) {
        if piece.start < self.end {
            self.overlapping.push(piece);
        }
        self.end = piece.end;
        self.pieces.push(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{SegmentSize, TimelineId};

    fn piece(start: u32, end: u32) -> Piece {
        let segment = SegmentName::holding(TimelineId::FIRST, Lsn::new(0x100_0000), SegmentSize::DEFAULT);
        Piece { segment, start, end, compression: Compression::Lz4, stored_bytes: 5000 }
    }

    fn chain(ranges: &[(u32, u32)]) -> (Vec<(u32, u32)>, u32, usize, usize) {
        let pieces: Vec<Piece> = ranges.iter().map(|&(start, end)| piece(start, end)).collect();
        let chain = PieceChain::of(&pieces);
        let taken = chain.pieces.iter().map(|p| (p.start, p.end)).collect();
        (taken, chain.end, chain.overlapping.len(), chain.unreachable.len())
    }

    #[test]
    fn pieces_that_follow_each_other_make_a_chain() {
        assert_eq!(chain(&[]), (vec![], 0, 0, 0));
        assert_eq!(chain(&[(8, 16), (0, 8), (16, 20)]), (vec![(0, 8), (8, 16), (16, 20)], 20, 0, 0));
    }

    #[test]
    fn a_hole_ends_the_chain() {
        assert_eq!(chain(&[(8, 16)]), (vec![], 0, 0, 1));
        assert_eq!(chain(&[(0, 8), (9, 16), (16, 20)]), (vec![(0, 8)], 8, 0, 2));
    }

    #[test]
    fn overlaps_are_named_for_comparison() {
        // The timeline's last piece, written as one from 0 on, replaces those before.
        assert_eq!(chain(&[(0, 8), (8, 16), (0, 20)]), (vec![(0, 20)], 20, 2, 0));
        assert_eq!(chain(&[(0, 8), (4, 16)]), (vec![(0, 8), (4, 16)], 16, 1, 0));
        assert_eq!(chain(&[(0, 8), (4, 12), (6, 20)]), (vec![(0, 8), (6, 20)], 20, 2, 0));
        assert_eq!(chain(&[(0, 8), (8, 12), (8, 20), (20, 24)]), (vec![(0, 8), (8, 20), (20, 24)], 24, 1, 0));
    }

    #[test]
    fn the_lsns_of_a_piece_are_those_of_its_bytes() {
        assert_eq!(piece(0x2000, 0x3000).start_lsn(), Lsn::new(0x100_2000));
        assert_eq!(piece(0x2000, 0x3000).end_lsn(), Lsn::new(0x100_3000));
    }
}
