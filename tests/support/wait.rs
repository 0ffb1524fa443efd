//! Waiting for something to become true, with a deadline and a name.

use std::time::{Duration, Instant};

/// Waits until `condition` holds; panics with `what` when `deadline` has passed.
#[track_caller]
pub fn wait_until(deadline: Duration, what: &str, mut condition: impl FnMut() -> bool) {
    eventually(deadline, what, || if condition() { Ok(()) } else { Err("not yet".to_owned()) })
}

/// Waits for a value; the last `Err` is shown when `deadline` has passed.
#[track_caller]
pub fn eventually<T>(deadline: Duration, what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(reason) if begun.elapsed() > deadline => {
                panic!("waited {deadline:?} in vain for: {what} (last seen: {reason})")
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
