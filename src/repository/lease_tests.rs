use super::*;
use crate::repository::Repository;
use crate::storage::open_local;
use crate::wal::SystemIdentifier;

async fn archive(root: &std::path::Path) -> Archive {
    let repository = Repository::new("main", "main", open_local(root.join("repository"))).unwrap();
    let archive = repository.bind(SystemIdentifier::new(7));
    archive.store().probe("main/walden-check/").await.unwrap();
    archive
}

/// A clock that stands still until it is moved.
#[derive(Clone)]
struct HandClock(Arc<Mutex<Instant>>);

impl HandClock {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }

    fn seeker(&self, archive: &Archive, agent: &str) -> LeaseSeeker {
        let holder = LeaseHolder { agent: agent.into(), host: format!("host-of-{agent}") };
        let clock = self.clone();
        LeaseSeeker::new(archive.clone(), holder, LEASE_TTL).with_clock(move || *clock.0.lock().unwrap())
    }
}

async fn taken(seeker: &mut LeaseSeeker) -> Option<Lease> {
    match seeker.try_take().await.unwrap() {
        LeaseAttempt::Taken(lease) => Some(lease),
        LeaseAttempt::HeldByOther { .. } => None,
    }
}

#[tokio::test]
async fn a_free_lease_is_taken_and_a_held_one_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let (mut first, mut second) = (clock.seeker(&archive, "a"), clock.seeker(&archive, "b"));
    let lease = taken(&mut first).await.expect("free");
    assert!(lease.is_held());
    match second.try_take().await.unwrap() {
        LeaseAttempt::HeldByOther { agent, host, .. } => {
            assert_eq!((agent.as_str(), host.as_str()), ("a", "host-of-a"))
        }
        LeaseAttempt::Taken(_) => panic!("it is held"),
    }
    // Renewed again and again it stays where it is, however long that takes.
    for _ in 0..5 {
        clock.pass(LEASE_RENEW);
        lease.renew().await.unwrap();
        assert!(taken(&mut second).await.is_none());
        assert!(lease.is_held());
    }
}

#[tokio::test]
async fn a_silent_holder_is_replaced_and_finds_out_before_it_writes() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let (mut first, mut second) = (clock.seeker(&archive, "a"), clock.seeker(&archive, "b"));
    let lost = taken(&mut first).await.expect("free");
    assert!(taken(&mut second).await.is_none());
    clock.pass(LEASE_TTL - LEASE_MARGIN);
    assert!(!lost.is_held(), "it stops before the other may take over");
    assert!(lost.require().unwrap_err().is_lease_lost());
    assert!(taken(&mut second).await.is_none());
    clock.pass(LEASE_MARGIN);
    let held = taken(&mut second).await.expect("not renewed for its time to live");
    assert!(held.is_held());
    assert!(lost.renew().await.unwrap_err().is_lease_lost());
    assert!(!lost.is_held());
    assert!(held.renew().await.is_ok(), "the loser changed nothing");
}

#[tokio::test]
async fn a_restart_takes_its_own_lease_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let before = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
    let after = taken(&mut clock.seeker(&archive, "a")).await.expect("our own");
    assert!(after.is_held());
    assert!(before.renew().await.unwrap_err().is_lease_lost(), "two with one spool do not both go on");
}

#[tokio::test]
async fn a_released_lease_is_free_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let lease = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
    lease.release().await.unwrap();
    assert!(!lease.is_held());
    assert!(taken(&mut clock.seeker(&archive, "b")).await.is_some());
}

/// A renewal was on its way when the agent stopped, and its answer was not waited for: the lease was not given back then, and the next
/// agent waited until it ran out.
#[tokio::test]
async fn a_lease_is_released_behind_a_renewal_that_nobody_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let lease = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
    let before = lease.state().version.clone();
    clock.pass(LEASE_RENEW);
    lease.renew().await.unwrap();
    lease.state().version = before;
    lease.release().await.unwrap();
    assert!(taken(&mut clock.seeker(&archive, "b")).await.is_some());
}

/// Two agents with a copied spool have one id. Each took the lease back at once, for ever.
#[tokio::test]
async fn one_that_lost_its_lease_to_its_twin_waits_like_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let lost = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
    let held = taken(&mut clock.seeker(&archive, "a")).await.expect("the same id");
    assert!(lost.renew().await.unwrap_err().is_lease_lost());
    let mut waiting = clock.seeker(&archive, "a").patient();
    for _ in 0..5 {
        assert!(taken(&mut waiting).await.is_none(), "its twin renews it");
        clock.pass(LEASE_RENEW);
        held.renew().await.unwrap();
    }
    assert!(taken(&mut waiting).await.is_none());
    clock.pass(LEASE_TTL);
    assert!(taken(&mut waiting).await.is_some(), "its twin is gone");
}

/// It stood in the way for ever: nobody could take it, and its holder could not renew it.
#[tokio::test]
async fn a_lease_that_cannot_be_read_runs_out() {
    for garbage in ["", "{", "{\"format\": 1}", "not a lease"] {
        let folder = tempfile::tempdir().unwrap();
        let archive = archive(folder.path()).await;
        let clock = HandClock::new();
        let lease = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
        put(&archive, garbage).await;
        assert!(lease.renew().await.unwrap_err().is_lease_lost(), "{garbage:?}");
        let mut seeker = clock.seeker(&archive, "a");
        assert!(taken(&mut seeker).await.is_none(), "{garbage:?}: it may be somebody's");
        clock.pass(LEASE_TTL);
        let lease = taken(&mut seeker).await.expect("nobody renewed it");
        assert!(lease.renew().await.is_ok(), "{garbage:?}");
    }
}

#[tokio::test]
async fn a_lease_of_a_newer_release_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    put(&archive, "{\"format\": 2}").await;
    let mut seeker = clock.seeker(&archive, "a");
    for _ in 0..3 {
        assert!(matches!(seeker.try_take().await, Err(RepositoryError::NewerFormat { .. })));
        clock.pass(LEASE_TTL);
    }
}

/// Whoever waits for another repository first knows already that this one's holder is gone.
#[tokio::test]
async fn time_counts_while_a_lease_is_only_watched() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path()).await;
    let clock = HandClock::new();
    let _silent = taken(&mut clock.seeker(&archive, "a")).await.expect("free");
    let mut watching = clock.seeker(&archive, "b");
    watching.watch().await.unwrap();
    clock.pass(LEASE_TTL);
    watching.watch().await.unwrap();
    assert!(taken(&mut watching).await.is_some());
}

async fn put(archive: &Archive, content: &str) {
    let key = archive.keys().lease();
    let version = archive.store().get(&key, SMALL_OBJECT_BYTES_MAX).await.ok().and_then(|(_, version)| version);
    let body = Bytes::copy_from_slice(content.as_bytes());
    archive.store().compare_and_swap(&key, body, version.as_deref()).await.unwrap();
}
