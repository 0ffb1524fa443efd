//! Until when what is held is complete, and the windows that follow from it.

use super::error::RestoreError;
use crate::repository::{Archive, Catalog, Stretch, Window};
use crate::wal::{PgTime, TimelineHistory};

/// Objects looked at from the end of a stretch for the last checkpoint's time.
const LAST_HEADERS: u64 = 8;

/// Until when every acknowledged commit is known to be held in `stretch`, by the archive's own words:
///
/// - the highest commit time and the last checkpoint's time in its last headers: a checkpoint's time is taken when it begins, so what was
///   committed before lies before its record (`CreateCheckPoint` in `src/backend/access/transam/xlog.c`);
/// - `coverage.json`, if the WAL through the position that it names is really there, on this branch.
pub(super) async fn complete_until(
    archive: &Archive,
    catalog: &Catalog,
    branch: &TimelineHistory,
    stretch: &Stretch,
) -> Result<Option<PgTime>, RestoreError> {
    let mut until = None;
    let count = stretch.object_count();
    for index in (count.saturating_sub(LAST_HEADERS)..count).rev() {
        let Some(object) = stretch.object(index) else { break };
        // What lies behind a switch is another history's.
        if object.valid_until < object.end() {
            continue;
        }
        let header = archive.header(&object).await?;
        until = until.max(header.summary.max_time).max(header.summary.checkpoint.map(|checkpoint| checkpoint.time));
        if header.summary.checkpoint.is_some() {
            break;
        }
    }
    Ok(until.max(covered_until(catalog, branch, stretch)))
}

/// What `coverage.json` says, as far as it can be believed.
fn covered_until(catalog: &Catalog, branch: &TimelineHistory, stretch: &Stretch) -> Option<PgTime> {
    let coverage = catalog.coverage.as_ref()?;
    let (begin, end) = branch.range_of(coverage.timeline)?;
    let on_branch = begin <= coverage.archived_lsn && end.is_none_or(|end| coverage.archived_lsn <= end);
    let held = stretch.start() <= coverage.archived_lsn && coverage.archived_lsn <= stretch.end();
    (on_branch && held).then_some(coverage.complete_until)
}

/// The windows with their times, for lists and refusals. A header that cannot be read leaves its time open.
pub async fn windows(archive: &Archive, catalog: &Catalog) -> Result<Vec<Window>, RestoreError> {
    let mut windows = catalog.windows();
    for window in &mut windows {
        let Some(branch) = catalog.history(window.timeline) else { continue };
        let stretches = catalog.stretches(&branch);
        let Some(stretch) = stretches.iter().find(|stretch| stretch.end() == window.to_lsn) else { continue };
        match complete_until(archive, catalog, &branch, stretch).await {
            Ok(until) => window.to_time = until,
            Err(error) => tracing::warn!(%error, "the end of a window cannot be placed in time"),
        }
        // A backup that nothing was written after: all that is known of its moment is the earlier of the two.
        if let (Some(from), Some(to)) = (window.from_time, window.to_time) {
            window.from_time = Some(from.min(to));
        }
    }
    Ok(windows)
}

#[cfg(test)]
#[path = "windows_tests.rs"]
mod tests;
