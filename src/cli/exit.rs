//! Exit codes. Scripts depend on them. `wal-fetch` has its own, in `wal_fetch`.

pub const DONE: u8 = 0;
pub const FAILED: u8 = 1;
/// Usage or configuration; a time without a zone or in a clock change.
pub const USAGE: u8 = 2;
/// The target of a restore cannot be reached.
pub const UNREACHABLE: u8 = 3;
/// Refused: non-empty directory, running server, other cluster, diverged history, lease held.
pub const REFUSED: u8 = 4;
/// A stored object is damaged or missing.
pub const DAMAGED: u8 = 5;
