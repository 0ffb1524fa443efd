use std::sync::Arc;

use crate::archive::Target;
use crate::config::{RepositorySettings, S3Options, Settings, StoreSettings, UploadSettings};
use crate::postgres::{ConnectSettings, PostgresError};
use crate::repository::Repository;
use crate::storage::{self, ObjectStore, S3Settings, StorageError};

use super::DaemonError;

/// libpq's settings with the environment of this process.
pub fn postgres_settings(settings: &Settings) -> Result<ConnectSettings, PostgresError> {
    let postgres = &settings.postgres;
    ConnectSettings::resolve(
        postgres.url.expose(),
        postgres.password_file.as_deref(),
        &postgres.application_name,
        postgres.connect_timeout,
        &|name| std::env::var(name).ok(),
    )
}

/// Opens every repository of the configuration to read from. One that cannot be opened says so when it is asked, so that the others can
/// serve; that none can be opened is an error.
pub async fn open_to_read(settings: &Settings) -> Result<Vec<Repository>, DaemonError> {
    let (mut repositories, mut opened, mut failed) = (Vec::new(), false, None);
    for repository in &settings.repositories {
        let store = match open_store(repository, &settings.upload).await {
            Ok(store) => {
                opened = true;
                store
            }
            Err(StorageError::Settings { url, why }) => {
                tracing::debug!(repository = repository.name, why, "this repository cannot be opened");
                failed.get_or_insert(StorageError::Settings { url: url.clone(), why: why.clone() });
                storage::unopened(url, why)
            }
            Err(error) => return Err(error.into()),
        };
        repositories.push(Repository::new(&repository.name, &settings.archive.cluster, store)?);
    }
    match failed {
        Some(error) if !opened => Err(error.into()),
        _ => Ok(repositories),
    }
}

/// Opens every repository of the configuration. No store is asked anything yet.
pub async fn open_targets(settings: &Settings) -> Result<Vec<Target>, DaemonError> {
    let mut targets = Vec::new();
    for repository in &settings.repositories {
        let store = open_store(repository, &settings.upload).await?;
        targets.push(Target {
            repository: Repository::new(&repository.name, &settings.archive.cluster, store.clone())?,
            store,
            required: repository.required,
            single_writer: repository.single_writer,
        });
    }
    Ok(targets)
}

async fn open_store(
    repository: &RepositorySettings,
    upload: &UploadSettings,
) -> Result<Arc<dyn ObjectStore>, StorageError> {
    match &repository.store {
        StoreSettings::Local { path } => Ok(storage::open_local(path)),
        StoreSettings::S3(options) => storage::open_s3(s3_settings(&repository.name, options, upload)?).await,
    }
}

fn s3_settings(name: &str, options: &S3Options, upload: &UploadSettings) -> Result<S3Settings, StorageError> {
    let unknown = |why| StorageError::Settings { url: format!("s3://{}", options.bucket), why };
    let sse = options.sse.as_deref().map(str::parse).transpose().map_err(unknown)?;
    Ok(S3Settings {
        name: name.into(),
        bucket: options.bucket.clone(),
        prefix: options.prefix.clone(),
        region: options.region.clone(),
        endpoint: options.endpoint.clone(),
        path_style: options.path_style,
        profile: options.profile.clone(),
        access_key_id_file: options.access_key_id_file.clone(),
        secret_access_key_file: options.secret_access_key_file.clone(),
        session_token_file: options.session_token_file.clone(),
        storage_class: options.storage_class.clone(),
        sse,
        sse_kms_key_id: options.sse_kms_key_id.clone(),
        ca_file: options.ca_file.clone(),
        request_timeout: upload.request_timeout,
        concurrency: upload.concurrency,
    })
}
