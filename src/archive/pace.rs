//! How often pieces are sent to a store that asks for fewer requests (503, 429).

use std::sync::{Arc, Mutex};
use std::time::Duration;

const FIRST: Duration = Duration::from_secs(2);
const MOST: Duration = Duration::from_secs(60);

/// The time between two pieces: none, until the store complains; doubled by each complaint, halved by each piece that went well.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Mutex<Duration>>);

impl Pace {
    fn with(&self, change: impl FnOnce(Duration) -> Duration) -> Duration {
        let mut spacing = self.0.lock().expect("no one panics while holding it");
        *spacing = change(*spacing);
        *spacing
    }

    pub fn spacing(&self) -> Duration {
        self.with(|spacing| spacing)
    }

    pub fn throttled(&self) {
        self.with(|spacing| (spacing * 2).clamp(FIRST, MOST));
    }

    pub fn went_well(&self) {
        self.with(|spacing| if spacing <= FIRST { Duration::ZERO } else { spacing / 2 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stretches_under_complaints_and_comes_back() {
        let pace = Pace::default();
        let mut seen = vec![pace.spacing().as_secs()];
        for _ in 0..7 {
            pace.throttled();
            seen.push(pace.spacing().as_secs());
        }
        assert_eq!(seen, [0, 2, 4, 8, 16, 32, 60, 60]);
        let mut seen = Vec::new();
        for _ in 0..6 {
            pace.went_well();
            seen.push(pace.spacing().as_millis());
        }
        assert_eq!(seen, [30_000, 15_000, 7_500, 3_750, 1_875, 0]);
    }
}
