//! Fuzz target: see [`outboard_fuzz::chains`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::chains::run(data));
