//! moto's S3 server as a child process, from the venv that the test set-up makes.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// Importing moto takes seconds on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(90);

pub struct Moto {
    /// `127.0.0.1:port`.
    pub address: String,
    _child: Child,
}

impl Moto {
    /// Where `moto_server` is: `WALDEN_TEST_TOOLS` names a venv, else `.cache/venv` in the project. `None` if it is not installed.
    pub fn program() -> Option<PathBuf> {
        let venv = match std::env::var_os("WALDEN_TEST_TOOLS") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache/venv"),
        };
        let program = venv.join("bin/moto_server");
        program.is_file().then_some(program)
    }

    pub async fn start(bucket: &str) -> Self {
        let program = Self::program()
            .expect("moto_server is not installed; run the test set-up, or name a venv in WALDEN_TEST_TOOLS");
        let port = free_port().await;
        let address = format!("127.0.0.1:{port}");
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("moto_server starts");
        let moto = Self { address, _child: child };
        let deadline = Instant::now() + START_TIMEOUT;
        while !moto.make_bucket(bucket).await {
            assert!(Instant::now() < deadline, "moto did not answer in {START_TIMEOUT:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        moto
    }

    /// moto asks for no signature worth the name, so a bare request does.
    async fn make_bucket(&self, bucket: &str) -> bool {
        let Ok(mut stream) = TcpStream::connect(&self.address).await else { return false };
        let request = format!(
            "PUT /{bucket} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n",
            self.address
        );
        let mut answer = Vec::new();
        stream.write_all(request.as_bytes()).await.is_ok()
            && stream.read_to_end(&mut answer).await.is_ok()
            && answer.starts_with(b"HTTP/1.1 200")
    }
}

async fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    listener.local_addr().expect("a bound socket").port()
}
