//! A shared directory, driven by our front-end with requests of FUSE (virtio 1.3 §5.11).
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
#![expect(clippy::indexing_slicing, reason = "tests know their sizes")]

mod driver;
mod files;
mod hostile;
mod state;
mod window;

#[path = "../rig/mod.rs"]
mod rig;
