//! S3 servers for tests, each behind a proxy that can inject faults and keeps what was asked: `s3s-fs` in this process, which checks
//! signatures and checksums, and moto in a process of its own, which knows more of S3 and checks neither.

use std::path::{Path, PathBuf};
use std::time::Duration;

use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use walden::storage::S3Settings;

use super::s3_moto::Moto;
use super::s3_proxy::{Faults, Proxy};

pub const ACCESS_KEY: &str = "AKIAWALDENTEST";
pub const SECRET_KEY: &str = "walden-secret-canary-7Qm2";
pub const BUCKET: &str = "walden-test";

/// A running server with one empty bucket. Dropping it stops it.
pub struct S3Server {
    /// `http://127.0.0.1:port`, where the proxy listens.
    pub endpoint: String,
    pub access_key: String,
    pub secret_key: String,
    pub bucket: String,
    faults: Faults,
    keys: tempfile::TempDir,
    _proxy: Proxy,
    _server: Server,
}

/// Held for its end only.
#[allow(dead_code)]
enum Server {
    InProcess(Stopped),
    Moto(Box<Moto>),
}

/// A task that ends with its owner.
pub struct Stopped(pub JoinHandle<()>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl S3Server {
    /// `s3s-fs` over `folder`: wrong checksums and signatures are refused, conditions are honoured (one PUT to a key at a time, since
    /// the server itself does not look and write in one step).
    pub async fn start_s3s(folder: &Path) -> Self {
        std::fs::create_dir_all(folder.join(BUCKET)).expect("the folder of the bucket");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder).expect("a folder to serve"));
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = builder.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let io = hyper_util::rt::TokioIo::new(socket);
                    // A connection that breaks is what some tests are about.
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
                });
            }
        });
        Self::behind_proxy(address, Server::InProcess(Stopped(task))).await
    }

    /// moto, from the tools of the test set-up.
    pub async fn start_moto() -> Self {
        let moto = Moto::start(BUCKET).await;
        let address = moto.address.clone();
        Self::behind_proxy(address, Server::Moto(Box::new(moto))).await
    }

    async fn behind_proxy(address: String, server: Server) -> Self {
        let faults = Faults::default();
        let proxy = Proxy::start(address, faults.clone()).await;
        let keys = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(keys.path().join("access-key-id"), ACCESS_KEY).expect("a key file");
        std::fs::write(keys.path().join("secret-access-key"), SECRET_KEY).expect("a key file");
        Self {
            endpoint: format!("http://{}", proxy.address),
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
            bucket: BUCKET.to_owned(),
            faults,
            keys,
            _proxy: proxy,
            _server: server,
        }
    }

    /// Faults between client and server, and the record of requests.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    /// Where the two key files are: `access-key-id`, `secret-access-key`.
    pub fn key_folder(&self) -> PathBuf {
        self.keys.path().to_owned()
    }

    /// Settings that reach it, with the keys in files.
    pub fn settings(&self) -> S3Settings {
        S3Settings {
            endpoint: Some(self.endpoint.clone()),
            path_style: true,
            access_key_id_file: Some(self.keys.path().join("access-key-id")),
            secret_access_key_file: Some(self.keys.path().join("secret-access-key")),
            request_timeout: Duration::from_secs(20),
            ..S3Settings::new(BUCKET)
        }
    }

    /// The environment for a program that is to use it.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}
