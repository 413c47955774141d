//! Fuzz target: see [`outboard_fuzz::conversation`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::conversation::run(data));
