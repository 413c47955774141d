//! The `outboard` program.
fn main() {}
