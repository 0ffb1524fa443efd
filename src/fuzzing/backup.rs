use sha2::{Digest, Sha256};

use crate::base_backup::fuzzing::{compare, split};
use crate::restore::fuzzing::{read_manifest, read_volume};

const BLOCK: usize = 512;

/// The server's archives. First byte: bit 0 puts header checksums right, bit 1 makes the second half a tablespace's archive, the
/// rest is the size of the pieces.
pub fn server_tar(bytes: &[u8]) {
    let Some((&how, stream)) = bytes.split_first() else { return };
    let stream = if how & 1 == 1 { right_checksums(stream) } else { stream.to_vec() };
    let step = step(how >> 2, 37, stream.len());
    let middle = if how & 2 == 2 { stream.len() / 2 / BLOCK * BLOCK } else { stream.len() };
    let (main, tablespace) = stream.split_at(middle);
    split(main.chunks(step), (!tablespace.is_empty()).then(|| tablespace.chunks(step)));
}

/// A volume of a repository. First byte: bit 0 puts header checksums right, the rest is the size of the pieces.
pub fn volume_tar(bytes: &[u8]) {
    let Some((&how, stream)) = bytes.split_first() else { return };
    let stream = if how & 1 == 1 { right_checksums(stream) } else { stream.to_vec() };
    read_volume(stream.chunks(step(how >> 1, 19, stream.len())));
}

/// First byte: bit 0 puts the manifest's own checksum right, the rest is the size of the pieces.
pub fn server_manifest(bytes: &[u8]) {
    let Some((&how, manifest)) = bytes.split_first() else { return };
    let manifest = if how & 1 == 1 { right_manifest(manifest) } else { manifest.to_vec() };
    compare(manifest.chunks(step(how >> 1, 1, manifest.len())));
}

/// An odd first byte puts the manifest's own checksum right.
pub fn backup_manifest(bytes: &[u8]) {
    let Some((&how, manifest)) = bytes.split_first() else { return };
    if how & 1 == 1 { read_manifest(&right_manifest(manifest)) } else { read_manifest(manifest) }
}

/// 0: all at once.
fn step(times: u8, unit: usize, length: usize) -> usize {
    if times == 0 { length.max(1) } else { usize::from(times) * unit }
}

/// What looks like a ustar header gets the checksum that belongs to it.
fn right_checksums(stream: &[u8]) -> Vec<u8> {
    let mut stream = stream.to_vec();
    for block in stream.chunks_exact_mut(BLOCK).filter(|block| &block[257..262] == b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    stream
}

/// The last line gets the checksum of all before it.
fn right_manifest(manifest: &[u8]) -> Vec<u8> {
    const LAST: &[u8] = b"\"Manifest-Checksum\": \"";
    let Some(at) = manifest.windows(LAST.len()).rposition(|window| window == LAST) else { return manifest.to_vec() };
    let digest: String = Sha256::digest(&manifest[..at]).iter().map(|byte| format!("{byte:02x}")).collect();
    [&manifest[..at], LAST, digest.as_bytes(), b"\"}\n"].concat()
}
