//! `wal-fetch`: the command that PostgreSQL runs to get a WAL file back (`restore_command`).
//!
//! PostgreSQL takes an exit status from 1 to 125 as "there is no such file", which ends recovery and opens the database,
//! perhaps long before its time; above 125, or by a signal, it stops instead ("Archive Recovery" in the documentation,
//! `RestoreArchivedFile` in `src/backend/access/transam/xlogarchive.c`). So there are three statuses: 0 delivered, 1 proven
//! absent, 255 everything else, wrong arguments and settings included; a panic aborts. Only the function that delivers may
//! say "proven absent" (I12).

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Parser;
use clap::error::ErrorKind;

use super::args::{Cli, Command};
use super::error::CliError;
use super::output::{Output, tell};
use crate::config::Settings;
use crate::telemetry::{LogSettings, start_logging};
use crate::wal::SystemIdentifier;

pub const DELIVERED: u8 = 0;
pub const PROVEN_ABSENT: u8 = 1;
pub const NOT_DELIVERED: u8 = 255;

/// What PostgreSQL asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The plan of a restore.
    pub plan: Option<PathBuf>,
    /// Which one of several under the cluster's name, where no plan says it.
    pub system: Option<SystemIdentifier>,
    /// `%f`: not checked yet.
    pub name: String,
    /// `%p`: relative to PostgreSQL's data directory, which is the working directory.
    pub path: PathBuf,
}

/// How it went, where it went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is there, whole and verified.
    Delivered,
    /// It is certain that this file does not exist.
    ProvenAbsent,
}

/// Gets the file, or says why not.
pub type Deliver = fn(&Settings, &Wanted) -> Result<Fetched, CliError>;

/// Whether these arguments mean `wal-fetch`, however wrong the rest of them is. A misspelt command that begins with `wal` counts
/// as well: it stands in a `restore_command`, and clap's status 2 would open the database.
pub fn is_meant(args: &[OsString]) -> bool {
    const WITH_VALUE: [&str; 6] = ["--config", "--url", "--slot", "--cluster", "--listen", "--repository"];
    let mut rest = args.iter().skip(1);
    while let Some(arg) = rest.next() {
        let text = arg.to_string_lossy();
        if WITH_VALUE.contains(&text.as_ref()) {
            rest.next();
        } else if !text.starts_with('-') {
            let known = super::command();
            let is_known = text == "help" || known.get_subcommands().any(|command| command.get_name() == text);
            return text.starts_with("wal") || (!is_known && args.iter().any(|arg| arg == "wal-fetch"));
        }
    }
    // Only flags: `--config wal-fetch` with the value forgotten, say.
    args.iter().skip(1).any(|arg| arg == OsStr::new("wal-fetch"))
}

/// Runs `wal-fetch` to its end; the result is the exit status. `args` begins with the program's name.
pub fn run(args: &[OsString], deliver: Deliver) -> u8 {
    abort_on_panic();
    match fetch(args, deliver) {
        Ok(Fetched::Delivered) => DELIVERED,
        Ok(Fetched::ProvenAbsent) => PROVEN_ABSENT,
        Err(error) => {
            Output::from_args(args).failure(&CliError { code: NOT_DELIVERED, ..error });
            NOT_DELIVERED
        }
    }
}

fn fetch(args: &[OsString], deliver: Deliver) -> Result<Fetched, CliError> {
    let cli = Cli::try_parse_from(args).map_err(|error| {
        if error.kind() == ErrorKind::DisplayHelp {
            tell(&error.render().to_string());
            // Help is no WAL file, so it ends as everything else that is none.
            return CliError::new(NOT_DELIVERED, "only the help was asked for, and no file", "");
        }
        super::usage_error(&error, args)
    })?;
    let Command::WalFetch(command) = &cli.command else {
        return Err(CliError::new(
            NOT_DELIVERED,
            "this is not a wal-fetch command",
            "write `walden wal-fetch NAME PATH`",
        ));
    };
    let wanted = Wanted {
        plan: command.plan.clone(),
        system: command.system.system_identifier,
        name: command.name.clone(),
        path: command.path.clone(),
    };
    let settings = super::load(&cli)?;
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => tracing::Level::ERROR,
        (false, 0) => settings.log.level.min(tracing::Level::WARN), // it runs once per file, in the server's log
        (false, 1) => tracing::Level::DEBUG,
        (false, _) => tracing::Level::TRACE,
    };
    start_logging(&LogSettings { level, format: settings.log.format });
    deliver(&settings, &wanted)
}

/// A panic's own exit status is 101, which PostgreSQL would take for the end of the WAL. A signal is not taken so.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        // stderr may be closed; that must not matter here.
        let _ = writeln!(
            io::stderr(),
            "error: wal-fetch failed by a bug: {panic}; report it, and see the log of PostgreSQL"
        );
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus, Stdio};

    use super::*;

    const KIND: &str = "WALDEN_TEST_FETCH";

    /// What runs in the child process: it ends with `run`'s status. Alone it does nothing.
    #[test]
    fn child() {
        let Ok(kind) = std::env::var(KIND) else { return };
        let deliver: Deliver = match kind.as_str() {
            "delivered" => |_, _| Ok(Fetched::Delivered),
            "absent" => |_, _| Ok(Fetched::ProvenAbsent),
            "panic" => |_, _| panic!("a bug"),
            "panic-in-thread" => |_, _| match std::thread::spawn(|| panic!("a bug")).join() {
                Ok(()) | Err(_) => Ok(Fetched::ProvenAbsent),
            },
            // Whatever code a room gives its error, it is not the process's.
            _ => |_, _| Err(CliError::new(5, "the object is damaged", "")),
        };
        let line = if kind == "arguments" { "walden wal-fetch --plan" } else { "walden wal-fetch a b" };
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        std::process::exit(i32::from(run(&args, deliver)));
    }

    fn status_of(kind: &str, variables: &[(&str, &str)]) -> ExitStatus {
        let mut command = Command::new(std::env::current_exe().expect("this test runs"));
        command.args(["--exact", "cli::wal_fetch::tests::child"]).env(KIND, kind).envs(variables.iter().copied());
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("it starts")
    }

    /// I12: PostgreSQL takes 1 to 125 as the end of the WAL, so only proof may give 1, and nothing gives 2 to 254.
    #[test]
    fn only_three_exit_statuses_or_a_signal_are_possible() {
        for (kind, code) in [("delivered", 0), ("absent", 1), ("error", 255), ("arguments", 255)] {
            assert_eq!(status_of(kind, &[]).code(), Some(code), "{kind}");
        }
        for wrong in
            [("WALDEN_CONFIG", "/nowhere"), ("WALDEN_CONFIG", "/"), ("WALDEN_LOG__LEVEL", "loud"), ("WALDEN_A__B", "1")]
        {
            assert_eq!(status_of("delivered", &[wrong]).code(), Some(255), "{wrong:?}");
        }
        for kind in ["panic", "panic-in-thread"] {
            let status = status_of(kind, &[]);
            assert_eq!((status.code(), status.signal()), (None, Some(6)), "{kind}");
        }
    }
}
