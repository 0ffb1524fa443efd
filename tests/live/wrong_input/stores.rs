//! Worlds in which the repository lies in a store that is not as it should be.

use std::fs;

use super::worlds::{Plan, Worlds};
use crate::support::parts;
use crate::support::s3_double::S3Server;
use crate::support::s3_proxy::HttpFault;

impl Worlds {
    /// `None`: this name is of another kind of world.
    pub(super) fn in_a_store(&mut self, given: &str) -> Option<Plan> {
        let stage = self.stage.clone();
        let plan = match given {
            "a store that is down" => {
                let mut plan = self.stored();
                let endpoint = self.store.as_ref().expect("started").1.endpoint.clone();
                let port = parts::free_port();
                plan.repository = plan.repository.replace(&endpoint, &format!("http://127.0.0.1:{port}"));
                plan.named.push((format!("127.0.0.1:{port}"), "{nobody}"));
                // Long enough for an answer each time.
                plan.set("WALDEN_RESTORE__FETCH_TIMEOUT", "5s");
                plan
            }
            "a store that never answers" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Hang);
                plan
            }
            "an endpoint that is a PostgreSQL server" => {
                let mut plan = self.stored();
                let endpoint = self.store.as_ref().expect("started").1.endpoint.clone();
                let port = self.server().port;
                plan.repository = plan.repository.replace(&endpoint, &format!("http://127.0.0.1:{port}"));
                plan
            }
            "a bucket that is missing" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Status(404, "NoSuchBucket"));
                plan
            }
            "a key that nobody knows" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Status(403, "InvalidAccessKeyId"));
                plan
            }
            "a store that may not be listed" => {
                let plan = self.stored();
                self.faults().always("GET", "list-type", HttpFault::Status(403, "AccessDenied"));
                plan
            }
            "a web server instead of a store" => {
                let plan = self.stored();
                let page = "<!DOCTYPE html><html><body>Not found</body></html>";
                self.faults().always("", "", HttpFault::Page(404, page));
                plan
            }
            "a gateway that has lost its store" => {
                let plan = self.stored();
                let page = "<html><body><h1>502 Bad Gateway</h1></body></html>";
                self.faults().always("", "", HttpFault::Page(502, page));
                plan
            }
            "a wrong key" => {
                let plan = self.stored();
                stage.write(plan.home.join("secret_access_key"), "wrong");
                plan
            }
            "a key file that is missing" => {
                let plan = self.stored();
                fs::remove_file(plan.home.join("secret_access_key")).expect("it was written");
                plan
            }
            "a store that may only be read" => {
                let plan = self.stored();
                self.faults().always("PUT", "", HttpFault::Status(403, "AccessDenied"));
                plan
            }
            "a store that may not be read" => {
                let plan = self.stored();
                self.faults().always("GET", "", HttpFault::Status(403, "AccessDenied"));
                plan
            }
            "a clock that the store does not believe" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Status(403, "RequestTimeTooSkewed"));
                plan
            }
            "a store that is full" => {
                let plan = self.stored();
                self.faults().always("PUT", "", HttpFault::Status(507, "InsufficientStorage"));
                plan
            }
            "a store that is overloaded" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Status(503, "SlowDown"));
                plan
            }
            "a store that answers something else" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Body("<html>Welcome to the hotel's WLAN</html>".into()));
                plan
            }
            "a store in another region" => {
                let plan = self.stored();
                self.faults().always("", "", HttpFault::Headers(301, "x-amz-bucket-region: eu-central-1\r\n"));
                plan
            }
            "a store without conditional writes" => {
                let mut plan = self.stored();
                let (runtime, server) = self.store.as_ref().expect("started");
                let moto = runtime.block_on(S3Server::start_moto());
                for header in ["if-none-match", "if-match"] {
                    moto.faults().always("PUT", "", HttpFault::DropHeader(header));
                }
                plan.repository = plan.repository.replace(&server.endpoint, &moto.endpoint);
                plan.named.push((moto.endpoint.clone(), "{endpoint}"));
                plan.store = None;
                plan.held.push(Box::new(moto));
                plan
            }
            "a ca_file that is missing" => {
                let mut plan = self.stored();
                plan.repository.push_str(&format!("ca_file = \"{}\"\n", plan.home.join("ca.pem").display()));
                plan.repository = plan.repository.replace("http://", "https://");
                plan
            }
            _ => return None,
        };
        Some(plan)
    }
}
