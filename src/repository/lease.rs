use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::objects::{ObjectProblem, SMALL_OBJECT_BYTES_MAX};
use super::{Archive, FORMAT, LeaseJson, RepositoryError};
use crate::storage::{PutOutcome, StorageError};
use crate::wal::PgTime;

/// A lease that was not renewed for so long may be taken by another agent.
pub const LEASE_TTL: Duration = Duration::from_secs(30);
/// How often the holder renews it.
pub const LEASE_RENEW: Duration = Duration::from_secs(10);
/// How often one that stands by looks.
pub const LEASE_POLL: Duration = Duration::from_secs(5);
/// The holder stops this long before others may take over, so that a write that has begun can end.
pub const LEASE_MARGIN: Duration = Duration::from_secs(5);

/// Stands for the agent where the lease cannot be read.
pub const LEASE_UNREADABLE: &str = "unknown (lease.json cannot be read)";

/// Who asks for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseHolder {
    /// The id in the agent's spool: whoever has that spool is the same agent, also after a restart.
    pub agent: String,
    /// For people only.
    pub host: String,
}

/// The monotonic clock, a seam for tests.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> Instant + Send + Sync>);

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

impl Clock {
    fn now(&self) -> Instant {
        (self.0)()
    }
}

pub enum LeaseAttempt {
    Taken(Lease),
    HeldByOther { agent: String, host: String, renewed: PgTime },
}

/// Takes a lease: at once if there is none, it was given back, or it is our own; else when it has not changed for its time to
/// live **by our own clock**. Clocks of two hosts are never compared.
#[derive(Debug)]
pub struct LeaseSeeker {
    archive: Archive,
    holder: LeaseHolder,
    ttl: Duration,
    clock: Clock,
    /// What was seen of another's lease, and since when it has been just that.
    seen: Option<(Bytes, Instant)>,
    /// One with our own agent id is taken at once.
    takes_own: bool,
}

impl LeaseSeeker {
    pub fn new(archive: Archive, holder: LeaseHolder, ttl: Duration) -> Self {
        Self { archive, holder, ttl, clock: Clock(Arc::new(Instant::now)), seen: None, takes_own: true }
    }

    /// Waits for one with our own agent id as for any other: it was lost to somebody, who may have a copy of our spool.
    #[must_use]
    pub fn patient(mut self) -> Self {
        self.takes_own = false;
        self
    }

    #[cfg(test)]
    fn with_clock(mut self, clock: impl Fn() -> Instant + Send + Sync + 'static) -> Self {
        self.clock = Clock(Arc::new(clock));
        self
    }

    /// One look and, if it may be, one try. Cancel-safe: a lease taken by a cancelled call is ours by its agent id next time.
    pub async fn try_take(&mut self) -> Result<LeaseAttempt, RepositoryError> {
        let started = self.clock.now();
        let Some((bytes, version)) = self.read().await? else { return self.take(started, None).await };
        let lease = parse(&self.archive, &bytes)?;
        let ours = self.takes_own && lease.agent == self.holder.agent;
        if ours || lease.ttl_seconds == 0 || self.has_expired(&bytes, &lease) {
            return self.take(started, version).await;
        }
        Ok(LeaseAttempt::HeldByOther { agent: lease.agent, host: lease.host, renewed: lease.renewed })
    }

    /// One look and no try, so that it is known already when it runs out.
    pub async fn watch(&mut self) -> Result<(), RepositoryError> {
        if let Some((bytes, _)) = self.read().await? {
            let lease = parse(&self.archive, &bytes)?;
            self.has_expired(&bytes, &lease);
        }
        Ok(())
    }

    async fn read(&self) -> Result<Option<(Bytes, Option<String>)>, RepositoryError> {
        match self.archive.store().get(&self.archive.keys().lease(), SMALL_OBJECT_BYTES_MAX).await {
            Ok(found) => Ok(Some(found)),
            Err(StorageError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the lease has been exactly this one for its time to live.
    fn has_expired(&mut self, bytes: &Bytes, lease: &LeaseJson) -> bool {
        let now = self.clock.now();
        match &self.seen {
            Some((seen, since)) if seen == bytes => {
                // The holder's own word counts if it is longer than ours; a day is the most that is believed.
                let stated = Duration::from_secs(u64::from(lease.ttl_seconds)).min(Duration::from_secs(86_400));
                now.duration_since(*since) >= self.ttl.max(stated)
            }
            _ => {
                self.seen = Some((bytes.clone(), now));
                false
            }
        }
    }

    async fn take(&mut self, started: Instant, version: Option<String>) -> Result<LeaseAttempt, RepositoryError> {
        // Also tells two processes with one agent id apart, and a renewal of ours from one of theirs.
        let taken = now();
        let lease = Lease {
            inner: Arc::new(LeaseInner {
                archive: self.archive.clone(),
                holder: self.holder.clone(),
                ttl: self.ttl,
                clock: self.clock.clone(),
                taken,
                state: Mutex::new(State { version, held_until: None, lost: None }),
            }),
        };
        match lease.write(self.ttl, started).await? {
            None => {
                self.seen = None;
                Ok(LeaseAttempt::Taken(lease))
            }
            // Somebody else was first.
            Some(other) => {
                Ok(LeaseAttempt::HeldByOther { agent: other.agent, host: other.host, renewed: other.renewed })
            }
        }
    }
}

/// The right to write. Shared by all who write; one task renews it.
#[derive(Clone, Debug)]
pub struct Lease {
    inner: Arc<LeaseInner>,
}

#[derive(Debug)]
struct LeaseInner {
    archive: Archive,
    holder: LeaseHolder,
    ttl: Duration,
    clock: Clock,
    taken: PgTime,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of the object as we wrote it last.
    version: Option<String>,
    /// Counted from *before* the renewal was sent: another agent can have seen it only later.
    held_until: Option<Instant>,
    /// Who took it, once it is gone. It never comes back to this value.
    lost: Option<String>,
}

impl Lease {
    /// Whether a write may begin now. Asks no store.
    pub fn is_held(&self) -> bool {
        let state = self.state();
        state.lost.is_none() && state.held_until.is_some_and(|until| self.inner.clock.now() + LEASE_MARGIN < until)
    }

    /// `is_held` as an error for those who write.
    pub(super) fn require(&self) -> Result<(), RepositoryError> {
        if self.is_held() {
            return Ok(());
        }
        Err(RepositoryError::LeaseLost { url: self.inner.archive.url(), by: self.state().lost.clone() })
    }

    /// Renews it. `LeaseLost`: another agent has it, and this handle never writes again. Other errors may pass: try again; meanwhile
    /// `is_held` runs out by itself.
    pub async fn renew(&self) -> Result<(), RepositoryError> {
        if let Some(by) = self.state().lost.clone() {
            return Err(RepositoryError::LeaseLost { url: self.inner.archive.url(), by: Some(by) });
        }
        match self.write_on(self.inner.ttl).await? {
            None => Ok(()),
            Some(other) => Err(RepositoryError::LeaseLost {
                url: self.inner.archive.url(),
                by: Some(format!("{} on {}", other.agent, other.host)),
            }),
        }
    }

    /// Gives it back, so that the next agent need not wait. No write may begin afterwards.
    pub async fn release(&self) -> Result<(), RepositoryError> {
        let held = self.is_held();
        self.state().held_until = None;
        if held {
            self.write_on(Duration::ZERO).await?;
        }
        Ok(())
    }

    /// Also behind an earlier write of our own whose answer was lost, or not waited for: its version is known then.
    async fn write_on(&self, ttl: Duration) -> Result<Option<LeaseJson>, RepositoryError> {
        match self.write(ttl, self.inner.clock.now()).await {
            Err(RepositoryError::Contended { .. }) => self.write(ttl, self.inner.clock.now()).await,
            other => other,
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic while it was held cannot have left a half-made state: it is only assigned to.
        self.inner.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Writes the lease over the version that we know. `Some` is another agent's that stands there instead; then ours is lost.
    async fn write(&self, ttl: Duration, started: Instant) -> Result<Option<LeaseJson>, RepositoryError> {
        let inner = &*self.inner;
        let key = inner.archive.keys().lease();
        let json = LeaseJson {
            format: FORMAT,
            agent: inner.holder.agent.clone(),
            host: inner.holder.host.clone(),
            taken: inner.taken,
            renewed: now(),
            ttl_seconds: u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX),
        };
        let body = Bytes::from(json.to_json());
        let expected = self.state().version.clone();
        inner.archive.store().compare_and_swap(&key, body.clone(), expected.as_deref()).await.map(drop_outcome)?;
        // The answer alone may be an old one repeated ("exists", because our own first try was stored and its answer lost), and the
        // version is needed anyway: what stands there now decides.
        let (found, version) = match inner.archive.store().get(&key, SMALL_OBJECT_BYTES_MAX).await {
            Ok(found) => found,
            Err(StorageError::NotFound { .. }) => {
                return Err(RepositoryError::Contended { url: inner.archive.url(), what: "the lease".into() });
            }
            Err(error) => return Err(error.into()),
        };
        if found == body {
            let mut state = self.state();
            state.version = version;
            state.held_until = (!ttl.is_zero()).then(|| started + ttl);
            return Ok(None);
        }
        let other = parse(&inner.archive, &found)?;
        if other.agent == inner.holder.agent && other.ttl_seconds > 0 && expected.is_some() {
            // Our own earlier write whose answer was lost: go on from it, at the next renewal.
            if other.taken == inner.taken {
                self.state().version = version;
                return Err(RepositoryError::Contended { url: inner.archive.url(), what: "the lease".into() });
            }
        }
        let mut state = self.state();
        state.held_until = None;
        state.lost = Some(format!("{} on {}", other.agent, other.host));
        Ok(Some(other))
    }
}

/// A lease that cannot be read is somebody's, and runs out like any other: its bytes tell whether it is renewed. What a newer release
/// wrote is left alone.
fn parse(archive: &Archive, bytes: &[u8]) -> Result<LeaseJson, RepositoryError> {
    match LeaseJson::parse(bytes) {
        Err(ObjectProblem::Unreadable(_)) => {
            let (agent, host) = (LEASE_UNREADABLE.into(), "an unknown host".into());
            let ttl_seconds = u32::try_from(LEASE_TTL.as_secs()).unwrap_or(u32::MAX);
            Ok(LeaseJson { format: FORMAT, agent, host, taken: now(), renewed: now(), ttl_seconds })
        }
        parsed => parsed.map_err(|problem| problem.at(&archive.url(), &archive.keys().lease())),
    }
}

/// What stands in the store afterwards says more than the answer.
fn drop_outcome(_: PutOutcome) {}

/// The agent's wall clock: for people who read the lease, decides nothing.
fn now() -> PgTime {
    PgTime::from_timestamp(jiff::Timestamp::now())
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
