use std::time::{Duration, Instant};

use crate::wal::PgTime;

/// The two clocks of the agent's host. Tests bring their own.
pub trait Clock: Send + Sync {
    /// The time of day; it may jump. For display and for causes, never for measuring.
    fn wall(&self) -> PgTime;

    /// Time since some fixed moment; it never goes back.
    fn monotonic(&self) -> Duration;
}

#[derive(Debug)]
pub struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    pub fn new() -> Self {
        Self { origin: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> PgTime {
        PgTime::from_timestamp(jiff::Timestamp::now())
    }

    fn monotonic(&self) -> Duration {
        self.origin.elapsed()
    }
}
