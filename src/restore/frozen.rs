//! What a plan holds fast of the archive: the backup's parts, the tail as it is now, the histories.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{StreamExt, TryStreamExt, stream};

use super::error::RestoreError;
use super::plan::NeededTail;
use super::plan_file::{PlannedHistory, PlannedPiece, PlannedTail};
use crate::repository::{Archive, BackupJson, WalObject, WalObjectKind};
use crate::seal::{ObjectHeader, combine_crc32};
use crate::wal::{TimelineHistory, TimelineId};

/// Requests at the same time.
const REQUESTS: usize = 8;

/// Every part of the backup is there with its length, and its checksum where the store tells one.
pub(super) async fn check_parts(archive: &Archive, backup: &BackupJson) -> Result<(), RestoreError> {
    let prefix = archive.keys().backup_prefix(&backup.id);
    let listed = archive.list(&prefix, None).await?;
    let listed: BTreeMap<&str, _> = listed.iter().map(|object| (object.key.as_str(), object)).collect();
    for part in backup.volumes.iter().chain(&backup.manifest) {
        let key = archive.keys().backup_object(&backup.id, &part.key);
        let why = match listed.get(key.as_str()) {
            None => format!("{} is missing", part.key),
            Some(object) if object.size != part.stored_bytes => {
                format!("{} has {} bytes instead of {}", part.key, object.size, part.stored_bytes)
            }
            Some(_) => continue,
        };
        return Err(RestoreError::DamagedBackup { backup: backup.id.to_string(), why });
    }
    Ok(())
}

/// Every WAL object of `needed` has the length that its header tells. One that was cut short would be found only when PostgreSQL asks for
/// it, with everything else already written. `needed` is in WAL order.
pub(super) async fn check_sizes(archive: &Archive, needed: &[(WalObject, u64)]) -> Result<(), RestoreError> {
    let keys = archive.keys();
    let mut expected: BTreeMap<String, u64> = needed.iter().map(|(object, size)| (object.key(keys), *size)).collect();
    let timelines: BTreeSet<TimelineId> = needed.iter().map(|(object, _)| object.segment.timeline()).collect();
    for timeline in timelines {
        let of = |piece: bool| {
            needed.iter().map(|(object, _)| object).find(|object| {
                object.segment.timeline() == timeline && matches!(object.kind, WalObjectKind::Piece { .. }) == piece
            })
        };
        let prefixes = [(of(false), keys.timeline_prefix(timeline)), (of(true), keys.tail_timeline_prefix(timeline))];
        for (first, prefix) in prefixes.into_iter().filter_map(|(first, prefix)| Some((first?, prefix))) {
            // The segment's name alone sorts before all that is stored of it.
            for object in archive.list(&prefix, Some(&format!("{prefix}{}", first.segment))).await? {
                if let Some(size) = expected.remove(&object.key).filter(|size| *size != object.size) {
                    let (key, url, found) = (object.key, archive.url(), object.size);
                    return Err(RestoreError::DamagedWal {
                        why: format!("{key} in {url} has {found} bytes instead of {size}"),
                    });
                }
            }
        }
    }
    match expected.pop_first() {
        Some((key, _)) => Err(RestoreError::Changed { what: format!("{key} is gone") }),
        None => Ok(()),
    }
}

/// Reads the headers of a tail's pieces, proves that they follow each other, and writes down what they are now.
pub(super) async fn freeze(archive: &Archive, tail: &NeededTail) -> Result<PlannedTail, RestoreError> {
    let objects: Vec<WalObject> = tail
        .pieces
        .iter()
        .map(|piece| WalObject {
            segment: piece.segment,
            kind: WalObjectKind::Piece { start: piece.start, end: piece.end },
            compression: piece.compression,
            valid_until: piece.end_lsn(),
        })
        .collect();
    archive.check_overlaps(tail.segment).await?;
    let headers: Vec<ObjectHeader> =
        stream::iter(&objects).map(|object| archive.header(object)).buffered(REQUESTS).try_collect().await?;
    let mut end = 0;
    let mut raw_crc32 = 0;
    let mut pieces = Vec::new();
    for (piece, header) in tail.pieces.iter().zip(&headers) {
        // Only pieces that meet exactly can be joined by their checksums; those that overlap were compared byte by byte.
        if u64::from(piece.start) == end {
            if header.prefix_crc32 != raw_crc32 {
                let why = format!(
                    "the piece at {} of {} was written behind other bytes than the ones that are stored before it",
                    piece.start_lsn(),
                    piece.segment
                );
                return Err(RestoreError::DamagedWal { why });
            }
            raw_crc32 = combine_crc32(raw_crc32, header.raw_crc32, header.raw_size);
        } else {
            raw_crc32 = archive.prefix_crc32(&tail.pieces, piece.end).await?;
        }
        end = u64::from(piece.end);
        pieces.push(PlannedPiece {
            start: piece.start,
            end: piece.end,
            compression: piece.compression,
            raw_crc32: header.raw_crc32,
        });
    }
    Ok(PlannedTail { segment: tail.segment.to_string(), end, raw_crc32, pieces })
}

/// The stored histories of the branch, oldest first, with their checksums.
pub(super) async fn histories(
    archive: &Archive,
    branch: &TimelineHistory,
) -> Result<Vec<PlannedHistory>, RestoreError> {
    let mut histories = Vec::new();
    let chain = branch.ancestors().iter().map(|ancestor| ancestor.timeline).chain([branch.timeline()]);
    for timeline in chain.filter(|timeline| *timeline != TimelineId::FIRST) {
        // Ancestors' files may be missing: the newest one has the whole chain.
        if let Some(bytes) = archive.history(timeline).await? {
            histories.push(PlannedHistory {
                timeline,
                size: bytes.len() as u64, // usize fits
                crc32: crc32fast::hash(&bytes),
            });
        }
    }
    Ok(histories)
}
