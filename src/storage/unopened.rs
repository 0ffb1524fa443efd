//! In place of a store whose settings cannot be used now, such as a file of certificates that is not there: every call says why.
//! So one repository that is out of reach stands beside the others as one that does not answer, and proves nothing (I12).

use async_trait::async_trait;
use bytes::Bytes;

use super::{Abilities, Body, MultipartUpload, ObjectInfo, ObjectStore, ObjectStream, PutOutcome, StorageError};

#[derive(Debug)]
pub(super) struct Unopened {
    pub(super) url: String,
    pub(super) why: String,
}

impl Unopened {
    fn refuse<T>(&self) -> Result<T, StorageError> {
        Err(StorageError::Settings { url: self.url.clone(), why: self.why.clone() })
    }
}

#[async_trait]
impl ObjectStore for Unopened {
    fn url(&self) -> String {
        self.url.clone()
    }

    async fn probe(&self, _prefix: &str) -> Result<Abilities, StorageError> {
        self.refuse()
    }

    async fn put_new(&self, _key: &str, _body: &Body, _crc32: u32) -> Result<PutOutcome, StorageError> {
        self.refuse()
    }

    async fn compare_and_swap(
        &self,
        _key: &str,
        _body: Bytes,
        _expected: Option<&str>,
    ) -> Result<PutOutcome, StorageError> {
        self.refuse()
    }

    async fn get(&self, _key: &str, _size_max: u64) -> Result<(Bytes, Option<String>), StorageError> {
        self.refuse()
    }

    async fn get_range(&self, _key: &str, _offset: u64, _length: u64) -> Result<Bytes, StorageError> {
        self.refuse()
    }

    async fn get_stream(&self, _key: &str) -> Result<ObjectStream, StorageError> {
        self.refuse()
    }

    async fn head(&self, _key: &str) -> Result<Option<ObjectInfo>, StorageError> {
        self.refuse()
    }

    async fn list(&self, _prefix: &str, _start_after: Option<&str>) -> Result<Vec<ObjectInfo>, StorageError> {
        self.refuse()
    }

    async fn list_folders(&self, _prefix: &str) -> Result<Vec<String>, StorageError> {
        self.refuse()
    }

    async fn delete(&self, _key: &str) -> Result<(), StorageError> {
        self.refuse()
    }

    async fn begin_multipart(&self, _key: &str) -> Result<Box<dyn MultipartUpload>, StorageError> {
        self.refuse()
    }
}
