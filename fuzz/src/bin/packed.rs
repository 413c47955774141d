//! Fuzz target: see [`outboard_fuzz::packed`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::packed::run(data));
