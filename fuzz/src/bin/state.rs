//! Fuzz target: see [`outboard_fuzz::state`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::state::run(data));
