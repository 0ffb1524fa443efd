//! What the server's own error means, by what it was asked.

use super::error::ASKING;
use super::socket::Transport;
use super::{PostgresError, ServerMessage};

/// What was asked when the server answered with an error. SQLSTATE and the command decide, not the text, which may be translated.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asked<'a> {
    /// `database`: for SQL.
    Startup {
        target: &'a str,
        user: &'a str,
        over: Transport,
        database: Option<&'a str>,
    },
    Stream {
        slot: Option<&'a str>,
    },
    ReadSlot {
        slot: &'a str,
    },
    CreateSlot,
    BaseBackup,
    Other(&'static str),
}

impl Asked<'_> {
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Startup { .. } => "the connection",
            Self::Stream { .. } => "START_REPLICATION",
            Self::ReadSlot { .. } => "READ_REPLICATION_SLOT",
            Self::CreateSlot => "CREATE_REPLICATION_SLOT",
            Self::BaseBackup => "BASE_BACKUP",
            Self::Other(what) => what,
        }
    }

    /// Chooses the variant for what the server said.
    ///
    /// Source: `src/backend/utils/errcodes.txt` and the `ereport` calls in `walsender.c`, `slot.c`, `auth.c`, `miscinit.c`, `postinit.c`.
    pub(super) fn classify(self, source: ServerMessage) -> PostgresError {
        use PostgresError as E;
        let source = Box::new(source);
        match source.sqlstate.as_str() {
            // cannot_connect_now, admin_shutdown, crash_shutdown
            "57P01" | "57P02" | "57P03" => return E::NotReady { source },
            // too_many_connections, also for max_wal_senders
            "53300" => return E::TooManyConnections { source },
            _ => {}
        }
        let state = source.sqlstate.clone();
        match (self, state.as_str()) {
            // invalid_password
            (Self::Startup { target, user, .. }, "28P01") => {
                E::PasswordRefused { target: target.into(), user: user.into(), source }
            }
            // invalid_authorization_specification
            (Self::Startup { target, user, over, .. }, "28000") => {
                let (target, user) = (target.to_owned(), user.to_owned());
                match source.routine.as_deref() {
                    Some("InitializeSessionUserId") => E::NoRole { target, user, source },
                    // No line, a reject line, or peer, ident or cert whose mapping does not fit.
                    _ => E::NoHbaLine { target, user, over, source },
                }
            }
            // invalid_catalog_name, insufficient_privilege: CONNECT is lacking
            (Self::Startup { target, user, database: Some(database), .. }, "3D000" | "42501") => {
                E::NoDatabase { target: target.into(), user: user.into(), database: database.into(), source }
            }
            // insufficient_privilege
            (Self::Startup { .. }, "42501") => E::Privilege { what: "open a replication connection", source },
            (Self::Stream { .. }, "42501") => E::Privilege { what: "stream WAL", source },
            (Self::CreateSlot | Self::ReadSlot { .. }, "42501") => {
                E::Privilege { what: "use replication slots", source }
            }
            (Self::BaseBackup, "42501") => E::Privilege { what: "take a base backup", source },
            (Self::Other(_), "42501") => E::Privilege { what: ASKING, source },
            // undefined_object
            (Self::Stream { slot: Some(slot) } | Self::ReadSlot { slot }, "42704") => {
                E::SlotMissing { slot: slot.into(), source }
            }
            // object_in_use
            (Self::Stream { slot: Some(slot) }, "55006") => E::SlotInUse { slot: slot.into(), source },
            // undefined_file: the segment is gone
            (Self::Stream { .. }, "58P01") => E::WalRemoved { source },
            // object_not_in_prerequisite_state
            (Self::Stream { slot: Some(slot) }, "55000") if source.routine.as_deref() == Some("StartReplication") => {
                E::SlotNotPhysical { slot: slot.into() }
            }
            (Self::Stream { slot: Some(slot) }, "55000") => E::SlotInvalidated { slot: slot.into(), source },
            (Self::ReadSlot { slot }, "55000" | "0A000") => E::SlotNotPhysical { slot: slot.into() },
            (Self::CreateSlot, "55000") => E::WalLevel { source },
            // A standby that was promoted, or has replayed WAL of a primary without full_page_writes. That wal_level is too low cannot be
            // said here: the server takes no replication connection then.
            (Self::BaseBackup, "55000") => E::BackupVoid { source },
            // configuration_limit_exceeded
            (Self::CreateSlot, "53400") => E::TooManySlots { source },
            // "requested starting point … is ahead of the WAL flush position", "requested timeline … is not in this server's history":
            // they have no SQLSTATE of their own.
            (Self::Stream { .. }, "XX000")
                if matches!(source.routine.as_deref(), Some("StartReplication" | "tliSwitchPoint")) =>
            {
                E::NotInHistory { source }
            }
            // data_corrupted: PostgreSQL's own page checksums
            (Self::BaseBackup, "XX001") => E::PagesDamaged { source },
            _ => E::Refused { what: self.what(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::NextStep;

    fn said(sqlstate: &str, routine: &str) -> ServerMessage {
        ServerMessage { sqlstate: sqlstate.into(), routine: Some(routine.into()), ..ServerMessage::default() }
    }

    #[test]
    fn the_state_and_the_command_choose_the_error_not_the_text() {
        let startup = Asked::Startup { target: "h:1", user: "u", over: Transport::Tls, database: None };
        assert!(matches!(startup.classify(said("28P01", "auth_failed")), PostgresError::PasswordRefused { .. }));
        assert!(matches!(startup.classify(said("28000", "ClientAuthentication")), PostgresError::NoHbaLine { .. }));
        assert!(matches!(startup.classify(said("28000", "InitializeSessionUserId")), PostgresError::NoRole { .. }));
        assert!(matches!(startup.classify(said("42501", "InitPostgres")), PostgresError::Privilege { .. }));
        // It was told as a role without REPLICATION.
        let sql = Asked::Startup { target: "h:1", user: "u", over: Transport::Tls, database: Some("d") };
        for state in ["42501", "3D000"] {
            let error = sql.classify(said(state, "InitPostgres"));
            assert!(matches!(error, PostgresError::NoDatabase { .. }) && error.hint().contains("GRANT CONNECT"));
            assert_eq!(error.sqlstate(), Some(state));
        }
        assert!(matches!(startup.classify(said("53300", "InitWalSender")), PostgresError::TooManyConnections { .. }));
        assert!(matches!(startup.classify(said("57P03", "x")), PostgresError::NotReady { .. }));
        let stream = Asked::Stream { slot: Some("s") };
        assert!(stream.classify(said("58P01", "WalSndSegmentOpen")).is_wal_removed());
        assert!(stream.classify(said("55006", "ReplicationSlotAcquire")).is_slot_in_use());
        assert!(stream.classify(said("42704", "ReplicationSlotAcquire")).is_slot_missing());
        assert!(stream.classify(said("55000", "ReplicationSlotAcquire")).is_slot_lost());
        assert!(matches!(stream.classify(said("55000", "StartReplication")), PostgresError::SlotNotPhysical { .. }));
        assert!(matches!(Asked::CreateSlot.classify(said("55000", "x")), PostgresError::WalLevel { .. }));
        // A promotion between two commands, which halted the agent for good.
        let promoted = stream.classify(said("XX000", "StartReplication"));
        assert!(matches!(promoted, PostgresError::NotInHistory { .. }) && promoted.next_step() == NextStep::Retry);
        // It was called a wal_level that is too low, to be cured by a restart of the server.
        let void = Asked::BaseBackup.classify(said("55000", "do_pg_backup_stop"));
        assert!(matches!(void, PostgresError::BackupVoid { .. }) && !void.hint().contains("wal_level"));
    }
}
