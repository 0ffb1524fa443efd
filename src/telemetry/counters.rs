use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::wal::Lsn;

/// Where WAL bytes are counted, raw. The first one by message, also what came a second time; the others as their position moves on,
/// so that bytes count once however they travel: as a piece, as a segment, to several repositories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Taken from the server.
    Received,
    /// On local disk, flushed.
    Durable,
    /// In every required repository.
    Archived,
}

impl Stage {
    pub const ALL: [Stage; 3] = [Self::Received, Self::Durable, Self::Archived];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Received => "received",
            Self::Durable => "durable",
            Self::Archived => "archived",
        }
    }
}

/// A position that may be unknown, in one atomic. No transaction's WAL lies at `0/0`, so 0 stands for unknown.
#[derive(Debug, Default)]
pub struct Position(AtomicU64);

impl Position {
    // Relaxed: each position is shown for itself; nothing else is published by it.
    pub fn set(&self, position: Lsn) {
        self.0.store(position.get(), Ordering::Relaxed);
    }

    pub fn get(&self) -> Option<Lsn> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            position => Some(Lsn::new(position)),
        }
    }
}

/// Counts the bytes by which a position moves on. Where it stands first is where counting begins; going back to an earlier position,
/// after a switch of timelines, counts nothing twice.
#[derive(Debug, Default)]
pub struct Odometer {
    begun: Position,
    furthest: AtomicU64,
}

impl Odometer {
    /// The position is at `to` now. `begin` is where counting begins if this is the first call.
    pub fn moved(&self, begin: Lsn, to: Lsn) {
        // Only the first call finds 0.
        let _ = self.begun.0.compare_exchange(0, begin.get(), Ordering::Relaxed, Ordering::Relaxed);
        self.furthest.fetch_max(to.get(), Ordering::Relaxed);
    }

    /// Where counting began.
    pub fn begun(&self) -> Option<Lsn> {
        self.begun.get()
    }

    pub fn bytes(&self) -> u64 {
        let begun = self.begun.get().map_or(0, Lsn::get);
        self.furthest.load(Ordering::Relaxed).saturating_sub(begun)
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the upload histogram in seconds: a tail piece into a near store to a segment of 1 GiB over a slow line.
pub const UPLOAD_SECONDS: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Durations counted by bucket. The last bucket is what took longer than all bounds.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; UPLOAD_SECONDS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = UPLOAD_SECONDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: std::array::from_fn(|at| self.buckets[at].load(Ordering::Relaxed)),
            sum_seconds: self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6, // exact below 2^53 µs, 285 years
        }
    }
}

/// Counts by bucket, not cumulated, in the order of `UPLOAD_SECONDS` and one for the rest.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HistogramSnapshot {
    pub buckets: [u64; UPLOAD_SECONDS.len() + 1],
    pub sum_seconds: f64,
}
