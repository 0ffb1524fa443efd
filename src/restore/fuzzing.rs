//! What a restore reads from a repository beside WAL, for the fuzz targets of [`crate::fuzzing`].

use super::configure::{REMOVED, raised, rewritten};
use super::directory::InnerPath;
use super::manifest::Manifest;
use super::tar::{TarEntry, TarError, TarKind, TarReader, TarSink};
use super::{PlanFile, parse_target_time};
use crate::wal::SegmentName;

/// A volume's entries: their data comes in full, and no path that is taken leaves the directory.
#[derive(Default)]
struct Entries {
    left: Option<u64>,
}

impl TarSink for Entries {
    type Error = TarError;

    fn entry(&mut self, entry: TarEntry) -> Result<(), TarError> {
        assert_eq!(self.left, None, "an entry begins in another's data");
        if let Some(path) = InnerPath::parse(&entry.path) {
            let parts = path.as_bytes().split(|byte| *byte == b'/');
            assert!(parts.into_iter().all(|part| !part.is_empty() && part != b"." && part != b".."), "{path}");
            path.in_tablespace();
        }
        if let TarKind::File { size } = entry.kind {
            self.left = Some(size);
        }
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        let left = self.left.expect("data of a file");
        self.left = Some(left.checked_sub(bytes.len() as u64).expect("no more than the header says"));
        Ok(())
    }

    fn file_end(&mut self) -> Result<(), TarError> {
        assert_eq!(self.left.take(), Some(0), "a file ends when its last byte has come");
        Ok(())
    }
}

/// A volume that comes in pieces.
pub fn read_volume<'a>(mut pieces: impl Iterator<Item = &'a [u8]>) {
    let (mut reader, mut entries) = (TarReader::default(), Entries::default());
    if pieces.try_for_each(|piece| reader.push(piece, &mut entries)).is_ok() && reader.finish().is_ok() {
        assert_eq!(entries.left, None, "an archive ends in an entry");
    }
}

/// PostgreSQL's manifest as it is stored.
pub fn read_manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        for file in manifest.files.values() {
            let mut running = file.checksum.start();
            running.update(b"content");
            file.checksum.equals(running);
        }
    }
}

/// The plan that `wal-fetch` follows: what it needs lies in its range, on its branch.
pub fn plan_file(bytes: &[u8]) {
    let Ok(plan) = PlanFile::parse(bytes) else { return };
    let (start, end) = plan.range();
    assert!(start < end, "a plan needs some WAL");
    let first = SegmentName::holding(plan.timeline, start, plan.segment_size);
    let owner = plan.timeline_of(start).expect("what begins the range is held");
    assert!(plan.is_on_branch(owner));
    assert!(
        plan.needs(first.on_timeline(owner)).is_some(),
        "{} is in the range and not held",
        first.on_timeline(owner)
    );
    assert_eq!(PlanFile::parse(&plan.to_json()).as_ref(), Ok(&plan), "a plan is read back as it was written");
}

/// `--target-time`; what follows a line end is `--time-zone`.
pub fn target_time(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (time, zone) = text.split_once('\n').map_or((text, None), |(time, zone)| (time, Some(zone)));
    if let Ok(time) = parse_target_time(time, zone) {
        // What PostgreSQL is told has an offset, and means the same moment.
        let told = time.to_timestamp().to_string();
        assert_eq!(parse_target_time(&told, None).ok(), Some(time), "{told}");
    }
}

/// `postgresql.auto.conf` of a backup: no setting of an earlier recovery is left, and settings that recovery needs are found.
pub fn auto_conf(bytes: &[u8]) {
    let once = rewritten(bytes, b"");
    for name in REMOVED {
        let left = |line: &[u8]| {
            let line = line.trim_ascii_start();
            let end = line.iter().position(|b| !(b.is_ascii_alphanumeric() || *b == b'_')).unwrap_or(line.len());
            line[..end].eq_ignore_ascii_case(name.as_bytes())
                && !line[end..].starts_with(b".")
                && !line[end..].starts_with(b"$")
        };
        assert!(!once.split(|byte| *byte == b'\n').any(left), "{name} is left");
    }
    for (_, value) in raised(&[("max_connections", 100), ("max_wal_senders", 10)], &[bytes, b"max_connections = 20"]) {
        assert!(value >= 10);
    }
}
