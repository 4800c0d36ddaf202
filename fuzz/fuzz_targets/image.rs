//! Feeds `fuse_tests::fuzz::image`; see there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::image(data));
