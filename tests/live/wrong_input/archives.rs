//! Worlds in which something was archived, and something happened to it.

use std::fs;

use std::path::{Path, PathBuf};

use super::worlds::{Plan, Worlds, mode};
use crate::support::oracle::files_below;

/// The one object of the archive whose path ends so.
#[track_caller]
fn one(plan: &Plan, end: &str) -> PathBuf {
    let mut found = files_below(&plan.home.join("archive"));
    found.retain(|path| path.to_string_lossy().ends_with(end));
    assert_eq!(found.len(), 1, "{end}: {found:?}");
    found.remove(0)
}

/// One bit is another, where the error is the same each time: in the mark that ends the compressed bytes.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("it was there");
    *bytes.last_mut().expect("it is not empty") ^= 1;
    fs::write(path, bytes).expect("it can be written");
}

impl Worlds {
    /// `None`: this name is of another kind of world.
    pub(super) fn with_an_archive(&mut self, given: &str) -> Option<Plan> {
        let stage = self.stage.clone();
        let plan = match given {
            "an archive" => {
                let plan = self.after_a_past();
                let full = stage.make_dir(plan.home.join("full"));
                stage.write(full.join("something"), "of value");
                let live = stage.make_dir(plan.home.join("live"));
                stage.write(live.join("PG_VERSION"), "15\n");
                stage.write(live.join("postmaster.pid"), format!("{}\n{}\n", std::process::id(), live.display()));
                mode(&stage.make_dir(plan.home.join("shut")), 0o500);
                stage.write(plan.home.join("file"), "in the way");
                plan
            }
            "an archive of two systems under one name" => {
                let plan = self.after_a_past();
                for part in ["main/7000000000000000001", "main/7000000000000000001/wal"] {
                    stage.make_dir(plan.home.join("archive").join(part));
                }
                stage.write(plan.home.join("archive/main/7000000000000000001/coverage.json"), "{}");
                plan
            }
            "an archive that cannot be read" => {
                let plan = self.after_a_past();
                mode(&plan.home.join("archive"), 0o000);
                plan
            }
            "a backup with a damaged volume" => {
                let plan = self.after_a_past();
                flip(&one(&plan, "/volumes/000001.tar.lz4"));
                plan
            }
            "a backup that has lost a volume" => {
                let plan = self.after_a_past();
                fs::remove_file(one(&plan, "/volumes/000001.tar.lz4")).expect("it was there");
                plan
            }
            "a backup with a damaged manifest" => {
                let plan = self.after_a_past();
                flip(&one(&plan, "/backup_manifest.lz4"));
                plan
            }
            "a backup that has lost its manifest" => {
                let plan = self.after_a_past();
                fs::remove_file(one(&plan, "/backup_manifest.lz4")).expect("it was there");
                plan
            }
            "a backup whose description is damaged" => {
                let plan = self.after_a_past();
                fs::write(one(&plan, "/backup.json"), "{ this is no JSON").expect("it can be written");
                plan
            }
            "a backup whose description is gone" => {
                let plan = self.after_a_past();
                fs::remove_file(one(&plan, "/backup.json")).expect("it was there");
                plan
            }
            "an archive that has lost the WAL that its backup begins with" => {
                let plan = self.after_a_past();
                fs::remove_file(one(&plan, &plan.text("{the backup's segment}.lz4"))).expect("it was there");
                plan
            }
            "an archive that has lost the WAL behind its backup" => {
                let plan = self.after_a_past();
                fs::remove_file(one(&plan, &plan.text("{the segment behind}.lz4"))).expect("it was there");
                plan
            }
            "an archive with damaged WAL" => {
                let plan = self.after_a_past();
                flip(&one(&plan, &plan.text("{the segment behind}.lz4")));
                plan
            }
            "an archive with WAL of nothing but a header" => {
                let plan = self.after_a_past();
                let path = one(&plan, &plan.text("{the segment behind}.lz4"));
                let bytes = fs::read(&path).expect("it was there");
                fs::write(&path, &bytes[..4096]).expect("it can be cut");
                plan
            }
            _ => return None,
        };
        Some(plan)
    }
}
