//! Faults: killed at any moment, a lost state database, a store that is down, damaged objects.

mod backup;
mod burn;
mod fetch;
mod gap;
mod kill;
mod spool;
mod state;
mod stop;
mod store;

pub use kill::kill_traced;
