use std::path::PathBuf;

use super::args::*;
use super::*;
use crate::wal::Lsn;

fn words(line: &str) -> Vec<OsString> {
    std::iter::once("walden").chain(line.split_whitespace()).map(OsString::from).collect()
}

fn parse(line: &str) -> Result<Cli, CliError> {
    Cli::try_parse_from(words(line)).map_err(|error| usage_error(&error, &words(line)))
}

fn target(line: &str) -> Result<Point, CliError> {
    match parse(line)?.command {
        Command::Restore(args) => args.target.point(),
        Command::RecoveryConf(args) => args.target.point(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definition_of_the_commands_is_sound() {
    command().debug_assert();
}

#[test]
fn every_command_has_help_with_an_example() {
    for subcommand in command().get_subcommands() {
        assert!(subcommand.get_about().is_some(), "{}", subcommand.get_name());
        let help = subcommand.clone().render_long_help().to_string();
        assert!(help.contains("xample"), "{help}");
    }
}

#[test]
fn targets_are_what_was_asked_for() {
    let lsn = Lsn::new(0x5A00_0028);
    assert_eq!(target("restore --pgdata d").ok(), Some(Point::Latest));
    assert_eq!(target("recovery-conf --target immediate").ok(), Some(Point::Immediate));
    let exclusive = target("restore --pgdata d --target-lsn 0/5A000028 --exclusive");
    assert_eq!(exclusive.ok(), Some(Point::Lsn { lsn, exclusive: true }));
    // 2^32 + 700: the epoch is cut off, as PostgreSQL does.
    let xid = target("recovery-conf --target-xid 4294967996");
    assert_eq!(xid.ok(), Some(Point::Xid { xid: 700, exclusive: false }));
}

#[test]
fn conflicting_targets_are_usage_errors() {
    for line in [
        "restore --pgdata d --target-lsn 0/1 --target-name x",
        "restore --pgdata d --target-time 2026-11-20 --target latest",
        "restore --pgdata d --target latest --exclusive",
        "restore --pgdata d --target-name x --exclusive",
        "restore --pgdata d --exclusive",
        "restore --pgdata d --target-lsn 1234",
        "restore --pgdata d --target now",
        "restore --pgdata d --timeline 0",
        "restore --pgdata d --dry-run --start",
        "restore --pgdata d --jobs 0",
        "restore --pgdata d --tablespace-map a=b",
        "restore --pgdata d --time-zone UTC",
        "restore",
        "status -q -v",
        "frobnicate",
        "",
    ] {
        let error = target(line).err().unwrap_or_else(|| panic!("{line} was accepted"));
        assert_eq!(error.code, exit::USAGE, "{line}");
        assert!(
            !error.message.is_empty() && !error.message.contains('\n') && !error.message.contains("Usage"),
            "{}",
            error.message
        );
    }
}

#[test]
fn tablespaces_are_mapped_by_absolute_paths() {
    let cli = parse(r"restore --pgdata d --tablespace-map /a\=b=/c --tablespace-map /d=/e")
        .unwrap_or_else(|error| panic!("{error}"));
    let Command::Restore(args) = cli.command else { panic!("not a restore") };
    let map = |old: &str, new: &str| TablespaceMap { old: PathBuf::from(old), new: PathBuf::from(new) };
    assert_eq!(args.tablespace_map, [map("/a=b", "/c"), map("/d", "/e")]);
}

#[test]
fn a_repository_is_a_name_only_where_something_is_read() {
    let given = |line: &str| {
        let cli = parse(line).unwrap_or_else(|error| panic!("{error}"));
        (cli.repository_name().map(str::to_owned), cli.quick_settings().repository)
    };
    assert_eq!(given("list --repository offsite"), (Some("offsite".into()), None));
    assert_eq!(given("list --repository s3://b/p"), (None, Some("s3://b/p".into())));
    assert_eq!(given("--repository ./a recovery-conf"), (None, Some("./a".into())));
    assert_eq!(given("run --repository archive"), (None, Some("archive".into())));
}

#[test]
fn errors_are_one_line_and_a_document() {
    let error = CliError::new(exit::UNREACHABLE, "no\nbackup \u{1b}[1m", "take one");
    assert_eq!(error.to_string(), "error: no backup [1m; take one");
    assert_eq!(
        error.to_json().to_string(),
        r#"{"error":{"code":3,"hint":"take one","message":"no backup [1m","windows":[]},"schema":1,"windows":[]}"#
    );
    let inner = std::io::Error::other("the disk is full");
    let outer = crate::config::ConfigError::Unreadable { path: "/a".into(), source: inner };
    assert_eq!(CliError::from(outer).message, "cannot read the configuration file /a: the disk is full");
}

#[test]
fn wal_fetch_is_recognised_however_wrong_its_arguments_are() {
    for line in [
        "wal-fetch 000000010000000000000001 pg_wal/RECOVERYXLOG",
        "--config walden.toml wal-fetch a b",
        "--config=walden.toml -q --json wal-fetch",
        "--bogus wal-fetch a b",
        "--bogus value wal-fetch a b",
        "--config wal-fetch a b",
        "wal-fetch --help",
        "wal_fetch a b",
        "walfetch a b",
        "--config wal-fetch",
    ] {
        assert!(wal_fetch::is_meant(&words(line)), "{line}");
    }
    for line in
        ["run", "backup --label wal-fetch", "--config wal-fetch status", "help wal-fetch", "--help", "", "--version"]
    {
        assert!(!wal_fetch::is_meant(&words(line)), "{line}");
    }
}

#[test]
fn every_command_can_be_told_from_wal_fetch() {
    for subcommand in command().get_subcommands().filter(|command| command.get_name() != "wal-fetch") {
        assert!(!wal_fetch::is_meant(&words(subcommand.get_name())), "{}", subcommand.get_name());
    }
}

#[test]
fn progress_is_hidden_without_a_terminal() {
    let output = Output::new(false, true);
    for total in [None, Some(1000)] {
        let bar = output.progress(total, "restoring");
        bar.inc(10);
        assert!(bar.is_hidden() && bar.position() == 10);
    }
}
