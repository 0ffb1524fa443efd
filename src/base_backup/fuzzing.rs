//! A base backup's tar stream and manifest as a server sends them, for the fuzz targets of [`crate::fuzzing`].

use super::header::BLOCK;
use super::manifest::{Fingerprints, ManifestReader};
use super::parts::PartEncoder;
use super::splitter::Splitter;
use crate::seal::Compression;

/// Archives that come in pieces, taken apart and written into volumes: the data directory's, then perhaps a tablespace's.
pub fn split<'a>(main: impl Iterator<Item = &'a [u8]>, tablespace: Option<impl Iterator<Item = &'a [u8]>>) {
    let parts = PartEncoder::new(Compression::Lz4, 0).expect("an encoder");
    let mut splitter = Splitter::new(64 << 10, parts);
    let pushed = splitter.begin_archive(None).and_then(|()| {
        let mut main = main;
        main.try_for_each(|piece| splitter.push(piece))?;
        let Some(mut tablespace) = tablespace else { return Ok(()) };
        splitter.begin_archive(Some(16_400))?;
        tablespace.try_for_each(|piece| splitter.push(piece))
    });
    if pushed.is_err() || splitter.finish().is_err() {
        return;
    }
    let mut parts = splitter.into_parts();
    let mut volumes = 0;
    while let Some(part) = parts.take_ready() {
        if let Some(whole) = part.whole {
            assert_eq!(whole.raw_bytes % BLOCK as u64, 0, "a volume is made of blocks");
            volumes += 1;
        }
    }
    assert!(volumes > 0, "a backup that has ended has volumes");
}

/// The manifest of two files, in pieces.
pub fn compare<'a>(mut manifest: impl Iterator<Item = &'a [u8]>) {
    // Those of the corpus, so that lines are compared and not refused at once.
    let mut files = Fingerprints::default();
    files.add(b"PG_VERSION", 3, 0x0403_0201);
    files.add(b"base/5/1259", 8192, 0);
    let mut reader = ManifestReader::new(files);
    if manifest.try_for_each(|piece| reader.push(piece)).is_ok() {
        let _ = reader.finish();
    }
}
