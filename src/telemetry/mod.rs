//! What is known about the agent at this moment, and its logs.
//!
//! The `Board` is where every job writes what it knows: positions, times, causes, counters. `status`, the metrics and the
//! alarms are made from a snapshot of it, so that a scrape asks neither the server nor a store. The board observes; it never
//! steers, it never does I/O, and what nobody wrote is unknown (`null`), never guessed.
//!
//! "Healthy" needs proof of progress (I19): a cause is raised not only by failures that a job reports, but also when
//! positions are unknown or stand still behind the server (`alert`).

mod alert;
mod board;
mod cause;
mod clock;
mod counters;
mod facts;
mod logging;
mod metrics;
mod progress;
mod repository;
mod snapshot;
mod status;

pub use alert::{AlertSettings, Verdict, evaluate};
pub use board::{Board, BoardRepository, BoardSetup};
pub use cause::{Cause, CauseCode};
pub use clock::{Clock, SystemClock};
pub use facts::{BackupFacts, GapFact, SlotFacts};
pub use logging::{LogFormat, LogSettings, start_logging};
pub use progress::Distance;
pub use repository::RepositoryBoard;
pub use snapshot::{RepositorySnapshot, Snapshot};
pub use status::{CauseJson, GapJson, LastBackupJson, QueueJson, RepositoryJson, SlotJson, StatusJson};

#[cfg(test)]
mod tests;
