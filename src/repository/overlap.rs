//! Pieces that give the same bytes twice must give the same bytes, else two histories were mixed: a conflict, never a choice.

use super::{Archive, Piece, PieceChain, RepositoryError, WalObject, WalObjectKind};
use crate::wal::{Lsn, SegmentName};

impl Archive {
    /// Compares all that is stored twice of a segment's tail, byte by byte. Does nothing but list where nothing overlaps.
    pub async fn check_overlaps(&self, segment: SegmentName) -> Result<(), RepositoryError> {
        let chain = PieceChain::of(&self.pieces(segment).await?);
        for extra in &chain.overlapping {
            let extra_raw = self.raw_piece(extra).await?;
            for piece in chain.pieces.iter().filter(|piece| *piece != extra) {
                let (start, end) = (piece.start.max(extra.start), piece.end.min(extra.end));
                if start >= end {
                    continue;
                }
                let raw = self.raw_piece(piece).await?;
                let cut = |raw: &[u8], piece: &Piece| -> Vec<u8> {
                    raw[(start - piece.start) as usize..(end - piece.start) as usize].to_vec() // u32 fits
                };
                let (one, other) = (cut(&raw, piece), cut(&extra_raw, extra));
                if let Some(at) = one.iter().zip(&other).position(|(a, b)| a != b) {
                    return Err(RepositoryError::PiecesDiffer {
                        url: self.url(),
                        first: object(piece).key(self.keys()),
                        second: object(extra).key(self.keys()),
                        at: Lsn::new(segment.start().get() + u64::from(start) + at as u64), // usize fits
                    });
                }
            }
        }
        Ok(())
    }

    /// CRC-32 of the segment's raw bytes `[0, end)`, read from a chain of pieces that may overlap.
    pub async fn prefix_crc32(&self, chain: &[Piece], end: u32) -> Result<u32, RepositoryError> {
        let mut hasher = crc32fast::Hasher::new();
        let mut done = 0u32;
        for piece in chain {
            if piece.start > done || done >= end {
                break;
            }
            let raw = self.raw_piece(piece).await?;
            let from = (done - piece.start) as usize; // u32 fits
            let to = (piece.end.min(end).saturating_sub(piece.start)) as usize; // u32 fits
            if from < to {
                hasher.update(&raw[from..to]);
                done = piece.end.min(end);
            }
        }
        Ok(hasher.finalize())
    }

    /// All of a piece; at most the size of a segment.
    async fn raw_piece(&self, piece: &Piece) -> Result<Vec<u8>, RepositoryError> {
        let mut raw = Vec::new();
        self.read_wal(&object(piece), |bytes| {
            raw.extend_from_slice(bytes);
            Ok(())
        })
        .await?;
        Ok(raw)
    }
}

fn object(piece: &Piece) -> WalObject {
    WalObject {
        segment: piece.segment,
        kind: WalObjectKind::Piece { start: piece.start, end: piece.end },
        compression: piece.compression,
        valid_until: piece.end_lsn(),
    }
}
