use std::fs::File;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::report::Check;
use crate::cli::http;
use crate::config::Settings;
use crate::wal::SystemIdentifier;

/// An agent that has an answer gives it at once.
const PATIENCE: Duration = Duration::from_secs(3);

/// The agent that runs on this configuration's spool, if one does.
#[derive(Debug, Default)]
pub struct Agent {
    /// Some process holds the spool's lock.
    pub is_running: bool,
    /// The id in the spool, once an agent has run here.
    pub id: Option<String>,
    /// What answered at `metrics.listen`, if it is a Walden agent.
    pub status: Option<Value>,
}

impl Agent {
    pub async fn look(settings: &Settings) -> Self {
        let root = &settings.spool.path;
        let id = std::fs::read_to_string(root.join("agent-id")).ok().map(|id| id.trim().to_owned());
        let mut agent = Self { is_running: is_locked(root), id, status: None };
        if let Some(listen) = &settings.metrics.listen
            && let Ok(body) = http::get(listen, "/status", PATIENCE).await
        {
            let document: Option<Value> = serde_json::from_str(&body).ok();
            agent.status = document.filter(|document| document["healthy"].is_boolean());
        }
        agent
    }

    /// Whether the agent that answers at `metrics.listen` is the one on this spool, as far as it can be told: it uses this slot, and it
    /// archives this system, where either is known.
    pub fn answers_as_ours(&self, slot: &str, system: Option<SystemIdentifier>) -> bool {
        let Some(status) = self.status.as_ref().filter(|_| self.is_running) else { return false };
        let same_system = match (status["system_identifier"].as_str(), system) {
            (Some(told), Some(system)) => told == system.to_string(),
            _ => true,
        };
        same_system && status["slot"]["name"].as_str() == Some(slot)
    }

    /// Whether it says that it streams.
    pub fn is_connected(&self) -> bool {
        !self.causes().contains(&"not_connected") && self.status.is_some()
    }

    /// The codes of the causes that it tells.
    pub fn causes(&self) -> Vec<&str> {
        let causes = self.status.as_ref().and_then(|status| status["causes"].as_array());
        causes.into_iter().flatten().filter_map(|cause| cause["code"].as_str()).collect()
    }

    /// How it is, if it runs: what is checked here is not its health, but whoever looks here wants to know.
    pub fn check(&self) -> Option<Check> {
        const NAME: &str = "agent";
        if !self.is_running {
            return None;
        }
        let Some(status) = &self.status else { return Some(Check::good(NAME, "an agent runs on this spool")) };
        if status["healthy"] == true {
            return Some(Check::good(NAME, "an agent runs on this spool, and it is healthy"));
        }
        let causes = self.causes().join(", ");
        let message = format!("an agent runs on this spool, and it is not healthy: {causes}");
        Some(Check::remark(NAME, message, "`walden status` tells more"))
    }
}

/// Whether a process holds the spool. A shared lock that is given back at once: an agent that starts in the same moment waits longer.
fn is_locked(root: &Path) -> bool {
    use rustix::fs::FlockOperation;
    let Ok(file) = File::open(root.join("lock")) else { return false };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            drop(file); // gives the lock back
            false
        }
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn agent(is_running: bool, status: Value) -> Agent {
        Agent { is_running, id: None, status: Some(status) }
    }

    #[test]
    fn an_agent_is_ours_by_its_slot_and_system() {
        let system: Option<SystemIdentifier> = "7000000000000000001".parse().ok();
        let status = |slot: &str, system: Value| json!({ "slot": { "name": slot }, "system_identifier": system });
        assert!(agent(true, status("walden", json!("7000000000000000001"))).answers_as_ours("walden", system));
        assert!(agent(true, status("walden", Value::Null)).answers_as_ours("walden", system));
        assert!(!agent(true, status("walden", json!("8"))).answers_as_ours("walden", system));
        assert!(!agent(true, status("other", Value::Null)).answers_as_ours("walden", system));
        assert!(!agent(false, status("walden", Value::Null)).answers_as_ours("walden", system), "nobody has the spool");
        assert!(!Agent { is_running: true, ..Agent::default() }.answers_as_ours("walden", system));
    }

    #[test]
    fn a_lock_is_seen_and_not_kept() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert!(!is_locked(dir.path()));
        assert!(!dir.path().join("lock").exists(), "looking creates nothing");
        let held = File::create(dir.path().join("lock")).expect("a lock file");
        rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).expect("the lock");
        assert!(is_locked(dir.path()));
        drop(held);
        assert!(!is_locked(dir.path()));
    }
}
