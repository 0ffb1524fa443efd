use super::agent::Agent;
use super::report::{Check, Report};
use crate::config::Settings;

/// The address for HTTP: free, or the agent's own.
pub async fn examine(settings: &Settings, agent: &Agent, report: &mut Report) {
    const NAME: &str = "metrics";
    let Some(listen) = &settings.metrics.listen else {
        let hint = "set metrics.listen to have `walden status`, /metrics and /readyz";
        return report.add(Check::remark(NAME, "metrics.listen is \"\": no HTTP", hint));
    };
    let hint = "stop what uses the port, or set metrics.listen to another address; \"\" switches HTTP off";
    report.add(match tokio::net::TcpListener::bind(listen).await {
        Ok(_) if agent.is_running => Check::failed(
            NAME,
            format!("an agent runs on this spool, and it does not serve HTTP at {listen}"),
            "restart it if metrics.listen was changed; it goes on without HTTP when the port was taken at its start",
        ),
        Ok(_) => Check::good(NAME, format!("{listen} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => match (&agent.status, agent.is_running) {
            (Some(_), true) => Check::good(NAME, format!("the running agent serves {listen}")),
            (Some(_), false) => Check::failed(NAME, format!("another Walden agent serves {listen}"), hint),
            (None, _) => Check::failed(NAME, format!("another program listens at {listen}"), hint),
        },
        Err(error) => Check::failed(NAME, format!("cannot serve HTTP at {listen}: {error}"), hint),
    });
}
