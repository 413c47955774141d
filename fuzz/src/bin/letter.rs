//! Fuzz target: see [`outboard_fuzz::letter`].
#![no_main]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::letter::run(data));
