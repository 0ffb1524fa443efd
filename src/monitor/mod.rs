//! The HTTP endpoint: `/metrics`, `/livez`, `/readyz` and `/status`.
//!
//! It shows the board and nothing else: it observes, never steers, and a request asks neither the server nor a store. What a
//! client can cost is bounded: a few connections at a time, each for a few seconds and one request. There is nothing secret
//! on the pages, but there is no authentication either, so the default is loopback.

mod connection;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::failure::NextStep;
use crate::telemetry::{Board, CauseJson};
use connection::BoundedListener;

/// A page takes milliseconds.
const CONNECTION_LIFE: Duration = Duration::from_secs(10);
/// How long a stop waits for answers that are being sent.
const STOP_WAIT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("cannot serve HTTP at {listen}")]
    Listen { listen: String, source: io::Error },
}

impl MonitorError {
    pub fn next_step(&self) -> NextStep {
        match self {
            Self::Listen { .. } => NextStep::Retry,
        }
    }

    /// What to do about it, one sentence.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Listen { .. } => {
                "free the port, or set metrics.listen to another address and restart (\"\" = no HTTP)"
            }
        }
    }
}

/// A listener that does not answer yet.
pub struct Monitor {
    listener: TcpListener,
    address: SocketAddr,
    board: Board,
    connection_life: Duration,
}

impl Monitor {
    /// Takes the port. An agent goes on without HTTP when it cannot.
    pub async fn bind(listen: &str, board: Board) -> Result<Self, MonitorError> {
        let failed = |source| MonitorError::Listen { listen: listen.to_owned(), source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, board, connection_life: CONNECTION_LIFE })
    }

    /// The address that was taken; it differs from the one asked for when that was a name or had port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown` is cancelled.
    pub async fn serve(self, shutdown: CancellationToken) {
        let routes = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(async || "alive\n"))
            .route("/readyz", get(readyz))
            .route("/status", get(status))
            .fallback(async || (StatusCode::NOT_FOUND, "there is /metrics, /livez, /readyz and /status\n"))
            .layer(middleware::map_response(last_answer))
            .with_state(self.board);
        let stop = shutdown.clone();
        let server = axum::serve(BoundedListener::new(self.listener, self.connection_life), routes)
            .with_graceful_shutdown(async move { stop.cancelled().await });
        let stopped = async {
            shutdown.cancelled().await;
            tokio::time::sleep(STOP_WAIT).await;
        };
        tokio::select! {
            // The listener waits over errors of accept, so this ends at the shutdown only, without an error.
            _ = server.into_future() => {}
            () = stopped => {}
        }
    }
}

/// Every answer ends its connection, so that a few idle clients cannot hold all connections there are.
async fn last_answer(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn metrics(State(board): State<Board>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, board.snapshot().metrics_text()).into_response()
}

async fn status(State(board): State<Board>) -> Response {
    Json(board.snapshot().status()).into_response()
}

#[derive(Serialize)]
struct Ready {
    healthy: bool,
    causes: Vec<CauseJson>,
}

async fn readyz(State(board): State<Board>) -> Response {
    let status = board.snapshot().status();
    let code = if status.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Ready { healthy: status.healthy, causes: status.causes })).into_response()
}

#[cfg(test)]
mod tests;
