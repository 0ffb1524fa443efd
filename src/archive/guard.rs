//! What the server is told while its commits wait for the repositories, and when that is given up for a while.
//!
//! PostgreSQL lets a commit return once its synchronous standbys have told a flush position at or behind it (`SyncRepReleaseWaiters`
//! in `src/backend/replication/syncrep.c`). A store that hangs would hang the database; the operator chooses which of the two it is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::telemetry::{Board, CauseCode};
use crate::wal::Lsn;

/// Positions remembered at most. Beyond it every second one goes, so that the age of the oldest is still known.
const WAITING_MAX: usize = 256;
/// The repositories keep up again once they need less than this part of the bound.
const KEEPS_UP: u32 = 4;

/// What becomes of commits that wait for the repositories, once they have waited too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDelay {
    /// They wait on.
    Wait,
    /// They return after the local disk has their WAL, until the repositories keep up again.
    Degrade,
}

/// Judges how long the repositories take to confirm what is durable here.
#[derive(Debug)]
pub struct SyncGuard {
    on_delay: OnDelay,
    max_delay: Duration,
    /// Durable positions that the repositories do not hold yet, and since when.
    waiting: VecDeque<(Lsn, Instant)>,
    /// Since when the guarantee is suspended, counted up to the second instant.
    degraded: Option<(Instant, Instant)>,
    /// Too long a delay was told.
    told: bool,
    /// The highest position that was told. What was said is not taken back: the slot would go back with it.
    reported: Lsn,
}

impl SyncGuard {
    pub fn new(on_delay: OnDelay, max_delay: Duration) -> Self {
        let waiting = VecDeque::new();
        Self { on_delay, max_delay, waiting, degraded: None, told: false, reported: Lsn::ZERO }
    }

    /// A session begins: another server may be told now, on another timeline. How long commits have waited is not forgotten.
    pub fn begin(&mut self, durable: Lsn) {
        self.reported = Lsn::ZERO;
        let since = self.waiting.front().map(|(_, since)| *since);
        self.waiting = since.map(|since| (durable, since)).into_iter().collect();
    }

    /// The position to tell. `archived` is what every required repository holds, `None` while that is not known.
    pub fn position(
        &mut self,
        now: Instant,
        durable: Lsn,
        archived: Option<Lsn>,
        is_waited_for: bool,
        board: &Board,
    ) -> Lsn {
        self.note(now, durable, archived);
        let delay = self.waiting.front().map_or(Duration::ZERO, |(_, since)| now.duration_since(*since));
        if let Some((_, counted)) = &mut self.degraded {
            board.count_unguarded(now.duration_since(*counted));
            *counted = now;
        }
        if !is_waited_for || delay < self.max_delay / KEEPS_UP || self.waiting.is_empty() {
            self.recover(board);
        } else if delay >= self.max_delay {
            self.tell(now, delay, board);
        }
        let confirmed = match self.degraded {
            Some(_) => durable,
            None => archived.map_or(Lsn::ZERO, |archived| archived.min(durable)),
        };
        self.reported = self.reported.max(confirmed);
        self.reported.min(durable)
    }

    /// When the delay will be too long, if nothing is confirmed before.
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.front().filter(|_| !self.told).map(|(_, since)| *since + self.max_delay)
    }

    fn note(&mut self, now: Instant, durable: Lsn, archived: Option<Lsn>) {
        while let Some((position, _)) = self.waiting.front()
            && archived.is_some_and(|archived| archived >= *position)
        {
            self.waiting.pop_front();
        }
        let is_new = self.waiting.back().is_none_or(|(last, _)| *last < durable);
        if is_new && archived.is_none_or(|archived| archived < durable) {
            self.waiting.push_back((durable, now));
        }
        if self.waiting.len() > WAITING_MAX {
            // Of each pair the later position stays with the earlier time: its age is never told too low.
            let mut thinned = VecDeque::with_capacity(WAITING_MAX);
            let mut pairs = self.waiting.iter();
            while let Some((first, since)) = pairs.next() {
                thinned.push_back((pairs.next().map_or(*first, |(second, _)| *second), *since));
            }
            self.waiting = thinned;
        }
    }

    fn tell(&mut self, now: Instant, delay: Duration, board: &Board) {
        let seconds = delay.as_secs_f64();
        match self.on_delay {
            OnDelay::Wait => {
                let message = format!(
                    "commits have waited {seconds:.0} s for the repositories and wait on (sync.on_delay = \"wait\"); see what the repositories report, or let them return with sync.on_delay = \"degrade\""
                );
                board.raise(CauseCode::SyncDelayed, message);
            }
            OnDelay::Degrade => {
                if self.degraded.is_none() {
                    self.degraded = Some((now, now));
                }
                let message = format!(
                    "the repositories have not confirmed for {seconds:.0} s (sync.max_delay is {} s): commits return once this host's disk has them, and are lost with the host; the guarantee comes back by itself, see what the repositories report",
                    self.max_delay.as_secs_f64()
                );
                board.raise(CauseCode::SyncDegraded, message);
            }
        }
        self.told = true;
    }

    fn recover(&mut self, board: &Board) {
        if self.told {
            self.told = false;
            self.degraded = None;
            board.clear(CauseCode::SyncDelayed);
            board.clear(CauseCode::SyncDegraded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{AlertSettings, BoardSetup, SystemClock};

    const SECOND: Duration = Duration::from_secs(1);

    fn board() -> Board {
        Board::new(BoardSetup {
            cluster: "main".into(),
            slot: "walden".into(),
            repositories: Vec::new(),
            alert: AlertSettings::default(),
            clock: std::sync::Arc::new(SystemClock::new()),
        })
    }

    struct Bench {
        guard: SyncGuard,
        board: Board,
        begun: Instant,
    }

    impl Bench {
        fn new(on_delay: OnDelay) -> Self {
            Self { guard: SyncGuard::new(on_delay, 10 * SECOND), board: board(), begun: Instant::now() }
        }

        fn at(&mut self, second: u32, durable: u64, archived: Option<u64>) -> u64 {
            let (durable, archived) = (Lsn::new(durable), archived.map(Lsn::new));
            self.guard.position(self.begun + SECOND * second, durable, archived, true, &self.board).get()
        }

        fn causes(&self) -> (bool, bool) {
            (self.board.is_raised(CauseCode::SyncDelayed), self.board.is_raised(CauseCode::SyncDegraded))
        }
    }

    #[test]
    fn waiting_commits_wait_on_under_an_alarm() {
        let mut bench = Bench::new(OnDelay::Wait);
        assert_eq!(bench.at(0, 100, Some(100)), 100);
        assert_eq!(bench.at(1, 200, Some(100)), 100);
        assert_eq!((bench.at(10, 300, Some(100)), bench.causes()), (100, (false, false)));
        assert_eq!((bench.at(11, 300, Some(100)), bench.causes()), (100, (true, false)));
        assert_eq!((bench.at(90, 300, Some(200)), bench.causes()), (200, (true, false)), "300 has waited as well");
        assert_eq!((bench.at(91, 300, Some(300)), bench.causes()), (300, (false, false)));
    }

    #[test]
    fn the_guarantee_is_suspended_counted_and_comes_back() {
        let mut bench = Bench::new(OnDelay::Degrade);
        assert_eq!(bench.at(0, 100, Some(100)), 100);
        assert_eq!(bench.at(1, 200, Some(100)), 100);
        assert_eq!((bench.at(11, 250, Some(100)), bench.causes()), (250, (false, true)));
        assert_eq!(bench.at(20, 400, Some(100)), 400);
        assert_eq!(bench.board.snapshot().unguarded.as_secs(), 9);
        // It keeps up again: what was told is not taken back, and nothing more is told before it is archived.
        assert_eq!((bench.at(21, 400, Some(400)), bench.causes()), (400, (false, false)));
        assert_eq!(bench.at(22, 500, Some(400)), 400);
        assert_eq!(bench.at(23, 500, Some(500)), 500);
        assert_eq!(bench.board.snapshot().unguarded.as_secs(), 10);
    }

    #[test]
    fn what_was_told_is_not_taken_back() {
        let mut bench = Bench::new(OnDelay::Degrade);
        bench.at(0, 200, Some(100));
        assert_eq!(bench.at(10, 300, Some(100)), 300);
        let board = bench.board.clone();
        let told = bench.guard.position(bench.begun + SECOND * 11, Lsn::new(300), Some(Lsn::new(100)), false, &board);
        assert_eq!(told.get(), 300, "nobody waits any more, and the slot stays where it is");
    }

    #[test]
    fn another_session_is_told_nothing_of_the_one_before() {
        let mut bench = Bench::new(OnDelay::Wait);
        assert_eq!(bench.at(0, 500, Some(500)), 500);
        bench.at(1, 600, Some(500));
        bench.guard.begin(Lsn::new(300));
        assert_eq!(bench.at(2, 400, None), 0, "what was confirmed on another timeline");
        assert_eq!((bench.at(11, 400, None), bench.causes()), (0, (true, false)), "they have waited since then");
        assert_eq!((bench.at(12, 400, Some(400)), bench.causes()), (400, (false, false)));
    }

    #[test]
    fn an_unknown_position_confirms_nothing_and_counts_as_delay() {
        let mut bench = Bench::new(OnDelay::Degrade);
        assert_eq!(bench.at(0, 100, None), 0);
        assert_eq!(bench.at(9, 100, None), 0);
        assert_eq!(bench.at(10, 100, None), 100);
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_is_not_forgotten() {
        let mut bench = Bench::new(OnDelay::Wait);
        for n in 1..=5000 {
            bench.at(1, 100 + n, Some(100));
        }
        assert!(bench.guard.waiting.len() <= WAITING_MAX);
        bench.at(11, 6000, Some(100));
        assert_eq!(bench.causes(), (true, false));
    }
}
