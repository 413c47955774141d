//! Fuzz target: see [`outboard_fuzz::frontend`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::frontend::run(data));
