//! Real PostgreSQL servers, each supported major that is set up.

mod by_hand;
mod check;
mod first_use;
mod house;
mod refusals;
pub mod restore;
pub mod streaming;
mod usage;
mod stores;
mod timeline;
mod wal_records;
mod watched;
mod wrong_input;
