//! What only a directory can get wrong: modes, links, leftovers, full and missing disks.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use bytes::Bytes;
use walden::storage::{Body, PutOutcome, StorageError, open_local};

use super::suite::{Store, file_of, noise, put, read};

/// Every name below `folder` with its mode.
fn modes(folder: &Path) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        found.push((entry.path().display().to_string(), metadata.mode() & 0o7777));
        if metadata.is_dir() {
            found.extend(modes(&entry.path()));
        }
    }
    found
}

#[tokio::test]
async fn directories_are_0700_and_files_0600() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_local(folder.path().join("archive"));
    let content = noise(1000, 1);
    let file = file_of(&content);
    put(&store, "a/b/c", &content).await.unwrap();
    let body = Body::SealedFile { path: file.path().to_owned(), length: 1000, goes: true };
    store.put_new("a/d", &body, crc32fast::hash(&content)).await.unwrap();
    store.compare_and_swap("a/lease.json", Bytes::from_static(b"{}"), None).await.unwrap();
    let upload = store.begin_multipart("a/parts").await.unwrap();
    upload.complete(0, 0).await.unwrap();
    for (name, mode) in modes(folder.path()) {
        let expected = if Path::new(&name).is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, expected, "{name} has mode {mode:o}");
        assert!(!name.contains(".tmp-"), "{name}");
    }
}

#[tokio::test]
async fn a_sealed_file_is_linked_once_and_copied_for_a_second_repository() {
    let folder = tempfile::tempdir().unwrap();
    let content = noise(500_000, 2);
    let sealed = folder.path().join("sealed");
    std::fs::write(&sealed, &content).unwrap();
    std::fs::set_permissions(&sealed, PermissionsExt::from_mode(0o600)).unwrap();
    let body = Body::SealedFile { path: sealed.clone(), length: 500_000, goes: true };
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    // A file that stays is not shared, whoever asks first: damage to it would be damage to the archive.
    let stays = Body::SealedFile { path: sealed.clone(), length: 500_000, goes: false };
    let apart = open_local(folder.path().join("apart"));
    assert_eq!(apart.put_new("wal/a", &stays, crc32fast::hash(&content)).await.unwrap(), PutOutcome::Created);
    let copy = folder.path().join("apart/wal/a");
    assert_ne!(inode(&copy), inode(&sealed));
    assert!(std::fs::read(&copy).unwrap() == content);
    let wrong = apart.put_new("wal/b", &stays, 7).await.unwrap_err();
    assert!(matches!(wrong, StorageError::SourceDamaged { .. }), "{wrong:?}");
    assert!(apart.list("wal/b", None).await.unwrap().is_empty());
    for name in ["one", "two"] {
        let store = open_local(folder.path().join(name));
        assert_eq!(store.put_new("wal/a", &body, crc32fast::hash(&content)).await.unwrap(), PutOutcome::Created);
    }
    let (one, two) = (folder.path().join("one/wal/a"), folder.path().join("two/wal/a"));
    assert_eq!(inode(&one), inode(&sealed), "the first repository shares the file");
    assert_ne!(inode(&two), inode(&sealed), "damage to one repository must not be damage to both");
    std::fs::remove_file(&sealed).unwrap();
    assert!(std::fs::read(&one).unwrap() == content && std::fs::read(&two).unwrap() == content);
}

/// A file system that was unmounted under a running agent looked like a new repository, and was begun anew below the mount point.
#[tokio::test]
async fn a_root_that_vanishes_is_not_begun_anew() {
    let folder = tempfile::tempdir().unwrap();
    let (root, away) = (folder.path().join("archive"), folder.path().join("unmounted"));
    let store = open_local(&root);
    put(&store, "a/b", &noise(10, 1)).await.unwrap();
    std::fs::rename(&root, &away).unwrap();
    assert!(matches!(put(&store, "a/c", &Bytes::new()).await, Err(StorageError::NoBucket { .. })));
    assert!(!root.exists());
    // The mount point stays when the file system goes.
    std::fs::create_dir(&root).unwrap();
    assert!(matches!(put(&store, "a/c", &Bytes::new()).await, Err(StorageError::NoBucket { .. })));
    let swapped = store.compare_and_swap("a/lease.json", Bytes::from_static(b"{}"), None).await;
    assert!(matches!(swapped, Err(StorageError::NoBucket { .. })));
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    std::fs::remove_dir(&root).unwrap();
    std::fs::rename(&away, &root).unwrap();
    put(&store, "a/c", &noise(10, 2)).await.unwrap();
}

#[tokio::test]
async fn a_missing_root_is_made_by_a_write_and_never_read_as_empty() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_local(folder.path().join("archive"));
    assert!(matches!(store.list("", None).await, Err(StorageError::NoBucket { .. })));
    assert!(matches!(store.head("a").await, Err(StorageError::NoBucket { .. })));
    assert!(matches!(store.get("a", 1).await, Err(StorageError::NoBucket { .. })));
    assert!(matches!(store.list_folders("").await, Err(StorageError::NoBucket { .. })));
    put(&store, "a", &Bytes::new()).await.unwrap();
    assert_eq!(store.list("", None).await.unwrap().len(), 1);

    let lost = open_local(folder.path().join("no/such/parent"));
    assert!(matches!(put(&lost, "a", &Bytes::new()).await, Err(StorageError::NoBucket { .. })));
    assert!(matches!(lost.probe("x/").await, Err(StorageError::NoBucket { .. })));
}

#[tokio::test]
async fn links_are_shown_and_never_followed() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    let root = folder.path().join("archive");
    std::fs::create_dir(&root).unwrap();
    symlink(&outside, root.join("folder")).unwrap();
    symlink(outside.join("secret"), root.join("file")).unwrap();
    // The root itself may be a link.
    symlink(&root, folder.path().join("link")).unwrap();
    let store = open_local(folder.path().join("link"));
    assert!(matches!(store.get("folder/secret", 100).await, Err(StorageError::Denied { .. })));
    assert!(matches!(store.get("file", 100).await, Err(StorageError::Denied { .. })));
    assert!(matches!(put(&store, "folder/new", &Bytes::new()).await, Err(StorageError::Denied { .. })));
    assert!(put(&store, "file", &Bytes::new()).await.is_err());
    let listed: Vec<String> = store.list("", None).await.unwrap().into_iter().map(|info| info.key).collect();
    assert_eq!(listed, ["file", "folder"]);
    assert_eq!(store.list_folders("").await.unwrap(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[tokio::test]
async fn what_is_no_regular_file_does_not_hold_a_reader() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_local(folder.path());
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.path().join("fifo"), rustix::fs::Mode::RUSR).unwrap();
    assert!(matches!(store.get("fifo", 100).await, Err(StorageError::Damaged { .. })));
    assert_eq!(store.list("", None).await.unwrap()[0].key, "fifo");
}

#[tokio::test]
async fn leftovers_of_a_dead_writer_go_and_those_of_a_living_one_stay() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("wal")).unwrap();
    std::fs::write(folder.path().join("wal/.tmp-dead"), "half").unwrap();
    std::fs::write(folder.path().join("wal/.tmp-lock"), "").unwrap();
    let first = open_local(folder.path());
    let upload = first.begin_multipart("wal/parts").await.unwrap();
    let second = open_local(folder.path());
    put(&second, "wal/a", &Bytes::new()).await.unwrap();
    let names = || {
        std::fs::read_dir(folder.path().join("wal"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    assert_eq!(names().len(), 2, "{:?}", names());
    assert_eq!(second.list("", None).await.unwrap().len(), 1);
    assert_eq!(upload.complete(0, 0).await.unwrap(), PutOutcome::Created);
    assert!(names().iter().all(|name| !name.to_string_lossy().starts_with(".tmp-")), "{:?}", names());
}

#[tokio::test]
async fn foreign_names_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["Thumbs.db", "a b", "-rf"] {
        std::fs::write(folder.path().join(name), "x").unwrap();
    }
    let bytes: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff\xfe");
    std::fs::write(folder.path().join(bytes), "x").unwrap();
    assert_eq!(open_local(folder.path()).list("", None).await.unwrap().len(), 4);
}

#[tokio::test]
async fn deleting_and_creating_in_one_folder_at_once_never_fails() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (open_local(folder.path()), open_local(folder.path()));
    let work = |store: Store, name: &'static str| async move {
        for _ in 0..200 {
            put(&store, &format!("x/y/{name}"), &Bytes::from_static(b"1")).await.unwrap();
            assert_eq!(read(&store, &format!("x/y/{name}")).await, "1");
            store.delete(&format!("x/y/{name}")).await.unwrap();
        }
    };
    let (one, two) = tokio::join!(tokio::spawn(work(one, "one")), tokio::spawn(work(two, "two")));
    one.unwrap();
    two.unwrap();
}

/// Needs the right to mount; elsewhere the full disk is simulated by the store that injects faults.
#[tokio::test]
async fn a_full_disk_is_full_and_heals_and_a_read_only_one_is_denied() {
    let folder = tempfile::tempdir().unwrap();
    let mounted =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting a small file system needs root");
        return;
    }
    let outcome = async {
        let store = open_local(folder.path());
        put(&store, "small", &noise(1000, 1)).await.map_err(|error| error.to_string())?;
        let full = put(&store, "large", &noise(2_000_000, 1)).await;
        let listed = store.list("", None).await.map_err(|error| error.to_string())?.len();
        let left = std::fs::read_dir(folder.path()).map_err(|error| error.to_string())?.count();
        store.delete("small").await.map_err(|error| error.to_string())?;
        let healed = put(&store, "large", &noise(900_000, 1)).await;
        let remounted = std::process::Command::new("mount").args(["-o", "remount,ro"]).arg(folder.path()).output();
        let read_only = if remounted.is_ok_and(|output| output.status.success()) {
            Some(put(&store, "new", &noise(10, 1)).await)
        } else {
            None
        };
        Ok::<_, String>((full, listed, left, healed, read_only))
    }
    .await;
    let unmounted = std::process::Command::new("umount").arg(folder.path()).output();
    assert!(unmounted.is_ok_and(|output| output.status.success()));
    let (full, listed, left, healed, read_only) = outcome.unwrap();
    assert!(matches!(read_only, Some(Err(StorageError::Denied { .. }))), "{read_only:?}");
    assert!(matches!(full, Err(StorageError::Full { .. })), "{full:?}");
    assert_eq!((listed, left), (1, 1));
    assert_eq!(healed.unwrap(), PutOutcome::Created);
}
