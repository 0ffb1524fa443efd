//! What indexing costs per byte of WAL: `cargo bench --bench indexer`.
//!
//! Reads segments from the folder in WALDEN_BENCH_WAL (uncompressed, as in `pg_wal`), else the small ones of the tests,
//! fed as they come from a socket, 128 KiB at a time. The live path's whole budget for it is 0.05 CPU-seconds per GiB.

use std::path::Path;

use divan::Bencher;
use divan::counter::BytesCount;
use walden::wal::{Indexer, IndexerStart, RecordScanner, ScanStart, SegmentName, SegmentSize};

const PIECE: usize = 128 << 10;

fn main() {
    divan::main();
}

/// Segments of one timeline, each as it begins a stream.
fn segments() -> Vec<(SegmentName, Vec<u8>)> {
    let mut found = Vec::new();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wal");
    let given = std::env::var_os("WALDEN_BENCH_WAL");
    let folder = given.as_ref().map_or(fixtures.as_path(), Path::new);
    for entry in std::fs::read_dir(folder).expect("the folder of segments").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut bytes = std::fs::read(entry.path()).expect("a readable segment");
        let name = match name.strip_suffix(".lz4") {
            Some(stem) => {
                let mut raw = Vec::new();
                let mut decoder = lz4_flex::frame::FrameDecoder::new(&bytes[..]);
                std::io::Read::read_to_end(&mut decoder, &mut raw).expect("an LZ4 frame");
                bytes = raw;
                stem.rsplit('-').next().unwrap_or(stem).to_owned()
            }
            None => name,
        };
        let size = SegmentSize::new(bytes.len() as u64);
        if let Some(name) = size.ok().and_then(|size| SegmentName::parse(&name, size).ok()) {
            found.push((name, bytes));
        }
    }
    assert!(!found.is_empty(), "no segments in {}", folder.display());
    found.sort_by_key(|(name, _)| *name);
    found
}

fn total(segments: &[(SegmentName, Vec<u8>)]) -> BytesCount {
    BytesCount::new(segments.iter().map(|(_, bytes)| bytes.len()).sum::<usize>())
}

#[divan::bench]
fn index(bencher: Bencher) {
    let segments = segments();
    bencher.counter(total(&segments)).bench_local(|| {
        let mut records = 0;
        for (name, bytes) in &segments {
            let mut indexer = Indexer::new(IndexerStart {
                timeline: name.timeline(),
                position: name.start(),
                segment_size: name.size(),
                system_identifier: None,
                branch_max_time: None,
            });
            for piece in bytes.chunks(PIECE) {
                indexer.feed(piece).expect("WAL of PostgreSQL");
            }
            records += indexer.cut().records;
        }
        records
    });
}

#[divan::bench]
fn scan(bencher: Bencher) {
    let segments = segments();
    bencher.counter(total(&segments)).bench_local(|| {
        let mut records = 0u64;
        for (name, bytes) in &segments {
            let mut scanner = RecordScanner::new(ScanStart {
                timeline: name.timeline(),
                position: name.start(),
                segment_size: name.size(),
                system_identifier: None,
            });
            for piece in bytes.chunks(PIECE) {
                scanner.feed(piece, |_| records += 1).expect("WAL of PostgreSQL");
            }
        }
        records
    });
}

/// The floor: reading every byte once.
#[divan::bench]
fn touch(bencher: Bencher) {
    let segments = segments();
    bencher.counter(total(&segments)).bench_local(|| {
        segments.iter().map(|(_, bytes)| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>()).sum::<u64>()
    });
}
