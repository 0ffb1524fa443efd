//! One server: connection, replication messages, slots, BASE_BACKUP, SQL.
//!
//! The replication connection is a thin layer of our own: framing, start-up, authentication, physical streaming and base backups.
//! The server is not trusted (I17): every length is checked before use, and memory is bounded by this room, not by the sender.
//! Settings are libpq's, TLS and its rules for certificates included (`tls`). Nothing here decides what is acknowledged; `WalStream::send_status` sends what it is told.
//!
//! Not here: what the WAL says (`wal`), where it is kept, when to connect again.

mod answer;
mod asked;
mod base_backup;
mod conninfo;
mod control_file;
mod door;
mod error;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod hosts;
mod options;
mod replication;
mod search;
mod secret;
mod settings;
mod shown;
mod socket;
mod sql;
mod standby_names;
mod startup;
mod tls;
mod wal_stream;
mod wire;

pub use base_backup::{BackupEvent, BackupOptions, BaseBackup, Tablespace};
pub use control_file::{ControlFile, ControlFileError, DatabaseState};
pub use error::{PostgresError, ServerMessage};
pub use replication::{CreateOutcome, ReplicationConnection, SlotState, StartOutcome, SystemInfo};
pub use secret::Secret;
pub use settings::ConnectSettings;
pub use shown::shown_duration;
pub use socket::Transport;
pub use sql::{ReplicationPlaces, RoleInfo, SlotInfo, Sql};
pub use standby_names::{names_explicitly, names_standby, quorum};
pub use tls::{SslMode, TlsError};
pub use wal_stream::{EndOfStream, WalMessage, WalStream};
