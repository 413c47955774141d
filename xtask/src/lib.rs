//! Outboard's own chores, as a library so that the guest tests in `tests/` use the same code as
//! `cargo xtask`.
//!
//! One file per subject. Nothing here is published and no crate of the project depends on it.
//! Invariant: the machine is left as it was found; everything made lies below the target
//! directory (`target/xtask`) and, for downloaded packages, the user's cache directory.

pub mod backend;
pub mod bench;
pub mod cases;
pub mod counts;
pub mod fuzz;
pub mod guards;
pub mod guest;
pub mod judged;
pub mod lint;
pub mod packages;
pub mod paths;
pub mod process;
pub mod skips;
pub mod soak;
pub mod suite;
pub mod summary;
