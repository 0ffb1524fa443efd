//! Every door through which bytes come in from outside, each as one function that must return: whatever the bytes are, without
//! a panic, in bounded time and memory (I17).
//!
//! `make test` replays `fuzz/corpus/` through them and mutates it for a while; `cargo fuzz` does the same with coverage
//! (`fuzz/`). Where a checksum would turn every mutation away, an input's first byte may ask for it to be put right, as one
//! who writes hostile bytes would. The functions of private parsers stand in their own rooms.

mod backup;
mod settings;
mod stored;
mod wal;

pub use crate::postgres::fuzzing::{conninfo, control_file, server_answers, server_backup, server_login, server_wal};
pub use crate::restore::fuzzing::{auto_conf, plan_file, target_time};
pub use backup::{backup_manifest, server_manifest, server_tar, volume_tar};
pub use settings::{configuration, schedule};
pub use stored::{backup_json, lz4_body, names, open_segment_mark, sealed_object, small_objects, zstd_body};
pub use wal::{history, wal_pages};

/// A parser's name and how to reach it. The name is that of its target and of its corpus below `fuzz/`.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    // a server
    ("server_login", server_login),
    ("server_answers", server_answers),
    ("server_wal", server_wal),
    ("server_backup", server_backup),
    ("server_tar", server_tar),
    ("server_manifest", server_manifest),
    ("control_file", control_file),
    ("wal_pages", wal_pages),
    ("history", history),
    // a repository, the spool
    ("sealed_object", sealed_object),
    ("lz4_body", lz4_body),
    ("zstd_body", zstd_body),
    ("open_segment_mark", open_segment_mark),
    ("backup_json", backup_json),
    ("small_objects", small_objects),
    ("names", names),
    ("volume_tar", volume_tar),
    ("backup_manifest", backup_manifest),
    ("auto_conf", auto_conf),
    ("plan_file", plan_file),
    // a person
    ("configuration", configuration),
    ("schedule", schedule),
    ("conninfo", conninfo),
    ("target_time", target_time),
];
