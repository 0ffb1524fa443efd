use super::agent::Agent;
use super::report::Check;
use crate::cli::output::size;
use crate::config::Settings;
use crate::postgres::{PostgresError, ReplicationPlaces, SlotInfo, SlotState};
use crate::wal::SystemIdentifier;

const NAME: &str = "slot";

/// What was found of the slot. The replication connection tells its kind and position from PostgreSQL 15 on, SQL the rest.
pub struct Seen<'a> {
    pub state: Option<SlotState>,
    /// `None`: SQL is not possible. `Some(None)`: there is no such slot.
    pub info: Option<Option<SlotInfo>>,
    pub places: Option<ReplicationPlaces>,
    pub agent: &'a Agent,
    pub system: Option<SystemIdentifier>,
}

/// Would the agent stream from it? Nothing is created.
pub fn judge(settings: &Settings, seen: &Seen<'_>) -> Check {
    let slot = &settings.postgres.slot;
    let is_physical = match (&seen.info, seen.state) {
        (Some(None), _) | (None, Some(SlotState::Missing)) => return missing(settings, seen),
        (Some(Some(info)), _) => info.physical,
        (None, Some(SlotState::NotPhysical)) => false,
        (None, Some(SlotState::Exists { .. })) => true,
        (None, Some(SlotState::Unknown) | None) => {
            let message = format!("before PostgreSQL 15 only SQL can tell whether \"{slot}\" is there");
            return Check::remark(NAME, message, "let the role open ordinary connections to know it");
        }
    };
    if !is_physical {
        let error = PostgresError::SlotNotPhysical { slot: slot.clone() };
        return Check::error(NAME, &error, error.hint());
    }
    match seen.info.as_ref().and_then(Option::as_ref) {
        Some(info) => known(settings, seen, info),
        None => {
            let message = match seen.state {
                Some(SlotState::Exists { restart_lsn: Some(from), .. }) => format!("\"{slot}\" holds WAL from {from}"),
                _ => format!("\"{slot}\" holds no WAL: it was never used, or the server invalidated it"),
            };
            Check::good(NAME, format!("{message}; without SQL it is not known whether another receiver uses it"))
        }
    }
}

fn missing(settings: &Settings, seen: &Seen<'_>) -> Check {
    let slot = &settings.postgres.slot;
    if !settings.postgres.create_slot {
        let hint = format!(
            "on the server: SELECT pg_create_physical_replication_slot('{slot}', true); or set postgres.create_slot = true"
        );
        return Check::failed(NAME, format!("there is no slot \"{slot}\", and postgres.create_slot is false"), hint);
    }
    match seen.places {
        Some(places) if places.slots >= places.slots_max => {
            let message = format!(
                "there is no slot \"{slot}\" yet, and all {} of max_replication_slots are taken",
                places.slots_max
            );
            Check::failed(
                NAME,
                message,
                "raise max_replication_slots and restart the server, or drop slots that nobody uses",
            )
        }
        _ => Check::good(NAME, format!("\"{slot}\" is not there yet; run will create it")),
    }
}

/// A physical slot of which SQL tells everything.
fn known(settings: &Settings, seen: &Seen<'_>, info: &SlotInfo) -> Check {
    let slot = &settings.postgres.slot;
    if info.wal_status.as_deref() == Some("lost") {
        let message = format!("\"{slot}\" was invalidated by the server: WAL that it held is gone");
        let hint =
            "run makes a new one and records the gap; take a base backup then, and look at max_slot_wal_keep_size";
        return Check::failed(NAME, message, hint);
    }
    let retained = info.retained_bytes.unwrap_or(0);
    let holds = match info.restart_lsn {
        Some(from) => format!("\"{slot}\" holds {} of WAL, from {from}", size(retained)),
        None => format!("\"{slot}\" holds no WAL yet"),
    };
    if info.active {
        return in_use(settings, seen, info, &holds);
    }
    if info.wal_status.as_deref() == Some("unreserved") {
        let hint = "start `walden run` at once; afterwards raise max_slot_wal_keep_size";
        return Check::remark(NAME, format!("{holds}, which the server may remove at its next checkpoint"), hint);
    }
    match settings.alert.slot_retained_bytes {
        Some(bound) if retained > bound => {
            let message = format!("{holds}, more than alert.slot_retained_bytes = {}", size(bound));
            Check::remark(NAME, message, "start `walden run`, and watch the server's disk until it has caught up")
        }
        _ => Check::good(NAME, holds),
    }
}

/// Some process uses it: our own agent, or somebody else.
fn in_use(settings: &Settings, seen: &Seen<'_>, info: &SlotInfo, holds: &str) -> Check {
    let name = info.active_name.as_ref().map_or(String::new(), |name| format!(", application_name \"{name}\""));
    let pid = info.active_pid.map_or("unknown".into(), |pid| pid.to_string());
    let who = format!("process {pid} of the server{name}");
    let agent = seen.agent;
    if agent.answers_as_ours(&settings.postgres.slot, seen.system) {
        if agent.is_connected() {
            return Check::good(NAME, format!("{holds}; the running agent streams from it"));
        }
    } else if agent.is_running && agent.status.is_none() {
        let message = format!("{holds}; it is in use by {who}, perhaps the agent that runs here");
        return Check::remark(NAME, message, "set metrics.listen, so that the agent can be asked");
    }
    let message = format!("\"{}\" is in use by another receiver: {who}", settings.postgres.slot);
    Check::failed(NAME, message, "stop that receiver, or set postgres.slot to a name of its own")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::report::Verdict;
    use super::*;
    use crate::config::{QuickSettings, Sources};
    use crate::wal::Lsn;

    fn settings(create_slot: bool) -> Settings {
        let sources = Sources {
            config: None,
            quick: QuickSettings::default(),
            environment: vec![("WALDEN_POSTGRES__CREATE_SLOT".into(), create_slot.to_string().into())],
            working_directory: "/somewhere".into(),
        };
        Settings::load(&sources).unwrap_or_else(|error| panic!("{error}"))
    }

    fn info() -> SlotInfo {
        SlotInfo {
            restart_lsn: Some(Lsn::new(0x100_0000)),
            wal_status: Some("reserved".into()),
            active: false,
            active_pid: None,
            active_name: None,
            retained_bytes: Some(1 << 20),
            physical: true,
        }
    }

    fn judged(create_slot: bool, state: Option<SlotState>, info: Option<Option<SlotInfo>>, agent: &Agent) -> Check {
        judge(&settings(create_slot), &Seen { state, info, places: None, agent, system: None })
    }

    fn by_sql(info: SlotInfo) -> Check {
        judged(true, None, Some(Some(info)), &Agent::default())
    }

    #[test]
    fn a_missing_slot_is_fine_if_it_may_be_created() {
        let nobody = Agent::default();
        for state in [Some(SlotState::Missing), None] {
            let info = if state.is_none() { Some(None) } else { None };
            assert_eq!(judged(true, state, info.clone(), &nobody).verdict, Verdict::Good);
            let failed = judged(false, state, info, &nobody);
            assert_eq!(failed.verdict, Verdict::Failed);
            assert!(failed.hint.contains("pg_create_physical_replication_slot('walden', true)"), "{failed:?}");
        }
        let places = Some(ReplicationPlaces { senders: 0, senders_max: 4, slots: 2, slots_max: 2 });
        let seen = Seen { state: None, info: Some(None), places, agent: &nobody, system: None };
        assert_eq!(judge(&settings(true), &seen).verdict, Verdict::Failed);
    }

    #[test]
    fn kinds_and_states_of_slots() {
        assert_eq!(by_sql(info()).verdict, Verdict::Good);
        assert_eq!(by_sql(SlotInfo { physical: false, ..info() }).verdict, Verdict::Failed);
        assert_eq!(judged(true, Some(SlotState::NotPhysical), None, &Agent::default()).verdict, Verdict::Failed);
        assert_eq!(judged(true, Some(SlotState::Unknown), None, &Agent::default()).verdict, Verdict::Remark);
        let lost = SlotInfo { wal_status: Some("lost".into()), restart_lsn: None, ..info() };
        assert_eq!(by_sql(lost).verdict, Verdict::Failed);
        assert_eq!(by_sql(SlotInfo { wal_status: Some("unreserved".into()), ..info() }).verdict, Verdict::Remark);
        let behind = by_sql(SlotInfo { retained_bytes: Some(17 << 30), ..info() });
        assert_eq!(behind.verdict, Verdict::Remark);
        assert!(behind.message.contains("17.0 GiB") && behind.message.contains("16.0 GiB"), "{behind:?}");
    }

    #[test]
    fn a_slot_in_use_is_fine_only_for_our_own_agent() {
        let used =
            || SlotInfo { active: true, active_pid: Some(7), active_name: Some("pg_receivewal".into()), ..info() };
        let failed = by_sql(used());
        assert_eq!(failed.verdict, Verdict::Failed);
        assert!(failed.message.contains("process 7") && failed.message.contains("pg_receivewal"), "{failed:?}");
        let status = json!({ "slot": { "name": "walden" }, "system_identifier": null, "causes": [] });
        let ours = Agent { is_running: true, id: None, status: Some(status) };
        assert_eq!(judged(true, None, Some(Some(used())), &ours).verdict, Verdict::Good);
        let waiting = json!({ "slot": { "name": "walden" }, "causes": [{ "code": "not_connected" }] });
        let shut_out = Agent { is_running: true, id: None, status: Some(waiting) };
        assert_eq!(judged(true, None, Some(Some(used())), &shut_out).verdict, Verdict::Failed);
        let silent = Agent { is_running: true, ..Agent::default() };
        assert_eq!(judged(true, None, Some(Some(used())), &silent).verdict, Verdict::Remark);
    }
}
