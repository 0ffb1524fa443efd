//! Real PostgreSQL servers, each supported major that is set up.

mod by_hand;
mod certificates;
mod check;
mod doors;
mod first_use;
pub mod hosts;
mod house;
mod pages;
mod refusals;
pub mod identity;
mod lease;
pub mod restore;
mod shipping;
mod slot;
pub mod streaming;
mod usage;
pub mod stores;
mod standby;
mod synchronous;
mod tail_cost;
pub mod timeline;
mod wal_records;
mod watched;
mod wrong_input;
