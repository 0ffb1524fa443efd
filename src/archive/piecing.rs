//! Which piece of the open segment goes to a repository next, and when.

use std::time::{Duration, Instant};

use super::tail::{Offer, Piece, TailedSegment};
use super::uploader::{Stand, Uploader};

/// Pieces on their way at the same time while the server's commits wait for them.
const PIECES_IN_FLIGHT: usize = 4;
/// How long the upload of a whole segment may take before the rest of it is sent as a piece.
const WHOLE_PATIENCE: Duration = Duration::from_secs(5);

impl Uploader {
    /// From when on a piece may be sent that nobody waits for, however few bytes it has. Cuts come at the tail's interval, and what was cut
    /// goes at once; but they come more often while commits wait for the spool: then it is the interval that counts.
    pub(super) fn piece_due(&self, stand: &Stand) -> Option<Instant> {
        let cut_for_commits = self.board.is_waited_for() && !self.durable_in_repository;
        let interval = self.tail_interval.filter(|_| cut_for_commits).unwrap_or_default();
        Some(stand.piece_sent? + self.pace.spacing().max(interval))
    }

    /// The next piece to send, if there is something new and its turn has come.
    pub(super) fn next_piece(&self, stand: &mut Stand) -> Option<Box<Piece>> {
        let is_waited_for = self.durable_in_repository && self.board.is_waited_for();
        let is_demanded = self.tail.demanded().is_some_and(|end| stand.reach < end);
        let is_urgent = is_waited_for || is_demanded || self.tail.is_ending();
        // Commits that wait need the pieces also where the tail is off, and so do a base backup and an agent that stops.
        if self.tail_interval.is_none() && !is_urgent {
            return None;
        }
        let in_flight = stand.courses.in_flight();
        if in_flight >= if is_waited_for { PIECES_IN_FLIGHT } else { 1 } {
            return None;
        }
        if stand.piece_not_before.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        let now = Instant::now();
        if !is_urgent && stand.piece_sent.is_some_and(|sent| now < sent + self.pace.spacing()) {
            return None;
        }
        let is_due = is_urgent || self.piece_due(stand).is_none_or(|due| due <= now);
        let settings = self.wal.borrow().clone()?;
        for at in self.segments_to_tail(stand, is_urgent) {
            // A timeline's history comes first (I10), and so does the list of what is there.
            if !stand.is_listed(at.segment)
                || !self.is_proven(at.segment)
                || self.backlog.lacks_history(self.shown.name(), at.segment.timeline())
            {
                return None;
            }
            let (from, until) = stand.courses.next(at.segment);
            if at.closed_for.is_none() {
                self.tail.stand(self.shown.name(), at.segment, from);
            }
            if !is_due && self.tail.bytes_from(at.segment, from) < self.tail_bytes {
                continue;
            }
            match self.tail.piece(&settings, at.segment, from, until) {
                Offer::Piece(piece) => {
                    stand.courses.sent(piece.segment, piece.start, piece.end);
                    if at.closed_for.is_none() {
                        // The next one begins where this one ends: no join may swallow that either.
                        self.tail.stand(self.shown.name(), at.segment, stand.courses.next(at.segment).0);
                    }
                    stand.piece_sent = Some(Instant::now());
                    return Some(piece);
                }
                Offer::NotACut { at: offset } if at.closed_for.is_none() => self.tail.want_cut(at.segment, offset),
                // The rest of a whole one comes with the whole.
                Offer::Nothing | Offer::NotACut { .. } => {}
            }
        }
        None
    }

    /// The open segment; and before it one that became whole meanwhile, if its beginning was sent in pieces and the upload of the whole
    /// one takes its time.
    fn segments_to_tail(&self, stand: &Stand, is_urgent: bool) -> Vec<TailedSegment> {
        let mut segments = self.tail.segments();
        segments.retain(|tailed| {
            tailed.closed_for.is_none_or(|closed_for| {
                let (next, _) = stand.courses.next(tailed.segment);
                next > 0 && next < self.segment_size.get() && (is_urgent || closed_for >= WHOLE_PATIENCE)
            })
        });
        segments
    }
}
