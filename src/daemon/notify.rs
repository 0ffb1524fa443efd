//! What the service manager is told: ready, reloading, stopping, alive. Nothing where none listens.
//!
//! Source: sd_notify(3), "Description" and "Notes".

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;

use super::START_TIME;
use crate::telemetry::{Board, CauseCode, Snapshot};

const POLL: Duration = Duration::from_millis(100);

/// The manager's socket, `$NOTIFY_SOCKET`.
pub(super) struct ServiceManager {
    socket: Option<UnixDatagram>,
    /// It restarts the agent unless it hears from it every so often (`$WATCHDOG_USEC`).
    watchdog: bool,
    status: Mutex<String>,
}

impl ServiceManager {
    pub(super) fn from_environment() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()).and_then(|name| {
            connect(&name)
                .map_err(|error| tracing::warn!(%error, "the service manager's socket NOTIFY_SOCKET cannot be used"))
                .ok()
        });
        let own = |pid: String| pid == std::process::id().to_string();
        let watchdog = std::env::var_os("WATCHDOG_USEC").is_some() && std::env::var("WATCHDOG_PID").map_or(true, own);
        Self { socket, watchdog, status: Mutex::default() }
    }

    /// Never waits: a manager that does not read misses a message.
    fn send(&self, message: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(message.as_bytes())
        {
            tracing::debug!(%error, "the service manager was not told");
        }
    }

    pub(super) fn reloading(&self) {
        // Type=notify-reload compares this with its own clock.
        let now = clock_gettime(ClockId::Monotonic);
        let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={micros}\n"));
    }

    pub(super) fn ready(&self) {
        self.send("READY=1\n");
    }

    /// The agent's tasks still run, and this is how it is.
    pub(super) fn alive(&self, snapshot: &Snapshot) {
        if self.watchdog {
            self.send("WATCHDOG=1\n");
        }
        let text = told(snapshot);
        let mut last = self.status.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *last != text {
            self.send(&format!("STATUS={text}\n"));
            *last = text;
        }
    }

    /// Says that the agent is ready once WAL streams. A server that is down must not keep the manager waiting, or it would
    /// kill an agent that already answers and tries again: so also when a refusal (an end with code 2 or 4) would have come.
    /// Then waits for the end, and says that it has begun.
    pub(super) async fn accompany(&self, board: &Board, shutdown: CancellationToken) {
        let begun = Instant::now();
        while board.is_raised(CauseCode::NotConnected) && begun.elapsed() < START_TIME {
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = shutdown.cancelled() => break,
            }
        }
        if !shutdown.is_cancelled() {
            self.ready();
        }
        shutdown.cancelled().await;
        self.send("STOPPING=1\n");
    }
}

fn connect(name: &OsStr) -> std::io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    match name.as_bytes().strip_prefix(b"@") {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(name)?,
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// One line for `systemctl status`, which changes seldom.
fn told(snapshot: &Snapshot) -> String {
    let causes: Vec<&str> =
        snapshot.causes.iter().filter(|cause| cause.code.is_unhealthy()).map(|cause| cause.code.as_str()).collect();
    if causes.is_empty() {
        "healthy: archiving".into()
    } else {
        format!("not healthy: {}; `walden status` says more", causes.join(", "))
    }
}
