//! Throw-away real servers, the built binary, a ledger of what was committed, and the comparison with the server's own
//! archive. Tests are plain functions: everything here blocks, and nothing sleeps for luck (`wait_until`).
//!
//! Everything a test makes lies in its [`Stage`]; dropping that (a failed test drops it too) stops every process that
//! still lives there and removes the folder, and complains if one was left that nobody stopped.

// Each test uses a part of this only.
#![allow(dead_code, unused_imports)]

pub mod certificates;
pub mod crowd;
pub mod doors;
pub mod host;
pub mod ledger;
pub mod oracle;
pub mod parts;
pub mod postgres;
pub mod random;
pub mod repository;
pub mod s3_double;
pub mod s3_moto;
pub mod s3_proxy;
pub mod s3_tls;
pub mod sql;
pub mod stage;
pub mod wait;
pub mod walden;

/// The long runs: `make test-full`.
pub fn is_full() -> bool {
    std::env::var_os("WALDEN_TEST_FULL").is_some()
}

pub use ledger::{Entry, Ledger, Recorder};
pub use postgres::{Builder, Load, Postgres};
pub use random::Random;
pub use repository::{Kind, Store};
pub use sql::Sql;
pub use stage::Stage;
pub use wait::{eventually, wait_until};
pub use walden::{Agent, Finished, Walden, has_cause};
