use bytes::Bytes;

use super::objects::BACKUP_JSON_BYTES_MAX;
use super::{Archive, BackupId, BackupJson, RepositoryError, Written};
use crate::storage::{Body, MultipartUpload, PutOutcome};

/// Writes one new backup, below its own folder only; it needs no lease for that. Until `finish`, the backup does not exist (I16).
#[derive(Clone, Debug)]
pub struct BackupWriter {
    archive: Archive,
    id: BackupId,
}

impl Archive {
    /// A writer for a backup that starts at `id`'s second, or in the next one that has no objects yet.
    pub async fn backup_writer(&self, mut id: BackupId) -> Result<BackupWriter, RepositoryError> {
        let folders = self.store().list_folders(&self.keys().backups_prefix()).await?;
        while folders.iter().any(|folder| folder.trim_end_matches('/') == id.to_string()) {
            id = id.next_second();
        }
        Ok(BackupWriter { archive: self.clone(), id })
    }
}

impl BackupWriter {
    pub fn id(&self) -> &BackupId {
        &self.id
    }

    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// `volumes/000001.tar.lz4` and so on: the whole key.
    pub fn key(&self, name: &str) -> String {
        self.archive.keys().backup_object(&self.id, name)
    }

    /// Stores a part whose length is known. `size` and `crc32` are those of `body`. May be called again after an error.
    pub async fn put(&self, name: &str, body: &Body, size: u64, crc32: u32) -> Result<Written, RepositoryError> {
        let key = self.key(name);
        match self.archive.store().put_new(&key, body, crc32).await? {
            PutOutcome::Created => Ok(Written::Created),
            // The folder is ours alone: only an earlier try of our own, whose answer was lost, can have made it.
            PutOutcome::Exists => self.is_ours(key, size, crc32).await,
        }
    }

    async fn is_ours(&self, key: String, size: u64, crc32: u32) -> Result<Written, RepositoryError> {
        if self.archive.holds(&key, size, crc32).await? {
            Ok(Written::AlreadyThere)
        } else {
            Err(RepositoryError::OtherContent { url: self.archive.url(), key })
        }
    }

    /// Starts a part whose length is not known yet. End it with `complete`.
    pub async fn begin_multipart(&self, name: &str) -> Result<Box<dyn MultipartUpload>, RepositoryError> {
        Ok(self.archive.store().begin_multipart(&self.key(name)).await?)
    }

    /// Makes a part that was sent by `begin_multipart` appear. May be called again after an error.
    pub async fn complete(
        &self,
        name: &str,
        upload: &dyn MultipartUpload,
        size: u64,
        crc32: u32,
    ) -> Result<Written, RepositoryError> {
        match upload.complete(size, crc32).await? {
            PutOutcome::Created => Ok(Written::Created),
            PutOutcome::Exists => self.is_ours(self.key(name), size, crc32).await,
        }
    }

    /// Makes the backup exist: every part is looked at once more, then `backup.json` is written. The WAL through the stop LSN
    /// must be archived before; that is the caller's.
    pub async fn finish(&self, backup: &BackupJson) -> Result<(), RepositoryError> {
        for part in backup.volumes.iter().chain(&backup.manifest) {
            // Each was proved when it was stored; reading them all again is what `verify` is for.
            let key = self.key(&part.key);
            let there = self.archive.head(&key).await?.is_some_and(|info| {
                info.size == part.stored_bytes && info.crc32.is_none_or(|crc32| crc32 == part.stored_crc32)
            });
            if !there {
                return Err(RepositoryError::OtherContent { url: self.archive.url(), key });
            }
        }
        let json = backup.to_json();
        // What cannot be read back would be a backup in vain.
        let key = self.key("backup.json");
        BackupJson::parse(&json).map_err(|problem| problem.at(&self.archive.url(), &key))?;
        let crc32 = crc32fast::hash(&json);
        match self.archive.store().put_new(&key, &Body::Bytes(Bytes::from(json.clone())), crc32).await? {
            PutOutcome::Created => Ok(()),
            PutOutcome::Exists if self.archive.get(&key, BACKUP_JSON_BYTES_MAX).await? == json => Ok(()),
            PutOutcome::Exists => Err(RepositoryError::OtherContent { url: self.archive.url(), key }),
        }
    }

    /// Removes what was stored so far of a backup that failed. Best effort; what stays does not exist as a backup.
    pub async fn discard(&self) -> Result<(), RepositoryError> {
        let key = self.key("backup.json");
        if self.archive.head(&key).await?.is_some() {
            return Err(RepositoryError::OtherContent { url: self.archive.url(), key });
        }
        for object in self.archive.list(&self.archive.keys().backup_prefix(&self.id), None).await? {
            self.archive.store().delete(&object.key).await?;
        }
        Ok(())
    }
}
