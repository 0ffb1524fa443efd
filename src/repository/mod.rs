//! What the stored objects mean: keys, the catalog, backups, the lease, and the format's version.
//!
//! - `Repository` and `Archive` only read. `RepositoryWriter` writes, and holds the lease; `BackupWriter` writes below its own new
//!   folder and needs none. Whoever verifies or plans is never given a writer.
//! - The layout is drawn in docs/format.md; `Keys` makes every key and `ParsedKey` takes it apart. A key that does not follow the
//!   grammar is foreign: counted, never touched.
//! - Nothing stored is replaced by other content (I2). The same WAL compressed otherwise is the same content; that is found by
//!   reading and comparing the raw bytes, never by a checksum alone.
//! - Every object says what it is, and that is compared with its key on each read (I6).
//! - There is no index object: the catalog is made from listings, each time anew.

mod adopted;
mod backup_writer;
mod branch;
mod catalog;
mod compare;
mod error;
mod gaps;
mod keys;
mod lease;
mod objects;
mod overlap;
mod pieces;
mod read;
mod spanned;
mod writer;

/// What other rooms' tests make catalogs and objects from.
#[cfg(test)]
pub(crate) mod test_support {
    pub(crate) use super::catalog::tests::{MIB, Sketch, timeline};
    pub(crate) use super::objects::tests::{backup, time};
    pub(crate) use super::writer::tests::{SYSTEM, seal, seal_with, writer};
}

use std::sync::Arc;

pub use adopted::{Adopted, Succession};
pub use backup_writer::BackupWriter;
pub use branch::{Held, Stretch, StretchPart, WalObject, WalObjectKind};
pub use catalog::{Catalog, CatalogBuilder, ObjectComplaint, SegmentRun, TimelineWal, Window};
pub use error::RepositoryError;
pub use keys::{Keys, ParsedKey};
pub use lease::{
    LEASE_MARGIN, LEASE_POLL, LEASE_RENEW, LEASE_TTL, LEASE_UNREADABLE, Lease, LeaseAttempt, LeaseHolder, LeaseSeeker,
};
pub use objects::{
    BackupId, BackupJson, BackupTablespace, Coverage, FORMAT, Gap, LeaseJson, ObjectProblem, RequiredSettings,
    StoredPart,
};
pub use pieces::{Piece, PieceChain};
pub use read::ArchivedWal;
pub use writer::{RepositoryWriter, SealedObject, Stored, Written};

use crate::storage::ObjectStore;
use crate::wal::SystemIdentifier;

/// One configured repository, for reading: the folder of one cluster name in one store.
#[derive(Clone, Debug)]
pub struct Repository {
    name: Arc<str>,
    cluster: Arc<str>,
    store: Arc<dyn ObjectStore>,
}

impl Repository {
    /// `name` is the one in the configuration.
    pub fn new(name: &str, cluster: &str, store: Arc<dyn ObjectStore>) -> Result<Self, RepositoryError> {
        Keys::check_cluster_name(cluster)?;
        Ok(Self { name: name.into(), cluster: cluster.into(), store })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// For people; never a secret.
    pub fn url(&self) -> String {
        self.store.url()
    }

    /// The systems that have a folder below the cluster's name, ascending. Other folders are foreign and passed over.
    pub async fn systems(&self) -> Result<Vec<SystemIdentifier>, RepositoryError> {
        let folders = self.store.list_folders(&Keys::cluster_prefix(&self.cluster)).await?;
        let mut systems: Vec<SystemIdentifier> =
            folders.iter().filter_map(|folder| folder.trim_end_matches('/').parse().ok()).collect();
        systems.sort_unstable();
        systems.dedup();
        Ok(systems)
    }

    /// The folder of one system, whether or not it exists yet.
    pub fn bind(&self, system: SystemIdentifier) -> Archive {
        let keys = Keys::new(&self.cluster, system).expect("the cluster's name was checked");
        Archive { repository: self.clone(), keys: Arc::new(keys) }
    }

    /// The folder of the only system there is, or of `wanted`. Several, none, or not the wanted one: an error that names them.
    pub async fn choose(&self, wanted: Option<SystemIdentifier>) -> Result<Archive, RepositoryError> {
        let found = self.systems().await?;
        let (url, cluster) = (self.url(), self.cluster.to_string());
        match (wanted, found.as_slice()) {
            (_, []) => Err(RepositoryError::NoCluster { url, cluster }),
            (Some(wanted), found) if found.contains(&wanted) => Ok(self.bind(wanted)),
            (Some(wanted), _) => Err(RepositoryError::NoSystem { url, cluster, wanted, found }),
            (None, [only]) => Ok(self.bind(*only)),
            (None, _) => Err(RepositoryError::SeveralSystems { url, cluster, found }),
        }
    }
}

/// The folder of one cluster and system in one repository, for reading.
#[derive(Clone, Debug)]
pub struct Archive {
    repository: Repository,
    keys: Arc<Keys>,
}

impl Archive {
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    pub fn system(&self) -> SystemIdentifier {
        self.keys.system()
    }

    pub fn url(&self) -> String {
        self.repository.url()
    }

    fn store(&self) -> &dyn ObjectStore {
        &*self.repository.store
    }
}
