use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::wal::Lsn;

/// Where WAL bytes are counted.
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
