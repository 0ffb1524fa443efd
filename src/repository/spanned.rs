//! Whether the WAL between two positions is archived, where timelines may change between them.

use super::{Archive, RepositoryError};
use crate::wal::{Lsn, SegmentSize, TimelineHistory, TimelineId};

impl Archive {
    /// Whether all WAL from `start` up to `stop` is archived on `timeline` and on those of its ancestors that lie in between: a standby that
    /// follows its primary's promotion ends a base backup on another timeline than it began it on.
    ///
    /// Without the timeline's `.history`, which is archived before its WAL, nothing is taken from ancestors.
    pub async fn holds_wal(
        &self,
        timeline: TimelineId,
        start: Lsn,
        stop: Lsn,
        size: SegmentSize,
    ) -> Result<bool, RepositoryError> {
        let mut branch = TimelineHistory::without_ancestors(timeline);
        if timeline != TimelineId::FIRST
            && let Some(bytes) = self.history(timeline).await?
        {
            let read = TimelineHistory::parse(timeline, &bytes);
            branch = read.map_err(|source| RepositoryError::History { url: self.url(), timeline, source })?;
        }
        let timelines = branch.ancestors().iter().map(|ancestor| ancestor.timeline).chain([timeline]);
        for timeline in timelines {
            let Some((begin, end)) = branch.range_of(timeline) else { continue };
            let (from, to) = (begin.max(start), end.unwrap_or(stop).min(stop));
            if from < to && self.archived_from(timeline, from, size).await?.end < to {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::test_support::{seal, writer};
    use crate::seal::Compression;
    use crate::wal::SegmentName;

    const MIB: u64 = 1 << 20;

    /// Begun on timeline 1 and ended on timeline 2, a backup waited for WAL of timeline 2 from its start on, which never comes, and was
    /// thrown away after `backup.wal_timeout`.
    #[tokio::test]
    async fn a_span_over_a_switch_needs_each_timeline_up_to_its_switch() {
        let folder = tempfile::tempdir().unwrap();
        let writer = writer(folder.path()).await;
        let archive = writer.archive();
        let size = SegmentSize::new(1 << 20).unwrap();
        let (one, two) = (TimelineId::FIRST, TimelineId::new(2).unwrap());
        let name = |timeline, number: u64| SegmentName::holding(timeline, Lsn::new(number * MIB), size);
        let whole = vec![7; 1 << 20];
        let put = async |segment, length: usize| {
            let sealed = seal(segment, 0, &whole[..length], Compression::Lz4);
            match length == whole.len() {
                true => writer.put_segment(segment, &sealed).await.map(|_| ()).unwrap(),
                false => {
                    let end = u32::try_from(length).unwrap();
                    writer.put_piece(segment, 0, end, &sealed).await.map(|_| ()).unwrap();
                }
            }
        };
        let (start, switch, stop) = (Lsn::new(3 * MIB + 40), Lsn::new(5 * MIB + 0x2000), Lsn::new(6 * MIB + 0x100));
        let holds = async |stop| archive.holds_wal(two, start, stop, size).await.unwrap();

        put(name(one, 3), 1 << 20).await;
        put(name(one, 4), 1 << 20).await;
        put(name(two, 5), 1 << 20).await;
        put(name(two, 6), 0x1000).await;
        assert!(!holds(stop).await, "no history yet");
        writer.put_history(two, format!("1\t{switch}\tno recovery target specified\n").as_bytes()).await.unwrap();
        assert!(!holds(stop).await, "timeline 1 lacks its last bytes before the switch");
        put(name(one, 5), 0x2000).await;
        assert!(holds(stop).await);
        assert!(holds(Lsn::new(6 * MIB + 0x1000)).await && !holds(Lsn::new(6 * MIB + 0x1001)).await);
        // Within one timeline nothing else counts.
        assert!(archive.holds_wal(one, start, switch, size).await.unwrap());
        assert!(!archive.holds_wal(one, start, stop, size).await.unwrap());
        assert!(archive.holds_wal(two, Lsn::new(5 * MIB + 0x3000), stop, size).await.unwrap());
        assert!(!archive.holds_wal(two, Lsn::new(2 * MIB), stop, size).await.unwrap());
    }
}
