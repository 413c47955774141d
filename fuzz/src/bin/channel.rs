//! Fuzz target: see [`outboard_fuzz::channel`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::channel::run(data));
