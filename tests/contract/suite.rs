//! What every store promises. Each function proves one sentence on an empty corner of a store that was probed before.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use walden::storage::{Body, ObjectStore, PutOutcome, StorageError};

pub type Store = Arc<dyn ObjectStore>;

/// Bytes without a pattern that a mistake in pieces could hide.
pub fn noise(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect::<Vec<u8>>()
        .into()
}

pub fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub async fn put(store: &Store, key: &str, bytes: &Bytes) -> Result<PutOutcome, StorageError> {
    store.put_new(key, &Body::Bytes(bytes.clone()), crc32fast::hash(bytes)).await
}

pub async fn read(store: &Store, key: &str) -> Bytes {
    store.get(key, 64 * 1024 * 1024).await.unwrap().0
}

async fn keys(store: &Store, prefix: &str) -> Vec<String> {
    store.list(prefix, None).await.unwrap().into_iter().map(|info| info.key).collect()
}

pub async fn an_object_is_created_once_and_stays(store: Store) {
    let (first, second) = (noise(300_000, 1), noise(300_000, 2));
    assert_eq!(put(&store, "once/a", &first).await.unwrap(), PutOutcome::Created);
    assert_eq!(put(&store, "once/a", &first).await.unwrap(), PutOutcome::Exists);
    assert_eq!(put(&store, "once/a", &second).await.unwrap(), PutOutcome::Exists);
    let file = file_of(&second);
    let body = Body::SealedFile { path: file.path().to_owned(), length: second.len() as u64, goes: true };
    assert_eq!(store.put_new("once/a", &body, crc32fast::hash(&second)).await.unwrap(), PutOutcome::Exists);
    assert_eq!(read(&store, "once/a").await, first);
}

/// Only where the store creates atomically (`Abilities::conditional_create`).
pub async fn of_racing_writers_one_wins_and_its_bytes_stay(store: Store) {
    for round in 0..10 {
        let key = format!("race/{round}");
        let writers = (0..6).map(|writer| {
            let (store, key) = (store.clone(), key.clone());
            tokio::spawn(async move {
                let bytes = noise(100_000, 1000 + writer);
                let outcome = if writer % 2 == 0 {
                    put(&store, &key, &bytes).await
                } else {
                    let file = file_of(&bytes);
                    let body =
                        Body::SealedFile { path: file.path().to_owned(), length: bytes.len() as u64, goes: true };
                    store.put_new(&key, &body, crc32fast::hash(&bytes)).await
                };
                (outcome.unwrap(), bytes)
            })
        });
        let results = futures_util::future::join_all(writers).await;
        let won: Vec<Bytes> = results
            .into_iter()
            .map(Result::unwrap)
            .filter(|(outcome, _)| *outcome == PutOutcome::Created)
            .map(|(_, bytes)| bytes)
            .collect();
        assert_eq!(won.len(), 1, "writers that were told that they created {key}");
        assert!(read(&store, &key).await == won[0], "{key} has the bytes of a loser");
    }
}

pub async fn bytes_with_another_checksum_are_refused_and_leave_nothing(store: Store) {
    let bytes = noise(600_000, 3);
    let wrong = crc32fast::hash(&bytes) ^ 1;
    let file = file_of(&bytes);
    let path = file.path().to_owned();
    let (length, prefix, suffix) = (bytes.len() as u64, Bytes::from_static(b"p"), Bytes::new());
    let bodies = [
        Body::Bytes(bytes.clone()),
        Body::SealedFile { path: path.clone(), length, goes: true },
        Body::FileRange { path: path.clone(), offset: 0, length, prefix: prefix.clone(), suffix: suffix.clone() },
        // Longer than the file, and not there.
        Body::SealedFile { path: path.clone(), length: length + 1, goes: true },
        Body::FileRange { path: path.clone(), offset: 1, length, prefix: prefix.clone(), suffix: suffix.clone() },
        Body::FileRange { path: "/nonexistent".into(), offset: 0, length: 1, prefix, suffix },
    ];
    for (number, body) in bodies.into_iter().enumerate() {
        let key = format!("refused/{number}");
        let error = store.put_new(&key, &body, wrong).await.unwrap_err();
        assert!(matches!(error, StorageError::SourceDamaged { .. }), "{number}: {error:?}");
        assert_eq!(store.head(&key).await.unwrap(), None);
    }
    assert_eq!(keys(&store, "refused/").await, Vec::<String>::new());
}

pub async fn objects_are_read_whole_in_part_and_as_a_stream(store: Store) {
    let bytes = noise(700_001, 4);
    put(&store, "read/a", &bytes).await.unwrap();
    assert!(read(&store, "read/a").await == bytes);
    assert!(matches!(store.get("read/a", 700_000).await, Err(StorageError::TooLarge { size_max: 700_000, .. })));
    let range = |offset, length| store.get_range("read/a", offset, length);
    assert!(range(0, 4104).await.unwrap() == bytes[..4104]);
    assert!(range(262_143, 300_000).await.unwrap() == bytes[262_143..562_143]);
    assert!(range(700_000, 10).await.unwrap() == bytes[700_000..]);
    assert_eq!(range(700_001, 10).await.unwrap(), "");
    assert_eq!(range(800_000, 10).await.unwrap(), "");
    assert_eq!(range(0, 0).await.unwrap(), "");
    let chunks: Vec<Bytes> = store.get_stream("read/a").await.unwrap().try_collect().await.unwrap();
    assert!(chunks.concat() == bytes);
    let info = store.head("read/a").await.unwrap().unwrap();
    assert_eq!((info.key.as_str(), info.size), ("read/a", 700_001));
    assert!(info.crc32.is_none_or(|crc32| crc32 == crc32fast::hash(&bytes)));

    assert!(matches!(store.get("read/none", 1).await, Err(StorageError::NotFound { .. })));
    assert!(matches!(store.get_range("read/none", 0, 1).await, Err(StorageError::NotFound { .. })));
    assert!(matches!(store.get_stream("read/none").await, Err(StorageError::NotFound { .. })));
    assert_eq!(store.head("read/none").await.unwrap(), None);
    assert_eq!(store.head("nowhere/at/all").await.unwrap(), None);
}

/// Not for `s3s-fs`, which stores folders and answers 500.
pub async fn a_folder_is_no_object(store: Store) {
    put(&store, "folder/a", &Bytes::new()).await.unwrap();
    assert_eq!(store.head("folder").await.unwrap(), None);
    assert!(matches!(store.get("folder", 1).await, Err(StorageError::NotFound { .. })));
}

pub async fn empty_objects_are_objects(store: Store) {
    let file = file_of(b"");
    let path = file.path().to_owned();
    let bodies = [
        Body::Bytes(Bytes::new()),
        Body::SealedFile { path: path.clone(), length: 0, goes: true },
        Body::FileRange { path, offset: 0, length: 0, prefix: Bytes::new(), suffix: Bytes::new() },
    ];
    for (number, body) in bodies.into_iter().enumerate() {
        let key = format!("empty/{number}");
        assert_eq!(store.put_new(&key, &body, 0).await.unwrap(), PutOutcome::Created);
        assert_eq!(read(&store, &key).await, "");
        assert_eq!(store.head(&key).await.unwrap().unwrap().size, 0);
        assert!(store.get_stream(&key).await.unwrap().next().await.is_none());
    }
}

pub async fn files_are_stored_with_what_goes_around_them(store: Store) {
    let content = noise(1_000_000, 5);
    let file = file_of(&content);
    for (number, (offset, length, prefix, suffix)) in [
        (0, 1_000_000, "", ""),
        (4104, 900_000, "head", "tail"),
        (0, 0, "only", ""),
        (999_999, 1, "", "x"),
        (10, 262_144, "", ""),
    ]
    .into_iter()
    .enumerate()
    {
        let middle = &content[offset..offset + length];
        let expected = [prefix.as_bytes(), middle, suffix.as_bytes()].concat();
        let body = Body::FileRange {
            path: file.path().to_owned(),
            offset: offset as u64,
            length: length as u64,
            prefix: Bytes::from_static(prefix.as_bytes()),
            suffix: Bytes::from_static(suffix.as_bytes()),
        };
        let key = format!("range/{number}");
        assert_eq!(store.put_new(&key, &body, crc32fast::hash(&expected)).await.unwrap(), PutOutcome::Created);
        assert!(read(&store, &key).await == expected, "{number}");
    }
    let body = Body::SealedFile { path: file.path().to_owned(), length: 1_000_000, goes: true };
    assert_eq!(store.put_new("range/sealed", &body, crc32fast::hash(&content)).await.unwrap(), PutOutcome::Created);
    // The file may go as soon as its object is there.
    drop(file);
    assert!(read(&store, "range/sealed").await == content);
}

pub async fn listings_are_complete_sorted_and_below_their_prefix(store: Store) {
    let all =
        ["list/a/1", "list/a/10", "list/a/2", "list/a-b/1", "list/a.history", "list/ab", "list/Z/z", "list/ü/x y+z%"];
    for key in all {
        put(&store, key, &Bytes::from_static(b"x")).await.unwrap();
    }
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    assert_eq!(keys(&store, "list/").await, sorted);
    assert_eq!(keys(&store, "list/a/").await, ["list/a/1", "list/a/10", "list/a/2"]);
    assert_eq!(keys(&store, "list/a/1").await, ["list/a/1", "list/a/10"]);
    assert_eq!(keys(&store, "list/none/").await, Vec::<String>::new());
    let after = |key| store.list("list/", Some(key));
    let after_ten: Vec<String> = after("list/a/10").await.unwrap().into_iter().map(|info| info.key).collect();
    assert_eq!(after_ten, ["list/a/2", "list/ab", "list/ü/x y+z%"]);
    assert_eq!(after("list/zzz").await.unwrap().len(), 1);
    assert_eq!(after("list/ü/z").await.unwrap(), []);
    assert_eq!(store.list_folders("list/").await.unwrap(), ["Z", "a", "a-b", "ü"]);
    assert_eq!(store.list_folders("list/a/").await.unwrap(), Vec::<String>::new());
    assert_eq!(store.list_folders("list/none/").await.unwrap(), Vec::<String>::new());
    assert!(store.list_folders("").await.unwrap().contains(&"list".to_owned()));
    let infos = store.list("list/ab", None).await.unwrap();
    assert_eq!(infos[0].size, 1);
}

pub async fn deleting_is_final_and_may_be_repeated(store: Store) {
    put(&store, "delete/deep/a", &Bytes::from_static(b"1")).await.unwrap();
    store.delete("delete/deep/a").await.unwrap();
    store.delete("delete/deep/a").await.unwrap();
    store.delete("never/was/there").await.unwrap();
    assert_eq!(store.head("delete/deep/a").await.unwrap(), None);
    assert_eq!(store.list_folders("delete/").await.unwrap(), Vec::<String>::new());
    assert_eq!(put(&store, "delete/deep/a", &Bytes::from_static(b"2")).await.unwrap(), PutOutcome::Created);
    assert_eq!(read(&store, "delete/deep/a").await, "2");
    // Several at once, in one folder and in others, and some that are not there.
    let keys: Vec<String> =
        ["deep/a", "deep/b", "deep/c", "other/d", "none/e", "deep/f"].map(|key| format!("delete/{key}")).into();
    for key in &keys[1..4] {
        put(&store, key, &Bytes::from_static(b"3")).await.unwrap();
    }
    put(&store, "delete/deep/stays", &Bytes::from_static(b"4")).await.unwrap();
    store.delete_all(&keys).await.unwrap();
    store.delete_all(&[]).await.unwrap();
    let left: Vec<_> = store.list("delete/", None).await.unwrap().into_iter().map(|object| object.key).collect();
    assert_eq!(left, ["delete/deep/stays"]);
    assert_eq!(store.list_folders("delete/").await.unwrap(), ["deep"]);
}

/// The smallest part that S3 allows before the last.
const PART: usize = 5 * 1024 * 1024;

pub async fn an_object_in_parts_appears_whole_and_once(store: Store) {
    let whole = noise(2 * PART + 12_345, 6);
    let (size, crc32) = (whole.len() as u64, crc32fast::hash(&whole));
    let upload = store.begin_multipart("parts/a").await.unwrap();
    let part = |number: usize| whole.slice((number - 1) * PART..whole.len().min(number * PART));
    let send =
        |number: usize| upload.put_part(u32::try_from(number).unwrap(), part(number), crc32fast::hash(&part(number)));
    // In any order, at the same time, and twice.
    let (third, first, second) = tokio::join!(send(3), send(1), send(2));
    third.and(first).and(second).unwrap();
    send(2).await.unwrap();
    assert_eq!(store.head("parts/a").await.unwrap(), None, "it is not there before it is complete");
    assert_eq!(upload.complete(size, crc32).await.unwrap(), PutOutcome::Created);
    assert!(read(&store, "parts/a").await == whole);
    assert_eq!(store.head("parts/a").await.unwrap().unwrap().size, size);

    let other = noise(100, 7);
    let upload = store.begin_multipart("parts/a").await.unwrap();
    upload.put_part(1, other.clone(), crc32fast::hash(&other)).await.unwrap();
    assert_eq!(upload.complete(100, crc32fast::hash(&other)).await.unwrap(), PutOutcome::Exists);
    assert!(read(&store, "parts/a").await == whole);
}

pub async fn parts_that_are_not_the_whole_are_refused(store: Store) {
    let bytes = noise(1000, 8);
    let crc32 = crc32fast::hash(&bytes);
    let upload = store.begin_multipart("unfinished/a").await.unwrap();
    let wrong = upload.put_part(1, bytes.clone(), crc32 ^ 1).await.unwrap_err();
    assert!(matches!(wrong, StorageError::SourceDamaged { .. }), "{wrong:?}");
    upload.put_part(1, bytes.clone(), crc32).await.unwrap();
    for (size, crc32) in [(1000, crc32 ^ 1), (999, crc32)] {
        let wrong = upload.complete(size, crc32).await.unwrap_err();
        assert!(matches!(wrong, StorageError::SourceDamaged { .. }), "{wrong:?}");
    }
    upload.abort().await.unwrap();
    drop(upload);
    drop(store.begin_multipart("unfinished/b").await.unwrap());
    assert_eq!(keys(&store, "unfinished/").await, Vec::<String>::new());
}

/// Only where the store updates atomically (`Abilities::conditional_update`) are the racers held to one winner.
pub async fn a_changed_object_is_not_replaced(store: Store, atomic: bool) {
    let swap = |text: &'static str, expected: Option<String>| {
        let store = store.clone();
        async move {
            store
                .compare_and_swap("swap/lease.json", Bytes::from_static(text.as_bytes()), expected.as_deref())
                .await
                .unwrap()
        }
    };
    let version = async || store.get("swap/lease.json", 100).await.unwrap().1;
    assert_eq!(swap("x", Some("\"0123\"".to_owned())).await, PutOutcome::Exists, "there is nothing to replace");
    assert_eq!(swap("one", None).await, PutOutcome::Created);
    assert_eq!(swap("two", None).await, PutOutcome::Exists);
    let first = version().await;
    assert!(first.is_some());
    assert_eq!(swap("three", first.clone()).await, PutOutcome::Created);
    assert_eq!(swap("four", first).await, PutOutcome::Exists);
    assert_eq!(read(&store, "swap/lease.json").await, "three");
    if atomic {
        for round in 0..5 {
            let before = version().await;
            let racers = (0..5).map(|racer| {
                let (store, before, text) = (store.clone(), before.clone(), Bytes::from(format!("{round}-{racer}")));
                tokio::spawn(async move {
                    (store.compare_and_swap("swap/lease.json", text.clone(), before.as_deref()).await.unwrap(), text)
                })
            });
            let results = futures_util::future::join_all(racers).await;
            let won: Vec<Bytes> = results
                .into_iter()
                .map(Result::unwrap)
                .filter(|(outcome, _)| *outcome == PutOutcome::Created)
                .map(|(_, text)| text)
                .collect();
            assert_eq!(won.len(), 1);
            assert_eq!(read(&store, "swap/lease.json").await, won[0]);
        }
    }
    store.delete("swap/lease.json").await.unwrap();
}

pub async fn listings_of_many_keys_are_complete(store: Store) {
    let names: BTreeSet<String> = (0..1003).map(|number| format!("many/{:02}/{number:04}", number % 7)).collect();
    let puts = names.iter().map(|key| {
        let store = &store;
        async move { put(store, key, &Bytes::new()).await.unwrap() }
    });
    let outcomes: Vec<PutOutcome> = futures_util::stream::iter(puts).buffer_unordered(16).collect().await;
    assert!(outcomes.iter().all(|outcome| *outcome == PutOutcome::Created));
    assert!(keys(&store, "many/").await.iter().eq(&names));
    let middle = names.iter().nth(500).unwrap();
    assert_eq!(store.list("many/", Some(middle)).await.unwrap().len(), 502);
    assert_eq!(store.list_folders("many/").await.unwrap(), ["00", "01", "02", "03", "04", "05", "06"]);
}

pub async fn what_is_not_a_key_is_refused(store: Store) {
    for key in ["", "/abs", "a//b", "../up", "a/../../up", "a/.", ".tmp-x", "a/.tmp-x", "nul\0", "line\nbreak", "a/"] {
        let refused =
            |error: StorageError| assert!(matches!(error, StorageError::Settings { .. }), "{key:?}: {error:?}");
        refused(put(&store, key, &Bytes::new()).await.unwrap_err());
        refused(store.get(key, 1).await.unwrap_err());
        refused(store.head(key).await.unwrap_err());
        refused(store.delete(key).await.unwrap_err());
        refused(store.compare_and_swap(key, Bytes::new(), None).await.unwrap_err());
        refused(store.begin_multipart(key).await.err().unwrap());
    }
}

pub async fn a_probe_leaves_nothing_behind(store: Store) {
    store.probe("probed/walden-check/").await.unwrap();
    assert_eq!(keys(&store, "probed/").await, Vec::<String>::new());
}
