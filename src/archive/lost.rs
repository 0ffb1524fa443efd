//! Segments that were lost from the spool on a timeline that was left since: no session of theirs begins any more, so what no repository
//! has of them is told as a gap (I3).

use std::time::Duration;

use super::ArchiveError;
use super::live::Live;
use crate::repository::{Archive, Gap, RepositoryError};
use crate::seal::Compression;
use crate::wal::{SegmentName, TimelineId};

/// How long a store may take to say what it holds.
const ASK_LIMIT: Duration = Duration::from_secs(15);

impl Live {
    /// Settles what is missing of timelines before this one. What a store does not tell now is asked at the next connection.
    pub(super) async fn settle_left(&self, timeline: TimelineId) -> Result<(), ArchiveError> {
        for segment in self.missing.before(timeline) {
            let mut held_in = Vec::new();
            for (archive, _) in &self.archives {
                let asked = archive.clone();
                let asked = self.stores.spawn(async move { is_settled_in(&asked, segment).await });
                match tokio::time::timeout(ASK_LIMIT, asked).await {
                    Ok(Ok(Ok(true))) => held_in.push(archive.repository().name().to_owned()),
                    Ok(Ok(Ok(false))) => {}
                    _ => return Ok(()),
                }
            }
            if held_in.len() < self.archives.len() {
                let reason = "it was lost from the spool after its timeline was left";
                self.record_gap(segment.timeline(), segment.start(), segment.end(), reason, held_in)?;
            }
            self.missing.remove(segment);
        }
        Ok(())
    }
}

/// Whether the repository has the segment, or tells it as a gap.
async fn is_settled_in(archive: &Archive, segment: SegmentName) -> Result<bool, RepositoryError> {
    for compression in [Compression::Lz4, Compression::Zstd] {
        if archive.head(&archive.keys().segment(segment, compression)).await?.is_some() {
            return Ok(true);
        }
    }
    let covers = |gap: &Gap| gap.from_lsn <= segment.start() && segment.end() <= gap.to_lsn;
    let gaps = archive.gaps(segment.size()).await?;
    Ok(gaps.iter().any(|gap| gap.timeline == segment.timeline() && covers(gap)))
}
