//! Keys that come from files, read again for each request, so that they can be changed while Walden runs. The other sources of credentials
//! (environment, profile, process, web identity, container, instance) are the SDK's.

use std::path::{Path, PathBuf};

use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future;
use aws_sdk_s3::config::{Credentials, ProvideCredentials};

use super::settings::S3Settings;
use crate::storage::BoxError;

/// Bound of a file that holds a key, in bytes.
const KEY_FILE_MAX: u64 = 64 * 1024;

/// Reads a small file on a blocking thread.
pub(super) async fn read_bounded(path: PathBuf, bytes_max: u64) -> Result<Vec<u8>, String> {
    let read = move || {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(|error| format!("cannot be opened: {error}"))?;
        file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|error| format!("cannot be read: {error}"))?;
        if bytes.len() as u64 > bytes_max { Err(format!("is larger than {bytes_max} bytes")) } else { Ok(bytes) }
    };
    tokio::task::spawn_blocking(read).await.map_err(|error| error.to_string())?
}

/// Keys in files. `Debug` shows the paths.
#[derive(Clone, Debug)]
pub(super) struct CredentialFiles {
    access_key_id: PathBuf,
    secret_access_key: PathBuf,
    session_token: Option<PathBuf>,
}

impl CredentialFiles {
    pub(super) fn of(settings: &S3Settings) -> Option<Self> {
        Some(Self {
            access_key_id: settings.access_key_id_file.clone()?,
            secret_access_key: settings.secret_access_key_file.clone()?,
            session_token: settings.session_token_file.clone(),
        })
    }

    async fn read(&self) -> Result<Credentials, CredentialsError> {
        let session_token = match &self.session_token {
            Some(path) => Some(read_key(path).await?),
            None => None,
        };
        let (id, secret) = (read_key(&self.access_key_id).await?, read_key(&self.secret_access_key).await?);
        Ok(Credentials::new(id, secret, session_token, None, "files"))
    }
}

async fn read_key(path: &Path) -> Result<String, CredentialsError> {
    let wrong = |why: &str| CredentialsError::provider_error(BoxError::from(format!("{} {why}", path.display())));
    let bytes = read_bounded(path.to_owned(), KEY_FILE_MAX).await.map_err(|why| wrong(&why))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("is not text"))?.trim();
    if text.is_empty() || text.contains(|c: char| c.is_control() || c == ' ') {
        return Err(wrong("must hold the key alone, on one line"));
    }
    Ok(text.to_owned())
}

impl ProvideCredentials for CredentialFiles {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.read())
    }
}

#[cfg(test)]
mod tests {
    use super::super::errors::Cause;
    use super::*;

    #[tokio::test]
    async fn keys_are_read_from_files_each_time_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let settings = S3Settings {
            access_key_id_file: Some(write("id", "AKIDCANARY\n")),
            secret_access_key_file: Some(write("secret", "SECRETCANARY\n")),
            ..S3Settings::new("b")
        };
        let files = CredentialFiles::of(&settings).unwrap();
        let first = files.read().await.unwrap();
        assert_eq!((first.access_key_id(), first.secret_access_key()), ("AKIDCANARY", "SECRETCANARY"));
        for shown in [format!("{files:?}"), format!("{settings:?}"), format!("{first:?}")] {
            assert!(!shown.contains("SECRETCANARY"), "{shown}");
        }
        write("secret", "SECRETCANARY2");
        assert_eq!(files.read().await.unwrap().secret_access_key(), "SECRETCANARY2");
        write("secret", "SECRETCANARY\nSECRETCANARY");
        let error = Cause::of(&files.read().await.unwrap_err()).to_string();
        assert!(error.contains("on one line") && !error.contains("SECRETCANARY"), "{error}");
        std::fs::remove_file(folder.path().join("secret")).unwrap();
        assert!(files.read().await.is_err());
    }
}
