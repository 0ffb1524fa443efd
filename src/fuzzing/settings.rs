use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use jiff::Timestamp;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::config::{QuickSettings, Schedule, Settings, Sources};

/// A configuration file; behind a zero byte, environment variables, one on each line. What a restore would write for its
/// `restore_command` is read back, with the same repositories.
pub fn configuration(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (text, variables) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let variables = String::from_utf8_lossy(variables);
    let environment = variables.lines().filter_map(|line| line.split_once('='));
    // WALDEN_CONFIG would name a file of this machine.
    let environment = environment.filter(|(name, _)| name.contains("__"));
    let environment = environment.map(|(name, value)| (name.into(), value.into())).collect();
    let Ok(settings) = load(text, environment) else { return };
    let written = settings.to_restore_toml();
    let again = load(written.as_bytes(), Vec::new());
    let again = again.unwrap_or_else(|error| panic!("{error} in what was written:\n{written}"));
    assert_eq!(again.archive.cluster, settings.archive.cluster);
    assert_eq!(again.repositories, settings.repositories);
    assert_eq!(again.to_restore_toml(), written);
}

/// Through the door that every command uses, a path; the file is in memory only.
fn load(text: &[u8], environment: Vec<(OsString, OsString)>) -> Result<Settings, crate::config::ConfigError> {
    let mut file = File::from(memfd_create("walden.toml", MemfdFlags::CLOEXEC).expect("memory for a file"));
    file.write_all(text).and_then(|()| file.rewind()).expect("it is written");
    let config = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Settings::load(&Sources {
        config: Some(config),
        quick: QuickSettings::default(),
        environment,
        working_directory: PathBuf::from("/"),
    })
}

/// `backup.schedule`: the next moments come one after the other, and soon.
pub fn schedule(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(schedule) = Schedule::parse(text) else { return };
    let mut now = Timestamp::from_second(1_795_000_000).expect("a time");
    for _ in 0..3 {
        let next = schedule.next_after(now).expect("a schedule has moments without end");
        assert!(next > now, "{text}: {next} is not after {now}");
        now = next;
    }
}
