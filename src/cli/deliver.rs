//! What `wal-fetch` does once its arguments and settings are read.

use super::error::CliError;
use super::reading;
use super::wal_fetch::{Fetched, NOT_DELIVERED, Wanted};
use crate::config::Settings;
use crate::restore::{self, FetchOutcome, FetchRequest, PlanFile};

/// Delivers the wanted file, or proves that it does not exist. Everything else is an error, whose exit status is always 255.
pub fn deliver(settings: &Settings, wanted: &Wanted) -> Result<Fetched, CliError> {
    let as_fetch = |mut error: CliError| {
        error.code = NOT_DELIVERED;
        error
    };
    let plan = match &wanted.plan {
        Some(path) => Some(PlanFile::read(path).map_err(|error| as_fetch(error.into()))?),
        None => None,
    };
    let request = FetchRequest {
        plan,
        system: wanted.system,
        name: wanted.name.clone(),
        path: wanted.path.clone(),
        patience: settings.restore.fetch_timeout,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| CliError::from_error(NOT_DELIVERED, &error, "check the limits of this user"))?;
    let outcome = runtime.block_on(async {
        let repositories = reading::open(settings).await?;
        restore::wal_fetch(&repositories, &request).await.map_err(CliError::from)
    });
    match outcome {
        Ok(FetchOutcome::Delivered) => Ok(Fetched::Delivered),
        Ok(FetchOutcome::ProvenAbsent) => Ok(Fetched::ProvenAbsent),
        Err(error) => Err(as_fetch(error)),
    }
}
