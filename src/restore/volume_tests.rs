use super::super::manifest::tests::manifest;
use super::super::tar::TarReader;
use super::super::tar::tests::{archive, directory, file, header};
use super::*;

fn destination(folder: &std::path::Path, files: Option<&[(&str, &[u8])]>) -> Destination {
    let open = |name: &str| Directory::open_or_create(&folder.join(name)).unwrap();
    Destination {
        backup: "20261120T020000Z-full".into(),
        main: open("data"),
        tablespaces: BTreeMap::from([(16_384, open("fast"))]),
        manifest: files.map(|files| Manifest::parse(&manifest(files)).unwrap()),
        seen: Mutex::default(),
    }
}

fn write(destination: &Destination, tar: &[u8]) -> Result<(), VolumeError> {
    let (mut reader, mut writer) = (TarReader::default(), VolumeWriter::new(destination));
    for piece in tar.chunks(700) {
        reader.push(piece, &mut writer)?;
    }
    Ok(reader.finish()?)
}

fn listing(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(&at).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            } else {
                found.push(entry.path().strip_prefix(folder).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn files_go_where_they_belong_and_some_are_held_back_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<(&str, &[u8])> = vec![
        ("PG_VERSION", b"17\n"),
        ("base/5/1259", b"a table"),
        ("pg_tblspc/16384/PG_17_1/5/1", b"elsewhere"),
        ("standby.signal", b""),
        ("postmaster.pid", b"1\n"),
        ("tablespace_map", b"16384 /old\n"),
        ("backup_label", b"START"),
        ("global/pg_control", b"control"),
    ];
    let destination = destination(folder.path(), Some(&files));
    let mut entries = vec![directory("./"), directory("base"), directory("pg_wal/"), directory("pg_tblspc/16384")];
    entries.extend(files.iter().map(|(path, data)| file(path, data)));
    assert!(destination.check_complete().is_err());
    write(&destination, &archive(&entries)).unwrap();
    destination.check_complete().unwrap();
    assert_eq!(listing(folder.path()), ["data/PG_VERSION", "data/base/5/1259", "fast/PG_17_1/5/1"]);
    assert!(folder.path().join("data/pg_wal").is_dir());
    let seen = destination.seen.lock().unwrap();
    assert_eq!(seen.held_back["global/pg_control"], b"control");
    assert_eq!(seen.held_back["tablespace_map"], b"16384 /old\n");
}

#[test]
fn hostile_entries_are_refused_and_nothing_lands_outside() {
    let manifested: &[(&str, &[u8])] = &[
        ("base/5/1259", b"good"),
        ("backup_label", b"x"),
        ("pg_tblspc/16384/authorized_keys", b"good"),
        ("pg_tblspc/16384/PG_17_1", b"good"),
    ];
    let hostile: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("a path that leaves", vec![file("../outside", b"x")]),
        ("a path that leaves later", vec![file("base/../../outside", b"x")]),
        ("an absolute path", vec![file("/tmp/walden-outside", b"x")]),
        ("a folder that leaves", vec![directory("../outside")]),
        ("a link", vec![header("base", b'2', 0)]),
        ("a hard link", vec![header("base", b'1', 0)]),
        ("a device", vec![header("base/null", b'3', 0)]),
        ("a PAX header", vec![header("base/x", b'x', 0), file("base/5/1259", b"good")]),
        ("a file that the manifest does not know", vec![file("base/5/9999", b"x")]),
        ("a file of another size", vec![file("base/5/1259", b"goods")]),
        ("a file of another content", vec![file("base/5/1259", b"evil")]),
        ("the same file twice", vec![file("base/5/1259", b"good"), file("base/5/1259", b"good")]),
        ("WAL", vec![file("pg_wal/000000010000000000000003", b"x")]),
        ("a key below a tablespace", vec![file("pg_tblspc/16384/authorized_keys", b"good")]),
        ("a folder below a tablespace", vec![directory("pg_tblspc/16384/.ssh")]),
        ("a file in the place of a tablespace's folder", vec![file("pg_tblspc/16384/PG_17_1", b"good")]),
        ("a recovery command", vec![file("postgresql.auto.conf", b"restore_command='rm'")]),
    ];
    for (what, entries) in hostile {
        let folder = tempfile::tempdir().unwrap();
        let destination = destination(folder.path(), Some(manifested));
        assert!(write(&destination, &archive(&entries)).is_err(), "{what}");
        let outside: Vec<String> =
            listing(folder.path()).into_iter().filter(|path| !path.starts_with("data/base/")).collect();
        assert!(outside.is_empty(), "{what}: {outside:?}");
        assert_eq!(std::fs::read_dir(folder.path().join("fast")).unwrap().count(), 0, "{what}");
        assert!(!std::path::Path::new("/tmp/walden-outside").exists());
    }
}

#[test]
fn folders_without_end_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let destination = destination(folder.path(), None);
    destination.seen.lock().unwrap().folders = FOLDERS_MAX - 1;
    assert!(write(&destination, &archive(&[directory("base/1")])).is_ok());
    assert!(write(&destination, &archive(&[directory("base/2")])).is_err());
}

#[test]
fn a_link_that_was_planted_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let destination = destination(folder.path(), Some(&[("base/5/1259", b"good")]));
    std::fs::create_dir(folder.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(folder.path().join("elsewhere"), folder.path().join("data/base")).unwrap();
    assert!(write(&destination, &archive(&[file("base/5/1259", b"good")])).is_err());
    assert!(listing(&folder.path().join("elsewhere")).is_empty());
}

#[test]
fn without_a_manifest_wal_is_still_refused() {
    let folder = tempfile::tempdir().unwrap();
    let destination = destination(folder.path(), None);
    write(&destination, &archive(&[file("base/5/1259", b"x")])).unwrap();
    assert!(write(&destination, &archive(&[file("pg_wal/000000010000000000000003", b"x")])).is_err());
}
