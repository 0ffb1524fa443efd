//! The live path: receive, assemble, seal, spool, upload. One server's WAL, contiguous, into every repository.
//!
//! ```text
//! receiver (own thread) ─▶ assembler ─▶ writer ─▶ sealer (disk threads) ─▶ backlog ─▶ uploader (one task per repository)
//!     ▲                                                │                                  │
//!     └──────────────── durable position ◀─────────────┘        tail pieces ──────────────┘
//! ```
//!
//! It tells the server no position that is not durable by the chosen policy (I1); it compares what it holds with what the server sends
//! on every connection (I7); it never writes over anything (I2). It decides nothing about backups or restores.

mod archiver;
mod assembler;
mod backlog;
mod chores;
mod confirmed;
mod course;
mod closing;
mod divergence;
mod error;
mod gap;
mod guard;
mod held;
mod history;
mod hosts;
mod identity;
mod live;
mod lost;
mod pace;
mod piecing;
mod predecessors;
mod receiver;
mod room;
mod records;
mod sealer;
mod ship;
mod slot;
mod start;
mod stopping;
mod stored;
mod tail;
mod tenure;
mod turn;
mod uploader;

pub use archiver::{Archiver, ArchiverSettings, Target};
pub use error::{ArchiveError, Halt};
pub use guard::OnDelay;
pub use hosts::Streaming;
pub use live::LiveSettings;
pub use sealer::SpoolBounds;
pub use tail::TailDemand;

use error::Missing;
