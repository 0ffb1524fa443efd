//! The SDK's client for one bucket: TLS, credentials, time limits, and the store's clock as its answers tell it.
//!
//! TLS is rustls with aws-lc everywhere. The SDK tries twice at most; trying for hours is the business of the durable queue. Redirects are
//! not followed: they would carry signed requests to hosts that nobody named.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use aws_config::meta::region::RegionProviderChain;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, IdentityCache, Intercept, RequestChecksumCalculation, ResponseChecksumValidation, RuntimeComponents,
    SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_types::service_config::ServiceConfigKey;
use jiff::Timestamp;

use super::credentials::CredentialFiles;
use super::settings::S3Settings;
use super::tls::{http_client, read_authorities};
use crate::storage::{BoxError, StorageError};

const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(10);
/// A body that does not move for this long ends the try.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);
/// The slowest body that is waited for, in bytes a second.
const SLOWEST_BODY: u64 = 128 * 1024;
/// The slowest answer that is waited for, in bytes a second.
const SLOWEST_ANSWER: u64 = 16 * 1024;
/// How soon after each other refused credentials are looked up anew.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
const DEFAULT_REGION: &str = "us-east-1";

/// Makes the client, and makes it anew when its credentials were refused: a profile that was edited counts without a restart.
pub(super) struct Clients {
    settings: S3Settings,
    current: RwLock<Current>,
    clock: Arc<StoreClock>,
    /// Plain http beyond this host: nothing protects the connection, so bodies are hashed for the signature.
    pub(super) is_exposed: bool,
}

struct Current {
    client: Client,
    made: Instant,
    http: SharedHttpClient,
    /// What `ca_file` held when `http` was made, and when it was last looked at again.
    authorities: Option<Vec<u8>>,
    looked: Option<Instant>,
}

impl Clients {
    /// Asks no store. May ask the machine's metadata service for a region when nothing else names one.
    pub(super) async fn open(settings: S3Settings) -> Result<Self, StorageError> {
        let authorities = read_authorities(&settings).await?;
        let http = http_client(&settings, authorities.as_deref())?;
        let clock = Arc::new(StoreClock::default());
        let (client, is_exposed) = make_client(&settings, &http, &clock).await?;
        let current = RwLock::new(Current { client, made: Instant::now(), http, authorities, looked: None });
        Ok(Self { settings, current, clock, is_exposed })
    }

    pub(super) fn get(&self) -> Client {
        self.current.read().unwrap_or_else(PoisonError::into_inner).client.clone()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Current) -> T) -> T {
        change(&mut self.current.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// After a refusal of the credentials. Does nothing when that was tried a moment ago.
    pub(super) async fn reload(&self) {
        let http = self.change(|current| {
            let is_due = current.made.elapsed() >= RELOAD_INTERVAL;
            if is_due {
                current.made = Instant::now();
            }
            is_due.then(|| current.http.clone())
        });
        let Some(http) = http else { return };
        // If nothing better can be made, the old client serves on and its error is told.
        if let Ok((client, _)) = make_client(&self.settings, &http, &self.clock).await {
            self.change(|current| current.client = client);
        }
    }

    /// After a connection that failed: authorities that were exchanged in `ca_file` count from the next request on.
    pub(super) async fn reload_authorities(&self) {
        let before = self.change(|current| {
            let is_due = current.looked.is_none_or(|looked| looked.elapsed() >= RELOAD_INTERVAL);
            if is_due {
                current.looked = Some(Instant::now());
            }
            is_due.then(|| current.authorities.clone())
        });
        // A file that cannot be used now may be half written: the old authorities serve on, and the connection's error is told.
        let (Some(before), Ok(now)) = (before, read_authorities(&self.settings).await) else { return };
        if now == before {
            return;
        }
        let Ok(http) = http_client(&self.settings, now.as_deref()) else { return };
        if let Ok((client, _)) = make_client(&self.settings, &http, &self.clock).await {
            tracing::info!(repository = %self.settings.name, "`ca_file` has changed, and counts from now on");
            self.change(|current| (current.client, current.http, current.authorities) = (client, http, now));
        }
    }

    /// The store's clock minus this machine's, from the last answer.
    pub(super) fn skew_seconds(&self) -> Option<f64> {
        self.clock.skew_seconds()
    }

    /// How long one chunk of an answer's body may take.
    pub(super) fn chunk_timeout(&self) -> Duration {
        self.settings.request_timeout
    }

    /// How long an answer's body of `length` bytes may take in all. A store that sends a byte now and then is none that answers.
    pub(super) fn body_timeout(&self, length: u64) -> Duration {
        self.settings.request_timeout + Duration::from_secs(length / SLOWEST_ANSWER)
    }

    /// Time limits for a request with a body of `length` bytes.
    pub(super) fn time_limits(&self, length: u64) -> TimeoutConfig {
        time_limits(&self.settings, length)
    }
}

fn time_limits(settings: &S3Settings, length: u64) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(settings.request_timeout.min(CONNECT_TIMEOUT_MAX))
        .operation_attempt_timeout(settings.request_timeout + Duration::from_secs(length / SLOWEST_BODY))
        .build()
}

async fn make_client(
    settings: &S3Settings,
    http: &SharedHttpClient,
    clock: &Arc<StoreClock>,
) -> Result<(Client, bool), StorageError> {
    let shared = load_shared(settings, http).await;
    let endpoint = settings.endpoint.clone().or_else(|| endpoint_of(&shared));
    let region = match (&settings.region, shared.region()) {
        (Some(region), _) => Region::new(region.clone()),
        (None, Some(region)) => region.clone(),
        (None, None) if endpoint.is_some() => Region::from_static(DEFAULT_REGION),
        (None, None) => {
            let why = "no region is known: set `region`, AWS_REGION or the profile's region".to_owned();
            return Err(StorageError::Settings { url: settings.url(), why });
        }
    };
    let mut config = aws_sdk_s3::config::Builder::from(&shared)
        .region(region)
        .force_path_style(settings.path_style)
        .retry_config(retry_config())
        .timeout_config(time_limits(settings, 0))
        .stalled_stream_protection(stall_protection())
        // The checksums are ours, known before the request; the SDK would otherwise send file bodies as aws-chunked with a trailer,
        // which some stores refuse and some store as content.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .interceptor(ClockReader(clock.clone()));
    config.set_endpoint_url(endpoint.clone());
    if let Some(files) = CredentialFiles::of(settings) {
        // Without a cache the files are read for each request.
        config = config.credentials_provider(files).identity_cache(IdentityCache::no_cache());
    }
    let is_exposed = endpoint.is_some_and(|endpoint| is_exposed(&endpoint));
    Ok((Client::from_conf(config.build()), is_exposed))
}

/// The endpoint that the environment or the profile names: for S3 alone, else for all services.
fn endpoint_of(shared: &SdkConfig) -> Option<String> {
    let key =
        ServiceConfigKey::builder().service_id("S3").env("AWS_ENDPOINT_URL").profile("endpoint_url").build().ok()?;
    let of_s3 = shared.service_config().and_then(|config| config.load_config(key));
    of_s3.or_else(|| shared.endpoint_url().map(str::to_owned))
}

/// Whether an endpoint is spoken to without TLS over a network.
fn is_exposed(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else { return false };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let address = host.parse::<SocketAddr>().map(|address| address.ip()).or_else(|_| {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        bare.unwrap_or(host).parse::<IpAddr>()
    });
    match address {
        Ok(address) => !address.is_loopback(),
        Err(_) => host != "localhost" && host.split_once(':').is_none_or(|(name, _)| name != "localhost"),
    }
}

async fn load_shared(settings: &S3Settings, http: &SharedHttpClient) -> SdkConfig {
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http.clone())
        .retry_config(retry_config())
        .timeout_config(time_limits(settings, 0))
        .stalled_stream_protection(stall_protection());
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    let region = settings.region.clone().map(Region::new);
    if region.is_some() || settings.endpoint.is_some() {
        // A compatible store is not asked about in the metadata service of a cloud.
        let mut profile = aws_config::profile::region::Builder::default();
        if let Some(name) = &settings.profile {
            profile = profile.profile_name(name);
        }
        let chain = RegionProviderChain::first_try(region)
            .or_else(aws_config::environment::EnvironmentVariableRegionProvider::new())
            .or_else(profile.build())
            .or_else(Region::from_static(DEFAULT_REGION));
        loader = loader.region(chain);
    }
    if let Some(files) = CredentialFiles::of(settings) {
        loader = loader.credentials_provider(files);
    }
    loader.load().await
}

fn retry_config() -> RetryConfig {
    RetryConfig::standard().with_max_attempts(2).with_max_backoff(Duration::from_secs(2))
}

fn stall_protection() -> StalledStreamProtectionConfig {
    StalledStreamProtectionConfig::enabled()
        .upload_enabled(true)
        .download_enabled(true)
        .grace_period(STALL_TIMEOUT)
        .build()
}

/// The store's clock minus this machine's in milliseconds; `i64::MIN` before the first answer.
struct StoreClock(AtomicI64);

impl Default for StoreClock {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MIN))
    }
}

impl StoreClock {
    fn skew_seconds(&self) -> Option<f64> {
        let milliseconds = self.0.load(Ordering::Relaxed);
        // Exact: a skew of milliseconds has far less than 53 bits.
        (milliseconds != i64::MIN).then_some(milliseconds as f64 / 1000.0)
    }

    fn note(&self, date: &str, now: SystemTime) {
        let (Some(date), Ok(now)) = (parse_date(date), Timestamp::try_from(now)) else { return };
        // `Date` has whole seconds, cut off: half a second is the best guess for the rest.
        self.0.store(date.as_millisecond() + 500 - now.as_millisecond(), Ordering::Relaxed);
    }
}

/// The date of an HTTP answer: `Sat, 21 Nov 2026 02:10:00 GMT` (RFC 9110, IMF-fixdate).
fn parse_date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()
}

/// Reads the `Date` of each answer.
struct ClockReader(Arc<StoreClock>);

impl fmt::Debug for ClockReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClockReader")
    }
}

impl Intercept for ClockReader {
    fn name(&self) -> &'static str {
        "ClockReader"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(date) = context.response().headers().get("date") {
            self.0.note(date, SystemTime::now());
        }
        Ok(())
    }
}

/// Signs a request with the hash of its body, or, where TLS or the loopback protects it, without (the checksum in the header covers it).
#[derive(Debug)]
pub(super) struct PayloadSignature(pub(super) Option<String>);

impl Intercept for PayloadSignature {
    fn name(&self) -> &'static str {
        "PayloadSignature"
    }

    fn modify_before_signing(
        &self,
        _context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        use aws_runtime::auth::PayloadSigningOverride;
        config.interceptor_state().store_put(match &self.0 {
            Some(sha256) => PayloadSigningOverride::Precomputed(sha256.clone()),
            None => PayloadSigningOverride::UnsignedPayload,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_an_answer_gives_the_skew() {
        let clock = StoreClock::default();
        assert_eq!(clock.skew_seconds(), None);
        let now = SystemTime::from(parse_date("Sat, 21 Nov 2026 02:10:00 GMT").unwrap());
        clock.note("Sat, 21 Nov 2026 03:10:00 GMT", now);
        assert_eq!(clock.skew_seconds(), Some(3600.5));
        clock.note("nonsense", now);
        assert_eq!(clock.skew_seconds(), Some(3600.5));
    }

    #[test]
    fn only_plain_http_over_a_network_is_exposed() {
        for endpoint in
            ["http://10.0.0.1:9000", "http://minio.local", "http://127.evil.example:80", "http://localhost.example"]
        {
            assert!(is_exposed(endpoint), "{endpoint}");
        }
        for endpoint in [
            "https://10.0.0.1",
            "http://127.0.0.1:9000",
            "http://[::1]:9000/",
            "http://[::1]",
            "http://localhost:9000",
            "http://localhost",
        ] {
            assert!(!is_exposed(endpoint), "{endpoint}");
        }
    }

    #[test]
    fn bodies_get_time_by_their_size() {
        let settings = S3Settings { request_timeout: Duration::from_secs(60), ..S3Settings::new("b") };
        let limit = |length| time_limits(&settings, length).operation_attempt_timeout().unwrap();
        assert_eq!(limit(0), Duration::from_secs(60));
        assert_eq!(limit(64 * 1024 * 1024), Duration::from_secs(60 + 512));
    }
}
