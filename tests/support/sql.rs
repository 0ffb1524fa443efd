//! A blocking SQL session over tokio-postgres.

use std::time::Duration;

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

pub type Row = Vec<Option<String>>;

/// One session. Everything comes back as text, as psql would show it.
pub struct Sql {
    client: Client,
    runtime: tokio::runtime::Runtime,
}

impl Sql {
    /// Connects with a libpq string.
    pub fn connect(settings: &str) -> Result<Sql, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = runtime.block_on(async {
            let connecting = tokio_postgres::connect(settings, NoTls);
            let (client, connection) = tokio::time::timeout(Duration::from_secs(10), connecting)
                .await
                .map_err(|_| "no connection within 10 s".to_owned())?
                .map_err(|error| describe(&error))?;
            tokio::spawn(connection);
            Ok::<_, String>(client)
        })?;
        Ok(Sql { client, runtime })
    }

    /// Runs one or more statements; the rows of all of them.
    pub fn try_rows(&self, sql: &str) -> Result<Vec<Row>, String> {
        let answer = self.runtime.block_on(self.client.simple_query(sql)).map_err(|error| describe(&error))?;
        let mut rows = Vec::new();
        for message in answer {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect());
            }
        }
        Ok(rows)
    }

    #[track_caller]
    pub fn rows(&self, sql: &str) -> Vec<Row> {
        self.try_rows(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    #[track_caller]
    pub fn run(&self, sql: &str) {
        self.rows(sql);
    }

    /// The first column of the first row; empty for NULL and for no row.
    #[track_caller]
    pub fn value(&self, sql: &str) -> String {
        self.rows(sql).into_iter().next().and_then(|row| row.into_iter().next().flatten()).unwrap_or_default()
    }
}

fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{}: {}", db.code().code(), db.message()),
        None => {
            let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
            format!("{error}{source}")
        }
    }
}
