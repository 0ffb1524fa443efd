//! The fuzz targets without a fuzzer: their corpora are replayed and mutated through the same functions, on stable Rust.
//!
//! `WALDEN_TEST_FUZZ_SECONDS` is the time for each target (10), `WALDEN_TEST_SEED` is the seed (1; of the
//! clock's making in the long runs). An input that breaks a
//! parser is kept in a file whose path is printed; once the parser is mended it belongs into `fuzz/corpus/`.

pub mod memory;
mod mutator;
mod parsers;
