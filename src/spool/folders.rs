//! The spool's folders: whose they are, and whether anything is left in them.

use std::io;
use std::path::{Path, PathBuf};

use super::{FOLDERS, Spool, SpoolError, at, files_below};
use crate::disk::Disk;
use crate::wal::SystemIdentifier;

impl Spool {
    /// Whether the root holds WAL, histories or gaps of this system. Makes nothing.
    pub fn holds_anything(root: &Path, cluster: &str, system: SystemIdentifier) -> bool {
        let folder = root.join(cluster).join(system.to_string());
        ["wal", "tail", "gaps", "open"]
            .iter()
            .any(|sub| files_below(&folder.join(sub), 2).is_ok_and(|files| !files.is_empty()))
    }

    /// Removes the folders that a system has left empty; what is not empty stays.
    pub fn remove_empty(&self) {
        let below = |folder: &Path| -> Vec<PathBuf> {
            let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect()
        };
        for sub in below(&self.folder) {
            for timeline in below(&sub) {
                for segment in below(&timeline) {
                    let _ = std::fs::remove_dir(segment);
                }
                let _ = std::fs::remove_dir(timeline);
            }
            let _ = std::fs::remove_dir(sub);
        }
        let _ = std::fs::remove_dir(&self.folder);
    }

    /// Refuses a spool of which somebody else owns a folder, or may write to one: what lies there could be anybody's (I18). What is
    /// not there yet is made for its owner alone.
    pub fn check_private(disk: &Disk, root: &Path, cluster: &str) -> Result<(), SpoolError> {
        let cluster = root.join(cluster);
        let mut folders = vec![root.to_path_buf(), cluster.clone()];
        for entry in std::fs::read_dir(&cluster).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.parse::<SystemIdentifier>().is_ok()) {
                folders.push(entry.path());
                folders.extend(FOLDERS.map(|sub| entry.path().join(sub)));
            }
        }
        for folder in folders {
            match disk.check_private(&folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                checked => checked.map_err(at("use", &folder))?,
            }
        }
        Ok(())
    }
}
