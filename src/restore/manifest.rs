//! PostgreSQL's backup manifest: which files a backup has, how long they are, and their checksums.
//!
//! Source: "Backup Manifest Format" in PostgreSQL's documentation; `parse_manifest.c` and `backup_manifest.c` in its source.

use std::collections::HashMap;

use serde::Deserialize;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use super::directory::InnerPath;
use crate::wal::SystemIdentifier;

/// Raw bytes that a manifest may have: some millions of files.
pub const MANIFEST_BYTES_MAX: u64 = 2 << 30;

#[derive(Debug)]
pub struct Manifest {
    pub files: HashMap<InnerPath, ExpectedFile>,
    /// From version 2 on (PostgreSQL 17).
    pub system_identifier: Option<SystemIdentifier>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedFile {
    pub size: u64,
    pub checksum: Expected,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    None,
    Crc32c([u8; 4]),
    Sha224(Vec<u8>),
    Sha256(Vec<u8>),
    Sha384(Vec<u8>),
    Sha512(Vec<u8>),
}

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    #[serde(rename = "Files", borrow)]
    files: Vec<Entry<'a>>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(rename = "Path", borrow)]
    path: Option<std::borrow::Cow<'a, str>>,
    /// Hexadecimal, for a name that is not UTF-8.
    #[serde(rename = "Encoded-Path", borrow)]
    encoded: Option<std::borrow::Cow<'a, str>>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm", borrow)]
    algorithm: Option<std::borrow::Cow<'a, str>>,
    #[serde(rename = "Checksum", borrow)]
    checksum: Option<std::borrow::Cow<'a, str>>,
}

impl Manifest {
    /// Parses a manifest and proves it by its own checksum.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|e| format!("the manifest cannot be read: {e}"))?;
        if !(1..=2).contains(&document.version) {
            return Err(format!("the manifest has version {}, which this release does not know", document.version));
        }
        if !document.checksum.eq_ignore_ascii_case(&hex(&Sha256::digest(covered(bytes)?))) {
            return Err("the manifest's own checksum is wrong".into());
        }
        let mut files = HashMap::with_capacity(document.files.len());
        for entry in document.files {
            let (path, file) = entry.read()?;
            if let Some(path) = files.insert(path.clone(), file).map(|_| path) {
                return Err(format!("the manifest names {path} twice"));
            }
        }
        let system_identifier = document.system_identifier.map(SystemIdentifier::new);
        Ok(Self { files, system_identifier })
    }
}

/// The checksum covers everything up to the last line, which holds it (`verify_manifest_checksum`).
fn covered(bytes: &[u8]) -> Result<&[u8], String> {
    let wrong = || "the manifest does not end with its checksum".to_string();
    let body = bytes.strip_suffix(b"\n").ok_or_else(wrong)?;
    let last = body.iter().rposition(|b| *b == b'\n').ok_or_else(wrong)?;
    Ok(&bytes[..=last])
}

impl Entry<'_> {
    fn read(&self) -> Result<(InnerPath, ExpectedFile), String> {
        let path = match (&self.path, &self.encoded) {
            (Some(path), None) => path.as_bytes().to_vec(),
            (None, Some(encoded)) => unhex(encoded).ok_or("the manifest has a path that cannot be decoded")?,
            _ => return Err("the manifest has a file without one path".into()),
        };
        let Some(inner) = InnerPath::parse(&path) else {
            return Err(format!("the manifest has the path \"{}\"", String::from_utf8_lossy(&path)));
        };
        let wrong = || format!("the manifest has a checksum of {inner} that cannot be read");
        let value = match &self.checksum {
            Some(text) => unhex(text).ok_or_else(wrong)?,
            None => Vec::new(),
        };
        let sized = |length: usize| if value.len() == length { Ok(value.clone()) } else { Err(wrong()) };
        let checksum = match self.algorithm.as_deref() {
            None | Some("NONE") => Expected::None,
            Some("CRC32C") => Expected::Crc32c(value.as_slice().try_into().map_err(|_| wrong())?),
            Some("SHA224") => Expected::Sha224(sized(28)?),
            Some("SHA256") => Expected::Sha256(sized(32)?),
            Some("SHA384") => Expected::Sha384(sized(48)?),
            Some("SHA512") => Expected::Sha512(sized(64)?),
            Some(other) => {
                return Err(format!(
                    "the manifest has checksums of a kind that is not known, \"{}\"",
                    shortened(other)
                ));
            }
        };
        Ok((inner, ExpectedFile { size: self.size, checksum }))
    }
}

/// A file's checksum while its bytes pass.
pub enum Running {
    None,
    Crc32c(u32),
    Sha224(Sha224),
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Expected {
    pub fn start(&self) -> Running {
        match self {
            Self::None => Running::None,
            Self::Crc32c(_) => Running::Crc32c(0),
            Self::Sha224(_) => Running::Sha224(Sha224::new()),
            Self::Sha256(_) => Running::Sha256(Sha256::new()),
            Self::Sha384(_) => Running::Sha384(Sha384::new()),
            Self::Sha512(_) => Running::Sha512(Sha512::new()),
        }
    }

    /// Whether it is the checksum of what passed.
    pub fn equals(&self, running: Running) -> bool {
        match (self, running) {
            (Self::None, Running::None) => true,
            // The server writes the integer as it lies in its memory (`pg_checksum_final` in src/common/checksum_helper.c).
            (Self::Crc32c(expected), Running::Crc32c(found)) => *expected == found.to_le_bytes(),
            (Self::Sha224(expected), Running::Sha224(hash)) => expected[..] == hash.finalize()[..],
            (Self::Sha256(expected), Running::Sha256(hash)) => expected[..] == hash.finalize()[..],
            (Self::Sha384(expected), Running::Sha384(hash)) => expected[..] == hash.finalize()[..],
            (Self::Sha512(expected), Running::Sha512(hash)) => expected[..] == hash.finalize()[..],
            _ => false,
        }
    }
}

impl Running {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            Self::Sha224(hash) => hash.update(bytes),
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha384(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let value = |b: u8| char::from(b).to_digit(16).and_then(|n| u8::try_from(n).ok());
    digits.chunks_exact(2).map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?)).collect()
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A manifest as PostgreSQL writes it.
    pub(crate) fn manifest(files: &[(&str, &[u8])]) -> Vec<u8> {
        let lines: Vec<String> = files
            .iter()
            .map(|(path, data)| {
                let crc = hex(&crc32c::crc32c(data).to_le_bytes());
                format!(
                    "{{ \"Path\": \"{path}\", \"Size\": {}, \"Last-Modified\": \"2026-11-20 02:00:00 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc}\" }}",
                    data.len()
                )
            })
            .collect();
        sealed(&format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7000000000000000001,\n\"Files\": [\n{}\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000120\" }}\n],\n",
            lines.join(",\n")
        ))
    }

    fn sealed(body: &str) -> Vec<u8> {
        let checksum = hex(&Sha256::digest(body.as_bytes()));
        format!("{body}\"Manifest-Checksum\": \"{checksum}\"}}\n").into_bytes()
    }

    #[test]
    fn a_manifest_as_postgresql_writes_it_is_read() {
        let bytes = manifest(&[("base/5/1259", b"abc"), ("PG_VERSION", b"17\n")]);
        let read = Manifest::parse(&bytes).unwrap();
        assert_eq!(read.system_identifier, Some(SystemIdentifier::new(7_000_000_000_000_000_001)));
        let file = &read.files[&InnerPath::parse(b"base/5/1259").unwrap()];
        assert_eq!(file.size, 3);
        let mut running = file.checksum.start();
        running.update(b"a");
        running.update(b"bc");
        assert!(file.checksum.equals(running));
        let mut other = file.checksum.start();
        other.update(b"abd");
        assert!(!file.checksum.equals(other));
    }

    #[test]
    fn a_manifest_that_was_touched_is_refused() {
        let good = manifest(&[("base/5/1259", b"abc")]);
        let text = String::from_utf8(good.clone()).unwrap();
        assert!(
            Manifest::parse(text.replace("\"Size\": 3", "\"Size\": 4").as_bytes()).unwrap_err().contains("checksum")
        );
        assert!(Manifest::parse(&good[..good.len() - 1]).is_err());
        assert!(Manifest::parse(b"{}").is_err());
        assert!(Manifest::parse(b"").is_err());
    }

    #[test]
    fn a_manifest_that_leads_outside_or_lies_is_refused() {
        let entry = |fields: &str| {
            sealed(&format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{{ {fields} }}],\n"))
        };
        for fields in [
            "\"Path\": \"../x\", \"Size\": 1",
            "\"Path\": \"/etc/passwd\", \"Size\": 1",
            "\"Encoded-Path\": \"2e2e2f78\", \"Size\": 1",
            "\"Encoded-Path\": \"zz\", \"Size\": 1",
            "\"Path\": \"a\", \"Encoded-Path\": \"61\", \"Size\": 1",
            "\"Size\": 1",
            "\"Path\": \"a\", \"Size\": -1",
            "\"Path\": \"a\", \"Size\": 1, \"Checksum-Algorithm\": \"MD5\", \"Checksum\": \"00\"",
            "\"Path\": \"a\", \"Size\": 1, \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"00\"",
            "\"Path\": \"a\", \"Size\": 1 }, { \"Path\": \"a\", \"Size\": 2",
        ] {
            assert!(Manifest::parse(&entry(fields)).is_err(), "{fields}");
        }
        let latin = entry("\"Encoded-Path\": \"e9\", \"Size\": 0");
        assert!(Manifest::parse(&latin).unwrap().files.contains_key(&InnerPath::parse(b"\xe9").unwrap()));
    }
}
