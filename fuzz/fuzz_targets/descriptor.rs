//! Fuzz target for the descriptor parser: runs `fuse_tests::fuzz::descriptor`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::descriptor(data));
