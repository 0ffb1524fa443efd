//! Listing: complete or an error, in byte order, without temporary names, without following a symbolic link.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::tree::{Tree, split};
use crate::storage::keys::TEMPORARY;
use crate::storage::{ObjectInfo, StorageError};

/// Walden's own keys are seven parts deep; the bound keeps a tree that somebody else made from using up the stack.
const DEPTH_MAX: u32 = 64;

pub(super) fn list(tree: &Tree, prefix: &str, start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
    let mut walk = Walk { tree, prefix, start_after, found: Vec::new() };
    let folder = split(prefix).0;
    if let Some(directory) = tree.open(folder)? {
        walk.enter(directory, folder, 0)?;
    }
    let mut found = walk.found;
    found.sort_unstable_by(|a, b| a.key.cmp(&b.key));
    Ok(found)
}

pub(super) fn list_folders(tree: &Tree, prefix: &str) -> Result<Vec<String>, StorageError> {
    let folder = prefix.trim_end_matches('/');
    let Some(directory) = tree.open(folder)? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for (name, kind) in read(&directory).map_err(|errno| tree.error(errno, "listing", folder))? {
        if kind == FileType::Directory {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

struct Walk<'a> {
    tree: &'a Tree,
    prefix: &'a str,
    start_after: Option<&'a str>,
    found: Vec<ObjectInfo>,
}

impl Walk<'_> {
    fn enter(&mut self, directory: OwnedFd, folder: &str, depth: u32) -> Result<(), StorageError> {
        let failed = |errno| self.tree.error(errno, "listing", folder);
        if depth > DEPTH_MAX {
            return Err(StorageError::Settings {
                url: self.tree.url.clone(),
                why: format!("{folder} is more than {DEPTH_MAX} directories deep"),
            });
        }
        for (name, kind) in read(&directory).map_err(failed)? {
            let key = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            if kind == FileType::Directory {
                if !self.may_hold(&format!("{key}/")) {
                    continue;
                }
                let child = match self.tree.open(&key)? {
                    Some(child) => child,
                    // Deleted since the directory was read.
                    None => continue,
                };
                self.enter(child, &key, depth + 1)?;
            } else if key.starts_with(self.prefix) && self.start_after.is_none_or(|after| key.as_str() > after) {
                let size = match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(status) if kind == FileType::RegularFile => u64::try_from(status.st_size).unwrap_or(0),
                    Ok(_) => 0,
                    Err(Errno::NOENT) if !name.contains(char::REPLACEMENT_CHARACTER) => continue,
                    // A foreign name that is not UTF-8: shown as well as it can be.
                    Err(Errno::NOENT) => 0,
                    Err(errno) => return Err(self.tree.error(errno, "listing", &key)),
                };
                self.found.push(ObjectInfo { key, size, crc32: None, version: None });
            }
        }
        Ok(())
    }

    /// Whether a key that begins with `folder` (ends with a slash) can be wanted.
    fn may_hold(&self, folder: &str) -> bool {
        let in_prefix = folder.starts_with(self.prefix) || self.prefix.starts_with(folder);
        in_prefix && self.start_after.is_none_or(|after| folder > after || after.starts_with(folder))
    }
}

/// Names and kinds, the kind looked up where the file system does not tell it.
fn read(directory: &OwnedFd) -> Result<Vec<(String, FileType)>, Errno> {
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") || name.to_bytes().starts_with(TEMPORARY.as_bytes()) {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(status) => FileType::from_raw_mode(status.st_mode),
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno),
            },
            kind => kind,
        };
        entries.push((name.to_string_lossy().into_owned(), kind));
    }
    Ok(entries)
}
