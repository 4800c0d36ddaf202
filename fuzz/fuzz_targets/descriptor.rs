//! Feeds `fuse_tests::fuzz::descriptor`; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::descriptor(data));
