//! `walden check`: would `run` and `restore` work?
//!
//! Looks at everything that `run` needs, in the order in which it needs it, and changes nothing: no slot, no spool, no state, no
//! repository is created. It writes one object below `<cluster>/walden-check/` of each repository, and removes it. Beside a running
//! agent it does not disturb it. What depends on something that failed is left out, so that one fault is one line.

mod agent;
mod folders;
mod hosts;
mod port;
mod report;
mod repository;
mod server;
mod slot;

use futures_util::future::join_all;

use super::error::CliError;
use super::exit;
use super::output::Output;
use crate::config::Settings;
use agent::Agent;
use report::{Check, Report};
use repository::Look;
use server::Server;

/// Clocks further apart make S3 refuse signatures sooner or later, and times in logs mislead.
const SKEW_SECONDS_MAX: f64 = 60.0;
/// From here on it is worth a remark.
const SKEW_SECONDS_NOTED: f64 = 5.0;

pub fn run(settings: &Settings, output: &Output) -> Result<u8, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| CliError::from_error(exit::FAILED, &error, "check the limits of this user"))?;
    let report = runtime.block_on(examine(settings));
    if output.is_json() {
        output.document(&report.to_json())?;
    } else {
        let text = report.to_text(output.is_quiet());
        if !text.is_empty() {
            output.line(&text)?;
        }
    }
    Ok(if report.is_ok() { exit::DONE } else { exit::FAILED })
}

async fn examine(settings: &Settings) -> Report {
    let mut report = Report::default();
    configuration(settings, &mut report);
    let agent = Agent::look(settings).await;
    report.checks.extend(agent.check());
    // At the same time, so that somebody waits for the slowest and not for all of them.
    let begin = settings.repositories.iter().map(|each| Look::begin(settings, each));
    let (server, looks) = tokio::join!(server::examine(settings, &agent, &mut report), join_all(begin));
    let looks = join_all(looks.into_iter().map(|look| look.finish(&agent, server.system))).await;
    let adopted = looks.iter().any(|seen| seen.adopted);
    folders::examine(settings, &agent, server.system, adopted, &mut report);
    let mut skews = Vec::new();
    for seen in looks {
        report.checks.extend(seen.checks);
        skews.extend(seen.skew_seconds.map(|skew| (format!("repository {}", seen.name), skew)));
    }
    report.add(clocks(&server, &skews));
    port::examine(settings, &agent, &mut report).await;
    report
}

fn configuration(settings: &Settings, report: &mut Report) {
    let source = match &settings.file {
        Some(file) if settings.is_from_file_alone() => file.display().to_string(),
        Some(file) => format!("{}, environment and flags", file.display()),
        None => "no file: defaults, environment and flags".into(),
    };
    report.add(Check::good("configuration", format!("{source}; cluster \"{}\"", settings.archive.cluster)));
    for warning in settings.warnings() {
        report.add(Check::remark("configuration", warning, ""));
    }
}

/// This host's clock against the server's and the stores'. Positive: the other one is ahead.
fn clocks(server: &Server, stores: &[(String, f64)]) -> Check {
    const NAME: &str = "clock";
    let mut seen: Vec<(String, f64)> =
        server.skew_seconds.map(|skew| ("the server".to_owned(), skew)).into_iter().collect();
    seen.extend_from_slice(stores);
    let Some(worst) = seen.iter().map(|(_, skew)| skew.abs()).max_by(f64::total_cmp) else {
        return Check::good(NAME, "nobody told another clock to compare with");
    };
    let told: Vec<String> = seen.iter().map(|(who, skew)| format!("{who} {skew:+.1} s")).collect();
    let message = format!("against this host's: {}", told.join(", "));
    let hint = "set the clocks by NTP; S3 refuses requests from 15 minutes on";
    if worst > SKEW_SECONDS_MAX {
        Check::failed(NAME, message, hint)
    } else if worst > SKEW_SECONDS_NOTED {
        Check::remark(NAME, message, hint)
    } else {
        Check::good(NAME, message)
    }
}

#[cfg(test)]
mod tests {
    use super::report::Verdict;
    use super::*;

    #[test]
    fn the_worst_clock_decides() {
        let server = |skew_seconds| Server { system: None, skew_seconds };
        let store = |skew| vec![("repository main".to_owned(), skew)];
        assert_eq!(clocks(&server(None), &[]).verdict, Verdict::Good);
        assert_eq!(clocks(&server(Some(0.4)), &store(-1.0)).verdict, Verdict::Good);
        assert_eq!(clocks(&server(Some(0.4)), &store(-7.0)).verdict, Verdict::Remark);
        let failed = clocks(&server(Some(-90.0)), &store(1.0));
        assert_eq!(failed.verdict, Verdict::Failed);
        assert_eq!(failed.message, "against this host's: the server -90.0 s, repository main +1.0 s");
    }
}
