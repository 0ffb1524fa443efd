//! What only a store on the network can get wrong, and what goes over the wire.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt;
use walden::storage::{Body, PutOutcome, S3Settings, ServerSideEncryption, StorageError, open_s3};

use super::suite::{Store, file_of, noise, put, read};
use crate::support::s3_double::{BUCKET, S3Server, SECRET_KEY};
use crate::support::s3_proxy::{HttpFault, Request};
use crate::support::s3_tls::TlsFront;

struct Double {
    server: S3Server,
    store: Store,
    _folder: tempfile::TempDir,
}

async fn double() -> Double {
    double_with(|settings| settings).await
}

async fn double_with(change: impl FnOnce(S3Settings) -> S3Settings) -> Double {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start_s3s(folder.path()).await;
    let store = open_s3(change(server.settings())).await.unwrap();
    Double { server, store, _folder: folder }
}

impl Double {
    fn sent(&self, method: &str, path_part: &str) -> Vec<Request> {
        self.server
            .faults()
            .requests()
            .into_iter()
            .filter(|r| r.method == method && r.path.contains(path_part))
            .collect()
    }
}

#[tokio::test]
async fn a_put_carries_checksum_length_and_condition_and_is_never_chunked() {
    let double = double().await;
    let content = noise(1_000_000, 1);
    let file = file_of(&content);
    let stored = [b"head", &content[..]].concat();
    let range = Body::FileRange {
        path: file.path().to_owned(),
        offset: 0,
        length: 1_000_000,
        prefix: Bytes::from_static(b"head"),
        suffix: Bytes::new(),
    };
    let sealed = Body::SealedFile { path: file.path().to_owned(), length: 1_000_000, goes: true };
    for (key, body, bytes) in [
        ("wire/range", range, &stored[..]),
        ("wire/sealed", sealed, &content[..]),
        ("wire/bytes", Body::Bytes(content.clone()), &content[..]),
        ("wire/empty", Body::Bytes(Bytes::new()), b""),
    ] {
        let crc32 = crc32fast::hash(bytes);
        assert_eq!(double.store.put_new(key, &body, crc32).await.unwrap(), PutOutcome::Created);
        let requests = double.sent("PUT", key);
        assert_eq!(requests.len(), 1, "{key}: one request, at the first try");
        let request = &requests[0];
        let text = aws_smithy_types::base64::encode(crc32.to_be_bytes());
        assert_eq!(request.header("x-amz-checksum-crc32"), Some(text.as_str()), "{key}");
        assert_eq!(request.header("content-length"), Some(bytes.len().to_string().as_str()), "{key}");
        assert_eq!(request.header("if-none-match"), Some("*"), "{key}");
        for absent in ["content-encoding", "transfer-encoding", "x-amz-decoded-content-length", "x-amz-trailer"] {
            assert_eq!(request.header(absent), None, "{key}: {absent}");
        }
        // Nobody stands in between on the loopback: the signed checksum is enough, as under TLS.
        assert_eq!(request.header("x-amz-content-sha256"), Some("UNSIGNED-PAYLOAD"), "{key}");
        assert!(request.body == bytes, "{key}: the bytes and nothing around them");
    }
}

#[tokio::test]
async fn settings_reach_the_wire() {
    let double = double_with(|settings| S3Settings {
        prefix: "/deep/prefix/".to_owned(),
        storage_class: Some("REDUCED_REDUNDANCY".to_owned()),
        sse: Some(ServerSideEncryption::AwsKms),
        sse_kms_key_id: Some("key-7".to_owned()),
        region: Some("eu-central-1".to_owned()),
        ..settings
    })
    .await;
    put(&double.store, "a", &Bytes::from_static(b"x")).await.unwrap();
    let request = &double.sent("PUT", "")[0];
    assert!(request.path.starts_with(&format!("/{BUCKET}/deep/prefix/a")), "{}", request.path);
    assert_eq!(request.header("x-amz-storage-class"), Some("REDUCED_REDUNDANCY"));
    assert_eq!(request.header("x-amz-server-side-encryption"), Some("aws:kms"));
    assert_eq!(request.header("x-amz-server-side-encryption-aws-kms-key-id"), Some("key-7"));
    assert!(request.header("authorization").unwrap().contains("/eu-central-1/s3/"));
    assert_eq!(double.store.url(), format!("s3://{BUCKET}/deep/prefix"));
}

/// Before a probe the store is not trusted to honour the condition, after one that passed there is no question more.
#[tokio::test]
async fn a_proven_store_is_not_asked_before_each_write() {
    let double = double().await;
    put(&double.store, "a", &Bytes::new()).await.unwrap();
    assert_eq!(double.sent("GET", "/a").len(), 1);
    let abilities = double.store.probe("check/").await.unwrap();
    assert!(abilities.conditional_create && abilities.conditional_update && abilities.checksums, "{abilities:?}");
    put(&double.store, "b", &Bytes::new()).await.unwrap();
    assert_eq!(double.sent("GET", "/b").len() + double.sent("HEAD", "/b").len(), 0);
}

#[tokio::test]
async fn errors_have_their_kind_and_say_what_to_do() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    let kind = |error: &StorageError| match error {
        StorageError::Denied { .. } => "denied",
        StorageError::NoBucket { .. } => "no bucket",
        StorageError::Throttled { .. } => "throttled",
        StorageError::Unavailable { .. } => "unavailable",
        StorageError::NotAStore { .. } => "no store",
        StorageError::Refused { .. } => "refused",
        StorageError::Full { .. } => "full",
        _ => "other",
    };
    for (fault, expected) in [
        (HttpFault::Status(403, "AccessDenied"), "denied"),
        (HttpFault::Status(403, "SignatureDoesNotMatch"), "denied"),
        (HttpFault::Status(400, "ExpiredToken"), "denied"),
        (HttpFault::Status(403, "RequestTimeTooSkewed"), "denied"),
        (HttpFault::Status(404, "NoSuchBucket"), "no bucket"),
        (HttpFault::Status(404, ""), "unavailable"),
        (HttpFault::Status(503, "SlowDown"), "throttled"),
        (HttpFault::Status(429, "TooManyRequests"), "throttled"),
        (HttpFault::Status(500, "InternalError"), "unavailable"),
        (HttpFault::Status(507, "XMinioStorageFull"), "full"),
        (HttpFault::Headers(301, "x-amz-bucket-region: eu-west-3\r\nlocation: http://192.0.2.1/\r\n"), "refused"),
        (HttpFault::Headers(307, "location: http://192.0.2.1/\r\n"), "refused"),
        (HttpFault::Status(400, "KMS.DisabledException"), "refused"),
        // An upload is looked at by HEAD, whose answer has no page to show.
        (HttpFault::Body("<html>login</html>".to_owned()), "unavailable"),
    ] {
        double.server.faults().always("PUT", "", fault.clone());
        double.server.faults().always("GET", "", fault.clone());
        let put_error = put(&double.store, "a", &noise(100, 1)).await;
        // A proxy's page answered 200 to a PUT is caught by asking for the object.
        let put_error = put_error.expect_err(&format!("{fault:?}"));
        assert_eq!(kind(&put_error), expected, "{fault:?}: {put_error}");
        let list_error = double.store.list("", None).await.unwrap_err();
        let is_page = matches!(fault, HttpFault::Body(_));
        assert_eq!(kind(&list_error), if is_page { "no store" } else { expected }, "{fault:?}: {list_error}");
        assert!(!put_error.to_string().contains('\n') && !put_error.hint().is_empty());
        double.server.faults().clear();
    }
    put(&double.store, "a", &noise(100, 1)).await.unwrap();
}

#[tokio::test]
async fn a_redirect_names_the_region_and_is_not_followed() {
    let double = double().await;
    let redirect = HttpFault::Headers(301, "x-amz-bucket-region: eu-west-3\r\nlocation: http://192.0.2.1/\r\n");
    double.server.faults().always("", "", redirect);
    let error = double.store.head("a").await.unwrap_err();
    assert!(error.to_string().contains("eu-west-3"), "{error}");
}

#[tokio::test]
async fn one_failure_is_tried_again_and_many_are_not() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    double.server.faults().add("PUT", "/once", 1, 1, HttpFault::Status(500, "InternalError"));
    assert_eq!(put(&double.store, "once", &noise(10, 1)).await.unwrap(), PutOutcome::Created);
    double.server.faults().always("PUT", "/always", HttpFault::Status(500, "InternalError"));
    assert!(put(&double.store, "always", &noise(10, 1)).await.is_err());
    assert_eq!(double.sent("PUT", "/always").len(), 2);
}

#[tokio::test]
async fn a_lost_answer_is_found_out_and_never_a_second_object() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    let bytes = noise(400_000, 2);
    double.server.faults().add("PUT", "/lost", 1, 1, HttpFault::AnswerLost);
    // The second try meets the object of the first; the caller compares and finds its own bytes.
    assert_eq!(put(&double.store, "lost", &bytes).await.unwrap(), PutOutcome::Exists);
    assert!(read(&double.store, "lost").await == bytes);

    double.server.faults().always("PUT", "/gone", HttpFault::AnswerLost);
    let error = put(&double.store, "gone", &bytes).await;
    assert!(matches!(error, Ok(PutOutcome::Exists) | Err(StorageError::Unavailable { .. })), "{error:?}");
}

#[tokio::test]
async fn a_connection_closed_on_the_body_is_asked_for_its_reason() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    double.server.faults().always("PUT", "/a", HttpFault::ResetAfter(100_000));
    let error = put(&double.store, "a", &noise(3_000_000, 1)).await.unwrap_err();
    assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
    double.server.faults().always("HEAD", "", HttpFault::Status(403, ""));
    let error = put(&double.store, "a", &noise(3_000_000, 1)).await.unwrap_err();
    assert!(matches!(error, StorageError::Denied { .. }), "{error:?}");
    double.server.faults().clear();
    assert_eq!(put(&double.store, "a", &noise(3_000_000, 1)).await.unwrap(), PutOutcome::Created);
}

#[tokio::test]
async fn a_silent_store_ends_in_time() {
    let double = double_with(|settings| S3Settings { request_timeout: Duration::from_secs(1), ..settings }).await;
    let started = Instant::now();
    double.server.faults().always("", "", HttpFault::Hang);
    assert!(matches!(double.store.head("a").await, Err(StorageError::Unavailable { .. })));
    assert!(matches!(put(&double.store, "a", &noise(10, 1)).await, Err(StorageError::Unavailable { .. })));
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_slow_answer_is_waited_for() {
    let double = double().await;
    double.server.faults().always("PUT", "", HttpFault::Delay(Duration::from_secs(1)));
    let started = Instant::now();
    assert_eq!(put(&double.store, "a", &noise(10, 1)).await.unwrap(), PutOutcome::Created);
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(double.sent("PUT", "/a").len(), 1);
}

#[tokio::test]
async fn an_answer_that_ends_early_or_is_changed_is_never_content() {
    let double = double().await;
    let bytes = noise(500_000, 3);
    put(&double.store, "a", &bytes).await.unwrap();
    double.server.faults().always("GET", "/a", HttpFault::ShortAnswer(300_000));
    assert!(matches!(double.store.get("a", 1_000_000).await, Err(StorageError::Unavailable { .. })));
    assert!(matches!(double.store.get_range("a", 10, 400_000).await, Err(StorageError::Unavailable { .. })));
    let streamed: Result<Vec<Bytes>, _> = double.store.get_stream("a").await.unwrap().try_collect().await;
    assert!(matches!(streamed, Err(StorageError::Unavailable { .. })));
    double.server.faults().clear();

    double.server.faults().always("GET", "/a", HttpFault::FlipFromEnd(1000));
    let changed = double.store.get("a", 1_000_000).await;
    assert!(matches!(changed, Err(StorageError::Damaged { .. })), "{changed:?}");
    let streamed: Result<Vec<Bytes>, _> = double.store.get_stream("a").await.unwrap().try_collect().await;
    assert!(matches!(streamed, Err(StorageError::Damaged { .. })));
    double.server.faults().clear();
    assert!(read(&double.store, "a").await == bytes);
}

/// A byte now and then kept a read alive for ever.
#[tokio::test]
async fn an_answer_that_trickles_ends_in_time() {
    let double = double_with(|settings| S3Settings { request_timeout: Duration::from_secs(2), ..settings }).await;
    put(&double.store, "a", &noise(500, 3)).await.unwrap();
    double.server.faults().always("GET", "/a", HttpFault::Trickle(Duration::from_millis(100)));
    let started = Instant::now();
    let streamed: Result<Vec<Bytes>, _> = double.store.get_stream("a").await.unwrap().try_collect().await;
    assert!(matches!(streamed, Err(StorageError::Unavailable { .. })), "{streamed:?}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_listing_cut_short_is_an_error() {
    let double = double().await;
    put(&double.store, "a", &Bytes::new()).await.unwrap();
    let listing = |truncated: &str| {
        HttpFault::Body(format!(
            "<?xml version=\"1.0\"?><ListBucketResult><Name>{BUCKET}</Name><KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys>{truncated}\
             <Contents><Key>a</Key><Size>0</Size></Contents></ListBucketResult>"
        ))
    };
    for cut in [
        "<IsTruncated>true</IsTruncated>",
        "",
        // A token that never moves on would go round for ever.
        "<IsTruncated>true</IsTruncated><NextContinuationToken>same</NextContinuationToken>",
    ] {
        double.server.faults().always("GET", "list-type=2", listing(cut));
        let error = double.store.list("", None).await.unwrap_err();
        assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
        let error = double.store.list_folders("").await.unwrap_err();
        assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
        double.server.faults().clear();
    }
    // Neither would two that take turns.
    let token = |token: &str| {
        listing(&format!("<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"))
    };
    double.server.faults().always("GET", "continuation-token=one", token("two"));
    double.server.faults().always("GET", "list-type=2", token("one"));
    let listed = tokio::time::timeout(Duration::from_secs(20), double.store.list("", None)).await.expect("it ends");
    assert!(matches!(listed, Err(StorageError::Unavailable { .. })), "{listed:?}");
    double.server.faults().clear();
    double.server.faults().always("GET", "list-type=2", listing("<IsTruncated>false</IsTruncated>"));
    assert_eq!(double.store.list("", None).await.unwrap().len(), 1);
    // Below another prefix the same answer is nonsense.
    assert!(double.store.list("b/", None).await.is_err());
}

#[tokio::test]
async fn foreign_keys_that_xml_cannot_carry_do_not_hide_the_others() {
    let double = double().await;
    let bad = "<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a\u{1}</Key><Size>0</Size></Contents>";
    let good = "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>\
                <Contents><Key>a%01+b</Key><Size>0</Size></Contents></ListBucketResult>";
    double.server.faults().always("GET", "encoding-type=url", HttpFault::Body(good.to_owned()));
    double.server.faults().always("GET", "list-type=2", HttpFault::Body(bad.to_owned()));
    assert_eq!(double.store.list("", None).await.unwrap()[0].key, "a\u{1} b");
}

#[tokio::test]
async fn a_completion_that_answers_200_with_an_error_is_a_failure() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    let bytes = noise(1000, 4);
    let crc32 = crc32fast::hash(&bytes);
    let upload = double.store.begin_multipart("a").await.unwrap();
    upload.put_part(1, bytes.clone(), crc32).await.unwrap();
    let error = "<?xml version=\"1.0\"?><Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>";
    double.server.faults().always("POST", "uploadId", HttpFault::Body(error.to_owned()));
    assert!(upload.complete(1000, crc32).await.is_err());
    assert_eq!(double.store.head("a").await.unwrap(), None);
    double.server.faults().clear();
    // The parts are still there.
    assert_eq!(upload.complete(1000, crc32).await.unwrap(), PutOutcome::Created);
    assert!(read(&double.store, "a").await == bytes);
}

#[tokio::test]
async fn an_upload_that_the_store_forgot_is_told_as_such() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    let bytes = noise(1000, 4);
    let crc32 = crc32fast::hash(&bytes);
    let upload = double.store.begin_multipart("a").await.unwrap();
    upload.put_part(1, bytes.clone(), crc32).await.unwrap();
    double.server.faults().always("", "uploadId", HttpFault::Status(404, "NoSuchUpload"));
    let part = upload.put_part(2, bytes.clone(), crc32).await;
    assert!(matches!(part, Err(StorageError::UploadGone { .. })), "{part:?}");
    let whole = upload.complete(1000, crc32).await;
    assert!(matches!(whole, Err(StorageError::UploadGone { .. })), "{whole:?}");
}

#[tokio::test]
async fn a_part_carries_its_checksum_and_a_completion_its_condition() {
    let double = double().await;
    let bytes = noise(1000, 5);
    let crc32 = crc32fast::hash(&bytes);
    let upload = double.store.begin_multipart("a").await.unwrap();
    upload.put_part(1, bytes.clone(), crc32).await.unwrap();
    upload.complete(1000, crc32).await.unwrap();
    let part = &double.sent("PUT", "partNumber=1")[0];
    let text = aws_smithy_types::base64::encode(crc32.to_be_bytes());
    assert_eq!(part.header("x-amz-checksum-crc32"), Some(text.as_str()));
    assert_eq!(part.header("content-length"), Some("1000"));
    assert_eq!(part.header("content-encoding"), None);
    assert_eq!(double.sent("POST", "uploadId")[0].header("if-none-match"), Some("*"));
}

#[tokio::test]
async fn a_store_that_echoes_nothing_is_looked_at_after_each_write() {
    let double = double().await;
    double.store.probe("check/").await.unwrap();
    double.server.faults().always("PUT", "", HttpFault::DropAnswerHeader("x-amz-checksum-crc32"));
    assert_eq!(put(&double.store, "a", &noise(1000, 1)).await.unwrap(), PutOutcome::Created);
    assert_eq!(double.sent("HEAD", "/a").len(), 1);
    double.server.faults().always("HEAD", "", HttpFault::DropAnswerHeader("x-amz-checksum-crc32"));
    double.server.faults().forget_requests();
    assert_eq!(put(&double.store, "b", &noise(1000, 2)).await.unwrap(), PutOutcome::Created);
    assert_eq!(double.sent("GET", "/b").len(), 1, "without any checksum the object is read back");
    double.server.faults().always("GET", "/c", HttpFault::FlipFromEnd(10));
    double.server.faults().always("GET", "/c", HttpFault::DropAnswerHeader("x-amz-checksum-crc32"));
    assert!(matches!(put(&double.store, "c", &noise(1000, 3)).await, Err(StorageError::Damaged { .. })));
}

#[tokio::test]
async fn changed_keys_count_at_once_and_wrong_ones_are_denied() {
    let double = double().await;
    let file = double.server.key_folder().join("secret-access-key");
    std::fs::write(&file, "another-secret-canary").unwrap();
    let error = put(&double.store, "a", &noise(10, 1)).await.unwrap_err();
    assert!(matches!(error, StorageError::Denied { .. }), "{error:?}");
    for shown in [
        error.to_string(),
        format!("{error:?}"),
        format!("{:?}", double.store),
        format!("{:?}", double.server.settings()),
    ] {
        assert!(!shown.contains("canary"), "{shown}");
    }
    std::fs::remove_file(&file).unwrap();
    let error = put(&double.store, "a", &noise(10, 1)).await.unwrap_err();
    assert!(matches!(error, StorageError::Denied { .. }), "{error:?}");
    std::fs::write(&file, SECRET_KEY).unwrap();
    assert_eq!(put(&double.store, "a", &noise(10, 1)).await.unwrap(), PutOutcome::Created);
}

#[tokio::test]
async fn a_missing_bucket_and_a_dead_store_are_told_apart() {
    let double = double().await;
    let wrong = S3Settings { bucket: "no-such-bucket".to_owned(), ..double.server.settings() };
    let store = open_s3(wrong).await.unwrap();
    // Writing to it is for moto: `s3s-fs` makes the bucket.
    let error = store.list("", None).await.unwrap_err();
    assert!(matches!(error, StorageError::NoBucket { .. }), "{error:?}");
    let settings = S3Settings { endpoint: Some("http://127.0.0.1:9".to_owned()), ..double.server.settings() };
    let store = open_s3(settings).await.unwrap();
    assert!(matches!(store.head("a").await, Err(StorageError::Unavailable { .. })));
}

#[tokio::test]
async fn the_clock_of_the_store_is_read_from_its_answers() {
    let double = double().await;
    assert_eq!(double.store.clock_skew_seconds(), None);
    let head = "date: Sat, 01 Jan 2022 00:00:00 GMT\r\n";
    double.server.faults().always("HEAD", "", HttpFault::Headers(403, head));
    double.store.head("a").await.unwrap_err();
    assert!(double.store.clock_skew_seconds().unwrap() < -86_400.0);
}

/// A store that overwrites without a word, as some do: the condition is taken out on the way to moto.
#[tokio::test]
async fn a_store_that_ignores_conditions_is_found_out_and_asked_before_each_write() {
    let server = S3Server::start_moto().await;
    server.faults().always("", "", HttpFault::DropHeader("if-none-match"));
    let store = open_s3(server.settings()).await.unwrap();
    let first = noise(1000, 1);
    // Even before the probe, what exists is not overwritten.
    assert_eq!(put(&store, "a", &first).await.unwrap(), PutOutcome::Created);
    assert_eq!(put(&store, "a", &noise(1000, 2)).await.unwrap(), PutOutcome::Exists);
    let abilities = store.probe("check/").await.unwrap();
    assert!(!abilities.conditional_create, "{abilities:?}");
    assert_eq!(put(&store, "a", &noise(1000, 2)).await.unwrap(), PutOutcome::Exists);
    assert!(read(&store, "a").await == first);
    assert_eq!(store.list("check/", None).await.unwrap(), []);

    let missing = open_s3(S3Settings { bucket: "no-such-bucket".to_owned(), ..server.settings() }).await.unwrap();
    for error in [
        put(&missing, "a", &first).await.unwrap_err(),
        missing.probe("check/").await.unwrap_err(),
        missing.list("", None).await.unwrap_err(),
        missing.head("a").await.unwrap_err(),
        missing.get("a", 1).await.unwrap_err(),
        missing.begin_multipart("a").await.err().unwrap(),
    ] {
        assert!(matches!(error, StorageError::NoBucket { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_store_that_does_not_know_conditions_is_written_to_without() {
    let double = double().await;
    // Only while the header is there; the requests after it pass.
    double.server.faults().add("PUT", "/a", 1, 1, HttpFault::Status(501, "NotImplemented"));
    assert_eq!(put(&double.store, "a", &noise(10, 1)).await.unwrap(), PutOutcome::Created);
    let puts = double.sent("PUT", "/a");
    assert_eq!((puts[0].header("if-none-match"), puts.last().unwrap().header("if-none-match")), (Some("*"), None));
    assert_eq!(put(&double.store, "a", &noise(10, 2)).await.unwrap(), PutOutcome::Exists);
}

#[tokio::test]
async fn over_tls_an_own_authority_is_trusted_and_bodies_are_not_hashed_twice() {
    let double = double().await;
    let front = TlsFront::start(double.server.endpoint.trim_start_matches("http://").to_owned()).await;
    let ca_file = double.server.key_folder().join("ca.pem");
    std::fs::write(&ca_file, &front.authority).unwrap();
    let settings = S3Settings { endpoint: Some(front.endpoint.clone()), ..double.server.settings() };

    let trusting = open_s3(S3Settings { ca_file: Some(ca_file), ..settings.clone() }).await.unwrap();
    let content = noise(600_000, 1);
    let file = file_of(&content);
    let sealed = Body::SealedFile { path: file.path().to_owned(), length: 600_000, goes: true };
    assert_eq!(trusting.put_new("a", &sealed, crc32fast::hash(&content)).await.unwrap(), PutOutcome::Created);
    assert_eq!(put(&trusting, "b", &content).await.unwrap(), PutOutcome::Created);
    assert!(read(&trusting, "a").await == content);
    for key in ["/a", "/b"] {
        let request = &double.sent("PUT", key)[0];
        assert_eq!(request.header("x-amz-content-sha256"), Some("UNSIGNED-PAYLOAD"));
        assert_eq!(request.header("content-length"), Some("600000"));
        assert_eq!(request.header("content-encoding"), None);
        assert!(request.header("x-amz-checksum-crc32").is_some());
    }

    double.server.faults().forget_requests();
    let strange = open_s3(settings).await.unwrap();
    let error = strange.head("a").await.unwrap_err();
    assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
    assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
    assert_eq!(double.server.faults().requests().len(), 0, "nothing is sent to a store that cannot prove its name");
}

/// The authority that signs for the store is exchanged under a running agent: the file counts again without a restart (H3 of the
/// failure table).
#[tokio::test]
async fn an_authority_that_was_exchanged_counts_without_a_restart() {
    let double = double().await;
    let upstream = double.server.endpoint.trim_start_matches("http://").to_owned();
    let front = TlsFront::start(upstream.clone()).await;
    let ca_file = double.server.key_folder().join("ca.pem");
    std::fs::write(&ca_file, &front.authority).unwrap();
    let endpoint = front.endpoint.clone();
    let settings = S3Settings { endpoint: Some(endpoint.clone()), ..double.server.settings() };
    let store = open_s3(S3Settings { ca_file: Some(ca_file.clone()), ..settings }).await.unwrap();
    put(&store, "a", &noise(100, 1)).await.unwrap();

    drop(front);
    let front = TlsFront::start_again(&endpoint, upstream).await;
    std::fs::write(&ca_file, &front.authority).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = store.head("a").await {
        assert!(matches!(error, StorageError::Unavailable { .. }), "{error:?}");
        assert!(Instant::now() < deadline, "the new authority was never looked at: {error:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    put(&store, "b", &noise(100, 1)).await.unwrap();
}

#[tokio::test]
async fn wrong_settings_fail_when_opened() {
    let settings = S3Settings::new("bucket");
    for wrong in [
        S3Settings { ca_file: Some("/nonexistent.pem".into()), ..settings.clone() },
        S3Settings { ca_file: Some("/etc/hostname".into()), ..settings.clone() },
        S3Settings { endpoint: Some("ftp://x".to_owned()), ..settings.clone() },
    ] {
        let error = open_s3(wrong).await.unwrap_err();
        assert!(matches!(error, StorageError::Settings { .. }), "{error:?}");
    }
}
