//! The 512 bytes in front of each entry of a tar, as PostgreSQL writes them (ustar), read with distrust.
//!
//! Source: `tarCreateHeader` in PostgreSQL `src/port/tar.c`; "ustar Interchange Format" in POSIX `pax`.

use std::ops::Range;

use super::BackupError;

pub(super) const BLOCK: usize = 512;
/// Longer names cannot be written as ustar anyway.
const NAME_MAX: usize = 255;
/// No file is larger than this; a header that says so lies. 8 EiB would make sums overflow.
const SIZE_MAX: u64 = 1 << 50;

const NAME: Range<usize> = 0..100;
const SIZE: Range<usize> = 124..136;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
const MAGIC: Range<usize> = 257..263;
const PREFIX: Range<usize> = 345..500;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    Directory,
    /// A tablespace's link; nothing else in a data directory is one.
    Link,
}

/// One entry's header. The name is relative, without `.` or `..`, and has no slash at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) size: u64,
    block: [u8; BLOCK],
}

impl Header {
    /// `None` for an empty block, which ends a tar.
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Option<Self>, BackupError> {
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let wrong = |why: &str| BackupError::Tar { why: why.into() };
        if &block[MAGIC] != b"ustar\0" {
            return Err(wrong("a header is not one of ustar"));
        }
        if octal(&block[CHECKSUM]) != Some(checksum(block)) {
            return Err(wrong("a header's checksum is wrong"));
        }
        let size = number(&block[SIZE]).filter(|&size| size <= SIZE_MAX);
        let size = size.ok_or_else(|| wrong("a file's size cannot be read"))?;
        let kind = match block[TYPE] {
            b'0' | 0 => EntryKind::File,
            b'5' => EntryKind::Directory,
            b'2' => EntryKind::Link,
            _ => return Err(wrong("an entry is neither file, directory nor link")),
        };
        if kind != EntryKind::File && size != 0 {
            return Err(wrong("a directory or link has content"));
        }
        let written = full_name(block);
        let name = check_name(&written, kind)
            .ok_or_else(|| wrong(&format!("the name \"{}\" leaves the data directory", shown(&written))))?;
        let mut header = Self { name, kind, size, block: *block };
        // PostgreSQL puts it before the folders of pg_wal alone.
        if written.starts_with(b"./") {
            header.write_name()?;
        }
        Ok(Some(header))
    }

    /// The header as it is to be written.
    pub(super) fn block(&self) -> &[u8; BLOCK] {
        &self.block
    }

    /// The name for people: never anything that could disturb a terminal.
    pub(super) fn shown(&self) -> String {
        shown(&self.name)
    }

    /// The same entry below `folder`.
    pub(super) fn below(&self, folder: &str) -> Result<Self, BackupError> {
        let mut name = folder.as_bytes().to_vec();
        name.push(b'/');
        name.extend_from_slice(&self.name);
        let mut header = Self { name, kind: self.kind, size: self.size, block: self.block };
        header.write_name()?;
        Ok(header)
    }

    /// A directory that PostgreSQL's tar does not have: mode 0700, owner and time as in `like`.
    pub(super) fn directory(name: &str, like: &Header) -> Result<Self, BackupError> {
        let mut block = like.block;
        block[100..108].copy_from_slice(b"0000700\0");
        block[SIZE].copy_from_slice(b"00000000000\0");
        block[TYPE] = b'5';
        block[157..257].fill(0);
        let mut header = Self { name: name.as_bytes().to_vec(), kind: EntryKind::Directory, size: 0, block };
        header.write_name()?;
        Ok(header)
    }

    /// Writes `name` into the block, split at a slash where it passes 100 bytes.
    fn write_name(&mut self) -> Result<(), BackupError> {
        let mut name = self.name.clone();
        if self.kind == EntryKind::Directory {
            name.push(b'/');
        }
        let too_long = || BackupError::Tar { why: format!("{} is too long a name for a tar", self.shown()) };
        let split = if name.len() <= NAME.len() {
            None
        } else {
            // The shortest prefix that leaves a name of at most 100 bytes; not the slash at a directory's end.
            let earliest = name.len() - NAME.len() - 1;
            let latest = PREFIX.len().min(name.len() - 2);
            let at = (earliest..=latest).find(|&at| name[at] == b'/' && at > 0);
            Some(at.ok_or_else(too_long)?)
        };
        let (prefix, rest) = split.map_or((&name[..0], &name[..]), |at| (&name[..at], &name[at + 1..]));
        self.block[NAME].fill(0);
        self.block[NAME][..rest.len()].copy_from_slice(rest);
        self.block[PREFIX].fill(0);
        self.block[PREFIX][..prefix.len()].copy_from_slice(prefix);
        let sum = format!("{:06o}\0 ", checksum(&self.block));
        self.block[CHECKSUM].copy_from_slice(sum.as_bytes());
        Ok(())
    }
}

pub(super) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().map(|c| if c.is_control() { '?' } else { c }).take(NAME_MAX).collect()
}

/// The bytes that follow a file of `size` bytes up to the next block.
pub(super) fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

/// The sum of all bytes, those of the checksum itself taken as spaces.
fn checksum(block: &[u8; BLOCK]) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u64::from(b)).sum::<u64>();
    sum(block) - sum(&block[CHECKSUM]) + 8 * u64::from(b' ')
}

fn full_name(block: &[u8; BLOCK]) -> Vec<u8> {
    let cut = |field: &[u8]| field.iter().take_while(|&&b| b != 0).copied().collect::<Vec<u8>>();
    let (prefix, name) = (cut(&block[PREFIX]), cut(&block[NAME]));
    if prefix.is_empty() { name } else { [prefix, name].join(&b'/') }
}

fn check_name(name: &[u8], kind: EntryKind) -> Option<Vec<u8>> {
    let name = name.strip_prefix(b"./").unwrap_or(name);
    let name = match (kind, name.strip_suffix(b"/")) {
        (EntryKind::Directory, Some(name)) => name,
        _ => name,
    };
    let parts_are_plain = name.split(|&b| b == b'/').all(|part| !matches!(part, b"" | b"." | b".."));
    (parts_are_plain && name.len() <= NAME_MAX).then(|| name.to_vec())
}

/// Octal digits, ended by a space or a zero byte.
fn octal(field: &[u8]) -> Option<u64> {
    let digits: Vec<u8> = field.iter().copied().skip_while(|&b| b == b' ').collect();
    let length = digits.iter().take_while(|b| (b'0'..=b'7').contains(b)).count();
    let ended = digits[length..].iter().all(|&b| b == 0 || b == b' ');
    if length == 0 || !ended {
        return None;
    }
    digits[..length].iter().try_fold(0_u64, |sum, &digit| sum.checked_mul(8)?.checked_add(u64::from(digit - b'0')))
}

/// Octal, or base 256 (first bit set) for sizes from 8 GiB on.
///
/// Source: `print_tar_number` in PostgreSQL `src/port/tar.c`.
fn number(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    match first {
        0x80 => rest.iter().try_fold(
            0_u64,
            |sum, &byte| {
                if sum >> 56 != 0 { None } else { Some(sum << 8 | u64::from(byte)) }
            },
        ),
        first if first & 0x80 != 0 => None,
        _ => octal(field),
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A header as PostgreSQL makes it.
    pub(in crate::base_backup) fn header(name: &str, kind: u8, size: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..108].copy_from_slice(b"0000600 ");
        block[108..124].copy_from_slice(b"0000000 0000000 ");
        if size < 1 << 33 {
            block[SIZE].copy_from_slice(format!("{size:011o} ").as_bytes());
        } else {
            block[SIZE.start] = 0x80;
            block[SIZE.end - 8..SIZE.end].copy_from_slice(&size.to_be_bytes());
        }
        block[136..148].copy_from_slice(b"14000000000 ");
        block[TYPE] = kind;
        block[MAGIC].copy_from_slice(b"ustar\0");
        block[263..265].copy_from_slice(b"00");
        sign(&mut block);
        block
    }

    pub(in crate::base_backup) fn sign(block: &mut [u8; BLOCK]) {
        let sum = format!("{:06o} \0", checksum(block));
        block[CHECKSUM].copy_from_slice(sum.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{header, sign};
    use super::*;
    use proptest::prelude::*;

    fn parse(block: &[u8; BLOCK]) -> Result<Header, String> {
        Header::parse(block).map(|header| header.expect("not empty")).map_err(|error| error.to_string())
    }

    #[test]
    fn what_postgresql_writes_is_read() {
        let file = parse(&header("base/5/1259", b'0', 8192)).unwrap();
        assert_eq!((file.name.as_slice(), file.kind, file.size), (&b"base/5/1259"[..], EntryKind::File, 8192));
        let directory = parse(&header("pg_wal/", b'5', 0)).unwrap();
        assert_eq!((directory.name.as_slice(), directory.kind), (&b"pg_wal"[..], EntryKind::Directory));
        assert_eq!(parse(&header("base/1/2", b'0', 40 << 30)).unwrap().size, 40 << 30);
        let status = parse(&header("./pg_wal/archive_status", b'5', 0)).unwrap();
        assert_eq!(status.name, b"pg_wal/archive_status");
        assert_eq!(parse(status.block()).unwrap(), status);
        assert!(Header::parse(&[0; BLOCK]).unwrap().is_none());
    }

    #[test]
    fn names_and_kinds_that_could_escape_are_refused() {
        for name in ["/etc/passwd", "../x", "a/../b", "a//b", "././a", "./", "a/.", "", "a/"] {
            assert!(parse(&header(name, b'0', 0)).is_err(), "{name}");
        }
        for kind in [b'1', b'3', b'4', b'6', b'7', b'x', b'g', b'L', b'K', b'S', 0xff] {
            assert!(parse(&header("a", kind, 0)).is_err(), "{kind}");
        }
        assert!(parse(&header("a", b'5', 512)).is_err());
        let mut unsigned = header("a", b'0', 1);
        unsigned[0] = b'b';
        assert!(parse(&unsigned).unwrap_err().contains("checksum"));
        let mut huge = header("a", b'0', 1);
        huge[SIZE].copy_from_slice(&[0xff; 12]);
        sign(&mut huge);
        assert!(parse(&huge).is_err());
        huge[SIZE].copy_from_slice(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff");
        sign(&mut huge);
        assert!(parse(&huge).is_err());
    }

    #[test]
    fn a_moved_entry_is_what_tar_reads() {
        let long = format!("PG_17_202406281/5/{}", "a".repeat(80));
        for (name, folder) in [("PG_15/5/1", "pg_tblspc/16394"), (long.as_str(), "pg_tblspc/4294967295")] {
            for kind in [b'0', b'5'] {
                let given = if kind == b'5' { format!("{name}/") } else { name.to_owned() };
                if given.len() > 100 {
                    continue;
                }
                let moved = parse(&header(&given, kind, 0)).unwrap().below(folder).unwrap();
                assert_eq!(parse(moved.block()).unwrap(), moved);
                let mut stream = moved.block().to_vec();
                stream.extend_from_slice(&[0; 1024]);
                let mut archive = tar::Archive::new(&stream[..]);
                let entry = archive.entries().unwrap().next().unwrap().unwrap();
                let expected = format!("{folder}/{given}");
                assert_eq!(entry.path_bytes().as_ref(), expected.as_bytes());
            }
        }
        let no_slash = parse(&header(&"a".repeat(100), b'0', 0)).unwrap();
        assert!(no_slash.below(&"b".repeat(160)).is_err());
    }

    proptest! {
        #[test]
        fn no_block_makes_it_panic(mut block in proptest::array::uniform32(any::<[u8; 16]>()), signed in any::<bool>()) {
            block[16][1..7].copy_from_slice(b"ustar\0");
            let mut flat = [0; BLOCK];
            flat.copy_from_slice(block.as_flattened());
            if signed {
                sign(&mut flat);
            }
            if let Ok(Some(header)) = Header::parse(&flat) {
                let _ = header.below("pg_tblspc/1");
            }
        }
    }
}
