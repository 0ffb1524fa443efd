/// A setting: its section, its name in it, and its default as TOML text. `repository` is the list of tables.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub section: &'static str,
    pub name: &'static str,
    pub default: &'static str,
}

const fn key(section: &'static str, name: &'static str, default: &'static str) -> Key {
    Key { section, name, default }
}

/// The list of repositories, the only section that may stand several times.
pub const REPOSITORY: &str = "repository";

/// Every setting that exists. What is not here is refused.
pub const KEYS: &[Key] = &[
    key("postgres", "url", r#""""#),
    key("postgres", "password_file", r#""""#),
    key("postgres", "slot", r#""walden""#),
    key("postgres", "create_slot", "true"),
    key("postgres", "application_name", r#""walden""#),
    key("postgres", "connect_timeout", r#""10s""#),
    key("postgres", "status_interval", r#""10s""#),
    key("archive", "cluster", r#""main""#),
    key("archive", "compression", r#""lz4""#),
    key("archive", "compression_level", "0"),
    key("archive", "durability", r#""spool""#),
    key("archive", "tail_interval", r#""1s""#),
    key("archive", "tail_bytes", r#""1MiB""#),
    key("archive", "stop_timeout", r#""10s""#),
    key("sync", "on_delay", r#""wait""#),
    key("sync", "max_delay", r#""30s""#),
    key("spool", "path", r#""walden-spool""#),
    key("spool", "bytes_max", r#""8GiB""#),
    key("spool", "free_bytes_min", r#""512MiB""#),
    key("state", "path", r#""walden-state""#),
    key("upload", "concurrency", "4"),
    key("upload", "request_timeout", r#""60s""#),
    key("upload", "retry_delay_max", r#""60s""#),
    key("upload", "multipart_bytes", r#""64MiB""#),
    key("backup", "schedule", r#""""#),
    key("backup", "initial", "true"),
    key("backup", "checkpoint", r#""fast""#),
    key("backup", "max_rate", "0"),
    key("backup", "volume_bytes", r#""1GiB""#),
    key("backup", "wal_timeout", r#""10m""#),
    key("restore", "jobs", "0"),
    key("restore", "fetch_timeout", r#""5m""#),
    key("alert", "lag_seconds", "300"),
    key("alert", "lag_bytes", r#""1GiB""#),
    key("alert", "rpo_seconds", "0"),
    key("alert", "slot_retained_bytes", r#""16GiB""#),
    key("metrics", "listen", r#""127.0.0.1:9847""#),
    key("log", "level", r#""info""#),
    key("log", "format", r#""text""#),
    key(REPOSITORY, "name", r#""""#),
    key(REPOSITORY, "type", r#""s3""#),
    key(REPOSITORY, "required", "true"),
    key(REPOSITORY, "single_writer", "false"),
    key(REPOSITORY, "path", r#""""#),
    key(REPOSITORY, "bucket", r#""""#),
    key(REPOSITORY, "prefix", r#""""#),
    key(REPOSITORY, "region", r#""""#),
    key(REPOSITORY, "endpoint", r#""""#),
    key(REPOSITORY, "path_style", "false"),
    key(REPOSITORY, "profile", r#""""#),
    key(REPOSITORY, "access_key_id_file", r#""""#),
    key(REPOSITORY, "secret_access_key_file", r#""""#),
    key(REPOSITORY, "session_token_file", r#""""#),
    key(REPOSITORY, "storage_class", r#""""#),
    key(REPOSITORY, "sse", r#""""#),
    key(REPOSITORY, "sse_kms_key_id", r#""""#),
    key(REPOSITORY, "ca_file", r#""""#),
];

pub fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// The section's name as it stands in the table, if it exists.
pub fn section(name: &str) -> Option<&'static str> {
    KEYS.iter().find(|key| key.section == name).map(|key| key.section)
}

/// The setting whose name is nearest to what was written. A name in another section counts as well as a misspelt one, so
/// that `bucket` under `[archive]` finds `repository.bucket`.
pub fn nearest(written: &str) -> String {
    let bare = written.rsplit('.').next().unwrap_or(written);
    let distance = |key: &Key| {
        let full = format!("{}.{}", key.section, key.name);
        edit_distance(written, &full).min(edit_distance(bare, key.name).saturating_add(1))
    };
    let key = KEYS.iter().min_by_key(|key| distance(key)).expect("there are settings");
    format!("{}.{}", key.section, key.name)
}

pub fn nearest_section(written: &str) -> &'static str {
    KEYS.iter()
        .map(|key| key.section)
        .min_by_key(|section| edit_distance(written, section))
        .expect("there are settings")
}

/// Levenshtein's distance: how many characters to insert, remove or replace. Only the first 64 characters count.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (at, from) in left.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = at + 1;
        for (column, to) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}
