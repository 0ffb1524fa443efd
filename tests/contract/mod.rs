//! One suite that every store passes: a local directory, S3 as `s3s-fs` does it, S3 as moto does it, and a store wrapped for faults.

mod local;
mod s3_credentials;
mod s3_faults;
mod suite;

use walden::storage::faulty::{FaultPlan, FaultyStore};
use walden::storage::{S3Settings, open_local, open_s3};

use crate::support::s3_double::S3Server;
use suite::Store;

/// The suite as one test per sentence; `$open` gives a guard and the store.
macro_rules! contract {
    ($backend:ident, $open:expr) => {
        mod $backend {
            use super::*;

            contract!(@each $open,
                an_object_is_created_once_and_stays,
                of_racing_writers_one_wins_and_its_bytes_stay,
                bytes_with_another_checksum_are_refused_and_leave_nothing,
                objects_are_read_whole_in_part_and_as_a_stream,
                empty_objects_are_objects,
                files_are_stored_with_what_goes_around_them,
                listings_are_complete_sorted_and_below_their_prefix,
                deleting_is_final_and_may_be_repeated,
                an_object_in_parts_appears_whole_and_once,
                parts_that_are_not_the_whole_are_refused,
                listings_of_many_keys_are_complete,
                what_is_not_a_key_is_refused,
                a_probe_leaves_nothing_behind
            );

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_changed_object_is_not_replaced() {
                let (_guard, store) = $open.await;
                let abilities = store.probe("walden-check/").await.unwrap();
                assert!(abilities.conditional_create && abilities.conditional_update);
                suite::a_changed_object_is_not_replaced(store, true).await;
            }
        }
    };
    (@each $open:expr, $($sentence:ident),*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $sentence() {
                let (_guard, store) = $open.await;
                let abilities = store.probe("walden-check/").await.unwrap();
                assert!(abilities.conditional_create);
                suite::$sentence(store).await;
            }
        )*
    };
}

async fn local() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = open_local(folder.path().join("archive"));
    (folder, store)
}

async fn wrapped() -> (tempfile::TempDir, Store) {
    let (folder, store) = local().await;
    (folder, FaultyStore::new(store, FaultPlan::new()))
}

async fn s3s() -> ((tempfile::TempDir, S3Server), Store) {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start_s3s(folder.path()).await;
    let store = open_s3(S3Settings { prefix: "some/prefix".to_owned(), ..server.settings() }).await.unwrap();
    ((folder, server), store)
}

contract!(on_a_local_directory, local());
contract!(on_s3s, s3s());
contract!(on_a_wrapped_store, wrapped());

#[tokio::test]
async fn a_folder_is_no_object() {
    let (_folder, store) = local().await;
    suite::a_folder_is_no_object(store).await;
}

/// One test, since moto takes seconds to start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moto_passes_the_contract() {
    let server = S3Server::start_moto().await;
    let store = open_s3(server.settings()).await.unwrap();
    let abilities = store.probe("walden-check/").await.unwrap();
    println!("moto: {abilities:?}");
    assert!(abilities.conditional_create && abilities.conditional_update);
    assert!(!abilities.checksums, "moto checks none");
    suite::an_object_is_created_once_and_stays(store.clone()).await;
    suite::of_racing_writers_one_wins_and_its_bytes_stay(store.clone()).await;
    suite::bytes_with_another_checksum_are_refused_and_leave_nothing(store.clone()).await;
    suite::objects_are_read_whole_in_part_and_as_a_stream(store.clone()).await;
    suite::a_folder_is_no_object(store.clone()).await;
    suite::empty_objects_are_objects(store.clone()).await;
    suite::files_are_stored_with_what_goes_around_them(store.clone()).await;
    suite::listings_are_complete_sorted_and_below_their_prefix(store.clone()).await;
    suite::deleting_is_final_and_may_be_repeated(store.clone()).await;
    suite::an_object_in_parts_appears_whole_and_once(store.clone()).await;
    suite::parts_that_are_not_the_whole_are_refused(store.clone()).await;
    suite::what_is_not_a_key_is_refused(store.clone()).await;
    suite::a_probe_leaves_nothing_behind(store.clone()).await;
    suite::a_changed_object_is_not_replaced(store.clone(), true).await;
    suite::listings_of_many_keys_are_complete(store).await;
}
