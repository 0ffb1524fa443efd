//! The other hosts of the list: can a slot be kept there, and has one been left behind?

use futures_util::future::join_all;

use super::report::Check;
use crate::config::Settings;
use crate::postgres::{ConnectSettings, PostgresError, ReplicationConnection, SlotState, Sql, SystemInfo};

/// One line for each host but the one numbered `connected`, which is the server that `info` is of. Nothing is created.
pub async fn examine(
    settings: &Settings,
    connect: &ConnectSettings,
    connected: usize,
    info: &SystemInfo,
) -> Vec<Check> {
    let targets = connect.targets();
    let others = targets.iter().enumerate().filter(|(host, _)| *host != connected);
    // At the same time, so that somebody waits for the slowest and not for all of them.
    let looked = join_all(others.map(|(host, target)| async move { (target, look(settings, connect, host).await) }));
    let postgres = &settings.postgres;
    let judged = looked.await.into_iter().map(|(target, looked)| {
        let name = format!("slot.{target}");
        match looked {
            Ok((found, slot)) => judge(name, &postgres.slot, postgres.create_slot, &found, slot, info),
            Err(error) => {
                let message = format!("no slot can be kept there now: {error}");
                Check::remark(name, message, "a failover to this host may leave a gap until it can be reached")
            }
        }
    });
    judged.collect()
}

async fn look(
    settings: &Settings,
    connect: &ConnectSettings,
    host: usize,
) -> Result<(SystemInfo, SlotState), PostgresError> {
    let mut connection = ReplicationConnection::connect_to_any(connect, host).await?;
    let info = connection.identify_system().await?;
    let slot = match connection.read_slot(&settings.postgres.slot).await? {
        SlotState::Unknown => Sql::slot_state(&connect.this_host(host), &settings.postgres.slot).await,
        state => state,
    };
    Ok((info, slot))
}

fn judge(
    name: String,
    slot: &str,
    create_slot: bool,
    found: &SystemInfo,
    state: SlotState,
    streaming: &SystemInfo,
) -> Check {
    if found.system_identifier != streaming.system_identifier {
        let message = format!("this host is another cluster, system {}", found.system_identifier);
        return Check::failed(name, message, "take it out of postgres.url");
    }
    let holds = match state {
        SlotState::NotPhysical => {
            let error = PostgresError::SlotNotPhysical { slot: slot.into() };
            return Check::error(name, &error, error.hint());
        }
        SlotState::Exists { restart_lsn: Some(from), .. } => format!("\"{slot}\" holds WAL from {from}"),
        SlotState::Exists { .. } => {
            let message = format!("\"{slot}\" holds no WAL: it was never used, or the server invalidated it");
            return Check::remark(name, message, "run makes it hold WAL; until then a failover to it may leave a gap");
        }
        SlotState::Unknown => {
            let message = format!(
                "before PostgreSQL 15 only SQL can tell whether \"{slot}\" is there, and from where on it holds WAL"
            );
            return Check::remark(name, message, "let the role open ordinary connections there to know it");
        }
        SlotState::Missing if create_slot => format!("\"{slot}\" is not there yet; run will create it"),
        SlotState::Missing => {
            let hint = format!("there: SELECT pg_create_physical_replication_slot('{slot}', true)");
            return Check::remark(
                name,
                format!("there is no slot \"{slot}\", so a failover to it may leave a gap"),
                hint,
            );
        }
    };
    if found.timeline < streaming.timeline && state != SlotState::Missing {
        let message = format!(
            "left behind on timeline {}, the server is on {}: {holds}, and nobody advances it there",
            found.timeline, streaming.timeline
        );
        let hint = format!(
            "make this host a standby again (pg_rewind), or free its disk there: SELECT pg_drop_replication_slot('{slot}')"
        );
        return Check::remark(name, message, hint);
    }
    Check::good(name, holds)
}

#[cfg(test)]
mod tests {
    use super::super::report::Verdict;
    use super::*;
    use crate::wal::{Lsn, SystemIdentifier, TimelineId};

    #[test]
    fn a_slot_left_behind_by_a_failover_is_named() {
        let info = |system, timeline| SystemInfo {
            system_identifier: SystemIdentifier::new(system),
            timeline: TimelineId::new(timeline).unwrap(),
            flush_lsn: Lsn::new(0x500_0000),
        };
        let at = |restart_lsn| SlotState::Exists { restart_lsn, restart_timeline: None };
        let judged = |found, state| judge("s".into(), "walden", true, &found, state, &info(7, 3));
        let stale = judged(info(7, 2), at(Some(Lsn::new(0x300_0000))));
        assert_eq!(stale.verdict, Verdict::Remark);
        assert!(stale.message.contains("0/3000000") && stale.hint.contains("pg_drop_replication_slot('walden')"));
        assert_eq!(judged(info(7, 3), at(Some(Lsn::new(0x300_0000)))).verdict, Verdict::Good);
        assert_eq!(judged(info(7, 3), SlotState::Missing).verdict, Verdict::Good);
        assert_eq!(judged(info(8, 3), at(None)).verdict, Verdict::Failed);
        // What is not known is not called good, nor is a slot that keeps nothing.
        for state in [SlotState::Unknown, at(None)] {
            assert_eq!(judged(info(7, 3), state).verdict, Verdict::Remark, "{state:?}");
        }
        assert_eq!(judged(info(7, 3), SlotState::NotPhysical).verdict, Verdict::Failed);
    }
}
