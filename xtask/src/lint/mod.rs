//! Checks of the tree.
pub mod crates;
