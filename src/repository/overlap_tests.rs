use std::time::Duration;

use super::super::writer::tests::{SYSTEM, seal_with, writer};
use super::*;
use crate::repository::{Repository, RepositoryWriter};
use crate::seal::Compression;
use crate::storage::faulty::{Effect, FaultPlan, FaultyStore, Operation, Rule};
use crate::storage::open_local;
use crate::wal::{SegmentSize, Summary, TimelineId};

const PIECE: usize = 4096;

fn segment() -> SegmentName {
    SegmentName::holding(TimelineId::FIRST, Lsn::new(0x100_0000), SegmentSize::DEFAULT)
}

async fn put(writer: &RepositoryWriter, start: usize, raw: &[u8]) {
    let sealed = seal_with(segment(), start as u64, raw, Compression::Lz4, 0, Summary::default());
    let (start, end) = (u32::try_from(start).unwrap(), u32::try_from(start + raw.len()).unwrap());
    writer.put_piece(segment(), start, end, &sealed).await.unwrap();
}

fn raw(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n * n / 7 % 251) as u8).collect()
}

/// The same repository, with its reads of objects counted.
fn counted(root: &std::path::Path) -> (Archive, FaultPlan) {
    let plan = FaultPlan::new();
    plan.add(Rule::new(Operation::GetStream, Effect::Delay(Duration::ZERO)));
    let store = FaultyStore::new(open_local(root.join("repository")), plan.clone());
    (Repository::new("main", "main", store).unwrap().bind(SYSTEM), plan)
}

/// A timeline's last part overlaps all the short pieces that were sent before it, and was read once for each of them: a plan took an
/// hour of requests.
#[tokio::test]
async fn each_piece_is_read_once_however_many_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(500 * PIECE);
    for (number, piece) in bytes.chunks(PIECE).enumerate() {
        put(&writer, number * PIECE, piece).await;
    }
    put(&writer, 0, &bytes).await;
    let (archive, plan) = counted(folder.path());
    archive.check_overlaps(segment()).await.unwrap();
    assert_eq!(plan.hits(), 501);
    let chain = PieceChain::of(&archive.pieces(segment()).await.unwrap());
    let crc32 = archive.prefix_crc32(&chain.pieces, 1_000_000).await.unwrap();
    assert_eq!(crc32, crc32fast::hash(&bytes[..1_000_000]));
}

#[tokio::test]
async fn overlaps_of_every_kind_are_compared_and_the_first_difference_is_told() {
    // The ranges, in bytes; the last piece of each list has one byte changed, at the offset given.
    let cases: [(&[(usize, usize)], usize); 6] = [
        (&[(0, 3_000_000), (1_500_000, 2_900_000)], 2_800_000),
        (&[(0, 3_000_000), (1_500_000, 1_600_000)], 1_500_000),
        (&[(0, 10_000), (9_000, 20_000)], 9_999),
        (&[(0, 10_000), (10_000, 20_000), (9_000, 11_000)], 10_500),
        (&[(0, 20_000), (1_000, 3_000), (2_000, 4_000), (1_500, 2_500)], 2_400),
        (&[(0, 20_000), (5_000, 6_000), (0, 20_001)], 5_500),
    ];
    for (ranges, changed) in cases {
        for is_changed in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let writer = writer(folder.path()).await;
            let bytes = raw(3_000_000);
            for (n, &(start, end)) in ranges.iter().enumerate() {
                let mut piece = bytes[start..end].to_vec();
                if is_changed && n + 1 == ranges.len() {
                    piece[changed - start] ^= 1;
                }
                put(&writer, start, &piece).await;
            }
            let checked = writer.archive().check_overlaps(segment()).await;
            match checked {
                Ok(()) => assert!(!is_changed, "{ranges:?}"),
                Err(RepositoryError::PiecesDiffer { at, .. }) if is_changed => {
                    assert_eq!(at, Lsn::new(0x100_0000 + changed as u64), "{ranges:?}");
                }
                Err(error) => panic!("{ranges:?}: {error}"),
            }
        }
    }
}

/// A piece that was changed on its way, or on its disk, is damaged and no other history.
#[tokio::test]
async fn a_damaged_piece_is_no_conflict() {
    let folder = tempfile::tempdir().unwrap();
    let writer = writer(folder.path()).await;
    let bytes = raw(2_000_000);
    put(&writer, 0, &bytes).await;
    put(&writer, 100_000, &bytes[100_000..1_900_000]).await;
    let (archive, plan) = counted(folder.path());
    for key in ["00000000-", "000186A0-"] {
        plan.clear();
        plan.add(Rule::new(Operation::GetStream, Effect::FlipByte).keys(key));
        let error = archive.check_overlaps(segment()).await.unwrap_err();
        assert!(matches!(error, RepositoryError::Damaged { .. }), "{key}: {error}");
    }
    plan.clear();
    archive.check_overlaps(segment()).await.unwrap();
}
