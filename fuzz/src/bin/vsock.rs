//! Fuzz target: see [`outboard_fuzz::vsock`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::vsock::run(data));
