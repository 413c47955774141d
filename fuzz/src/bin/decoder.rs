//! Fuzz target: see [`outboard_fuzz::decoder`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::decoder::run(data));
