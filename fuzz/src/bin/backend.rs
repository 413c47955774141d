//! Fuzz target: see [`outboard_fuzz::backend`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::backend::run(data));
