//! A repository for a test that should not care where it lies: a folder, or an S3 server that keeps its objects as files.

use std::path::PathBuf;

use super::s3_double::{ACCESS_KEY, S3Server, SECRET_KEY};
use super::{Postgres, Stage, Walden};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Local,
    S3,
}

/// An empty one. Dropping it stops its server.
pub struct Store {
    /// Where its objects lie as files, whatever serves them.
    pub folder: PathBuf,
    table: String,
    _server: Option<(S3Server, tokio::runtime::Runtime)>,
}

impl Store {
    pub fn start(stage: &Stage, kind: Kind) -> Store {
        if kind == Kind::Local {
            let folder = stage.join("archive");
            let table = format!("[[repository]]\nname = \"main\"\ntype = \"local\"\npath = \"{}\"\n", folder.display());
            return Store { folder, table, _server: None };
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let objects = stage.make_dir("s3");
        let server = runtime.block_on(S3Server::start_s3s(&objects));
        // In files, since PostgreSQL's own environment has no keys when it calls wal-fetch.
        let key = |name: &str, content: &str| stage.write(name, content).display().to_string();
        let table = format!(
            "[[repository]]\nname = \"main\"\ntype = \"s3\"\nbucket = \"{}\"\nprefix = \"deep/down\"\nregion = \"us-east-1\"\n\
             endpoint = \"{}\"\npath_style = true\naccess_key_id_file = \"{}\"\nsecret_access_key_file = \"{}\"\n",
            server.bucket,
            server.endpoint,
            key("access-key-id", ACCESS_KEY),
            key("secret-access-key", SECRET_KEY),
        );
        let folder = objects.join(&server.bucket).join("deep/down");
        Store { folder, table, _server: Some((server, runtime)) }
    }

    /// As [`Walden::local`], over this repository.
    pub fn walden(&self, stage: &Stage, postgres: &Postgres, more: &str) -> Walden {
        Walden::with_repository(stage, postgres, &format!("{}[backup]\ninitial = false\n{more}", self.table))
    }
}
