use super::super::header::testing::header;
use super::*;
use crate::seal::Compression;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::Read;

fn entry(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, kind, content.len() as u64).to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    bytes
}

/// A control file as PostgreSQL 17 would write it, with nothing in it but what is checked.
fn control_file() -> Vec<u8> {
    let mut content = vec![0; 8192];
    content[8..12].copy_from_slice(&1700_u32.to_le_bytes());
    content[16] = 6;
    content[48] = 1;
    content[208..216].copy_from_slice(&1_234_567.0_f64.to_le_bytes());
    content[228..232].copy_from_slice(&(16_u32 << 20).to_le_bytes());
    let crc32c = crc32c::crc32c(&content[..288]);
    content[288..292].copy_from_slice(&crc32c.to_le_bytes());
    content
}

type Volume = Vec<(String, Vec<u8>)>;

/// The volumes, read by the tar crate.
fn split(archives: &[(Option<u32>, Vec<u8>)], volume_bytes: u64, step: usize) -> Result<Vec<Volume>, BackupError> {
    let mut splitter = Splitter::new(volume_bytes, PartEncoder::new(Compression::Lz4, 0)?);
    for (tablespace, archive) in archives {
        splitter.begin_archive(*tablespace)?;
        for chunk in archive.chunks(step) {
            splitter.push(chunk)?;
        }
    }
    splitter.finish()?;
    let mut objects: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while let Some(part) = splitter.parts().take_ready() {
        objects.entry(part.object).or_default().extend_from_slice(&part.bytes);
    }
    Ok(objects.values().map(|stored| read_volume(stored, volume_bytes)).collect())
}

fn read_volume(stored: &[u8], volume_bytes: u64) -> Volume {
    let mut raw = Vec::new();
    lz4_flex::frame::FrameDecoder::new(stored).read_to_end(&mut raw).unwrap();
    let volume: Volume = tar::Archive::new(&raw[..])
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (name, content)
        })
        .collect();
    assert!(raw.len() as u64 <= volume_bytes || volume.len() == 1, "only a huge file may pass the bound");
    assert!(raw.ends_with(&TRAILER));
    volume
}

#[test]
fn tablespaces_move_links_go_and_the_control_file_comes_last() {
    let control = control_file();
    let main = [
        entry("backup_label", b'0', b"START"),
        entry("global/", b'5', b""),
        entry("global/pg_control", b'0', &control),
        entry("pg_tblspc/", b'5', b""),
        entry("pg_tblspc/16394", b'2', b""),
        entry("base/5/1", b'0', &[1; 700]),
        vec![0; 1024],
    ];
    let tablespace = [entry("PG_17_202406281/", b'5', b""), entry("PG_17_202406281/5/1", b'0', b"x")].concat();
    let volumes = split(&[(Some(16394), tablespace), (None, main.concat())], 1 << 30, 777).unwrap();
    let names: Vec<&str> = volumes[0].iter().map(|(name, _)| name.as_str()).collect();
    let expected = [
        "pg_tblspc/16394/",
        "pg_tblspc/16394/PG_17_202406281/",
        "pg_tblspc/16394/PG_17_202406281/5/1",
        "backup_label",
        "global/",
        "pg_tblspc/",
        "base/5/1",
        "global/pg_control",
    ];
    assert_eq!(names, expected);
    assert!(volumes[0].last().unwrap().1 == control);
}

#[test]
fn hostile_archives_are_refused() {
    let control = entry("global/pg_control", b'0', &control_file());
    let refused = [
        [control.clone(), control.clone()].concat(),
        entry("base/1", b'0', b""),
        [entry("base/x", b'2', b""), control.clone()].concat(),
        [entry("pg_tblspc/../x", b'2', b""), control.clone()].concat(),
        [entry("/etc/passwd", b'0', b""), control.clone()].concat(),
        entry("global/pg_control", b'0', &[0; 8192]),
        entry("global/pg_control", b'0', &vec![0; 70_000]),
        control[..5000].to_vec(),
    ];
    for (at, archive) in refused.into_iter().enumerate() {
        assert!(split(&[(None, archive)], 1 << 30, 512).is_err(), "{at}");
    }
    let link = entry("pg_tblspc/1", b'2', b"");
    assert!(split(&[(Some(5), link), (None, control)], 1 << 30, 512).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn every_file_is_in_one_volume_whole(
        sizes in proptest::collection::vec(0_usize..6000, 0..20),
        volume_bytes in 4096_u64..40_000,
        step in 1_usize..5000,
    ) {
        let files: Volume = sizes.iter().enumerate()
            .map(|(at, &size)| (format!("base/5/{at}"), vec![at as u8; size]))
            .collect();
        let mut main: Vec<u8> = files.iter().flat_map(|(name, content)| entry(name, b'0', content)).collect();
        main.extend(entry("global/pg_control", b'0', &control_file()));
        main.extend([0; 1024]);
        let volumes = split(&[(None, main)], volume_bytes, step).unwrap();
        let last = volumes.last().unwrap().last().unwrap().0.clone();
        prop_assert_eq!(last, "global/pg_control");
        let mut all: Volume = volumes.into_iter().flatten().collect();
        all.pop();
        prop_assert_eq!(all, files);
    }
}
