//! File, environment and flags become one checked `Settings`.
//!
//! The order is flag, environment, file, default. Everything is checked at the start: an unknown key, a value out of its
//! range or two settings that exclude each other end the command with exit code 2 and say where the value came from.
//! This room reads one file and nothing else; it opens no connection and creates nothing. Secrets are not settings: they
//! come from files that are named here, or from the environment of the libraries that need them. Only a connection URL may
//! hold one, so it is a type that cannot be printed.

mod effective;
mod error;
mod keys;
mod raw;
mod reader;
mod repository;
mod schedule;
mod sections;
mod settings;
mod sources;
mod value;

pub use error::ConfigError;
pub use keys::{KEYS, Key};
pub use raw::Origin;
pub use schedule::Schedule;
pub use settings::{
    ArchiveSettings, BackupSettings, Checkpoint, ConnectionUrl, Durability, MetricsSettings, OnDelay, PostgresSettings,
    RepositorySettings, RestoreSettings, S3Options, Settings, SpoolSettings, StateSettings, StoreSettings,
    SyncSettings, UploadSettings,
};
pub use sources::{QuickSettings, Sources};

#[cfg(test)]
mod tests;
