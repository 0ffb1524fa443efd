use super::*;
use crate::base_backup::parts::{PART_BYTES, PartEncoder};
use crate::repository::{BackupId, Repository};
use crate::seal::Compression;
use crate::storage::ObjectStore;
use crate::storage::faulty::{Effect, Failure, FaultPlan, FaultyStore, Operation, Rule};
use crate::wal::{PgTime, SystemIdentifier};

/// Bytes that do not compress, for two parts and a little.
static NOISE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
    let mut state = 1_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ state >> 29).to_le_bytes()
    };
    std::iter::repeat_with(next).take(PART_BYTES / 4 + 125).flatten().collect()
});

struct Fixture {
    plan: FaultPlan,
    stores: Vec<Arc<dyn ObjectStore>>,
    writers: Vec<BackupWriter>,
    stop: CancellationToken,
    _folder: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let plan = FaultPlan::new();
    let faulty = FaultyStore::new(crate::storage::open_local(folder.path().join("a")), plan.clone());
    let stores: Vec<Arc<dyn ObjectStore>> = vec![faulty, crate::storage::open_local(folder.path().join("b"))];
    let mut writers = Vec::new();
    for store in &stores {
        store.probe("main/walden-check/").await.unwrap();
        let archive = Repository::new("r", "main", store.clone()).unwrap().bind(SystemIdentifier::new(7));
        writers.push(archive.backup_writer(BackupId::full_at(PgTime::from_pg_micros(0))).await.unwrap());
    }
    Fixture { plan, stores, writers, stop: CancellationToken::new(), _folder: folder }
}

impl Fixture {
    fn uploader(&self) -> Uploader {
        Uploader {
            places: self.writers.iter().map(|writer| Place::new(writer.clone(), true)).collect(),
            parts_in_flight: 3,
            retry_delay_max: Duration::from_millis(2),
            stop: self.stop.clone(),
        }
    }

    /// A large object of three parts and a small one, as a backup would give them.
    async fn run(&self) -> Result<BTreeMap<String, StoredPart>, BackupError> {
        self.run_with(self.uploader()).await
    }

    async fn run_with(&self, uploader: Uploader) -> Result<BTreeMap<String, StoredPart>, BackupError> {
        let mut encoder = PartEncoder::new(Compression::Lz4, 0).unwrap();
        encoder.begin("volumes/000001.tar");
        encoder.write(&NOISE).unwrap();
        encoder.finish().unwrap();
        encoder.begin("backup_manifest");
        encoder.write(b"{}").unwrap();
        encoder.finish().unwrap();
        let (sender, receiver) = mpsc::channel(1);
        let feed = async move {
            while let Some(part) = encoder.take_ready() {
                if sender.send(part).await.is_err() {
                    break;
                }
            }
        };
        tokio::join!(uploader.run(receiver), feed).0
    }

    async fn keys(&self, store: usize) -> Vec<String> {
        let found = self.stores[store].list("main/7/backups/", None).await.unwrap();
        found.into_iter().map(|object| object.key).collect()
    }

    async fn assert_stored(&self, stored: &BTreeMap<String, StoredPart>) {
        assert_eq!(stored.len(), 2);
        for writer in &self.writers {
            for (name, part) in stored {
                let key = writer.key(name);
                assert!(writer.archive().holds(&key, part.stored_bytes, part.stored_crc32).await.unwrap(), "{key}");
            }
        }
    }
}

#[tokio::test]
async fn every_part_reaches_every_repository() {
    let fixture = fixture().await;
    let stored = fixture.run().await.unwrap();
    fixture.assert_stored(&stored).await;
    assert_eq!(stored["volumes/000001.tar.lz4"].raw_bytes, PART_BYTES as u64 * 2 + 1000);
}

#[tokio::test]
async fn a_failed_part_is_tried_again_not_the_backup() {
    for operation in [Operation::PutNew, Operation::BeginMultipart, Operation::PutPart, Operation::Complete] {
        for effect in [Effect::Fail(Failure::Unavailable), Effect::Fail(Failure::Full), Effect::AnswerLost] {
            let fixture = fixture().await;
            fixture.plan.add(Rule::new(operation, effect).keys("backups/").times(3));
            let stored = fixture.run().await.unwrap();
            fixture.assert_stored(&stored).await;
            // A lost answer is found to be none: the object is there.
            assert!(fixture.plan.hits() >= 1, "{operation:?} {effect:?}");
        }
    }
}

/// A store that has forgotten the upload never takes a part of it again: the backup waited for ever.
#[tokio::test]
async fn an_upload_that_the_store_forgot_ends_the_backup() {
    for operation in [Operation::PutPart, Operation::Complete] {
        let fixture = fixture().await;
        fixture.plan.add(Rule::new(operation, Effect::Fail(Failure::UploadGone)));
        let ended = tokio::time::timeout(Duration::from_secs(20), fixture.run()).await.expect("it ends");
        assert!(
            matches!(ended, Err(BackupError::Repository(RepositoryError::Storage(StorageError::UploadGone { .. })))),
            "{operation:?}: {ended:?}"
        );
    }
}

#[tokio::test]
async fn a_cancelled_upload_leaves_no_object() {
    let fixture = fixture().await;
    fixture.plan.add(Rule::new(Operation::PutPart, Effect::Hang));
    let stop = fixture.stop.clone();
    let cancel = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.cancel();
    };
    let (outcome, ()) = tokio::join!(fixture.run(), cancel);
    assert!(matches!(outcome, Err(BackupError::Cancelled)));
    for (store, writer) in fixture.writers.iter().enumerate() {
        assert!(!fixture.keys(store).await.iter().any(|key| key.contains("volumes/")));
        writer.discard().await.unwrap();
        assert_eq!(fixture.keys(store).await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn another_object_of_the_same_name_ends_the_backup() {
    let fixture = fixture().await;
    let key = fixture.writers[0].key("backup_manifest.lz4");
    let other = bytes::Bytes::from_static(b"other");
    let crc32 = crc32fast::hash(&other);
    fixture.stores[0].put_new(&key, &Body::Bytes(other), crc32).await.unwrap();
    assert!(matches!(fixture.run().await, Err(BackupError::Repository(RepositoryError::OtherContent { .. }))));
}

/// A repository that is not required and fails is left out; the others have everything. It ended the backup, or stopped it for ever.
#[tokio::test]
async fn one_that_is_not_required_is_left_out() {
    let failures = [Effect::Fail(Failure::Unavailable), Effect::Hang];
    for operation in [Operation::PutNew, Operation::BeginMultipart, Operation::PutPart, Operation::Complete] {
        for effect in failures {
            let mut fixture = fixture().await;
            fixture.plan.add(Rule::new(operation, effect).keys("backups/"));
            let mut uploader = fixture.uploader();
            let patience = Duration::from_millis(300);
            uploader.places[0] = Place { patience, ..Place::new(fixture.writers[0].clone(), false) };
            let places = uploader.places.clone();
            let stored = fixture.run_with(uploader).await.unwrap();
            fixture.writers.remove(0);
            fixture.assert_stored(&stored).await;
            assert!(places[0].is_left_out() && !places[1].is_left_out(), "{operation:?} {effect:?}");
        }
    }
}
