//! What a failed request means. A store's answer is outside input: its text is cut and cleaned before anyone sees it.

use std::error::Error;
use std::fmt;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::storage::StorageError;

/// The longest text of a cause, in characters.
const CAUSE_CHARS_MAX: usize = 300;

/// What the SDK and its HTTP client wrap around a reason, in their own words.
const WRAPPERS: [&str; 10] = [
    "an error occurred while loading credentials",
    "service error",
    "dispatch failure",
    "io error",
    "timeout",
    "other",
    "client error (Connect)",
    "client error (SendRequest)",
    "tcp connect error",
    "dns error",
];

/// A request that did not succeed.
#[derive(Debug)]
pub(super) struct Refusal {
    kind: Kind,
    /// The HTTP status, where an answer came.
    pub(super) status: Option<u16>,
    /// The store's error code; empty where the answer has none (answers to HEAD have no body).
    pub(super) code: String,
    /// The region that the store says the bucket is in.
    region: Option<String>,
    cause: Cause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The store answered.
    Answer,
    /// The store answered something that cannot be parsed.
    Unreadable,
    /// A page for a browser came instead of an answer.
    WebPage,
    /// No answer in time.
    Timeout,
    /// The connection failed or broke.
    Connection,
    /// There are no credentials to sign with.
    Credentials,
}

/// The text of an SDK error and of what caused it, without the request or the answer, whose `Debug` might show more than is good.
#[derive(Debug)]
pub(super) struct Cause(String);

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Cause {}

impl Cause {
    pub(super) fn new(text: &str) -> Self {
        Self(text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(CAUSE_CHARS_MAX).collect())
    }

    pub(super) fn of(error: &(dyn Error + 'static)) -> Self {
        let mut texts: Vec<String> = Vec::new();
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            let says_nothing = WRAPPERS.contains(&text.as_str());
            if !says_nothing && texts.last().is_none_or(|last| !last.contains(&text)) {
                texts.push(text);
            }
            next = error.source();
        }
        Self::new(&texts.join(": "))
    }
}

impl<E> From<SdkError<E, HttpResponse>> for Refusal
where
    E: ProvideErrorMetadata + Error + Send + Sync + 'static,
{
    fn from(error: SdkError<E, HttpResponse>) -> Self {
        let response = error.raw_response();
        let status = response.map(|response| response.status().as_u16());
        let region = response.and_then(|response| response.headers().get("x-amz-bucket-region")).map(str::to_owned);
        let metadata = error.as_service_error().map(ProvideErrorMetadata::meta);
        let code = metadata.and_then(|metadata| metadata.code()).unwrap_or_default();
        let code: String = code.chars().filter(|c| c.is_ascii_graphic()).take(64).collect();
        let is_web_page = response.is_some_and(is_web_page);
        let kind = match &error {
            // A gateway's page about a store that is down says 5xx, and that is what counts then.
            _ if is_web_page && status.is_some_and(|status| status < 500 && status != 429) => Kind::WebPage,
            SdkError::TimeoutError(_) => Kind::Timeout,
            SdkError::DispatchFailure(failure) if failure.is_timeout() => Kind::Timeout,
            SdkError::ServiceError(_) if code.is_empty() && status.is_some_and(|status| status < 300) => {
                Kind::Unreadable
            }
            SdkError::ServiceError(_) => Kind::Answer,
            SdkError::ResponseError(_) => Kind::Unreadable,
            _ if chain(&error).any(|cause| cause.is::<CredentialsError>()) => Kind::Credentials,
            _ => Kind::Connection,
        };
        let cause = match (metadata.and_then(|metadata| metadata.message()), status) {
            (Some(message), _) if kind == Kind::Answer => Cause::new(message),
            (None, Some(status)) if kind == Kind::Answer => Cause::new(&format!("the store answered {status}")),
            // The SDK takes it for a bug of its own, which helps nobody.
            _ if kind == Kind::Unreadable => Cause::new("the answer is not one of S3's, or it was cut on its way"),
            (_, Some(status)) if kind == Kind::WebPage => {
                Cause::new(&format!("status {status} with a web page instead of an answer"))
            }
            _ if kind == Kind::Timeout => Cause::new("no answer came in time"),
            _ => Cause::of(&error),
        };
        Self { kind, status, code, region, cause }
    }
}

/// Whether an answer is made for a browser: the console of a store, a login page, somebody else's server.
fn is_web_page(response: &HttpResponse) -> bool {
    let mut bytes = response.body().bytes().unwrap_or_default().trim_ascii_start();
    bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let begins = |tag: &[u8]| bytes.get(..tag.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(tag));
    is_web_type(response.headers().get("content-type")) || begins(b"<html") || begins(b"<!doctype html")
}

/// Nothing that Walden stores, and no answer of S3, has this type.
pub(super) fn is_web_type(content_type: Option<&str>) -> bool {
    content_type.is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("text/html"))
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

impl Refusal {
    /// The condition of the request was not met.
    pub(super) fn is_precondition_failed(&self) -> bool {
        self.status == Some(412)
    }

    /// Another conditional request for the key is under way; whoever asks again gets a clear answer.
    pub(super) fn is_conflict(&self) -> bool {
        self.status == Some(409) && matches!(self.code.as_str(), "ConditionalRequestConflict" | "OperationAborted")
    }

    /// The store does not know a header or an operation.
    pub(super) fn is_not_implemented(&self) -> bool {
        self.status == Some(501) || self.code == "NotImplemented"
    }

    /// A definite "no such object": the store says so by code. A bare 404 might come from anything between.
    pub(super) fn is_no_such_key(&self) -> bool {
        self.code == "NoSuchKey"
    }

    pub(super) fn is_not_found(&self) -> bool {
        self.status == Some(404)
    }

    pub(super) fn is_range_beyond_end(&self) -> bool {
        self.status == Some(416)
    }

    pub(super) fn is_no_such_upload(&self) -> bool {
        self.code == "NoSuchUpload"
    }

    /// The bytes that arrived are not those that the checksum is of.
    pub(super) fn is_bad_digest(&self) -> bool {
        matches!(
            self.code.as_str(),
            "BadDigest" | "InvalidDigest" | "XAmzContentSHA256Mismatch" | "XAmzContentChecksumMismatch"
        )
    }

    /// No answer came, though the store may have had one: it closed the connection on a body that it did not want.
    pub(super) fn is_broken_connection(&self) -> bool {
        self.kind == Kind::Connection
    }

    /// The answer came and could not be parsed.
    pub(super) fn is_unreadable(&self) -> bool {
        self.kind == Kind::Unreadable
    }

    /// Other credentials might be let in.
    pub(super) fn is_denied(&self) -> bool {
        self.kind == Kind::Credentials
            || matches!(self.status, Some(401 | 403))
            || matches!(self.code.as_str(), "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired")
    }

    /// Whether it matters who was asked: nobody answered, or somebody else.
    pub(super) fn is_about_the_endpoint(&self) -> bool {
        matches!(self.kind, Kind::Timeout | Kind::Connection | Kind::WebPage)
    }

    /// With who was asked in front of the cause.
    pub(super) fn asked(mut self, endpoint: &str) -> Self {
        self.cause = Cause::new(&format!("{endpoint}: {}", self.cause));
        self
    }

    /// `what` is for people: "storing main/…"; `key` is what it was about.
    pub(super) fn into_error(self, url: &str, what: &str, key: &str, skew_seconds: Option<f64>) -> StorageError {
        let (url, what) = (url.to_owned(), what.to_owned());
        let is_denied = self.is_denied();
        let source = Some(Box::new(self.cause) as _);
        let code = self.code;
        if self.kind == Kind::Credentials {
            return StorageError::Denied { url, what, code: "no credentials".to_owned(), source };
        }
        if self.kind == Kind::WebPage {
            return StorageError::NotAStore { url, what, source };
        }
        if matches!(self.kind, Kind::Timeout | Kind::Connection) {
            return StorageError::Unavailable { url, what, source };
        }
        match (code.as_str(), self.status) {
            ("NoSuchBucket", _) => StorageError::NoBucket { url, source },
            ("NoSuchKey", _) => StorageError::NotFound { url, key: key.to_owned() },
            ("RequestTimeTooSkewed", _) => {
                let by = skew_seconds.map_or_else(String::new, |skew| format!(" by {:.0} s", skew.abs()));
                let code = format!(
                    "RequestTimeTooSkewed: the clocks of this machine and of the store differ{by}, correct them"
                );
                StorageError::Denied { url, what, code, source }
            }
            ("PermanentRedirect" | "TemporaryRedirect" | "IllegalLocationConstraintException", _)
            | (_, Some(301 | 302 | 307 | 308)) => {
                let why = match self.region {
                    Some(region) => format!("the bucket is in another region: set `region = {region:?}`"),
                    None => "the store sends the request elsewhere: correct `region` or `endpoint`".to_owned(),
                };
                StorageError::Refused { url, why, source: None }
            }
            ("AuthorizationHeaderMalformed", _) if self.region.is_some() => {
                let region = self.region.unwrap_or_default();
                let why = format!("the bucket is in another region: set `region = {region:?}`");
                StorageError::Refused { url, why, source: None }
            }
            ("InvalidBucketName" | "InvalidStorageClass", _) => {
                StorageError::Refused { url, why: format!("the store refuses a setting ({code})"), source }
            }
            // A key that is disabled, about to be deleted, or not there.
            (code, _) if code.starts_with("KMS.") && code != "KMS.ThrottlingException" => {
                let why = format!("the store cannot use the encryption key ({code})");
                StorageError::Refused { url, why, source }
            }
            ("QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage", _) | (_, Some(507)) => {
                StorageError::Full { url, key: key.to_owned(), source }
            }
            ("SlowDown" | "ServiceUnavailable" | "RequestLimitExceeded" | "Throttling" | "ThrottlingException", _)
            | ("KMS.ThrottlingException", _)
            | (_, Some(429 | 503)) => StorageError::Throttled { url, what, source },
            _ if is_denied => {
                let code = if code.is_empty() { format!("status {}", self.status.unwrap_or(0)) } else { code };
                StorageError::Denied { url, what, code, source }
            }
            _ => StorageError::Unavailable { url, what, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::NextStep;

    fn answer(status: u16, code: &str) -> StorageError {
        let refusal = Refusal {
            kind: Kind::Answer,
            status: Some(status),
            code: code.to_owned(),
            region: (status == 301).then(|| "eu-west-1".to_owned()),
            cause: Cause::new("said so"),
        };
        refusal.into_error("s3://b", "storing k", "k", Some(-3600.4))
    }

    #[test]
    fn each_answer_has_its_meaning() {
        assert!(matches!(answer(404, "NoSuchBucket"), StorageError::NoBucket { .. }));
        assert!(matches!(answer(404, "NoSuchKey"), StorageError::NotFound { .. }));
        // Anything may answer 404 without a code: a proxy, a load balancer, a wrong endpoint.
        assert!(matches!(answer(404, ""), StorageError::Unavailable { .. }));
        for code in ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", ""] {
            assert!(matches!(answer(403, code), StorageError::Denied { .. }), "{code}");
        }
        assert!(matches!(answer(400, "ExpiredToken"), StorageError::Denied { .. }));
        for (status, code) in [(503, "SlowDown"), (503, ""), (429, "TooManyRequests")] {
            assert!(matches!(answer(status, code), StorageError::Throttled { .. }), "{status} {code}");
        }
        assert!(matches!(answer(500, "InternalError"), StorageError::Unavailable { .. }));
        assert!(matches!(answer(400, "RequestTimeout"), StorageError::Unavailable { .. }));
        assert!(matches!(answer(507, "XMinioStorageFull"), StorageError::Full { .. }));
        let redirect = answer(301, "PermanentRedirect");
        assert!(redirect.to_string().contains("eu-west-1"), "{redirect}");
        assert!(matches!(redirect, StorageError::Refused { .. }));
        for code in ["KMS.DisabledException", "KMS.NotFoundException", "InvalidStorageClass"] {
            let refused = answer(400, code);
            assert!(matches!(refused, StorageError::Refused { .. }), "{code}");
            assert_eq!(refused.next_step(), NextStep::Retry, "a store that is mended is used again");
        }
        let skewed = answer(403, "RequestTimeTooSkewed");
        assert!(skewed.to_string().contains("by 3600 s"), "{skewed}");
    }

    #[test]
    fn a_web_page_is_known_by_its_type_or_its_beginning() {
        let page = |content_type: &str, body: &str| {
            let status = aws_smithy_runtime_api::http::StatusCode::try_from(200).unwrap();
            let mut answer = HttpResponse::new(status, aws_smithy_types::body::SdkBody::from(body));
            answer.headers_mut().insert("content-type", content_type.to_owned());
            is_web_page(&answer)
        };
        assert!(page("text/html; charset=utf-8", ""));
        assert!(page("TEXT/HTML", "anything"));
        for body in ["<html>", "\n <!DOCTYPE html><html>", "\u{feff}<HTML lang=\"en\">"] {
            assert!(page("application/xml", body), "{body:?}");
        }
        for body in ["", "<?xml version=\"1.0\"?><Error/>", "<htm", "html"] {
            assert!(!page("application/xml", body), "{body:?}");
        }
    }

    #[test]
    fn a_hostile_message_is_cut_and_cleaned() {
        let cause = Cause::new(&format!("a\nb\u{1b}[31m{}", "x".repeat(10_000)));
        assert_eq!(cause.0.chars().count(), CAUSE_CHARS_MAX);
        assert!(!cause.0.contains(char::is_control));
    }
}
