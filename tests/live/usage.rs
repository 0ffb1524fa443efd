//! What is no mistake: help and version.

use std::time::Duration;

use crate::support::{Stage, Walden, walden};

/// Nothing here waits for anything.
const AT_ONCE: Duration = Duration::from_secs(30);

/// Help and version are data: stdout, code 0, and no line too wide for a terminal of 100 columns.
#[test]
fn help_is_data_and_fits_a_terminal() {
    let stage = Stage::new("help");
    let plain = Walden::with_config(&stage, "");
    let run = |arguments: &[&str]| {
        let mut command = stage.command(plain.binary());
        command.args(arguments).env("COLUMNS", "100");
        walden::finish(command, AT_ONCE)
    };
    let version = run(&["--version"]);
    assert_eq!((version.code, version.stdout.trim()), (Some(0), concat!("walden ", env!("CARGO_PKG_VERSION"))));
    for command in
        [&[][..], &["run"], &["check"], &["backup"], &["list"], &["status"], &["restore"], &["recovery-conf"]]
    {
        for flag in ["--help", "-h"] {
            let done = run(&[command, &[flag]].concat());
            assert_eq!((done.code, done.stderr.as_str()), (Some(0), ""), "{command:?}");
            let wide = done.stdout.lines().find(|line| line.chars().count() > 100);
            assert!(wide.is_none(), "{command:?}: {wide:?}");
        }
    }
    // PostgreSQL must never take help for a file.
    let fetch = run(&["wal-fetch", "--help"]);
    assert_eq!((fetch.code, fetch.stdout.as_str()), (Some(255), ""));
}
