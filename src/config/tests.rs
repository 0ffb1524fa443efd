use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::raw::Raw;
use super::sections::holds_password;
use super::value::{self, Scalar};
use super::*;
use crate::failure::NextStep;
use crate::seal::Compression;

/// Settings from a file with this text, these variables and these flags; the working directory is `/work`.
fn load(text: Option<&str>, environment: &[(&str, &str)], quick: QuickSettings) -> Result<Settings, ConfigError> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = text.map(|text| {
        let path = folder.path().join("walden.toml");
        std::fs::write(&path, text).expect("writable");
        path
    });
    let environment = environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
    Settings::load(&Sources { config, quick, environment, working_directory: PathBuf::from("/srv") })
}

fn load_file(text: &str) -> Result<Settings, ConfigError> {
    load(Some(text), &[], QuickSettings::default())
}

/// The whole message, without the temporary folder.
fn refusal(result: Result<Settings, ConfigError>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(error) => {
            assert_eq!(error.next_step(), NextStep::Stop);
            assert!(!error.hint().is_empty());
            error.to_string()
        }
    }
}

#[test]
fn the_defaults_work_without_any_file() {
    let settings = load(Some(""), &[], QuickSettings::default()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.postgres.slot, "walden");
    assert_eq!(settings.postgres.url.expose(), "");
    assert_eq!(settings.archive.compression, Compression::Lz4);
    assert_eq!(settings.archive.tail_interval, Some(Duration::from_secs(1)));
    assert_eq!(settings.spool.bytes_max, 8 << 30);
    assert_eq!(settings.backup.max_rate, None);
    assert_eq!(settings.alert.lag, Some(Duration::from_secs(300)));
    assert_eq!(settings.alert.rpo, None);
    assert_eq!(settings.metrics.listen.as_deref(), Some("127.0.0.1:9847"));
    assert!(settings.spool.path.is_absolute() && settings.restore.jobs_or_cpus() > 0);
    let [repository] = settings.repositories.as_slice() else { panic!("one repository") };
    assert_eq!(repository.name, "local-1");
    assert!(matches!(&repository.store, StoreSettings::Local { path } if path.ends_with("walden-archive")));
}

/// The example in `config/` is the list of settings that users read, so each one is there, with its true default.
#[test]
fn the_example_file_has_every_setting_with_its_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/walden.toml");
    let text = std::fs::read_to_string(&path).expect("the example is there");
    assert!(load_file(&text).is_ok_and(|settings| settings.repositories.len() == 1), "as it is, it changes nothing");

    let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ") && *line != "#";
    let all = text.lines().map(|line| if is_setting(&line) { &line[1..] } else { line }).collect::<Vec<_>>().join("\n");
    let raw = Raw::parse(&all, &path).unwrap_or_else(|error| panic!("{error}"));
    let [repository] = raw.repositories.as_slice() else { panic!("one example repository") };
    for key in KEYS {
        let section = if key.section == "repository" { Some(repository) } else { raw.sections.get(key.section) };
        let entry = section.and_then(|section| section.get(key.name));
        let entry = entry.unwrap_or_else(|| panic!("{}.{} is not in the example", key.section, key.name));
        assert_eq!(entry.value, Scalar::from_text(key.default), "{}.{}", key.section, key.name);
    }
}

#[test]
fn a_named_file_that_is_missing_is_an_error() {
    let sources = Sources {
        config: Some("/nowhere/walden.toml".into()),
        quick: QuickSettings::default(),
        environment: Vec::new(),
        working_directory: PathBuf::from("/srv"),
    };
    assert!(matches!(Settings::load(&sources), Err(ConfigError::Missing { .. })));
    let sources =
        Sources { config: None, environment: vec![("WALDEN_CONFIG".into(), "walden.toml".into())], ..sources };
    let message = refusal(Settings::load(&sources));
    assert_eq!(message, "there is no configuration file /srv/walden.toml");
}

#[test]
fn an_unknown_key_names_its_line_and_the_nearest_setting() {
    let message = refusal(load_file("[archive]\n\nclutser = \"main\"\n"));
    assert!(
        message.ends_with(
            "walden.toml line 3: there is no setting \"archive.clutser\" (did you mean \"archive.cluster\"?)"
        ),
        "{message}"
    );
    let message = refusal(load_file("[archive]\nbucket = \"b\"\n"));
    assert!(message.contains("did you mean \"repository.bucket\""), "{message}");
    let message = refusal(load_file("slot = \"s\"\n"));
    assert!(message.contains("did you mean \"postgres.slot\""), "{message}");
    let message = refusal(load_file("[backups]\n"));
    assert!(message.contains("line 1: there is no setting \"backups\" (did you mean \"backup\"?)"), "{message}");
    let message = refusal(load_file("[[repository]]\ntype = \"local\"\npth = \"/a\"\n"));
    assert!(message.contains("line 3") && message.contains("did you mean \"repository.path\""), "{message}");
    let message = refusal(load(None, &[("WALDEN_ARCHIVE__CLUSTR", "x")], QuickSettings::default()));
    assert!(message.starts_with("environment variable WALDEN_ARCHIVE__CLUSTR: there is no setting \"archive.clustr\" (did you mean \"archive.cluster\"?)"), "{message}");
    // The two underscores are the prefix's own and one more: every command panicked.
    for (name, shown) in [("WALDEN__CLUSTER", "cluster"), ("WALDEN__", ""), ("WALDEN___", "")] {
        let message = refusal(load(None, &[(name, "x")], QuickSettings::default()));
        assert!(
            message.starts_with(&format!("environment variable {name}: there is no setting \"{shown}\"")),
            "{message}"
        );
    }
}

#[test]
fn broken_toml_names_its_line() {
    let message = refusal(load_file("[archive]\ncluster = main\n"));
    assert!(message.contains("walden.toml line 2 is not TOML"), "{message}");
    let message = refusal(load_file("archive = 3\n"));
    assert!(message.contains("write [archive]"), "{message}");
    let message = refusal(load_file("[repository]\nbucket = \"b\"\n"));
    assert!(message.contains("write [[repository]]"), "{message}");
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file = "[archive]\ncluster = \"file\"\n[postgres]\nslot = \"file\"\napplication_name = \"file\"\n";
    let environment = [("WALDEN_ARCHIVE__CLUSTER", "env"), ("WALDEN_POSTGRES__SLOT", "env"), ("WALDEN_SILENT", "x")];
    let quick = QuickSettings { cluster: Some("flag".into()), ..QuickSettings::default() };
    let settings = load(Some(file), &environment, quick).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.archive.cluster, "flag");
    assert_eq!(settings.postgres.slot, "env");
    assert_eq!(settings.postgres.application_name, "file");
    assert!(!settings.is_from_file_alone());
    assert!(load_file(file).is_ok_and(|settings| settings.is_from_file_alone()));
}

#[test]
fn the_environment_is_toml_if_it_parses_and_else_text() {
    let environment = [
        ("WALDEN_ARCHIVE__CLUSTER", "2026"),
        ("WALDEN_UPLOAD__CONCURRENCY", "7"),
        ("WALDEN_BACKUP__INITIAL", "false"),
        ("WALDEN_ARCHIVE__TAIL_INTERVAL", "500ms"),
        ("WALDEN_POSTGRES__CONNECT_TIMEOUT", "3"),
        ("WALDEN_SPOOL__BYTES_MAX", "\"1GiB\""),
        ("WALDEN_METRICS__LISTEN", ""),
    ];
    let settings = load(None, &environment, QuickSettings::default()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.archive.cluster, "2026");
    assert_eq!(settings.upload.concurrency, 7);
    assert!(!settings.backup.initial);
    assert_eq!(settings.archive.tail_interval, Some(Duration::from_millis(500)));
    assert_eq!(settings.postgres.connect_timeout, Duration::from_secs(3));
    assert_eq!(settings.spool.bytes_max, 1 << 30);
    assert_eq!(settings.metrics.listen, None);
}

#[test]
fn the_environment_overrides_and_appends_repositories() {
    let file = "[[repository]]\nbucket = \"one\"\nregion = \"r\"\n";
    let environment = [("WALDEN_REPOSITORY__1__PATH", "second"), ("WALDEN_REPOSITORY__0__BUCKET", "other")];
    let settings = load(Some(file), &environment, QuickSettings::default()).unwrap_or_else(|error| panic!("{error}"));
    let [first, second] = settings.repositories.as_slice() else { panic!("two repositories") };
    assert!(matches!(&first.store, StoreSettings::S3(s3) if s3.bucket == "other" && s3.region.as_deref() == Some("r")));
    assert!(matches!(&second.store, StoreSettings::Local { path } if path.is_absolute() && path.ends_with("second")));
    assert_eq!((first.name.as_str(), second.name.as_str()), ("s3-1", "local-2"));

    let message = refusal(load(Some(file), &[("WALDEN_REPOSITORY__2__BUCKET", "b")], QuickSettings::default()));
    assert!(message.contains("the next repository has the number 1"), "{message}");
    let message = refusal(load(None, &[("WALDEN_REPOSITORY__BUCKET", "b")], QuickSettings::default()));
    assert!(message.contains("WALDEN_REPOSITORY__0__BUCKET"), "{message}");
}

#[test]
fn the_repository_flag_names_the_only_one() {
    let file = "[[repository]]\nbucket = \"one\"\n[[repository]]\nbucket = \"two\"\n";
    let with = |url: &str, environment: &[(&str, &str)]| {
        let quick = QuickSettings { repository: Some(url.into()), ..QuickSettings::default() };
        load(Some(file), environment, quick)
    };
    let settings = with("s3://wal/a/b/", &[("WALDEN_REPOSITORY__0__ENDPOINT", "http://127.0.0.1:9000/")]);
    let settings = settings.unwrap_or_else(|error| panic!("{error}"));
    let [RepositorySettings { store: StoreSettings::S3(s3), .. }] = settings.repositories.as_slice() else {
        panic!("one S3 repository")
    };
    assert_eq!((s3.bucket.as_str(), s3.prefix.as_str()), ("wal", "a/b"));
    assert_eq!(s3.endpoint.as_deref(), Some("http://127.0.0.1:9000"));

    let settings = with("./archive", &[]).unwrap_or_else(|error| panic!("{error}"));
    assert!(
        matches!(&settings.repositories[0].store, StoreSettings::Local { path } if path == Path::new("/srv/archive"))
    );
    assert!(refusal(with("gs://wal", &[])).contains("neither s3://"));
    assert!(refusal(with("s3://", &[])).contains("needs a bucket"));
}

#[test]
fn relative_paths_begin_in_the_files_folder_or_the_working_directory() {
    let settings = load_file("[spool]\npath = \"./spool\"\n").unwrap_or_else(|error| panic!("{error}"));
    let folder = settings.file.as_deref().and_then(Path::parent).expect("a file was read");
    assert_eq!(settings.spool.path, folder.join("spool"));
    assert_eq!(settings.state.path, folder.join("walden-state"));
    if !Path::new("/etc/walden/walden.toml").exists() {
        let settings = load(None, &[], QuickSettings::default()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(settings.spool.path, Path::new("/srv/walden-spool"));
    }
}

#[test]
fn values_out_of_form_or_range_are_refused() {
    for (text, expected) in [
        ("[postgres]\nslot = \"My-Slot\"", "lower-case letters"),
        ("[postgres]\nslot = 3", "must be a text in quotation marks, not a whole number"),
        ("[postgres]\nconnect_timeout = \"soon\"", "must be seconds or a time such as"),
        ("[postgres]\nconnect_timeout = 0", "must be from 100ms to 1h, not 0s"),
        ("[postgres]\nconnect_timeout = -1", "must not be negative"),
        ("[archive]\ncluster = \"a/b\"", "letters, digits"),
        ("[archive]\ncluster = \"..\"", "letters, digits"),
        ("[archive]\ncompression = \"gzip\"", "must be \"lz4\" or \"zstd\", not \"gzip\""),
        ("[archive]\ncompression_level = 1", "must be 0 with compression \"lz4\", which has no levels, not 1"),
        ("[archive]\ncompression = \"zstd\"\ncompression_level = 20", "must be from 0 to 19, not 20"),
        ("[archive]\ntail_bytes = \"64MB\"", "units: KiB, MiB, GiB, TiB"),
        (
            "[archive]\ntail_bytes = 1.5",
            "must be bytes or a size such as \"64MiB\" (units: KiB, MiB, GiB, TiB), not a number",
        ),
        ("[archive]\non_gap = \"alarm\"", "there is no setting"),
        ("[upload]\nconcurrency = 0", "must be from 1 to 64, not 0"),
        ("[upload]\nconcurrency = 99999999999999999999", "must be from 1 to 64"),
        ("[upload]\nmultipart_bytes = \"1MiB\"", "must be from 5.0 MiB to 5.0 GiB, not 1.0 MiB"),
        ("[backup]\ninitial = \"yes\"", "must be true or false"),
        ("[backup]\nschedule = \"every night\"", "is not a cron pattern"),
        ("[backup]\nschedule = \"0 0 2 * * *\"", "is not a cron pattern"),
        ("[backup]\nmax_rate = 1000", "must be from 32.0 KiB"),
        ("[backup]\nvolume_bytes = \"1TiB\"", "more than 10,000 parts"),
        ("[metrics]\nlisten = \":9847\"", "must be host:port"),
        ("[metrics]\nlisten = \"localhost\"", "must be host:port"),
        ("[log]\nlevel = \"loud\"", "must be \"error\" or \"warn\""),
        ("[spool]\npath = \"\"", "must name a path"),
        ("[spool]\npath = \"a\"\n[state]\npath = \"a/b\"", "must not lie in each other"),
        ("[protect]\nmode = \"archive\"", "there is no setting"),
    ] {
        let message = refusal(load_file(text));
        assert!(message.contains(expected), "{text}\n{message}");
    }
}

#[test]
fn repositories_are_checked() {
    for (text, expected) in [
        ("", "needs a bucket"),
        ("type = \"local\"", "needs the path"),
        ("type = \"local\"\npath = \"\"", "must name a path"),
        ("type = \"gcs\"", "must be \"local\" or \"s3\""),
        ("type = \"local\"\npath = \"/a\"\nbucket = \"b\"", "belongs to type \"s3\""),
        ("bucket = \"b\"\npath = \"/a\"", "belongs to type \"local\""),
        ("bucket = \"b\"\nname = \"a/b\"", "at most 63 letters"),
        ("bucket = \"b\"\nprefix = \"a/../b\"", "names with slashes"),
        ("bucket = \"b\"\nendpoint = \"minio:9000\"", "must begin with https://"),
        ("bucket = \"b\"\nendpoint = \"https://key:secret@minio\"", "must not hold a user"),
        ("bucket = \"b\"\nsse = \"yes\"", "must be \"AES256\""),
        ("bucket = \"b\"\nsse_kms_key_id = \"k\"", "needs sse"),
        ("bucket = \"b\"\naccess_key_id_file = \"k\"", "must be given together"),
        ("bucket = \"b\"\nsession_token_file = \"k\"", "needs access_key_id_file"),
        ("bucket = \"b\"\nrequired = false", "no repository is required"),
        ("bucket = \"b\"\nname = \"x\"\n[[repository]]\nbucket = \"c\"\nname = \"x\"", "is the name of another"),
        ("path = \"walden-spool/archive\"", "must not lie in each other"),
    ] {
        let message = refusal(load_file(&format!("[[repository]]\n{text}\n")));
        assert!(message.contains(expected), "{text}\n{message}");
    }
}

#[test]
fn a_password_on_the_command_line_is_refused() {
    for url in [
        "postgres://walden:s3cret@db1/x",
        "postgresql://db1?user=a&password=s3cret",
        "host=db1 password = s3cret",
        "password=s3cret",
    ] {
        let quick = QuickSettings { url: Some(url.into()), ..QuickSettings::default() };
        let message = refusal(load(None, &[], quick));
        assert!(message.contains("PGPASSWORD") && !message.contains("s3cret"), "{message}");
        assert!(load(None, &[("WALDEN_POSTGRES__URL", url)], QuickSettings::default()).is_ok());
    }
    for url in [
        "postgres://walden@db1:5432/x",
        "host=db1 user=walden passfile=/a",
        "",
        "postgres://[::1]:5432/db?sslmode=require",
    ] {
        assert!(!holds_password(url), "{url}");
    }
}

#[test]
fn a_secret_in_the_wrong_place_is_not_shown() {
    let message = refusal(load_file("[upload]\nconcurrency = \"s3cret\""));
    assert!(!message.contains("s3cret"), "{message}");
}

#[test]
fn a_readable_file_with_a_password_is_warned_of() {
    let settings = load_file("[postgres]\nurl = \"postgres://a:b@c\"\n").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.warnings().len(), 1);
    assert!(!settings.warnings()[0].contains("a:b"));
}

#[test]
fn the_settings_for_a_restore_read_back_the_same() {
    let text = "[postgres]\nurl = \"postgres://a:s3cret@c\"\n[archive]\ncluster = \"c-1\"\n[restore]\nfetch_timeout = \"1500ms\"\n\
        [[repository]]\nname = \"a\"\nbucket = \"b\"\nprefix = \"p \\\"q\\\"\"\nregion = \"r\"\nsse = \"aws:kms\"\nsse_kms_key_id = \"k\"\n\
        access_key_id_file = \"id\"\nsecret_access_key_file = \"key\"\nca_file = \"ca.pem\"\npath_style = true\n\
        [[repository]]\nname = \"b\"\ntype = \"local\"\npath = \"it's here\"\nrequired = false\n";
    let settings = load_file(text).unwrap_or_else(|error| panic!("{error}"));
    let written = settings.to_restore_toml();
    assert!(!written.contains("s3cret"), "{written}");
    let again = load_file(&written).unwrap_or_else(|error| panic!("{error}\n{written}"));
    assert_eq!(again.repositories, settings.repositories);
    assert_eq!(again.restore, settings.restore);
    assert_eq!(again.archive.cluster, "c-1");
}

#[test]
fn the_environment_a_restored_server_needs_is_named() {
    let set = |name: &str| matches!(name, "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" | "AWS_REGION");
    let s3 = load_file("[[repository]]\nbucket = \"b\"\nregion = \"r\"\n").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(s3.environment_needed(&set), ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]);
    let local = load_file("").unwrap_or_else(|error| panic!("{error}"));
    assert!(local.environment_needed(&set).is_empty());
}

#[test]
fn schedules_are_utc_and_strictly_later() {
    let schedule = Schedule::parse("30 2 * * *").expect("a pattern");
    let at = |text: &str| text.parse::<jiff::Timestamp>().expect("a time");
    assert_eq!(schedule.next_after(at("2026-11-20T02:29:59Z")), Some(at("2026-11-20T02:30:00Z")));
    assert_eq!(schedule.next_after(at("2026-11-20T02:30:00Z")), Some(at("2026-11-21T02:30:00Z")));
    // It would be searched for through three thousand years, and no backup would ever be taken.
    for never in ["0 0 30 2 *", "0\u{b}0 30 2 *", ", 0 * * *", "0 , * * *"] {
        assert_eq!(Schedule::parse(never).err().as_deref(), Some("there is no such moment"), "{never}");
    }
    assert!(Schedule::parse("@daily").is_ok());
    let rare = Schedule::parse("0 0 29 2 *").expect("a pattern");
    assert_eq!(rare.next_after(at("2028-02-29T00:00:00Z")), Some(at("2032-02-29T00:00:00Z")));
}

#[test]
fn durations_and_sizes_have_units() {
    assert_eq!(value::duration("500ms"), Some(Duration::from_millis(500)));
    assert_eq!(value::duration("1.5s"), Some(Duration::from_millis(1500)));
    assert_eq!(value::duration("14d"), Some(Duration::from_secs(14 * 86_400)));
    assert_eq!(value::duration("90"), Some(Duration::from_secs(90)));
    for wrong in ["", "s", "1 day", "-1s", "1e3s", "1.2.3s", "99999999d", "1s 2s"] {
        assert_eq!(value::duration(wrong), None, "{wrong}");
    }
    assert_eq!(value::bytes("64MiB"), Some(64 << 20));
    assert_eq!(value::bytes("64 MiB"), Some(64 << 20));
    assert_eq!(value::bytes("17"), Some(17));
    for wrong in ["", "MiB", "64M", "64MB", "1.5GiB", "-1", "99999999999999TiB"] {
        assert_eq!(value::bytes(wrong), None, "{wrong}");
    }
}

#[test]
fn one_repository_can_be_chosen_for_reading() {
    let text =
        "[[repository]]\nname = \"a\"\nbucket = \"b\"\n[[repository]]\nname = \"c\"\npath = \"d\"\nrequired = false\n";
    let mut settings = load_file(text).unwrap_or_else(|error| panic!("{error}"));
    let message = refusal(settings.choose_repository("x").map(|()| settings.clone()));
    assert_eq!(message, "there is no repository \"x\"; the settings have a, c");
    assert!(settings.choose_repository("c").is_ok());
    assert!(settings.repositories.len() == 1 && settings.repositories[0].name == "c");
    assert!(!settings.is_from_file_alone(), "the file alone would give both");
    assert!(load_file(&settings.to_restore_toml()).is_ok(), "what is written for a restore can be read");
}

#[test]
fn a_reload_reads_the_file_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("walden.toml");
    std::fs::write(&path, "[log]\nlevel = \"warn\"\n").expect("writable");
    let environment = vec![("WALDEN_ARCHIVE__CLUSTER".into(), "env".into())];
    let sources = Sources {
        config: Some(path.clone()),
        quick: QuickSettings::default(),
        environment,
        working_directory: "/srv".into(),
    };
    let settings = Settings::load(&sources).unwrap_or_else(|error| panic!("{error}"));
    std::fs::write(&path, "[log]\nlevel = \"debug\"\n").expect("writable");
    let again = settings.reload().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((again.log.level, again.archive.cluster.as_str()), (tracing::Level::DEBUG, "env"));
}
