//! Feeds `fuse_tests::fuzz::header`; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::header(data));
