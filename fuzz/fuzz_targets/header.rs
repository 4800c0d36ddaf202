//! Fuzz target for the header parser: runs `fuse_tests::fuzz::header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::header(data));
