//! TLS in front of a test's server: a certificate authority and a certificate for `localhost`, made anew each time.

use std::sync::Arc;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};

use super::s3_double::Stopped;

pub struct TlsFront {
    /// `https://localhost:port`.
    pub endpoint: String,
    /// The authority's certificate, PEM.
    pub authority: String,
    _task: Stopped,
}

impl TlsFront {
    /// Passes what arrives on to `upstream` (`127.0.0.1:port`).
    pub async fn start(upstream: String) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.expect("a free port"), upstream)
    }

    /// Another one, with an authority of its own, where one that was dropped had its `endpoint`.
    pub async fn start_again(endpoint: &str, upstream: String) -> Self {
        let port = endpoint.rsplit(':').next().expect("a port");
        loop {
            // The task that was dropped ends in its own time.
            match TcpListener::bind(format!("127.0.0.1:{port}")).await {
                Ok(listener) => return Self::on(listener, upstream),
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            }
        }
    }

    fn on(listener: TcpListener, upstream: String) -> Self {
        let mut authority = rcgen::CertificateParams::new(Vec::new()).expect("parameters of an authority");
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority_key = rcgen::KeyPair::generate().expect("a key");
        let authority_certificate = authority.self_signed(&authority_key).expect("an authority");
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let key = rcgen::KeyPair::generate().expect("a key");
        let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters of a server");
        let certificate = server.signed_by(&key, &issuer).expect("a certificate");

        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("protocol versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .expect("a server's configuration");
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let endpoint = format!("https://localhost:{}", listener.local_addr().expect("a bound socket").port());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (acceptor, upstream) = (acceptor.clone(), upstream.clone());
                tokio::spawn(async move {
                    // A client that refuses the certificate is part of the tests.
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let Ok(mut server) = TcpStream::connect(upstream).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { endpoint, authority: authority_certificate.pem(), _task: Stopped(task) }
    }
}
