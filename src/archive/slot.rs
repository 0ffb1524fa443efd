//! The slot keeps the WAL that is not held yet. One that was invalidated keeps nothing, now or later, and is made anew.

use std::time::Duration;

use super::ArchiveError;
use super::live::{Live, Way};
use crate::postgres::{ReplicationConnection, SlotState, Sql};
use crate::wal::Lsn;

const SQL_LIMIT: Duration = Duration::from_secs(5);
pub(super) const KEPT_NOTHING: &str = "the server had invalidated it, or it was made without reserving any";

impl Live {
    /// The slot comes before anything else, with its WAL reserved, so that nothing can be removed while the rest is found out. Gives
    /// where it stands, and whether it kept nothing and was made anew.
    pub(super) async fn reserve(
        &mut self,
        connection: &mut ReplicationConnection,
    ) -> Result<(Option<Lsn>, bool), ArchiveError> {
        let slot = self.ensure_slot(connection).await?;
        self.slot_at = slot.unwrap_or(Lsn::ZERO);
        if slot.is_none()
            && let SlotState::Exists { restart_lsn, .. } = self.slot_state(connection).await?
        {
            // It was invalidated, or never used. Before 18 the server streams from such a slot without a word, and from 16 on it keeps
            // nothing later on either (`ReplicationSlotsComputeRequiredLSN` in `src/backend/replication/slot.c`).
            if restart_lsn.is_none() && self.settings.create_slot {
                return Ok((self.renew_slot(connection, KEPT_NOTHING).await?, true));
            }
            self.slot_at = restart_lsn.unwrap_or(Lsn::ZERO);
        }
        Ok((slot, false))
    }

    pub(super) fn made_anew(&self, why: &str) -> String {
        format!("slot \"{}\" did not keep the WAL ({why}); it is made anew", self.settings.slot)
    }

    /// Drops a slot that keeps nothing of what is needed, and makes it anew. Gives where the new one holds WAL from, if that is known.
    pub(super) async fn renew_slot(
        &mut self,
        connection: &mut ReplicationConnection,
        why: &str,
    ) -> Result<Option<Lsn>, ArchiveError> {
        let name = self.settings.slot.clone();
        if !self.settings.create_slot {
            // Somebody else makes it anew: the next session looks what it is then.
            self.way = Way::Overlapping;
            return Err(ArchiveError::SlotUseless { name, why: why.into() });
        }
        connection.drop_slot(&name).await?;
        let position = self.slot_position(connection).await?;
        self.slot_at = position.unwrap_or(Lsn::ZERO);
        Ok(position)
    }

    /// Where the slot holds WAL from; made if it is not there. Before 15 only SQL tells it: without, a slot that is good may be made
    /// anew, and the gap be larger than it had to be.
    pub(super) async fn slot_position(
        &self,
        connection: &mut ReplicationConnection,
    ) -> Result<Option<Lsn>, ArchiveError> {
        if let Some(position) = self.ensure_slot(connection).await? {
            return Ok(Some(position));
        }
        match self.slot_state(connection).await? {
            SlotState::Exists { restart_lsn, .. } => Ok(restart_lsn),
            _ => Ok(None),
        }
    }

    /// What is known of the slot: by the replication connection, or before 15 by SQL.
    async fn slot_state(&self, connection: &mut ReplicationConnection) -> Result<SlotState, ArchiveError> {
        let state = connection.read_slot(&self.settings.slot).await?;
        if state != SlotState::Unknown {
            return Ok(state);
        }
        let connect = self.settings.connect.this_host(self.host);
        let asked = Sql::slot_state(&connect, &self.settings.slot);
        Ok(tokio::time::timeout(SQL_LIMIT, asked).await.unwrap_or(SlotState::Unknown))
    }
}
