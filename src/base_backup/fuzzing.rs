//! A base backup's tar stream and manifest as a server sends them, for the fuzz targets of [`crate::fuzzing`].

use sha2::{Digest, Sha256};

use super::header::BLOCK;
use super::manifest::{Fingerprints, ManifestReader};
use super::parts::PartEncoder;
use super::splitter::Splitter;
use crate::seal::Compression;

/// Two archives' bytes, taken apart and written into volumes. First byte: bit 0 puts header checksums right, bit 1 makes the
/// second half a tablespace's archive, the rest is the size of the pieces.
pub fn server_tar(bytes: &[u8]) {
    let Some((&how, stream)) = bytes.split_first() else { return };
    let mut stream = stream.to_vec();
    if how & 1 == 1 {
        right_checksums(&mut stream);
    }
    let step = match how >> 2 {
        0 => stream.len().max(1),
        step => usize::from(step) * 37,
    };
    let parts = PartEncoder::new(Compression::Lz4, 0).expect("an encoder");
    let mut splitter = Splitter::new(64 << 10, parts);
    let (first, second) =
        if how & 2 == 2 { stream.split_at(stream.len() / 2 / BLOCK * BLOCK) } else { (&stream[..], &[][..]) };
    let mut feed = |tablespace, archive: &[u8]| {
        splitter.begin_archive(tablespace)?;
        archive.chunks(step).try_for_each(|chunk| splitter.push(chunk))
    };
    if feed(None, first).is_err() || (!second.is_empty() && feed(Some(16_400), second).is_err()) {
        return;
    }
    let Ok((_, files)) = splitter.finish() else { return };
    let mut parts = splitter.into_parts();
    let mut volumes = 0;
    while let Some(part) = parts.take_ready() {
        volumes += usize::from(part.whole.is_some_and(|whole| whole.raw_bytes % BLOCK as u64 == 0));
    }
    assert!(volumes > 0, "a backup that has ended has whole volumes");
    drop(files);
}

/// What looks like a ustar header gets the checksum that belongs to it.
pub(crate) fn right_checksums(stream: &mut [u8]) {
    for block in stream.chunks_exact_mut(BLOCK) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

/// First byte: bit 0 puts the manifest's own checksum right, the rest is the size of the pieces.
pub fn server_manifest(bytes: &[u8]) {
    let Some((&how, manifest)) = bytes.split_first() else { return };
    let mut manifest = manifest.to_vec();
    if how & 1 == 1 {
        right_manifest(&mut manifest);
    }
    let step = match how >> 1 {
        0 => manifest.len().max(1),
        step => usize::from(step),
    };
    // The files of the corpus, so that lines are compared and not refused at once.
    let mut files = Fingerprints::default();
    files.add(b"PG_VERSION", 3, 0x0403_0201);
    files.add(b"base/5/1259", 8192, 0);
    let mut reader = ManifestReader::new(files);
    if manifest.chunks(step).try_for_each(|chunk| reader.push(chunk)).is_ok() {
        let _ = reader.finish();
    }
}

/// The last line's checksum of all before it.
pub(crate) fn right_manifest(manifest: &mut Vec<u8>) {
    const LAST: &[u8] = b"\"Manifest-Checksum\": \"";
    let Some(at) = manifest.windows(LAST.len()).rposition(|window| window == LAST) else { return };
    let digest: String = Sha256::digest(&manifest[..at]).iter().map(|byte| format!("{byte:02x}")).collect();
    manifest.truncate(at + LAST.len());
    manifest.extend_from_slice(digest.as_bytes());
    manifest.extend_from_slice(b"\"}\n");
}
