//! The delay before the next try: exponential, jittered, without an end. An archiver that gives up loses WAL, so nothing here ever says "stop".
//!
//! This is the only user of the `backoff` crate, which serves as a calculator of delays; sleeping is the caller's, in a `select!` with shutdown.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

/// The first delay after an ordinary failure.
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// The first delay after the store asked for a slower pace.
const FIRST_DELAY_THROTTLED: Duration = Duration::from_secs(2);
/// A delay lies within this fraction of its middle value, on either side.
const JITTER: f64 = 0.5;

/// Delays for one thing that is tried again and again. Starts at 0.2 s (2 s when throttled), doubles, ends at the bound.
#[derive(Debug)]
pub struct Backoff {
    delays: ExponentialBackoff,
    delay_max: Duration,
    attempts: u32,
}

impl Backoff {
    /// `delay_max` bounds every delay, jitter included.
    pub fn new(delay_max: Duration) -> Self {
        let delays = ExponentialBackoff {
            current_interval: FIRST_DELAY.min(delay_max),
            initial_interval: FIRST_DELAY.min(delay_max),
            randomization_factor: JITTER,
            multiplier: 2.0,
            max_interval: delay_max,
            // The crate's default ends after 15 minutes.
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        Self { delays, delay_max, attempts: 0 }
    }

    /// How long to wait after the failure just seen.
    pub fn next_delay(&mut self) -> Duration {
        self.attempts = self.attempts.saturating_add(1);
        // `None` cannot come without a maximum of elapsed time; the bound is the safe answer all the same.
        self.delays.next_backoff().unwrap_or(self.delay_max).min(self.delay_max)
    }

    /// The same when the store throttled the request: the pace falls at once, not after several refusals.
    pub fn next_delay_throttled(&mut self) -> Duration {
        self.delays.current_interval = self.delays.current_interval.max(FIRST_DELAY_THROTTLED).min(self.delay_max);
        self.next_delay()
    }

    /// After a success: the next failure starts with the first delay again.
    pub fn reset(&mut self) {
        self.attempts = 0;
        self.delays.reset();
    }

    /// Failures since the last success.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_bound_and_never_end() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        let first = backoff.next_delay();
        assert!(first >= Duration::from_millis(100) && first <= Duration::from_millis(301), "{first:?}");
        for _ in 0..1000 {
            assert!(backoff.next_delay() <= Duration::from_secs(60));
        }
        assert!(backoff.next_delay() >= Duration::from_secs(30));
        assert_eq!(backoff.attempts(), 1002);
        backoff.reset();
        assert_eq!(backoff.attempts(), 0);
        assert!(backoff.next_delay() <= Duration::from_millis(301));
    }

    #[test]
    fn delays_are_jittered() {
        let delays: std::collections::HashSet<Duration> =
            (0..20).map(|_| Backoff::new(Duration::from_secs(60)).next_delay()).collect();
        assert!(delays.len() > 1);
    }

    #[test]
    fn throttling_slows_down_at_once() {
        let mut backoff = Backoff::new(Duration::from_secs(60));
        assert!(backoff.next_delay_throttled() >= Duration::from_secs(1));
    }

    #[test]
    fn a_small_bound_holds_from_the_first_delay() {
        let mut backoff = Backoff::new(Duration::from_millis(50));
        assert!(backoff.next_delay() <= Duration::from_millis(50));
        assert!(backoff.next_delay_throttled() <= Duration::from_millis(50));
    }
}
