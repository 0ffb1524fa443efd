//! The recorded gaps: WAL that is known to be lost (I3).

use futures_util::{StreamExt, TryStreamExt, stream};

use super::objects::SMALL_OBJECT_BYTES_MAX;
use super::read::REQUESTS;
use super::{Archive, FORMAT, Gap, ParsedKey, RepositoryError};
use crate::wal::{Lsn, PgTime, SegmentSize, TimelineId};

impl Archive {
    /// The recorded gaps, whether or not their WAL was found later.
    pub async fn gaps(&self, size: SegmentSize) -> Result<Vec<Gap>, RepositoryError> {
        Ok(self.read_gaps(size).await?.into_iter().map(|(gap, _)| gap).collect())
    }

    /// The gaps, each with why its record cannot be read, if that is so. Its name tells the gap then: a damaged record hides neither the
    /// gap nor all the rest (I3).
    pub(super) async fn read_gaps(
        &self,
        size: SegmentSize,
    ) -> Result<Vec<(Gap, Option<RepositoryError>)>, RepositoryError> {
        let listed = self.list(&self.keys().gaps_prefix(), None).await?;
        let gaps = listed.into_iter().filter_map(|object| match ParsedKey::parse(self.keys(), &object.key, size) {
            ParsedKey::Gap { timeline, from, to } => Some((timeline, from, to)),
            _ => None,
        });
        let read = |(timeline, from, to)| self.gap_or_its_name(timeline, from, to);
        stream::iter(gaps).map(read).buffered(REQUESTS).try_collect().await
    }

    async fn gap_or_its_name(
        &self,
        timeline: TimelineId,
        from_lsn: Lsn,
        to_lsn: Lsn,
    ) -> Result<(Gap, Option<RepositoryError>), RepositoryError> {
        match self.gap(self.keys().gap(timeline, from_lsn, to_lsn)).await {
            Ok(gap) => Ok((gap, None)),
            Err(error) if error.is_damaged() || matches!(error, RepositoryError::NewerFormat { .. }) => {
                let (since, reason) = (PgTime::from_unix_seconds(0), "its record cannot be read".into());
                let (format, system_identifier) = (FORMAT, self.system());
                let gap = Gap { format, system_identifier, timeline, from_lsn, to_lsn, since, reason };
                Ok((gap, Some(error)))
            }
            Err(error) => Err(error),
        }
    }

    async fn gap(&self, key: String) -> Result<Gap, RepositoryError> {
        let bytes = self.get(&key, SMALL_OBJECT_BYTES_MAX).await?;
        let gap = Gap::parse(&bytes).map_err(|problem| problem.at(&self.url(), &key))?;
        self.check_system(&key, gap.system_identifier)?;
        if self.keys().gap(gap.timeline, gap.from_lsn, gap.to_lsn) != key {
            let found = format!("a gap from {} to {} on timeline {}", gap.from_lsn, gap.to_lsn, gap.timeline);
            return Err(RepositoryError::Identity {
                url: self.url(),
                key,
                found,
                expected: "what its name says".into(),
            });
        }
        Ok(gap)
    }
}
