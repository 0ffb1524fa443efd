//! The command line: one file per command.
//!
//! Data goes to stdout, everything else to stderr. A failure is one line that says what, why and what to do, and one of the
//! exit codes in [`exit`]. `wal-fetch` does not pass through here: its exit statuses mean something else to PostgreSQL.

pub mod args;
pub mod error;
pub mod exit;
pub mod output;
pub mod wal_fetch;

pub mod deliver;

mod adopt;
mod backup;
mod check;
mod contact;
mod http;
mod list;
mod man;
mod reading;
mod recovery_conf;
mod restore;
mod run;
mod status;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::config::{Settings, Sources};
use crate::telemetry::{LogFormat, LogSettings, start_logging};
use args::{Cli, Command};
pub use error::CliError;
pub use output::Output;

/// Runs one command to its end and returns the exit code. `args` begins with the program's name.
pub fn run(args: &[OsString]) -> u8 {
    // What libraries create, such as the state's files, is for its owner alone too (I18).
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let output = Output::from_args(args);
    let result = match Cli::try_parse_from(args) {
        Ok(cli) => dispatch(&cli, &output),
        Err(error) => explain(&error, args),
    };
    result.unwrap_or_else(|error| {
        output.failure(&error);
        error.code
    })
}

fn dispatch(cli: &Cli, output: &Output) -> Result<u8, CliError> {
    if let Command::WalFetch(_) = cli.command {
        return Ok(wal_fetch::NOT_DELIVERED); // unreachable as long as `wal_fetch::is_meant` sees what clap sees
    }
    // What is about the program alone works however wrong the settings are.
    match &cli.command {
        Command::Completions(args) => return man::completions(output, args.shell),
        Command::Man(_) => return man::run(output),
        _ => {}
    }
    cli.command.check()?;
    let settings = load(cli)?;
    start_logging(&log_settings(cli, output, &settings));
    if !matches!(cli.command, Command::Check(_)) {
        settings.warnings().iter().for_each(|warning| tracing::warn!("{warning}")); // `check` reports them
    }
    match &cli.command {
        Command::Status(_) => status::run(&settings, output),
        Command::Run(_) => run::run(&settings).or_else(|error| ended(error, output, &settings)),
        Command::Check(_) => check::run(&settings, output),
        Command::Backup(args) => backup::run(&settings, output, args),
        Command::List(args) => list::run(&settings, output, args),
        Command::Restore(args) => restore::run(&settings, output, args),
        Command::RecoveryConf(args) => recovery_conf::run(&settings, output, args),
        Command::Adopt(args) => adopt::run(&settings, output, args),
        Command::WalFetch(_) | Command::Completions(_) | Command::Man(_) => Ok(exit::FAILED), // returned above
    }
}

/// Why the agent ended: among JSON lines it is one too.
fn ended(error: CliError, output: &Output, settings: &Settings) -> Result<u8, CliError> {
    if settings.log.format != LogFormat::Json {
        return Err(error);
    }
    tracing::error!(event = "ended", code = error.code, "{}; {}", error.message, error.hint);
    if output.is_json() {
        output.line(&error.to_json().to_string())?;
    }
    Ok(error.code)
}

/// A command that reads and was given the name of a repository gets settings with this one alone.
fn load(cli: &Cli) -> Result<Settings, CliError> {
    if let Some(name) = cli.bare_repository() {
        refuse_known_name(cli, name)?;
    }
    let sources = Sources::from_process(cli.global.config.clone(), cli.quick_settings())?;
    let mut settings = Settings::load(&sources)?;
    if let Some(name) = cli.repository_name() {
        settings.choose_repository(name)?;
    }
    Ok(settings)
}

/// Whoever gives the name of a configured repository to a command that writes does not mean a directory of that name: WAL would go
/// there, and be missing where it belongs.
fn refuse_known_name(cli: &Cli, name: &str) -> Result<(), CliError> {
    let quick = crate::config::QuickSettings { repository: None, ..cli.quick_settings() };
    let configured = Settings::load(&Sources::from_process(cli.global.config.clone(), quick)?)?;
    if !configured.repositories.iter().any(|repository| repository.name == name) {
        return Ok(());
    }
    Err(CliError::new(
        exit::USAGE,
        format!("--repository {name} is the name of a configured repository, and this command works with all of them"),
        format!("leave it out, or write ./{name} if a directory is meant"),
    ))
}

/// `run` logs by its settings. A command that somebody waits for shows its progress on the terminal instead, so there only
/// warnings are logged. `-q` leaves errors, `-v` adds debug, `-vv` trace.
fn log_settings(cli: &Cli, output: &Output, settings: &Settings) -> LogSettings {
    use tracing::Level;
    let is_run = matches!(cli.command, Command::Run(_));
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => Level::ERROR,
        (false, 0) if is_run || !output.is_terminal() => settings.log.level,
        (false, 0) => settings.log.level.min(Level::WARN), // tracing orders levels from ERROR up to TRACE
        (false, 1) => Level::DEBUG,
        (false, _) => Level::TRACE,
    };
    LogSettings { level, format: settings.log.format }
}

/// Help and version are data; everything else clap says is a usage error, made one line.
fn explain(error: &clap::Error, args: &[OsString]) -> Result<u8, CliError> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nothing can be done when stdout is closed; the help was not wanted then.
            let _ = error.print();
            Ok(exit::DONE)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            Err(CliError::new(exit::USAGE, "a command is missing", "`walden --help` lists the commands"))
        }
        _ => Err(usage_error(error, args)),
    }
}

/// Clap's message without its usage block, in one line; its tip, where it has one, is what to do.
pub fn usage_error(error: &clap::Error, args: &[OsString]) -> CliError {
    let text = error.render().to_string();
    let mut paragraphs = text.trim_start_matches("error: ").split("\n\n").map(str::trim);
    let what = paragraphs.next().unwrap_or_default();
    let tip = paragraphs.find_map(|paragraph| paragraph.strip_prefix("tip: "));
    let known = command();
    let named = args.iter().skip(1).find_map(|arg| known.get_subcommands().find(|command| arg == command.get_name()));
    let help = match named {
        Some(command) => format!("`walden {} --help` shows how it is used", command.get_name()),
        None => "`walden --help` lists the commands".into(),
    };
    CliError::new(exit::USAGE, what, tip.map_or(help, str::to_owned))
}

/// The command as clap knows it, for completions and tests.
pub fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests;
