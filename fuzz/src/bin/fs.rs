//! Fuzz target: see [`outboard_fuzz::fs`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::fs::run(data));
