//! What a user says about a bucket.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::storage::StorageError;

/// One S3 repository. It holds no secret, only the paths of files that do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Settings {
    /// The repository's name, for messages.
    pub name: String,
    pub bucket: String,
    /// "" or `a/b`; slashes at the ends are dropped.
    pub prefix: String,
    /// `None`: from the environment, the profile or the instance; with an endpoint, `us-east-1` if none of them says.
    pub region: Option<String>,
    /// `http(s)://host[:port]` of a compatible store; `None`: `AWS_ENDPOINT_URL`, the profile, or AWS itself.
    pub endpoint: Option<String>,
    pub path_style: bool,
    pub profile: Option<String>,
    /// The access key and the secret come from both files or from neither. They are read again for each request, so keys can change.
    pub access_key_id_file: Option<PathBuf>,
    pub secret_access_key_file: Option<PathBuf>,
    pub session_token_file: Option<PathBuf>,
    pub storage_class: Option<String>,
    pub sse: Option<ServerSideEncryption>,
    pub sse_kms_key_id: Option<String>,
    /// PEM certificates that replace the system's trusted roots for this store.
    pub ca_file: Option<PathBuf>,
    /// For one try of one request, besides the time that a body may take (8 seconds for each MiB).
    pub request_timeout: Duration,
    /// Connections kept open while idle.
    pub concurrency: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerSideEncryption {
    /// With a key of the store (SSE-S3).
    Aes256,
    /// With a key of the key management service (SSE-KMS).
    AwsKms,
}

impl FromStr for ServerSideEncryption {
    type Err = String;

    /// The words of the configuration: `AES256` and `aws:kms`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "AES256" => Ok(Self::Aes256),
            "aws:kms" => Ok(Self::AwsKms),
            other => Err(format!("{other:?} is not a server-side encryption (AES256 or aws:kms)")),
        }
    }
}

impl S3Settings {
    /// A bucket of AWS, everything else by default.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            name: "s3".to_owned(),
            bucket: bucket.into(),
            prefix: String::new(),
            region: None,
            endpoint: None,
            path_style: false,
            profile: None,
            access_key_id_file: None,
            secret_access_key_file: None,
            session_token_file: None,
            storage_class: None,
            sse: None,
            sse_kms_key_id: None,
            ca_file: None,
            request_timeout: Duration::from_secs(60),
            concurrency: 4,
        }
    }

    /// `s3://bucket/prefix`.
    pub(super) fn url(&self) -> String {
        match self.prefix.trim_matches('/') {
            "" => format!("s3://{}", self.bucket),
            prefix => format!("s3://{}/{prefix}", self.bucket),
        }
    }

    pub(super) fn check(&self) -> Result<(), StorageError> {
        let wrong = |why: &str| Err(StorageError::Settings { url: self.url(), why: why.to_owned() });
        if self.bucket.is_empty() || self.bucket.contains('/') {
            return wrong("`bucket` must be the name of a bucket");
        }
        if self.access_key_id_file.is_some() != self.secret_access_key_file.is_some() {
            return wrong("`access_key_id_file` and `secret_access_key_file` must be given together");
        }
        if self.session_token_file.is_some() && self.access_key_id_file.is_none() {
            return wrong("`session_token_file` needs `access_key_id_file` and `secret_access_key_file`");
        }
        if self.sse_kms_key_id.is_some() && self.sse != Some(ServerSideEncryption::AwsKms) {
            return wrong("`sse_kms_key_id` needs `sse = \"aws:kms\"`");
        }
        if self.endpoint.as_deref().is_some_and(|endpoint| !is_endpoint(endpoint)) {
            return wrong(
                "`endpoint` must be http:// or https:// with a host and nothing behind it, such as https://minio.example:9000",
            );
        }
        Ok(())
    }
}

/// A user name or password in it would end up in messages, and a query is never right.
fn is_endpoint(text: &str) -> bool {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    rest.is_some_and(|rest| {
        !rest.is_empty()
            && !rest.starts_with(['/', ':'])
            && !rest.contains(['@', '?', '#', ' '])
            && !rest.contains(char::is_control)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_settings_are_refused_with_a_reason() {
        let good = S3Settings::new("bucket");
        good.check().unwrap();
        S3Settings { endpoint: Some("http://127.0.0.1:9000".to_owned()), ..good.clone() }.check().unwrap();
        for bad in [
            S3Settings::new(""),
            S3Settings::new("a/b"),
            S3Settings { access_key_id_file: Some("x".into()), ..good.clone() },
            S3Settings { session_token_file: Some("x".into()), ..good.clone() },
            S3Settings { sse_kms_key_id: Some("x".to_owned()), ..good.clone() },
            S3Settings { endpoint: Some("minio:9000".to_owned()), ..good.clone() },
            S3Settings { endpoint: Some("https://user:secret@host".to_owned()), ..good.clone() },
        ] {
            let error = bad.check().unwrap_err();
            assert!(!error.to_string().contains("secret@"), "{error}");
        }
    }

    #[test]
    fn the_url_names_bucket_and_prefix() {
        assert_eq!(S3Settings::new("b").url(), "s3://b");
        assert_eq!(S3Settings { prefix: "/x/y/".to_owned(), ..S3Settings::new("b") }.url(), "s3://b/x/y");
    }
}
