//! Fuzz target for whole images: runs `fuse_tests::fuzz::image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::fuzz::image(data));
