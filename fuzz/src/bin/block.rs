//! Fuzz target: see [`outboard_fuzz::block`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::block::run(data));
