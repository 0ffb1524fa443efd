//! A target becomes a plan, a plan becomes a data directory, and `wal-fetch` serves PostgreSQL while it recovers.
//!
//! - **Plans first** (I5): backup, branch, exact cut and every needed object are resolved and checked before a byte is written. What
//!   cannot be reached is refused, and the windows that can be are named.
//! - Reads the repository alone: neither the agent nor its spool nor the server that was archived.
//! - Writes below the new data directory and the tablespaces' directories only, through directory handles, following no link
//!   (I17). `global/pg_control` is written last: a restore that was interrupted cannot be started.
//! - Every restore that replays anything sets a recovery target, so that PostgreSQL itself refuses to open too early; the exit
//!   statuses of `wal-fetch` are the second line of defence (I12).

mod configure;
mod directory;
mod error;
mod fetch;
mod frozen;
#[doc(hidden)]
pub mod fuzzing;
mod manifest;
mod places;
mod plan;
mod plan_file;
mod quoting;
mod resolve;
mod search;
mod source;
mod start;
mod tar;
mod target;
mod target_time;
mod volume;
mod wal_fetch;
mod windows;

pub use configure::{
    ArchiveMode, CommandLine, ConfigSource, Configuration, configuration_lines, settings, written_files,
};
pub use error::{RestoreError, repository_exit_code};
pub use fetch::{FetchProgress, RestoreOptions, Restored, check_places, restore};
pub use places::{TablespaceMap, refuse_occupied, tablespaces};
pub use plan::{RecoveryStop, target_settings};
pub use plan_file::{PLAN_FILE, PlanFile};
pub use quoting::{config_quoted, restore_command_path, shell_quoted};
pub use resolve::{Plan, plan};
pub use start::{StartOptions, check_can_start, start};
pub use target::{Request, Target, TargetAction};
pub use target_time::parse_target_time;
pub use wal_fetch::{FetchOutcome, FetchRequest, wal_fetch};
pub use windows::windows;
