//! The settings that a restored server's `wal-fetch` needs, as a file, without secrets.

use toml::Value;

use super::settings::{RepositorySettings, S3Options, Settings, StoreSettings};
use super::value::duration_text;

/// What the AWS SDK reads from the environment that decides who is asked and as whom (AWS SDKs and Tools reference guide,
/// "Environment variables").
const AWS_CREDENTIALS: [&str; 13] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
];
const AWS_REGION: [&str; 2] = ["AWS_REGION", "AWS_DEFAULT_REGION"];
const AWS_ENDPOINT: [&str; 2] = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"];

impl Settings {
    /// A configuration file with what restoring needs: the cluster's name, `[restore]` and the repositories. It holds the
    /// paths of secrets, never a secret, and all paths are absolute.
    pub fn to_restore_toml(&self) -> String {
        let mut text = String::from("# Written by `walden restore` for its restore_command. It holds no secrets.\n");
        line(&mut text, "\n[archive]\n", &[("cluster", Some(self.archive.cluster.as_str().into()))]);
        let jobs = i64::try_from(self.restore.jobs).expect("at most 256");
        let timeout = duration_text(self.restore.fetch_timeout);
        line(&mut text, "\n[restore]\n", &[("jobs", Some(jobs.into())), ("fetch_timeout", Some(timeout.into()))]);
        for repository in &self.repositories {
            write_repository(&mut text, repository);
        }
        text
    }

    /// The variables set now that decide how the repositories are reached and that no file holds: the environment of the
    /// PostgreSQL server that runs `restore_command` needs them as well. Their names, never their values.
    pub fn environment_needed(&self, is_set: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
        let stores = || {
            self.repositories.iter().filter_map(|repository| match &repository.store {
                StoreSettings::S3(options) => Some(options.as_ref()),
                StoreSettings::Local { .. } => None,
            })
        };
        let mut names: Vec<&'static str> = Vec::new();
        if stores().any(|options| options.access_key_id_file.is_none()) {
            names.extend(AWS_CREDENTIALS);
        }
        if stores().any(|options| options.region.is_none()) {
            names.extend(AWS_REGION);
        }
        if stores().any(|options| options.endpoint.is_none()) {
            names.extend(AWS_ENDPOINT);
        }
        names.retain(|name| is_set(name));
        names
    }
}

fn line(text: &mut String, heading: &str, entries: &[(&str, Option<Value>)]) {
    text.push_str(heading);
    for (name, value) in entries {
        if let Some(value) = value {
            text.push_str(&format!("{name} = {value}\n")); // a `Value` prints itself as TOML, quoted
        }
    }
}

fn write_repository(text: &mut String, repository: &RepositorySettings) {
    let general = [
        ("name", Some(repository.name.as_str().into())),
        ("required", Some(repository.required.into())),
        ("single_writer", Some(repository.single_writer.into())),
    ];
    line(text, "\n[[repository]]\n", &general);
    match &repository.store {
        StoreSettings::Local { path } => {
            line(text, "", &[("type", Some("local".into())), ("path", path_value(Some(path)))]);
        }
        StoreSettings::S3(options) => line(text, "", &s3_entries(options)),
    }
}

fn s3_entries(options: &S3Options) -> Vec<(&'static str, Option<Value>)> {
    let value = |text: &Option<String>| text.as_deref().map(Value::from);
    vec![
        ("type", Some("s3".into())),
        ("bucket", Some(options.bucket.as_str().into())),
        ("prefix", Some(options.prefix.as_str().into())),
        ("region", value(&options.region)),
        ("endpoint", value(&options.endpoint)),
        ("path_style", Some(options.path_style.into())),
        ("profile", value(&options.profile)),
        ("access_key_id_file", path_value(options.access_key_id_file.as_ref())),
        ("secret_access_key_file", path_value(options.secret_access_key_file.as_ref())),
        ("session_token_file", path_value(options.session_token_file.as_ref())),
        ("storage_class", value(&options.storage_class)),
        ("sse", value(&options.sse)),
        ("sse_kms_key_id", value(&options.sse_kms_key_id)),
        ("ca_file", path_value(options.ca_file.as_ref())),
    ]
}

fn path_value(path: Option<&std::path::PathBuf>) -> Option<Value> {
    path.map(|path| Value::from(path.to_str().expect("paths in settings are checked to be UTF-8")))
}
