//! The files that came, compared with the `backup_manifest` that the server made of what it read from its disk.
//!
//! Both come in the same order, so 8 bytes per file are enough to compare and to name the one that differs.
//! Source: "Backup Manifest Format" in PostgreSQL's documentation; `src/backend/backup/backup_manifest.c`.

use std::hash::{DefaultHasher, Hasher};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::BackupError;
use super::header::shown;

/// A path of 255 bytes in hexadecimal and everything else fit in a fraction of it.
const LINE_MAX: usize = 64 * 1024;
/// 1 until PostgreSQL 16, 2 from 17 on.
const VERSION_MAX: u64 = 2;

/// What came, file by file.
#[derive(Default)]
pub(super) struct Fingerprints(Vec<u64>);

impl Fingerprints {
    pub(super) fn add(&mut self, name: &[u8], size: u64, crc32c: u32) {
        self.0.push(fingerprint(name, size, crc32c));
    }
}

fn fingerprint(name: &[u8], size: u64, crc32c: u32) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(name);
    hasher.write_u64(size);
    hasher.write_u32(crc32c);
    hasher.finish()
}

/// Reads a manifest as it comes and compares each line.
pub(super) struct ManifestReader {
    files: Fingerprints,
    compared: usize,
    line: Vec<u8>,
    part: Part,
    digest: Sha256,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Head,
    Files,
    Ranges,
    Ended,
}

/// A line of "Files".
#[derive(Deserialize)]
struct FileLine {
    #[serde(rename = "Path")]
    path: Option<String>,
    /// A path that is not UTF-8, in hexadecimal.
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

impl ManifestReader {
    pub(super) fn new(files: Fingerprints) -> Self {
        Self { files, compared: 0, line: Vec::new(), part: Part::Head, digest: Sha256::new() }
    }

    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<(), BackupError> {
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            self.keep(&bytes[..end])?;
            self.take_line()?;
            bytes = &bytes[end + 1..];
        }
        self.keep(bytes)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        if self.line.len() + bytes.len() > LINE_MAX {
            return Err(wrong("a line of it is too long"));
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    fn take_line(&mut self) -> Result<(), BackupError> {
        let line = std::mem::take(&mut self.line);
        let text = std::str::from_utf8(&line).map_err(|_| wrong("it is not UTF-8"))?;
        match self.part {
            Part::Head => match text.strip_prefix("{ \"PostgreSQL-Backup-Manifest-Version\": ") {
                Some(version) => {
                    let version: u64 = version.trim_end_matches(',').parse().map_err(|_| wrong("it has no version"))?;
                    if version == 0 || version > VERSION_MAX {
                        return Err(wrong(&format!("it has version {version}, Walden knows {VERSION_MAX} at most")));
                    }
                }
                None if text.starts_with("\"Files\": [") => self.part = Part::Files,
                None if text.starts_with("\"System-Identifier\": ") => {}
                None => return Err(wrong("its beginning is not what PostgreSQL writes")),
            },
            Part::Files if text.starts_with('{') => self.compare(text.trim_end_matches(','))?,
            Part::Files if text.starts_with(']') => self.part = Part::Ranges,
            Part::Files => return Err(wrong("its list of files is not what PostgreSQL writes")),
            Part::Ranges => {
                if let Some(checksum) = text.strip_prefix("\"Manifest-Checksum\": \"") {
                    let found = hex(&std::mem::take(&mut self.digest).finalize());
                    if checksum.trim_end_matches("\"}") != found {
                        return Err(wrong("its own checksum is wrong"));
                    }
                    self.part = Part::Ended;
                }
            }
            Part::Ended => return Err(wrong("data follows its end")),
        }
        // The checksum covers every line before its own.
        self.digest.update(&line);
        self.digest.update(b"\n");
        self.line = line;
        self.line.clear();
        Ok(())
    }

    fn compare(&mut self, text: &str) -> Result<(), BackupError> {
        let line: FileLine = serde_json::from_str(text).map_err(|error| wrong(&format!("a line of it: {error}")))?;
        let path = match (line.path, line.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(encoded)) => unhex(&encoded).ok_or_else(|| wrong("an encoded path cannot be read"))?,
            _ => return Err(wrong("a file has no path")),
        };
        let checksum = match (line.algorithm.as_deref(), line.checksum) {
            (Some("CRC32C"), Some(checksum)) => unhex(&checksum).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()),
            _ => None,
        };
        // PostgreSQL prints the four bytes as they lie in memory, of a little-endian machine.
        let crc32c = u32::from_le_bytes(checksum.ok_or_else(|| wrong("a file has no CRC-32C"))?);
        if self.files.0.get(self.compared) != Some(&fingerprint(&path, line.size, crc32c)) {
            return Err(BackupError::Damaged { path: shown(&path) });
        }
        self.compared += 1;
        Ok(())
    }

    /// The manifest has ended: every file that came must have been in it. Gives how many.
    pub(super) fn finish(mut self) -> Result<usize, BackupError> {
        if !self.line.is_empty() {
            self.take_line()?;
        }
        if self.part != Part::Ended {
            return Err(wrong("it ended before its checksum"));
        }
        if self.compared != self.files.0.len() {
            return Err(wrong(&format!(
                "it lists {} files, but {} came in the archives",
                self.compared,
                self.files.0.len()
            )));
        }
        Ok(self.compared)
    }
}

fn wrong(why: &str) -> BackupError {
    BackupError::Manifest { why: why.into() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .map(|c| c.to_digit(16))
        .collect::<Option<Vec<u32>>>()?
        .into_iter()
        .map(|digit| digit as u8) // below 16
        .collect();
    let whole = digits.len().is_multiple_of(2);
    whole.then(|| digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(entries: &str) -> Vec<u8> {
        let mut text = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 77,\n\"Files\": [\n{entries}],\n\
             \"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/5000028\", \"End-LSN\": \"0/5000100\" }}\n],\n"
        );
        let digest = hex(&Sha256::digest(text.as_bytes()));
        text.push_str(&format!("\"Manifest-Checksum\": \"{digest}\"}}\n"));
        text.into_bytes()
    }

    const TWO: &str = "{ \"Path\": \"a\\\\b\", \"Size\": 3, \"Last-Modified\": \"2026-11-21 02:13:30 GMT\", \
                       \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"04030201\" },\n\
                       { \"Encoded-Path\": \"ff2f61\", \"Size\": 0, \"Last-Modified\": \"x\", \
                       \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00000000\" }\n";

    fn read(files: &[(&[u8], u64, u32)], manifest: &[u8], step: usize) -> Result<usize, BackupError> {
        let mut fingerprints = Fingerprints::default();
        for (name, size, crc32c) in files {
            fingerprints.add(name, *size, *crc32c);
        }
        let mut reader = ManifestReader::new(fingerprints);
        for chunk in manifest.chunks(step) {
            reader.push(chunk)?;
        }
        reader.finish()
    }

    #[test]
    fn what_came_must_be_what_the_manifest_lists() {
        let good: [(&[u8], u64, u32); 2] = [(b"a\\b", 3, 0x0102_0304), (b"\xff/a", 0, 0)];
        for step in [1, 7, 100_000] {
            assert_eq!(read(&good, &manifest(TWO), step).unwrap(), 2);
        }
        let other: [(&[u8], u64, u32); 2] = [(b"a\\b", 3, 0x0102_0305), (b"\xff/a", 0, 0)];
        assert!(matches!(read(&other, &manifest(TWO), 50), Err(BackupError::Damaged { path }) if path == "a\\b"));
        assert!(read(&good[..1], &manifest(TWO), 50).is_err());
        let three: [(&[u8], u64, u32); 3] = [good[0], good[1], (b"c", 0, 0)];
        assert!(read(&three, &manifest(TWO), 50).is_err());
    }

    #[test]
    fn a_cut_or_changed_manifest_is_refused() {
        let good: [(&[u8], u64, u32); 2] = [(b"a\\b", 3, 0x0102_0304), (b"\xff/a", 0, 0)];
        let whole = manifest(TWO);
        for cut in [0, 10, 100, 300, whole.len() - 70] {
            assert!(read(&good, &whole[..cut], 50).is_err(), "{cut}");
        }
        let changed = String::from_utf8(whole).unwrap().replace("0/5000028", "0/5000029");
        assert!(read(&good, changed.as_bytes(), 50).is_err());
    }

    proptest! {
        #[test]
        fn no_manifest_makes_it_panic(text in "(\\{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": \\[\n)?\\PC{0,200}") {
            let _ = read(&[], text.as_bytes(), 9);
        }
    }
}
