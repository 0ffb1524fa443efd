use super::*;
use crate::archive::held::tests::{finish, segment, size};
use crate::archive::held::{name_finished, tests};
use crate::archive::live::small_entry;
use crate::repository::test_support::{SYSTEM, writer};
use crate::wal::TimelineId;

struct Bench {
    folder: tempfile::TempDir,
    spool: Spool,
    writer: RepositoryWriter,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::open(Disk::default(), &folder.path().join("spool"), "main", SYSTEM).unwrap();
        let writer = writer(folder.path()).await;
        Self { folder, spool, writer }
    }

    async fn put(&self, entry: &QueueEntry) -> Result<(), ArchiveError> {
        put_spooled(&self.spool, size(), &self.writer, entry, false, true).await
    }

    async fn stored(&self, folder: &str) -> usize {
        let prefix = format!("main/{SYSTEM}/{folder}");
        self.writer.archive().list(&prefix, None).await.unwrap().len()
    }
}

/// A history file was sent as it lay in the spool, whatever had become of it there: a wrong one cannot be replaced in the repository
/// (I13, I2; D4 of the failure table).
#[tokio::test]
async fn a_history_file_that_changed_in_the_spool_is_not_stored() {
    let bench = Bench::new().await;
    let content = b"1\t0/5000000\tno recovery target specified\n";
    let timeline = TimelineId::new(2).unwrap();
    let name = bench.spool.write_small(Spool::history(timeline), content).unwrap();
    let entry = small_entry(&name, content);
    let path = bench.spool.path_of(&name);
    for damaged in [&b"1\t0/5000001\tno recovery target specified\n"[..], &content[..20], b""] {
        std::fs::write(&path, damaged).unwrap();
        let error = bench.put(&entry).await.unwrap_err();
        assert_eq!(error.next_step(), NextStep::FetchAgain, "{error}");
    }
    // Without a record, only its own sense is left.
    let nonsense = b"not a history";
    std::fs::write(&path, nonsense).unwrap();
    let error = bench.put(&small_entry(&name, nonsense)).await.unwrap_err();
    assert_eq!(error.next_step(), NextStep::FetchAgain, "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = bench.put(&entry).await.unwrap_err();
    assert_eq!(error.next_step(), NextStep::FetchAgain, "{error}");
    assert_eq!(bench.stored("wal/").await, 0);
    std::fs::write(&path, content).unwrap();
    bench.put(&entry).await.unwrap();
    assert_eq!(bench.stored("wal/").await, 1);
}

/// A spooled segment that had vanished was looked for again and again, and never asked of the server (I3).
#[tokio::test]
async fn a_segment_that_vanished_from_the_spool_is_fetched_again() {
    let bench = Bench::new().await;
    finish(&bench.spool, segment(1));
    let entries = name_finished(&bench.spool, tests::SYSTEM, size()).unwrap();
    std::fs::remove_file(bench.spool.folder().join(&entries[0].relative)).unwrap();
    let error = bench.put(&entries[0]).await.unwrap_err();
    assert!(matches!(error, ArchiveError::Spool(SpoolError::Gone { .. })), "{error}");
    assert_eq!(error.next_step(), NextStep::FetchAgain);
    assert!(!bench.spool.quarantine(&bench.spool.folder().join(&entries[0].relative)).unwrap());
}

/// A gap is told although its file was damaged: its name says all but the reason (I3).
#[tokio::test]
async fn a_gap_is_stored_whatever_became_of_its_file() {
    let bench = Bench::new().await;
    let gap = gap_of(SYSTEM, TimelineId::FIRST, segment(2).start(), segment(3).end(), "a test");
    let name = bench.spool.write_small(Spool::gap(gap.timeline, gap.from_lsn, gap.to_lsn), &gap.to_json()).unwrap();
    std::fs::write(bench.spool.path_of(&name), b"{}").unwrap();
    bench.put(&small_entry(&name, &gap.to_json())).await.unwrap();
    let stored = bench.writer.archive().gaps(size()).await.unwrap();
    assert_eq!((stored.len(), stored[0].from_lsn, stored[0].to_lsn), (1, gap.from_lsn, gap.to_lsn));
    assert!(bench.folder.path().exists());
}
