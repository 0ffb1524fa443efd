use super::super::manifest::tests::manifest;
use super::super::tar::tests::{archive, directory, file};
use super::*;
use crate::repository::test_support::{SYSTEM, backup, seal, writer};
use crate::repository::{Repository, RepositoryWriter, StoredPart};
use crate::restore::configure::{ArchiveMode, ConfigSource};
use crate::restore::{Request, Target};
use crate::seal::Encoder;
use crate::storage::Body;
use crate::wal::testing::WalWriter;
use crate::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

const MIB: u64 = 1 << 20;
const LABEL: &[u8] = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\nLABEL: x\n";

struct NoProgress;

impl FetchProgress for NoProgress {
    fn advance(&self, _: u64) {}
}

struct Bench {
    folder: tempfile::TempDir,
    writer: RepositoryWriter,
}

fn control() -> Vec<u8> {
    let mut control = SYSTEM.get().to_le_bytes().to_vec();
    control.resize(8192, 7);
    control
}

fn compressed(raw: &[u8], compression: Compression) -> Vec<u8> {
    let mut encoder = Encoder::new(compression, 0).unwrap();
    let mut out = Encoder::prefix(compression).to_vec();
    encoder.write(raw, &mut out).unwrap();
    encoder.cut(&mut out).unwrap();
    out.extend_from_slice(Encoder::suffix(compression));
    out
}

impl Bench {
    /// A backup from 0/200028 to 0/200128 with a tablespace at `<folder>/old`, and the WAL that it needs.
    async fn new(files: &[(&str, &[u8])], extra: &[Vec<u8>]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let writer = writer(folder.path()).await;
        let size = SegmentSize::new(MIB).unwrap();
        let segment = SegmentName::holding(TimelineId::FIRST, Lsn::new(2 * MIB), size);
        let mut wal = WalWriter::new(2 * MIB, size);
        wal.system_identifier = SYSTEM.get();
        // The backup's only record, and what switches the segment behind it.
        wal.filler(7, 0x100 - 24 - 2);
        assert_eq!(wal.position(), 2 * MIB + 0x128);
        wal.switch();
        let raw = wal.bytes;
        writer.put_segment(segment, &seal(segment, 0, &raw, Compression::Lz4)).await.unwrap();
        let id = crate::repository::BackupId::parse("20261120T020000Z-full").unwrap();
        let backups = writer.archive().backup_writer(id).await.unwrap();
        let mut json = backup("20261120T020000Z-full", 2 * MIB + 0x28, 2 * MIB + 0x128);
        json.volumes.clear();
        json.tablespaces[0].oid = 16_384;
        json.tablespaces[0].location = folder.path().join("old").display().to_string();
        json.required_settings.max_connections = 321;
        let (last, first) = files.split_last().unwrap();
        let volumes = [
            archive(&first.iter().map(|(path, data)| file(path, data)).collect::<Vec<_>>()),
            archive(&[extra, &[directory("pg_wal"), file(last.0, last.1)]].concat()),
        ];
        let manifest = manifest(files);
        for (name, raw, compression) in [
            ("volumes/000001.tar.lz4", &volumes[0], Compression::Lz4),
            ("volumes/000002.tar.zst", &volumes[1], Compression::Zstd),
            ("backup_manifest.lz4", &manifest, Compression::Lz4),
        ] {
            let stored = Bytes::from(compressed(raw, compression));
            let part = StoredPart {
                key: name.into(),
                raw_bytes: raw.len() as u64,
                stored_bytes: stored.len() as u64,
                raw_crc32: crc32fast::hash(raw),
                stored_crc32: crc32fast::hash(&stored),
            };
            backups.put(name, &Body::Bytes(stored), part.stored_bytes, part.stored_crc32).await.unwrap();
            if name.starts_with("volumes") {
                json.volumes.push(part);
            } else {
                json.manifest = Some(part);
            }
        }
        backups.finish(&json).await.unwrap();
        Self { folder, writer }
    }

    async fn plan(&self) -> Result<Plan, RestoreError> {
        let repositories: [Repository; 1] = [self.writer.archive().repository().clone()];
        let request = Request { target: Target::Immediate, ..Request::latest() };
        crate::restore::plan(&repositories, None, &request).await
    }

    fn options(&self) -> RestoreOptions {
        RestoreOptions {
            pgdata: self.folder.path().join("data"),
            tablespaces: vec![TablespaceMap {
                old: self.folder.path().join("old"),
                new: self.folder.path().join("new"),
            }],
            force: false,
            jobs: 2,
        }
    }

    async fn restore(&self, options: &RestoreOptions) -> Result<Restored, RestoreError> {
        let plan = self.plan().await?;
        let configuration = Configuration {
            binary: "/usr/bin/walden".into(),
            source: ConfigSource::Effective("# effective\n".into()),
            config_file: None,
            archive_mode: ArchiveMode::Off,
        };
        restore(&plan, options, &configuration, Arc::new(NoProgress)).await
    }

    fn read(&self, path: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.folder.path().join(path)).unwrap()).into_owned()
    }

    fn startable(&self) -> bool {
        self.folder.path().join("data/global/pg_control").exists()
    }
}

/// It was told as "there is no backup", with the code of a target that cannot be reached.
#[tokio::test]
async fn a_damaged_backup_json_is_damage_and_not_absence() {
    let control = control();
    let owned = files(&control);
    let files: Vec<(&str, &[u8])> = owned.iter().map(|(path, data)| (*path, data.as_slice())).collect();
    let bench = Bench::new(&files, &[]).await;
    let id = crate::repository::BackupId::parse("20261120T020000Z-full").unwrap();
    let key = bench.writer.archive().keys().backup_object(&id, "backup.json");
    let path = std::path::Path::new(&bench.writer.archive().repository().url()).join(&key);
    std::fs::write(&path, b"{\"format\": 1, \"id\": ").unwrap();
    let error = bench.plan().await.unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert!(error.to_string().contains(&key), "{error}");
}

/// The restore wrote everything, and PostgreSQL died when it came to the segment.
#[tokio::test]
async fn wal_that_was_cut_short_is_damage_before_anything_is_written() {
    let control = control();
    let owned = files(&control);
    let bench = Bench::new(&borrowed(&owned), &[]).await;
    let segment = SegmentName::holding(TimelineId::FIRST, Lsn::new(2 * MIB), SegmentSize::new(MIB).unwrap());
    let key = bench.writer.archive().keys().segment(segment, Compression::Lz4);
    let path = std::path::Path::new(&bench.writer.archive().repository().url()).join(&key);
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let error = bench.restore(&bench.options()).await.unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert!(error.to_string().contains(&key), "{error}");
    assert!(!bench.folder.path().join("data").exists());
    std::fs::write(&path, &whole).unwrap();
    assert!(bench.plan().await.is_ok());
}

fn files(control: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("PG_VERSION", b"17\n".to_vec()),
        ("base/5/1259", vec![9; 100_000]),
        ("pg_tblspc/16384/PG_17_1/5/1", b"elsewhere".to_vec()),
        (
            "postgresql.auto.conf",
            b"work_mem = '64MB'\nprimary_conninfo = 'host=old'\nsynchronous_standby_names = 'walden'\n".to_vec(),
        ),
        ("standby.signal", Vec::new()),
        ("tablespace_map", b"16384 /old\n".to_vec()),
        ("backup_label", LABEL.to_vec()),
        ("global/pg_control", control.to_vec()),
    ]
}

fn borrowed<'a>(files: &'a [(&'static str, Vec<u8>)]) -> Vec<(&'a str, &'a [u8])> {
    files.iter().map(|(path, data)| (*path, data.as_slice())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_becomes_a_directory_that_recovers() {
    let files = files(&control());
    let bench = Bench::new(&borrowed(&files), &[]).await;
    let restored = bench.restore(&bench.options()).await.unwrap();
    assert_eq!(bench.read("data/base/5/1259").len(), 100_000);
    assert_eq!(bench.read("new/PG_17_1/5/1"), "elsewhere");
    let link = std::fs::read_link(bench.folder.path().join("data/pg_tblspc/16384")).unwrap();
    assert_eq!(link, bench.folder.path().join("new"));
    assert_eq!(bench.read("data/tablespace_map"), format!("16384 {}\n", link.display()));
    assert_eq!(bench.read("data/backup_label").as_bytes(), LABEL);
    assert_eq!(std::fs::read(bench.folder.path().join("data/global/pg_control")).unwrap(), control());
    for absent in ["data/standby.signal", "data/postmaster.pid"] {
        assert!(!bench.folder.path().join(absent).exists(), "{absent}");
    }
    assert_eq!(bench.read("data/recovery.signal"), "");
    assert_eq!(bench.read("data/walden-restore.toml"), "# effective\n");
    let auto_conf = bench.read("data/postgresql.auto.conf");
    assert!(auto_conf.starts_with("work_mem = '64MB'\n"), "{auto_conf}");
    assert!(!auto_conf.contains("host=old"));
    assert!(auto_conf.contains("max_connections = '321'"));
    assert!(auto_conf.contains("archive_mode = 'off'"));
    // Its commits would wait for ever. What stands last counts.
    let synchronous = auto_conf.lines().rfind(|line| line.starts_with("synchronous_standby_names"));
    assert_eq!(synchronous, Some("synchronous_standby_names = ''"));
    assert!(restored.notes.iter().any(|note| note.contains("it was 'walden'")), "{:?}", restored.notes);
    assert!(auto_conf.contains("recovery_target_timeline = '1'"));
    assert!(auto_conf.trim_end().ends_with("recovery_target = 'immediate'"), "{auto_conf}");
    assert!(auto_conf.contains("wal-fetch --plan"));
    assert!(restored.notes.iter().any(|note| note.contains("no postgresql.conf")), "{:?}", restored.notes);
    // The plan that wal-fetch will follow.
    let plan = crate::restore::PlanFile::read(&bench.folder.path().join("data/walden-plan.json")).unwrap();
    assert_eq!(plan.range(), (Lsn::new(2 * MIB), Lsn::new(3 * MIB)));
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &str| std::fs::metadata(bench.folder.path().join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("data"), mode("data/walden-plan.json"), mode("data/base/5/1259")), (0o700, 0o600, 0o600));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_stands_in_the_way_is_refused_or_renamed_but_never_deleted() {
    let files = files(&control());
    let bench = Bench::new(&borrowed(&files), &[]).await;
    let mut options = bench.options();
    std::fs::create_dir_all(bench.folder.path().join("data")).unwrap();
    std::fs::write(bench.folder.path().join("data/precious"), "x").unwrap();
    let error = bench.restore(&options).await.unwrap_err();
    assert!(matches!(error, RestoreError::NotEmpty { .. }) && error.exit_code() == 4, "{error}");
    // A server that lives there stops even --force.
    std::fs::write(bench.folder.path().join("data/postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
    options.force = true;
    let error = bench.restore(&options).await.unwrap_err();
    assert!(matches!(error, RestoreError::ServerRunning { .. }) && error.exit_code() == 4, "{error}");
    // One that is gone does not.
    std::fs::write(bench.folder.path().join("data/postmaster.pid"), "999999999\n").unwrap();
    let restored = bench.restore(&options).await.unwrap();
    let [(from, to)] = restored.renamed.as_slice() else { panic!("{:?}", restored.renamed) };
    assert!(to.display().to_string().starts_with(&format!("{}.before-", from.display())));
    assert_eq!(std::fs::read_to_string(to.join("precious")).unwrap(), "x");
    assert!(bench.startable());
}

/// A copy was restored beside its running original with `--force`, for a directory of its own that was not empty: the original's
/// tablespace, which has no `postmaster.pid`, was renamed and filled, and both servers wrote to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn force_renames_a_tablespace_only_of_the_server_that_is_replaced() {
    let files = files(&control());
    let bench = Bench::new(&borrowed(&files), &[]).await;
    let options = RestoreOptions { tablespaces: Vec::new(), force: true, ..bench.options() };
    let (old, data) = (bench.folder.path().join("old"), bench.folder.path().join("data"));
    std::fs::create_dir_all(old.join("PG_17_1")).unwrap();
    std::fs::write(old.join("PG_17_1/1"), "the original's").unwrap();
    std::fs::create_dir_all(data.join("pg_tblspc")).unwrap();
    std::fs::write(data.join("PG_VERSION"), "17\n").unwrap();
    let elsewhere = bench.folder.path().join("elsewhere");
    std::os::unix::fs::symlink(&elsewhere, data.join("pg_tblspc/16384")).unwrap();
    let error = bench.restore(&options).await.unwrap_err();
    assert!(matches!(error, RestoreError::Refused { .. }) && error.exit_code() == 4, "{error}");
    assert_eq!(bench.read("old/PG_17_1/1"), "the original's");
    assert_eq!(bench.read("data/PG_VERSION"), "17\n");
    // The server in the directory has it: both are renamed.
    std::os::unix::fs::symlink(&old, data.join("pg_tblspc/20000")).unwrap();
    let restored = bench.restore(&options).await.unwrap();
    assert_eq!(restored.renamed.len(), 2, "{:?}", restored.renamed);
    assert_eq!(bench.read("old/PG_17_1/5/1"), "elsewhere");
    assert!(!old.join("PG_17_1/1").exists());
}

/// It was found after `--force` had renamed what was there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn want_of_room_is_found_before_anything_is_renamed() {
    let files = files(&control());
    let bench = Bench::new(&borrowed(&files), &[]).await;
    let options = RestoreOptions { force: true, ..bench.options() };
    std::fs::create_dir(bench.folder.path().join("data")).unwrap();
    std::fs::write(bench.folder.path().join("data/precious"), "x").unwrap();
    let places = Places::check(&bench.plan().await.unwrap(), &options).unwrap();
    let mut manifest = Manifest::parse(&manifest(&borrowed(&files))).unwrap();
    check_space(&places, Some(&manifest)).unwrap();
    for path in [&b"base/5/1259"[..], b"pg_tblspc/16384/PG_17_1/5/1"] {
        let mut huge = manifest.files.clone();
        huge.get_mut(&InnerPath::parse(path).unwrap()).unwrap().size = u64::MAX / 2;
        std::mem::swap(&mut manifest.files, &mut huge);
        let error = check_space(&places, Some(&manifest)).unwrap_err();
        assert!(matches!(error, RestoreError::Io { what: "filled", .. }), "{error}");
        manifest.files = huge;
    }
    assert_eq!(bench.read("data/precious"), "x");
    assert!(!bench.folder.path().join("new").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_map_is_refused_before_anything_is_written() {
    let files = files(&control());
    let bench = Bench::new(&borrowed(&files), &[]).await;
    let data = bench.folder.path().join("data");
    let maps = [
        ("unknown", vec![(bench.folder.path().join("none"), bench.folder.path().join("new"))]),
        ("inside the data directory", vec![(bench.folder.path().join("old"), data.join("pg_tblspc/x"))]),
        ("the data directory itself", vec![(bench.folder.path().join("old"), data.clone())]),
        ("a line end", vec![(bench.folder.path().join("old"), bench.folder.path().join("a\nb"))]),
        ("relative", vec![(bench.folder.path().join("old"), "new".into())]),
    ];
    for (what, map) in maps {
        let mut options = bench.options();
        options.tablespaces = map.into_iter().map(|(old, new)| TablespaceMap { old, new }).collect();
        let error = bench.restore(&options).await.unwrap_err();
        assert_eq!(error.exit_code(), 2, "{what}: {error}");
        assert!(!data.exists(), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_never_becomes_startable() {
    let good = files(&control());
    // The manifest and the volumes agree, but the backup is not what its entry says.
    let mut other_label = good.clone();
    other_label[6].1 = b"START WAL LOCATION: 0/300028 (file x)\n".to_vec();
    let other_control = files(&[1; 8192]);
    for (what, files) in [("another label", &other_label), ("another system's pg_control", &other_control)] {
        let bench = Bench::new(&borrowed(files), &[]).await;
        let error = bench.restore(&bench.options()).await.unwrap_err();
        assert_eq!(error.exit_code(), 5, "{what}: {error}");
        assert!(!bench.startable(), "{what}");
    }
    // A file that the manifest does not have.
    let bench = Bench::new(&borrowed(&good), &[file("base/5/666", b"evil")]).await;
    let error = bench.restore(&bench.options()).await.unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert!(!bench.startable());
    // A volume that was changed in the store.
    let bench = Bench::new(&borrowed(&good), &[]).await;
    let root = PathBuf::from(bench.writer.archive().url());
    let key = bench.writer.archive().keys().backup_prefix(&bench.plan().await.unwrap().backup.id);
    let volume = root.join(key).join("volumes/000001.tar.lz4");
    let mut bytes = std::fs::read(&volume).unwrap();
    let at = bytes.len() - 30;
    bytes[at] ^= 1;
    std::fs::write(&volume, &bytes).unwrap();
    let error = bench.restore(&bench.options()).await.unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert!(!bench.startable());
    // One that is short or gone is found before anything is written.
    std::fs::write(&volume, &bytes[..at]).unwrap();
    let untouched = RestoreOptions { pgdata: bench.folder.path().join("second"), ..bench.options() };
    assert_eq!(bench.restore(&untouched).await.unwrap_err().exit_code(), 5);
    std::fs::remove_file(&volume).unwrap();
    assert_eq!(bench.restore(&untouched).await.unwrap_err().exit_code(), 5);
    assert!(!untouched.pgdata.exists());
}
