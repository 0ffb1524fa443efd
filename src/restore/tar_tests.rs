use super::*;

/// A ustar header as PostgreSQL makes it.
pub(crate) fn header(path: &str, kind: u8, size: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..path.len()].copy_from_slice(path.as_bytes());
    block[100..107].copy_from_slice(b"0000600");
    block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    seal(&mut block);
    block
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

pub(crate) fn file(path: &str, data: &[u8]) -> Vec<u8> {
    let mut out = header(path, b'0', data.len() as u64);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

pub(crate) fn directory(path: &str) -> Vec<u8> {
    header(path, b'5', 0)
}

pub(crate) fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut out = entries.concat();
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

#[derive(Default)]
struct Seen(Vec<(String, Option<Vec<u8>>)>, u32);

impl TarSink for Seen {
    type Error = TarError;

    fn entry(&mut self, entry: TarEntry) -> Result<(), TarError> {
        let data = matches!(entry.kind, TarKind::File { .. }).then(Vec::new);
        self.0.push((String::from_utf8(entry.path).unwrap(), data));
        Ok(())
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        self.0.last_mut().unwrap().1.as_mut().unwrap().extend_from_slice(bytes);
        Ok(())
    }

    fn file_end(&mut self) -> Result<(), TarError> {
        self.1 += 1;
        Ok(())
    }
}

fn read(bytes: &[u8], step: usize) -> Result<Seen, TarError> {
    let (mut reader, mut seen) = (TarReader::default(), Seen::default());
    for piece in bytes.chunks(step) {
        reader.push(piece, &mut seen)?;
    }
    reader.finish()?;
    Ok(seen)
}

#[test]
fn files_and_directories_come_out_whatever_the_pieces() {
    let big: Vec<u8> = (0..70_000u32).map(|n| n as u8).collect();
    let bytes = archive(&[directory("base/"), file("base/1", &big), file("empty", b""), file("x", &[7; 512])]);
    for step in [1, 7, 511, 512, 513, 4096, bytes.len()] {
        let seen = read(&bytes, step).unwrap();
        assert_eq!(seen.1, 3);
        let expected = vec![
            ("base".to_string(), None),
            ("base/1".to_string(), Some(big.clone())),
            ("empty".to_string(), Some(vec![])),
            ("x".to_string(), Some(vec![7; 512])),
        ];
        assert_eq!(seen.0, expected, "{step}");
    }
}

#[test]
fn what_a_base_backup_does_not_contain_is_refused() {
    for kind in [b'1', b'2', b'3', b'4', b'6', b'7', b'x', b'g', b'L', b'K', b'S', b'z'] {
        let bytes = archive(&[header("base/1", kind, 0)]);
        assert!(matches!(read(&bytes, 512), Err(TarError::Kind { .. })), "{}", kind as char);
    }
    // The stock crate's PAX entry that lies about the size of the next one.
    assert!(read(&archive(&[header("PaxHeaders/x", b'x', 20), file("a", b"b")]), 512).is_err());
}

#[test]
fn a_damaged_archive_is_an_error_not_a_panic() {
    let good = archive(&[file("a", b"data")]);
    let mut flipped = good.clone();
    flipped[3] ^= 1;
    assert_eq!(read(&flipped, 512).err(), Some(TarError::Checksum));
    for length in [1, 511, 512, 700, 1024] {
        assert_eq!(read(&good[..length], 64).err(), Some(TarError::Short), "{length}");
    }
    assert!(read(&[], 1).is_err());
    let mut after = good.clone();
    after.push(1);
    assert_eq!(read(&after, 512).err(), Some(TarError::AfterEnd));
    let mut huge = header("a", b'0', 0);
    huge[124..136].copy_from_slice(&[0xFF; 12]);
    seal(&mut huge);
    assert_eq!(read(&archive(&[huge]), 512).err(), Some(TarError::Field("size")));
    let mut junk = header("a", b'0', 0);
    junk[124..136].copy_from_slice(b"00000000 9x\0");
    seal(&mut junk);
    assert_eq!(read(&archive(&[junk]), 512).err(), Some(TarError::Field("size")));
    assert!(read(&archive(&[header("dir/", b'0', 0)]), 512).is_err(), "a file that looks like a directory");
    assert!(read(&archive(&[header("dir", b'5', 512)]), 512).is_err(), "a directory with content");
}

#[test]
fn a_long_name_stands_in_the_prefix_and_a_large_size_in_binary() {
    let mut block = header("leaf", b'0', 0);
    block[345..350].copy_from_slice(b"a/b/c");
    block[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1]);
    seal(&mut block);
    let entry = parse_header(&block).unwrap();
    assert_eq!(entry, TarEntry { path: b"a/b/c/leaf".to_vec(), kind: TarKind::File { size: 0x2_0000_0001 } });
}
