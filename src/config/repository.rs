use std::collections::BTreeSet;
use std::path::Path;

use super::error::ConfigError;
use super::keys::REPOSITORY;
use super::raw::Section;
use super::reader::Reader;
use super::settings::{RepositorySettings, S3Options, StoreSettings};

/// The local repository that is used when none is given.
const PATH_DEFAULT: &str = "walden-archive";

/// What belongs to S3 only.
const S3_NAMES: [&str; 13] = [
    "bucket",
    "prefix",
    "region",
    "endpoint",
    "path_style",
    "profile",
    "access_key_id_file",
    "secret_access_key_file",
    "session_token_file",
    "storage_class",
    "sse",
    "sse_kms_key_id",
    "ca_file",
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Local,
    S3,
}

/// All repositories in their order; one in a local directory if none is given.
pub fn read(given: &[Section], base: &Path) -> Result<Vec<RepositorySettings>, ConfigError> {
    if given.is_empty() {
        let store = StoreSettings::Local { path: base.join(PATH_DEFAULT) };
        return Ok(vec![RepositorySettings { name: "local-1".into(), required: true, single_writer: false, store }]);
    }
    let mut names = BTreeSet::new();
    let mut repositories = Vec::new();
    for (at, section) in given.iter().enumerate() {
        let read = Reader::new(REPOSITORY, Some(section), base);
        let repository = read_one(&read, at + 1)?;
        if !names.insert(repository.name.clone()) {
            return Err(read.wrong("name", format!("\"{}\" is the name of another repository", repository.name)));
        }
        repositories.push(repository);
    }
    if !repositories.iter().any(|repository| repository.required) {
        let why = "no repository is required, so no WAL would ever count as archived; set repository.required = true for one of them";
        return Err(ConfigError::Together { why: why.into() });
    }
    Ok(repositories)
}

fn read_one(read: &Reader, number: usize) -> Result<RepositorySettings, ConfigError> {
    // A table that has a path and no bucket can only mean a local directory.
    let kind = if !read.is_given("type") && read.is_given("path") && !read.is_given("bucket") {
        Kind::Local
    } else {
        read.word("type", &[("local", Kind::Local), ("s3", Kind::S3)])?
    };
    let name = match read.optional_text("name")? {
        Some(name) => name,
        None if kind == Kind::Local => format!("local-{number}"),
        None => format!("s3-{number}"),
    };
    let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    if name.len() > 63 || !name.bytes().all(is_word) {
        return Err(read.wrong("name", "must have at most 63 letters, digits, dots, dashes and underscores"));
    }
    let store = match kind {
        Kind::Local => local(read)?,
        Kind::S3 => StoreSettings::S3(Box::new(s3(read)?)),
    };
    Ok(RepositorySettings { name, required: read.flag("required")?, single_writer: read.flag("single_writer")?, store })
}

fn local(read: &Reader) -> Result<StoreSettings, ConfigError> {
    if let Some(name) = S3_NAMES.iter().find(|name| read.is_given(name)) {
        return Err(read.wrong(name, "belongs to type \"s3\", and this repository is \"local\""));
    }
    if !read.is_given("path") {
        return Err(read.wrong("path", "is missing: a local repository needs the path of its directory"));
    }
    Ok(StoreSettings::Local { path: read.path("path")? })
}

fn s3(read: &Reader) -> Result<S3Options, ConfigError> {
    if read.optional_text("path")?.is_some() {
        return Err(read.wrong("path", "belongs to type \"local\", and this repository is \"s3\""));
    }
    let options = S3Options {
        bucket: bucket(read)?,
        prefix: prefix(read)?,
        region: read.optional_text("region")?,
        endpoint: endpoint(read)?,
        path_style: read.flag("path_style")?,
        profile: read.optional_text("profile")?,
        access_key_id_file: read.optional_path("access_key_id_file")?,
        secret_access_key_file: read.optional_path("secret_access_key_file")?,
        session_token_file: read.optional_path("session_token_file")?,
        storage_class: read.optional_text("storage_class")?,
        sse: read.optional_text("sse")?,
        sse_kms_key_id: read.optional_text("sse_kms_key_id")?,
        ca_file: read.optional_path("ca_file")?,
    };
    if options.access_key_id_file.is_some() != options.secret_access_key_file.is_some() {
        return Err(read.wrong("access_key_id_file", "and secret_access_key_file must be given together"));
    }
    if options.session_token_file.is_some() && options.access_key_id_file.is_none() {
        return Err(read.wrong("session_token_file", "needs access_key_id_file and secret_access_key_file"));
    }
    if options.profile.is_some() && options.access_key_id_file.is_some() {
        return Err(read.wrong("profile", "and access_key_id_file exclude each other"));
    }
    match options.sse.as_deref() {
        None | Some("AES256" | "aws:kms") => {}
        Some(_) => return Err(read.wrong("sse", "must be \"AES256\", \"aws:kms\" or \"\"")),
    }
    if options.sse_kms_key_id.is_some() && options.sse.as_deref() != Some("aws:kms") {
        return Err(read.wrong("sse_kms_key_id", "needs sse = \"aws:kms\""));
    }
    Ok(options)
}

fn bucket(read: &Reader) -> Result<String, ConfigError> {
    let bucket = read.text("bucket")?;
    if bucket.is_empty() {
        return Err(read.wrong("bucket", "is missing: a repository of type \"s3\" needs a bucket"));
    }
    // Wider than S3's own rule, since compatible stores and old buckets have other names.
    let is_word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    if bucket.len() > 255 || !bucket.bytes().all(is_word) {
        return Err(read.wrong("bucket", "must have only letters, digits, dots, dashes and underscores"));
    }
    Ok(bucket)
}

fn prefix(read: &Reader) -> Result<String, ConfigError> {
    let prefix = read.text("prefix")?.trim_matches('/').to_owned();
    let is_part = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
    if prefix.len() > 512 || !(prefix.is_empty() || prefix.split('/').all(is_part)) {
        return Err(read.wrong("prefix", "must be names with slashes between them, at most 512 bytes"));
    }
    Ok(prefix)
}

fn endpoint(read: &Reader) -> Result<Option<String>, ConfigError> {
    let Some(endpoint) = read.optional_text("endpoint")? else { return Ok(None) };
    let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
    let rest = rest.ok_or_else(|| read.wrong("endpoint", "must begin with https:// or http://"))?;
    if rest.contains('@') {
        return Err(read
            .wrong("endpoint", "must not hold a user or password; use access_key_id_file and secret_access_key_file"));
    }
    if rest.trim_end_matches('/').is_empty() || rest.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(read.wrong("endpoint", "must name a host, such as \"https://s3.example.com\""));
    }
    let host = rest.split('/').next().unwrap_or_default();
    // An IPv6 address has colons of its own, in brackets.
    let port = host.rsplit(']').next().unwrap_or_default().rsplit_once(':').map(|(_, port)| port);
    if port.is_some_and(|port| port.parse::<u16>().map_or(true, |port| port == 0)) {
        return Err(read.wrong("endpoint", "has a port that is none (1 to 65535)"));
    }
    Ok(Some(endpoint.trim_end_matches('/').to_owned()))
}
