//! Fuzz target: see [`outboard_fuzz::net`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| outboard_fuzz::net::run(data));
