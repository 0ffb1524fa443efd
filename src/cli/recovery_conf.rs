//! `walden recovery-conf`: the recovery settings for a target, to be used by hand. Touches nothing.

use super::args::RecoveryConfArgs;
use super::error::CliError;
use super::output::Output;
use super::{exit, reading, restore as restore_command};
use crate::config::{Settings, StoreSettings};
use crate::restore::{self, ArchiveMode, CommandLine, ConfigSource};

pub fn run(settings: &Settings, output: &Output, args: &RecoveryConfArgs) -> Result<u8, CliError> {
    let request = reading::request(&args.target)?;
    let (mut command, remark) = command_line(settings)?;
    reading::runtime()?.block_on(async {
        let repositories = reading::open(settings).await?;
        let plan = restore::plan(&repositories, args.system.system_identifier, &request).await?;
        // The plan holds for this system in this repository, and another one may hold less.
        command.system = Some(plan.archive.system());
        if repositories.len() > 1 {
            command.repository = Some(plan.archive.repository().name().to_owned());
        }
        let shown = restore::settings(&plan, &command, &[], ArchiveMode::Keep);
        if output.is_json() {
            let files = ["postgresql.auto.conf".to_string(), "recovery.signal".to_string()];
            output.document(&reading::plan_json(&plan, &shown, &files))?;
            return Ok(exit::DONE);
        }
        let mut text = String::new();
        for line in reading::plan_lines(&plan) {
            text.push_str(&format!("# {}\n", line.replace(char::is_control, " ")));
        }
        text.push_str("# Put these lines last in postgresql.auto.conf, and make an empty recovery.signal beside it.\n");
        text.push_str("# The server needs at least:\n");
        for (name, value) in &plan.required_settings {
            text.push_str(&format!("#   {name} = {value}\n"));
        }
        if let Some(remark) = remark {
            text.push_str(&format!("# {remark}\n"));
        }
        text.push_str(&String::from_utf8_lossy(&restore::configuration_lines(&shown)));
        output.line(text.trim_end())?;
        Ok(exit::DONE)
    })
}

/// Without a directory to write to, the command can name a file or repeat flags; what the environment said must be there again.
fn command_line(settings: &Settings) -> Result<(CommandLine, Option<&'static str>), CliError> {
    let mut command = CommandLine {
        binary: restore_command::own_binary()?,
        config: None,
        cluster: None,
        repository: None,
        plan: None,
        system: None,
    };
    if let ConfigSource::File(path) = restore_command::config_source(settings) {
        command.config = Some(path);
        return Ok((command, None));
    }
    const REMARK: &str =
        "Flags or the environment changed the settings of Walden: the restore_command needs the same ones.";
    command.config.clone_from(&settings.file);
    command.cluster = Some(settings.archive.cluster.clone());
    if let [only] = settings.repositories.as_slice()
        && let StoreSettings::Local { path } = &only.store
    {
        command.repository = Some(path.display().to_string());
        return Ok((command, None));
    }
    Ok((command, Some(REMARK)))
}
