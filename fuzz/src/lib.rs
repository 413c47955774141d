//! The bodies of the fuzz targets. Each takes bytes of the fuzzer as a script of what a hostile
//! peer does, plays it against one part of Outboard, and panics when something that must hold does
//! not. What was reached is printed once per process as a line `cover: …`: `cargo xtask fuzz`
//! compares these lines with what has to be reached.

pub mod backend;
pub mod block;
pub mod chains;
pub mod channel;
pub mod console;
pub mod conversation;
pub mod cover;
pub mod decoder;
pub mod frontend;
pub mod fs;
pub mod input;
#[cfg(fuzzing)]
pub mod letter;
pub mod net;
pub mod packed;
pub mod rig;
pub mod state;
pub mod vsock;
