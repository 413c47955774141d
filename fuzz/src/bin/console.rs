//! Fuzz target: see [`outboard_fuzz::console`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::console::run(data));
