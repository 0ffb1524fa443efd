//! Walden streams a PostgreSQL server's WAL into a repository and gives back the database as it was at any moment.
//!
//! ```text
//! PostgreSQL ─▶ receive ─▶ assemble ─▶ seal ─▶ spool ─▶ queue ─▶ upload ─▶ repository ─▶ restore
//!     ▲                                          │                             ▲
//!     └───── durable_lsn, never ahead of it ─────┘              base backup ───┘
//! ```
//!
//! A module uses only modules declared above it, and the jobs (`archive`, `base_backup`, `restore`) never use each other.

// words
pub mod failure;
pub mod wal;
pub mod seal;
pub mod telemetry;
// places
pub mod disk;
pub mod postgres;
pub mod spool;
pub mod queue;
pub mod storage;
pub mod repository;
// jobs
pub mod archive;
pub mod base_backup;
pub mod restore;
// edges
pub mod monitor;
pub mod config;
pub mod daemon;
pub mod cli;
// for tests: every door through which bytes come in
#[doc(hidden)]
pub mod fuzzing;
