//! Counts what a thread allocates, so that a parser that reserves what a sender asks for is seen.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The allocator of the test binary: the system's, with a count for each thread.
pub struct Counting;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
    /// Beyond this the measured thread gets no more memory, and the process ends; the machine does not.
    static CEILING: Cell<i64> = const { Cell::new(i64::MAX) };
}

/// A measured call that passes this aborts.
const HARD_LIMIT: i64 = 2 << 30;

fn add(bytes: i64) -> bool {
    // A thread that is ending has no counters any more.
    LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        PEAK.with(|peak| peak.set(peak.get().max(live.get())));
        live.get() <= CEILING.with(Cell::get)
    })
    .unwrap_or(true)
}

fn size_of(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX / 4)
}

// SAFETY: every call is handed on to `System` as it came; counting touches plain cells and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !add(size_of(layout.size())) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !add(size_of(layout.size())) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        add(-size_of(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !add(size_of(size) - size_of(layout.size())) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs `work` and tells how many bytes it held at most on this thread, beyond what was held before.
pub fn measured<T>(work: impl FnOnce() -> T) -> (T, i64) {
    let before = LIVE.get();
    PEAK.set(before);
    CEILING.set(before + HARD_LIMIT);
    let result = work();
    CEILING.set(i64::MAX);
    (result, PEAK.get() - before)
}
