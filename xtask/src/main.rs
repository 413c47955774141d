//! `cargo xtask`: the project's chores. See `cargo xtask help`.

fn main() {}
