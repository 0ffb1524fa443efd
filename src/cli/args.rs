//! Commands, flags and their help.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::error::CliError;
use super::exit;
use crate::config::QuickSettings;
use crate::wal::{Lsn, SystemIdentifier, TimelineId};

/// Continuous WAL archiving, base backups and point-in-time recovery for PostgreSQL.
#[derive(Debug, Parser)]
#[command(name = "walden", version, max_term_width = 120, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(flatten)]
    pub quick: QuickArgs,
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  walden run                                     archive the local server into ./walden-archive
  walden status                                  is everything all right?
  walden list                                    what can be restored?
  walden restore --pgdata /tmp/db --target-time '2026-11-20 14:03:00+00' --start
                                                 the database as it was, started

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 target cannot be reached, 4 refused, 5 stored object damaged or missing. \
With each, one line says what, why and what to do.";

#[derive(Debug, Args)]
#[command(next_help_heading = "For every command")]
pub struct GlobalArgs {
    /// Configuration file [default: WALDEN_CONFIG, else /etc/walden/walden.toml if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print JSON on stdout, errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Settings for first tries, without a file.
#[derive(Debug, Args)]
#[command(next_help_heading = "Instead of a configuration file, for a first try")]
pub struct QuickArgs {
    /// Server, as a libpq URL or key=value text without a password
    #[arg(long, global = true, value_name = "URL")]
    pub url: Option<String>,
    /// Replication slot
    #[arg(long, global = true, value_name = "NAME")]
    pub slot: Option<String>,
    /// Your name for the database cluster: the folder in the repository
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// The agent's HTTP address; "" for none
    #[arg(long, global = true, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// The only repository: s3://bucket/prefix or a path; list, restore, recovery-conf and wal-fetch also take the name of a
    /// configured one
    #[arg(long, global = true, value_name = "URL|NAME")]
    pub repository: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The agent: stream, ship, back up on schedule, serve metrics
    #[command(after_help = "\
Ends at the start only for wrong settings (2) or a refusal (4); what can heal (host, password, bucket, disk) is said once, shown \
by `walden status`, and tried again for ever. SIGTERM and SIGINT stop it cleanly, SIGHUP reads [alert] and [backup] again.

Examples:
  walden run --url postgres://walden@db1 --repository s3://backups/db1
  walden --config /etc/walden/walden.toml run")]
    Run(RunArgs),
    /// Prove that `run` and `restore` would work, and change nothing; 1 if not
    #[command(after_help = "\
One line for each thing that was looked at: \"ok\" works, \"note\" works and has something to know, \"FAIL\" would not work; behind \
it what to do. Fine beside a running agent.

Examples:
  walden check
  walden --config /etc/walden/walden.toml check --json")]
    Check(CheckArgs),
    /// Take one base backup now, beside a running agent or alone
    #[command(after_help = "Example:\n  walden backup --label before-upgrade")]
    Backup(BackupArgs),
    /// Show backups, timelines, and from when to when any moment can be restored
    #[command(after_help = "Examples:\n  walden list\n  walden list --json --repository offsite")]
    List(ListArgs),
    /// Ask the running agent whether all is well: 0 healthy, 1 not
    #[command(after_help = "Examples:\n  walden status\n  walden status --json --listen 127.0.0.1:9847")]
    Status(StatusArgs),
    /// Rebuild a data directory as it was at a target, ready to start
    #[command(after_help = "\
Everything is planned and checked before the first byte is written. Nothing is ever deleted.

Examples:
  walden restore --pgdata /var/lib/postgresql/restored
  walden restore --pgdata DIR --target-time '2026-11-20 14:03:00+00' --dry-run
  walden restore --pgdata DIR --target-lsn 0/5A000028 --exclusive --start")]
    Restore(RestoreArgs),
    /// Print the recovery settings for a target; touches nothing
    #[command(
        after_help = "Example:\n  walden recovery-conf --target-time '2026-11-20 14:03:00+00' >> postgresql.auto.conf"
    )]
    RecoveryConf(RecoveryConfArgs),
    /// Deliver one WAL file to PostgreSQL; for restore_command
    #[command(after_help = "\
Exit statuses: 0 delivered and verified, 1 proven absent, 255 everything else, so that PostgreSQL never takes a fault for the \
end of the WAL.

Example:
  restore_command = '/usr/bin/walden --config /etc/walden/walden.toml wal-fetch %f %p'")]
    WalFetch(WalFetchArgs),
    /// Let a new cluster archive under a name that another one used
    #[command(after_help = "\
After initdb or pg_upgrade a cluster has another system identifier, and `walden run` refuses it under the old name. What was \
archived stays and can be restored with `--system-identifier`; the old cluster is refused from then on. Its agent must be stopped.

Example:
  walden adopt --system-identifier 7564093612785409013")]
    Adopt(AdoptArgs),
    /// Print a script that lets your shell complete commands and flags
    #[command(after_help = "\
Examples:
  walden completions bash > /usr/share/bash-completion/completions/walden
  walden completions zsh > /usr/local/share/zsh/site-functions/_walden
  walden completions fish > /usr/share/fish/vendor_completions.d/walden.fish")]
    Completions(CompletionsArgs),
    /// Print the manual page
    #[command(after_help = "Examples:\n  walden man | man -l -\n  walden man > /usr/local/share/man/man1/walden.1")]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub struct AdoptArgs {
    /// The new cluster's, as `pg_controldata` and the refusal show it
    #[arg(long, value_name = "N")]
    pub system_identifier: SystemIdentifier,
}

#[derive(Debug, Args)]
pub struct RunArgs {}

#[derive(Debug, Args)]
pub struct CheckArgs {}

#[derive(Debug, Args)]
pub struct BackupArgs {
    /// A few words to find it again
    #[arg(long, value_parser = parse_label)]
    pub label: Option<String>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub system: SystemArgs,
}

#[derive(Debug, Args)]
pub struct StatusArgs {}

#[derive(Debug, Args)]
pub struct RecoveryConfArgs {
    #[command(flatten)]
    pub system: SystemArgs,
    #[command(flatten)]
    pub target: TargetArgs,
}

#[derive(Debug, Args)]
pub struct WalFetchArgs {
    /// The plan that `walden restore` wrote
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    #[command(flatten)]
    pub system: SystemArgs,
    /// The file's name (%f)
    pub name: String,
    /// Where to write it (%p)
    pub path: PathBuf,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Your shell
    #[arg(value_enum)]
    pub shell: ShellName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShellName {
    Bash,
    Fish,
    Zsh,
}

#[derive(Debug, Args)]
pub struct ManArgs {}

#[derive(Debug, Args)]
pub struct SystemArgs {
    /// Which one, where several database clusters were archived under this name
    #[arg(long, value_name = "N")]
    pub system_identifier: Option<SystemIdentifier>,
}

#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The data directory to make
    #[arg(long, value_name = "DIR")]
    pub pgdata: PathBuf,
    #[command(flatten)]
    pub system: SystemArgs,
    /// Put a tablespace elsewhere (repeatable); write \= for a = in a path
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace)]
    pub tablespace_map: Vec<TablespaceMap>,
    /// The postgresql.conf to use, where the server kept it outside its data directory
    #[arg(long, value_name = "PATH")]
    pub config_file: Option<PathBuf>,
    /// Whether the restored server goes on archiving, and waiting for synchronous standbys, as the backup's did
    #[arg(long, value_enum, default_value_t = ArchiveMode::Off, value_name = "MODE")]
    pub archive_mode: ArchiveMode,
    /// Rename what is at DIR to DIR.before-<UTC>; nothing is deleted
    #[arg(long)]
    pub force: bool,
    /// Print the plan and write nothing
    #[arg(long, conflicts_with = "start")]
    pub dry_run: bool,
    /// Start PostgreSQL and wait until the target is reached
    #[arg(long)]
    pub start: bool,
    /// Downloads at the same time [default: restore.jobs, the number of CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub jobs: Option<u16>,
    // Last, since its heading holds for all that follows.
    #[command(flatten)]
    pub target: TargetArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Target")]
pub struct TargetArgs {
    #[command(flatten)]
    pub point: PointArgs,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    pub exclusive: bool,
    /// Follow this timeline, decimal [default: the newest on the branch that is archived now]
    #[arg(long, value_name = "N", value_parser = parse_timeline)]
    pub timeline: Option<TimelineId>,
    /// Start from this backup of `walden list` [default: the last one that serves]
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
    /// What PostgreSQL does at the target
    #[arg(long, value_enum, default_value_t = Action::Promote, value_name = "ACTION")]
    pub action: Action,
    /// The zone of a --target-time that names none, such as Europe/Berlin
    #[arg(long, value_name = "ZONE")]
    pub time_zone: Option<String>,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct PointArgs {
    /// A moment with its zone, such as '2026-11-20 14:03:00+00'
    #[arg(long, value_name = "T")]
    pub target_time: Option<String>,
    /// A position in the WAL, such as 0/5A000028
    #[arg(long, value_name = "L")]
    pub target_lsn: Option<Lsn>,
    /// A transaction, with or without its epoch
    #[arg(long, value_name = "X", value_parser = parse_xid)]
    pub target_xid: Option<u64>,
    /// A restore point made by pg_create_restore_point
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub target_name: Option<String>,
    /// latest: the end of all WAL that is held; immediate: the end of the backup [default: latest]
    #[arg(long, value_enum, value_name = "WHICH")]
    pub target: Option<TargetWord>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TargetWord {
    Latest,
    Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    Promote,
    Pause,
    Shutdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ArchiveMode {
    Keep,
    Off,
}

/// A tablespace's location in the backup, and where to put it. Both absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceMap {
    pub old: PathBuf,
    pub new: PathBuf,
}

/// Where to stop, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// Not parsed yet: its zone may be given beside it.
    Time {
        text: String,
        exclusive: bool,
    },
    Lsn {
        lsn: Lsn,
        exclusive: bool,
    },
    Xid {
        xid: u32,
        exclusive: bool,
    },
    Name(String),
    Latest,
    Immediate,
}

impl TargetArgs {
    /// Usage error where `--exclusive` has no meaning.
    pub fn point(&self) -> Result<Point, CliError> {
        let (point, exclusive) = (&self.point, self.exclusive);
        let chosen = if let Some(text) = &point.target_time {
            Point::Time { text: text.clone(), exclusive }
        } else if let Some(lsn) = point.target_lsn {
            Point::Lsn { lsn, exclusive }
        } else if let Some(xid) = point.target_xid {
            // PostgreSQL cuts off the epoch in the same way (check_recovery_target_xid in xlogrecovery.c).
            Point::Xid { xid: (xid & u64::from(u32::MAX)) as u32, exclusive }
        } else if let Some(name) = &point.target_name {
            Point::Name(name.clone())
        } else if point.target == Some(TargetWord::Immediate) {
            Point::Immediate
        } else {
            Point::Latest
        };
        let has_side = matches!(chosen, Point::Time { .. } | Point::Lsn { .. } | Point::Xid { .. });
        if exclusive && !has_side {
            return Err(CliError::new(
                exit::USAGE,
                "--exclusive has no meaning for this target",
                "give it with --target-time, --target-lsn or --target-xid",
            ));
        }
        if self.time_zone.is_some() && !matches!(chosen, Point::Time { .. }) {
            return Err(CliError::new(exit::USAGE, "--time-zone needs --target-time", "leave it out"));
        }
        Ok(chosen)
    }
}

impl Command {
    /// What clap cannot say.
    pub fn check(&self) -> Result<(), CliError> {
        match self {
            Self::Restore(args) => args.target.point().map(|_| ()),
            Self::RecoveryConf(args) => args.target.point().map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Whether `--repository` may choose one of the configured repositories.
    fn is_reading(&self) -> bool {
        matches!(self, Self::List(_) | Self::Restore(_) | Self::RecoveryConf(_) | Self::WalFetch(_))
    }
}

impl Cli {
    /// The name given with `--repository`, if it chooses one of the configured repositories.
    pub fn repository_name(&self) -> Option<&str> {
        let given = self.quick.repository.as_deref()?;
        (self.command.is_reading() && !given.contains('/')).then_some(given)
    }

    /// What was given with `--repository` to a command that writes, and might be meant as a name.
    pub fn bare_repository(&self) -> Option<&str> {
        let writes =
            matches!(self.command, Command::Run(_) | Command::Check(_) | Command::Backup(_) | Command::Adopt(_));
        self.quick.repository.as_deref().filter(|given| writes && !given.contains('/'))
    }

    pub fn quick_settings(&self) -> QuickSettings {
        let quick = &self.quick;
        QuickSettings {
            url: quick.url.clone(),
            slot: quick.slot.clone(),
            cluster: quick.cluster.clone(),
            listen: quick.listen.clone(),
            repository: if self.repository_name().is_some() { None } else { quick.repository.clone() },
        }
    }
}

/// Decimal, as in JSON; only file names are hexadecimal.
fn parse_timeline(text: &str) -> Result<TimelineId, String> {
    let number: u32 = text.parse().map_err(|_| "a timeline is a decimal number from 1".to_owned())?;
    TimelineId::new(number).map_err(|error| error.to_string())
}

fn parse_xid(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "a transaction is a decimal number, as txid_current() and pg_waldump show it".to_owned())
}

/// One line of at most 200 characters.
fn parse_label(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().count() > 200 || text.contains(char::is_control) {
        return Err("a label has 1 to 200 characters on one line".into());
    }
    Ok(text.into())
}

/// As in `pg_basebackup --tablespace-mapping`: absolute paths, `\=` for an equals sign in one.
fn parse_tablespace(text: &str) -> Result<TablespaceMap, String> {
    let mut sides = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let side = sides.last_mut().expect("it begins with one and only grows");
        match c {
            '\\' if chars.peek() == Some(&'=') => side.extend(chars.next()),
            '=' => sides.push(String::new()),
            c => side.push(c),
        }
    }
    let [old, new] = sides.as_slice() else { return Err("write OLD=NEW, and \\= for a = in a path".into()) };
    let (old, new) = (PathBuf::from(old), PathBuf::from(new));
    if !old.is_absolute() || !new.is_absolute() {
        return Err("both paths must be absolute".into());
    }
    Ok(TablespaceMap { old, new })
}
