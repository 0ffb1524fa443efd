//! Where credentials come from: each link of the chain, in a process of its own, against a server that checks signatures.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use walden::storage::{PutOutcome, S3Settings, StorageError, open_s3};

use super::suite::{noise, put};
use crate::support::s3_double::{S3Server, Stopped};

/// The child's part: opens the store by the environment alone and writes one object.
#[tokio::test]
#[ignore = "run by the tests below in a process of its own"]
async fn child_writes_by_its_environment() {
    let Ok(bucket) = std::env::var("CONTRACT_BUCKET") else { return };
    let settings = S3Settings {
        endpoint: std::env::var("CONTRACT_ENDPOINT").ok(),
        path_style: true,
        profile: std::env::var("CONTRACT_PROFILE").ok(),
        ..S3Settings::new(bucket)
    };
    let store = open_s3(settings).await.unwrap();
    if let Ok(ready) = std::env::var("CONTRACT_DENIED_FIRST") {
        let error = put(&store, "a", &noise(1000, 1)).await.unwrap_err();
        assert!(matches!(error, StorageError::Denied { .. }), "{error:?}");
        std::fs::write(ready, "").unwrap();
        let deadline = Instant::now() + Duration::from_secs(40);
        while put(&store, "a", &noise(1000, 1)).await.is_err() {
            assert!(Instant::now() < deadline, "the new keys were never looked up");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        return;
    }
    let key = std::env::var("CONTRACT_KEY").unwrap_or_else(|_| "a".to_owned());
    assert_eq!(put(&store, &key, &noise(1000, 1)).await.unwrap(), PutOutcome::Created);
}

struct Case {
    folder: tempfile::TempDir,
    server: S3Server,
}

impl Case {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = S3Server::start_s3s(&folder.path().join("s3")).await;
        Self { folder, server }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    /// Runs the child with nothing but these variables; its output if it failed.
    async fn child(&self, environment: &[(String, String)]) -> Result<(), String> {
        let endpoint = ("CONTRACT_ENDPOINT".to_owned(), self.server.endpoint.clone());
        self.child_without_endpoint(&[&[endpoint], environment].concat()).await
    }

    /// The same, with no endpoint among the settings.
    async fn child_without_endpoint(&self, environment: &[(String, String)]) -> Result<(), String> {
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "contract::s3_credentials::child_writes_by_its_environment", "--nocapture"])
            .env_clear()
            .env("HOME", self.folder.path())
            .env("AWS_REGION", "us-east-1")
            .env("CONTRACT_BUCKET", &self.server.bucket)
            .envs(environment.iter().cloned())
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!text.contains(&self.server.secret_key), "a secret was shown: {text}");
        assert!(text.contains("running 1 test"), "{text}");
        if output.status.success() { Ok(()) } else { Err(text) }
    }

    /// The answer of a service that hands out credentials.
    fn handed_out(&self) -> String {
        format!(
            r#"{{"Code":"Success","Version":1,"Type":"AWS-HMAC","AccessKeyId":"{}","SecretAccessKey":"{}","Token":"t","Expiration":"2099-01-01T00:00:00Z","LastUpdated":"2020-01-01T00:00:00Z"}}"#,
            self.server.access_key, self.server.secret_key
        )
    }
}

fn variables<const N: usize>(of: [(&str, &str); N]) -> Vec<(String, String)> {
    of.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
}

/// A web server that answers by the first part of a request's path that is known.
async fn canned(answers: Vec<(&'static str, String)>) -> (String, Stopped) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let answers = answers.clone();
            tokio::spawn(async move {
                let mut request = Vec::new();
                while !request.windows(4).any(|window| window == b"\r\n\r\n") {
                    if client.read_buf(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let text = String::from_utf8_lossy(&request).into_owned();
                let path = text.split(' ').nth(1).unwrap_or_default();
                let body = answers.iter().find(|(known, _)| path == *known).map(|(_, body)| body.as_str());
                let (status, body) = body.map_or(("404 Not Found", ""), |body| ("200 OK", body));
                let answer = format!(
                    "HTTP/1.1 {status}\r\ncontent-length: {}\r\nx-aws-ec2-metadata-token-ttl-seconds: 21600\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                // A client that has gone needs no answer.
                let _ = client.write_all(answer.as_bytes()).await;
            });
        }
    });
    (address, Stopped(task))
}

#[tokio::test]
async fn credentials_come_from_the_environment() {
    let case = Case::new().await;
    case.child(&case.server.environment()).await.unwrap();
}

#[tokio::test]
async fn without_credentials_the_store_is_denied_and_says_so() {
    let case = Case::new().await;
    let output = case.child(&variables([("AWS_EC2_METADATA_DISABLED", "true")])).await.unwrap_err();
    assert!(output.contains("Denied") && output.contains("no credentials"), "{output}");
}

#[tokio::test]
async fn credentials_come_from_a_profile() {
    let case = Case::new().await;
    let keys =
        format!("aws_access_key_id = {}\naws_secret_access_key = {}\n", case.server.access_key, case.server.secret_key);
    let file = case
        .file("credentials", &format!("[other]\naws_access_key_id = x\naws_secret_access_key = x\n[backup]\n{keys}"));
    let environment = variables([
        ("AWS_SHARED_CREDENTIALS_FILE", &file),
        ("CONTRACT_PROFILE", "backup"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]);
    case.child(&environment).await.unwrap();
}

#[tokio::test]
async fn a_profile_that_was_corrected_counts_without_a_restart() {
    let case = Case::new().await;
    let profile = |secret: &str| {
        let text =
            format!("[default]\naws_access_key_id = {}\naws_secret_access_key = {secret}\n", case.server.access_key);
        case.file("credentials", &text)
    };
    let file = profile("wrong");
    let ready = case.folder.path().join("ready");
    let environment = variables([
        ("AWS_SHARED_CREDENTIALS_FILE", &file),
        ("CONTRACT_DENIED_FIRST", &ready.display().to_string()),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]);
    let correct = async {
        while !ready.exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        profile(&case.server.secret_key);
    };
    let (outcome, ()) = tokio::join!(case.child(&environment), correct);
    outcome.unwrap();
}

/// What names an endpoint for S3 alone was dropped, and the requests went to AWS.
#[tokio::test]
async fn the_endpoint_comes_from_the_environment_or_the_profile() {
    let case = Case::new().await;
    let keys = case.server.environment();
    let nowhere = "http://127.0.0.1:9";
    let here = case.server.endpoint.as_str();
    let profile = format!("[default]\nservices = local\n[services local]\ns3 =\n  endpoint_url = {here}\n");
    let profile = case.file("config", &profile);
    for (number, named) in [
        variables([("AWS_ENDPOINT_URL", here)]),
        variables([("AWS_ENDPOINT_URL_S3", here)]),
        variables([("AWS_ENDPOINT_URL_S3", here), ("AWS_ENDPOINT_URL", nowhere)]),
        variables([("AWS_CONFIG_FILE", profile.as_str())]),
    ]
    .into_iter()
    .enumerate()
    {
        let key = ("CONTRACT_KEY".to_owned(), format!("a{number}"));
        case.child_without_endpoint(&[&keys[..], &named, &[key]].concat()).await.unwrap();
    }
}

#[tokio::test]
async fn credentials_come_from_a_process() {
    let case = Case::new().await;
    let answer = format!(
        r#"{{"Version":1,"AccessKeyId":"{}","SecretAccessKey":"{}"}}"#,
        case.server.access_key, case.server.secret_key
    );
    let answer = case.file("answer.json", &answer);
    let config = case.file("config", &format!("[default]\ncredential_process = /bin/cat {answer}\n"));
    let environment = variables([("AWS_CONFIG_FILE", config.as_str()), ("AWS_EC2_METADATA_DISABLED", "true")]);
    case.child(&environment).await.unwrap();
}

#[tokio::test]
async fn credentials_come_from_a_container() {
    let case = Case::new().await;
    let (address, _service) = canned(vec![("/credentials", case.handed_out())]).await;
    let address = format!("{address}/credentials");
    let environment =
        variables([("AWS_CONTAINER_CREDENTIALS_FULL_URI", address.as_str()), ("AWS_EC2_METADATA_DISABLED", "true")]);
    case.child(&environment).await.unwrap();
}

#[tokio::test]
async fn credentials_come_from_the_instance() {
    let case = Case::new().await;
    let list = "/latest/meta-data/iam/security-credentials";
    let (address, _service) = canned(vec![
        ("/latest/api/token", "token".to_owned()),
        ("/latest/meta-data/iam/security-credentials/", "role".to_owned()),
        (list, "role".to_owned()),
        ("/latest/meta-data/iam/security-credentials-extended/", "role".to_owned()),
        ("/latest/meta-data/iam/security-credentials-extended/role", case.handed_out()),
        ("/latest/meta-data/iam/security-credentials/role", case.handed_out()),
    ])
    .await;
    case.child(&variables([("AWS_EC2_METADATA_SERVICE_ENDPOINT", address.as_str())])).await.unwrap();
}

#[tokio::test]
async fn credentials_come_from_a_web_identity() {
    let case = Case::new().await;
    let token = case.file("token", "a-token");
    let answer = format!(
        "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleWithWebIdentityResult>\
         <Credentials><AccessKeyId>{}</AccessKeyId><SecretAccessKey>{}</SecretAccessKey><SessionToken>t</SessionToken>\
         <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>\
         <AssumedRoleUser><AssumedRoleId>r:s</AssumedRoleId><Arn>arn:aws:sts::1:assumed-role/r/s</Arn></AssumedRoleUser>\
         </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
        case.server.access_key, case.server.secret_key
    );
    let (address, _service) = canned(vec![("/", answer)]).await;
    let environment = variables([
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.as_str()),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/walden"),
        ("AWS_ROLE_SESSION_NAME", "walden"),
        ("AWS_ENDPOINT_URL_STS", address.as_str()),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ]);
    case.child(&environment).await.unwrap();
}
